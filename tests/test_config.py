"""The sweep file: what is refused and how it is said, and what a study's identity is made of."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from crism_mlops.config import (
    DataConfig,
    InstructPix2PixModel,
    RunConfig,
    SweepConfig,
    UNetModel,
    digest_of,
    dotted_keys,
    extremes,
    load_sweep,
)
from crism_mlops.dataset.prompts import render
from crism_mlops.errors import ConfigError

UNET = """
study: demo
experiment: crism
budget: {trials: 4}
data: {source: simulated, variant: pnr, resolution: 64}
model: {kind: unet, encoder_weights: null}
train:
  learning_rate: 1e-4
  epochs: 3
search:
  train.learning_rate: {loguniform: [1e-4, 1e-2]}
  data.variant: {choice: [pnr, bpn, pca, rect]}
"""
IP2P = UNET.replace("{kind: unet, encoder_weights: null}", "{kind: instruct_pix2pix, pretrained: tiny}")


def sweep(tmp_path: Path, text: str = UNET, *overrides: str) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(text)
    return load_sweep(path, overrides)


def one_line(error: BaseException) -> str:
    message = str(error)
    assert message.strip()
    assert "\n" not in message
    return message


def refused(tmp_path: Path, text: str = UNET, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep(tmp_path, text, *overrides)
    message = one_line(caught.value)
    assert len(message) < 1500
    return message


# --- what is read


def test_a_whole_file(tmp_path: Path) -> None:
    config = sweep(tmp_path)
    assert isinstance(config.model, UNetModel)
    assert config.model.encoder_weights is None
    assert config.train.learning_rate == 1e-4
    assert config.budget.trials == 4
    assert [extremes(d) for d in config.search.values()] == [(1e-4, 1e-2), ("pnr", "bpn", "pca", "rect")]
    with pytest.raises(ValidationError, match="frozen"):
        config.budget.trials = 5  # type: ignore[misc]


def test_numbers_as_yaml_writes_them(tmp_path: Path) -> None:
    """YAML 1.1 reads 1e-4 as text: it is a number here, in a choice too."""
    assert yaml.safe_load("1e-4") == "1e-4"
    text = UNET.replace("{loguniform: [1e-4, 1e-2]}", "{choice: [1e-4, 5.0e-5, 1E-3]}")
    config = sweep(tmp_path, text, "train.weight_decay=1e-6")
    assert config.train.weight_decay == 1e-6
    choices = extremes(config.search["train.learning_rate"])
    assert choices == (1e-4, 5e-5, 1e-3)
    assert all(isinstance(value, float) for value in choices)
    assert config.run_config({"train.learning_rate": choices[0]}).train.learning_rate == 1e-4


def test_overrides(tmp_path: Path) -> None:
    config = sweep(
        tmp_path, UNET, "train.epochs=7", "model.encoder_weights=imagenet", "data.views=[whole, vflip]", "split.seed=3",
        "search.train.batch_size={choice: [2, 4]}", "data.path=a=b",
    )  # fmt: skip
    assert config.train.epochs == 7
    assert config.train.learning_rate == 1e-4
    assert config.data.views == ("whole", "vflip")
    assert config.split.seed == 3
    assert config.data.path == "a=b"
    assert set(config.search) == {"train.learning_rate", "data.variant", "train.batch_size"}
    assert sweep(tmp_path, UNET, "search={}").search == {}


@pytest.mark.parametrize("override", ["train.epochs", "=3", "", "train.epochs: 3"])
def test_override_without_a_value(tmp_path: Path, override: str) -> None:
    assert "expected key=value, e.g. --set train.epochs=3" in refused(tmp_path, UNET, override)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", "unknown key train.epoch; did you mean train.epochs?"),
        ("train.epochs.x=3", "train.epochs.x: epochs is 3, not a section"),
        ("train.epochs=[1", "the value is not YAML"),
        ("train.epochs=2001-99-99", "the value is not YAML"),
        ("train.epochs=0", "train.epochs: Input should be greater than or equal to 1 (found 0)"),
        ("data=5", "data: "),
        ("tr\nain=5", "unknown key"),
        ("a\nb", "expected key=value"),
        ("search.train.epoch={choice: [1]}", "search.train.epoch: no such key for unet; did you mean train.epochs?"),
    ],
)
def test_bad_overrides(tmp_path: Path, override: str, words: str) -> None:
    assert words in refused(tmp_path, UNET, override)


# --- what is refused


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("epochs: 3", "epoch: 3", "unknown key train.epoch; did you mean train.epochs?"),
        ("epochs: 3", "lerning_rate: 3", "unknown key train.lerning_rate; did you mean train.learning_rate?"),
        ("trials: 4", "trails: 4", "unknown key budget.trails; did you mean budget.trials?"),
        ("resolution: 64", "resolutoin: 64", "did you mean data.resolution?"),
        ("resolution: 64", "resolution: 65", "data.resolution: Input should be a multiple of 32 (found 65)"),
        ("source: simulated", "source: nasa", "data.source: Input should be 'mtrdr', 'pairs' or 'simulated'"),
        ("kind: unet", "kind: vit", "model.kind: expected one of unet, instruct_pix2pix (found 'vit')"),
        ("kind: unet, ", "", "model"),
        ("study: demo", "", "study is missing; add it"),
        ("study: demo", "study: ../demo", "study: "),
        ("train:", "learning: 3\ntrain:", "unknown key learning"),
        ("encoder_weights: null", "prompt: x", "unknown key model.prompt"),
        ("{loguniform: [1e-4, 1e-2]}", "{loguniform: [0, 1e-2]}", "loguniform needs 0 < low <= high"),
        ("{loguniform: [1e-4, 1e-2]}", "{loguniform: [1e-2, 1e-4]}", "loguniform needs 0 < low <= high"),
        ("{loguniform: [1e-4, 1e-2]}", "{uniform: [0.5, 0.1]}", "uniform needs low <= high"),
        ("{loguniform: [1e-4, 1e-2]}", "{loguniform: [1e-4, 2]}", "search.train.learning_rate"),
        ("{loguniform: [1e-4, 1e-2]}", "{logunifrom: [1e-4, 1]}", "expected one of choice, uniform, loguniform, int"),
        ("{loguniform: [1e-4, 1e-2]}", "[1e-4, 1]", "expected one of choice, uniform, loguniform, int"),
        ("{loguniform: [1e-4, 1e-2]}", "{choice: [1], int: [1, 2]}", "expected one of choice, uniform, loguniform"),
        ("{loguniform: [1e-4, 1e-2]}", "{choice: []}", "search.train.learning_rate"),
        ("train.learning_rate: {log", "train.learning_rat: {log", "did you mean train.learning_rate?"),
        ("train.learning_rate: {log", "learning_rate: {log", "did you mean train.learning_rate?"),
        ("data.variant: {choice: [pnr", "data.variant: {choice: [xyz", "search.data.variant"),
        ("data.variant: {choice: [pnr, bpn, pca, rect]}", "data.resolution: {int: [64, 128]}", "multiple of 32"),
        ("data.variant: {choice: [pnr, bpn, pca, rect]}", "data.resolution: {int: [128, 64, 32]}", "int needs low"),
        ("data.variant: {choice: [pnr, bpn, pca, rect]}", "data.resolution: {int: [64, 128, 0]}", "int needs"),
        ("data.variant: {choice: [pnr, bpn, pca, rect]}", "model.prompt: {choice: [a]}", "no such key for unet"),
        ("data.variant: {choice: [pnr, bpn, pca, rect]}", "budget.trials: {choice: [1]}", "no such key for unet"),
        ("variant: pnr, ", "variant: cassis, ", "found 'cassis'"),
    ],
)  # fmt: skip
def test_refusals(tmp_path: Path, old: str, new: str, words: str) -> None:
    assert UNET.count(old) == 1
    message = refused(tmp_path, UNET.replace(old, new))
    assert words in message
    assert message.startswith(str(tmp_path / "sweep.yaml"))


def test_a_unet_is_not_offered_what_it_has_not(tmp_path: Path) -> None:
    """`model.prompt` is a key, but not one of the U-Net's: it must not be its own nearest key."""
    message = refused(tmp_path, UNET, "model.prompt=x")
    assert "unknown key model.prompt" in message
    assert "did you mean model.prompt" not in message
    assert sweep(tmp_path, IP2P, "model.prompt=x").model.prompt == "x"  # type: ignore[union-attr]
    assert "did you mean model.prompt?" in refused(tmp_path, IP2P, "model.promt=x")
    assert "search.model.encoder: no such key for instruct_pix2pix" in refused(
        tmp_path, IP2P, "search.model.encoder={choice: [resnet18]}"
    )


