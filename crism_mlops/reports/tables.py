"""Tables for the terminal, and the same content as plain data for --json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from crism_mlops.config import error_sign
from crism_mlops.reports.record import state_of
from crism_mlops.tracking import INFEASIBLE, REPEAT_OF, RunInfo, Tracker, contenders

if TYPE_CHECKING:
    from rich.table import Table

_PROTOCOLS = {"test": "valid protocol, balanced test set", "thesis": "thesis protocol, balanced test set"}
_METRICS = ("rmse", "pcc", "cosine", "ssim", "lpips")


def study_status(tracker: Tracker, name: str) -> dict[str, Any]:
    """One study as plain data: totals, trials, floors and ceilings with all their scores."""
    runs = tracker.find(crism_study=name)
    parents = [r for r in runs if r.kind == "study"]
    rows = [_row(r) for r in runs if r.kind != "study"]
    states = [row["state"] for row in rows if row["kind"] == "trial" and row["repeat_of"] is None]
    objective = parents[-1].tags.get("crism.objective", "val/rmse") if parents else "val/rmse"
    best = min(contenders(runs), key=lambda r: error_sign(objective) * r.ranking, default=None)
    return {
        "study": name,
        "experiment": tracker.experiment,
        "model": parents[-1].tags.get("crism.model") if parents else None,
        "status": parents[-1].status if parents else None,
        "trials_total": int(parents[-1].tags.get("crism.trials_total", 0)) if parents else None,
        "counts": {state: states.count(state) for state in sorted(set(states))},
        "objective": objective,
        "best_run": None if best is None else best.name,
        "best_run_id": None if best is None else best.run_id,
        "rows": rows,
    }


def _row(run: RunInfo) -> dict[str, Any]:
    state = state_of(run)
    # Settings are the parameters that are keys of the configuration: they hold a dot.
    settings = {k: v for k, v in run.params.items() if k.split(".")[0] in ("data", "train", "model")}
    return {
        "run": run.name,
        "run_id": run.run_id,
        "kind": run.kind,
        "state": state,
        "repeat_of": run.tags.get(REPEAT_OF),
        "why": run.tags.get("crism.why") or run.tags.get(INFEASIBLE),
        "settings": settings,
        "scores": {k: v for k, v in sorted(run.metrics.items()) if "/" in k and k.split("/")[0] != "train"},
    }


def status_tables(statuses: Sequence[dict[str, Any]]) -> list[Table]:
    """Rich tables: one a protocol, all studies in it, floors and ceilings beneath the trials."""
    from rich.table import Table

    tables = []
    for prefix, words in _PROTOCOLS.items():
        table = Table(title=f"{prefix}: {words}", title_justify="left", title_style="bold", expand=False)
        table.add_column("run", overflow="fold")
        table.add_column("state")
        table.add_column("settings", overflow="fold")
        for metric in _METRICS:
            arrow = "↓" if error_sign(metric) > 0 else "↑"
            table.add_column(f"{metric} {arrow}", justify="right")
            if metric == "rmse":
                table.add_column("95 %", justify="right")
        if prefix == "test":
            table.add_column("skill ↑", justify="right")
        for status in statuses:
            order = {"trial": 0, "floor": 1, "ceiling": 2}
            for row in sorted(status["rows"], key=lambda r: order.get(r["kind"], 3)):
                best = row["run_id"] == status["best_run_id"]
                state = row["state"] if row["kind"] == "trial" else row["kind"]
                if row["repeat_of"] is not None:
                    state += f", repeats {row['repeat_of']}"
                if row["kind"] != "trial" and row["state"] != "finished":
                    state += f", {row['state']}"
                table.add_row(
                    ("* " if best else "") + row["run"],
                    state,
                    _settings(row["settings"]) if row["kind"] == "trial" else "",
                    *_figures(row["scores"], prefix),
                    style="bold" if best else ("dim" if row["kind"] != "trial" else ""),
                )
            table.add_section()
        tables.append(table)
    return tables


def headline(status: dict[str, Any]) -> str:
    """One line: how many trials, in which state, and the best one's objective."""
    counts = ", ".join(f"{n} {state}" for state, n in status["counts"].items()) or "no trials yet"
    best = _best_row(status)
    metric = status["objective"].split("/")[-1]
    value = "" if best is None else f"; best {best['run']}: {status['objective']} {_value(best, status, metric)}"
    return f"{status['study']} ({status['model']}): {counts} of {status['trials_total']}{value} (chosen on validation)"


