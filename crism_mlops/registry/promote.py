"""Promotion: a candidate, the evidence, a decision, and only then a version and its alias."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from crism_mlops.config import PromotionConfig
from crism_mlops.errors import CrismError, PromotionError, TrackingAwayError, one_line
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.registry.candidates import NAMES, Candidate, best, named
from crism_mlops.registry.card import FOLDER, write_card
from crism_mlops.registry.evidence import gather
from crism_mlops.registry.gates import Decision, Evidence, decide, plain, stopped_before
from crism_mlops.registry.moves import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    Attempt,
    Move,
    attempts,
    begin_attempt,
    check_holder,
    discard,
    end_attempt,
    history,
    move,
    now,
    numbered,
    who,
)
from crism_mlops.registry.verify import PREDICTIONS, verify
from crism_mlops.reports.record import StudyRecord, read_json, read_study, study_names
from crism_mlops.tracking import RunInfo, Tracker, flat_json
from crism_mlops.tracking_registry import Registry, Version

Say = Callable[[str], None]
Outcome = Literal["promoted", "unchanged", "refused", "accepted"]
OVERRIDE = "crism.override"
# Of a version: figures that people look for in the registry, with the ends of their intervals.
_SCORES = ("val", "test", "thesis", "test_full", "test_worst")


@dataclass(frozen=True, slots=True)
class Promotion:
    """What was done. outcome: promoted; unchanged (it holds the alias already); refused; accepted (a dry run would have
    promoted). decision is None where nothing had to be decided, version where there is none."""

    outcome: Outcome
    name: str
    alias: str
    candidate: Candidate
    decision: Decision | None
    version: str | None
    reason: str
    move: Move | None = None

    @property
    def changed(self) -> bool:
        """Whether an alias moved."""
        return self.outcome == "promoted"


def promote(
    tracker: Tracker, what: str | None = None, *, variant: str | None = None, alias: str = CHAMPION,
    dry_run: bool = False, override: str | None = None, policy: PromotionConfig | None = None,
    say: Say = lambda words: None,
) -> Promotion:  # fmt: skip
    """Judge a candidate by the gates, register it, and move the alias as the last step; safe to repeat.

    what: a study (its best trial), a trial's name or id, or None: the experiment's best InstructPix2Pix trial. policy:
    the gates; None takes those of the candidate's study file. override: why it gets the alias though a gate refuses.
    A refused candidate changes nothing, but that its attempt on the test set is on record.
    Raises PromotionError where there is no candidate, or where somebody else was faster.
    """
    if alias not in (CHAMPION, CHALLENGER):
        raise PromotionError(f"--alias {alias}: expected {CHAMPION} or {CHALLENGER}; {PREVIOUS} is rollback's")
    if override is not None and not override.strip():
        raise PromotionError('--override: say why, e.g. --override "new test set, agreed with the team"')
    runs = tracker.find()
    candidate = find_candidate(tracker, runs, what, variant)
    registry, name = Registry(tracker), candidate.name
    holder, champion = registry.by_alias(name, alias), registry.by_alias(name, CHAMPION)
    for held, known in ((alias, holder), (CHAMPION, champion)):
        if known is not None and known.run_id == candidate.run.run_id:
            reason = f"it is the {held} already: no change"
            done = Promotion("unchanged", name, alias, candidate, None, known.number, reason)
            if not dry_run:
                _complete_record(tracker, registry, done)
            return done
    record = read_study(tracker, candidate.study, None)
    if policy is None:
        if record.sweep is None:
            raise PromotionError(
                f"study {candidate.study}: its file, which says what is asked of its model, cannot be read "
                f"({record.without_file}); name the gates with --policy FILE"
            )
        policy = record.sweep.promotion
    evidence = gather(tracker, candidate, record, champion, 1, say)
    attempt = None
    if champion is not None and policy.gates.champion != "off" and _asks(evidence, policy, alias):
        attempt = _attempt(registry, name, candidate, champion, evidence.test_digest, policy, dry_run, say)
        evidence = replace(evidence, attempt=attempt.number)
    decision = decide(evidence, policy, alias)
    outcome: Outcome = "accepted" if decision.accepted or override is not None else "refused"
    if attempt is not None and not dry_run:
        end_attempt(registry, name, replace(attempt, outcome=_outcome(decision, override)))
    done = Promotion(outcome, name, alias, candidate, decision, None, decision.reason)
    if dry_run or outcome == "refused":
        return done
    return _carry_out(
        tracker, done, evidence, record, policy, "" if holder is None else holder.number, override, say
    )  # fmt: skip


def _carry_out(
    tracker: Tracker, done: Promotion, evidence: Evidence, record: StudyRecord, policy: PromotionConfig, before: str,
    override: str | None, say: Say,
) -> Promotion:  # fmt: skip
    """Register what was accepted, see that it is the same in the registry, describe it, and move the alias; `before`
    held it when this began. What keeps the alias from moving leaves no new version, and on an older one its tags."""
    candidate, decision, registry, alias = done.candidate, done.decision, Registry(tracker), done.alias
    assert decision is not None  # Only what was judged is accepted.
    version, fresh = _version(registry, candidate)
    say(f"registered as {version.uri}")
    try:
        if registry.aliases(done.name).get(alias) != version.number:
            check_holder(registry, done.name, alias, before)
        wrong = _unlike(tracker, version, policy, say)
        if wrong and override is None:
            if fresh:
                discard(registry, version)
            return replace(done, outcome="refused", reason=f"{version.uri}, once registered: {wrong}")
        if decision.accepted and not wrong:
            override = None  # Nothing had to be overridden.
        found = "; ".join(filter(None, ("" if decision.accepted else decision.reason, wrong)))
        reason = decision.reason if override is None else f"override: {override.strip()} (the gates: {found})"
        done = replace(done, version=version.number, reason=reason)
        _describe(tracker, registry, version, done, evidence, record, override)
        file = f"promotion/{now().replace(':', '')}-{alias}.json"
        tracker.text(candidate.run.run_id, flat_json(document(done, evidence, policy, override)), file)
        made = move(
            registry, version, alias, before, "promotion" if override is None else "override", reason,
            {g.name: f"{g.verdict}: {g.figure}" for g in decision.gates}, file, say,
        )  # fmt: skip
    except CrismError as error:
        if fresh:
            discard(registry, version)
        else:
            _restore(registry, version, alias)
        if isinstance(error, PromotionError | TrackingAwayError):
            raise
        raise PromotionError(
            f"{version.uri} cannot stand in the registry ({one_line(error)}); nothing moved"
        ) from error
    if made is None:
        return replace(done, outcome="unchanged", reason=f"somebody else has made it {alias} meanwhile: no change")
    done = replace(done, outcome="promoted", move=made)
    tracker.text(candidate.run.run_id, flat_json(document(done, evidence, policy, override)), file)
    return done


def find_candidate(tracker: Tracker, runs: Sequence[RunInfo], what: str | None, variant: str | None) -> Candidate:
    """The trial that is meant; see `promote`. Raises PromotionError naming what there is."""
    studies = [r for r in runs if r.kind == "study"]
    if what is None:
        return best(runs, studies, variant)
    known = study_names(tracker)
    if what in known:
        return best([r for r in runs if r.tags.get("crism.study") == what], studies, variant, tuple(NAMES))
    found = [r for r in runs if what in (r.run_id, r.name)]
    if variant is not None and found:
        raise PromotionError(f"--variant chooses among a study's trials; {what} is one run: leave it out")
    if len(found) > 1:
        ids = ", ".join(r.run_id for r in found[:4])
        raise PromotionError(f"{what!r} is the name of {len(found)} runs; give an id: {ids}")
    if not found:
        raise PromotionError(
            f"no study or run {what!r} in experiment {tracker.experiment!r}; it holds {', '.join(known) or 'none'}"
        )
    return named(found[0], runs)


def _asks(evidence: Evidence, policy: PromotionConfig, alias: str) -> bool:
    """Whether the test set is asked about candidate and champion: no gate stops it before, and they can be compared."""
    champion = evidence.champion
    compared = champion is not None and champion.against.of(evidence.metric) is not None
    return compared and not stopped_before(evidence, policy, alias)


def _attempt(
    registry: Registry, name: str, candidate: Candidate, champion: Version, digest: str, policy: PromotionConfig,
    dry_run: bool, say: Say,
) -> Attempt:  # fmt: skip
    """The attempt that holding the candidate against the champion is, on record before its result is told; a dry run
    leaves none."""
    asked = Attempt(0, now(), who(), digest, candidate.run.run_id, champion.run_id, 0.0)
    if dry_run:
        return numbered(attempts(registry, digest), asked, policy.level_at)
    return begin_attempt(registry, name, asked, policy.level_at, say)


def _outcome(decision: Decision, override: str | None) -> str:
    if decision.accepted:
        return "accepted"
    return "refused" if override is None else "overridden"


def _version(registry: Registry, candidate: Candidate) -> tuple[Version, bool]:
    """The version of the candidate's model, made where there is none yet; whether it was not there before."""
    run, name = candidate.run, candidate.name
    fresh = not any(v.run_id == run.run_id for v in registry.versions(name))
    own = {"crism.run_id": run.run_id, "crism.model_id": run.tags["crism.model_id"]}
    return registry.register(run.tags["crism.model_id"], name, own), fresh


