"""A Ray cluster of several nodes on this machine, started as users start one."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from serving.machine import socket_root
from tests.processes import free_port

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class RayNodes:
    """`nodes` are the processes of `ray start --block`; `variables` what a program needs to join."""

    address: str
    nodes: list[subprocess.Popen[bytes]]
    variables: Mapping[str, str]


@contextmanager
def ray_nodes(count: int, *resources: str) -> Iterator[RayNodes]:
    """Start so many nodes with these resources; the first is the head."""
    folder = Path(tempfile.mkdtemp(prefix="nodes-", dir=socket_root()))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    address = f"{LOOPBACK}:{free_port()}"
    variables = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1",  # a private Ray of the test process sets 0
    }
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    common = ["--block", f"--node-ip-address={LOOPBACK}", *resources, "--disable-usage-stats"]
    common.append(f"--object-store-memory={80 * 2**20}")
    head = ["--head", f"--port={address.split(':')[1]}", f"--temp-dir={folder}", "--include-dashboard=false"]
    nodes: list[subprocess.Popen[bytes]] = []
    try:
        for number in range(count):
            with (folder / f"node-{number}.log").open("w") as log:
                node = subprocess.Popen(
                    [
                        f"{sys.prefix}/bin/ray",
                        "start",
                        *common,
                        *(head if number == 0 else [f"--address={address}"]),
                    ],
                    env={**kept, **variables},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            nodes.append(node)
            while "Ray runtime started" not in Path(log.name).read_text():
                assert node.poll() is None, Path(log.name).read_text()
                time.sleep(0.1)
        yield RayNodes(address, nodes, variables)
    finally:
        for node in reversed(nodes):
            end_node(node)
        shutil.rmtree(folder, ignore_errors=True)


def end_node(node: subprocess.Popen[bytes]) -> None:
    """Kill all processes of a node, as a machine that fails."""
    if node.poll() is None:
        family = psutil.Process(node.pid).children(recursive=True)
        node.kill()
        for process in family:
            if process.is_running():
                process.kill()
        psutil.wait_procs(family)
    node.wait()
