"""Services under test as processes, and in threads, with what asks them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from fastapi import FastAPI


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def running_script(
    script: str, way: float | str, *flags: str, token_variable: str, port: int | None = None
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """The process of a service, told `way` as its first argument, and a client that has its token."""
    port = port or free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(way), "--port", str(port), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {token_variable: "a-token"},
    )
    headers = {"Authorization": "Bearer a-token"}
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=20, trust_env=False, headers=headers) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def wait_for(client: httpx.Client, path: str, status: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            if client.get(path).status_code == status:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    pytest.fail(f"{path} did not become {status}")


def post_accepted(
    client: httpx.Client,
    executor: ThreadPoolExecutor,
    path: str,
    body: Mapping[str, object],
    *,
    in_progress: str,
) -> Future[httpx.Response]:
    """One request, sent and accepted: the service's metrics show the line `in_progress`."""
    asked = executor.submit(client.post, path, json=body)
    deadline = time.monotonic() + 10
    while in_progress not in client.get("/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return asked


@contextmanager
def served_in_thread(app: FastAPI) -> Iterator[str]:
    """The address of an application over a real socket, ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while httpx.get(f"{address}/readyz", trust_env=False).status_code != 200:
        time.sleep(0.01)
    yield address
    server.should_exit = True
    thread.join()
