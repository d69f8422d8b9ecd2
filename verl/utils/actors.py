"""Run a class in this process or as a Ray actor, with the same calls.

Either way the object lives in a `_Host`, which builds it and runs its sync methods on threads of its own, by
default on one: one call at a time, and the event loop stays free. Coroutines run on the event loop beside
them, by default also one at a time: what such an actor does in the background is a coroutine.

    launcher = make_launcher("ray")
    policy = launcher.launch(PolicyWorker, kwargs={"rank": 0}, name="policy-0")
    await policy.call("update", batch)      # a failed constructor shows here, too
    launcher.shutdown()
"""

from __future__ import annotations

import asyncio
import inspect
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol

from serving.ray_start import PrivateRay
from verl.errors import RolloutError, UserError

_WATCH_INTERVAL_S = 1.0
_RAY_CALLS = 1000
# How long actors live on without a process of Ray: long enough to save their state.
_SURVIVAL = {"health_check_failure_threshold": 200, "gcs_rpc_server_reconnect_timeout_s": 600}


class ActorError(UserError, RuntimeError):
    """An actor has ended: the message names it, its class and the end of its stderr."""


class Actor(Protocol):
    """An object that can live in another process."""

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        """Return or raise what the method does. Raises ActorError when the actor has ended."""
        ...

    def kill(self) -> None:
        """End it at once, also during a call; a second `kill` does nothing."""
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
        """Wait until a process that all actors depend on has ended, then raise ActorError."""
        ...

    def shutdown(self) -> None:
        """Kill all actors and remove everything that was started."""
        ...


def make_launcher(kind: str, *, object_store_mb: int = 200) -> Launcher:
    """Return the launcher that `trainer.launcher` names; "ray" starts a private cluster.

    Raises KeyError for another name.
    """
    starts: dict[str, Callable[[], Launcher]] = {
        "local": LocalLauncher,
        "ray": lambda: RayLauncher(object_store_mb=object_store_mb),
    }
    return starts[kind]()


class _Host:
    """Holds the object and decides on which thread it runs."""

    def __init__(self, cls: type, kwargs: dict[str, object], name: str, max_concurrency: int) -> None:
        self._executor = ThreadPoolExecutor(max_concurrency, thread_name_prefix=name)
        self._turns = asyncio.Semaphore(max_concurrency)
        self._built = self._executor.submit(cls, **kwargs)

    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        target = getattr(await asyncio.wrap_future(self._built), method)
        if inspect.iscoroutinefunction(target):
            async with self._turns:
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
    """Runs all actors in this process, for the debugger and for tests; `env` is set for all of it."""

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
    def __init__(self, actor: Any, *, ray: PrivateRay, name: str, role: str) -> None:
        self._actor = actor
        self._ray = ray
        self._name = name
        self._role = role
        self._pid: int | None = None
        self._has_answered = False

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            if self._pid is None:
                self._pid = await self._actor.pid.remote()
                self._ray.guard_processes()
            result = await self._actor.call.remote(method, args, kwargs)
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception):
                raise ActorError(f"{self._label}: {error}") from error
            if isinstance(cause, RolloutError) and not self._has_answered:
                # The reason why an engine cannot start is only on its stderr.
                cause.add_note(self._ray.read_stderr_end(self._pid))
            raise cause from error
        except RayActorError as error:
            death = self._ray.describe_death(error, pid=self._pid)
            raise ActorError(f"{self._label} died; {method!r} has no result. {death}") from error
        self._has_answered = True
        return result

    @property
    def _label(self) -> str:
        return f"actor {self._name!r} ({self._role})"

    def kill(self) -> None:
        import ray

        if ray.is_initialized() and self._ray.find_dead() is None:  # otherwise closing the cluster kills it
            ray.kill(self._actor)


class RayLauncher:
    """Runs one process per actor, in a Ray cluster of this process's own that ends with it, even by SIGKILL.

    Create it on the main thread: Linux ends Ray's processes when the thread that started them ends.
    """

    def __init__(self, *, object_store_mb: int) -> None:
        self._ray = PrivateRay()
        self._actors: list[_RayActor] = []
        try:
            with keep_sigterm_handler():
                self._ray.start(object_store_bytes=object_store_mb * 2**20, system_config=_SURVIVAL)
        except Exception as error:  # Ray raises the bare class
            self._ray.close()
            raise ActorError(
                f"Ray cannot start ({type(error).__name__}: {error}); free memory, shared memory and disk in "
                f"{self._ray.folder.parent}, or look for the cause with trainer.launcher=local, which starts "
                "no Ray"
            ) from error

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
        # `_Host` limits calls. Ray's own limit, which is 1,000 by default, must hold back none of them.
        options["max_concurrency"] = _RAY_CALLS + max_concurrency
        if env:
            options["runtime_env"] = {"env_vars": dict(env)}
        remote = ray.remote(_Host).options(**options).remote(cls, kwargs, name, max_concurrency)
        actor = _RayActor(remote, ray=self._ray, name=name, role=cls.__name__)
        self._actors.append(actor)
        return actor

    async def watch(self) -> None:
        """Raise ActorError when a process of Ray has ended.

        Actors live on for some minutes, so that a caller can still save what they hold.
        """
        while (dead := self._ray.find_dead()) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        raise ActorError(
            f"Ray's {dead} ended (killed because memory ran out?), and no actor can work without it; repeat "
            "the command to resume"
        )

    def shutdown(self) -> None:
        for actor in self._actors:
            actor.kill()
        self._actors.clear()
        self._ray.close()


@contextmanager
def keep_sigterm_handler() -> Iterator[None]:
    """Restore this process's SIGTERM handler: Ray's own would end it at once, without any cleanup."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can only be set on the main thread
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
