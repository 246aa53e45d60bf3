"""What the doctor counts, held against what is really built, written and kept."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from console import console
from test_cli import Ran
from torch.autograd.graph import saved_tensors_hooks
from trackers import small_sweep

from crism_mlops.config import (
    DataConfig,
    EngineConfig,
    InstructPix2PixModel,
    LoraConfig,
    RunConfig,
    ScratchUNet,
    SplitConfig,
    SweepConfig,
    TrainConfig,
    UNetModel,
)
from crism_mlops.dataset.count import SceneCount, count_scenes
from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.errors import ModelError, SceneError
from crism_mlops.models import instruct_pix2pix, parts, unet, weights
from crism_mlops.models.blueprint import Blueprint, Part, blueprint, pretrained
from crism_mlops.models.counting import Work
from crism_mlops.models.latents import LatentCache
from crism_mlops.models.resume import ResumeFolder
from crism_mlops.models.rows import Rows
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.build import open_store
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.studies import machine, needs, verdicts
from crism_mlops.studies.machine import Gpu, Machine
from crism_mlops.studies.needs import Case, Memory, Need
from crism_mlops.training import train

ROOT = Path(__file__).parents[1]
QUICK_IP2P, QUICK_UNET = (ROOT / "sweeps" / f"quickstart-{kind}.yaml" for kind in ("ip2p", "unet"))
ENGINE = EngineConfig()
GB = 10**9
HERE = Machine("cpu", (), 2, 32 * GB, 16 * GB, "g++", {})
# The published configurations of Stable Diffusion 1.5, with InstructPix2Pix's 8 input channels.
SD15 = {
    "model_index.json": {"_class_name": "StableDiffusionInstructPix2PixPipeline", "_diffusers_version": "0.6.0"},
    "unet/config.json": {
        "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": False, "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
        "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0, "in_channels": 8, "layers_per_block": 2,
        "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    },
    "vae/config.json": {
        "_class_name": "AutoencoderKL", "_diffusers_version": "0.6.0", "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512], "down_block_types": ["DownEncoderBlock2D"] * 4, "in_channels": 3,
        "latent_channels": 4, "layers_per_block": 2, "norm_num_groups": 32, "out_channels": 3, "sample_size": 512,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
    },
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"], "attention_dropout": 0.0, "bos_token_id": 0, "dropout": 0.0,
        "eos_token_id": 2, "hidden_act": "quick_gelu", "hidden_size": 768, "initializer_factor": 1.0,
        "initializer_range": 0.02, "intermediate_size": 3072, "layer_norm_eps": 1e-05, "max_position_embeddings": 77,
        "model_type": "clip_text_model", "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1,
        "projection_dim": 768, "torch_dtype": "float32", "transformers_version": "4.22.0.dev0", "vocab_size": 49408,
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerAncestralDiscreteScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "prediction_type": "epsilon",
    },
}  # fmt: skip


Doctor = Callable[..., Ran]


@pytest.fixture
def doctor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Calls the command as the console script does, with `changes` as `--set` options."""

    def call(file: object, *options: str, changes: Sequence[str] = ()) -> Ran:
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        settings = [word for change in changes for word in ("--set", change)]
        ran = console(["doctor", file, *options, *settings], monkeypatch, capsys)
        return Ran(ran.code, ran.out, ran.err)

    return call


def plain(ran: Ran) -> str:
    """What a table says, without its lines."""
    return " ".join(ran.out.replace("│", " ").split())


def tiny(**options: Any) -> InstructPix2PixModel:
    return InstructPix2PixModel(kind="instruct_pix2pix", **{"pretrained": "tiny", **options})


def resnet18(**options: Any) -> UNetModel:
    return UNetModel(kind="unet", **{"encoder": "resnet18", "encoder_weights": None, **options})


@cache
def counted(model: InstructPix2PixModel | UNetModel, channels: int = 3, half: bool = False) -> Blueprint:
    found = blueprint(model, channels, 64, ENGINE, half)
    assert found is not None
    return found


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# Counting a model.


