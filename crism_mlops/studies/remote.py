"""A model on a server (`crism-mlops serve`), asked over HTTP.

A token is sent to the host that was asked for and to nobody else: no redirect is followed, no proxy
and no .netrc of the environment counts. It is never part of a message.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

import numpy as np
from numpy.typing import NDArray

from crism_mlops.config import digest_of
from crism_mlops.errors import ModelError, OtherModelError, one_line
from crism_mlops.studies.predictors import Facts, facts_of

if TYPE_CHECKING:
    import requests

    from crism_mlops.studies.served import Answer, Request

TOKEN = "CRISM_MLOPS_SERVE_TOKEN"
NAME_HEADER, VERSION_HEADER = "X-Model-Name", "X-Model-Version"
_CONNECT_S, _READ_S = 10.0, 1800.0
# A busy server is asked again so often, and each time not after more than so long.
_TRIES, _LONGEST_S = 10, 60.0
_LOCAL = "predict with the model itself: --model models:/NAME@champion or a checkpoint's folder"
_PARAMS = (
    "prompt", "longitude", "latitude", "location", "seed", "steps", "guidance", "image_guidance", "draws"
)  # fmt: skip


class RemoteModel:
    """A server's model; `facts` are what the server said at first.

    `say` is told why it takes longer. Raises ModelError, on one line, for whatever the server refuses.
    """

    def __init__(self, url: str, say: Callable[[str], None] = lambda words: None) -> None:
        import requests

        self.url, self._say = _checked_url(url), say
        self._session = requests.Session()
        # Neither a proxy nor .netrc: either would see the token or replace it.
        self._session.trust_env = False
        self._session.verify = os.environ.get("REQUESTS_CA_BUNDLE") or True
        self._session.headers["Accept"] = "application/json"
        token = os.environ.get(TOKEN)
        if token:
            if not (token.isascii() and token.isprintable() and " " not in token):
                raise ModelError(f"{TOKEN} holds spaces, line ends or letters that a header cannot; set it again")
            self._session.headers["Authorization"] = f"Bearer {token}"
            parts = urlsplit(self.url)
            if parts.scheme == "http" and parts.hostname not in ("127.0.0.1", "::1", "localhost"):
                say(f"note: the token travels to {parts.netloc} as it is; https would hide it")
        answer = self._ask("GET", "/model")
        if answer.status_code in (404, 405):
            raise ModelError(
                f"{self.url}: it does not say which model it serves (GET /model), as plain `mlflow models serve` does "
                f"not; start it with: crism-mlops serve, or {_LOCAL}"
            )
        description = self._content(answer)
        self.version = _header(answer, VERSION_HEADER)
        tags = {"server": self.url, "model_name": _header(answer, NAME_HEADER), "model_version": self.version,
                "model_digest": digest_of(description)}  # fmt: skip
        self.facts: Facts = facts_of(description, self.url, {key: value for key, value in tags.items() if value})

    def answers(self, requests: Sequence[Request]) -> list[Answer]:
        """An answer for each request, one after the other. Raises ModelError, and OtherModelError where the server
        has gone over to another version."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Answer:
        params: dict[str, Any] = {"bands": list(request.bands), "units": self.facts.units}
        params |= {name: value for name in _PARAMS if (value := getattr(request, name)) is not None}
        body = json.dumps({"inputs": [_numbers(request.image)], "params": params})
        height, width = request.image.shape[:2]
        answer = self._ask("POST", "/invocations", body)
        # The body is too long, or its pixels are more than the model takes.
        if answer.status_code == 413 or (answer.status_code == 400 and "pixels" in _message(answer)):
            raise ModelError(
                f"{self.url}: {height} x {width} pixels ({len(body) / 1e6:.0f} MB) are more than the server takes at "
                f"once ({_message(answer)}); cut the image into pieces (gdal_translate -srcwin), or {_LOCAL}"
            )
        version = _header(answer, VERSION_HEADER)
        if version and self.version and version != self.version:
            raise OtherModelError(
                f"{self.url}: it served version {self.version} at first and now {version}, so nothing more is "
                "predicted; for all by one version name another folder or add --force, and serve a version that stays: "
                "crism-mlops serve --model models:/NAME/VERSION"
            )
        found = self._content(answer).get("predictions")
        try:
            return _as_answer(found, height, width)
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(
                f"{self.url}: its answer is not that of crism-mlops serve ({one_line(error)[:160]}); {_LOCAL}"
            ) from error

    def _ask(self, method: str, path: str, body: str | None = None) -> requests.Response:
        import requests

        for left in reversed(range(_TRIES)):
            try:
                answer = self._session.request(
                    method, self.url + path, data=body, headers={"Content-Type": "application/json"} if body else {},
                    timeout=(_CONNECT_S, _READ_S), allow_redirects=False,
                )  # fmt: skip
            except requests.ConnectionError as error:
                raise ModelError(
                    f"{self.url}: no connection ({_cause(error)}); start a server with crism-mlops serve, or "
                    "look at the address"
                ) from error
            except requests.Timeout as error:
                raise ModelError(f"{self.url}: no answer within {_READ_S:.0f} s; {_LOCAL}") from error
            except requests.RequestException as error:
                raise ModelError(f"{self.url}: not a usable address or answer ({type(error).__name__})") from error
            if answer.status_code != 503 or left == 0:
                return answer
            wait = _wait(answer.headers.get("Retry-After"))
            self._say(f"{self.url} is busy; asking again in {wait:.0f} s")
            time.sleep(wait)
        raise AssertionError("the last try returns")

    def _content(self, answer: requests.Response) -> dict[str, Any]:
        """The JSON object of a good answer. Raises ModelError for any other one."""
        status = answer.status_code
        if 300 <= status < 400:
            raise ModelError(
                f"{self.url}: it answers with a redirect to another address, which is not followed; give "
                "that address itself"
            )
        if status in (401, 403):
            raise ModelError(f"{self.url}: it wants another token than {TOKEN} holds; set {TOKEN} to the server's")
        if status == 503:
            raise ModelError(f"{self.url}: still busy after {_TRIES} tries ({_message(answer)}); try again later")
        if status != 200:
            raise ModelError(f"{self.url}: {_message(answer)} (HTTP {status})")
        try:
            content = answer.json()
        except ValueError as error:
            raise ModelError(f"{self.url}: its answer is not JSON; give the address of crism-mlops serve") from error
        if not isinstance(content, dict):
            raise ModelError(f"{self.url}: its answer is not a JSON object; give the address of crism-mlops serve")
        return content


