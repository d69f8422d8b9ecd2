"""Run a class in this process or as a Ray actor, with the same calls.

Either way the object lives in a `_Host`: built and called on threads of its own, one call at a time unless
told otherwise, so that all sync calls of a default actor share one thread and the event loop stays free.

    launcher = make_launcher("ray")
    policy = launcher.launch(PolicyWorker, kwargs={"rank": 0}, name="policy-0")
    await policy.call("update", batch)      # a failed constructor shows here, too
    launcher.shutdown()
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import psutil

from serving.ray_start import describe_death, make_ray_folder, read_stderr_end, start_ray
from verl.errors import ConfigError, RolloutError
from verl.utils.reaper import MARK, start_reaper

_REAPER_TIMEOUT_S = 30.0
_WATCH_INTERVAL_S = 1.0
# How long Ray outlives one of its processes: long enough to save what the actors hold.
_SURVIVAL = {"health_check_failure_threshold": 200, "gcs_rpc_server_reconnect_timeout_s": 600}


class ActorError(RuntimeError):
    """An actor is gone: names it, its class and what it last wrote to stderr."""


class Actor(Protocol):
    """An object that lives elsewhere."""

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        """Return what the method returns, raise what it raises. Raises ActorError when the actor is gone."""
        ...

    def kill(self) -> None:
        """End it now, whatever it does. A second time does nothing."""
        ...


class Launcher(Protocol):
    """Start actors."""

    def launch(
        self,
        cls: type,
        /,
        *,
        kwargs: dict[str, object],
        name: str,
        env: Mapping[str, str] | None = None,
        max_concurrency: int = 1,
    ) -> Actor:
        """Build `cls(**kwargs)` without waiting for it, in an environment with `env` added."""
        ...

    async def watch(self) -> None:
        """Raise ActorError once a process that all actors depend on has ended."""
        ...

    def shutdown(self) -> None:
        """Kill what was launched and leave nothing behind."""
        ...


def make_launcher(kind: str, *, object_store_mb: int = 200) -> Launcher:
    """Make the launcher of `trainer.launcher`: "ray" starts a private cluster here, "local" nothing."""
    if kind == "local":
        return LocalLauncher()
    if kind == "ray":
        return RayLauncher(object_store_mb=object_store_mb)
    raise ConfigError(f"trainer.launcher must be one of ray, local, got {kind!r}")


class _Host:
    """Owns the object and decides on which thread it runs."""

    def __init__(self, cls: type, kwargs: dict[str, object], name: str, max_concurrency: int) -> None:
        self._executor = ThreadPoolExecutor(max_concurrency, thread_name_prefix=name)
        self._turns = asyncio.Semaphore(max_concurrency)
        self._built = self._executor.submit(cls, **kwargs)

    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        target = getattr(await asyncio.wrap_future(self._built), method)
        async with self._turns:
            if inspect.iscoroutinefunction(target):
                return await target(*args, **kwargs)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, lambda: target(*args, **kwargs))

    async def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class _LocalActor:
    def __init__(self, host: _Host, name: str) -> None:
        self._host: _Host | None = host
        self._name = name

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        if self._host is None:
            raise ActorError(f"actor {self._name!r} was killed before the call of {method!r}")
        return await self._host.call(method, args, kwargs)

    def kill(self) -> None:
        if self._host is not None:
            self._host.close()
            self._host = None


class LocalLauncher:
    """Everything in this process: for the debugger and for tests. `env` is set for the whole process."""

    def __init__(self) -> None:
        self._actors: list[_LocalActor] = []

    def launch(
        self,
        cls: type,
        /,
        *,
        kwargs: dict[str, object],
        name: str,
        env: Mapping[str, str] | None = None,
        max_concurrency: int = 1,
    ) -> Actor:
        os.environ.update(env or {})
        actor = _LocalActor(_Host(cls, kwargs, name, max_concurrency), name)
        self._actors.append(actor)
        return actor

    async def watch(self) -> None:
        await asyncio.Event().wait()  # this process is the only one

    def shutdown(self) -> None:
        for actor in self._actors:
            actor.kill()
        self._actors.clear()


class _RayActor:
    def __init__(self, actor: Any, *, cluster: RayLauncher, name: str, role: str, folder: Path) -> None:
        self._actor = actor
        self._cluster = cluster
        self._name = name
        self._role = role
        self._folder = folder
        self._pid: int | None = None
        self._has_answered = False

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            if self._pid is None:
                self._pid = await self._actor.pid.remote()
            result = await self._actor.call.remote(method, args, kwargs)
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception):
                raise ActorError(f"{self._who}: {error}") from error
            if isinstance(cause, RolloutError) and not self._has_answered:
                # Why an engine cannot start is only on its stderr.
                cause.add_note(read_stderr_end(folder=self._folder, pid=self._pid))
            raise cause from error
        except RayActorError as error:
            death = describe_death(error, folder=self._folder, pid=self._pid)
            raise ActorError(f"{self._who} died; {method!r} has no result. {death}") from error
        self._has_answered = True
        return result

    @property
    def _who(self) -> str:
        return f"actor {self._name!r} ({self._role})"

    def kill(self) -> None:
        import ray

        if ray.is_initialized() and self._cluster.find_dead() is None:  # else the reaper kills it
            ray.kill(self._actor)


class RayLauncher:
    """One process per actor, in a Ray cluster of this process's own that ends with it, even by kill -9.

    Make it on the main thread: Linux ends Ray's processes when the thread that started them ends.
    """

    def __init__(self, *, object_store_mb: int) -> None:
        self._folder, self._reaper = _start_cluster(object_store_mb)
        self._actors: list[_RayActor] = []
        named = [(child, child.name()) for child in psutil.Process().children()]
        self._essential = [(child, name) for child, name in named if name in ("raylet", "gcs_server")]

    def launch(
        self,
        cls: type,
        /,
        *,
        kwargs: dict[str, object],
        name: str,
        env: Mapping[str, str] | None = None,
        max_concurrency: int = 1,
    ) -> Actor:
        import ray

        options: dict[str, Any] = {"name": name, "num_cpus": 0, "num_gpus": 0}
        if env:
            options["runtime_env"] = {"env_vars": dict(env)}
        remote = ray.remote(_Host).options(**options).remote(cls, kwargs, name, max_concurrency)
        actor = _RayActor(remote, cluster=self, name=name, role=cls.__name__, folder=self._folder)
        self._actors.append(actor)
        return actor

    async def watch(self) -> None:
        """Actors live on for some minutes, so that a caller can still save what they hold."""
        while (dead := self.find_dead()) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        raise ActorError(
            f"Ray's {dead} ended (killed because memory ran out?), and no actor can work without it; repeat "
            "the command to resume"
        )

    def find_dead(self) -> str | None:
        """Return the name of a process of the cluster that has ended; None while all run."""
        for process, name in self._essential:
            if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
                return name
        return None

    def shutdown(self) -> None:
        import ray

        if self.find_dead() is not None:  # else Ray waits for processes that only the reaper ends
            self._reaper.communicate(timeout=_REAPER_TIMEOUT_S)
        for actor in self._actors:
            actor.kill()
        self._actors.clear()
        ray.shutdown()
        if self._reaper.returncode is None:
            self._reaper.communicate(timeout=_REAPER_TIMEOUT_S)
        shutil.rmtree(self._folder, ignore_errors=True)  # what Ray logged after the reaper's end


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Put this process's SIGTERM handler back: Ray's own would end it at once, with nothing taken down."""
    if threading.current_thread() is not threading.main_thread():
        yield  # where handlers can neither be set nor lost
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _start_cluster(object_store_mb: int) -> tuple[Path, subprocess.Popen[bytes]]:
    """Start Ray. Return its folder, and the reaper that watches over it."""
    folder = make_ray_folder()
    os.environ[MARK] = str(folder)
    try:
        with keep_sigterm_handler():
            start_ray(folder, object_store_bytes=object_store_mb * 2**20, system_config=_SURVIVAL)
    except Exception as error:  # Ray raises the bare class
        start_reaper(folder).communicate(timeout=_REAPER_TIMEOUT_S)
        raise ActorError(
            f"Ray cannot start ({type(error).__name__}: {error}); free memory, shared memory and "
            f"disk in {folder.parent}, or look for the cause with trainer.launcher=local, which starts no Ray"
        ) from error
    finally:
        del os.environ[MARK]
    return folder, start_reaper(folder)
