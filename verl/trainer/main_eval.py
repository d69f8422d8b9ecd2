"""Evaluate a model: `python -m verl.trainer.main_eval [--protocol NAME] [key=value ...]`.

It answers the questions of data.val_files with the model at actor_rollout_ref.model.path, by the agent,
formats, tools and metrics of the training; its own settings are the section `evaluation` of
config/ppo_trainer.yaml. `--protocol NAME` is `evaluation.protocol=NAME`. The last line of stdout is JSON.
"""

from __future__ import annotations

import json

from verl.evaluation.protocol_check import add_protocol_settings
from verl.trainer.command import run_command
from verl.trainer.config.schema import Config


async def evaluate(config: Config) -> None:
    """Evaluate, and print the summary as the last line."""
    from verl.trainer.evaluate import evaluate_model  # takes seconds, so only after the arguments are checked

    summary = await evaluate_model(config)
    print(json.dumps(summary), flush=True)  # noqa: T201 (for the program that started this one)


if __name__ == "__main__":
    run_command(evaluate, complete=add_protocol_settings)
