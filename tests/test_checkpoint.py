"""A checkpoint folder is whole or refused, and a failed write costs nothing that was there."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from test_models import IMAGES, PROMPTS, SEEDS, config_of, make_parts

from crism_mlops.config import DataConfig, RunConfig, TrainConfig, UNetModel
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import ModelError
from crism_mlops.models import unet
from crism_mlops.models.checkpoint import CARD, Checkpoint, load_checkpoint, read_checkpoint, save_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.unet import UNet

DATA = DataConfig(source="simulated", resolution=32)
PCA = InputTransform(
    "pca", "physical", mean=(0.1, 0.2, 0.3, 1 / 3), components=((1.0, 0.0, 0.0, 0.0),) * 3,
    low=(0.0, 0.1, 0.2), high=(1.0, 0.9, 0.8),
)  # fmt: skip
UNET = UNetModel(kind="unet", encoder="resnet18", encoder_weights=None)


def make_checkpoint(epoch: int = 3, score: float | None = 12.5) -> Checkpoint:
    config = RunConfig(data=DATA, model=UNET, train=TrainConfig(learning_rate=1e-3))
    return Checkpoint(config, PCA, "0123456789abcdef", epoch, 40, score, {})


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One saved U-Net; look, don't touch."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    save_checkpoint(unet.build(UNET, 3, 1), folder, make_checkpoint())
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    shutil.copytree(saved, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def test_a_unet_comes_back_as_it_was(tmp_path: Path) -> None:
    model = unet.build(UNET, 3, 1)
    written = save_checkpoint(model, tmp_path / "a" / "checkpoint", make_checkpoint())
    loaded, checkpoint = load_checkpoint(tmp_path / "a" / "checkpoint")
    assert checkpoint == written
    assert checkpoint.transform == PCA
    assert checkpoint.config == make_checkpoint().config
    assert (checkpoint.epoch, checkpoint.step, checkpoint.score) == (3, 40, 12.5)
    assert {"model.safetensors", "config.json"} <= set(checkpoint.files)
    assert torch.equal(loaded.predict(IMAGES, PROMPTS, SEEDS), model.predict(IMAGES, PROMPTS, SEEDS))
    for module in loaded.modules:
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf")])
def test_an_undefined_score_costs_no_checkpoint(tmp_path: Path, folder: Path, score: float) -> None:
    """It is kept where no scene of the validation has the figure; earlier versions wrote NaN, which JSON lacks."""
    written = save_checkpoint(unet.build(UNET, 3, 1), tmp_path / "new", make_checkpoint(score=score))
    assert "NaN" not in (tmp_path / "new" / CARD).read_text()
    assert read_checkpoint(tmp_path / "new") == written
    assert written.score is None
    card = json.loads((folder / CARD).read_text())
    (folder / CARD).write_text(json.dumps({**card, "score": score}))
    assert read_checkpoint(folder).score is None
    (folder / CARD).write_text(json.dumps({**card, "transform": {**card["transform"], "low": [score, 0.1, 0.2]}}))
    with pytest.raises(ModelError, match="a number that JSON does not have"):
        read_checkpoint(folder)


def test_an_instruct_pix2pix_comes_back_as_it_was(tmp_path: Path) -> None:
    config = config_of(text_encoder="trained")
    model = InstructPix2Pix(make_parts(), config)
    about = Checkpoint(RunConfig(data=DATA, model=config), InputTransform("pnr", "physical"), "d", 1, 2, None, {})
    written = save_checkpoint(model, tmp_path / "checkpoint", about)
    loaded, checkpoint = load_checkpoint(tmp_path / "checkpoint")
    assert checkpoint == written
    assert checkpoint.score is None
    parts = ("vae/diffusion_pytorch_model", "unet/diffusion_pytorch_model", "text_encoder/model")
    assert {f"{part}.safetensors" for part in parts} == {n for n in checkpoint.files if n.endswith(".safetensors")}
    assert torch.equal(loaded.predict(IMAGES, PROMPTS, SEEDS), model.predict(IMAGES, PROMPTS, SEEDS))
    assert len(loaded.modules) == 2
    assert not any(p.requires_grad for module in loaded.modules for p in module.parameters())


def _edit(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def _card(**changes: object) -> Callable[[Path], object]:
    def change(content: bytes) -> bytes:
        return json.dumps({**json.loads(content), **changes}).encode()

    return _edit(CARD, change)


def _swap_for_link(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.rename(folder.parent / "elsewhere.safetensors")
    weights.symlink_to(folder.parent / "elsewhere.safetensors")


@pytest.mark.parametrize(
    ("damage", "named", "says"),
    [
        (_edit("model.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])), "model.safetensors", "digest"),
        (_edit("config.json", lambda b: b.replace(b"resnet18", b"resnet34")), "config.json", "digest"),
        (_edit("config.json", lambda b: b[:20]), "config.json", "digest"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors", "missing"),
        (lambda f: (f / "config.json").unlink(), "config.json", "missing"),
        (lambda f: shutil.copy(f / "model.safetensors", f / "more.safetensors"), "more.safetensors", "not named"),
        (lambda f: (f / "pytorch_model.bin").write_bytes(b""), "pytorch_model.bin", "refused"),
        (lambda f: (f / "optimizer.PT").write_bytes(b""), "optimizer.PT", "refused"),
        (lambda f: (f / "pipeline.py").write_text(""), "pipeline.py", "refused"),
        (_swap_for_link, "model.safetensors", "refused"),
        (lambda f: (f / "link").symlink_to(f.parent), "link", "refused"),
        (lambda f: (f / CARD).unlink(), CARD, "not a checkpoint"),
        (_edit(CARD, lambda b: b[:200]), CARD, "damaged"),
        (_edit(CARD, lambda b: b"\xff\xfe"), CARD, "damaged"),
        (_edit(CARD, lambda b: b"[]"), CARD, "damaged"),
        (_edit(CARD, lambda b: b"{}"), CARD, "damaged"),
        (_card(format=2), CARD, "another version .*expected 1"),
        (_card(files=[1]), CARD, "damaged"),
        (_card(epoch="three"), CARD, "damaged"),
        (_card(transform={"variant": "pnr"}), CARD, "damaged"),
        (_card(config={"data": {}}), CARD, "damaged"),
        (_card(files={}), "model.safetensors", "not named"),
        (_card(files={"../other.safetensors": "0"}), "other.safetensors", "missing"),
    ],
)
def test_what_is_damaged_is_named(folder: Path, damage: Callable[[Path], object], named: str, says: str) -> None:
    damage(folder)
    with pytest.raises(ModelError, match=says) as error:
        load_checkpoint(folder)
    assert named in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_note_beside_the_weights_does_no_harm(folder: Path) -> None:
    (folder / "NOTES.md").write_text("mine")
    assert read_checkpoint(folder).epoch == 3


def test_a_model_that_does_not_fit_its_card_is_an_error(folder: Path) -> None:
    """The card says InstructPix2Pix, the files are a U-Net's."""
    content = json.loads((folder / CARD).read_text())
    content["config"]["model"] = config_of().model_dump(mode="json")
    (folder / CARD).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="not an InstructPix2Pix pipeline") as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value)


