"""crism-mlops lineage: where a model comes from, and which models saw an observation."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from crism_mlops.terminal import AsJson, Storage, TrackingUri, console, print_json

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.tree import Tree

    from crism_mlops.registry.lineage import DigestLineage, ModelLineage, ObservationLineage
    from crism_mlops.tracking import RunInfo, Tracker
    from crism_mlops.tracking_registry import Version

_ROLES = {"train": "trained on it", "validation": "chosen by it", "test": "tested on it"}
# What a terminal shows: ids of a split, models of a study (those that are registered first); --json has all.
_SHOWN, _MODELS = 5, 12


def lineage(
    what: Annotated[
        str,
        typer.Argument(help="NAME@ALIAS, models:/NAME/3, a run, a study (its best trial), an observation or a digest"),
    ],
    experiment: Annotated[
        str, typer.Option("--experiment", help="look in this MLflow experiment alone; default: in all of the store")
    ] = "",
    tracking_uri: TrackingUri = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """From a model to its code, configuration and observations; from an observation to every model that saw it.

    Example: crism-mlops lineage FRT0000643D
    """
    from crism_mlops.registry.lineage import DigestLineage, ModelLineage, trace

    found = trace(_tracker(what, experiment, tracking_uri, storage), what, everywhere=not experiment)
    if as_json:
        print_json(plain(found))
    elif isinstance(found, ModelLineage):
        console().print(_model_tree(found))
    elif isinstance(found, DigestLineage):
        console().print(_digest_tree(found))
    else:
        console().print(_observation_tree(found))


def _tracker(what: str, experiment: str, tracking_uri: str | None, storage: str | None) -> Tracker:
    """That of the experiment, or of the one that a study of this name is of; else any will do to begin with."""
    from crism_mlops.errors import CrismError
    from crism_mlops.reports.record import tracker_of
    from crism_mlops.tracking_registry import any_tracker

    if experiment:
        return tracker_of(tracking_uri, experiment, what, storage)
    try:
        return tracker_of(tracking_uri, None, what, storage)
    except CrismError:
        return any_tracker(tracking_uri)


def plain(found: ModelLineage | ObservationLineage | DigestLineage) -> dict[str, Any]:
    """A lineage as plain data, complete."""
    from crism_mlops.registry.lineage import DigestLineage, ModelLineage

    if isinstance(found, ModelLineage):
        return _plain_model(found)
    if isinstance(found, DigestLineage):
        runs = [
            {"digest": key, "value": value, "experiment": experiment, **_plain_run(run, versions)}
            for key, value, experiment, run, versions in found.found
        ]
        return {"kind": "digest", "begin": found.begin, "runs": runs}
    uses = [
        {"experiment": use.experiment, "study": use.study, "split": use.observation.split,
         "balanced": use.observation.balanced, "content": use.observation.content,
         "made_of": use.observation.made_of, "audit": list(use.audit),
         "models": [_plain_run(run, versions) for run, versions in use.models]}
        for use in found.uses
    ]  # fmt: skip
    return {"kind": "observation", "id": found.observation_id, "uses": uses, "unread": list(found.unread)}


def _plain_model(found: ModelLineage) -> dict[str, Any]:
    from crism_mlops.registry.observations import SPLITS

    study = found.study
    return {
        "kind": "model",
        "experiment": found.experiment,
        **_plain_run(found.run, found.versions),
        "study": None if study is None else {"name": study.tags.get("crism.study"), "run_id": study.run_id},
        "trial": found.run.tags.get("crism.trial_number"),
        "seed": found.run.params.get("seed"),
        "code": found.code,
        "digests": found.digests,
        "data_sets": [
            {"name": one.name, "context": one.context, "digest": one.digest, "source": json.loads(one.source or "null"),
             **json.loads(one.profile or "{}")}
            for one in found.data_sets
        ],
        "observations": {
            split: [
                {"id": one.observation_id, "content": one.content, "made_of": one.made_of,
                 **({"balanced": one.balanced} if split == "test" else {})}
                for one in found.of(split)
            ]
            for split in SPLITS
        },
        "weights": found.weights,
        "lacking": list(found.lacking),
    }  # fmt: skip


def _plain_run(run: RunInfo, versions: Sequence[Version]) -> dict[str, Any]:
    return {
        "run": run.name,
        "run_id": run.run_id,
        "run_kind": run.kind,
        "status": run.status,
        "model_id": run.tags.get("crism.model_id"),
        "versions": [{"name": v.name, "version": v.number, "aliases": list(v.aliases)} for v in versions],
    }


def _model_tree(found: ModelLineage) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    from crism_mlops.registry.observations import SPLITS

    run, study, code = found.run, found.study, found.code
    tree = Tree(f"[bold]{escape(_named(found.versions) or 'not registered')}[/]")
    branch = tree.add(
        f"{run.kind} [bold]{escape(run.name)}[/], run {run.run_id}, experiment {escape(found.experiment)}"
    )
    if study is not None:
        number = run.tags.get("crism.trial_number", "-")
        branch = branch.add(f"study [bold]{escape(study.name)}[/], trial {number}, run {study.run_id}")
    dirty = ", with files that differ from it" if code["dirty"] else ""
    branch.add(f"code: commit {code['commit']}{dirty}")
    branch.add(f"configuration {found.digests.get('config_digest', '?')}, seed {run.params.get('seed', '?')}")
    base = found.weights.get("base", {})
    if base:
        weights = branch.add(f"weights, begun with {escape(', '.join(f'{k} {v}' for k, v in base.items()))}")
        for name, digest in found.weights["files"].items():
            weights.add(f"{escape(name)}: sha256 {digest[:16]}")
    named = ", ".join(f"{k.removesuffix('_digest')} {v}" for k, v in found.digests.items() if k != "config_digest")
    data = branch.add(f"digests: {named or 'none'}")
    sets: dict[str, str] = {one.context: one.name for one in found.data_sets}
    for split in SPLITS:
        scenes = found.of(split)
        name = sets.get("training" if split == "train" else split, "of no name")
        balanced = sum(one.balanced for one in scenes)
        more = f", {balanced} of them balanced" if balanced else ""
        part = data.add(f"{split}: {escape(name)}, {len(scenes)} observations{more}")
        for one in scenes[:_SHOWN]:
            part.add(escape(one.observation_id) + (f", content {one.content}" if one.content else ""))
        if len(scenes) > _SHOWN:
            part.add(f"and {len(scenes) - _SHOWN} more; --json lists them")
    for line in found.lacking:
        tree.add(f"[yellow]missing[/]: {escape(line)}")
    return tree


def _observation_tree(found: ObservationLineage) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"observation [bold]{escape(found.observation_id)}[/]")
    for use in found.uses:
        one = use.observation
        role = _ROLES[one.split] + (" (balanced)" if one.balanced else "")
        count = len(use.models)
        words = f"{count} model{'' if count == 1 else 's'} {role}"
        branch = tree.add(f"study [bold]{escape(use.study)}[/], experiment {escape(use.experiment)}: {words}")
        # Every registered one, whatever the number.
        shown = max(_MODELS, sum(bool(versions) for _, versions in use.models))
        for run, versions in use.models[:shown]:
            registered = _named(versions)
            branch.add(escape(run.name) + (f": [bold]{escape(registered)}[/]" if registered else ""))
        if count > shown:
            branch.add(f"and {count - shown} more; --json lists them")
        for line in use.audit:
            branch.add(f"[yellow]audit[/] {escape(line)}")
    for name in found.unread:
        tree.add(f"[yellow]missing[/]: nobody wrote down which scenes {escape(name)} has")
    return tree


def _digest_tree(found: DigestLineage) -> Tree:
    from rich.markup import escape
    from rich.tree import Tree

    tree = Tree(f"digest [bold]{found.begin}[/]")
    branches: dict[tuple[str, str], Tree] = {}
    for key, value, experiment, run, versions in found.found:
        if (key, value) not in branches:
            branches[key, value] = tree.add(f"{key} {value}")
        registered = _named(versions)
        words = f"{run.kind} {run.name}, run {run.run_id}, experiment {experiment}"
        branches[key, value].add(escape(words) + (f": [bold]{escape(registered)}[/]" if registered else ""))
    return tree


def _named(versions: Sequence[Version]) -> str:
    return ", ".join(f"{v.name} version {v.number}{''.join(f' @{alias}' for alias in v.aliases)}" for v in versions)
