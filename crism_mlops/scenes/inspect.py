"""What an observation or a folder holds, as rows for a table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from crism_mlops.config import DataConfig
from crism_mlops.errors import CrismError, SceneError
from crism_mlops.products.mtrdr import observation_folders, open_observation
from crism_mlops.scenes.sources import Scene, load_scenes, scene_from_products


def inspect_path(path: Path) -> list[dict[str, Any]]:
    """One row an observation. A damaged observation gets its problem as a row; others go on.

    Raises SceneError if the path does not exist, ProductError if it holds no observation.
    """
    if not path.is_dir():
        raise SceneError(f"{path}: no such folder; give an observation's folder or a folder of observations")
    if (path / "scenes.csv").is_file():
        config = DataConfig(source="pairs", path=str(path), normalization="minmax", target_normalization="minmax")
        return [_row(s) for s in load_scenes(config)]
    rows = []
    for folder in observation_folders(path):
        try:
            products = open_observation(folder)
            row: dict[str, Any] = {
                "observation": next(iter(products.values())).observation_id,
                "products": " ".join(sorted(products)),
            }
            if "if" in products:
                height, width, bands = products["if"].shape
                scene = scene_from_products(products, DataConfig(source="mtrdr", path=str(path)))
                row |= {"lines x samples x bands": f"{height} x {width} x {bands}", **_row(scene)}
            else:
                first = next(iter(products.values()))
                row["lines x samples x bands"] = " x ".join(map(str, first.shape))
                row["problem"] = "no I/F product: cannot become a scene"
        except CrismError as error:
            row = {"observation": folder.name, "problem": str(error)}
        rows.append(row)
    return rows


def _row(scene: Scene) -> dict[str, Any]:
    height, width = scene.valid.shape
    row: dict[str, Any] = {
        "observation": scene.observation_id,
        "size": f"{height} x {width}",
        "region": scene.region,
        "longitude": None if scene.longitude_deg is None else round(scene.longitude_deg, 3),
        "latitude": None if scene.latitude_deg is None else round(scene.latitude_deg, 3),
        "no-data": f"{1.0 - scene.valid.mean():.1%}",
        "kind": scene.kind,
    }
    if scene.carbonate is not None:
        row["carbonate"] = f"{scene.carbonate.sum() / scene.valid.sum():.1%}"
    return row
