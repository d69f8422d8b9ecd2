"""What the entry points share: read the configuration, run one coroutine with it, end with one line."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl.errors import ConfigError
from verl.trainer.config.loading import first_line, load_config, register_schema
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import Config
from verl.utils.entry import error_line
from verl.utils.shutdown import cancel_by_signals


def run_command(
    work: Callable[[Config], Awaitable[None]],
    *,
    complete: Callable[[Sequence[str]], Sequence[str]] = tuple,
) -> None:
    """Run `work` with the configuration of the command line; exit code 130 after an interrupt.

    `complete` adds to the arguments what they imply. A user's error ends as one line, before `work` starts
    or while it runs.
    """

    @hydra.main(version_base=None, config_path="config", config_name="ppo_trainer")
    def run(raw: DictConfig) -> None:
        with error_line():
            try:
                asyncio.run(_run(work, load_config(raw)))
            except asyncio.CancelledError:  # by a signal
                sys.exit(130)

    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints several lines and exits
    register_schema()
    with error_line():
        sys.argv[1:] = check_overrides(complete(sys.argv[1:]))
        try:
            run()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(first_line(error)) from error


async def _run(work: Callable[[Config], Awaitable[None]], config: Config) -> None:
    cancel_by_signals()
    await work(config)