def against_floors(status: dict[str, Any], statuses: Sequence[dict[str, Any]] = ()) -> list[str]:
    """For the best trial: does it beat copying, the best floor of its own input variant, and the best U-Net
    among `statuses` (of the same experiment), on test?"""
    best = _best_row(status)
    if best is None:
        return []
    variant, normalization = (best["settings"].get(f"data.{k}") for k in ("variant", "normalization"))
    floors = [
        row
        for row in status["rows"]
        if row["kind"] == "floor"
        and row["state"] == "finished"
        and (row["settings"].get("data.variant"), row["settings"].get("data.normalization")) == (variant, normalization)
    ]
    strongest = min(floors, key=lambda r: r["scores"].get("test/rmse", math.inf), default=None)
    shown = [("the floor", r) for r in floors if r["run"].startswith("copy ") and r is not strongest]
    shown += [("the best floor", strongest)] if strongest is not None else []
    if status["model"] != "unet":
        nets = [row for one in statuses if one["model"] == "unet" and (row := _best_row(one)) is not None]
        shown += [("the U-Net", row) for row in sorted(nets, key=lambda r: r["scores"].get("test/rmse", math.inf))[:1]]
    lines = []
    for what, row in shown:
        words = []
        for metric in ("rmse", "lpips"):
            mine, other = (r["scores"].get(f"test/{metric}", math.nan) for r in (best, row))
            verdict = "beats" if mine < other else "does not beat"
            words.append(f"{verdict} it on {metric} ({_figure(mine, metric)} against {_figure(other, metric)})")
        lines.append(f"{best['run']} and {what} {row['run']}: {' and '.join(words)}")
    return lines


def _best_row(status: dict[str, Any]) -> dict[str, Any] | None:
    return next((r for r in status["rows"] if r["run_id"] == status["best_run_id"]), None)


def _settings(settings: dict[str, str]) -> str:
    parts = []
    for key, value in sorted(settings.items()):
        name = key.split(".")[-1]
        if key == "train.learning_rate":
            value = f"{float(value):.2g}"
        parts.append(f"{name}={value if len(value) <= 34 else value[:31] + '...'}")
    return " ".join(parts)


def _figures(scores: Mapping[str, float], prefix: str) -> list[str]:
    """The five metrics, after RMSE its interval, and at the end the skill where the table has one."""
    cells = [_figure(scores.get(f"{prefix}/{m}"), m) for m in _METRICS]
    low, high = (scores.get(f"{prefix}/rmse_{end}") for end in ("low", "high"))
    cells.insert(1, "too few" if low is None or high is None else f"{low:.2f}-{high:.2f}")
    if cells[0] == "-":
        cells[1] = "-"
    return [*cells, _figure(scores.get("test/skill"), "skill")] if prefix == "test" else cells


def _value(best: Mapping[str, Any], status: Mapping[str, Any], metric: str) -> str:
    """The best trial's objective; where it was repeated, the mean over seeds with its interval."""
    scores = best["scores"]
    if "seeds/mean" not in scores:
        return _figure(scores.get(status["objective"]), metric)
    mean, low, high = (_figure(scores.get(f"seeds/{key}"), metric) for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high} at 95 %, {scores['seeds/count']:.0f} seeds)"


def _figure(value: float | None, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if metric == "rmse" else f"{value:.3f}"
