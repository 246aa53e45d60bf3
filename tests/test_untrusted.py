"""A checkpoint from outside is checked, or refused by name, before a library reads it."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import shutil
import socket
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_checkpoint import UNET, make_checkpoint
from test_models import IMAGES, PROMPTS, SEEDS, config_of, make_parts

from crism_mlops.config import DataConfig, RunConfig
from crism_mlops.dataset.variants import InputTransform
from crism_mlops.errors import EvaluationError, ModelError, SceneError, UntrustedError
from crism_mlops.models import instruct_pix2pix, unet
from crism_mlops.models.checkpoint import (
    CARD,
    Checkpoint,
    file_digest,
    load_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.parts import load_autoencoder, load_parts
from crism_mlops.models.residual import LinearResidual
from crism_mlops.untrusted import check_folder, check_name, disguised, read_json, tensor_shapes

Damage = Callable[[Path], object]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a small InstructPix2Pix; look, don't touch."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    config = RunConfig(data=DataConfig(source="simulated", resolution=32), model=config_of())
    transform = InputTransform("pnr", "physical", low=(0.0, 0.1, 0.2), high=(0.5, 0.6, 0.7))
    residual = LinearResidual(((1.0, 0.0, 0.0),) * 3, (0.0, 0.5, 1.0), 0.25)
    about = Checkpoint(config, transform, "0123", 1, 2, 3.5, {}, seen={"train": ("a", "b")}, residual=residual)
    save_checkpoint(InstructPix2Pix(make_parts(), config_of(), residual=residual), folder, about)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    shutil.copytree(saved, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def _write(name: str, content: bytes) -> Damage:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)

    return write


def _json(name: str, **changes: Any) -> Damage:
    """Keys of a JSON file set to other values; in a card, `files` too."""

    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**content, **changes}))

    return change


def _signed(folder: Path) -> None:
    """Whoever sends a folder writes its card as well: every digest fits."""
    content = json.loads((folder / CARD).read_text())
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file() and p.name != CARD)
    content["files"] = {name: file_digest(folder / name) for name in names}
    (folder / CARD).write_text(json.dumps(content))


def _zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"\0" * 100_000)
    return buffer.getvalue()


def _tensors(header: dict[str, Any] | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _of(shape: list[int], end: int, kind: str = "F32") -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [0, end]}


UNET_WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
DEEP = b'{"a":' * 100_000 + b"1" + b"}" * 100_000


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        # Pickles and archives under other names.
        (_write(UNET_WEIGHTS, pickle.dumps({"a": 1})), r"diffusion_pytorch_model\.safetensors: .*a pickle"),
        (_write(UNET_WEIGHTS, _zip()), "a zip archive"),
        (_write("unet/config.json", _zip()), r"unet/config\.json: .*a zip archive"),
        (_write("tokenizer/tokenizer.json", pickle.dumps([1])), r"tokenizer\.json: .*a pickle"),
        (_write("tokenizer/merges.txt", pickle.dumps([1])), r"merges\.txt: .*a pickle"),
        (_write("weights.npz", _zip()), r"weights\.npz: refused"),
        (_write("unet/diffusion_pytorch_model.bin", _zip()), r"model\.bin: refused"),
        (_write("text_encoder/modeling.py", b""), r"modeling\.py: refused"),
        # Headers.
        (_write(UNET_WEIGHTS, _tensors({}, length=10 << 30)), "header claims"),
        (_write(UNET_WEIGHTS, _tensors({}, length=2**63)), "header claims"),
        (_write(UNET_WEIGHTS, b"{}"), "cannot be read as safetensors"),
        (_write(UNET_WEIGHTS, b""), "cannot be read as safetensors"),
        # Classes and files from elsewhere.
        (_json("model_index.json", unet=["os", "system"]), r"model_index\.json: refused, unet is"),
        (_json("model_index.json", unet=["my_module", "UNet"]), "expected diffusers's UNet2DConditionModel"),
        (_json("model_index.json", extra=["subprocess", "Popen"]), "no such part"),
        (_json("model_index.json", _class_name=["my_pipeline", "Mine"]), "its class is"),
        (_json("model_index.json", text_encoder=["transformers", "AutoModel"]), "text_encoder is"),
        (_json("unet/config.json", auto_map={"AutoModel": "evil/repo--m.M"}), r"config\.json: .*key auto_map"),
        (_json("text_encoder/config.json", trust_remote_code=True), "key trust_remote_code"),
        (_json("text_encoder/config.json", _attn_implementation="evil/kernel"), "key _attn_implementation"),
        (_json("text_encoder/config.json", x={"y": [{"quantization_config": {}}]}), "key quantization_config"),
        (_json("tokenizer/tokenizer_config.json", vocab_file="/etc/passwd"), "key vocab_file"),
        (_json("tokenizer/tokenizer_config.json", tokenizer_class="GPT2Tokenizer"), "it is a GPT2Tokenizer"),
        (_json("unet/config.json", _class_name="AutoencoderKL"), "it holds a AutoencoderKL"),
        (_write("text_encoder/adapter_config.json", b"{}"), "another model's weights"),
        (_write("vae/more.json", b"{}"), r"vae/more\.json: refused"),
        # More memory than there are weights.
        (_json("unet/config.json", block_out_channels=[10**9, 10**9]), "the number 1000000000"),
        (_json("unet/config.json", block_out_channels=[99_968, 99_968, 99_968]), "of one model|can be made"),
        (_json("unet/config.json", layers_per_block=90_000), "layers or more"),
        (_json("text_encoder/config.json", num_hidden_layers=900_000), "layers or more"),
        (_json("text_encoder/config.json", vocab_size=999_999), "a model of"),
        (_json("scheduler/scheduler_config.json", num_train_timesteps=999_999), "num_train_timesteps"),
        (_json("unet/config.json", norm_num_groups="many"), "can be made of it"),
        # JSON.
        (_write("unet/config.json", DEEP), r"unet/config\.json: .*too deeply"),
        (_write("unet/config.json", b'{"a": 1' + b"0" * 5000 + b"}"), "cannot be read as JSON"),
        (_write("unet/config.json", b'{"a": NaN}'), "NaN is no number"),
        (_write("unet/config.json", b'{"a": 1e999}'), "too large"),
        (_write("unet/config.json", b'{"a": 1, "a": 2}'), "stands twice"),
        (_write("unet/config.json", b"[]"), "expected keys"),
        (_write("unet/config.json", b"\xff\xfe{"), "cannot be read as JSON"),
    ],
)  # fmt: skip
def test_a_folder_whose_digests_fit_is_refused_by_name(folder: Path, damage: Damage, says: str) -> None:
    damage(folder)
    _signed(folder)
    with pytest.raises(ModelError, match=says) as error:
        load_checkpoint(folder)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd", "/etc/passwd", "unet/../../x", "C:\\x", "C:x", "..\\x", "a\0b", "a//b", "", ".", "a/./b",
        "a\nb", "x" * 300,
    ],
)  # fmt: skip
def test_names_that_lead_out_of_the_folder(folder: Path, name: str) -> None:
    content = json.loads((folder / CARD).read_text())
    content["files"][name] = "0" * 64
    (folder / CARD).write_text(json.dumps(content))
    with pytest.raises(ModelError, match="leads out of its folder") as error:
        read_checkpoint(folder)
    assert "\n" not in str(error.value)


def test_a_name_of_no_text_is_refused() -> None:
    with pytest.raises(UntrustedError, match="leads out"):
        check_name(7, Path("list.json"))
    assert check_name("unet/config.json", Path("list.json")) == "unet/config.json"


def test_links_pipes_and_devices_are_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer" / "added_tokens.json").symlink_to("/etc/hostname")
    with pytest.raises(ModelError, match=r"added_tokens\.json: refused, it is a link"):
        read_checkpoint(folder)
    (folder / "tokenizer" / "added_tokens.json").unlink()
    (folder / "more").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(ModelError, match="more: refused, it is a link"):
        read_checkpoint(folder)
    (folder / "more").unlink()
    # Opened for reading, a pipe would never answer.
    os.mkfifo(folder / "tokenizer" / "added_tokens.json")
    with pytest.raises(ModelError, match="no ordinary file"):
        read_checkpoint(folder)
    with pytest.raises(UntrustedError, match="no ordinary file"):
        read_json(folder / "tokenizer" / "added_tokens.json")
    (folder / "tokenizer" / "added_tokens.json").unlink()
    # The name that the user gives may be a link: it is theirs.
    (tmp_path / "latest").symlink_to(folder)
    assert read_checkpoint(tmp_path / "latest").epoch == 1


def test_too_many_and_too_large_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.untrusted.MAX_FILES", 3)
    for name in "abcd":
        (tmp_path / name).write_text("{}")
    with pytest.raises(UntrustedError, match="more than 3 files"):
        check_folder(tmp_path)
    with (tmp_path / "a").open("wb") as sparse:
        sparse.truncate(10 << 30)
    with pytest.raises(UntrustedError, match="more than"):
        read_json(tmp_path / "a")


@pytest.mark.parametrize(
    "content",
    [
        # What safetensors refuses itself, held here so that a version that does not is noticed.
        _tensors({"a": _of([4], 16), "b": _of([4], 16)}),
        _tensors({"a": _of([400], 1600)}),
        _tensors({"a": _of([2], 8)}),
        _tensors({"a": _of([2**38, 4], 16)}),
        _tensors({"__metadata__": {"a": 1}, "a": _of([4], 16)}),
        # What it lets through.
        _tensors({"a": _of([2**62, 0], 0)}, b""),
        _tensors({"a": _of([1] * 5000, 4)}, b"\0" * 4),
        _tensors({"a": _of([8], 4, "F4")}, b"\0" * 4),
        _tensors(b'{"a":%s,"a":%s}' % ((json.dumps(_of([4], 16)).encode(),) * 2)),
        _tensors({str(i): _of([0], 0) for i in range(20_001)}, b""),
        _tensors({"a": _of([4], 16, "X99")}),
        _tensors({"a": _of([-4], 16)}),
        _tensors({"a": [1]}),
        _tensors(DEEP),
        _tensors(b" " * (9 << 20)),
    ],
)
def test_safetensors_headers(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(UntrustedError, match=r"x\.safetensors: cannot be read as safetensors, refused"):
        tensor_shapes(path)


def test_a_header_is_no_pickle_by_its_length(tmp_path: Path) -> None:
    """A header of 0x0280 bytes begins as a pickle of protocol 2 does."""
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": _of([4], 16)}).encode().ljust(0x0280)
    path.write_bytes(_tensors(text))
    assert disguised(path) is None
    assert tensor_shapes(path) == {"a": (4,)}


def test_a_shard_index_names_files_beside_it_only(folder: Path) -> None:
    place = folder / "unet" / "diffusion_pytorch_model.safetensors"
    place.rename(folder / "unet" / "part-1.safetensors")
    index = folder / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    for name in ("../../x.safetensors", "sub/x.safetensors", "pytorch_model.bin"):
        index.write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
        _signed(folder)
        with pytest.raises(ModelError, match=r"index\.json: "):
            load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_model_class": "from_pretrained"}, "its class is 'from_pretrained'"),
        ({"_model_class": "create_model"}, "its class is"),
        ({"encoder_name": "tu-hf-hub:evil/model"}, "its encoder is"),
        ({"encoder_name": "resnet34"}, "its encoder is 'resnet34', its card says 'resnet18'"),
        ({"in_channels": 10**9}, "channels"),
        ({"in_channels": 4}, "of another model"),
    ],
)
def test_a_unet_is_made_of_its_card(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(unet.build(UNET, 3, 1), folder, make_checkpoint())
    _json("config.json", **changes)(folder)
    _signed(folder)
    with pytest.raises(ModelError, match=says):
        load_checkpoint(folder)


def test_a_card_cannot_name_an_encoder_of_the_hub(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    save_checkpoint(unet.build(UNET, 3, 1), folder, make_checkpoint())
    for encoder in ("tu-hf-hub:evil/model", "tu-local-dir:/etc", "../x"):
        config = json.loads((folder / CARD).read_text())["config"]
        config["model"]["encoder"] = encoder
        _json(CARD, config=config)(folder)
        _json("config.json", encoder_name=encoder)(folder)
        _signed(folder)
        with pytest.raises(ModelError, match="not a saved U-Net"):
            load_checkpoint(folder)


def test_loading_asks_nobody_and_reads_nothing_elsewhere(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever pretrained models the card names: a checkpoint is whole."""
    config = json.loads((folder / CARD).read_text())["config"]
    config["model"] |= {"pretrained": "evil/pipeline", "input_vae": "/nowhere/vae"}
    _json(CARD, config=config)(folder)
    for part in ("unet", "vae", "text_encoder"):
        _json(f"{part}/config.json", _name_or_path="evil/part")(folder)
    _signed(folder)
    asked: list[object] = []

    def refuse(self: socket.socket, address: object) -> None:
        asked.append(address)
        raise OSError("no network in this test")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *words, **_: refuse(None, words))  # type: ignore[arg-type]
    model, checkpoint = load_checkpoint(folder)
    assert checkpoint.config.model.pretrained == "evil/pipeline"  # type: ignore[union-attr]
    assert len(model.predict(IMAGES, PROMPTS, SEEDS)) == 4
    assert asked == []


