"""A Hugging Face hub on this machine that breaks off, lies, refuses and stalls as it is told."""

from __future__ import annotations

import gzip
import hashlib
import random
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

INDEX_REPO = "PeterJinGo/wiki-18-e5-index"
CORPUS_REPO = "PeterJinGo/wiki-18-corpus"
PARTS = [random.Random(seed).randbytes(300_000 + seed) for seed in (1, 2)]
INDEX = PARTS[0] + PARTS[1]
CORPUS = b"".join(b'{"id": "%d", "contents": "passage %d"}\n' % (i, i * i) for i in range(20_000))
ARCHIVE = gzip.compress(CORPUS)
PUBLISHED = {
    f"{INDEX_REPO}/part_aa": PARTS[0],
    f"{INDEX_REPO}/part_ab": PARTS[1],
    f"{CORPUS_REPO}/wiki-18.jsonl.gz": ARCHIVE,
}
"""Small stand-ins under the names that the hub knows."""


@dataclass(slots=True)
class Fault:
    """What the server does wrong with one GET (or HEAD, by `method`)."""

    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    break_after: int | None = None
    """Bytes of the body before the connection breaks."""
    content: bytes | None = None
    """Another content."""
    method: str = "GET"
    is_lasting: bool = False
    file: str = ""


@dataclass(slots=True)
class FakeHub:
    """A hub on a free port, which serves `/datasets/<repo>/resolve/main/<file>`."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(PUBLISHED))
    faults: list[Fault] = field(default_factory=list)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    """Method, path, Range."""
    num_bytes: int = 0
    token: str | None = None
    has_hashes: bool = True
    url: str = ""

    def next_fault(self, method: str, path: str) -> Fault:
        for fault in self.faults:
            if fault.method == method and path.endswith(fault.file):
                if not fault.is_lasting:
                    self.faults.remove(fault)
                return fault
        return Fault()

    def count(self, method: str) -> int:
        return sum(asked[0] == method for asked in self.asked)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Quietly."""

    def do_HEAD(self) -> None:
        self.answer("HEAD")

    def do_GET(self) -> None:
        self.answer("GET")

    def answer(self, method: str) -> None:
        hub, path = self.hub, self.path
        if path.startswith("/datasets/"):
            hub.asked.append((method, path, self.headers.get("Range")))
        fault = hub.next_fault(method, path)
        content = hub.files.get(re.sub(r"^/datasets/|resolve/main/", "", path))
        if fault.status:
            self.say(fault.status, fault.headers)
        elif hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self.say(401, {"X-Error-Code": "RepoNotFound"})
        elif content is None:
            self.say(404, {"X-Error-Code": "EntryNotFound"})
        elif method == "HEAD":
            self.say(*self.facts(content))
        else:
            self.send_content(content if fault.content is None else fault.content, fault)

    def facts(self, content: bytes) -> tuple[int, dict[str, str]]:
        digest = hashlib.sha256(content).hexdigest() if self.hub.has_hashes else "none"
        size = str(len(content))
        return 200, {"Content-Length": size, "ETag": f'"{digest}"', "X-Repo-Commit": "c0ffee"}

    def say(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": "0"} | headers).items():
            self.send_header(name, value)
        self.end_headers()

    def send_content(self, content: bytes, fault: Fault) -> None:
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        headers = {"Content-Length": str(len(content) - start), "ETag": '"x"', "X-Repo-Commit": "c0ffee"}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:] if fault.break_after is None else content[start : start + fault.break_after]
        self.say(206 if match else 200, headers)
        self.hub.num_bytes += len(body)
        self.wfile.write(body)
        if fault.break_after is not None:
            self.close_connection = True


@contextmanager
def serving(hub: FakeHub) -> Iterator[None]:
    """`hub` on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()
