"""Do runs one after the other in this process: services and engines stay up over the runs that can share
them.

Policy, reference, optimizer and all that belongs to one run are built anew for each; the engines take over
the weights of its start, which is checked (`WeightPublisher.verify`). So a run does not depend on those
before it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path

from screen import Screen, Update

from comparison.handicaps import apply_handicap
from comparison.pace import measure_pace
from comparison.results import Result, make_result
from comparison.runs import RunSpec, prepare_world, shared_settings
from serving.processes import count_processor_seconds
from verl.errors import DataError
from verl.run.folder import scratch_folder, set_aside_run
from verl.run.records import EVALUATION, TRAJECTORIES
from verl.run.tracking import read_metrics
from verl.trainer.build import open_trainer
from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides, in_quotes
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import resolve_device
from verl.trainer.launch import Host, count_gpus, open_host
from verl.trainer.wiring import bind_agent
from verl.utils.supervise import Child, Supervisor, start_service
from verl.workers.checkpoint import CHECKPOINTS

_POLL_S = 5.0
_STOP_S = 40.0


class Runner:
    """Does runs; `aclose` ends the engines. The supervisor ends the services."""

    def __init__(self, supervisor: Supervisor, screen: Screen, *, folder: Path, keeps_episodes: bool) -> None:
        """Work in `folder`, which gets the run folders and the logs of the services.

        Run folders keep metrics, manifest and report; episodes and checkpoints only if asked.
        """
        self._supervisor = supervisor
        self._screen = screen
        self.folder = folder
        self._keeps_episodes = keeps_episodes
        self._services: dict[str, tuple[tuple[str, ...], Child, str]] = {}
        """By name: arguments, process, address."""
        self._stack: AsyncExitStack | None = None
        self._host: tuple[str, Host] | None = None

    async def run(self, run: RunSpec, *, title: str) -> Result:
        """Do a run from its start, return its result. Raises what ended it; the engines are then closed."""
        run_dir = self.folder / run.key
        if self._keeps_episodes and run_dir.exists():
            set_aside_run(run_dir)
        else:
            shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was killed: it begins again
        config = self._configure(run, run_dir)
        try:
            host = await self._open_host(config)
            pace_s = measure_pace()
            began, before = time.monotonic(), count_processor_seconds()
            with self._screen.phase(title, total=run.steps) as update, _quiet_opening():
                async with _watched(run_dir, update), open_trainer(config, host=host) as trainer:
                    _quiet_screen()
                    apply_handicap(trainer, run.method.handicap, seed=run.seed)
                    await trainer.fit()
                    processor_s = count_processor_seconds() - before  # while all processes are there
            wall_s = time.monotonic() - began
            pace_s = (pace_s + measure_pace()) / 2
        except BaseException:
            await self.aclose()
            raise
        result = make_result(run, run_dir, wall_s=wall_s, processor_s=processor_s, pace_s=pace_s)
        if not self._keeps_episodes:
            for name in (TRAJECTORIES, EVALUATION, CHECKPOINTS):
                shutil.rmtree(run_dir / name, ignore_errors=True)
        return result

    async def aclose(self) -> None:
        """End the engines."""
        self._host = None
        if self._stack is not None:
            stack, self._stack = self._stack, None
            await stack.aclose()

    def _configure(self, run: RunSpec, run_dir: Path) -> Config:
        """Start the services that the run needs; return its configuration."""
        world = prepare_world(run.world)
        search = self._start("retriever", "search_r1.search.retrieval_server", world.retriever_flags)
        overrides = [
            *run.overrides,
            f"retriever.url={search}/retrieve",
            f"trainer.default_local_dir={in_quotes(str(run_dir))}",
        ]
        if run.ig_flags:
            gains = self._start("IG service", "IG.service.IG_server", run.service_flags(world))
            overrides.append(f"reward.semantic.url={gains}")
        return compose_config(check_overrides(overrides))

    def _start(self, name: str, module: str, arguments: tuple[str, ...]) -> str:
        """Return the address of a service with these arguments; one with others ends."""
        if (running := self._services.get(name)) is not None:
            known, child, url = running
            if known == arguments and child.process.poll() is None:
                return url
            del self._services[name]
            child.process.terminate()
            try:
                child.process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
            self._supervisor.children.remove(child)
        with self._screen.phase(f"starting the {name}") as update:
            url = start_service(
                self._supervisor,
                f"the {name}",
                module=module,
                arguments=arguments,
                log=self.folder / f"{name.replace(' ', '_')}.log",
                update=update,
            )
        self._services[name] = (arguments, self._supervisor.children[-1], url)
        return url

    async def _open_host(self, config: Config) -> Host:
        """Return engines for the run: those that are there, if they are what it would start."""
        wanted = shared_settings(config)
        if self._host is not None and self._host[0] == wanted:
            return self._host[1]
        await self.aclose()
        device = resolve_device(config, num_gpus=count_gpus())
        stack = AsyncExitStack()
        self._stack = stack
        with self._screen.phase("starting the engines"), _stderr_in(self.folder / "engines.log"):
            host = await open_host(
                config,
                stack,
                device=device,
                scratch=stack.enter_context(scratch_folder(self.folder)),
                open_agent=bind_agent(
                    config, device=device, temperature=config.actor_rollout_ref.rollout.temperature
                ),
                trains=True,
            )
        self._host = wanted, host
        return host


@contextmanager
def _stderr_in(path: Path) -> Iterator[None]:
    """Let processes that the block starts write their errors to a file; they draw a bar for every update."""
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("ab") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _quiet_opening() -> Iterator[None]:
    """Log only errors in the block, until `_quiet_screen` lets the log file have all again."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def _quiet_screen() -> None:
    """Let the log file have all records, and the screen, the first handler, errors alone."""
    logging.disable(logging.NOTSET)
    logging.getLogger().handlers[0].setLevel(logging.ERROR)


@asynccontextmanager
async def _watched(run_dir: Path, update: Update) -> AsyncIterator[None]:
    """Show the newest step of a run while the block runs."""

    async def watch() -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with suppress(DataError, OSError):
                lines = [line for line in read_metrics(run_dir) if line["kind"] == "train"]
                if lines:
                    last = lines[-1]
                    em, seconds = last.get("reward/em_mean"), last.get("time/step_s") or 0.0
                    update(last["step"], f"em {'-' if em is None else f'{em:.3f}'}, {seconds:.1f} s per step")

    watching = asyncio.create_task(watch())
    try:
        yield
    finally:
        watching.cancel()
