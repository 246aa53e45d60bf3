#!/usr/bin/env python3
"""Pin the images that compose.yaml names under x-images: tag -> tag@sha256:..., as their registries say now.

    python3 docker/resolve_digests.py             write the digests into compose.yaml
    python3 docker/resolve_digests.py --check     change nothing; exit code 1 where a digest is missing or not the tag's

A digest is that of the index of all platforms where there is one. Where a registry does not answer, nothing is written,
and the exit code is 2. Needs Python's standard library only; asks as nobody, so public images only.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import json
import re
import sys
import urllib.error
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

COMPOSE = Path(__file__).with_name("compose.yaml")
HUB = "registry-1.docker.io"
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    )
)
LARGEST = 1 << 22  # bytes of a manifest: registries take no larger ones
PATIENCE_S = 20.0
_IMAGE = re.compile(
    r"(?:(?P<registry>[\w.-]+\.[\w.-]+(?::\d+)?|localhost(?::\d+)?)/)?(?P<name>[a-z0-9._/-]+):(?P<tag>[\w.-]{1,128})"
    r"(?:@(?P<digest>sha256:[0-9a-f]{64}))?"
)
_ENTRY = re.compile(r"(?m)^(?P<head>  \w+: &\w+ )(?P<image>\S+)$")


class ResolveError(Exception):
    """A registry's answer that cannot be used."""


class AwayError(Exception):
    """A registry that does not answer."""


@dataclass(frozen=True, slots=True)
class Image:
    """registry: host of the v2 API; name: the repository's path there; tagged: without a digest, as it is written."""

    registry: str
    name: str
    tag: str
    digest: str | None
    tagged: str


def read_image(text: str) -> Image:
    """Raises ResolveError for what is no NAME:TAG, with or without a registry before it and a digest behind it."""
    found = _IMAGE.fullmatch(text)
    if found is None:
        raise ResolveError(f"{text}: expected NAME:TAG or NAME:TAG@sha256:...")
    registry, name = found["registry"], found["name"]
    if registry in (None, "docker.io"):
        registry, name = HUB, name if "/" in name else f"library/{name}"
    return Image(registry, name, found["tag"], found["digest"], text.partition("@")[0])


def images(text: str) -> list[Image]:
    """The images of a compose file's x-images. Raises ResolveError where there are none."""
    found = [read_image(entry["image"]) for entry in _ENTRY.finditer(_block(text))]
    if not found:
        raise ResolveError(f"{COMPOSE.name}: no images under x-images, each as `  name: &name IMAGE:TAG`")
    return found


def pinned(text: str, digests: dict[str, str]) -> str:
    """The file with these digests; `digests` is by the image as it is tagged."""
    block = _block(text)

    def entry(found: re.Match[str]) -> str:
        image = read_image(found["image"])
        return f"{found['head']}{image.tagged}@{digests[image.tagged]}"

    return text.replace(block, _ENTRY.sub(entry, block), 1)


def _block(text: str) -> str:
    found = re.search(r"(?m)^x-images:\n(?:[ #].*\n)+", text)
    return found.group() if found else ""


def resolve(image: Image, base: str | None = None) -> str:
    """The digest that a registry has for a tag; `base` is its address where that is not https://REGISTRY.

    Raises AwayError where it does not answer, ResolveError where it refuses, or what it sends has another digest.
    """
    root = base or f"https://{image.registry}"
    url = f"{root}/v2/{image.name}/manifests/{urllib.parse.quote(image.tag)}"
    headers = {"Accept": ACCEPT}
    try:
        try:
            body, told = _get(url, headers)
        except urllib.error.HTTPError as error:
            if error.code != 401:
                raise
            with error:
                challenge = error.headers.get("WWW-Authenticate", "")
            body, told = _get(url, {**headers, "Authorization": f"Bearer {_token(image, root, challenge)}"})
    except urllib.error.HTTPError as error:
        with error:
            if error.code in (408, 429) or error.code >= 500:
                raise AwayError(f"{image.registry} says not now ({error.code})") from error
            raise ResolveError(f"{image.tagged}: {image.registry} answers {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise AwayError(f"{image.registry} cannot be reached ({reason})") from error
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    if told not in (None, digest):
        raise ResolveError(f"{image.tagged}: {image.registry} says {told}, but what it sent has {digest}")
    return digest


def _token(image: Image, root: str, challenge: str) -> str:
    """A token for reading, from the place that the registry names."""
    scheme, _, rest = challenge.partition(" ")
    fields = dict(re.findall(r'(\w+)="([^"]*)"', rest))
    realm = fields.get("realm", "")
    if scheme.lower() != "bearer" or not realm.startswith(("https://", f"{root}/")):
        raise ResolveError(
            f"{image.tagged}: {image.registry} wants a log-in that is not known here: {scheme or 'none'}"
        )
    query = {"scope": fields.get("scope", f"repository:{image.name}:pull")}
    query |= {"service": fields["service"]} if "service" in fields else {}
    try:
        answer = json.loads(_get(f"{realm}?{urllib.parse.urlencode(query)}", {})[0])
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError) as error:
        raise ResolveError(f"{image.tagged}: the token service of {image.registry} sent no JSON object") from error
    if not isinstance(token, str) or not token.isascii() or not token.isprintable():
        raise ResolveError(f"{image.tagged}: the token service of {image.registry} sent no token")
    return token


def _get(url: str, headers: dict[str, str]) -> tuple[bytes, str | None]:
    """A body, and the digest that its sender says it has."""
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=PATIENCE_S) as response:
        body = response.read(LARGEST + 1)
        if len(body) > LARGEST:
            raise ResolveError(f"{url}: more than {LARGEST} bytes")
        return body, response.headers.get("Docker-Content-Digest")


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Pin the images of docker/compose.yaml to digests.")
    parser.add_argument("--check", action="store_true", help="change nothing, say what differs")
    parser.add_argument("--file", type=Path, default=COMPOSE, help="the compose file")
    parser.add_argument("--registry", metavar="URL", help="ask there instead, for instance a mirror of the hub")
    asked = parser.parse_args(words)
    try:
        text = asked.file.read_text(encoding="utf-8")
        found = images(text)
        digests = {image.tagged: resolve(image, asked.registry) for image in found}
    except AwayError as error:
        print(f"{error}; {asked.file} is unchanged: run this where the registry can be reached", file=sys.stderr)
        return 2
    except (ResolveError, OSError) as error:
        print(f"{error}; {asked.file} is unchanged", file=sys.stderr)
        return 1
    for image in found:
        now = digests[image.tagged]
        print(f"{image.tagged}: {now}" + ("" if image.digest == now else f" (was {image.digest or 'not pinned'})"))
    if all(image.digest == digests[image.tagged] for image in found):
        return 0
    if asked.check:
        return 1
    new = asked.file.with_name(f"{asked.file.name}.new")
    new.write_text(pinned(text, digests), encoding="utf-8")
    new.replace(asked.file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
