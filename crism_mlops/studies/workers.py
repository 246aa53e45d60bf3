"""Workers of a study beyond this process: several on this machine, one that joins from another, many on a Ray
cluster. Each is told the study's name and where it lives; all else it reads there."""

from __future__ import annotations

import logging
import math
import os
import pickle
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from threading import Event, Thread
from typing import Any
from uuid import uuid4

from crism_mlops.cluster import Where, run, slots, without_main
from crism_mlops.config import SweepConfig, override_sweep
from crism_mlops.errors import ClusterError, CrismError, StudyError, one_line
from crism_mlops.interrupts import holding_interrupts
from crism_mlops.quiet import quiet_libraries
from crism_mlops.redact import redacted
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies.overview import stored_sweep
from crism_mlops.studies.run import Hooks, run_trial
from crism_mlops.studies.shares import Share, environment, share
from crism_mlops.studies.storage import SearchStore, load_study, open_store, storage_errors
from crism_mlops.studies.study import TRACKING, closing, prepare, terminate_as_interrupt, work, working
from crism_mlops.studies.trial import Listener, RunTrial
from crism_mlops.tracking import Tracker

log = logging.getLogger(__name__)
# A worker that dies so often without finishing a trial in between is not started again.
RESTARTS = 3
DONE, INTERRUPTED, REFUSED = 0, 130, 1


@dataclass(frozen=True, slots=True)
class Assignment:
    """All that a worker elsewhere needs. `group` names the call that started it; `folder` is where relative paths
    of the study file begin."""

    study: str
    storage: str
    tracking_uri: str | None = None
    overrides: tuple[str, ...] = ()
    group: str = ""
    folder: str = ""
    run: RunTrial = run_trial


def join_study(assignment: Assignment, listener: Listener | None = None) -> SweepConfig:
    """Work on a study that another call made, until it has had enough.

    Raises StudyError where there is no such study, or where this machine's scenes are others than the study's.
    """
    listener = listener or Listener()
    store = open_store(assignment.storage, say=listener.say, create=False)
    study = load_study(store, assignment.study)
    sweep = study_sweep(study, assignment)
    uri = assignment.tracking_uri or study.user_attrs.get(TRACKING)
    tracker = Tracker(uri, sweep.experiment, patience=math.inf, say=listener.say)
    scenes = load_scenes(sweep.data)
    with (
        terminate_as_interrupt(),
        working(sweep, scenes, tracker, store, listener, None, assignment.run, assignment.group, fresh=False) as desk,
        closing(desk),
    ):
        prepare(desk, fresh=False)
        work(desk)
    return sweep


def study_sweep(study: Any, assignment: Assignment) -> SweepConfig:
    """The study file as it is stored with the study, with this machine's own paths."""
    return override_sweep(stored_sweep(study).model_dump(mode="json"), assignment.overrides)


def run_workers(assignment: Assignment, listeners: Sequence[Listener]) -> None:
    """Run a study's workers in processes of this machine, one a listener, each on its share of cores or GPUs.

    A process that dies is started again; what it was at is taken up by the next that asks. After Ctrl-C all stop
    once they have saved; a second one ends them at once. Raises StudyError with the words of the first that refuses,
    ClusterError where one keeps dying.
    """
    count = len(listeners)
    context = get_context("spawn")
    children: dict[int, _Child] = {}
    restarts = dict.fromkeys(range(count), 0)
    refused: list[str] = []
    try:
        for place in range(count):
            children[place] = _start(context, assignment, place, count)
        while children:
            for place in _messages(children, listeners, restarts, refused):
                child = children.pop(place)
                if child.process.exitcode in (DONE, REFUSED) or refused:
                    continue
                restarts[place] += 1
                how = _how(child.process.exitcode)
                if restarts[place] > RESTARTS:
                    raise ClusterError(
                        f"worker {place} {how} {restarts[place]} times without finishing a trial; with fewer --workers "
                        "each has more memory. What was done is kept, the same command goes on"
                    )
                listeners[place].say(f"worker {place} {how}; starting it again")
                children[place] = _start(context, assignment, place, count)
            if refused:
                break
        if refused:
            raise StudyError(refused[0])
    finally:
        _stop(children, listeners)


@dataclass(frozen=True, slots=True)
class _Child:
    process: SpawnProcess
    pipe: Connection


def _start(context: Any, assignment: Assignment, place: int, count: int) -> _Child:
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(assignment, theirs, share(place, count)), name=f"worker {place}")
    # Ctrl-C between fork and the child's own handler would end it in the midst of its imports.
    with holding_interrupts(), without_main(), environment(share(place, count).environment):
        process.start()
    theirs.close()
    return _Child(process, ours)


