"""The archive's servers: which hosts may be asked, over what, and how often to try again.

Every address, and every redirect, is checked against a list of hosts before anything is sent there.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin

from crism_mlops import __version__
from crism_mlops.errors import CrismError

if TYPE_CHECKING:
    import requests

log = logging.getLogger(__name__)
ODE_URL = "https://oderest.rsl.wustl.edu/live2"
# The only ones that serve ODE's answers and the files named in them.
HOSTS = ("oderest.rsl.wustl.edu", "pds-geosciences.wustl.edu")
MAX_JSON_BYTES = 64 << 20
_MAX_REDIRECTS = 5
_CHUNK_BYTES = 1 << 16
_CONNECT_S = 15.0


class ArchiveError(CrismError):
    """The archive cannot be searched, or a file of it cannot be had."""


class TryAgainError(Exception):
    """A try that may go better next time; `after` is the server's Retry-After. Never leaves this stage."""

    def __init__(self, problem: str, after: str | None = None) -> None:
        super().__init__(problem)
        self.after = after


@dataclass(frozen=True, slots=True)
class Service:
    """Where the archive is and how patiently it is asked.

    `allowed` are hosts (HOST or HOST:PORT) beside the archive's own, over https or http; the
    archive's own are asked over https only. `backoff_s` is the unit of the exponential wait between
    `tries`, with jitter; a server's Retry-After counts, up to `longest_wait_s`. `page` is the number
    of products asked for at once.
    """

    url: str = ODE_URL
    allowed: tuple[str, ...] = ()
    timeout_s: float = 60.0
    tries: int = 6
    backoff_s: float = 0.5
    longest_wait_s: float = 120.0
    page: int = 200
    sleep: Callable[[float], None] = time.sleep


class Patience:
    """Counts the tries of one thing and waits between them."""

    def __init__(self, service: Service, what: str) -> None:
        self._service = service
        self._what = what
        self.reset()

    def reset(self) -> None:
        """Start to count anew: something was gained."""
        from urllib3.util import Retry

        unit = self._service.backoff_s
        self._retry = Retry(
            total=self._service.tries - 1,
            backoff_factor=unit,
            backoff_jitter=unit,
            backoff_max=self._service.longest_wait_s,
        )

    def wait(self, problem: TryAgainError) -> None:
        """Wait before the next try; raises ArchiveError, naming the thing, where there is none left."""
        from urllib3.exceptions import InvalidHeader, MaxRetryError

        try:
            self._retry = self._retry.increment(error=problem)
        except MaxRetryError:
            raise ArchiveError(
                f"{self._what}: {problem}; given up after {self._service.tries} tries, run the same command later"
            ) from problem
        seconds = self._retry.get_backoff_time()
        if problem.after is not None:
            try:
                seconds = self._retry.parse_retry_after(problem.after)
            except (InvalidHeader, ValueError, OverflowError):
                log.debug("%s: Retry-After %r is neither seconds nor a date", self._what, problem.after)
        seconds = min(seconds, self._service.longest_wait_s)
        log.info("%s: %s; trying again in %.1f s", self._what, problem, seconds)
        if seconds > 0.0:
            self._service.sleep(seconds)


def new_session() -> requests.Session:
    """Connections of one thread, kept open between requests."""
    import requests

    session = requests.Session()
    # A compressed body has neither the announced length nor byte ranges of the file.
    session.headers.update({"User-Agent": f"crism-mlops/{__version__}", "Accept-Encoding": "identity"})
    return session


def checked_url(url: str, service: Service) -> str:
    """The address to ask for `url`: https, unless its host was named by the user.

    Raises ArchiveError where the address is not one, or on a host that is not allowed.
    """
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    # The client's own parser, as two parsers may see two hosts in one address; what they are known
    # to disagree about is refused.
    try:
        parts = parse_url(url)
    except LocationParseError as error:
        raise ArchiveError(f"{shown(url)}: not an address; expected https://HOST/PATH") from error
    host = (parts.host or "").lower()
    if (
        not host
        or parts.scheme not in ("http", "https")
        or parts.auth is not None
        or re.search(r"[\\\s\x00-\x1f]", url)
    ):
        raise ArchiveError(f"{shown(url)}: not an address to fetch from; expected https://HOST/PATH")
    if any(_named(host, parts.port, allowed) for allowed in service.allowed):
        return parts.url
    if host not in HOSTS or parts.port not in (None, 80, 443):
        place = host if parts.port is None else f"{host}:{parts.port}"
        raise ArchiveError(
            f"{shown(url)}: on the host {shown(place)}; files come from {' and '.join(HOSTS)} only; if you trust it, "
            f"add --allow-host {shown(place)}"
        )
    return str(parts._replace(scheme="https", port=None).url)


