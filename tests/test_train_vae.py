"""The autoencoder of four bands: made, trained, guarded against leaks, and used by InstructPix2Pix."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from console import console
from diffusers import AutoencoderKL, AutoencoderTiny, DPMSolverMultistepScheduler
from test_cli import Ran
from test_models import SCRATCH, config_of, make_parts, make_scheduler, whole
from trackers import new_tracker, optuna_store

from crism_mlops.config import EngineConfig, RunConfig, SweepConfig, TrainConfig
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.errors import ConfigError, DatasetError, ModelError, StudyError, TrainingError
from crism_mlops.models import instruct_pix2pix
from crism_mlops.models.autoencoder import (
    CARD,
    AutoencoderCard,
    InputAutoencoder,
    autoencoder_digest,
    check_replaceable,
    read_card,
    widened,
)
from crism_mlops.models.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from crism_mlops.models.instruct_pix2pix import InstructPix2Pix
from crism_mlops.models.latents import encode_distribution, weights_digest
from crism_mlops.models.pipeline import BandsInstructPix2PixPipeline
from crism_mlops.models.sampling import sampling_scheduler
from crism_mlops.scenes.scene import Scene
from crism_mlops.studies.input_vae import input_vaes_seen, scenes_seen
from crism_mlops.studies.storage import open_store
from crism_mlops.studies.study import input_manifests, open_study, run_study
from crism_mlops.studies.train_vae import VaeHooks, VaeSettings, check_out, load_vae_sweep, train_vae, vae_settings
from crism_mlops.training import train

SIDE = 32
SETTINGS = VaeSettings(epochs=3, learning_rate=3e-3, batch_size=4, kl_weight=1e-6)
BANDS = torch.rand(2, 4, SIDE, SIDE, generator=torch.Generator().manual_seed(4)) * 2 - 1  # BLU, PAN, NIR, RED


def make_autoencoder(kind: str) -> Any:
    """A small one of random weights, of three channels."""
    if kind == "AutoencoderKL":
        return make_parts()["vae"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        )


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of random weights; look, don't touch."""
    path = tmp_path_factory.mktemp("pretrained") / "pipeline"
    InstructPix2Pix(make_parts(), config_of()).save(path)
    return path


def content_of(pretrained: Path, **changes: Any) -> dict[str, Any]:
    """A sweep file's content; `changes` replaces top-level keys, or merges into sections."""
    content: dict[str, Any] = {
        "study": "four",
        "experiment": "crism-test",
        "budget": {"trials": 1},
        "device": "cpu",
        "data": {"source": "simulated", "resolution": SIDE, "views": ["whole", "vflip"]},
        "split": {"validation": 0.2, "test": 0.4},
        "model": {
            "kind": "instruct_pix2pix", "pretrained": str(pretrained), "prompt": "Find {location}", "steps": 2,
            "image_guidance": 1.0, "text_guidance": 1.0,
        },
        "train": {"epochs": 1, "batch_size": 4},
        "evaluate": {"chunk": 2, "validation_scenes": 2, "panel_scenes": 1},
        "sampler": {"kind": "random"},
    }  # fmt: skip
    for key, value in changes.items():
        content[key] = {**content[key], **value} if isinstance(content.get(key), dict) else value
    return content


def sweep_of(pretrained: Path, **changes: Any) -> SweepConfig:
    return SweepConfig.model_validate(content_of(pretrained, **changes))


def make(
    folder: Path, pretrained: Path, scenes: list[Scene], settings: VaeSettings = SETTINGS, **changes: Any
) -> AutoencoderCard:
    """`train-vae` on a sweep file."""
    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump(content_of(pretrained, **changes)))
    return train_vae(*load_vae_sweep(file), scenes, folder, settings)


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, pretrained: Path, simulated_scenes: list[Scene]
) -> tuple[Path, AutoencoderCard]:
    """An autoencoder trained on the simulated scenes, and its card; look, don't touch."""
    root = tmp_path_factory.mktemp("trained")
    store = {"store": str(root / "store"), "cache": str(root / "cache")}
    return root / "vae4", make(root / "vae4", pretrained, simulated_scenes, data=store)


