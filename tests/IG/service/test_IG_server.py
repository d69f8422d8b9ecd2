from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest
import uvicorn

from IG.belief import Belief, BeliefReader, FullReading
from IG.entailment import EntailmentQueue
from IG.estimator import GainEstimate, GainEstimator, GainFailure, GainOptions, GainQuery
from IG.semantics import ScoreKind
from IG.service.IG_server import build_response, create_app, main
from tests.fakes import FakeAnswerSampler, FakeEntailment

GOOD = {"question": "Where?", "context": "a good passage", "answers": ["Bolton"]}
ANSWERS: Mapping[str, Sequence[str] | Exception] = {
    "good": ["Bolton", "Bolton", "Leeds", "Bolton"],
    "poison": RuntimeError("boom"),
    "Where": ["Bolton", "York", "Hull", "Leeds"],
}


@dataclass(slots=True)
class FakeBackend:
    """The real estimator over fake models."""

    pause_s: float = 0.0
    device: str = "cpu"
    failure: str | None = None
    closed: bool = False
    running: int = 0
    most: int = 0
    estimator: GainEstimator = field(init=False)

    def __post_init__(self) -> None:
        reader = BeliefReader(EntailmentQueue(FakeEntailment()), score=ScoreKind.hard, threshold=0.5)
        self.estimator = GainEstimator(FakeAnswerSampler(ANSWERS), reader=reader, options=GainOptions())

    async def estimate(
        self, queries: Sequence[GainQuery], *, details: bool
    ) -> list[GainEstimate | GainFailure]:
        self.running += 1
        self.most = max(self.most, self.running)
        await asyncio.sleep(self.pause_s)
        self.running -= 1
        return await self.estimator.estimate(queries, details=details)

    async def aclose(self) -> None:
        self.closed = True


@asynccontextmanager
async def serving(backend: FakeBackend, *, load_s: float = 0.0) -> AsyncIterator[httpx.AsyncClient]:
    """The service over a real socket, its models loaded unless `load_s` is above 0."""

    async def start() -> FakeBackend:
        await asyncio.sleep(load_s)
        return backend

    listener = socket.create_server(("127.0.0.1", 0))
    app = create_app(start, max_concurrent_requests=2)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    async with httpx.AsyncClient(base_url=url, timeout=10, trust_env=False) as client:
        while (await client.get("/livez")).status_code != 200 or (
            not load_s and (await client.get("/readyz")).status_code != 200
        ):
            await asyncio.sleep(0.01)
        yield client
    server.should_exit = True
    await running


async def test_wire_format_with_one_bad_item() -> None:
    poison = GOOD | {"context": "poison"}
    async with serving(FakeBackend()) as client:
        answer = (await client.post("/compute_info_gain", json={"items": [GOOD, poison, GOOD]})).json()
    assert set(answer) == {"scores", "errors", "details"}
    assert answer["scores"] == [pytest.approx(0.5), None, pytest.approx(0.5)]
    assert answer["errors"] == [None, "RuntimeError: boom", None]
    detail = answer["details"][0]
    assert answer["details"][1] is None
    assert detail["with_context"][0] == {"text": "Bolton", "mean_loglik": -1.0, "length": 1}
    assert detail["entailment_with_context"] == {
        "n_responses": 4,
        "n_answers": 1,
        "resp_entails_ans": [1.0, 1.0, 0.1, 1.0],
        "ans_entails_resp": [1.0, 1.0, 0.1, 1.0],
    }
    assert detail["clusters_with_context"] == [0, 0, 1, 0]
    assert (detail["score_with_context"], detail["score_no_context"]) == (0.75, 0.25)


def test_matrices_are_flat_and_row_by_row() -> None:
    forward = np.asarray([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])
    full = FullReading(
        response_entails_gold=forward,
        gold_entails_response=(forward + 0.5).T,
        clusters=np.asarray([0, 1]),
        semantic_entropy=0.5,
    )
    belief = Belief(answers=(), weights=np.asarray([0.5, 0.5]), score=0.0, full=full)
    answer = build_response(
        [GainEstimate(gain=0.0, with_context=belief, no_context=belief)], include_details=True
    )
    assert answer.details is not None
    assert answer.details[0] is not None
    entailment = answer.details[0].entailment_with_context
    assert (entailment.n_responses, entailment.n_answers) == (2, 3)
    assert entailment.resp_entails_ans == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    assert entailment.ans_entails_resp == pytest.approx([0.6, 0.7, 0.8, 0.9, 1.0, 1.1])


async def test_details_can_be_left_out_and_nothing_asks_for_nothing() -> None:
    async with serving(FakeBackend()) as client:
        bare = await client.post("/compute_info_gain", json={"items": [GOOD], "include_details": False})
        empty = await client.post("/compute_info_gain", json={"items": []})
    assert bare.json() == {"scores": [0.5], "errors": [None], "details": None}
    assert empty.json() == {"scores": [], "errors": [], "details": None}


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"items": [GOOD | {"question": None}]},
        {"items": [GOOD | {"answers": "Bolton"}]},
        {"items": [{"question": "Where?"}]},
        [],
    ],
)
async def test_a_malformed_request_is_refused_and_the_service_lives(body: object) -> None:
    async with serving(FakeBackend()) as client:
        assert (await client.post("/compute_info_gain", json=body)).status_code == 422
        assert (await client.post("/compute_info_gain", json={"items": [GOOD]})).json()["errors"] == [None]