@pytest.mark.parametrize(
    "key",
    ["seed", "device", "data.source", "data.path", "data.cache", "data.simulated.seed", "data.carbonate.minimum_depth",
     "data.target", "data.target_normalization", "split.seed", "split", "evaluate.seed", "model.kind"],
)  # fmt: skip
def test_what_is_compared_is_fixed(tmp_path: Path, key: str) -> None:
    message = refused(tmp_path, UNET, f"search.{key}={{choice: [1]}}")
    assert f"search.{key}: it decides what is compared, so it is fixed for a study" in message


@pytest.mark.parametrize("key", ["data", "model"])
def test_whole_sections_are_fixed_where_a_key_of_theirs_is(tmp_path: Path, key: str) -> None:
    """Searching `data` would change `data.target` behind the rule's back."""
    override = "search.data={choice: [{source: simulated, target: fal}, {source: simulated, target: car}]}"
    if key == "model":
        override = "search.model={choice: [{kind: unet}, {kind: instruct_pix2pix}]}"
    assert "fixed for a study" in refused(tmp_path, UNET, override)


def test_searchable(tmp_path: Path) -> None:
    config = sweep(
        tmp_path, IP2P, "search.model.prompt={choice: [a, 'at {longitude}']}",
        "search.train.balance={choice: [none, weighted]}",
        "search.model.text_encoder={choice: [frozen, trained]}", "search.train.batch_size={int: [2, 8, 2]}",
        "search.model.text_guidance={uniform: [1, 7.5]}", "search.data.normalization={choice: [physical, minmax]}",
    )  # fmt: skip
    assert len(config.search) == 8


