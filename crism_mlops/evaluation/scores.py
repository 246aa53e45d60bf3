"""Scores by scene -> figures over strata of scenes, each with its interval."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import error_sign
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation import carbonate
from crism_mlops.evaluation.inference import Difference, Interval, compare, interval, mean_interval
from crism_mlops.evaluation.metrics import FIGURES, METRICS

# A stratum of fewer scenes says nothing: it is not taken for the worst one.
FEWEST_IN_STRATUM = 3


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """One row a scene, in the order of their ids.

    A row holds observation_id, region, kind, cluster (scenes of one cluster are not independent),
    truth_digest (of what the prediction was held against), `PROTOCOL/FIGURE` for every figure of the
    protocols that were asked for, and where the scene has a carbonate mask `carbonate/COUNT` of
    evaluation/carbonate.py, of the prediction and, as `carbonate_ceiling/COUNT`, of the true target.
    counts, ceilings: those with their curves, by id.
    """

    rows: tuple[dict[str, Any], ...]
    counts: Mapping[str, carbonate.Counts] = field(default_factory=dict)
    ceilings: Mapping[str, carbonate.Counts] = field(default_factory=dict)

    def of(self, ids: Sequence[str] | None) -> ScoreTable:
        """The rows of some scenes. Raises EvaluationError where there is none, or one was not scored."""
        wanted = None if ids is None else set(ids)
        chosen = tuple(r for r in self.rows if wanted is None or r["observation_id"] in wanted)
        missing = sorted((wanted or set()) - {r["observation_id"] for r in chosen})
        if missing or not chosen:
            raise EvaluationError(
                f"no scores of {', '.join(missing[:5]) or 'any scene'}; {len(self.rows)} scenes were scored; score the "
                "same split that is averaged"
            )
        return replace(self, rows=chosen)

    def means(self, protocol: str, ids: Sequence[str] | None = None) -> dict[str, float]:
        """Mean of each of the protocol's figures over the scenes (or those named in `ids`).

        NaN where any of them is undefined: a mean over fewer scenes would not say so. Raises
        EvaluationError where there is no scene, or a named one was not scored.
        """
        rows = self.of(ids).rows
        names = FIGURES[protocol]  # type: ignore[index]
        return {name: float(np.mean([r[f"{protocol}/{name}"] for r in rows])) for name in names}

    def interval(self, figure: str) -> Interval:
        """A figure over all rows: "valid/rmse" and the like, "carbonate/f1" or "carbonate_ceiling/f1"."""
        part, _, name = figure.partition("/")
        clusters = [r["cluster"] for r in self.rows]
        if part in ("carbonate", "carbonate_ceiling"):
            counts = self.counts if part == "carbonate" else self.ceilings
            known = [r for r in self.rows if r["observation_id"] in counts]
            if not known:
                return Interval(math.nan, math.nan, math.nan, len(self.rows), len(set(clusters)), len(self.rows))
            sums = np.stack([counts[r["observation_id"]].vector() for r in known])
            if name != "ap":
                sums = sums[:, : len(carbonate.COUNTS)]
            found = interval(sums, [r["cluster"] for r in known], partial(carbonate.figure, name))
            # A scene without a mask has no carbonate to be found or missed: it is told, and left out.
            return replace(found, scenes=len(self.rows), undefined=len(self.rows) - len(known))
        return mean_interval([r[figure] for r in self.rows], clusters)

    def strata(self) -> Iterator[tuple[str, ScoreTable]]:
        """Name and rows of each stratum: all, a kind of scene, "region/NAME"."""
        yield "all", self
        for kind in ("carbonate", "barren", "unknown"):
            if rows := tuple(r for r in self.rows if r["kind"] == kind):
                yield kind, replace(self, rows=rows)
        for region in sorted({r["region"] for r in self.rows}):
            yield f"region/{slug(region)}", replace(self, rows=tuple(r for r in self.rows if r["region"] == region))

    def worst(self, metric: str) -> float:
        """The worst mean of a metric (protocol `valid`) over the strata of at least FEWEST_IN_STRATUM scenes.

        NaN where a stratum's is.
        """
        sign = error_sign(metric)
        means = [
            sign * table.means("valid")[metric]
            for _, table in self.strata()
            if len(table.rows) >= min(FEWEST_IN_STRATUM, len(self.rows))
        ]
        return sign * float(np.max(means))

    def summary(self, prefix: str, ids: Sequence[str] | None = None) -> dict[str, float]:
        """What MLflow is told of the scenes (or those named in `ids`): `PREFIX/FIGURE` of the protocol
        `valid`, the five metrics with `_low` and `_high`; `PREFIX_stretch_free/...`; carbonates; the
        number of undefined scenes where there are any."""
        chosen = self.of(ids)
        first = chosen.rows[0]
        found: dict[str, float] = {}
        for protocol, names in FIGURES.items():
            if protocol == "thesis" or f"{protocol}/{names[0]}" not in first:
                continue
            part = prefix if protocol == "valid" else f"{prefix}_{protocol}"
            found |= chosen.bounded(part, {name: f"{protocol}/{name}" for name in METRICS if name in names})
            found |= {f"{part}/{k}": v for k, v in chosen.means(protocol).items() if k not in METRICS}
        if chosen.counts:
            names = carbonate.FIGURES
            found |= chosen.bounded(prefix, {f"carbonate_{name}": f"carbonate/{name}" for name in names})
            for name in names:
                found[f"{prefix}/carbonate_{name}_ceiling"] = chosen.interval(f"carbonate_ceiling/{name}").mean
        return found

    def bounded(self, prefix: str, figures: Mapping[str, str]) -> dict[str, float]:
        """`PREFIX/NAME`, `_low` and `_high` (where there are enough scenes), `_undefined` (where there are any)."""
        found = {}
        for name, figure in figures.items():
            one = self.interval(figure)
            found[f"{prefix}/{name}"] = one.mean
            if not math.isnan(one.low):
                found |= {f"{prefix}/{name}_low": one.low, f"{prefix}/{name}_high": one.high}
            if one.undefined:
                found[f"{prefix}/{name}_undefined"] = one.undefined
        return found

    def strata_summary(self, prefix: str) -> dict[str, float]:
        """`PREFIX_carbonate/...`, `PREFIX_barren/...`, `PREFIX_region/NAME/...` and `PREFIX_worst/...`."""
        found: dict[str, float] = {}
        for name, table in self.strata():
            if name != "all":
                found |= table.bounded(f"{prefix}_{name}", {m: f"valid/{m}" for m in METRICS})
        return found | {f"{prefix}_worst/{m}": self.worst(m) for m in METRICS}

    def strata_rows(self) -> list[dict[str, Any]]:
        """A table for people: one row a stratum and figure, with interval and number of scenes."""
        rows = []
        figures = [f"{p}/{name}" for p, names in FIGURES.items() for name in names if f"{p}/{name}" in self.rows[0]]
        if self.counts:
            figures += [f"carbonate/{name}" for name in carbonate.FIGURES]
        for name, table in self.strata():
            for figure in figures:
                one = table.interval(figure)
                rows.append({
                    "stratum": name, "figure": figure, "mean": one.mean, "low": one.low, "high": one.high,
                    "scenes": one.scenes, "independent": one.clusters, "undefined": one.undefined, "says": str(one),
                })  # fmt: skip
        return rows

    def records(self) -> list[dict[str, Any]]:
        """The rows with counts of carbonate pixels, flat: for CSV, parquet and MLflow's table."""
        flat = []
        for row in self.rows:
            record = dict(row)
            for part, counts in (("carbonate", self.counts), ("carbonate_ceiling", self.ceilings)):
                if (one := counts.get(row["observation_id"])) is not None:
                    record |= {f"{part}/{name}": getattr(one, name) for name in carbonate.COUNTS}
            flat.append(record)
        return flat


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """Records as CSV text; a key that only some have is a column as well."""
    columns = list(dict.fromkeys(key for record in records for key in record))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns)
    writer.writeheader()
    writer.writerows(records)
    return buffer.getvalue()


