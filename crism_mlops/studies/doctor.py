"""Before a study: what a trial will need, what this machine has, and whether that is enough.

Nothing is built, downloaded or trained, and no database is opened.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.build import check_data
from crism_mlops.dataset.count import SceneCount, count_scenes, simulation_of
from crism_mlops.dataset.variants import channels
from crism_mlops.errors import CrismError
from crism_mlops.evaluation.lpips_weights import weights_here
from crism_mlops.models.blueprint import Blueprint, blueprint, pretrained
from crism_mlops.models.weights import Pretrained
from crism_mlops.scenes.build import open_store
from crism_mlops.studies import needs, verdicts
from crism_mlops.studies.machine import Machine, look, speed
from crism_mlops.studies.needs import Case, Memory, Need, Time
from crism_mlops.studies.verdicts import Disk, Verdict
from crism_mlops.tracking import DEFAULT_ROOT, artifact_folder, default_tracking_uri

Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Report:
    """What `examine` found. memory, time: of the choices that take the most of it, which are named; blueprint:
    the model of those that take the most memory; speed: operations a second that a matrix product reached
    here. None where it is not known."""

    study: str
    trials: int
    machine: Machine
    scenes: SceneCount | None
    sources: tuple[Pretrained, ...]
    blueprint: Blueprint | None = None
    memory: Memory | None = None
    memory_choices: dict[str, Any] = field(default_factory=dict)
    time: Time | None = None
    time_choices: dict[str, Any] = field(default_factory=dict)
    speed: float | None = None
    disks: tuple[Disk, ...] = ()
    verdicts: tuple[Verdict, ...] = ()

    @property
    def fits(self) -> bool:
        """Whether nothing is known that will surely fail."""
        return all(verdict.level != "fails" for verdict in self.verdicts)

    def as_json(self) -> dict[str, Any]:
        """All of it: sizes in bytes, operations as counts."""
        return {"fits": self.fits, **asdict(self)}


def examine(sweep: SweepConfig) -> Report:
    """Look at everything that a study of this configuration needs; what is wrong becomes a verdict."""
    said: list[Verdict] = []

    def tried(about: str, look_at: Callable[[], Found]) -> Found | None:
        try:
            return look_at()
        except CrismError as error:
            said.append(Verdict("fails", about, str(error)))
            return None

    machine = look(sweep.device)
    tried("data", lambda: check_data(sweep.data))
    scenes = tried("data", lambda: count_scenes(sweep.data, sweep.split))
    found, problems = needs.cases(sweep)
    said += [Verdict("warning", "search", words) for words in problems]
    sources: dict[str, Pretrained] = {}
    models: dict[Any, Blueprint | None] = {}
    for case in found:
        if (key := needs.key_of(case.config, machine.device)) in models:
            continue
        loaded = tried("model", partial(_pretrained, case.config))
        sources |= {one.source: one for one in loaded or ()}
        models[key] = None if loaded is None else tried("model", partial(_count, case.config, machine.device))
    found = [replace(case, blueprint=models[needs.key_of(case.config, machine.device)]) for case in found]
    said += [verdicts.of_files(source) for source in sources.values()]
    said += [
        Verdict("warning", "model", f"a step cannot be counted, and may fail: {model.work.problem}")
        for model in models.values()
        if model is not None and model.work.problem is not None
    ]
    report = Report(sweep.study, sweep.budget.trials, machine, scenes, tuple(sources.values()))
    if found:
        # Without scenes, what the model alone needs.
        counted = scenes or SceneCount(0, 0, 0, 0)
        disks = tried("disk", partial(_disks, sweep, found, counted))
        report = replace(_with_needs(report, found, counted), disks=disks or ())
    if report.memory is not None:
        said += verdicts.of_memory(report.memory, report.memory_choices, sweep, machine)
    said += [verdicts.of_disk(disk) for disk in report.disks]
    said += verdicts.of_machine([case.config for case in found], machine, weights_here())
    return replace(report, verdicts=tuple(dict.fromkeys(said)))


def _with_needs(report: Report, found: Sequence[Case], scenes: SceneCount) -> Report:
    def held(case: Case) -> float:
        memory = needs.memory(case, scenes)
        return 0.0 if memory is None else memory.likely

    def busy(case: Case) -> float:
        time = needs.time(case, scenes)
        counted = None not in (time.training, time.validating)
        return (time.training or 0) + (time.validating or 0) if counted else time.steps_per_epoch * time.epochs

    largest, of_memory = needs.worst(found, held)
    longest, of_time = needs.worst(found, busy)
    half = needs.in_half(longest.config, report.machine.device)
    return replace(
        report,
        blueprint=largest.blueprint,
        memory=needs.memory(largest, scenes),
        memory_choices=of_memory,
        time=needs.time(longest, scenes) if scenes.train else None,
        time_choices=of_time,
        speed=speed(report.machine.device, half) if scenes.train else None,
    )


def _pretrained(config: RunConfig) -> list[Pretrained]:
    return pretrained(config.model, channels(config.data.variant))


def _count(config: RunConfig, device: str) -> Blueprint | None:
    half = needs.in_half(config, device)
    return blueprint(config.model, channels(config.data.variant), config.data.resolution, config.engine, half)


def _disks(sweep: SweepConfig, found: Sequence[Case], scenes: SceneCount) -> tuple[Disk, ...]:
    """The needs by the file system that they fall on; those on a tracking server's are not looked at."""
    wanted = [needs.built(scenes), *needs.disk(sweep, found, scenes)]
    if sweep.data.source == "simulated":
        wanted.insert(0, needs.simulated(simulation_of(sweep.data).bytes))
    store = open_store(sweep.data).folder
    places: dict[str, Path | None] = {
        "simulated observations": Path(sweep.data.cache).expanduser() / simulation_of(sweep.data).folder_name,
        "scenes": store,
        "samples": store / "samples",
        "latents": store / "latents",
        "prompt embeddings": store / "prompts",
        "copy while it is logged": Path(tempfile.gettempdir()),
        "logged models": artifact_folder(default_tracking_uri(), sweep.experiment),
    }
    # What lies there is not what is still to be written: built scenes, other programs' files, another epoch.
    anew = ("scenes", "copy while it is logged", "best epochs")
    rows: dict[int, list[tuple[Need, str, int]]] = {}
    free: dict[int, int] = {}
    for need in wanted:
        place = places.get(need.what, DEFAULT_ROOT / "work" / sweep.study)
        if place is None or need.most == 0:
            continue
        place = place.absolute()
        parent = next(p for p in (place, *place.parents) if p.exists())
        system = parent.stat().st_dev
        free[system] = shutil.disk_usage(parent).free
        shown = place.relative_to(Path.cwd()) if place.is_relative_to(Path.cwd()) else place
        rows.setdefault(system, []).append((need, str(shown), 0 if need.what in anew else _size(place)))
    return tuple(Disk(free[system], tuple(one)) for system, one in rows.items())


def _size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += (Path(place) / name).stat().st_size
            except OSError:
                continue  # Removed meanwhile.
    return total
