"""Services under test in processes and in threads, and their clients."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress

import httpx
import uvicorn
from fastapi import FastAPI

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


@contextmanager
def running_script(
    script: str, way: float | str, *flags: str, token_variable: str
) -> Iterator[tuple[subprocess.Popen[str], httpx.Client]]:
    """Yield the process of a service whose first argument is `way`, and a client that has its token."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(way), "--port", str(port), *flags],
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {token_variable: "a-token"},
    )
    headers = {"Authorization": "Bearer a-token"}
    url = f"http://127.0.0.1:{port}"
    try:
        with httpx.Client(base_url=url, timeout=None, trust_env=False, headers=headers) as client:
            yield process, client
    finally:
        process.kill()
        process.communicate()


def wait_for(client: httpx.Client, path: str, status: int) -> None:
    """Wait until a path answers with this status; a hang is ended by the limit that every test has."""
    while True:
        with suppress(httpx.TransportError):
            if client.get(path).status_code == status:
                return
        time.sleep(0.02)


def post_accepted(
    client: httpx.Client,
    executor: ThreadPoolExecutor,
    path: str,
    body: Mapping[str, object],
    *,
    in_progress: str,
) -> Future[httpx.Response]:
    """Send one request and wait until the service's metrics show the line `in_progress`."""
    request = executor.submit(client.post, path, json=body)
    while in_progress not in client.get("/metrics").text:
        time.sleep(0.02)
    return request


async def eventually(holds: Callable[[], bool]) -> None:
    """Wait; a hang is ended by the limit that every test has."""
    while not holds():
        await asyncio.sleep(0.01)


async def read_metrics(client: httpx.AsyncClient) -> dict[str, float]:
    """Return every sample by its name and labels."""
    answer = await client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    lines = [line for line in answer.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


@asynccontextmanager
async def announcing(client: httpx.AsyncClient, path: str, num_bytes: int) -> AsyncIterator[Connection]:
    """A connection on which a body of so many bytes was announced, and nothing of it sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {num_bytes}\r\n\r\n".encode())
    yield reader, writer
    writer.close()


async def first_line(reader: asyncio.StreamReader) -> str:
    return (await reader.readline()).decode().strip()


@contextmanager
def served_in_thread(app: FastAPI) -> Iterator[str]:
    """Serve an application on a real socket and yield its address once it is ready."""
    listener = socket.create_server(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", http="h11"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while httpx.get(f"{address}/readyz", trust_env=False).status_code != 200:
            time.sleep(0.01)
        yield address
    finally:
        server.should_exit = True
        thread.join()
