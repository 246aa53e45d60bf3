"""The loop on models small enough to follow by hand."""

import math
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch

from crism_mlops.config import EngineConfig, TrainConfig, UNetModel
from crism_mlops.errors import TrainingError
from crism_mlops.models.latents import weights_digest
from crism_mlops.models.rows import Rows, Tensors
from crism_mlops.models.unet import UNet
from crism_mlops.training import Trained, train

UNET = UNetModel(kind="unet", encoder="resnet18", encoder_weights=None)


class Recorder:
    """A model of one weight that keeps the rows of every batch; its loss is w times `slope`."""

    device = "cpu"

    def __init__(self, slope: float = 1.0) -> None:
        self.module = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.constant_(self.module.weight, 2.0)
        self.modules = [self.module]
        self.slope = slope
        self.batches: list[list[int]] = []
        self.training: list[bool] = []

    def configure(self, engine: EngineConfig) -> None:
        pass

    def parameter_groups(self, rate: float, text_rate: float | None) -> list[dict[str, Any]]:
        return [{"params": list(self.module.parameters()), "lr": rate}]

    def draw(self, batch: Tensors, generator: torch.Generator) -> Tensors:
        self.batches.append(batch["row"].tolist())
        self.training.append(self.module.training)
        return batch

    def count(self, batch: Tensors) -> torch.Tensor:
        return torch.tensor(float(len(batch["row"])))

    def errors(self, batch: Tensors) -> torch.Tensor:
        return len(batch["row"]) * self.slope * self.module.weight.sum()


def run(model: Any, count: int, config: TrainConfig, seed: int = 0, **options: Any) -> Trained:
    weights = options.pop("weights", torch.ones(count, dtype=torch.float64))
    return train(model, Rows([{"row": torch.arange(count)}]), weights, config, seed, **options)


def tiny_unet(seed: int) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = smp.Unet("resnet18", encoder_depth=3, encoder_weights=None, decoder_channels=(16, 8, 8), classes=3)
    return UNet(module, UNET)


def linear_truth(count: int = 8, side: int = 32) -> Rows:
    """Targets that are a linear map of the input's channels."""
    images = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mix = torch.tensor([[0.6, -0.2, 0.1], [0.1, 0.5, 0.0], [0.0, 0.3, -0.4]])
    return Rows(
        [
            {
                "input": images,
                "target": torch.einsum("oc,nchw->nohw", mix, images),
                "weight": torch.ones(count, 1, side, side, dtype=torch.bool),
            }
        ]
    )


def test_a_unet_learns_a_linear_map() -> None:
    losses: list[float] = []
    done = train(
        tiny_unet(0), linear_truth(), torch.ones(8), TrainConfig(learning_rate=1e-2, batch_size=4, epochs=12), 0,
        on_epoch=lambda epoch, loss, last: bool(losses.append(loss)),
    )  # fmt: skip
    assert done.steps == 24
    assert losses[-1] < 0.4 * losses[0]


def test_a_seed_gives_the_same_weights_bit_for_bit() -> None:
    def digest(seed: int) -> str:
        model = tiny_unet(0)
        train(model, linear_truth(), torch.ones(8), TrainConfig(learning_rate=1e-3, batch_size=3, epochs=2), seed)
        return weights_digest(model.module)

    assert digest(1) == digest(1) != digest(2)


@pytest.mark.parametrize(("count", "size", "sizes"), [(8, 4, [4, 4]), (9, 4, [3, 3, 3]), (5, 8, [5]), (1, 8, [1])])
def test_an_epoch_shows_every_row_once_in_batches_of_like_size(count: int, size: int, sizes: list[int]) -> None:
    model = Recorder()
    steps = run(model, count, TrainConfig(batch_size=size, epochs=2)).steps
    assert steps == 2 * len(sizes) == len(model.batches)
    assert [len(rows) for rows in model.batches] == sizes * 2
    half = len(sizes)
    first, second = ([row for rows in part for row in rows] for part in (model.batches[:half], model.batches[half:]))
    assert sorted(first) == sorted(second) == list(range(count))
    assert count < 8 or first != second


def test_rows_are_drawn_by_weight_and_never_without_one() -> None:
    model = Recorder()
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0], dtype=torch.float64)
    run(model, 4, TrainConfig(batch_size=2, epochs=500), weights=weights)
    drawn = Counter(row for rows in model.batches for row in rows)
    assert set(drawn) == {1, 2}
    assert sum(drawn.values()) == 2000
    assert drawn[2] / 2000 == pytest.approx(0.75, abs=0.03)


