"""The figures that explain a study, made from Optuna's record of it.

They are drawn here and not by `optuna.visualization`: its pictures need pyplot's global state, cut long choices,
know nothing of floors, constraints, repetitions and attempts, and take seconds for a matrix of all pairs of keys.
Its importances are Optuna's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import optuna
from matplotlib.figure import Figure

from crism_mlops.config import SweepConfig
from crism_mlops.reports.drawn import course, pairs, searched
from crism_mlops.reports.drawn.importance import importance_figure, importances
from crism_mlops.reports.drawn.reading import read_study
from crism_mlops.reports.drawn.style import rendered, styled

__all__ = ["CAPTIONS", "TITLES", "Figures", "rendered", "study_figures"]

TITLES = {
    "history": "Optimisation history",
    "importance": "Importance of the searched keys",
    "parallel": "Settings of all trials",
    "slice": "Objective by searched key",
    "contour": "Objective over the two most important keys",
    "pareto": "Objectives against each other",
    "intermediate": "Objective by epoch",
    "distribution": "Distribution of the objective",
    "timeline": "When each trial ran",
}
CAPTIONS = {
    "history": "Each point is a finished trial, the black line the best one so far; floors and ceilings are lines "
    "across. An arrow after the objective's name says which way is better.",
    "importance": "How much of the differences between trials each searched key explains; all shares together are "
    "100 %. A key with a small share can be left as it is.",
    "parallel": "Each line is a finished trial, from its settings to its objective; dark is better, the thickest is "
    "the best. Where dark lines meet lies a good value.",
    "slice": "Each point is a finished trial, at its value of one key and its objective; the star is the best. Good "
    "points crowded at an end suggest to search beyond it.",
    "contour": "The objective over the two keys that explain most of it; dark is better. Between trials it is "
    "interpolated only where both keys are numbers and trials are enough.",
    "pareto": "Each point is a finished trial; blue ones are not beaten in all objectives at once by any other. To "
    "gain in one objective from there is to lose in another.",
    "intermediate": "Each line is a trial's objective on the validation scenes after each epoch, the thick one the "
    "best trial's. A marker shows where one was pruned, failed or stopped.",
    "distribution": "The finished trials from the best to the worst: a curve that is flat on the left means many "
    "settings do about as well as the best. Floors and ceilings are lines across.",
    "timeline": "Each bar is an attempt at a trial, by how it ended; a trial that was interrupted and went on has "
    "several in its row. Gaps are time in which nothing ran.",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """made: the figures by name; missing: why one cannot be made, a clause for people; both in the order of TITLES.

    importances: searched key -> share of all (0 to 1), the largest first; empty where unknown.
    """

    made: dict[str, Figure]
    missing: dict[str, str]
    importances: dict[str, float]


def study_figures(study: optuna.Study, sweep: SweepConfig, lines: Mapping[str, float]) -> Figures:
    """Every figure of a study that its trials allow, at whatever point it stands.

    `lines` are floors and ceilings, by name, in the units of the first objective. Trials copied from other studies
    are left out everywhere; repetitions with other seeds stand in the history and the timeline only.
    """
    read = read_study(study, sweep, lines)
    made: dict[str, Figure] = {}
    missing: dict[str, str] = {}
    with styled():
        found = importances(read)
        draw: dict[str, Callable[[], Figure | str]] = {
            "history": lambda: course.history(read),
            "importance": lambda: importance_figure(read, found),
            "parallel": lambda: searched.parallel(read),
            "slice": lambda: searched.slices(read),
            "contour": lambda: pairs.contour(read, found.shares),
            "pareto": lambda: pairs.pareto(read),
            "intermediate": lambda: course.intermediate(read),
            "distribution": lambda: course.distribution(read),
            "timeline": lambda: course.timeline(read),
        }
        for name in TITLES:
            drawn = draw[name]()
            if isinstance(drawn, str):
                missing[name] = drawn
            else:
                made[name] = drawn
    return Figures(made, missing, found.shares)
