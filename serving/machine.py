"""What the processes of vLLM and Ray need of a machine beside Python packages; imports neither."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

_MAX_SOCKET_ROOT_CHARS = 24
"""Ray puts unix sockets (at most 107 characters) about 80 characters below its folder, vLLM 37."""
_LSCPU = ("lscpu", "--json", "--extended=CPU,CORE,NODE", "--online")
_BIN = Path(__file__).with_name("bin")
_LIBNUMA = "libnuma.so.1"
_CPU_INFO = Path("/proc/cpuinfo")


class MachineError(RuntimeError):
    """The machine lacks something; the message names what to install."""


def socket_root() -> str:
    """Return the folder for temporary files, or /tmp where its path is too long for unix sockets."""
    root = tempfile.gettempdir()
    return root if len(root) <= _MAX_SOCKET_ROOT_CHARS and root.split() == [root] else "/tmp"


def has_bfloat16(*, cpu_info: Path = _CPU_INFO) -> bool:
    """Return whether the CPU has instructions for bfloat16; others compute it slower than float32."""
    with suppress(OSError):
        words = cpu_info.read_text(encoding="utf-8", errors="replace").split()
        return not {"avx512_bf16", "amx_bf16", "bf16"}.isdisjoint(words)
    return False


def prepare_engine(*, on_cpu: bool) -> None:
    """Set what vLLM and its child processes read from the environment. Call it before vllm is imported.

    Raises MachineError when vLLM's CPU build cannot start here.
    """
    os.environ["VLLM_RPC_BASE_PATH"] = socket_root()
    if on_cpu:
        # Even with enforce_eager, vLLM compiles a few functions at the first request, which takes a C++
        # compiler and 7 s of processor time for each engine; decoding takes as much with them as without.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
        _provide_libnuma()
        _provide_lscpu()


def _provide_libnuma() -> None:
    """Let this process and its children load libnuma: the system's, or the copy that `make venv` made."""
    with suppress(OSError):
        ctypes.CDLL(_LIBNUMA)
        return
    folder = f"{sys.prefix}/lib/libnuma"
    try:
        ctypes.CDLL(f"{folder}/{_LIBNUMA}", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MachineError(
            f"vLLM's CPU build needs the system library {_LIBNUMA}, which is missing here; "
            "install it: apt install libnuma1 (Debian, Ubuntu), dnf install numactl-libs (Fedora)"
        ) from error
    os.environ["LD_LIBRARY_PATH"] = _prepend(folder, to="LD_LIBRARY_PATH")


def _provide_lscpu() -> None:
    with suppress(OSError):
        if subprocess.run(_LSCPU, capture_output=True).returncode == 0:
            return
    os.environ["PATH"] = _prepend(str(_BIN), to="PATH")


def _prepend(folder: str, *, to: str) -> str:
    return os.pathsep.join(filter(None, (folder, os.environ.get(to))))
