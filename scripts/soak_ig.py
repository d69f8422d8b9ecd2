"""Does the IG service stay right under abuse? Many clients, bad requests, vanishing callers, dying workers.

`make soak-ig` runs this. First one undisturbed worker computes what every item's gain is. Then a service with
two workers and caches far too small for the items (so that there is work all the time) serves 200 clients for
two minutes, while every second each of its workers is killed with a probability of 1 %. The exit status is 0
only if every accepted good item came back right, nobody got a 5xx, and memory stayed flat.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import httpx
import psutil
from rich.console import Console
from screen import Screen
from supervise import ChildFailedError, MemoryWatch, Supervisor

from bench.service import WORLD, read_counters, start_ig_service
from bench.soak import MAX_GROWTH, Seen, edges, soak_table
from bench.workload import Rollout, grpo_steps, load_evidence
from verl.utils.entry import error_line

QUESTIONS, ROLLOUTS = 8, 4
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result, in the order of the JSON line."""

    seconds: float
    clients: int
    requests: dict[str, int]
    statuses: dict[str, int]
    items_right: int
    items_wrong: int
    items_failed: int
    items_late: int
    broken_connections: int
    workers_killed: int
    worker_restarts: int
    memory_first_mb: float
    memory_last_mb: float
    passed: bool


def main() -> int:
    """Exit status: 0 passed, 1 not."""
    arguments = parse_arguments()
    screen = Screen(Console())
    evidence = load_evidence(WORLD / "doctor.jsonl")
    steps = grpo_steps(
        evidence,
        num_steps=len(evidence) // QUESTIONS,
        questions=QUESTIONS,
        rollouts=ROLLOUTS,
        seed=arguments.seed,
    )
    rollouts = list(dict.fromkeys(rollout for step in steps for rollout in step))
    try:
        with TemporaryDirectory(prefix="soak-ig-") as folder:
            gains = reference(screen, rollouts, folder=Path(folder))
            summary = soak(screen, rollouts, gains=gains, arguments=arguments, folder=Path(folder))
    except ChildFailedError as error:
        screen.say(str(error), style="bold red")
        return 1
    print(json.dumps(asdict(summary)))
    return 0 if summary.passed else 1


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
    parser.add_argument("--seed", type=int, default=0, help="seed of clients and killings (default 0)")
    arguments = parser.parse_args()
    if arguments.workers < 2:
        parser.error(f"--workers is {arguments.workers}, expected at least 2: one is killed, others go on")
    return arguments


def reference(screen: Screen, rollouts: Sequence[Rollout], *, folder: Path) -> list[float]:
    """The gain of every item from one worker that nobody disturbs. Raises ChildFailedError if one fails."""
    with Supervisor() as supervisor, screen.phase("what is right: one worker alone") as update:
        log = folder / "reference.log"
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
    folder: Path,
) -> Summary:
    """Two minutes of abuse."""
    service = (*SERVICE_ARGUMENTS, "--num-workers", str(arguments.workers), *SMALL_CACHES)
    memory: list[int] = []
    with Supervisor() as supervisor:
        with screen.phase(f"starting a service with {arguments.workers} workers") as update:
            log = folder / "soak.log"
            url = start_ig_service(supervisor, arguments=service, log=log, update=update)
        if len(worker_processes()) != arguments.workers:
            raise ChildFailedError(f"found the workers {worker_processes()}, expected {arguments.workers}")
        with MemoryWatch(supervisor) as watch:
            abuse = Abuse(url, rollouts, gains=gains, arguments=arguments)
            with screen.phase("soaking", total=int(arguments.seconds)) as update:

                def look(second: int, is_whole: bool) -> None:
                    if is_whole:  # a worker that is being replaced takes no memory yet
                        memory.append(watch.measure())
                    update(
                        second,
                        f"{abuse.seen.right} right, {abuse.seen.wrong + abuse.seen.failed} "
                        f"not, {abuse.workers_killed} killed, {watch.peak_bytes / 1e9:.1f} GB",
                    )

                asyncio.run(abuse.run(look))
        supervisor.children[0].check_alive()
        restarts = int(read_counters(url)["ig_worker_restarts_total"])
    first, last = edges(memory)
    summary = summarise(
        abuse.seen,
        arguments=arguments,
        workers_killed=abuse.workers_killed,
        restarts=restarts,
        first=first,
        last=last,
    )
    title = f"{summary.clients} clients for {summary.seconds:g} s"
    screen.console.print(soak_table(title, facts=asdict(summary), complaints=abuse.seen.complaints))
    return summary


