"""Secrets kept out of everything that is written: messages, logs, parameters, tags and artifacts.

Passwords and tokens reach this program in addresses (tracking store, search database, data store) and in the
environment; they come back in the libraries' errors, which quote what they were given.
"""

from __future__ import annotations

import logging
import os
import re
from base64 import b64decode
from collections.abc import Callable
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

HIDDEN = "***"
_WORDS = (
    r"pass(?:word|wd|phrase)?|pwd|secret(?:[_-]?(?:access[_-]?)?key)?|(?:access|auth|session|security|refresh|api)?[_-]?"
    r"token|api[_-]?key|access[_-]?key(?:[_-]?id)?|account[_-]?key|sas[_-]?token|x-amz-(?:signature|credential|"
    r"security-token)|sig(?:nature)?"
)


def _hide_to_last_at(found: re.Match[str]) -> str:
    """The address and what follows, up to the last @ if there is one, hidden."""
    _, at, after = found[2].rpartition("@")
    return f"{found[1]}:{HIDDEN}@{after}" if at else found[0]


# All are linear in the text's length, whoever wrote it: no two beginnings of a match read the same stretch of it. So a
# scheme begins where its letters do, and is not tried again within them.
_SCHEME = r"(?<![a-z0-9+.-])([a-z0-9+.-]++://"
_PATTERNS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
    # The last @ before the path ends a password, which may hold one itself.
    (re.compile(rf"{_SCHEME}[^\s/:@'\"]*):[^\s/'\"]+@", re.I), rf"\1:{HIDDEN}@"),
    # A password with a slash in it, which ends the address for its readers: not host:PORT/path@version, nor [::1].
    (re.compile(rf"{_SCHEME}[^\s/:@'\"\[]*):(?!\d+[/?#])([^\s/'\"@]+/[^\s'\"]*)", re.I), _hide_to_last_at),
    # A token in the place of a user's name, as git's servers take it; names are shorter.
    (re.compile(r"\b(https?://)[^\s/:@'\"]{16,}@", re.I), rf"\1{HIDDEN}@"),
    # Quoted, the quotes perhaps escaped: all up to the same one.
    (re.compile(rf"(?<![A-Za-z0-9])((?:{_WORDS})\s*[=:]\s*\\*(['\"]))(?:(?!\2).)+", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"(?<![A-Za-z0-9])((?:{_WORDS})=)(?!\\+['\"])[^\s&;'\",)}}\]]+", re.I), rf"\1{HIDDEN}"),
    (re.compile(rf"((['\"])(?:[a-z0-9]+[_-])*(?:{_WORDS})\2\s*:\s*(['\"]))(?:(?!\3).)+", re.I), rf"\1{HIDDEN}"),
    (re.compile(r"(authorization['\"]?\s*[:=]\s*['\"]?(?:basic|bearer)\s+)[^\s'\"]+", re.I), rf"\1{HIDDEN}"),
    # Without the header's name; a word without a digit is no token.
    (re.compile(r"\b(bearer\s+)(?=[^\s'\"]*\d)[\w.~+/-]{8,}=*", re.I), rf"\1{HIDDEN}"),
)
_BASIC = re.compile(r"\b(basic\s+)([A-Za-z0-9+/]{4,}={0,2})", re.I)
# PGPASSWORD and MYSQL_PWD, too, but not the shell's PWD and OLDPWD.
_SECRET_NAME = re.compile(
    r"(^|_|^PG)(PASSWORD|PASSWD|PASSPHRASE|SECRET|TOKEN|KEY|CREDENTIALS?)(_ID)?$|[A-Z0-9]_PWD$", re.I
)
_SECRET_KEY = re.compile(rf"(?:{_WORDS})", re.I)
# Shorter ones stand in ordinary words.
_SHORTEST = 6
_known: set[str] = set()


def redacted(text: str) -> str:
    """The text without passwords and tokens: those in addresses and settings that it quotes, and wherever they
    stand those of the environment and of addresses that were `remembered`."""
    text = _by_patterns(text)
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        if secret in text:
            # Not within a word: a password "postgres" is no part of postgresql://.
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(secret)}(?![A-Za-z0-9])", HIDDEN, text)
    return text


def _by_patterns(text: str) -> str:
    for pattern, instead in _PATTERNS:
        text = pattern.sub(instead, text)
    return _BASIC.sub(lambda found: found[1] + HIDDEN if _is_login(found[2]) else found[0], text)


def _is_login(word: str) -> bool:
    """Whether a word is the base64 of user:password; others follow "basic" too."""
    try:
        return ":" in b64decode(word.rstrip("=") + "=" * (-len(word.rstrip("=")) % 4)).decode()
    except ValueError:
        return False


def remembered(address: str) -> str:
    """The address itself; its password is known from now on, however a library writes it."""
    _known.update(_in_address(address))
    return address


def without_secrets(address: str) -> str:
    """An address that others may use: no user, no password, no secret among its options."""
    parts = urlsplit(address)
    options = parse_qsl(parts.query, keep_blank_values=True)
    kept = [(key, value) for key, value in options if not _SECRET_KEY.fullmatch(key)]
    query = parts.query if len(kept) == len(options) else urlencode(kept)
    # A password with a slash in it is part of the path.
    return _by_patterns(parts._replace(netloc=parts.netloc.rpartition("@")[2], query=query).geturl())


def tells_secret(name: str, value: str) -> bool:
    """Whether a variable of the environment is a secret, or an address or setting with one."""
    return bool(_SECRET_NAME.search(name)) or _by_patterns(value) != value


def hide_in(handler: logging.Handler) -> logging.Handler:
    """The handler, whose lines (tracebacks too) are `redacted` from now on."""
    handler.setFormatter(_Redacting(handler.formatter or logging.Formatter()))
    return handler


class _Redacting(logging.Formatter):
    def __init__(self, inner: logging.Formatter) -> None:
        super().__init__()
        self.inner = inner

    def format(self, record: logging.LogRecord) -> str:
        return redacted(self.inner.format(record))


def _of_environment() -> set[str]:
    found: set[str] = set()
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and _SECRET_NAME.search(name):
            found.add(value)
        elif "://" in value and "@" in value:
            found |= _in_address(value)
    return found


def _in_address(address: str) -> set[str]:
    try:
        parts = urlsplit(address)
        words = [parts.password, *(v for k, v in parse_qsl(parts.query) if _SECRET_KEY.fullmatch(k))]
    except ValueError:
        return set()
    forms = {form for word in words if word for form in (word, unquote(word), quote(unquote(word), safe=""))}
    return {form for form in forms if len(form) >= _SHORTEST}