def test_instruct_pix2pix_takes_three_channels(tmp_path: Path) -> None:
    assert "takes three" in refused(tmp_path, IP2P, "data.variant=cassis4")
    message = refused(tmp_path, IP2P, "search.data.variant={choice: [pnr, cassis4]}")
    assert "search.data.variant" in message
    assert "takes three" in message
    assert sweep(tmp_path, UNET, "data.variant=cassis4").data.variant == "cassis4"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variant": "bpn"}, "variant bpn cannot be made from pairs"),
        ({"variant": "pca"}, "variant pca cannot be made from pairs"),
        ({"normalization": "physical"}, "already stretched"),
        ({"normalization": "percentile"}, "already stretched"),
        ({"target_normalization": "physical"}, "already stretched"),
        ({"target": "car"}, "pairs hold the target fal, not car"),
    ],
)
def test_pairs_restrictions(changes: dict[str, Any], words: str) -> None:
    values = {"source": "pairs", "normalization": "minmax", "target_normalization": "minmax"}
    DataConfig.model_validate(values)
    with pytest.raises(ValidationError, match=words):
        DataConfig.model_validate(values | changes)


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("data: {source: simulated, carbonate: {barren_fraction: 0.2}}", "barren_fraction exceeds bearing_fraction"),
        ("data: {source: simulated, simulated: {seed: 30000}}", "less than 30000"),
        ("data: {source: simulated, views: []}", "views is empty"),
        ("data: {source: simulated}\nsplit: {validation: 0.5, test: 0.5}", "leaves nothing to train on"),
        ("data: {source: simulated}\nsplit: {by: pixel}", "split.by"),
        ("data: {source: simulated}\ndevice: tpu", "device"),
        ("data: {source: simulated}\ntrain: {learning_rate: fast}", "train.learning_rate"),
        ("data:", "data: "),
    ],
)
def test_sections(tmp_path: Path, section: str, words: str) -> None:
    text = f"study: a\nexperiment: b\nmodel: {{kind: unet}}\n{section}\n"
    assert words in refused(tmp_path, text)


