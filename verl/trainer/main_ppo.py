"""Train a search agent: `python -m verl.trainer.main_ppo [key=value ...]` (config/ppo_trainer.yaml)."""

from __future__ import annotations

import asyncio
import signal
import sys

import hydra
from omegaconf import DictConfig

from serving.logs import safe_text
from verl.errors import (
    ConfigError,
    DataError,
    RolloutError,
    ServiceError,
    TrainingHaltedError,
    WeightSyncError,
)
from verl.trainer.build import open_trainer
from verl.trainer.config.loading import check_override_keys, load_config, register_schema
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
    try:
        check_override_keys(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {safe_text(str(error))}")
    register_schema()
    run()


if __name__ == "__main__":
    main()
