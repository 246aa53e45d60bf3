"""Solvers of the denoising steps, and the time steps that they go through."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from crism_mlops.config import Solver

WHOLE_RUN = 100  # steps of the run that fewer steps stand for
_TOWARDS_THE_END = 1.5


def sampling_scheduler(name: Solver, config: Any, steps: int) -> Any:
    """diffusers' solver of that name and number of steps for a model trained under `config` (a scheduler's).

    The noise schedule and what the U-Net predicts (noise, velocity or the image) are the model's.
    None of the four draws noise of its own, so a seed decides the whole prediction. dpm++ goes
    through `steps` of the time steps that a run of WHOLE_RUN would (`thinned`); the others take the
    model's own spacing.
    """
    import diffusers

    # Clipping is for pixels; latents reach beyond [-1, 1].
    if name == "ddim":
        scheduler = diffusers.DDIMScheduler.from_config(config, clip_sample=False)
    elif name == "euler":
        scheduler = diffusers.EulerDiscreteScheduler.from_config(config)
    elif name == "unipc":
        scheduler = diffusers.UniPCMultistepScheduler.from_config(config)
    else:
        # Lu et al. 2022, "DPM-Solver++", section 4: the data-prediction multistep solver of second order.
        scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            config, algorithm_type="dpmsolver++", solver_order=2, use_karras_sigmas=False
        )
    whole = min(WHOLE_RUN, scheduler.config.num_train_timesteps)
    scheduler.set_timesteps(steps if name != "dpm++" or steps >= whole else whole)
    if name == "dpm++" and steps < whole:
        scheduler.set_timesteps(timesteps=thinned(scheduler.timesteps.tolist(), steps))
    return scheduler


def thinned(times: Sequence[int], count: int) -> list[int]:
    """`count` of the time steps of a longer run, its first and its last among them, denser towards the end.

    How much fine detail a prediction holds is decided by the last noise levels that the U-Net sees: evenly
    spaced, 20 steps stop far above 100, and predictions are smoother (docs/sampling.md). Places go with
    the power _TOWARDS_THE_END of the share of steps that is left.
    """
    last = len(times) - 1
    left = [1.0 - i / max(count - 1, 1) for i in range(count)]
    places = [round(last * (1.0 - share**_TOWARDS_THE_END)) for share in left]
    for i in range(count - 2, -1, -1):  # no step twice, where they are dense
        places[i] = min(places[i], places[i + 1] - 1)
    return [times[place] for place in places]
