"""Which version is to be served, and its files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from crism_mlops.errors import ServingError, TrackingAwayError, TrackingError
from crism_mlops.registry.serving.settings import Named
from crism_mlops.tracking_store import (
    connect,
    default_tracking_uri,
    reach_away,
    retry_ourselves,
    shown,
    sqlite_path,
    translated,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Version:
    """One version of a model; of a logged model without a registered name, `version` is its id."""

    name: str
    version: str
    run_id: str
    uri: str


class Registry:
    """The tracking store as a server sees it: who is meant, and give me its files. Both block."""

    def __init__(self, model: Named, tracking_uri: str | None) -> None:
        """Raises TrackingError where the store is not there."""
        self.model = model
        self.uri = tracking_uri or default_tracking_uri()
        self._file = sqlite_path(self.uri)
        if self._file is not None and not self._file.is_file():
            raise TrackingError(f"{self.uri}: no such store; name another with --tracking-uri")
        retry_ourselves()
        self._client = connect(self.uri)

    @property
    def moves(self) -> bool:
        """Whether the model may be another one later."""
        return self.model.alias is not None

    def resolve(self) -> Version:
        """The version that the name means now. Raises TrackingError, TrackingAwayError, ServingError."""
        # Opened, a file that was moved away would be made anew, and empty.
        if self._file is not None and not self._file.is_file():
            raise TrackingAwayError(f"{self.uri}: the file is gone")
        reach_away(self.uri)
        model = self.model
        try:
            with translated(self.uri):
                if model.id is not None:
                    found = self._client.get_logged_model(model.id)
                    return Version(str(found.name), model.id, str(found.source_run_id or ""), model.uri)
                if model.alias is not None:
                    version = self._client.get_model_version_by_alias(model.name, model.alias)
                else:
                    version = self._client.get_model_version(model.name, model.version)
        except TrackingError as error:
            if self._says_missing(error):
                raise ServingError(
                    f"{model.uri}: no such model in {shown(self.uri)}; crism-mlops promote makes a champion, "
                    "--model names another one"
                ) from error
            raise
        run = str(version.tags.get("crism.run_id") or version.run_id or "")
        return Version(str(model.name), str(version.version), run, f"models:/{model.name}/{version.version}")

    def _says_missing(self, error: TrackingError) -> bool:
        """Whether there is no such model. A server with log-in says of a name that does not exist what it says of one
        that is another's, so it is asked for the name alone."""
        code = getattr(error.__cause__, "error_code", "")
        if code == "PERMISSION_DENIED" and self.model.name is not None:
            try:
                with translated(self.uri):
                    self._client.get_registered_model(self.model.name)
            except TrackingError as other:
                code = getattr(other.__cause__, "error_code", "")
        return code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

    def fetch(self, version: Version, folder: Path) -> Path:
        """A copy of the version's files below `folder`: workers start again from it when the store is away, and when
        the version was deleted. Raises TrackingError."""
        import mlflow

        folder.mkdir(mode=0o700, parents=True)
        try:
            with translated(self.uri):
                made = Path(
                    mlflow.artifacts.download_artifacts(
                        artifact_uri=version.uri, dst_path=str(folder), tracking_uri=self.uri
                    )
                )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if not made.resolve().is_relative_to(folder.resolve()):
            # MLflow hands out the folder itself where it is on this machine.
            # A link stays one, which the worker refuses by its name; what it leads to is never copied.
            shutil.copytree(made, folder / "model", symlinks=True)
            made = folder / "model"
        return made
