"""From a file's text to keys and values, and from pydantic's errors to one line."""

from __future__ import annotations

import difflib
import json
import re
import types
from collections.abc import Iterator, Mapping
from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from crism_mlops.errors import ConfigError

if TYPE_CHECKING:
    import yaml

# A study file with a grid of a thousand points has not a tenth of it.
_MAX_NODES = 100_000

Chosen = Mapping[str, type[BaseModel]]


def read_yaml(text: str) -> Any:
    """YAML, safe-loaded; a key that stands twice is an error, and so are aliases that make a small file a huge one, or
    one that holds itself. Raises ValueError with one line."""
    import yaml

    try:
        return yaml.load(text, Loader=_loader())
    except (yaml.YAMLError, ValueError) as error:
        # PyYAML lets a date such as 2001-99-99 through to datetime's own ValueError.
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


@cache
def _loader() -> type[yaml.SafeLoader]:
    import yaml

    class Loader(yaml.SafeLoader):
        def get_single_node(self) -> yaml.Node | None:
            node: yaml.Node | None = super().get_single_node()
            if node is not None:
                _expanded(node, {})
            return node

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            for key in keys:
                if keys.count(key) > 1 and key != "<<":
                    raise yaml.YAMLError(f"the key {key} stands twice")
            return super().construct_mapping(node, deep)

    # YAML 1.1 takes 1e-4 for text, as it has no dot; YAML 1.2 and every reader of a sweep do not.
    number = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+.0123456789"))
    return Loader


def _expanded(node: yaml.Node, known: dict[int, int]) -> int:
    """How many nodes there are below one, those behind aliases counted each time; 0 stands in `known` for one whose
    count has begun."""
    import yaml

    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.YAMLError("an alias stands within what it names")
        return known[id(node)]
    known[id(node)] = 0
    count = 1
    if isinstance(node, yaml.CollectionNode):
        count += sum(
            _expanded(one, known) for entry in node.value for one in (entry if isinstance(entry, tuple) else (entry,))
        )
    if count > _MAX_NODES:
        raise yaml.YAMLError(f"with its aliases written out it has more than {_MAX_NODES} values")
    known[id(node)] = count
    return count


def digest_of(content: Any) -> str:
    """16 hex digits over JSON content, independent of key order."""
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=8).hexdigest()


def dotted_keys(section: type[BaseModel], chosen: Chosen | None = None) -> Iterator[str]:
    """Every key below a section, dotted; `chosen` names the class of a union field."""
    for name, field in section.model_fields.items():
        yield name
        for inner in _sections_in(field.annotation):
            if chosen is not None and name in chosen and inner is not chosen[name]:
                continue
            for key in dotted_keys(inner):
                yield f"{name}.{key}"


def _sections_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    elif get_origin(annotation) in (Union, types.UnionType, Annotated):
        for part in get_args(annotation):
            yield from _sections_in(part)


