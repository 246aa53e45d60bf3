"""Which process a worker is: others must know whether it lives."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from uuid import uuid4

import psutil


@dataclass(frozen=True, slots=True)
class Me:
    """This process, as others see it: `machine` tells processes apart that cannot see each other's numbers."""

    worker: str
    machine: str
    process: str

    @property
    def host(self) -> str:
        return self.machine.partition("/")[0]


def here() -> Me:
    """A new worker in this process."""
    return Me(uuid4().hex, machine(), process_name(os.getpid()))


@cache
def machine() -> str:
    """Host, boot and process namespace: containers may share the first two."""

    def read(path: str, otherwise: str) -> str:
        try:
            return os.readlink(path) if path.endswith("/pid") else Path(path).read_text().strip()
        except OSError:
            return otherwise

    boot = read("/proc/sys/kernel/random/boot_id", str(int(psutil.boot_time())))
    return f"{socket.gethostname()}/{boot[:13]}/{read('/proc/self/ns/pid', '')}"


def process_name(pid: int) -> str:
    """Number and start: a number alone is given again."""
    try:
        # Ticks since boot: the time of day at which it began moves when somebody sets the clock.
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        began = f"{psutil.Process(pid).create_time():.2f}"
    return f"{pid}:{began}"


def process_lives(name: str) -> bool:
    """Whether a process of this machine still runs; what is dead and not yet collected does not."""
    pid = int(name.partition(":")[0])
    try:
        return process_name(pid) == name and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False