def test_a_later_save_replaces_the_folder_whole(folder: Path) -> None:
    (folder / "NOTES.md").write_text("of the former one")
    save_checkpoint(unet.build(UNET, 3, 2), folder, make_checkpoint(epoch=4))
    assert read_checkpoint(folder).epoch == 4
    assert not (folder / "NOTES.md").exists()
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def _half_written(error: BaseException) -> Callable[[UNet, Path], None]:
    def save(model: UNet, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    return save


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: No space left on device")]
)
def test_a_full_disk_keeps_the_previous_checkpoint(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(UNet, "save", _half_written(error))
    model = unet.build(UNET, 3, 2)
    with pytest.raises(ModelError, match=r"No space left.*previous one is kept"):
        save_checkpoint(model, folder, make_checkpoint(epoch=4))
    assert read_checkpoint(folder).epoch == 3
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]
    with pytest.raises(ModelError, match="cannot be written") as caught:
        save_checkpoint(model, folder.with_name("new"), make_checkpoint())
    assert "previous" not in str(caught.value)
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_an_interrupt_while_writing_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNet, "save", _half_written(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(unet.build(UNET, 3, 2), folder, make_checkpoint(epoch=4))
    assert read_checkpoint(folder).epoch == 3
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_a_failing_rename_puts_the_previous_one_back(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name.endswith(".partial"):
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(ModelError, match=r"Input/output error.*previous one is kept"):
        save_checkpoint(unet.build(UNET, 3, 2), folder, make_checkpoint(epoch=4))
    monkeypatch.undo()
    assert read_checkpoint(folder).epoch == 3
    assert [p.name for p in folder.parent.iterdir()] == ["checkpoint"]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="cannot be written"):
        save_checkpoint(unet.build(UNET, 3, 2), tmp_path / "file" / "checkpoint", make_checkpoint())
