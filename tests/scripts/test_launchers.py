"""The shell launchers, run with a python that only records its arguments and environment."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import Config

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = (
    "train_grpo.sh",
    "evaluate.sh",
    "retrieval_launch.sh",
    "IG_service_launch.sh",
    "search_r1/search/build_index.sh",
    "scripts/install.sh",
)
DIFFICULT = "é (1),[x]=~'&张"
FAKE_PYTHON = """#!/usr/bin/env bash
env > "$0.env"
printf "%s\\n" "$@"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The launchers in a folder whose .venv/bin/python prints its arguments instead of training."""
    root = tmp_path / DIFFICULT
    root.mkdir()
    for script in ("train_grpo.sh", "evaluate.sh"):
        shutil.copy(ROOT / script, root)
    shutil.copytree(ROOT / "scripts", root / "scripts", ignore=shutil.ignore_patterns("world", "__pycache__"))
    write_program(root / ".venv/bin/python", FAKE_PYTHON)
    return root


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("BASE_MODEL", "DATA_DIR", "EXPERIMENT_NAME", "N_GPUS", "TP_SIZE", "IG_BATCH_SIZE"):
        monkeypatch.delenv(name, raising=False)


def write_program(path: Path, code: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(code)
    path.chmod(0o755)


def start(script: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    return subprocess.run(
        ["bash", str(script), *arguments],
        cwd=script.parent,
        env={**clean, "PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )


def launch(tree: Path, *arguments: str, script: str = "train_grpo.sh", **variables: str) -> list[str]:
    done = start(tree / script, *arguments, **variables)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def environment(tree: Path) -> set[str]:
    """Variables of the last launch, as NAME=VALUE."""
    return set((tree / ".venv/bin/python.env").read_text().splitlines())


def composed(*arguments: str) -> Config:
    """The configuration that the trainer gets from these arguments."""
    return compose_config(check_overrides(arguments))


def test_without_arguments_it_trains_the_world_like_the_quickstart(tree: Path) -> None:
    assert launch(tree, RECIPE="world") == ["-P", "-m", "verl.trainer.main_ppo", "recipe=world"]
    world, quickstart = composed("recipe=world"), composed("recipe=quickstart")
    assert world.trainer.experiment_name == "world"
    world.trainer.experiment_name = "quickstart"
    world.trainer.default_local_dir = quickstart.trainer.default_local_dir
    assert asdict(world) == asdict(quickstart)  # the schema is a class of its own for every call


def test_a_bare_word_is_a_method_unless_it_is_the_value_of_a_flag(tree: Path) -> None:
    printed = launch(tree, "igpo", "--cfg", "job", "-p", "trainer", "max_turns=4", RECIPE="world")
    assert printed[4:] == ["algorithm=igpo", "--cfg", "job", "-p", "trainer", "max_turns=4"]


def test_what_the_caller_exports_reaches_the_recipe_and_arguments_come_last(
    tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {
        "BASE_MODEL": "Qwen/Qwen2.5-7B",
        "DATA_DIR": f"{DIFFICULT}\\",
        "IG_BATCH_SIZE": "64",
        "EXPERIMENT_NAME": "it's [3]",
        "N_GPUS": "4",
        "TP_SIZE": "2",
    }
    printed = launch(tree, "max_turns=4", "trainer.save_freq=10", **given)
    assert printed[3:] == ["recipe=gpu_4", "max_turns=4", "trainer.save_freq=10"]
    assert f"DATA_DIR={tree}/{DIFFICULT}\\" in environment(tree)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    config = composed(*printed[3:])
    assert config.actor_rollout_ref.model.path == "Qwen/Qwen2.5-7B"
    assert config.data.train_paths == (f"{DIFFICULT}\\/train.parquet",)
    assert config.trainer.experiment_name == "it's [3]"
    assert (config.reward.semantic.batch_size, config.trainer.n_gpus_per_node) == (64, 4)
    assert config.actor_rollout_ref.rollout.tensor_model_parallel_size == 2
    assert (config.max_turns, config.trainer.save_freq) == (4, 10)
    assert config.trajectories_per_step == 512 * 3  # as published


@pytest.mark.parametrize(
    ("gpus", "variables", "recipe", "num_gpus"),
    [
        (8, {}, "world", 8),
        (1, {"BASE_MODEL": "m"}, "gpu_1", 1),
        (3, {"BASE_MODEL": "m"}, "gpu_2", 3),
        (8, {"DATA_DIR": "d"}, "gpu", 8),
        (8, {"DATA_DIR": "d", "CUDA_VISIBLE_DEVICES": "2,GPU-1,5,6"}, "gpu_4", 4),
        (8, {"DATA_DIR": "d", "CUDA_VISIBLE_DEVICES": ""}, "gpu", None),
        (8, {"DATA_DIR": "d", "CUDA_VISIBLE_DEVICES": "-1"}, "gpu", None),
        (8, {"DATA_DIR": "d", "N_GPUS": "2"}, "gpu_2", 2),
        (4, {"RECIPE": "gpu"}, "gpu", 4),
        (8, {"RECIPE": "gpu_2"}, "gpu_2", None),
        (None, {"BASE_MODEL": "m"}, "gpu", None),
    ],
)
def test_a_gpu_recipe_is_taken_on_request_alone(
    tree: Path, gpus: int | None, variables: dict[str, str], recipe: str, num_gpus: int | None
) -> None:
    """By the variables and the visible GPUs, which are also those that are trained on."""
    if gpus is not None:
        listing = "\n".join(f"GPU {k}: NVIDIA H100 (UUID: GPU-{k})" for k in range(gpus))
        write_program(tree / "bin/nvidia-smi", f"#!/bin/sh\necho '{listing}'\n")
        variables = {"PATH": f"{tree}/bin:/usr/bin:/bin", **variables}
    assert launch(tree, **variables)[3:] == [f"recipe={recipe}"]
    found = [line for line in environment(tree) if line.startswith("N_GPUS=")]
    assert found == ([] if num_gpus is None else [f"N_GPUS={num_gpus}"])


def test_recipes_of_the_command_line_win_and_homes_in_variables_are_expanded(tree: Path) -> None:
    assert launch(tree, "recipe=quickstart", RECIPE="gpu")[3:] == ["recipe=quickstart"]
    launch(tree, HOME="/home/me", DATA_DIR="~/data", BASE_MODEL="~/models/m")
    assert {"DATA_DIR=/home/me/data", "BASE_MODEL=/home/me/models/m"} <= environment(tree)
    launch(tree, BASE_MODEL="~other/m")
    assert "BASE_MODEL=~other/m" in environment(tree)


def test_variables_of_the_evaluation_reach_its_settings_and_arguments_come_last(tree: Path) -> None:
    (tree / "my model").mkdir()
    printed = launch(
        tree,
        "max_turns=5",
        script="evaluate.sh",
        HOME="/home/me",
        MODEL_PATH="my model",
        TEST_FILES="a1.parquet,~/b=2.parquet",
        OUTPUT_DIR='o "1", é',
        EVAL_LOG_PATH="/logs/e.log",
        MAX_TURNS="010",
    )
    assert printed[:4] == ["-P", "-m", "verl.trainer.main_eval", "recipe=world"]
    assert printed[-2:] == ["max_turns=9", "max_turns=5"]
    config = composed(*printed[3:])
    assert config.actor_rollout_ref.model.path == f"{tree}/my model"
    assert config.data.val_paths == (f"{tree}/a1.parquet", "/home/me/b=2.parquet")
    assert config.evaluation.output_dir == f'{tree}/o "1", é'
    assert config.evaluation.log_file == "/logs/e.log"
    assert config.max_turns == 5
    hub = launch(tree, "recipe=gpu", script="evaluate.sh", MODEL_PATH="Qwen/Qwen2.5-3B")
    assert composed(*hub[3:]).actor_rollout_ref.model.path == "Qwen/Qwen2.5-3B"


@pytest.mark.parametrize("turns", ["1", "ten", "-3"])
def test_too_few_turns_are_refused_by_name(tree: Path, turns: str) -> None:
    done = start(tree / "evaluate.sh", MAX_TURNS=turns)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: MAX_TURNS must be a whole number of at least 2")


def test_help_of_the_evaluation_names_every_variable() -> None:
    done = start(ROOT / "evaluate.sh", "--help")
    variables = set(re.findall(r"\$\{([A-Z_]+):-", (ROOT / "evaluate.sh").read_text()))
    assert {"MODEL_PATH", "TEST_FILES", "OUTPUT_DIR", "EVAL_LOG_PATH", "MAX_TURNS"} <= variables
    assert variables <= set(re.findall(r"\w+", done.stdout))


def test_help_of_the_trainer_names_every_variable() -> None:
    script = (ROOT / "train_grpo.sh").read_text()
    done = subprocess.run(["bash", str(ROOT / "train_grpo.sh"), "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert set(re.findall(r"\$\{([A-Z_]+):-", script)) <= set(re.findall(r"\w+", done.stdout))
    configuration = "".join(path.read_text() for path in (ROOT / "verl/trainer/config").glob("**/*.yaml"))
    read = {
        name for names in re.findall(r": \$\{env:([A-Z_,]+),", configuration) for name in names.split(",")
    }
    assert {"RETRIEVER_URL", "WANDB_PROJECT", "WAND_PROJECT"} <= read <= set(re.findall(r"\w+", done.stdout))


def test_launchers_are_valid_bash_and_never_overwrite_an_export() -> None:
    for script in (ROOT / name for name in LAUNCHERS):
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        assert script.stat().st_mode & 0o111 == 0o111
        exports = re.findall(r"^\s*export (\w+)=(.*)$", script.read_text(), flags=re.MULTILINE)
        assert not [name for name, value in exports if f"${{{name}" not in value and f"${name}" not in value]


def pick_python(root: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-euc", 'root="$1"; source "$root/scripts/python.sh"; echo "$python"', "bash", str(root)],
        env={"PATH": "/usr/bin:/bin", **variables},
        capture_output=True,
        text=True,
    )


def test_an_active_environment_wins_and_one_without_our_packages_is_named(tree: Path, tmp_path: Path) -> None:
    mine, bare = tmp_path / "mine", tmp_path / "bare"
    write_program(mine / "bin/python", FAKE_PYTHON)
    assert pick_python(tree).stdout == f"{tree}/.venv/bin/python\n"
    assert pick_python(tree, VIRTUAL_ENV=str(mine)).stdout == f"{mine}/bin/python\n"
    conda = {"CONDA_PREFIX": str(mine), "CONDA_DEFAULT_ENV": "mine"}
    assert pick_python(tree, **conda).stdout == f"{mine}/bin/python\n"
    assert pick_python(tree, **{**conda, "CONDA_DEFAULT_ENV": "base"}).stdout == f"{tree}/.venv/bin/python\n"
    write_program(bare / "bin/python", f'#!/usr/bin/env bash\nexec {sys.executable} -S "$@"\n')
    done = pick_python(tree, VIRTUAL_ENV=str(bare))
    assert done.returncode == 1
    for part in ("lacks omegaconf, uvicorn", f"{bare}/bin/python cannot run this", "make venv"):
        assert part in done.stderr


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


FAKE_PIP = """#!/usr/bin/env bash
# What the script asks of Python: pip over a registry and an index that hold torch for $REGISTRY and $INDEX.
folder="$(dirname "$0")"
torch() {
    [[ "$1" != none ]] || { echo "no matching distribution" >&2; exit 1; }
    [[ "$1" == cpu ]] && cuda=None || cuda="'13.0'"
    mkdir -p "$folder/torch"
    echo "cuda = $cuda" >"$folder/torch/version.py"
    touch "$folder/torch/__init__.py"
}
case "$*" in
*"pip "*"uninstall"*torch) rm -rf "$folder/torch" ;;
*"pip "*"uv=="*) exit 1 ;;
*"pip "*torch==*)
    echo "$*" >>"$folder/arguments"
    [[ -n "${PIP_INDEX_URL:-}" ]] || { torch "$REGISTRY"; exit; }
    echo "$PIP_INDEX_URL" >"$folder/index"
    torch "$INDEX"
    ;;
