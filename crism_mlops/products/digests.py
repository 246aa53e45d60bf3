"""Digests of an observation's products, and the receipt of cubes that were dropped after use."""

from __future__ import annotations

import json
import logging
import os
import uuid
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b, file_digest, sha256
from pathlib import Path

from crism_mlops.errors import ProductError, StoreError
from crism_mlops.products.mtrdr import parse_name
from crism_mlops.products.observations import RECEIPT, open_observation
from crism_mlops.untrusted import parse_json

log = logging.getLogger(__name__)
_SUFFIXES = (".img", ".hdr", ".lbl", ".txt")
# What reading a JSON file that does not hold what it should may raise.
_DAMAGED = (ValueError, LookupError, TypeError, AttributeError)


@dataclass(frozen=True, slots=True)
class Digests:
    """What an observation folder holds: SHA-256 (64 hex digits) by product kind, over header, label
    and image."""

    observation_id: str
    products: dict[str, str]


def known_digests(folder: Path, memory: Path) -> Digests | None:
    """The digests of a folder as `observation_digests` found them before, or None.

    What is remembered under the folder `memory` holds as long as no file in the observation's
    folder has changed (name, size, inode, time of change). A folder whose images were dropped
    has its receipt. Raises ProductError for a damaged receipt or a folder that cannot be read.
    """
    try:
        files = _files(folder)
        if (folder / RECEIPT).is_file():
            receipt = _read(folder / RECEIPT)
            # One image fewer is enough: dropping them may have been cut short.
            if len(product_images(folder, receipt.products)) < len(receipt.products):
                return receipt
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ProductError(f"{folder}: cannot be read ({error.strerror or error})") from error
    except _DAMAGED as error:
        raise ProductError(f"{folder / RECEIPT}: damaged ({error}); fetch the observation again") from error
    try:
        return _read(_memory(folder, files, memory))
    except (OSError, *_DAMAGED):
        # Nothing remembered, or not to be understood: the digests can be had again.
        return None


def observation_digests(folder: Path, root: Path, kinds: Sequence[str], memory: Path) -> Digests:
    """Digests of the products of an observation's folder below `root`, remembered under `memory`.

    A cube is read for it once, at the disk's speed. Raises ProductError if a product cannot be
    read, StoreError if `memory` cannot be written.
    """
    known = known_digests(folder, memory)
    if known is not None:
        return known
    products = open_observation(folder, root, kinds)
    try:
        files = _files(folder)
        # Before the bytes are read: a file that changes meanwhile must not be known by its old digest.
        place = _memory(folder, files, memory)
        digests = {}
        for kind in sorted(products):
            stem = products[kind].path.name.split(".")[0].lower()
            parts = {}
            for path in files:
                if path.name.split(".")[0].lower() == stem:
                    with path.open("rb") as handle:
                        parts[path.name.lower()] = file_digest(handle, "sha256").hexdigest()
            digests[kind] = sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
        if not products:
            raise ProductError(f"{folder}: holds none of the kinds {', '.join(kinds)}; download them")
        found = Digests(next(iter(products.values())).observation_id, digests)
    except OSError as error:
        raise ProductError(f"{folder}: cannot be read for its digest ({error.strerror or error})") from error
    try:
        _write(place, found)
    except OSError as error:
        raise StoreError(
            f"data.cache {memory}: cannot be written ({error.strerror or error}); free space, or set data.cache to a "
            "folder of your own"
        ) from error
    return found


def keep_receipt(folder: Path, digests: Digests) -> None:
    """Make an observation known by its digests alone, where its files are on another machine."""
    _write(folder / RECEIPT, digests)


def drop_images(folder: Path, digests: Digests) -> int:
    """Remove the images that digests are of, after a receipt of them; returns the bytes freed.

    No other file is touched. Headers and labels stay: the folder is still an observation's. Where an image is
    a link, what it points to is not ours: all images stay, and it is said. Raises ProductError if the
    folder refuses.
    """
    freed = 0
    try:
        images = product_images(folder, digests.products)
        if links := [path.name for path in images if path.is_symlink()]:
            log.warning("%s: nothing dropped, as %s is a link to a file elsewhere", folder.name, links[0])
            return 0
        _write(folder / RECEIPT, digests)
        for path in images:
            freed += path.stat().st_size
            path.unlink()
    except OSError as error:
        raise ProductError(f"{folder}: images cannot be dropped ({error.strerror or error})") from error
    return freed


def product_images(folder: Path, kinds: Collection[str]) -> list[Path]:
    """The images in a folder that are CRISM products of some kinds."""
    found = []
    for path in _files(folder):
        name = parse_name(path)
        if path.suffix.lower() == ".img" and name is not None and name.kind in kinds:
            found.append(path)
    return found


def _files(folder: Path) -> list[Path]:
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in _SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def _memory(folder: Path, files: Sequence[Path], memory: Path) -> Path:
    stamps = [(f.name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for f in files for s in (f.stat(),)]
    text = json.dumps([str(folder.resolve()), stamps])
    return memory / "digests" / f"{blake2b(text.encode(), digest_size=16).hexdigest()}.json"


def _read(path: Path) -> Digests:
    content = parse_json(path.read_bytes())
    return Digests(str(content["observation_id"]), {str(k): str(v) for k, v in content["products"].items()})


def _write(path: Path, digests: Digests) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    partial.write_text(json.dumps(asdict(digests), indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
