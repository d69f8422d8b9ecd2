"""Small stand-ins for the seams, shared by all tests: each does one thing and keeps what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Reply:
    """One scripted HTTP answer; `delay_s` before it, or `hangs_up` instead of it."""

    body: str = "{}"
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    delay_s: float = 0.0
    hangs_up: bool = False


@dataclass(slots=True)
class ScriptedServer:
    """A real HTTP server on a free port that plays its script, the last reply for ever; records requests."""

    script: list[Reply]
    requests: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)
    """Request line, headers in lower case, body."""
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[ScriptedServer]:
        server = await asyncio.start_server(self._play, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield self
        server.close()

    async def _play(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((head[0], headers, body))
        reply = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        await asyncio.sleep(reply.delay_s)
        if not reply.hangs_up:
            text = reply.body.encode()
            extra = "".join(f"{name}: {value}\r\n" for name, value in reply.headers)
            start = f"HTTP/1.1 {reply.status} scripted\r\nContent-Length: {len(text)}\r\n{extra}"
            writer.write(f"{start}Connection: close\r\n\r\n".encode() + text)
        writer.close()
