"""The requirements of pyproject.toml, a line each: python wanted.py pyproject.toml EXTRA...

With them alone an image's layers of packages are made: they do not change with every line of the project itself.
"""

import re
import sys
import tomllib
from pathlib import Path


def wanted(text: str, extras: list[str]) -> list[str]:
    """Requirements of the project and of these extras. Raises KeyError for an extra that it does not have."""
    project = tomllib.loads(text)["project"]
    lines: list[str] = [*project["dependencies"]]
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    own = re.compile(rf"{re.escape(project['name'])}\b")
    return [line for line in lines if not own.match(line)]


if __name__ == "__main__":
    print("\n".join(wanted(Path(sys.argv[1]).read_text(encoding="utf-8"), sys.argv[2:])))
