"""Check that the IG service stays right under abuse: many clients, bad requests, killed workers.

`make soak-ig` runs this. First one undisturbed worker measures every item's gain. Then a service with two
workers, and caches far too small for the items, serves 200 clients for two minutes, while every second each
worker is killed with a probability of 1 %. The exit status is 0 only if every accepted good item came back
right, no client got a 5xx, and memory stayed flat. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from random import Random

import httpx
import psutil
from screen import Screen

from bench.command import run_bench
from bench.service import read_counters, start_ig_service
from bench.soak import MAX_GROWTH, Statistics, edges, soak_table
from bench.workload import Rollout, world_steps
from verl.utils.entry import error_line
from verl.utils.supervise import ChildFailedError, MemoryWatch, Supervisor

TIMEOUT_S = 120.0
SERVICE_ARGUMENTS = ("--num-generations", "8", "--max-new-tokens", "12", "--cpu-cache-gb", "0.1")
# A tenth of the distinct prompts: nearly every item has to be computed again.
SMALL_CACHES = ("--sample-cache-size", "48", "--pair-cache-size", "512")
SHARES = {"good": 0.88, "malformed": 0.05, "vanishing": 0.05, "impatient": 0.02}
MAX_ITEMS_PER_REQUEST = 4
TOLERANCE = 1e-5
MALFORMED: tuple[object, ...] = (
    {"items": [{"question": "Who?", "context": ""}]},
    {"items": [{"question": None, "context": "", "answers": ["x"]}]},
    {"items": "all of them"},
    {"items": [{"question": "Who?", "context": "", "answers": "x"}], "timeout_s": -1},
    [],
)


def main() -> int:
    """Return the exit status: 0 passed, 1 not."""
    arguments = parse_arguments()
    steps = world_steps(seed=arguments.seed)
    rollouts = list(dict.fromkeys(rollout for step in steps for rollout in step))

    def measure(screen: Screen, folder: Path) -> Mapping[str, object]:
        gains = measure_reference(screen, rollouts, log=folder / "reference.log")
        return soak(screen, rollouts, gains=gains, arguments=arguments, log=folder / "soak.log")

    return run_bench(measure, name="soak-ig")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="how long (default 120)")
    parser.add_argument("--clients", type=int, default=200, help="concurrent clients (default 200)")
    parser.add_argument("--workers", type=int, default=2, help="workers of the service (default 2)")
    parser.add_argument(
        "--kill-share", type=float, default=0.01, help="workers killed per second (default 0.01)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of clients and kills (default 0)")
    arguments = parser.parse_args()
    if arguments.workers < 2:
        parser.error(f"--workers is {arguments.workers}, expected at least 2: one is killed, others go on")
    return arguments


def measure_reference(screen: Screen, rollouts: Sequence[Rollout], *, log: Path) -> list[float]:
    """Return every item's gain from one undisturbed worker. Raises ChildFailedError if one fails."""
    with Supervisor() as supervisor, screen.phase("measuring the reference with one worker") as update:
        url = start_ig_service(supervisor, arguments=SERVICE_ARGUMENTS, log=log, update=update)
        body = {"items": [rollout.as_item() for rollout in rollouts], "include_details": False}
        answer = httpx.post(f"{url}/compute_info_gain", json=body, timeout=600, trust_env=False).json()
    if any(score is None for score in answer["scores"]):
        raise ChildFailedError(f"the reference failed: {Counter(answer['errors']).most_common(3)}")
    return list(answer["scores"])


def soak(
    screen: Screen,
    rollouts: Sequence[Rollout],
    *,
    gains: Sequence[float],
    arguments: argparse.Namespace,
    log: Path,
) -> dict[str, object]:
    """Start the service and abuse it for the given time; return the figures."""
    service = (*SERVICE_ARGUMENTS, "--num-workers", str(arguments.workers), *SMALL_CACHES)
    memory: list[int] = []
    with Supervisor() as supervisor:
        with screen.phase(f"starting a service with {arguments.workers} workers") as update:
            url = start_ig_service(supervisor, arguments=service, log=log, update=update)
        if len(worker_processes()) != arguments.workers:
            raise ChildFailedError(f"found the workers {worker_processes()}, expected {arguments.workers}")
        abuse = Abuse(url, rollouts, gains=gains, arguments=arguments)
        with (
            MemoryWatch(supervisor) as watch,
            screen.phase("soaking", total=int(arguments.seconds)) as update,
        ):

            def observe(second: int, is_whole: bool) -> None:
                if is_whole:  # a worker that is being replaced takes no memory yet
                    memory.append(watch.measure())
                found = abuse.statistics
                update(
                    second,
                    f"{found.right} right, {found.wrong + found.failed} not, {abuse.num_killed} killed, "
                    f"{watch.peak_bytes / 1e9:.1f} GB",
                )

            asyncio.run(abuse.run(observe))
        supervisor.children[0].check_alive()
        restarts = int(read_counters(url)["ig_worker_restarts_total"])
    figures = summarize(abuse, restarts=restarts, ends=edges(memory))
    title = f"{arguments.clients} clients for {arguments.seconds:g} s"
    screen.console.print(soak_table(title, facts=figures, complaints=abuse.statistics.complaints))
    return figures


