"""Figures of a study: what each one shows of which trials, why one is missing, and that no word is cut."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.text import Text
from optuna.trial import FrozenTrial, TrialState, create_trial

from crism_mlops.config import SweepConfig, load_sweep
from crism_mlops.reports.drawn import course, pairs, searched
from crism_mlops.reports.drawn.importance import importances
from crism_mlops.reports.drawn.keys import keys_of_search, plain
from crism_mlops.reports.drawn.reading import Reading, read_study
from crism_mlops.reports.drawn.style import literal, styled, width_of, wrapped
from crism_mlops.reports.drawn.window import window
from crism_mlops.reports.figures import CAPTIONS, TITLES, Figures, rendered, study_figures
from crism_mlops.studies.ledger import COPIED, REPEAT
from crism_mlops.studies.search_space import distributions

SWEEPS = Path(__file__).parents[1] / "sweeps"
NAMES = [
    "history", "importance", "parallel", "slice", "contour", "pareto", "intermediate", "distribution", "timeline"
]  # fmt: skip
RATE, PROMPT, ENCODER = "train.learning_rate", "model.prompt", "model.text_encoder"
TWO_KEYS = "search={train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}, model.steps: {int: [2, 10]}}"
LINES = {"floor linear pnr physical": 8.0, "floor copy pnr physical": 90.0, "ceiling": 3.5}


def sweep(*overrides: str) -> SweepConfig:
    return load_sweep(SWEEPS / "quickstart-ip2p.yaml", overrides)


TWO_OBJECTIVES = ("objective.metric=[val/rmse, val/pcc]", TWO_KEYS)


class Made:
    """A study in memory, its trials put there as they ended."""

    def __init__(self, config: SweepConfig, lines: Mapping[str, float] | None = None) -> None:
        self.config, self.lines = config, lines or {}
        self.space = distributions(config.search)
        self.study = optuna.create_study(directions=config.objective.directions)

    def add(
        self, end: TrialState = TrialState.COMPLETE, values: float | Sequence[float] | None = None,
        params: Mapping[str, Any] | None = None, epochs: Mapping[int, float] | None = None,
        excess: float | None = None, **attributes: Any,
    ) -> FrozenTrial:  # fmt: skip
        given = {RATE: 1e-4} if params is None else dict(params)
        given = {name: value for name, value in given.items() if name in self.space}
        made = create_trial(
            state=end, values=[values] if isinstance(values, (int, float)) else values, params=given,
            distributions={name: self.space[name] for name in given}, intermediate_values=dict(epochs or {}),
            user_attrs={f"crism.{name}": value for name, value in attributes.items()},
        )  # fmt: skip
        if excess is not None:
            made.set_constraint("val/lpips", excess)
        self.study.add_trial(made)
        return self.study.trials[-1]

    @property
    def read(self) -> Reading:
        return read_study(self.study, self.config, self.lines)

    def all(self) -> Figures:
        return study_figures(self.study, self.config, self.lines)

    def draw(self, name: str) -> Figure:
        """One figure, without the time that the others take."""
        read = self.read
        draw = {
            "history": course.history, "intermediate": course.intermediate, "distribution": course.distribution,
            "timeline": course.timeline, "parallel": searched.parallel, "slice": searched.slices,
            "pareto": pairs.pareto, "contour": lambda r: pairs.contour(r, importances(r).shares),
        }[name]  # fmt: skip
        with styled():
            drawn = draw(read)
        assert isinstance(drawn, Figure), drawn
        return drawn


def spread(made: Made, number: int = 14) -> Made:
    """Finished trials over both numbers of TWO_KEYS: less the nearer the rate is to 1e-4; steps play no part."""
    for index in range(number):
        rate = 10.0 ** (-5.0 + 2.0 * ((index * 0.618) % 1.0))
        value = 5.0 + 4.0 * abs(math.log10(rate) + 4.0)
        made.add(values=value, params={RATE: rate, "model.steps": 2 + (index * 5) % 9})
    return made


def named(figure: Figure, gid: str) -> list[Any]:
    return figure.findobj(lambda artist: artist.get_gid() == gid)


def points(figure: Figure, gid: str) -> list[tuple[float, float]]:
    return [tuple(xy) for one in named(figure, gid) for xy in np.asarray(one.get_offsets()).tolist()]


def words(figure: Figure) -> str:
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def unseen(figure: Figure) -> set[Text]:
    """Labels of ticks beyond an axis's ends, which matplotlib keeps and does not draw."""
    found = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            slack = 1e-6 * (high - low)
            ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
            beyond = [t for t in ticks if not low - slack <= t.get_loc() <= high + slack]
            found |= {label for tick in beyond for label in (tick.label1, tick.label2)}
    return found


