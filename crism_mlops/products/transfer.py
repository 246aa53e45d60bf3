"""One file from a server to the disk: begun, gone on with, checked, renamed.

It is written as `.NAME.part` and renamed when all of it is there. A hidden record beside the files
holds what the server said of each (length, ETag or Last-Modified): by that a later call knows what
is still the same. Byte ranges as in RFC 9110, 13.1.5 and 14.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from crism_mlops.errors import ProductError
from crism_mlops.products.mtrdr import open_product
from crism_mlops.products.service import ArchiveError, Patience, Service, TryAgainError, body, opened
from crism_mlops.untrusted import parse_json

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
RECORD = ".crism-mlops-download.json"
# Left free on the disk: a full one takes other programs down as well.
RESERVE_BYTES = 256 << 20
# A body without an announced length may not run on for ever.
_MAX_FILE_BYTES = 32 << 30
# A try that brought so much was worth it: the count of tries begins anew.
_WORTH_BYTES = 1 << 20
OnBytes = Callable[[int], None]


class DiskFullError(ArchiveError):
    """No room for the files."""


@dataclass(frozen=True, slots=True)
class WantedFile:
    """A file to fetch: `name` is safe as a file name, lower case; `bytes` approximate, or None."""

    name: str
    url: str
    bytes: int | None


class Transfer:
    """One file on its way: the tries, and the bytes told to `on_bytes`."""

    def __init__(
        self,
        file: WantedFile,
        folder: Path,
        record: Record,
        session: requests.Session,
        service: Service,
        on_bytes: OnBytes,
        stop: threading.Event,
    ) -> None:
        self.file, self.record, self.session, self.service = file, record, session, service
        self.final, self.part = folder / file.name, folder / f".{file.name}.part"
        self.on_bytes, self.stop = on_bytes, stop
        self.told, self.furthest, self.received = 0, 0, 0

    def fetch(self) -> bool:
        """True where the file was fetched, False where it was there; ArchiveError where it cannot be."""
        entry = self.record.get(self.file.name)
        if self.final.is_file() and entry is not None and entry.bytes == self.final.stat().st_size:
            self._tell(entry.bytes)
            return False
        patience = Patience(self.service, self.file.name)
        while True:
            before = self.furthest
            try:
                return self._try()
            except TryAgainError as problem:
                # Not the bytes received: a server without byte ranges may break off at one place for ever.
                if self.furthest - before >= _WORTH_BYTES:
                    patience.reset()
                patience.wait(problem)
            except ArchiveError as error:
                raise type(error)(f"{self.file.name}: {error}") from error

    def _try(self) -> bool:
        entry = self.record.get(self.file.name)
        have = self._kept(entry)
        headers = {"Range": f"bytes={have}-"} if have else {}
        if have and entry is not None and entry.validator is not None:
            headers["If-Range"] = entry.validator
        with opened(self.session, self.service, self.file.url, headers=headers) as answer:
            if answer.status_code != 200:
                if not (have and entry is not None and _continues(answer, entry, have)):
                    self.part.unlink(missing_ok=True)
                    self._tell(0)
                    raise TryAgainError("the server cannot go on where the file broke off; it is fetched anew")
                total = _content_range(answer)[1]
            else:
                have, total = 0, _length(answer)
                if total is not None and self.final.is_file() and self.final.stat().st_size == total:
                    self._tell(total)
                    self._note(_validator(answer), total)
                    return False
                self._note(_validator(answer), total)
            if answer.status_code != 416:
                _require_file(answer, total)
                require_bytes((total or self.file.bytes or 0) - have, free_bytes(self.part.parent), self.part.parent)
                have = self._write(answer, have, total)
        self._accept(have, total)
        return True

    def _kept(self, entry: Entry | None) -> int:
        """Bytes of an earlier try that can be gone on from: those of the same address, and known."""
        if entry is None or entry.url != self.file.url or (entry.validator is None and entry.bytes is None):
            return 0
        return self.part.stat().st_size if self.part.is_file() and not self.part.is_symlink() else 0

    def _write(self, answer: requests.Response, have: int, total: int | None) -> int:
        """Append the body to the part from byte `have` on; returns the part's size."""
        limit = total if total is not None else _unannounced_limit(self.file)
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
        with os.fdopen(os.open(self.part, flags, 0o666), "r+b") as out:
            out.truncate(have)
            out.seek(have)
            self._tell(have)
            for piece in body(answer):
                if self.stop.is_set():
                    raise StoppedError
                if have + len(piece) > limit:
                    self.part.unlink()
                    raise ArchiveError(f"the server sends more than the {limit} bytes announced; not kept")
                out.write(piece)
                have += len(piece)
                self.received += len(piece)
                self._tell(have)
            out.flush()
            os.fsync(out.fileno())
        return have

    def _accept(self, size: int, total: int | None) -> None:
        if total is not None and size != total:
            raise TryAgainError(f"{size} of {total} bytes came")
        announced = self.file.bytes
        if total is None and announced is not None and abs(size - announced) > 2048 + announced // 20:
            raise ArchiveError(f"{size} bytes came, the archive's list has about {announced}; kept as {self.part.name}")
        os.replace(self.part, self.final)
        entry = self.record.get(self.file.name)
        self._note(None if entry is None else entry.validator, size)

    def _note(self, validator: str | None, size: int | None) -> None:
        self.record.update({self.file.name: Entry(self.file.url, validator, size)})

    def _tell(self, position: int) -> None:
        if position != self.told:
            self.on_bytes(position - self.told)
            self.told = position
            self.furthest = max(self.furthest, position)


