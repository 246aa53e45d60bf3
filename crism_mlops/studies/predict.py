"""A checkpoint and one scene -> a prediction as GeoTIFF, through the same path as evaluation."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from numpy.typing import NDArray

from crism_mlops import __version__
from crism_mlops.config import DataConfig, Variant, digest_of
from crism_mlops.dataset.manifest import Pair
from crism_mlops.dataset.prompts import scene_prompt
from crism_mlops.dataset.variants import (
    VARIANT_BANDS,
    cassis_can_give,
    inverse_target,
    target_has_inverse,
    target_image,
)
from crism_mlops.errors import CrismError, DatasetError, ModelError, ProductError, SceneError
from crism_mlops.evaluation.evaluate import noise_seed
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint
from crism_mlops.products.geometry import Grid, centre_degrees, grid
from crism_mlops.products.geotiff import BandImage, read_geotiff, write_geotiff
from crism_mlops.products.mtrdr import Product
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.regions import UNKNOWN_REGION, region_of
from crism_mlops.scenes.bands import IF_RANGE, band_image
from crism_mlops.scenes.filters import FILTERS, Filter, load_filters
from crism_mlops.scenes.quicklook import NO_DATA, stretched, write_figure
from crism_mlops.scenes.scene import Scene, scene_from_products
from crism_mlops.scenes.targets import TARGET_PARAMETERS
from crism_mlops.studies.outcome import resolve_device
from crism_mlops.studies.run import predict

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True)
class Source:
    """What is predicted from: a scene, whether its target is a truth or only a place holder, where its
    pixels lie (None where nobody knows), and what a reader of the prediction should know."""

    scene: Scene
    has_truth: bool
    grid: Grid | None
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prediction:
    """One predicted scene.

    image: H x W x 3 float32 in `units` (I/F, band depth or index; "0..1" where the target has no
    inverse); scaled: the same in [0, 1], as it is scored; shown and truth: what the model saw and what
    it should have found, H x W x C and H x W x 3 in [0, 1], truth None where nobody knows.
    """

    source: Source
    image: NDArray[np.float32]
    scaled: NDArray[np.float32]
    shown: NDArray[np.float32]
    truth: NDArray[np.float32] | None
    names: tuple[str, str, str]
    units: tuple[str, ...]
    tags: dict[str, str]


def predict_scene(folder: Path, place: Path, device: str = "auto", bands: tuple[str, ...] | None = None) -> Prediction:
    """Predict with a checkpoint folder from an observation's folder or a GeoTIFF of CaSSIS-like bands.

    An observation with its truth gives the very prediction that `evaluate` scores. `bands` names a
    GeoTIFF's bands in their order. Raises CrismError where the checkpoint or the scene cannot be used.
    """
    if not place.exists():
        raise SceneError(f"{place}: no such file or folder; give an observation's folder or a GeoTIFF of its bands")
    model, checkpoint = load_checkpoint(folder, _device(device))
    config, variant = checkpoint.config, checkpoint.transform.variant
    if place.is_dir():
        if bands is not None:
            raise SceneError(f"{place}: --bands names a GeoTIFF's bands; those of an observation come from its filters")
        # Its own, wherever the file that they came from is now, and whatever it holds.
        source = from_observation(place, config.data, variant, checkpoint.filters or load_filters(config.data.filters))
    else:
        source = from_geotiff(place, variant, bands)
        source = replace(source, notes=(*source.notes, *_squeezed(source.scene, config.data.resolution)))
    scene, data = source.scene, config.data
    shown = checkpoint.transform.image(scene)
    kind = (data.target, data.target_normalization, data.ranges)
    truth = target_image(scene, *kind) if source.has_truth else None
    blank = np.zeros_like(scene.target) if truth is None else truth
    (scaled,) = predict(model, config)([Pair(scene, shown, blank)]).images
    names = TARGET_PARAMETERS[data.target]
    physical = target_has_inverse(data.target_normalization)
    return Prediction(
        source=source,
        image=inverse_target(scaled, *kind) if physical else scaled,
        scaled=scaled,
        shown=shown,
        truth=truth,
        names=names,
        units=tuple(_unit(name) for name in names) if physical else ("0..1",) * 3,
        tags=_tags(checkpoint, scene, physical),
    )


def write_prediction(prediction: Prediction, path: Path, picture: Path | None = None) -> None:
    """Write a prediction as GeoTIFF, and a picture of it (PNG) where one is asked for; what is there is
    replaced.

    Raises ProductError where the disk refuses.
    """
    write_geotiff(
        path, prediction.image, prediction.source.scene.valid, prediction.source.grid, prediction.names,
        prediction.units, tags=prediction.tags,
    )  # fmt: skip
    if picture is not None:
        write_figure(figure(prediction), picture)


def check_output(path: Path, picture: Path | None, given: Path, force: bool) -> None:
    """Refuse, before anything is computed, to overwrite a file (`given`, the input, even with `force`) or
    to write where nothing can be written. Raises SceneError."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        raise SceneError(f"{path}: a prediction is a GeoTIFF; name a .tif file")
    for target in (path,) if picture is None else (path, picture):
        if target.is_dir() or not target.parent.is_dir():
            raise SceneError(f"{target}: name a file in a folder that exists")
        if target.resolve() == given.resolve() or (picture is not None and picture.resolve() == path.resolve()):
            raise SceneError(f"{target}: it is named twice, the prediction would be lost or replace its own input")
        if target.exists() and not force:
            raise SceneError(f"{target}: it exists already; name another file, or add --force to replace it")


