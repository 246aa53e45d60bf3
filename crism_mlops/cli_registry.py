"""crism-mlops promote, rollback, history, verify: who is champion, and why."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from crism_mlops.registry import MODEL_NAME
from crism_mlops.terminal import AsJson, Progress, TrackingUri, print_json, print_table

if TYPE_CHECKING:
    from crism_mlops.config import PromotionConfig
    from crism_mlops.registry.gates import Gate
    from crism_mlops.registry.promote import Promotion
    from crism_mlops.registry.verify import Check
    from crism_mlops.tracking import Tracker

DEFAULT_EXPERIMENT = "crism"
# A refused promotion, or a version that is not what it was: nothing went wrong, the answer is no.
REFUSED = 3
Experiment = Annotated[str, typer.Option("--experiment", help="the MLflow experiment that the studies share")]
Name = Annotated[str, typer.Option("--name", help="the registered model")]


def promote(
    what: Annotated[
        str | None, typer.Argument(metavar="[STUDY|RUN]", help="a study or a trial; without it, the experiment's best")
    ] = None,
    alias: Annotated[str, typer.Option("--alias", help="champion or challenger")] = "champion",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the gates, change nothing")] = False,
    override: Annotated[
        str | None, typer.Option("--override", metavar="REASON", help="promote though a gate refuses; it is on record")
    ] = None,
    policy: Annotated[
        Path | None,
        typer.Option("--policy", help="a YAML file with a section promotion; default: that of the candidate's study"),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(help="promote this input variant; rect goes under a name of its own")
    ] = None,
    experiment: Experiment = DEFAULT_EXPERIMENT,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Hold a model against its gates, register it and give it the alias champion.

    Exit code 3: a gate refused it, and nothing has changed. Promoting the champion again is no change, exit code 0.

    Example: crism-mlops promote --experiment crism-quickstart --dry-run
    """
    from crism_mlops.registry.promote import document
    from crism_mlops.registry.promote import promote as promote_best
    from crism_mlops.tracking import Tracker

    preset = os.environ.get("MLFLOW_TRACKING_URI")
    rules = None if policy is None else _policy(policy)
    tracker = Tracker(tracking_uri, experiment, create=False)
    progress = Progress()
    done = promote_best(
        tracker, what, variant=variant, alias=alias, dry_run=dry_run, override=override, policy=rules, say=progress.live
    )
    if as_json:
        print_json(document(done))
    else:
        _print_promotion(done, tracker, preset)
    if done.outcome == "refused":
        raise typer.Exit(REFUSED)


def _print_promotion(done: Promotion, tracker: Tracker, preset: str | None) -> None:
    from crism_mlops.tracking import shown

    if done.decision is not None:
        _print_gates(done.decision.gates, f"{done.candidate.run.name} for {done.name}@{done.alias}")
    held = f"{done.name} version {done.version} is {done.alias}: {done.candidate.run.name}; {done.reason}"
    if done.outcome == "refused":
        typer.echo(f"refused: {done.candidate.run.name} is not {done.alias}; {done.reason}")
        for gate in done.decision.refusing if done.decision else ():
            typer.echo(f"  {gate.name}: {gate.fix}")
        return
    if done.outcome == "accepted":
        typer.echo(f"dry run, nothing changed: {done.candidate.run.name} would be {done.alias}; {done.reason}")
        return
    typer.echo(f"{'promoted' if done.changed else 'unchanged'}: {held}")
    # Left to itself, the command looks into a store of its own.
    store = "" if tracker.uri == (preset or "sqlite:///mlruns/mlflow.db") else f" --tracking-uri {shown(tracker.uri)}"
    typer.echo(f"serve it: crism-mlops serve --model models:/{done.name}@{done.alias}{store}")


def _print_gates(gates: tuple[Gate, ...], title: str) -> None:
    from rich.text import Text

    styles = {"passed": "green", "failed": "bold red", "warning": "yellow"}
    print_table(
        title, ("gate", "level", "verdict", "found", "expected"),
        [(g.name, g.level, Text(g.verdict, styles.get(g.verdict, "")), g.figure, g.expected) for g in gates],
    )  # fmt: skip


def _policy(path: Path) -> PromotionConfig:
    """The section promotion of a file. Raises ConfigError."""
    from pydantic import ValidationError

    from crism_mlops.config import PromotionConfig
    from crism_mlops.config_text import explain, read_yaml
    from crism_mlops.errors import ConfigError

    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); give a YAML file with a section promotion") from error
    if not isinstance(content, dict) or not isinstance(content.get("promotion"), dict):
        raise ConfigError(f"{path}: no section promotion; e.g. promotion: {{gates: {{linear_floor: warn}}}}")
    try:
        return PromotionConfig.model_validate(content["promotion"])
    except ValidationError as error:
        raise ConfigError(f"{path}: promotion: {explain(error, PromotionConfig)}") from error


