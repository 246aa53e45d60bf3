"""The leakage audit: small truth for every leak, and a clean data set that is called clean."""

import json
import logging
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from crism_mlops.config import AuditConfig, DataConfig, SplitConfig
from crism_mlops.dataset.audit import AuditReport, audit, require_clean
from crism_mlops.dataset.checks import Finding
from crism_mlops.dataset.fingerprints import Fingerprint, alike, fingerprint, oriented
from crism_mlops.dataset.manifest import Manifest, build_manifest
from crism_mlops.dataset.split import PARTS, Split
from crism_mlops.dataset.variants import fit_transform
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.filters import BAND_NAMES
from crism_mlops.scenes.scene import Scene
from crism_mlops.scenes.sources import load_scenes

SIZE = 40
# Principal components of a few small scenes exceed their range, which is that of 99 % of the train pixels.
CONFIG = AuditConfig(saturated_share=0.5)


def ground(seed: int, channels: int, size: int = SIZE) -> NDArray[np.float32]:
    """Smooth terrain, I/F between 0.1 and 0.5."""
    noise = np.random.default_rng(seed).normal(size=(size, size, channels))
    terrain = gaussian_filter(noise, (2.0, 2.0, 0.0)) + 0.5 * gaussian_filter(noise.mean(-1), 2.0)[..., None]
    return (0.1 + 0.4 * (terrain - terrain.min()) / np.ptp(terrain)).astype(np.float32)


def scene(index: int, **changes: Any) -> Scene:
    """A scene with a no-data border, 0.2 degrees wide on the ground, 1 degree from the next."""
    valid = np.ones((SIZE, SIZE), dtype=bool)
    valid[:3] = valid[:, -5:] = False
    values: dict[str, Any] = {
        "observation_id": f"frt{index + 0xA000:08x}",
        "source": "mtrdr",
        "bands": ground(index, len(BAND_NAMES)) * valid[..., None],
        "band_names": BAND_NAMES,
        "target": ground(1000 + index, 3) * valid[..., None],
        "valid": valid,
        "carbonate": None,
        "carbonate_bearing": index % 2 == 0,
        "longitude_deg": float(index) + 0.1,
        "latitude_deg": 10.1,
        "region": "nili_fossae",
        "footprint": shapely.box(index, 10.0, index + 0.2, 10.2),
    }
    return Scene(**(values | changes))


@pytest.fixture(scope="module")
def clean() -> Manifest:
    scenes = [scene(i) for i in range(40)]
    return build_manifest(scenes, DataConfig(source="mtrdr", variant="pca"), SplitConfig())


def of(manifest: Manifest, name: str, place: int = 0) -> Scene:
    return manifest.of(name)[place]  # type: ignore[arg-type]


def with_scene(manifest: Manifest, changed: Scene, instead: str) -> Manifest:
    """The data set with one scene in the place of another, under whatever id it has."""
    scenes = tuple(changed if s.observation_id == instead else s for s in manifest.scenes)
    parts = {
        name: tuple(changed.observation_id if i == instead else i for i in getattr(manifest.split, name))
        for name in (*PARTS, "test_balanced")
    }
    return replace(manifest, scenes=scenes, split=Split(**parts))


def findings(manifest: Manifest, config: AuditConfig = CONFIG) -> dict[str, Finding]:
    return {f.check: f for f in audit(manifest, config).findings}


def verdicts(report: AuditReport) -> dict[str, str]:
    return {f.check: f.verdict for f in report.findings if f.verdict != "ok"}


