"""Building scenes and data sets into the store: once, whoever asks, and what is left out is told."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ode_server import ode_server

from crism_mlops.cluster import HERE, Where
from crism_mlops.config import DataConfig, SweepConfig
from crism_mlops.dataset.build import build_data_sets, data_sections, fetch_tasks
from crism_mlops.dataset.manifest import build_manifest
from crism_mlops.dataset.samples import sample_name, samples_bytes
from crism_mlops.dataset.variants import fit_transform, target_image
from crism_mlops.dataset.views import apply_view, views_of
from crism_mlops.errors import ConfigError, DatasetError, ProductError, SceneError, StoreError
from crism_mlops.products.digests import RECEIPT, Digests, drop_images, known_digests, observation_digests
from crism_mlops.products.observations import observation_folders, open_observation
from crism_mlops.products.ode import Query, search
from crism_mlops.products.service import Service
from crism_mlops.products.simulate import Simulation, write_simulation
from crism_mlops.scenes.build import SceneTask, build_scenes, load_built, open_store, scene_name
from crism_mlops.scenes.scene import SCENE_KINDS, scene_from_products
from crism_mlops.scenes.sources import load_scenes
from crism_mlops.scenes.store import map_arrays, read_facts, write_arrays


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve simulated observations, 32 x 32 pixels; look, don't touch."""
    return write_simulation(Simulation(scenes=12, size=32, seed=11), tmp_path_factory.mktemp("archive"))


def configuration(root: Path, **more: Any) -> DataConfig:
    return DataConfig.model_validate({"source": "mtrdr", "path": str(root), "resolution": 32, **more})


def tasks(config: DataConfig, **more: Any) -> list[SceneTask]:
    root = Path(str(config.path))
    return [SceneTask(folder, root, config, **more) for folder in observation_folders(root)]


def sweep_of(config: DataConfig, **more: Any) -> SweepConfig:
    content = {
        "study": "small", "experiment": "tests", "data": config.model_dump(mode="json"),
        "model": {"kind": "unet", "encoder": "resnet18", "encoder_weights": None}, **more,
    }  # fmt: skip
    return SweepConfig.model_validate(content)


def silent(what: str, done: int, total: int) -> None:
    assert 0 < done <= total


# --- scenes


def test_a_stored_scene_is_what_its_products_give(archive: Path) -> None:
    config = configuration(archive)
    built = build_scenes(tasks(config))
    assert [one.problem for one in built] == [None] * 12
    assert all(one.made for one in built)
    for scene, folder in zip(load_built(built, config), observation_folders(archive), strict=True):
        direct = scene_from_products(open_observation(folder), config)
        for name in ("bands", "target", "valid", "carbonate"):
            np.testing.assert_array_equal(getattr(scene, name), getattr(direct, name))
            assert not getattr(scene, name).flags.writeable
        for name in ("observation_id", "source", "band_names", "carbonate_bearing", "longitude_deg", "latitude_deg",
                     "region"):  # fmt: skip
            assert getattr(scene, name) == getattr(direct, name)
        assert scene.footprint is not None
        assert scene.footprint.equals(direct.footprint)


@pytest.mark.parametrize(
    ("facts", "arrays"),
    [
        ({"observation_id": None}, {}),
        ({"observation_id": "{"}, {}),
        ({"longitude_deg": '"east"'}, {}),
        ({"footprint": '"POLYGON"'}, {}),
        ({}, {"bands": np.zeros((3, 3, 7), np.float32)}),
        ({}, {"carbonate": None}),
    ],
)
def test_a_stored_scene_that_makes_no_sense_is_named(
    archive: Path, facts: dict[str, str | None], arrays: dict[str, Any]
) -> None:
    config = configuration(archive)
    (built,) = build_scenes(tasks(config)[:1])
    path = open_store(config).path(str(built.name))
    spoilt_facts = {k: v for k, v in {**read_facts(path), **facts}.items() if v is not None}
    spoilt_arrays = {k: np.array(v) for k, v in {**map_arrays(path), **arrays}.items() if v is not None}
    write_arrays(path, spoilt_arrays, spoilt_facts)
    with pytest.raises(StoreError, match=f"{path.name}: damaged"):
        load_built([built], config)


