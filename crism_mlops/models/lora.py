"""Low-rank adapters (Hu et al. 2022) by peft: a few weights are trained beside frozen ones."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from crism_mlops.config import LoraConfig

if TYPE_CHECKING:
    import torch

# The projections of attention in diffusers' U-Nets, and in transformers' CLIP.
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj"]


def adapt(module: torch.nn.Module, config: LoraConfig, seed: int) -> None:
    """Freeze a module and add adapters to its attention, in place; only they are trained."""
    import torch
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    module.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            PeftConfig(
                r=config.rank,
                lora_alpha=config.alpha,  # type: ignore[arg-type]  # any number serves
                target_modules=_TARGETS,
                lora_dropout=0.0,
            ),
            module,
        )


def merged(module: torch.nn.Module) -> torch.nn.Module:
    """The module without adapters: itself, or a copy into whose weights they are merged.

    Merging and taking it back would change the weights that are trained on by rounding.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(part, BaseTunerLayer) for part in module.modules()):
        return module
    plain = copy.deepcopy(module)
    for name, part in list(plain.named_modules()):
        if isinstance(part, BaseTunerLayer):
            part.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(plain.get_submodule(parent), leaf, part.get_base_layer())
    return plain.requires_grad_(False)
