"""One exception tree. The CLI catches CrismError and nothing else.

A message is one line: what was found, what was expected, what to do next.
"""

from __future__ import annotations

from crism_mlops.redact import redacted


class CrismError(Exception):
    """Anything that a user can put right; printed as one line, exit code 1. It never tells a password."""

    def __str__(self) -> str:
        return redacted(super().__str__())


class ConfigError(CrismError):
    """A sweep file or a `--set` that cannot be used as written."""


class ProductError(CrismError):
    """A file of the archive that cannot be read as what it claims to be."""


class SceneError(CrismError):
    """An observation that cannot become a scene (a product or a band is missing)."""


class StoreError(CrismError):
    """The store of built scenes and data sets cannot be read or written."""


class ClusterError(CrismError):
    """Worker processes or a Ray cluster that cannot be used."""


class DatasetError(CrismError):
    """Scenes that cannot become a data set (an empty split, too few carbonate scenes)."""


class ModelError(CrismError):
    """Weights that cannot be had or loaded, or a model that does not fit the data."""


class UntrustedError(ModelError):
    """A file from outside that is not what its name says, or that would do harm when it is read or loaded."""


class UnwrittenError(ModelError):
    """A checkpoint or a state to resume from that cannot be written (a full disk); what was there before is whole."""


class OtherModelError(ModelError):
    """A server serves another version of its model than at first."""


class TrainingError(CrismError):
    """Training that cannot go on (a non-finite loss)."""


class NonFiniteError(TrainingError):
    """Losses or gradients that are no numbers any more."""


class MemoryShortError(TrainingError):
    """Memory that does not suffice even for a batch of one."""


class EvaluationError(CrismError):
    """Images that cannot be scored."""


class GivenUpError(CrismError):
    """A prediction that nobody waits for any more."""


class TrackingError(CrismError):
    """The MLflow server or store cannot be used."""


class TrackingAwayError(TrackingError):
    """The MLflow server or store does not answer, or says "not now": the same call may succeed later.

    `doubtful`: it answered, with an internal error. That may pass, or come again for ever.
    """

    def __init__(self, message: str, *, doubtful: bool = False) -> None:
        super().__init__(message)
        self.doubtful = doubtful


class StudyError(CrismError):
    """A study that cannot be continued as asked."""


class LeaseLostError(StudyError):
    """A trial that others were given, as nothing was heard of its worker: whoever has it goes on, nobody else."""


class TrialTimeoutError(CrismError):
    """A trial that took longer than it may."""


class PromotionError(CrismError):
    """No run can be promoted as asked."""


class RequestError(CrismError):
    """What the served model is asked that it cannot answer; `found` and `expected` say so."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(f"{found}; expected {expected}")
        self.found = found
        self.expected = expected


class ServingError(CrismError):
    """A model that cannot be served as asked."""


def one_line(error: BaseException) -> str:
    """What an exception says, on one line of readable length; its type's name where it says nothing."""
    # SQLAlchemy ends with an address that explains its own errors, not the database's.
    text = str(error).partition("(Background on this error at")[0]
    # Before it is cut: half a password would not be known as one.
    return redacted(" ".join(text.split()))[:300] or type(error).__name__
