"""What MLflow is told of a data set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Context = Literal["training", "validation", "test"]


@dataclass(frozen=True, slots=True)
class DataSet:
    """One part of a data set, and what a run used it for. MLflow knows it by name and digest: runs with the same
    have one between them.

    name: at most 500 characters; digest: at most 36; source_type: what MLflow can load again ("local", "code");
    source, schema, profile: JSON.
    """

    name: str
    digest: str
    context: Context
    source_type: str
    source: str
    schema: str
    profile: str