@pytest.mark.parametrize(
    "model",
    [
        tiny(),
        tiny(text_encoder="trained"),
        tiny(text_encoder="trained", lora=LoraConfig(rank=4)),
        tiny(scratch_unet=ScratchUNet(block_channels=(32, 64))),
    ],
)
def test_instruct_pix2pix_is_counted_as_it_is_built(model: InstructPix2PixModel) -> None:
    real, found = instruct_pix2pix.build(model, 0), counted(model)
    modules = (real.unet, real.text_encoder, real.vae)
    assert [part.parameters for part in found.parts] == [parameters(module) for module in modules]
    groups = real.parameter_groups(1e-4, None)
    assert found.trained == sum(p.numel() for group in groups for p in group["params"])
    assert found.bytes == sum(t.nbytes for module in modules for t in module.state_dict().values())


@pytest.mark.parametrize(("model", "channels"), [(resnet18(), 3), (resnet18(), 4), (resnet18(encoder="mit_b0"), 3)])
def test_unet_is_counted_as_it_is_built(model: UNetModel, channels: int) -> None:
    real, found = unet.build(model, channels, 0), counted(model, channels)
    assert [(p.parameters, p.trained) for p in found.parts] == [(parameters(real.module), parameters(real.module))]
    assert found.bytes == sum(t.nbytes for t in real.module.state_dict().values())


def test_the_saved_model_and_the_state_are_as_large_as_said(tmp_path: Path) -> None:
    for place, model in ((tmp_path / "a", tiny(text_encoder="trained")), (tmp_path / "b", tiny(lora=LoraConfig()))):
        real, found, config = instruct_pix2pix.build(model, 0), counted(model), TrainConfig(epochs=1, ema_decay=0.9)
        real.save(place / "saved")
        assert size(place / "saved") == pytest.approx(found.checkpoint_bytes, rel=0.05)
        rows = {"condition": 4, "mean": 4, "std": 4, "weight": 1}
        data = Rows([{**{name: torch.rand(2, n, 16, 16) for name, n in rows.items()}, **words(real)}])
        resume = ResumeFolder(place / "resume", "one")
        train(real, data, torch.ones(2, dtype=torch.float64), config, 0, engine=ENGINE, resume=resume)
        case = Case({}, run_config(model, ema_decay=0.9), found)
        (state,) = (need for need in disk_of(case) if need.what == "state to resume from")
        # Names and random generators come on top.
        assert size(place / "resume") == pytest.approx(state.least, rel=0.02, abs=100_000)
        assert state.most == 2 * state.least


def words(model: instruct_pix2pix.InstructPix2Pix) -> dict[str, torch.Tensor]:
    tokens = model.tokenize(["Predict carbonates"] * 2)
    return {"tokens": tokens} if model.trains_text else {"text": model._embed(tokens)}


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_activations_are_what_autograd_keeps() -> None:
    def kept(module: torch.nn.Module, forward: Callable[[], Any]) -> int:
        found: list[torch.Tensor] = []
        with saved_tensors_hooks(lambda t: found.append(t) or t, lambda t: t):
            out = forward()
        own = {t.untyped_storage().data_ptr() for t in module.state_dict().values()}
        sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in found}
        del out
        return sum(size for place, size in sizes.items() if place not in own)

    real = instruct_pix2pix.build(tiny(), 0).unet
    real.train()
    two, four = (
        kept(real, lambda n=n: real(torch.zeros(n, 8, 32, 32), torch.zeros(n).long(), torch.zeros(n, 77, 64)).sample)
        for n in (2, 4)
    )
    # The most that is held has what the last operation needs beside what is kept.
    assert 1.0 <= counted(tiny()).work.activation_bytes / ((four - two) / 2) < 1.1  # type: ignore[operator]
    plain = unet.build(resnet18(), 3, 0).module.train()
    two, four = (kept(plain, lambda n=n: plain(torch.zeros(n, 3, 64, 64))) for n in (2, 4))
    assert 1.0 <= counted(resnet18()).work.activation_bytes / ((four - two) / 2) < 1.1  # type: ignore[operator]