def _messages(
    children: Mapping[int, _Child], listeners: Sequence[Listener], restarts: dict[int, int], refused: list[str]
) -> list[int]:
    """Pass on what workers say for a while; returns the places of those that have ended."""
    by_pipe = {child.pipe: place for place, child in children.items()}
    by_sentinel = {child.process.sentinel: place for place, child in children.items()}
    ready = connection.wait([*by_pipe, *by_sentinel], timeout=0.5)
    for pipe in [p for p in ready if p in by_pipe]:
        place = by_pipe[pipe]
        _drain(children[place].pipe, listeners[place], place, restarts, refused)
    ended = []
    for sentinel in [s for s in ready if s in by_sentinel]:
        place = by_sentinel[sentinel]
        children[place].process.join()
        _drain(children[place].pipe, listeners[place], place, restarts, refused)
        ended.append(place)
    return ended


def _drain(pipe: Connection, listener: Listener, place: int, restarts: dict[int, int], refused: list[str]) -> None:
    try:
        while pipe.poll():
            name, *words = pipe.recv()
            if name == "refused":
                refused.append(words[0])
            elif name in ("step", "report", "phase"):
                getattr(listener.hooks, name)(*words)
            else:
                if name == "ended":
                    restarts[place] = 0
                getattr(listener, name)(*words)
    except (EOFError, OSError, pickle.UnpicklingError):
        return  # It died, perhaps in the midst of a word.


def _stop(children: Mapping[int, _Child], listeners: Sequence[Listener]) -> None:
    """End what runs: first after saving, at a second Ctrl-C at once."""
    if not children:
        return
    with holding_interrupts() as again:
        for child in children.values():
            child.process.terminate()
        while any(child.process.is_alive() for child in children.values()):
            if again:
                for child in children.values():
                    child.process.kill()
            _messages(children, listeners, {}, [])
    again.clear()


def _child(assignment: Assignment, pipe: Connection, mine: Share) -> None:
    """A worker process: Ctrl-C is its parent's affair, and without its parent it stops after saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, mine.cores)
    _end_with_parent()
    listener = _talking(pipe)
    logging.basicConfig(level=logging.WARNING, handlers=[_Through(listener)], force=True)
    quiet_libraries()
    try:
        join_study(assignment, listener)
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except CrismError as error:
        _send(pipe, "refused", str(error))
        sys.exit(REFUSED)
    except Exception as error:
        log.exception("worker failed")
        _send(pipe, "refused", f"{type(error).__name__}: {one_line(error)}")
        sys.exit(REFUSED)


def _end_with_parent() -> None:
    from multiprocessing import parent_process

    parent = parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)

    Thread(target=wait, daemon=True).start()


def _talking(pipe: Connection) -> Listener:
    """A listener that passes on to the parent process, steps at most five times a second."""
    last = [0.0]

    def step(at: int, total: int, loss: float) -> None:
        now = time.monotonic()
        if now - last[0] > 0.2 or at == total:
            last[0] = now
            _send(pipe, "step", at, total, loss)

    def send(name: str) -> Any:
        return lambda *words: _send(pipe, name, *words)

    hooks = Hooks(step=step, report=send("report"), phase=send("phase"))
    return Listener(
        trial=send("trial"), ended=send("ended"), floors=send("floors"), idle=send("idle"), say=send("say"),
        hooks=hooks,
    )  # fmt: skip


def _send(pipe: Connection, *words: Any) -> None:
    with suppress(OSError):  # Nobody listens any more: `_end_with_parent` ends this process.
        pipe.send(words)


class _Through(logging.Handler):
    """Warnings of a worker, where its parent shows them."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener

    def emit(self, record: logging.LogRecord) -> None:
        self.listener.say(redacted(f"{record.levelname} {record.name}: {record.getMessage()}"))


def _how(code: int | None) -> str:
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with code {code}"


def ray_slots(where: Where) -> int:
    """How many workers a Ray cluster has room for now; one at least."""
    return max(1, slots(where))


def run_on_ray(assignment: Assignment, where: Where, count: int, store: SearchStore, listener: Listener) -> None:
    """Run so many workers on a Ray cluster; it places them, and places one again whose machine is lost.

    After Ctrl-C they stop once they have saved; a second one leaves them to Ray, which ends them at once.
    """
    group = uuid4().hex
    tasks = [replace(assignment, group=group, folder=os.getcwd())] * count
    over = Event()

    def stop_gently() -> None:
        # Tasks of Ray hear no signals: they hear what stands in the search database.
        while not over.wait(0.5):
            if held:
                listener.say("stopping the workers once they have saved; Ctrl-C again ends them at once")
                store.ledger.control(assignment.study, f"group:{group}", "stop now")
                return

    with storage_errors(store), holding_interrupts(limit=1) as held:
        watch = Thread(target=stop_gently, daemon=True)
        watch.start()
        try:
            for index, problem in run(_on_ray, tasks, where):
                if problem:
                    raise StudyError(problem)
                listener.say(f"worker {index} has nothing left to do")
        finally:
            over.set()
            watch.join()
            store.ledger.control(assignment.study, f"group:{group}", None)


def _on_ray(assignment: Assignment) -> str:
    """A worker in a task of Ray; what it refuses to do is returned, as it would refuse everywhere."""
    if os.path.isdir(assignment.folder):
        os.chdir(assignment.folder)
    try:
        join_study(assignment)
    except CrismError as error:
        return str(error)
    return ""
