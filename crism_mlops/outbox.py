"""What waits to be told, on disk: an append-only journal that survives its process.

    FOLDER/journal.jsonl   one operation a line, in the order of `put`
    FOLDER/acknowledged    how many bytes of the journal have been delivered
    FOLDER/payload-*       bytes that belong to an operation, written before its line
    FOLDER/refused.jsonl   operations that were refused, with the reason; nothing of them is lost

Delivered at least once: a process that is killed between delivering and noting it delivers that again, so
that an operation must do no harm when it is repeated.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from crism_mlops.errors import TrackingError, one_line

Op = dict[str, Any]
# A journal of which everything is delivered starts anew beyond this size.
_COMPACT = 1 << 20
# A process that is just ending may hold the folder for so long, and so may a killed one's children.
_LOCK_SECONDS = 20.0


class Outbox:
    """One folder's journal; of one process at a time, of any of its threads."""

    def __init__(self, folder: Path) -> None:
        """Take over what an earlier process left there. Raises TrackingError where the folder cannot be
        written, or another process uses it."""
        self.folder = folder
        self._journal, self._mark = folder / "journal.jsonl", folder / "acknowledged"
        self._aside = folder / "refused.jsonl"
        self._lock = threading.RLock()
        self._closed = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The system gives it back when a process dies.
            self._owner = FileLock(folder / "lock")
            self._owner.acquire(timeout=_LOCK_SECONDS)
        except Timeout as error:
            raise TrackingError(f"outbox {folder} is in use by another process; wait for it, or end it") from error
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._file = os.open(self._journal, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            # Each with the byte after it. Bounded by what the training logs while the server is away.
            self._waiting: deque[tuple[Op, int]] = deque()
            self._size = self._acknowledged = 0
            self._unsynced = False
            self._read()
        except BaseException as error:
            self._owner.release()
            if isinstance(error, OSError):
                raise self._unwritable(error) from error
            raise

    def _unwritable(self, error: OSError) -> TrackingError:
        return TrackingError(
            f"outbox {self.folder} cannot be written ({one_line(error)}); free space there, or put it elsewhere"
        )

    def _read(self) -> None:
        content = self._journal.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            # The line was being written when the process died: its `put` never returned.
            os.ftruncate(self._file, whole)
        done = int(self._mark.read_text() or "0") if self._mark.is_file() else 0
        if done > whole:
            # Emptied, and killed before that was noted; or the machine went down with the end of the journal,
            # which had been delivered.
            os.ftruncate(self._file, 0)
            self._note(0)
            done = whole = 0
        self._size = whole
        self._acknowledged = end = done
        for line in content[done:whole].splitlines(keepends=True):
            end += len(line)
            try:
                op = json.loads(line)
            except ValueError:
                op = {"op": "unreadable", "line": line.decode(errors="replace")}
            self._waiting.append((op, end))
        # Of an operation that was being put, or had just been delivered, when the process died.
        used = {op.get("payload") for op, _ in self._waiting}
        refused = self._aside.read_text() if self._aside.is_file() else ""
        for path in self.folder.glob("payload-*"):
            if path.name not in used and path.name not in refused:
                path.unlink()

    def put(self, op: Mapping[str, Any], payload: bytes | None = None) -> None:
        """Add an operation. Where it returns, a killed process loses nothing of it."""
        with self._lock:
            whole = dict(op)
            written: Path | None = None
            try:
                if payload is not None:
                    written = self.folder / f"payload-{uuid.uuid4().hex}"
                    _write(written, payload)
                    whole["payload"] = written.name
                line = (json.dumps(whole, separators=(",", ":")) + "\n").encode()
                self._append(line)
            except OSError as error:
                if written is not None:
                    written.unlink(missing_ok=True)
                raise self._unwritable(error) from error
            # Asked of the file: where Ctrl-C came between writing a line and this, the line is there all the same.
            self._size = os.fstat(self._file).st_size
            self._unsynced = True
            self._waiting.append((whole, self._size))

    def _append(self, line: bytes) -> None:
        left, size = memoryview(line), os.fstat(self._file).st_size
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError:
            # Half a line would join the next one.
            os.ftruncate(self._file, size)
            raise

    def payload(self, op: Op) -> Path:
        """The file with an operation's bytes."""
        return self.folder / str(op["payload"])

    def pending(self) -> int:
        """How many operations are not delivered."""
        return len(self._waiting)

    def peek(self, limit: int = 1000) -> list[Op]:
        """The oldest operations that are not delivered."""
        with self._lock:
            return [op for op, _ in islice(self._waiting, limit)]

    def acknowledge(self, count: int) -> None:
        """The oldest `count` operations are delivered."""
        if not count:
            return
        with self._lock:
            if self._closed:
                return  # Of a delivery that outlived this process's turn: it is made again, which does no harm.
            done = [self._waiting.popleft() for _ in range(count)]
            self._acknowledged = done[-1][1]
            if not self._waiting and self._size > _COMPACT:
                os.ftruncate(self._file, 0)
                self._size = self._acknowledged = 0
            self._note(self._acknowledged)
            for op, _ in done:
                if "payload" in op and not op.get("kept"):
                    self.payload(op).unlink(missing_ok=True)

    def refuse(self, reason: str) -> None:
        """The oldest operation will never be taken: it makes room, and stays on disk with its payload."""
        with self._lock:
            if self._closed:
                return
            op, _ = self._waiting[0]
            with self._aside.open("a") as file:
                file.write(json.dumps({"reason": reason, **op}) + "\n")
            op["kept"] = True
            self.acknowledge(1)

    def deliver(self, send: Callable[[Sequence[Op]], int]) -> None:
        """Hand the operations to `send`, oldest first, until none is left. It returns how many of those that
        it got are delivered, at least one; what it raises ends this, and those stay."""
        while ops := self.peek():
            self.acknowledge(send(ops))

    def sync(self) -> None:
        """Put what a power cut would lose onto the disk: for when it stays there for longer."""
        with self._lock:
            if self._unsynced and not self._closed:
                os.fsync(self._file)
                self._unsynced = False

    def close(self) -> None:
        """Let go of the folder; it is gone where nothing is left to deliver."""
        with self._lock:
            if self._closed:
                return
            self.sync()
            self._closed = True
            os.close(self._file)
            try:
                if not self._waiting:
                    for path in (self._journal, self._mark, self.folder / "lock"):
                        path.unlink(missing_ok=True)
                    if not any(self.folder.iterdir()):
                        self.folder.rmdir()
            finally:
                self._owner.release()

    def _note(self, offset: int) -> None:
        _write(self._mark, str(offset).encode())


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_bytes(content)
    temporary.replace(path)
