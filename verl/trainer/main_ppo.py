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

from serving.logs import safe_text
from verl.errors import (
    ConfigError,
    DataError,
    RolloutError,
    ServiceError,
    TrainingHaltedError,
    WeightSyncError,
)
from verl.trainer.config.loading import first_line, load_config, register_schema
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import Config
from verl.utils.actors import ActorError

USER_ERRORS = (
    ActorError,
    ConfigError,
    DataError,
    RolloutError,
    ServiceError,
    TrainingHaltedError,
    WeightSyncError,
)


async def train(config: Config) -> None:
    """Build everything, train, and take everything down again, also when interrupted."""
    from verl.trainer.build import open_trainer  # takes seconds: only once the arguments are right

    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    async with open_trainer(config) as trainer:
        await trainer.fit()


@hydra.main(version_base=None, config_path="config", config_name="ppo_trainer")
def run(raw: DictConfig) -> None:
    """What a user can mend becomes one message and exit code 1; anything else is a bug with its traceback."""
    try:
        asyncio.run(train(load_config(raw)))
    except USER_ERRORS as error:
        sys.exit(f"error: {safe_text(str(error))}")
    except (KeyboardInterrupt, asyncio.CancelledError):
        sys.exit(130)


def main() -> None:
    os.environ["HYDRA_FULL_ERROR"] = "1"  # or Hydra prints several lines of its own and exits
    register_schema()
    try:
        sys.argv[1:] = check_overrides(sys.argv[1:])
        run()
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        text = str(error) if isinstance(error, ConfigError) else first_line(error)
        sys.exit(f"error: {safe_text(text)}")


if __name__ == "__main__":
    main()
