"""A training that is killed anywhere ends with the bits of one that was not."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from servers import PATIENCE
from test_models import config_of, make_parts, make_samples
from test_training import UNET, Recorder, linear_truth, run

from crism_mlops.config import EngineConfig, LoraConfig, TrainConfig
from crism_mlops.errors import TrainingError, UnwrittenError
from crism_mlops.models import lora
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import weights_digest
from crism_mlops.models.resume import ResumeFolder
from crism_mlops.models.rows import Rows
from crism_mlops.models.unet import UNet
from crism_mlops.training import train

EVERY_STEP = EngineConfig(save_minutes=0.0)
KINDS = ("unet", "instruct_pix2pix", "lora")


def make(kind: str) -> tuple[Any, Rows, torch.Tensor, TrainConfig]:
    """A model with everything that a step depends on: batch statistics, dropout (the global random
    generator), an average, a schedule, drawn rows; or a text encoder of its own rate, or adapters."""
    config = TrainConfig(
        learning_rate=1e-3, text_learning_rate=1e-4, batch_size=3, epochs=3, ema_decay=0.9, schedule="cosine",
        warmup_steps=2, weight_decay=1e-2,
    )  # fmt: skip
    if kind == "unet":
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.BatchNorm2d(8), torch.nn.Dropout2d(0.2))
        model = UNet(torch.nn.Sequential(*layers, torch.nn.Conv2d(8, 3, 1)), UNET)
        return model, linear_truth(8), torch.arange(1.0, 9.0, dtype=torch.float64), config
    parts = make_parts()
    adapters = LoraConfig(rank=2) if kind == "lora" else None
    if adapters is not None:
        lora.adapt(parts["unet"], adapters, 0)
    own = InstructPix2Pix(parts, config_of(text_encoder="frozen" if adapters else "trained", lora=adapters))
    return own, own.prepare(make_samples(8)), torch.ones(8, dtype=torch.float64), config


def digest_after(kind: str, folder: Path | None, on_step: Any = lambda *_: None) -> str:
    torch.manual_seed(7)
    model, data, weights, config = make(kind)
    notes: dict[str, Any] = {"losses": []}

    def on_epoch(epoch: int, loss: float, last: bool) -> bool:
        notes["losses"].append(loss)
        return False

    resume = None if folder is None else ResumeFolder(folder, "test")
    train(model, data, weights, config, 11, on_step, on_epoch, EVERY_STEP, resume, notes)
    return json.dumps([[weights_digest(m) for m in model.modules], notes["losses"]])


# In a process of its own: it forks before torch has threads, so each kill costs no start.
KILLED = """
import os, signal, sys
from pathlib import Path
from crism_mlops.models import resume
import test_resume

kind, folder = sys.argv[1], Path(sys.argv[2])

def forked(work):
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(9)
    return os.waitpid(child, 0)[1]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def killed_after(step, saves=lambda step: True):
    save = resume.ResumeFolder.save
    resume.ResumeFolder.save = lambda self, n, *more: save(self, n, *more) if saves(n) else None
    test_resume.digest_after(kind, folder / f"after{step}", lambda n, total, loss: n == step and die())

def killed_in_write(nth):
    calls = []
    def sync(place):
        calls.append(place)
        if len(calls) == nth:
            (next(place.glob("*.safetensors"))).write_bytes(b"half")
            die()
    resume.sync = sync
    test_resume.digest_after(kind, folder / f"write{nth}")

def killed_between(nth):
    calls = []
    def sync_parent(place):
        calls.append(place)
        if len(calls) == nth:
            die()
    resume.sync_parent = sync_parent
    test_resume.digest_after(kind, folder / f"between{nth}")

def killed_in_validation(epoch):
    train = test_resume.train
    def dying(*arguments):
        arguments = list(arguments)
        real = arguments[6]
        arguments[6] = lambda number, loss, last: die() if number == epoch else real(number, loss, last)
        return train(*arguments)
    test_resume.train = dying
    test_resume.digest_after(kind, folder / f"validation{epoch}")

cases = {
    "after1": lambda: killed_after(1),
    "after4": lambda: killed_after(4),
    "after8": lambda: killed_after(8, lambda n: n % 3 == 0),
    "write2": lambda: killed_in_write(2),
    "between5": lambda: killed_between(5),
    "validation2": lambda: killed_in_validation(2),
}
for name, work in cases.items():
    assert os.WTERMSIG(forked(work)) == signal.SIGKILL, name
    left = sorted(p.name for p in (folder / name).iterdir())
    print(name, *left, sep="\\t", flush=True)
    out = folder / f"{name}.digest"
    forked(lambda: out.write_text(test_resume.digest_after(kind, folder / name)))
    print(out.read_text(), flush=True)