@pytest.mark.parametrize("content", ["[]", "{}", '{"observation_id": 1, "products": []}', "[" * 9999, "\xff"])
def test_a_damaged_receipt_is_named(archive: Path, tmp_path: Path, content: str) -> None:
    folder = shutil.copytree(observation_folders(archive)[0], tmp_path / "one")
    (folder / RECEIPT).write_text(content, encoding="latin-1")
    with pytest.raises(ProductError, match=f"{RECEIPT}: damaged"):
        known_digests(folder, tmp_path / "memory")


def test_a_cache_that_cannot_be_written_is_not_the_observation_s_fault(archive: Path) -> None:
    Path("cache").write_text("a file where a folder should be")
    with pytest.raises(StoreError, match=r"data\.cache cache: cannot be written"):
        build_scenes(tasks(configuration(archive, cache="cache"))[:1])


def test_dropped_images_are_said_to_be_dropped(archive: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(observation_folders(archive)[0], tmp_path / "one" / "frt")
    drop_images(folder, observation_digests(folder, folder.parent, SCENE_KINDS, tmp_path / "memory"))
    with pytest.raises(ProductError, match=r"dropped .* download --id \w+ -o .*one"):
        open_observation(folder)


def test_labels_and_ranges_are_read_before_anything_is_built(archive: Path) -> None:
    Path("labels.csv").write_text("observation_id;label\n")
    for section, error in (({"labels": "labels.csv"}, SceneError), ({"ranges": {"VIOLET": [0, 1]}}, DatasetError)):
        sweep = sweep_of(configuration(archive, store="untouched", **section))
        with pytest.raises(error):
            build_data_sets(sweep, silent)
        assert not Path("untouched").exists()


def test_a_label_changes_no_sample(archive: Path) -> None:
    config = configuration(archive)
    scenes = load_scenes(config)
    relabelled = [replace(s, carbonate_bearing=not s.carbonate_bearing, region="elsewhere") for s in scenes]
    transform = fit_transform(relabelled, "pnr", "physical")
    names = [sample_name(s, config, transform, 0) for s in scenes]
    assert [sample_name(s, config, transform, 0) for s in relabelled] == names
    other = configuration(archive, ranges={"R1080": [0.0, 1.0]})
    assert not set(names) & {sample_name(s, other, transform, 0) for s in relabelled}
    unused = configuration(archive, ranges={"D2300": [0.0, 1.0]})
    assert [sample_name(s, unused, transform, 0) for s in relabelled] == names


def test_the_second_call_builds_nothing_and_opens_nothing(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(archive)
    first = build_scenes(tasks(config))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a product was opened")

    monkeypatch.setattr("crism_mlops.scenes.build.open_observation", refuse)
    monkeypatch.setattr("crism_mlops.products.digests.open_observation", refuse)
    calls: list[tuple[int, int]] = []
    second = build_scenes(tasks(config), lambda done, total: calls.append((done, total)))
    assert [one.name for one in second] == [one.name for one in first]
    assert not any(one.made for one in second)
    assert calls == [(12, 12)]


def test_processes_build_what_one_builds(archive: Path, tmp_path: Path) -> None:
    found = {}
    for workers in (1, 2):
        config = configuration(archive, store=str(tmp_path / f"store{workers}"))
        built = build_scenes(tasks(config), None, Where(workers=workers))
        found[workers] = [one.name for one in built]
        assert len(load_built(built, config)) == 12
    assert found[1] == found[2]


@pytest.mark.parametrize(
    ("change", "same"),
    [({}, True), ({"variant": "bpn", "normalization": "minmax", "resolution": 64}, True), ({"target": "car"}, False),
     ({"carbonate": {"minimum_depth": 0.011}}, False), ({"carbonate": {"bearing_fraction": 0.9}}, True),
     ({"filters": "own.txt"}, False)],
)  # fmt: skip
def test_the_name_holds_all_that_a_scene_is_made_from(change: dict[str, Any], same: bool, tmp_path: Path) -> None:
    nm = np.arange(400.0, 1100.0, 10.0)
    rows = np.column_stack([nm, *(np.exp(-(((nm - centre) / 60.0) ** 2)) for centre in (500, 680, 840, 940))])
    np.savetxt("own.txt", rows, delimiter="\t")
    digests = Digests("frt00000001", {"if": "a" * 64})
    name = scene_name(digests, configuration(tmp_path))
    assert (scene_name(digests, configuration(tmp_path, **change)) == name) is same
    for other in (Digests("frt00000001", {"if": "b" * 64}), Digests("frt00000002", digests.products),
                  Digests("frt00000001", {**digests.products, "sr": "c" * 64})):  # fmt: skip
        assert scene_name(other, configuration(tmp_path)) != name
    browse = Digests("frt00000001", {**digests.products, "brtan": "c" * 64})
    assert scene_name(browse, configuration(tmp_path)) == name, "what a scene is not made from plays no part"


def test_labels_win_and_unknown_is_never_barren(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    plain = {scene.observation_id: scene.carbonate_bearing for scene in load_scenes(configuration(archive))}
    bearing, barren, third = (
        next(i for i, k in plain.items() if k is True), next(i for i, k in plain.items() if k is False),
        sorted(plain)[-1],
    )  # fmt: skip
    Path("labels.csv").write_text(
        f"observation_id,label\n{bearing.upper()},barren\n{barren},Carbonate\n{third},unknown\nfrt0000ffff,barren\n"
    )
    with caplog.at_level(logging.WARNING):
        scenes = load_scenes(configuration(archive, labels="labels.csv"))
    assert {s.observation_id: s.carbonate_bearing for s in scenes} == {
        **plain, bearing: False, barren: True, third: None
    }  # fmt: skip
    assert "labels.csv: no scene for frt0000ffff" in caplog.text


def test_filters_that_cannot_be_read_are_said_once(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(SceneError, match=r"nowhere\.txt: filter responses"):
        load_scenes(configuration(archive, filters="nowhere.txt"))
    assert not caplog.records


# --- digests, receipts, dropped images


def test_digests_see_every_byte_and_are_remembered(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data" / "frt"
    shutil.copytree(observation_folders(archive)[0], folder)
    memory = tmp_path / "memory"
    assert known_digests(folder, memory) is None
    first = observation_digests(folder, folder.parent, SCENE_KINDS, memory)
    assert set(first.products) == {"if", "de"}
    assert known_digests(folder, memory) == first
    moved = folder.rename(tmp_path / "data" / "elsewhere")
    assert observation_digests(moved, moved.parent, SCENE_KINDS, memory) == first
    for suffix in (".img", ".hdr", ".lbl"):
        path = next(p for p in moved.iterdir() if p.suffix == suffix and "_if" in p.name)
        whole = path.read_bytes()
        at = (
            len(whole) // 2
            if suffix == ".img"
            else whole.index(b"simulated")
            if suffix == ".hdr"
            else whole.index(b"BY")
        )
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        found = observation_digests(moved, moved.parent, SCENE_KINDS, memory)
        assert found.products["if"] != first.products["if"]
        assert found.products["de"] == first.products["de"]
        path.write_bytes(whole)
    assert observation_digests(moved, moved.parent, SCENE_KINDS, memory) == first
    for path in (memory / "digests").iterdir():
        path.write_text("{")
    assert observation_digests(moved, moved.parent, SCENE_KINDS, memory) == first, "a damaged memory does no harm"


def test_images_can_be_dropped_once_their_scene_is_built(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = Path("data").absolute()
    shutil.copytree(archive, root)
    config = configuration(root)
    whole = load_scenes(config)
    built = build_scenes(tasks(config, drop=True))
    assert not list(root.rglob("*.img"))
    assert len(list(root.rglob("*.hdr"))) == 24
    assert [one.problem for one in built] == [None] * 12
    shutil.rmtree(Path(config.cache) / "digests")
    again = load_scenes(config)
    assert [scene.content for scene in again] == [scene.content for scene in whole]
    with caplog.at_level(logging.WARNING), pytest.raises(SceneError, match="none of the 12 observations"):
        load_scenes(configuration(root, target="car"))
    assert "images were dropped" in caplog.text
    assert f"data download --id {whole[0].observation_id}" in caplog.text
    (observation_folders(root)[0] / RECEIPT).write_text("{")
    with caplog.at_level(logging.WARNING):
        assert len(load_scenes(config)) == 11
    assert "fetch the observation again" in caplog.text


def test_a_folder_that_refuses_keeps_its_images(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frt"
    shutil.copytree(observation_folders(archive)[0], folder)
    (folder / f".{RECEIPT}").mkdir()
    digests = observation_digests(folder, tmp_path, SCENE_KINDS, tmp_path / "memory")
    freed = sum(path.stat().st_size for path in folder.glob("*.img"))
    assert drop_images(folder, digests) == freed > 0


def test_only_the_images_of_the_receipt_are_dropped(archive: Path, tmp_path: Path) -> None:
    folder = tmp_path / "frt"
    shutil.copytree(observation_folders(archive)[0], folder)
    (folder / "mine.img").write_text("mine")
    (folder / "link.img").symlink_to(tmp_path / "elsewhere")
    digests = observation_digests(folder, tmp_path, SCENE_KINDS, tmp_path / "memory")
    drop_images(folder, digests)
    assert {path.name for path in folder.glob("*.img")} == {"mine.img", "link.img"}
    assert known_digests(folder, tmp_path / "other") == digests


def test_nothing_is_dropped_whose_scene_is_damaged(archive: Path) -> None:
    root = shutil.copytree(archive, Path("data").absolute())
    config = configuration(root)
    (first, *_) = build_scenes(tasks(config))
    path = open_store(config).path(str(first.name))
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(StoreError, match=f"{path.name}: damaged .*remove it"):
        build_scenes(tasks(config, drop=True), where=HERE)
    assert len(list(first.folder.glob("*.img"))) == 2
    path.unlink()
    assert [one.problem for one in build_scenes(tasks(config, drop=True))] == [None] * 12
    assert len(load_scenes(config)) == 12


def test_linked_images_are_not_dropped_and_not_forgotten(archive: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = shutil.copytree(archive, Path("data").absolute())
    (root / ".pool").mkdir()
    for image in sorted(root.rglob("*.img")):
        image.rename(root / ".pool" / image.name)
        image.symlink_to(root / ".pool" / image.name)
    config = configuration(root)
    with caplog.at_level(logging.WARNING):
        assert [one.problem for one in build_scenes(tasks(config, drop=True))] == [None] * 12
    assert "nothing dropped" in caplog.text
    assert not list(root.rglob(RECEIPT))
    assert len(list((root / ".pool").iterdir())) == 24
    image = next((root / ".pool").glob("*_if*"))
    content = bytearray(image.read_bytes())
    content[5000] ^= 1
    image.write_bytes(content)
    assert sum(one.made for one in build_scenes(tasks(config))) == 1


def test_an_observation_that_does_not_fit_into_memory_is_left_out(
    archive: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(archive)
    large = observation_folders(archive)[3]

    def small(products: Any, *args: Any, **options: Any) -> Any:
        if products["if"].path.parent == large:
            raise MemoryError("Unable to allocate 3.5 GiB")
        return scene_from_products(products, *args, **options)

    monkeypatch.setattr("crism_mlops.scenes.build.scene_from_products", small)
    built = build_scenes(tasks(config))
    assert [one.problem is None for one in built].count(False) == 1
    assert "does not fit into memory (Unable to allocate" in str(built[3].problem)


def test_an_observation_in_two_folders_is_counted_once(archive: Path) -> None:
    root = shutil.copytree(archive, Path("data").absolute())
    first = observation_folders(root)[0]
    shutil.copytree(first, root / "zz_copy" / first.name)
    report = build_data_sets(sweep_of(configuration(root)), silent)
    assert (len(report.scenes), report.made) == (12, 12)
    ((folder, reason),) = report.left_out.items()
    assert "zz_copy" in folder
    assert "stands in two folders" in reason
    again = build_data_sets(sweep_of(configuration(root)), silent)
    assert (again.made, again.left_out) == (0, report.left_out)


def test_a_damaged_record_is_named(archive: Path) -> None:
    sweep = sweep_of(configuration(archive))
    (data_set,) = build_data_sets(sweep, silent).data_sets
    path = open_store(sweep.data).path(data_set.record)
    for content in ("garbage", '{"digest": "another"}', "{}"):
        path.write_text(content)
        with pytest.raises(StoreError, match=f"{path.name}: damaged"):
            build_data_sets(sweep, silent)
    path.unlink()
    assert build_data_sets(sweep, silent).data_sets == (data_set,)


def test_a_store_that_fails_ends_the_build(archive: Path) -> None:
    config = configuration(archive)
    names = [one.name for one in build_scenes(tasks(config))]
    blocked = Path("blocked") / str(names[0])
    blocked.parent.parent.mkdir(parents=True)
    blocked.parent.write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="cannot write"):
        build_scenes(tasks(configuration(archive, store="blocked")))


# --- data sets


def test_samples_are_the_views_of_the_scenes(archive: Path) -> None:
    config = configuration(archive, resolution=64, variant="pca")
    scenes = load_scenes(config)
    manifest = build_manifest(scenes, config, sweep_of(config).split)
    samples = manifest.samples()
    names = [(sample.scene.observation_id, sample.view) for sample in samples]
    assert names == [
        (scene.observation_id, view.name)
        for scene in manifest.of("train")
        for view in views_of(scene.observation_id, config.views, manifest.seed)
    ]
    for index in (0, 3, len(samples) - 1):
        sample = samples[index]
        view = next(
            v for v in views_of(sample.scene.observation_id, config.views, manifest.seed) if v.name == sample.view
        )
        image, valid = apply_view(manifest.transform.image(sample.scene), sample.scene.valid, view, 64)
        truth = target_image(sample.scene, "fal", "physical")
        target, _ = apply_view(truth, sample.scene.valid, view, 64)
        for found, wanted in ((sample.input, image), (sample.target, target), (sample.valid, valid)):
            np.testing.assert_array_equal(found.numpy(), wanted.numpy())
    assert len(samples[1:4]) == 3
    stored = Path(config.store) / samples.stored[0]
    assert stored.stat().st_size == pytest.approx(samples_bytes(config), rel=0.01)


def test_a_sweep_s_data_sets_are_written_once(archive: Path) -> None:
    config = configuration(archive)
    search = {"data.variant": {"choice": ["pnr", "bpn"]}, "data.normalization": {"choice": ["physical", "minmax"]}}
    sweep = sweep_of(config, search=search)
    assert len(data_sections(sweep)) == 4
    first = build_data_sets(sweep, silent)
    assert (len(first.scenes), first.made, first.left_out) == (12, 12, {})
    assert len({one.digest for one in first.data_sets}) == 4
    times = {path: path.stat().st_mtime_ns for path in Path(config.store).rglob("*.*")}
    second = build_data_sets(sweep, silent, Where(workers=2))
    assert second.made == 0
    assert second.data_sets == first.data_sets
    assert {path: path.stat().st_mtime_ns for path in Path(config.store).rglob("*.*")} == times
    record = json.loads((Path(config.store) / first.data_sets[0].record).read_text())
    assert record["digest"] == first.data_sets[0].digest
    assert set(record["samples"]) == set(record["split"]["train"])
    assert json.dumps(first.as_json())


def test_a_range_cannot_be_built_beforehand(archive: Path) -> None:
    sweep = sweep_of(configuration(archive), search={"data.resolution": {"int": [32, 64, 32]}})
    with pytest.raises(ConfigError, match=r"search\.data\.resolution: a range"):
        build_data_sets(sweep, silent)


def test_no_room_is_said_before_anything_is_rendered(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = configuration(archive)
    load_scenes(config)
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(StoreError, match=r"0\.00 GB free"):
        build_data_sets(sweep_of(config), silent)
    assert not open_store(config).names("samples")


BUILD = "from crism_mlops.cli import main; import sys; sys.argv[1:] = {arguments}; main()"


def test_a_killed_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text(
        "study: killed\nexperiment: tests\n"
        "data: {source: simulated, simulated: {scenes: 24, size: 64, seed: 5}, resolution: 64}\n"
        "model: {kind: unet, encoder: resnet18, encoder_weights: null}\n"
    )
    arguments = ["data", "build", "sweep.yaml", "--workers", "1"]
    command = [sys.executable, "-c", BUILD.format(arguments=arguments)]
    scenes = tmp_path / "mlruns" / "store" / "scenes"
    with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL) as process:
        while len(list(scenes.rglob("*.safetensors"))) < 5:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    kept = {path.name: path.stat().st_mtime_ns for path in scenes.rglob("[!.]*.safetensors")}
    assert 5 <= len(kept) < 24
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert f"24 scenes in mlruns/store: {24 - len(kept)} built, {len(kept)} found there" in result.stdout
    assert {
        name: path.stat().st_mtime_ns for path in scenes.rglob("*.safetensors") if (name := path.name) in kept
    } == kept
    assert not list((tmp_path / "mlruns" / "store").rglob("*.partial"))


# --- from the archive


def test_observations_are_fetched_built_and_dropped_one_by_one(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    config = configuration(Path("mars"))
    sweep = sweep_of(config)
    with ode_server() as server:
        for folder in observation_folders(archive):
            server.add_folder(folder)
        service = Service(f"{server.url}/live2", (server.host,))
        found = search(Query(region="Nili Fossae"), service)
        assert len(found) == 12
        tasks = fetch_tasks(found, sweep, service, drop=True)
        report = build_data_sets(sweep, silent, Where(workers=1), tasks)
        assert (report.made, report.left_out) == (12, {})
        asked = len(server.log)
        assert build_data_sets(sweep, silent, Where(workers=1), tasks).made == 0
        assert len(server.log) == asked, "what was dropped is not fetched again"
    assert not list(Path("mars").rglob("*.img"))
    # From here on it is a folder like any other.
    direct = {scene.observation_id: scene for scene in load_scenes(configuration(archive, store="other"))}
    for scene in load_scenes(config):
        np.testing.assert_array_equal(scene.bands, direct[scene.observation_id].bands)
    # A machine that has receipts only: the observations were fetched and dropped by others.
    for path in Path("mars").rglob("*"):
        if path.is_file() and path.name != RECEIPT:
            path.unlink()
    assert len(load_scenes(config)) == 12


def test_an_observation_that_cannot_be_fetched_is_left_out(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sweep = sweep_of(configuration(Path("mars")))
    with ode_server() as server:
        folders = observation_folders(archive)
        for folder in folders:
            server.add_folder(folder)
        lost = next(path for path in server.files if folders[0].name in path.lower() and path.lower().endswith(".img"))
        del server.files[lost]
        service = Service(f"{server.url}/live2", (server.host,), tries=2, sleep=no_sleep)
        found = search(Query(region="Nili Fossae"), service)
        report = build_data_sets(sweep, silent, Where(workers=1), fetch_tasks(found, sweep, service, drop=False))
    assert report.made == 11
    (left_out,) = report.left_out
    assert Path(left_out).name == folders[0].name
    assert "is not complete" in report.left_out[left_out]


def test_what_was_there_before_is_of_the_data_set_as_well(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folders = observation_folders(archive)
    for folder in folders[:9]:
        shutil.copytree(folder, Path("mars") / folder.name)
    sweep = sweep_of(configuration(Path("mars")))
    with ode_server() as server:
        for folder in folders[9:]:
            server.add_folder(folder)
        service = Service(f"{server.url}/live2", (server.host,))
        found = search(Query(region="Nili Fossae"), service)
        report = build_data_sets(sweep, silent, Where(workers=1), fetch_tasks(found, sweep, service, drop=False))
    assert len(report.scenes) == 12
    again = build_data_sets(sweep, silent, Where(workers=1))
    assert (again.made, again.data_sets) == (0, report.data_sets)


def test_what_lacks_a_product_that_the_archive_has_is_completed(archive: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    sweep = sweep_of(configuration(Path("mars")))
    with ode_server() as server:
        for folder in observation_folders(archive):
            server.add_folder(folder)
            own = Path("mars") / folder.name
            own.mkdir(parents=True)
            for file in folder.glob("*_if*"):
                shutil.copy(file, own)
        build_data_sets(sweep, silent, Where(workers=1))
        service = Service(f"{server.url}/live2", (server.host,))
        found = search(Query(region="Nili Fossae"), service)
        report = build_data_sets(sweep, silent, Where(workers=1), fetch_tasks(found, sweep, service, drop=False))
    assert report.made == 12
    assert len(list(Path("mars").rglob("*_de*.img"))) == 12
    whole = build_data_sets(sweep_of(configuration(archive, store="other")), silent)
    assert [d.digest for d in report.data_sets] == [d.digest for d in whole.data_sets]


def no_sleep(seconds: float) -> None:
    assert seconds >= 0.0


def test_fetching_needs_a_folder_to_put_things_in() -> None:
    sweep = sweep_of(DataConfig(source="simulated"))
    with pytest.raises(SceneError, match=r"data\.source=mtrdr and data\.path=FOLDER"):
        fetch_tasks([], sweep, Service(), drop=True)
