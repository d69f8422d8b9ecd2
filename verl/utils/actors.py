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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

from serving.ray_start import PrivateRay
from verl.errors import RolloutError, UserError

_WATCH_INTERVAL_S = 1.0
_NOTICE_S = 2.0
"""How long an actor's death waits for `watch`, which names the cause if a process of Ray has ended."""
_RAY_CALLS = 1000
_SURVIVAL_S = 600.0
"""How long actors of a private Ray live on without one of its processes: long enough to save their state."""
_SURVIVAL = {"health_check_failure_threshold": 200, "gcs_rpc_server_reconnect_timeout_s": int(_SURVIVAL_S)}


class ActorError(UserError, RuntimeError):
    """An actor has ended: the message names it, its class and the end of its stderr."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A machine that runs actors."""

    address: str = "127.0.0.1"
    interface: str = "lo"
    """Network interface that has the address."""
    gpus: tuple[str, ...] = ()
    """Identifiers of the GPUs that may be used, as in CUDA_VISIBLE_DEVICES; empty: all of the machine."""
    is_here: bool = True
    """Whether this process runs there, too."""

    def see_gpus(self, indices: range) -> dict[str, str]:
        """Return the environment of a process that sees these of the GPUs."""
        chosen = [self.gpus[i] if self.gpus else str(i) for i in indices]
        # Policy ranks and engines share GPUs, so Ray, which assigns each GPU only once, must not do it.
        return {
            "CUDA_VISIBLE_DEVICES": ",".join(chosen),
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
        }


def interface_of(nodes: Sequence[Node], index: int) -> str:
    """Return the network interface on which a node talks to the others; loopback if it is alone."""
    return nodes[index].interface if len(nodes) > 1 else "lo"


def this_node() -> Node:
    """Return this machine with the GPUs that this process sees."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return Node(gpus=tuple(name for name in visible if name))


class Actor(Protocol):
    """An object that can live in another process."""

    node: int
    """Index of its node among `Launcher.nodes`."""

    async def call(self, method: str, /, *args: object, **kwargs: object) -> Any:
        """Return or raise what the method does. Raises ActorError when the actor has ended.

        Cancelling the call cancels a coroutine in the actor, too, as soon as that answers; a sync method runs
        to its end.
        """
        ...

    def kill(self) -> None:
        """End it at once, also during a call; a second `kill` does nothing."""
        ...


class Launcher(Protocol):
    """Start actors."""

    nodes: tuple[Node, ...]
    address: str
    """Address of this process that the nodes can reach."""
    survival_s: float
    """How long actors live on when `watch` has raised; their calls may then wait without end."""

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
        """Build `cls(**kwargs)` on a node without waiting for it, in an environment with `env` added."""
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
        "ray": lambda: _start_private(object_store_mb=object_store_mb),
    }
    return starts[kind]()


class _Host:
    """Holds the object and decides on which thread it runs."""

    def __init__(
        self,
        cls: type,
        kwargs: dict[str, object],
        name: str,
        max_concurrency: int,
        *,
        folder: str | None = None,
    ) -> None:
        if folder is not None:
            os.chdir(folder)  # relative paths then mean the same in every process
        self._executor = ThreadPoolExecutor(max_concurrency, thread_name_prefix=name)
        self._turns = asyncio.Semaphore(max_concurrency)
        self._built = self._executor.submit(cls, **kwargs)

    async def call(self, method: str, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        target = getattr(await asyncio.wrap_future(self._built), method)
        if inspect.iscoroutinefunction(target):
            async with self._turns:
                return await target(*args, **kwargs)
        loop = asyncio.get_running_loop()
        running = loop.run_in_executor(self._executor, lambda: target(*args, **kwargs))
        # Not cancelled while it waits for its turn: other ranks may run theirs, and wait in a collective.
        return await asyncio.shield(running)

    async def pid(self) -> int:
        return os.getpid()

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)


class _LocalActor:
    node = 0

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

    survival_s = 0.0  # not used: this process is the only one

    def __init__(self) -> None:
        self.nodes: tuple[Node, ...] = (this_node(),)
        self.address = self.nodes[0].address
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
        node: int = 0,
    ) -> Actor:
        assert node == 0, f"this process is node 0, got {node}"
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


class _RayActor:
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
        """`options`: those of Ray that place an actor on each node; `env`: variables of all actors.

        `fix`: what to do when a process of Ray has ended.
        """
        self.nodes = tuple(nodes)
        self.address = address
        self._ray = ray
        self._options = tuple(options)
        self._env = dict(env)
        self.survival_s = survival_s
        self._fix = fix
        self._actors: list[_RayActor] = []

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
        # `_Host` limits calls. Ray's own limit, which is 1,000 by default, must hold back none of them.
        options["max_concurrency"] = _RAY_CALLS + max_concurrency
        if variables := {**(env or {}), **self._env}:  # the user's own win
            options["runtime_env"] = {"env_vars": variables}
        remote = (
            ray.remote(_Host)
            .options(**options)
            .remote(cls, kwargs, name, max_concurrency, folder=os.getcwd())
        )
        where = self.nodes[node]
        label = f"actor {name!r} ({cls.__name__})" + ("" if where.is_here else f" on node {where.address}")
        actor = _RayActor(remote, ray=self._ray, label=label, node=node, is_here=where.is_here)
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


def _start_private(*, object_store_mb: int) -> RayLauncher:
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