def rollback(
    to: Annotated[str | None, typer.Option("--to", metavar="VERSION", help="default: the version before")] = None,
    reason: Annotated[str, typer.Option("--reason", help="why; it is on record")] = "",
    unverified: Annotated[
        bool, typer.Option("--unverified", help="though it is not what it was, or of another version of this package")
    ] = False,
    name: Name = MODEL_NAME,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Give the alias champion back to the version before, once that is seen to be what it was.

    Example: crism-mlops rollback --reason "stripes over Jezero"
    """
    from dataclasses import asdict

    from crism_mlops.registry.rollback import rollback as roll_back
    from crism_mlops.tracking_registry import any_tracker

    made = roll_back(any_tracker(tracking_uri), name, to, reason, unverified=unverified, say=Progress().live)
    if as_json:
        print_json(asdict(made))
        return
    typer.echo(
        f"rolled back: {name} version {made.after} is champion, version {made.before} is previous; {made.reason}"
    )


def history(
    name: Name = MODEL_NAME,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Every move of a model's aliases, with reason and evidence, and every attempt on a test set.

    Example: crism-mlops history --name crism-unet
    """
    from dataclasses import asdict

    from crism_mlops.errors import PromotionError
    from crism_mlops.registry.moves import attempts
    from crism_mlops.registry.moves import history as moves_of
    from crism_mlops.tracking_registry import Registry, any_tracker

    registry = Registry(any_tracker(tracking_uri))
    if name not in registry.names():
        raise PromotionError(f"no registered model {name}; there are {', '.join(registry.names()) or 'none'}")
    moves, tried, aliases = moves_of(registry, name), attempts(registry, name=name), registry.aliases(name)
    if as_json:
        print_json({"name": name, "aliases": aliases, "moves": [asdict(m) for m in moves],
                    "attempts": [asdict(a) for a in tried]})  # fmt: skip
        return
    print_table(f"{name}: moves", ("#", "time", "by", "what", "alias", "from", "to", "reason and evidence"), [
        (m.number, m.time, m.by, m.kind if m.carried_out else f"{m.kind}, not carried out", m.alias, m.before or "-",
         m.after, m.reason + (f" ({m.evidence} of run {m.run_id})" if m.evidence else ""))
        for m in moves
    ])  # fmt: skip
    if tried:
        columns = ("test set", "#", "level", "time", "by", "candidate", "champion", "outcome")
        print_table("attempts on test sets", columns, [
            (a.test_digest[:12], a.number, f"{a.level:.3g}", a.time, a.by, a.run_id[:12], a.champion_run_id[:12],
             a.outcome)
            for a in tried
        ])  # fmt: skip
    held = ", ".join(f"{alias} is version {number}" for alias, number in sorted(aliases.items())) or "no alias is held"
    typer.echo(f"now: {held}")
    last = moves[-1] if moves else None
    if last is not None and last.alias == "champion" and aliases.get("champion") != last.after:
        typer.echo("note: the last move says otherwise: somebody moved the alias in MLflow itself")


def verify(
    version: Annotated[str, typer.Argument(help="a version's number, an alias, or models:/NAME/VERSION")],
    name: Name = MODEL_NAME,
    tracking_uri: TrackingUri = None,
    as_json: AsJson = False,
) -> None:
    """Is a version still what its trial logged? Digests, signature, stored predictions again; exit code 3 if not.

    Example: crism-mlops verify champion
    """
    from dataclasses import asdict

    from crism_mlops.registry.verify import find_version
    from crism_mlops.registry.verify import verify as verify_version
    from crism_mlops.tracking_registry import Registry, any_tracker

    tracker = any_tracker(tracking_uri)
    found = find_version(Registry(tracker), version, name)
    checks = verify_version(tracker, found, Progress().live)
    good = all(check.ok for check in checks)
    if as_json:
        print_json({"version": found.uri, "ok": good, "checks": [asdict(check) for check in checks]})
    else:
        _print_checks(checks, found.uri)
        typer.echo(f"{found.uri}: {'verified' if good else 'NOT what its trial logged'}")
    if not good:
        raise typer.Exit(REFUSED)


def _print_checks(checks: list[Check], title: str) -> None:
    from rich.text import Text

    yes, no = Text("yes", "green"), Text("NO", "bold red")
    print_table(title, ("what", "ok", "found"), [(c.name, yes if c.ok else no, c.figure) for c in checks])