def test_a_checkpoint_that_names_a_file_of_filters_is_refused(folder: Path) -> None:
    config = json.loads((folder / CARD).read_text())["config"]
    config["data"]["filters"] = "/etc/passwd"
    _json(CARD, config=config)(folder)
    with pytest.raises(ModelError, match="names a file of filters"):
        read_checkpoint(folder)


def _cached(folder: Path, cache: Path) -> Path:
    """A pipeline as the hub's client lays it out: a snapshot of links into blobs."""
    place, blobs = cache / "models--some--pipeline", cache / "models--some--pipeline" / "blobs"
    snapshot = place / "snapshots" / ("0" * 40)
    blobs.mkdir(parents=True)
    for path in (p for p in folder.rglob("*") if p.is_file() and p.name != CARD):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blobs / file_digest(path))
        link.symlink_to(os.path.relpath(blobs / file_digest(path), link.parent))
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("0" * 40)
    return snapshot


def test_a_pipeline_of_the_hub_is_checked_in_the_cache(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Links into the cache's own blobs are the cache's way; others are refused."""
    cache = tmp_path / "hub"
    snapshot = _cached(folder, cache)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(cache))
    assert len(load_parts("some/pipeline")["tokenizer"]) >= 256
    (snapshot / "vae" / "config.json").unlink()
    for elsewhere in (Path("/etc/hostname"), Path("/dev/null"), tmp_path / "nothing", cache):
        (snapshot / "vae" / "config.json").symlink_to(elsewhere)
        with pytest.raises(ModelError, match=r"a link to something other than a file in .*blobs"):
            load_parts("some/pipeline")
        (snapshot / "vae" / "config.json").unlink()


def test_an_autoencoder_in_the_hub_s_cache_is_loaded(folder: Path, tmp_path: Path) -> None:
    """By itself, as a repository of one, and as a part of a pipeline's."""
    for place in (_cached(folder, tmp_path / "hub") / "vae", _cached(folder / "vae", tmp_path / "alone")):
        assert load_autoencoder("vae", str(place), 3).config.in_channels == 3
        (place / "more.json").symlink_to("/etc/hostname")
        with pytest.raises(ModelError, match=r"more\.json: refused, it is a link to something other"):
            load_autoencoder("vae", str(place), 3)
    # Whoever sends a folder may call one blobs, and have it lead elsewhere.
    blobs = tmp_path / "alone" / "models--some--pipeline" / "blobs"
    (place / "more.json").unlink()
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ModelError, match="refused, it is a link"):
        load_autoencoder("vae", str(place), 3)


