"""Promotion: the candidate as a pure function, and the whole of it against a real registry with a real model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from promotable import DIGEST, promotable, promotable_store, studied
from safetensors.numpy import load, save
from trackers import logged_trial

from crism_mlops.config import PromotionConfig
from crism_mlops.errors import PromotionError, TrackingAwayError, TrackingError
from crism_mlops.registry import MODEL_NAME
from crism_mlops.registry import promote as promote_module
from crism_mlops.registry.candidates import best, model_name, named
from crism_mlops.registry.gates import AGAINST_CHAMPION
from crism_mlops.registry.moves import CHAMPION, attempts, history, move, who
from crism_mlops.registry.promote import Promotion, promote
from crism_mlops.registry.rollback import rollback
from crism_mlops.registry.verify import Check, find_version, verify
from crism_mlops.studies.stored import FILE
from crism_mlops.tracking import RunInfo, Tracker
from crism_mlops.tracking_registry import Registry


def trial(name: str, value: float | None, variant: str = "pnr", study: str = "ip2p", **changes: Any) -> RunInfo:
    tags = {
        "crism.kind": "trial",
        "crism.model": "instruct_pix2pix",
        "crism.variant": variant,
        "crism.study": study,
        "crism.model_id": f"m-{name}",
    } | changes.pop("tags", {})
    metrics = {} if value is None else {"objective": value}
    return RunInfo(**{"run_id": name, "name": name, "status": "FINISHED", "tags": tags, "params": {},
                      "metrics": metrics, **changes})  # fmt: skip


def parent(study: str = "ip2p", **params: str) -> RunInfo:
    given = {"objective": "val/rmse", "scenes_digest": "d", "data.target": "fal", **params}
    return RunInfo(study, study, "FINISHED", {"crism.kind": "study", "crism.study": study}, given, {})


def without_model_id(run: RunInfo) -> RunInfo:
    del run.tags["crism.model_id"]
    return run


@pytest.mark.parametrize(
    ("objective", "wanted"),
    [("val/rmse", "a"), ("val/lpips", "a"), ("val/pcc", "c"), ("val/cosine", "c"), ("val/ssim", "c")],
)
def test_best_by_the_study_s_objective(objective: str, wanted: str) -> None:
    runs = [trial("b", 0.5), trial("a", 0.2, "bpn"), trial("c", 0.9, "pca")]
    candidate = best(runs, [parent(objective=objective)], None)
    assert candidate.run.run_id == wanted
    assert candidate.objective == objective
    assert candidate.value == candidate.run.metrics["objective"]
    assert str(candidate) == f"{wanted} (best of 3 finished trials, {objective} {candidate.value:.4g})"


@pytest.mark.parametrize(
    "worthless",
    [
        trial("x", 0.1, status="KILLED"),
        trial("x", 0.1, status="FAILED"),
        trial("x", 0.1, status="RUNNING"),
        trial("x", None),
        trial("x", float("nan")),
        without_model_id(trial("x", 0.1)),
        trial("x", 0.1, tags={"crism.model": "unet"}),
        trial("x", 0.1, tags={"crism.kind": "floor"}),
        trial("x", 0.1, "rect"),
        trial("x", 0.1, "of-the-future"),
    ],
    ids=lambda r: f"{r.status}-{r.tags['crism.variant']}-{r.metrics.get('objective')}",
)
def test_what_is_never_promoted(worthless: RunInfo) -> None:
    assert best([worthless, trial("good", 5.0)], [parent()], None).run.run_id == "good"
    with pytest.raises(PromotionError, match=r"no finished InstructPix2Pix trial .*; run a sweep such as"):
        best([worthless], [parent()], None)


def test_what_breaks_a_constraint_is_not_promoted() -> None:
    broken = trial("x", 0.1, tags={"crism.infeasible": "val_worst/rmse is 40, at most 30"})
    assert best([broken, trial("good", 5.0)], [parent()], None).run.run_id == "good"
    with pytest.raises(PromotionError, match=r"every one of 1 finished trials breaks a constraint .*at most 30"):
        best([broken], [parent()], None)


def test_settings_of_which_a_repetition_breaks_a_constraint() -> None:
    numbered = {"crism.trial_number": "0"}
    broken = trial("r", 0.1, tags={"crism.repeat_of": "0", "crism.infeasible": "too large", "crism.trial_number": "5"})
    runs = [trial("a", 1.0, tags=numbered), broken, trial("b", 2.0, tags={"crism.trial_number": "1"})]
    assert best(runs, [parent()], None).run.run_id == "b"
    with pytest.raises(PromotionError, match="or a repetition of it does"):
        best(runs[:2], [parent()], None)


def test_trials_of_an_earlier_study_of_the_name_are_none_of_this_one() -> None:
    token = "crism.study_token"
    runs = [trial("old", 0.1, tags={token: "t1"}), trial("new", 2.0, tags={token: "t2"}), trial("unsaid", 3.0)]
    assert best(runs, [parent()], None).run.run_id == "new"
    with pytest.raises(PromotionError, match="old is of an earlier study called ip2p"):
        named(runs[0], [*runs, parent()])


def test_variant_asked_for() -> None:
    runs = [trial("r", 0.1, "rect"), trial("p", 0.2), trial("b", 0.3, "bpn")]
    for variant, expected in ((None, "p"), ("rect", "r"), ("bpn", "b")):
        assert best(runs, [parent()], variant).run.run_id == expected
    with pytest.raises(PromotionError, match=r"with variant pca \(finished variants: bpn, pnr, rect\)"):
        best(runs, [parent()], "pca")
    with pytest.raises(PromotionError, match=r"that four CaSSIS bands can give \(finished variants: rect\)"):
        best(runs[:1], [parent()], None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scenes_digest": "other"}, "differ in scenes_digest,"),
        ({"objective": "val/pcc"}, "differ in objective,"),
        ({"data.target": "car"}, r"differ in data\.target,"),
        ({"data.target_normalization": "minmax", "objective": "val/pcc"}, r"differ in objective, data\.target_norm"),
    ],
)
def test_studies_that_cannot_be_compared(change: dict[str, str], words: str) -> None:
    runs = [trial("a", 1.0), trial("b", 0.5, study="other")]
    with pytest.raises(PromotionError, match=f"studies ip2p, other {words}") as caught:
        best(runs, [parent(), parent("other", **change)], None)
    assert str(caught.value).endswith("crism-mlops promote STUDY")
    assert best(runs, [parent(), parent("other")], None).run.run_id == "b"
    only_one_has_candidates = [trial("a", 1.0), trial("b", 0.5, study="other", status="FAILED")]
    assert best(only_one_has_candidates, [parent(), parent("other", **change)], None).run.run_id == "a"


def test_study_whose_own_run_was_deleted() -> None:
    with pytest.raises(PromotionError, match="study ip2p has trials but no run of its own"):
        best([trial("a", 1.0)], [], None)


def test_model_name() -> None:
    for variant in ("pnr", "bpn", "pca"):
        assert model_name(variant) == MODEL_NAME == "crism-instruct-pix2pix"
    assert model_name("rect") == "crism-instruct-pix2pix-rect"
    with pytest.raises(PromotionError, match="no variant 'rgb'; expected one of pnr"):
        model_name("rgb")


def test_what_may_be_named() -> None:
    run = trial("a", 2.0)
    chosen = named(run, [run, parent(objective="val/pcc")])
    assert (chosen.run.run_id, chosen.objective, chosen.among) == ("a", "val/pcc", 1)
    assert chosen.name == MODEL_NAME
    unet = trial("u", 2.0, tags={"crism.model": "unet"})
    assert named(unet, [unet, parent()]).name == "crism-unet"
    for run, words in (
        (trial("a", 2.0, study="gone"), "its study gone has no run of its own in MLflow"),
        (trial("a", 2.0, tags={"crism.kind": "floor"}), "a is a floor, no trial"),
        (without_model_id(trial("a", 2.0, status="KILLED")), r"a \(killed\) has logged no model"),
        (trial("a", 2.0, tags={"crism.infeasible": "too large"}), "breaks a constraint of its study: too large"),
    ):
        with pytest.raises(PromotionError, match=words):
            named(run, [parent()])


# Against a registry.


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)
    return promotable_store(tmp_path)


def holders(tracker: Tracker, name: str = MODEL_NAME) -> dict[str, str]:
    return Registry(tracker).aliases(name)


def verdicts(done: Promotion) -> dict[str, str]:
    assert done.decision is not None
    return {g.name: g.verdict for g in done.decision.gates}


def test_promote_repeat_refuse_replace_and_roll_back(tracker: Tracker) -> None:
    first = promotable(tracker, "ip2p-000", 5.0)
    dry = promote(tracker, dry_run=True)
    assert (dry.outcome, dry.version, holders(tracker)) == ("accepted", None, {})
    done = promote(tracker)
    assert (done.outcome, done.name, done.version) == ("promoted", MODEL_NAME, "1")
    assert {n for n, v in verdicts(done).items() if v == "-"} == set(AGAINST_CHAMPION)
    assert {v for n, v in verdicts(done).items() if n not in AGAINST_CHAMPION} == {"passed"}
    assert holders(tracker) == {"champion": "1"}
    (version,) = Registry(tracker).versions(MODEL_NAME)
    assert version.tags["crism.run_id"] == version.run_id == first
    assert version.tags["crism.test_digest"] == DIGEST
    told = {"crism.study": "ip2p", "crism.variant": "pnr", "crism.model": "instruct_pix2pix", "inputs_digest": "i1",
            "val/rmse": "5"}  # fmt: skip
    assert told.items() <= version.tags.items()
    assert float(version.tags["test/rmse_low"]) < 5.0 < float(version.tags["test/rmse_high"])
    assert json.loads(version.tags["crism.gates"])["linear_floor"] == "passed"
    assert "5" in version.description
    assert "card/README.md" in tracker.files(first, "card")
    (evidence,) = [json.loads(tracker.read(first, f)) for f in tracker.files(first, "promotion")]
    assert (evidence["outcome"], evidence["by"], evidence["override"]) == ("promoted", who(), None)
    assert (evidence["version"], evidence["move"]["after"]) == ("1", "1")
    assert evidence["evidence"]["scenes"] == 16

    again = promote(tracker, "ip2p")
    assert (again.outcome, again.version, again.changed) == ("unchanged", "1", False)

    # Better on validation, not so on test: one scene set, one attempt less.
    tracker.tags(promotable(tracker, "ip2p-001", 4.99, number=1), {"note": "hardly better"})
    before = Registry(tracker).tags(MODEL_NAME)
    dry = promote(tracker, dry_run=True)
    assert dry.outcome == "accepted", "the same deviations scene by scene: any difference is certain"
    assert Registry(tracker).tags(MODEL_NAME) == before, "a dry run is not on record"
    worse = promotable(tracker, "ip2p-002", 6.0, number=2)
    refused = promote(tracker, worse)
    assert refused.outcome == "refused"
    assert {n for n, v in verdicts(refused).items() if v == "failed"} == {"champion", "worst_stratum", "other_metrics"}
    assert holders(tracker) == {"champion": "1"}
    assert len(Registry(tracker).versions(MODEL_NAME)) == 1, "a refused one leaves no version"
    assert [(a.number, a.outcome) for a in attempts(Registry(tracker))] == [(1, "refused")]

    better = promotable(tracker, "ip2p-003", 3.0, number=3)
    done = promote(tracker)
    assert (done.candidate.run.run_id, done.outcome, done.version) == (better, "promoted", "2")
    assert done.decision is not None
    champion = next(g for g in done.decision.gates if g.name == "champion")
    assert "p < 0.00833 (attempt 2 on this test set)" in champion.expected
    assert holders(tracker) == {"champion": "2", "previous": "1"}

    back = rollback(tracker, MODEL_NAME, reason="stripes")
    assert (back.before, back.after, back.reason) == ("2", "1", "stripes")
    assert holders(tracker) == {"champion": "1", "previous": "2"}
    told = [(m.kind, m.before, m.after, bool(m.evidence)) for m in history(Registry(tracker), MODEL_NAME)]
    assert told == [("promotion", "", "1", True), ("promotion", "1", "2", True), ("rollback", "2", "1", False)]


def test_override_is_on_record(tracker: Tracker) -> None:
    run_id = promotable(tracker, "ip2p-000", 9.0)
    refused = promote(tracker)
    assert refused.outcome == "refused"
    assert verdicts(refused)["linear_floor"] == "failed"
    assert Registry(tracker).names() == []
    assert tracker.files(run_id, "promotion") == []
    done = promote(tracker, override="  the floor knows the answer ")
    assert done.outcome == "promoted"
    (version,) = Registry(tracker).versions(MODEL_NAME)
    said = json.loads(version.tags["crism.override"])
    assert (said["by"], said["why"]) == (who(), "the floor knows the answer")
    (made,) = history(Registry(tracker), MODEL_NAME)
    assert made.kind == "override"
    assert made.reason.startswith("override: the floor knows the answer (the gates: linear_floor: rmse 1")
    with pytest.raises(PromotionError, match="--override: say why"):
        promote(tracker, override=" ")
    done = promote(tracker, "ip2p-000", alias="challenger")
    assert (done.outcome, done.reason) == ("unchanged", "it is the champion already: no change")
    assert (holders(tracker), attempts(Registry(tracker))) == ({"champion": "1"}, [])
    assert Registry(tracker).versions(MODEL_NAME)[0].tags == version.tags


def test_a_challenger_asks_the_test_set_as_well(tracker: Tracker) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    worse = promotable(tracker, "ip2p-001", 6.0, number=1)
    done = promote(tracker, "ip2p-001", alias="challenger")
    assert (done.outcome, done.candidate.run.run_id) == ("promoted", worse)
    assert verdicts(done)["champion"] == "warning"
    assert holders(tracker) == {"champion": "1", "challenger": "2"}
    assert [(a.number, a.outcome) for a in attempts(Registry(tracker))] == [(1, "accepted")]
    with pytest.raises(PromotionError, match=r"version 2 was never champion.*those that were: 1\. .*--override"):
        rollback(tracker, MODEL_NAME, to="2")
    promote(tracker, "ip2p-001", override="the same question again")
    assert [(a.number, a.outcome) for a in attempts(Registry(tracker))] == [(1, "overridden")]
    with pytest.raises(PromotionError, match="--alias prod: expected champion or challenger"):
        promote(tracker, alias="prod")


def test_a_unet_has_its_own_name(tracker: Tracker) -> None:
    done = promote(tracker, "unet-000")
    assert (done.name, done.outcome) == ("crism-unet", "refused")
    assert verdicts(done)["unet"] == "-"
    policy = PromotionConfig.model_validate({"scenes": 8, "gates": {"linear_floor": "warn"}})
    done = promote(tracker, "unet", policy=policy)
    assert (done.name, done.outcome, verdicts(done)["linear_floor"]) == ("crism-unet", "promoted", "warning")


def test_another_test_set(tracker: Tracker) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    other = promotable(tracker, "ip2p-001", 3.0, number=1)
    tracker.note_test_reading(other, "trial", "another-digest-that-is-later")
    done = promote(tracker, other)
    assert done.outcome == "refused"
    assert verdicts(done)["same_test_set"] == "failed"
    assert verdicts(done)["champion"] == verdicts(done)["worst_stratum"] == "-"
    assert attempts(Registry(tracker)) == [], "nothing was asked, so nothing is spent"


def test_one_candidate_promoted_by_two_at_once(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever comes second finds it done, and takes nothing away from the first."""
    promotable(tracker, "ip2p-000", 5.0)
    registry = Registry(tracker)

    def others_are_faster(*_: object) -> list[Check]:
        (version,) = registry.versions(MODEL_NAME)
        if not version.aliases:
            move(registry, version, CHAMPION, "", "promotion", "the other one")
        return []

    monkeypatch.setattr("crism_mlops.registry.promote.verify", others_are_faster)
    done = promote(tracker)
    assert (done.outcome, done.version) == ("unchanged", "1")
    assert done.reason == "somebody else has made it champion meanwhile: no change"
    assert holders(tracker) == {"champion": "1"}

    def full(*_: object) -> None:
        raise TrackingError("no space left")

    registry.delete_alias(MODEL_NAME, CHAMPION)
    monkeypatch.setattr(Registry, "describe", full)
    with pytest.raises(PromotionError, match="no space left"):
        promote(tracker)
    assert holders(tracker) == {"champion": "1"}, "its version is the other one's champion"