# ---- the start


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_four_bands_start_with_the_latents_of_three(kind: str) -> None:
    vae = make_autoencoder(kind)
    before = torch.get_rng_state()
    four = widened(vae)
    assert torch.equal(torch.get_rng_state(), before)
    assert (four.config.in_channels, four.config.out_channels) == (4, 4)
    assert type(four) is type(vae)
    for key in ("scaling_factor", "latent_channels", "block_out_channels"):
        assert four.config[key] == vae.config[key]
    with torch.no_grad():
        wanted, deviation = encode_distribution(vae, BANDS[:, [1, 2, 3]])
        found, found_deviation = encode_distribution(four, BANDS)
        torch.testing.assert_close(found, wanted)
        torch.testing.assert_close(found_deviation, deviation)
        pnr = vae.decode(wanted).sample
        decoded = four.decode(wanted).sample
    torch.testing.assert_close(decoded[:, 1:], pnr)
    torch.testing.assert_close(decoded[:, 0], pnr.mean(1), atol=1e-5, rtol=1e-4)


# ---- the loss


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
def test_the_loss_is_of_valid_pixels_and_of_the_whole_batch(kind: str) -> None:
    model = InputAutoencoder(widened(make_autoencoder(kind)), 0.5)
    valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
    valid[:, :5] = False
    drawn = model.draw({"input": BANDS, "valid": valid}, torch.Generator().manual_seed(1))
    value, count = model.errors(drawn), model.count(drawn)
    assert float(count) == 2 * 4 * SIDE * (SIDE - 5)
    with torch.no_grad():
        if kind == "AutoencoderKL":
            posterior = model.vae.encode(BANDS).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(1))
            latents, kl = posterior.mean + posterior.std * noise, posterior.kl().sum()
        else:
            latents, kl = model.vae.encode(BANDS).latents, torch.tensor(0.0)
        wanted = (model.vae.decode(latents).sample - BANDS).abs()[valid[:, None].expand_as(BANDS)].sum() + 0.5 * kl
    torch.testing.assert_close(value, wanted)
    # What is drawn is drawn for the batch: its parts add up.
    parts = [model.errors({name: t[i : i + 1] for name, t in drawn.items()}) for i in range(2)]
    torch.testing.assert_close(sum(parts), value, atol=1e-2, rtol=1e-5)


def test_new_weights_learn_faster() -> None:
    model = InputAutoencoder(widened(make_autoencoder("AutoencoderTiny")), 0.0)
    old, new = model.parameter_groups(1e-3, None)
    assert (old["lr"], new["lr"]) == (1e-3, 1e-2)
    assert {tuple(p.shape) for p in new["params"]} == {(8, 4, 3, 3), (8,), (4, 8, 3, 3), (4,)}
    assert len(old["params"]) + len(new["params"]) == len(list(model.vae.parameters()))


def test_checkpointing_does_not_change_what_is_computed() -> None:
    """AutoencoderTiny of diffusers scales its input only where it does not checkpoint."""
    for kind in ("AutoencoderKL", "AutoencoderTiny"):
        model = InputAutoencoder(widened(make_autoencoder(kind)), 0.0)
        valid = torch.ones(2, SIDE, SIDE, dtype=torch.bool)
        drawn = model.draw({"input": BANDS, "valid": valid}, torch.Generator().manual_seed(1))
        plain = model.errors(drawn)
        model.vae.train()
        model.configure(EngineConfig(gradient_checkpointing=True))
        torch.testing.assert_close(model.errors(drawn), plain)


# ---- the training


