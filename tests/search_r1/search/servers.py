"""A retriever without an index, and the server over any: over a real socket, in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import uvicorn
from fastapi import FastAPI

from search_r1.search.retrieval_server import create_app
from search_r1.search.retriever import Hit, Outcome, Retriever
from search_r1.search.schema import Document
from search_r1.search.settings import resolve_server


def hits_for(query: str, topk: int) -> tuple[Hit, ...]:
    return tuple(
        Hit(document=Document(id=f"{query}/{row}", contents=query), score=-row) for row in range(topk)
    )


@dataclass(slots=True)
class EchoRetriever:
    """Finds what names its query; `act` says what goes wrong with which."""

    search_s: float = 0.0
    max_batch: int = 256
    num_parallel_calls: int = 1
    num_passages: int | None = None
    gate: asyncio.Event | None = None
    """What every search waits for."""
    act: Mapping[str, Outcome | Exception] = field(default_factory=dict)
    calls: list[tuple[str, ...]] = field(default_factory=list)
    topks: list[int] = field(default_factory=list)
    timeouts_s: list[float] = field(default_factory=list)
    started_s: list[float] = field(default_factory=list)
    """On the loop's clock."""
    facts: dict[str, str | int | float | None] = field(default_factory=lambda: {"retriever": "echo"})
    running: int = 0
    most: int = 0
    closed: bool = False

    def describe(self) -> dict[str, str | int | float | None]:
        return self.facts

    async def search(self, queries: Sequence[str], *, topk: int, timeout_s: float) -> list[Outcome]:
        assert 0 < len(queries) <= self.max_batch
        self.calls.append(tuple(queries))
        self.topks.append(topk)
        self.timeouts_s.append(timeout_s)
        self.started_s.append(asyncio.get_running_loop().time())
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(self.search_s)
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.running -= 1
        for query in queries:
            if isinstance(error := self.act.get(query), Exception):
                raise type(error)(*error.args)
        outcomes: list[Outcome] = []
        for query in queries:
            known = self.act.get(query)
            outcomes.append(hits_for(query, topk) if known is None else known)  # type: ignore[arg-type]
            if topk > 100:
                await asyncio.sleep(0)  # others have turns while it makes so many
        return outcomes

    async def aclose(self) -> None:
        self.closed = True


def make_app(
    retriever: Retriever,
    *flags: str,
    load_s: float = 0.0,
    environ: Mapping[str, str] | None = None,
    corpus_path: Path | None = None,
) -> FastAPI:
    """The application with the settings of a command line."""

    async def load() -> Retriever:
        await asyncio.sleep(load_s)
        return retriever

    settings = resolve_server(flags, environ=environ or {})[0]
    return create_app(load, settings=settings, corpus_path=corpus_path)


@asynccontextmanager
async def serving(
    retriever: Retriever,
    *flags: str,
    load_s: float = 0.0,
    environ: Mapping[str, str] | None = None,
    corpus_path: Path | None = None,
) -> AsyncIterator[httpx.AsyncClient]:
    """Ready for work unless `load_s` says otherwise."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(retriever, *flags, load_s=load_s, environ=environ, corpus_path=corpus_path)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3000, trust_env=False, limits=limits) as client:
        while (await client.get("/livez" if load_s else "/readyz")).status_code != 200:
            await asyncio.sleep(0.01)
        yield client
    server.should_exit = True
    await running