def test_a_u_net_of_other_scenes_is_no_rival(tracker: Tracker) -> None:
    run_id = studied(tracker, "elsewhere", "unet")
    tracker.params(run_id, {"test_digest": "of other scenes"})
    promotable(tracker, "elsewhere-000", 1.0, "elsewhere", "unet")
    promotable(tracker, "ip2p-000", 5.0)
    done = promote(tracker, dry_run=True)
    assert done.outcome == "accepted"
    assert done.decision is not None
    assert "unet-000" in next(g.figure for g in done.decision.gates if g.name == "unet")


@pytest.mark.parametrize(
    ("file", "content", "gate", "figure"),
    [
        ("audit.json", b"[]", "audit", "no audit"),
        ("audit.json", b'{"findings": []}', "audit", "no audit"),
        ("scores_by_scene.parquet", None, "complete", "it is of an older version"),
    ],
)
def test_what_older_versions_left(tracker: Tracker, file: str, content: bytes | None, gate: str, figure: str) -> None:
    run_id = promotable(tracker, "ip2p-000", 5.0)
    if content is None:
        rows = [{k: v for k, v in row.items() if k != "cluster"} for row in tracker.read_table(run_id, file)]
        tracker.table(run_id, rows, file)
    else:
        (parent_run,) = tracker.find(crism_kind="study", crism_study="ip2p")
        tracker.content(parent_run.run_id, content, file)
    done = promote(tracker, dry_run=True)
    assert done.outcome == "refused"
    assert done.decision is not None
    assert figure in next(g.figure for g in done.decision.gates if g.name == gate)


