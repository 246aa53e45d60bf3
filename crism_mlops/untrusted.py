"""Files from outside, before anything reads them in earnest: what they are, how large, and where they lie.

A checkpoint, a pipeline folder or a store may come from anybody. Nothing here runs code of theirs, follows
their links, or takes more memory than their files have bytes.
"""

from __future__ import annotations

import io
import json
import math
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from crism_mlops.errors import UntrustedError, one_line

if TYPE_CHECKING:
    from numpy.typing import NDArray

# CLIP's tokenizer.json, the largest JSON file of a model, has 3.6 MB.
MAX_JSON_BYTES = 32 << 20
# Stable Diffusion's U-Net: 686 tensors, a header of 90 kB. safetensors itself stops at 100 MB, a gigabyte of objects.
MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 20_000
MAX_FILES = 10_000
_MAX_DIMENSIONS = 16
_MAX_ELEMENTS = 1 << 40
_MAX_NAME = 255
# Of NumPy and PyTorch both; safetensors knows more, which one of them cannot hold.
_DTYPES = {"BOOL", "U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "F16", "BF16", "F32", "F64"}
_MAGIC = (
    (b"PK\x03\x04", "a zip archive (as torch.save and numpy.savez write)"),
    (b"PK\x05\x06", "a zip archive (as torch.save and numpy.savez write)"),
    (b"\x93NUMPY", "a NumPy file"),
    (b"\x89HDF\r\n", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip archive"),
    (b"BZh", "a bzip2 archive"),
    (b"\xfd7zXZ", "an xz archive"),
    (b"\x7fELF", "a program"),
    (b"#!", "a script"),
    (b"GGUF", "a GGUF file"),
)


def disguised(path: Path) -> str | None:
    """What a file is by its first bytes, in words, where that is an archive, a program or a pickle; else None.

    Pickles of protocol 0 and 1 have no mark of their own: they are no JSON and no safetensors either.
    """
    with path.open("rb") as handle:
        begin = handle.read(8)
    for magic, words in _MAGIC:
        if begin.startswith(magic):
            return words
    # PROTO, then the number of the protocol; in a safetensors file these are the length of the header, whose
    # next five bytes are then 0.
    if len(begin) > 2 and begin[0] == 0x80 and 2 <= begin[1] <= 5 and any(begin[3:8]):
        return "a pickle"
    return None


def check_name(name: object, where: Path) -> str:
    """A file name of a list that came with the files, as POSIX text below the list's folder.

    Raises UntrustedError, naming the list `where`, for anything that could lead out of it: "..", an absolute
    path, one of Windows', a character of control.
    """
    bad = (
        not isinstance(name, str)
        or not name.isprintable()
        or any(c in name for c in '\\:*?"<>|')
        or any(part in ("", ".", "..") or len(part) > _MAX_NAME for part in name.split("/"))
    )
    if bad:
        raise UntrustedError(
            f"{where}: names the file {str(name)[:80]!r}, which is missing from or leads out of its folder; expected "
            "plain names below it"
        )
    return str(name)


def check_folder(folder: Path, links_into: Path | None = None) -> list[str]:
    """Names of all files below a folder, POSIX, sorted; the folder's own name may be a link, as the user gave it.

    `links_into`: links to ordinary files below this folder are files too.
    Raises UntrustedError for a link, a pipe, a device or a socket below it (reading one could read another file,
    or never end), and for too many files.
    """
    found: list[str] = []
    waiting = [folder]
    while waiting:
        place = waiting.pop()
        try:
            entries = sorted(os.scandir(place), key=lambda entry: entry.name)
            kinds = [entry.stat(follow_symlinks=False).st_mode for entry in entries]
        except OSError as error:
            raise UntrustedError(f"{place}: cannot be listed ({one_line(error)})") from error
        for entry, kind in zip(entries, kinds, strict=True):
            if stat.S_ISDIR(kind):
                waiting.append(Path(entry.path))
            elif stat.S_ISREG(kind) or (links_into is not None and _leads_into(Path(entry.path), links_into)):
                found.append(Path(entry.path).relative_to(folder).as_posix())
            else:
                what = "no ordinary file"
                if stat.S_ISLNK(kind):
                    what = "a link" if links_into is None else f"a link to something other than a file in {links_into}"
                raise UntrustedError(
                    f"{entry.path}: refused, it is {what}; only files and folders are read: copy the file itself "
                    "(cp -rL copies a folder with the files behind its links)"
                )
        if len(found) + len(waiting) > MAX_FILES:
            raise UntrustedError(f"{folder}: refused, it holds more than {MAX_FILES} files")
    return sorted(found)


def _leads_into(link: Path, folder: Path) -> bool:
    """Whether a link ends at an ordinary file below `folder`, which is no link itself."""
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError):  # nothing there, or links in a circle
        return False
    return link.is_symlink() and target.is_file() and target.is_relative_to(folder)


def read_json(path: Path, limit: int = MAX_JSON_BYTES, *, constants: bool = False) -> dict[str, Any]:
    """The keys and values of a JSON file.

    `constants`: NaN, Infinity and -Infinity, which Python writes and JSON does not have, are read as numbers.
    Raises UntrustedError for a file of more than `limit` bytes, of another kind, that is no object, nests too
    deeply, has a key twice, or holds a number that JSON does not have (NaN, Infinity; unless `constants`) or of
    thousands of digits.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError("no ordinary file")
        with path.open("rb") as handle:
            text = handle.read(limit + 1)
        if len(text) > limit:
            raise ValueError(f"more than {limit} bytes")
        if (words := disguised(path)) is not None:
            raise ValueError(f"{words}")
        return parse_json(text, constants=constants)
    except (OSError, ValueError) as error:
        raise UntrustedError(
            f"{path}: cannot be read as JSON, refused ({one_line(error)[:160]}); write or download it again"
        ) from error


def parse_json(text: bytes, *, constants: bool = False) -> dict[str, Any]:
    """An object of JSON text. Raises ValueError as `read_json` says."""
    constant = float if constants else _no_constant
    try:
        content = json.loads(
            text.decode("utf-8"), object_pairs_hook=_keys, parse_constant=constant, parse_float=_finite
        )
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"expected keys and values, found {type(content).__name__}")
    return content


def _keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        # Of two readers one takes the first, one the last.
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1) if len(names) < 1000 else "(one of many)"
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return content


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON's")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the tensors in a safetensors file, from its header alone.

    safetensors checks lengths, offsets (no gap, no overlap), sizes of shapes times types, and the nesting; this
    refuses what it lets through or what it needs too much memory for: long headers, 10^4 tensors and more, names
    that stand twice, shapes beyond the libraries' (with a 0 among them), types that one of them does not have.

    Raises UntrustedError.
    """
    from safetensors import SafetensorError, safe_open

    try:
        kind = path.stat()
        if not stat.S_ISREG(kind.st_mode):
            raise ValueError("no ordinary file")
        if (words := disguised(path)) is not None:
            raise ValueError(f"{words}")
        with path.open("rb") as handle:
            shapes = _header_shapes(handle, kind.st_size)
        # Maps the file and checks the header; no tensor is read.
        with safe_open(str(path), framework="np"):
            return shapes
    except (OSError, ValueError, SafetensorError, MemoryError) as error:
        raise UntrustedError(
            f"{path}: cannot be read as safetensors, refused ({one_line(error)[:160]}); write or download it again"
        ) from error


def read_tensors(content: bytes) -> dict[str, NDArray[Any]]:
    """The arrays by name of safetensors content that is in memory; refuses what `tensor_shapes` does.

    Raises ValueError.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    _header_shapes(io.BytesIO(content), len(content))
    try:
        return dict(load(content))
    except (SafetensorError, MemoryError) as error:
        raise ValueError(one_line(error)) from error


def _header_shapes(handle: BinaryIO, size: int) -> dict[str, tuple[int, ...]]:
    length = int.from_bytes(handle.read(8), "little")
    if size < 8 or length > size - 8:
        raise ValueError(f"its header claims {length} bytes, the file has {size}")
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    header = parse_json(handle.read(length))
    shapes = {name: _shape(name, entry) for name, entry in header.items() if name != "__metadata__"}
    if len(shapes) > MAX_TENSORS:
        raise ValueError(f"it names {len(shapes)} tensors, at most {MAX_TENSORS} are read")
    return shapes


def _shape(name: str, entry: Any) -> tuple[int, ...]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not isinstance(shape, list) or any(type(n) is not int or n < 0 for n in shape):
        raise ValueError(f"tensor {name[:80]!r} has no shape")
    if len(shape) > _MAX_DIMENSIONS or math.prod(max(n, 1) for n in shape) > _MAX_ELEMENTS:
        raise ValueError(f"tensor {name[:80]!r} has a shape of {len(shape)} dimensions, or too large a one")
    kind = entry.get("dtype")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"tensor {name[:80]!r} is of type {str(kind)[:20]!r}")
    return tuple(shape)
