"""Clients that ask, wait for the answer and ask again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import httpx
from supervise import ChildFailedError

TIMEOUT_S = 120.0


@dataclass(slots=True)
class Load:
    """What the clients saw, all together."""

    seconds: float = 0.0
    latencies_s: list[float] = field(default_factory=list)
    """Of every answer within the time."""

    @property
    def queries_per_s(self) -> float:
        return len(self.latencies_s) / self.seconds


async def ask_all_the_time(
    url: str, queries: Sequence[str], *, clients: int, topk: int, seconds: float, warm_up_s: float
) -> Load:
    """One query a request, a new one each time; what comes back before `warm_up_s` is not counted.

    Raises ChildFailedError for anything but a full answer, ValueError when the queries run out.
    """
    load = Load()
    fresh = iter(queries)
    began = time.perf_counter() + warm_up_s
    end = began + seconds

    async def client(http: httpx.AsyncClient) -> None:
        while (asked := time.perf_counter()) < end:
            query = next(fresh, None)
            if query is None:
                raise ValueError(f"{len(queries)} queries are too few for {seconds:g} s")
            body = {"query": query, "topk": topk, "return_scores": True}
            answer = await http.post("/retrieve", json=body)
            answered = time.perf_counter()
            if answer.status_code != 200 or len(answer.json()["result"][0]) != topk:
                raise ChildFailedError(f"a search was answered by {answer.status_code}: {answer.text[:300]}")
            if began <= answered <= end:
                load.latencies_s.append(answered - asked)

    limits = httpx.Limits(max_connections=clients)
    async with (
        httpx.AsyncClient(base_url=url, timeout=TIMEOUT_S, limits=limits, trust_env=False) as http,
        asyncio.TaskGroup() as group,
    ):
        for _ in range(clients):
            group.create_task(client(http))
    load.seconds = seconds
    return load
