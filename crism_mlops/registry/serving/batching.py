"""Requests that wait together are predicted together."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any

from crism_mlops.errors import GivenUpError
from crism_mlops.registry.serving.logs import tell

# How long a batch waits for calls that are on their way: a share of the last forward pass, within bounds.
SHARE, LEAST_S, MOST_S = 0.2, 0.005, 0.1
_NO_MEMORY = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


class ExpiredError(Exception):
    """Nobody waits for this answer any more."""


@dataclass(frozen=True, slots=True)
class Batched:
    """The answers to one call, and what they cost: seconds in the queue, seconds of the model, images in the batch."""

    answers: list[Any]
    queued: float
    model: float
    images: int


@dataclass(frozen=True, slots=True)
class _Job:
    requests: Sequence[Any]
    deadline: float
    future: Future[Batched] = field(default_factory=Future)
    entered: float = field(default_factory=time.monotonic)


# Requests, and whether anyone still waits for one of their answers; GivenUpError where nobody does.
Answers = Callable[[Sequence[Any], Callable[[], bool]], Sequence[Any]]


class Batcher:
    """One thread that owns the model. While it predicts, calls queue up; the next batch is what waits then, up to
    `chunk` images. With fewer it lingers a moment for calls that are being read (`coming()` of them), and for as many
    as there were last time: clients that got their answers together ask again together, but not in the same instant."""

    def __init__(self, answers: Answers, chunk: int, coming: Callable[[], int] = lambda: 0) -> None:
        self._answers = answers
        self._chunk = chunk
        self._coming = coming
        self._queue: SimpleQueue[_Job] = SimpleQueue()
        self._last_s, self._callers = 0.0, 1
        Thread(target=self._run, name="batcher", daemon=True).start()

    def submit(self, requests: Sequence[Any], deadline: float) -> Future[Batched]:
        """The answers of one call, all or an exception; ExpiredError where it is not begun before `deadline`
        (time.monotonic()), and where the whole batch is not done before its last call's."""
        job = _Job(requests, deadline)
        self._queue.put(job)
        return job.future

    def _run(self) -> None:
        while True:
            batch = self._collect()
            begun = time.monotonic()
            self._answer(batch)
            self._last_s = time.monotonic() - begun
            self._callers = len(batch) + self._queue.qsize()

    def _collect(self) -> list[_Job]:
        batch = [self._queue.get()]
        end = time.monotonic() + min(max(SHARE * self._last_s, LEAST_S), MOST_S)
        while sum(len(job.requests) for job in batch) < self._chunk:
            rest = end - time.monotonic()
            expected = self._coming() > 0 or len(batch) < self._callers
            try:
                batch.append(self._queue.get(timeout=rest) if rest > 0 and expected else self._queue.get_nowait())
            except Empty:
                if rest <= 0 or not expected:
                    break
        return batch

    def _answer(self, batch: Sequence[_Job]) -> None:
        begun = time.monotonic()
        for job in batch:
            if job.deadline < begun:
                job.future.set_exception(ExpiredError())
        batch = [job for job in batch if job.deadline >= begun]
        requests = [request for job in batch for request in job.requests]
        if not requests:
            return
        last = max(job.deadline for job in batch)
        try:
            answers = list(self._answers(requests, lambda: time.monotonic() <= last))
            if len(answers) != len(requests):
                raise RuntimeError(f"the model gave {len(answers)} answers to {len(requests)} requests")
        except GivenUpError:
            for job in batch:
                job.future.set_exception(ExpiredError())
            return
        except Exception as error:
            end_if_poisoned(error)
            if is_memory(error):
                _release_memory()
            if len(batch) == 1:
                batch[0].future.set_exception(error)
                return
            # Whose fault it was shows when each is alone.
            for job in batch:
                self._answer([job])
            return
        seconds, first = time.monotonic() - begun, 0
        for job in batch:
            own = answers[first : first + len(job.requests)]
            first += len(job.requests)
            job.future.set_result(Batched(own, begun - job.entered, seconds, len(requests)))


def is_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the machine or on the GPU."""
    # torch is not imported for its exception's sake; on a CPU, and from CUDA itself, it is a plain RuntimeError.
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY))
    )


def end_if_poisoned(error: BaseException) -> None:
    """End this process where CUDA has failed otherwise than for memory: its context answers no call any more, and a
    worker with another one takes the place. The front asks another one what this one was asked."""
    if isinstance(error, RuntimeError) and "CUDA error" in str(error) and not is_memory(error):
        tell(logging.ERROR, "the GPU's context is lost, the worker ends", exc_info=error)
        os._exit(1)


def _release_memory() -> None:
    torch = sys.modules.get("torch")
    if torch is None:
        return
    try:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except Exception as error:
        end_if_poisoned(error)
        # It is the thread's that answers everything.
        tell(logging.WARNING, "memory is not released", exc_info=error)
