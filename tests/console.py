"""The console script, run in the tests' own process."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from crism_mlops import cli


class Ran:
    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line of an error; fails where there is another one, or anything on standard output."""
        assert self.code == 1, f"exit code {self.code}\n{self.out}{self.err}"
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert self.out == ""
        return lines[0]

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def console(words: Sequence[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ran:
    """Call it with these words; what it prints before is forgotten."""
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", ["crism-mlops", *map(str, words)])
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return Ran(code, out, err)