def assert_inside(figure: Figure) -> None:
    """No visible text stands outside the figure, or below 9 points."""
    with styled():
        renderer, hidden = figure.canvas.get_renderer(), unseen(figure)  # type: ignore[attr-defined] # Agg's canvas has one
        for text in figure.findobj(Text):
            if text in hidden or not text.get_visible() or not text.get_text().strip():
                continue
            assert text.get_fontsize() >= 9.0
            box = text.get_window_extent(renderer)
            outside = max(-box.x0, -box.y0, box.x1 - figure.bbox.x1, box.y1 - figure.bbox.y1)
            assert outside <= 0.5, f"{text.get_text()!r} at {box} of {figure.bbox}"
    assert figure.get_size_inches()[0] == 6.4


def test_every_figure_has_a_title_and_a_caption() -> None:
    assert list(TITLES) == list(CAPTIONS) == NAMES
    assert all(text.endswith(".") and len(text) > 60 for text in CAPTIONS.values())


# -- history


def test_history_shows_each_trial_and_the_best_so_far() -> None:
    made = Made(sweep(), LINES)
    for value in (7.0, 9.0, 6.0, 6.5):
        made.add(values=value)
    made.add(TrialState.PRUNED, epochs={1: 20.0})
    made.add(TrialState.FAIL, state="failed")
    made.add(TrialState.FAIL, state="cancelled")
    made.add(values=5.0)
    figure = made.draw("history")
    assert points(figure, "finished") == [(0, 7.0), (1, 9.0), (2, 6.0), (3, 6.5), (7, 5.0)]
    (best,) = named(figure, "best so far")
    assert best.get_xdata().tolist() == [0, 1, 2, 3, 7, 7]
    assert best.get_ydata().tolist() == [7.0, 7.0, 6.0, 6.0, 5.0, 5.0]
    assert [points(figure, state)[0][0] for state in ("pruned", "failed", "cancelled")] == [4, 5, 6]
    markers = {points(figure, s)[0][0]: named(figure, s)[0].get_paths()[0].vertices.shape for s in ("pruned", "failed")}
    assert len(set(markers.values())) == 2, "states are told apart without colour"


def test_best_so_far_goes_up_where_more_is_better() -> None:
    made = Made(sweep("objective.metric=val/pcc"))
    for value in (0.2, 0.6, 0.5):
        made.add(values=value)
    figure = made.draw("history")
    assert named(figure, "best so far")[0].get_ydata().tolist() == [0.2, 0.6, 0.6, 0.6]
    assert "val/pcc ↑" in words(figure)


def test_floors_are_lines_with_names_and_far_ones_do_not_squash_the_trials() -> None:
    made = Made(sweep(), {**LINES, "nothing": math.nan})
    for value in (5.0, 6.0, 7.0):
        made.add(values=value)
    for name in ("history", "distribution"):
        figure = made.draw(name)
        assert named(figure, "line:floor linear pnr physical")[0].get_ydata()[0] == 8.0
        assert not named(figure, "line:floor copy pnr physical")
        assert named(figure, "label:floor copy pnr physical")[0].get_text() == "↑ floor copy pnr physical 90"
        assert named(figure, "label:floor linear pnr physical")[0].get_text() == "floor linear pnr physical 8"
        low, high = figure.axes[0].get_ylim()
        assert low < 5.0 < 7.0 < high < 10.0
        assert "nothing" not in words(figure)
        assert_inside(figure)


