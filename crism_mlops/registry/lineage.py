"""Both ways along a model's origin: from a version to the observations that it learned from, and from an observation
to every model that saw it.

A study's scenes are one list on its own run, the same for all its trials; studies of the same scenes are read once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from crism_mlops.errors import TrackingAwayError, TrackingError, one_line
from crism_mlops.registry.observations import Observation, study_scenes, with_models
from crism_mlops.reports.record import read_json, read_study
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_data import DataSet
from crism_mlops.tracking_lineage import checkpoint_card, data_of, experiment_of, experiments, is_deleted, runs_with
from crism_mlops.tracking_registry import Registry, Version

DIGESTS = ("data_digest", "inputs_digest", "scenes_digest", "test_digest", "config_digest")
_RUN_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class ModelLineage:
    """Where a model comes from. run: the trial; study: its study's run, None where it was deleted; versions: those
    registered of it; code: commit, dirty, versions of libraries; digests: by name; weights: what training began with
    (base) and the SHA-256 of the checkpoint's files; lacking: what cannot be had, a sentence each."""

    experiment: str
    run: RunInfo
    study: RunInfo | None
    versions: tuple[Version, ...]
    code: dict[str, Any]
    digests: dict[str, str]
    data_sets: tuple[DataSet, ...]
    observations: tuple[Observation, ...]
    weights: dict[str, Any]
    lacking: tuple[str, ...]

    def of(self, split: str) -> list[Observation]:
        """The observations of a split."""
        return [one for one in self.observations if one.split == split]


@dataclass(frozen=True, slots=True)
class Use:
    """A study that an observation is part of: its experiment, the split, the finished trials that have a model with
    their versions, the registered ones first, and what the study's audit noted of the observation. Of a version whose
    run or study was deleted its checkpoint tells, which knows scenes of training and validation."""

    experiment: str
    study: str
    observation: Observation
    models: tuple[tuple[RunInfo, tuple[Version, ...]], ...]
    audit: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ObservationLineage:
    """Every study that has an observation, oldest first; unread: studies of which nobody knows the scenes."""

    observation_id: str
    uses: tuple[Use, ...]
    unread: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class DigestLineage:
    """The runs that carry a digest: which one it is, in full, the experiment, the run, its versions."""

    begin: str
    found: tuple[tuple[str, str, str, RunInfo, tuple[Version, ...]], ...]


def trace(tracker: Tracker, what: str, everywhere: bool = True) -> ModelLineage | ObservationLineage | DigestLineage:
    """The lineage of a version (models:/NAME/3, NAME@champion), a run (id or name), a study's best trial, an
    observation (its id, or a beginning that only one has), or a digest (six digits of it at least).

    `everywhere`: in all experiments of the store, the tracker's first; else in that alone, but a version and a run's id
    are found in any case. Raises TrackingError for what is none of these, a name that several other experiments have,
    or the beginning of several observations.
    """
    trackers = _trackers(tracker, everywhere)
    if (own := run_of(tracker, what)) is not None:
        return model_lineage(tracker, own)
    hits = [(one, run) for one in trackers[1:] if (run := run_of(one, what)) is not None]
    if len(hits) > 1:
        where = ", ".join(one.experiment for one, _ in hits)
        raise TrackingError(f"{what!r} stands in several experiments, {where}: say in which with --experiment")
    if hits:
        return model_lineage(*hits[0])
    seen = observation_lineage(trackers, what)
    if seen is not None:
        return seen
    found = digest_lineage(trackers, what)
    if found.found:
        return found
    where = "any experiment" if everywhere else f"experiment {tracker.experiment!r}"
    more = "" if everywhere else "; without --experiment all are looked in"
    raise TrackingError(
        f"{what!r} is no version, run, study, observation or digest in {where}{more}; registered models are "
        f"{', '.join(Registry(tracker).names()) or 'none'}; crism-mlops status lists the runs"
    )


