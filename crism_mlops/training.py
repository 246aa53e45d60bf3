"""The loop, on one page; knows neither MLflow nor Optuna: it calls on_step and on_epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from crism_mlops.config import TrainConfig
from crism_mlops.errors import TrainingError
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import Tensors
from crism_mlops.models.unet import UNet

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)


def train(
    model: UNet | InstructPix2Pix,
    data: Tensors,
    weights: torch.Tensor,
    config: TrainConfig,
    seed: int,
    on_step: Callable[[int, int, float], None] = lambda step, total, loss: None,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> int:
    """Train in place; returns the number of steps taken.

    `data` holds one row a sample (from `model.prepare`), `weights` N float64 the samples' shares
    in an epoch (all equal: plain shuffling). `on_step(step, total, loss)` after each step,
    `on_epoch(epoch, mean loss)` after each epoch, both counted from 1; what they raise ends the
    loop. Raises TrainingError when a loss is not finite.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # accelerate keeps the first precision of a process for good; a later trial may have another.
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=model.device == "cpu", mixed_precision=config.mixed_precision)
    parameters = [p for module in model.modules for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay)
    optimizer = accelerator.prepare(optimizer)
    generator = torch.Generator().manual_seed(seed)
    total = _batch_count(weights, config.batch_size) * config.epochs
    step = 0
    for epoch in range(1, config.epochs + 1):
        for module in model.modules:
            module.train()
        losses = []
        for rows in _batches(weights, config.batch_size, generator):
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
            batch = {name: tensor[rows].to(model.device) for name, tensor in data.items()}
            with accelerator.autocast():
                loss = model.loss(batch, generator)
            value = float(loss.detach())
            step += 1
            if value != value or value in (float("inf"), float("-inf")):
                raise TrainingError(
                    f"loss is {value} at step {step} of {total} (epoch {epoch}); lower train.learning_rate "
                    f"(now {config.learning_rate:g}) or train.gradient_clip (now {config.gradient_clip:g})"
                )
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(parameters, config.gradient_clip)
            optimizer.step()
            losses.append(value)
            on_step(step, total, value)
        for module in model.modules:
            module.eval()
        on_epoch(epoch, sum(losses) / len(losses))
    return step


def _batches(weights: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Row numbers of one epoch's batches: a permutation, or draws by weight where weights differ.

    Batches differ by one row at most: a last batch of a few leftovers would weigh each of them more
    than the others, and batch normalisation has no statistics in a batch of one.
    """
    import torch

    if bool((weights == weights[0]).all()):
        order = torch.randperm(len(weights), generator=generator)
    else:
        order = torch.multinomial(weights, len(weights), replacement=True, generator=generator)
    yield from order.tensor_split(_batch_count(weights, size))


def _batch_count(weights: torch.Tensor, size: int) -> int:
    return -(-len(weights) // size)
