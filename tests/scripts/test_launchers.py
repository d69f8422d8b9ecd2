"""The shell launchers, run with a python that writes down what it was asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser

from verl.trainer.config.loading import load_config, register_schema
from verl.trainer.config.overrides import check_overrides

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = (
    "train_grpo.sh",
    "retrieval_launch.sh",
    "IG_service_launch.sh",
    "search_r1/search/build_index.sh",
    "scripts/install.sh",
)
DIFFICULT = "é (1),[x]=~'&张"
FAKE_PYTHON = f"""#!/usr/bin/env bash
if [[ "$1" == */quickstart.py ]]; then exec {sys.executable} "$@"; fi
env > "$0.env"
printf "%s\\n" "$@"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launcher in a folder whose .venv/bin/python prints its arguments instead of training."""
    root = tmp_path / DIFFICULT
    root.mkdir()
    shutil.copy(ROOT / "train_grpo.sh", root)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("world", "__pycache__"))
    write_program(root / ".venv/bin/python", FAKE_PYTHON)
    return root


def write_program(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(code)
    path.chmod(0o755)


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


def environment(tree: Path) -> set[str]:
    """Variables of the last launch, as NAME=VALUE."""
    return set((tree / ".venv/bin/python.env").read_text().splitlines())


def overrides(printed: list[str]) -> dict[str, object]:
    """What Hydra understands of it."""
    assert printed[:3] == ["-P", "-m", "verl.trainer.main_ppo"]
    check_overrides(printed[3:])
    parsed = OverridesParser.create().parse_overrides(printed[3:])
    return {override.key_or_group: override.value() for override in parsed}


def test_without_arguments_it_trains_the_world_like_the_quickstart(tree: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/quickstart.py"), "--print-overrides"],
        capture_output=True,
        text=True,
    )
    printed = launch(tree, RECIPE="world")
    given = overrides(printed)
    assert given.pop("trainer.experiment_name") == "world"
    assert set(done.stdout.split()) <= set(printed)
    assert "actor_rollout_ref.model.path" not in given


def test_what_the_caller_exports_wins_and_arguments_come_last(tree: Path) -> None:
    printed = launch(
        tree,
        "max_turns=4",
        "trainer.save_freq=10",
        BASE_MODEL="Qwen/Qwen2.5-7B",
        DATA_DIR=f"{DIFFICULT}\\",
        IG_BATCH_SIZE="64",
        EXPERIMENT_NAME="it's [3]",
        N_GPUS="4",
        TP_SIZE="2",
    )
    assert printed[-2:] == ["max_turns=4", "trainer.save_freq=10"]
    given = overrides(printed)
    assert given["actor_rollout_ref.model.path"] == "Qwen/Qwen2.5-7B"
    assert given["data.train_files"] == f"{tree}/{DIFFICULT}\\/train.parquet"
    assert given["trainer.experiment_name"] == "it's [3]"
    # What the trainer reads from the environment by itself, with the recipe's defaults.
    assert {"IG_BATCH_SIZE=64", "IG_TIMEOUT=120"} <= environment(tree)
    assert (given["trainer.n_gpus_per_node"], given["trainer.device"]) == (4, "cuda")
    assert given["actor_rollout_ref.rollout.tensor_model_parallel_size"] == 2


def test_a_home_in_variables_is_expanded(tree: Path) -> None:
    given = overrides(launch(tree, RECIPE="gpu", HOME="/home/me", DATA_DIR="~/data", BASE_MODEL="~/models/m"))
    assert given["data.train_files"] == "/home/me/data/train.parquet"
    assert given["actor_rollout_ref.model.path"] == "/home/me/models/m"
    assert overrides(launch(tree, BASE_MODEL="~other/m"))["actor_rollout_ref.model.path"] == "~other/m"


def test_the_gpu_recipe_is_the_published_one(tree: Path) -> None:
    printed = launch(tree, RECIPE="gpu")
    given = overrides(printed)
    published = {
        "data.train_batch_size": 512,
        "actor_rollout_ref.rollout.n_agent": 3,
        "actor_rollout_ref.actor.optim.lr": 1e-6,
        "actor_rollout_ref.actor.ppo_mini_batch_size": 64,
        "actor_rollout_ref.actor.clip_ratio_low": 0.2,
        "actor_rollout_ref.actor.clip_ratio_high": 0.2,
        "actor_rollout_ref.actor.use_kl_loss": True,
        "actor_rollout_ref.rollout.temperature": 1.0,
        "actor_rollout_ref.rollout.tensor_model_parallel_size": 4,
        "actor_rollout_ref.rollout.gpu_memory_utilization": 0.5,
        "actor_rollout_ref.actor.entropy_coeff": 0.001,
        "trainer.val_before_train": False,
        "reward.answer_rule": "published",
        "actor_rollout_ref.actor.optim.lr_warmup_steps_ratio": 0.285,
        "actor_rollout_ref.actor.kl_loss_coef": 0.001,
        "actor_rollout_ref.actor.kl_loss_type": "low_var_kl",
        "data.max_prompt_length": 4096,
        "data.max_start_length": 2048,
        "data.max_response_length": 500,
        "data.max_obs_length": 500,
        "max_turns": 2,
        "retriever.topk": 3,
        "reward.gain_weight": 0.6,
        "trainer.total_training_steps": 1005,
        "trainer.save_freq": 50,
        "trainer.test_freq": 20,
        "trainer.n_gpus_per_node": 8,
    }
    assert {key: given[key] for key in published} == published
    assert {"IG_BATCH_SIZE=512", "IG_TIMEOUT=120"} <= environment(tree)
    register_schema()
    with initialize_config_module("verl.trainer.config", version_base=None):
        load_config(compose("ppo_trainer", overrides=printed[3:]))


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
    assert set(re.findall(r"\$\{([A-Z_]+):-", script)) <= set(re.findall(r"\w+", done.stdout))
    configuration = (ROOT / "verl/trainer/config/ppo_trainer.yaml").read_text()
    read = {
        name for names in re.findall(r": \$\{env:([A-Z_,]+),", configuration) for name in names.split(",")
    }
    assert {"RETRIEVER_URL", "WANDB_PROJECT", "WAND_PROJECT"} <= read <= set(re.findall(r"\w+", done.stdout))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launchers_are_valid_bash_and_never_overwrite_an_export(name: str) -> None:
    script = ROOT / name
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    assert script.stat().st_mode & 0o111 == 0o111
    for variable, value in re.findall(r"^\s*export (\w+)=(.*)$", script.read_text(), flags=re.MULTILINE):
        assert f"${{{variable}" in value or f"${variable}" in value, f"{variable} is overwritten"


def pick_python(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", 'root="$1"; source "$root/scripts/python.sh"; echo "$python"', "bash", str(root)],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )


def test_an_active_environment_wins_over_the_one_here(tree: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write_program(mine / "bin/python", FAKE_PYTHON)
    assert pick_python(tree).stdout == f"{tree}/.venv/bin/python\n"
    assert pick_python(tree, VIRTUAL_ENV=str(mine)).stdout == f"{mine}/bin/python\n"
    conda = {"CONDA_PREFIX": str(mine), "CONDA_DEFAULT_ENV": "mine"}
    assert pick_python(tree, **conda).stdout == f"{mine}/bin/python\n"
    assert pick_python(tree, **{**conda, "CONDA_DEFAULT_ENV": "base"}).stdout == f"{tree}/.venv/bin/python\n"


def test_an_environment_without_our_packages_is_told_how_to_get_them(tree: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    write_program(bare / "bin/python", f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')
    done = pick_python(tree, VIRTUAL_ENV=str(bare))
    assert done.returncode == 1
    assert "lacks omegaconf, uvicorn" in done.stderr
    assert f"{bare}/bin/python cannot run this" in done.stderr
    assert "make venv" in done.stderr


def test_folders_of_the_caller_do_not_shadow_ours(tmp_path: Path) -> None:
    for name in ("search_r1", "IG", "verl", "omegaconf"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the wrong package')")
    for launcher in ("retrieval_launch.sh", "IG_service_launch.sh"):
        done = subprocess.run(
            ["bash", str(ROOT / launcher), "--help"], cwd=tmp_path, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert "--port" in done.stdout


def test_an_environment_of_another_platform_is_not_mixed(tree: Path) -> None:
    shutil.copytree(ROOT / "requirements", tree / "requirements")
    (tree / ".venv/.installed-cpu").touch()
    done = subprocess.run(
        ["bash", str(tree / "scripts/install.sh"), "gpu"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert ".venv holds the cpu packages: remove it (rm -rf .venv)" in done.stderr