def test_many_floors_have_labels_that_do_not_overlap() -> None:
    lines = {f"floor {a} {b} {c}": 6.0 + 0.01 * (len(a) + len(b)) for a in ("mean", "linear", "boosted", "copy")
             for b in ("pnr", "pca", "rect") for c in ("physical", "minmax")}  # fmt: skip
    made = Made(sweep(), lines)
    for value in (5.0, 7.0):
        made.add(values=value)
    figure = made.draw("history")
    renderer = figure.canvas.get_renderer()  # type: ignore[attr-defined] # Agg's canvas has one
    boxes = [named(figure, f"label:{name}")[0].get_window_extent(renderer) for name in lines]
    boxes.sort(key=lambda box: box.y0)
    assert len(boxes) == 24
    assert all(below.y1 <= above.y0 + 2.0 for below, above in pairwise(boxes))
    assert_inside(figure)


def test_a_diverged_trial_stands_at_the_edge() -> None:
    made = Made(sweep())
    for value in (5.0, 5.5, 6.0, 6.5, 7.0, 7.5, 4000.0):
        made.add(values=value)
    for name in ("history", "slice", "distribution"):
        figure = made.draw(name)
        assert figure.axes[0].get_ylim()[1] < 30.0
        assert "1 trial lies beyond the axis and stands at its edge: 4000." in words(figure)
        (edge,) = points(figure.axes[0].figure, "beyond")[:1]
        assert edge[1] == pytest.approx(figure.axes[0].get_ylim()[1])


def test_the_best_side_of_an_axis_is_never_cut() -> None:
    values = [*(10.0 + 0.1 * i for i in range(20)), 1.0]
    assert window(values, (), 1.0).low < 1.0
    assert window([-v for v in values], (), -1.0).high > -1.0
    assert window(values, (), -1.0).low > 1.0


def test_trials_that_break_a_constraint_are_hollow_and_never_the_best() -> None:
    made = Made(sweep(TWO_KEYS))
    spread(made)
    made.add(values=1.0, params={RATE: 2e-4, "model.steps": 4}, excess=0.3)
    made.add(values=6.0, params={RATE: 2e-4, "model.steps": 5}, excess=-0.3)
    for name in ("history", "slice", "contour"):
        figure = made.draw(name)
        for hollow in named(figure, "breaks a constraint"):
            assert isinstance(hollow, PathCollection)
            assert len(hollow.get_facecolor()) == 0
            assert len(hollow.get_edgecolor()) == 1
        assert len(points(figure, "breaks a constraint")) == (2 if name == "slice" else 1)
    assert min(named(made.draw("history"), "best so far")[0].get_ydata()) > 1.0
    assert all(y > 1.0 for _, y in points(made.draw("slice"), "best"))
    dashed = named(made.draw("parallel"), "trial:14")
    assert [line.get_linestyle() for line in dashed] == ["--"]


def test_repeats_stand_apart_and_copies_nowhere() -> None:
    made = spread(Made(sweep(TWO_KEYS)))
    before = importances(made.read).shares
    for index in range(6):
        made.add(values=1.0 + index, params={RATE: 1e-4, "model.steps": 10}, repeat_of=0)
    made.add(values=0.5, params={RATE: 1e-4, "model.steps": 2}, copied_from="other/3")
    assert {REPEAT, COPIED} <= {key for t in made.study.trials for key in t.user_attrs}
    figure = made.draw("history")
    assert [x for x, _ in points(figure, "repeat with another seed")] == [14, 15, 16, 17, 18, 19]
    assert len(points(figure, "finished")) == 14
    assert min(named(figure, "best so far")[0].get_ydata()) > 4.9
    assert len(points(made.draw("slice"), "finished")) == 2 * 13
    assert importances(made.read).shares == before


# -- searched keys


def test_importance_names_its_evaluator_and_finds_the_key_that_matters() -> None:
    made = spread(Made(sweep(TWO_KEYS)))
    found = made.all()
    assert list(found.importances) == [RATE, "model.steps"]
    assert math.fsum(found.importances.values()) == pytest.approx(1.0)
    assert found.importances[RATE] > 0.6
    text = words(found.made["importance"])
    assert "fANOVA (64 trees), over 14 finished trials. Fewer than 20 trials: no more than a hint." in text
    assert f"{100 * found.importances[RATE]:.0f} %" in text


def test_a_diverged_trial_is_not_all_that_importance_explains() -> None:
    made = spread(Made(sweep(TWO_KEYS)), 20)
    made.add(values=1e6, params={RATE: 1e-4, "model.steps": 10})
    assert importances(made.read).shares[RATE] > 0.5