def test_half_precision_halves_activations_and_copies_weights() -> None:
    whole, half = counted(resnet18()), counted(resnet18(), half=True)
    assert half.work.activation_bytes == pytest.approx(0.5 * whole.work.activation_bytes, rel=0.1)  # type: ignore[operator]
    assert half.work.cast_bytes == pytest.approx(whole.bytes / 2, rel=0.05)
    assert (half.bytes, whole.work.cast_bytes) == (whole.bytes, 0)


def test_published_shapes_before_a_file_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    model = InstructPix2PixModel(kind="instruct_pix2pix")
    found = blueprint(model, 3, 512, ENGINE, False)
    assert found is not None
    assert [part.parameters for part in found.parts] == [859_532_484, 123_060_480, 83_653_863]
    # TFLOP, as they were counted of the real modules.
    assert found.work.forward_flops == pytest.approx(0.803e12, rel=1e-3)
    assert found.work.encode_flops == pytest.approx(1.117e12, rel=1e-3)
    assert found.work.decode_flops == pytest.approx(2.515e12, rel=1e-3)
    assert found.work.step_flops == pytest.approx(3 * 0.803e12, rel=5e-3)
    assert found.work.target_bytes + found.work.condition_bytes == (3 * 4 + 1) * 64 * 64 * 4


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="multiples of 16"):
        counted(tiny(scratch_unet=ScratchUNet(block_channels=(30, 60))))
    with pytest.raises(ModelError, match="gradient_checkpointing"):
        blueprint(resnet18(), 3, 64, EngineConfig(gradient_checkpointing=True), False)
    folder = shutil.copytree(parts.tiny_folder(), tmp_path / "tiny")
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 4}))
    with pytest.raises(ModelError, match="4 input channels, the autoencoders of input and target make 4"):
        counted(tiny(pretrained=str(folder)))
    (folder / "unet" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="configuration that cannot be used"):
        counted(tiny(pretrained=str(folder), steps=3))
    (folder / "unet" / "config.json").write_text("[")
    with pytest.raises(ModelError, match=r"config\.json: cannot be read"):
        counted(tiny(pretrained=str(folder), steps=4))


def test_an_autoencoder_of_four_bands(tmp_path: Path) -> None:
    config = json.loads((parts.tiny_folder() / "vae" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "in_channels": 4}))
    model = tiny(input_vae=str(tmp_path))
    found, plain = counted(model, channels=4), counted(tiny())
    assert [part.name for part in found.parts] == ["U-Net", "text encoder", "autoencoder", "input autoencoder"]
    assert found.parts[3].parameters == plain.parts[2].parameters + 32 * 9, "one more band of 3 x 3 filters"
    assert found.checkpoint_bytes == plain.checkpoint_bytes + found.parts[3].bytes
    _, own = pretrained(model, 4)
    assert own.missing == ("diffusion_pytorch_model.safetensors",)
    assert len(pretrained(model, 3)) == 1, "three bands need none"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="takes 3 channels"):
        blueprint(model, 4, 64, ENGINE, False)


def test_a_network_that_refuses_the_resolution_is_a_problem_in_words() -> None:
    assert "output size is too small" in str(counted(resnet18(architecture="PAN")).work.problem).lower()


def test_checkpointing_computes_forward_again() -> None:
    model = tiny(text_encoder="trained")
    found = blueprint(model, 3, 64, EngineConfig(gradient_checkpointing=True), False)
    assert found is not None
    plain = counted(model).work
    assert found.work.step_flops > 1.2 * plain.step_flops  # type: ignore[operator]
    assert found.work.activation_bytes < 0.6 * plain.activation_bytes  # type: ignore[operator]


