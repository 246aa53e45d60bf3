"""What predicts: a checkpoint in this process, or a server; both take requests and say what they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, get_args

from pydantic import ValidationError

from crism_mlops.config import DataConfig, InstructPix2PixModel, Variant, digest_of
from crism_mlops.dataset.variants import VARIANT_BANDS
from crism_mlops.errors import ModelError
from crism_mlops.scenes.filters import FILTERS, Filter, load_filters
from crism_mlops.studies.inputs import ranges_nm

if TYPE_CHECKING:
    from crism_mlops.studies.served import Answer, Request


@dataclass(frozen=True, slots=True)
class Facts:
    """What a model takes and gives (`studies.served_description.description`), and who it is.

    data: of its configuration what concerns scenes, with target, normalisation and ranges; filters: what
    its bands are made through, None where nobody can tell here; within_nm: the wavelengths that a band of each
    name may have; chunk: how many requests it answers best at once; text: how its prompts are made, where that is
    known here; tags: what to remember it by.
    """

    model: str
    variant: Variant
    units: str
    names: tuple[str, ...]
    output_units: tuple[str, ...]
    data: DataConfig
    normalization: str
    carbonate: bool
    resolution: int
    seed: int
    prompt: str | None
    chunk: int
    filters: tuple[Filter, ...] | None
    within_nm: Mapping[str, tuple[float, float]]
    tags: Mapping[str, str]
    text: InstructPix2PixModel | None = None

    @property
    def bands(self) -> tuple[str, ...]:
        """The channels of a request's image, in their order."""
        return VARIANT_BANDS[self.variant]


class Predictor(Protocol):
    """A model that can be asked."""

    @property
    def facts(self) -> Facts: ...

    def answers(self, requests: Sequence[Request]) -> list[Answer]: ...


class LocalModel:
    """A checkpoint's folder, in this process."""

    def __init__(self, folder: Path, device: str = "auto") -> None:
        """Raises ModelError for a folder that is no checkpoint and for a device that is not there."""
        from crism_mlops.products.geotiff import MAX_PIXELS
        from crism_mlops.studies.request import Limits
        from crism_mlops.studies.served import Served

        self.served = Served.load(folder, device)
        # Nobody else's memory: whatever can be read can be predicted, however long a strip it is.
        self.served.limits = Limits(side=MAX_PIXELS, pixels=MAX_PIXELS)
        checkpoint = self.served.checkpoint
        config = checkpoint.config
        rule = None if checkpoint.carbonate is None else asdict(checkpoint.carbonate)
        tags = {
            "checkpoint_digest": digest_of([checkpoint.files, config.digest, asdict(checkpoint.transform), rule]),
            "data_digest": checkpoint.data_digest,
            "config_digest": config.digest,
        }
        # Its own filters, wherever the file that they came from is now, and whatever it holds.
        filters = checkpoint.filters or load_filters(config.data.filters)
        found = facts_of(self.served.describe(), str(folder), tags, config.data, filters)
        self.facts = replace(found, text=config.model if config.model.kind == "instruct_pix2pix" else None)

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """See `Served.answers`."""
        return self.served.answers(requests)


def facts_of(
    description: Mapping[str, Any],
    where: str,
    tags: Mapping[str, str],
    data: DataConfig | None = None,
    filters: tuple[Filter, ...] | None = None,
) -> Facts:
    """A model's own description, checked. Raises ModelError, which names `where` it is from, for one that does not fit
    this version."""
    try:
        variant, defaults = description["variant"], description["defaults"]
        if variant not in get_args(Variant):
            raise ValueError(f"unknown variant {str(variant)[:40]!r}")
        if list(description["bands"]) != list(VARIANT_BANDS[variant]):
            raise ValueError(f"bands {str(description['bands'])[:80]} of variant {variant}")
        if description["units"] not in ("I/F", "scaled"):
            raise ValueError(f"unknown units {str(description['units'])[:40]!r}")
        names, units = (tuple(str(v)[:40] for v in description[key]) for key in ("names", "output_units"))
        if len(names) != 3 or len(units) != 3:
            raise ValueError(f"{len(names)} names and {len(units)} units of three output channels")
        if data is None:
            data = DataConfig.model_validate(
                {
                    "source": "mtrdr",
                    "variant": variant,
                    "target": description["target"],
                    "target_normalization": description["target_normalization"],
                    "ranges": description["target_ranges"] or {},
                }
            )
        known = description["wavelengths_nm"] or {}
        nm = {name: (float(one["centre"]), float(one["width"])) for name, one in known.items()}
        if filters is None and nm and nm == {f.name: (f.centre_nm, f.width_nm) for f in FILTERS if f.name in nm}:
            filters = FILTERS
        within = ranges_nm() | {name: (centre - width / 2, centre + width / 2) for name, (centre, width) in nm.items()}
        prompt = defaults.get("prompt")
        return Facts(
            model=str(description["model"])[:40],
            variant=variant,
            units=description["units"],
            names=names,
            output_units=units,
            data=data,
            normalization=str(description["normalization"])[:40],
            carbonate=bool(description["carbonate"]),
            resolution=int(description["resolution"]),
            seed=int(defaults["seed"]),
            prompt=None if prompt is None else str(prompt),
            chunk=max(1, int(description["chunk"])),
            filters=filters,
            within_nm=within,
            tags=tags,
        )
    except (KeyError, TypeError, ValueError, AttributeError, ValidationError) as error:
        what = f"no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())[:200]
        raise ModelError(
            f"{where}: what it says of itself does not fit this version of crism-mlops ({what})"
        ) from error