def body_of(question: str, context: str = '""', answers: str = "[]") -> str:
    return f'{{"items": [{{"question": {question}, "context": {context}, "answers": {answers}}}]}}'


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"items": [{"question": NaN}]}', ["items", 0, "question"]),
        (body_of('"Where?"', answers="[Infinity]"), ["items", 0, "answers", 0]),
        (r'{"items": [{"question": "\ud800", "context": ""}]}', ["items", 0, "answers"]),
        (body_of(r'"\ud800"'), ["items", 0, "question"]),
        (body_of('"Where?"', r'"\udc00"'), ["items", 0, "context"]),
        (body_of('"Where?"', answers=r'["a", "\ud800"]'), ["items", 0, "answers", 1]),
        (r'{"items": "\ud800"}', ["items"]),
        (r'{"items": [], "include_details": "\ud800"}', ["include_details"]),
        ('{"items": [', []),
        ("NaN", []),
    ],
)
async def test_what_cannot_be_echoed_is_refused_and_named(body: str, named: list[object]) -> None:
    """NaN and lone surrogates get through Python's JSON reader, but not back through its writer."""
    async with serving(FakeBackend()) as client:
        answer = await client.post(
            "/compute_info_gain", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 422
    assert any(problem["loc"][1 : 1 + len(named)] == named for problem in answer.json()["detail"])


async def test_bytes_that_are_no_text_are_refused() -> None:
    async with serving(FakeBackend()) as client:
        answer = await client.post(
            "/compute_info_gain", content=b'{"items": "\xff"}', headers={"Content-Type": "application/json"}
        )
    assert answer.status_code in (400, 422)


async def test_before_its_models_are_loaded_it_says_so() -> None:
    async with serving(FakeBackend(), load_s=60) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (
            200,
            {"status": "unhealthy", "message": "Models not loaded"},
        )
        assert (await client.get("/readyz")).status_code == 503
        refused = await client.post("/compute_info_gain", json={"items": [GOOD]})
        assert (refused.status_code, refused.json()) == (503, {"detail": "Models not loaded"})


async def test_a_dead_engine_is_a_503_that_says_so() -> None:
    backend = FakeBackend()
    async with serving(backend) as client:
        backend.failure = "the engine died"
        assert (await client.get("/health")).json() == {"status": "unhealthy", "message": "the engine died"}
        assert (await client.post("/compute_info_gain", json={"items": [GOOD]})).status_code == 503


async def test_health_answers_at_once_under_load_and_concurrency_is_limited() -> None:
    backend = FakeBackend(pause_s=0.6)
    async with serving(backend) as client:
        work = [
            asyncio.create_task(client.post("/compute_info_gain", json={"items": [GOOD] * 5}))
            for _ in range(8)
        ]
        await asyncio.sleep(0.05)
        started = time.monotonic()
        health = await client.get("/health")
        assert time.monotonic() - started < 0.5
        assert health.json() == {"status": "healthy", "mode": "single-CPU", "device": "cpu"}
        answers = [(await task).json() for task in work]
    assert all(answer["scores"] == [0.5] * 5 for answer in answers)
    assert backend.most == 2
    assert backend.closed


def test_a_taken_port_is_named_before_any_model_loads(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        models = ["--model-path", str(tmp_path), "--entailment-model", str(tmp_path)]
        assert main(["--port", str(port), *models]) == 1
    assert f"cannot listen on 127.0.0.1:{port}" in caplog.text
    assert "--port" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model-path", "/no/such/folder"], "--model-path /no/such/folder: no such folder"),
        (["--model-path", "missing/model"], "--model-path missing/model: neither a folder here nor a model"),
        (["--port", "x"], "--port is 'x', expected a whole number"),
    ],
)
def test_what_is_missing_is_named_within_seconds(
    arguments: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 1
    assert message in caplog.text


def test_an_unknown_flag_ends_as_argparse_does() -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--prot", "1"])
    assert ended.value.code == 2


SLOW_LOADS = """
import multiprocessing, sys, time
import IG.sampler
from IG.service import IG_server, IG_worker

def load_slowly(*_, **__):
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    child.start()
    print(child.pid, flush=True)
    time.sleep(600)

class LoadedSampler:
    device = "cpu"
    async def aclose(self): pass

async def start_at_once(*_, **__):
    return LoadedSampler()

if sys.argv.pop(1) == "engine":
    IG.sampler._load_engine = load_slowly
else:
    IG.sampler.VllmSampler.start = start_at_once
    IG_worker.EntailmentModel.load = load_slowly
sys.exit(IG_server.main())
"""


@pytest.mark.parametrize("slow", ["engine", "entailment"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_while_a_model_loads_ends_at_once_with_what_it_started(
    slow: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    models = ["--model-path", str(tmp_path), "--entailment-model", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_LOADS, slow, "--port", str(port), *models],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    child = psutil.Process(int(process.stdout.readline()))
    time.sleep(0.3)
    process.send_signal(number)
    try:
        assert process.wait(timeout=5) == 0
        psutil.wait_procs([child], timeout=5)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        process.stdout.close()