# Files.


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tiny model as the hub's cache would hold it under me/tiny; the folder of its files."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--tiny"
    snapshot = repository / "snapshots" / ("a" * 40)
    shutil.copytree(parts.tiny_folder(), snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    return snapshot


def test_files_of_the_hub_cache(cached: Path) -> None:
    found = weights.pipeline(tiny(pretrained="me/tiny"))
    assert (found.missing, found.assumed) == ((), False)
    assert counted(tiny(pretrained="me/tiny")).parts == counted(tiny()).parts
    names = [p.relative_to(cached).as_posix() for p in cached.rglob("*") if p.suffix in (".json", ".safetensors")]
    for name in set(names) - {"measured.json"}:
        content = (cached / name).read_bytes()
        (cached / name).unlink()
        missing = weights.pipeline(tiny(pretrained="me/tiny")).missing
        (cached / name).write_bytes(content)
        # Published pipelines have their words in two files.
        words = ("tokenizer/vocab.json", "tokenizer/merges.txt")
        assert missing == (words if name == "tokenizer/tokenizer.json" else (name,))


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = shutil.copytree(parts.tiny_folder(), tmp_path / "tiny")
    whole = folder / "unet" / "diffusion_pytorch_model.safetensors"
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    whole.with_suffix(".safetensors.index.json").write_text(json.dumps(index))
    whole.rename(whole.with_name("one.safetensors"))
    assert weights.pipeline(tiny(pretrained=str(folder))).missing == ("unet/two.safetensors",)


def test_nothing_of_an_unknown_model_is_there(cached: Path) -> None:
    found = weights.pipeline(tiny(pretrained="me/other"))
    assert found.configs is None
    assert {"unet/config.json", "vae/diffusion_pytorch_model.safetensors"} <= set(found.missing)
    assert blueprint(tiny(pretrained="me/other"), 3, 64, ENGINE, False) is None
    with pytest.raises(ModelError, match="no folder"):
        weights.pipeline(tiny(pretrained="./nowhere"))
    with pytest.raises(ModelError, match=r"model\.vae: no folder"):
        weights.autoencoder("vae", "nowhere")


def test_encoder_weights(cached: Path) -> None:
    model = resnet18(encoder_weights="imagenet")
    found = weights.encoder(model)
    assert found.missing == ("config.json", "model.safetensors")
    assert f"hf download {found.source} NAMES --revision" in found.remedy
    snapshot = cached.parents[2] / f"models--{found.source.replace('/', '--')}" / "snapshots"
    place = snapshot / found.remedy.partition("--revision ")[2].split()[0]
    place.mkdir(parents=True)
    (place / "config.json").touch()
    assert weights.encoder(model).missing == ("model.safetensors",)
    with pytest.raises(ModelError, match="no weights 'imagenett'; it has imagenet"):
        weights.encoder(resnet18(encoder_weights="imagenett"))
    assert weights.encoder(resnet18(encoder="tu-resnet18", encoder_weights="imagenet")).missing == (
        "model.safetensors",
    )


# Arithmetic, by hand.


def run_config(model: Any, **options: Any) -> RunConfig:
    data = DataConfig(source="simulated", resolution=64, views=("whole", "quarters"))
    return RunConfig(data=data, model=model, device="cpu", train=TrainConfig(**options))


def by_hand(**work: Any) -> Blueprint:
    parts = (Part("U-Net", 1000, 600, 4000), Part("text encoder", 200, 100, 800), Part("autoencoder", 50, 0, 200))
    return Blueprint(parts, 4900, 2900, Work(**work))


def disk_of(*cases: Case, scenes: int = 10, **changes: Any) -> list[Need]:
    sweep = small_sweep(model=cases[0].config.model.model_dump(), **changes)
    return needs.disk(sweep, cases, SceneCount(scenes, scenes, 0, 0))


def test_memory_by_hand() -> None:
    work = {
        "activation_bytes": 10_000,
        "cast_bytes": 70,
        "predict_bytes": 3000,
        "condition_bytes": 5,
        "target_bytes": 6,
    }
    case = Case({}, run_config(tiny(), batch_size=4, ema_decay=0.99), by_hand(**work))
    found = needs.memory(case, SceneCount(10, 7, 1, 2))
    assert found == Memory(
        weights=5000, gradients=2800, moments=5600, average=2800, copy=2800, casts=70, sample=10_000, at_once=4,
        predicting=24_000, rows=7 * 5 * 11,
    )  # fmt: skip
    assert found.certain == 5000 + 2800 * 5
    assert found.likely == found.certain + 40_070
    engine = EngineConfig(micro_batch=2)
    less = needs.memory(replace(case, config=case.config.model_copy(update={"engine": engine})), SceneCount(1, 1, 0, 0))
    assert less is not None
    assert (less.at_once, less.likely) == (2, less.certain + 24_000), "predicting takes more"
    adapted = Case({}, run_config(tiny(lora=LoraConfig())), by_hand())
    merged = needs.memory(adapted, SceneCount(1, 1, 0, 0))
    assert merged is not None
    assert merged.copy == 4000 + 800, "both modules with adapters are copied to be merged and saved"
    assert needs.memory(replace(case, blueprint=None), SceneCount(1, 1, 0, 0)) is None


def test_steps_and_operations_by_hand() -> None:
    model = tiny(steps=5, image_guidance=1.5, text_guidance=7.5)
    config = run_config(model, batch_size=8, epochs=10, validate_every=4)
    work = {"step_flops": 300, "forward_flops": 100, "encode_flops": 20, "decode_flops": 30}
    found = needs.time(Case({}, config, by_hand(**work)), SceneCount(30, 10, 9, 11))
    assert (found.samples, found.steps_per_epoch, found.validations) == (50, 7, 3), "at 4, 8 and the last"
    image = 20 + 30 + 5 * 3 * 100
    assert (found.step, found.training, found.once) == (2400, 300 * 50 * 10, 2 * 50 * 20)
    assert found.validating == 3 * 8 * image, "8 scenes are a chunk"
    assert found.scoring == (16 + 16) * image, "9 and 11 scenes are two chunks each"


def test_disk_by_hand() -> None:
    case = Case({}, run_config(tiny(text_encoder="trained"), keep_top=3), by_hand(condition_bytes=5, target_bytes=6))
    found = {need.what: (need.least, need.most) for need in disk_of(case, trials=7)}
    assert found["latents"] == (10 * 5 * 11, 10 * 5 * 11)
    assert found["prompt embeddings"] == (0, 0), "they change with every step"
    assert found["state to resume from"] == (2900 + 2 * 2800, 2 * (2900 + 2 * 2800))
    assert found["best epochs"] == (4900, 4 * 4900)
    assert found["logged models"] == (7 * 4900, 7 * 4900)
    pruned = disk_of(case, trials=7, pruner={"kind": "median", "startup_trials": 2})
    assert {n.what: (n.least, n.most) for n in pruned}["logged models"] == (2 * 4900, 7 * 4900)
    room = Case({}, run_config(tiny(), keep_top=3, keep_bytes=10_000), by_hand())
    assert {n.what: n.most for n in disk_of(room)}["best epochs"] == 3 * 4900


def test_the_worst_choice_is_named() -> None:
    search = {
        "train.batch_size": {"int": [2, 8, 2]},
        "train.learning_rate": {"loguniform": [1e-4, 1e-2]},
        "train.ema_decay": {"uniform": [0.9, 0.99]},
        "data.normalization": {"choice": ["physical", "minmax"]},
    }
    found, problems = needs.cases(small_sweep(search=search))
    assert (len(found), problems) == (3 * 2, [])
    assert all(case.config.train.ema_decay == 0.9 for case in found)
    top, telling = needs.worst(found, lambda case: case.config.train.batch_size)
    assert (top.config.train.batch_size, telling) == (8, {"train.batch_size": 8})


def test_combinations_that_no_trial_can_have() -> None:
    search = {
        "model.prediction": {"choice": ["epsilon", "sample"]},
        "model.zero_terminal_snr": {"choice": [True, False]},
    }
    sweep = SweepConfig.model_validate(
        {**small_sweep().model_dump(), "search": search, "model": {**tiny().model_dump(), "prediction": "sample"}}
    )
    found, (problem,) = needs.cases(sweep)
    assert len(found) == 3
    assert "epsilon with zero_terminal_snr" in problem


# Scenes and disk, held against what is really written.


def simulated(tmp_path: Path, scenes: int = 12, **options: Any) -> DataConfig:
    return DataConfig.model_validate({
        "source": "simulated", "cache": str(tmp_path / "cache"), "store": str(tmp_path / "store"), "resolution": 64,
        "simulated": {"scenes": scenes, "size": 32, "seed": 5}, **options,
    })  # fmt: skip


def test_scenes_are_counted_before_and_after_they_are_built(tmp_path: Path) -> None:
    data, split = simulated(tmp_path), SplitConfig(validation=0.2, test=0.3)
    before = count_scenes(data, split)
    assert before == SceneCount(12, 6, 2, 4, pixels=12 * 32 * 32)
    assert list(tmp_path.iterdir()) == [], "nothing is made"
    scenes = load_scenes(data)
    after, manifest = count_scenes(data, split), build_manifest(scenes, data, split)
    assert after == SceneCount(
        12, len(manifest.of("train")), len(manifest.of("validation")), len(manifest.of("test")), built=12, exact=True
    )
    simulation = Simulation(12, 32, 5)
    assert size(tmp_path / "cache" / simulation.folder_name) == pytest.approx(simulation.bytes, rel=0.03)
    assert size(tmp_path / "store" / "scenes") == pytest.approx(needs.built(before).most, rel=0.05)


def test_observations_are_counted(tmp_path: Path) -> None:
    root = write_simulation(Simulation(3, 32, 9), tmp_path)
    found = count_scenes(simulated(tmp_path, source="mtrdr", path=str(root)), SplitConfig(validation=0.3, test=0.3))
    assert (found.total, found.train, found.built, found.exact) == (3, 1, 0, False)
    assert found.pixels == pytest.approx(3 * 32 * 32, rel=0.1)


def test_pairs_are_counted(tmp_path: Path, real_data: Path) -> None:
    minmax = {"normalization": "minmax", "target_normalization": "minmax"}
    pairs = simulated(tmp_path, source="pairs", path=str(real_data / "scene_pairs"), **minmax)
    assert count_scenes(pairs, SplitConfig()).total > 80
    with pytest.raises(SceneError, match=r"scenes\.csv: cannot be read"):
        count_scenes(pairs.model_copy(update={"path": str(tmp_path)}), SplitConfig())


def test_samples_and_latents_take_what_is_said(tmp_path: Path) -> None:
    prompt = "Longitude: {longitude}, predict carbonates"
    search = {"data.variant": {"choice": ["pnr", "bpn"]}}
    sweep = small_sweep(
        data=simulated(tmp_path, views=["whole", "vflip"]).model_dump(), model=tiny(prompt=prompt).model_dump(),
        search=search, split={"validation": 0.2, "test": 0.3},
    )  # fmt: skip
    found, _ = needs.cases(sweep)
    found = [replace(case, blueprint=counted(tiny(prompt=prompt))) for case in found]
    scenes = load_scenes(sweep.data)
    wanted = {n.what: n for n in needs.disk(sweep, found, count_scenes(sweep.data, sweep.split))}
    model = instruct_pix2pix.build(tiny(prompt=prompt), 0)
    store = open_store(sweep.data)
    for case in found:
        samples = build_manifest(scenes, case.config.data, sweep.split).samples()
        assert len(samples) == 2 * len(samples.blocks), "all views show data"
        model.prepare(samples, LatentCache(store))
    for what, folder in {"samples": "samples", "latents": "latents", "prompt embeddings": "prompts"}.items():
        assert size(store.folder / folder) == pytest.approx(wanted[what].most, rel=0.04), what


# Verdicts.


MEMORY = Memory(
    weights=2 * GB, gradients=2 * GB, moments=4 * GB, average=0, copy=0, casts=0, sample=GB, at_once=4, predicting=GB,
    rows=GB,
)  # fmt: skip
CONFIG = small_sweep()


def test_memory_that_fits_may_fit_and_does_not() -> None:
    def said(available: int, memory: Memory = MEMORY, **choices: Any) -> verdicts.Verdict:
        (found,) = verdicts.of_memory(memory, choices, CONFIG, replace(HERE, memory_available=available))
        return found

    assert said(16 * GB).level == "fits"
    tight = said(11 * GB)
    assert tight.level == "warning"
    assert "12.00 GB with activations of 4 samples, of 11.00 GB available; set engine.micro_batch=3" in tight.words
    assert "not even one sample may fit" in said(9 * GB - 1, replace(MEMORY, predicting=0)).words
    assert "lower evaluate.chunk" in said(9 * GB, replace(MEMORY, predicting=2 * GB)).words
    uncounted = said(16 * GB, replace(MEMORY, sample=None))
    assert uncounted.level == "warning"
    assert "activations come on top" in uncounted.words
    over = said(7 * GB, text="trained")
    assert over.level == "fails"
    assert "does not fit with text=trained: weights, gradients and optimiser need 8.00 GB, there are 7.00" in over.words
    assert "set model.lora" in over.words


def test_memory_of_a_gpu() -> None:
    gpus = (Gpu("one", 24 * GB, 20 * GB), Gpu("two", 8 * GB, 7 * GB))
    first = replace(HERE, device="cuda", gpus=gpus)
    (found,) = verdicts.of_memory(MEMORY, {}, CONFIG, first)
    # The data set is on it as well, as it takes less than a quarter of what is free.
    assert (found.level, found.about) == ("fits", "memory of one")
    assert found.words.startswith("about 13.00 GB")
    (found,) = verdicts.of_memory(MEMORY, {}, CONFIG, replace(first, device="cuda:1"))
    assert found.level == "fails"
    *_, host = verdicts.of_memory(MEMORY, {}, CONFIG, replace(first, memory_available=GB))
    assert (host.level, host.about) == ("fails", "memory")
    (no_gpu,) = verdicts.of_machine([CONFIG], replace(first, device="cuda:2"), lpips=True)
    assert no_gpu.words.startswith("cuda:2: torch sees 2 GPUs")


def test_disk_that_fits_may_fit_and_does_not() -> None:
    rows = (
        (Need("latents", "store", 2 * GB, 3 * GB, "data.views"), "s", GB),
        (Need("logged models", "artifacts", 2 * GB, 9 * GB, "trials"), "a", 0),
    )
    assert verdicts.of_disk(verdicts.Disk(20 * GB, rows)).level == "fits"
    some = verdicts.of_disk(verdicts.Disk(8 * GB, rows))
    assert some.level == "warning"
    assert (
        "up to 12.27 GB needed, at least 3.27 GB, 8.00 GB free; most of it is logged models in a: lower trials"
        in some.words
    )
    none = verdicts.of_disk(verdicts.Disk(3 * GB, rows))
    assert none.level == "fails"
    assert "does not fit: at least 3.27 GB needed, 3.00 GB free" in none.words


def test_what_a_machine_lacks() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    def said(config: RunConfig, lpips: bool = True, **changes: Any) -> str:
        found = verdicts.of_machine([config], replace(HERE, **changes), lpips)
        return " ".join(f"{one.level}: {one.words}" for one in found)

    assert said(CONFIG) == ""
    half = small_sweep(train={"mixed_precision": "fp16"})
    assert "warning: train.mixed_precision fp16 does nothing on a CPU" in said(half)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert not Accelerator(cpu=True, mixed_precision="fp16").native_amp
    AcceleratorState._reset_state(reset_partial_state=True)
    assert [needs.in_half(half, device) for device in ("cpu", "cuda")] == [False, True]
    compiled = small_sweep(engine={"compile": True})
    assert said(compiled) == ""
    assert "fails: engine.compile needs a C++ compiler" in said(compiled, compiler=None)
    assert "fails: LPIPS: AlexNet's weights are missing" in said(CONFIG, lpips=False)


def test_a_container_limits_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = tmp_path / "cgroup"
    (groups / "slurm" / "job").mkdir(parents=True)
    (groups / "memory.max").write_text("max\n")
    (groups / "slurm" / "memory.max").write_text("3000\n")
    (groups / "slurm" / "job" / "memory.max").write_text("4000\n")
    (tmp_path / "own").write_text("1:name=systemd:/\n0::/slurm/job\n")
    monkeypatch.setattr(machine, "_CONTROL_GROUPS", groups)
    monkeypatch.setattr(machine, "_OWN_GROUP", tmp_path / "own")
    found = machine.look("cpu")
    assert (found.memory_total, found.memory_available) == (3000, 3000)
    (tmp_path / "own").unlink()
    assert machine.look("auto").memory_total > 10**9


def test_speed_is_measured() -> None:
    assert machine.speed("cpu", half=False) > 1e8  # type: ignore[operator]
    assert machine.speed("cuda:99", half=False) is None


# The command.


def test_all_fits(doctor: Doctor, tmp_path: Path) -> None:
    ran = doctor(QUICK_IP2P)
    assert ran.code == 0, ran.out + ran.err
    assert "quickstart-ip2p: all fits" in ran.out
    assert "tiny: all files are there" in ran.out
    assert "memory of a trial with model.text_encoder=trained" in ran.out
    assert "2.2 M" in ran.out
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_json(doctor: Doctor) -> None:
    found = doctor(QUICK_UNET, "--json", changes=["model.encoder_weights=null"]).json
    assert found["fits"] is True
    assert found["scenes"]["total"] == 60
    assert found["memory"]["moments"] == 2 * found["memory"]["gradients"]
    assert {"study", "machine", "sources", "blueprint", "time", "disks", "verdicts"} <= set(found)


def test_too_little_memory_and_disk(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = namedtuple("memory", "total available")(2 * GB, 10**7)
    monkeypatch.setattr("psutil.virtual_memory", lambda: memory)
    usage = namedtuple("usage", "total used free")(GB, GB, 10**7)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ran = doctor(QUICK_IP2P, changes=["search={}"])
    assert ran.code == 1
    out = plain(ran)
    assert "does not fit: weights, gradients and optimiser need" in out
    assert "there are 10.0 MB" in out
    assert "10.0 MB free" in out
    assert "2 failing" in out


def test_typos_are_the_usual_errors(doctor: Doctor) -> None:
    assert "did you mean train.epochs?" in doctor(QUICK_IP2P, changes=["train.epoch=3"]).error
    assert "nowhere.yaml: cannot be read" in doctor("nowhere.yaml").error


def test_everything_wrong_is_said_at_once(doctor: Doctor, cached: Path) -> None:
    changes = ["data.path=nowhere", "data.labels=none.csv", "model.encoder=resnet18", "device=cuda:7"]
    ran = doctor(ROOT / "sweeps" / "unet.yaml", changes=changes)
    assert ran.code == 1
    out = plain(ran)
    for words in ("no such folder: nowhere", "none.csv", "missing config.json model.safetensors", "cuda:7: torch sees"):
        assert words in out
    assert "14.3 M" in out, "the model is counted all the same"


def test_a_store_that_cannot_be_used(doctor: Doctor) -> None:
    ran = doctor(QUICK_IP2P, changes=["data.store=nosuch://x", "search={}"])
    assert ran.code == 1
    assert "data.store nosuch://x" in plain(ran)
    assert ran.err == ""


def test_artifacts_of_a_server_need_no_room_here(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crism_mlops.studies.doctor.default_tracking_uri", lambda: "http://tracking.example")
    found = doctor(QUICK_UNET, "--json", changes=["model.encoder_weights=null"]).json
    assert "logged models" not in {need["what"] for disk in found["disks"] for need, _, _ in disk["needs"]}


def test_full_size_without_weights(doctor: Doctor, tmp_path: Path) -> None:
    for name, content in SD15.items():
        (tmp_path / "sd" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sd" / name).write_text(json.dumps(content))
    changes = ["data.source=simulated", "model.pretrained=sd", "search={}", "device=cpu"]
    ran = doctor(ROOT / "sweeps" / "ip2p.yaml", changes=changes)
    assert ran.code == 1
    out = plain(ran)
    for count in ("859.5 M", "123.1 M", "83.7 M"):
        assert count in out
    for part in ("unet/diffusion_pytorch_model", "text_encoder/model", "vae/diffusion_pytorch_model"):
        assert f"{part}.safetensors" in out
    assert "tokenizer/tokenizer.json" in out
    assert "write or download sd again" in out
    assert "4.26 GB" in out, "weights, and a logged model"
