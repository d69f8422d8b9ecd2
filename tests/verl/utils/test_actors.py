from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from verl.utils.actors import ActorError, Launcher, make_launcher
from verl.utils.ray_actors import RayActor, keep_sigterm_handler


class Counter:
    """Counts, fails and dies on request."""

    def __init__(self, *, start: int) -> None:
        if start < 0:
            raise ValueError(f"start must be at least 0, got {start}")
        self.value = start
        self.active = 0
        self.most = 0

    def add(self, amount: int, *, twice: bool = False) -> int:
        self.value += amount * (2 if twice else 1)
        return self.value

    async def add_later(self, amount: int) -> int:
        await asyncio.sleep(0.01)
        return self.add(amount)

    async def wait_for_cancel(self) -> None:
        self.value = 1
        try:
            await asyncio.Event().wait()
        finally:
            self.value = 2

    def overlap(self, expected: int) -> int:
        """Wait until so many calls run at once. Return the largest number so far."""
        self.active += 1
        while self.most < expected:
            self.most = max(self.most, self.active)
            time.sleep(0.001)
        time.sleep(0.05)  # for calls beyond the limit
        self.most = max(self.most, self.active)
        self.active -= 1
        return self.most

    def wait_for(self, value: int) -> None:
        while self.value < value:
            time.sleep(0.001)

    def read_env(self, key: str) -> str | None:
        return os.environ.get(key)

    def die(self) -> None:
        sys.stderr.write("out of memory\n")
        sys.stderr.flush()
        os._exit(3)


@pytest.fixture(scope="module")
def local() -> Iterator[Launcher]:
    launcher = make_launcher("local")
    yield launcher
    launcher.shutdown()


def test_an_unknown_launcher_starts_nothing() -> None:
    with pytest.raises(KeyError, match="Ray"):
        make_launcher("Ray")


def on_sigterm(number: int, frame: FrameType | None) -> None:
    """A handler of the test process."""


@pytest.fixture(scope="module")
def ray() -> Iterator[Launcher]:
    before = signal.signal(signal.SIGTERM, on_sigterm)
    launcher = make_launcher("ray", object_store_mb=80)
    yield launcher
    launcher.shutdown()
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def launcher(request: pytest.FixtureRequest) -> Launcher:
    launcher: Launcher = request.getfixturevalue(request.param)
    return launcher


