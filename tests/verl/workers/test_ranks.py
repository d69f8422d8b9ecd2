"""What several ranks load, train, save and resume; the ranks are processes of `gloo_ranks.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_ranks_load_and_resume_each_others_state(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.verl.workers.gloo_ranks", str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
