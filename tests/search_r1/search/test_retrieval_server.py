from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from search_r1.search.retrieval_server import main
from tests.processes import free_port
from tests.search_r1.search.small_world import (
    PASSAGES,
    REPOSITORY,
    SERVER,
    RunningServer,
    World,
)

Start = Callable[..., RunningServer]


def retrieve(server: RunningServer, **payload: object) -> httpx.Response:
    return httpx.post(f"{server.url}/retrieve", json=payload, trust_env=False, timeout=30.0)


def statuses_until_ready(running: RunningServer) -> set[int]:
    """Statuses of a search asked again and again from the first moment on."""
    seen: set[int] = set()
    while 200 not in seen:
        try:
            answer = httpx.post(f"{running.url}/retrieve", json={"query": "river"}, trust_env=False)
            seen.add(answer.status_code)
            if answer.status_code == 503:
                assert answer.headers["Retry-After"] == "1"
                assert httpx.get(f"{running.url}/livez", trust_env=False).status_code == 200
        except httpx.TransportError:
            assert running.process.poll() is None
        time.sleep(0.1)
    return seen


def test_both_published_shapes(server: RunningServer) -> None:
    bare = retrieve(server, queries=["Alice Marsh born", "river"], topk=2).json()["result"]
    scored = retrieve(server, queries=["Alice Marsh born", "river"], topk=2, return_scores=True).json()[
        "result"
    ]
    assert [[hit["document"] for hit in hits] for hits in scored] == bare
    assert [len(hits) for hits in bare] == [2, 2]
    for hits in scored:
        assert [set(hit) for hit in hits] == [{"document", "score"}] * 2
        assert hits[0]["score"] >= hits[1]["score"]
        assert all(PASSAGES[hit["document"]["id"]] == hit["document"]["contents"] for hit in hits)


def test_a_page_of_the_corpus(server: RunningServer) -> None:
    answer = httpx.post(f"{server.url}/page", json={"id": 3}, trust_env=False, timeout=30.0).json()
    assert answer["page"]["num_parts"] == 1
    (passage,) = answer["page"]["passages"]
    assert passage["id"] == "3"
    assert PASSAGES["3"].endswith(passage["text"])


@pytest.mark.parametrize("payload", [{}, {"topk": None}, {"topk": 0}])
def test_the_default_number_of_passages(server: RunningServer, payload: dict[str, object]) -> None:
    assert len(retrieve(server, query="river", **payload).json()["result"][0]) == 3


@pytest.mark.parametrize("topk", ["2", 2.0])
@pytest.mark.parametrize("yes", ["true", "True", "1", 1])
def test_values_are_read_as_the_published_server_reads_them(
    server: RunningServer, topk: object, yes: object
) -> None:
    asked = {"queries": ["river"], "topk": topk, "return_scores": yes, "timeout_s": "30", "top_p": 0.9}
    expected = retrieve(server, queries=["river"], topk=2, return_scores=True)
    assert retrieve(server, **asked).json() == expected.json()


def test_edges(server: RunningServer) -> None:
    assert retrieve(server, queries=[]).json() == {"result": []}
    assert retrieve(server, queries=["", "  "]).json() == {"result": [[], []]}
    assert len(retrieve(server, query="river", topk=1000).json()["result"][0]) == len(PASSAGES)
    found = retrieve(server, query="größe 漢字 🎬\u0000", topk=1).json()["result"][0]
    assert found == [{"id": "3", "contents": PASSAGES["3"]}]


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", ""),
        (b"not json", "json"),
        (b"[]", "body"),
        (b"{}", "exactly one of"),
        (b'{"query": "a", "queries": ["b"]}', "exactly one of"),
        (b'{"queries": "a"}', "queries"),
        (b'{"queries": ["a", null]}', "queries"),
        (b'{"queries": ["a", 3]}', "queries"),
        (b'{"query": "a", "topk": -1}', "topk"),
        (b'{"query": "a", "topk": 100000}', "topk"),
        (b'{"query": "a", "topk": "many"}', "topk"),
        (b'{"query": "a", "topk": 2.5}', "topk"),
        (b'{"query": "a", "return_scores": "maybe"}', "return_scores"),
        (b'{"query": "\\ud800"}', "query"),
        (b'{"query": "\xff"}', ""),
    ],
)
def test_a_malformed_body_is_refused_and_named(server: RunningServer, body: bytes, where: str) -> None:
    headers = {"Content-Type": "application/json"}
    refused = httpx.post(f"{server.url}/retrieve", content=body, headers=headers, trust_env=False)
    assert refused.status_code in (400, 422)
    assert where in refused.text
    assert retrieve(server, query="river").status_code == 200


def test_a_taken_port_is_named_before_anything_loads(server: RunningServer, world: World) -> None:
    port = server.url.rpartition(":")[2]
    ended = subprocess.run(
        [sys.executable, str(SERVER), *world.flags, "--port", port], capture_output=True, text=True
    )
    assert ended.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in ended.stderr
    assert "--port" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert "loading" not in ended.stderr


@pytest.mark.parametrize("flag", ["--index_path", "--corpus_path", "--retriever_model"])
def test_a_missing_file_ends_the_server_with_a_message(
    world: World, flag: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    missing = str(tmp_path / "nowhere")
    assert main([*world.flags, "--port", "0", flag, missing]) == 1
    (message,) = caplog.messages
    assert f"{flag} {missing}" in message


@pytest.mark.parametrize("arguments", [["--topk", "0"], ["--port", "70000"], ["--num_threads", "-1"]])
def test_wrong_flags_are_refused(arguments: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main(arguments) == 1
    assert f"{arguments[0]} is '{arguments[1]}', expected a whole number" in caplog.text


@pytest.mark.slow
def test_the_launched_server_says_when_it_is_ready_and_stops_cleanly(
    world: World, start_server: Start, tmp_path: Path
) -> None:
    port = free_port()
    launcher = str(REPOSITORY / "retrieval_launch.sh")
    variables = [f"INDEX_PATH={world.index}", f"CORPUS_PATH={world.corpus}", f"RETRIEVER_PORT={port}"]
    variables += [f"RETRIEVER_MODEL={world.encoder}", "RETRIEVER_HOST=127.0.0.1", "TOPK=5"]
    running = start_server(["env", *variables, "bash", launcher, "--topk", "2"], port=port, cwd=tmp_path)
    assert statuses_until_ready(running) == {503, 200}  # 503 while it loads
    assert len(retrieve(running, query="river").json()["result"][0]) == 2  # a flag wins over its variable
    # An open keep-alive connection must not hold the server.
    with httpx.Client(trust_env=False) as client:
        client.get(f"{running.url}/livez")
        os.kill(running.process.pid, signal.SIGINT)
        assert running.process.wait() == 0
    log = running.log.read_text()
    assert f"ready: {running.url}/retrieve (6 passages" in log
    assert "Traceback" not in log


def test_the_launcher_explains_itself() -> None:
    launcher = str(REPOSITORY / "retrieval_launch.sh")
    shown = subprocess.run(["bash", launcher, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0
    for word in ("RETRIEVER_PORT", "--index_path", "curl"):
        assert word in shown.stdout


def test_create_app_serves_any_retriever() -> None:
    code = (
        "import sys\n"
        "from search_r1.search.retrieval_server import create_app\n"
        "create_app(lambda: None)\n"
        "heavy = {'torch', 'faiss', 'transformers', 'verl'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
