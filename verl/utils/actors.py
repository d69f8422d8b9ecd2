"""Run a class in this process or as a Ray actor, with the same calls.

Either way the object lives in an `ActorHost`, which builds it and runs its sync methods on threads of its
own, by default on one: one call at a time, and the event loop stays free. Coroutines run on the event loop
beside them, by default also one at a time: what such an actor does in the background is a coroutine.

    launcher = make_launcher("ray")
    policy = launcher.launch(PolicyWorker, kwargs={"rank": 0}, name="policy-0")
    await policy.call("update", batch)      # a failed constructor shows here, too
    launcher.shutdown()
"""

from __future__ import annotations

import asyncio
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from verl.errors import UserError


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

    def gpu_environment(self, indices: range) -> dict[str, str]:
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

    def start_ray() -> Launcher:
        from verl.utils.ray_actors import start_private  # which imports this module

        return start_private(object_store_mb=object_store_mb)

    starts: dict[str, Callable[[], Launcher]] = {"local": LocalLauncher, "ray": start_ray}
    return starts[kind]()


class ActorHost:
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

    def __init__(self, host: ActorHost, name: str) -> None:
        self._host: ActorHost | None = host
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
        actor = _LocalActor(ActorHost(cls, kwargs, name, max_concurrency), name)
        self._actors.append(actor)
        return actor

    async def watch(self) -> None:
        await asyncio.Event().wait()  # this process is the only one

    def shutdown(self) -> None:
        for actor in self._actors:
            actor.kill()
        self._actors.clear()
