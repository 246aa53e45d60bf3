"""The store: content-addressed files, each written once, never half."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from crism_mlops.errors import StoreError
from crism_mlops.scenes import store as module
from crism_mlops.scenes.store import Store, content_digest, map_arrays, read_facts, write_arrays


def test_a_file_is_written_once(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "cache")
    calls: list[Path] = []

    def write(path: Path) -> None:
        calls.append(path)
        path.write_text("content")

    first = store.put("scenes/ab/abc.txt", write)
    assert first == tmp_path / "store/scenes/ab/abc.txt" == store.path("scenes/ab/abc.txt")
    assert store.put("scenes/ab/abc.txt", write) == first
    assert len(calls) == 1
    assert calls[0] != first, "written under another name, then renamed"
    assert store.exists("scenes/ab/abc.txt")
    assert not store.exists("scenes/ab/other.txt")
    assert store.names("scenes") == {"scenes/ab/abc.txt"}
    assert store.names("nothing") == set()


@pytest.mark.parametrize("error", [RuntimeError("stop"), KeyboardInterrupt()])
def test_a_failed_write_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "cache")

    def write(path: Path) -> None:
        path.write_text("half")
        raise error

    with pytest.raises(type(error)):
        store.put("scenes/ab/abc.txt", write)
    assert store.names("scenes") == set()
    assert list((tmp_path / "store/scenes/ab").iterdir()) == []


KILLED = """
import sys, time
from pathlib import Path
from crism_mlops.scenes.store import Store

def write(path):
    path.write_text("half")
    print("writing", flush=True)
    time.sleep(60)