def _unlike(tracker: Tracker, version: Version, policy: PromotionConfig, say: Say) -> str:
    """What a registered version has that was not judged, by the gates that are required; "" where it is the same."""
    gates = policy.gates
    wrong = [
        check for check in verify(tracker, version, say)
        if not check.ok and (gates.reproduces if check.name == PREDICTIONS else gates.complete) == "require"
    ]  # fmt: skip
    return "; ".join(f"{check.name}: {check.figure}" for check in wrong)


def _describe(
    tracker: Tracker, registry: Registry, version: Version, done: Promotion, evidence: Evidence, record: StudyRecord,
    override: str | None,
) -> None:  # fmt: skip
    """Give a version its tags and its card; of one that an earlier call left, the gates are those of today."""
    candidate, gates = done.candidate, () if done.decision is None else done.decision.gates
    run = candidate.run
    tags = {
        "crism.study": candidate.study,
        "crism.trial_number": run.tags.get("crism.trial_number", ""),
        "crism.variant": run.tags.get("crism.variant", ""),
        "crism.model": run.tags.get("crism.model", ""),
        "crism.objective": f"{candidate.objective} {candidate.value:.6g}",
        "crism.test_digest": evidence.test_digest,
        "crism.gates": json.dumps({g.name: g.verdict for g in gates}),
        "data_digest": run.params.get("data_digest", ""),
        "inputs_digest": run.params.get("inputs_digest", ""),
        "config_digest": run.params.get("config_digest", ""),
        "git_commit": run.tags.get("mlflow.source.git.commit", run.params.get("git_commit", "")),
    }
    tags |= {k: f"{v:.6g}" for k, v in run.metrics.items() if _is_score(k)}
    if override is not None:
        said = {"by": who(), "time": now(), "why": override.strip()[:1000]}
        tags[OVERRIDE] = json.dumps(said, ensure_ascii=False)
    registry.set_version_tags(version, tags)
    if override is None and done.alias == CHAMPION and OVERRIDE in version.tags:
        registry.delete_version_tag(version, OVERRIDE)
    card = write_card(tracker, record, run, gates, candidate.name, version.number)
    tracker.text(run.run_id, card.text, f"{FOLDER}/README.md")
    for file, content in card.files.items():
        tracker.content(run.run_id, content, f"{FOLDER}/{file}")
    registry.describe(version, card.short)


