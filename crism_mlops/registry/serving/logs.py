"""Logs as JSON lines: one object a line, whoever speaks."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from crism_mlops.errors import CrismError
from crism_mlops.redact import redacted

# Everything of the server goes by this name; its fields stand beside `event`.
log = logging.getLogger("crism_mlops.serve")


class JsonLines(logging.Formatter):
    """A record as one JSON object: time, level, event, the fields it was given, a traceback where there is one;
    without passwords and tokens."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        if record.name != log.name:
            content["logger"] = record.name
        content |= getattr(record, "fields", {})
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        # Text by text: within the finished line a quotation mark's backslash would count as a password's.
        return json.dumps(_hidden(content), default=lambda value: redacted(str(value)))


def _hidden(value: Any) -> Any:
    match value:
        case str():
            return redacted(value)
        case dict():
            return {key: _hidden(one) for key, one in value.items()}
        case list() | tuple():
            return [_hidden(one) for one in value]
    return value


def log_as_json(stream: TextIO | None = None) -> None:
    """All logs of this process as JSON lines on standard error (or `stream`); the server's from INFO on."""
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    logging.captureWarnings(True)
    log.setLevel(logging.INFO)


def tell(level: int, event: str, *, exc_info: BaseException | None = None, **fields: Any) -> None:
    """One line; a field that is None is left out."""
    kept = {key: value for key, value in fields.items() if value is not None}
    log.log(level, "%s", event, extra={"fields": kept}, exc_info=exc_info)


def unexpected(error: Exception) -> Exception | None:
    """The error, for a traceback in the log, where it is none that we raise ourselves or an operating system's."""
    return None if isinstance(error, CrismError | OSError) else error