def _named(host: str, port: int | None, allowed: str) -> bool:
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    try:
        place = parse_url(f"http://{allowed}")
    except LocationParseError as error:
        raise ArchiveError(f"--allow-host {shown(allowed)}: not a host; expected HOST or HOST:PORT") from error
    if place.host is None or place.auth is not None or place.path is not None or place.query is not None:
        raise ArchiveError(f"--allow-host {shown(allowed)}: not a host; expected HOST or HOST:PORT")
    return place.host.lower() == host and place.port in (None, port)


def opened(
    session: requests.Session,
    service: Service,
    url: str,
    params: Mapping[str, str] | None = None,
    headers: Mapping[str, str] | None = None,
) -> requests.Response:
    """The answer (200, 206 or 416) to a GET, its body still to be read; to be used in a `with`.

    Redirects are followed to allowed hosts only. Raises TryAgainError for what may pass (no connection,
    429, 5xx), ArchiveError for what will not (another status, a host that is not allowed).
    """
    import requests

    try:
        asked = requests.Request("GET", checked_url(url, service), params=params).prepare().url or ""
        for _ in range(_MAX_REDIRECTS + 1):
            response = session.get(
                asked, headers=headers, stream=True, allow_redirects=False, timeout=(_CONNECT_S, service.timeout_s)
            )
            if not response.is_redirect:
                break
            response.close()
            asked = checked_url(urljoin(asked, response.headers["Location"]), service)
        else:
            raise ArchiveError(f"{shown(url)}: redirected more than {_MAX_REDIRECTS} times")
    except requests.Timeout as error:
        raise TryAgainError(f"no answer from {shown(url)} within {service.timeout_s:g} s") from error
    except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError) as error:
        raise TryAgainError(f"no connection to {shown(url)} ({reason(error)})") from error
    except (requests.RequestException, ValueError) as error:
        raise ArchiveError(f"{shown(url)}: cannot be asked for ({reason(error)})") from error
    status = response.status_code
    if status in (200, 206, 416):
        return response
    response.close()
    answer = shown(f"{status} {response.reason or ''}", 60)
    if status == 429 or status >= 500:
        raise TryAgainError(f"the server answers {answer}", response.headers.get("Retry-After"))
    raise ArchiveError(f"{shown(asked)}: the server answers {answer}")


def body(response: requests.Response) -> Iterator[bytes]:
    """The body in pieces; raises TryAgainError where it ends too early or stops coming."""
    import requests

    try:
        yield from response.iter_content(_CHUNK_BYTES)
    except requests.RequestException as error:
        raise TryAgainError(f"the body broke off ({reason(error)})") from error


def read_json(session: requests.Session, service: Service, params: Mapping[str, str]) -> Any:
    """The service's JSON answer to a query.

    Raises ArchiveError where it is not JSON, larger than 64 MB, or not to be had after all tries.
    """
    patience = Patience(service, shown(service.url))
    while True:
        try:
            with opened(session, service, service.url, params) as response:
                text = bytearray()
                for piece in body(response):
                    text += piece
                    if len(text) > MAX_JSON_BYTES:
                        raise ArchiveError(
                            f"{shown(service.url)}: an answer of more than {MAX_JSON_BYTES >> 20} MB; ask for a "
                            "smaller region"
                        )
                kind = response.headers.get("Content-Type", "no type")
            break
        except TryAgainError as problem:
            patience.wait(problem)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        begin = shown(text[:40].decode("utf-8", "replace"))
        raise ArchiveError(
            f"{shown(service.url)}: not a JSON answer but {shown(kind)} that begins {begin!r}; check --service, or try "
            "later"
        ) from error


def shown(text: str, limit: int = 200) -> str:
    """A stranger's text on one line of a terminal: printable, and not too long."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def reason(error: BaseException) -> str:
    """The innermost cause of a client's error, in its own words."""
    while True:
        inner = getattr(error, "reason", None) or next((a for a in error.args if isinstance(a, BaseException)), None)
        if not isinstance(inner, BaseException):
            return shown(str(error)) or type(error).__name__
        error = inner
