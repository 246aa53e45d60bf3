"""crism-mlops schema: the study file's JSON Schema, for editors."""

from __future__ import annotations

from typing import Any

from crism_mlops.terminal import print_json

NAME = "sweep.schema.json"


def schema() -> None:
    """Print the JSON Schema of the study file, by which editors complete and check it.

    A file says so in its first line: # yaml-language-server: $schema=sweep.schema.json

    Example: crism-mlops schema > sweeps/sweep.schema.json
    """
    print_json(study_schema())


def study_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of the study file."""
    from crism_mlops.config import SweepConfig

    made = _cleaned(SweepConfig.model_json_schema())
    assert isinstance(made, dict)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"https://crism-mlops.invalid/{NAME}",
        "title": "A study of crism-mlops",
        **made,
    }


def _cleaned(part: Any) -> Any:
    """Without titles, which repeat the keys. A union needs no tag in a file that leaves the default kind out, so
    its parts are any of, not one of."""
    if isinstance(part, list):
        return [_cleaned(one) for one in part]
    if not isinstance(part, dict):
        return part
    kept = {key: value for key, value in part.items() if key not in ("title", "discriminator")}
    made = {}
    for key, value in kept.items():
        if key in ("properties", "$defs"):
            # Names of the file's, not of the schema language.
            made[key] = {name: _cleaned(one) for name, one in value.items()}
        elif key == "default" or key == "const" or key == "enum":
            made[key] = value
        else:
            made["anyOf" if key == "oneOf" else key] = _cleaned(value)
    return made
