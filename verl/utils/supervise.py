"""Start processes, watch them, measure their memory, and leave none behind (Linux).

A `Supervisor` ends every process that it started, and all that those started in turn: as their subreaper it
becomes the parent of orphans. If this process is killed, a `ProcessGuard` ends its children.
"""

from __future__ import annotations

import ctypes
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.processes import ProcessGuard
from verl.errors import UserError

_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True)
_ROOT = Path(__file__).resolve().parents[2]
_START_TIMEOUT_S = 300.0
_GRACE_S = 40.0
"""For children to end by themselves."""
_ORPHAN_GRACE_S = 2.0
_KILL_ROUNDS = 10
_RESIDENT_GROWTH = 1.01
"""Growth by less is not measured: without this, a slow leak would be measured every second."""
# The services run on this machine: the requests must not go through a proxy that the user has set.
_DIRECTLY = urllib.request.build_opener(urllib.request.ProxyHandler({}))

_SERVICE_PREFIXES = ("IG_", "RETRIEVER_")
_SERVICE_NAMES = ("INDEX_PATH", "CORPUS_PATH", "BM25_INDEX_PATH", "TOPK", "IGPO_MOCK_SEARCH")


class ChildFailedError(UserError):
    """A process died or did not become ready; the message contains the end of its log."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """One process in a session of its own, its output in a log file."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check_alive(self) -> None:
        """Raise ChildFailedError with the end of the log if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise ChildFailedError(f"{self.name} ended with exit code {code}. {self.describe_log()}")

    def describe_log(self) -> str:
        """Return the last lines of the log, for an error message."""
        return f"{self.log} ends:\n" + ("\n".join(self.read_log()[-25:]) or "(empty)")

    def read_log(self) -> list[str]:
        """Return the complete lines of the log, and the last one when the process has ended."""
        has_ended = self.process.poll() is not None
        *whole, last = self.log.read_text(errors="replace").split("\n")
        return [*whole, last] if has_ended and last else whole


class Supervisor:
    """Starts children and guarantees their end: use as a context manager."""

    def __init__(self) -> None:
        self.children: list[Child] = []
        self._guard: ProcessGuard | None = None
        self._earlier: set[psutil.Process] = set()

    def __enter__(self) -> Supervisor:
        self._earlier = set(psutil.Process().children(recursive=True))
        self._guard = ProcessGuard(grace_s=_GRACE_S)
        self._earlier |= set(psutil.Process().children())
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._guard is not None
        self.stop_all()
        self._guard.close()
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)

    def start(
        self, name: str, *, command: Sequence[str], log: Path, cwd: Path, environment: Mapping[str, str]
    ) -> Child:
        """Start a process; its output goes to `log`."""
        assert self._guard is not None
        with log.open("w") as sink:
            process = subprocess.Popen(
                command,
                cwd=cwd,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._guard.add(process.pid)
        child = Child(name=name, process=process, log=log)
        self.children.append(child)
        return child

    def descendants(self) -> list[psutil.Process]:
        """Return all living processes below this one, without those from before the supervisor."""
        below = psutil.Process().children(recursive=True)
        return [process for process in below if process not in self._earlier and _is_alive(process)]

    def stop_all(self) -> None:
        """End all: SIGTERM to each child, which can then end its own; after the grace period SIGKILL."""
        for child in reversed(self.children):
            child.process.terminate()
        deadline = time.monotonic() + _GRACE_S
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
        _, alive = psutil.wait_procs(self.descendants(), timeout=_ORPHAN_GRACE_S)
        for _ in range(_KILL_ROUNDS):  # what is killed may have started others meanwhile
            if not alive:
                break
            for process in alive:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(alive, timeout=_ORPHAN_GRACE_S)  # also reaps orphans that became our children
            alive = self.descendants()
        self.children.clear()


def _is_alive(process: psutil.Process) -> bool:
    """Return whether a process runs; a zombie has ended and waits for its parent."""
    with suppress(psutil.NoSuchProcess):
        return process.status() != psutil.STATUS_ZOMBIE
    return False


class MemoryWatch:
    """Records the largest memory of this process and all its supervised descendants.

    The unit is the sum of proportional set sizes (PSS): a page that several processes share, such as one of
    Ray's object store, counts once in total. The kernel walks all page tables for it, so it is only read when
    the sum of resident set sizes, which costs next to nothing, is above its own largest value so far.
    """

    def __init__(self, supervisor: Supervisor, *, interval_s: float = 1.0) -> None:
        self._supervisor = supervisor
        self._interval_s = interval_s
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def measure(self) -> int:
        """Return the memory of all processes now, in bytes of PSS."""
        return self._sum(lambda process: process.memory_full_info().pss)

    def _watch(self) -> None:
        peak_resident = 0.0
        while True:
            resident = self._sum(lambda process: process.memory_info().rss)
            if resident > peak_resident * _RESIDENT_GROWTH:
                peak_resident = resident
                self.peak_bytes = max(self.peak_bytes, self.measure())
            if self._done.wait(self._interval_s):
                return

    def _sum(self, read: Callable[[psutil.Process], int]) -> int:
        total = 0
        for process in (psutil.Process(), *self._supervisor.descendants()):
            with suppress(psutil.Error):  # it has just ended
                total += read(process)
        return total


def service_environment() -> dict[str, str]:
    """Return the environment of the user without settings of services, which the scripts choose.

    The model hub is not asked for the embedded world, unless the user sets HF_HUB_OFFLINE.
    """
    kept = {name: value for name, value in os.environ.items() if not is_service_variable(name)}
    defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**defaults, **kept, "PYTHONUNBUFFERED": "1"}


def is_service_variable(name: str) -> bool:
    """Return whether an environment variable configures one of the services."""
    return name.startswith(_SERVICE_PREFIXES) or name in _SERVICE_NAMES


def free_ports(count: int) -> list[int]:
    """Return different loopback ports on which nothing listens."""
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


def wait_until_ready(
    children: Mapping[str, Child], *, timeout_s: float | None, on_tick: Callable[[list[Child]], None]
) -> Iterator[tuple[str, Child]]:
    """Poll readiness URLs; yield each with its child when it answers 200.

    `on_tick` gets the children that are not ready yet. Raises ChildFailedError when any child has ended, or
    after `timeout_s`; without one a child may load as long as it runs.
    """
    began = time.monotonic()
    waiting = dict(children)
    while waiting:
        for url in list(waiting):
            if _answers(url):
                yield url, waiting.pop(url)
        for child in children.values():
            child.check_alive()
        if not waiting:
            return
        if timeout_s is not None and time.monotonic() > began + timeout_s:
            late = next(iter(waiting.values()))
            raise ChildFailedError(f"{late.name} was not ready after {timeout_s:g} s. {late.describe_log()}")
        on_tick(list(waiting.values()))
        time.sleep(0.25)


def start_service(
    supervisor: Supervisor,
    name: str,
    *,
    module: str,
    arguments: Sequence[str],
    log: Path,
    update: Callable[[int, str], None],
) -> str:
    """Run `python -m module` on a free loopback port and wait until it is ready. Returns its URL.

    `update(0, what is waited for)` is called several times a second. Raises ChildFailedError.
    """
    (port,) = free_ports(1)
    url = f"http://127.0.0.1:{port}"
    service = supervisor.start(
        name,
        command=[sys.executable, "-P", "-m", module, "--port", str(port), *arguments],
        log=log,
        cwd=_ROOT,
        environment=service_environment(),
    )
    for _ in wait_until_ready(
        {f"{url}/readyz": service},
        timeout_s=_START_TIMEOUT_S,
        on_tick=lambda waiting: update(0, "waiting for " + " and ".join(child.name for child in waiting)),
    ):
        pass
    return url


def _answers(url: str) -> bool:
    try:
        with _DIRECTLY.open(url, timeout=2.0) as answer:
            return bool(answer.status == 200)
    except (OSError, http.client.HTTPException):
        return False
