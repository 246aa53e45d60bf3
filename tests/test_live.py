"""The live view of a running study: what it shows at any width, on a terminal and elsewhere."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from fcntl import ioctl
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from crism_mlops.reports.live import LiveView, render
from crism_mlops.reports.snapshot import clean, clock_of, words_of
from crism_mlops.studies.board import STATES, Board, Doing, Snapshot

ROOT = Path(__file__).parents[1]
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def doing(index: int = 0) -> Doing:
    return Doing(f"w{index % 4}", f"node{index // 4}", 10 + index, "training", 1500, 6000, 0.0123, 4.5, 330.0)


def snapshot(workers: int = 2) -> Snapshot:
    counts = {"running": workers, "finished": 11, "pruned": 2, "failed": 1}
    note = "17 updates wait for the tracking server"
    shown = tuple(doing(i) for i in range(workers))
    return Snapshot("carbonate", "val/rmse", counts, 40, (7, 0.04213), shown, 4321.0, 900.0, note)


def text(of: Snapshot, width: int, height: int = 30, encoding: str = "utf-8") -> list[str]:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding)
    Console(width=width, height=height, file=file, no_color=True).print(render(of))
    file.flush()
    return raw.getvalue().decode(encoding).splitlines()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# --- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 100, 140, 160])
def test_the_key_facts_stand_at_every_width(width: int) -> None:
    lines = text(snapshot(), width)
    words = "\n".join(lines)
    for fact in (
        "carbonate", "13 of 40 trials", "1 h 12 min so far", "about 3 h 22 min left", "2 running", "11 finished",
        "2 pruned", "1 failed", "best: trial 7, val/rmse 0.04213", "17 updates wait for the tracking server",
    ):  # fmt: skip
        assert fact in words
    row = next(line for line in lines if line.lstrip().startswith("10 "))
    for fact in ("w0", "training", "━", "1500/6000", "0.0123", "4.5", "16:40"):
        assert fact in row
    assert max(map(cell_len, lines)) <= width
    assert len(lines) == 6


def test_the_bar_shows_the_share_that_is_done() -> None:
    row = next(line for line in text(snapshot(1), 120) if "training" in line)
    assert row.count("━") / (row.count("━") + row.count("─")) == pytest.approx(0.25, abs=0.03)


def test_of_many_workers_twelve_rows_stand_and_the_number_of_the_others() -> None:
    lines = text(snapshot(40), 80)
    assert sum("training" in line for line in lines) == 12
    assert any("and 28 more" in line for line in lines)
    # Only what differs is kept of a long name: the end of it.
    long = replace(snapshot(), workers=(replace(doing(), host="gpu-cluster-partition-a-node-0017"), doing(9)))
    assert any("17/w0" in line for line in text(long, 80))


def test_a_low_terminal_shows_fewer_rows_and_still_the_note() -> None:
    lines = text(snapshot(40), 80, height=12)
    assert len(lines) < 12
    assert "17 updates" in lines[-1]
    assert any("and 34 more" in line for line in lines)


def test_words_take_the_room_of_figures_that_say_nothing() -> None:
    waits = Doing("w2", "node0", 12, "waiting for the study database", 0, 0, None, None, 3.0)
    idle = replace(waits, trial=None)
    lines = text(replace(snapshot(), workers=(doing(), waits, idle)), 80)
    assert any(line.lstrip().startswith("12 ") and waits.phase in line for line in lines)
    assert "  1 worker without a trial: waiting for the study database" in lines


def test_a_terminal_without_unicode_gets_other_bars() -> None:
    lines = text(replace(snapshot(), study="carbonate" * 20), 80, encoding="ascii")
    assert any("##" in line and "--" in line for line in lines)
    assert max(map(len, lines)) <= 80


def test_what_moves_the_cursor_is_not_drawn() -> None:
    lines = text(replace(snapshot(), note="paused\x1b[2J\nsince\t14:02\r"), 80)
    assert lines[-1] == "  paused [2J since 14:02"
    assert clean("e\u0301\u200d") == "\u00e9"


@pytest.mark.parametrize(
    ("seconds", "words", "clock"),
    [
        (0.0, "0 s", "0:00"), (59.6, "1 min", "1:00"), (3599.0, "1 h 00 min", "59:59"),
        (11_105.0, "3 h 05 min", "3:05:05"),
        (187_200.0, "2 d 04 h", "52:00:00"), (1e6, "11 d 14 h", "11 d 14 h"), (1e300, "years", "years"),
        (math.inf, "?", "-"), (-3.0, "0 s", "0:00"),
    ],
)  # fmt: skip
def test_spans_of_time(seconds: float, words: str, clock: str) -> None:
    assert (words_of(seconds), clock_of(seconds)) == (words, clock)


some_float = st.floats(allow_nan=True, allow_infinity=True)
some_text = st.text(max_size=60)
some_count = st.integers(0, 10**12)
some_doing = st.builds(
    Doing, worker=some_text, host=some_text, trial=st.none() | some_count, phase=some_text | st.just("training"),
    step=some_count, steps=some_count, loss=st.none() | some_float, steps_per_second=st.none() | some_float,
    seconds=some_float,
)  # fmt: skip
some_snapshot = st.builds(
    Snapshot, study=some_text, objective=some_text, counts=st.dictionaries(st.sampled_from(STATES), some_count),
    total=some_count, best=st.none() | st.tuples(some_count, some_float),
    workers=st.lists(some_doing, max_size=20).map(tuple), seconds=some_float, trial_seconds=st.none() | some_float,
    note=some_text,
)  # fmt: skip


@settings(deadline=None, max_examples=150)
@given(of=some_snapshot, width=st.integers(1, 200), height=st.integers(1, 60))
def test_any_snapshot_is_drawn_within_its_width(of: Snapshot, width: int, height: int) -> None:
    lines = text(of, width, height)
    assert max(map(cell_len, lines)) <= width
    assert len(lines) <= max(height, 8)


@settings(deadline=None, max_examples=50)
@given(of=some_snapshot)
def test_any_snapshot_comes_back_from_json(of: Snapshot) -> None:
    sent = json.dumps(of.to_json(), allow_nan=False)
    assert repr(Snapshot.from_json({**json.loads(sent), "newer": 1})) == repr(of)


# --- the board -----------------------------------------------------------------------------------------------------


def test_speed_and_time_left_count_only_steps_since_the_restart() -> None:
    clock = Clock()
    board = Board("here", clock)
    board.trial("w0", 3, {"train.learning_rate": 0.00123, "model.features": 8})
    assert board.doing()[0].phase == "learning_rate=0.00123, features=8"
    board.phase("w0", "going on after step 500")
    clock.now += 40.0
    board.step("w0", 501, 1000, 0.5)
    assert board.doing()[0].steps_per_second is None
    assert board.doing()[0].left is None
    for step in range(502, 601):
        clock.now += 0.5
        board.step("w0", step, 1000, 0.5)
    (at,) = board.doing()
    assert at.steps_per_second == pytest.approx(2.0)
    assert at.left == pytest.approx(200.0)
    assert (at.host, at.trial, at.phase, at.step, at.steps, at.loss) == ("here", 3, "training", 600, 1000, 0.5)
    assert at.seconds == pytest.approx(89.5)


def test_speed_follows_a_change_and_a_pause_with_another_phase_does_not_slow_it() -> None:
    clock = Clock()
    board = Board("here", clock)
    board.trial("w0", 3, {})
    step = 0

    def train(steps: int, seconds: float) -> None:
        nonlocal step
        for _ in range(steps):
            clock.now += seconds
            step += 1
            board.step("w0", step, 100_000, 0.1)

    train(1000, 0.1)
    board.phase("w0", "waiting for the tracking server")
    assert board.doing()[0].steps_per_second is None
    clock.now += 3600.0
    train(10, 0.1)
    assert board.doing()[0].steps_per_second == pytest.approx(10.0)
    train(300, 1.0)
    speed = board.doing()[0].steps_per_second
    assert speed is not None
    assert 1.0 <= speed < 1.2


def test_a_step_back_and_a_clock_that_stands_do_no_harm() -> None:
    clock = Clock()
    board = Board("here", clock)
    board.trial("w0", 1, {})
    board.step("w0", 5, 10, 0.1)
    board.step("w0", 6, 10, 0.1)
    clock.now += 2.0
    board.step("w0", 7, 10, 0.1)
    assert board.doing()[0].steps_per_second == pytest.approx(1.0)
    board.step("w0", 2, 10, 0.1)
    clock.now += 1.0
    board.step("w0", 3, 10, 0.1)
    assert board.doing()[0].left == pytest.approx(7.0)


def test_idle_and_gone() -> None:
    clock = Clock()
    board = Board("here", clock)
    board.idle("w0", "waiting for the study database")
    clock.now += 5.0
    board.idle("w0", "paused")
    board.trial("w1", 4, {})
    (idle, busy) = board.doing()
    assert (idle.trial, idle.phase, idle.seconds, idle.left) == (None, "paused", 5.0, None)
    assert (busy.trial, busy.phase) == (4, "starting")
    board.idle("w1", "done")
    assert board.doing()[1].trial is None
    board.gone("w0")
    board.gone("nobody")
    assert [d.worker for d in board.doing()] == ["w1"]


def test_a_study_s_time_left() -> None:
    assert snapshot(2).left == 27 * 900.0 / 2
    assert snapshot(0).left == 27 * 900.0
    assert replace(snapshot(), trial_seconds=None).left is None
    assert replace(snapshot(), total=5).left == 0.0


# --- without a terminal --------------------------------------------------------------------------------------------


def test_without_a_terminal_lines_have_the_clock_and_come_seldom(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with LiveView(every=30.0, clock=clock) as view:
        clock.now += 12.34
        view.say("trial 10 (40 in all): features=8")
        quiet = replace(snapshot(1), note="")
        view.update(quiet)
        clock.now += 29.0
        view.update(quiet)
        clock.now += 1.0
        view.update(quiet)
        clock.now += 60.0
        view.update(quiet)  # Nothing changed.
        view.update(replace(quiet, workers=(replace(doing(), step=1501),), note="paused since 14:02"))
        view.update(replace(quiet, workers=(replace(doing(), step=1502),), note="paused since 14:02"))
    out, err = capsys.readouterr()
    where = "trial 10 (node0/w0): training, step"
    assert err.splitlines() == [
        "[  12.3 s] trial 10 (40 in all): features=8",
        f"[  42.3 s] {where} 1500 of 6000, loss 0.0123, 4.5 steps/s, 16:40 left",
        "[ 102.3 s] paused since 14:02",
        f"[ 102.3 s] {where} 1501 of 6000, loss 0.0123, 4.5 steps/s, 16:40 left",
    ]
    assert out == ""


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


@pytest.mark.parametrize("stderr", [None, Broken(), "closed"])
def test_nobody_reads_standard_error(monkeypatch: pytest.MonkeyPatch, stderr: object) -> None:
    if stderr == "closed":
        stderr = io.StringIO()
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    with LiveView(every=0.0) as view:
        view.say("a line")
        view.update(snapshot())
    view.say("another one")


def test_several_threads_say_whole_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with LiveView(every=0.0) as view:
        threads = [
            threading.Thread(target=lambda i=i: [view.say(f"thread {i} line {n}") for n in range(50)]) for i in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 200
    assert all(re.fullmatch(r"\[ +\d+\.\d s\] thread \d line \d+", line) for line in lines)


# --- on a terminal -------------------------------------------------------------------------------------------------

SCRIPT = """
import logging, os, sys, threading, time
from dataclasses import replace
sys.path.insert(0, {tests!r})
from crism_mlops.reports.live import LiveView
from test_live import snapshot
logging.basicConfig(stream=sys.stderr)
with LiveView() as view:
    view.say("before")
    for n in range(8):
        view.update(replace(snapshot(), note=f"note {{n}}"))
        time.sleep(0.1)
    {body}
