"""A worker without a model, for the tests of what stands before it: it starts in a moment, and does as it is told.

A request's JSON: {"sleep": seconds, "says": text, "die": file} - it waits; it prints the text among its logs; it ends
before its answer where the file is there, and takes the file away ("always": whenever it is asked). The answer quotes
the request, with the process id and the seconds that it was given.
"""

from __future__ import annotations

import json
import os
import socketserver
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.answer(b"3.0")

    def do_POST(self) -> None:
        content = json.loads(self.rfile.read(int(self.headers["content-length"])))
        time.sleep(content.get("sleep", 0.0))
        if "says" in content:
            print(content["says"], file=sys.stderr, flush=True)
        death = content.get("die")
        if death == "always":
            os._exit(9)
        if death is not None and Path(death).is_file():
            Path(death).unlink()
            os._exit(9)
        self.answer(json.dumps({"predictions": content, "pid": os.getpid(),
                                "seconds": self.headers["x-crism-seconds"]}).encode())  # fmt: skip

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        for name, value in (("content-type", "application/json"), ("content-length", str(len(body))),
                            ("x-crism-queued", "0.25"), ("x-crism-model", "0.5"), ("x-crism-batch", "3")):  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "front"

    def log_message(self, format: str, *args: object) -> None:
        pass


class Listener(socketserver.ThreadingUnixStreamServer):
    request_queue_size = 128
    daemon_threads = True


def end_with_front() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    job = json.loads(sys.stdin.buffer.readline())
    threading.Thread(target=end_with_front, daemon=True).start()
    print("a library's own words", file=sys.stderr, flush=True)
    if (Path(job["folder"]) / "broken").is_file():
        print(json.dumps({"error": "no weights"}), flush=True)
        os._exit(1)
    if (Path(job["folder"]) / "hangs").is_file():
        time.sleep(60)
    if (Path(job["folder"]) / "babbles").is_file():
        print("ready, I think", flush=True)
        time.sleep(60)
    with Listener(job["socket"], Handler) as listener:
        print(json.dumps({"ready": True}), flush=True)
        listener.serve_forever()
