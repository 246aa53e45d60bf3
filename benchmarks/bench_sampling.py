"""How many denoising steps each solver needs: RMSE against a run of 100 DDIM steps, on the same scenes and noise.

Without arguments the tiny model that ships with the package predicts simulated scenes that it has not seen; with a
checkpoint's folder and a sweep's file, that checkpoint the sweep's scenes other than the test scenes. A row's interval
is that of the ratio of the two mean RMSEs, paired by scene. Whether a solver has converged is a question of arithmetic
on these scenes, not of Mars: scenes are drawn one by one here, also where they see the same ground.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import SweepConfig, load_sweep
from crism_mlops.dataset.manifest import Pair, build_manifest
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.evaluation.evaluate import predict_pairs, score_pairs
from crism_mlops.evaluation.inference import interval
from crism_mlops.models import instruct_pix2pix
from crism_mlops.models.checkpoint import load_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies.score import manifest_as_seen

SWEEP = Path(__file__).parent.parent / "sweeps" / "quickstart-ip2p.yaml"
UNSEEN = ("data.simulated.seed=77", "data.simulated.scenes=60")
STEPS = (1, 2, 4, 8, 15, 20, 25, 30, 40)
SOLVERS = ("dpm++", "unipc", "euler", "ddim")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="a checkpoint's folder")
    parser.add_argument("sweep", type=Path, nargs="?", default=SWEEP)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--scenes", type=int, default=24, help="at most so many")
    parser.add_argument("--guidance", type=float, nargs=2, default=(1.0, 1.0), metavar=("IMAGE", "TEXT"))
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS)
    parser.add_argument("--solvers", nargs="+", default=SOLVERS, choices=SOLVERS)
    asked = parser.parse_args()
    config = load_sweep(asked.sweep, (*(UNSEEN if asked.checkpoint is None else ()), *asked.set))
    model, pairs = opened(asked.checkpoint, config)
    pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(asked.scenes, len(pairs))).astype(int)]
    clusters = [p.scene.observation_id for p in pairs]
    image, text = asked.guidance
    what = "the tiny model" if asked.checkpoint is None else "the checkpoint"
    print(f"{what}, {len(pairs)} scenes, guidance {image:g} (image), {text:g} (text)\n")

    def errors(sampler: str, steps: int) -> tuple[NDArray[np.float64], float]:
        model.config = model.config.model_copy(
            update={"sampler": sampler, "steps": steps, "image_guidance": image, "text_guidance": text}
        )
        begun = time.perf_counter()
        prompt = partial(scene_prompt, model.config)
        predicted = predict_pairs(model, pairs, prompt, config.evaluate, config.data.resolution)
        seconds = (time.perf_counter() - begun) / len(pairs)
        rows = score_pairs(predicted, pairs, ("valid",)).rows
        by_id = {row["observation_id"]: row["valid/rmse"] for row in rows}
        return np.array([by_id[p.scene.observation_id] for p in pairs]), seconds

    reference, seconds = errors("ddim", 100)
    print("| solver | steps | mean RMSE | against 100 DDIM steps | 95 % interval | s a scene |")
    print("| --- | ---: | ---: | ---: | --- | ---: |")
    print(f"| ddim | 100 | {reference.mean():.3f} | | | {seconds:.3f} |", flush=True)
    for sampler in asked.solvers:
        for steps in (*asked.steps, *(() if sampler == "ddim" else (100,))):
            found, seconds = errors(sampler, steps)
            print(f"| {sampler} | {steps} | {found.mean():.3f} | {ratio(found, reference, clusters)} | {seconds:.3f} |",
                  flush=True)  # fmt: skip


def opened(checkpoint: Path | None, config: SweepConfig) -> tuple[InstructPix2Pix, Sequence[Pair]]:
    """The model, and the scenes to predict: none of the sweep's test scenes."""
    scenes = load_scenes(config.data, lambda done, total: None)
    if checkpoint is None:
        assert config.model.kind == "instruct_pix2pix"
        pairs = build_manifest(scenes, config.data, config.split).pairs("train")
        return instruct_pix2pix.build(config.model, 0), pairs
    model, card = load_checkpoint(checkpoint)
    assert isinstance(model, InstructPix2Pix), "a U-Net takes no steps"
    manifest = manifest_as_seen(checkpoint, card.config, card, config, scenes)
    return model, [*manifest.pairs("validation"), *manifest.pairs("train")]


def ratio(found: NDArray[np.float64], reference: NDArray[np.float64], clusters: Sequence[str]) -> str:
    """Ratio of the means less one and its interval, in per cent: two cells of a table."""
    one = interval(np.column_stack([found, reference]), clusters, lambda totals: totals[..., 0] / totals[..., 1])
    bounds = "too few scenes" if one.too_few else f"{one.low - 1.0:+.2%} to {one.high - 1.0:+.2%}"
    return f"{one.mean - 1.0:+.2%} | {bounds}"


if __name__ == "__main__":
    main()
