"""A run's part of the sweep file: all that one trial depends on, frozen, nothing unknown allowed, torch-free."""

from __future__ import annotations

import math
from pathlib import Path
from string import Formatter
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from crism_mlops.config_text import digest_of

Variant = Literal["pnr", "bpn", "pca", "rect", "cassis4"]
Normalization = Literal["physical", "percentile", "minmax"]
PROMPT_FIELDS = ("longitude", "latitude", "location")
Solver = Literal["dpm++", "unipc", "ddim", "euler"]
ViewName = Literal["whole", "vflip", "quarters", "rotations"]


# Where things lie; what lies there is told by the scenes' digest.
PLACES = {"cache", "path", "store", "filters", "labels"}


class Section(BaseModel):
    """Base of every section: frozen, unknown keys refused, defaults checked too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, protected_namespaces=())


class SimulatedConfig(Section):
    """Simulated observations: how many, how large (pixels a side), from which seed."""

    scenes: int = Field(60, ge=3, le=100_000)
    size: int = Field(64, ge=32, le=2048)
    seed: int = Field(1, ge=0, lt=30_000, description="30 000 and above pretrained the tiny model")


class CarbonateConfig(Section):
    """When a pixel and when a scene bears carbonate (fractions of the valid pixels)."""

    minimum_depth: float = Field(0.010, gt=0.0, lt=1.0, description="MIN2295_2480 or MIN2345_2537 exceeds this")
    supporting_depth: float = Field(0.010, ge=0.0, lt=1.0, description="and D2300 or BD2500_2 exceeds this")
    bearing_fraction: float = Field(0.03, gt=0.0, lt=1.0, description="at least this share: carbonate-bearing")
    barren_fraction: float = Field(0.01, gt=0.0, lt=1.0, description="below this share: barren; between: unknown")

    @model_validator(mode="after")
    def _ordered(self) -> CarbonateConfig:
        if self.barren_fraction > self.bearing_fraction:
            raise ValueError("barren_fraction exceeds bearing_fraction; a scene would be both")
        return self


class DataConfig(Section):
    """Where scenes come from and what becomes of them."""

    source: Literal["mtrdr", "pairs", "simulated"]
    path: str | None = Field(None, description="folder of observations (mtrdr) or of pairs")
    cache: str = Field("mlruns/cache", description="where simulated observations are written")
    store: str = Field(
        "mlruns/store", description="where built scenes and data sets are kept: a folder or an fsspec URL (s3://...)"
    )
    filters: str | None = Field(
        None, description="responses of your own: a table nm, BLU, PAN, RED, NIR, or a folder of normalized_response_*"
    )
    labels: str | None = Field(
        None, description="CSV of experts: observation_id, label (carbonate, barren or unknown); it wins"
    )
    ranges: dict[str, tuple[float, float]] = Field(
        default_factory=dict, description="physical range of a band or parameter, e.g. R2529: [0.05, 0.65]"
    )
    simulated: SimulatedConfig = SimulatedConfig()
    carbonate: CarbonateConfig = CarbonateConfig()
    target: Literal["fal", "car", "cr2"] = "fal"
    target_normalization: Literal["physical", "minmax"] = "physical"
    variant: Variant = "pnr"
    normalization: Normalization = "physical"
    resolution: int = Field(512, ge=32, le=2048, multiple_of=32, description="pixels a side that a model sees")
    views: tuple[ViewName, ...] = ("whole", "vflip", "quarters", "rotations")

    @field_validator("path", "cache", "store", "filters", "labels")
    @classmethod
    def _place(cls, place: str | None) -> str | None:
        if place is None:
            return None
        if not place.strip() or "\0" in place:
            raise ValueError("not the name of a file or folder")
        try:
            Path(place).expanduser()
        except RuntimeError as error:
            raise ValueError(f"{error}; write the folder out") from error
        return place

    @model_validator(mode="after")
    def _possible(self) -> DataConfig:
        if self.source == "pairs":
            if self.variant != "pnr":
                raise ValueError(
                    f"variant {self.variant} cannot be made from pairs: they hold PAN, NIR and RED only; "
                    "use variant pnr, or MTRDR scenes"
                )
            if self.target != "fal":
                raise ValueError(f"pairs hold the target fal, not {self.target}; use fal, or MTRDR scenes")
            if self.normalization != "minmax" or self.target_normalization != "minmax":
                raise ValueError(
                    "pairs are already stretched image by image; set data.normalization and "
                    "data.target_normalization to minmax"
                )
        if not self.views:
            raise ValueError("views is empty; use at least [whole]")
        for name, (low, high) in self.ranges.items():
            if not (math.isfinite(low) and math.isfinite(high) and low < high):
                raise ValueError(f"ranges.{name}: {low} to {high} is no range; give [low, high] with low < high")
        return self


class SplitConfig(Section):
    """Shares of observations; the rest trains. Splits never cut an observation in two."""

    by: Literal["observation", "footprint", "region"] = Field(
        "observation", description="what stays whole: an observation, all that overlap on the ground, or a region"
    )
    validation: float = Field(0.15, gt=0.0, lt=1.0)
    test: float = Field(0.25, gt=0.0, lt=1.0)
    seed: int = Field(0, ge=0)
    balanced_minimum: int = Field(1, ge=1, description="fewest scenes of each kind in the balanced test set")

    @model_validator(mode="after")
    def _something_left(self) -> SplitConfig:
        if self.validation + self.test >= 1.0:
            raise ValueError(f"validation {self.validation} + test {self.test} leaves nothing to train on")
        return self


class AuditConfig(Section):
    """What the leakage audit looks for, and what a leak does to a sweep."""

    on_leak: Literal["fail", "warn"] = Field("fail", description="a leak ends a sweep before any training, or is said")
    duplicate_bits: int = Field(4, ge=0, le=16, description="images whose perceptual hashes differ by at most this")
    saturated_share: float = Field(0.05, gt=0.0, le=1.0, description="share of pixels at a range's end that is told")


# What a model predicts: the target, or what the linear floor leaves of it.
Residual = Annotated[Literal["linear"] | None, Field(description="linear: learn on top of the linear floor")]


class UNetModel(Section):
    """U-Net baseline (segmentation_models_pytorch)."""

    kind: Literal["unet"]
    architecture: str = "Unet"
    encoder: str = "resnet34"
    encoder_weights: str | None = Field("imagenet", description="imagenet, or null to train from scratch")
    loss: Literal["mse", "l1", "huber"] = Field("mse", description="over pixels that show data; huber at 0.1")
    residual: Residual = None


class ScratchUNet(Section):
    """A denoising U-Net trained from scratch instead of the pretrained one."""

    block_channels: tuple[int, ...] = (64, 128, 192)
    layers_per_block: int = Field(1, ge=1, le=4)
    attention_heads: int = Field(8, ge=1)


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2022) on attention, instead of all weights: for small GPUs."""

    rank: int = Field(8, ge=1, le=1024)
    alpha: float = Field(8.0, gt=0.0, description="adapters are scaled by alpha / rank")


