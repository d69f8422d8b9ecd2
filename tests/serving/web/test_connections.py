"""Silent and slow clients against both services, over real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
import pytest

from tests.IG.service.backends import GOOD
from tests.IG.service.test_serving import WITHOUT_MODELS
from tests.processes import running_script, wait_for
from tests.search_r1.search.test_server_process import WITHOUT_INDEX

SERVICES = {
    "retriever": (WITHOUT_INDEX, "RETRIEVER_TOKEN", "/retrieve", {"query": "a"}),
    "IG": (WITHOUT_MODELS, "IG_TOKEN", "/compute_info_gain", {"items": [GOOD]}),
}
HEAD = (
    b"POST %s HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer a-token\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


@contextmanager
def running(service: str, *, first: str, work_s: float = 0) -> Iterator[httpx.Client]:
    """A client of a service whose process runs the statements `first` before anything else."""
    script, token_variable, _, _ = SERVICES[service]
    with running_script(f"{first}\n{script}", work_s, token_variable=token_variable) as (_, client):
        wait_for(client, "/readyz", 200)
        yield client


def connect(client: httpx.Client) -> socket.socket:
    connection = socket.create_connection((client.base_url.host, client.base_url.port or 0))
    connection.settimeout(60)
    return connection


# Fewer files than clients, and little time for heads.
FEW_FILES = (
    "import resource, serving.web.server\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); serving.web.server.HEAD_TIMEOUT_S = 2.0"
)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("sent", ["nothing", "half a head"])
def test_silent_clients_that_hold_all_open_files_are_disconnected(service: str, sent: str) -> None:
    _, _, path, body = SERVICES[service]
    start = HEAD[: {"nothing": 0, "half a head": 60}[sent]]
    with running(service, first=FEW_FILES) as client, ExitStack() as open_connections:
        for _ in range(300):
            with suppress(ConnectionError):  # without a file for it, a connection is closed at once
                open_connections.enter_context(connect(client)).sendall(start)
        with httpx.Client(base_url=client.base_url, headers=client.headers, trust_env=False) as other:
            wait_for(other, "/livez", 200)
            assert other.post(path, json=body).status_code == 200


@pytest.mark.parametrize("service", SERVICES)
def test_a_head_that_does_not_arrive_in_time_ends_the_connection(service: str) -> None:
    _, _, path, body = SERVICES[service]
    first = "import serving.web.server; serving.web.server.HEAD_TIMEOUT_S = 0.5"
    with running(service, first=first) as client, connect(client) as silent, connect(client) as slow:
        with suppress(OSError):
            while True:  # a byte now and then is no progress
                slow.sendall(b"G")
                time.sleep(0.05)
        assert silent.recv(1) == b""
        content = json.dumps(body).encode()
        with connect(client) as in_time:
            in_time.sendall(HEAD % (path.encode(), len(content)))
            time.sleep(1)  # longer than a head may take: the body has a deadline of its own
            in_time.sendall(content)
            assert in_time.recv(1 << 16).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize("service", SERVICES)
def test_a_trailing_slash_is_served_and_never_redirected(service: str) -> None:
    _, _, path, body = SERVICES[service]
    elsewhere = {"Host": "elsewhere.example"}
    with running(service, first="") as client:
        for route in ("/livez/", "/readyz//", "/health/", "/version/", "/metrics/", "/openapi.json/"):
            assert client.get(route, headers=elsewhere).status_code == 200, route
        assert client.post(f"{path}/", json=body, headers=elsewhere).status_code == 200
        for route in ("/nowhere/", f"{path}/more/"):
            assert client.get(route, headers=elsewhere).status_code == 404, route
