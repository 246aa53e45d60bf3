"""What a server is told, and what it refuses to be told."""

from __future__ import annotations

import ipaddress
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from crism_mlops.errors import ServingError

TOKEN_VARIABLE = "CRISM_MLOPS_SERVE_TOKEN"
TOKEN_LENGTH = 16
LOOPBACK_NAMES = ("127.0.0.1", "localhost", "::1")
DRAIN_S = 30.0
# To load a version and predict once with it.
START_S = 600.0
_MODEL = re.compile(r"models:/(?:(?P<id>m-[0-9a-f]+)|(?P<name>[^/@:]+)(?:@(?P<alias>[^/@:]+)|/(?P<version>[0-9]+)))")


@dataclass(frozen=True, slots=True)
class Named:
    """A model as the user names it: by its own id, or by registered name and either alias or version."""

    uri: str
    id: str | None
    name: str | None
    alias: str | None
    version: str | None


@dataclass(frozen=True, slots=True)
class Settings:
    """`concurrency`: requests in the house at once; `max_bytes`: of one request's body; `poll`: seconds between looks
    at the alias; `timeout`: seconds that a prediction may take; `drain`: seconds that requests have at the server's
    end; `start`: seconds that a version may take to load; `token`: None where none is needed."""

    model: Named
    host: str = "127.0.0.1"
    port: int = 5001
    workers: int = 1
    concurrency: int = 16
    max_bytes: int = 64_000_000
    poll: float = 5.0
    timeout: float = 300.0
    drain: float = DRAIN_S
    start: float = START_S
    token: bytes | None = field(default=None, repr=False)
    allowed_hosts: tuple[str, ...] = ()
    tracking_uri: str | None = None

    def __post_init__(self) -> None:
        """Raises ServingError where anyone on the network could use the server."""
        if self.token is None and not is_loopback(self.host):
            raise ServingError(
                f"{self.host} can be reached from other machines, and no token is set; put one of at least "
                f"{TOKEN_LENGTH} characters into {TOKEN_VARIABLE} or a file (--token-file), or listen on 127.0.0.1"
            )


def named(uri: str) -> Named:
    """Raises ServingError for anything but the three ways to name a registered or logged model."""
    found = _MODEL.fullmatch(uri)
    if found is None:
        raise ServingError(
            f"model {uri!r} cannot be served; expected models:/NAME@ALIAS, models:/NAME/VERSION or models:/m-ID"
        )
    return Named(uri, found["id"], found["name"], found["alias"], found["version"])


def is_loopback(host: str) -> bool:
    """Whether this address can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_token(file: Path | None, environment: Mapping[str, str] = os.environ) -> bytes | None:
    """The token of the file, or of the environment; None where neither is given.

    Raises ServingError where the file cannot be read, others may read it, or the token is short.
    """
    if file is not None:
        where = f"token file {file}"
        try:
            mode = file.stat().st_mode
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(f"{where}: cannot be read ({type(error).__name__}); name a text file") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ServingError(f"{where}: other users may open it; chmod 600 {file}")
    elif (given := environment.get(TOKEN_VARIABLE)) is not None:
        where, text = TOKEN_VARIABLE, given
    else:
        return None
    token = text.strip().encode()
    if len(token) < TOKEN_LENGTH or not re.fullmatch(rb"[\x21-\x7e]+", token):
        raise ServingError(
            f"{where}: expected {TOKEN_LENGTH} or more printable characters without spaces; make one with "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return token
