"""The journal of what waits to be told, and its crashes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from crism_mlops.errors import TrackingError
from crism_mlops.outbox import Op, Outbox


def put(box: Outbox, count: int, start: int = 0) -> None:
    for n in range(start, start + count):
        box.put({"op": "metrics", "n": n})


def numbers(box: Outbox) -> list[int]:
    return [op["n"] for op in box.peek()]


def crash(box: Outbox) -> None:
    """What is left of an outbox whose process was killed: its files."""
    os.close(box._file)
    box._owner.release()
    box._closed = True


def test_in_order_and_gone_when_delivered(tmp_path: Path) -> None:
    box = Outbox(tmp_path / "box")
    put(box, 5)
    got: list[Op] = []

    def send(ops: Sequence[Op]) -> int:
        got.extend(ops[:2])
        return len(ops[:2])

    box.deliver(send)
    assert [op["n"] for op in got] == [0, 1, 2, 3, 4]
    assert box.pending() == 0
    box.close()
    box.close()
    assert not (tmp_path / "box").exists()


def test_what_was_not_acknowledged_is_delivered_next_time(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    put(box, 5)

    def send(ops: Sequence[Op]) -> int:
        if ops[0]["n"] == 2:
            raise ConnectionError
        return 1

    with pytest.raises(ConnectionError):
        box.deliver(send)
    crash(box)
    box = Outbox(tmp_path)
    assert numbers(box) == [2, 3, 4]
    put(box, 1, 5)
    box.acknowledge(1)
    box.close()
    box = Outbox(tmp_path)
    assert numbers(box) == [3, 4, 5]
    box.close()


@pytest.mark.parametrize("torn", [b"{", b'{"op": "metrics", "n": 9}', b"\x00\xff"])
def test_torn_last_line(tmp_path: Path, torn: bytes) -> None:
    box = Outbox(tmp_path)
    put(box, 2)
    crash(box)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(torn)
    box = Outbox(tmp_path)
    put(box, 1, 2)
    crash(box)
    box = Outbox(tmp_path)
    assert numbers(box) == [0, 1, 2]
    box.close()


def test_damaged_line_blocks_nothing(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    put(box, 1)
    crash(box)
    with (tmp_path / "journal.jsonl").open("ab") as file:
        file.write(b"\x00\xff\n")
    box = Outbox(tmp_path)
    put(box, 1, 1)
    assert [op["op"] for op in box.peek()] == ["metrics", "unreadable", "metrics"]
    box.close()


def test_emptied_and_killed_before_that_was_noted(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    put(box, 2)
    box.acknowledge(2)
    crash(box)
    (tmp_path / "journal.jsonl").write_bytes(b"")
    box = Outbox(tmp_path)
    put(box, 2, 7)
    crash(box)
    box = Outbox(tmp_path)
    assert numbers(box) == [7, 8]
    box.close()


def test_long_journal_starts_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.outbox._COMPACT", 100)
    box = Outbox(tmp_path)
    put(box, 20)
    box.acknowledge(19)
    assert (tmp_path / "journal.jsonl").stat().st_size > 100
    box.acknowledge(1)
    assert (tmp_path / "journal.jsonl").stat().st_size == 0
    put(box, 1, 20)
    crash(box)
    box = Outbox(tmp_path)
    assert numbers(box) == [20]
    box.close()


def test_payloads_lie_beside_the_journal(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    box.put({"op": "file"}, b"first")
    box.put({"op": "file"}, b"second")
    first, second = box.peek()
    assert box.payload(first).read_bytes() == b"first"
    box.acknowledge(1)
    assert not box.payload(first).exists()
    (tmp_path / "payload-orphan").write_bytes(b"of a put that was killed")
    crash(box)
    box = Outbox(tmp_path)
    assert not (tmp_path / "payload-orphan").exists()
    box.refuse("no such run")
    assert box.payload(second).read_bytes() == b"second"
    assert "no such run" in (tmp_path / "refused.jsonl").read_text()
    box.close()
    Outbox(tmp_path).close()
    assert box.payload(second).read_bytes() == b"second"


def test_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    box = Outbox(tmp_path)
    put(box, 1)
    write = os.write

    def half(file: int, content: memoryview) -> int:
        if len(content) < 12:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(file, content[: len(content) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", half)
        with pytest.raises(TrackingError, match=r"No space left.*free space there"):
            box.put({"op": "metrics", "n": 1}, b"payload")
    put(box, 1, 2)
    assert list(tmp_path.glob("payload-*")) == []
    crash(box)
    box = Outbox(tmp_path)
    assert numbers(box) == [0, 2]
    box.close()


def test_one_process_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.outbox._LOCK_SECONDS", 0.1)
    box = Outbox(tmp_path)
    code = "import sys\nfrom pathlib import Path\nfrom crism_mlops import outbox\noutbox._LOCK_SECONDS = 0.1\n"
    code += "outbox.Outbox(Path(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert "in use by another process" in done.stderr
    box.close()


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(TrackingError, match="cannot be written"):
        Outbox(tmp_path / "file" / "box")


def test_late_acknowledgement_changes_nothing(tmp_path: Path) -> None:
    box = Outbox(tmp_path)
    put(box, 2)
    box.close()
    box.acknowledge(1)
    box.refuse("late")
    again = Outbox(tmp_path)
    assert numbers(again) == [0, 1]
    again.close()


WRITER = """
import sys
from pathlib import Path
from crism_mlops.outbox import Outbox
box = Outbox(Path(sys.argv[1]))
for n in range(10**9):
    box.put({"op": "metrics", "n": n}, b"x" * 1000 if n % 50 == 0 else None)
    if n % 3 == 0 and n > 1000:
        box.acknowledge(1)
    if n == 2000:
        print("going", flush=True)
"""


def test_killed_at_any_moment(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    box = Outbox(tmp_path)
    found = [op["n"] for op in box.peek(10**9)]
    assert found == list(range(found[0], found[-1] + 1))
    assert found[0] > 300
    for op in box.peek(10**9):
        assert (op["n"] % 50 == 0) == ("payload" in op)
        assert "payload" not in op or box.payload(op).read_bytes() == b"x" * 1000
    box.close()
