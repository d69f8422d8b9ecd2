"""The service as users start it, with the small models of the repository, over a real socket."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
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
def serving() -> Iterator[tuple[subprocess.Popen[bytes], httpx.Client]]:
    """A started service and a client of it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen(
        ["bash", str(ROOT / "IG_service_launch.sh"), "--port", str(port), "--max-new-tokens", "8"]
    )
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300, trust_env=False) as client:
            deadline = time.monotonic() + 400
            while not _is_ready(client):
                assert process.poll() is None, "the service ended before it was ready"
                assert time.monotonic() < deadline
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
    _, alive = psutil.wait_procs(processes, timeout=15)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


def test_same_scores_alone_and_in_a_crowd_and_no_process_survives() -> None:
    """In a crowd and killed; alone in a second service, whose caches are fresh: only the seeds can agree."""
    crowd = [
        ITEM | {"question": f"Where was Bob {index} born?", "context": "a " * index} for index in range(40)
    ]
    too_long = ITEM | {"context": "Alice Marsh " * 2000}
    with serving() as (process, client):
        together = _score(client, [*crowd[:20], ITEM, *crowd[20:], too_long])
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert _living(children) == []
    assert together["errors"][:41] == [None] * 41
    assert together["scores"][41] is None
    assert "shorten the context" in str(together["errors"][41])

    with serving() as (process, client):
        alone = _score(client, [ITEM])
        children = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(timeout=60) == 0
        assert _living(children) == []
    assert alone["scores"][0] == pytest.approx(together["scores"][20], abs=1e-5)
    for condition in ("with_context", "no_context"):
        assert _texts(alone["details"][0], condition) == _texts(together["details"][20], condition)
