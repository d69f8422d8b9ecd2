"""Run a program where everything is taken away that the README says a machine need not have."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from tests.e2e.running import ROOT

RunPython = Callable[..., subprocess.CompletedProcess[str]]

_COMPILER = re.compile(r"(^|-)(gcc|g\+\+|cc|c\+\+|clang|clang\+\+|cpp|c89|c99|tcc)(-[\d.]+)?$")
_SET_FOR_TESTS = re.compile("^(CC|CXX|OMP_NUM_THREADS|HF_.*|WANDB_.*|RAY_.*|VLLM_.*)$")
"""Or by a developer: users of a bare machine have none of these."""
_TAKE_AWAY = """
set -e
mount --make-rprivate /
mount -t tmpfs -o size=64m tmpfs /dev/shm
mount -t tmpfs -o ro tmpfs "$HOME"
for library in $LIBNUMA; do mount --bind /dev/null "$library"; done
"$0" -c 'import fcntl, socket, struct
fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x41))  # the loopback interface is up'
exec taskset -c "$CORE" "$0" "$@"
"""
_LOOK = """
import ctypes, json, os, shutil, socket
def works(action, *arguments):
    try:
        action(*arguments)
    except OSError:
        return False
    return True
memory = os.statvfs("/dev/shm")
print(json.dumps({
    "compilers": [name for name in ("cc", "c++", "gcc", "g++", "clang", "clang++") if shutil.which(name)],
    "libnuma": works(ctypes.CDLL, "libnuma.so.1"),
    "lscpu": os.system("lscpu >/dev/null 2>&1") == 0,
    "a home": works(os.mkdir, os.path.expanduser("~/folder")),
    "a second core": len(os.sched_getaffinity(0)) > 1,
    "shared memory": memory.f_blocks * memory.f_frsize > 64 * 2**20,
    "networks": [name for _, name in socket.if_nameindex() if name != "lo"],
}))
"""


def strip_machine(folder: Path) -> tuple[RunPython, str]:
    """Return what runs Python without all of this, or in full and the reason where that cannot be done."""

    def run_in_full(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)

    if shutil.which("unshare") is None or os.geteuid() != 0:
        return run_in_full, "hiding a library takes root and unshare (package util-linux)"
    environment = _make_environment(folder)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["unshare", "--mount", "--net", "sh", "-c", _TAKE_AWAY, sys.executable, *arguments]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    look = run("-c", _LOOK)
    if look.returncode:
        return run_in_full, f"nothing can be hidden on this machine: {look.stderr}"
    there = json.loads(look.stdout)
    assert not any(there.values()), there
    return run, ""


def _make_environment(folder: Path) -> dict[str, str]:
    programs, home, temporary = folder / "bin", folder / "home", folder / ("t" * 90)
    for path in (programs, home, temporary):
        path.mkdir()
    (programs / "lscpu").symlink_to("/bin/false")
    for place in ("/usr/bin", "/bin", "/usr/sbin", "/sbin"):
        for program in Path(place).iterdir():
            if not _COMPILER.search(program.name) and not os.path.lexists(programs / program.name):
                (programs / program.name).symlink_to(program)
    cache = subprocess.run(["/sbin/ldconfig", "-p"], capture_output=True, text=True).stdout
    libraries = {str(Path(path).resolve()) for path in re.findall(r"libnuma\.so\.1 .*=> (.+)", cache)}
    kept = {name: value for name, value in os.environ.items() if not _SET_FOR_TESTS.search(name)}
    return kept | {
        "PATH": str(programs),
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "LIBNUMA": " ".join(libraries),
        "CORE": str(min(os.sched_getaffinity(0))),
    }
