"""The promotion part of the study file: which gates a model has to pass before it may be called champion."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from crism_mlops.config_run import Section

# YAML reads a bare off as false.
Level = Annotated[Literal["require", "warn", "off"], BeforeValidator(lambda value: "off" if value is False else value)]


class Gates(Section):
    """What is asked of a candidate: `require` refuses it, `warn` says so and goes on, `off` does not look."""

    complete: Level = Field("require", description="finished, every artifact there, its digests right")
    audit: Level = Field("require", description="the study's audit found no leak from train to test")
    same_test_set: Level = Field("require", description="scored on the scenes that the champion was scored on")
    enough_scenes: Level = Field("require", description="`scenes` independent test scenes or more")
    copy_floor: Level = Field("require", description="better than its input taken for the prediction")
    linear_floor: Level = Field("require", description="better than a linear map of each pixel")
    unet: Level = Field("require", description="better than the experiment's best U-Net")
    champion: Level = Field("require", description="better than the champion in the objective's metric")
    other_metrics: Level = Field("require", description="in the other metrics not worse than the champion by a margin")
    worst_stratum: Level = Field("require", description="its worst stratum no worse than the champion's by a margin")
    latency: Level = Field("require", description="`seconds` a scene or less, where promote runs")
    size: Level = Field("require", description="`gigabytes` on disk or less")
    reproduces: Level = Field("require", description="loaded from the registry, it predicts its stored scenes again")


class Margins(Section):
    """How much worse than the champion a candidate may be, in each metric's own unit."""

    rmse: float = Field(0.5, ge=0.0, allow_inf_nan=False, description="of 0..255")
    pcc: float = Field(0.01, ge=0.0, allow_inf_nan=False)
    cosine: float = Field(0.005, ge=0.0, allow_inf_nan=False)
    ssim: float = Field(0.01, ge=0.0, allow_inf_nan=False)
    lpips: float = Field(0.01, ge=0.0, allow_inf_nan=False)

    def of(self, metric: str) -> float:
        """The margin of one metric."""
        return float(getattr(self, metric))


class PromotionConfig(Section):
    """What `promote` asks of a study's model."""

    gates: Gates = Gates()
    alpha: float = Field(
        0.05, gt=0.0, lt=1.0, description="level of all promotions on one test set: the k-th gets alpha / (k (k + 1))"
    )
    scenes: int = Field(30, ge=1, description="independent scenes of the balanced test set")
    margins: Margins = Margins()
    seconds: float = Field(60.0, gt=0.0, allow_inf_nan=False, description="a scene")
    gigabytes: float = Field(10.0, gt=0.0, allow_inf_nan=False, description="of the logged model")

    def level_at(self, attempt: int) -> float:
        """What is spent of alpha at the k-th attempt (from 1): over all attempts, however many, no more than alpha."""
        return self.alpha / (attempt * (attempt + 1))