Store(sys.argv[1], Path(sys.argv[1])).put("scenes/ab/abc.txt", write)
"""


def test_a_killed_process_leaves_no_file_and_no_lock(tmp_path: Path) -> None:
    root = tmp_path / "store"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(root)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    store = Store(str(root), tmp_path / "cache")
    assert not store.exists("scenes/ab/abc.txt")
    assert store.names("scenes") == set()
    assert len(list((root / "scenes/ab").iterdir())) == 1, "what the killed process had begun"
    store.put("scenes/ab/abc.txt", lambda path: path.write_text("whole") and None)
    assert [path.name for path in (root / "scenes/ab").iterdir()] == ["abc.txt"], "and nothing of it is left"
    assert store.path("scenes/ab/abc.txt").read_text() == "whole"


def _put(root: str, log: str) -> None:
    def write(path: Path) -> None:
        with open(log, "a") as handle:
            handle.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        path.write_text("content")

    Store(root, Path(root)).put("scenes/ab/abc.txt", write)


def test_of_several_processes_one_writes_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = (str(tmp_path / "store"), str(tmp_path / "log"))
    processes = [context.Process(target=_put, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1
    assert (tmp_path / "store/scenes/ab/abc.txt").read_text() == "content"


def test_a_store_elsewhere_is_mirrored(tmp_path: Path) -> None:
    import fsspec

    url = f"memory://{tmp_path.name}/crism"
    first = Store(url, tmp_path / "one")
    local = first.put("scenes/ab/abc.txt", lambda path: path.write_text("content") and None)
    assert not first.is_local
    assert local.is_relative_to(tmp_path / "one")
    assert fsspec.filesystem("memory").cat(f"/{tmp_path.name}/crism/scenes/ab/abc.txt") == b"content"
    second = Store(url, tmp_path / "two")
    assert second.names("scenes") == {"scenes/ab/abc.txt"}
    assert second.exists("scenes/ab/abc.txt")
    assert second.put("scenes/ab/abc.txt", lambda path: pytest.fail("written twice")).read_text() == "content"
    with pytest.raises(StoreError, match=r"cannot fetch scenes/ab/none\.txt"):
        second.path("scenes/ab/none.txt")


def test_a_copy_here_is_not_the_store(tmp_path: Path) -> None:
    import fsspec

    store = Store(f"memory://{tmp_path.name}/crism", tmp_path / "one")
    store.put("scenes/ab/abc.txt", lambda path: path.write_text("content") and None)
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}", recursive=True)
    assert not store.exists("scenes/ab/abc.txt")
    store.put("scenes/ab/abc.txt", lambda path: pytest.fail("the copy is as good"))
    assert store.exists("scenes/ab/abc.txt")


def test_what_writing_raises_is_not_the_store_s(tmp_path: Path) -> None:
    class OwnError(Exception):
        pass

    OwnError.__module__ = "fsspec.core"

    def write(path: Path) -> None:
        raise OwnError

    with pytest.raises(OwnError):
        Store(f"memory://{tmp_path.name}/crism", tmp_path / "one").put("scenes/ab/abc.txt", write)


def test_a_store_travels_between_processes(tmp_path: Path) -> None:
    store = Store(str(tmp_path), tmp_path)
    assert store.is_local
    again = pickle.loads(pickle.dumps(store))
    assert (again.url, again.mirror, again.folder) == (store.url, store.mirror, store.folder)


@pytest.mark.parametrize("url", ["nonsense://bucket/x", "http+weird://", "github://x", "reference://x", "dir://x"])
def test_a_url_of_no_use(tmp_path: Path, url: str) -> None:
    with pytest.raises(StoreError, match="give a folder, or a URL"):
        Store(url, tmp_path).exists("x")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"data\.store .*file.*cannot write"):
        Store(str(tmp_path / "file" / "store"), tmp_path).put("a.txt", lambda path: None)


def test_a_full_disk_is_said_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(str(tmp_path / "store"), tmp_path)

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match="No space left on device"):
        store.put("a.txt", full)
    with pytest.raises(StoreError, match=r"GB free, 1000000\.\d+ GB needed"):
        store.need(10**15)
    monkeypatch.setattr(module, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(StoreError, match="with a reserve"):
        store.put("a.txt", lambda path: pytest.fail("written to a full disk"))


def test_arrays_are_mapped_and_damage_is_told(tmp_path: Path) -> None:
    arrays = {"a": np.arange(12, dtype=np.float32).reshape(3, 4), "m": np.array([[True, False]])}
    path = tmp_path / "x.safetensors"
    write_arrays(path, arrays, {"who": "me"})
    found = map_arrays(path)
    assert read_facts(path) == {"who": "me"}
    assert set(found) == {"a", "m"}
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) in maps.read_text(), "the file is mapped, not copied"
    path.write_bytes(path.read_bytes()[:-5])
    store = Store(str(tmp_path), tmp_path)
    for read in (map_arrays, read_facts):
        with pytest.raises(StoreError, match=r"x\.safetensors: damaged .*remove it"), store.reading(path.name) as local:
            read(local)


def test_damage_elsewhere_is_named_there_and_its_copy_is_forgotten(tmp_path: Path) -> None:
    import fsspec

    store = Store(f"memory://{tmp_path.name}/crism", tmp_path / "one")
    name = "scenes/ab/abc.safetensors"
    local = store.put(name, lambda path: write_arrays(path, {"a": np.zeros(3)}, {}))
    store.check_size(name)
    with fsspec.filesystem("memory").open(f"/{tmp_path.name}/crism/{name}", "wb") as handle:
        handle.write(b"xx")
    with pytest.raises(StoreError, match=r"memory://.*scenes/ab/abc\.safetensors: damaged \(it has 2 bytes"):
        store.check_size(name)
    local.unlink()
    with (
        pytest.raises(StoreError, match=r"memory://.*abc\.safetensors: damaged .*remove it"),
        store.reading(name) as path,
    ):
        read_facts(path)
    assert not local.exists()
    fsspec.filesystem("memory").rm(f"/{tmp_path.name}/crism/{name}")
    store.put(name, lambda path: write_arrays(path, {"a": np.ones(3)}, {}))
    with store.reading(name) as path:
        assert map_arrays(path)["a"].sum() == 3.0, "the message was right: removed, and built anew"


def test_content_digest_sees_values_shape_and_type() -> None:
    one = np.arange(6, dtype=np.float32)
    digests = {content_digest(a) for a in ([one], [one + 1], [one.reshape(2, 3)], [one.astype(np.float64)], [one, one])}
    assert len(digests) == 5
    assert content_digest([one.reshape(2, 3).T]) == content_digest([np.ascontiguousarray(one.reshape(2, 3).T)])