def test_it_improves_and_says_what_it_has_seen(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene]
) -> None:
    folder, card = trained
    before, after = card.history[0], card.history[card.epoch]
    assert [entry["epoch"] for entry in card.history] == [0, 1, 2, 3]
    assert after["rmse"] == min(entry["rmse"] for entry in card.history) < 0.7 * before["rmse"]
    assert set(after["bands"]) == {"BLU", "PAN", "NIR", "RED"}
    assert all(after["bands"][band] < before["bands"][band] for band in after["bands"])
    assert read_card(folder) == card
    content = json.loads((folder / CARD).read_text())
    manifest = manifest_of(sweep_of(pretrained), simulated_scenes)
    assert content["seen"] == {"train": [*manifest.split.train], "validation": [*manifest.split.validation]}
    assert not set(manifest.split.test) & {*content["seen"]["train"], *content["seen"]["validation"]}
    assert content["started_from"] == weights_digest(make_parts()["vae"])
    assert content["settings"] == SETTINGS.model_dump()
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json", CARD, "diffusion_pytorch_model.safetensors"
    ]  # fmt: skip
    assert [p.name for p in folder.parent.iterdir() if "vae4" in p.name and p.is_dir()] == ["vae4"]


def manifest_of(sweep: SweepConfig, scenes: list[Scene], variant: str = "cassis4") -> Manifest:
    return build_manifest(scenes, sweep.data.model_copy(update={"variant": variant}), sweep.split)


def test_diffusers_loads_it_and_finds_the_error_that_the_card_names(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene]
) -> None:
    folder, card = trained
    vae = AutoencoderKL.from_pretrained(str(folder)).eval()
    errors = []
    # At 32 pixels the scenes are as they are.
    for pair in manifest_of(sweep_of(pretrained), simulated_scenes).pairs("validation"):
        image = torch.from_numpy(pair.image).permute(2, 0, 1)[None] * 2 - 1
        with torch.no_grad():
            decoded = vae.decode(vae.encode(image).latent_dist.mode()).sample.clamp(-1, 1)
        inside = torch.from_numpy(pair.scene.valid.copy())
        errors.append(((decoded - image)[0, :, inside] ** 2).mean(1).sqrt() * 127.5)
    wanted = torch.stack(errors).mean(0).tolist()
    assert list(card.history[card.epoch]["bands"].values()) == pytest.approx(wanted, rel=1e-4)


def test_scenes_that_are_held_out_teach_nothing(
    tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene], trained: tuple[Path, AutoencoderCard]
) -> None:
    """With other pixels in validation and test scenes the weights of the same epoch are the same bits."""
    sweep = sweep_of(pretrained)
    train_ids = set(manifest_of(sweep, simulated_scenes).split.train)
    changed = [s if s.observation_id in train_ids else replace(s, bands=s.bands * 0.9) for s in simulated_scenes]
    one_epoch = SETTINGS.model_copy(update={"epochs": 1})
    cards = [
        make(tmp_path / f"vae{i}", pretrained, scenes, one_epoch)
        for i, scenes in enumerate((simulated_scenes, changed, simulated_scenes))
    ]
    weights = [card.files["diffusion_pytorch_model.safetensors"] for card in cards]
    assert [card.epoch for card in cards] == [1, 1, 1]
    assert weights[0] == weights[1] == weights[2]
    assert cards[0].history == cards[2].history
    assert cards[0].history != cards[1].history
    other = make(tmp_path / "other", pretrained, simulated_scenes, one_epoch, seed=1)
    assert other.files["diffusion_pytorch_model.safetensors"] != weights[0]


def test_without_an_epoch_that_is_better_the_start_is_kept(
    tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene], caplog: pytest.LogCaptureFixture
) -> None:
    settings = VaeSettings(epochs=1, learning_rate=1.0, batch_size=4, kl_weight=0.0)
    card = make(tmp_path / "vae4", pretrained, simulated_scenes, settings)
    assert card.epoch == 0
    assert "no epoch was better than the start" in caplog.text
    kept = AutoencoderKL.from_pretrained(str(tmp_path / "vae4"))
    assert weights_digest(kept) == weights_digest(widened(make_parts()["vae"]))


