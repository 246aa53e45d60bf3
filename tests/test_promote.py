"""Promotion: the decision as a pure function, the registry against a real store, the served model's checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mlflow.exceptions import MlflowException
from trackers import logged_trial, new_tracker

from crism_mlops.errors import PromotionError, TrackingError
from crism_mlops.registry.promote import CHAMPION, MODEL_NAME, decide, model_name, promote
from crism_mlops.registry.pyfunc import MAX_IMAGES, MAX_SIDE, checked
from crism_mlops.tracking import RunInfo, Tracker


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
    ("objective", "best"),
    [("val/rmse", "a"), ("val/lpips", "a"), ("val/pcc", "c"), ("val/cosine", "c"), ("val/ssim", "c")],
)
def test_best_by_the_study_s_objective(objective: str, best: str) -> None:
    runs = [trial("b", 0.5), trial("a", 0.2, "bpn"), trial("c", 0.9, "pca")]
    decision = decide(runs, [parent(objective=objective)], None, None)
    assert decision.candidate.run_id == best
    assert decision.accepted
    assert decision.objective == objective
    assert decision.value == decision.candidate.metrics["objective"]
    assert decision.reason == f"best {objective} of 3 finished trials: {decision.value:.4g}"


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
    assert decide([worthless, trial("good", 5.0)], [parent()], None, None).candidate.run_id == "good"
    with pytest.raises(PromotionError, match=r"no finished InstructPix2Pix trial .*; run a sweep such as"):
        decide([worthless], [parent()], None, None)


def test_what_breaks_a_constraint_is_not_promoted() -> None:
    broken = trial("x", 0.1, tags={"crism.infeasible": "val_worst/rmse is 40, at most 30"})
    assert decide([broken, trial("good", 5.0)], [parent()], None, None).candidate.run_id == "good"
    with pytest.raises(PromotionError, match=r"every one of 1 finished trials breaks a constraint .*at most 30"):
        decide([broken], [parent()], None, None)


def test_variant_asked_for() -> None:
    runs = [trial("r", 0.1, "rect"), trial("p", 0.2), trial("b", 0.3, "bpn")]
    for variant, expected in ((None, "p"), ("rect", "r"), ("bpn", "b")):
        assert decide(runs, [parent()], None, variant).candidate.run_id == expected
    with pytest.raises(PromotionError, match=r"with variant pca \(finished variants: bpn, pnr, rect\)"):
        decide(runs, [parent()], None, "pca")
    with pytest.raises(PromotionError, match=r"that four CaSSIS bands can give \(finished variants: rect\)"):
        decide(runs[:1], [parent()], None, None)


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
        decide(runs, [parent(), parent("other", **change)], None, None)
    assert str(caught.value).endswith("crism-mlops promote STUDY")
    assert decide(runs, [parent(), parent("other")], None, None).candidate.run_id == "b"
    only_one_has_candidates = [trial("a", 1.0), trial("b", 0.5, study="other", status="FAILED")]
    assert decide(only_one_has_candidates, [parent(), parent("other", **change)], None, None).candidate.run_id == "a"


def test_study_whose_own_run_was_deleted() -> None:
    with pytest.raises(PromotionError, match="study ip2p has trials but no run of its own"):
        decide([trial("a", 1.0)], [], None, None)


def test_champion_stays_or_goes() -> None:
    runs = [trial("a", 1.0), trial("b", 2.0)]
    same = decide(runs, [parent()], "a", None)
    assert (same.accepted, same.champion_run_id, same.reason) == (False, "a", "it is the champion already: no change")
    assert decide(runs, [parent()], "b", None).accepted


def test_model_name() -> None:
    for variant in ("pnr", "bpn", "pca"):
        assert model_name(variant) == MODEL_NAME == "crism-instruct-pix2pix"
    assert model_name("rect") == "crism-instruct-pix2pix-rect"
    with pytest.raises(PromotionError, match="no variant 'rgb'; expected one of pnr"):
        model_name("rgb")


# Against a registry.


@pytest.fixture
def tracker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    monkeypatch.chdir(tmp_path)
    tracker = new_tracker(tmp_path)
    tracker.start("ip2p", "study", {"crism.study": "ip2p"}, {"objective": "val/rmse", "scenes_digest": "d"})
    return tracker


def test_promote_register_repeat_and_replace(tracker: Tracker) -> None:
    first = logged_trial(tracker, "first", 3.0)
    logged_trial(tracker, "worse", 4.0)
    logged_trial(tracker, "laboratory", 1.0, "rect")
    done = promote(tracker)
    assert (done.name, done.version, done.decision.accepted) == (MODEL_NAME, "1", True)
    version = tracker.client.get_model_version_by_alias(MODEL_NAME, CHAMPION)
    assert version.tags == {
        "crism.run_id": first, "crism.study": "ip2p", "crism.trial_number": "0", "crism.variant": "pnr",
        "data_digest": "d1", "config_digest": "c1", "git_commit": "g1", "val/rmse": "3", "test/rmse": "4",
    }  # fmt: skip

    again = promote(tracker, "ip2p")
    assert (again.version, again.decision.accepted) == ("1", False)
    assert len(tracker.client.search_model_versions(f"name = '{MODEL_NAME}'")) == 1

    second = logged_trial(tracker, "second", 2.0)
    better = promote(tracker)
    assert (better.version, better.decision.champion_run_id) == ("2", first)
    assert tracker.client.get_model_version_by_alias(MODEL_NAME, CHAMPION).tags["crism.run_id"] == second

    laboratory = promote(tracker, variant="rect")
    assert (laboratory.name, laboratory.version) == ("crism-instruct-pix2pix-rect", "1")
    assert tracker.client.get_model_version_by_alias(MODEL_NAME, CHAMPION).version == 2


def test_killed_between_registering_and_the_alias(tracker: Tracker) -> None:
    logged_trial(tracker, "first", 3.0)
    promote(tracker)
    tracker.client.delete_registered_model_alias(MODEL_NAME, CHAMPION)
    done = promote(tracker)
    assert (done.version, done.decision.accepted) == ("1", True), "the version that is there is used"
    assert tracker.client.get_model_version_by_alias(MODEL_NAME, CHAMPION).version == 1


def test_unknown_study(tracker: Tracker) -> None:
    for name in ("ip2", "it's"):
        with pytest.raises(PromotionError, match=r"no study .* in experiment 'crism-test'; it holds ip2p$"):
            promote(tracker, name)


def test_registry_out_of_order_is_not_taken_for_an_empty_one(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    logged_trial(tracker, "first", 3.0)

    def broken(*_: object) -> None:
        raise MlflowException("the database is on fire")

    monkeypatch.setattr(tracker.client, "get_model_version_by_alias", broken)
    with pytest.raises(TrackingError, match="on fire"):
        promote(tracker)
    monkeypatch.undo()
    assert tracker.client.search_registered_models() == []


# What the served model takes.


def test_images_that_fit() -> None:
    images = checked(np.linspace(0.0, 1.0, 2 * 4 * 5 * 3).reshape(2, 4, 5, 3).tolist())
    assert images.shape == (2, 4, 5, 3)
    assert images.dtype == np.float32


@pytest.mark.parametrize(
    "shape",
    [(), (4, 5, 3), (0, 4, 5, 3), (1, 0, 5, 3), (1, 2, 4, 5, 3), (MAX_IMAGES + 1, 1, 1, 3), (1, 1, MAX_SIDE + 1, 3)],
)
def test_wrong_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(MlflowException, match=r"input has shape \(.*\); expected N x H x W x C") as caught:
        checked(np.zeros(shape))
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(("value", "words"), [(-0.1, "from -0.1 to 0.5"), (1.5, "from 0.5 to 1.5"), (np.inf, "to inf")])
def test_wrong_range(value: float, words: str) -> None:
    images = np.full((1, 4, 4, 3), 0.5)
    images[0, 1, 2, 0] = value
    with pytest.raises(MlflowException, match=words) as caught:
        checked(images)
    assert caught.value.get_http_status_code() == 400


@pytest.mark.parametrize(
    ("share", "words"), [(1, r"from 0\.5 to 0\.5 \(1 NaN\)"), (48, r"\(48 NaN\); expected 0 to 1")]
)
def test_nan(share: int, words: str) -> None:
    images = np.full(48, 0.5)
    images[:share] = np.nan
    with pytest.raises(MlflowException, match=words):
        checked(images.reshape(1, 4, 4, 3))


@pytest.mark.parametrize("content", [[[1, 2], [3]], "pixels", [[["a"]]]])
def test_no_numbers(content: Any) -> None:
    with pytest.raises(MlflowException, match="expected N x H x W x C") as caught:
        checked(content)
    assert caught.value.get_http_status_code() == 400


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
    decision = decide(runs, [r for r in runs if r.kind == "study"], None, None)
    assert (decision.candidate.name, decision.value) == ("steady", 2.5)
