"""The loop, on one page; knows neither MLflow nor Optuna: it calls on_step and on_epoch."""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from crism_mlops.config import EngineConfig, TrainConfig
from crism_mlops.errors import MemoryShortError, NonFiniteError, TrainingError
from crism_mlops.interrupts import holding_interrupts
from crism_mlops.models.autoencoder import InputAutoencoder
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.resume import Progress, ResumeFolder, TrainingState
from crism_mlops.models.rows import Rows, Tensors, batches
from crism_mlops.models.unet import UNet

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)
Trainable = UNet | InstructPix2Pix | InputAutoencoder


@dataclass(frozen=True, slots=True)
class Trained:
    """How a training ended: steps taken, seconds; why (epochs, patience or time); the micro-batch that memory
    allowed."""

    steps: int
    seconds: float
    ended: str
    micro_batch: int


def train(
    model: Trainable,
    data: Rows,
    weights: torch.Tensor,
    config: TrainConfig,
    seed: int,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    on_epoch: Callable[[int, float, bool], bool] = lambda epoch, loss, last: False,
    engine: EngineConfig | None = None,
    resume: ResumeFolder | None = None,
    notes: dict[str, Any] | None = None,
    on_resume: Callable[[int], None] = lambda step: None,
) -> Trained:
    """Train in place, or go on where `resume` was left.

    `data` holds one row a sample (from `model.prepare`), `weights` N float64 the samples' shares
    in an epoch (all equal: plain shuffling). `on_step(step, total, loss)` after each step;
    `on_epoch(epoch, mean loss, last)` after each epoch, with the averaged weights where there are
    any: it returns whether that is enough. Both count from 1; what they raise ends the loop. What
    on_epoch keeps in `notes` (JSON content) is there again when `on_resume(step)` is called. Raises TrainingError when
    losses are not finite or memory is short even for one sample, UnwrittenError when a state cannot be written.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    engine = engine or EngineConfig()
    if config.mixed_precision == "fp16" and not model.device.startswith("cuda"):
        # accelerate would leave it out without a word.
        raise TrainingError(f"train.mixed_precision: fp16 needs a GPU, this is {model.device}; use bf16 or no")
    # accelerate keeps the first precision of a process for good; a later trial may have another.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=model.device == "cpu", mixed_precision=config.mixed_precision)
    model.configure(engine)
    # On a CPU it makes the U-Net of convolutions faster (by a sixth), and attention no slower.
    convolutions = model.device.startswith("cuda") or isinstance(model, UNet)
    for module in model.modules:
        if engine.channels_last or (engine.channels_last is None and convolutions):
            module.to(memory_format=torch.channels_last)
        if engine.compile:
            module.compile()
    data = data.resident(model.device)
    groups = model.parameter_groups(config.learning_rate, config.text_learning_rate)
    parameters = [p for group in groups for p in group["params"]]
    adam = torch.optim.AdamW(groups, weight_decay=config.weight_decay, fused=model.device != "mps")
    rates = [group["lr"] for group in adam.param_groups]
    optimizer = accelerator.prepare(adam)
    average = _average(parameters, config.ema_decay)
    generator = torch.Generator().manual_seed(seed)
    count = -(-len(data) // config.batch_size)
    total = count * config.epochs
    progress = Progress(micro_batch=engine.micro_batch, notes={} if notes is None else notes)
    state = TrainingState(model.modules, parameters, adam, average, accelerator.scaler, generator, progress)
    if resume is not None and (found := resume.load()) is not None:
        state.restore(*found)
        # What memory allowed last time, or less where the settings say so now.
        sizes = [size for size in (progress.micro_batch, engine.micro_batch) if size is not None]
        progress.micro_batch = min(sizes, default=None)
        log.info("going on after step %d of %d", progress.step, total)
        on_resume(progress.step)
    saved = begun = time.monotonic()
    before = progress.seconds

    def save() -> None:
        nonlocal saved
        if resume is not None:
            resume.save(progress.step, *state.content())
            saved = time.monotonic()

    whole = True
    try:
        while not progress.ended:
            up = False
            if not len(state.order):
                state.order = _order(weights, generator)
            for module in model.modules:
                module.train()
            # Batches differ by one row at most: a last batch of a few leftovers would weigh each of them
            # more than the others, and batch normalisation has no statistics in a batch of one.
            for batch in batches(data, state.order.tensor_split(count)[progress.batch :], model.device):
                with holding_interrupts(limit=1):
                    whole = False
                    for group, rate in zip(adam.param_groups, rates, strict=True):
                        group["lr"] = rate * _rate(config, progress.step, total)
                    drawn = model.draw(batch.tensors, generator)
                    value, norm = _step(
                        model, drawn, optimizer, parameters, accelerator, config.gradient_clip, progress
                    )
                    progress.step += 1
                    progress.batch += 1
                    if math.isfinite(value) and (math.isfinite(norm) or accelerator.scaler is not None):
                        progress.bad_steps = 0
                        progress.losses, progress.counted = progress.losses + value, progress.counted + 1
                        if average is not None:
                            average.step(parameters)
                    else:
                        progress.bad_steps += 1
                        _bad(progress, total, value, norm, [data.labels[int(i)] for i in batch.rows], config)
                    progress.seconds = before + time.monotonic() - begun
                    if time.monotonic() - saved >= 60.0 * engine.save_minutes:
                        save()
                    whole = True
                on_step(progress.step, total, value)
                if config.max_minutes is not None and progress.seconds >= 60.0 * config.max_minutes:
                    up = True
                    break
            for module in model.modules:
                module.eval()
            last = up or progress.epoch + 1 == config.epochs
            with _averaged(average, parameters):
                enough = on_epoch(progress.epoch + 1, progress.losses / max(progress.counted, 1), last)
            progress.epoch, progress.batch, progress.losses, progress.counted = progress.epoch + 1, 0, 0.0, 0
            state.order = state.order[:0]
            if last or enough:
                progress.ended = "time" if up else "epochs" if last else "patience"
    except KeyboardInterrupt:
        # Between two steps all is whole (what follows an epoch is done again); in the middle of one
        # it was asked for a second time, to end at once.
        if whole:
            save()
        raise
    # What comes after training may be interrupted as well.
    save()
    if average is not None:
        average.copy_to(parameters)
    return Trained(progress.step, progress.seconds, progress.ended, progress.micro_batch or config.batch_size)


def _step(
    model: Trainable,
    drawn: Tensors,
    optimizer: Any,
    parameters: list[torch.nn.Parameter],
    accelerator: Any,
    gradient_clip: float,
    progress: Progress,
) -> tuple[float, float]:
    """One step on a drawn batch, a micro-batch at a time: its loss and the norm of its gradient.

    The parts' losses add up to that of the whole batch, as all that is random is drawn for it before.
    Where memory is short they become smaller, for good. Nothing is updated where a figure is not finite.
    """
    import torch

    total = model.count(drawn).clamp_min(1.0)
    size = len(next(iter(drawn.values())))
    while True:
        micro = min(progress.micro_batch or size, size)
        value = 0.0
        try:
            optimizer.zero_grad(set_to_none=True)
            for start in range(0, size, micro):
                part = drawn if micro == size else {name: t[start : start + micro] for name, t in drawn.items()}
                with accelerator.autocast():
                    loss = model.errors(part) / total
                accelerator.backward(loss)
                value += float(loss.detach())
            break
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if micro == 1:
                raise MemoryShortError(
                    f"memory does not suffice for a batch of one ({str(error).splitlines()[0][:120]}); lower "
                    "data.resolution, set engine.gradient_checkpointing or model.lora"
                ) from error
            progress.micro_batch = -(-micro // 2)
            log.warning(
                "memory does not suffice for %d samples at once: %d from here on, a batch is still %d (accumulated)",
                micro, progress.micro_batch, size,
            )  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    norm = float(accelerator.clip_grad_norm_(parameters, gradient_clip))
    # A scaler skips a step by itself where half precision overflowed, and scales less next time.
    if math.isfinite(value) and (math.isfinite(norm) or accelerator.scaler is not None):
        optimizer.step()
    return value, norm


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says that memory is short: a class of its own on a GPU, words on a CPU."""
    import torch

    words = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def _bad(progress: Progress, total: int, value: float, norm: float, scenes: list[str], config: TrainConfig) -> None:
    """Log a step without a finite figure; raise TrainingError for the last one that is allowed."""
    named = ", ".join(list(dict.fromkeys(scenes))[:8])
    what = (
        f"loss is {value}, gradient norm {norm:g}, at step {progress.step} of {total} (epoch {progress.epoch + 1}), "
        f"scenes {named}"
    )
    if progress.bad_steps >= config.bad_steps:
        raise NonFiniteError(
            f"{what}; {progress.bad_steps} such steps one after the other: lower train.learning_rate (now "
            f"{config.learning_rate:g}) or train.gradient_clip (now {config.gradient_clip:g}), or look at these scenes"
        )
    log.warning("%s; the step is left out", what)


def _rate(config: TrainConfig, step: int, total: int) -> float:
    """Share of the learning rate at a step, counted from 0: the warm-up, then the schedule to 0."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
    if config.schedule == "linear":
        return 1.0 - done
    return 0.5 * (1.0 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1.0


def _order(weights: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Row numbers of one epoch: a permutation, or draws by weight where weights differ."""
    import torch

    if bool((weights == weights[0]).all()):
        return torch.randperm(len(weights), generator=generator)
    return torch.multinomial(weights, len(weights), replacement=True, generator=generator)


def _average(parameters: list[torch.nn.Parameter], decay: float | None) -> Any:
    """The exponential average of weights (Polyak; decay rises to its value over the first steps)."""
    if decay is None:
        return None
    from diffusers.training_utils import EMAModel

    return EMAModel(parameters, decay=decay, foreach=True)


@contextmanager
def _averaged(average: Any, parameters: list[torch.nn.Parameter]) -> Iterator[None]:
    """The averaged weights in the model's place, meanwhile."""
    if average is None:
        yield
        return
    average.store(parameters)
    average.copy_to(parameters)
    try:
        yield
    finally:
        average.restore(parameters)