class InstructPix2PixModel(Section):
    """Fine-tuned InstructPix2Pix (diffusers)."""

    kind: Literal["instruct_pix2pix"]
    pretrained: str = Field(
        "timbrooks/instruct-pix2pix", description="hub name, folder in diffusers layout, or tiny (shipped)"
    )
    vae: str | None = Field(None, description="folder of another autoencoder (needs scratch_unet)")
    input_vae: str | None = Field(
        None, description="folder of an autoencoder for inputs of four channels (made by crism-mlops train-vae)"
    )
    scratch_unet: ScratchUNet | None = None
    prompt: str = Field("Predict carbonates", min_length=1)
    prompt_decimals: int = Field(2, ge=0, le=6, description="of longitude and latitude")
    prompt_fallback: str | None = Field(
        None, description="prompt of a scene that lacks metadata which the template asks for; null: it says unknown"
    )
    text_encoder: Literal["frozen", "trained"] = "frozen"
    lora: LoraConfig | None = Field(None, description="train adapters only, of the U-Net and of a trained text encoder")
    prediction: Literal["epsilon", "v_prediction", "sample"] | None = Field(
        None, description="what the U-Net predicts; null is as the pretrained model does"
    )
    zero_terminal_snr: bool | None = Field(
        None, description="the last time step is pure noise (Lin et al. 2024); null is as the pretrained model"
    )
    snr_gamma: float | None = Field(None, gt=0.0, description="min-SNR weighting (Hang et al. 2023), e.g. 5")
    noise_offset: float = Field(0.0, ge=0.0, le=1.0, description="of a channel's mean noise, a share of its deviation")
    residual: Residual = None
    conditioning_dropout: float = Field(0.05, ge=0.0, le=0.33)
    sampler: Solver = Field("dpm++", description="solver of the denoising steps")
    steps: int = Field(15, ge=1, le=1000, description="denoising steps")
    image_guidance: float = Field(1.5, ge=0.0)
    text_guidance: float = Field(7.5, ge=0.0)

    @field_validator("prompt")
    @classmethod
    def _known_fields(cls, prompt: str) -> str:
        fields = [part[1:] for part in Formatter().parse(prompt) if part[1] is not None]
        unknown = {name for name, _, _ in fields} - set(PROMPT_FIELDS)
        known = "a prompt may use {longitude}, {latitude}, {location}"
        if unknown:
            raise ValueError(f"no such field {sorted(map(str, unknown))}; {known}")
        # A field is text by the time it is filled in; a number's format would fail in mid-trial.
        if any(spec or conversion for _, spec, conversion in fields):
            raise ValueError(f"a field takes no format of its own; {known}")
        return prompt

    @model_validator(mode="after")
    def _vae_needs_unet(self) -> InstructPix2PixModel:
        if self.vae is not None and self.scratch_unet is None:
            raise ValueError("another autoencoder has another latent space: set model.scratch_unet as well")
        return self

    @field_validator("prompt_fallback")
    @classmethod
    def _plain(cls, prompt: str | None) -> str | None:
        if prompt is not None and ("{" in prompt or "}" in prompt):
            raise ValueError("a fallback stands where metadata is absent, so it has no fields of its own")
        return prompt

    @model_validator(mode="after")
    def _something_to_learn(self) -> InstructPix2PixModel:
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ValueError(
                "epsilon with zero_terminal_snr: of pure noise, the noise says nothing of the image; set "
                "model.prediction to v_prediction or sample"
            )
        return self


