"""Run a Ray cluster for this process alone: on loopback, with a token of its own, in a private folder."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import psutil

from serving.machine import socket_root
from serving.processes import ProcessGuard, list_children_with
from serving.redaction import is_secret_name

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_NUM_QUOTED_LINES = 15
_TOKEN_FILE = "auth_token"
_RAY_FOLDER = "r"
_ESSENTIAL = ("raylet", "gcs_server")
_NEEDED_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class PrivateRay:
    """The processes and the folder of one cluster; both end with this process, even by SIGKILL.

    Linux also ends Ray's processes with the thread that calls `start`.
    """

    def __init__(self) -> None:
        # Mode 0700, and a path short enough for the sockets below it.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir=socket_root()))
        self._guard = ProcessGuard()
        self._guard.add_folder(self.folder)
        self._essential: list[tuple[psutil.Process, str]] = []
        self._is_started = False

    def start(
        self,
        *,
        object_store_bytes: int,
        num_gpus: int | None = None,
        system_config: Mapping[str, object] | None = None,
    ) -> None:
        """Start Ray, without this process's secrets except those for the model hub and for Ray itself.

        Raises RuntimeError when Ray already runs in this process, and what Ray raises.
        """
        with self._guard.adding(self._list_processes), _without_secrets(), _without_hangup():
            _start_ray(
                self.folder,
                object_store_bytes=object_store_bytes,
                num_gpus=num_gpus,
                system_config=system_config,
            )
        self._is_started = True
        named = [(child, child.name()) for child in psutil.Process().children()]
        self._essential = [(child, name) for child, name in named if name in _ESSENTIAL]

    def guard_processes(self) -> None:
        """Let the processes that Ray has started since, such as those of actors, end with this one, too."""
        self._guard.add_families(self._list_processes())

    def find_dead(self) -> str | None:
        """Return the name of a process that the cluster cannot work without and that has ended, if any."""
        for process, name in self._essential:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return name
        return None

    def close(self) -> None:
        """End Ray with all its processes and remove the folder."""
        try:
            self.guard_processes()
            if self.find_dead() is not None:
                self._guard.close()  # otherwise Ray waits for processes that do not end by themselves
            if self._is_started:
                import ray

                ray.shutdown()
        finally:
            self._guard.close()
            shutil.rmtree(self.folder, ignore_errors=True)  # what Ray wrote after the guard removed it

    def describe_death(self, error: Exception, *, pid: int | None) -> str:
        """Return Ray's reason for the loss of an actor, and the end of what its process wrote to stderr."""
        return death_reason(error) + self.read_stderr_end(pid)

    def read_stderr_end(self, pid: int | None) -> str:
        """Return the last lines that an actor's process wrote to stderr under a heading; empty if none."""
        return read_stderr_end(self.folder / _RAY_FOLDER / "session_latest", pid)

    def _list_processes(self) -> list[psutil.Process]:
        return list_children_with(str(self.folder))


def death_reason(error: Exception) -> str:
    """Return Ray's reason for the loss of an actor."""
    return str(error).strip().splitlines()[-1].split(" Some common causes")[0]


def read_stderr_end(session: Path, pid: int | None) -> str:
    """Return the last lines of stderr of a process in Ray's session folder under a heading; empty if none.

    The inside of tracebacks is left out: the exception at their end says more.
    """
    lines = [
        f"  {line}"
        for log in sorted((session / "logs").glob(f"worker-*-{pid}.err"))
        for line in log.read_text(errors="replace").splitlines()
        if line and not line.startswith((":", "  "))  # ":x" is Ray's own
    ]
    return "\n".join(["\nIts stderr ends:", *lines[-_NUM_QUOTED_LINES:]]) if lines else ""


def prepare_ray_import() -> None:
    """Set what Ray reads when it is imported. Call it before importing a library that imports Ray, too."""
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray binds to loopback only where it thinks clusters unsupported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # By itself Ray gives its workers the niceness 15: on busy cores they would wait for all other programs.
    os.environ.setdefault("RAY_worker_niceness", "0")


@contextmanager
def _without_secrets() -> Iterator[None]:
    names = [name for name in os.environ if is_secret_name(name) and name not in _NEEDED_SECRETS]
    hidden = {name: os.environ.pop(name) for name in names}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _without_hangup() -> Iterator[None]:
    """Block SIGHUP for the processes that start inside.

    A terminal that closes sends it to the whole process group. Without Ray's processes, no actor could save
    what is left to save; Ray blocks SIGINT for them for the same reason.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start_ray(
    folder: Path,
    *,
    object_store_bytes: int,
    num_gpus: int | None,
    system_config: Mapping[str, object] | None,
) -> None:
    """Start Ray with all its files below `folder`.

    By itself Ray makes its folder world-writable (0777) and stores its token readable by all in ~/.ray.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise RuntimeError("Ray already runs in this process; shut it down first")
    token_path = folder / _TOKEN_FILE
    with open(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_make_token())
    prepare_ray_import()
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    # When the raylet is gone, Ray ends a process whose parent is process 1 (nohup, a container) at once,
    # without any cleanup, unless this variable names another living process. Workers get the raylet's id.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    import ray

    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            # No CPUs: actors ask for none, so few cores never block one, and Ray stocks no idle workers.
            ray.init(
                address="local",
                num_cpus=0,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(folder / _RAY_FOLDER),
                _system_config=dict(system_config or {}),
            )
            return
        except Exception as error:  # Ray raises the bare class when its processes are slow to start
            ray.shutdown()
            if "timed out" not in str(error) or attempt == _START_ATTEMPTS:
                raise
            logger.warning("Ray did not start in time (a busy machine?); attempt %d failed", attempt)


@functools.cache
def _make_token() -> str:
    """Return the token of this process: Ray caches it, so a second cluster must have the same."""
    return secrets.token_hex(32)
