"""The shell launchers, run with a python that writes down what it was asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl.trainer.config.loading import check_override_keys

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = ("train_grpo.sh", "retrieval_launch.sh", "IG_service_launch.sh")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launcher in a folder whose .venv/bin/python prints its arguments instead of training."""
    shutil.copy(ROOT / "train_grpo.sh", tmp_path)
    shutil.copytree(
        ROOT / "scripts", tmp_path / "scripts", ignore=shutil.ignore_patterns("world", "__pycache__")
    )
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        "#!/usr/bin/env bash\n"
        f'if [[ "$1" == */quickstart.py ]]; then exec {sys.executable} "$@"; fi\n'
        'printf "%s\\n" "$@"\n'
    )
    python.chmod(0o755)
    return tmp_path


def launch(tree: Path, *arguments: str, **variables: str) -> list[str]:
    clean = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        ["bash", str(tree / "train_grpo.sh"), *arguments],
        cwd=tree,
        env={**clean, "PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def overrides(printed: list[str]) -> dict[str, str]:
    assert printed[:2] == ["-m", "verl.trainer.main_ppo"]
    check_override_keys(printed[2:])
    return dict(argument.split("=", 1) for argument in printed[2:])


def test_without_arguments_it_trains_the_world_like_the_quickstart(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/quickstart.py"), "--print-overrides"],
        capture_output=True,
        text=True,
    )
    given = overrides(launch(tree, RECIPE="world"))
    for setting in done.stdout.split():
        key, value = setting.split("=", 1)
        assert given[key] == value
    assert "actor_rollout_ref.model.path" not in given


def test_what_the_caller_exports_wins_and_arguments_come_last(tree: Path) -> None:
    printed = launch(
        tree,
        "max_turns=4",
        "trainer.save_freq=10",
        BASE_MODEL="Qwen/Qwen2.5-7B",
        DATA_DIR="mine",
        IG_SERVICE_URL="http://10.0.0.5:310",
        IG_BATCH_SIZE="64",
        IG_TIMEOUT="33",
        RETRIEVER_URL="http://10.0.0.6:8000/retrieve",
        WANDB_PROJECT="p",
        EXPERIMENT_NAME="e",
        N_GPUS="4",
        TP_SIZE="2",
    )
    assert printed[-2:] == ["max_turns=4", "trainer.save_freq=10"]
    given = overrides(printed)
    assert given["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-7B"
    assert given["data.train_files"] == f"{tree}/mine/train.parquet"
    assert given["reward.semantic.url"] == "http://10.0.0.5:310"
    assert given["reward.semantic.batch_size"] == "64"
    assert given["reward.semantic.timeout_s"] == "33"
    assert given["retriever.url"] == "http://10.0.0.6:8000/retrieve"
    assert (given["trainer.project_name"], given["trainer.experiment_name"]) == ("p", "e")
    assert (given["trainer.n_gpus_per_node"], given["trainer.device"]) == ("4", "cuda")
    assert given["actor_rollout_ref.rollout.tensor_model_parallel_size"] == "2"


def test_the_gpu_recipe_is_the_published_one(tree: Path) -> None:
    given = overrides(launch(tree, RECIPE="gpu"))
    published = {
        "data.train_batch_size": "512",
        "actor_rollout_ref.rollout.n_agent": "3",
        "actor_rollout_ref.actor.optim.lr": "1e-6",
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": "0.285",
        "actor_rollout_ref.actor.kl_loss_coef": "0.001",
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "data.max_prompt_length": "4096",
        "data.max_start_length": "2048",
        "data.max_response_length": "500",
        "data.max_obs_length": "500",
        "max_turns": "2",
        "retriever.topk": "3",
        "reward.gain_weight": "0.6",
        "trainer.total_training_steps": "1005",
        "trainer.save_freq": "50",
        "trainer.test_freq": "20",
        "trainer.n_gpus_per_node": "8",
    }
    assert {key: given[key] for key in published} == published


def test_a_wrong_recipe_is_named() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "train_grpo.sh")],
        env={**os.environ, "RECIPE": "tpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "RECIPE must be world or gpu, got tpu" in done.stderr


def test_help_of_the_trainer_names_every_variable() -> None:
    script = (ROOT / "train_grpo.sh").read_text()
    done = subprocess.run(["bash", str(ROOT / "train_grpo.sh"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for name in (
        "BASE_MODEL",
        "DATA_DIR",
        "IG_SERVICE_URL",
        "IG_TIMEOUT",
        "IG_BATCH_SIZE",
        "RETRIEVER_URL",
        "N_GPUS",
    ):
        assert f"${{{name}:-" in script
        assert name in done.stdout


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_valid_bash_and_never_overwrite_an_export(name: str) -> None:
    script = ROOT / name
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    for variable, value in re.findall(r"^\s*export (\w+)=(.*)$", script.read_text(), flags=re.MULTILINE):
        assert f"${{{variable}" in value or f"${variable}" in value, f"{variable} is overwritten"