def test_importance_of_settings_that_are_all_the_same_is_unknown() -> None:
    made = Made(sweep(TWO_KEYS))
    for value in (5.0, 6.0, 7.0, 8.0, 9.0):
        made.add(values=value, params={RATE: 1e-4, "model.steps": 4})
    found = made.all()
    assert found.missing["importance"] == "no key makes a difference that the evaluator sees"
    assert (found.importances, "contour" in found.made) == ({}, True)


def test_conditional_keys_are_judged_by_an_evaluator_that_knows_them() -> None:
    text_rate = "train.text_learning_rate"
    search = {
        ENCODER: {"choice": ["frozen", "trained"]},
        text_rate: {"loguniform": [1e-6, 1e-4], "when": {ENCODER: "trained"}},
    }
    made = Made(sweep(f"search={json.dumps(search)}"))
    for index in range(12):
        params = {ENCODER: "frozen"} if index % 3 == 0 else {ENCODER: "trained", text_rate: 1e-6 * 1.4**index}
        made.add(values=8.0 - index % 3 - 0.1 * index, params=params)
    found = importances(made.read)
    assert found.how == "PED-ANOVA (the best 42 %), over 12 finished trials"
    assert set(found.shares) == {ENCODER, text_rate}
    assert f"{text_rate} (searched in 8 of 12)" in words(made.draw("slice"))
    figure = made.draw("parallel")
    assert "not searched" in words(figure)
    absent = [named(figure, f"trial:{n}")[0].get_ydata()[1] for n in (0, 3)]
    assert absent == [absent[0]] * 2
    assert absent[0] < 0.0


def test_lines_of_the_parallel_axes_go_through_their_values() -> None:
    made = Made(sweep(TWO_KEYS))
    made.add(values=5.0, params={RATE: 1e-5, "model.steps": 10})
    made.add(values=9.0, params={RATE: 1e-4, "model.steps": 2})
    figure = made.draw("parallel")
    good, bad = (named(figure, f"trial:{n}")[0] for n in (0, 1))
    assert good.get_ydata()[:2].tolist() == [0.0, 1.0]
    assert bad.get_ydata()[:2].tolist() == pytest.approx([0.5, 0.0])
    assert good.get_linewidth() > 2.0 * bad.get_linewidth()
    assert sum(mpl.colors.to_rgb(good.get_color())) < sum(mpl.colors.to_rgb(bad.get_color())), "the best is darkest"


def test_contour_is_filled_between_enough_trials_only() -> None:
    filled = spread(Made(sweep(TWO_KEYS)), 20).draw("contour")
    assert filled.findobj(ContourSet)
    assert filled.axes[0].get_xscale() == "log"
    few = spread(Made(sweep(TWO_KEYS)), 6).draw("contour")
    assert not few.findobj(ContourSet)
    assert len(points(few, "finished")) == 6
    assert "nothing is interpolated below 12 different places" in words(few)
    line = Made(sweep(TWO_KEYS))
    for index in range(30):
        line.add(values=float(index), params={RATE: 10 ** (-5 + index / 15), "model.steps": 3})
    assert not line.draw("contour").findobj(ContourSet)


def test_contour_of_choices_is_a_table_of_means_and_counts() -> None:
    search = "search={model.text_encoder: {choice: [frozen, trained]}, data.variant: {choice: [pnr, bpn]}}"
    made = Made(sweep(search))
    for encoder, variant, value in (
        ("frozen", "pnr", 4.0), ("frozen", "pnr", 6.0), ("trained", "pnr", 7.0), ("trained", "bpn", 9.0),
    ):  # fmt: skip
        made.add(values=value, params={ENCODER: encoder, "data.variant": variant})
    cells = [text.get_text() for text in made.draw("contour").axes[0].texts]
    assert sorted(cells) == ["5\nn = 2", "7\nn = 1", "9\nn = 1", "–"]


def test_a_fixed_key_is_none_and_a_single_key_is_enough() -> None:
    made = Made(sweep("search={train.learning_rate: {loguniform: [1.0e-5, 1.0e-3]}, model.steps: {int: [4, 4]}}"))
    for index in range(8):
        made.add(values=5.0 + index, params={RATE: 1e-5 * 2**index / 2, "model.steps": 4} if index else {RATE: 1e-5})
    found = made.all()
    assert found.importances == {RATE: 1.0}
    assert found.missing["contour"] == "only one key of the search has more than one value"
    assert len(points(found.made["slice"], "finished")) == 7
    assert "model.steps" not in words(found.made["parallel"])


