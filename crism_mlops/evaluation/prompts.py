"""Does the metadata help? The same model with its prompts right, shuffled between scenes, and blank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from crism_mlops.dataset.manifest import Manifest, Pair
from crism_mlops.dataset.split import region_name
from crism_mlops.errors import EvaluationError
from crism_mlops.evaluation.carbonate import BINS, Counts
from crism_mlops.evaluation.evaluate import Predicted, score_pairs
from crism_mlops.evaluation.inference import Difference, Interval
from crism_mlops.evaluation.scores import ScoreTable, compared
from crism_mlops.scenes.scene import Scene

WAYS = ("right", "shuffled", "blank")
FLOOR = "region's share"


@dataclass(frozen=True, slots=True)
class PromptScores:
    """Tables of the three ways; what right prompts change against shuffled and blank ones (first minus
    second); and what the floor scores that knows only the region's carbonate share: its average
    precision and predicted minus true area. None where scenes have no carbonate mask."""

    tables: dict[str, ScoreTable]
    differences: dict[str, list[Difference]]
    floor: dict[str, Interval] | None
    prompts: dict[str, tuple[str, ...]]


def prompt_scores(
    predicted: Callable[[Sequence[str]], Predicted],
    prompt: Callable[[Scene], str],
    pairs: Sequence[Pair],
    manifest: Manifest,
    device: str = "cpu",
) -> PromptScores:
    """Score the predictions for right, shuffled and blank prompts.

    Shuffled: each scene has the prompt of another one, the same one every time. Raises
    EvaluationError for fewer than two scenes.
    """
    if len(pairs) < 2:
        raise EvaluationError(f"{len(pairs)} scene: prompts can be shuffled between two scenes or more")
    right = [prompt(pairs[i].scene) for i in range(len(pairs))]
    order = np.random.default_rng(0).permutation(len(pairs))
    # One step along a shuffled circle: nobody keeps their own.
    shuffled = [""] * len(pairs)
    for giver, taker in zip(order, np.roll(order, 1), strict=True):
        shuffled[taker] = right[giver]
    prompts = {"right": tuple(right), "shuffled": tuple(shuffled), "blank": ("",) * len(pairs)}
    tables = {
        way: score_pairs(
            predicted(words), pairs, ("valid",), rule=manifest.carbonate, data=manifest.data, device=device
        )
        for way, words in prompts.items()
    }
    differences = {way: compared(tables["right"].rows, tables[way].rows) for way in WAYS[1:]}
    return PromptScores(tables, differences, region_floor(tables["right"], pairs, manifest), prompts)


def region_floor(table: ScoreTable, pairs: Sequence[Pair], manifest: Manifest) -> dict[str, Interval] | None:
    """Average precision and area of a predictor that gives every pixel its region's share of carbonate.

    Shares are those of the train scenes' valid pixels, that of all of them for a region without any.
    """
    train = [scene for scene in manifest.of("train") if scene.carbonate is not None]
    if not train or not table.counts:
        return None
    sums: dict[str, np.ndarray] = {}
    for scene in train:
        assert scene.carbonate is not None
        pixels = np.array([scene.carbonate.sum(), scene.valid.sum()], dtype=np.float64)
        for key in (region_name(scene), ""):
            sums[key] = sums.get(key, 0.0) + pixels
    counts = {}
    for i in range(len(pairs)):
        scene = pairs[i].scene
        if scene.carbonate is None:
            continue
        found, of = sums.get(region_name(scene), sums[""])
        share, true, valid = found / of, int(scene.carbonate.sum()), int(scene.valid.sum())
        curve = np.zeros((2, BINS))
        curve[:, min(int(share * BINS), BINS - 1)] = true, valid - true
        counts[scene.observation_id] = Counts(share * true, share * valid, true, valid, curve)
    known = ScoreTable(table.rows, counts)
    return {name: known.interval(f"carbonate/{name}") for name in ("ap", "area")}
