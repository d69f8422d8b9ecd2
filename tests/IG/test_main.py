from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from IG.__main__ import main

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("command", "flag"), [("serve", "--port"), ("doctor", "--max-samples")])
def test_every_command_has_its_own_help(command: str, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert flag in capsys.readouterr().out


def test_examining_needs_nothing_of_the_trainer() -> None:
    program = (
        "import sys, IG.doctor.command; print([m for m in sys.modules if m in ('verl', 'search_r1', 'vllm')])"
    )
    found = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert found.stdout.strip() == "[]"


@pytest.mark.parametrize("command", ["serve", "doctor"])
def test_gpus_that_are_not_there_are_refused_before_any_model_loads(
    command: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert main([command, "--num-gpus", "4"]) == 1
    assert "--num-gpus is 4" in caplog.text
    assert "PyTorch sees 0 GPUs here" in caplog.text
    assert "loading" not in caplog.text