def _checked_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if not good:
        raise ModelError(f"{url[:100]}: not an address; expected http://HOST:PORT of crism-mlops serve")
    if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
        raise ModelError(f"an address is http://HOST:PORT and nothing more; put a token into {TOKEN}")
    return url.rstrip("/").removesuffix("/invocations")


def _numbers(image: NDArray[np.float32]) -> Any:
    """An image as nested lists whose shortest text is as exact as float32 is: half of what float64 needs."""
    exact = image.astype(np.float64)
    short = np.array([float(str(value)) for value in image.ravel()]).reshape(image.shape)
    return np.where(short.astype(np.float32) == image, short, exact).tolist()


def _as_answer(found: Any, height: int, width: int) -> Answer:
    """Raises KeyError, TypeError or ValueError for another form."""
    from crism_mlops.studies.served import Answer

    def array(name: str, channels: int | None, dtype: Any) -> NDArray[Any]:
        values = np.asarray(found[name], dtype=np.float32)
        shape = (1, height, width) if channels is None else (1, height, width, channels)
        if values.shape != shape or not np.isfinite(values).all():
            raise ValueError(f"{name} has shape {values.shape} or holds no numbers, expected {shape}")
        return np.asarray(values[0], dtype=dtype)

    return Answer(
        prediction=array("prediction", 3, np.float32),
        scaled=np.empty((0, 0, 3), dtype=np.float32),
        nodata=array("nodata", None, np.bool_),
        carbonate=array("carbonate", None, np.bool_) if found.get("carbonate") is not None else None,
        deviation=array("deviation", 3, np.float32) if found.get("deviation") is not None else None,
    )


def _wait(text: str | None) -> float:
    """Seconds to wait; a date, or nothing, is five seconds."""
    try:
        return min(max(float(text or ""), 0.0), _LONGEST_S)
    except ValueError:
        return 5.0


def _message(answer: requests.Response) -> str:
    """What a server says went wrong, on one line."""
    try:
        content = answer.json()
    except ValueError:
        # Not answer.text, which guesses an encoding.
        content = answer.content[:2000].decode(errors="replace")
    if isinstance(content, dict):
        content = next(
            (content[key] for key in ("message", "detail", "error") if isinstance(content.get(key), str)), ""
        )
    return _text(content, 500) or answer.reason or "no reason given"


def _header(answer: requests.Response, name: str) -> str:
    """What a header says, whose letters beyond ASCII are %-encoded; empty where it is absent."""
    return _text(unquote(answer.headers.get(name, "")))


def _text(value: Any, longest: int = 100) -> str:
    """What came from a server, fit for a terminal and a tag."""
    text = " ".join(str(value).split()) if isinstance(value, str | int) else ""
    return "".join(c for c in text if c.isprintable())[:longest]


def _cause(error: BaseException) -> str:
    """What the system said, without the library's own names."""
    cause: BaseException | None = error
    for _ in range(8):
        reason = getattr(cause, "reason", None)
        inner = reason if isinstance(reason, BaseException) else cause.__cause__ or cause.__context__ if cause else None
        if inner is None:
            break
        cause = inner
    return getattr(cause, "strerror", None) or type(cause).__name__
