"""What the workers of a study are at, as plain data: it crosses processes as JSON, and reports/live.py draws it."""

from __future__ import annotations

import math
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

STATES = ("running", "finished", "pruned", "failed", "interrupted", "waiting")
TRAINING = "training"
# Seconds after which a step counts for a third of what it did in a worker's speed.
SPAN = 60.0


@dataclass(frozen=True, slots=True)
class Doing:
    """What one worker is at; without a trial it is idle, and `phase` says why.

    `step` of `steps` counts the whole training, also what an earlier call did of it. `seconds` since the trial
    began here, or since the worker waits. `steps_per_second` while it trains, else None.
    """

    worker: str
    host: str
    trial: int | None
    phase: str
    step: int
    steps: int
    loss: float | None
    steps_per_second: float | None
    seconds: float

    @property
    def left(self) -> float | None:
        """Seconds of the training left by its speed; None where that is unknown."""
        speed = self.steps_per_second
        if self.trial is None or self.steps <= 0 or speed is None or not (0.0 < speed < math.inf):
            return None
        return max(self.steps - self.step, 0) / speed

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, which has neither NaN nor infinity: these are the words "nan" and "inf"."""
        return _plain_dict(asdict(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Doing:
        """What `to_json` made; keys that a newer version may have added are left out."""
        known = _known(cls, content)
        for key in ("loss", "steps_per_second", "seconds"):
            known[key] = None if known[key] is None else float(known[key])
        return cls(**known)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A study at one moment.

    `counts` by state, keys from STATES; `total` finished and pruned trials are wanted; `best` is a trial's number
    and its objective; `seconds` since the call began; `trial_seconds` the mean of the trials that ended; `note` is
    what a user should know now, or "".
    """

    study: str
    objective: str
    counts: dict[str, int]
    total: int
    best: tuple[int, float] | None
    workers: tuple[Doing, ...]
    seconds: float
    trial_seconds: float | None
    note: str

    @property
    def done(self) -> int:
        """The trials that count towards the total."""
        return self.counts.get("finished", 0) + self.counts.get("pruned", 0)

    @property
    def running(self) -> tuple[Doing, ...]:
        """The workers that have a trial."""
        return tuple(w for w in self.workers if w.trial is not None)

    @property
    def left(self) -> float | None:
        """Seconds until the total, if trials go on taking as long as they did and as many run at a time; None
        where no trial ended yet."""
        if self.trial_seconds is None or not math.isfinite(self.trial_seconds):
            return None
        return max(self.total - self.done, 0) * self.trial_seconds / max(len(self.running), 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, as `Doing.to_json`."""
        return _plain_dict(asdict(self))

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Snapshot:
        """What `to_json` made; keys that a newer version may have added are left out."""
        known = _known(cls, content)
        known["workers"] = tuple(Doing.from_json(w) for w in known["workers"])
        known["counts"] = dict(known["counts"])
        known["best"] = None if known["best"] is None else (known["best"][0], float(known["best"][1]))
        known["seconds"] = float(known["seconds"])
        known["trial_seconds"] = None if known["trial_seconds"] is None else float(known["trial_seconds"])
        return cls(**known)


def _known(of: type[Doing] | type[Snapshot], content: Mapping[str, Any]) -> dict[str, Any]:
    return {f.name: content[f.name] for f in fields(of)}


def _plain_dict(content: Mapping[str, Any]) -> dict[str, Any]:
    return {k: _plain(v) for k, v in content.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return _plain_dict(value)
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return str(float(value)) if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(slots=True)
class _Entry:
    """A worker's line on the board. `mark` is the last step and its time, None while it does not train; `done`
    steps in `spent` seconds, the older the less, are its speed."""

    trial: int | None
    phase: str
    began: float
    step: int = 0
    steps: int = 0
    loss: float | None = None
    mark: tuple[int, float] | None = None
    done: float = 0.0
    spent: float = 0.0


class Board:
    """Collects what the workers of this process tell; safe to use from several threads."""

    def __init__(self, host: str | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.host = socket.gethostname() if host is None else host
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.Lock()

    def trial(self, worker: str, number: int, choices: Mapping[str, Any]) -> None:
        """A trial begins, or goes on; until its first phase its choices are shown."""
        with self._lock:
            self._entries[worker] = _Entry(number, _words(choices) or "starting", self._clock())

    def phase(self, worker: str, words: str) -> None:
        """Another part of the trial; what it takes does not slow the training's speed."""
        with self._lock:
            entry = self._entry(worker)
            if entry.phase != words:
                entry.phase, entry.mark = words, None

    def step(self, worker: str, step: int, steps: int, loss: float) -> None:
        """Training is at `step` of `steps`. The first step after a start or another phase only sets the clock."""
        with self._lock:
            entry, now = self._entry(worker), self._clock()
            entry.phase, entry.step, entry.steps, entry.loss = TRAINING, step, steps, loss
            before, at = entry.mark or (step, now)
            if step > before and now == at:
                return  # A coarse clock: counted with the next one.
            if step > before:
                fade = math.exp((at - now) / SPAN)
                entry.done = entry.done * fade + (step - before)
                entry.spent = entry.spent * fade + (now - at)
            entry.mark = (step, now)

    def idle(self, worker: str, why: str) -> None:
        """The worker has no trial."""
        with self._lock:
            entry = self._entry(worker)
            if entry.trial is None:
                entry.phase = why
            else:
                self._entries[worker] = _Entry(None, why, self._clock())

    def gone(self, worker: str) -> None:
        """The worker ended."""
        with self._lock:
            self._entries.pop(worker, None)

    def doing(self) -> tuple[Doing, ...]:
        """All workers, in the order in which they came."""
        with self._lock:
            now = self._clock()
            return tuple(self._doing(worker, entry, now) for worker, entry in self._entries.items())

    def _doing(self, worker: str, entry: _Entry, now: float) -> Doing:
        trains = entry.mark is not None and entry.spent > 0.0
        speed = entry.done / entry.spent if trains else None
        return Doing(
            worker, self.host, entry.trial, entry.phase, entry.step, entry.steps, entry.loss, speed, now - entry.began
        )  # fmt: skip

    def _entry(self, worker: str) -> _Entry:
        return self._entries.setdefault(worker, _Entry(None, "starting", self._clock()))


def _words(choices: Mapping[str, Any]) -> str:
    """The choices in short: learning_rate=0.001, features=8."""
    return ", ".join(
        f"{key.split('.')[-1]}={value:.3g}" if isinstance(value, float) else f"{key.split('.')[-1]}={value}"
        for key, value in choices.items()
    )