print("whole", flush=True)
out = folder / "whole.digest"
forked(lambda: out.write_text(test_resume.digest_after(kind, None)))
print(out.read_text(), flush=True)
"""


@pytest.mark.parametrize("kind", KINDS)
def test_killed_and_resumed_is_never_killed_bit_for_bit(kind: str, tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join((str(here), str(here.parent)))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(tmp_path)], env=environment, capture_output=True, text=True,
        timeout=300 * PATIENCE, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    found = dict(zip((line.split("\t")[0] for line in lines[::2]), lines[1::2], strict=True))
    assert len(found) == 7
    assert set(found.values()) == {found["whole"]}
    left = {line.split("\t")[0]: line.split("\t")[1:] for line in lines[:-2:2]}
    assert left["after4"] == ["state-000000004"]
    assert left["after8"] == ["state-000000006"]
    assert left["write2"] == [".partial", "state-000000001"]
    assert left["between5"] == ["state-000000004", "state-000000005"]


def test_another_seed_or_no_kill_is_told_apart(tmp_path: Path) -> None:
    """The test above would see a difference."""
    one, two = digest_after("unet", None), digest_after("unet", tmp_path)
    assert one == two
    model, data, weights, config = make("unet")
    train(model, data, weights, config, 12)
    assert weights_digest(model.module) not in one


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_is_answered_at_the_end_of_a_step_and_training_goes_on(kind: str, tmp_path: Path) -> None:

    import crism_mlops.training as training

    steps = training._step

    def interrupted(*arguments: Any) -> Any:
        result = steps(*arguments)
        if arguments[-1].step == 3:
            os.kill(os.getpid(), 2)
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_step", interrupted)
        torch.manual_seed(7)
        model, data, weights, config = make(kind)
        notes: dict[str, Any] = {"losses": []}

        def on_epoch(epoch: int, loss: float, last: bool) -> bool:
            notes["losses"].append(loss)
            return False

        with pytest.raises(KeyboardInterrupt):
            # Ten minutes between saves: only Ctrl-C makes one.
            train(model, data, weights, config, 11, interrupt_never, on_epoch, EngineConfig(),
                  ResumeFolder(tmp_path, "test"), notes)  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["state-000000004"]
    assert digest_after(kind, tmp_path) == digest_after(kind, None)


def interrupt_never(step: int, total: int, loss: float) -> None:
    pass


def test_the_state_is_safetensors_and_json(tmp_path: Path) -> None:
    digest_after("unet", tmp_path)
    (state,) = tmp_path.iterdir()
    assert {p.name for p in state.iterdir()} == {"0000.safetensors", "state.json"}
    assert json.loads((state / "state.json").read_text())["step"] == 9


def test_a_state_of_other_settings_is_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(Recorder(), 4, TrainConfig(batch_size=2, epochs=1), resume=ResumeFolder(tmp_path, "one"))
    model = Recorder()
    assert run(model, 4, TrainConfig(batch_size=2, epochs=1), resume=ResumeFolder(tmp_path, "two")).steps == 2
    assert len(model.batches) == 2
    assert "of other settings or data, not resumed" in caplog.text


@pytest.mark.parametrize("what", ["state.json", "0000.safetensors"])
def test_a_damaged_state_is_left_out(what: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(Recorder(), 4, TrainConfig(batch_size=2, epochs=1), resume=ResumeFolder(tmp_path, "one"))
    (state,) = tmp_path.iterdir()
    (state / what).write_bytes(b"{")
    model = Recorder()
    run(model, 4, TrainConfig(batch_size=2, epochs=1), resume=ResumeFolder(tmp_path, "one"))
    assert len(model.batches) == 2
    assert "damaged" in caplog.text


def test_a_full_disk_keeps_the_state_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import crism_mlops.models.resume as resume

    folder = ResumeFolder(tmp_path, "one")
    tensors = {"x": torch.arange(4.0)}
    folder.save(1, tensors, {"progress": 1})

    def full(place: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(resume, "sync", full)
    with pytest.raises(UnwrittenError, match=r"cannot be written .*No space left.*the one before it is kept"):
        folder.save(2, tensors, {"progress": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["state-000000001"]
    found = folder.load()
    assert found is not None
    assert found[1]["progress"] == 1


def test_a_large_state_is_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import crism_mlops.models.resume as resume

    monkeypatch.setattr(resume, "_FILE_BYTES", 4096)
    tensors = {f"t{i}": torch.full((512,), float(i)) for i in range(5)}
    ResumeFolder(tmp_path, "one").save(3, tensors, {})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    found = ResumeFolder(tmp_path, "one").load()
    assert found is not None
    assert all(torch.equal(found[0][name], tensor) for name, tensor in tensors.items())


def test_pickles_are_not_read(tmp_path: Path) -> None:
    run(Recorder(), 4, TrainConfig(batch_size=2, epochs=1), resume=ResumeFolder(tmp_path, "one"))
    (state,) = tmp_path.iterdir()
    (state / "optimizer.pt").write_bytes(b"cos\nsystem\n(S'touch /tmp/no'\ntR.")
    with pytest.raises(TrainingError, match=r"optimizer\.pt: refused"):
        ResumeFolder(tmp_path, "one").load()
