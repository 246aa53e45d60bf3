"""A trial's tracker that does not wait for the tracking server."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from crism_mlops.errors import TrackingAwayError, TrackingError, one_line
from crism_mlops.outbox import Op, Outbox
from crism_mlops.tracking import Tracker
from crism_mlops.tracking_store import DOUBT, Outage, pauses, reach_away, reason, retry_ourselves, shown, translated

log = logging.getLogger(__name__)

T = TypeVar("T")
# Metrics that go into one call while a backlog is delivered.
BATCH = 1000
# How long an interrupted trial waits for its last updates to be taken.
FAREWELL = 5.0


class BufferedTracker(Tracker):
    """Metrics, parameters, tags and files go into an outbox on disk, as of now, and a thread delivers them in
    order; what needs an answer, or ends a run, first waits until all of them are delivered.

    A store that is away is tried again for as long as this is open. An update that the store refuses is put
    aside (`refused.jsonl` in the folder) and raised as a TrackingError by the next call. Left without an
    error, everything is delivered, with the tracker's patience; left with one, whatever is not delivered
    after some seconds stays in the folder for the next tracker on it.
    """

    def __init__(self, tracker: Tracker, folder: Path, say: Callable[[str], None] | None = None) -> None:
        self.uri, self.client = tracker.uri, tracker.client
        self.experiment, self.experiment_id = tracker.experiment, tracker.experiment_id
        self.patience = tracker.patience
        self._say = say or log.warning
        self.outage = Outage(self.uri, self._say, f"training goes on, updates wait in {folder}")
        retry_ourselves()
        self._outbox = Outbox(folder)
        # Guards all that follows; woken by new updates, attempts and the end.
        self._news = threading.Condition()
        self._refused: list[str] = []
        self._broken: BaseException | None = None
        self._last: TrackingAwayError | None = None  # why the latest attempt failed
        self._failures = 0
        self._hurry = self._ending = False
        self._doubt: float | None = None
        self._thread = threading.Thread(target=self._deliver, name="tracking outbox", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """How many updates wait for the store."""
        return self._outbox.pending()

    def __enter__(self) -> BufferedTracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.flush()
                return
            try:
                self.flush(within=FAREWELL)
            except TrackingError as problem:
                # The error that ends the trial is the one to be raised.
                self._say(one_line(problem))
        finally:
            self._close()

    def flush(self, within: float | None = None) -> None:
        """Wait until everything is delivered: until the tracker's patience ends with the store away, or
        `within` so many seconds. Raises TrackingAwayError where it is not, TrackingError for what was refused."""
        end = None if within is None else time.monotonic() + within
        with self._news:
            seen, since = self._failures, None
            self._hurry = True
            self._news.notify_all()
            while self._outbox.pending() and self._broken is None:
                now = time.monotonic()
                if self._last is None:
                    since = None
                elif self._failures > seen:
                    since = now if since is None else since
                if (since is not None and now - since >= self.patience) or (end is not None and now >= end):
                    raise self._left() from self._last
                self._news.wait(0.1)
        self._complain()

    def _left(self) -> TrackingAwayError:
        why = "is slow" if self._last is None else f"does not answer ({reason(self._last)})"
        return TrackingAwayError(
            f"tracking server {shown(self.uri)} {why}; {_updates(self._outbox.pending(), 'waits', 'wait')} in "
            f"{self._outbox.folder}, the same command goes on from there"
        )

    def _ask(self, call: Callable[[], T]) -> T:
        self.flush()
        return super()._ask(call)

    def _tell(self, op: dict[str, Any], payload: bytes | None = None) -> None:
        # First of all this one is kept: what may be raised is about earlier ones.
        self._keep(op, payload)
        self._complain()

    def _keep(self, op: dict[str, Any], payload: bytes | None = None) -> None:
        self._outbox.put(op, payload)
        with self._news:
            self._news.notify_all()

    def _complain(self) -> None:
        with self._news:
            if self._broken is not None:
                raise TrackingError(
                    f"updates are no longer delivered ({type(self._broken).__name__}: {one_line(self._broken)}); "
                    f"they stay in {self._outbox.folder}"
                ) from self._broken
            refused, self._refused = self._refused, []
        if refused:
            how = _updates(len(refused), "was refused and is", "were refused and are")
            place = self._outbox.folder / "refused.jsonl"
            raise TrackingError(f"{how} kept in {place}, first {refused[0]}")

    def _deliver(self) -> None:
        """The thread: everything in order, until the end."""
        rest = pauses()
        try:
            while True:
                with self._news:
                    self._news.wait_for(lambda: self._ending or self._outbox.pending())
                    if self._ending:
                        return
                    again = self._last is not None
                try:
                    if again:
                        reach_away(self.uri)
                    self._deliver_some(self._outbox.peek(BATCH))
                except TrackingAwayError as error:
                    self._outbox.sync()
                    self.outage.away(error)
                    with self._news:
                        self._last, self._hurry = error, False
                        self._failures += 1
                        self._news.notify_all()
                        self._news.wait_for(lambda: self._ending or self._hurry, next(rest))
                else:
                    self.outage.back()
                    rest = pauses()
                    with self._news:
                        self._last, self._doubt = None, None
                        self._news.notify_all()
        except BaseException as error:
            # Raised by the next call: a thread has nobody to tell.
            with self._news:
                self._broken = error
                self._news.notify_all()

    def _deliver_some(self, ops: Sequence[Op]) -> None:
        """Deliver the oldest operation, and of metrics those that follow it."""
        together = _together(ops)
        try:
            with translated(self.uri):
                if len(together) > 1:
                    self._send({**together[0], "metrics": [row for op in together for row in op["metrics"]]}, None)
                else:
                    payload = self._outbox.payload(together[0]).read_bytes() if "payload" in together[0] else None
                    self._send(together[0], payload)
        except TrackingAwayError as error:
            self._doubt = (self._doubt or time.monotonic()) if error.doubtful else None
            if self._doubt is None or time.monotonic() - self._doubt < DOUBT:
                raise
            self._refuse(together[0], error)
            self._doubt = None
        except (TrackingError, KeyError, TypeError, ValueError) as error:
            if len(together) > 1:
                # Which of them is it?
                for op in together:
                    self._deliver_some([op])
                return
            self._refuse(together[0], error)
        else:
            self._outbox.acknowledge(len(together))

    def _refuse(self, op: Op, error: Exception) -> None:
        names = [row[0] for row in op.get("metrics", ())] or [*op.get("params", ()), *op.get("tags", ())]
        what = op.get("file") or ", ".join(names[:3])
        self._outbox.refuse(one_line(error))
        with self._news:
            self._refused.append(f"{op.get('op')} {what} of run {op.get('run')}: {one_line(error)}")

    def _close(self) -> None:
        with self._news:
            self._ending = True
            self._news.notify_all()
        # It may be in a call that gets no answer: a daemon, it ends with the process.
        self._thread.join(timeout=FAREWELL)
        self._outbox.close()


def _updates(count: int, one: str, more: str) -> str:
    return f"1 update {one}" if count == 1 else f"{count} updates {more}"


def _together(ops: Sequence[Op]) -> Sequence[Op]:
    """The first operation, and where it logs metrics those after it that log the same run's."""
    first, count, rows = ops[0], 0, 0
    for op in ops:
        if op.get("op") != "metrics" or op["run"] != first["run"]:
            break
        rows += len(op["metrics"])
        if rows > BATCH:
            break
        count += 1
    return ops[: max(count, 1)]