def test_long_prompts_have_letters_and_stand_below_in_full() -> None:
    prompts = [
        "Predict carbonates in the CTX mosaic of this very place, if they are present there",
        "Predict carbonates in the CTX mosaic of this very place, if they are present here",
        "It costs $5 or $6, and 碳\nanother line " + "W" * 90,
    ]
    made = Made(
        sweep(f"search={json.dumps({PROMPT: {'choice': prompts}, ENCODER: {'choice': ['frozen', 'trained']}})}")
    )
    for index in range(12):
        made.add(
            values=5.0 + index % 3, params={PROMPT: prompts[index % 3], ENCODER: ("frozen", "trained")[index % 2]},
            epochs={1: 9.0}, attempts=[attempt(60 * index, 60 * index + 50, "finished")],
        )  # fmt: skip
    key = keys_of_search(made.config.search)[0] if made.read.keys[0].name == PROMPT else made.read.keys[1]
    assert key.ticks == ("A", "B", "C")
    found = made.all()
    for name in ("parallel", "slice", "contour"):
        text = re.sub(r"\s+", " ", words(found.made[name]))
        assert f'{PROMPT} A = "{prompts[0]}"' in text
        assert f'{PROMPT} B = "{prompts[1]}"' in text
        assert r"It costs \$5 or \$6, and <U+78B3>↵another line" in text
    for figure in found.made.values():
        assert_inside(figure)


def test_values_that_read_alike_have_labels_of_their_own() -> None:
    made = sweep(
        'search={model.prompt: {choice: ["1", "true", "null"]}, model.prompt_fallback: {choice: [null, "null"]}}'
    )
    labels = {key.name: key.ticks for key in keys_of_search(made.search)}
    assert labels[PROMPT] == ("1", "true", "null")
    assert len(set(labels["model.prompt_fallback"])) == 2


# -- epochs, distribution, several objectives


def test_pruned_trials_end_where_they_were_pruned() -> None:
    made = Made(sweep("pruner={kind: median}"))
    made.add(values=5.0, epochs={1: 20.0, 2: 8.0, 3: 5.0})
    made.add(TrialState.PRUNED, epochs={1: 30.0, 2: 25.0, 3: math.nan})
    made.add(values=6.0, epochs={1: 22.0, 2: 9.0, 3: 6.0})
    made.add(TrialState.FAIL, epochs={1: math.inf}, state="failed")
    figure = made.draw("intermediate")
    (end,) = named(figure, "end:1")
    assert (end.get_xdata().tolist(), end.get_ydata().tolist()) == ([2], [25.0])
    assert named(figure, "best")[0].get_ydata().tolist() == [20.0, 8.0, 5.0]
    assert named(figure, "best")[0].get_linewidth() > 2.0 * named(figure, "curve:2")[0].get_linewidth()
    assert not named(figure, "curve:3")
    assert "pruned after this epoch" in words(figure)
    assert figure.axes[0].get_yscale() == "log"


def test_distribution_goes_from_the_best_to_the_worst() -> None:
    made = Made(sweep("objective.metric=val/pcc"))
    for value in (0.2, 0.8, 0.5, 0.4):
        made.add(values=value)
    assert points(made.draw("distribution"), "finished") == [(0.25, 0.8), (0.5, 0.5), (0.75, 0.4), (1.0, 0.2)]


def test_pareto_front_is_what_no_feasible_trial_beats() -> None:
    made = Made(sweep(*TWO_OBJECTIVES))
    for rmse, pcc in ((5.0, 0.5), (6.0, 0.8), (7.0, 0.7), (8.0, 0.9), (5.5, 0.5)):
        made.add(values=[rmse, pcc], params={RATE: 1e-5 * rmse, "model.steps": int(rmse)})
    made.add(values=[1.0, 0.99], params={RATE: 1e-4, "model.steps": 3}, excess=1.0)
    figure = made.draw("pareto")
    assert points(figure, "not beaten in all objectives") == [(5.0, 0.5), (6.0, 0.8), (8.0, 0.9)]
    assert points(figure, "finished") == [(7.0, 0.7), (5.5, 0.5)]
    assert "Not beaten: trials 0, 1, 3." in words(figure)
    (front,) = named(figure, "front")
    assert front.get_xdata().tolist() == [5.0, 6.0, 8.0]
    assert len(named(made.draw("history"), "best so far")) == 2
    assert made.all().missing == {
        "intermediate": "with several objectives trials report no epochs", "timeline": "no trial has begun"
    }  # fmt: skip