class Abuse:
    """All clients, and the killing of workers."""

    def __init__(
        self, url: str, rollouts: Sequence[Rollout], *, gains: Sequence[float], arguments: argparse.Namespace
    ) -> None:
        self.statistics = Statistics()
        self.num_killed = 0
        self.arguments = arguments
        self._url = url
        self._rollouts = rollouts
        self._gains = gains
        self._end = 0.0

    async def run(self, observe: Callable[[int, bool], None]) -> None:
        """Run until the time is over and every client has its answer."""
        began = time.monotonic()
        self._end = began + self.arguments.seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=TIMEOUT_S, limits=limits, trust_env=False
        ) as http:
            seed = self.arguments.seed
            clients = [
                asyncio.create_task(self._client(http, Random(f"client {seed} {k}")))
                for k in range(self.arguments.clients)
            ]
            rng = Random(f"killer {seed}")
            while time.monotonic() < self._end:
                await asyncio.sleep(1)
                for worker in worker_processes():
                    if rng.random() < self.arguments.kill_share:
                        worker.kill()
                        self.num_killed += 1
                health = (await http.get("/health")).json()
                observe(int(time.monotonic() - began), health["status"] == "healthy")
            await asyncio.gather(*clients)

    async def _client(self, http: httpx.AsyncClient, rng: Random) -> None:
        while time.monotonic() < self._end:
            (kind,) = rng.choices(list(SHARES), weights=list(SHARES.values()))
            self.statistics.requests[kind] += 1
            try:
                await self._request(http, kind, rng=rng)
            except httpx.HTTPError as error:
                self.statistics.broken_connections += 1
                self.statistics.complain(f"{kind}: {type(error).__name__} {error}")

    async def _request(self, http: httpx.AsyncClient, kind: str, *, rng: Random) -> None:
        chosen = rng.sample(range(len(self._rollouts)), rng.randint(1, MAX_ITEMS_PER_REQUEST))
        body: object = {
            "items": [self._rollouts[k].as_item() for k in chosen],
            "include_details": rng.random() < 0.1,
            "timeout_s": 0.2 if kind == "impatient" else None,
        }
        if kind == "malformed":
            body = rng.choice(MALFORMED)
        call = http.post("/compute_info_gain", json=body)
        if kind == "vanishing":
            with suppress(TimeoutError):
                await asyncio.wait_for(call, rng.uniform(0.01, 0.5))
            return
        answer = await call
        self.statistics.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        elif answer.status_code != (422 if kind == "malformed" else 200):
            self.statistics.complain(f"{kind}: {answer.status_code} {answer.text[:200]}")
        elif kind != "malformed":
            self._check(answer.json(), chosen)

    def _check(self, answer: dict[str, list[float | str | None]], chosen: Sequence[int]) -> None:
        found = self.statistics
        for k, score, error in zip(chosen, answer["scores"], answer["errors"], strict=True):
            if score is None and str(error).startswith("deadline"):
                found.late += 1
            elif score is None:
                found.failed += 1
                found.complain(f"failed: {error}")
            elif abs(float(score) - self._gains[k]) <= TOLERANCE:
                found.right += 1
            else:
                found.wrong += 1
                found.complain(f"wrong: {score}, right is {self._gains[k]}: {self._rollouts[k]}")


def worker_processes() -> list[psutil.Process]:
    """Return the service's workers: Ray names actors after their class (IG_worker.py)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it ended meanwhile
            if process.name().startswith("ray::_Host"):
                found.append(process)
    return found


def summarize(abuse: Abuse, *, restarts: int, ends: tuple[float, float]) -> dict[str, object]:
    """Return the figures in the order of the JSON line; `ends`: bytes in the middle and at the end."""
    found = abuse.statistics
    first, last = ends
    server_errors = sum(count for status, count in found.statuses.items() if status >= 500)
    return {
        "seconds": abuse.arguments.seconds,
        "clients": abuse.arguments.clients,
        "requests": dict(found.requests),
        "statuses": {str(status): count for status, count in sorted(found.statuses.items())},
        "items_right": found.right,
        "items_wrong": found.wrong,
        "items_failed": found.failed,
        "items_late": found.late,
        "broken_connections": found.broken_connections,
        "workers_killed": abuse.num_killed,
        "worker_restarts": restarts,
        "memory_first_mb": round(first / 1e6, 1),
        "memory_last_mb": round(last / 1e6, 1),
        "passed": found.wrong == found.failed == found.broken_connections == server_errors == 0
        and found.right > 0
        and found.statuses[422] == found.requests["malformed"]
        and last <= first * (1 + MAX_GROWTH),
    }


if __name__ == "__main__":
    with error_line():
        sys.exit(main())
