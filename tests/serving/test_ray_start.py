from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

_OWNER = """
import json, os, signal, stat, time
import psutil
from contextlib import suppress
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored
from serving.ray_start import PrivateRay
from serving.vllm_rules import prepare_environment

prepare_environment(on_cpu=True)
import ray  # as vLLM does
os.umask(0)
found = {"modes": {}}
for _ in range(2):  # Ray caches the token of the first one
    cluster = PrivateRay()
    cluster.start(object_store_bytes=80 * 2**20)
    folder = cluster.folder
    names = ("RAY_AUTH_TOKEN_PATH", "IG_TOKEN")
    echo = ray.remote(num_cpus=0)(lambda: ([os.environ.get(name) for name in names], os.nice(0)))
    assert ray.get(echo.remote()) == ([str(folder / "auth_token"), None], os.nice(0))
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGHUP)  # as a terminal that closes
    time.sleep(0.5)
    assert cluster.find_dead() is None
    assert ray.get(echo.remote())
    assert signal.SIGHUP not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    sockets = folder.glob("*/session_latest/sockets/*")
    found["longest"] = max(len(os.path.realpath(socket)) for socket in sockets)
    for path in (folder, folder / "auth_token"):
        found["modes"][path.name[:4]] = oct(stat.S_IMODE(path.stat().st_mode))
    cluster.close()
    assert not folder.exists()
print(json.dumps(found))
"""


@pytest.mark.slow
def test_no_other_user_can_enter_a_cluster_and_a_closed_terminal_does_not_end_it(tmp_path: Path) -> None:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environ |= {"IG_TOKEN": "hush", "HOME": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", _OWNER], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["modes"] == {"ray-": "0o700", "auth": "0o600"}
    assert found["longest"] <= 107
    assert not (tmp_path / ".ray").exists()  # where Ray itself would keep a token that all can read
