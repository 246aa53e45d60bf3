"""Folders of products: which are there, and one observation's products by kind."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from crism_mlops.errors import ProductError, one_line
from crism_mlops.products.mtrdr import Product, ProductName, inside, open_product, parse_name

# Digests of an observation whose images were dropped after use (products/digests.py).
RECEIPT = "crism-mlops-receipt.json"
_LEVELS = ("trr", "ter", "mtr")


def observation_folders(root: Path) -> list[Path]:
    """Folders below (or equal to) `root` that hold CRISM products, sorted by name.

    A folder with the receipt of dropped images counts as well. Hidden folders are left out:
    observations are written under such names and then renamed. A link to a folder of products is
    listed unless that folder is listed itself; a folder that cannot be looked into is listed too:
    `open_observation` says what is wrong with either. Raises ProductError if the folder does not
    exist, cannot be read or holds no product.
    """
    if not root.is_dir():
        raise ProductError(f"{root}: no such folder; expected a folder of observations such as frt0000643d/")
    found: list[Path] = []
    links: list[Path] = []
    unreadable: list[Path] = []
    for place, folders, files in os.walk(root, onerror=lambda e: unreadable.append(Path(e.filename))):
        folder = Path(place)
        # os.walk does not go through links, so that one to / or to itself does no harm.
        links += [folder / name for name in folders if not name.startswith(".") and (folder / name).is_symlink()]
        folders[:] = [name for name in folders if not name.startswith(".")]
        if RECEIPT in files or any(_is_description(folder / name) for name in files):
            # The user's own link to one observation is fine.
            found.append(folder.resolve() if folder == root else folder)
    if root in unreadable:
        raise ProductError(f"{root}: cannot be read; check its permissions")
    own = {folder.resolve() for folder in found}
    found += [link for link in links if link.resolve() not in own and _holds_products(link)]
    found = sorted({*found, *unreadable}, key=lambda p: (p.name.lower(), str(p)))
    if not found:
        raise ProductError(
            f"{root}: holds no CRISM product; expected files such as frt0000643d_07_if164j_mtr3.hdr with its .img"
        )
    return found


def open_observation(
    folder: Path, root: Path | None = None, kinds: Collection[str] | None = None
) -> dict[str, Product]:
    """The products of one observation folder (of some kinds) by kind: "if", "sr", "de", "brtan", ...

    Where there are several of a kind, the map-projected one of the highest version is taken, as
    the other products' pixels are those of the map. A detector's own product (TRDR) counts only
    where no joined one of its kind is there; its key has the sensor and the counter: "if_l_07".

    No file may lie outside `root` (by default the folder), symbolic links followed. Raises
    ProductError if a product cannot be read, if the folder holds none, or if it mixes observations
    or several images (counters) of one.
    """
    if root is None:
        # A link to a folder may stay beside it; what `folder` itself is called is the user's business.
        inside(folder, Path(os.path.abspath(folder)).parent)
        root = folder
    else:
        inside(folder, root)
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ProductError(f"{folder}: cannot be read ({one_line(error)})") from error
    named = [(name, path) for path in paths if _is_description(path) and (name := parse_name(path)) is not None]
    if not named:
        raise ProductError(f"{folder}: holds no CRISM product; expected files such as frt0000643d_07_if164j_mtr3.hdr")
    ids = sorted({name.observation_id for name, _ in named})
    if (folder / RECEIPT).is_file() and not any(path.suffix.lower() == ".img" for path in paths):
        raise ProductError(
            f"{folder}: its images were dropped after its scene was built; fetch them again with: crism-mlops data "
            f"download --id {ids[0]} -o {folder.parent}"
        )
    if len(ids) > 1:
        raise ProductError(f"{folder}: holds {len(ids)} observations ({', '.join(ids)}); give each its own folder")
    joined = {name.kind for name, _ in named if name.level != "trr"}
    counters = sorted({name.counter for name, _ in named if name.level != "trr"})
    if len(counters) > 1:
        raise ProductError(
            f"{folder}: holds {len(counters)} images of {ids[0]} (counters {', '.join(counters)}); "
            "give each its own folder"
        )
    best: dict[str, tuple[ProductName, Path]] = {}
    for name, path in named:
        if (name.level == "trr" and name.kind in joined) or (kinds is not None and name.kind not in kinds):
            continue
        key = name.kind if name.level != "trr" else f"{name.kind}_{name.sensor}_{name.counter}"
        if key not in best or _rank(name) > _rank(best[key][0]):
            best[key] = (name, path)
    return {key: open_product(path, root) for key, (_, path) in best.items()}


def _is_description(path: Path) -> bool:
    """Whether a name is that of a CRISM product's header or label."""
    return path.name.lower().endswith((".hdr", ".lbl", ".lbl.txt")) and parse_name(path) is not None


def _holds_products(folder: Path) -> bool:
    try:
        return any(_is_description(path) for path in folder.iterdir())
    except OSError:
        return True  # opening it says why it cannot be read


def _rank(name: ProductName) -> tuple[int, int]:
    return _LEVELS.index(name.level), name.version