def set_dotted(content: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in nested mappings, which are made where they lack."""
    *parents, last = key.split(".")
    # The search block's own keys hold dots: search.train.learning_rate is one key of `search`.
    if parents and parents[0] == "search":
        parents, last = ["search"], key.removeprefix("search.")
    place = content
    for parent in parents:
        inner = place.setdefault(parent, {})
        if inner is None:
            # An empty section of a YAML file, or one that is optional.
            inner = place[parent] = {}
        if not isinstance(inner, dict):
            raise ConfigError(f"{key}: {parent} is {inner!r}, not a section")
        place = inner
    place[last] = value


def flatten(content: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings as dotted keys."""
    for key, value in content.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nearest(key: str, known: set[str]) -> str:
    """What to try instead of an unknown key: the nearest one, or the keys of its section."""
    section, _, leaf = key.rpartition(".")
    by_leaf = {name.rsplit(".", 1)[-1]: name for name in sorted(known, reverse=True)}
    match = difflib.get_close_matches(key, known, 1, 0.6) or [
        by_leaf[m] for m in difflib.get_close_matches(leaf, by_leaf, 1, 0.6)
    ]
    if match:
        return f"; did you mean {match[0]}?"
    siblings = sorted(name for name in known if name.rpartition(".")[0] == section) or sorted(known)
    return f"; known keys: {', '.join(siblings[:40])}"


def explain(error: ValidationError, section: type[BaseModel]) -> str:
    """One line of the first problem; the count of the others."""
    problems = error.errors()
    first = problems[0]
    place = _Place(first["loc"], section)
    location = place.name or "(file)"
    if first["type"] == "extra_forbidden":
        message = f"unknown key {location}{place.elsewhere()}{nearest(location, place.known())}"
    elif first["type"] == "missing":
        message = f"{location} is missing; add it"
    elif first["type"] in ("union_tag_invalid", "union_tag_not_found"):
        message = f"{location}.kind: {place.kinds(first)}"
    else:
        found = first.get("input")
        shown = "" if isinstance(found, (dict, BaseModel)) or location == "(file)" else f" (found {found!r:.100})"
        message = f"{location}: {first['msg'].removeprefix('Value error, ')}{shown}".replace("(file): ", "")
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return " ".join(f"{message}{more}".split())


class _Place:
    """Where an error lies: pydantic's path without the tags of unions, and the classes they named."""

    def __init__(self, path: tuple[int | str, ...], section: type[BaseModel]) -> None:
        self.section = section
        self.parts: list[str] = []
        self.chosen: dict[str, type[BaseModel]] = {}
        self.keyed = False  # Below a mapping with keys of the user's.
        self.parent: Any = None
        self.here: Any = section
        for part in path:
            self._step(part)

    def _step(self, part: int | str) -> None:
        sections = list(_sections_in(self.here))
        tagged = [one for one in sections if part in _tags(one)] if len(sections) > 1 else []
        if tagged:
            self.chosen[self.parts[-1]] = self.here = tagged[0]
            return
        if isinstance(part, str) and part.startswith("<"):
            return  # A tag of our own that is no class.
        self.parts.append(str(part))
        self.parent = self.here
        fields = [one.model_fields[part].annotation for one in sections if part in one.model_fields]
        # Annotated[X, ...] of an alias hides what X is.
        bare = get_args(self.here)[0] if get_origin(self.here) is Annotated else self.here
        inner = get_args(bare)
        self.keyed = self.keyed or get_origin(bare) is dict
        if get_origin(bare) in (dict, tuple) and inner:
            fields = [inner[1] if get_origin(bare) is dict else inner[0]]
        self.here = fields[0] if fields else None

    @property
    def name(self) -> str:
        return ".".join(self.parts)

    def known(self) -> set[str]:
        """Keys that could stand there: those of the classes that the file chose, not of the others."""
        siblings = {
            ".".join([*self.parts[:-1], name]) for one in _sections_in(self.parent) for name in one.model_fields
        }
        return siblings if self.keyed and siblings else set(dotted_keys(self.section, self.chosen)) | siblings

    def elsewhere(self) -> str:
        """Of which other kind an unknown key is an option."""
        here, key = self.chosen.get(self.parts[-2] if len(self.parts) > 1 else ""), self.parts[-1]
        if here is None or here is not self.parent:
            return ""
        field: Any = self.section
        for part in self.parts[:-1]:
            owner = next((one for one in _sections_in(field) if part in one.model_fields), None)
            field = owner.model_fields[part].annotation if owner else None
        others = [_tags(one)[0] for one in _sections_in(field) if key in one.model_fields]
        return f": an option of {', '.join(others)}, and the kind is {_tags(here)[0]}" if others else ""

    def kinds(self, problem: ErrorDetails) -> str:
        """Which kinds there are, and what was found."""
        kinds = [_tags(one)[0] for one in _sections_in(self.here)]
        if problem["type"] == "union_tag_not_found":
            return f"missing; one of {', '.join(kinds)}"
        found = str(problem.get("ctx", {}).get("tag"))
        return f"expected one of {', '.join(kinds)} (found {found!r:.100}){_close(found, kinds)}"


def _close(found: str, kinds: list[str]) -> str:
    match = difflib.get_close_matches(found, kinds, 1, 0.6)
    return f"; did you mean {match[0]}?" if match else ""


def _tags(section: type[BaseModel]) -> tuple[str, ...]:
    """What tells a class from the others of a union: the values of its kind, or its name."""
    kind = section.model_fields.get("kind")
    if kind is not None and get_origin(kind.annotation) is Literal:
        return tuple(get_args(kind.annotation))
    return (section.__name__,)