@pytest.mark.parametrize(
    "prompt",
    ["{lat}", "{}", "{0}", "{longitude", "longitude}", "{longitude.real}", "{longitude[0]}", "{longitude:.1f}",
     "{latitude:d}", "{location!x}", "", "{location:{latitude}}"],
)  # fmt: skip
def test_prompts_that_cannot_be_filled(prompt: str) -> None:
    with pytest.raises(ValidationError):
        InstructPix2PixModel(kind="instruct_pix2pix", prompt=prompt)


@settings(max_examples=100, deadline=None)
@given(
    prompt=st.text(alphabet="{}:!.[]0dflongitude ", max_size=16) | st.sampled_from(["{latitude} {location}", "{{x}}"])
)
def test_a_prompt_that_is_accepted_can_be_filled(prompt: str) -> None:
    try:
        InstructPix2PixModel(kind="instruct_pix2pix", prompt=prompt)
    except ValidationError:
        return
    for values in ((77.5, 18.4, "jezero_crater"), (None, None, None)):
        assert isinstance(render(prompt, *values), str)


def test_another_autoencoder_needs_its_unet(tmp_path: Path) -> None:
    assert "set model.scratch_unet as well" in refused(tmp_path, IP2P, "model.vae=/weights/taesd")
    config = sweep(tmp_path, IP2P, "model.vae=/weights/taesd", "model.scratch_unet.layers_per_block=2")
    assert isinstance(config.model, InstructPix2PixModel)
    assert config.model.scratch_unet is not None


# --- files


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "found NoneType"),
        (b"- a\n- b\n", "found list"),
        (b"study: [1", "not YAML"),
        (b"study: {a: b\n\ttrials: 3", "not YAML"),
        (b"study: !!python/object/apply:os.system ['true']", "not YAML"),
        (b"study: 2001-99-99", "not YAML"),
        (b"[" * 20000, "not YAML"),
        (b"study: \xff\xfe", "cannot be read"),
        (b"study: a\nstudy: b\n", "the key study stands twice"),
        # A thousand million values in ten lines, and a list within itself.
        (
            b"a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n"
            + b"".join(b"a%d: &a%d [%s]\n" % (i, i, b", ".join([b"*a%d" % (i - 1)] * 10)) for i in range(1, 9)),
            "with its aliases written out it has more than 100000 values",
        ),
        (b"search: &a [*a]\n", "an alias stands within what it names"),
        (b"1: 2\n", "sweep.yaml"),
        (b"study: a\n? [x]\n: y\n", "sweep.yaml"),
    ],
)
def test_files_that_are_no_sweep(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_sweep(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_aliases_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "plain.yaml").write_text(f"{UNET}split: {{validation: 0.2, test: 0.2}}\n")
    (tmp_path / "alias.yaml").write_text(f"{UNET}split: {{validation: &a 0.2, test: *a}}\n")
    assert load_sweep(tmp_path / "alias.yaml") == load_sweep(tmp_path / "plain.yaml")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(ConfigError, match=r"cannot be read .*; give the path of a sweep file"):
            load_sweep(path)


@settings(max_examples=100, deadline=None)
@given(
    key=st.sampled_from(sorted(dotted_keys(SweepConfig))),
    value=st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
        max_leaves=5,
    ),
)
def test_nothing_but_config_errors(key: str, value: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(UNET)
    try:
        config = load_sweep(path, (f"{key}={yaml.safe_dump(value)}",))
    except ConfigError as error:
        one_line(error)
        return
    assert len(config.digest) == 16
    assert isinstance(config.identity, dict)
    config.run_config({})


# --- one trial's configuration, and the study's identity


def test_run_config(tmp_path: Path) -> None:
    config = sweep(tmp_path)
    run = config.run_config({"train.learning_rate": 0.005, "data.variant": "rect"})
    assert type(run) is RunConfig
    assert (run.train.learning_rate, run.data.variant) == (0.005, "rect")
    assert run.train.epochs == 3
    assert (config.train.learning_rate, config.data.variant) == (1e-4, "pnr")
    assert run.data.views == config.data.views
    with pytest.raises(ConfigError, match=r"train\.learning_rate"):
        config.run_config({"train.learning_rate": -1})
    with pytest.raises(ConfigError, match=r"unknown key train\.lr"):
        config.run_config({"train.lr": 1})


def test_digest(tmp_path: Path) -> None:
    config = sweep(tmp_path)
    run = config.run_config({})
    assert run.digest == config.run_config({}).digest
    assert len(run.digest) == 16
    same = sweep(tmp_path, UNET, "device=cpu", "data.cache=/elsewhere", "budget.trials=9", "study=other").run_config({})
    assert same.digest == run.digest
    for override in ("seed=1", "data.target=car", "train.epochs=4", "split.seed=1", "model.encoder=resnet18"):
        assert sweep(tmp_path, UNET, override).run_config({}).digest != run.digest
    assert config.run_config({"data.variant": "bpn"}).digest != run.digest
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1}) != digest_of({"a": 1, "b": 3})