*version.py*) PYTHONPATH="$folder" exec "$REAL" -S "$@" ;;
esac
"""


def install(tree: Path, platform: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Make an environment with the fake pip."""
    shutil.copytree(ROOT / "requirements", tree / "requirements")
    shutil.rmtree(tree / ".venv")
    write_program(tree / ".venv/bin/python", FAKE_PIP)
    (tree / ".venv/lib/libnuma").mkdir(parents=True)
    (tree / ".venv/lib/libnuma/libnuma.so.1").touch()
    variables = {"PYTHON": sys.executable, "REAL": sys.executable, **variables}
    return start(tree / "scripts/install.sh", platform, **variables)


@pytest.mark.parametrize(
    ("platform", "registry", "index", "error"),
    [
        ("cpu", "cpu", "none", None),
        ("cpu", "none", "cpu", None),
        ("cpu", "cuda", "cpu", None),
        ("gpu", "cuda", "none", None),
        ("gpu", "none", "cuda", None),
        ("gpu", "cpu", "cuda", None),
        ("gpu", "cpu", "cpu", "torch==2.13.0 for PLATFORM=gpu (cu130) could not be installed"),
        ("cpu", "none", "cuda", "torch==2.13.0+cpu for PLATFORM=cpu (cpu) could not be installed"),
    ],
)
def test_only_the_torch_of_the_platform_is_installed(
    tree: Path, platform: str, registry: str, index: str, error: str | None
) -> None:
    """From the registry, else from the folder of that build in PyTorch's index; another build is removed."""
    done = install(tree, platform, REGISTRY=registry, INDEX=index)
    assert (done.returncode == 0) == (error is None), done.stderr
    assert (error or "") in done.stderr
    asked = tree / ".venv/bin/index"
    assert asked.exists() == (registry != ("cuda" if platform == "gpu" else "cpu"))
    folder = "cu130" if platform == "gpu" else "cpu"
    assert not asked.exists() or asked.read_text() == f"https://download.pytorch.org/whl/{folder}\n"
    installed = tree / ".venv/bin/torch/version.py"
    expected = None if error else "cuda = '13.0'\n" if platform == "gpu" else "cuda = None\n"
    assert (installed.read_text() if installed.exists() else None) == expected
    assert (tree / f".venv/.installed-{platform}").exists() == (error is None)


def test_the_password_of_an_index_is_neither_shown_nor_an_argument(tree: Path) -> None:
    index = "https://me:password@mirror/whl/cu130"
    done = install(tree, "gpu", REGISTRY="none", INDEX="cuda", TORCH_INDEX=index)
    assert done.returncode == 0, done.stderr
    assert (tree / ".venv/bin/index").read_text() == f"{index}\n"
    assert "trying https://mirror/whl/cu130\n" in done.stdout
    assert "password" not in done.stdout + done.stderr + (tree / ".venv/bin/arguments").read_text()