Model = Annotated[UNetModel | InstructPix2PixModel, Field(discriminator="kind")]


class TrainConfig(Section):
    """What is learned from what: AdamW, batches of views, best validation epoch kept."""

    learning_rate: float = Field(1e-4, gt=0.0, le=1.0)
    text_learning_rate: float | None = Field(None, gt=0.0, le=1.0, description="of a trained text encoder")
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up, to 0")
    warmup_steps: int = Field(0, ge=0)
    batch_size: int = Field(8, ge=1)
    epochs: int = Field(50, ge=1)
    weight_decay: float = Field(0.0, ge=0.0)
    gradient_clip: float = Field(1.0, gt=0.0)
    ema_decay: float | None = Field(None, gt=0.0, lt=1.0, description="averaged weights are scored and kept")
    balance: Literal["none", "undersample", "weighted"] = "none"
    validate_every: int | None = Field(
        None, ge=1, description="epochs between validations; null: as many as keep them below 15 % of the arithmetic"
    )
    patience: int | None = Field(None, ge=1, description="validations without a better one after which training ends")
    max_minutes: float | None = Field(None, gt=0.0, description="time of training after which it ends, resumed or not")
    keep_top: int = Field(1, ge=1, le=20, description="epochs kept, the best of which on all validation scenes wins")
    keep_bytes: int | None = Field(None, ge=1, description="room for those; the best one is always kept")
    bad_steps: int = Field(3, ge=1, description="steps without a finite loss, one after the other, that end the trial")
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"


class Resources(Section):
    """What a trial needs of a Ray cluster's machines; a share of a GPU lets several trials have one."""

    cpu: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    gpu: float = Field(0.0, ge=0.0, allow_inf_nan=False)


class EngineConfig(Section):
    """How it is computed, which changes a result by rounding at most: a study may go on with other settings."""

    micro_batch: int | None = Field(
        None, ge=1, description="samples a forward pass, the rest of a batch is accumulated; null is the whole batch"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for one more forward pass")
    channels_last: bool | None = Field(None, description="memory format of convolutions; null: on GPUs, and for U-Nets")
    compile: bool = Field(False, description="torch.compile; needs a C++ compiler")
    save_minutes: float = Field(10.0, ge=0.0, description="between two resume states; 0 saves after every step")
    work: str = Field(
        "mlruns/work",
        min_length=1,
        description="folder of resume states; where all machines share it, a lost machine's trial goes on",
    )
    lease_seconds: float = Field(
        60.0, ge=2.0, allow_inf_nan=False, description="a worker unheard of for so long has lost its trial to others"
    )
    attempts: int = Field(3, ge=1, description="times that a trial is begun whose worker dies")
    timeout_minutes: float | None = Field(
        None, gt=0.0, allow_inf_nan=False, description="a trial that takes longer in one attempt fails"
    )
    system_metrics_seconds: float | None = Field(
        10.0, gt=0.0, allow_inf_nan=False, description="between two looks at CPU, GPU and memory; null: none"
    )
    resources_per_trial: Resources = Resources()


class EvaluateConfig(Section):
    """How predictions are made for scoring."""

    chunk: int = Field(8, ge=1, description="images a forward pass, padded to this size: same bits anywhere")
    seed: int = Field(0, ge=0, description="noise seed of diffusion sampling, combined with the scene's id")
    draws: int = Field(1, ge=1, le=64, description="predictions of diffusion a scene; their mean is scored")
    validation_scenes: int | None = Field(8, ge=1, description="scenes scored at each epoch; null is all")
    panel_scenes: int = Field(3, ge=1, le=12)


class RunConfig(Section):
    """All that one trial depends on."""

    seed: int = Field(0, ge=0)
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?|mps)$")
    data: DataConfig
    split: SplitConfig = SplitConfig()
    audit: AuditConfig = AuditConfig()
    model: Model
    train: TrainConfig = TrainConfig()
    engine: EngineConfig = EngineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()

    @model_validator(mode="after")
    def _channels(self) -> RunConfig:
        if self.model.kind == "instruct_pix2pix" and self.data.variant == "cassis4" and self.model.input_vae is None:
            raise ValueError(
                "variant cassis4 has four channels; InstructPix2Pix's autoencoder takes three: train another one with "
                "`crism-mlops train-vae SWEEP.yaml --out FOLDER`, and set model.input_vae to its folder"
            )
        return self

    @property
    def digest(self) -> str:
        """Digest of everything that can change the result; where scenes lie and the device cannot."""
        content = self.model_dump(mode="json", exclude={"device": True, "engine": True, "audit": True, "data": PLACES})
        return digest_of(content)