def test_identity(tmp_path: Path) -> None:
    before = sweep(tmp_path).identity
    same = ("budget.trials=9", "study=other", "experiment=other", "device=cpu", "data.cache=/x",
            "budget.failure_rate=1", "sampler.startup_trials=3", "pruner.kind=median", "train.learning_rate=0.01",
            "data.variant=bpn")  # fmt: skip
    for override in same:
        assert sweep(tmp_path, UNET, override).identity == before, override
    others = ("seed=1", "data.target=car", "data.simulated.scenes=5", "train.epochs=9", "objective.metric=val/pcc",
              "search.train.batch_size={choice: [2, 4]}", "search.train.learning_rate={loguniform: [1e-5, 1e-2]}",
              "split.seed=4", "evaluate.seed=2", "data.carbonate.minimum_depth=0.02")  # fmt: skip
    for override in others:
        after = sweep(tmp_path, UNET, override).identity
        changed = {k for k in before | after if before.get(k) != after.get(k)}
        key = override.split("=")[0]
        # The difference names the key, and nothing else but a searched key's default.
        assert key in changed
        assert changed <= {key, key.removeprefix("search.")}
    assert before["search.data.variant"] == {"choice": ["pnr", "bpn", "pca", "rect"]}
    assert "data.variant" not in before


@pytest.mark.parametrize(
    ("metric", "direction"),
    [("val/rmse", "minimize"), ("val/lpips", "minimize"), ("val/pcc", "maximize"), ("val/ssim", "maximize")],
)
def test_objective(tmp_path: Path, metric: str, direction: str) -> None:
    assert sweep(tmp_path, UNET, f"objective.metric={metric}").objective.direction == direction


def test_dotted_keys() -> None:
    keys = set(dotted_keys(RunConfig, {"model": UNetModel}))
    assert {"model.encoder", "data.simulated.seed", "train.epochs", "model"} <= keys
    assert "model.prompt" not in keys
    assert "model.prompt" in set(dotted_keys(RunConfig, {"model": InstructPix2PixModel}))
    assert "model.scratch_unet.layers_per_block" in set(dotted_keys(RunConfig))


def test_constraints(tmp_path: Path) -> None:
    text = UNET + "constraints: {val_worst/rmse: {max: 30}, val/ssim: {min: 0.5, max: 0.9}}\n"
    limits = sweep(tmp_path, text).constraints
    assert [limits["val_worst/rmse"].excess(v) for v in (29.0, 30.0, 31.5)] == [-1.0, 0.0, 1.5]
    assert [limits["val/ssim"].excess(v) for v in (0.75, 0.25, 1.0)] == pytest.approx([-0.15, 0.25, 0.1])
    assert str(limits["val/ssim"]) == "at most 0.9 and at least 0.5"


@pytest.mark.parametrize(
    ("constraints", "says"),
    [
        ("{test/rmse: {max: 1}}", "val/rmse"),
        ("{val/rmse: {}}", "a limit needs max or min"),
        ("{val/rmse: 12}", "say which way it limits: {max: 12} or {min: 12}"),
        ("{val/rmse: {maximum: 3}}", "unknown key"),
        ("{val/rmse: {max: 1, min: 2}}", "nothing lies between min 2 and max 1"),
        ("{val/rmse: {max: .nan}}", "finite"),
    ],
)
def test_constraints_that_mean_nothing(tmp_path: Path, constraints: str, says: str) -> None:
    assert says in refused(tmp_path, UNET + f"constraints: {constraints}\n")


