"""The input autoencoders that a study uses: which they are, and what they have seen."""

from __future__ import annotations

import logging
from pathlib import Path

from crism_mlops.config import RunConfig, SweepConfig
from crism_mlops.dataset.manifest import Manifest
from crism_mlops.dataset.variants import channels
from crism_mlops.models.autoencoder import AutoencoderCard, autoencoder_digest, read_card
from crism_mlops.studies.search_space import input_variants

log = logging.getLogger(__name__)
Seen = dict[str, tuple[str, ...]]


def input_vae_digests(sweep: SweepConfig) -> dict[str, str]:
    """Digests of the autoencoders that a sweep's trials may encode their input with, by folder as the sweep names it;
    empty where no variant needs one. Raises ModelError for a folder that holds none."""
    return {name: autoencoder_digest(Path(name).expanduser()) for name in _names(sweep)}


def input_vaes_seen(sweep: SweepConfig) -> dict[str, Seen | None]:
    """What these autoencoders have seen, for the audit: ids by split, None where there is no card.

    One that was trained on images of another normalisation than a trial may show it is logged.
    Raises ModelError for a folder that holds none, and a card that does not fit.
    """
    cards: dict[str, AutoencoderCard | None] = {}
    for name in input_vae_digests(sweep):
        cards[name] = card = read_card(Path(name).expanduser())
        used = {normalization for variant, normalization in input_variants(sweep) if _needs_one(variant)}
        if card is not None and (other := sorted(used - {card.normalization})):
            log.warning(
                "model.input_vae %s was trained on images of data.normalization %s; of %s it may be worse",
                name, card.normalization, ", ".join(other),
            )  # fmt: skip
    return {f"model.input_vae {name}": None if card is None else card.seen for name, card in cards.items()}


def scenes_seen(config: RunConfig, manifest: Manifest) -> Seen:
    """What a trial's checkpoint has seen, ids by split: its own scenes, and those of its input autoencoder."""
    seen: Seen = {"train": manifest.split.train, "validation": manifest.split.validation}
    place = getattr(config.model, "input_vae", None)
    card = read_card(Path(place).expanduser()) if place and _needs_one(config.data.variant) else None
    if card is None:
        return seen
    return {part: tuple(dict.fromkeys((*ids, *card.seen.get(part, ())))) for part, ids in seen.items()}


def _names(sweep: SweepConfig) -> list[str]:
    if sweep.model.kind != "instruct_pix2pix" or not any(_needs_one(v) for v, _ in input_variants(sweep)):
        return []
    return [str(place) for place in sweep.values_of("model.input_vae") if place is not None]


def _needs_one(variant: str) -> bool:
    return channels(variant) != 3  # type: ignore[arg-type]