def test_callbacks_count_from_one() -> None:
    steps: list[tuple[int, int, float]] = []
    epochs: list[tuple[int, float]] = []
    events: list[str] = []
    model = Recorder()

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        epochs.append((epoch, loss))
        events.append("epoch")
        assert last == (epoch == 2)
        assert not model.module.training
        return False

    def on_step(step: int, total: int, loss: float) -> None:
        steps.append((step, total, loss))
        events.append("step")

    assert run(model, 5, TrainConfig(batch_size=2, epochs=2), on_step=on_step, on_epoch=on_epoch).steps == 6
    assert [s[:2] for s in steps] == [(i, 6) for i in range(1, 7)]
    assert events == ["step"] * 3 + ["epoch"] + ["step"] * 3 + ["epoch"]
    assert [e for e, _ in epochs] == [1, 2]
    for epoch, loss in epochs:
        assert loss == pytest.approx(sum(s[2] for s in steps[3 * epoch - 3 : 3 * epoch]) / 3)
    assert all(model.training)
    assert not model.module.training


def test_warm_up_raises_the_learning_rate_step_by_step() -> None:
    """Adam's steps are as long as the learning rate while the gradient stays the same."""
    model, places = Recorder(), [2.0]
    run(
        model, 4, TrainConfig(learning_rate=1e-2, batch_size=1, epochs=2, warmup_steps=5),
        on_step=lambda step, total, loss: places.append(model.module.weight.item()),
    )  # fmt: skip
    rates = [a - b for a, b in pairwise(places)]
    assert rates == pytest.approx([0.002, 0.004, 0.006, 0.008, 0.01, 0.01, 0.01, 0.01], rel=1e-3)


def test_gradients_are_clipped() -> None:
    seen: list[float] = []
    model = Recorder(slope=100.0)

    def on_step(step: int, total: int, loss: float) -> None:
        assert model.module.weight.grad is not None
        seen.append(model.module.weight.grad.item())

    run(model, 1, TrainConfig(epochs=1, gradient_clip=0.5), on_step=on_step)
    assert seen == [pytest.approx(0.5, rel=1e-3)]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_not_finite_ends_with_its_step(bad: float) -> None:
    model = Recorder()

    def on_step(step: int, total: int, loss: float) -> None:
        if step == 2:
            model.slope = bad

    config = TrainConfig(learning_rate=1e-3, batch_size=1, epochs=2, bad_steps=1)
    with pytest.raises(
        TrainingError, match=r"step 3 of 4 \(epoch 2\), scenes [01]; 1 such .*lower train\.learning_rate \(now 0\.001\)"
    ):
        run(model, 2, config, on_step=on_step)
    assert math.isfinite(model.module.weight.item())  # what was learnt before it is still there


class PrunedError(Exception):
    """Stands in for Optuna's."""


@pytest.mark.parametrize("callback", ["on_epoch", "on_step"])
def test_what_a_callback_raises_passes_through(callback: str) -> None:
    def stop(*_: object) -> None:
        raise PrunedError

    model = Recorder()
    with pytest.raises(PrunedError):
        run(model, 4, TrainConfig(batch_size=2, epochs=9), **{callback: stop})
    assert len(model.batches) == (2 if callback == "on_epoch" else 1)


def test_the_next_trial_may_have_another_precision() -> None:
    """accelerate holds one precision a process, and a sweep may search it."""
    for precision in ("no", "bf16", "no"):
        model = tiny_unet(0)
        dtypes: list[torch.dtype] = []
        model.module.segmentation_head.register_forward_hook(_dtype_of(dtypes))
        config = TrainConfig(learning_rate=1e-3, batch_size=4, epochs=1, mixed_precision=precision)
        train(model, linear_truth(4), torch.ones(4), config, 0)
        assert dtypes == [torch.bfloat16 if precision == "bf16" else torch.float32]


def _dtype_of(dtypes: list[torch.dtype]) -> Callable[..., None]:
    return lambda module, inputs, output: dtypes.append(output.dtype)


def test_frozen_parameters_stay() -> None:
    model = tiny_unet(0)
    model.module.encoder.requires_grad_(False)
    before = model.module.encoder.conv1.weight.clone()
    train(model, linear_truth(4), torch.ones(4), TrainConfig(learning_rate=1e-2, batch_size=2, epochs=1), 0)
    assert torch.equal(model.module.encoder.conv1.weight, before)