# --- budget, samplers, pruners


@pytest.mark.parametrize(
    ("old", "words"),
    [("trials=9", "unknown key trials: it is budget.trials now"), ("max_failures=2", "it is budget.failure_rate now")],
)
def test_keys_of_earlier_versions(tmp_path: Path, old: str, words: str) -> None:
    assert words in refused(tmp_path, UNET, old)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sampler.kind=tpee", "sampler.kind: expected one of tpe, gp, cmaes"),
        ("sampler.kind=tpee", "(found 'tpee'); did you mean tpe?"),
        ("sampler={kind: gp, sigma: 0.3}", "unknown key sampler.sigma: an option of cmaes, and the kind is gp"),
        (
            "sampler={kind: random, startup_trials: 3}",
            "unknown key sampler.startup_trials: an option of tpe, gp, cmaes",
        ),
        ("sampler={kind: nsga2, populaton: 3}", "unknown key sampler.populaton; did you mean sampler.population?"),
        ("sampler={kind: qmc, sequence: sobl}", "sampler.sequence: Input should be 'sobol' or 'halton' (found 'sobl')"),
        ("sampler=tpe", "sampler"),
        ("sampler={kind: cmaes, sigma: 0}", "sampler.sigma: Input should be greater than 0 (found 0)"),
        ("pruner={kind: medain}", "did you mean median?"),
        ("pruner={kind: median, percentile: 3}", "unknown key pruner.percentile: an option of percentile, and"),
        (
            "pruner={warmup_epochs: 3}",
            "unknown key pruner.warmup_epochs: an option of median, percentile, and the kind",
        ),
        ("pruner={kind: hyperband, min_epochs: 5}", "min_epochs 5 exceeds the 3 epochs of a trial"),
        ("pruner={kind: patient}", "pruner.patience is missing; add it"),
        (
            "pruner={kind: patient, patience: 1, inner: {kind: patient}}",
            "pruner.inner.kind: expected one of none, median",
        ),
        ("pruner={kind: patient, patience: 1, inner: {kind: median, warmup: 1}}", "unknown key pruner.inner.warmup"),
        ("budget.failure_rate=0", "budget.failure_rate"),
        ("budget.hours=0", "budget.hours"),
        ("budget.patience=0", "budget.patience"),
        ("repeat={seeds: 1}", "repeat.seeds"),
        ("warm_start={best: 1}", "warm_start.study is missing"),
        ("engine.lease_seconds=1", "engine.lease_seconds"),
        ("objective.metric=val/mse", "objective.metric: Input should be 'val/rmse'"),
        ("objective.metric=[val/rmse, val/rmse]", "objective.metric: val/rmse stands twice"),
        ("objective.metric=[]", "an objective needs a figure"),
    ],
)
def test_study_sections(tmp_path: Path, override: str, words: str) -> None:
    message = refused(tmp_path, UNET, override)
    assert words in message
    assert "more)" not in message


def test_several_objectives(tmp_path: Path) -> None:
    both = "objective.metric=[val/rmse, val/pcc]"
    config = sweep(tmp_path, UNET, both)
    assert config.objective.metrics == ("val/rmse", "val/pcc")
    assert (config.objective.first, config.objective.direction) == ("val/rmse", "minimize")
    assert config.objective.directions == ["minimize", "maximize"]
    assert sweep(tmp_path).objective.metrics == ("val/rmse",)
    assert "pruner median: with several objectives" in refused(tmp_path, UNET, both, "pruner.kind=median")
    assert "budget.patience: with several" in refused(tmp_path, UNET, both, "budget.patience=3")
    numbers = "search={train.learning_rate: {loguniform: [1e-4, 1e-2]}}"
    assert "cmaes: it follows one objective only" in refused(tmp_path, UNET, both, numbers, "sampler.kind=cmaes")
    for kind in ("qmc", "nsga2", "tpe", "gp", "random"):
        sweep(tmp_path, UNET, both, f"sampler.kind={kind}")


