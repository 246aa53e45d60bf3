"""Proof that a data set can be trusted: nothing leaks from train into validation or test."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import AuditConfig
from crism_mlops.dataset import checks
from crism_mlops.dataset.checks import Finding, Record, shown
from crism_mlops.dataset.fingerprints import fingerprint, pixel_digest
from crism_mlops.dataset.manifest import Manifest, Pair
from crism_mlops.dataset.split import PARTS, region_name
from crism_mlops.dataset.variants import VARIANT_BANDS, fit_transform
from crism_mlops.errors import DatasetError
from crism_mlops.scenes.targets import TARGET_PARAMETERS

log = logging.getLogger(__name__)

# Scenes that a JSON document names for a finding; the count of all stands beside them.
MOST_IDS = 100
_REMEDIES = {
    "observations": "remove one of the two",
    "footprints": "set split.by=footprint",
    "duplicates": "remove the copies",
    "near-duplicates": "remove the copies (audit.duplicate_bits says how alike two images may be)",
    "statistics": "fit the transform on the train scenes of this split",
    "input autoencoder": "train another one on the train scenes of this split (crism-mlops train-vae)",
}


@dataclass(frozen=True, slots=True)
class AuditReport:
    """One finding a check, in a fixed order."""

    findings: tuple[Finding, ...]

    @property
    def leaks(self) -> tuple[Finding, ...]:
        """The findings that make test scores worth nothing."""
        return tuple(f for f in self.findings if f.verdict == "leak")

    def rows(self) -> list[dict[str, str]]:
        """For a table: check, verdict and finding."""
        return [{"check": f.check, "verdict": f.verdict, "finding": f.message} for f in self.findings]

    def as_json(self) -> dict[str, Any]:
        """For JSON: as `rows`, with the scenes (the first MOST_IDS) and their count."""
        return {
            "leaks": len(self.leaks),
            "findings": [
                {**row, "scenes": list(f.scenes[:MOST_IDS]), "scene_count": len(f.scenes)}
                for row, f in zip(self.rows(), self.findings, strict=True)
            ],
        }


def audit(
    manifest: Manifest,
    config: AuditConfig,
    on_scene: Callable[[int, int], None] | None = None,
    others: Sequence[Manifest] = (),
    learned: Mapping[str, Mapping[str, Sequence[str]] | None] | None = None,
) -> AuditReport:
    """Look at every scene of train, validation and test once, one at a time, then compare what was kept.

    `others` are the same scenes and split in a sweep's other variants: of these, what was fitted is
    looked at. `learned` tells, by name, what parts of a sweep's models that come trained have seen: see
    `checks.learned_before`. What is kept of a scene is about 6 kB. `on_scene(done, total)` is called after each.
    Raises DatasetError if a scene lacks a band of the variant.
    """
    total = sum(len(getattr(manifest.split, name)) for name in PARTS)
    records: list[Record] = []
    for name in PARTS:
        for pair in manifest.test_pairs() if name == "test" else manifest.pairs(name):
            records.append(_record(pair, name, manifest))
            if on_scene is not None:
                on_scene(len(records), total)
    channels = _channels(manifest)
    return AuditReport(
        (
            checks.observations(records),
            checks.footprints(records),
            checks.places(records),
            *checks.duplicates(records, config.duplicate_bits),
            *_statistics_of([manifest, *(m for m in others if m is not manifest)]),
            *(checks.learned_before(records, name, seen) for name, seen in (learned or {}).items()),
            checks.class_balance(records, len(manifest.split.test_balanced)),
            checks.saturated(records, channels, config.saturated_share),
            checks.crushed(records, channels),
            checks.no_data(records),
            checks.regions(records),
        )
    )


def require_clean(report: AuditReport, config: AuditConfig) -> None:
    """Raise DatasetError where something leaks, or only say so with `on_leak: warn`; log other warnings."""
    for finding in report.findings:
        if finding.verdict == "warning" or (finding.verdict == "leak" and config.on_leak == "warn"):
            log.warning("audit, %s: %s", finding.check, finding.message)
    if report.leaks and config.on_leak == "fail":
        said = "; ".join(f"{f.check}: {f.message} -> {_REMEDIES[f.check]}" for f in report.leaks[:3])
        more = f"; and {len(report.leaks) - 3} more" if len(report.leaks) > 3 else ""
        raise DatasetError(f"test data leaks: {said}{more}; or set audit.on_leak=warn to go on all the same")


def _record(pair: Pair, split: str, manifest: Manifest) -> Record:
    scene, valid = pair.scene, pair.scene.valid
    place = None
    if scene.longitude_deg is not None and scene.latitude_deg is not None:
        place = (scene.longitude_deg, scene.latitude_deg)
    pixels = np.concatenate([pair.image[valid], pair.truth[valid]], axis=1)
    return Record(
        observation_id=scene.observation_id,
        split=split,
        kind=scene.kind,
        region=region_name(scene),
        place=place,
        footprint=scene.footprint,
        image=fingerprint(pair.image, valid),
        target_digest=pixel_digest(pair.truth, valid),
        saturated=tuple((((pixels <= 0.0) | (pixels >= 1.0)).sum(axis=0) / max(len(pixels), 1)).tolist()),
        crushed=_crushed(pixels, pair, manifest),
        no_data=1.0 - float(valid.mean()),
    )


def _crushed(pixels: NDArray[np.float32], pair: Pair, manifest: Manifest) -> tuple[bool, ...]:
    inputs = pair.image.shape[-1]
    # Pairs come stretched image by image, whatever the configuration says.
    stretched = np.full(pixels.shape[1], pair.scene.source == "pairs")
    stretched[:inputs] |= manifest.transform.normalization != "physical"
    stretched[inputs:] |= manifest.data.target_normalization != "physical"
    if not stretched.any() or not len(pixels):
        return tuple(False for _ in stretched)
    bottom, top = np.percentile(pixels, (1.0, 99.0), axis=0)
    # A constant channel holds nothing, but no outlier crushed it: `saturated` tells it.
    crushed = stretched & (top - bottom <= checks.CRUSHED) & (np.ptp(pixels, axis=0) > 0.0)
    return tuple(bool(c) for c in crushed)


def _channels(manifest: Manifest) -> tuple[str, ...]:
    variant = manifest.transform.variant
    bands = ("PC1", "PC2", "PC3") if variant == "pca" else VARIANT_BANDS[variant]
    return tuple(f"input {b}" for b in bands) + tuple(f"target {p}" for p in TARGET_PARAMETERS[manifest.data.target])


def _statistics_of(manifests: Sequence[Manifest]) -> list[Finding]:
    """A finding for each that learns something; one for the first where none does."""
    fitted = [m for m in manifests if m.transform.variant == "pca" or m.transform.fitted_on]
    return [_statistics(m) for m in fitted or manifests[:1]]


def _statistics(manifest: Manifest) -> Finding:
    """Whatever the transform learnt, it learnt from train scenes."""
    transform, train = manifest.transform, manifest.of("train")
    ids = {s.observation_id for s in train}
    fitted_on = transform.fitted_on
    outside = tuple(i for i in fitted_on or () if i not in ids)
    if outside:
        return Finding(
            "statistics", "leak",
            f"the {transform.variant} transform was fitted on {len(outside)} scenes that are not train scenes: "
            f"{shown(outside)}",
            outside,
        )  # fmt: skip
    if transform.variant != "pca":
        return Finding("statistics", "ok", "no variant has anything that is fitted")
    known = ids if fitted_on is None else set(fitted_on)
    again = fit_transform([s for s in train if s.observation_id in known], transform.variant, transform.normalization)
    # A checkpoint of version 0.1 names no scenes; its range was fitted in another way.
    for name in ("mean", "components", "low", "high") if fitted_on is not None else ("mean", "components"):
        own, refitted = getattr(transform, name), getattr(again, name)
        # Sums in another order differ by 1e-12; one scene more or less by far more than this.
        if refitted is not None and (own is None or not np.allclose(own, refitted, rtol=1e-6, atol=1e-9)):
            return Finding(
                "statistics", "leak",
                f"fitting pca on the {len(known)} train scenes gives another {name}: it was fitted on other pixels",
            )  # fmt: skip
    return Finding("statistics", "ok", f"fitting pca on the {len(known)} train scenes again gives the same transform")
