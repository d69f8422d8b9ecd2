"""The server as a process: its signals, its exit status, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import httpx
import pytest

from tests.processes import post_accepted, running_script, wait_for

WITHOUT_INDEX = """
import asyncio, os, sys, time
from serving.web.loading import load_in_thread
from search_r1.search import retrieval_server
from search_r1.search.errors import RetrieverError
from tests.search_r1.search.servers import EchoRetriever

async def open_retriever(settings):
    assert "RETRIEVER_TOKEN" not in os.environ
    way = sys.argv[1]
    if way == "broken":
        raise RetrieverError("the index is broken")
    if way == "crashing":
        raise KeyError("row")
    if way == "endless":
        await load_in_thread(lambda: time.sleep(600), name="index")
    return EchoRetriever(search_s=float(way))

retrieval_server.open_retriever = open_retriever
sys.exit(retrieval_server.main(sys.argv[2:]))
"""
running = partial(running_script, WITHOUT_INDEX, token_variable="RETRIEVER_TOKEN")
"""The server without an index, each of whose searches takes so many seconds, and a client of it."""


def ask(client: httpx.Client, executor: ThreadPoolExecutor) -> Future[httpx.Response]:
    body = {"query": "a", "topk": 1}
    in_progress = "retriever_queries_in_progress 1.0"
    return post_accepted(client, executor, "/retrieve", body, in_progress=in_progress)


def test_a_signal_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    with running(1.0) as (process, client), ThreadPoolExecutor() as executor:
        wait_for(client, "/readyz", 200)
        accepted = ask(client, executor)
        process.send_signal(signal.SIGTERM)
        wait_for(client, "/readyz", 503)
        refused = client.post("/retrieve", json={"query": "b"})
        health = client.get("/health").json()
        assert accepted.result().json() == {"result": [[{"id": "a/0", "contents": "a"}]]}
        _, log = process.communicate(timeout=200)
        assert process.returncode == 0
    assert (refused.status_code, refused.json()) == (503, {"detail": "Shutting down"})
    assert health["status"] == "stopping"
    assert "Traceback" not in log


def test_the_end_of_the_grace_cancels() -> None:
    with running(600, "--shutdown_grace_s", "0.2") as (process, client), ThreadPoolExecutor() as executor:
        wait_for(client, "/readyz", 200)
        accepted = ask(client, executor)
        process.send_signal(signal.SIGTERM)
        assert accepted.result().status_code == 503
        assert process.wait() == 0


def test_a_stop_while_it_loads_ends_at_once() -> None:
    with running("endless") as (process, client):
        wait_for(client, "/livez", 200)
        assert client.get("/readyz").status_code == 503
        process.send_signal(signal.SIGINT)
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("way", "told", "has_traceback"),
    [
        ("broken", "the retriever does not start: the index is broken", False),
        ("crashing", "the retriever does not start: KeyError: 'row'", True),
    ],
)
def test_a_retriever_that_does_not_load_is_named_and_the_status_says_so(
    way: str, told: str, has_traceback: bool
) -> None:
    with running(way) as (process, _):
        _, log = process.communicate(timeout=200)
        assert process.returncode == 1
    assert told in log
    assert ("Traceback" in log) is has_traceback


def test_who_listens_to_other_machines_without_a_token_is_warned() -> None:
    warning = "may search; set RETRIEVER_TOKEN"
    command = [sys.executable, "-c", WITHOUT_INDEX, "broken", "--host", "0.0.0.0", "--port", "0"]
    for token, is_warned in (("", True), ("a-token", False)):
        environ = os.environ | {"RETRIEVER_TOKEN": token}
        ended = subprocess.run(command, env=environ, capture_output=True, text=True)
        assert (warning in ended.stderr) is is_warned
        assert "a-token" not in ended.stderr
