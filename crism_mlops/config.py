"""The sweep file as data: frozen, nothing unknown allowed, torch-free.

A `SweepConfig` is the whole YAML file. `SweepConfig.run_config(choices)` fixes the searched keys
and gives the `RunConfig` of one trial. A stage gets only its own section.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import blake2b
from pathlib import Path
from string import Formatter
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from crism_mlops.errors import ConfigError

if TYPE_CHECKING:
    import yaml

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


class EngineConfig(Section):
    """How it is computed, which changes a result by rounding at most: a study may go on with other settings."""

    micro_batch: int | None = Field(
        None, ge=1, description="samples a forward pass, the rest of a batch is accumulated; null is the whole batch"
    )
    gradient_checkpointing: bool = Field(False, description="less memory for one more forward pass")
    channels_last: bool | None = Field(None, description="memory format of convolutions; null: on GPUs, and for U-Nets")
    compile: bool = Field(False, description="torch.compile; needs a C++ compiler")
    save_minutes: float = Field(10.0, ge=0.0, description="between two resume states; 0 saves after every step")


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


class Choice(Section):
    choice: tuple[Any, ...] = Field(min_length=1)


class Uniform(Section):
    uniform: tuple[float, float]

    @model_validator(mode="after")
    def _ordered(self) -> Uniform:
        if not self.uniform[0] <= self.uniform[1]:
            raise ValueError("uniform needs low <= high")
        return self


class LogUniform(Section):
    loguniform: tuple[float, float]

    @model_validator(mode="after")
    def _positive(self) -> LogUniform:
        if not 0.0 < self.loguniform[0] <= self.loguniform[1]:
            raise ValueError("loguniform needs 0 < low <= high")
        return self


class Integer(Section):
    """low, high and, optionally, step."""

    int: tuple[int, int] | tuple[int, int, int]

    @model_validator(mode="after")
    def _ordered(self) -> Integer:
        low, high, *step = self.int
        if low > high or any(s < 1 for s in step):
            raise ValueError("int needs low <= high, and a step of at least 1 where there is one")
        return self


_DIMENSIONS = {"choice": "Choice", "uniform": "Uniform", "loguniform": "LogUniform", "int": "Integer"}


def _dimension_kind(value: Any) -> str | None:
    """Which class a search block's entry is; None, and so an error, where it is none or several."""
    if isinstance(value, Section):
        return type(value).__name__
    if not isinstance(value, Mapping):
        return None
    kinds = [kind for key, kind in _DIMENSIONS.items() if key in value]
    return kinds[0] if len(kinds) == 1 else None


Dimension = Annotated[
    Annotated[Choice, Tag("Choice")]
    | Annotated[Uniform, Tag("Uniform")]
    | Annotated[LogUniform, Tag("LogUniform")]
    | Annotated[Integer, Tag("Integer")],
    Discriminator(
        _dimension_kind,
        custom_error_type="dimension",
        custom_error_message="expected one of choice, uniform, loguniform, int, e.g. {{choice: [1, 2]}}",
    ),
]


def error_sign(metric: str) -> float:
    """1 where less is better (rmse, lpips), -1 where more is; `metric` with or without "val/"."""
    return 1.0 if metric.rsplit("/", 1)[-1] in ("rmse", "lpips") else -1.0


# What a search may look at: a figure on the validation scenes, or on the worst of their strata
# (carbonate-bearing, barren, a region of three scenes or more).
ValidationFigure = Literal[
    "val/rmse", "val/pcc", "val/cosine", "val/ssim", "val/lpips",
    "val_worst/rmse", "val_worst/pcc", "val_worst/cosine", "val_worst/ssim", "val_worst/lpips",
]  # fmt: skip


class Objective(Section):
    """What the search minimises or maximises."""

    metric: ValidationFigure = "val/rmse"

    @property
    def direction(self) -> Literal["minimize", "maximize"]:
        return "minimize" if error_sign(self.metric) > 0 else "maximize"