def compared(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]], protocol: str = "valid",
    metrics: Sequence[str] = METRICS,
) -> list[Difference]:  # fmt: skip
    """Paired comparison of two tables' rows (of `ScoreTable.rows` or read back from MLflow) in the five metrics, or
    some of them.

    Raises EvaluationError where the tables hold other scenes, or another truth of one, naming them.
    """
    by_id = [{str(r["observation_id"]): r for r in rows} for rows in (first, second)]
    alone = sorted(set(by_id[0]) ^ set(by_id[1]))
    if alone or not first:
        raise EvaluationError(
            f"{len(by_id[0])} scenes against {len(by_id[1])}, not in both: {', '.join(alone[:5]) or 'none at all'}; a "
            "paired comparison needs the same scenes: score both on one split of the same data"
        )
    ids = sorted(by_id[0])
    other = [i for i in ids if by_id[0][i].get("truth_digest") != by_id[1][i].get("truth_digest")]
    if other:
        raise EvaluationError(
            f"the truth of {', '.join(other[:5])} ({len(other)} of {len(ids)} scenes) is another one in the second "
            "table (another target, range, mask or size); a paired comparison needs the same truth: score both on one "
            "data set"
        )
    names = [m for m in metrics if f"{protocol}/{m}" in first[0] and f"{protocol}/{m}" in second[0]]
    values = [{m: _column(rows, ids, f"{protocol}/{m}") for m in names} for rows in by_id]
    clusters = [str(by_id[0][i]["cluster"]) for i in ids]
    return compare(values[0], values[1], clusters, {m: error_sign(m) for m in names})


def _column(rows: Mapping[str, Mapping[str, Any]], ids: Sequence[str], figure: str) -> NDArray[np.float64]:
    return np.array([float(rows[i][figure]) for i in ids])


def slug(name: str) -> str:
    """A region's name as a part of a metric's: lower case, other characters than letters and digits as "_"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unknown"