def test_samplers_that_do_not_suit_the_space(tmp_path: Path) -> None:
    choices = (
        "search={train.batch_size: {choice: [2, 4]}, data.variant: {choice: [pnr, bpn]}, train.epochs: {int: [1, 9]}}"
    )
    assert "cmaes: 2 of 3 searched entries are choices" in refused(tmp_path, UNET, choices, "sampler.kind=cmaes")
    assert "grid: search.train.learning_rate is a range" in refused(tmp_path, UNET, "sampler.kind=grid")
    assert sweep(tmp_path, UNET, choices, "sampler.kind=grid").sampler.kind == "grid"
    many = "search={train.warmup_steps: {int: [0, 999]}, train.epochs: {int: [1, 999]}}"
    assert "grid: 999000 combinations" in refused(tmp_path, UNET, many, "sampler.kind=grid")
    when = "search={data.variant: {choice: [pnr, bpn]}, train.epochs: {int: [1, 9], when: {data.variant: pnr}}}"
    for kind in ("gp", "cmaes", "qmc", "grid"):
        assert f"sampler {kind}: search.train.epochs has `when`" in refused(
            tmp_path, UNET, when, f"sampler.kind={kind}"
        )
    numbers = "search={train.learning_rate: {loguniform: [1e-4, 1e-2]}}"
    limit = "constraints={val/rmse: {max: 30}}"
    assert "cmaes: it does not follow constraints" in refused(tmp_path, UNET, numbers, limit, "sampler.kind=cmaes")
    for kind in ("tpe", "random", "nsga2"):
        sweep(tmp_path, UNET, when, f"sampler.kind={kind}")


# --- groups and conditions

SIZE = "size: {group: {small: {train.batch_size: 2, train.epochs: 9}, large: {train.batch_size: 8, train.epochs: 3}}}"


@pytest.mark.parametrize(
    ("search", "words"),
    [
        ("train: {group: {a: {train.epochs: 1}}}", "search.train: this is a key of its own"),
        ("a.b: {group: {a: {train.epochs: 1}}}", "search.a.b: a group's name is of a-z"),
        ("size: {group: {}}", "search.size.group"),
        ("size: {group: {a: {}}}", "group a sets nothing"),
        (
            "size: {group: {a: {train.epoch: 1}}}",
            "search.size.train.epoch: no such key for unet; did you mean train.ep",
        ),
        ("size: {group: {a: {train.epochs: 0}}}", "search.size, value 'a': train.epochs: Input should be greater"),
        ("size: {group: {a: {data.target: car}}}", "search.size.data.target: it decides what is compared"),
        ("size: {group: {a: {train.epochs: 1}, b: {train.batch_size: 1}}}", "a and b must set the same keys; only one"),
        (
            f"{SIZE}, train.epochs: {{int: [1, 3]}}",
            "search.train.epochs: it sets train.epochs, and so does search.size",
        ),
        (f"{SIZE}, other: {{group: {{a: {{train.epochs: 1}}}}}}", "search.other: it sets train.epochs, and so does"),
        ("size: {group: {a: {train: {}, train.epochs: 3}}}", "train.epochs lies in train"),
        ("data.variant: {choice: [pnr], when: {train.epochs: 3}}", "when.train.epochs: it is not searched"),
        ("train.epochs: {int: [1, 3]}, data.variant: {choice: [pnr], when: {train.epochs: 3}}", "it is a range"),
        (f"{SIZE}, data.variant: {{choice: [pnr], when: {{size: big}}}}", "'big' is none of 'small', 'large'"),
        (f"{SIZE}, data.variant: {{choice: [pnr], when: {{size: []}}}}", "search.data.variant.when.size"),
        (f"{SIZE}, data.variant: {{choice: [pnr], wen: {{size: small}}}}", "did you mean search.data.variant.when?"),
        (
            "data.variant: {choice: [pnr], when: {train.balance: none}}, "
            "train.balance: {choice: [none], when: {data.variant: pnr}}",
            "depend on each other",
        ),
        (
            "data.variant: {choice: [pnr, bpn]}, train.balance: {choice: [none], when: {data.variant: pnr}}, "
            "train.epochs: {int: [1, 2], when: {train.balance: none, data.variant: bpn}}",
            "search.train.epochs: it is never searched",
        ),
        ("train.epochs: {uniform: [1, 5]}", "search.train.epochs, value 2."),
        ("train.learning_rate: {uniform: [0.1, .inf]}", "uniform needs low <= high, both finite"),
        ("train.epochs: {int: [1, 100000000000000000000]}", "at most 2^53"),
    ],
)
def test_search_blocks_that_are_refused(tmp_path: Path, search: str, words: str) -> None:
    assert words in refused(tmp_path, UNET, f"search={{{search}}}")


