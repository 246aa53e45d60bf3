"""Prompt templates filled from a scene's metadata."""

from __future__ import annotations

from crism_mlops.scenes.scene import Scene


def render(template: str, longitude: float | None, latitude: float | None, location: str | None) -> str:
    """Fill {longitude}, {latitude} (degrees, two decimals) and {location}; "unknown" where absent."""
    return template.format(
        longitude="unknown" if longitude is None else f"{longitude:z.2f}",
        latitude="unknown" if latitude is None else f"{latitude:z.2f}",
        location=(location or "unknown").replace("_", " "),
    )


def scene_prompt(template: str, scene: Scene) -> str:
    """The prompt of one scene."""
    return render(template, scene.longitude_deg, scene.latitude_deg, scene.region)
