"""A backend without models, and the service over it: over a real socket, or in this process."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import httpx
import uvicorn
from fastapi import FastAPI

from IG.config import resolve_config
from IG.entailment import Pair
from IG.estimator import Estimates, GainEstimator, GainQuery
from IG.judging import Judgements, judge_pairs
from IG.service.IG_server import create_app
from IG.service.pool import PoolStatus
from IG.sharing import ModelIdentity
from tests.fakes import FakeAnswerSampler, FakePairJudge

T = TypeVar("T")

GOOD = {"question": "Where?", "context": "a good passage", "answers": ["Bolton"]}
ANSWERS: Mapping[str, Sequence[str] | Exception] = {
    "good": ["Bolton", "Bolton", "Leeds", "Bolton"],
    "poison": RuntimeError("boom"),
    "Where": ["Bolton", "York", "Hull", "Leeds"],
}
IDENTITY = ModelIdentity(
    generator="fake", generator_digest="aa", entailment="fake too", entailment_digest="bb"
)


@dataclass(slots=True)
class FakeBackend:
    """The real estimator over fake models."""

    pause_s: float = 0.0
    """Added to every estimate, whatever its deadline."""
    gate: asyncio.Event | None = None
    """Every estimate waits until it is set."""
    sampling_s: float = 0.0
    devices: tuple[str, ...] = ("cpu",)
    num_ready_workers: int = 1
    num_worker_restarts: int = 0
    failure: str | None = None
    identity: ModelIdentity = IDENTITY
    error: Exception | None = None
    """Raised by every estimate."""
    closed: bool = False
    running: int = 0
    most: int = 0
    num_cancelled: int = 0
    timeouts_s: list[float | None] = field(default_factory=list)
    estimator: GainEstimator | None = None
    """By default one that knows ANSWERS."""

    def __post_init__(self) -> None:
        self.estimator = self.estimator or GainEstimator(
            FakeAnswerSampler(ANSWERS, pause_s=self.sampling_s),
            FakePairJudge(),
            config=resolve_config(["--num-generations", "4"], environ={}),
            generator_digest=self.identity.generator_digest,
        )

    @property
    def workers(self) -> PoolStatus:
        return PoolStatus(
            devices=self.devices,
            num_ready=self.num_ready_workers,
            num_restarts=self.num_worker_restarts,
            failure=self.failure,
        )

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool, timeout_s: float | None
    ) -> Estimates:
        assert self.estimator is not None
        work = self.estimator.estimate(queries, details=details, timeout_s=timeout_s)
        return await self._run(work, timeout_s=timeout_s)

    async def judge(self, pairs: Sequence[Pair], *, timeout_s: float | None) -> Judgements:
        assert self.estimator is not None
        work = judge_pairs(self.estimator.judgements, pairs, timeout_s=timeout_s)
        return await self._run(work, timeout_s=timeout_s)

    async def _run(self, work: Coroutine[object, object, T], *, timeout_s: float | None) -> T:
        self.timeouts_s.append(timeout_s)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            if self.error is not None:
                raise self.error
            await asyncio.sleep(self.pause_s)
            if self.gate is not None:
                await self.gate.wait()
            return await work
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            work.close()
            self.running -= 1

    async def aclose(self) -> None:
        self.closed = True


def make_app(
    backend: FakeBackend,
    *flags: str,
    load_s: float = 0.0,
    environ: Mapping[str, str] | None = None,
) -> FastAPI:
    """The application with the settings of a command line."""

    async def start() -> FakeBackend:
        await asyncio.sleep(load_s)
        return backend

    return create_app(start, config=resolve_config(flags, environ=environ or {}))


@asynccontextmanager
async def serving(
    backend: FakeBackend,
    *flags: str,
    load_s: float = 0.0,
    environ: Mapping[str, str] | None = None,
    wait_ready: bool = True,
) -> AsyncIterator[httpx.AsyncClient]:
    """The service over a real socket, ready for work unless `load_s` or `wait_ready` says otherwise."""
    listener = socket.create_server(("127.0.0.1", 0))
    app = make_app(backend, *flags, load_s=load_s, environ=environ)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=3000, trust_env=False, limits=limits) as client:
        path = "/livez" if load_s or not wait_ready else "/readyz"
        while (await client.get(path)).status_code != 200:
            await asyncio.sleep(0.01)
        yield client
    server.should_exit = True
    await running


@asynccontextmanager
async def calling(
    backend: FakeBackend, *flags: str, environ: Mapping[str, str] | None = None
) -> AsyncIterator[httpx.AsyncClient]:
    """The ready service without a socket."""
    app = make_app(backend, *flags, environ=environ)
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=3000) as client,
    ):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0)
        yield client
