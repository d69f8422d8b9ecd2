"""Actors in a private Ray cluster that ends with this process, even by kill -9.

cluster = await RayCluster.start()
actor = cluster.launch(Counter, name="counter")
await actor.call("add", 1)          # WorkerLostError once its process is gone
await cluster.aclose()
"""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import Any

from IG.service.jobs import WorkerLostError
from serving.ray_start import PrivateRay
from serving.web.loading import load_in_thread

_OBJECT_STORE_BYTES = 80 * 2**20  # arguments and results are small and sent inline; Ray accepts no less
_CALLS_AT_ONCE = 10_000


class RayActor:
    """An object with async methods in a process of its own; many calls run at once."""

    def __init__(self, actor: Any, *, name: str, ray: PrivateRay) -> None:
        self.pid: int | None = None
        """Of its process, when known; the end of its stderr is quoted when it dies."""
        self._actor = actor
        self._name = name
        self._ray = ray

    async def call(self, method: str, /, *arguments: object) -> Any:
        """Call a method; cancelling this cancels it. Raises what it raises, and WorkerLostError."""
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
            death = self._ray.describe_death(error, pid=self.pid)
            raise WorkerLostError(f"the process of {self._name} died. {death}") from error

    def kill(self) -> None:
        """Kill the process now."""
        import ray

        if ray.is_initialized():
            ray.kill(self._actor)


class RayCluster:
    """A private Ray cluster whose processes end with this one and leave no folder behind.

    One thread starts them and lives until it stops them, because Linux ends them with that thread.
    """

    def __init__(self) -> None:
        self._ray = PrivateRay()
        self._stop = threading.Event()
        self._ended = threading.Event()

    @classmethod
    async def start(cls) -> RayCluster:
        """Start Ray. Raises what it raises; cancelled, it ends what it started as soon as Ray lets it."""
        cluster = cls()
        loading = load_in_thread(cluster._begin, name="ray", then=cluster._end_when_asked)
        try:
            await loading
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
        return RayActor(actor, name=name, ray=self._ray)

    def guard_processes(self) -> None:
        """Make all present Ray processes and their children end with this one."""
        self._ray.guard_processes()

    async def aclose(self) -> None:
        """Stop Ray and all its processes."""
        self._stop.set()
        await asyncio.to_thread(self._ended.wait)

    def _begin(self) -> None:
        # Ctrl-C must not end Ray's processes before this one has finished.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        self._ray.start(object_store_bytes=_OBJECT_STORE_BYTES, num_gpus=0)

    def _end_when_asked(self) -> None:
        self._stop.wait()
        try:
            self._ray.close()
        finally:
            self._ended.set()