class Limit(Section):
    """What a figure must keep to: at most `max`, at least `min`, or both."""

    max: float | None = Field(None, allow_inf_nan=False)
    min: float | None = Field(None, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _spelled_out(cls, content: Any) -> Any:
        if not isinstance(content, (dict, Limit)):
            raise ValueError(f"say which way it limits: {{max: {content}}} or {{min: {content}}}")
        return content

    @model_validator(mode="after")
    def _some(self) -> Limit:
        if self.max is None and self.min is None:
            raise ValueError("a limit needs max or min, e.g. {max: 30}")
        if self.max is not None and self.min is not None and self.min > self.max:
            raise ValueError(f"nothing lies between min {self.min:g} and max {self.max:g}")
        return self

    def excess(self, value: float) -> float:
        """By how much a figure breaks the limit; 0 or less where it keeps to it."""
        high = math.inf if self.max is None else self.max
        low = -math.inf if self.min is None else self.min
        return max(value - high, low - value)

    def __str__(self) -> str:
        limits = {"at most": self.max, "at least": self.min}
        return " and ".join(f"{words} {limit:g}" for words, limit in limits.items() if limit is not None)


class SamplerConfig(Section):
    kind: Literal["tpe", "random"] = "tpe"
    startup_trials: int = Field(10, ge=1)


class PrunerConfig(Section):
    kind: Literal["median", "none"] = "none"
    startup_trials: int = Field(5, ge=0)
    warmup_epochs: int = Field(0, ge=0)


# The sweep must not let the search change what is compared, or on what.
_FIXED = (
    "seed", "device", "data.source", "data.path", "data.cache", "data.store", "data.filters", "data.labels",
    "data.ranges", "data.simulated", "data.carbonate", "data.target", "data.target_normalization", "split", "audit",
    "engine", "evaluate", "model.kind",
)  # fmt: skip


class SweepConfig(RunConfig):
    """One study: a run's configuration, what of it is searched, and for how many trials."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$")
    experiment: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. /-]{0,199}$")
    trials: int = Field(20, ge=1, description="total of finished and pruned trials, over all calls")
    max_failures: int = Field(3, ge=1, description="failed trials in one call after which it stops")
    objective: Objective = Objective()
    constraints: dict[ValidationFigure, Limit] = Field(
        default_factory=dict, description="limits a trial must keep to; one that does not is never the best"
    )
    sampler: SamplerConfig = SamplerConfig()
    pruner: PrunerConfig = PrunerConfig()
    search: dict[str, Dimension] = Field(default_factory=dict)

    def run_config(self, choices: Mapping[str, Any]) -> RunConfig:
        """The configuration of one trial. Raises ConfigError if a choice does not fit the model."""
        try:
            return self._with(choices)
        except ValidationError as error:
            raise ConfigError(f"search: {_explain(error, RunConfig)}") from error

    def _with(self, choices: Mapping[str, Any]) -> RunConfig:
        content = {name: getattr(self, name) for name in RunConfig.model_fields}
        content = json.loads(RunConfig.model_construct(**content).model_dump_json())
        for key, value in choices.items():
            _set_dotted(content, key, value)
        return RunConfig.model_validate(content)

    @model_validator(mode="after")
    def _search_fits(self) -> SweepConfig:
        known = set(dotted_keys(RunConfig, {"model": type(self.model)}))
        for key, dimension in self.search.items():
            if key not in known:
                raise ValueError(f"search.{key}: no such key for {self.model.kind}{_nearest(key, known)}")
            # A section above a fixed key (data, model) would change it as well.
            if any(f"{key}.".startswith(f"{fixed}.") or fixed.startswith(f"{key}.") for fixed in _FIXED):
                raise ValueError(
                    f"search.{key}: it decides what is compared, so it is fixed for a study; "
                    "make a study for each value instead"
                )
            for value in extremes(dimension):
                try:
                    self._with({key: value})
                except ValidationError as error:
                    raise ValueError(f"search.{key}, value {value!r}: {_explain(error, RunConfig)}") from error
        return self

    @property
    def identity(self) -> dict[str, Any]:
        """What a study's trials share: flat, JSON-able; two calls that differ in it don't mix.

        The scenes themselves are identified by their digest, not by the folder they lie in.
        """
        content = self.model_dump(
            mode="json",
            exclude={
                "trials": True, "max_failures": True, "study": True, "experiment": True, "device": True,
                "engine": True, "audit": True, "data": PLACES, "sampler": True, "pruner": True, "search": True,
            },
        )  # fmt: skip
        flat = dict(_flatten(content))
        for key in self.search:
            # The default of a searched key plays no part.
            for other in [k for k in flat if k == key or k.startswith(key + ".")]:
                del flat[other]
        for key, dimension in sorted(self.search.items()):
            flat[f"search.{key}"] = dimension.model_dump(mode="json")
        return flat


def extremes(dimension: Dimension) -> tuple[Any, ...]:
    """Values of a dimension that must all be legal: every choice, or both ends (and one step up)."""
    if isinstance(dimension, Choice):
        return dimension.choice
    if isinstance(dimension, Uniform):
        return dimension.uniform
    if isinstance(dimension, LogUniform):
        return dimension.loguniform
    low, high, *step = dimension.int
    # Where the ends are multiples of something, the step must be as well.
    return tuple(dict.fromkeys((low, high, min(low + (step[0] if step else 1), high))))


def load_sweep(path: Path, overrides: tuple[str, ...] = ()) -> SweepConfig:
    """Read a sweep file (YAML, safe-loaded) and apply `key=value` overrides (values in YAML).

    Raises ConfigError naming file, key, what was found and the nearest known key.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}); give the path of a sweep file such as sweeps/quickstart-unet.yaml"
        ) from error
    try:
        content = _yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path}: expected keys such as study, experiment, data, model; found {type(content).__name__}"
        )
    for override in overrides:
        shown = " ".join(override.split())
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set {shown}: expected key=value, e.g. --set train.epochs=3")
        try:
            _set_dotted(content, key.strip(), _yaml(value))
        except ValueError as error:
            raise ConfigError(f"--set {shown}: the value is not YAML: {error}") from error
    try:
        return SweepConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error, SweepConfig)}") from error


