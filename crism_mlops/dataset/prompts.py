"""Prompt templates filled from a scene's metadata."""

from __future__ import annotations

from string import Formatter

from crism_mlops.config import InstructPix2PixModel
from crism_mlops.scenes.scene import Scene


def render(
    template: str,
    longitude: float | None,
    latitude: float | None,
    location: str | None,
    decimals: int = 2,
    fallback: str | None = None,
) -> str:
    """Fill {longitude}, {latitude} (degrees, rounded to `decimals`) and {location}.

    Where the template asks for what is absent: the fallback, a prompt of its own, or without one
    "unknown" in its place.
    """
    if fallback is not None and lacks(template, longitude, latitude, location):
        return fallback
    return template.format(
        longitude="unknown" if longitude is None else f"{longitude:z.{decimals}f}",
        latitude="unknown" if latitude is None else f"{latitude:z.{decimals}f}",
        location=(location or "unknown").replace("_", " "),
    )


def lacks(template: str, longitude: float | None, latitude: float | None, location: str | None) -> bool:
    """Whether a template asks for metadata that is absent."""
    given = {"longitude": longitude, "latitude": latitude, "location": location or None}
    return any(given[name] is None for name in fields(template))


def fields(template: str) -> set[str]:
    """The fields that a template asks for."""
    return {name for _, name, _, _ in Formatter().parse(template) if name}


def scene_prompt(model: InstructPix2PixModel, scene: Scene) -> str:
    """The prompt of one scene."""
    return render(
        model.prompt, scene.longitude_deg, scene.latitude_deg, scene.region, model.prompt_decimals,
        model.prompt_fallback,
    )  # fmt: skip


def scene_lacks(model: InstructPix2PixModel, scene: Scene) -> bool:
    """Whether a scene's prompt is the fallback, or says "unknown" somewhere."""
    return lacks(model.prompt, scene.longitude_deg, scene.latitude_deg, scene.region)
