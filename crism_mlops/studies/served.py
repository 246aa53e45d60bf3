"""The served model without a server: requests in, predictions out, by the path that evaluation takes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.variants import VARIANT_BANDS, inverse_target, target_has_inverse
from crism_mlops.errors import GivenUpError, ModelError, RequestError
from crism_mlops.evaluation.evaluate import draw_seed, noise_seed, predict_images
from crism_mlops.evaluation.tiling import Tile, tiles
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.unet import UNet
from crism_mlops.products.regions import UNKNOWN_REGION, east_longitude_180, region_of
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.targets import TARGET_PARAMETERS
from crism_mlops.studies.outcome import resolve_device
from crism_mlops.studies.request import (
    MAX_DRAWS,
    MAX_GUIDANCE,
    MAX_SEED,
    MAX_STEPS,
    SERVER,
    Limits,
    Request,
    Units,
    checked_bands,
    checked_image,
    checked_nodata,
    checked_number,
    checked_place,
    checked_text,
    checked_whole,
)
from crism_mlops.studies.served_description import description, output_span, output_units, tile_side, units_of

__all__ = ["Answer", "Request", "Served"]
# Pixels a side that a network pools into one at most: U-Nets do, and a resolution is a multiple of it.
_COARSEST = 32
# Pixels worked on at once where an array of the whole image would be in double precision.
_BLOCK = 1 << 20


@dataclass(frozen=True, slots=True)
class Answer:
    """The prediction for one request, H x W pixels as its image.

    prediction: H x W x 3 float32 in the model's output units (I/F, band depth or index where the
    target has an inverse, else 0..1), 0 without data; scaled: the same in [0, 1] as it is scored,
    without data whatever the model gave; nodata: H x W bool, True where there is no data; carbonate:
    H x W bool, None where the model has no rule for it; deviation: H x W x 3 float32, the standard
    deviation between draws in prediction's units, 0 without data, None for one draw.
    """

    prediction: NDArray[np.float32]
    scaled: NDArray[np.float32]
    nodata: NDArray[np.bool_]
    carbonate: NDArray[np.bool_] | None
    deviation: NDArray[np.float32] | None


class Served:
    """A checkpoint's model behind requests; safe to be called from several threads, one at a time predicts.

    limits: of what it is asked, a server's unless it is set to others.
    """

    def __init__(self, model: UNet | InstructPix2Pix, checkpoint: Checkpoint) -> None:
        data = checkpoint.config.data
        self.checkpoint = checkpoint
        self.bands: tuple[str, ...] = VARIANT_BANDS[checkpoint.transform.variant]
        self.units: Units = units_of(checkpoint)
        self.names: tuple[str, str, str] = TARGET_PARAMETERS[data.target]
        self.output_units: tuple[str, ...] = output_units(checkpoint)
        self.side = tile_side(checkpoint)
        self.span = output_span(checkpoint)
        self.limits: Limits = SERVER
        self._model = model
        self._lock = threading.Lock()
        # A tokenizer is for one thread at a time: this one is for `check`, which shall not wait for a prediction.
        self._reading = threading.Lock()
        self._reader: InstructPix2Pix | None = None
        if isinstance(model, InstructPix2Pix):
            self._reader = copy(model)
            self._reader.tokenizer = deepcopy(model.tokenizer)

    @classmethod
    def load(cls, folder: Path, device: str = "auto") -> Served:
        """The model of a checkpoint folder. Raises ModelError for one that cannot be used, and for a device that
        is not there."""
        return cls(*load_checkpoint(folder, present_device(device)))

    def describe(self) -> dict[str, Any]:
        """What the model takes and gives, for JSON; see `description`."""
        return description(self.checkpoint)

    def check(self, request: Request) -> Request:
        """The request as it will be answered: defaults filled in, no data 0 in every channel.

        Raises RequestError for what cannot be answered. What passed once passes again.
        """
        model = self.checkpoint.config.model
        checked_bands(request.bands, self.bands)
        nodata = checked_nodata(request.nodata)
        seed = self.checkpoint.config.evaluate.seed if request.seed is None else request.seed
        seed = checked_whole("seed", seed, 0, MAX_SEED)
        place = checked_place(request.longitude, request.latitude)
        longitude, latitude = (None, None) if place is None else (east_longitude_180(place[0]), place[1])
        location = None if request.location is None else checked_text("location", request.location)
        prompt = None if request.prompt is None else checked_text("prompt", request.prompt)
        steps: int | None = None
        guidance: float | None = None
        image_guidance: float | None = None
        draws = 1
        if model.kind == "instruct_pix2pix":
            steps = checked_whole("steps", _or(request.steps, model.steps), 1, MAX_STEPS)
            guidance = checked_number("guidance", _or(request.guidance, model.text_guidance), 0.0, MAX_GUIDANCE)
            image_guidance = checked_number(
                "image_guidance", _or(request.image_guidance, model.image_guidance), 0.0, MAX_GUIDANCE
            )
            draws = checked_whole("draws", _or(request.draws, self.checkpoint.config.evaluate.draws), 1, MAX_DRAWS)
        else:
            for name in ("prompt", "steps", "guidance", "image_guidance"):
                if getattr(request, name) is not None:
                    raise RequestError(f"{name} is given, and the model is a U-Net", f"no {name}: it plays no part")
            checked_whole("draws", _or(request.draws, 1), 1, 1)
        image = checked_image(request.image, self.bands, self.units, nodata, self.limits)
        if image.shape[0] * image.shape[1] * draws > self.limits.pixels:
            raise RequestError(
                f"{draws} draws of {image.shape[0]} x {image.shape[1]} pixels",
                f"{self.limits.pixels} pixels times draws at most; ask for fewer draws, or for parts of the image",
            )
        checked = replace(
            request, image=image, bands=self.bands, nodata=None, seed=seed, longitude=longitude, latitude=latitude,
            steps=steps, guidance=guidance, image_guidance=image_guidance, draws=draws, prompt=prompt,
            location=location,
        )  # fmt: skip
        if self._reader is not None:
            try:
                with self._reading:
                    self._reader.tokenize([self._prompt(checked)])
            except ModelError as error:
                # Without the prompt itself, which the error ends with.
                raise RequestError(str(error).partition(";")[0], "a prompt that is not cut off") from error
        return checked

    def answers(self, requests: Sequence[Request], wanted: Callable[[], bool] | None = None) -> list[Answer]:
        """An answer for each request, in their order.

        Forward passes are filled across requests that ask for the same steps and guidance, and hold exactly
        the model's chunk of images, so that an answer has the same bits in any company. Raises RequestError
        for the first request that cannot be answered; GivenUpError as soon as `wanted`, which is asked before each
        forward pass, says no.
        """

        def go_on() -> None:
            if wanted is not None and not wanted():
                raise GivenUpError("nobody waits for the prediction any more")

        asked = [self.check(request) for request in requests]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for index, request in enumerate(asked):
            groups.setdefault((request.steps, request.image_guidance, request.guidance), []).append(index)
        found: dict[int, Answer] = {}
        with self._lock:
            for (steps, image_guidance, guidance), members in groups.items():
                model = self._model
                if isinstance(model, InstructPix2Pix):
                    model = model.sampled(steps, image_guidance, guidance)
                    model.before_step = go_on
                work = (self._work(index, asked[index]) for index in members)
                found |= {
                    index: self._answer(asked[index], draws) for index, draws in self._predicted(model, work, go_on)
                }
        return [found[index] for index in range(len(asked))]

    def _work(self, index: int, request: Request) -> _Work:
        image = self.checkpoint.transform.image(self._scene(request))
        height, width = image.shape[:2]
        shown = _shown(request.image)
        # A tile is squeezed to the resolution, as the scenes were: a network's coarsest pixel is so many of its own.
        grid = _COARSEST * self.side / self.checkpoint.config.data.resolution
        parts = [tile for tile in tiles(height, width, self.side, grid) if shown[tile.place].any()]
        # `check` filled them in.
        assert request.draws is not None
        assert request.seed is not None
        totals = [np.zeros((height, width, 3), dtype=np.float32) for _ in range(request.draws)]
        whole = (height, width) == image[parts[0].place].shape[:2]
        jobs = [
            _Job(tile, draw, _tile_seed(draw_seed(request.seed, draw), None if whole else tile))
            for draw in range(request.draws)
            for tile in parts
        ]
        return _Work(index, image, self._prompt(request), jobs, totals)

    def _predicted(
        self, model: UNet | InstructPix2Pix, work: Iterable[_Work], go_on: Callable[[], None]
    ) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
        """Each request's number and its draws, H x W x 3 in [0, 1], as soon as its last tile is predicted."""
        chunk = self.checkpoint.config.evaluate.chunk
        waiting: list[tuple[_Work, _Job]] = []

        def run(batch: list[tuple[_Work, _Job]]) -> Iterator[tuple[int, list[NDArray[np.float32]]]]:
            go_on()
            images = predict_images(
                model,
                [one.image[job.tile.place] for one, job in batch],
                [one.prompt for one, _ in batch],
                [job.seed for _, job in batch],
                self.checkpoint.config.data.resolution,
                chunk,
            )
            for (one, job), image in zip(batch, images, strict=True):
                job.tile.add(one.totals[job.draw], image)
                one.left -= 1
                if one.left == 0:
                    yield one.index, one.totals

        for one in work:
            for job in one.jobs:
                waiting.append((one, job))
                if len(waiting) == chunk:
                    yield from run(waiting)
                    waiting = []
        if waiting:
            yield from run(waiting)

    def _answer(self, request: Request, draws: list[NDArray[np.float32]]) -> Answer:
        config, rule = self.checkpoint.config.data, self.checkpoint.carbonate
        nodata = ~_shown(request.image)
        for draw in draws:
            # Weights add up to 1 but for rounding.
            np.clip(draw, 0.0, 1.0, out=draw)
        scaled = draws[0] if len(draws) == 1 else np.empty_like(draws[0])
        deviation = None if len(draws) == 1 else np.empty_like(draws[0])
        prediction = np.empty_like(scaled)
        carbonate = None if rule is None else np.zeros(nodata.shape, dtype=np.bool_)
        kind = (config.target, config.target_normalization, config.ranges)
        step = max(1, _BLOCK // nodata.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(nodata), step)):
            if deviation is not None:
                # As evaluation does it, block by block: a running variance would have other bits.
                stack = np.stack([draw[rows] for draw in draws])
                scaled[rows], deviation[rows] = stack.mean(axis=0), stack.std(axis=0, ddof=1)
            prediction[rows] = scaled[rows]
            if target_has_inverse(config.target_normalization):
                prediction[rows] = inverse_target(scaled[rows], *kind)
            if rule is not None and carbonate is not None:
                carbonate[rows] = (rule.score(scaled[rows], config) > rule.threshold) & ~nodata[rows]
        prediction[nodata] = 0.0
        if deviation is not None:
            deviation *= self.span
            deviation[nodata] = 0.0
        return Answer(prediction, scaled, nodata, carbonate, deviation)

    def _prompt(self, request: Request) -> str:
        model = self.checkpoint.config.model
        if model.kind != "instruct_pix2pix":
            return ""
        return scene_prompt(model, self._scene(request)) if request.prompt is None else request.prompt

    def _scene(self, request: Request) -> Scene:
        """The request as a scene whose truth nobody knows: prompt and input image are then made as for any scene."""
        valid = _shown(request.image)
        region = UNKNOWN_REGION
        if request.longitude is not None and request.latitude is not None:
            region = region_of(request.longitude, request.latitude)
        return Scene(
            observation_id="request",
            source="pairs" if self.units == "scaled" else "bands",
            bands=request.image,
            band_names=self.bands,
            target=np.broadcast_to(np.float32(0.0), (*valid.shape, 3)),
            valid=valid,
            carbonate=None,
            carbonate_bearing=None,
            longitude_deg=request.longitude,
            latitude_deg=request.latitude,
            region=request.location or region,
        )


@dataclass(frozen=True, slots=True)
class _Job:
    """One tile of one draw, and the seed of its noise."""

    tile: Tile
    draw: int
    seed: int


@dataclass(slots=True)
class _Work:
    """A request while it is predicted: its image in [0, 1], its prompt, what is to be done, and each draw so far."""

    index: int
    image: NDArray[np.float32]
    prompt: str
    jobs: list[_Job]
    totals: list[NDArray[np.float32]]

    def __post_init__(self) -> None:
        self.left = len(self.jobs)

    left: int = 0


def _tile_seed(seed: int, tile: Tile | None) -> int:
    """Tiles have noise of their own, or its pattern would come again and again; a whole image has the seed's."""
    return seed if tile is None else noise_seed(seed, f"tile {tile.rows.start},{tile.columns.start}")


def _shown(image: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where a checked image shows data: H x W bool."""
    return np.asarray(image.any(axis=-1))


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def present_device(device: str) -> str:
    """A device that is there; "auto" is the first GPU, else the CPU. Raises ModelError for one that is not."""
    import torch

    here = resolve_device(device)
    found = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    found += ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if here not in found:
        raise ModelError(f"--device {device}: not there; use auto or one of {', '.join(found)}")
    return here
