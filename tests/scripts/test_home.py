"""A `~` that no shell expanded, in the paths of every program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    "command",
    [
        "scripts/report.py ~/nowhere",
        "scripts/view_rollouts.py ~/nowhere",
        "scripts/prepare_data.py --train nq=~/nowhere --out-dir=~/out",
        "scripts/download.py --save_path=~/file/nowhere",
        "scripts/doctor.py --lock=~/nowhere",
        "-m search_r1.search.index_cli verify --index_path=~/nowhere",
        "-m search_r1.search.index_cli ceiling --questions ~/nowhere",
        "-m search_r1.search.index_builder --corpus_path=~/nowhere --save_dir=~/out",
        "-m search_r1.search.retrieval_server --index_path=~/nowhere",
        "-m IG.service.IG_server --model-path=~/nowhere",
        "-m IG doctor --questions=~/nowhere",
    ],
)
def test_a_tilde_is_the_home_folder(command: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made below it")
    ended = subprocess.run(
        [sys.executable, *command.split()],
        cwd=REPOSITORY,
        env=os.environ | {"HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert f"{tmp_path}/" in ended.stdout + ended.stderr
    assert "~/" not in ended.stdout + ended.stderr
