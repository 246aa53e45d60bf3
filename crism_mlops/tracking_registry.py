"""Registered models: their versions, aliases and tags, as MLflow's registry holds them.

A name, version or alias that does not exist is None, or nothing; whatever else goes wrong is a TrackingError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from crism_mlops.errors import TrackingError
from crism_mlops.tracking import Tracker, connect, default_tracking_uri, sqlite_path

T = TypeVar("T")
# Characters that a description may have: the column's width. SQLite takes more, PostgreSQL and MySQL do not.
MAX_DESCRIPTION = 5000
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND")
_EXISTS = ("RESOURCE_ALREADY_EXISTS", "ALREADY_EXISTS")
_PAGE = 200
# A registered model of this ending is a lock: of two that create one name, the store lets one succeed.
LOCK = ".lock"
# On a logged model: the versions that were made of it, which MLflow's UI shows on its page.
_VERSIONS_OF_MODEL = "mlflow.modelVersions"


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a registered model.

    run_id: the run that made the model, "" where nobody said; source: usually models:/ID, the logged model;
    aliases: sorted; created: time.time().
    """

    name: str
    number: str
    run_id: str
    source: str
    tags: dict[str, str]
    aliases: tuple[str, ...]
    description: str
    created: float

    @property
    def uri(self) -> str:
        """What MLflow calls it."""
        return f"models:/{self.name}/{self.number}"

    @property
    def model_id(self) -> str:
        """The logged model that it was made of; "" where it was made of files."""
        known = self.source.removeprefix("models:/")
        return self.tags.get("crism.model_id", "" if known == self.source or "/" in known else known)


def any_tracker(uri: str | None) -> Tracker:
    """A tracker for who is interested in the registry alone: on whatever experiment the store has. Raises TrackingError
    where there is no such store."""
    # MLflow makes it in every store; but somebody may have deleted it.
    try:
        return Tracker(uri, "Default", create=False)
    except TrackingError:
        uri = uri or default_tracking_uri()
        path = sqlite_path(uri)
        if path is not None and not path.is_file():
            raise
        names = [e.name for e in connect(uri).search_experiments(max_results=1)]
        if not names:
            raise
        return Tracker(uri, names[0], create=False)


