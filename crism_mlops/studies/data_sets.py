"""A manifest's parts as MLflow's data sets: one for each split, the same for all runs that use it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from crism_mlops.config import DataConfig
from crism_mlops.dataset.manifest import Manifest, SplitName
from crism_mlops.dataset.variants import channels
from crism_mlops.tracking_data import Context, DataSet

PARTS: tuple[SplitName, ...] = ("train", "validation", "test")
# On a study's run: every scene of its data set by its split.
OBSERVATIONS = "data/observations.json"
_CONTEXTS: dict[SplitName, Context] = {
    "train": "training", "validation": "validation", "test": "test", "test_balanced": "test"
}  # fmt: skip


def data_sets(manifest: Manifest, parts: Sequence[SplitName] = PARTS) -> list[DataSet]:
    """What of a manifest a run uses, in this order: the UI shows the first one in its table.

    Their digest is the manifest's, that of the parameter `data_digest`.
    """
    data = manifest.data
    kind, source = _source(data)
    shared = {
        "variant": data.variant, "normalization": data.normalization, "target": data.target,
        "target_normalization": data.target_normalization, "resolution": data.resolution, "views": list(data.views),
    }  # fmt: skip
    found = []
    for part in parts:
        profile = {"split": part, **manifest.profile(part), **shared}
        name = f"{data.source}-{data.variant}-{part.replace('_', '-')}"
        found.append(DataSet(name, manifest.digest, _CONTEXTS[part], kind, source, _schema(data), json.dumps(profile)))
    return found


def observations(manifest: Manifest) -> str:
    """The scenes of a manifest, JSON: id, split, whether in the balanced test set, kind, region; `content`, the digest
    of all that the data set takes from a scene, and `made_of`, that of its products and recipe, where it is known.

    The same for every variant of a study: one list serves all its runs.
    """
    balanced = set(manifest.split.test_balanced)
    scenes = [
        {"id": scene.observation_id, "split": part, "balanced": scene.observation_id in balanced, "kind": scene.kind,
         "region": scene.region, "content": scene.content, "made_of": scene.digest}
        for part in PARTS for scene in manifest.of(part)
    ]  # fmt: skip
    content = {"scenes_digest": manifest.scenes_digest, "test_digest": manifest.test_digest, "scenes": scenes}
    return json.dumps(content, separators=(",", ":"))


def _source(data: DataConfig) -> tuple[str, str]:
    """MLflow's kind of source, and where it is as JSON: a folder, or the code that simulates."""
    if data.source == "simulated":
        settings = {f"data.simulated.{key}": value for key, value in data.simulated.model_dump().items()}
        return "code", json.dumps({"tags": {"mlflow.source.name": "crism_mlops.products.simulate", **settings}})
    return "local", json.dumps({"uri": data.path or data.store})


def _schema(data: DataConfig) -> str:
    """Image and target, as MLflow describes tensors."""

    def tensor(name: str, depth: int) -> str:
        spec: dict[str, Any] = {"dtype": "float32", "shape": [-1, -1, -1, depth]}
        return json.dumps([{"type": "tensor", "name": name, "tensor-spec": spec}])

    features, targets = tensor(data.variant, channels(data.variant)), tensor(data.target, 3)
    return json.dumps({"mlflow_tensorspec": {"features": features, "targets": targets}})