def test_a_study_file_that_cannot_be_read_gives_no_gates(tracker: Tracker) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    (parent_run,) = tracker.find(crism_kind="study", crism_study="ip2p")
    tracker.text(parent_run.run_id, "study: ip2p\nof_the_future: 1\n", "study.yaml")
    with pytest.raises(PromotionError, match=r"its file, which says what is asked .*data is missing.*--policy FILE"):
        promote(tracker)
    assert promote(tracker, policy=PromotionConfig(scenes=16), dry_run=True).outcome == "accepted"


def test_a_figure_that_the_champion_has_not_either(tracker: Tracker) -> None:
    def without_pcc(run_id: str) -> None:
        rows = tracker.read_table(run_id, "scores_by_scene.parquet")
        rows[0]["valid/pcc"] = float("nan")
        tracker.table(run_id, rows, "scores_by_scene.parquet")

    without_pcc(promotable(tracker, "ip2p-000", 5.0))
    promote(tracker)
    without_pcc(promotable(tracker, "ip2p-001", 3.0, number=1))
    done = promote(tracker, dry_run=True)
    assert done.outcome == "accepted"
    assert done.decision is not None
    assert "15 of 16 scenes" in next(g.figure for g in done.decision.gates if g.name == "other_metrics")


def test_the_way_back_of_a_move_that_died_between_its_aliases(tracker: Tracker) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    promotable(tracker, "ip2p-001", 3.0, number=1)
    promote(tracker)
    Registry(tracker).set_alias(MODEL_NAME, "previous", "2")
    assert rollback(tracker, MODEL_NAME).after == "1"


