"""Actors in a private Ray cluster that ends with this process, even by kill -9. The only one to import ray.

cluster = await RayCluster.start()
actor = cluster.launch(Counter, name="counter")
await actor.call("add", 1)          # ActorLostError once its process is gone
await cluster.aclose()
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from IG.lifeline import Lifeline
from IG.web.loading import load_in_thread

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_LOOK_EVERY_S = 0.2
_OBJECT_STORE_BYTES = 80 * 2**20  # what goes to and fro is small and travels inline; Ray takes no less
_CALLS_AT_ONCE = 10_000
_NUM_QUOTED_LINES = 15
_MAX_SOCKET_ROOT_CHARS = 24
"""Ray puts unix sockets (at most 107 characters) about 80 characters below its folder."""
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")
_NEEDED_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


class ActorLostError(RuntimeError):
    """The actor's process is gone."""


class RayActor:
    """An object with async methods in a process of its own; many calls run at once."""

    def __init__(self, actor: Any, *, name: str, logs: Path) -> None:
        self.pid: int | None = None
        """Of its process, as far as somebody said; whose last words to quote."""
        self._actor = actor
        self._name = name
        self._logs = logs

    async def call(self, method: str, /, *arguments: object) -> Any:
        """What the method returns or raises; cancelled, the method is, too. Raises ActorLostError."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        reference = getattr(self._actor, method).remote(*arguments)
        try:
            return await reference
        except asyncio.CancelledError:
            ray.cancel(reference)
            raise
        except RayTaskError as error:
            raise (error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))) from error
        except RayError as error:
            reason = str(error).strip().splitlines()[-1].split(" Some common causes")[0]
            raise ActorLostError(f"the process of {self._name} died. {reason}{self._last_words()}") from error

    def kill(self) -> None:
        """End it now, whatever it does."""
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)

    def _last_words(self) -> str:
        if self.pid is None:
            return ""
        lines = [
            line
            for log in sorted(self._logs.glob(f"worker-*-{self.pid}.err"))
            for line in log.read_text(errors="replace").splitlines()
            if line.strip() and not line.startswith(":")  # ":x" is Ray's own
        ]
        return "\nIts last words:\n  " + "\n  ".join(lines[-_NUM_QUOTED_LINES:]) if lines else ""


class RayCluster:
    """Ray's servants for this process alone: they end with it and leave no folder behind.

    A thread starts them and stays until it ends them, because Linux ends them with that thread.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lifeline = Lifeline()
        self._lifeline.leave_nothing_in(folder)
        self._is_begun = False
        self._stop = threading.Event()
        self._ended = threading.Event()

    @classmethod
    async def start(cls) -> RayCluster:
        """Start Ray. Raises what it raises; cancelled, it ends what it started as soon as Ray lets it."""
        root = tempfile.gettempdir()
        root = root if len(root) <= _MAX_SOCKET_ROOT_CHARS and root.split() == [root] else "/tmp"
        cluster = cls(Path(tempfile.mkdtemp(prefix="ray-", dir=root)))
        loading = load_in_thread(cluster._begin, name="ray", then=cluster._end_when_asked)
        try:
            while not loading.done():
                cluster.tie_processes()
                await asyncio.wait([loading], timeout=_LOOK_EVERY_S)
            loading.result()
        except BaseException:
            loading.cancel()
            cluster._stop.set()
            raise
        return cluster

    def launch(self, cls: type, *, name: str) -> RayActor:
        """Make `cls()` in a new process, without waiting for it; nobody restarts it when it is lost."""
        import ray

        options = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": _CALLS_AT_ONCE, "max_restarts": 0}
        actor = ray.remote(cls).options(**options).remote()
        return RayActor(actor, name=name, logs=self._folder / "session_latest" / "logs")

    def tie_processes(self) -> None:
        """Let the processes that there are now, Ray's and those that they started, die with this one."""
        _tie_servants(self._lifeline, folder=self._folder)

    async def aclose(self) -> None:
        """End Ray and all its processes."""
        self._stop.set()
        await asyncio.to_thread(self._ended.wait)

    def _begin(self) -> None:
        _start_ray(self._folder)
        self._is_begun = True

    def _end_when_asked(self) -> None:
        import ray

        self._stop.wait()
        with ExitStack() as ending:  # whatever fails, what comes after it is done
            ending.callback(self._ended.set)
            ending.callback(self._lifeline.cut)
            if self._is_begun:
                ending.callback(ray.shutdown)
            self.tie_processes()


def _start_ray(folder: Path) -> None:
    """Start the servants. Raises what Ray raises."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as for the engine: theirs is not the decision
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray binds to loopback only where it thinks clusters unsupported; it reads this when imported.
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    import ray

    if ray.is_initialized():
        raise RuntimeError("Ray already runs in this process; several workers need one of their own")
    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            with _without_secrets():
                # No CPUs: actors ask for none, so few cores never block one, and Ray stocks no idle workers.
                ray.init(
                    address="local",
                    num_cpus=0,
                    num_gpus=0,
                    include_dashboard=False,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    log_to_driver=False,
                    logging_level="error",
                    _temp_dir=str(folder),
                )
            return
        except Exception as error:  # Ray raises the bare class when its processes are slow to start
            ray.shutdown()
            if "timed out" not in str(error) or attempt == _START_ATTEMPTS:
                raise
            logger.warning("Ray did not start in time (a busy machine?); attempt %d failed", attempt)
    raise AssertionError("unreachable")


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Start processes without the secrets of this one's environment, but for those that open the hub."""
    secrets = {
        name: value
        for name, value in os.environ.items()
        if any(word in name.upper() for word in _SECRET_WORDS) and name not in _NEEDED_SECRETS
    }
    for name in secrets:
        del os.environ[name]
    try:
        yield
    finally:
        os.environ.update(secrets)


def _tie_servants(lifeline: Lifeline, *, folder: Path) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in child.cmdline()):
                # Their children by descent: Ray's agents and workers overwrite their command line.
                for process in (child, *child.children(recursive=True)):
                    lifeline.tie(process.pid)