def test_clean_is_clean(clean: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[tuple[int, int]] = []
    report = audit(clean, CONFIG, lambda done, total: calls.append((done, total)))
    assert verdicts(report) == {}
    assert report.leaks == ()
    assert calls == [(i, 40) for i in range(1, 41)]
    with caplog.at_level(logging.WARNING):
        require_clean(report, CONFIG)
    assert not caplog.records
    content = json.loads(json.dumps(report.as_json(), allow_nan=False))
    assert content["leaks"] == 0
    assert [f["check"] for f in content["findings"]] == [row["check"] for row in report.rows()]
    assert findings(clean)["statistics"].message == "fitting pca on the 24 train scenes again gives the same transform"
    assert findings(clean)["footprints"].message == "no overlap between splits; 0 pairs within a split"
    # 5 of 40 columns and 3 of the other rows are no data.
    assert "test 19.1%" in findings(clean)["no data"].message


# --- observations


def test_one_scene_in_two_splits(clean: Manifest) -> None:
    split = clean.split
    twice = replace(clean, split=replace(split, test=(*split.test, split.train[0])))
    found = findings(twice)
    assert found["observations"].verdict == "leak"
    assert found["observations"].scenes == (split.train[0],)
    # One cause is one finding.
    assert found["duplicates"].verdict == found["footprints"].verdict == "ok"


@pytest.mark.parametrize("spell", [str.upper, lambda i: "hrl" + i[3:], lambda i: i + "_07_if164j_mtr3"])
def test_one_observation_under_two_ids(clean: Manifest, spell: Callable[[str], str]) -> None:
    """The number tells, whatever case, class or product it is written with."""
    train, test = of(clean, "train"), of(clean, "test")
    other = replace(test, observation_id=spell(train.observation_id))
    found = findings(with_scene(clean, other, test.observation_id))["observations"]
    assert found.verdict == "leak"
    assert set(found.scenes) == {train.observation_id, other.observation_id}
    assert f"{train.observation_id} (train) = {other.observation_id} (test)" in found.message


def test_one_observation_twice_in_train(clean: Manifest) -> None:
    first, second = of(clean, "train", 0), of(clean, "train", 1)
    other = replace(second, observation_id=first.observation_id.upper())
    found = findings(with_scene(clean, other, second.observation_id))
    assert found["observations"].verdict == "warning"
    assert "twice in one split" in found["observations"].message


# --- the ground


def moved(manifest: Manifest, name: str, onto: str, east: float, north: float = 0.0) -> Manifest:
    """A scene of one split laid beside or upon one of another."""
    place, one = of(manifest, onto).footprint, of(manifest, name)
    assert place is not None
    west, south, _, _ = place.bounds
    box = shapely.box(west + east, south + north, west + east + 0.2, south + north + 0.2)
    return with_scene(manifest, replace(one, footprint=box), one.observation_id)


@pytest.mark.parametrize("name", ["validation", "test"])
def test_overlapping_ground(clean: Manifest, name: str) -> None:
    spoilt = moved(clean, name, "train", 0.1, 0.1)
    found = findings(spoilt)["footprints"]
    assert found.verdict == "leak"
    assert set(found.scenes) == {of(clean, "train").observation_id, of(clean, name).observation_id}
    assert f"{of(clean, 'train')!s:.0}25.0%" in found.message
    # A split by footprint is what the error proposes; it mends it.
    again = build_manifest(spoilt.scenes, clean.data, SplitConfig(by="footprint"))
    assert findings(again)["footprints"].verdict == "ok"
    with pytest.raises(DatasetError, match=r"footprints: .* split\.by=footprint"):
        require_clean(audit(spoilt, CONFIG), CONFIG)


def test_touching_ground_is_no_overlap(clean: Manifest) -> None:
    assert findings(moved(clean, "test", "train", 0.2))["footprints"].verdict == "ok"
    assert findings(moved(clean, "test", "train", 0.2, 0.2))["footprints"].verdict == "ok"


def test_validation_upon_test_is_a_warning(clean: Manifest) -> None:
    assert findings(moved(clean, "validation", "test", 0.1))["footprints"].verdict == "warning"


def test_scenes_without_footprint(clean: Manifest) -> None:
    blind = replace(clean, scenes=tuple(replace(s, footprint=None) for s in clean.scenes))
    found = findings(blind)
    assert found["footprints"].verdict == "unknown"
    assert "unknown for 40 of 40 scenes" in found["footprints"].message
    # Centres are a degree (58 km) apart: nothing to fear.
    assert found["places"].verdict == "ok"
    train, test = of(blind, "train"), of(blind, "test")

    def test_scene_at(longitude: float | None, latitude: float | None) -> Finding:
        there = replace(test, longitude_deg=longitude, latitude_deg=latitude)
        return findings(with_scene(blind, there, test.observation_id))["places"]

    assert train.longitude_deg is not None
    near = test_scene_at(train.longitude_deg + 360.0, 10.15)
    assert near.verdict == "warning"
    # 0.05 degrees of latitude on a sphere of 3389.5 km.
    assert f"{train.observation_id} (train) and {test.observation_id} (test) 3.0 km" in near.message
    assert test_scene_at(train.longitude_deg, 10.3).verdict == "ok"
    nominal = test_scene_at(train.longitude_deg, train.latitude_deg)
    assert nominal.verdict == "warning"
    assert "2 scenes in several splits (1 test, 1 train) share one coordinate" in nominal.message
    assert "likely a nominal one: whether they overlap is unknown" in nominal.message
    lost = test_scene_at(None, None)
    assert lost.verdict == "unknown"
    assert lost.scenes == (test.observation_id,)


# --- images


def copy_into_test(manifest: Manifest, change: Callable[[NDArray[Any]], NDArray[Any]]) -> Manifest:
    """A train scene's pixels, changed, under the id and in the place of a test scene."""
    train, test = of(manifest, "train"), of(manifest, "test")
    arrays = {name: np.array(change(getattr(train, name))) for name in ("bands", "target", "valid")}
    return with_scene(manifest, replace(test, **arrays), test.observation_id)


def test_copy_under_another_id(clean: Manifest) -> None:
    spoilt = copy_into_test(clean, lambda a: a)
    report = audit(spoilt, CONFIG)
    assert verdicts(report) == {"duplicates": "leak"}
    ids = (of(clean, "train").observation_id, of(clean, "test").observation_id)
    assert report.leaks[0].scenes == ids
    with pytest.raises(DatasetError) as caught:
        require_clean(report, CONFIG)
    message = str(caught.value)
    assert message == (
        f"test data leaks: duplicates: 1 pair of equal images across splits: {ids[0]} (train) and {ids[1]} (test) "
        "(input equal) -> remove the copies; or set audit.on_leak=warn to go on all the same"
    )


def test_equal_target(clean: Manifest) -> None:
    train, test = of(clean, "train"), of(clean, "test")
    found = findings(with_scene(clean, replace(test, target=train.target.copy()), test.observation_id))
    assert found["duplicates"].verdict == "leak"
    assert "(target equal)" in found["duplicates"].message


CHANGES: dict[str, Callable[[NDArray[Any]], NDArray[Any]]] = {
    "flipped top to bottom": lambda a: a[::-1],
    "flipped left to right": lambda a: a[:, ::-1],
    "quarter turn": lambda a: np.rot90(a),
    "half turn": lambda a: np.rot90(a, 2),
    "transposed": lambda a: a.swapaxes(0, 1),
    "brighter": lambda a: a if a.dtype == bool else a * np.float32(1.03),
    "noisy": lambda a: a if a.dtype == bool else a * np.float32(1) + rng_noise(a),
    "twice as large": lambda a: a.repeat(2, axis=0).repeat(2, axis=1),
    "eight bits": lambda a: a if a.dtype == bool else np.round(a * np.float32(255)) / np.float32(255),
}


def rng_noise(a: NDArray[Any]) -> NDArray[np.float32]:
    return (np.random.default_rng(0).normal(0.0, 0.002, a.shape) * (a > 0)).astype(np.float32)


@pytest.mark.parametrize("name", CHANGES)
def test_nearly_equal_images(clean: Manifest, name: str) -> None:
    found = findings(copy_into_test(clean, CHANGES[name]))
    assert found["duplicates"].verdict == "ok"
    assert found["near-duplicates"].verdict == "leak"
    assert found["near-duplicates"].scenes == (of(clean, "train").observation_id, of(clean, "test").observation_id)
    turned = name in ("flipped top to bottom", "flipped left to right", "quarter turn", "half turn", "transposed")
    assert ("flipped or turned" in found["near-duplicates"].message) == turned


def test_copies_within_a_split_are_a_warning(clean: Manifest) -> None:
    one, other = of(clean, "train", 0), of(clean, "train", 1)
    same = replace(other, bands=one.bands.copy(), target=one.target.copy())
    found = findings(with_scene(clean, same, other.observation_id))["duplicates"]
    assert found.verdict == "warning"
    assert found.message.startswith("0 pairs of equal images across splits and 1 within one: ")


def test_same_ground_seen_twice(clean: Manifest) -> None:
    """Two looks at one place with something else in between: neither equal nor nearly equal, yet alike."""
    spoilt = copy_into_test(clean, lambda a: a if a.dtype == bool else a + np.float32(0.5) * ground(77, a.shape[-1]))
    found = findings(spoilt)
    assert found["near-duplicates"].verdict == "ok"
    assert found["same ground"].verdict == "warning"
    assert found["same ground"].scenes == (of(clean, "train").observation_id, of(clean, "test").observation_id)


def test_bland_scenes_are_not_duplicates(clean: Manifest) -> None:
    """Slopes of light with a little noise; one colour, which says nothing."""
    y = np.linspace(0.0, 1.0, 64)[:, None, None] * np.ones((1, 64, 3))
    slopes = [(y * 0.8 + np.random.default_rng(i).normal(0, 0.003, y.shape)).astype(np.float32) for i in range(12)]
    everywhere = np.ones((64, 64), dtype=bool)
    prints = [fingerprint(image, everywhere) for image in slopes]
    assert alike(prints, bits=64, least=0.6) == []
    flat = np.full((SIZE, SIZE, len(BAND_NAMES)), 0.3, dtype=np.float32)
    spoilt = clean
    for name in ("train", "test"):
        one = of(clean, name)
        spoilt = with_scene(spoilt, replace(one, bands=flat.copy(), target=flat[..., :3].copy()), one.observation_id)
    found = findings(replace(spoilt, transform=fit_transform(spoilt.of("train"), "pnr", "physical")))
    assert found["duplicates"].verdict == found["near-duplicates"].verdict == found["same ground"].verdict == "ok"


def test_orientations() -> None:
    corner = np.arange(4).reshape(2, 2)
    assert len({oriented(corner, o).tobytes() for o in range(8)}) == 8
    image, valid = ground(5, 3), np.ones((SIZE, SIZE), dtype=bool)
    turned = np.ascontiguousarray(oriented(image, 5))
    (one,) = alike([fingerprint(image, valid), fingerprint(turned, valid)], bits=2, least=0.99)
    assert (one.first, one.second) == (0, 1)
    np.testing.assert_array_equal(oriented(turned, one.orientation), image)


def test_no_data_is_not_part_of_a_fingerprint() -> None:
    image, valid = ground(5, 3), np.ones((SIZE, SIZE), dtype=bool)
    valid[:8] = False
    one, other = (fingerprint(np.where(valid[..., None], image, np.float32(f)), valid) for f in (0.0, 1.0))
    assert one.hashes is not None
    assert other.hashes is not None
    np.testing.assert_array_equal(one.hashes, other.hashes)
    np.testing.assert_array_equal(one.detail, other.detail)


def test_thousands_of_hashes_are_compared() -> None:
    """A pair planted among 2000 is found; one with the same hash, but other detail, is not."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**63, (2000, 8), dtype=np.uint64)
    words[1700] = words[1800] = words[300]
    detail = rng.normal(size=(32, 32)).astype(np.float32)
    prints = [Fingerprint(str(i), w, detail if i in (300, 1700) else -detail) for i, w in enumerate(words)]
    found = alike(prints, bits=4, least=0.9)
    assert [(x.first, x.second, x.orientation, x.bits) for x in found] == [(300, 1700, 0, 0)]


# --- statistics


def test_transform_fitted_on_all_scenes(clean: Manifest) -> None:
    spoilt = replace(clean, transform=fit_transform(clean.scenes, "pca", "physical"))
    found = findings(spoilt)["statistics"]
    assert found.verdict == "leak"
    assert set(found.scenes) == {*clean.split.validation, *clean.split.test}
    # What it says of itself is not what is believed.
    for claim in (None, clean.transform.fitted_on):
        claimed = replace(spoilt, transform=replace(spoilt.transform, fitted_on=claim))
        assert findings(claimed)["statistics"].verdict == "leak"
    with pytest.raises(DatasetError, match=r"statistics: .* fit the transform on the train scenes"):
        require_clean(audit(spoilt, CONFIG), CONFIG)
    fixed = replace(clean, transform=fit_transform(clean.of("train")[::-1], "pca", "physical"))
    assert findings(fixed)["statistics"].verdict == "ok"
    stretched = replace(clean, transform=fit_transform(clean.of("train"), "pca", "minmax"))
    assert findings(stretched)["statistics"].verdict == "ok"


def test_altered_transform(clean: Manifest) -> None:
    """Whatever it says that it was fitted on: the figures must follow from the train scenes."""
    assert clean.transform.mean is not None
    mean = tuple(m * 1.001 for m in clean.transform.mean)
    assert findings(replace(clean, transform=replace(clean.transform, mean=mean)))["statistics"].verdict == "leak"


def test_nothing_fitted(clean: Manifest) -> None:
    plain = replace(clean, transform=fit_transform(clean.of("train"), "pnr", "physical"))
    assert findings(plain)["statistics"].message == "no variant has anything that is fitted"


def test_every_variant_s_statistics_are_looked_at(clean: Manifest) -> None:
    plain = replace(clean, transform=fit_transform(clean.of("train"), "pnr", "physical"))
    leaky = replace(clean, transform=fit_transform(clean.of("test"), "pca", "physical"))
    report = audit(plain, CONFIG, others=[leaky])
    assert [f.check for f in report.leaks] == ["statistics"]


# --- what is in the scenes


def test_class_balance(clean: Manifest) -> None:
    ids = set(clean.split.validation)
    spoilt = replace(
        clean,
        scenes=tuple(replace(s, carbonate_bearing=None) if s.observation_id in ids else s for s in clean.scenes),
        split=replace(clean.split, test_balanced=clean.split.test_balanced[:4]),
    )
    found = findings(spoilt)["class balance"]
    assert found.verdict == "warning"
    assert "validation has no carbonate scene; validation has no barren scene" in found.message
    # 1.96 * sqrt(0.25 / 4)
    assert "4 scenes in the balanced test set are few: a share is known to ±49% at best" in found.message
    assert "test 10 (5 barren, 5 carbonate)" in found.message


def test_saturated_channel(clean: Manifest) -> None:
    plain = replace(clean, transform=fit_transform(clean.of("train"), "pnr", "physical"))
    one = of(clean, "validation")
    bands, target = one.bands.copy(), one.target.copy()
    inside = np.argwhere(one.valid)
    for y, x in inside[: len(inside) // 10]:
        bands[y, x, BAND_NAMES.index("NIR")] = 0.7
        target[y, x, 2] = 0.0
    spoilt = with_scene(plain, replace(one, bands=bands, target=target), one.observation_id)
    found = findings(spoilt, AuditConfig())["saturated channels"]
    assert found.verdict == "warning"
    assert found.scenes == (one.observation_id,)
    share = (len(inside) // 10) / len(inside)
    assert f"input NIR in 1 (most {one.observation_id} {share:.1%}), target R1080 in 1" in found.message
    assert "PAN" not in found.message
    assert findings(spoilt, AuditConfig(saturated_share=0.11))["saturated channels"].verdict == "ok"
    assert findings(plain, AuditConfig())["saturated channels"].verdict == "ok"


def test_crushed_channel(clean: Manifest) -> None:
    """One outlier, stretched to image by image, leaves all others in a tenth of the scale."""
    plain = replace(clean, transform=fit_transform(clean.of("train"), "pnr", "minmax"))
    one = of(clean, "test")
    bands = one.bands.copy()
    bands[20, 20, BAND_NAMES.index("RED")] = 6.0
    spoilt = with_scene(plain, replace(one, bands=bands), one.observation_id)
    found = findings(spoilt)["crushed channels"]
    assert found.verdict == "warning"
    assert f"input RED in 1 ({one.observation_id})" in found.message
    assert findings(plain)["crushed channels"].verdict == "ok"
    fixed = replace(spoilt, transform=fit_transform(clean.of("train"), "pnr", "physical"))
    assert findings(fixed)["crushed channels"].verdict == "ok"


def test_mostly_no_data(clean: Manifest) -> None:
    one = of(clean, "test")
    valid = np.zeros_like(one.valid)
    valid[10:15, 10:15] = True
    found = findings(with_scene(clean, replace(one, valid=valid), one.observation_id))["no data"]
    assert found.verdict == "warning"
    assert found.scenes == (one.observation_id,)


def test_regions(clean: Manifest) -> None:
    ids = set(clean.split.test)
    there = tuple(replace(s, region="coprates2") if s.observation_id in ids else s for s in clean.scenes)
    found = findings(replace(clean, scenes=there))["regions"]
    assert (found.verdict, found.message) == ("ok", "2 regions; in one split only: test: coprates")


# --- what is done about it


def test_on_leak_warn(clean: Manifest, caplog: pytest.LogCaptureFixture) -> None:
    report = audit(copy_into_test(clean, lambda a: a), CONFIG)
    with caplog.at_level(logging.WARNING):
        require_clean(report, AuditConfig(on_leak="warn"))
    assert "audit, duplicates: 1 pair of equal images across splits" in caplog.text


def test_error_is_one_bounded_line() -> None:
    leaks = tuple(
        Finding(check, "leak", f"{check} found", tuple(f"frt{i:08x}" for i in range(1000)))
        for check in ("observations", "footprints", "duplicates", "statistics")
    )
    with pytest.raises(DatasetError, match=r"and 1 more; or set audit.on_leak=warn") as caught:
        require_clean(AuditReport(leaks), CONFIG)
    assert "\n" not in str(caught.value)
    content = AuditReport(leaks).as_json()["findings"][0]
    assert len(content["scenes"]) == 100
    assert content["scene_count"] == 1000


def test_memory_does_not_hold_the_scenes(clean: Manifest) -> None:
    """Four times the scenes: what is rendered of each is let go."""

    def peak(count: int) -> int:
        scenes = tuple(replace(clean.scenes[0], observation_id=f"frt{i:08x}", footprint=None) for i in range(count))
        ids = tuple(s.observation_id for s in scenes)
        many = replace(
            clean,
            scenes=scenes,
            split=Split(ids, (), (), ()),
            transform=fit_transform(scenes[:1], "pnr", "physical"),
        )
        tracemalloc.start()
        audit(many, AuditConfig(duplicate_bits=0))
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    few, many = peak(25), peak(100)
    # Image and truth of a scene are 38 kB; what is kept is some 6 kB.
    assert many - few < 75 * 15_000


# --- real scenes


def test_real_pairs(real_data: Path) -> None:
    import csv

    root = real_data / "scene_pairs"
    data = DataConfig(source="pairs", path=str(root), normalization="minmax", target_normalization="minmax")
    manifest = build_manifest(load_scenes(data), data, SplitConfig())
    report = audit(manifest, CONFIG)
    assert verdicts(report) == {
        "footprints": "unknown",
        "places": "warning",
        "same ground": "warning",
        "crushed channels": "warning",
    }
    found = {f.check: f for f in report.findings}
    with (root / "scenes.csv").open(newline="", encoding="utf-8-sig") as handle:
        rows = list(csv.DictReader(handle))
    known = {r["observation_id"] for r in rows if "True" in (r["input_channel_crushed"], r["target_channel_crushed"])}
    assert set(found["crushed channels"].scenes) == known
    assert "input PAN in 1 (frt000064d9), target R2529 in 1 (frt0000805f)" in found["crushed channels"].message
    # Two looks at one place in Jezero, in train and validation; the metadata give both the crater's coordinate.
    assert found["same ground"].scenes == ("hrl00010963", "hrl000116c6")
    assert "8 scenes in several splits" in found["places"].message
