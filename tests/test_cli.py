"""The commands, run as the console script runs them: exit codes, one line for an error, JSON on standard output."""

from __future__ import annotations

import errno
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml
from console import Ran, console
from trackers import logged_trial, tracking_store

from crism_mlops import __version__, cli
from crism_mlops.config import SweepConfig, load_sweep
from crism_mlops.errors import CrismError
from crism_mlops.studies.search_space import describe
from crism_mlops.tracking import Tracker

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
QUICKSTART = ROOT / "sweeps" / "quickstart-unet.yaml"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Calls the console script's function in an empty working directory."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Ran:
        # Absolute, as MLflow keeps connections by URI; set anew, as it writes the last one into the environment.
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}")
        return console(words, monkeypatch, capsys)

    return call


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """The store that the commands use."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    tracking_store(tmp_path / "mlruns")
    tracker = Tracker(f"sqlite:///{tmp_path / 'mlruns' / 'mlflow.db'}", "crism")
    tags = {"crism.study": "ip2p", "crism.model": "instruct_pix2pix", "crism.trials_total": "2"}
    tracker.start("ip2p", "study", tags, {"objective": "val/rmse", "scenes_digest": "d"})
    return tracker


@pytest.fixture
def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def commands() -> Iterator[tuple[str, click.Command]]:
    def walk(name: str, command: Any) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield name, command
            return
        for word, one in inner.items():
            yield from walk(f"{name} {word}".strip(), one)

    yield from walk("", typer.main.get_command(cli.app))


COMMANDS = dict(commands())


def test_all_commands_are_there() -> None:
    assert {"sweep", "status", "promote", "ui", "evaluate", "data inspect"} <= set(COMMANDS)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_help_with_an_example(run: Any, name: str) -> None:
    ran = run(*name.split(), "--help")
    assert ran.code == 0
    assert f"Example: crism-mlops {name} " in " ".join(ran.out.split())
    for parameter in COMMANDS[name].params:
        assert getattr(parameter, "help", None) or parameter.name in ("port",), f"{name}: {parameter.name} has no help"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_readme_names_the_command(name: str) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"crism-mlops {name}" in text, f"README.md does not show the command `crism-mlops {name}`: add a line for it"


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, crism_mlops.cli; print(*(m for m in sys.modules if '.' not in m))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, env=environment
    ).stdout.split()
    heavy = {"torch", "mlflow", "optuna", "diffusers", "transformers", "numpy", "pandas", "matplotlib", "sqlalchemy"}
    assert not heavy & set(loaded)


def test_version(run: Any) -> None:
    assert run("--version").out.strip() == __version__


def test_usage_error_is_2(run: Any) -> None:
    assert run("sweep").code == 2
    assert run("evaluate", "somewhere", QUICKSTART, "--split", "exam").code == 2


# Errors: one line, exit code 1, no traceback.


@pytest.mark.parametrize("command", [("sweep",), ("evaluate", "checkpoint")])
def test_missing_file(run: Any, command: tuple[str, ...]) -> None:
    assert "nowhere.yaml: cannot be read" in run(*command, "nowhere.yaml").error


def test_unknown_key_in_the_file(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(QUICKSTART.read_text().replace("epochs:", "epoch:"))
    assert "study.yaml: unknown key train.epoch; did you mean train.epochs?" in run("sweep", file).error


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "did you mean train.epochs?"),
        ("train.epochs=many", "train.epochs"),
        ("train.epochs", "expected key=value"),
        ("data.variant=[", "the value is not YAML"),
        ("data.path=~nobody-of-that-name/x", "write the folder out"),
        ("data.store=''", "not the name of a file or folder"),
        ('data.cache="a\\0b"', "not the name of a file or folder"),
    ],
)
def test_override_that_does_not_fit(run: Any, override: str, words: str) -> None:
    assert words in run("sweep", QUICKSTART, "--set", override).error


def test_pairs_give_only_pnr(run: Any) -> None:
    ran = run("sweep", QUICKSTART, "--set", "data.source=pairs", "--set", "data.variant=rect")
    assert "variant rect cannot be made from pairs" in ran.error


def test_missing_data_folder(run: Any, store: Tracker) -> None:
    ran = run("sweep", ROOT / "sweeps" / "unet.yaml", "--set", "data.path=no/such/folder")
    assert "no such folder: no/such/folder; set it with --set data.path=FOLDER" in ran.error


def test_unreachable_server(run: Any, closed_port: int) -> None:
    uri = f"http://127.0.0.1:{closed_port}"
    for words in (("sweep", QUICKSTART), ("status",), ("promote",), ("evaluate", "models:/m@champion", QUICKSTART)):
        assert f"tracking server {uri} does not answer" in run(*words, "--tracking-uri", uri).error


@pytest.mark.parametrize("command", ["status", "promote", "ui", "rollback", "history"])
def test_no_store_yet(run: Any, tmp_path: Path, command: str) -> None:
    assert "no such store yet; run a sweep first" in run(command).error
    assert list(tmp_path.iterdir()) == []


def test_unknown_study_and_experiment(run: Any, store: Tracker) -> None:
    assert "no study 'unet' in experiment 'crism'; it holds ip2p" in run("status", "unet").error
    assert "no study or run 'unet' in experiment 'crism'; it holds ip2p" in run("promote", "unet").error
    assert "no experiment 'other'" in run("status", "--experiment", "other").error
    assert "it holds anything, crism" in run("promote", "--experiment", "other").error


def test_nothing_to_promote(run: Any, store: Tracker) -> None:
    assert "no finished InstructPix2Pix trial" in run("promote").error
    assert "no variant 'rgb'; expected one of" in run("promote", "--variant", "rgb").error


def test_evaluate_what_is_no_checkpoint(run: Any, tmp_path: Path, store: Tracker) -> None:
    assert "no such folder; give a checkpoint's folder" in run("evaluate", "nowhere", QUICKSTART).error
    assert "Registered Model" in run("evaluate", "models:/nothing@champion", QUICKSTART).error
    assert {e.name for e in store.client.search_experiments()} == {"Default", "anything", "crism"}, "nothing is made"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free space, then run the same"),
        (PermissionError(errno.EACCES, "Permission denied", "/nowhere/x"), "Permission denied: '/nowhere/x'"),
        (CrismError("first line\nsecond line"), "first line second line"),
    ],
)
def test_errors_of_the_machine(
    run: Any, store: Tracker, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("crism_mlops.scenes.sources.load_scenes", fail)
    assert words in run("sweep", QUICKSTART).error


def test_ctrl_c(run: Any, store: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crism_mlops.scenes.sources.load_scenes", lambda *_: [])
    monkeypatch.setattr("crism_mlops.studies.study.run_study", interrupt)
    ran = run("sweep", QUICKSTART)
    assert ran.code == 130
    assert ran.err.splitlines()[-1].endswith("quickstart-unet: interrupted; the same command goes on from here")
    assert "Traceback" not in ran.err


def test_debug_shows_the_traceback(run: Any) -> None:
    ran = run("--debug", "sweep", "nowhere.yaml")
    assert ran.code == 1
    assert ran.err.startswith("Traceback (most recent call last)")
    assert re.search(r"ConfigError: .*nowhere\.yaml", ran.err.splitlines()[-1])


@pytest.mark.parametrize("debug", [False, True])
def test_as_a_process(tmp_path: Path, debug: bool) -> None:
    words = [*(["--debug"] if debug else []), "sweep", "nowhere.yaml"]
    ran = subprocess.run(
        [sys.executable, "-m", "crism_mlops.cli", *words],
        capture_output=True, text=True, timeout=60, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert ran.returncode == 1
    assert ("Traceback (most recent call last)" in ran.stderr) is debug
    if not debug:
        assert Ran(ran.returncode, ran.stdout, ran.stderr).error


# Sweep files.


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_shipped_sweep_is_valid(file: Path) -> None:
    sweep = load_sweep(file)
    assert sweep.study == file.stem
    assert len(describe(sweep)) == len(sweep.search) > 0


def test_sweeps_of_both_models() -> None:
    found = {file.stem: load_sweep(file) for file in SWEEPS}
    assert {"unet", "ip2p", "quickstart-unet", "quickstart-ip2p"} <= set(found)
    for one, other in (("unet", "ip2p"), ("quickstart-unet", "quickstart-ip2p")):
        assert found[one].experiment == found[other].experiment
    for name in ("unet", "ip2p"):
        assert found[name].data.resolution == 512
        assert found[name].train.batch_size == 8
        assert set(found[name].search["data.variant"].choice) == {"pnr", "pca", "rect"}  # type: ignore[union-attr]
    assert {"model.prompt", "model.text_encoder"} <= set(found["ip2p"].search)
    quick = found["quickstart-unet"], found["quickstart-ip2p"]
    assert quick[0].data.simulated == quick[1].data.simulated
    assert quick[0].split == quick[1].split


@pytest.mark.parametrize("file", SWEEPS, ids=lambda p: p.stem)
def test_dry_run_parses_back(run: Any, tmp_path: Path, file: Path) -> None:
    ran = run("sweep", file, "--dry-run", "--trials", 7, "--new-study", "other", "--set", "train.epochs=4")
    assert ran.code == 0
    printed = SweepConfig.model_validate(yaml.safe_load(ran.out))
    assert printed == load_sweep(file, ("budget.trials=7", "study=other", "train.epochs=4"))
    assert (printed.budget.trials, printed.study, printed.train.epochs) == (7, "other", 4)
    assert "# search space, 7 trials in all, minimize val/rmse" in ran.out
    for line in describe(printed):
        assert f"#   {line}" in ran.out
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"


def test_dry_run_of_every_kind_of_dimension(run: Any) -> None:
    search = "search={train.batch_size: {int: [2, 8, 2]}, train.weight_decay: {uniform: [0, 0.5]}}"
    out = run("sweep", QUICKSTART, "--dry-run", "--set", search).out
    assert "#   train.batch_size: integers 2 to 8 in steps of 2" in out
    assert "#   train.weight_decay: 0 to 0.5" in out
    assert "#   (nothing is searched)" in run("sweep", QUICKSTART, "--dry-run", "--set", "search={}").out


# status, ui.


def test_status(run: Any, store: Tracker) -> None:
    run_id = logged_trial(store, "ip2p-000", 3.0)
    store.metrics(run_id, {"thesis/pcc": float("nan")})
    one = run("status", "ip2p", "--json").json
    assert (one["study"], one["counts"], one["trials_total"]) == ("ip2p", {"finished": 1}, 2)
    assert one["rows"][0]["scores"]["test/rmse"] == 4.0
    assert one["rows"][0]["scores"]["thesis/pcc"] is None
    assert run("status", "--json").json == {"experiment": "crism", "studies": [one]}
    table = run("status").out
    assert "* ip2p-000" in table
    assert "ip2p (instruct_pix2pix): 1 finished of 2; best ip2p-000: val/rmse 3.00 (chosen on validation)" in table
    assert "crism-mlops ui" in table


def test_ui(run: Any, store: Tracker, monkeypatch: pytest.MonkeyPatch, closed_port: int) -> None:
    started: list[Any] = []
    monkeypatch.setattr(os, "execve", lambda *arguments: started.append(arguments))
    ran = run("ui", "--port", closed_port)
    assert f"http://127.0.0.1:{closed_port}" in ran.out
    program, command, environment = started[0]
    assert program == command[0] == sys.executable
    # A database's address holds a password, and a command line is everybody's to read.
    assert environment["MLFLOW_BACKEND_STORE_URI"] == store.uri
    assert store.uri not in command
    assert command[command.index("--host") + 1] == "127.0.0.1"
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in run("ui", "--port", port).error
    ran = run("ui", "--tracking-uri", "http://me:secret@tracking.example")
    assert ran.out.strip().endswith("http://me:***@tracking.example")
    assert len(started) == 1


# data inspect.


def test_inspect_one_observation(run: Any, observation: Path) -> None:
    document = run("data", "inspect", observation, "--json").json
    assert document["path"] == str(observation)
    (row,) = document["observations"]
    assert row["observation"] == observation.name
    assert row["products"] == "de if"
    assert row["lines x samples x bands"] == "40 x 40 x 489"
    assert row["kind"] in ("carbonate", "barren", "unknown")
    table = run("data", "inspect", observation).out
    assert observation.name in table
    assert "1 observation " in table


def test_inspect_folder_with_a_damaged_observation(run: Any, observation: Path, tmp_path: Path) -> None:
    folder = tmp_path / "observations"
    shutil.copytree(observation, folder / observation.name)
    damaged = folder / "frt0000dead"
    for file in shutil.copytree(observation, damaged).iterdir():
        if file.suffix == ".lbl":
            file.unlink()  # It names the observation that it was written for.
        else:
            file.rename(damaged / file.name.replace(observation.name, damaged.name))
    image = next(damaged.glob("*_if*.img"))
    image.write_bytes(image.read_bytes()[:1000])
    rows = {row["observation"]: row for row in run("data", "inspect", folder, "--json").json["observations"]}
    assert set(rows) == {observation.name, damaged.name}
    assert image.name in rows[damaged.name]["problem"]
    assert "problem" not in rows[observation.name]
    ran = run("data", "inspect", folder)
    assert ran.code == 0
    assert "2 observations" in ran.out


def test_inspect_pairs(run: Any, real_data: Path) -> None:
    document = run("data", "inspect", real_data / "scene_pairs", "--json").json
    assert len(document["observations"]) > 80


def test_inspect_nothing(run: Any, tmp_path: Path) -> None:
    assert "no such folder" in run("data", "inspect", "nowhere").error
    (tmp_path / "empty").mkdir()
    assert "empty" in run("data", "inspect", "empty").error