class StoppedError(Exception):
    """The download was called off: the part stays."""


@dataclass(frozen=True, slots=True)
class Entry:
    """What the server said of a file; `checked` when its product was found to be right."""

    url: str
    validator: str | None
    bytes: int | None
    checked: bool = False


class Record:
    """The hidden record of an observation's folder, by file name; used by whoever holds the folder's lock."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / RECORD
        self._entries: dict[str, Entry] = {}
        try:
            content = parse_json(self._path.read_bytes())
            self._entries = {str(name): Entry(**fields) for name, fields in content.items()}
        except FileNotFoundError:
            pass
        except (ValueError, TypeError):
            # Without it, parts are begun anew and files compared with the server's.
            log.warning("%s: damaged; files are compared with the archive's", self._path)

    def get(self, name: str) -> Entry | None:
        return self._entries.get(name)

    def update(self, changes: Mapping[str, Entry | None]) -> None:
        """Set entries, or take them away (None), and write the record."""
        entries: dict[str, Entry | None] = {**self._entries, **changes}
        self._entries = {name: entry for name, entry in sorted(entries.items()) if entry is not None}
        partial = self._path.with_name(f"{self._path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            partial.write_text(json.dumps({k: asdict(v) for k, v in self._entries.items()}, indent=1) + "\n")
            os.replace(partial, self._path)
        finally:
            partial.unlink(missing_ok=True)


def check_product(names: Sequence[str], folder: Path, record: Record) -> str | None:
    """Hold a product's image against its header and label, unless that was done before.

    What is wrong is put aside as `.NAME.wrong` and reported as a line; None where all is right, or
    where a file is missing.
    """
    paths = [folder / name for name in names]
    described = [path for path in paths if path.suffix in (".hdr", ".lbl")]
    images = [path for path in paths if path.suffix == ".img"]
    if not (described and images and all(path.is_file() for path in (*described, *images))):
        return None
    entries = {path.name: record.get(path.name) for path in (*described, *images)}
    if all(entry is not None and entry.checked for entry in entries.values()):
        return None
    try:
        open_product(described[0])
    except ProductError as error:
        # Which of them is wrong cannot be known, so all are fetched anew the next time.
        for path in (*images, *described):
            os.replace(path, path.with_name(f".{path.name}.wrong"))
        record.update(dict.fromkeys(entries))
        return f"{images[0].name}: {error}; put aside as .{images[0].name}.wrong"
    record.update({name: None if entry is None else replace(entry, checked=True) for name, entry in entries.items()})
    return None


def _continues(answer: requests.Response, entry: Entry, have: int) -> bool:
    """Whether an answer to a byte range goes on (206), or ends (416), with what is on disk."""
    start, total = _content_range(answer)
    if total is None or (entry.bytes is not None and total != entry.bytes):
        return False
    if answer.status_code == 416:
        return total == have
    same = _validator(answer) in (None, entry.validator)
    return same and start == have and _length(answer) in (None, total - have)


def _content_range(answer: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total length of Content-Range (RFC 9110, 14.4)."""
    match = re.fullmatch(
        r"bytes (?:(\d{1,18})-\d{1,18}|\*)/(\d{1,18})", answer.headers.get("Content-Range", "").strip()
    )
    return (None, None) if match is None else (None if match[1] is None else int(match[1]), int(match[2]))


def _length(answer: requests.Response) -> int | None:
    text = answer.headers.get("Content-Length", "").strip()
    chunked = "Transfer-Encoding" in answer.headers
    return int(text) if re.fullmatch(r"\d{1,18}", text) and not chunked else None


def _validator(answer: requests.Response) -> str | None:
    """What names this version of a file: its ETag, unless weak (no good for ranges), or its date."""
    tag = answer.headers.get("ETag")
    return tag if tag is not None and not tag.startswith("W/") else answer.headers.get("Last-Modified")


def _require_file(answer: requests.Response, total: int | None) -> None:
    if total is not None and total > _MAX_FILE_BYTES:
        raise ArchiveError(f"the server announces {total} bytes, more than any product has")
    if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise ArchiveError("the server sends it compressed, so its size cannot be checked")
    if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
        raise ArchiveError("the server sends a web page in the place of the file")


def _unannounced_limit(file: WantedFile) -> int:
    return _MAX_FILE_BYTES if file.bytes is None else file.bytes + file.bytes // 20 + 4096


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that `folder` is, or will be, on."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free


def require_bytes(needed: int, free: int, folder: Path) -> None:
    """Raises DiskFullError, with both figures, where `needed` bytes and a reserve are not free."""
    if needed > 0 and free < needed + RESERVE_BYTES:
        raise DiskFullError(
            f"{folder}: {needed / 1e9:.2f} GB to fetch, {free / 1e9:.2f} GB free, of which "
            f"{RESERVE_BYTES / 1e9:.2f} GB must stay so; free space, or give another folder with -o"
        )
