"""What a sweep shows while it runs: the live view, and the listeners that its workers talk to."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any

from crism_mlops.config import SweepConfig
from crism_mlops.errors import one_line
from crism_mlops.reports.live import LiveView
from crism_mlops.studies.board import Board
from crism_mlops.studies.overview import overview
from crism_mlops.studies.run import Hooks
from crism_mlops.studies.storage import SearchStore, is_away, load_study
from crism_mlops.studies.trial import FAREWELL_S, Desk, Listener

log = logging.getLogger(__name__)
EVERY_S = 1.0


class Watch:
    """One study on standard error, for as many workers as the call has."""

    def __init__(self, view: LiveView, note: Callable[[], str] = str) -> None:
        self.view = view
        self.board = Board()
        self.note = note
        self.began = time.monotonic()

    def listener(self, worker: str = "w0") -> Listener:
        """What a worker of this call talks to."""
        board, say = self.board, self.view.say
        # Until its first trial.
        board.idle(worker, "starting")

        def trial(number: int, total: int, choices: Mapping[str, Any]) -> None:
            board.trial(worker, number, choices)
            shown = ", ".join(
                f"{k.split('.')[-1]}={v:.3g}" if isinstance(v, float) else f"{k.split('.')[-1]}={v}"
                for k, v in choices.items()
            )
            say(f"trial {number} ({total} in all): {shown}")

        def ended(number: int, state: str, value: float | None, why: str) -> None:
            board.idle(worker, "between trials")
            figure = "" if value is None else f", objective {value:.4g}"
            say(f"trial {number} {state.lower()}{figure}{': ' + why if why else ''}")

        def floors(variant: str, normalization: str) -> None:
            board.idle(worker, f"floors for {variant}, {normalization}")
            say(f"floors for {variant}, {normalization}")

        def doing() -> Mapping[str, Any]:
            return next((d.to_json() for d in board.doing() if d.worker == worker), {})

        def closed(desk: Desk) -> None:
            from crism_mlops.reports.parent import log_report

            board.idle(worker, "figures")
            say(f"{desk.sweep.study}: summary, figures and tables for its run in MLflow")
            patience, desk.tracker.patience = desk.tracker.patience, FAREWELL_S
            try:
                # The study has ended: nobody waits for a server that goes away now.
                with desk.store.within(FAREWELL_S):
                    log_report(desk.tracker, desk.sweep.study, desk.store)
            except Exception as error:
                # The study has ended, and is none the worse for a picture that cannot be made.
                log.debug("report of %s", desk.sweep.study, exc_info=error)
                say(f"figures of {desk.sweep.study} were not logged ({one_line(error)}); later: crism-mlops report "
                    f"{desk.sweep.study} --log")  # fmt: skip
            finally:
                desk.tracker.patience = patience

        hooks = Hooks(
            step=lambda step, total, loss: board.step(worker, step, total, loss),
            report=lambda epoch, figures: None,
            phase=lambda words: board.phase(worker, words),
        )
        return Listener(
            trial=trial, ended=ended, floors=floors, idle=lambda why: board.idle(worker, why), say=say, doing=doing,
            hooks=hooks, closed=closed,
        )  # fmt: skip

    @contextmanager
    def watching(self, store: SearchStore, sweep: SweepConfig, group: str = "") -> Iterator[None]:
        """The live part, drawn from the board and from what workers elsewhere say, while this lasts."""
        over = Event()

        def draw() -> None:
            study = None
            while not over.wait(EVERY_S):
                try:
                    study = study or load_study(store, sweep.study)
                    self.view.update(overview(store, study, sweep, self.began, self.board.doing(), group, self.note))
                except Exception as error:
                    # A view that fails must not end what it shows.
                    log.log(logging.DEBUG if is_away(error) else logging.WARNING, "live view: %s", error)

        thread = Thread(target=draw, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=5.0)
