"""Train a search agent: `python -m verl.trainer.main_ppo [key=value ...]` (config/ppo_trainer.yaml)."""

from __future__ import annotations

import asyncio
import os
import signal
import sys

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from verl.errors import ConfigError
from verl.trainer.config.loading import first_line, load_config, register_schema
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import Config
from verl.utils.entry import error_line


async def train(config: Config) -> None:
    """Build the trainer, train, and take it down, also after an interrupt."""
    from verl.trainer.build import open_trainer  # takes seconds, so only after the arguments are checked

    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    async with open_trainer(config) as trainer:
        await trainer.fit()


@hydra.main(version_base=None, config_path="config", config_name="ppo_trainer")
def run(raw: DictConfig) -> None:
    """Train; exit code 130 after an interrupt."""
    try:
        with error_line():
            asyncio.run(train(load_config(raw)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


def main() -> None:
    """Check the arguments and train; a user's error ends as one line."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # without it Hydra prints several lines and exits
    register_schema()
    with error_line():
        sys.argv[1:] = check_overrides(sys.argv[1:])
        try:
            run()
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigError(first_line(error)) from error


if __name__ == "__main__":
    main()
