"""How sure a mean over scenes is: bootstrap intervals, paired comparisons, Holm's correction.

Scenes that see the same ground, or of which only the region is known, are not independent: they
are drawn together, as clusters (Field and Welsh 2007, Bootstrapping clustered data). Everything
drawn has a fixed seed, so that the same table gives the same interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crism_mlops.dataset.footprints import overlaps
from crism_mlops.dataset.split import region_name
from crism_mlops.errors import EvaluationError
from crism_mlops.scenes.scene import Scene

RESAMPLES = 10_000
LEVEL = 0.95
# Of fewer clusters a bootstrap knows too little: see docs/evaluation.md for what intervals cover.
FEWEST_CLUSTERS = 8
# Two orders of summing give the last digits otherwise: that is no difference.
_NOISE = 1e-9
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure over scenes and its 95 % interval.

    low and high are NaN where there are fewer than FEWEST_CLUSTERS independent clusters (`too_few`),
    or where the figure itself is NaN; undefined: scenes for which it has no value, whatever `mean`
    would be without them.
    """

    mean: float
    low: float
    high: float
    scenes: int
    clusters: int
    undefined: int = 0

    @property
    def too_few(self) -> bool:
        """Whether there are too few clusters for an interval."""
        return self.clusters < FEWEST_CLUSTERS

    def __str__(self) -> str:
        if math.isnan(self.mean):
            return f"undefined ({self.undefined} of {self.scenes} scenes)" if self.undefined else "undefined"
        of = f", {self.scenes - self.undefined} of {self.scenes} scenes" if self.undefined else ""
        if self.too_few:
            return f"{self.mean:.4g} (too few: {self.clusters} of {FEWEST_CLUSTERS} independent scenes{of})"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]{of}"


@dataclass(frozen=True, slots=True)
class Difference:
    """First minus second on the same scenes, paired.

    interval: of the mean difference; favour: share of the resamples in which the first is better; p:
    two-sided bootstrap p-value of no difference; adjusted: the same after Holm's correction over the
    metrics that were compared together. NaN where there are too few clusters.
    """

    metric: str
    interval: Interval
    favour: float
    p: float
    adjusted: float


