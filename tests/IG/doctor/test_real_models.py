"""The doctor as users start it, with the small models of the repository."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]


def test_the_embedded_world_is_examined_from_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "IG", "doctor", "--num-questions", "4", "--max-samples", "8"]
    command += ["--num-generations", "4", "--cpu-threads", "1", "--out", str(tmp_path)]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr[-2000:]
    line = json.loads(ended.stdout.splitlines()[-1])
    assert (line["questions"], line["failed"]) == (4, 0)
    assert line["signal"] > 0.3
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    gains = report["gains"]
    assert min(gains["all supporting documents"]) > max(gains["random documents"])
    assert report["work"]["baselines_sampled"] == 4
