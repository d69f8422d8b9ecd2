"""What every test gets: this machine as the only network, small thread pools, no process left behind."""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections.abc import Iterator

import psutil
import pytest

SESSION_MARK = "INFOREASONER_TEST_SESSION"
# Servants of the test process itself: they end with it, by design.
_SERVANTS = ("resource_tracker", "forkserver", "wandb-core", "wandb_core")
_GRACE_S = 10.0


def pytest_configure() -> None:
    """Set the environment before any test module imports torch, transformers, ray or wandb."""
    os.environ[SESSION_MARK] = uuid.uuid4().hex
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)


def _own_addresses() -> set[str]:
    found = {address.address.split("%")[0] for group in psutil.net_if_addrs().values() for address in group}
    return found | {"localhost", "0.0.0.0", "::", "::1", ""}


@pytest.fixture(scope="session", autouse=True)
def _only_this_machine() -> Iterator[None]:
    """Refuse TCP connections to other machines: a test that needs the network fails elsewhere."""
    own = _own_addresses()
    connect = socket.socket.connect

    def guarded(sock: socket.socket, address: object) -> None:
        is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type & socket.SOCK_STREAM
        host = str(address[0]) if isinstance(address, tuple) else ""
        if is_tcp and host not in own and not host.startswith("127."):
            raise ConnectionRefusedError(f"tests may talk to this machine only, not to {host}")
        connect(sock, address)  # type: ignore[arg-type]

    patch = pytest.MonkeyPatch()
    patch.setattr(socket.socket, "connect", guarded)
    yield
    patch.undo()


def _descends_from_session(process: psutil.Process, mark: str) -> bool:
    if process.pid == os.getpid():
        return False
    try:
        if process.status() == psutil.STATUS_ZOMBIE or process.environ().get(SESSION_MARK) != mark:
            return False
        command = " ".join(process.cmdline())
    except psutil.Error:
        return False
    return not any(servant in command for servant in _SERVANTS)


def _left_behind() -> list[psutil.Process]:
    mark = os.environ[SESSION_MARK]
    return [process for process in psutil.process_iter() if _descends_from_session(process, mark)]


@pytest.fixture(scope="session", autouse=True)
def _no_orphans() -> Iterator[None]:
    """Fail if a process started by a test, or by what it started, outlives the session; end it."""
    yield
    deadline = time.monotonic() + _GRACE_S
    while (left := _left_behind()) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = []
    for process in left:
        try:
            names.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
        except psutil.Error:
            continue
    assert not names, "processes left behind by the tests:\n" + "\n".join(names)
