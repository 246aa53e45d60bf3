"""What experts say of whole scenes: a CSV of observation_id and label."""

from __future__ import annotations

import csv
from pathlib import Path

from crism_mlops.errors import SceneError

LABELS: dict[str, bool | None] = {"carbonate": True, "barren": False, "unknown": None}
_COLUMNS = ("observation_id", "label")


def read_labels(path: Path) -> dict[str, bool | None]:
    """Lower-case observation ids -> carbonate-bearing (True), barren (False) or unknown (None).

    A CSV (UTF-8, with or without byte order mark) with the columns observation_id and label, in
    any case; further columns are ignored. An id may stand twice with the same label. Raises
    SceneError, naming the line, for a missing column or id, a word that is no label, and an id
    with two labels.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as handle:
            reader = csv.reader(handle, strict=True)
            lines = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error) as error:
        raise SceneError(
            f"{path}: not a readable table ({' '.join(str(error).split())}); "
            "give data.labels a CSV in UTF-8 with the columns observation_id,label"
        ) from error
    first, header = lines[0] if lines else (1, [])
    columns = [name.strip().lower() for name in header]
    for name in _COLUMNS:
        if columns.count(name) != 1:
            raise SceneError(
                f"{path}, line {first}: {columns.count(name)} columns {name}; expected the columns "
                f"{','.join(_COLUMNS)} with commas between them, found {','.join(columns)[:100] or 'nothing'}"
            )
    labels: dict[str, bool | None] = {}
    stands: dict[str, int] = {}
    for line, row in lines[1:]:
        cells = dict(zip(columns, (" ".join(cell.lower().split()) for cell in row), strict=False))
        name, word = (cells.get(column, "") for column in _COLUMNS)
        if not name:
            raise SceneError(f"{path}, line {line}: no observation_id; give one such as frt000047a3")
        if word not in LABELS:
            raise SceneError(f"{path}, line {line}: {name} is labelled {word[:50]!r}; use {', '.join(LABELS)}")
        if name in labels and labels[name] is not LABELS[word]:
            raise SceneError(
                f"{path}, lines {stands[name]} and {line}: two labels for {name}; keep one of them, or say unknown"
            )
        labels[name] = LABELS[word]
        stands.setdefault(name, line)
    return labels
