"""How InstructPix2Pix and the U-Net learn: weighting, schedules of noise, adapters, residuals, kept epochs."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from pydantic import ValidationError
from test_models import SCRATCH, SIDE, config_of, make_parts, make_samples, make_scene, whole
from trackers import small_scenes, small_sweep

from crism_mlops.config import (
    DataConfig,
    EngineConfig,
    InstructPix2PixModel,
    LoraConfig,
    RunConfig,
    TrainConfig,
    UNetModel,
)
from crism_mlops.dataset.manifest import Pair, build_manifest
from crism_mlops.dataset.prompts import render, scene_lacks, scene_prompt
from crism_mlops.errors import ModelError
from crism_mlops.evaluation.evaluate import round_trips
from crism_mlops.models import instruct_pix2pix, lora
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.kept import Kept
from crism_mlops.models.latents import weights_digest
from crism_mlops.models.residual import LinearResidual, fit_residual
from crism_mlops.models.unet import UNet
from crism_mlops.studies import run as run_module
from crism_mlops.studies.run import Hooks, validation_interval
from crism_mlops.training import train


def step(model: InstructPix2Pix, **drawn: torch.Tensor) -> dict[str, torch.Tensor]:
    """A drawn batch of three samples, with some of it replaced."""
    return {**model.draw(whole(model.prepare(make_samples())), torch.Generator().manual_seed(0)), **drawn}


# ---- the denoiser's loss


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_the_papers(kind: str) -> None:
    """Hang et al. 2023: the ratio of signal to noise is a product of the schedule, computed here by hand."""
    plain, weighted = (
        InstructPix2Pix(make_parts(prediction_type=kind), config_of(snr_gamma=gamma)) for gamma in (None, 5.0)
    )
    betas = np.linspace(0.01, 0.2, 50)
    for t in (0, 20, 49):
        signal = np.cumprod(1.0 - betas)[t]
        snr = signal / (1.0 - signal)
        share = {"sample": 1.0, "epsilon": 1.0 / snr, "v_prediction": 1.0 / (snr + 1.0)}[kind] * min(snr, 5.0)
        timesteps = torch.full((3,), t)
        with torch.no_grad():
            one, other = (float(m.errors(step(m, timesteps=timesteps))) for m in (plain, weighted))
        assert other == pytest.approx(share * one, rel=1e-4)


def test_noise_offset_moves_whole_channels() -> None:
    model = InstructPix2Pix(make_parts(), config_of(noise_offset=0.5))
    batch = {name: tensor.repeat(200, *[1] * (tensor.ndim - 1)) for name, tensor in
             whole(model.prepare(make_samples(1))).items()}  # fmt: skip
    noise = model.draw(batch, torch.Generator().manual_seed(0))["noise"]
    means = noise.mean(dim=(2, 3))
    # A channel's mean of 256 values deviates by 1/16 by itself.
    assert float(means.std()) == pytest.approx(math.hypot(0.5, 1.0 / 16.0), rel=0.1)
    plain = InstructPix2Pix(make_parts(), config_of()).draw(batch, torch.Generator().manual_seed(0))["noise"]
    assert float(plain.mean(dim=(2, 3)).std()) == pytest.approx(1.0 / 16.0, rel=0.1)


def test_parts_of_a_drawn_batch_add_up() -> None:
    model = InstructPix2Pix(make_parts(), config_of(conditioning_dropout=0.3))
    drawn = step(model)
    with torch.no_grad():
        parts = [{name: tensor[i : i + 1] for name, tensor in drawn.items()} for i in range(3)]
        assert float(sum(model.errors(p) for p in parts)) == pytest.approx(float(model.errors(drawn)), rel=1e-5)
        assert float(sum(model.count(p) for p in parts)) == pytest.approx(float(model.count(drawn)))


@pytest.fixture
def folder(tmp_path: Path) -> str:
    InstructPix2Pix(make_parts(), config_of()).save(tmp_path / "pipeline")
    return str(tmp_path / "pipeline")


def test_prediction_and_terminal_snr_can_be_chosen_and_are_saved(folder: str, tmp_path: Path) -> None:
    config = config_of(pretrained=folder, prediction="v_prediction", zero_terminal_snr=True)
    model = instruct_pix2pix.build(config, 0)
    model.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "scheduler" / "scheduler_config.json").read_text())
    assert settings["prediction_type"] == "v_prediction"
    assert settings["rescale_betas_zero_snr"]
    assert settings["timestep_spacing"] == "trailing"
    last = DDPMScheduler.from_config(settings).alphas_cumprod[-1]
    assert float(last) == pytest.approx(0.0, abs=1e-7)
    with torch.no_grad():
        loss = float(model.errors(step(model)))
        assert math.isfinite(loss)
        again = instruct_pix2pix.load(tmp_path / "saved", config)
        assert float(again.errors(step(again))) == pytest.approx(loss)


def test_the_pretrained_schedule_stays_where_nothing_is_chosen(folder: str) -> None:
    model = instruct_pix2pix.build(config_of(pretrained=folder), 0)
    assert model.scheduler.config.prediction_type == "epsilon"
    assert not model.scheduler.config.rescale_betas_zero_snr


def test_epsilon_of_pure_noise_is_refused(folder: str) -> None:
    with pytest.raises(ValidationError, match="noise says nothing of the image"):
        config_of(prediction="epsilon", zero_terminal_snr=True)
    with pytest.raises(ModelError, match="noise says nothing of the image"):
        instruct_pix2pix.build(config_of(pretrained=folder, zero_terminal_snr=True), 0)


@pytest.mark.parametrize("adapters", [None, LoraConfig(rank=2)])
def test_gradient_checkpointing_computes_the_same(folder: str, adapters: LoraConfig | None) -> None:
    states = []
    for engine in (EngineConfig(), EngineConfig(gradient_checkpointing=True)):
        model = instruct_pix2pix.build(config_of(pretrained=folder, text_encoder="trained", lora=adapters), 0)
        data = model.prepare(make_samples(4))
        config = TrainConfig(learning_rate=1e-3, batch_size=2, epochs=2)
        train(model, data, torch.ones(4), config, 0, engine=engine)
        states.append([p.detach() for m in model.modules for p in m.parameters()])
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_an_unet_has_no_gradient_checkpointing() -> None:
    model = UNet(torch.nn.Conv2d(3, 3, 1), UNetModel(kind="unet", encoder_weights=None))
    with pytest.raises(ModelError, match=r"has none; lower engine\.micro_batch"):
        model.configure(EngineConfig(gradient_checkpointing=True))


# ---- adapters


@pytest.mark.parametrize("text_encoder", ["frozen", "trained"])
def test_adapters_alone_are_trained_and_merged_where_saved(folder: str, tmp_path: Path, text_encoder: str) -> None:
    config = config_of(pretrained=folder, lora=LoraConfig(rank=2, alpha=4.0), text_encoder=text_encoder)
    model = instruct_pix2pix.build(config, 0)
    groups = model.parameter_groups(1e-2, 1e-3)
    assert [g["lr"] for g in groups] == ([1e-2, 1e-3] if text_encoder == "trained" else [1e-2])
    trained = sum(p.numel() for g in groups for p in g["params"])
    assert 0 < trained < 0.2 * sum(p.numel() for m in model.modules for p in m.parameters())
    frozen = [p.detach().clone() for p in model.unet.parameters() if not p.requires_grad]
    data = model.prepare(make_samples(4))
    train(model, data, torch.ones(4), TrainConfig(learning_rate=1e-2, batch_size=2, epochs=3), 0)
    assert all(torch.equal(a, b) for a, b in zip(
        frozen, (p for p in model.unet.parameters() if not p.requires_grad), strict=True))  # fmt: skip
    before = weights_digest(model.unet)
    model.save(tmp_path / "saved")
    assert weights_digest(model.unet) == before, "saving leaves what is trained on alone"
    loaded = instruct_pix2pix.load(tmp_path / "saved", config)
    assert not any("lora" in name for name, _ in loaded.unet.named_parameters())
    images = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    for module in model.modules:
        module.eval()
    ours, theirs = (m.predict(images, ["one", "two"], [1, 2]) for m in (model, loaded))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    untrained = instruct_pix2pix.build(config_of(pretrained=folder), 0).predict(images, ["one", "two"], [1, 2])
    assert float((untrained - ours).abs().max()) > 1e-3


def test_without_adapters_a_module_is_its_own() -> None:
    module = torch.nn.Linear(2, 2)
    assert lora.merged(module) is module


# ---- the U-Net's loss


@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_unet_losses_count_pixels_that_show_data(loss: str) -> None:
    module = torch.nn.Conv2d(3, 3, 1)
    model = UNet(module, UNetModel(kind="unet", encoder_weights=None, loss=loss))
    batch = whole(model.prepare(make_samples(3)))
    valid = batch["weight"].expand_as(batch["target"])
    errors = (module(batch["input"]) - batch["target"])[valid].detach()
    small = errors.abs() <= 0.1
    wanted = {
        "mse": errors**2, "l1": errors.abs(),
        "huber": torch.where(small, 0.5 * errors**2, 0.1 * (errors.abs() - 0.05)),
    }[loss].mean()  # fmt: skip
    assert 0.0 < float(small.float().mean()) < 1.0
    torch.testing.assert_close(model.loss(batch, torch.Generator()).detach(), wanted)


# ---- on top of the linear floor


def linear_pairs(noise: float, count: int = 3) -> list[Pair]:
    rng, pairs = np.random.default_rng(0), []
    mix = np.array([[0.6, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.2, 0.4]], dtype=np.float32)
    for i in range(count):
        scene = make_scene(f"frt0000000{i}")
        image = rng.uniform(0.1, 0.9, (SIDE, SIDE, 3)).astype(np.float32)
        truth = np.clip(image @ mix + 0.05 + noise * rng.uniform(-1, 1, image.shape), 0, 1).astype(np.float32)
        image[~scene.valid] = truth[~scene.valid] = 0.0
        pairs.append(Pair(scene, image, truth))
    return pairs


def test_the_residual_is_what_the_floor_leaves() -> None:
    residual = fit_residual(linear_pairs(0.05))
    assert residual.scale == pytest.approx(0.1, rel=0.05)
    np.testing.assert_allclose(residual.weights, [[0.6, 0.1, 0.0], [0.2, 0.5, 0.3], [0.0, 0.2, 0.4]], atol=0.01)
    pair = linear_pairs(0.05)[0]
    image, truth = (torch.from_numpy(x).permute(2, 0, 1)[None] * 2 - 1 for x in (pair.image, pair.truth))
    left = residual.encode(image, truth)
    valid = torch.tensor(pair.scene.valid)
    assert float(left[..., valid].abs().max()) <= 1.0
    assert float(left[..., valid].std()) == pytest.approx(1.0 / 3**0.5, rel=0.05)
    back = residual.decode(image, left)
    assert float((back - truth)[..., valid].abs().max()) < 0.02
    perfect = fit_residual(linear_pairs(0.0))
    assert perfect.scale == 0.02


RESIDUAL = LinearResidual(((0.6, 0.1, 0.0), (0.2, 0.5, 0.3), (0.0, 0.2, 0.4)), (0.05, 0.05, 0.05), 0.25)


def test_an_unet_on_top_of_the_floor_starts_at_the_floor(tmp_path: Path) -> None:
    module = torch.nn.Conv2d(3, 3, 1)
    torch.nn.init.zeros_(module.weight)
    torch.nn.init.zeros_(module.bias)
    model = UNet(module, UNetModel(kind="unet", encoder_weights=None, residual="linear"), "cpu", RESIDUAL)
    pair = linear_pairs(0.0)[0]
    image, truth = (torch.from_numpy(x).permute(2, 0, 1)[None] * 2 - 1 for x in (pair.image, pair.truth))
    valid = torch.tensor(pair.scene.valid)
    assert float((model.predict(image, [""], [0]) - truth)[..., valid].abs().max()) < 1e-5


def checkpoint_of(model: UNet | InstructPix2Pix, folder: Path) -> Checkpoint:
    sweep = small_sweep()
    config = RunConfig.model_validate({"data": sweep.data, "model": model.config})
    from crism_mlops.dataset.variants import fit_transform

    transform = fit_transform([make_scene()], "pnr", "minmax")
    return save_checkpoint(model, folder, Checkpoint(config, transform, "d", 1, 1, 0.0, {}, residual=model.residual))


def test_instruct_pix2pix_on_top_of_the_floor(folder: str, tmp_path: Path) -> None:
    config = config_of(pretrained=folder, residual="linear")
    model = instruct_pix2pix.build(config, 0, residual=RESIDUAL)
    samples = make_samples(2)
    data = whole(model.prepare(samples))
    left = RESIDUAL.encode(samples[0].input[None], samples[0].target[None])
    with torch.no_grad():
        torch.testing.assert_close(data["mean"][:1], model.vae.encode(left).latent_dist.mean)
    images = torch.stack([s.input for s in samples])
    predicted = model.predict(images, ["a", "b"], [1, 2])
    plain = instruct_pix2pix.build(config_of(pretrained=folder), 0).predict(images, ["a", "b"], [1, 2])
    torch.testing.assert_close(predicted, RESIDUAL.decode(images, plain))
    checkpoint_of(model, tmp_path / "checkpoint")
    loaded, card = load_checkpoint(tmp_path / "checkpoint")
    assert card.residual == loaded.residual == RESIDUAL
    assert torch.equal(loaded.predict(images, ["a", "b"], [1, 2]), predicted)


def test_the_ceiling_of_a_residual_is_higher(folder: str) -> None:
    """An autoencoder's error counts by the residual's scale."""
    pairs = linear_pairs(0.05)
    plain = instruct_pix2pix.build(config_of(pretrained=folder), 0)
    on_top = instruct_pix2pix.build(config_of(pretrained=folder, residual="linear"), 0, residual=fit_residual(pairs))
    errors = []
    for model in (plain, on_top):
        images = round_trips(model, pairs, SIDE).images
        errors.append(np.mean([np.abs(i - p.truth)[p.scene.valid].mean() for i, p in zip(images, pairs, strict=True)]))
    assert errors[1] < 0.3 * errors[0]


# ---- prompts


def test_prompts_round_as_told_and_fall_back() -> None:
    template = "At {longitude} {latitude}, {location}"
    model = InstructPix2PixModel(
        kind="instruct_pix2pix", prompt=template, prompt_decimals=0, prompt_fallback="Carbonates"
    )
    assert scene_prompt(model, make_scene()) == "At 78 18, jezero"
    assert render(template, 1.0, None, "x", 1, "Carbonates") == "Carbonates"
    assert render("{longitude}", 1.26, None, None, 1, "Carbonates") == "1.3"
    assert render(template, 1.26, None, None, 1) == "At 1.3 unknown, unknown"
    assert not scene_lacks(model, make_scene())


def test_a_fallback_is_plain() -> None:
    with pytest.raises(ValidationError, match="has no fields of its own"):
        InstructPix2PixModel(kind="instruct_pix2pix", prompt_fallback="At {longitude}")


# ---- epochs that are kept


def write(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "model.safetensors").write_bytes(b"x" * 100)


@pytest.mark.parametrize(
    ("top", "room", "kept"), [(1, None, [3]), (2, None, [3, 6]), (3, None, [3, 6, 2]), (3, 250, [3, 6]), (3, 10, [3])]
)
def test_the_best_epochs_are_kept_within_room(tmp_path: Path, top: int, room: int | None, kept: list[int]) -> None:
    entries: list[dict[str, Any]] = []
    shelf = Kept(tmp_path, top, room, entries)
    best = [shelf.offer(epoch, error, write) for epoch, error in enumerate([9.0, 4.0, 3.0, 7.0, 5.0, 3.0], start=1)]
    assert best == [True, True, True, False, False, False]
    assert shelf.places == [tmp_path / f"epoch-{e:05d}" / "checkpoint" for e in kept]
    assert sorted(p.parent for p in shelf.places) == sorted(tmp_path.iterdir())
    assert json.loads(json.dumps(entries)) == entries


def test_an_epoch_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    shelf = Kept(tmp_path, 1, None, [])
    shelf.offer(1, 2.0, write)

    def full(place: Path) -> None:
        raise ModelError("no space left")

    with pytest.raises(ModelError):
        shelf.offer(2, 1.0, full)
    assert [e["epoch"] for e in shelf.entries] == [1]
    assert shelf.places[0].is_dir()


# ---- how often it is validated


def run_config(**settings: Any) -> RunConfig:
    model = {"kind": "instruct_pix2pix", **settings.pop("model", {})}
    data = DataConfig(source="simulated")
    return RunConfig.model_validate({"data": data, "model": model, **settings})


def test_validation_stays_below_its_share_of_the_arithmetic() -> None:
    # 8 scenes, 15 steps of three passes each and the autoencoder; steps count three passes a sample.
    config = run_config(train={"epochs": 1000})
    for samples in (10, 100, 800, 5000):
        every = validation_interval(config, samples, 8)
        cost, epoch = 8 * (45 + 4.52), 3.0 * samples
        assert cost / (cost + every * epoch) <= 0.15
        assert every == 1 or cost / (cost + (every - 1) * epoch) > 0.15
    assert validation_interval(config, 5000, 8) == 1
    assert validation_interval(run_config(train={"epochs": 3}), 1, 8) == 3
    # Passes whose factor is 0 are not computed; a U-Net makes one pass a scene.
    plain = run_config(train={"epochs": 1000}, model={"image_guidance": 1.0, "text_guidance": 1.0})
    assert validation_interval(plain, 100, 8) < validation_interval(config, 100, 8)
    assert validation_interval(run_config(model={"kind": "unet"}), 20, 8) == 1


def test_scratch_unet_fits(folder: str) -> None:
    model = instruct_pix2pix.build(config_of(pretrained=folder, scratch_unet=SCRATCH), 0)
    assert model.unet.config.in_channels == 8


@pytest.mark.parametrize(
    ("objective", "chosen"), [("val/rmse", "b"), ("val_worst/rmse", "c"), ("val/pcc", "c"), ("val_worst/pcc", "a")]
)
def test_of_several_epochs_the_best_on_all_validation_scenes_wins(
    objective: str, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = {"a": (3.0, 9.0), "b": (2.0, 8.0), "c": (math.nan, 7.0), "d": (4.0, math.nan)}
    if objective == "val/pcc":
        figures = {"a": (0.3, 0.1), "b": (0.5, 0.1), "c": (0.9, 0.1), "d": (math.nan, 0.1)}
    if objective == "val_worst/pcc":
        figures = {"a": (0.3, 0.6), "b": (0.5, 0.1), "c": (0.9, 0.1), "d": (0.9, 0.5)}

    class Table:
        def __init__(self, name: str) -> None:
            self.mean, self.low = figures[name]

        def means(self, protocol: str) -> dict[str, float]:
            return {"rmse": self.mean, "pcc": self.mean}

        def worst(self, metric: str) -> float:
            return self.low

    monkeypatch.setattr(run_module, "load_checkpoint", lambda folder, device: (folder.name, None))
    monkeypatch.setattr(run_module, "predict", lambda model, config: lambda pairs: model)
    monkeypatch.setattr(run_module, "score_pairs", lambda predicted, *more, **options: Table(predicted))
    sweep = small_sweep()
    manifest = build_manifest(small_scenes(), sweep.data, sweep.split)
    kept = [Path(name) for name in figures]
    assert run_module.choose(kept, manifest, sweep, objective, Hooks()).name == chosen
    assert run_module.choose(kept[1:2], manifest, sweep, objective, Hooks()).name == "b"


def test_a_pipeline_whose_tokenizer_has_no_files_is_refused(folder: str) -> None:
    """transformers would make a vocabulary of two tokens, without a word."""
    for file in Path(folder, "tokenizer").iterdir():
        if file.name != "tokenizer_config.json":
            file.unlink()
    with pytest.raises(ModelError, match=r"its tokenizer knows \d+ tokens.*files are missing in tokenizer/"):
        instruct_pix2pix.build(config_of(pretrained=folder), 0)
