"""`data search` and `data download` as the console script runs them, against a local ODE."""

from __future__ import annotations

import io
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from console import console
from ode_server import Fault, OdeServer, ode_server

from crism_mlops import cli
from crism_mlops.scenes.inspect import inspect_path


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The last line on standard error, that of an error; nothing is on standard output."""
        assert (self.code, self.out) == (1, ""), self.err
        line = self.err.splitlines()[-1]
        assert line.startswith("error: "), self.err
        return line


Run = Callable[..., Ran]


@pytest.fixture
def ode(observation: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[OdeServer]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ode_server() as server:
        server.add_folder(observation)
        yield server


@pytest.fixture
def run(ode: OdeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`crism-mlops data WORDS` at the local server."""

    def call(*words: object) -> Ran:
        there = ["--service", f"{ode.url}/live2", "--allow-host", ode.host]
        ran = console(["data", *words, *there], monkeypatch, capsys)
        return Ran(ran.code, ran.out, ran.err)

    return call


def test_search_prints_a_table_and_the_size(run: Run, observation: Path) -> None:
    ran = run("search", "--region", "Nili Fossae")
    assert ran.code == 0
    (row,) = (line for line in ran.out.splitlines() if observation.name in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == [
        observation.name, "-74.500", "22.113", "2007-01-30T12:34:56", "de, if", "3.2 MB", "3.2 MB",
    ]  # fmt: skip
    assert ran.out.splitlines()[-1] == "3.2 MB to download, 3.2 MB in all"


def test_search_as_json(run: Run, ode: OdeServer, observation: Path) -> None:
    content = json.loads(run("search", "--bbox=-80,20,-70,25", "--json").out)
    (one,) = content["observations"]
    assert one["observation_id"] == observation.name
    assert [product["kind"] for product in one["products"]] == ["de", "if"]
    assert content["bytes"] == content["download_bytes"] == one["bytes"]
    assert content["bytes"] == pytest.approx(sum(map(len, ode.files.values())), abs=6 * 1024)
    assert ode.log[0].query["westernlon"] == "280"


def test_search_that_finds_nothing(run: Run) -> None:
    ran = run("search", "--id", "HRL00000000", "--json")
    assert (ran.code, json.loads(ran.out)) == (0, {"observations": [], "bytes": 0, "download_bytes": 0})


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "give one of --region NAME"),
        (["--region", "x", "--id", "FRT"], "give one of --region NAME"),
        (["--region", "Olympus"], "known are coprates"),
        (["--bbox", "1,2"], "four numbers W,S,E,N"),
        (["--id", "FRT/../x"], "not an observation id"),
        (["--id", "FRT", "--allow-host", "http://x"], "not a host"),
    ],
)
def test_what_cannot_be_searched_for_is_one_line(run: Run, words: list[str], line: str) -> None:
    assert line in run("search", *words).error


def test_another_service_must_be_allowed(
    ode: OdeServer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["crism-mlops", "data", "search", "--id", "FRT", "--service", ode.url])
    with pytest.raises(SystemExit):
        cli.main()
    assert f"add --allow-host {ode.host}" in capsys.readouterr().err
    assert ode.log == []


def test_download_and_again(run: Run, observation: Path, tmp_path: Path) -> None:
    ran = run("download", "--id", observation.name, "-o", "data")
    assert ran.code == 0
    assert ran.out.splitlines() == ["1 observations in data: 6 files fetched (3.2 MB), 0 there before, 0 missing"]
    assert "1 observations, 6 files, 3.2 MB, of which 0 bytes are there" in ran.err
    assert f"1 of 1: {observation.name}: 6 files fetched, 0 there, 0 missing" in ran.err
    (row,) = inspect_path(tmp_path / "data")
    assert observation.name in row.values()
    content = json.loads(run("download", "--id", "FRT", "-o", "data", "--json", "--yes", "--jobs", 8).out)
    assert content == {
        "fetched": 0, "there": 6, "bytes": 0, "failed": [], "left_out": [], "folder": "data", "complete": True,
    }  # fmt: skip


def test_kinds_to_download(run: Run, observation: Path, tmp_path: Path) -> None:
    ran = run("download", "--id", "FRT", "-o", "data", "--kinds", "DE")
    assert ran.code == 0
    assert ran.out.splitlines()[1:] == ["  left out: 3 files: of another kind"]
    names = {path.name for path in (tmp_path / "data" / observation.name).glob("[!.]*")}
    assert names == {f"{observation.name}_07_de164l_mtr1.{suffix}" for suffix in ("img", "hdr", "lbl")}
    assert "not a kind of product" in run("download", "--id", "FRT", "-o", "data", "--kinds", "if,xx/y").error
    assert "lists no product of sr" in run("download", "--id", "FRT", "-o", "data", "--kinds", "sr").err


def test_something_missing_is_exit_code_1(run: Run, ode: OdeServer, observation: Path) -> None:
    (path,) = (path for path in ode.files if path.endswith("_IF164J_MTR3.HDR"))
    ode.faults[path] = [Fault(status=404)]
    ran = run("download", "--id", "FRT", "-o", "data")
    assert ran.code == 1
    assert f"missing: {observation.name}_07_if164j_mtr3.hdr: " in ran.err
    assert "answers 404" in ran.err
    assert "5 files fetched" in ran.out
    assert "1 missing" in ran.out


def test_nothing_to_download(run: Run) -> None:
    assert "no map-projected observation there" in run("download", "--id", "HRL", "-o", "data").error


def test_no_room(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "data: 0.00 GB to fetch, 0.00 GB free" in run("download", "--id", "FRT", "-o", "data").error
    assert not (tmp_path / "data").exists()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "code"), [("n\n", 1), ("y\n", 0)])
def test_on_a_terminal_it_asks_first(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, code: int
) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal(answer))
    ran = run("download", "--id", "FRT", "-o", "data")
    assert ran.code == code
    assert "Fetch them? [y/N]" in ran.err
    assert (tmp_path / "data").exists() is (code == 0)


def test_a_bar_on_a_terminal(run: Run, observation: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", screen)
    ran = run("download", "--id", "FRT", "-o", "data", "--json")
    assert json.loads(ran.out)["fetched"] == 6
    assert "3.2/3.2 MB" in screen.getvalue()
    assert f"{observation.name}: 6 files fetched" in screen.getvalue()


def test_interrupted(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crism_mlops.products.transfer.os.replace", stop)
    ran = run("download", "--id", "FRT", "-o", "data")
    assert ran.code == 130
    assert "interrupted; the same command goes on from here" in ran.err
