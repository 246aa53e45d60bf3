"""The loop on models small enough to follow by hand."""

import math
import shutil
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import segmentation_models_pytorch as smp
import torch

from crism_mlops.config import EngineConfig, TrainConfig, UNetModel
from crism_mlops.errors import TrainingError
from crism_mlops.models.latents import weights_digest
from crism_mlops.models.resume import ResumeFolder
from crism_mlops.models.rows import Rows, Tensors
from crism_mlops.models.unet import UNet
from crism_mlops.training import Trained, out_of_memory, train

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


# ---- what a step costs, and what ends it


def weights_after(model: UNet, **settings: Any) -> list[torch.Tensor]:
    config = TrainConfig(**{"learning_rate": 1e-3, "batch_size": 4, "epochs": 2, **settings.pop("train", {})})
    train(model, linear_truth(), torch.ones(8), config, 0, engine=EngineConfig(**settings))
    return [p.detach().clone() for p in model.module.parameters()]


def plain_unet() -> UNet:
    """Without batch normalisation: a sample's share of the gradient does not depend on its neighbours."""
    torch.manual_seed(0)
    return UNet(
        torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.SiLU(), torch.nn.Conv2d(8, 3, 1)), UNET
    )


@pytest.mark.parametrize("micro", [1, 2, 3])
def test_micro_batches_add_up_to_the_batch(micro: int) -> None:
    for one, other in zip(weights_after(plain_unet()), weights_after(plain_unet(), micro_batch=micro), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Cramped(Recorder):
    """Has memory for `room` samples at once."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room = room
        self.sizes: list[int] = []

    def errors(self, batch: Tensors) -> torch.Tensor:
        self.sizes.append(len(batch["row"]))
        if len(batch["row"]) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return super().errors(batch)


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch(caplog: pytest.LogCaptureFixture) -> None:
    model, whole = Cramped(3), Recorder()
    config = TrainConfig(learning_rate=1e-2, batch_size=8, epochs=2)
    done = run(model, 16, config)
    assert model.sizes[:5] == [8, 4, 2, 2, 2]
    assert model.sizes[5:] == [2] * 13
    assert (done.steps, done.micro_batch) == (4, 2)
    run(whole, 16, config)
    torch.testing.assert_close(model.module.weight, whole.module.weight)
    assert model.batches == whole.batches, "a batch is drawn once, however often it is tried"
    assert "not suffice for 8 samples at once: 4 from here on, a batch is still 8" in caplog.text


def test_out_of_memory_with_one_sample_says_what_to_do() -> None:
    with pytest.raises(TrainingError, match=r"batch of one .*gradient_checkpointing or model\.lora"):
        run(Cramped(0), 4, TrainConfig(batch_size=4, epochs=1))


@pytest.mark.parametrize("words", ["DefaultCPUAllocator: can't allocate memory: you tried to", "CUDA out of memory"])
def test_torchs_words_for_short_memory(words: str) -> None:
    assert out_of_memory(RuntimeError(words))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_a_cpu_that_has_no_memory_left_says_so_in_these_words() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(1 << 60)
    assert out_of_memory(error.value)


def test_another_error_of_a_step_passes_through() -> None:
    class Broken(Recorder):
        def errors(self, batch: Tensors) -> torch.Tensor:
            raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        run(Broken(), 4, TrainConfig(batch_size=2, epochs=1))


def test_a_few_bad_steps_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    model, places = Recorder(), []

    def on_step(step: int, total: int, loss: float) -> None:
        model.slope = math.nan if step in (2, 3, 5) else 1.0
        places.append(model.module.weight.item())

    losses: list[float] = []
    config = TrainConfig(learning_rate=1e-2, batch_size=1, epochs=1, bad_steps=3)
    run(model, 8, config, on_step=on_step, on_epoch=lambda epoch, loss, last: bool(losses.append(loss)))
    assert places[1] == places[2] == places[3], "steps 3 and 4 changed nothing"
    assert places[4] < places[3]
    assert places[5] == places[4]
    assert math.isfinite(losses[0])
    assert "gradient norm nan, at step 3 of 8 (epoch 1), scenes" in caplog.text
    assert caplog.text.count("the step is left out") == 3


def test_too_many_bad_steps_one_after_the_other_end_it() -> None:
    model = Recorder(slope=math.inf)
    config = TrainConfig(learning_rate=1e-3, batch_size=2, epochs=9, bad_steps=4)
    with pytest.raises(TrainingError, match=r"step 4 of 18 .*scenes \d, \d; 4 such steps one after the other"):
        run(model, 4, config)
    assert model.module.weight.item() == 2.0


def test_a_gradient_that_is_not_finite_changes_nothing() -> None:
    class Steep(Recorder):
        def errors(self, batch: Tensors) -> torch.Tensor:
            # The value is 0; its slope at 0 is infinite.
            return torch.sqrt(self.module.weight.sum() * 0.0)

    model = Steep()
    with pytest.raises(TrainingError, match="gradient norm nan"):
        run(model, 4, TrainConfig(batch_size=4, epochs=9))
    assert model.module.weight.item() == 2.0


def test_time_is_up() -> None:
    ends: list[tuple[int, bool]] = []
    config = TrainConfig(batch_size=1, epochs=50, max_minutes=1e-9)
    done = run(Recorder(), 4, config, on_epoch=lambda epoch, loss, last: bool(ends.append((epoch, last))))
    assert (done.steps, done.ended) == (1, "time")
    assert ends == [(1, True)]


def test_enough_is_enough() -> None:
    done = run(Recorder(), 4, TrainConfig(batch_size=2, epochs=50), on_epoch=lambda epoch, loss, last: epoch == 3)
    assert (done.steps, done.ended) == (6, "patience")


@pytest.mark.parametrize(
    ("schedule", "shares"),
    [
        ("constant", [0.5, 1, 1, 1, 1, 1]),
        ("linear", [0.5, 1, 1, 0.75, 0.5, 0.25]),
        ("cosine", [0.5, 1, 1, 0.5 + 0.25 * 2**0.5, 0.5, 0.5 - 0.25 * 2**0.5]),
    ],
)
def test_schedules(schedule: str, shares: list[float]) -> None:
    model, places = Recorder(), [2.0]
    config = TrainConfig(learning_rate=1e-2, batch_size=1, epochs=1, warmup_steps=2, schedule=schedule)
    run(model, 6, config, on_step=lambda step, total, loss: places.append(model.module.weight.item()))
    assert [a - b for a, b in pairwise(places)] == pytest.approx([0.01 * s for s in shares], rel=1e-3)


def test_the_average_is_what_is_scored_and_kept() -> None:
    model, places, scored = Recorder(), [], []

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        scored.append(model.module.weight.item())
        return False

    config = TrainConfig(learning_rate=1e-1, batch_size=1, epochs=2, ema_decay=0.5)
    run(
        model, 4, config, on_step=lambda step, total, loss: places.append(model.module.weight.item()), on_epoch=on_epoch
    )
    # The decay rises: (1 + n) / (10 + n) after n steps before, 0.5 at most; the first average is the start.
    average, averages = 2.0, []
    for step, place in enumerate(places):
        decay = min(0.5, (1 + step) / (10 + step)) if step else 0.0
        average = decay * average + (1.0 - decay) * place
        averages.append(average)
    assert scored == pytest.approx([averages[3], averages[7]], rel=1e-5)
    assert model.module.weight.item() == pytest.approx(averages[7], rel=1e-5)


def test_weights_decay_apart_from_the_gradient() -> None:
    """AdamW (Loshchilov and Hutter 2019): decay is a share of the weight, whatever Adam makes of the gradient."""
    one, two = Recorder(), Recorder()
    run(one, 1, TrainConfig(learning_rate=1e-2, epochs=1))
    run(two, 1, TrainConfig(learning_rate=1e-2, epochs=1, weight_decay=0.1))
    assert one.module.weight.item() - two.module.weight.item() == pytest.approx(1e-2 * 0.1 * 2.0, rel=1e-3)


@pytest.mark.parametrize("settings", [{"channels_last": True}, {"compile": True}])
def test_another_way_of_computing_gives_the_same_up_to_rounding(settings: dict[str, Any]) -> None:
    if settings.get("compile") and shutil.which("g++") is None:
        pytest.skip("torch.compile needs a C++ compiler")
    for one, other in zip(weights_after(plain_unet()), weights_after(plain_unet(), **settings), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)


# ---- rows


def test_rows_of_blocks_labels_and_tables() -> None:
    blocks = [
        {"x": torch.tensor([[1.0], [2.0]]), "word_row": torch.tensor([1, 0])},
        {"x": torch.tensor([[3.0]]), "word_row": torch.tensor([1])},
    ]
    rows = Rows(blocks, ["a", "a", "b"], {"word": torch.tensor([[10.0], [20.0]])})
    batch = rows.batch(torch.tensor([2, 1]))
    assert batch["x"].tolist() == [[3.0], [2.0]]
    assert batch["word"].tolist() == [[20.0], [10.0]]
    assert set(batch) == {"x", "word"}
    few = rows.only(torch.tensor([True, False, True]))
    assert (len(few), few.labels) == (2, ("a", "b"))
    assert few.batch([1])["x"].tolist() == [[3.0]]
    assert rows.nbytes == 3 * 4 + 3 * 8


def test_an_error_while_a_batch_is_gathered_ends_training() -> None:
    rows = Rows([{"row": torch.arange(4)}])
    rows._places[2] = (7, 0)
    with pytest.raises(IndexError):
        train(Recorder(), rows, torch.ones(4), TrainConfig(batch_size=2, epochs=1), 0)


@pytest.mark.parametrize(
    ("settings", "why"),
    [({"epochs": 3}, "epochs"), ({"epochs": 9}, "patience"), ({"epochs": 9, "max_minutes": 1e-9}, "time")],
)
def test_a_training_that_has_ended_does_not_go_on(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    """What comes after it was interrupted: scoring is done again, no step is."""
    config = TrainConfig(learning_rate=1e-2, batch_size=2, **settings)

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        return epoch == 2 and settings["epochs"] == 9

    first, second = Recorder(), Recorder()
    done = run(first, 4, config, on_epoch=on_epoch, resume=ResumeFolder(tmp_path, "one"))
    again = run(second, 4, config, on_epoch=on_epoch, resume=ResumeFolder(tmp_path, "one"))
    assert (again.steps, again.ended) == (done.steps, done.ended) == (done.steps, why)
    assert second.batches == []
    assert second.module.weight.item() == first.module.weight.item()


def test_half_precision_needs_a_gpu() -> None:
    with pytest.raises(TrainingError, match="fp16 needs a GPU, this is cpu; use bf16 or no"):
        run(Recorder(), 4, TrainConfig(batch_size=2, epochs=1, mixed_precision="fp16"))


def test_undefined_figures_do_not_cost_the_state(tmp_path: Path) -> None:
    """A validation figure of a scene that has none is NaN in the history that goes with a state."""
    folder = ResumeFolder(tmp_path, "one")
    folder.save(7, {"a": torch.ones(2)}, {"history": [{"ssim": float("nan"), "psnr": float("inf")}]})
    found = folder.load()
    assert found is not None
    assert found[1]["step"] == 7
    assert math.isnan(found[1]["history"][0]["ssim"])
    assert found[1]["history"][0]["psnr"] == math.inf
