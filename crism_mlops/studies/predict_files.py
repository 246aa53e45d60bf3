"""The files of a prediction: what they are called, which belong together, and whether they are there already."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from crism_mlops.errors import CrismError, SceneError, one_line
from crism_mlops.products.geotiff import read_tags

# Digest of what a prediction depends on, and in what lies beside a prediction that one's name.
MADE_BY = "crism.made_by"
PART_OF = "crism.part_of"


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files of one prediction, all of which `tif` names; None where one is not asked for."""

    tif: Path
    carbonate: Path | None
    deviation: Path
    png: Path | None

    @classmethod
    def beside(cls, tif: Path, carbonate: bool = True, png: bool = False) -> Outputs:
        """NAME.tif, NAME-carbonate.tif, NAME-deviation.tif and NAME.png."""
        marked = tif.with_name(f"{tif.stem}-carbonate.tif") if carbonate else None
        return cls(tif, marked, tif.with_name(f"{tif.stem}-deviation.tif"), tif.with_suffix(".png") if png else None)

    @property
    def paths(self) -> tuple[Path, ...]:
        """All that may be written."""
        return tuple(path for path in (self.tif, self.carbonate, self.deviation, self.png) if path is not None)

    @property
    def beside_it(self) -> tuple[Path, ...]:
        """All that may lie beside `tif` and belong to it, whether or not it is asked for now."""
        full = Outputs.beside(self.tif, carbonate=True, png=True)
        return full.paths[1:]


def is_done(outputs: Outputs, wanted: Mapping[Path, bool], made_by: str) -> bool:
    """Whether a prediction is there, whole.

    `wanted`: of the files beside it, those that the prediction will have. Raises SceneError for one that was made
    otherwise, and for another file.
    """
    there = True
    for path in (outputs.tif, *(path for path, needed in wanted.items() if needed)):
        if not path.exists():
            there = False
        elif _tags(path).get(MADE_BY) != made_by:
            raise SceneError(
                f"{path}: is there, made by another model or with other options, or its input has changed since; name "
                "another folder, or add --force to replace it"
            )
    return there


def part_tags(outputs: Outputs, tags: Mapping[str, str]) -> dict[str, str]:
    """The tags of what lies beside a prediction with these tags."""
    return {**tags, PART_OF: outputs.tif.name}


def remove_earlier(outputs: Outputs, tags: Mapping[str, str]) -> None:
    """Remove what lies beside a prediction and belongs to another one of its name; `tags` are the new one's.

    Files without such tags are the user's, and stay.
    """
    own = part_tags(outputs, tags)
    for path in outputs.beside_it:
        try:
            found = _tags(path) if path.is_file() else {}
        except CrismError:
            continue  # no GeoTIFF and no PNG: nothing of ours
        if found.get(PART_OF) == outputs.tif.name and any(found.get(name) != value for name, value in own.items()):
            path.unlink(missing_ok=True)


def _tags(path: Path) -> dict[str, str]:
    """What a GeoTIFF or a PNG says of itself. Raises ProductError or SceneError for a file that is neither."""
    if path.suffix.lower() != ".png":
        return read_tags(path)
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as picture:
            return {str(name): value for name, value in picture.info.items() if isinstance(value, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise SceneError(f"{path}: not a readable PNG ({one_line(error)}); remove or replace it") from error