def from_observation(place: Path, data: DataConfig, variant: Variant, filters: tuple[Filter, ...] = FILTERS) -> Source:
    """The scene of an observation's folder, with its truth where its products give one, else the bands alone."""
    folders = observation_folders(place)
    if len(folders) > 1:
        raise SceneError(f"{place}: holds {len(folders)} observations; give one of them, such as {folders[0]}")
    products = open_observation(folders[0])
    if "if" not in products:
        raise SceneError(
            f"{place}: no I/F product of both detectors among {', '.join(sorted(products))}; bands are made from it"
        )
    notes = []
    try:
        pixels = grid(products["if"])
    except ProductError as error:
        pixels = None
        notes.append(f"no map projection: {error}")
    try:
        return Source(scene_from_products(products, data, filters=filters), True, pixels, tuple(notes))
    except CrismError as error:
        scene = _bands_alone(products, variant, filters)
        notes.append(f"from the bands alone, as there is no truth to compare with ({error})")
        return Source(scene, False, pixels, tuple(notes))


def _bands_alone(products: dict[str, Product], variant: Variant, given: tuple[Filter, ...]) -> Scene:
    """A scene without target: valid is every pixel with data in the variant's bands."""
    names = VARIANT_BANDS[variant]
    filters = tuple(f for f in given if f.name in names)
    image = band_image(products["if"], filters)
    try:
        longitude, latitude = centre_degrees(products)
    except ProductError:
        return _scene(products["if"].observation_id, image, tuple(f.name for f in filters), None, None)
    return _scene(products["if"].observation_id, image, tuple(f.name for f in filters), longitude, latitude)


def from_geotiff(path: Path, variant: Variant, bands: tuple[str, ...] | None = None) -> Source:
    """The scene of a GeoTIFF of CaSSIS-like bands in I/F; its id, and so its noise, is the file's name.

    Raises DatasetError where CaSSIS' bands cannot give the variant, SceneError where the values are
    not I/F.
    """
    if not cassis_can_give(variant):
        raise DatasetError(
            f"the checkpoint was trained on the variant {variant}, which four CaSSIS bands cannot give; "
            "use one of pnr, bpn, pca or cassis4, or predict from an observation"
        )
    given = read_geotiff(path, VARIANT_BANDS[variant], bands)
    image = _as_reflectance(given)
    if given.grid is None:
        return Source(_scene(path.stem, image, given.names, None, None), False, None, (f"{path}: {given.note}",))
    height, width = given.valid.shape
    longitudes, latitudes = given.grid.degrees([width / 2], [height / 2])
    return Source(
        _scene(path.stem, image, given.names, float(longitudes[0]), float(latitudes[0])), False, given.grid, ()
    )


def _squeezed(scene: Scene, resolution: int) -> tuple[str, ...]:
    """A word of warning where the model sees an image far smaller, or of another form, than it is."""
    height, width = scene.valid.shape
    if max(height, width) <= min(4 * resolution, 2 * min(height, width)):
        return ()
    return (
        f"the image of {height} x {width} pixels is squeezed into {resolution} x {resolution} for the model; pieces of "
        "the size and pixel scale of the scenes that it was trained on (about 18 m) give more",
    )


