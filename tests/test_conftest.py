"""The guard that every test session has, in a session of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

LEAKING = """
import subprocess, sys, time
import conftest

conftest._GRACE_S = 0.2
# As Ray and vLLM do: a title that overwrites the environment, a session of its own, and a parent that ends.
ORPHAN = "import setproctitle, time; setproctitle.setproctitle('VLLM::Engine'); time.sleep(600)"
PARENT = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {ORPHAN!r}], "\\
    "start_new_session=True); time.sleep(2)"


def test_leaks():
    subprocess.run([sys.executable, "-c", PARENT], check=True)
"""


@pytest.mark.slow
def test_an_orphan_that_renamed_itself_fails_the_session_and_is_ended(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_leaking.py").write_text(LEAKING)
    (tmp_path / "pytest.ini").touch()
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_leaking.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout
    assert "1 passed, 1 error" in done.stdout
    (left,) = re.findall(r"(\d+): VLLM::Engine", done.stdout)[:1]
    assert not psutil.pid_exists(int(left)) or psutil.Process(int(left)).status() == psutil.STATUS_ZOMBIE