# -- timeline


def attempt(began: float, ended: float | None, how: str | None = None) -> dict[str, Any]:
    made = {"worker": "w", "host": "h", "gpus": 0.0, "began": 1_795_000_000.0 + began, "ended": ended}
    if ended is not None:
        made |= {"ended": 1_795_000_000.0 + ended, "how": how}
    return made


def test_timeline_has_a_bar_for_each_attempt() -> None:
    made = Made(sweep())
    made.add(values=5.0, attempts=[attempt(0, 60, "interrupted"), attempt(120, 300, "finished")])
    made.add(TrialState.PRUNED, attempts=[attempt(30, 90, "lost"), attempt(100, 160, "pruned")])
    made.add(TrialState.FAIL, attempts=[attempt(200, None)], state="failed")
    made.add(TrialState.WAITING)
    figure = made.draw("timeline")
    bars = {
        container.patches[0].get_gid(): [
            tuple(round(float(x), 6) for x in (b.get_x(), b.get_width(), b.get_y() + 0.4)) for b in container
        ]
        for container in figure.axes[0].containers
        if isinstance(container, BarContainer)
    }
    assert bars == {
        "finished": [(2.0, 3.0, 0)], "interrupted": [(0.0, 1.0, 0)], "pruned": [(1.666667, 1.0, 1)],
        "lost": [(0.5, 1.0, 1), (3.333333, 0.0, 2)],
    }  # fmt: skip
    assert "minutes since" in words(figure)


def test_what_runs_now_has_a_bar_until_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course.time, "time", lambda: 1_795_000_000.0 + 7200.0 * 3)
    made = Made(sweep())
    made.add(TrialState.RUNNING, attempts=[attempt(0, None)])
    figure = made.draw("timeline")
    (bar,) = named(figure, "running")
    assert (bar.get_x(), bar.get_width()) == (0.0, 6.0)
    assert "hours since" in words(figure)


# -- what cannot be made


def no_trial(made: Made) -> None:
    pass


def one_finished(made: Made) -> None:
    made.add(values=5.0)


def only_pruned(made: Made) -> None:
    for _ in range(5):
        made.add(TrialState.PRUNED, epochs={1: 9.0})


def only_failed(made: Made) -> None:
    for _ in range(5):
        made.add(TrialState.FAIL, epochs={1: math.nan}, state="failed")


def all_equal(made: Made) -> None:
    for index in range(6):
        made.add(values=5.0, params={RATE: 1e-4 * (1 + index / 10), ENCODER: ("frozen", "trained")[index % 2],
                                     "data.variant": "pnr"})  # fmt: skip


NONE, ONE = "the study has no trial yet", "fewer than 2 trials have finished (1)"
UNFINISHED = dict.fromkeys(
    ["history", "importance", "parallel", "slice", "contour", "distribution"], "no trial has finished"
)
ALWAYS = {"pareto": "the study has one objective"}
UNTOLD = {"intermediate": "no trial has reported an epoch", "timeline": "no trial has begun"}


@pytest.mark.parametrize(
    ("fill", "missing"),
    [
        (no_trial, {**dict.fromkeys(NAMES, NONE), **ALWAYS}),
        (
            one_finished,
            {**dict.fromkeys(["parallel", "slice", "contour", "distribution"], ONE), **UNTOLD, **ALWAYS,
             "importance": "fewer than 4 trials have finished (1)"},
        ),
        (only_pruned, {**UNFINISHED, **ALWAYS, "timeline": UNTOLD["timeline"]}),
        (only_failed, {**UNFINISHED, **ALWAYS, **UNTOLD}),
        (all_equal, {**ALWAYS, **UNTOLD, "importance": "all finished trials have the same objective"}),
    ],
)  # fmt: skip
def test_what_is_missing_has_a_reason(fill: Any, missing: dict[str, str]) -> None:
    made = Made(sweep(), LINES)
    fill(made)
    found = made.all()
    assert found.missing == missing
    assert found.importances == {}
    assert [*found.made] == [name for name in NAMES if name not in missing]
    for figure in found.made.values():
        assert_inside(figure)