class Abuse:
    """All clients and the one who kills."""

    def __init__(
        self, url: str, rollouts: Sequence[Rollout], *, gains: Sequence[float], arguments: argparse.Namespace
    ) -> None:
        self.seen = Seen()
        self.workers_killed = 0
        self._url = url
        self._rollouts = rollouts
        self._gains = gains
        self._arguments = arguments
        self._end = 0.0

    async def run(self, look: Callable[[int, bool], None]) -> None:
        """Until the time is over and everybody has an answer."""
        began = time.monotonic()
        self._end = began + self._arguments.seconds
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=self._url, timeout=TIMEOUT_S, limits=limits, trust_env=False
        ) as http:
            seed = self._arguments.seed
            clients = [
                asyncio.create_task(self._client(http, Random(f"client {seed} {k}")))
                for k in range(self._arguments.clients)
            ]
            rng = Random(f"killer {seed}")
            while time.monotonic() < self._end:
                await asyncio.sleep(1)
                self._kill_some(rng)
                health = (await http.get("/health")).json()
                look(int(time.monotonic() - began), health["status"] == "healthy")
            await asyncio.gather(*clients)

    def _kill_some(self, rng: Random) -> None:
        for worker in worker_processes():
            if rng.random() < self._arguments.kill_share:
                worker.kill()
                self.workers_killed += 1

    async def _client(self, http: httpx.AsyncClient, rng: Random) -> None:
        kinds = list(SHARES)
        while time.monotonic() < self._end:
            (kind,) = rng.choices(kinds, weights=list(SHARES.values()))
            self.seen.requests[kind] += 1
            try:
                await self._request(http, kind, rng=rng)
            except httpx.HTTPError as error:
                self.seen.broken_connections += 1
                self.seen.complain(f"{kind}: {type(error).__name__} {error}")

    async def _request(self, http: httpx.AsyncClient, kind: str, *, rng: Random) -> None:
        if kind == "malformed":
            answer = await http.post("/compute_info_gain", json=rng.choice(MALFORMED))
            self.seen.statuses[answer.status_code] += 1
            if answer.status_code != 422:
                self.seen.complain(f"malformed: {answer.status_code} {answer.text[:200]}")
            return
        chosen = rng.sample(range(len(self._rollouts)), rng.randint(1, MAX_ITEMS_PER_REQUEST))
        body: dict[str, object] = {
            "items": [self._rollouts[k].as_item() for k in chosen],
            "include_details": rng.random() < 0.1,
        }
        if kind == "impatient":
            body["timeout_s"] = 0.2
        call = http.post("/compute_info_gain", json=body)
        if kind == "vanishing":
            try:
                await asyncio.wait_for(call, rng.uniform(0.01, 0.5))
            except TimeoutError:
                return
            return
        answer = await call
        self.seen.statuses[answer.status_code] += 1
        if answer.status_code == 429:
            await asyncio.sleep(float(answer.headers["Retry-After"]))
        elif answer.status_code != 200:
            self.seen.complain(f"{kind}: {answer.status_code} {answer.text[:200]}")
        else:
            self._check(answer.json(), chosen)

    def _check(self, answer: dict[str, list[float | str | None]], chosen: Sequence[int]) -> None:
        for k, score, error in zip(chosen, answer["scores"], answer["errors"], strict=True):
            if score is None:
                if str(error).startswith("deadline"):
                    self.seen.late += 1
                else:
                    self.seen.failed += 1
                    self.seen.complain(f"failed: {error}")
            elif abs(float(score) - self._gains[k]) <= TOLERANCE:
                self.seen.right += 1
            else:
                self.seen.wrong += 1
                self.seen.complain(f"wrong: {score}, right is {self._gains[k]}: {self._rollouts[k]}")


def worker_processes() -> list[psutil.Process]:
    """The service's workers: Ray names an actor's process after its class (IG/service/cluster.py)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            name = process.name()
        except psutil.Error:  # gone in between
            continue
        if name.startswith("ray::_Host"):
            found.append(process)
    return found


def summarise(
    seen: Seen,
    *,
    arguments: argparse.Namespace,
    workers_killed: int,
    restarts: int,
    first: float,
    last: float,
) -> Summary:
    server_errors = sum(count for status, count in seen.statuses.items() if status >= 500)
    malformed = seen.requests["malformed"]
    passed = (
        seen.wrong == seen.failed == seen.broken_connections == server_errors == 0
        and seen.right > 0
        and seen.statuses[422] == malformed
        and last <= first * (1 + MAX_GROWTH)
    )
    return Summary(
        seconds=arguments.seconds,
        clients=arguments.clients,
        requests=dict(seen.requests),
        statuses={str(status): count for status, count in sorted(seen.statuses.items())},
        items_right=seen.right,
        items_wrong=seen.wrong,
        items_failed=seen.failed,
        items_late=seen.late,
        broken_connections=seen.broken_connections,
        workers_killed=workers_killed,
        worker_restarts=restarts,
        memory_first_mb=round(first / 1e6, 1),
        memory_last_mb=round(last / 1e6, 1),
        passed=passed,
    )


if __name__ == "__main__":
    with error_line():
        sys.exit(main())
