"""Intervals, paired comparisons and Holm's correction: against known truth, other libraries, and by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from test_models import make_scene

from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.inference import (
    FEWEST_CLUSTERS,
    clusters_of,
    compare,
    holm,
    interval,
    mean_interval,
)

ALONE = [f"frt{i:08x}" for i in range(40)]


def test_a_mean_s_interval_is_scipy_s() -> None:
    values = np.random.default_rng(1).gamma(2.0, 3.0, 40)
    found = mean_interval(values, ALONE)
    # Hesterberg's expanded level for 40 scenes; plain 95 % percentiles lie 4 % nearer.
    level = 1.0 - 2.0 * stats.norm.sf(np.sqrt(40 / 39) * stats.t.isf(0.025, 39))
    wanted = stats.bootstrap(
        (values,), np.mean, confidence_level=level, n_resamples=50_000, method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval  # fmt: skip
    assert found.mean == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx(wanted, rel=0.02)
    assert (found.scenes, found.clusters, found.undefined, found.too_few) == (40, 40, 0, False)
    assert mean_interval(values, ALONE) == found, "the same table, the same interval"
    order = np.random.default_rng(3).permutation(40)
    again = mean_interval(values[order], [ALONE[i] for i in order])
    assert (again.low, again.high) == pytest.approx((found.low, found.high)), "whatever the order of its rows"


def test_scenes_of_one_cluster_count_once() -> None:
    # Ten places, each seen four times with nearly one figure: the interval is that of ten, not of forty.
    rng = np.random.default_rng(4)
    places = rng.normal(20.0, 5.0, 10)
    values = np.repeat(places, 4) + rng.normal(0.0, 0.01, 40)
    clusters = np.repeat([f"place {i}" for i in range(10)], 4).tolist()
    together, apart = mean_interval(values, clusters), mean_interval(values, ALONE)
    ten = mean_interval(places, ALONE[:10])
    assert (together.clusters, together.scenes) == (10, 40)
    assert together.high - together.low == pytest.approx(ten.high - ten.low, rel=0.01)
    assert together.high - together.low > 1.7 * (apart.high - apart.low)


@pytest.mark.parametrize("count", [8, 40])
def test_the_interval_covers_what_it_says(count: int) -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(400):
        found = mean_interval(rng.normal(20.0, 5.0, count), ALONE[:count])
        covered += found.low <= 20.0 <= found.high
    assert 0.91 <= covered / 400 <= 0.98


def test_too_few_is_said() -> None:
    found = mean_interval([1.0] * 20, ["a", "b", "c", "d"] * 5)
    assert found.too_few
    assert math.isnan(found.low)
    assert str(found) == f"1 (too few: 4 of {FEWEST_CLUSTERS} independent scenes)"
    assert str(mean_interval(np.arange(40.0), ALONE)).startswith("19.5 [")


def test_an_undefined_scene_is_counted_and_not_left_out_in_silence() -> None:
    values = np.arange(40.0)
    values[[3, 5]] = np.nan
    found = mean_interval(values, ALONE)
    assert math.isnan(found.mean)
    assert math.isnan(found.high)
    assert found.undefined == 2
    assert str(found) == "undefined (2 of 40 scenes)"


def test_a_function_of_sums_has_an_interval() -> None:
    rng = np.random.default_rng(6)
    hits, of = rng.integers(0, 50, 40), rng.integers(50, 100, 40)
    found = interval(np.column_stack([hits, of]), ALONE, lambda totals: totals[..., 0] / totals[..., 1])
    assert found.mean == pytest.approx(hits.sum() / of.sum())
    assert found.low < found.mean < found.high


def test_nothing_to_average_is_an_error() -> None:
    with pytest.raises(EvaluationError, match="0 scenes"):
        mean_interval([], [])
    with pytest.raises(EvaluationError, match="3 scenes, 2 clusters"):
        mean_interval([1.0, 2.0, 3.0], ["a", "b"])


# ---- paired


def test_a_paired_difference_sees_what_two_intervals_do_not() -> None:
    rng = np.random.default_rng(7)
    scenes = rng.normal(20.0, 5.0, 40)
    better, worse = scenes - 0.5 + rng.normal(0, 0.3, 40), scenes + rng.normal(0, 0.3, 40)
    (found,) = compare({"rmse": better}, {"rmse": worse}, ALONE, {"rmse": 1.0})
    assert found.interval.mean == pytest.approx((better - worse).mean())
    assert found.interval.high < 0.0
    assert found.favour == 1.0
    assert 0.0 < found.p < 0.001
    (turned,) = compare({"rmse": worse}, {"rmse": better}, ALONE, {"rmse": 1.0})
    assert (turned.favour, turned.p) == (0.0, found.p)
    (more,) = compare({"pcc": better}, {"pcc": worse}, ALONE, {"pcc": -1.0})
    assert more.favour == 0.0, "where more is better, less is worse"
    mine, theirs = mean_interval(better, ALONE), mean_interval(worse, ALONE)
    assert mine.high > theirs.low, "unpaired, nobody could tell them apart"


def test_a_predictor_against_itself_favours_neither() -> None:
    values = np.random.default_rng(8).normal(size=40)
    (found,) = compare({"rmse": values}, {"rmse": values}, ALONE, {"rmse": 1.0})
    assert (found.interval.mean, found.favour) == (0.0, 0.5)
    assert found.p == found.adjusted == pytest.approx(1.0)


def test_another_order_of_summing_is_no_difference() -> None:
    values = np.linspace(0.5, 0.9, 20)
    clusters = [str(i) for i in range(20)]
    rng = np.random.default_rng(0)
    (found,) = compare({"ssim": values + rng.normal(0.0, 1e-16, 20)}, {"ssim": values}, clusters, {"ssim": -1.0})
    assert (found.favour, found.p, found.interval.mean) == (0.5, 1.0, 0.0)


def test_p_values_are_uniform_where_nothing_differs() -> None:
    rng = np.random.default_rng(9)
    p = [
        compare({"rmse": rng.normal(size=40)}, {"rmse": rng.normal(size=40)}, ALONE, {"rmse": 1.0})[0].p
        for _ in range(300)
    ]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.10
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_too_few_scenes_are_not_compared() -> None:
    (found,) = compare({"rmse": [1.0, 2.0]}, {"rmse": [3.0, 5.0]}, ["a", "b"], {"rmse": 1.0})
    assert found.interval.mean == -2.5
    assert math.isnan(found.p)
    assert math.isnan(found.favour)


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(EvaluationError, match="2 scenes against 1"):
        compare({"rmse": [1.0, 2.0]}, {"rmse": [1.0]}, ["a", "b"], {"rmse": 1.0})


def test_holm_by_hand() -> None:
    # Wikipedia's example of the method: four hypotheses, sorted 0.005, 0.01, 0.03, 0.04.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, math.nan, 0.7])[0] == 1.0
    assert math.isnan(holm([0.6, math.nan])[1])


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=8))
def test_holm_keeps_the_order_and_only_raises(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(a >= p for a, p in zip(adjusted, p_values, strict=True))
    assert all(a <= 1.0 for a in adjusted)
    order = np.argsort(p_values, kind="stable")
    assert (np.diff(np.array(adjusted)[order]) >= 0.0).all()


# ---- what is independent


def test_clusters_are_overlapping_footprints_and_regions_without_one() -> None:
    def box(west: float) -> shapely.Polygon:
        return shapely.box(west, 18.0, west + 0.2, 18.2)

    # a overlaps b, b overlaps c: one place, though a and c do not touch. d lies alone.
    scenes = [
        replace(make_scene(f"frt0000000{i}"), footprint=None if west is None else box(west), region=region)
        for i, (west, region) in enumerate(
            [(77.0, "jezero"), (77.15, "jezero"), (77.3, "jezero"), (80.0, "jezero"), (None, "nili"), (None, "nili2"),
             (None, "hale")]
        )
    ]  # fmt: skip
    assert clusters_of(scenes) == [
        "frt00000000", "frt00000000", "frt00000000", "frt00000003", "region nili", "region nili", "region hale",
    ]  # fmt: skip
    assert clusters_of([]) == []
