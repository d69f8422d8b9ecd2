"""Does the retriever stay right under many clients? Every answer is compared with the serial one.

`make soak-retriever` runs this. First every query is asked alone, one after the other. Then 200 clients ask
the same server 5,000 queries, singly and several at a time, while some send malformed requests, some go away
before their answer and some send deadlines that are too short. The exit status is 0 only if every good query
was answered as it was alone, there was no 5xx, and memory stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TypeAlias

import aiohttp
import httpx
import pyarrow.parquet as pq
from screen import Screen, Update

from bench.command import run_bench
from bench.load import TIMEOUT_S, open_session
from bench.service import WORLD
from bench.soak import MAX_GROWTH, Statistics, edges, soak_table
from verl.utils.entry import error_line
from verl.utils.supervise import ChildFailedError, MemoryWatch, Supervisor, start_service

TOPK = 5
MAX_QUERIES_PER_REQUEST = 4
TOLERANCE = 1e-5
"""Of a score: a batch rounds otherwise than a single query."""
SHARES = {"good": 0.9, "malformed": 0.04, "vanishing": 0.04, "impatient": 0.02}
MALFORMED: tuple[object, ...] = (
    {"queries": "one"},
    {"query": "a", "queries": ["b"]},
    {"queries": [None]},
    {"query": "a", "topk": -1},
    {"query": "a", "timeout_s": -1},
    [],
)
Answer: TypeAlias = list[tuple[str, float]]
"""Ids and scores, best first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result, in the order of the JSON line."""

    queries: int
    clients: int
    seconds: float
    requests: dict[str, int]
    statuses: dict[str, int]
    queries_right: int
    queries_wrong: int
    broken_connections: int
    memory_first_mb: float
    memory_last_mb: float
    passed: bool


def main() -> int:
    """Return the exit status: 0 passed, 1 not."""
    arguments = parse_arguments()
    questions = pq.read_table(WORLD / "train.parquet", columns=["question"])["question"].to_pylist()

    def measure(screen: Screen, folder: Path) -> Mapping[str, object]:
        return asdict(soak(screen, questions, arguments=arguments, folder=folder))

    return run_bench(measure, name="soak-retriever")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--queries", type=int, default=5000, help="good ones in all (default 5000)")
    parser.add_argument("--clients", type=int, default=200, help="concurrent clients (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clients (default 0)")
    parser.add_argument(
        "--server-flags", default="", help="further flags of the server, in one string (default none)"
    )
    return parser.parse_args()


def soak(screen: Screen, questions: Sequence[str], *, arguments: argparse.Namespace, folder: Path) -> Summary:
    """Ask every query alone, then by all clients at once."""
    memory: list[int] = []
    with Supervisor() as supervisor:
        with screen.phase("starting the retriever") as update:
            url = start_service(
                supervisor,
                "the retriever",
                module="search_r1.search.retrieval_server",
                # Fewer answers kept than there are questions: nearly every query is searched again.
                arguments=["--cache_size", "100", *arguments.server_flags.split()],
                log=folder / "server.log",
                update=update,
            )
        with screen.phase("every query alone", total=len(questions)) as update:
            right = ask_serially(url, questions, update=update)
        clients = Clients(url, questions, right=right, arguments=arguments)
        began = time.monotonic()
        with (
            MemoryWatch(supervisor, interval_s=0.2) as watch,
            screen.phase(f"{arguments.clients} clients", total=arguments.queries) as update,
        ):

            async def look() -> None:
                running = asyncio.ensure_future(clients.run())
                while not running.done():
                    await asyncio.wait([running], timeout=0.2)
                    memory.append(watch.measure())
                    update(clients.statistics.right, f"{memory[-1] / 1e9:.2f} GB")
                await running

            asyncio.run(look())
        supervisor.children[0].check_alive()
    summary = summarize(
        clients.statistics, arguments=arguments, seconds=time.monotonic() - began, ends=edges(memory)
    )
    title = f"{summary.queries} queries from {summary.clients} clients"
    screen.console.print(soak_table(title, facts=asdict(summary), complaints=clients.statistics.complaints))
    return summary


def ask_serially(url: str, questions: Sequence[str], *, update: Update) -> list[Answer]:
    """Return the expected answers. Raises ChildFailedError for anything but an answer."""
    right = []
    with httpx.Client(base_url=url, timeout=TIMEOUT_S, trust_env=False) as http:
        for count, question in enumerate(questions, start=1):
            answer = http.post("/retrieve", json={"query": question, "topk": TOPK, "return_scores": True})
            if answer.status_code != 200:
                raise ChildFailedError(f"{question!r} alone: {answer.status_code} {answer.text[:200]}")
            right += read_answers(answer.text)
            update(count, "queries")
    return right


def read_answers(body: str) -> list[Answer]:
    return [[(hit["document"]["id"], hit["score"]) for hit in hits] for hits in json.loads(body)["result"]]


async def post(http: aiohttp.ClientSession, body: object) -> tuple[int, str]:
    async with http.post("/retrieve", json=body) as answer:
        return answer.status, await answer.text()


def agree(found: Answer, right: Answer) -> bool:
    """Return whether passages and scores are the same; passages of equal score may change places."""
    if len(found) != len(right):
        return False
    of_right = dict(right)
    lowest = right[-1][1] if right else 0.0
    return all(
        abs(score - expected) <= TOLERANCE
        # Among several that score like the last one, any may be the last one.
        and (abs(of_right.get(passage, lowest) - score) <= TOLERANCE)
        for (passage, score), (_, expected) in zip(found, right, strict=True)
    )


class Clients:
    """All clients of the soak."""

    def __init__(
        self, url: str, questions: Sequence[str], *, right: Sequence[Answer], arguments: argparse.Namespace
    ) -> None:
        self.statistics = Statistics()
        self._url = url
        self._questions = questions
        self._right = right
        self._arguments = arguments
        self._left = arguments.queries

    async def run(self) -> None:
        """Run until all queries are asked and answered."""
        clients = self._arguments.clients
        async with open_session(self._url, clients=clients) as http, asyncio.TaskGroup() as group:
            for number in range(clients):
                group.create_task(self._client(http, Random(f"client {self._arguments.seed} {number}")))

    async def _client(self, http: aiohttp.ClientSession, rng: Random) -> None:
        while self._left > 0:
            (kind,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
            self.statistics.requests[kind] += 1
            try:
                if kind == "malformed":
                    await self._send_malformed(http, rng)
                else:
                    await self._ask(http, kind, rng=rng)
            except (aiohttp.ClientError, TimeoutError) as error:
                self.statistics.broken_connections += 1
                self.statistics.complain(f"{kind}: {type(error).__name__} {error}")

    async def _send_malformed(self, http: aiohttp.ClientSession, rng: Random) -> None:
        status, text = await post(http, rng.choice(MALFORMED))
        self.statistics.statuses[status] += 1
        if status != 422:
            self.statistics.complain(f"malformed: {status} {text[:200]}")

    async def _ask(self, http: aiohttp.ClientSession, kind: str, *, rng: Random) -> None:
        chosen = rng.sample(range(len(self._questions)), rng.randint(1, MAX_QUERIES_PER_REQUEST))
        queries = [self._questions[number] for number in chosen]
        body: dict[str, object] = {"queries": queries, "topk": TOPK, "return_scores": True}
        if kind == "impatient":  # some are answered from the cache; none may be wrong
            body |= {"timeout_s": 0.001, "allow_failures": True}
        if kind == "vanishing":
            with suppress(TimeoutError):
                await asyncio.wait_for(post(http, body), rng.uniform(0.0, 0.05))
            return
        if kind == "good":
            self._left -= len(chosen)
        status, text = await post(http, body)
        self.statistics.statuses[status] += 1
        if status != 200:
            self.statistics.complain(f"{kind}: {status} {text[:200]}")
        elif kind == "good":
            self._check(read_answers(text), chosen)

    def _check(self, answers: Sequence[Answer], chosen: Sequence[int]) -> None:
        for number, found in zip(chosen, answers, strict=True):
            if agree(found, self._right[number]):
                self.statistics.right += 1
            else:
                self.statistics.wrong += 1
                self.statistics.complain(f"{self._questions[number]!r}: {found}, alone {self._right[number]}")


def summarize(
    statistics: Statistics, *, arguments: argparse.Namespace, seconds: float, ends: tuple[float, float]
) -> Summary:
    """Return the result; it passed only if everything that was asked was answered right."""
    first, last = ends
    passed = (
        statistics.right >= arguments.queries
        and statistics.wrong == statistics.broken_connections == 0
        and set(statistics.statuses) <= {200, 422}
        and statistics.statuses[422] == statistics.requests["malformed"]
        and last <= first * (1 + MAX_GROWTH)
    )
    return Summary(
        queries=arguments.queries,
        clients=arguments.clients,
        seconds=round(seconds, 1),
        requests=dict(statistics.requests),
        statuses={str(status): count for status, count in sorted(statistics.statuses.items())},
        queries_right=statistics.right,
        queries_wrong=statistics.wrong,
        broken_connections=statistics.broken_connections,
        memory_first_mb=round(first / 1e6, 1),
        memory_last_mb=round(last / 1e6, 1),
        passed=passed,
    )


if __name__ == "__main__":
    with error_line():
        sys.exit(main())