def _as_reflectance(given: BandImage) -> NDArray[np.float32]:
    """The bands, NaN where they are outside the physical range of I/F or, in a file that names no
    no-data value, 0 in every band."""
    values = given.image[given.valid]
    possible = np.asarray(((values > IF_RANGE[0]) & (values < IF_RANGE[1])).all(axis=-1))
    empty = ~values.any(axis=-1)
    data = possible[~empty]
    if not data.size or data.mean() < 0.5:
        low, high = np.percentile(values, (1.0, 99.0))
        raise SceneError(
            f"{given.path}: values run from {low:.4g} to {high:.4g} (1st to 99th percentile); expected I/F between 0 "
            f"and {IF_RANGE[1]}; set scale and offset of each band so that they give I/F (gdal_edit -scale -offset)"
        )
    image = np.full_like(given.image, np.nan)
    image[given.valid] = np.where((possible & ~empty)[:, None], values, np.float32(np.nan))
    return image


def _scene(
    name: str, image: NDArray[np.float32], bands: tuple[str, ...], longitude: float | None, latitude: float | None
) -> Scene:
    valid = np.asarray(np.isfinite(image).all(axis=-1))
    if not valid.any():
        raise SceneError(f"{name}: no pixel has data in all of {', '.join(bands)}")
    known = longitude is not None and latitude is not None
    return Scene(
        observation_id=name,
        source="bands",
        bands=np.where(valid[..., None], image, np.float32(0.0)),
        band_names=bands,
        target=np.zeros((*valid.shape, 3), dtype=np.float32),
        valid=valid,
        carbonate=None,
        carbonate_bearing=None,
        longitude_deg=longitude,
        latitude_deg=latitude,
        region=region_of(longitude, latitude) if known else UNKNOWN_REGION,  # type: ignore[arg-type]
    )


def _unit(parameter: str) -> str:
    """What a summary parameter's figure is (Viviano-Beck et al. 2014)."""
    if re.fullmatch(r"R\d+", parameter):
        return "I/F"
    return "index" if parameter.startswith("CINDEX") else "band depth"


def _tags(checkpoint: Checkpoint, scene: Scene, physical: bool) -> dict[str, str]:
    """What a prediction depends on, for the file itself."""
    config = checkpoint.config
    inverse = "fixed ranges undone" if physical else "none: the target is stretched image by image, values are 0..1"
    tags = {
        "scene": scene.observation_id,
        "checkpoint_digest": digest_of([checkpoint.files, config.digest, asdict(checkpoint.transform)]),
        "data_digest": checkpoint.data_digest,
        "config_digest": config.digest,
        "model": config.model.kind,
        "variant": checkpoint.transform.variant,
        "normalization": checkpoint.transform.normalization,
        "target": config.data.target,
        "target_normalization": config.data.target_normalization,
        "inverse": inverse,
        "resolution": str(config.data.resolution),
        "seed": str(config.evaluate.seed),
        "noise_seed": str(noise_seed(config.evaluate.seed, scene.observation_id)),
        "software": f"crism-mlops {__version__}",
    }
    if config.model.kind == "instruct_pix2pix":
        tags["prompt"] = scene_prompt(config.model, scene)
    return {f"crism.{name}": value for name, value in tags.items()}


def _device(device: str) -> str:
    """A device that is there. Raises ModelError for one that is not."""
    import torch

    here = resolve_device(device)
    found = ["cpu"] + ["mps"] * torch.backends.mps.is_available()
    found += ["cuda"] * torch.cuda.is_available() + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if here not in found:
        raise ModelError(f"--device {device}: not there; use auto or one of {', '.join(found)}")
    return here


def figure(prediction: Prediction) -> Figure:
    """Input (stretched for the eye), truth where it is known, and prediction; a matplotlib figure."""
    from matplotlib.figure import Figure

    scene = prediction.source.scene
    variant = prediction.tags["crism.variant"]
    channels = "principal components" if variant == "pca" else ", ".join(VARIANT_BANDS[cast(Variant, variant)][:3])
    images = [(f"input, stretched: {channels}", stretched(prediction.shown[..., :3], scene.valid))]
    if prediction.truth is not None:
        images.append(("truth", np.where(scene.valid[..., None], prediction.truth, NO_DATA)))
    images.append(("prediction", np.where(scene.valid[..., None], prediction.scaled, NO_DATA)))
    height, width = scene.valid.shape
    size = (4.2 * len(images), 4.2 * min(max(height / width, 0.4), 2.5) + 0.9)
    drawn = Figure(figsize=size, layout="constrained", dpi=120)
    for axis, (title, image) in zip(drawn.subplots(1, len(images)), images, strict=True):
        axis.imshow(image, interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_xticks([])
        axis.set_yticks([])
    ranges = ", ".join(f"{n} ({u})" for n, u in zip(prediction.names, prediction.units, strict=True))
    drawn.suptitle(f"{scene.observation_id}, {prediction.tags['crism.model']}\nred, green, blue: {ranges}", fontsize=12)
    return drawn
