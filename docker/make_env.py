#!/usr/bin/env python3
"""Write docker/.env with a secret of its own for each empty line of .env.example, readable by this user only. What it
holds already stays; what it lacks is added. Needs Python's standard library only."""

from __future__ import annotations

import os
import re
import secrets
import sys
from pathlib import Path

HERE = Path(__file__).parent
_LINE = re.compile(r"(?m)^([A-Z_]+)=(.*)$")


def filled(example: str, present: str) -> tuple[str, list[str]]:
    """The file's text, and the names that were given a secret. `present` is the text of the file as it is."""
    known = {name: value for name, value in _LINE.findall(present) if value}
    added = []

    def line(found: re.Match[str]) -> str:
        name, value = found.groups()
        if value or name in known:
            return found.group()
        added.append(name)
        return f"{name}={secrets.token_hex(32)}"

    if not present.strip():
        return _LINE.sub(line, example), added
    kept = "".join(f"{row}\n" for row in present.splitlines() if not re.fullmatch(r"[A-Z_]+=", row))
    lacking = [line(found) for found in _LINE.finditer(example) if not found[2]]
    return kept + "".join(f"{row}\n" for row in lacking if row.partition("=")[2]), added


def main() -> None:
    target = HERE / ".env"
    present = target.read_text(encoding="utf-8") if target.exists() else ""
    text, added = filled((HERE / ".env.example").read_text(encoding="utf-8"), present)
    if not added:
        print(f"{target}: has all secrets; nothing changed")
        return
    new = target.with_name(".env.new")
    new.unlink(missing_ok=True)
    with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    new.replace(target)
    print(f"{target}: made {', '.join(added)}")


if __name__ == "__main__":
    sys.exit(main())
