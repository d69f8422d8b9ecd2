"""The service as a process: its port, its signals, its exit status."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest

from IG.service.IG_server import main
from tests.IG.service.backends import GOOD
from tests.processes import free_port, post_accepted, running_script, wait_for


def test_a_taken_port_is_named_before_any_model_loads(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "entailment"}}')
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
        (["--model-path", "missing/model"], "--model-path missing/model: no such folder, and"),
        (["--port", "x"], "--port is 'x', expected a whole number"),
    ],
)
def test_what_is_missing_is_named_within_seconds(
    arguments: list[str], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert main(arguments) == 1
    assert message in caplog.text


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


@pytest.mark.parametrize(("slow", "number"), [("engine", signal.SIGINT), ("entailment", signal.SIGTERM)])
def test_a_stop_while_a_model_loads_ends_at_once_with_what_it_started(
    slow: str, number: signal.Signals, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"id2label": {"0": "entailment"}}')
    port = free_port()
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
        assert process.wait() == 0
        psutil.wait_procs([child], timeout=200)
        assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    finally:
        process.kill()
        process.stdout.close()


WITHOUT_MODELS = """
import asyncio, os, sys
from IG.service import IG_server
from tests.IG.service.backends import FakeBackend

class Pool:
    @staticmethod
    async def start(config):
        assert "IG_TOKEN" not in os.environ
        assert not config.token
        if sys.argv[1] == "broken":
            raise OSError("the models are broken")
        return FakeBackend(pause_s=float(sys.argv[1]))

IG_server.PooledBackend = Pool
IG_server.require_models = lambda _: None
sys.exit(IG_server.main(sys.argv[2:]))
"""


running = partial(running_script, WITHOUT_MODELS, token_variable="IG_TOKEN")
"""The service without models, each of whose requests takes so many seconds, and a client of it."""


def ask(client: httpx.Client, executor: ThreadPoolExecutor) -> Future[httpx.Response]:
    body = {"items": [GOOD]}
    in_progress = "ig_items_in_progress 1.0"
    return post_accepted(client, executor, "/compute_info_gain", body, in_progress=in_progress)


def test_a_signal_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    with running(1.0) as (process, client), ThreadPoolExecutor() as executor:
        wait_for(client, "/readyz", 200)
        accepted = ask(client, executor)
        process.send_signal(signal.SIGINT)
        wait_for(client, "/readyz", 503)
        refused = client.post("/compute_info_gain", json={"items": [GOOD]})
        health = client.get("/health").json()
        assert accepted.result().json()["scores"] == [0.5]
        assert process.wait() == 0
    assert (refused.status_code, refused.json()) == (503, {"detail": "Shutting down"})
    assert int(refused.headers["Retry-After"]) >= 1
    assert (health["status"], health["message"]) == ("unhealthy", "Shutting down")


def test_a_second_signal_cancels() -> None:
    with running(600, "--shutdown-grace-s", "600") as (process, client), ThreadPoolExecutor() as executor:
        wait_for(client, "/readyz", 200)
        accepted = ask(client, executor)
        process.send_signal(signal.SIGTERM)
        wait_for(client, "/readyz", 503)
        process.send_signal(signal.SIGTERM)
        assert accepted.result().status_code == 503
        assert process.wait() == 0


def test_a_request_that_is_not_here_yet_is_not_waited_for() -> None:
    with running(0) as (process, client):
        wait_for(client, "/readyz", 200)
        with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as connection:
            connection.sendall(
                b"POST /compute_info_gain HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer a-token\r\n"
                b'Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"items": ['
            )
            time.sleep(0.2)
            process.terminate()
            _, log = process.communicate(timeout=200)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 503")
        assert process.returncode == 0
        assert "Traceback" not in log


def test_models_that_do_not_load_end_the_service_with_1() -> None:
    with running("broken") as (process, _):
        _, log = process.communicate(timeout=200)
        assert process.returncode == 1
    assert "the models could not be loaded: OSError: the models are broken" in log
