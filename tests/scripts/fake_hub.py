"""A Hugging Face hub on this machine that can break off, corrupt a file, and require a token."""

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
class FakeHub:
    """A hub on a free port, which serves `/datasets/<repo>/resolve/main/<file>`."""

    files: dict[str, bytes] = field(default_factory=lambda: dict(PUBLISHED))
    corrupt: str = ""
    """End of the name of a file of which the next GET gets other bytes."""
    break_after: int | None = None
    """Bytes of the next body before the connection breaks."""
    num_bytes: int = 0
    """Sent in bodies."""
    token: str | None = None
    has_hashes: bool = True
    url: str = ""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args: object) -> None:
        """Print nothing."""

    def do_HEAD(self) -> None:
        if (content := self.find()) is not None:
            digest = hashlib.sha256(content).hexdigest() if self.hub.has_hashes else "none"
            self.send_head(200, {"Content-Length": str(len(content)), "ETag": f'"{digest}"'})

    def do_GET(self) -> None:
        hub = self.hub
        if (content := self.find()) is None:
            return
        if hub.corrupt and self.path.endswith(hub.corrupt):
            content, hub.corrupt = b"x" * len(content), ""
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(match[1]) if match else 0
        headers = {"Content-Length": str(len(content) - start), "ETag": '"x"'}
        if match:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.send_head(206 if match else 200, headers)
        body = content[start:][: hub.break_after]
        hub.num_bytes += len(body)
        self.wfile.write(body)
        self.close_connection = hub.break_after is not None
        hub.break_after = None

    def find(self) -> bytes | None:
        """Return the content of the file, or answer that there is none."""
        content = self.hub.files.get(re.sub(r"^/datasets/|resolve/main/", "", self.path))
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self.send_head(401, {"X-Error-Code": "RepoNotFound", "Content-Length": "0"})
        elif content is None:
            self.send_head(404, {"X-Error-Code": "EntryNotFound", "Content-Length": "0"})
        else:
            return content
        return None

    def send_head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "X-Repo-Commit": "c0ffee"}.items():
            self.send_header(name, value)
        self.end_headers()


@contextmanager
def serving(hub: FakeHub) -> Iterator[None]:
    """Serve `hub` on a free port."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield
    server.shutdown()
    server.server_close()
    thread.join()