def _yaml(text: str) -> Any:
    """YAML, safe-loaded; a key that stands twice is an error. Raises ValueError with one line."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML lets a date such as 2001-99-99 through to datetime's own ValueError.
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1 and key != "<<":
                    raise yaml.YAMLError(f"the key {key} stands twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-4 for text, as it has no dot; YAML 1.2 and every reader of a sweep do not.
    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def digest_of(content: Any) -> str:
    """16 hex digits over JSON content, independent of key order."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def dotted_keys(section: type[BaseModel], chosen: Mapping[str, type[BaseModel]] | None = None) -> Iterator[str]:
    """Every key below a section, dotted; `chosen` names the model class of a union field."""
    for name, field in section.model_fields.items():
        yield name
        for inner in _sections_in(field.annotation):
            if chosen is not None and name in chosen and inner is not chosen[name]:
                continue
            for key in dotted_keys(inner):
                yield f"{name}.{key}"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _sections_in(part)


def _set_dotted(content: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    # The search block's own keys hold dots: search.train.learning_rate is one key of `search`.
    if parents and parents[0] == "search":
        parents, last = ["search"], key.removeprefix("search.")
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            # An empty section of a YAML file, or one that is optional.
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {parent} is {inner!r}, not a section")
        place = inner
    place[last] = value


def _flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nearest(key: str, known: set[str]) -> str:
    """What to try instead of an unknown key: the nearest one, or the keys of its section."""
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in sorted(known, reverse=True)}
    match = difflib.get_close_matches(key, known, 1, 0.6) or [
        by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    ]
    if match:
        return f"; did you mean {match[0]}?"
    siblings = sorted(name for name in known if name.rpartition(".")[0] == section) or sorted(known)
    return f"; known keys: {', '.join(siblings[:40])}"


def _explain(error: ValidationError, section: type[BaseModel]) -> str:
    """One line of the first problem; the count of the others."""
    problems = error.errors()
    first = problems[0]
    models: dict[str, type[BaseModel]] = {"unet": UNetModel, "instruct_pix2pix": InstructPix2PixModel}
    tags = {*models, *_DIMENSIONS.values()}
    location = ".".join(str(part) for part in first["loc"] if part not in tags) or "(file)"
    if first["type"] == "extra_forbidden":
        # The keys of the model that the file chose, not of the other one.
        kind = next((str(part) for part in first["loc"] if part in models), None)
        keys = set(dotted_keys(section, {"model": models[kind]} if kind else None))
        message = f"unknown key {location}{_nearest(location, keys)}"
    elif first["type"] == "missing":
        message = f"{location} is missing; add it"
    else:
        found = first.get("input")
        shown = "" if isinstance(found, (dict, BaseModel)) or location == "(file)" else f" (found {found!r:.100})"
        message = f"{location}: {first['msg'].removeprefix('Value error, ')}{shown}".replace("(file): ", "")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{message}{more}".split())
