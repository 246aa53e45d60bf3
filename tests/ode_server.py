"""A local server that answers in the form of ODE's REST service, serves files, and misbehaves on demand."""

from __future__ import annotations

import email.utils
import json
import re
import socket
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit


@dataclass(frozen=True)
class Fault:
    """What is done in the place of one right answer.

    `status` answers so, with `headers`; `cut` sends so many bytes of the body and closes; `reset` does
    it with a reset; `stall` waits so many seconds after `cut` bytes (or before the answer); `lie` is
    added to Content-Length; `text` is sent as a web page; `no_range` and `no_length` ignore the
    range and the length; `more` bytes are sent beyond the range that was announced.
    """

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None
    reset: bool = False
    stall: float = 0.0
    lie: int = 0
    text: str | None = None
    no_range: bool = False
    no_length: bool = False
    more: int = 0


@dataclass
class Request:
    """One line of the server's log; `sent` counts bytes of the body."""

    path: str
    query: dict[str, str]
    range: str | None
    if_range: str | None
    status: int = 0
    sent: int = 0


class OdeServer:
    """Products and files to serve, faults by path (each used once, in order), and the log of requests."""

    def __init__(self) -> None:
        self.products: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[Fault]] = {}
        self.log: list[Request] = []
        self.answer: Callable[[dict[str, str]], Any] = self.page
        self.validators = True
        self.largest_page = 1000
        self.url = ""

    @property
    def host(self) -> str:
        return urlsplit(self.url).netloc

    def requests(self, path: str) -> list[Request]:
        return [request for request in self.log if request.path.endswith(path)]

    def add_folder(self, folder: Path, **fields: Any) -> None:
        """The files of an observation's folder as products, one for each image, with upper-case names."""
        for image in sorted(folder.glob("*.img")):
            names = sorted(path.name for path in folder.glob(f"{image.stem}.*"))
            for name in names:
                self.files[f"/data/{name.upper()}"] = (folder / name).read_bytes()
            self.products.append(self.product(image.stem, names) | fields)

    def product(self, stem: str, names: list[str]) -> dict[str, Any]:
        """One product in ODE's form: all leaves are text."""
        files = [
            {
                "FileName": name.upper(),
                "URL": f"{self.url}/data/{name.upper()}",
                "KBytes": str(len(self.files.get(f"/data/{name.upper()}", b"")) // 1024 + 1),
                "Type": "Product",
                "Description": "PRODUCT DATA FILE",
            }
            for name in names
        ]
        return {
            "pdsid": stem.upper(),
            "Observation_id": f"16#{stem[3:11].upper()}",
            "Center_latitude": "22.113",
            "Center_longitude": "285.5",
            "Minimum_latitude": "22.0",
            "Maximum_latitude": "22.2",
            "Westernmost_longitude": "285.4",
            "Easternmost_longitude": "285.6",
            "Footprint_C0_geometry": "POLYGON ((-74.6 22, -74.4 22, -74.4 22.2, -74.6 22.2, -74.6 22))",
            "UTC_start_time": "2007-01-30T12:34:56.789",
            "Product_files": {"Product_file": files[0] if len(files) == 1 else files},
        }

    def page(self, query: dict[str, str]) -> Any:
        """ODE's answer to a query: a list of products, one as it is, or words in the place of none."""
        pattern = query.get("pdsid", "*").removesuffix("*")
        found = [p for p in self.products if str(p.get("pdsid", "")).startswith(pattern)]
        offset, limit = int(query["offset"]), min(int(query["limit"]), self.largest_page)
        part = found[offset : offset + limit]
        products: Any = {"Product": part[0] if len(part) == 1 else part} if part else "No Products Found"
        return {"ODEResults": {"Status": "Success", "Count": str(len(found)), "Products": products}}


@contextmanager
def ode_server() -> Iterator[OdeServer]:
    """A server on a free port of 127.0.0.1; ends with the block."""
    ode = OdeServer()

    class Handler(_Handler):
        server_of = ode

    with _Server(("127.0.0.1", 0), Handler) as server:
        ode.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield ode
        finally:
            server.shutdown()
            thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that hangs up in mid-file is what some tests are about.
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    # Head and body are two writes: Nagle's algorithm would hold the second one up by 40 ms.
    disable_nagle_algorithm = True
    server_of: OdeServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        ode, parts = self.server_of, urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        self.entry = Request(parts.path, query, self.headers["Range"], self.headers["If-Range"])
        ode.log.append(self.entry)
        waiting = ode.faults.get(parts.path, [])
        fault = waiting.pop(0) if waiting else Fault()
        if fault.stall and fault.cut is None:
            time.sleep(fault.stall)
        try:
            if fault.text is not None:
                self._send(200, fault.text.encode(), {"Content-Type": "text/html"}, fault)
            elif fault.status is not None:
                self._send(fault.status, b"no", fault.headers, fault)
            elif parts.path == "/live2":
                body = json.dumps(ode.answer(query)).encode()
                self._send(200, body, {"Content-Type": "application/json"}, fault)
            elif parts.path in ode.files:
                self._file(ode.files[parts.path], fault)
            else:
                self._send(404, b"no such file", {}, fault)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _file(self, content: bytes, fault: Fault) -> None:
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        tag = f'"{sha256(content).hexdigest()[:16]}"'
        if self.server_of.validators:
            headers |= {"ETag": tag, "Last-Modified": email.utils.formatdate(1_700_000_000, usegmt=True)}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.entry.range or "")
        if wanted is None or fault.no_range or self.entry.if_range not in (None, tag):
            return self._send(200, content, headers, fault)
        start = int(wanted[1])
        if start >= len(content):
            return self._send(416, b"", headers | {"Content-Range": f"bytes */{len(content)}"}, fault)
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(206, content[start:], headers, fault)

    def _send(self, status: int, body: bytes, headers: dict[str, str], fault: Fault) -> None:
        self.entry.status = status
        body += b"x" * fault.more
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if fault.no_length:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(body) + fault.lie))
        self.end_headers()
        if fault.no_length:
            for begin in range(0, len(body), 4096):
                piece = body[begin : begin + 4096]
                self.wfile.write(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
                self.entry.sent += len(piece)
            self.wfile.write(b"0\r\n\r\n")
            return
        body = body if fault.cut is None else body[: fault.cut]
        for begin in range(0, len(body), 1 << 16):
            self.entry.sent += self.wfile.write(body[begin : begin + (1 << 16)]) or 0
        if fault.cut is not None and fault.stall:
            time.sleep(fault.stall)
        if fault.cut is not None or fault.lie or fault.reset:
            self.close_connection = True
        if fault.reset:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
