"""Evidence -> decision: the gates between a trial and the name champion. Pure: nothing here reads or writes a store."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from crism_mlops.config import PromotionConfig, error_sign
from crism_mlops.config_promotion import Gates, Level
from crism_mlops.evaluation.inference import FEWEST_CLUSTERS, Difference, Interval
from crism_mlops.evaluation.metrics import METRICS
from crism_mlops.studies.stored import Reproduction
from crism_mlops.tracking import RunInfo

# In the order in which they are told.
GATES: tuple[str, ...] = tuple(Gates.model_fields)
# Those that hold the candidate against the champion: a challenger need not have won yet.
AGAINST_CHAMPION = ("same_test_set", "champion", "other_metrics", "worst_stratum")
# Those that ask the test set about the champion, which costs level, and those that have to let a candidate pass first.
ASKING = ("champion", "other_metrics", "worst_stratum")
BEFORE = ("complete", "audit", "same_test_set", "enough_scenes")


@dataclass(frozen=True, slots=True)
class Gate:
    """One gate's verdict. passed: None where there is nothing to look at (no champion yet, or the gate is off);
    figure: what was found, with its interval; expected: what was asked; fix: what to do about it."""

    name: str
    level: Level
    passed: bool | None
    figure: str
    expected: str
    fix: str = ""

    @property
    def verdict(self) -> str:
        """passed, failed, warning, off or - (nothing to look at)."""
        if self.level == "off":
            return "off"
        if self.passed is None:
            return "-"
        return "passed" if self.passed else "failed" if self.level == "require" else "warning"

    @property
    def refuses(self) -> bool:
        """Whether the candidate ends here."""
        return self.level == "require" and self.passed is False


@dataclass(frozen=True, slots=True)
class Against:
    """The candidate minus another run on the same test scenes, metric by metric; or why that cannot be had. undefined:
    metrics that the other run has in no scene."""

    run: str
    differences: tuple[Difference, ...] = ()
    why: str = ""
    undefined: tuple[str, ...] = ()

    def of(self, metric: str) -> Difference | None:
        """The difference in one metric."""
        return next((d for d in self.differences if d.metric == metric), None)


@dataclass(frozen=True, slots=True)
class Champion:
    """The version that holds the alias now; `worst`: the candidate's worst stratum minus its own, in the objective's
    metric, the names of the two strata, and of those of too few independent scenes to be compared."""

    name: str
    version: str
    run_id: str
    test_digest: str
    against: Against
    worst: Interval | None = None
    strata: tuple[str, str] = ("", "")
    untold: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that a decision rests on.

    problems: what is wrong with the run's artifacts; leaks: findings of the study's audit, None where there is none to
    be read; scenes: independent scenes of the balanced test set; copy, linear, unet: None where there is no such run;
    attempt: the how manyth candidate is held against a champion on this test set; seconds: a scene on this machine,
    None where the model did not run; trouble: why it did not.
    """

    candidate: RunInfo
    objective: str
    value: float
    problems: tuple[str, ...]
    leaks: int | None
    test_digest: str
    scenes: int
    copy: Against | None
    linear: Against | None
    unet: Against | None
    champion: Champion | None
    attempt: int
    seconds: float | None
    size: int
    reproduced: tuple[Reproduction, ...]
    trouble: str = ""

    @property
    def metric(self) -> str:
        """The objective's metric, which the test set is asked about: val_worst/rmse -> rmse."""
        return self.objective.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True)
class Decision:
    """What promotion would do: the candidate and its objective on validation scenes, the present champion's run, each
    gate's verdict, whether the candidate may have the name, and why."""

    candidate: RunInfo
    objective: str
    value: float
    champion_run_id: str | None
    gates: tuple[Gate, ...]
    accepted: bool
    reason: str

    @property
    def refusing(self) -> tuple[Gate, ...]:
        """The gates that refuse it."""
        return tuple(gate for gate in self.gates if gate.refuses)


