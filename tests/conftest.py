"""Settings of every test: no network but this machine, small thread pools, no process left behind."""

from __future__ import annotations

import gc
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import hypothesis
import psutil
import pytest

SESSION_MARK = "INFOREASONER_TEST_SESSION"
_HELPERS = ("resource_tracker", "forkserver", "wandb-core", "wandb_core")
"""Child processes of the test process itself, which end with it by design."""
_GRACE_S = 60.0
_POLL_S = 0.5


def pytest_configure() -> None:
    """Set the environment before any test module imports torch, transformers, ray or wandb."""
    # A shell starts background jobs with SIGINT ignored, and what the tests start would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ[SESSION_MARK] = uuid.uuid4().hex
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "WANDB_MODE": "offline",
        "RAY_USAGE_STATS_ENABLED": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # otherwise a pool of processes that import torch
        "VLLM_NO_USAGE_STATS": "1",
    }.items():
        os.environ.setdefault(name, value)
    # No limit for the time of an example: it would depend on the speed of the machine.
    hypothesis.settings.register_profile("tests", deadline=None)
    hypothesis.settings.load_profile("tests")


def pytest_collection_finish() -> None:
    """Exempt what is imported by now from garbage collection, which tests for leaks do often."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # libraries report what is not freed at the end


def _own_addresses() -> set[str]:
    found = {address.address.split("%")[0] for group in psutil.net_if_addrs().values() for address in group}
    return found | {"localhost", "0.0.0.0", "::", "::1", ""}


@pytest.fixture(scope="session", autouse=True)
def _only_this_machine() -> Iterator[None]:
    """Refuse TCP connections to other machines, so that no test depends on the network."""
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


class _Descendants(threading.Thread):
    """Collects every descendant of the test process while it is one.

    The mark in the environment is not enough: Ray's and vLLM's processes overwrite it with their title, and a
    process that loses its parent is no longer a descendant.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.seen: set[psutil.Process] = set()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(_POLL_S):
            self.collect()

    def collect(self) -> None:
        with suppress(psutil.Error):
            self.seen |= set(psutil.Process().children(recursive=True))

    def stop(self) -> None:
        self._done.set()
        self.join()
        self.collect()


def _left_behind(seen: set[psutil.Process]) -> list[psutil.Process]:
    """Return the processes that were seen, or are marked, and still run."""
    left = []
    for process in {*seen, *psutil.process_iter()} - {psutil.Process()}:
        # psutil compares start times: another process with the same number does not count as running.
        with suppress(psutil.Error):
            if process not in seen and process.environ().get(SESSION_MARK) != os.environ[SESSION_MARK]:
                continue
            runs = process.is_running() and process.status() != psutil.STATUS_ZOMBIE
            command = " ".join(process.cmdline())
            if runs and not any(helper in command for helper in _HELPERS):
                left.append(process)
    return left


@pytest.fixture(scope="session", autouse=True)
def _no_orphans() -> Iterator[None]:
    """Fail if a process started by the tests, directly or not, outlives the session; end it."""
    descendants = _Descendants()
    descendants.start()
    yield
    descendants.stop()
    deadline = time.monotonic() + _GRACE_S
    while (left := _left_behind(descendants.seen)) and time.monotonic() < deadline:
        time.sleep(0.2)
    names = []
    for process in left:
        with suppress(psutil.Error):
            names.append(f"{process.pid}: {' '.join(process.cmdline())[:200]}")
            process.kill()
    assert not names, "processes left behind by the tests:\n" + "\n".join(names)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--rules",
        default="tests.conformance.rules",
        help="module whose RULES the worked numbers of tests/conformance are held against",
    )


@pytest.hookimpl(tryfirst=True)  # before `-m` chooses by marker
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if {"IG", "search_r1"} & {*item.path.relative_to(Path(__file__).parent).parts}:
            item.add_marker("services")
