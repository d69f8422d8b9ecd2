"""The service as users start it, with the small models of the repository, over a real socket."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pyarrow.parquet as parquet
import pytest

from tests.processes import free_port

ROOT = Path(__file__).resolve().parents[3]
ITEM = {
    "question": "Where was Alice Marsh born?",
    "context": 'Doc 1(Title: "Alice Marsh") Alice Marsh was born in Bolton.',
    "answers": ["Bolton", "Bolton, England"],
}

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]


@contextmanager
def serving(*flags: str) -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A started service, in a process group of its own, and a client of it."""
    port = free_port()
    process = subprocess.Popen(
        ["bash", str(ROOT / "IG_service_launch.sh"), "--port", str(port), "--max-new-tokens", "8", *flags],
        start_new_session=True,
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
            while not _is_ready(client):
                assert process.poll() is None, "the service ended before it was ready"
                time.sleep(0.5)
            yield process, client
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _is_ready(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def _score(client: httpx.Client, items: list[dict[str, object]]) -> dict[str, list[dict[str, object] | None]]:
    answer = client.post("/compute_info_gain", json={"items": items})
    assert answer.status_code == 200, answer.text
    body: dict[str, list[dict[str, object] | None]] = answer.json()
    return body


def _texts(detail: dict[str, object] | None, condition: str) -> list[str]:
    assert detail is not None
    answers = detail[condition]
    assert isinstance(answers, list)
    return [answer["text"] for answer in answers]


def _living(processes: list[psutil.Process]) -> list[psutil.Process]:
    _, alive = psutil.wait_procs(processes, timeout=200)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def _many_items(count: int) -> list[dict[str, object]]:
    return [
        ITEM | {"question": f"Where was Bob {index} born?", "context": "a " * index} for index in range(count)
    ]


def _interrupt_at_work(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """Ctrl-C reaches every process of the group; what was accepted is finished, and then nothing is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    items = [item | {"context": "b"} for item in _many_items(20)]
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_score, client, items)
        _wait_for_work(client)
        os.killpg(process.pid, signal.SIGINT)
        assert None not in answer.result()["scores"]
    assert process.wait() == 0
    assert _living(children) == []


def _interrupt_the_children_at_work(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """Those that Ctrl-C reaches must go on until the service has finished what was accepted."""
    children = psutil.Process(process.pid).children(recursive=True)
    group = [
        child
        for child in children
        if child.status() != psutil.STATUS_ZOMBIE and os.getpgid(child.pid) == process.pid
    ]
    assert group
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_score, client, [item | {"context": "c"} for item in _many_items(20)])
        _wait_for_work(client)
        for child in group:
            child.send_signal(signal.SIGINT)
        assert None not in answer.result()["scores"]


def _kill_at_work(process: subprocess.Popen[bytes], client: httpx.Client) -> None:
    """No process and no folder of a killed service is left."""
    children = psutil.Process(process.pid).children(recursive=True)
    words = " ".join(word for child in children for word in child.cmdline())
    (folder,) = set(re.findall(r"/\S+/ray-[a-z0-9_]{8}(?=[/\s])", words))
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_score, client, _many_items(20))
        _wait_for_work(client)
        process.kill()
        process.wait()
        assert isinstance(answer.exception(), httpx.TransportError)
    assert _living(children) == []
    while Path(folder).exists():
        time.sleep(0.1)


def _wait_for_work(client: httpx.Client) -> None:
    while "ig_items_in_progress 0.0" in client.get("/metrics").text:
        time.sleep(0.02)


def _scores_while_one_is_killed(
    process: subprocess.Popen[bytes], client: httpx.Client, items: list[dict[str, object]], *, name: str
) -> list[object]:
    """Return the scores of items at whose work a process is killed, when its worker is replaced."""
    restarts = re.compile(r"ig_worker_restarts_total (.*)")
    before = restarts.findall(client.get("/metrics").text)
    children = psutil.Process(process.pid).children(recursive=True)
    victim = next(child for child in children if child.name().startswith(name))
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_score, client, items)
        _wait_for_work(client)
        victim.kill()
        scores: list[object] = [*answer.result()["scores"]]
    while restarts.findall(client.get("/metrics").text) == before:
        time.sleep(0.1)
    assert client.get("/health").json()["status"] == "healthy"
    return scores


def _world_items(count: int) -> list[dict[str, object]]:
    """Questions of the embedded world; every second context holds an answer."""
    rows = parquet.read_table(ROOT / "world" / "test.parquet", columns=["question", "golden_answers"])
    return [
        {
            "question": row["question"],
            "context": f'Doc 1(Title: "Note") {row["question"]} {row["golden_answers"][0] * (index % 2)}.',
            "answers": row["golden_answers"],
        }
        for index, row in enumerate(rows.slice(0, count).to_pylist())
    ]


def test_scores_do_not_depend_on_workers_other_items_and_killed_processes_and_an_interrupt_loses_none() -> (
    None
):
    """Two services that remember next to nothing: only the seeds can agree."""
    world = _world_items(24)
    flags = ("--sample-cache-size", "1", "--pair-cache-size", "1", "--shutdown-grace-s", "500")
    with serving(*flags) as (process, client):
        alone = _score(client, [ITEM])
        expected = _score(client, world)["scores"]
        assert len({*map(str, expected)} - {"None"}) > 3
        assert _score(client, world[:8])["scores"] == expected[:8]  # whatever else is in the batch
        assert _scores_while_one_is_killed(process, client, world, name="VLLM::EngineCor") == expected
        version = client.get("/version").json()
        _interrupt_at_work(process, client)
    too_long = ITEM | {"context": "Alice Marsh " * 2000}
    many = _many_items(20)
    with serving(*flags, "--num-workers", "2") as (process, client):
        assert client.get("/health").json()["mode"] == "multi-CPU"
        together = _score(client, [*many[:10], ITEM, *many[10:], too_long])
        assert _scores_while_one_is_killed(process, client, world, name="ray::_Host") == expected
        assert "ig_worker_restarts_total 1.0" in client.get("/metrics").text
        assert client.get("/version").json() == version
        _interrupt_the_children_at_work(process, client)
        _kill_at_work(process, client)
    assert together["errors"][:21] == [None] * 21
    assert together["scores"][21] is None
    assert "shorten the context" in str(together["errors"][21])
    assert alone["scores"][0] == together["scores"][10]
    for condition in ("with_context", "no_context"):
        assert _texts(alone["details"][0], condition) == _texts(together["details"][10], condition)