def decide(evidence: Evidence, policy: PromotionConfig, alias: str = "champion") -> Decision:
    """Whether a candidate may have an alias. For another one than champion, the gates that hold it against the champion
    warn at most."""
    barred = stopped_before(evidence, policy, alias)
    gates = tuple(
        Gate(name, getattr(policy.gates, name), None, f"not looked at, as {barred} refuses", "")
        if barred and name in ASKING
        else _judged(name, evidence, policy, alias)
        for name in GATES
    )
    refusing = [gate for gate in gates if gate.refuses]
    warnings = [gate.name for gate in gates if gate.verdict == "warning"]
    if refusing:
        reason = "; ".join(f"{gate.name}: {gate.figure}, expected {gate.expected}" for gate in refusing)
    else:
        reason = f"{evidence.objective} {evidence.value:.4g}, every required gate passed"
        reason += f" (warnings: {', '.join(warnings)})" if warnings else ""
    champion = None if evidence.champion is None else evidence.champion.run_id
    return Decision(
        evidence.candidate, evidence.objective, evidence.value, champion, gates, not refusing, reason
    )  # fmt: skip


def stopped_before(evidence: Evidence, policy: PromotionConfig, alias: str = "champion") -> str:
    """The first gate that refuses a candidate before its scores are held against the champion's; "" where none does."""
    return next((name for name in BEFORE if _judged(name, evidence, policy, alias).refuses), "")


def _judged(name: str, evidence: Evidence, policy: PromotionConfig, alias: str) -> Gate:
    level: Level = getattr(policy.gates, name)
    if level == "off":
        return Gate(name, level, None, "not looked at", "")
    if alias != "champion" and name in AGAINST_CHAMPION:
        level = "warn"
    passed, figure, expected, fix = _JUDGES[name](evidence, policy)
    return Gate(name, level, passed, figure, expected, fix)


Judged = tuple[bool | None, str, str, str]
_FIRST: Judged = (None, "no champion yet", "", "")


def _complete(evidence: Evidence, policy: PromotionConfig) -> Judged:
    found = "; ".join(evidence.problems) or "all there, digests match"
    return not evidence.problems, found, "a finished run with whole artifacts", "run the trial again"


def _audit(evidence: Evidence, policy: PromotionConfig) -> Judged:
    fix = "crism-mlops data audit FILE says what leaks and how to split otherwise"
    if evidence.leaks is None:
        return False, "no audit on the study's run", "no leak", fix
    return evidence.leaks == 0, f"{evidence.leaks} leaks", "no leak", fix


def _same_test_set(evidence: Evidence, policy: PromotionConfig) -> Judged:
    champion = evidence.champion
    if champion is None:
        return _FIRST
    mine, theirs = evidence.test_digest, champion.test_digest
    figure = f"{mine[:12] or 'unknown'}, the champion's {theirs[:12] or 'unknown'}"
    fix = "score both on one test set: train on the champion's split, or retire it with --override"
    return bool(mine) and mine == theirs, figure, "the same digest", fix


def _enough_scenes(evidence: Evidence, policy: PromotionConfig) -> Judged:
    # Fewer than that and there are no intervals at all.
    wanted = max(policy.scenes, FEWEST_CLUSTERS)
    return evidence.scenes >= wanted, f"{evidence.scenes} independent scenes", f"{wanted} or more", "add test scenes"


def _better(evidence: Evidence, other: Against | None, level: float, absent: str, fix: str) -> Judged:
    metric = evidence.metric
    expected = f"better {metric}, p < {level:.3g}"
    if other is None:
        return False, absent, expected, fix
    found = other.of(metric)
    if found is None:
        return False, f"{other.run}: {other.why or f'no {metric}'}", expected, fix
    figure = f"{metric} {found.interval} against {other.run}" + ("" if math.isnan(found.p) else f", p = {found.p:.2g}")
    if math.isnan(found.p):
        few = "add test scenes: these are too few to tell"
        return False, figure, expected, few if found.interval.too_few else f"{metric} is undefined in some scenes"
    return error_sign(metric) * found.interval.mean < 0.0 and found.p < level, figure, expected, fix


def _copy_floor(evidence: Evidence, policy: PromotionConfig) -> Judged:
    return _better(evidence, evidence.copy, policy.alpha, "no copy floor of its input", "train longer")


def _linear_floor(evidence: Evidence, policy: PromotionConfig) -> Judged:
    fix = "train on what the linear floor leaves (model.residual: linear), or longer"
    return _better(evidence, evidence.linear, policy.alpha, "no linear floor of its input", fix)


def _unet(evidence: Evidence, policy: PromotionConfig) -> Judged:
    if evidence.candidate.tags.get("crism.model") == "unet":
        return None, "it is a U-Net", "", ""
    fix = "run a U-Net study on the same scenes in this experiment"
    return _better(evidence, evidence.unet, policy.alpha, "no U-Net in the experiment", fix)