def test_a_user_s_pipeline_with_a_linked_part_is_refused_with_a_way_out(folder: Path, tmp_path: Path) -> None:
    shutil.move(folder / "vae", tmp_path / "vae")
    (folder / "vae").symlink_to(tmp_path / "vae")
    with pytest.raises(UntrustedError, match=r"vae: refused, it is a link; .*cp -rL"):
        load_parts(str(folder))


def test_a_pipeline_with_a_dpm_solver_is_loaded(folder: Path, tmp_path: Path) -> None:
    """diffusers writes lambda_min_clipped as -Infinity; a model that is made of it keeps the key."""
    (folder / CARD).unlink()
    DPMSolverMultistepScheduler().save_pretrained(folder / "scheduler")  # type: ignore[no-untyped-call] # no types
    assert "-Infinity" in (folder / "scheduler" / "scheduler_config.json").read_text()
    config = config_of(pretrained=str(folder), sampler="dpm++")
    run = RunConfig(data=DataConfig(source="simulated", resolution=32), model=config)
    about = Checkpoint(run, InputTransform("pnr", "physical"), "0123", 1, 2, 3.5, {})
    save_checkpoint(instruct_pix2pix.build(config, 1), tmp_path / "made", about)
    model, _ = load_checkpoint(tmp_path / "made")
    assert len(model.predict(IMAGES, PROMPTS, SEEDS)) == 4
    _json("unet/config.json", dropout=-math.inf)(folder)
    with pytest.raises(UntrustedError, match="-Infinity is no number"):
        load_parts(str(folder))


