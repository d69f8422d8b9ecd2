"""Facts about this machine that decide how vLLM and Ray are run; imports neither."""

from __future__ import annotations

import ipaddress
import tempfile
from contextlib import suppress
from pathlib import Path

_MAX_SOCKET_ROOT_CHARS = 24
"""Ray puts unix sockets (at most 107 characters) about 80 characters below its folder, vLLM 37."""
_CPU_INFO = Path("/proc/cpuinfo")


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


def is_loopback(host: str) -> bool:
    """Return whether only this machine can reach the host: `localhost`, or an address of loopback."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