def test_a_damaged_model_is_refused_and_no_longer_verified(tracker: Tracker, tmp_path: Path) -> None:
    run_id = promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    registry = Registry(tracker)
    version = find_version(registry, "champion", MODEL_NAME)
    model = tracker.run(run_id).tags["crism.model_id"]
    assert [c.figure for c in verify(tracker, version) if not c.ok] == []
    (weights,) = (tmp_path / "artifacts").rglob(f"{model}/**/unet/*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    wrong = {c.name: c.figure for c in verify(tracker, version) if not c.ok}
    assert "does not match its digest" in wrong["files"]
    assert "predictions" in wrong
    registry.delete_alias(MODEL_NAME, "champion")
    done = promote(tracker)
    assert done.outcome == "refused"
    assert {n for n, v in verdicts(done).items() if v == "failed"} == {"complete", "latency", "reproduces"}


def test_predictions_that_are_others(tracker: Tracker) -> None:
    run_id = promotable(tracker, "ip2p-000", 5.0)
    content = load(tracker.read(run_id, FILE))
    changed = {k: v + np.float32(0.2) if k.endswith("prediction") else v for k, v in content.items()}
    tracker.content(run_id, save(changed), FILE)
    done = promote(tracker)
    assert done.outcome == "refused"
    assert [n for n, v in verdicts(done).items() if v == "failed"] == ["reproduces"]


def test_predictions_that_are_others_in_the_registry_alone(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the registry hands out is judged by the same gates as what the trial logged."""
    promotable(tracker, "ip2p-000", 5.0)
    wrong = [Check("predictions", False, "difference 0.2"), Check("signature", True, "as it was")]
    monkeypatch.setattr("crism_mlops.registry.promote.verify", lambda *_: wrong)
    done = promote(tracker)
    assert (done.outcome, done.version, holders(tracker)) == ("refused", None, {})
    assert "once registered: predictions: difference 0.2" in done.reason
    assert Registry(tracker).versions(MODEL_NAME) == []
    policy = PromotionConfig.model_validate({"scenes": 16, "gates": {"reproduces": "warn"}})
    assert promote(tracker, policy=policy, override="to be sure").outcome == "promoted"
    (made,) = history(Registry(tracker), MODEL_NAME)
    assert (made.kind, "override" in made.reason) == ("promotion", False), "there was nothing to override"
    assert "crism.override" not in Registry(tracker).versions(MODEL_NAME)[0].tags


def test_what_cannot_be_compared_costs_no_attempt(tracker: Tracker) -> None:
    champion = promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    tracker.content(champion, b"damaged", "scores_by_scene.parquet")
    promotable(tracker, "ip2p-001", 3.0, number=1)
    done = promote(tracker, "ip2p-001")
    assert (done.outcome, verdicts(done)["champion"]) == ("refused", "failed")
    assert attempts(Registry(tracker)) == []


def test_a_store_that_is_away_refuses_nobody(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    promotable(tracker, "ip2p-001", 3.0, number=1)
    read = Tracker.read

    def away(name: str) -> Callable[[Tracker, str, str], bytes]:
        def answer(tracker: Tracker, run_id: str, file: str) -> bytes:
            if file == name:
                raise TrackingAwayError("connection refused")
            return read(tracker, run_id, file)

        return answer

    for name in ("audit.json", "scores_by_scene.parquet", "stored/scenes.json"):
        with monkeypatch.context() as patch:
            patch.setattr(Tracker, "read", away(name))
            with pytest.raises(TrackingAwayError, match="connection refused"):
                promote(tracker)
    assert attempts(Registry(tracker)) == []
    assert promote(tracker).outcome == "promoted"


def test_a_model_that_fails_in_an_unforeseen_way_is_refused(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    promotable(tracker, "ip2p-000", 5.0)

    def broken(*_: object) -> None:
        raise AttributeError("of another version of diffusers")

    monkeypatch.setattr("crism_mlops.registry.verify.load_checked", broken)
    done = promote(tracker)
    assert (done.outcome, verdicts(done)["reproduces"]) == ("refused", "failed")
    assert "of another version of diffusers" in done.reason


def test_a_metric_that_the_champion_has_nowhere(tracker: Tracker) -> None:
    def without_pcc(run_id: str) -> None:
        rows = [row | {"valid/pcc": float("nan")} for row in tracker.read_table(run_id, "scores_by_scene.parquet")]
        tracker.table(run_id, rows, "scores_by_scene.parquet")

    without_pcc(promotable(tracker, "ip2p-000", 5.0))
    assert promote(tracker).outcome == "promoted"
    without_pcc(promotable(tracker, "ip2p-001", 3.0, number=1))
    done = promote(tracker, dry_run=True)
    assert done.outcome == "accepted", done.reason
    assert done.decision is not None
    assert "pcc undefined for the champion" in next(g.figure for g in done.decision.gates if g.name == "other_metrics")


def test_a_stratum_of_few_independent_scenes_tells_nothing(tracker: Tracker) -> None:
    def in_one_place(run_id: str) -> str:
        rows = tracker.read_table(run_id, "scores_by_scene.parquet")
        for row in rows[:3]:
            row |= {"region": "Somewhere", "cluster": "one"}
        tracker.table(run_id, rows, "scores_by_scene.parquet")
        return run_id

    policy = PromotionConfig.model_validate({"scenes": 14})
    in_one_place(promotable(tracker, "ip2p-000", 5.0))
    promote(tracker, policy=policy)
    in_one_place(promotable(tracker, "ip2p-001", 3.0, number=1))
    done = promote(tracker, policy=policy, dry_run=True)
    assert done.decision is not None
    figure = next(g.figure for g in done.decision.gates if g.name == "worst_stratum")
    assert "; of fewer than 8 independent scenes, not compared: " in figure
    assert "region/somewhere" in figure.partition("not compared: ")[2]


def test_the_record_of_a_move_that_died_before_it_was_written_is_completed(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_id = promotable(tracker, "ip2p-000", 5.0)
    text = Tracker.text

    class Killed(BaseException):
        pass

    def die(tracker: Tracker, run: str, words: str, file: str) -> None:
        if file.startswith("promotion/") and holders(tracker):
            raise Killed
        text(tracker, run, words, file)

    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "text", die)
        with pytest.raises(Killed):
            promote(tracker)
    (file,) = tracker.files(run_id, "promotion")
    assert promote(tracker, dry_run=True).outcome == "unchanged"
    assert json.loads(tracker.read(run_id, file))["outcome"] == "accepted", "a dry run writes nothing"
    assert promote(tracker).outcome == "unchanged"
    said = json.loads(tracker.read(run_id, file))
    assert (said["outcome"], said["changed"], said["move"]["after"]) == ("promoted", True, "1")


def test_a_loser_s_version_keeps_what_was_said_of_it(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    promotable(tracker, "ip2p-001", 6.0, number=1)
    promote(tracker, "ip2p-001", alias="challenger")
    registry = Registry(tracker)
    before = registry.version(MODEL_NAME, "2")
    promotable(tracker, "ip2p-002", 3.0, number=2)

    def others_are_faster(*words: Any) -> None:
        monkeypatch.setattr(promote_module, "_describe", describe)
        promote(tracker, "ip2p-002")
        describe(*words)

    describe = promote_module._describe
    monkeypatch.setattr(promote_module, "_describe", others_are_faster)
    with pytest.raises(PromotionError, match="somebody else was faster"):
        promote(tracker, "ip2p-001", override="I want it")
    after = registry.version(MODEL_NAME, "2")
    assert before is not None
    assert after is not None
    assert after.tags == before.tags


def test_killed_between_registering_and_the_alias(tracker: Tracker) -> None:
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    tracker.client.delete_registered_model_alias(MODEL_NAME, CHAMPION)
    done = promote(tracker)
    assert (done.version, done.outcome) == ("1", "promoted"), "the version that is there is used"
    assert holders(tracker) == {"champion": "1"}


def test_a_version_that_cannot_be_registered_leaves_nothing(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    promotable(tracker, "ip2p-000", 5.0)

    def full(*_: object) -> None:
        raise TrackingError("no space left on the registry's disk")

    monkeypatch.setattr(Registry, "describe", full)
    with pytest.raises(PromotionError, match=r"cannot stand in the registry \(no space left .*\); nothing moved"):
        promote(tracker)
    assert Registry(tracker).versions(MODEL_NAME) == []


def test_rollback_without_a_way_back(tracker: Tracker) -> None:
    with pytest.raises(PromotionError, match="crism-unet has no champion; those that have one: none"):
        rollback(tracker, "crism-unet")
    promotable(tracker, "ip2p-000", 5.0)
    promote(tracker)
    with pytest.raises(
        PromotionError, match=r"has no version before it \(previous\); name one of its versions: --to 1"
    ):
        rollback(tracker, MODEL_NAME)
    for version, words in (("1", "is the champion already"), ("7", "has no version 7")):
        with pytest.raises(PromotionError, match=words):
            rollback(tracker, MODEL_NAME, version)


def test_unknown_names(tracker: Tracker) -> None:
    promotable(tracker, "twice", 5.0)
    promotable(tracker, "twice", 6.0)
    for name in ("ip2", "it's"):
        with pytest.raises(
            PromotionError, match=r"no study or run .* in experiment 'crism-test'; it holds ip2p, unet$"
        ):
            promote(tracker, name)
    with pytest.raises(PromotionError, match="'twice' is the name of 2 runs; give an id"):
        promote(tracker, "twice")
    with pytest.raises(PromotionError, match="--variant chooses among a study's trials"):
        promote(tracker, "unet-000", variant="pnr")
    promote(tracker, override="a champion, for the aliases that there are")
    with pytest.raises(PromotionError, match=r"has no version 'prod'; its versions are 1, its aliases champion"):
        find_version(Registry(tracker), "prod", MODEL_NAME)


def test_registry_out_of_order_is_not_taken_for_an_empty_one(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    promotable(tracker, "ip2p-000", 5.0)

    def broken(*_: object) -> None:
        raise MlflowException("the database is on fire")

    monkeypatch.setattr(tracker.client, "get_registered_model", broken)
    with pytest.raises(TrackingError, match="on fire"):
        promote(tracker)
    monkeypatch.undo()
    assert tracker.client.search_registered_models() == []


def test_of_repeated_trials_the_mean_decides(tracker: Tracker) -> None:
    """One lucky seed beats no mean: neither a trial that was not repeated, nor a repetition itself."""
    tracker.start("ip2p", "study", {"crism.study": "ip2p"}, {"objective": "val/rmse"})
    lucky = logged_trial(tracker, "lucky", 1.0)
    steady = logged_trial(tracker, "steady", 2.0)
    logged_trial(tracker, "never repeated", 0.5)
    again = logged_trial(tracker, "again", 0.1)
    tracker.tags(again, {"crism.repeat_of": "0"})
    tracker.metrics(lucky, {"seeds/mean": 5.0})
    tracker.metrics(steady, {"seeds/mean": 2.5})
    runs = tracker.find()
    candidate = best(runs, [r for r in runs if r.kind == "study"], None)
    assert (candidate.run.name, candidate.value) == ("steady", 2.5)
