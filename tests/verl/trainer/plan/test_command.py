"""`plan=true` prints tables and JSON before anything loads; runs on GPUs begin with the same check."""

from __future__ import annotations

import json
import logging
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from scale.plan import compose_config
from verl.errors import ConfigError
from verl.trainer.config.validate import validate
from verl.trainer.plan.command import check_memory

SMI = "#!/bin/sh\nprintf '%s, GPU-a, NVIDIA H100 80GB HBM3, 81559, {used}\\n' 0\n"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "verl.trainer.main_ppo", "plan=true", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose nvidia-smi reports one H100, on which another program uses 2 GB."""
    program = tmp_path / "nvidia-smi"
    program.write_text(SMI.format(used=2000))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_run_that_fits_is_planned_without_data_or_gpus() -> None:
    done = run("recipe=gpu", "placement.gpu=H100")
    assert (done.returncode, done.stderr) == (0, "")
    assert "GB on GPU 0-7" in done.stdout
    record = json.loads(done.stdout.splitlines()[-1])
    assert (record["fits"], record["num_gpus"], record["parameters"]) == (True, 8, 3085938688)
    assert record["step_s"] == pytest.approx(sum(record["seconds"].values()), abs=0.5)
    assert max(record["memory_gb"].values()) < record["usable_gb"]


def test_a_run_that_does_not_fit_ends_with_status_1_and_one_line() -> None:
    done = run("recipe=gpu", "placement.gpu=A100", "trainer.n_gpus_per_node=1")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the run does not fit: phase rollout needs ")
    assert json.loads(done.stdout.splitlines()[-1])["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("recipe=gpu", "placement.gpu=TPU"), "error: placement.gpu=TPU: expected one of "),
        (("trainer.device=cpu",), "error: plan=true plans GPUs, and trainer.device=cpu has none"),
        (
            ("recipe=gpu", "placement.gpu=H100", "actor_rollout_ref.rollout.tensor_model_parallel_size=3"),
            "error: trainer.n_gpus_per_node=8 is no multiple of ",
        ),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 1
    assert done.stderr.startswith(message)
    assert len(done.stderr.splitlines()) == 1


def test_an_evaluation_has_no_plan() -> None:
    with pytest.raises(ConfigError, match=r"plan=true plans training"):
        validate(compose_config("plan=true"), num_gpus=0, cpu_has_bfloat16=False, trains=False)


@pytest.mark.usefixtures("one_gpu")
def test_a_run_on_this_machine_is_checked_by_its_own_gpus(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"phase update needs 1\d\d\.\d GB on GPU 0 .* of 85\.5; change: "):
        check_memory(compose_config("recipe=gpu_1"), model_path="Qwen/Qwen2.5-7B")
    caplog.set_level(logging.INFO)
    check_memory(compose_config("recipe=gpu_1"), model_path="Qwen/Qwen2.5-1.5B")
    assert "memory: at most " in caplog.text


def test_a_machine_that_reports_no_gpu_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    check_memory(compose_config("recipe=gpu"), model_path="Qwen/Qwen2.5-7B")
    assert "memory is not planned: nvidia-smi reports no GPU" in caplog.text