def test_a_tiny_autoencoder_of_another_latent_space(
    tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene]
) -> None:
    make_autoencoder("AutoencoderTiny").save_pretrained(tmp_path / "tae")
    model = {"vae": str(tmp_path / "tae"), "scratch_unet": {"block_channels": [16, 32], "attention_heads": 4}}
    card = make(tmp_path / "vae4", pretrained, simulated_scenes, model=model)
    assert card.history[card.epoch]["rmse"] < 0.8 * card.history[0]["rmse"]
    config = config_of(**{**model, "pretrained": str(pretrained), "input_vae": str(tmp_path / "vae4")})
    built = instruct_pix2pix.build(config, 0, channels=4)
    assert type(built.input_vae).__name__ == "AutoencoderTiny"
    assert built.predict(BANDS, ["one", "two"], [1, 2]).shape == (2, 3, SIDE, SIDE)
    file = tmp_path / "vae4.yaml"
    with pytest.raises(ModelError, match="where the training starts"):
        check_out(tmp_path / "tae", load_vae_sweep(file)[1], force=True)


def test_losses_that_are_not_finite_name_the_option(
    tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    count = InputAutoencoder.count
    monkeypatch.setattr(InputAutoencoder, "count", lambda self, batch: count(self, batch) * float("nan"))
    with pytest.raises(TrainingError, match="--learning-rate; nothing is written"):
        make(tmp_path / "vae4", pretrained, simulated_scenes)
    assert not (tmp_path / "vae4").exists()


def test_ctrl_c_leaves_nothing_half_written_and_the_older_one(
    tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene]
) -> None:
    file = tmp_path / "four.yaml"
    file.write_text(yaml.safe_dump(content_of(pretrained)))

    def interrupt(step: int, total: int, loss: float) -> None:
        raise KeyboardInterrupt

    make(tmp_path / "vae4", pretrained, simulated_scenes, SETTINGS.model_copy(update={"epochs": 1}))
    before = autoencoder_digest(tmp_path / "vae4")
    for name in ("vae4", "new"):
        with pytest.raises(KeyboardInterrupt):
            train_vae(
                *load_vae_sweep(file), simulated_scenes, tmp_path / name, SETTINGS, VaeHooks(step=interrupt)
            )  # fmt: skip
    assert autoencoder_digest(tmp_path / "vae4") == before
    assert not (tmp_path / "new").exists()
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


# ---- the sweep file


def test_a_sweep_that_already_says_cassis4(tmp_path: Path, pretrained: Path) -> None:
    """RunConfig refuses it as long as no autoencoder is named, in the data section and in the search."""
    file = tmp_path / "four.yaml"
    content = content_of(pretrained, data={"variant": "cassis4"})
    with pytest.raises(ValueError, match="crism-mlops train-vae"):
        SweepConfig.model_validate(content)
    file.write_text(yaml.safe_dump({**content, "search": {"data.variant": {"choice": ["pnr", "cassis4"]}}}))
    sweep, model = load_vae_sweep(file, ("seed=7",))
    assert (sweep.data.variant, sweep.seed, model.pretrained) == ("cassis4", 7, str(pretrained))


