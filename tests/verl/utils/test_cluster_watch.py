"""The watch over a joined cluster, with a real socket in place of its head."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from verl.utils.cluster_watch import ClusterWatch


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=100) as server:
        yield server


def watch(head: socket.socket, *, find_gone: Callable[[], str | None]) -> ClusterWatch:
    return ClusterWatch(f"127.0.0.1:{head.getsockname()[1]}", find_gone=find_gone)


def wait_for_death(watched: ClusterWatch) -> str:
    while (dead := watched.find_dead()) is None:
        time.sleep(0.01)
    return dead


def test_a_node_that_has_left_is_named_by_the_head(head: socket.socket) -> None:
    answers: list[str | None] = ["raylet of node 10.0.0.2", None]
    watched = watch(head, find_gone=answers.pop)
    assert wait_for_death(watched) == "raylet of node 10.0.0.2"
    watched.close()


def test_the_end_of_the_head_is_noticed_also_while_a_call_of_it_blocks(head: socket.socket) -> None:
    asked, answered = threading.Event(), threading.Event()

    def block() -> None:
        asked.set()
        answered.wait()

    watched = watch(head, find_gone=block)
    address = watched.address
    asked.wait()
    assert watched.find_dead() is None
    assert watched.has_head()
    head.close()
    assert wait_for_death(watched) == f"head at {address}"
    assert not watched.has_head()
    answered.set()


def test_a_watch_that_was_closed_reports_nothing(head: socket.socket) -> None:
    watched = watch(head, find_gone=lambda: None)
    watched.close()
    head.close()
    for thread in threading.enumerate():
        if thread.name == "cluster-watch":
            thread.join()
    assert watched.find_dead() is None
