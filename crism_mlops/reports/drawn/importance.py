"""How much of the objective each searched key explains, by Optuna's evaluators."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import optuna
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from optuna.importance import BaseImportanceEvaluator, FanovaImportanceEvaluator, PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial, create_trial

from crism_mlops.reports.drawn.reading import Reading
from crism_mlops.reports.drawn.style import BLUE, blank, finish
from crism_mlops.reports.drawn.window import window

LEAST = 4  # finished trials
FEW = 20  # finished trials, below which shares are a hint
# fANOVA's time grows faster than its trials (measured on one core, five keys): 1.2 s for 100 with 64 trees, 7.6 s for
# 500 with 64, 2.1 s for 500 with 16 and the same shares, 23 s for 2000 with 16. So beyond _MANY it has fewer trees, and
# beyond _MOST a thinned selection of trials.
_MOST, _MANY = 500, 100


@dataclass(frozen=True, slots=True)
class Importances:
    """shares: searched key -> share of all (0 to 1), the largest first; how: the evaluator and over how many trials;
    why: why there are none, None where there are."""

    shares: dict[str, float]
    how: str = ""
    why: str | None = None


def importances(read: Reading) -> Importances:
    """Of the first objective, over finished trials; repetitions are the same settings and are left out."""
    if not read.keys:
        return Importances({}, why="no key of the search has more than one value")
    if why := read.few(LEAST):
        return Importances({}, why=why)
    if _constant(read.values.tolist()):
        return Importances({}, why="all finished trials have the same objective")
    names = {key.name for key in read.keys}
    trials = _thinned([t for t in read.finished if names & t.params.keys()])
    if len(trials) < LEAST:
        return Importances({}, why=f"fewer than {LEAST} finished trials have searched keys")
    evaluator, name = _evaluator(len(trials), all(names <= t.params.keys() for t in trials))
    raw = _evaluated(trials, names, read.sign, evaluator)
    total = math.fsum(raw.values())
    if not raw or not math.isfinite(total) or total <= 0.0:
        return Importances({}, why="no key makes a difference that the evaluator sees")
    shares = {key: value / total for key, value in sorted(raw.items(), key=lambda item: (-item[1], item[0]))}
    of = "" if len(trials) == len(read.finished) else f" of {len(read.finished)}"
    return Importances(shares, f"{name}, over {len(trials)}{of} finished trials")


def _evaluator(trials: int, complete: bool) -> tuple[BaseImportanceEvaluator, str]:
    """fANOVA where every trial has every key: shares of the objective's variance. PED-ANOVA, which knows keys that
    are searched under a condition, elsewhere: what tells the best trials from the others."""
    if complete:
        trees = 64 if trials <= _MANY else 16
        return FanovaImportanceEvaluator(n_trees=trees, seed=0), f"fANOVA ({trees} trees)"
    # At least five of the best, as its documentation advises, but never more than half.
    best = max(0.1, min(0.5, 5.0 / trials))
    return PedAnovaImportanceEvaluator(target_quantile=best), f"PED-ANOVA (the best {100 * best:.0f} %)"


def _evaluated(
    trials: Sequence[FrozenTrial], names: set[str], sign: float, evaluator: BaseImportanceEvaluator
) -> dict[str, float]:
    """Optuna's shares, of a study of these trials alone that minimises; empty where it sees no difference."""
    study = optuna.create_study(direction="minimize")
    shown = window([trial.values[0] for trial in trials], (), sign)
    for trial in trials:
        kept = {name: value for name, value in trial.params.items() if name in names}
        spaces = {name: trial.distributions[name] for name in kept}
        # A diverged trial counts as a bad one: by its value, it would be all that there is to explain.
        value = sign * shown.clipped(trial.values[0])
        study.add_trial(create_trial(params=kept, distributions=spaces, value=value))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Advice on few trials: the figure says how many there are.
        try:
            found = optuna.importance.get_param_importances(study, evaluator=evaluator)
        except RuntimeError:  # fANOVA: no tree found a difference, as where all settings are the same.
            return {}
    return {name: float(share) for name, share in found.items()}


def _thinned(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """At most so many trials, evenly from first to last."""
    if len(trials) <= _MOST:
        return list(trials)
    return [trials[round(i * (len(trials) - 1) / (_MOST - 1))] for i in range(_MOST)]


def _constant(values: Sequence[float]) -> bool:
    return max(values) - min(values) <= 1e-12 * max(1.0, max(map(abs, values)))


def importance_figure(read: Reading, found: Importances) -> Figure | str:
    """A bar for each searched key, the most important one on top."""
    if found.why is not None:
        return found.why
    figure = blank(0.26 * len(found.shares) + 0.65)
    axes = figure.subplots()
    names, shares = list(found.shares), list(found.shares.values())
    axes.barh(names, shares, height=0.62, color=BLUE, gid="importance")
    for row, share in enumerate(shares):
        axes.text(share + 0.012, row, f"{100 * share:.0f} %" if share >= 0.005 else "< 1 %", va="center")
    axes.set(xlim=(0.0, 1.12), ylim=(len(names) - 0.5, -0.5), xlabel=f"share of the importance for {read.metrics[0]}")
    axes.set_xticks([0.0, 0.25, 0.5, 0.75, 1.0])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    axes.tick_params(axis="y", length=0)
    hint = " Fewer than 20 trials: no more than a hint." if len(read.finished) < FEW else ""
    return finish(figure, [f"{found.how}.{hint}"])
