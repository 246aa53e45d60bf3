"""The best epochs of a training: a few checkpoints, within a room."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """Checkpoint folders of the best epochs below `folder`: `top` of them, within `room` bytes.

    The best one always stays. `entries` (JSON content: epoch, error, bytes; best first) is the caller's,
    who keeps it with the state to resume from.
    """

    def __init__(self, folder: Path, top: int, room: int | None, entries: list[dict[str, Any]]) -> None:
        self.folder, self.top, self.room, self.entries = folder, top, room, entries

    def offer(self, epoch: int, error: float, write: Callable[[Path], object]) -> bool:
        """Keep an epoch (written by `write(folder)`) if it is among the best; whether it is the best.

        `error`: less is better. Of equal ones the earlier stays. What is no longer among the best is
        removed after the new one is there.
        """
        # An epoch that is offered again, by a training that went on, takes its own place.
        self.entries[:] = [entry for entry in self.entries if entry["epoch"] != epoch]
        better: int = sum(entry["error"] <= error for entry in self.entries)
        if better >= self.top:
            return False
        place = self.place(epoch)
        write(place)
        size = sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
        self.entries.insert(better, {"epoch": epoch, "error": error, "bytes": size})
        while len(self.entries) > self.top or (
            self.room is not None and len(self.entries) > 1 and sum(e["bytes"] for e in self.entries) > self.room
        ):
            shutil.rmtree(self.place(self.entries.pop()["epoch"]).parent, ignore_errors=True)
        return better == 0

    def place(self, epoch: int) -> Path:
        """The folder of an epoch's checkpoint."""
        # The last part is what the folder is called where it is logged.
        return self.folder / f"epoch-{epoch:05d}" / "checkpoint"

    @property
    def places(self) -> list[Path]:
        """The folders that are kept, the best first."""
        return [self.place(entry["epoch"]) for entry in self.entries]