async def test_methods_share_one_object_and_environment_and_raise_their_own_errors(
    launcher: Launcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COUNTER_MODE", raising=False)
    actor = launcher.launch(Counter, kwargs={"start": 1}, name="counter-a", env={"COUNTER_MODE": "fast"})
    assert await actor.call("add", 2, twice=True) == 5
    with pytest.raises(TypeError):
        await actor.call("add", "x")
    assert await actor.call("add_later", 1) == 6
    assert await actor.call("read_env", "COUNTER_MODE") == "fast"
    broken = launcher.launch(Counter, kwargs={"start": -1}, name="counter-c")
    with pytest.raises(ValueError, match="at least 0, got -1"):
        await broken.call("add", 1)


@pytest.mark.parametrize("limit", [1, 2])
async def test_calls_overlap_only_up_to_the_limit(launcher: Launcher, limit: int) -> None:
    actor = launcher.launch(Counter, kwargs={"start": 0}, name=f"limit-{limit}", max_concurrency=limit)
    overlaps = await asyncio.gather(*(actor.call("overlap", limit) for _ in range(4)))
    assert max(overlaps) == limit


async def test_a_coroutine_runs_beside_a_sync_method(launcher: Launcher) -> None:
    """Neither the event loop nor the thread of sync methods waits for the other."""
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter-d")
    waiting = asyncio.ensure_future(actor.call("wait_for", 1))
    assert await actor.call("add_later", 1) == 1
    await waiting


async def test_cancelling_a_call_cancels_its_coroutine(launcher: Launcher) -> None:
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter-e", max_concurrency=2)
    waiting = asyncio.ensure_future(actor.call("wait_for_cancel"))
    await actor.call("wait_for", 1)
    waiting.cancel()
    await actor.call("wait_for", 2)
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_sync_call_that_is_cancelled_before_its_turn_runs_all_the_same(launcher: Launcher) -> None:
    """Else some ranks would take part in a collective without the others."""
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter-h")
    first = asyncio.ensure_future(actor.call("wait_for", 1))
    cancelled = asyncio.ensure_future(actor.call("add", 10))
    await actor.call("add_later", 0)  # the others have arrived before
    cancelled.cancel()
    await actor.call("add_later", 0)
    await actor.call("add_later", 1)
    await first
    assert await actor.call("add", 0) == 11


async def test_a_call_of_a_killed_actor_names_it(launcher: Launcher) -> None:
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter-f")
    await actor.call("add", 1)
    actor.kill()
    actor.kill()
    with pytest.raises(ActorError, match="counter-f"):
        await actor.call("add", 1)


@pytest.mark.slow
async def test_the_error_of_an_ended_ray_actor_names_it_and_quotes_its_stderr(ray: Launcher) -> None:
    actor = ray.launch(Counter, kwargs={"start": 0}, name="policy-0")
    await actor.call("add", 1)
    with pytest.raises(ActorError, match=r"(?s)'policy-0' \(Counter\) died.*out of memory"):
        await actor.call("die")


class StarvedActor:
    """Stands for an actor of Ray whose machine has run out of memory."""

    def __init__(self) -> None:
        self.pid = self.call = self

    async def remote(self, *_: object) -> object:
        from ray.exceptions import OutOfMemoryError  # later: another test is about the first import of Ray

        raise OutOfMemoryError(
            "1 worker(s) were killed: 22.49GB used / 23.54GB limit\n  OOM kill reason: ..."
        )


async def test_an_actor_that_ray_ends_for_want_of_memory_says_what_to_do() -> None:
    nothing: Any = None
    actor = RayActor(StarvedActor(), ray=nothing, label="actor 'policy-0'", node=0, is_here=True)
    with pytest.raises(ActorError) as caught:
        await actor.call("update")
    assert str(caught.value) == (
        "Ray ended actor 'policy-0' in 'update', because its machine has too little memory: 1 worker(s) were "
        "killed: 22.49GB used / 23.54GB limit; end other programs there, and repeat the command to resume"
    )


@pytest.mark.slow
@pytest.mark.usefixtures("ray")
def test_ray_leaves_sigterm_alone_and_is_started_once() -> None:
    assert signal.getsignal(signal.SIGTERM) is on_sigterm
    with pytest.raises(ActorError, match="already runs"):
        make_launcher("ray")
    assert signal.getsignal(signal.SIGTERM) is on_sigterm


def test_a_sigterm_handler_is_put_back_also_after_a_failure() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with contextlib.suppress(OSError), keep_sigterm_handler():
        signal.signal(signal.SIGTERM, on_sigterm)
        raise OSError("no cluster")
    assert signal.getsignal(signal.SIGTERM) is before
    with ThreadPoolExecutor() as executor:
        executor.submit(_enter, keep_sigterm_handler).result()


def _enter(context: Callable[[], AbstractContextManager[None]]) -> None:
    with context():
        pass


@pytest.mark.slow
def test_ray_leaves_nothing_behind_when_its_owner_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "owner.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, time
            from tests.verl.utils.test_actors import Counter
            from verl.utils.actors import make_launcher
            launcher = make_launcher("ray")
            actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter")
            asyncio.run(actor.call("add", 1))
            print(launcher._ray.folder, flush=True)
            time.sleep(600)
            """
        )
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=env) as owner:
        assert owner.stdout is not None
        folder = owner.stdout.readline().strip()
        assert Path(folder).is_dir()
        children = psutil.Process(owner.pid).children(recursive=True)
        assert len(children) >= 3
        owner.send_signal(signal.SIGKILL)
    psutil.wait_procs(children)
    assert not Path(folder).exists()


_LOSE_PROCESS = """
import asyncio, sys
import psutil
from tests.verl.utils.test_actors import Counter
from verl.utils.actors import ActorError, make_launcher

async def main():
    launcher = make_launcher("ray", object_store_mb=80)
    actor = launcher.launch(Counter, kwargs={"start": 0}, name="counter")
    await actor.call("add", 1)
    next(child for child in psutil.Process().children() if child.name() == sys.argv[1]).kill()
    try:
        await launcher.watch()
    except ActorError as error:
        print(error)
    print("the actor holds", await actor.call("add", 1))
    launcher.shutdown()
    print("folder:", launcher._ray.folder.exists(), "children:", len(psutil.Process().children()))

asyncio.run(main())
sys.exit("error: last line")
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_a_lost_process_of_ray_is_reported_while_actors_can_still_save(name: str) -> None:
    # Without a parent, as after nohup and in containers: Ray then takes every failed write for its end.
    ended = subprocess.run(
        ["sh", "-c", '"$@" &', "sh", sys.executable, "-c", _LOSE_PROCESS, name],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        check=False,
    )
    lines = ended.stdout.splitlines()  # Ray's own among them
    assert any(line.startswith(f"Ray's {name} ended") for line in lines), ended.stderr
    assert "the actor holds 2" in lines
    assert lines[-1] == "folder: False children: 0"
    assert ended.stderr.splitlines()[-1] == "error: last line"