def test_a_condition_is_part_of_what_is_checked(tmp_path: Path) -> None:
    """Zero terminal SNR is refused beside epsilon, the file's own, and not where it is searched."""
    text = IP2P.replace("pretrained: tiny", "pretrained: tiny, prediction: epsilon")
    snr = "model.zero_terminal_snr: {choice: [true, false]"
    assert "epsilon with zero_terminal_snr" in refused(tmp_path, text, f"search={{{snr}}}}}")
    prediction = "model.prediction: {choice: [epsilon, sample]}"
    config = sweep(tmp_path, text, f"search={{{prediction}, {snr}, when: {{model.prediction: sample}}}}}}")
    assert config.identity["model.zero_terminal_snr"] is None, "where it is not searched, the default counts"
    assert "model.prediction" not in config.identity


def test_a_key_of_a_section_that_a_choice_makes(tmp_path: Path) -> None:
    lora = "search={model.lora: {choice: [null, {alpha: 16}]}, model.lora.rank: {int: [4, 16]"
    assert "make it conditional: when: {model.lora: ...}" in refused(tmp_path, IP2P, f"{lora}}}}}")
    config = sweep(tmp_path, IP2P, f"{lora}, when: {{model.lora: {{alpha: 16}}}}}}}}")
    choices = {"model.lora.rank": 5, "model.lora": config.search["model.lora"].choice[1]}  # type: ignore[union-attr]
    for _ in range(2):
        assert config.run_config(choices).model.lora.model_dump() == {"rank": 5, "alpha": 16.0}  # type: ignore[union-attr]
    assert config.search["model.lora"].choice[1] == {"alpha": 16}, "a configuration is never changed"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ("{train.epochs: 3}", "enqueue.0.train.epochs: it is not searched"),
        ("{train.learning_rate: 1}", "enqueue.0.train.learning_rate: 1 lies outside 0.0001 to 0.01"),
        ("{train.learning_rate: x}", "'x' is no number"),
        ("{size: big}", "enqueue.0.size: 'big' is none of 'small', 'large'"),
        ("{train.warmup_steps: 3}", "3 is not among the integers 2 to 9"),
        (
            "{size: large, train.warmup_steps: 4}",
            "it is searched only where size is one of 'small'; here it is 'large'",
        ),
    ],
)
def test_enqueued(tmp_path: Path, given_: str, words: str) -> None:
    search = f"{SIZE}, train.learning_rate: {{loguniform: [1e-4, 1e-2]}}"
    search = f"search={{{search}, train.warmup_steps: {{int: [2, 9, 2], when: {{size: small}}}}}}"
    fine = "enqueue=[{size: small, train.learning_rate: 1e-3, train.warmup_steps: 4}, {train.warmup_steps: 8}, {}]"
    assert len(sweep(tmp_path, UNET, search, fine).enqueue) == 3
    assert words in refused(tmp_path, UNET, search, f"enqueue=[{given_}]")


def test_how_a_study_searches_is_not_what_it_is(tmp_path: Path) -> None:
    before = sweep(tmp_path)
    after = sweep(
        tmp_path, UNET, "sampler={kind: nsga2}", "pruner={kind: hyperband}", "repeat={best: 2}",
        "warm_start={study: other}", "enqueue=[{data.variant: bpn}]", "engine.attempts=9", "budget.hours=3",
    )  # fmt: skip
    assert after.identity == before.identity
    assert after.run_config({}).digest == before.run_config({}).digest


def test_another_search_drops_what_was_enqueued(tmp_path: Path) -> None:
    text = UNET + "enqueue: [{data.variant: bpn}]\n"
    assert len(sweep(tmp_path, text, "search.train.epochs={int: [1, 3]}").enqueue) == 1
    assert sweep(tmp_path, text, "search={}").enqueue == ()
    assert "it is not searched" in refused(tmp_path, text, "search={}", "enqueue=[{data.variant: bpn}]")