class Registry:
    """The registered models of a tracker's store. A method returns when the store has what it was told."""

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self._client = tracker.client

    def names(self) -> list[str]:
        """Registered models, sorted."""
        return sorted(name for m in self._models() if not (name := str(m.name)).endswith(LOCK))

    def all_aliases(self) -> dict[str, dict[str, str]]:
        """Name -> alias -> version's number, of every registered model."""
        return {name: _aliases(m) for m in self._models() if not (name := str(m.name)).endswith(LOCK)}

    def aliases(self, name: str) -> dict[str, str]:
        """Alias -> version's number; nothing where there is no such model."""
        return _aliases(self._model(name))

    def tags(self, name: str) -> dict[str, str]:
        """A registered model's tags; nothing where there is no such model."""
        found = self._model(name)
        return {} if found is None else dict(found.tags)

    def versions(self, name: str | None = None) -> list[Version]:
        """Versions of a registered model, or of all of them: by name, the oldest first."""
        if name is not None and "'" in name:
            return []  # MLflow's filter cannot say it, and no name of ours holds a quote.
        return self._search(None if name is None else f"name = '{name}'")

    def versions_of_run(self, run_id: str) -> list[Version]:
        """Versions that were made of a run's model."""
        return [] if "'" in run_id else self._search(f"run_id = '{run_id}'")

    def version(self, name: str, number: str | int) -> Version | None:
        """A version by its number. Raises TrackingError for what is no number."""
        found = self._unless_gone(name, lambda: self._client.get_model_version(name, str(number)))
        return None if found is None else _version(found, self.aliases(name))

    def by_alias(self, name: str, alias: str) -> Version | None:
        """The version that an alias means."""
        # Not get_model_version_by_alias: of an alias that is not there a database says the same as of a bad name.
        number = self.aliases(name).get(alias)
        return None if number is None else self.version(name, number)

    def register(self, model_id: str, name: str, tags: Mapping[str, str]) -> Version:
        """Make a version of a logged model, the registered model too where there is none. Of a logged model that has
        a version of this name already, that one, as it stands."""

        def create() -> tuple[Any, bool]:
            self._create_name(name)
            source = f"models:/{model_id}"
            known = [v for v in self._pages(f"name = '{name}'") if v.source == source]
            if known:
                return known[0], False
            # The store looks the logged model up where MLflow's functions without a client do.
            import mlflow

            mlflow.set_tracking_uri(self.tracker.uri)
            run_id = self._client.get_logged_model(model_id).source_run_id
            # Not mlflow.register_model, which prints, and asks the last tracker's store.
            return self._client.create_model_version(name, source, run_id, dict(tags), model_id=model_id), True

        made, fresh = self._ask(create)
        if fresh:
            self._ask(lambda: self._link(model_id, name, made.version))
        return _version(made, self.aliases(name))

    def set_version_tags(self, version: Version, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        for key, value in tags.items():
            self._ask(partial(self._client.set_model_version_tag, version.name, version.number, key, str(value)))

    def delete_version_tag(self, version: Version, key: str) -> None:
        """Take a version's tag away; nothing where there is none."""
        _unless_missing(
            lambda: self._ask(lambda: self._client.delete_model_version_tag(version.name, version.number, key))
        )

    def set_tags(self, name: str, tags: Mapping[str, str]) -> None:
        """Set tags of a registered model."""
        for key, value in tags.items():
            self._ask(partial(self._client.set_registered_model_tag, name, key, str(value)))

    def set_alias(self, name: str, alias: str, number: str | int) -> None:
        """Let an alias mean a version; the one that it meant before has it no more."""
        self._ask(lambda: self._client.set_registered_model_alias(name, alias, str(number)))

    def delete_alias(self, name: str, alias: str) -> None:
        """Take an alias away; nothing where there is none."""
        self._unless_gone(name, lambda: self._client.delete_registered_model_alias(name, alias))

    def describe(self, version: Version, text: str) -> None:
        """Give a version its description, Markdown of at most MAX_DESCRIPTION characters. Raises TrackingError for
        a longer one."""
        if len(text) > MAX_DESCRIPTION:
            raise TrackingError(
                f"a version's description has {len(text)} characters; expected {MAX_DESCRIPTION} or less"
            )
        self._ask(lambda: self._client.update_model_version(version.name, version.number, text))

    def delete_version(self, version: Version) -> None:
        """Remove a version and its aliases; the model that it was made of stays in its run."""
        _unless_missing(lambda: self._ask(lambda: self._client.delete_model_version(version.name, version.number)))

    def claim(self, name: str, tags: Mapping[str, str]) -> dict[str, str] | None:
        """Create a name's lock with its holder's tags; None if that worked, else the tags of who holds it.

        Any store that MLflow knows does this for one of several at once: names are unique.
        """
        from mlflow.exceptions import MlflowException

        def create() -> dict[str, str] | None:
            try:
                self._client.create_registered_model(name + LOCK, dict(tags))
            except MlflowException as error:
                # MLflow itself looks at what exists, and finds nothing where it was given back in between.
                if error.error_code not in (*_EXISTS, *_MISSING):
                    raise
                # Given back in between: as good as held by somebody who is about to give it back.
                return self.tags(name + LOCK)
            return None

        return self._ask(create)

    def release(self, name: str, tags: Mapping[str, str]) -> None:
        """Give a name's lock back, if its holder is still who these tags say."""
        if self.tags(name + LOCK) == dict(tags):
            _unless_missing(lambda: self._ask(lambda: self._client.delete_registered_model(name + LOCK)))

    def _ask(self, call: Callable[[], T]) -> T:
        return self.tracker._ask(call)

    def _unless_gone(self, name: str, call: Callable[[], T]) -> T | None:
        """What `call` returns; None where what it asks for, of a registered model, does not exist."""
        try:
            return _unless_missing(lambda: self._ask(call))
        except TrackingError as error:
            # A server with log-in says of a name that does not exist what it says of one that is another's.
            if _code(error) == "PERMISSION_DENIED" and self._model(name) is None:
                return None
            raise

    def _model(self, name: str) -> Any:
        return _unless_missing(lambda: self._ask(lambda: self._client.get_registered_model(name)))

    def _models(self) -> list[Any]:
        def read() -> list[Any]:
            found, token = [], None
            while True:
                page = self._client.search_registered_models(max_results=_PAGE, page_token=token)
                found += list(page)
                token = page.token
                if not token:
                    return found

        return self._ask(read)

    def _search(self, terms: str | None) -> list[Version]:
        found = self._ask(lambda: self._pages(terms))
        if not found:
            return []
        # The versions that a search finds do not know their aliases.
        names = {str(v.name) for v in found}
        aliases = self.all_aliases() if len(names) > 1 else {name: self.aliases(name) for name in names}
        return sorted((_version(v, aliases.get(str(v.name), {})) for v in found), key=lambda v: (v.name, int(v.number)))

    def _pages(self, terms: str | None) -> list[Any]:
        found: list[Any] = []
        token = None
        while True:
            page = self._client.search_model_versions(terms, max_results=_PAGE, page_token=token)
            found += list(page)
            token = page.token
            if not token:
                return found

    def _create_name(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code not in _EXISTS:
                raise

    def _link(self, model_id: str, name: str, number: Any) -> None:
        known = json.loads(self._client.get_logged_model(model_id).tags.get(_VERSIONS_OF_MODEL, "[]"))
        entry = {"name": name, "version": str(number)}
        if entry not in known:
            self._client.set_logged_model_tags(model_id, {_VERSIONS_OF_MODEL: json.dumps([*known, entry])})


def _unless_missing(call: Callable[[], T]) -> T | None:
    """What `call` returns; None where MLflow says that there is no such thing."""
    try:
        return call()
    except TrackingError as error:
        if _code(error) in _MISSING:
            return None
        raise


def _code(error: TrackingError) -> str:
    """MLflow's name for what went wrong."""
    return str(getattr(error.__cause__, "error_code", ""))


def _aliases(model: Any) -> dict[str, str]:
    return {} if model is None else {str(k): str(v) for k, v in model.aliases.items()}


def _version(found: Any, aliases: Mapping[str, str]) -> Version:
    number = str(found.version)
    return Version(
        name=str(found.name),
        number=number,
        run_id=found.run_id or found.tags.get("crism.run_id", ""),
        source=found.source or "",
        tags=dict(found.tags),
        aliases=tuple(sorted(alias for alias, of in aliases.items() if of == number)),
        description=found.description or "",
        created=(found.creation_timestamp or 0) / 1000.0,
    )
