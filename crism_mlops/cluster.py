"""Run these tasks there: in this process, in several, or on a Ray cluster. The only importer of ray."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from threading import Thread
from types import ModuleType
from typing import Any, TypeVar

from crism_mlops.errors import ClusterError
from crism_mlops.interrupts import holding_interrupts

log = logging.getLogger(__name__)
Item = TypeVar("Item")
Result = TypeVar("Result")
# A task whose machine is lost is done again elsewhere, at most so many times.
RETRIES = 3
# A signal that arrives just before a wait without end begins is noticed when that wait ends (Python runs
# handlers between byte codes, not in a lock's wait): measured, 6 of 800 second Ctrl-C. So waits wake up.
WAKES_S = 0.5


@dataclass(frozen=True, slots=True)
class Where:
    """In how many processes of this machine (None: one a core), or at which Ray cluster
    ("auto": the one that this machine belongs to; HOST:PORT; ray://HOST:PORT); there, what each task needs."""

    workers: int | None = None
    ray: str | None = None
    cpus: float = 1.0
    gpus: float = 0.0


HERE = Where(workers=1)


def run(task: Callable[[Item], Result], items: Sequence[Item], where: Where = HERE) -> Iterator[tuple[int, Result]]:
    """`(index, task(item))` for every item, in the order in which they are done.

    `task` is a function of a module, and what it takes and gives can be pickled between
    processes. What it raises passes through and ends the others that have not begun; so does
    Ctrl-C. Raises ClusterError if a process dies or the cluster cannot be reached.
    """
    if where.ray is not None:
        return _on_ray(task, items, where)
    workers = min(where.workers or cores(), len(items))
    return _here(task, items) if workers <= 1 else _in_processes(task, items, workers)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _here(task: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[tuple[int, Result]]:
    for index, item in enumerate(items):
        yield index, task(item)


def _in_processes(task: Callable[[Item], Result], items: Sequence[Item], workers: int) -> Iterator[tuple[int, Result]]:
    from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import active_children, get_context

    # Fresh interpreters: a fork would copy torch's threads in whatever state they are.
    running: dict[Future[Result], int] = {}
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_alone)
    try:
        waiting = iter(enumerate(items))
        while True:
            # No more than there are workers: what the pool holds already cannot be called back.
            for index, item in islice(waiting, workers - len(running)):
                with holding_interrupts(), without_main():
                    running[pool.submit(task, item)] = index
            if not running:
                return
            # Raised within, Ctrl-C would leave a lock of the pool taken (measured: 2 of 800).
            with holding_interrupts():
                done = wait(running, timeout=WAKES_S, return_when=FIRST_COMPLETED).done
            for future in done:
                yield running.pop(future), future.result()
    except BrokenProcessPool as error:
        raise ClusterError(
            f"one of {workers} worker processes died (killed, or out of memory); run the same command again, what "
            "is done is kept; with one worker it needs the least memory"
        ) from error
    finally:
        # After Ctrl-C or an error what runs is finished first; a second Ctrl-C ends that as well.
        with holding_interrupts() as again:
            if running:
                log.warning("finishing what %d processes are at; Ctrl-C again ends them at once", len(running))
            while not again and wait(running, timeout=WAKES_S).not_done:
                pass
            if again:
                for process in active_children():
                    process.terminate()
            pool.shutdown(wait=not again, cancel_futures=True)


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that start meanwhile do not run the caller's script again.

    A fresh interpreter imports the parent's main module, for functions that are defined there. Tasks
    never are; and a script without `if __name__ == "__main__":` would begin its work a second time.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _alone() -> None:
    """In each worker: one thread for arithmetic, as there is a process a core; Ctrl-C is the parent's,
    and where the parent is killed the worker ends: it would wait for work for ever."""
    from multiprocessing import parent_process
    from multiprocessing.process import BaseProcess

    def end_with(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    if (parent := parent_process()) is not None:
        Thread(target=end_with, args=(parent,), daemon=True).start()

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"


def slots(where: Where) -> int:
    """How many of `where`'s tasks a Ray cluster can run at a time."""
    assert where.ray is not None
    ray, joined = _connect(where.ray)
    try:
        there = ray.cluster_resources()
    finally:
        if not joined:
            ray.shutdown()
    by_gpu = [there.get("GPU", 0.0) / where.gpus] if where.gpus else []
    return int(min([there.get("CPU", 0.0) / where.cpus, *by_gpu]))


def _connect(address: str) -> tuple[Any, bool]:
    """Ray, and whether this process had joined its cluster before."""
    try:
        import ray
    except ImportError as error:
        raise ClusterError("ray is not installed; pip install 'crism-mlops[cluster]'") from error
    joined = ray.is_initialized()
    if not joined:
        try:
            _answers(address)
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING)
        except (OSError, ValueError, RuntimeError) as error:
            what = " ".join(str(error).split())[:200]
            raise ClusterError(
                f"no Ray cluster at {address!r} ({what}); start one with `ray start --head`, join the other machines "
                "to it, or give its address with --ray HOST:PORT"
            ) from error
    return ray, joined


def _on_ray(task: Callable[[Item], Result], items: Sequence[Item], where: Where) -> Iterator[tuple[int, Result]]:
    address = where.ray
    assert address is not None
    ray, joined = _connect(address)
    try:
        remote = ray.remote(num_cpus=where.cpus, num_gpus=where.gpus, max_retries=RETRIES)(task)
        waiting = list(enumerate(items))[::-1]
        running: dict[Any, int] = {}
        while waiting or running:
            # A few more than there are cores, not 10^4 at once: what has not begun costs nothing to stop.
            slots = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
            while waiting and len(running) < slots:
                index, item = waiting.pop()
                running[remote.remote(item)] = index
            done, _ = ray.wait(list(running), num_returns=1, timeout=5.0)
            for reference in done:
                index = running.pop(reference)
                try:
                    result = ray.get(reference)
                except ray.exceptions.RayTaskError as error:
                    if "failed to import on the worker" in str(error):
                        raise ClusterError(
                            "the Ray cluster's machines lack this package; install the same version of crism-mlops "
                            "on each of them"
                        ) from error
                    raise error.as_instanceof_cause() from None
                except ray.exceptions.RayError as error:
                    what = " ".join(str(error).split())[:200]
                    raise ClusterError(
                        f"the Ray cluster at {address!r} lost task {index} {RETRIES + 1} times ({what}); run the same "
                        "command again, what is done is kept"
                    ) from error
                yield index, result
    finally:
        if not joined:
            ray.shutdown()


def _answers(address: str) -> None:
    """Raises OSError where nobody listens: Ray itself would ask for five minutes, then end the process."""
    import socket
    from urllib.parse import urlsplit

    place = urlsplit(address if "://" in address else f"//{address}")
    if place.hostname is not None and place.port is not None:
        socket.create_connection((place.hostname, place.port), timeout=10.0).close()