def run_of(tracker: Tracker, what: str) -> RunInfo | None:
    """The run that a version, a study, a run's id or name means; None for what is none of these."""
    if what.startswith("models:/") or "@" in what:
        return tracker.run(_run_of_version(tracker, what.removeprefix("models:/")))
    if tracker.find(crism_study=what):
        best = read_study(tracker, what, None).best
        if best is None:
            raise TrackingError(f"study {what!r} has no finished trial yet; name a run, or run more trials")
        return best
    runs = tracker.find(mlflow_runName=what)
    finished = [r for r in runs if r.status == "FINISHED"] or runs
    if len(finished) > 1 and any(r.kind == "trial" for r in finished):
        ids = ", ".join(r.run_id for r in finished[:4])
        raise TrackingError(f"{what!r} is the name of {len(finished)} runs; give an id: {ids}")
    if finished:
        return finished[-1]
    if not _RUN_ID.fullmatch(what):
        return None
    try:
        return tracker.run(what)
    except TrackingError as error:
        # As many digits as a run's id has, and none of a run's.
        if getattr(error.__cause__, "error_code", "") == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _run_of_version(tracker: Tracker, name: str) -> str:
    registry = Registry(tracker)
    model, at, alias = name.partition("@")
    if not at:
        model, slash, alias = name.partition("/")
        if not slash:
            return tracker.run_of_model(f"models:/{name}")
    version = registry.by_alias(model, alias) if at else registry.version(model, alias)
    if version is None:
        known = [f"{v.number}{''.join(f' @{a}' for a in v.aliases)}" for v in registry.versions(model)]
        raise TrackingError(
            f"no version {name!r}; {model} has {', '.join(known)}" if known else
            f"no registered model {model!r}; there are {', '.join(registry.names()) or 'none'}"
        )  # fmt: skip
    return version.run_id


def model_lineage(tracker: Tracker, run: RunInfo) -> ModelLineage:
    """All that is known of a run's origin."""
    lacking = []
    parent = run.tags.get("mlflow.parentRunId")
    study = None
    if parent is None:
        lacking.append("the run is of no study")
    else:
        try:
            study = tracker.run(parent)
        except TrackingError as error:
            lacking.append(f"its study's run is gone ({one_line(error)})")
    model_id = run.tags.get("crism.model_id")
    card = None if model_id is None else checkpoint_card(tracker, model_id)
    if card is None:
        lacking.append("no checkpoint: " + ("the run logged no model" if model_id is None else "its files are gone"))
    scenes = None if study is None else study_scenes(tracker, study, card, run)
    if scenes is None:
        lacking.append("nobody wrote down which observations it saw")
    elif any(one.content is None for one in scenes):
        lacking.append("digests of single observations: the study is of an older version")
    about, why = read_json(tracker, study, "environment.json")
    if about is None:
        lacking.append(f"versions of libraries: {why}")
    params = {**(study.params if study else {}), **run.params}
    commit = params.get("git_commit") or (about or {}).get("commit") or "unknown"
    digests = {key: params[key] for key in DIGESTS if key in params}
    if card and card.get("filters_digest"):
        digests["filters_digest"] = str(card["filters_digest"])
    return ModelLineage(
        experiment=experiment_of(tracker, run.run_id),
        run=run,
        study=study,
        versions=tuple(Registry(tracker).versions_of_run(run.run_id)),
        code={"commit": commit.removesuffix("+dirty"), "dirty": commit.endswith("+dirty"),
              "versions": (about or {}).get("versions", {})},
        digests=digests,
        data_sets=tuple(data_of(tracker, run.run_id)),
        observations=scenes or (),
        weights=_weights(card),
        lacking=tuple(lacking),
    )  # fmt: skip


def _weights(card: dict[str, Any] | None) -> dict[str, Any]:
    """What the model began with, by its name in the configuration, and the digests of what it is now."""
    if card is None:
        return {}
    model = card.get("config", {}).get("model", {})
    names = ("pretrained", "vae", "input_vae", "encoder", "encoder_weights")
    files = {name: digest for name, digest in card.get("files", {}).items() if name.endswith(".safetensors")}
    return {"base": {name: model[name] for name in names if model.get(name) is not None}, "files": files}


