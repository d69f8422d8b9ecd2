"""Actors in a private Ray cluster that ends with this process, even by kill -9.

cluster = await RayCluster.start()
actor = cluster.launch(Counter, name="counter")
await actor.call("add", 1)          # ActorLostError once its process is gone
await cluster.aclose()
"""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from serving.lifeline import Lifeline
from serving.ray_start import describe_death, make_ray_folder, start_ray
from serving.web.loading import load_in_thread

_POLL_S = 0.2
_OBJECT_STORE_BYTES = 80 * 2**20  # what goes to and fro is small and travels inline; Ray takes no less
_CALLS_AT_ONCE = 10_000
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "API_KEY", "CREDENTIAL")
_NEEDED_SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


class ActorLostError(RuntimeError):
    """The actor's process is gone."""


class RayActor:
    """An object with async methods in a process of its own; many calls run at once."""

    def __init__(self, actor: Any, *, name: str, folder: Path) -> None:
        self.pid: int | None = None
        """Of its process, when known; the end of its stderr is quoted when it dies."""
        self._actor = actor
        self._name = name
        self._folder = folder

    async def call(self, method: str, /, *arguments: object) -> Any:
        """Call a method; cancelling this cancels it. Raises what it raises, and ActorLostError."""
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
            death = describe_death(error, folder=self._folder, pid=self.pid)
            raise ActorLostError(f"the process of {self._name} died. {death}") from error

    def kill(self) -> None:
        """Kill the process now."""
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)


class RayCluster:
    """A private Ray cluster whose processes end with this one and leave no folder behind.

    One thread starts them and lives until it stops them, because Linux ends them with that thread.
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
        cluster = cls(make_ray_folder())
        loading = load_in_thread(cluster._begin, name="ray", then=cluster._end_when_asked)
        try:
            while not loading.done():
                cluster.tie_processes()
                await asyncio.wait([loading], timeout=_POLL_S)
            loading.result()
            # Ray replaced the handler by its own, which prints a stack and aborts.
            signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
        except BaseException:
            loading.cancel()
            cluster._stop.set()
            raise
        return cluster

    def launch(self, cls: type, *, name: str) -> RayActor:
        """Start `cls()` in a new process, without waiting for it; it is not restarted when it is lost."""
        import ray

        options = {"num_cpus": 0, "num_gpus": 0, "max_concurrency": _CALLS_AT_ONCE, "max_restarts": 0}
        actor = ray.remote(cls).options(**options).remote()
        return RayActor(actor, name=name, folder=self._folder)

    def tie_processes(self) -> None:
        """Make all present Ray processes and their children die with this one."""
        _tie_children(self._lifeline, folder=self._folder)

    async def aclose(self) -> None:
        """Stop Ray and all its processes."""
        self._stop.set()
        await asyncio.to_thread(self._ended.wait)

    def _begin(self) -> None:
        # Ctrl-C must not end Ray's processes before this one has finished.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        with _without_secrets():
            start_ray(self._folder, object_store_bytes=_OBJECT_STORE_BYTES, num_gpus=0)
        self._is_begun = True

    def _end_when_asked(self) -> None:
        import ray

        self._stop.wait()
        with ExitStack() as ending:  # each step runs even if one before it fails
            ending.callback(self._ended.set)
            ending.callback(self._lifeline.cut)
            if self._is_begun:
                ending.callback(ray.shutdown)
            self.tie_processes()


@contextmanager
def _without_secrets() -> Iterator[None]:
    """Hide secrets from child processes started meanwhile, except those for the hub and Ray."""
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


def _tie_children(lifeline: Lifeline, *, folder: Path) -> None:
    for child in psutil.Process().children():
        with suppress(psutil.Error):
            if any(str(folder) in word for word in child.cmdline()):
                # Their children by descent: Ray's agents and workers overwrite their command line.
                for process in (child, *child.children(recursive=True)):
                    lifeline.tie(process.pid)