def _restore(registry: Registry, version: Version, alias: str) -> None:
    """Give a version that was there before the tags of its last promotion back, unless the alias did move."""
    there = registry.version(version.name, version.number)
    if there is None or alias in there.aliases:
        return
    for tag in (OVERRIDE, "crism.gates"):
        if tag in version.tags:
            registry.set_version_tags(version, {tag: version.tags[tag]})
        else:
            registry.delete_version_tag(version, tag)


def _complete_record(tracker: Tracker, registry: Registry, done: Promotion) -> None:
    """The evidence of a move whose call died before it could say there that it was carried out."""
    moves = [m for m in history(registry, done.name) if m.after == done.version and m.carried_out and m.evidence]
    if not moves:
        return
    content, _ = read_json(tracker, done.candidate.run, moves[-1].evidence)
    if isinstance(content, dict) and content.get("outcome") == "accepted":
        content |= {"outcome": "promoted", "changed": True, "move": asdict(moves[-1])}
        tracker.text(done.candidate.run.run_id, flat_json(content), moves[-1].evidence)


def _is_score(key: str) -> bool:
    part, _, name = key.partition("/")
    return part in _SCORES and name.removesuffix("_low").removesuffix("_high") in (*METRICS, "skill")


def document(
    done: Promotion, evidence: Evidence | None = None, policy: PromotionConfig | None = None,
    override: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """A promotion for JSON, and, with its evidence, for the record."""
    candidate, decision = done.candidate, done.decision
    found: dict[str, Any] = {
        "name": done.name, "version": done.version, "alias": done.alias, "outcome": done.outcome,
        "changed": done.changed, "run": candidate.run.name, "run_id": candidate.run.run_id,
        "study": candidate.study, "objective": candidate.objective, "value": candidate.value, "reason": done.reason,
        "champion_run_id": None if decision is None else decision.champion_run_id,
        "gates": [] if decision is None else plain(decision.gates),
    }  # fmt: skip
    if done.move is not None:
        found["move"] = asdict(done.move)
    if evidence is not None:
        found |= {
            "time": now(), "by": who(), "override": override,
            "policy": None if policy is None else policy.model_dump(mode="json"),
            "evidence": {**asdict(evidence), "candidate": evidence.candidate.run_id},
        }  # fmt: skip
    return found
