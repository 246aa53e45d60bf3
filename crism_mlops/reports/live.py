"""A running study on standard error: a live part on a terminal, plain lines elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any, TextIO

from rich.console import Console, ConsoleRenderable
from rich.live import Live
from rich.text import Text

from crism_mlops.interrupts import holding_interrupts
from crism_mlops.reports.snapshot import clean, line_of, render
from crism_mlops.studies.board import Snapshot

__all__ = ["LiveView", "render"]
PER_SECOND = 4.0


class _Console(Console):
    """Standard error; what one thread prints, live part included, is written before another one begins."""

    def __init__(self) -> None:
        self._turn = threading.RLock()
        super().__init__(stderr=True, emoji=False, markup=False, highlight=False)

    def __enter__(self) -> _Console:
        self._turn.acquire()
        super().__enter__()
        return self

    def __exit__(self, *of: Any) -> None:
        try:
            super().__exit__(*of)
        except (OSError, ValueError):  # Nobody reads any more: the work goes on.
            self.quiet = True
        finally:
            self._turn.release()

    def on_broken_pipe(self) -> None:
        self.quiet = True


class LiveView:
    """Shows a study while it runs; `say` and `update` may be called from any thread.

    On a terminal the live part stands below what is said, and is gone at the end. Elsewhere a running trial has
    a plain line every `every` seconds, if it changed.
    """

    def __init__(self, every: float = 30.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.every = every
        self._clock = clock
        self._started = clock()
        self._console = _Console()
        self.terminal = _is_terminal() and self._console.is_terminal and not self._console.is_dumb_terminal
        self._lock = threading.RLock()
        self._said: dict[tuple[str, int | None] | None, tuple[float, object]] = {}
        self._snapshot: Snapshot | None = None
        self._fresh = False
        self._live: Live | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._handlers: list[tuple[logging.StreamHandler[TextIO], TextIO]] = []

    def __enter__(self) -> LiveView:
        if not self.terminal:
            return self
        try:
            # What goes to a file by way of standard output is not for the terminal.
            tty = sys.stdout is not None and sys.stdout.isatty()
            live = Live(
                get_renderable=self._shown, console=self._console, auto_refresh=False, transient=True,
                redirect_stdout=tty, vertical_overflow="crop",
            )  # fmt: skip
            before = sys.stderr
            self._live = live
            with holding_interrupts(limit=2):
                with self._console:
                    live.start()
                self._redirect_logs(before)
                self._thread = threading.Thread(target=self._draw, name="live view", daemon=True)
                self._thread.start()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def say(self, line: str) -> None:
        """A line that stays, after the seconds since the start."""
        line = f"[{self._clock() - self._started:6.1f} s] {line}"
        if not self.terminal:
            with self._lock:
                _write(line)
            return
        with holding_interrupts(limit=2), self._console:
            self._console.print(Text(line), soft_wrap=True)

    def update(self, snapshot: Snapshot) -> None:
        """The study's present state; drawn at most PER_SECOND times a second."""
        with self._lock:
            self._snapshot, self._fresh = snapshot, True
            if not self.terminal:
                for line in self._changed(snapshot):
                    self.say(line)

    def _changed(self, snapshot: Snapshot) -> Iterator[str]:
        """A line for the note and each running trial that changed, where the last one is old enough. A trial's
        first one comes `every` seconds after it was first seen: that it began is said elsewhere."""
        now = self._clock()
        if snapshot.note and self._due(None, snapshot.note, now, -math.inf):
            yield clean(snapshot.note)
        for doing in snapshot.running:
            if self._due((doing.worker, doing.trial), (doing.phase, doing.step), now, now):
                yield line_of(doing)
        present = {(d.worker, d.trial) for d in snapshot.running}
        self._said = {key: last for key, last in self._said.items() if key is None or key in present}

    def _due(self, key: tuple[str, int | None] | None, content: object, now: float, first: float) -> bool:
        last, old = self._said.setdefault(key, (first, None))
        if now - last < self.every or old == content:
            return False
        self._said[key] = (now, content)
        return True

    def _shown(self) -> ConsoleRenderable:
        return Text("") if self._snapshot is None else render(self._snapshot)

    def _draw(self) -> None:
        while not self._ended.wait(1.0 / PER_SECOND):
            if self._fresh and self._live is not None:
                self._fresh = False
                # The console's turn before Live's own lock, as in every print.
                with self._console:
                    self._live.refresh()

    def _redirect_logs(self, before: TextIO) -> None:
        """Log lines go above the live part: a handler keeps the stream that it was made with."""
        for handler in logging.getLogger().handlers:
            if isinstance(handler, logging.StreamHandler) and handler.stream is before:
                handler.setStream(sys.stderr)
                self._handlers.append((handler, before))

    def _close(self) -> None:
        """Leave the terminal as it was, also when Ctrl-C comes meanwhile."""
        with holding_interrupts(limit=2):
            self._ended.set()
            if self._thread is not None:
                self._thread.join(1.0)
                self._thread = None
            while self._handlers:
                handler, stream = self._handlers.pop()
                handler.setStream(stream)
            live, self._live = self._live, None
            if live is not None:
                with self._console:
                    self._snapshot = None
                    live.stop()


def _is_terminal() -> bool:
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # It is closed.
        return False


def _write(line: str) -> None:
    try:
        if sys.stderr is not None:
            sys.stderr.write(f"{line}\n")
            sys.stderr.flush()
    except (OSError, ValueError):  # Nobody reads any more: the work goes on.
        return
