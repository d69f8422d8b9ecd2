"""Load on a retriever: clients that ask continuously, and the bare Faiss index as the limit of a server."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import aiohttp
import faiss
import numpy as np
import numpy.typing as npt

from verl.utils.supervise import ChildFailedError

TIMEOUT_S = 120.0
_INDEX: faiss.Index | None = None


def open_session(url: str, *, clients: int) -> aiohttp.ClientSession:
    """Return a session for so many clients. httpx would take 8 ms of a core for each request of 64."""
    return aiohttp.ClientSession(
        url,
        connector=aiohttp.TCPConnector(limit=clients),
        timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
    )


@dataclass(slots=True)
class Load:
    """The answers to all clients together."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    """Of every answer within the time."""

    @property
    def queries_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


async def ask_continuously(
    url: str, queries: Sequence[str], *, clients: int, topk: int, seconds: float, warm_up_s: float
) -> Load:
    """Send one query a request, a new one each time; answers before `warm_up_s` are not counted.

    Raises ChildFailedError for anything but a full answer, ValueError when the queries run out.
    """
    load = Load()
    fresh = iter(queries)
    began = time.perf_counter() + warm_up_s

    async def client(http: aiohttp.ClientSession) -> None:
        while True:
            asked = time.perf_counter()
            query = next(fresh, None)
            if query is None:
                raise ValueError(f"{len(queries)} queries are too few for {seconds:g} s")
            body = {"query": query, "topk": topk, "return_scores": True}
            async with http.post("/retrieve", json=body) as answer:
                text = await answer.text()
            answered = time.perf_counter()
            if answer.status != 200 or len(json.loads(text)["result"][0]) != topk:
                raise ChildFailedError(f"a search was answered by {answer.status}: {text[:300]}")
            if answered >= began:
                load.latencies_s.append(answered - asked)

    with suppress(TimeoutError):  # what is still asked then is given up
        async with (
            asyncio.timeout(warm_up_s + seconds),
            open_session(url, clients=clients) as http,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(clients):
                group.create_task(client(http))
    load.seconds = seconds
    return load


def load_index(path: str, num_threads: int) -> None:
    """Read an index as Faiss does by itself, for `search_bare` in this process."""
    global _INDEX
    faiss.omp_set_num_threads(num_threads)
    _INDEX = faiss.read_index(path)


def search_bare(vectors: npt.NDArray[np.float32], *, topk: int, batch_size: int, seconds: float) -> float:
    """Search batch after batch for at least `seconds`; return the queries per second."""
    assert _INDEX is not None
    batches = [vectors[start : start + batch_size] for start in range(0, len(vectors), batch_size)]
    began = time.perf_counter()
    answered = 0
    for batch in itertools.cycle(batches):
        if (taken := time.perf_counter() - began) >= seconds:
            break
        _INDEX.search(batch, topk)
        answered += len(batch)
    return answered / taken
