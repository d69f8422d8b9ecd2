"""Run actors as processes of a Ray cluster, and say why one of them has died."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, Protocol

from serving.ray_start import PrivateRay
from verl.errors import RolloutError
from verl.utils.actors import Actor, ActorError, ActorHost, Node, this_node

_WATCH_INTERVAL_S = 1.0
_NOTICE_S = 2.0
"""How long an actor's death waits for `watch`, which names the cause if a process of Ray has ended."""
_RAY_CALLS = 1000
_SURVIVAL_S = 600.0
"""How long actors of a private Ray live on without one of its processes: long enough to save their state."""
_SURVIVAL = {"health_check_failure_threshold": 200, "gcs_rpc_server_reconnect_timeout_s": int(_SURVIVAL_S)}


class RayCluster(Protocol):
    """A running Ray cluster, private to this process or joined."""

    def guard_processes(self) -> None:
        """Let the processes that Ray has started on this machine end with this one."""
        ...

    def find_dead(self) -> str | None:
        """Return the name of a process that actors cannot work without and that has ended, if any."""
        ...

    def describe_death(self, error: Exception, *, pid: int | None) -> str:
        """Return Ray's reason for the loss of an actor, and the end of its stderr."""
        ...

    def read_stderr_end(self, pid: int | None) -> str:
        """Return the last lines that an actor's process wrote to stderr under a heading; empty if none."""
        ...

    def close(self) -> None:
        """End all actors, and the cluster if it is private."""
        ...


class RayActor:
    """An actor in a process of its own."""

    def __init__(self, actor: Any, *, ray: RayCluster, label: str, node: int, is_here: bool) -> None:
        self.node = node
        self._actor = actor
        self._ray = ray
        self._label = label
        self._is_here = is_here
        self._pid: int | None = None
        self._has_answered = False

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError

        try:
            if self._pid is None:
                self._pid = await self._actor.pid.remote()
                self._ray.guard_processes()
            result = await self._await_or_cancel(self._actor.call.remote(method, args, kwargs))
        except RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception):
                raise ActorError(f"{self._label}: {error}") from error
            if isinstance(cause, RolloutError) and not self._has_answered:
                # The reason why an engine cannot start is only on its stderr.
                cause.add_note(self._ray.read_stderr_end(self._local_pid))
            raise cause from error
        except RayActorError as error:
            if self._ray.find_dead() is None:
                await asyncio.sleep(_NOTICE_S)
            death = self._ray.describe_death(error, pid=self._local_pid)
            raise ActorError(f"{self._label} died; {method!r} has no result. {death}") from error
        except OutOfMemoryError as error:
            first_line = str(error).partition("\n")[0]
            raise ActorError(
                f"Ray ended {self._label} in {method!r}, because its machine has too little memory: "
                f"{first_line}; end other programs there, and repeat the command to resume"
            ) from error
        self._has_answered = True
        return result

    async def _await_or_cancel(self, running: Any) -> Any:
        try:
            return await running
        except asyncio.CancelledError:
            import ray

            if ray.is_initialized():
                ray.cancel(running)
            raise

    @property
    def _local_pid(self) -> int | None:
        return self._pid if self._is_here else None

    def kill(self) -> None:
        import ray

        if ray.is_initialized() and self._ray.find_dead() is None:  # otherwise closing the cluster kills it
            ray.kill(self._actor)


class RayLauncher:
    """Runs one process per actor in a Ray cluster."""

    def __init__(
        self,
        ray: RayCluster,
        *,
        nodes: Sequence[Node],
        address: str = "127.0.0.1",
        options: Sequence[Mapping[str, object]] = ({},),
        env: Mapping[str, str] = MappingProxyType({}),
        survival_s: float = _SURVIVAL_S,
        fix: str = "repeat the command to resume",
    ) -> None:
        """Take `options` of Ray that place an actor on each node, and `env`, variables of all actors.

        `fix`: what to do when a process of Ray has ended.
        """
        self.nodes = tuple(nodes)
        self.address = address
        self._ray = ray
        self._options = tuple(options)
        self._env = dict(env)
        self.survival_s = survival_s
        self._fix = fix
        self._actors: list[RayActor] = []

    def launch(
        self,
        cls: type,
        /,
        *,
        kwargs: dict[str, object],
        name: str,
        env: Mapping[str, str] | None = None,
        max_concurrency: int = 1,
        node: int = 0,
    ) -> Actor:
        import ray

        options: dict[str, Any] = {"name": name, "num_cpus": 0, "num_gpus": 0, **self._options[node]}
        # `ActorHost` limits calls. Ray's own limit, which is 1,000 by default, must hold back none of them.
        options["max_concurrency"] = _RAY_CALLS + max_concurrency
        if variables := {**(env or {}), **self._env}:  # the user's own win
            options["runtime_env"] = {"env_vars": variables}
        remote = (
            ray.remote(ActorHost)
            .options(**options)
            .remote(cls, kwargs, name, max_concurrency, folder=os.getcwd())
        )
        where = self.nodes[node]
        label = f"actor {name!r} ({cls.__name__})" + ("" if where.is_here else f" on node {where.address}")
        actor = RayActor(remote, ray=self._ray, label=label, node=node, is_here=where.is_here)
        self._actors.append(actor)
        return actor

    async def watch(self) -> None:
        """Raise ActorError when a process of Ray has ended.

        Actors live on for some minutes, so that a caller can still save what they hold.
        """
        while (dead := self._ray.find_dead()) is None:
            await asyncio.sleep(_WATCH_INTERVAL_S)
        raise ActorError(
            f"Ray's {dead} ended (killed because memory ran out?), and no actor can work without it; "
            f"checkpoints are complete: {self._fix}"
        )

    def shutdown(self) -> None:
        for actor in self._actors:
            actor.kill()
        self._actors.clear()
        self._ray.close()


def start_private(*, object_store_mb: int) -> RayLauncher:
    """Start a Ray cluster of this process's own, which ends with it, even by SIGKILL.

    Call it on the main thread: Linux ends Ray's processes when the thread that started them ends.
    """
    ray = PrivateRay()
    try:
        with keep_sigterm_handler():
            ray.start(object_store_bytes=object_store_mb * 2**20, system_config=_SURVIVAL)
    except Exception as error:  # Ray raises the bare class
        ray.close()
        raise ActorError(
            f"Ray cannot start ({type(error).__name__}: {error}); free memory, shared memory and disk in "
            f"{ray.folder.parent}, or look for the cause with trainer.launcher=local, which starts no Ray"
        ) from error
    return RayLauncher(ray, nodes=[this_node()])


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
