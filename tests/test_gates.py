"""The decision as a pure function: each gate by a table of evidence and verdict."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from crism_mlops.config import PromotionConfig
from crism_mlops.config_promotion import Gates
from crism_mlops.config_text import read_yaml
from crism_mlops.evaluation.inference import Difference, Interval, compare
from crism_mlops.registry.gates import (
    AGAINST_CHAMPION,
    ASKING,
    BEFORE,
    GATES,
    Against,
    Champion,
    Evidence,
    Gate,
    decide,
    not_inferior,
    plain,
)
from crism_mlops.studies.stored import Reproduction
from crism_mlops.tracking import RunInfo

RUN = RunInfo("candidate", "ip2p-003", "FINISHED", {"crism.model": "instruct_pix2pix"}, {}, {})
POLICY = PromotionConfig()


def interval(mean: float, half: float = 0.1, scenes: int = 40) -> Interval:
    return Interval(mean, mean - half, mean + half, scenes, scenes)


def unknown(mean: float) -> Interval:
    return Interval(mean, math.nan, math.nan, 4, 4)


def difference(metric: str, mean: float, p: float = 0.001) -> Difference:
    return Difference(metric, interval(mean, 0.001), 1.0, p, p)


def against(name: str, mean: float = -2.0, p: float = 0.001, **others: float) -> Against:
    """The candidate minus a run: RMSE by `mean`, of the other metrics nothing between the two but what is given."""
    found = [difference("rmse", mean, p)]
    found += [difference(m, others.get(m, 0.0), 1.0) for m in ("pcc", "cosine", "ssim", "lpips")]
    return Against(name, tuple(found))


CHAMPION = Champion("crism-instruct-pix2pix", "4", "old", "digest", against("version 4", -1.0), interval(-0.5),
                    ("barren", "carbonate"))  # fmt: skip
GOOD = Evidence(
    candidate=RUN, objective="val/rmse", value=5.0, problems=(), leaks=0, test_digest="digest", scenes=40,
    copy=against("copy"), linear=against("linear"), unet=against("unet-002"), champion=CHAMPION, attempt=1,
    seconds=2.0, size=10**9, reproduced=(Reproduction("frt01", 0.0, 0.001, True),),
)  # fmt: skip


def gate(evidence: Evidence, name: str, policy: PromotionConfig = POLICY, alias: str = "champion") -> Gate:
    return next(g for g in decide(evidence, policy, alias).gates if g.name == name)


def test_all_gates_passed() -> None:
    decision = decide(GOOD, POLICY)
    assert decision.accepted
    assert [g.name for g in decision.gates] == list(GATES) == list(Gates.model_fields)
    assert {g.verdict for g in decision.gates} == {"passed"}
    assert decision.reason == "val/rmse 5, every required gate passed"
    assert (decision.candidate, decision.champion_run_id) == (RUN, "old")


def changed_champion(**changes: Any) -> dict[str, Any]:
    return {"champion": replace(CHAMPION, **changes)}


@pytest.mark.parametrize(
    ("change", "refusing", "figure"),
    [
        ({"problems": ("artifacts: missing: config.json",)}, "complete", "artifacts: missing: config.json"),
        ({"leaks": 2}, "audit", "2 leaks"),
        ({"leaks": None}, "audit", "no audit on the study's run"),
        ({"test_digest": "another"}, "same_test_set", "another, the champion's digest"),
        ({"test_digest": ""}, "same_test_set", "unknown, the champion's digest"),
        ({"scenes": 29}, "enough_scenes", "29 independent scenes"),
        ({"copy": None}, "copy_floor", "no copy floor of its input"),
        ({"copy": against("copy", -2.0, 0.2)}, "copy_floor", "p = 0.2"),
        ({"copy": against("copy", +2.0)}, "copy_floor", "rmse 2 [1.999, 2.001] against copy"),
        ({"copy": Against("copy", why="other scenes")}, "copy_floor", "copy: other scenes"),
        ({"linear": against("linear", 0.4)}, "linear_floor", "against linear"),
        ({"linear": None}, "linear_floor", "no linear floor of its input"),
        ({"unet": None}, "unet", "no U-Net in the experiment"),
        ({"unet": against("unet-002", 0.0, 1.0)}, "unet", "p = 1"),
        (changed_champion(against=against("version 4", -1.0, 0.03)), "champion", "p = 0.03"),
        (changed_champion(against=against("version 4", 1.0)), "champion", "rmse 1 [0.999, 1.001]"),
        (changed_champion(against=against("version 4", -1.0, pcc=-0.02)), "other_metrics", "pcc -0.02"),
        (changed_champion(against=against("version 4", -1.0, lpips=0.02)), "other_metrics", "lpips 0.02"),
        (changed_champion(worst=interval(0.45)), "worst_stratum", "rmse 0.45 [0.35, 0.55] (barren against carbonate)"),
        (changed_champion(worst=unknown(-3.0)), "worst_stratum", "too few"),
        (changed_champion(worst=None), "worst_stratum", "cannot be compared"),
        ({"seconds": 61.0}, "latency", "61 s a scene here"),
        ({"seconds": None, "trouble": "it needs a GPU"}, "latency", "it needs a GPU"),
        ({"size": 11 * 10**9}, "size", "11 GB"),
        ({"size": 0}, "size", "0 GB"),
        ({"reproduced": (Reproduction("frt01", 0.5, 0.001, False),)}, "reproduces", "largest difference 0.5 of 0.001"),
        ({"reproduced": ()}, "reproduces", "no stored scene"),
        ({"trouble": "it is no model"}, "reproduces", "it is no model"),
    ],
)  # fmt: skip
def test_each_gate_refuses(change: dict[str, Any], refusing: str, figure: str) -> None:
    evidence = replace(GOOD, **change)
    decision = decide(evidence, POLICY)
    assert not decision.accepted
    found = gate(evidence, refusing)
    assert found.verdict == "failed"
    assert figure in found.figure
    assert found.expected
    assert found.fix
    assert f"{refusing}: " in decision.reason
    if refusing in BEFORE:
        assert {g.figure for g in decision.gates if g.name in ASKING} == {f"not looked at, as {refusing} refuses"}
    # As a warning it is told, and lets it pass; not looked at, it says nothing.
    levels = {g.name: "warn" for g in decision.refusing}
    warned = decide(evidence, PromotionConfig.model_validate({"gates": levels}))
    assert warned.accepted
    assert f"(warnings: {', '.join(g.name for g in decision.refusing)})" in warned.reason
    off = PromotionConfig.model_validate({"gates": dict.fromkeys(levels, "off")})
    assert decide(evidence, off).accepted
    assert gate(evidence, refusing, off).verdict == "off"


def test_the_first_champion_is_held_against_nobody() -> None:
    decision = decide(replace(GOOD, champion=None), POLICY)
    assert decision.accepted
    assert decision.champion_run_id is None
    assert {g.name for g in decision.gates if g.verdict == "-"} == set(AGAINST_CHAMPION)


def test_a_u_net_need_not_beat_u_nets() -> None:
    unet = replace(GOOD, candidate=replace(RUN, tags={"crism.model": "unet"}), unet=None)
    assert gate(unet, "unet").passed is None
    assert decide(unet, POLICY).accepted


def test_a_challenger_need_not_have_won() -> None:
    losing = replace(GOOD, champion=replace(CHAMPION, against=against("version 4", 3.0), worst=interval(9.0)))
    assert not decide(losing, POLICY).accepted
    decision = decide(losing, POLICY, "challenger")
    assert decision.accepted
    assert [g.name for g in decision.gates if g.verdict == "warning"] == ["champion", "worst_stratum"]
    assert not decide(replace(losing, leaks=1), POLICY, "challenger").accepted


@pytest.mark.parametrize(("attempt", "level"), [(1, 0.025), (2, 0.05 / 6), (3, 0.05 / 12), (10, 0.05 / 110)])
def test_level_of_an_attempt(attempt: int, level: float) -> None:
    assert POLICY.level_at(attempt) == pytest.approx(level)
    for p, passed in ((level * 0.99, True), (level * 1.01, False)):
        evidence = replace(GOOD, attempt=attempt, champion=replace(CHAMPION, against=against("version 4", -1.0, p)))
        found = gate(evidence, "champion")
        assert found.passed is passed
        assert f"p < {level:.3g} (attempt {attempt} on this test set)" in found.expected


@given(alpha=st.floats(1e-6, 0.5), attempts=st.integers(1, 3000))
def test_no_number_of_attempts_spends_more_than_alpha(alpha: float, attempts: int) -> None:
    policy = PromotionConfig(alpha=alpha)
    assert sum(policy.level_at(k) for k in range(1, attempts + 1)) <= alpha * (1 + 1e-9)


@pytest.mark.parametrize(("scenes", "most"), [(8, 1), (16, 3), (30, 6), (100, 11)])
def test_how_many_attempts_so_many_scenes_allow(scenes: int, most: int) -> None:
    """A difference that every resample shows has the smallest p that there is; docs/decisions/0013 tells these."""
    rows = [{"rmse": [5.0 - 0.01 * i for i in range(scenes)]}, {"rmse": [9.0] * scenes}]
    (found,) = compare(*rows, [str(i) for i in range(scenes)], {"rmse": 1.0})
    passed = [k for k in range(1, 20) if found.p < POLICY.level_at(k)]
    assert passed == list(range(1, most + 1))


def test_objectives_of_which_more_is_better() -> None:
    better = Against("version 4", tuple(replace(d, metric={"rmse": "pcc", "pcc": "rmse"}.get(d.metric, d.metric))
                                        for d in against("", 0.02).differences))  # fmt: skip
    evidence = replace(
        GOOD, objective="val_worst/pcc", copy=better, linear=better, unet=better,
        champion=replace(CHAMPION, against=better, worst=interval(0.0, 0.005)),
    )  # fmt: skip
    assert decide(evidence, POLICY).accepted
    assert gate(replace(evidence, champion=replace(CHAMPION, against=better, worst=interval(-0.02, 0.005))),
                "worst_stratum").verdict == "failed"  # fmt: skip


@pytest.mark.parametrize(
    ("metric", "low", "high", "good"),
    [
        ("rmse", -9.0, 0.5, True), ("rmse", -9.0, 0.51, False), ("ssim", -0.5, 9.0, True), ("ssim", -0.51, 9.0, False),
        ("rmse", math.nan, math.nan, False), ("ssim", math.nan, math.nan, False),
    ],
)  # fmt: skip
def test_non_inferiority_looks_at_the_worse_end(metric: str, low: float, high: float, good: bool) -> None:
    assert not_inferior(Interval(0.0, low, high, 40, 40), metric, 0.5) is good


def test_a_bare_off_is_no_false() -> None:
    content = read_yaml("gates: {linear_floor: off, unet: warn}")
    assert PromotionConfig.model_validate(content).gates.linear_floor == "off"
    with pytest.raises(ValidationError, match="require"):
        PromotionConfig.model_validate({"gates": {"linear_floor": True}})


def test_gates_for_json() -> None:
    rows = plain(decide(replace(GOOD, leaks=3), POLICY).gates)
    assert [r["gate"] for r in rows] == list(GATES)
    assert rows[1] == {
        "gate": "audit", "level": "require", "passed": False, "verdict": "failed", "figure": "3 leaks",
        "expected": "no leak", "fix": "crism-mlops data audit FILE says what leaks and how to split otherwise",
    }  # fmt: skip