def observation_lineage(trackers: Sequence[Tracker], begin: str) -> ObservationLineage | None:
    """Every study that has the observation that `begin` means; None where there is none. Raises TrackingError where it
    is the beginning of several."""
    wanted = begin.casefold()
    lists: dict[str, tuple[Observation, ...] | None] = {}
    hits: list[tuple[Tracker, RunInfo, Observation]] = []
    unread = []
    for tracker in trackers:
        for study in tracker.find(crism_kind="study"):
            key = study.params.get("scenes_digest", study.run_id)
            if lists.get(key) is None:
                lists[key] = study_scenes(tracker, study)
            scenes = lists[key]
            if scenes is None:
                unread.append(study.name)
            hits += [(tracker, study, s) for s in scenes or () if s.observation_id.casefold().startswith(wanted)]
    ids = sorted({s.observation_id for _, _, s in hits})
    if wanted in [i.casefold() for i in ids]:
        ids = [i for i in ids if i.casefold() == wanted]
    if len(ids) > 1:
        more = f" and {len(ids) - 6} more" if len(ids) > 6 else ""
        raise TrackingError(f"{begin!r} is the beginning of {len(ids)} observations: {', '.join(ids[:6])}{more}")
    versions = _by_run(Registry(trackers[0]).versions())
    uses = [_use(t, study, s, versions) for t, study, s in hits if ids and s.observation_id == ids[0]]
    listed = {run.run_id for use in uses for run, _ in use.models}
    # A study's or a trial's run that was deleted takes no version out of the registry.
    for of_run in [of for run_id, of in versions.items() if run_id not in listed]:
        found = _of_version(trackers, of_run, ids[0] if ids else wanted)
        if isinstance(found, Use):
            uses.append(found)
        elif found:
            unread.append(found)
    if not uses:
        return None
    return ObservationLineage(uses[0].observation.observation_id, tuple(uses), tuple(unread))


def _of_version(trackers: Sequence[Tracker], versions: tuple[Version, ...], identity: str) -> Use | str | None:
    """The use of an observation that a registered version's own checkpoint tells of; what it cannot tell of, in words;
    None where its run stands and its study answers for it, or it did not see it."""
    version, tracker = versions[0], trackers[0]
    gone = f"{version.name} version {version.number}, of which run or checkpoint is gone,"
    try:
        run, experiment = tracker.run(version.run_id), experiment_of(tracker, version.run_id)
        runs = (version.run_id, run.tags.get("mlflow.parentRunId", ""))
        if experiment not in [one.experiment for one in trackers] or not any(is_deleted(tracker, r) for r in runs):
            return None
        card = checkpoint_card(tracker, version.tags.get("crism.model_id") or run.tags.get("crism.model_id", ""))
    except TrackingAwayError:
        raise
    except TrackingError:
        return gone
    split_of = None if card is None else card.get("seen")
    if not isinstance(split_of, dict):
        return gone
    for split, seen in split_of.items():
        for one in seen:
            if str(one).casefold() == identity.casefold():
                study = run.tags.get("crism.study", "?")
                return Use(experiment, study, Observation(str(one), split, False), ((run, versions),), ())
    return None


def _use(tracker: Tracker, study: RunInfo, one: Observation, versions: dict[str, tuple[Version, ...]]) -> Use:
    name = study.tags.get("crism.study", study.name)
    trials = [(r, versions.get(r.run_id, ())) for r in with_models(tracker, name)]
    trials = [(r, of) for r, of in trials if r.tags.get("mlflow.parentRunId", study.run_id) == study.run_id]
    audit, _ = read_json(tracker, study, "audit.json")
    said = [
        f"{f['check']}: {f['finding']}" for f in (audit or {}).get("findings", ())
        if f.get("verdict") != "ok" and one.observation_id in f.get("scenes", ())
    ]  # fmt: skip
    return Use(tracker.experiment, name, one, tuple(sorted(trials, key=lambda t: not t[1])), tuple(said))


def digest_lineage(trackers: Sequence[Tracker], begin: str) -> DigestLineage:
    """Runs that carry a digest which begins so; of fewer than six digits none."""
    begin = begin.lower()
    if not re.fullmatch(r"[0-9a-f]{6,64}", begin):
        return DigestLineage(begin, ())
    versions = _by_run(Registry(trackers[0]).versions())
    found = [
        (key, run.params[key], tracker.experiment, run, versions.get(run.run_id, ()))
        for tracker in trackers for key in DIGESTS for run in runs_with(tracker, key, begin)
    ]  # fmt: skip
    return DigestLineage(begin, tuple(found))


def _by_run(versions: Iterable[Version]) -> dict[str, tuple[Version, ...]]:
    found: dict[str, tuple[Version, ...]] = {}
    for version in versions:
        found[version.run_id] = (*found.get(version.run_id, ()), version)
    return found


def _trackers(tracker: Tracker, everywhere: bool) -> list[Tracker]:
    if not everywhere:
        return [tracker]
    others = [name for name in experiments(tracker) if name != tracker.experiment]
    return [tracker, *(Tracker(tracker.uri, name, create=False) for name in others)]