def test_a_published_pipeline_may_hold_what_is_not_read(folder: Path) -> None:
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(_zip())
    (folder / CARD).unlink()
    assert load_parts(str(folder))["unet"].config.in_channels == 8
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ModelError, match="weights are read from safetensors only"):
        load_parts(str(folder))


# ---- the card, mutated

_ANY = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def _places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(place for key, value in inner for place in _places(value, (*path, key)))][(not path) :]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_card_is_read_or_refused(saved: Path, data: st.DataObject) -> None:
    content = json.loads((saved / CARD).read_text())
    before = read_checkpoint(saved)
    place = data.draw(st.sampled_from(_places(content)))
    here = content
    for key in place[:-1]:
        here = here[key]
    if data.draw(st.booleans()) and isinstance(here, dict):
        del here[place[-1]]
    else:
        here[place[-1]] = data.draw(_ANY)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "checkpoint"
        shutil.copytree(saved, folder, copy_function=os.link)
        (folder / CARD).unlink()
        (folder / CARD).write_text(json.dumps(content))
        try:
            after = read_checkpoint(folder)
        except ModelError as error:
            assert "\n" not in str(error)  # noqa: PT017 -- either way is right
            return
    # What was admitted can be used as the other is.
    assert type(after.transform) is type(before.transform)
    assert after.files == before.files
    assert isinstance(after.epoch, int)
    assert isinstance(after.config, RunConfig)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=400))
