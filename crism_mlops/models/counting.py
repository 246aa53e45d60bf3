"""What running a model takes, counted without running it: operations, and the memory of tensors.

Operations are counted on torch's meta device, memory on fake tensors of the CPU: both have shapes and
no content. A kernel's own workspace is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from crism_mlops.errors import one_line

if TYPE_CHECKING:
    import torch

FLOAT = 4  # bytes: weights are float32 whatever the precision of a step


@dataclass(frozen=True, slots=True)
class Work:
    """What one sample takes at a resolution, counted; a multiplication and an addition are two operations.

    step_flops: forward and backward; forward_flops: the network once, predicting; encode_flops,
    decode_flops: the autoencoder (0 without one). activation_bytes: the most that a forward pass of
    training holds; cast_bytes: besides, whatever the batch (autocast's copies of weights);
    predict_bytes: the most that predicting an image holds. problem: why they are None, in words.
    condition_bytes, target_bytes: the cached latents of a view; prompt_bytes: the cached embeddings of a
    prompt.
    """

    step_flops: int | None = None
    forward_flops: int | None = None
    encode_flops: int = 0
    decode_flops: int = 0
    activation_bytes: int | None = None
    cast_bytes: int = 0
    predict_bytes: int | None = None
    condition_bytes: int = 0
    target_bytes: int = 0
    prompt_bytes: int = 0
    problem: str | None = None


def counted(
    work: Work, modules: list[Any], train: Callable[[int, str], Any], forward: Callable[[int, str], Any], half: bool,
    frozen: list[Any] | None = None, decode: Callable[[int, str], Any] | None = None,
) -> Work:  # fmt: skip
    """`work` with operations and memory, of modules on the meta device; they end as fake tensors.

    `train(count, device)` and `forward(count, device)` run so many samples through `modules`, which are
    trained, and `frozen` ones; `decode` is the rest of a prediction. half: training in half precision.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    def step_in(count: int) -> Any:
        # As in training, a context of its own: it remembers the weights' half-precision copies.
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return train(count, "cpu")

    try:
        for module in modules:
            module.train()
        # Two: batch normalisation has no statistics of a single pixel.
        step = flops(lambda: train(2, "meta").sum().backward(), gradients=True) // 2
        for module in modules:
            module.eval()
        work = replace(work, step_flops=step, forward_flops=flops(lambda: forward(1, "meta")))
        every = [*modules, *(frozen or [])]
        # The CPU's attention keeps what the fused one of a GPU does; on the meta device it would keep its weights.
        with FakeTensorMode(allow_non_fake_inputs=True):
            for module in every:
                _renew(module)
                module.train(module in modules)
            two, four = (_most_held(partial(step_in, n), every) for n in (2, 4))
            each = (four - two) // 2
            for module in modules:
                module.eval()
            with torch.no_grad():
                predicted = max(_most_held(partial(part, 1, "cpu"), every) for part in (forward, decode or forward))
    except (RuntimeError, ValueError, AssertionError, NotImplementedError) as error:
        # A network that refuses the resolution says so to the trial in the same words; but it may be that
        # torch cannot run it without its memory, and nothing is wrong.
        return replace(work, problem=one_line(error))
    casts = max(0, two - 2 * each) if half else 0
    return replace(work, activation_bytes=each, cast_bytes=casts, predict_bytes=predicted)


def _renew(module: torch.nn.Module) -> None:
    """New tensors on the CPU in the place of a module's own: fake ones, where it is called in that mode."""
    import torch

    for part in module.modules():
        for name, old in list(part.named_parameters(recurse=False)):
            setattr(part, name, torch.nn.Parameter(torch.empty(old.shape, dtype=old.dtype), old.requires_grad))
        for name, buffer in list(part.named_buffers(recurse=False)):
            setattr(part, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def flops(run: Callable[[], Any], gradients: bool = False) -> int:
    """Operations of matrix products, convolutions and attention while `run` runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(gradients), counter:
        run()
    return int(counter.get_total_flops())


def _most_held(run: Callable[[], Any], modules: list[Any]) -> int:
    """The most bytes that tensors hold at once while `run` runs, the modules' own aside."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    held = most = 0
    known = {t.untyped_storage()._cdata for m in modules for t in (*m.parameters(), *m.buffers())}

    def gone(key: int, size: int) -> None:
        nonlocal held
        known.discard(key)
        held -= size

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal held, most
            made = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(made):
                storage = leaf.untyped_storage() if hasattr(leaf, "untyped_storage") else None
                if storage is not None and storage._cdata not in known:
                    known.add(storage._cdata)
                    held += storage.nbytes()
                    weakref.finalize(storage, gone, storage._cdata, storage.nbytes())
            most = max(most, held)
            return made

    with Watch():  # type: ignore[no-untyped-call]
        result = run()
    del result
    return most