def test_a_search_of_nothing_has_a_history() -> None:
    made = Made(sweep("search={}"))
    for value in (5.0, 6.0, 7.0, 8.0):
        made.add(values=value)
    found = made.all()
    assert {found.missing[n] for n in ("importance", "parallel", "slice", "contour")} == {searched.NOTHING}
    assert len(points(found.made["history"], "finished")) == 4


# -- bytes and words


@pytest.mark.parametrize(("kind", "start"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_rendering_is_the_same_twice(kind: Any, start: bytes) -> None:
    made = spread(Made(sweep(TWO_KEYS), LINES), 12)
    once, again = made.draw("contour"), made.draw("contour")
    first = rendered(once, kind)
    assert first.startswith(start)
    assert first == rendered(once, kind) == rendered(again, kind)
    assert b"CreationDate" not in first
    assert b"<dc:date>" not in first


def test_pixels_are_150_an_inch() -> None:
    made = Made(sweep())
    made.add(values=5.0)
    png = rendered(made.draw("history"), "png")
    assert int.from_bytes(png[16:20], "big") == 960


def test_nothing_is_left_of_the_style_outside() -> None:
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    made = Made(sweep())
    made.add(values=5.0)
    rendered(made.draw("history"), "pdf")
    assert dict(mpl.rcParams) == before
    assert pyplot.get_fignums() == []


def test_words_are_drawn_letter_by_letter() -> None:
    assert literal("$x$ at 5 $") == r"\$x\$ at 5 \$"
    assert literal("a\nb\x00") == "a↵b<U+0000>"
    lines = wrapped("word " * 60 + "W" * 300, 3.0)
    assert max(map(width_of, lines)) <= 3.0
    assert "".join(lines).replace(" ", "") == "word" * 60 + "W" * 300


def test_numbers_on_axes_are_plain() -> None:
    assert [plain(v) for v in (3e-5, 0.001, 16.0, 1e5, 0.0, -0.5)] == ["3e−5", "0.001", "16", "1e5", "0", "−0.5"]


# -- whatever a study holds

FLOAT = st.floats(allow_nan=False)
EPOCHS = st.dictionaries(st.integers(0, 6), st.floats(), max_size=3)
ENDS = st.sampled_from(
    [TrialState.COMPLETE] * 3 + [TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING]
)


@st.composite
def studies(draw: st.DrawFn) -> Made:
    several = draw(st.booleans())
    config = sweep(*(TWO_OBJECTIVES if several else [draw(st.sampled_from([TWO_KEYS, "objective.metric=val/ssim"]))]))
    made = Made(config, draw(st.dictionaries(st.sampled_from(["floor a", "ceiling"]), st.floats())))
    for _ in range(draw(st.integers(0, 9))):
        state = draw(ENDS)
        values = [draw(FLOAT) for _ in config.objective.metrics] if state == TrialState.COMPLETE else None
        params = {RATE: draw(st.floats(3e-5, 3e-4)), "model.steps": draw(st.integers(2, 10)),
                  PROMPT: "Predict carbonates", ENCODER: draw(st.sampled_from(["frozen", "trained"]))}  # fmt: skip
        attributes: dict[str, Any] = {"state": draw(st.sampled_from(["failed", "cancelled", "interrupted"]))}
        if draw(st.booleans()):
            began, ended = draw(st.floats(0, 1e5)), draw(st.none() | st.floats(0, 1e5))
            attributes["attempts"] = [attempt(began, ended, "lost")]
        if draw(st.booleans()):
            attributes["repeat_of"] = 0
        made.add(state, values, params, draw(EPOCHS), draw(st.none() | st.floats(-1, 1)), **attributes)
    return made


@settings(max_examples=10, deadline=None)
@given(made=studies())
def test_whatever_a_study_holds_each_figure_is_made_or_has_a_reason(made: Made) -> None:
    found = made.all()
    assert set(found.made) | set(found.missing) == set(NAMES)
    assert not set(found.made) & set(found.missing)
    for figure in found.made.values():
        assert_inside(figure)