@example(b"\x80\x04\x95")
@example(_zip())
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x"
        path.write_bytes(content)
        for read in (read_json, tensor_shapes):
            try:
                assert isinstance(read(path), dict)
            except UntrustedError as error:
                assert "\n" not in str(error)  # noqa: PT017 -- either way is right


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.integers(0, 3000), byte=st.integers(0, 255), kept=st.none() | st.integers(0, 3000))
def test_any_header_is_read_or_refused(saved: Path, place: int, byte: int, kept: int | None) -> None:
    from safetensors.torch import load_file

    weights = bytearray((saved / "vae" / "diffusion_pytorch_model.safetensors").read_bytes())
    weights[place] = byte
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        path.write_bytes(weights[:kept])
        try:
            shapes = tensor_shapes(path)
        except UntrustedError:
            return
        assert {key: tuple(tensor.shape) for key, tensor in load_file(path).items()} == shapes


# ---- pictures and arrays

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(x) run\n%%EOF\n"


def test_a_picture_is_a_png_and_nothing_else(tmp_path: Path) -> None:
    from crism_mlops.scenes.sources import picture_bands
    from crism_mlops.studies.images import _picture

    path = tmp_path / "a.png"
    path.write_bytes(EPS)
    with Image.open(path) as picture:
        assert picture.format == "EPS"  # What Ghostscript would have been started for.
    with pytest.raises(SceneError, match="not a readable picture"):
        picture_bands(path)
    with pytest.raises(OSError, match="cannot identify"):
        _picture(path)
    Image.new("RGB", (4, 4)).save(path)
    assert picture_bands(path).shape == _picture(path).shape == (4, 4, 3)


def test_an_array_that_claims_more_than_it_has(tmp_path: Path) -> None:
    from crism_mlops.studies.images import _array

    path = tmp_path / "a.npy"
    np.save(path, np.zeros((2, 2, 3), np.float32))
    assert _array(path, (2, 2, 3)).shape == (2, 2, 3)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(2, 2, 3), }", b"(999999,3),}"))
    with pytest.raises(ValueError, match=r"larger|greater|size"):
        _array(path, (2, 2, 3))
    with path.open("wb") as sparse:
        np.lib.format.write_array_header_1_0(sparse, {"descr": "<f4", "fortran_order": False, "shape": (1 << 33,)})
        sparse.truncate((1 << 35) + 4096)
    assert _array(path, (2, 2, 3)).shape == (1 << 33,)
    np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match=r"Python objects|allow_pickle"):
        _array(path, (2, 2, 3))
    path.write_bytes(_zip())
    with pytest.raises(ValueError, match="archive"):
        _array(path, (2, 2, 3))


def test_weights_of_lpips_are_safetensors(tmp_path: Path) -> None:
    from crism_mlops.evaluation.lpips_weights import _read_safetensors

    torch.save({"features.0.weight": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(EvaluationError, match="a zip archive"):
        _read_safetensors(tmp_path / "a.safetensors")
