"""Train a search agent: `python -m verl.trainer.main_ppo [key=value ...]` (config/ppo_trainer.yaml)."""

from __future__ import annotations

from verl.trainer.command import run_command
from verl.trainer.config.schema import Config
from verl.trainer.plan.command import show_plan


async def train(config: Config) -> None:
    """Build the trainer, train, and take it down, also after an interrupt; or print the plan alone."""
    if config.plan:
        show_plan(config)
        return
    from verl.trainer.build import open_trainer  # takes seconds, so only after the arguments are checked

    async with open_trainer(config) as trainer:
        await trainer.fit()


if __name__ == "__main__":
    run_command(train)
