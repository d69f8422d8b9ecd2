"""Silent and slow clients against both services, over real sockets."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import httpx
import pytest

from serving.web.server import listen
from tests.IG.service.backends import GOOD
from tests.IG.service.test_serving import WITHOUT_MODELS
from tests.processes import running_script, wait_for
from tests.search_r1.search.test_server_process import WITHOUT_INDEX

SERVICES: dict[str, tuple[str, str, str, dict[str, object]]] = {
    "retriever": (WITHOUT_INDEX, "RETRIEVER_TOKEN", "/retrieve", {"query": "a"}),
    "IG": (WITHOUT_MODELS, "IG_TOKEN", "/compute_info_gain", {"items": [GOOD]}),
}
HEAD = (
    b"POST %s HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer a-token\r\n"
    b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
)


# Fewer files than clients, and little time for the head of a request.
LIMITS = (
    "import resource, serving.web.server\n"
    "resource.setrlimit(resource.RLIMIT_NOFILE, (64, 128)); serving.web.server.HEAD_TIMEOUT_S = 1.0\n"
)


@dataclass(frozen=True)
class Service:
    """A running service, its route for work and a request for it."""

    client: httpx.Client
    path: str
    body: dict[str, object]

    def connect(self) -> socket.socket:
        url = self.client.base_url
        return socket.create_connection((url.host, url.port or 0), timeout=120)


@pytest.fixture(scope="module", params=SERVICES)
def service(request: pytest.FixtureRequest) -> Iterator[Service]:
    script, token_variable, path, body = SERVICES[request.param]
    with running_script(LIMITS + script, 0, token_variable=token_variable) as (_, client):
        wait_for(client, "/readyz", 200)
        yield Service(client, path, body)


@pytest.mark.parametrize("sent", ["nothing", "half a head"])
def test_silent_clients_that_hold_all_open_files_are_disconnected(service: Service, sent: str) -> None:
    start = HEAD[: {"nothing": 0, "half a head": 60}[sent]]
    client = service.client
    with ExitStack() as open_connections:
        for _ in range(300):
            with suppress(ConnectionError):  # without a file for it, a connection is closed at once
                open_connections.enter_context(service.connect()).sendall(start)
        with httpx.Client(base_url=client.base_url, headers=client.headers, trust_env=False) as other:
            wait_for(other, "/livez", 200)
            assert other.post(service.path, json=service.body).status_code == 200


def test_a_head_that_does_not_arrive_in_time_ends_the_connection(service: Service) -> None:
    with service.connect() as silent, service.connect() as slow:
        with suppress(OSError):
            while True:  # a byte now and then does not help
                slow.sendall(b"G")
                time.sleep(0.05)
        assert silent.recv(1) == b""
    content = json.dumps(service.body).encode()
    with service.connect() as in_time:
        in_time.sendall(HEAD % (service.path.encode(), len(content)))
        time.sleep(1.5)  # longer than a head may take: the body has a deadline of its own
        in_time.sendall(content)
        assert in_time.recv(1 << 16).startswith(b"HTTP/1.1 200")


def test_a_trailing_slash_is_served_and_never_redirected(service: Service) -> None:
    elsewhere = {"Host": "elsewhere.example"}
    client, path = service.client, service.path
    for route in ("/livez/", "/readyz//", "/health/", "/version/", "/metrics/", "/openapi.json/"):
        assert client.get(route, headers=elsewhere).status_code == 200, route
    assert client.post(f"{path}/", json=service.body, headers=elsewhere).status_code == 200
    for route in ("/nowhere/", f"{path}/more/"):
        assert client.get(route, headers=elsewhere).status_code == 404, route


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_host_that_cannot_be_one_is_named(host: str) -> None:
    with pytest.raises(OSError, match="is no host name; correct --host"):
        listen(host, 0)