def test_sweeps_that_have_no_use_for_it(tmp_path: Path) -> None:
    root = Path(__file__).parents[1] / "sweeps"
    with pytest.raises(ConfigError, match="a U-Net, which takes four bands as they are"):
        load_vae_sweep(root / "quickstart-unet.yaml")
    with pytest.raises(ConfigError, match="pairs hold PAN, NIR and RED only"):
        load_vae_sweep(root / "pairs-ip2p.yaml")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 0.0}, "--learning-rate 0.0: Input should be greater than 0"),
        ({"learning_rate": float("nan")}, "--learning-rate nan"),
        ({"kl_weight": float("inf")}, "--kl-weight inf"),
        ({"epochs": 0}, "--epochs 0"),
    ],
)
def test_options_that_make_no_sense(change: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        vae_settings(**{**SETTINGS.model_dump(), **change})


# ---- the folder


def _file(folder: Path) -> None:
    folder.write_text("x")


def _pipeline(folder: Path) -> None:
    (folder / "vae").mkdir(parents=True)
    (folder / "config.json").write_text("{}")


def _notes(folder: Path) -> None:
    folder.mkdir()
    (folder / "notes.txt").write_text("x")


def _foreign(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")


@pytest.mark.parametrize(
    ("prepare", "force", "words"),
    [
        (lambda folder: None, False, None),
        (lambda folder: folder.mkdir(), False, None),
        (_file, True, "it is a file"),
        (_notes, False, "not made by train-vae .it holds notes.txt"),
        (_notes, True, "--force replaces the folder of an autoencoder only"),
        (_pipeline, True, "--force replaces the folder of an autoencoder only"),
        (_foreign, False, "not made by train-vae"),
        (_foreign, True, None),
    ],
)
def test_what_is_replaced(tmp_path: Path, prepare: Callable[[Path], object], force: bool, words: str | None) -> None:
    folder = tmp_path / "out"
    prepare(folder)
    if words is None:
        check_replaceable(folder, force)
        return
    with pytest.raises(ModelError, match=words):
        check_replaceable(folder, force)
    with pytest.raises(ModelError, match="nothing can be written in"):
        check_replaceable(next(p for p in (folder, *folder.rglob("*")) if p.is_file()) / "below" / "it", force)


@pytest.fixture
def copied(trained: tuple[Path, AutoencoderCard], tmp_path: Path) -> Path:
    """A copy of the trained autoencoder to damage."""
    from shutil import copytree

    return Path(copytree(trained[0], tmp_path / "vae4"))


def test_a_card_of_other_weights_or_a_damaged_one(copied: Path) -> None:
    check_replaceable(copied, force=False)
    weights = copied / "diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ModelError, match=r"not the file that crism-vae\.json was written for"):
        read_card(copied)
    for text in ("{", "[]", "{}", '{"format": 2}', '{"format": 1, "seen": {}}', '{"format": 1, "seen": []}'):
        (copied / CARD).write_text(text)
        with pytest.raises(ModelError, match=r"crism-vae\.json: damaged or of another version"):
            read_card(copied)
    (copied / CARD).unlink()
    assert read_card(copied) is None


# ---- InstructPix2Pix of four bands


def four_band_model(vae: Path, pretrained: Path) -> tuple[RunConfig, InstructPix2Pix]:
    sweep = sweep_of(pretrained, data={"variant": "cassis4"}, model={
        "input_vae": str(vae), "scratch_unet": SCRATCH.model_dump(), "image_guidance": 1.5, "text_guidance": 7.5,
        "steps": 3,
    })  # fmt: skip
    config = sweep.run_config({})
    assert config.model.kind == "instruct_pix2pix"
    return config, instruct_pix2pix.build(config.model, 1, channels=4)


def test_it_trains_and_comes_back_with_the_same_bits_and_diffusers_predicts_the_same(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path
) -> None:
    folder, card = trained
    config, model = four_band_model(folder, pretrained)
    assert model.unet.config.in_channels == 8
    manifest = manifest_of(sweep_of(pretrained), simulated_scenes)
    data = model.prepare(manifest.samples())
    with torch.no_grad():
        mode = model.input_vae.encode(manifest.samples()[0].input[None]).latent_dist.mode()
    torch.testing.assert_close(whole(data)["condition"][:1], mode)
    frozen, unet = weights_digest(model.input_vae), weights_digest(model.unet)
    losses: list[float] = []
    settings = TrainConfig(learning_rate=1e-3, batch_size=8, epochs=1)
    train(model, data, torch.ones(len(data)), settings, 1, lambda step, total, loss: losses.append(loss))
    assert all(0.0 < loss < 10.0 for loss in losses)
    assert weights_digest(model.input_vae) == frozen
    assert weights_digest(model.unet) != unet

    about = Checkpoint(
        config, manifest.transform, manifest.digest, 1, len(losses), None, {}, seen=scenes_seen(config, manifest)
    )
    save_checkpoint(model, tmp_path / "checkpoint", about)
    loaded, checkpoint = load_checkpoint(tmp_path / "checkpoint")
    prompts, seeds = ["one", "two"], [5, 6]
    predicted = model.predict(BANDS, prompts, seeds)
    assert predicted.shape == (2, 3, SIDE, SIDE)
    assert torch.equal(loaded.predict(BANDS, prompts, seeds), predicted)
    assert checkpoint.seen == card.seen
    assert not torch.equal(model.predict(-BANDS, prompts, seeds), predicted)

    solver = DPMSolverMultistepScheduler.from_config(make_scheduler().config)
    reference = BandsInstructPix2PixPipeline.from_pretrained(
        str(tmp_path / "checkpoint"), scheduler=solver, safety_checker=None, requires_safety_checker=False
    )
    reference.set_progress_bar_config(disable=True)
    times, spaced = sampling_scheduler("dpm++", solver.config, 3).timesteps.tolist(), solver.set_timesteps
    solver.set_timesteps = lambda count, device: spaced(timesteps=times, device=device)
    noise = torch.randn(1, 4, SIDE // 2, SIDE // 2, generator=torch.Generator().manual_seed(5))
    wanted = reference(
        "one", image=BANDS[:1], num_inference_steps=3, guidance_scale=7.5, image_guidance_scale=1.5, latents=noise,
        output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close((predicted[:1] + 1) / 2, wanted, atol=1e-3, rtol=1e-3)


def searched(pretrained: Path, vae: Path, **changes: Any) -> SweepConfig:
    """A sweep over three and four bands."""
    changes = {"search": {"data.variant": {"choice": ["pnr", "cassis4"]}}, "budget": {"trials": 2}, **changes}
    return sweep_of(pretrained, model={"input_vae": str(vae)}, **changes)


def test_a_study_over_three_and_four_bands(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    # Floors know nothing of autoencoders, and take longer than the trials.
    monkeypatch.setattr("crism_mlops.studies.study._log_all_floors", lambda *_: None)
    tracker = new_tracker(tmp_path)
    sweep = searched(pretrained, trained[0], data={"views": ["whole"]}, seed=3)  # It draws one, then the other.
    summary = run_study(sweep, simulated_scenes, tracker, optuna_store(tmp_path), work_root=tmp_path / "work")
    assert (summary.complete, summary.failed) == (2, 0)
    runs = tracker.find(crism_kind="trial")
    assert {run.params["data.variant"] for run in runs} == {"pnr", "cassis4"}
    assert all(0.0 < run.metrics["val/rmse"] < 255.0 for run in runs)


# ---- the guard


def start(sweep: SweepConfig, scenes: list[Scene], folder: Path) -> None:
    """Run a study up to its first trial."""

    class Begun(Exception):  # noqa: N818
        pass

    def stop(*_: object, **__: object) -> None:
        raise Begun

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("crism_mlops.studies.study._log_all_floors", stop)
        with pytest.raises(Begun):
            run_study(sweep, scenes, new_tracker(folder), optuna_store(folder), work_root=folder / "work")


def test_an_autoencoder_that_saw_held_out_scenes_ends_a_study(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path
) -> None:
    folder, card = trained
    own = searched(pretrained, folder)
    start(own, simulated_scenes, tmp_path / "own")
    other = searched(pretrained, folder, split={"seed": 1})
    split = manifest_of(other, simulated_scenes).split
    leaked = (set(card.seen["train"]) & {*split.validation, *split.test}) | (
        set(card.seen["validation"]) & set(split.test)
    )
    assert leaked
    with pytest.raises(DatasetError, match=f"chosen by, {len(leaked)} scenes held out here") as error:
        start(other, simulated_scenes, tmp_path / "other")
    assert str(folder) in str(error.value)
    assert "train another one on the train scenes of this split (crism-mlops train-vae)" in str(error.value)
    told = searched(pretrained, folder, split={"seed": 1}, audit={"on_leak": "warn"})
    start(told, simulated_scenes, tmp_path / "told")
    # A study of three bands has no use for it.
    start(searched(pretrained, folder, split={"seed": 1}, search={}), simulated_scenes, tmp_path / "three")


def test_one_without_a_card_is_taken_with_a_warning(
    copied: Path, pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (copied / CARD).unlink()
    start(searched(pretrained, copied), simulated_scenes, tmp_path / "study")
    assert f"{copied} has no card: nobody can say which scenes it was trained on" in caplog.text


def test_another_normalisation_than_the_one_it_was_trained_on_is_said(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, caplog: pytest.LogCaptureFixture
) -> None:
    search = {"data.variant": {"choice": ["pnr", "cassis4"]}, "data.normalization": {"choice": ["physical", "minmax"]}}
    seen = input_vaes_seen(searched(pretrained, trained[0], search=search))
    assert list(seen.values()) == [trained[1].seen]
    assert "was trained on images of data.normalization physical; of minmax it may be worse" in caplog.text


def test_a_folder_that_is_not_there_ends_a_study_before_the_audit(
    pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"no autoencoder in diffusers layout .* make one with crism-mlops train-vae"):
        start(searched(pretrained, tmp_path / "absent"), simulated_scenes, tmp_path / "study")


def test_another_autoencoder_in_the_same_folder_is_another_study(
    copied: Path, pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path
) -> None:
    sweep, store = searched(pretrained, copied), open_store(optuna_store(tmp_path))
    tracker = new_tracker(tmp_path)
    manifest = build_manifest(simulated_scenes, sweep.data, sweep.split)
    open_study(sweep, manifest, store, tracker)
    open_study(sweep, manifest, store, tracker)
    vae = AutoencoderKL.from_pretrained(str(copied))
    with torch.no_grad():
        next(vae.parameters()).add_(1e-3)
    vae.save_pretrained(copied)
    with pytest.raises(StudyError, match=r"weights of model\.input_vae \(digest\)"):
        open_study(sweep, manifest, store, tracker)


def test_a_study_of_three_bands_has_the_identity_that_it_had(
    pretrained: Path, simulated_scenes: list[Scene], tmp_path: Path
) -> None:
    sweep = sweep_of(pretrained, model={"input_vae": str(tmp_path / "absent")})
    manifest = build_manifest(simulated_scenes, sweep.data, sweep.split)
    study = open_study(sweep, manifest, open_store(optuna_store(tmp_path)), new_tracker(tmp_path))
    assert "input_vae_digest" not in study.user_attrs["crism.identity"]
    assert len(input_manifests(sweep, simulated_scenes, manifest)) == 1


def test_a_checkpoint_has_seen_what_its_autoencoder_has(
    trained: tuple[Path, AutoencoderCard], pretrained: Path, simulated_scenes: list[Scene]
) -> None:
    config = searched(pretrained, trained[0], split={"seed": 1}).run_config({"data.variant": "cassis4"})
    manifest = build_manifest(simulated_scenes, config.data, config.split)
    seen = scenes_seen(config, manifest)
    assert set(seen["train"]) == {*manifest.split.train, *trained[1].seen["train"]}
    three = config.model_copy(update={"data": config.data.model_copy(update={"variant": "pnr"})})
    assert scenes_seen(three, manifest)["train"] == manifest.split.train


# ---- the command


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """`crism-mlops train-vae WORDS`, or `crism-mlops data WORDS`."""

    def call(*words: object) -> Ran:
        ran = console([*([] if words[0] == "data" else ["train-vae"]), *words], monkeypatch, capsys)
        return Ran(ran.code, ran.out, ran.err)

    return call


@pytest.fixture
def file(tmp_path: Path, pretrained: Path, simulated_scenes: list[Scene], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file whose scenes are there."""
    monkeypatch.setattr("crism_mlops.scenes.sources.load_scenes", lambda *_: simulated_scenes)
    place = tmp_path / "four.yaml"
    place.write_text(yaml.safe_dump(content_of(pretrained)))
    return place


def test_the_command(run: Callable[..., Ran], file: Path, tmp_path: Path) -> None:
    words = (file, "--out", "vae4", "--epochs", 2, "--learning-rate", 3e-3, "--batch-size", 4)
    ran = run(*words)
    assert ran.code == 0, ran.err
    lines = ran.out.splitlines()
    assert lines[0] == "RMSE on 3 validation scenes, 0..255:"
    for band in ("BLU", "PAN", "NIR", "RED", "all"):
        (row,) = [line for line in lines if f" {band} " in line]
        before, after = (float(word) for word in row.replace("│", " ").split()[1:])
        assert after < before
    assert lines[-1] == "use it: --set data.variant=cassis4 --set model.input_vae=vae4"
    assert "epoch 2 of 2, loss" in ran.err
    card = read_card(tmp_path / "vae4")
    # One of its own is replaced.
    document = run(*words, "--json").json
    assert card is not None
    assert (document["folder"], document["epoch"]) == ("vae4", card.epoch)
    assert document["after"] == document["history"][card.epoch] == card.history[card.epoch]


def test_errors_of_the_command(run: Callable[..., Ran], file: Path, tmp_path: Path, pretrained: Path) -> None:
    unet = Path(__file__).parents[1] / "sweeps" / "quickstart-unet.yaml"
    assert "its model is a U-Net" in run(unet, "--out", "vae4").error
    assert "nowhere.yaml: cannot be read" in run("nowhere.yaml", "--out", "vae4").error
    there = tmp_path / "there"
    _notes(there)
    assert "it exists and was not made by train-vae" in run(file, "--out", there).error
    assert "no folder" in run(file, "--out", "vae4", "--set", "model.pretrained=/no/such/folder").err
    source = ("--set", "data.source=mtrdr", "--set", "data.path=no/such/folder")
    assert "no such folder: no/such/folder" in run(file, "--out", "vae4", *source).error
    assert "--learning-rate 2.0" in run(file, "--out", "vae4", "--learning-rate", 2).error
    assert run(file).code == 2
    assert not (tmp_path / "vae4").exists()


def test_the_audit_command_asks_the_same_as_a_sweep(
    run: Callable[..., Ran], file: Path, trained: tuple[Path, AutoencoderCard]
) -> None:
    four = ("--set", "data.variant=cassis4", "--set", f"model.input_vae={trained[0]}")
    ran = run("data", "audit", file, *four, "--json")
    (found,) = [f for f in ran.json["findings"] if f["check"] == "input autoencoder"]
    assert (found["verdict"], "on none of the 9 scenes held out here" in found["finding"]) == ("ok", True)
    ran = run("data", "audit", file, *four, "--set", "split.seed=1", "--json")
    assert ran.code == 1
    assert "test data leaks: input autoencoder: model.input_vae" in ran.err


def test_ctrl_c(run: Callable[..., Ran], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crism_mlops.scenes.sources.load_scenes", interrupt)
    ran = run(file, "--out", "vae4")
    assert ran.code == 130
    assert ran.err.splitlines()[-1].endswith("interrupted: nothing is written; the same command starts again")
    assert not (tmp_path / "vae4").exists()