def clusters_of(scenes: Sequence[Scene]) -> list[str]:
    """A name for each scene's cluster: scenes that are not independent share one.

    Footprints that overlap, directly or through others, are one cluster. Scenes without a footprint
    are one cluster a region: nobody knows which of them overlap.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    found = overlaps([scene.footprint for scene in scenes])
    rows, columns = [o.first for o in found], [o.second for o in found]
    joined = coo_array((np.ones(len(found)), (rows, columns)), shape=(len(scenes), len(scenes)))
    _, component = connected_components(joined, directed=False)
    first: dict[int, str] = {}
    names = []
    for scene, number in zip(scenes, component, strict=True):
        if scene.footprint is None:
            names.append(f"region {region_name(scene)}")
        else:
            names.append(first.setdefault(int(number), scene.observation_id))
    return names


def mean_interval(values: ArrayLike, clusters: Sequence[str]) -> Interval:
    """Mean of one figure a scene, with its interval; NaN, and a count of them, where some scene has none."""
    figures = np.asarray(values, dtype=np.float64)
    undefined = int(np.isnan(figures).sum())
    sums = np.column_stack([figures, np.ones(len(figures))])
    found = interval(sums, clusters, lambda totals: totals[..., 0] / totals[..., 1], undefined)
    # Sums by cluster round otherwise in the last digit.
    return replace(found, mean=float(np.mean(figures)))


def interval(sums: ArrayLike, clusters: Sequence[str], statistic: Statistic, undefined: int = 0) -> Interval:
    """Interval of a figure that is a function of sums over scenes.

    sums: scenes x M; statistic: totals (... x M) -> figures (...), such as a ratio of two sums or
    an F1 of counts. Expanded percentile interval (Hesterberg 2015, What teachers should know about
    the bootstrap, section 4.3) over RESAMPLES draws of whole clusters: plain percentiles of few
    clusters are too narrow. Raises EvaluationError where there is no scene.
    """
    rows = np.asarray(sums, dtype=np.float64)
    totals, drawn = _resampled(rows, clusters)
    with np.errstate(invalid="ignore", divide="ignore"):
        value = float(statistic(totals))
        count = len(set(clusters))
        if math.isnan(value) or drawn is None:
            return Interval(value, math.nan, math.nan, len(rows), count, undefined)
        figures = statistic(drawn)
    # A resample may lack what the figure is a share of (no carbonate pixel at all): it says nothing.
    figures = figures[~np.isnan(figures)]
    tail = _expanded((1.0 - LEVEL) / 2.0, count)
    low, high = (float(v) for v in np.quantile(figures, (tail, 1.0 - tail)))
    return Interval(value, low, high, len(rows), count, undefined)


def compare(
    first: Mapping[str, ArrayLike], second: Mapping[str, ArrayLike], clusters: Sequence[str], signs: Mapping[str, float]
) -> list[Difference]:
    """Paired comparison of two predictors on the same scenes, metric by metric.

    first, second: metric -> one figure a scene, in the same order; signs: 1 where less is better,
    -1 where more is. Holm's correction is over the metrics that have a p-value. Raises
    EvaluationError where lengths differ.
    """
    found = []
    for metric, sign in signs.items():
        a, b = (np.asarray(values[metric], dtype=np.float64) for values in (first, second))
        if a.shape != b.shape:
            raise EvaluationError(f"{metric}: {len(a)} scenes against {len(b)}; compare the same scenes")
        change = a - b
        change[np.abs(change) < _NOISE] = 0.0
        whole = mean_interval(change, clusters)
        _, drawn = _resampled(np.column_stack([change, np.ones(len(change))]), clusters)
        if drawn is None or math.isnan(whole.mean):
            found.append(Difference(metric, whole, math.nan, math.nan, math.nan))
            continue
        means = sign * drawn[:, 0]
        # A tie (the same predictor twice) favours neither.
        favour = float((means < 0.0).mean() + 0.5 * (means == 0.0).mean())
        beyond = min(int((means <= 0.0).sum()), int((means >= 0.0).sum()))
        p = 2.0 * _unexpanded(min(0.5, (beyond + 1) / (RESAMPLES + 1)), whole.clusters)
        found.append(Difference(metric, whole, favour, p, math.nan))
    adjusted = holm([d.p for d in found])
    return [Difference(d.metric, d.interval, d.favour, d.p, a) for d, a in zip(found, adjusted, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979); NaN is left out and stays NaN."""
    known = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, (p, i) in enumerate(known):
        highest = max(highest, min(1.0, (len(known) - rank) * p))
        adjusted[i] = highest
    return adjusted


def _expanded(tail: float, clusters: int) -> float:
    """The share of resamples beyond a limit that stands for `tail`: as the t distribution's wider tails."""
    from scipy.stats import norm, t

    return float(norm.sf(math.sqrt(clusters / (clusters - 1)) * t.isf(tail, clusters - 1)))


def _unexpanded(share: float, clusters: int) -> float:
    """The tail that a share of resamples stands for: the inverse of `_expanded`."""
    from scipy.stats import norm, t

    return float(t.sf(norm.isf(share) / math.sqrt(clusters / (clusters - 1)), clusters - 1))


def _resampled(
    rows: NDArray[np.float64], clusters: Sequence[str]
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None]:
    """Sums over all scenes (M), and over each resample (RESAMPLES x M); None for too few clusters."""
    if len(rows) != len(clusters) or not len(rows):
        raise EvaluationError(f"{len(rows)} scenes, {len(clusters)} clusters; expected one of each a scene, at least 1")
    names = sorted(set(clusters))
    place = {name: i for i, name in enumerate(names)}
    summed = np.zeros((len(names), rows.shape[1]))
    np.add.at(summed, [place[c] for c in clusters], rows)
    if len(names) < FEWEST_CLUSTERS:
        return summed.sum(axis=0), None
    return summed.sum(axis=0), _times(len(names)) @ summed


@lru_cache(maxsize=8)
def _times(clusters: int) -> NDArray[np.float64]:
    """How often each cluster is in each resample: RESAMPLES x clusters."""
    drawn = np.random.default_rng(0).multinomial(clusters, [1.0 / clusters] * clusters, size=RESAMPLES)
    return drawn.astype(np.float64)
