"""A worker's heart: it beats while the worker lives, and hears what others want of it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from threading import Event, RLock, Thread
from types import TracebackType
from typing import Any

from crism_mlops.errors import LeaseLostError, one_line
from crism_mlops.studies.ledger import Ledger
from crism_mlops.studies.processes import Me
from crism_mlops.studies.proxy import RemoteLedger
from crism_mlops.studies.storage import is_away

log = logging.getLogger(__name__)


class Yielded(KeyboardInterrupt):
    """Somebody else asked for this trial to stop after saving: as Ctrl-C does, but the worker goes on."""


def clock() -> float:
    """Seconds that go on while the machine sleeps: others' clocks do."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class Heart:
    """Joins a study, beats in a thread of its own, and leaves it: `with Heart(...) as heart`.

    `doing()` is what others are told of the worker with each beat.
    """

    def __init__(
        self,
        ledger: Ledger | RemoteLedger,
        study: str,
        me: Me,
        lease: float,
        every: float,
        gpus: float = 0.0,
        group: str = "",
        doing: Callable[[], Mapping[str, Any]] = dict,
    ) -> None:
        self.ledger = ledger
        self.study = study
        self.me = me
        self.lease = lease
        self.every = min(every, lease / 6.0)
        self.gpus = gpus
        self.group = group
        self.doing = doing
        self.controls: dict[str, Any] = {}
        self.lost = False
        self._good_until = 0.0
        self._ask_again = 0.0
        self._offset = 0.0
        self._ended = Event()
        # A beat that was under way when its worker joined again would tell of the row before.
        self._lock = RLock()
        self._thread = Thread(target=self._run, name="heart", daemon=True)

    def __enter__(self) -> Heart:
        self.join()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        try:
            self.ledger.leave(self.me.worker)
        except Exception as problem:
            # The row stays until its lease ends, as if the worker had died here.
            log.warning("could not sign off from the study: %s", one_line(problem))

    def join(self) -> None:
        """Join, or join again after having been given up for dead."""
        me = self.me
        with self._lock:
            self.ledger.join(self.study, me.worker, me.machine, me.process, self.lease, self.gpus, self.group)
            self.lost = False
            self.listen()

    def beat(self) -> None:
        """Beat once. Passes on what the database raises."""
        with self._lock:
            begun = clock()
            answer = self.ledger.beat(self.study, self.me.worker, self.lease, dict(self.doing()))
            self.controls = answer["controls"]
            self._offset = answer["now"] - time.time()
            if answer["alive"]:
                self._good_until = begun + self.lease
            else:
                self.lost = True

    def listen(self) -> None:
        """Beat to hear what is wanted; what was wanted last stands where the database is away."""
        try:
            self.beat()
        except Exception as error:
            if not is_away(error):
                raise

    def now(self) -> float:
        """The search database's clock, as it was at the last beat."""
        return time.time() + self._offset

    @property
    def wanted(self) -> str:
        """What somebody asked of all workers, or of those of one call: "", "pause", "pause now", "stop", "stop now"."""
        asked = self.controls.get("run") or self.controls.get(f"group:{self.group}") or {}
        return str(asked.get("value", ""))

    def check(self, trial: int) -> None:
        """Called in the midst of a trial, often. Raises LeaseLostError where it is another's by now, Yielded
        where it is to stop for the moment."""
        if not self.lost and clock() > max(self._good_until, self._ask_again):
            # This process stood still (or the database did): nothing is written before it is known whose it is.
            try:
                self.beat()
            except Exception as error:
                if not is_away(error):
                    raise
                # Nobody is given the trial meanwhile, as that takes the database as well.
                self._ask_again = clock() + self.every
        if self.lost:
            raise LeaseLostError(
                f"trial {trial} was given to another worker, as nothing was heard of this one for {self.lease:.0f} s "
                "(engine.lease_seconds)"
            )
        if self.wanted.endswith(" now"):
            raise Yielded

    def cancelled(self, trial: int) -> bool:
        """Whether somebody asked for this trial to be given up."""
        return f"cancel:{trial}" in self.controls

    def confirm(self, trial: int, wait: Callable[[float], None] = time.sleep) -> None:
        """Before anything is told for good: waits for the database, then raises LeaseLostError if the trial is
        another's."""
        while True:
            try:
                self.beat()
                break
            except Exception as error:
                if not is_away(error):
                    raise
                wait(1.0)
        if self.lost:
            self.check(trial)

    def _run(self) -> None:
        while not self._ended.wait(self.every):
            if self.lost:
                continue
            try:
                self.beat()
            except Exception as error:
                # Whoever works finds out by `check`; a heart that stopped at the first error would kill it.
                level = logging.DEBUG if is_away(error) else logging.WARNING
                log.log(level, "a beat was missed: %s", error)
