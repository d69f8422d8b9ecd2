"""Start a private Ray cluster: on loopback, with its own token, in a folder that no other user can enter."""

from __future__ import annotations

import functools
import logging
import os
import secrets
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from serving.machine import socket_root

logger = logging.getLogger(__name__)

_START_ATTEMPTS = 3
_NUM_QUOTED_LINES = 15
_TOKEN_FILE = "auth_token"
_RAY_FOLDER = "r"


def make_ray_folder() -> Path:
    """Create the folder of one cluster, mode 0700, where paths of sockets can be short enough."""
    return Path(tempfile.mkdtemp(prefix="ray-", dir=socket_root()))


def start_ray(
    folder: Path,
    *,
    object_store_bytes: int,
    num_gpus: int | None = None,
    system_config: Mapping[str, object] | None = None,
) -> None:
    """Start Ray for this process, with all its files below `folder`.

    Raises RuntimeError when Ray already runs in this process, and what Ray raises.

    Ray makes its own folder world-writable (0777) and stores its token readable by all in ~/.ray: its folder
    lies below the private one, as does the token.
    """
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():
        raise RuntimeError("Ray already runs in this process; shut it down first")
    token_path = folder / _TOKEN_FILE
    with open(os.open(token_path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(_make_token())
    # Ray reads these when it is imported. It binds to loopback only where it thinks clusters unsupported.
    os.environ["RAY_AUTH_MODE"] = "token"
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token_path)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    # When it loses the raylet, Ray ends a process whose parent is process 1 (nohup, a container) at once with
    # nothing taken down. This is the process it checks instead; the workers get the raylet's id.
    os.environ["RAY_RAYLET_PID"] = str(os.getpid())
    import ray

    for attempt in range(1, _START_ATTEMPTS + 1):
        try:
            # No CPUs: actors ask for none, so few cores never block one, and Ray stocks no idle workers.
            ray.init(
                address="local",
                num_cpus=0,
                num_gpus=num_gpus,
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                log_to_driver=False,
                logging_level="error",
                _temp_dir=str(folder / _RAY_FOLDER),
                _system_config=dict(system_config or {}),
            )
            return
        except Exception as error:  # Ray raises the bare class when its processes are slow to start
            ray.shutdown()
            if "timed out" not in str(error) or attempt == _START_ATTEMPTS:
                raise
            logger.warning("Ray did not start in time (a busy machine?); attempt %d failed", attempt)


def describe_death(error: Exception, *, folder: Path, pid: int | None) -> str:
    """Return Ray's reason for the loss of an actor, and the end of what its process wrote to stderr."""
    reason = str(error).strip().splitlines()[-1].split(" Some common causes")[0]
    return reason + read_stderr_end(folder=folder, pid=pid)


def read_stderr_end(*, folder: Path, pid: int | None) -> str:
    """Return the last lines that an actor's process wrote to stderr under a heading; empty if none.

    The inside of tracebacks is left out: what is raised at their end says more.
    """
    lines = [
        f"  {line}"
        for log in sorted((folder / _RAY_FOLDER / "session_latest" / "logs").glob(f"worker-*-{pid}.err"))
        for line in log.read_text(errors="replace").splitlines()
        if line and not line.startswith((":", "  "))  # ":x" is Ray's own
    ]
    return "\n".join(["\nIts stderr ends:", *lines[-_NUM_QUOTED_LINES:]]) if lines else ""


@functools.cache
def _make_token() -> str:
    """Return the token of this process: Ray caches it, so a second cluster must have the same."""
    return secrets.token_hex(32)
