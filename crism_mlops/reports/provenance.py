"""Where a report's figures come from: the data set and its audit, versions, seeds, and how to do it again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator

from crism_mlops.reports.document import Block, Code, Text
from crism_mlops.reports.findings import Findings
from crism_mlops.reports.record import read_json, trial_number
from crism_mlops.reports.standing import audit_table
from crism_mlops.studies.plan import as_yaml
from crism_mlops.tracking import Tracker, shown


def data_blocks(tracker: Tracker, study: Findings) -> Iterator[Block]:
    """The data set's size and digests, how often its test set was read, and the audit."""
    record = study.record
    if record.parent is not None:
        names = {"scenes.train": "train scenes", "scenes.validation": "validation scenes", "scenes.test": "test scenes",
                 "scenes.test_balanced": "balanced test scenes", "data.target": "target",
                 "data.target_normalization": "target's scale", "scenes_digest": "digest of scenes and split",
                 "test_digest": "digest of the test set"}  # fmt: skip
        lines = [f"{words}: {record.parent.params[key]}" for key, words in names.items() if key in record.parent.params]
        readings = sum(r.get("test_digest") == record.parent.params.get("test_digest") for r in tracker.test_readings())
        yield Text((*lines, f"readings of this test set in the experiment so far: {readings}"), "list")
    found, why = read_json(tracker, record.parent, "audit.json")
    if found is None:
        yield Text((f"The audit is missing: {why}.",), "lacking")
        return
    leaks = int(found.get("leaks", 0))
    says = (
        "Nothing leaks from train to test." if not leaks else f"{leaks} leaks were found; the study was told to go on."
    )
    yield Text((says,))
    yield audit_table(found)


def again_blocks(tracker: Tracker, study: Findings) -> Iterator[Block]:
    """What the study was computed with, and the command and files that do it again."""
    record, best = study.record, study.best
    about, why = read_json(tracker, record.parent, "environment.json")
    commits = sorted(
        {r.params["git_commit"] for r in record.trials if r.params.get("git_commit", "unknown") != "unknown"}
    )
    lines = []
    if about is None:
        yield Text((f"What it was computed with is not known: {why}.",), "lacking")
    else:
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        device = about.get("gpu") or about.get("device")
        lines += [f"versions: {versions}", f"machine: {about.get('system')}, {device}, {about.get('cores')} cores, "
                                           f"{about.get('memory_gib')} GiB"]  # fmt: skip
    lines.append(f"commits of the code: {', '.join(commits) or 'not known'}")
    seeds = [f"trial {trial_number(r)}: {r.params['seed']}" for r in record.ranked[:5] if "seed" in r.params]
    if record.sweep is not None:
        lines.append(f"seed of the search: {record.sweep.seed}; of the trials: {', '.join(seeds) or 'none finished'}")
    lines.append(f"tracking: {shown(tracker.uri)}, experiment {record.experiment}")
    if best is not None:
        lines.append(f"best trial: run {best.run_id}, model models:/{best.tags.get('crism.model_id', '?')}")
    yield Text(tuple(lines), "list")
    if record.sweep is None:
        why = f"The study file cannot be had ({record.without_file}): run its sweep once more."
        yield Text((why,), "lacking")
        return
    commit = "unknown" if best is None else best.params.get("git_commit", "unknown")
    if commit.endswith("+dirty"):
        yield Text(("The best trial ran with files that differ from its commit: nobody has kept them.",), "lacking")
    checkout = [] if commit == "unknown" else [f"git checkout {shlex.quote(commit.removesuffix('+dirty'))}"]
    command = (
        f"crism-mlops sweep {shlex.quote(f'{record.name}.yaml')} --new-study {shlex.quote(f'{record.name}-again')}"
    )
    yield Code("Again, from the study file below", "\n".join([*checkout, command]))
    yield Code("The resolved study file", as_yaml(record.sweep), f"{record.name}.yaml")
    if best is not None:
        content, why = read_json(tracker, best, "config.json")
        if content is None:
            yield Text((f"The best trial's configuration is missing: {why}.",), "lacking")
        else:
            yield Code("The best trial's configuration", json.dumps(content, indent=2), "config.json")