print("the end", file=sys.stderr)
"""


def on_terminal(
    body: str, columns: int = 80, then: Callable[[subprocess.Popen[bytes]], None] | None = None, **environment: str
) -> tuple[str, int]:
    """What a process writes to its terminal, and its exit code."""
    mine, its = pty.openpty()
    ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES")}
    env |= {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT), **environment}
    script = SCRIPT.format(tests=str(ROOT / "tests"), body=body)
    process = subprocess.Popen([sys.executable, "-c", script], stdin=its, stdout=its, stderr=its, env=env)
    os.close(its)
    read = b""
    while True:
        try:
            got = os.read(mine, 65536)
        except OSError:  # The other end is closed.
            break
        if not got:
            break
        read += got
        if then is not None and b"ready" in read:
            then(process)
            then = None
    os.close(mine)
    return read.decode(), process.wait(30)


def assert_restored(written: str) -> None:
    assert written.count(HIDE) == written.count(SHOW) == 1
    assert written.index(HIDE) < written.index(SHOW)
    # Behind the cursor there is only the clearing of the live part, and what is written later.
    assert "trial 7" not in written[written.index(SHOW) :]


@pytest.mark.parametrize("columns", [80, 140])
def test_the_terminal_is_as_it_was(columns: int) -> None:
    written, code = on_terminal(
        "view.say('said'); logging.warning('logged'); print('printed')\n"
        "    few = [threading.Thread(target=view.say, args=(f'thread {n}',)) for n in range(4)]\n"
        "    [t.start() for t in few]; [t.join() for t in few]",
        columns,
    )
    assert code == 0
    assert_restored(written)
    assert written.rstrip().endswith("the end")
    for fact in (
        "s] before\r\n",
        "s] said\r\n",
        "WARNING:root:logged\r\n",
        "printed\r\n",
        "s] thread 3\r\n",
        "\x1b[1m",
    ):
        assert fact in written
    # A second of updates: drawn four times, and once with each line.
    assert 2 <= written.count("13 of 40") <= 14


def test_an_exception_leaves_the_terminal_as_it_was() -> None:
    written, code = on_terminal("raise RuntimeError('broken')")
    assert code == 1
    assert_restored(written)
    assert "RuntimeError: broken" in written[written.index(SHOW) :]


def test_ctrl_c_leaves_the_terminal_as_it_was() -> None:
    def interrupt(process: subprocess.Popen[bytes]) -> None:
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)

    body = "view.say('ready')\n    for n in range(100000): view.say('a line'); view.update(snapshot(n % 30))"
    written, code = on_terminal(body, then=interrupt)
    assert code != 0
    assert_restored(written)
    assert "KeyboardInterrupt" in written[written.index(SHOW) :]


def test_no_color_and_a_dumb_terminal() -> None:
    written, _ = on_terminal("pass", NO_COLOR="1")
    assert_restored(written)
    assert not re.search(r"\x1b\[[\d;]*3[0-9][\d;]*m", written)
    written, code = on_terminal("view.say('said')", TERM="dumb")
    assert code == 0
    assert "\x1b" not in written
    assert "s] said\r\n" in written


def test_log_handlers_get_their_stream_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    try:
        with LiveView() as view:
            assert view.terminal
            assert handler.stream is not stream
            view.update(snapshot())
    finally:
        logging.getLogger().removeHandler(handler)
    assert handler.stream is stream
    assert sys.stderr is stream
    assert stream.getvalue().count(SHOW) == 1
