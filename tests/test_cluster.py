"""Tasks in this process and in several; the Ray cluster has its test in tests/integration."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from crism_mlops.cluster import Where, cores, run
from crism_mlops.errors import ClusterError, SceneError


def square(number: int) -> tuple[int, int]:
    return number * number, os.getpid()


def fail(number: int) -> int:
    if number == 3:
        raise SceneError(f"scene {number} is no good")
    return number


def die(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_every_item_comes_back_with_its_index(workers: int) -> None:
    found = dict(run(square, list(range(20)), Where(workers=workers)))
    assert {index: value for index, (value, _) in found.items()} == {i: i * i for i in range(20)}
    processes = {process for _, process in found.values()}
    assert (os.getpid() in processes) is (workers == 1)
    assert len(processes) <= workers


def test_nothing_to_do() -> None:
    assert list(run(square, [], Where())) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_task_raises_passes_through(workers: int) -> None:
    with pytest.raises(SceneError, match="scene 3 is no good"):
        list(run(fail, list(range(10)), Where(workers=workers)))


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(ClusterError, match=r"worker processes died.*run the same command again"):
        list(run(die, list(range(10)), Where(workers=2)))
    assert len(list(run(square, [1, 2], Where(workers=2)))) == 2, "the next call starts afresh"


def test_no_ray_cluster_there() -> None:
    with pytest.raises(ClusterError, match=r"no Ray cluster at '127\.0\.0\.1:1'"):
        list(run(square, [1], Where(ray="127.0.0.1:1")))


def test_cores_are_counted() -> None:
    assert 1 <= cores() <= (os.cpu_count() or 1)


INTERRUPTED = """
import signal, sys, time
# Started in the background of a shell, a process ignores Ctrl-C, and so do its children.
signal.signal(signal.SIGINT, signal.default_int_handler)
from crism_mlops.cluster import Where, run
import tests_tasks

try:
    for index, _ in run(tests_tasks.slow, list(range(100)), Where(workers=2)):
        print("done", index, flush=True)
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


def test_ctrl_c_ends_the_others(tmp_path: Path) -> None:
    (tmp_path / "tests_tasks.py").write_text("import time\n\ndef slow(item):\n    time.sleep(0.2)\n    return item\n")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"done")
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    assert rest.splitlines()[-1] == b"interrupted"
    assert len(rest.splitlines()) < 50


def test_after_ctrl_c_nothing_begins_and_a_second_one_ends_all(tmp_path: Path) -> None:
    (tmp_path / "tests_tasks.py").write_text(
        "import time\nfrom pathlib import Path\n\ndef slow(item):\n    Path(f'{item}.begun').touch()\n"
        "    time.sleep(0 if item < 2 else 60)\n    return item\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, cwd=tmp_path
    ) as process:
        assert process.stderr is not None
        try:
            until(lambda: len(list(tmp_path.glob("*.begun"))) == 4)
            process.send_signal(signal.SIGINT)
            assert b"finishing what 2 processes are at" in process.stderr.readline()
            process.send_signal(signal.SIGINT)
            rest, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert rest.splitlines()[-1] == b"interrupted"
    assert len(list(tmp_path.glob("*.begun"))) == 4


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not Path("/proc").exists(), reason="asks /proc which processes are there")
def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    (tmp_path / "tests_tasks.py").write_text(
        "import os, time\n\ndef slow(item):\n    open(f'{os.getpid()}.pid', 'w').close()\n    time.sleep(0.2)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", INTERRUPTED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, cwd=tmp_path) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"done")
        process.kill()
    workers = [Path("/proc", path.stem) for path in tmp_path.glob("*.pid")]
    assert workers
    deadline = time.monotonic() + 20.0
    while any(worker.exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [worker for worker in workers if worker.exists()]


BARE = """
from pathlib import Path
from crism_mlops.products.simulate import Simulation, write_simulation

print("the script runs", flush=True)
print(len(list(write_simulation(Simulation(20, 64, 3), Path("out")).iterdir())), flush=True)
"""


@pytest.mark.parametrize("standard_input", [False, True])
def test_a_script_needs_no_guard(tmp_path: Path, standard_input: bool) -> None:
    (tmp_path / "script.py").write_text(BARE)
    command = [sys.executable, *([] if standard_input else ["script.py"])]
    ran = subprocess.run(
        command, cwd=tmp_path, input=BARE if standard_input else None, capture_output=True, text=True, timeout=100
    )
    assert ran.stdout.split("\n") == ["the script runs", "20", ""], ran.stderr
