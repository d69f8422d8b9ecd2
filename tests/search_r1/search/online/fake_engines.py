"""Local servers that speak as the search engines do, with a key to check and faults to play."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

from pydantic import SecretStr

from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.online.retriever import open_online
from search_r1.search.retriever import Found, Outcome, SearchFailure

SECRET = "geheim-0123456789-geheim"
KEY_VARIABLES = ("SERPER_API_KEY", "SERPAPI_API_KEY", "GOOGLE_API_KEY", "GOOGLE_CSE_ID")
KEYS = {name: SecretStr(SECRET) for name in KEY_VARIABLES}
NOTHING = "nothing"
"""The query that finds nothing."""
NAMES = ("serper", "serpapi", "google")

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What the server does instead of answering one request."""

    status: int = 500
    body: str | bytes = "{}"
    headers: Mapping[str, str] = field(default_factory=dict)
    hangs: bool = False
    breaks_off: bool = False
    """Promise twice the body."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request as the engine saw it."""

    method: str
    params: Mapping[str, str]
    headers: Mapping[str, str]
    body: Json

    @property
    def query(self) -> str:
        return str(self.body.get("q") or self.params["q"])


@dataclass(slots=True)
class FakeEngine:
    """A real HTTP server on a free port. Three results a page, of which there are two."""

    name: str
    faults: list[Fault] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    num_connections: int = 0
    num_open: int = 0
    most_open: int = 0
    delay_s: float = 0.0
    url: str = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator[FakeEngine]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/search"
        yield self
        server.close()

    def options(
        self,
        *,
        mode: OnlineMode = OnlineMode.LIVE,
        cache_path: Path | None = None,
        date: str | None = None,
        max_requests: int | None = None,
        num_parallel_calls: int = 16,
    ) -> OnlineOptions:
        return OnlineOptions(
            keys=KEYS,
            url=self.url,
            mode=mode,
            cache_path=cache_path,
            date=date,
            max_requests=max_requests,
            num_parallel_calls=num_parallel_calls,
        )

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while await self._answer(reader, writer):
                pass
        self.num_open -= 1
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Whether the connection stays open."""
        asked = await _read_request(reader)
        self.asked.append(asked)
        fault = self.faults.pop(0) if self.faults else None
        if fault is not None and fault.hangs:
            await reader.read()
            return False
        await asyncio.sleep(self.delay_s)
        status, headers, breaks_off = 200, {}, False
        if fault is not None:
            status, headers, breaks_off = fault.status, dict(fault.headers), fault.breaks_off
            body = fault.body if isinstance(fault.body, bytes) else fault.body.encode()
        else:
            status, answer = _FORMATS[self.name](asked)
            body = json.dumps(answer).encode()
        length = len(body) * 2 if breaks_off else len(body)
        lines = [
            f"HTTP/1.1 {status} x",
            f"Content-Length: {length}",
            *(f"{k}: {v}" for k, v in headers.items()),
        ]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)
        await writer.drain()
        return not breaks_off


async def _read_request(reader: asyncio.StreamReader) -> Asked:
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    method, target, _ = head[0].split(" ")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:-2])}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    params = {name: values[0] for name, values in parse_qs(urlsplit(target).query).items()}
    return Asked(method=method, params=params, headers=headers, body=json.loads(body) if body else {})


def _results(query: str, page: int, *, title: str, url: str) -> list[Json]:
    if query == NOTHING or page >= 2:
        return []
    ranks = range(page * 3 + 1, page * 3 + 4)
    return [
        {
            title: f"Title {rank}",
            url: f"https://a.example/{query}/{rank}",
            "snippet": f"About {query}.\nMore.",
        }
        for rank in ranks
    ]


def _serper(asked: Asked) -> tuple[int, Json]:
    if asked.headers.get("x-api-key") != SECRET:
        return 403, {"message": "Unauthorized.", "statusCode": 403}
    page = int(str(asked.body["page"])) - 1
    found = _results(asked.query, page, title="title", url="link")
    return 200, {"searchParameters": {"q": asked.query, "type": "search"}, "organic": found, "credits": 1}


def _serpapi(asked: Asked) -> tuple[int, Json]:
    if asked.params.get("api_key") != SECRET:
        said = f"Invalid API key: {asked.params.get('api_key')}"
        return 401, {"error": said}
    found = _results(asked.query, int(asked.params["start"]) // 10, title="title", url="link")
    answer: Json = {"search_metadata": {"status": "Success"}, "search_parameters": {"engine": "google"}}
    if not found:
        return 200, answer | {"error": "Google hasn't returned any results for this query."}
    return 200, answer | {"organic_results": found}


def _google(asked: Asked) -> tuple[int, Json]:
    if asked.params.get("key") != SECRET or asked.params.get("cx") != SECRET:
        said = "API key not valid. Please pass a valid API key."
        return 400, {"error": {"code": 400, "message": said, "status": "INVALID_ARGUMENT"}}
    assert int(asked.params["num"]) <= 10
    found = _results(asked.query, int(asked.params["start"]) // 10, title="title", url="link")
    answer: Json = {"kind": "customsearch#search", "searchInformation": {"totalResults": str(len(found))}}
    return 200, answer | ({"items": found} if found else {})


_FORMATS: dict[str, Callable[[Asked], tuple[int, Json]]] = {
    "serper": _serper,
    "serpapi": _serpapi,
    "google": _google,
}


async def search(
    engine: str,
    options: OnlineOptions,
    queries: Sequence[str] = ("moon",),
    *,
    topk: int = 3,
    timeout_s: float = 5.0,
) -> list[Outcome]:
    retriever = open_online(engine, options=options)
    try:
        return await retriever.search(queries, topk=topk, timeout_s=timeout_s)
    finally:
        await retriever.aclose()


def as_found(outcome: Outcome) -> Found:
    assert not isinstance(outcome, SearchFailure), outcome
    return outcome
