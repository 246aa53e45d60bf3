"""Ctrl-C at a moment when it does no harm."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread


@contextmanager
def holding_interrupts(limit: int | None = None) -> Iterator[list[int]]:
    """Ctrl-C (and SIGTERM, where it is handled) within is put on the list, and takes effect at the end.

    Raised in the middle of a library's own code it leaves a lock taken or a step half done. With
    `limit` one more than so many takes effect at once. Not in the main thread: nothing is held.
    """
    held: list[int] = []  # No Event: its lock could be held when the next Ctrl-C comes.
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    handlers = {number: handler for number, handler in handlers.items() if callable(handler)}
    if current_thread() is not main_thread() or not handlers:
        yield held
        return

    def hold(number: int, _: object) -> None:
        held.append(number)
        if limit is not None and len(held) > limit:
            raise KeyboardInterrupt

    for number in handlers:
        signal.signal(number, hold)
    try:
        yield held
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if held and (limit is None or len(held) <= limit):
            signal.raise_signal(held[0])