def _champion(evidence: Evidence, policy: PromotionConfig) -> Judged:
    if evidence.champion is None:
        return _FIRST
    level = policy.level_at(evidence.attempt)
    fix = "what these scenes cannot tell needs more test scenes, not more attempts: each one costs level"
    passed, figure, expected, fix = _better(evidence, evidence.champion.against, level, "", fix)
    return passed, figure, f"{expected} (attempt {evidence.attempt} on this test set)", fix


def _other_metrics(evidence: Evidence, policy: PromotionConfig) -> Judged:
    champion = evidence.champion
    if champion is None:
        return _FIRST
    told, passed, margins = [], True, []
    for metric in METRICS:
        if metric == evidence.metric:
            continue
        margin = policy.margins.of(metric)
        margins.append(f"{metric} {margin:g}")
        found = champion.against.of(metric)
        if metric in champion.against.undefined:
            # Nobody can be worse than that.
            told.append(f"{metric} undefined for the champion")
            continue
        if found is None:
            told.append(f"{metric} unknown" + (f" ({champion.against.why})" if champion.against.why else ""))
            passed = False
            continue
        told.append(f"{metric} {found.interval}")
        passed = passed and not_inferior(found.interval, metric, margin)
    return passed, ", ".join(told), f"the interval no worse than {', '.join(margins)}", "look at compare RUN CHAMPION"


def _worst_stratum(evidence: Evidence, policy: PromotionConfig) -> Judged:
    champion = evidence.champion
    if champion is None:
        return _FIRST
    metric = evidence.metric
    margin = policy.margins.of(metric)
    expected, fix = f"the interval no worse than {metric} {margin:g}", "look at compare RUN CHAMPION --stratum ..."
    if champion.worst is None:
        return False, champion.against.why or "cannot be compared", expected, fix
    mine, theirs = champion.strata
    figure = f"{metric} {champion.worst} ({mine} against {theirs})"
    if champion.untold:
        figure += f"; of fewer than {FEWEST_CLUSTERS} independent scenes, not compared: {', '.join(champion.untold)}"
    return not_inferior(champion.worst, metric, margin), figure, expected, fix


def not_inferior(difference: Interval, metric: str, margin: float) -> bool:
    """Whether the worse end of a difference's 95 % interval is within the margin; False where there is no interval."""
    worst = difference.high if error_sign(metric) > 0.0 else -difference.low
    return worst <= margin


def _latency(evidence: Evidence, policy: PromotionConfig) -> Judged:
    expected = f"{policy.seconds:g} s or less"
    if evidence.seconds is None:
        return False, evidence.trouble or "it did not run", expected, "see reproduces"
    return evidence.seconds <= policy.seconds, f"{evidence.seconds:.3g} s a scene here", expected, "fewer model.steps"


def _size(evidence: Evidence, policy: PromotionConfig) -> Judged:
    found = evidence.size / 1e9
    return 0.0 < found <= policy.gigabytes, f"{found:.3g} GB", f"{policy.gigabytes:g} GB or less", "a smaller model"


def _reproduces(evidence: Evidence, policy: PromotionConfig) -> Judged:
    expected = "within rounding of what its trial logged"
    if evidence.trouble or not evidence.reproduced:
        return False, evidence.trouble or "no stored scene", expected, "run the trial again with this version"
    worst = max(evidence.reproduced, key=lambda one: one.largest - one.tolerance)
    figure = f"{len(evidence.reproduced)} scenes, largest difference {worst.largest:.2g} of {worst.tolerance:.2g}"
    fix = "same library versions? (the model's requirements); same weights? (crism-mlops verify)"
    return all(one.ok for one in evidence.reproduced), figure, expected, fix


_JUDGES: Mapping[str, Callable[[Evidence, PromotionConfig], Judged]] = {
    "complete": _complete, "audit": _audit, "same_test_set": _same_test_set, "enough_scenes": _enough_scenes,
    "copy_floor": _copy_floor, "linear_floor": _linear_floor, "unet": _unet, "champion": _champion,
    "other_metrics": _other_metrics, "worst_stratum": _worst_stratum, "latency": _latency, "size": _size,
    "reproduces": _reproduces,
}  # fmt: skip


def plain(gates: tuple[Gate, ...]) -> list[dict[str, Any]]:
    """Gates for JSON."""
    return [
        {"gate": g.name, "level": g.level, "passed": g.passed, "verdict": g.verdict, "figure": g.figure,
         "expected": g.expected, "fix": g.fix}
        for g in gates
    ]  # fmt: skip
