"""The service as users start it, with the small models of the repository, over a real socket."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

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
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
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
    items = [item | {"context": "b"} for item in _many_items(300)]
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(_score, client, items)
        time.sleep(0.5)
        assert not answer.done()
        os.killpg(process.pid, signal.SIGINT)
        assert None not in answer.result()["scores"]
    assert process.wait() == 0
    assert _living(children) == []


def test_alone_or_among_others_on_two_workers_a_score_is_the_same_and_an_interrupt_loses_none() -> None:
    """Two services, whose caches are fresh: only the seeds can agree."""
    with serving("--shutdown-grace-s", "500") as (process, client):
        alone = _score(client, [ITEM])
        _interrupt_at_work(process, client)
    too_long = ITEM | {"context": "Alice Marsh " * 2000}
    with serving("--num-workers", "2", "--shutdown-grace-s", "500") as (process, client):
        assert client.get("/health").json()["mode"] == "multi-CPU"
        together = _score(client, [*_many_items(20), ITEM, *_many_items(40)[20:], too_long])
        _interrupt_at_work(process, client)
    assert together["errors"][:41] == [None] * 41
    assert together["scores"][41] is None
    assert "shorten the context" in str(together["errors"][41])
    assert alone["scores"][0] == together["scores"][20]
    for condition in ("with_context", "no_context"):
        assert _texts(alone["details"][0], condition) == _texts(together["details"][20], condition)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_a_killed_service_leaves_no_process_and_no_folder(num_workers: int) -> None:
    with serving("--num-workers", str(num_workers)) as (process, client), ThreadPoolExecutor(1) as thread:
        children = psutil.Process(process.pid).children(recursive=True)
        words = " ".join(word for child in children for word in child.cmdline())
        folders = set(re.findall(r"/\S+/ray-[a-z0-9_]{8}(?=[/\s])", words))
        assert len(folders) == num_workers - 1
        answer = thread.submit(_score, client, _many_items(300))
        time.sleep(0.5)
        process.kill()
        process.wait()
        assert isinstance(answer.exception(), httpx.TransportError)
        assert _living(children) == []
        time.sleep(3)
        assert not any(Path(folder).exists() for folder in folders)
