"""What the doctor looks at where there are GPUs: driver, CUDA, compiler, limits and variables."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

MIN_DRIVERS = {12: 525, 13: 580}
"""The oldest driver for each major version of CUDA, as NVIDIA's release notes state it."""
MIN_FILES = 65536
_READ_TORCH = """
import json, torch
print(json.dumps([torch.version.cuda, torch.cuda.is_available(), torch.cuda.device_count()]))
"""
_TORCH_TIMEOUT_S = 600.0
_SLOW_SETTINGS = {
    "NCCL_P2P_DISABLE": "GPUs of a node exchange gradients through host memory",
    "NCCL_SHM_DISABLE": "GPUs of a node may exchange gradients over the network",
    "NCCL_IB_DISABLE": "nodes exchange gradients over Ethernet",
    "NCCL_NET_GDR_DISABLE": "gradients between nodes pass through host memory",
    "CUDA_LAUNCH_BLOCKING": "every kernel is waited for",
    "TORCH_NCCL_BLOCKING_WAIT": "every collective is waited for",
}

Status = Literal["ok", "warning", "error"]


class Finding(NamedTuple):
    """One reading; `fix` is empty if nothing is wrong.

    Not a dataclass with slots: a Python that is too old must be able to report that.
    """

    name: str
    status: Status
    found: str
    fix: str = ""


class Torch(NamedTuple):
    """What torch reports of CUDA."""

    cuda: str | None
    """Version that it was built for; None: a CPU build."""
    is_available: bool
    num_gpus: int


def check_gpus(*, environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check what training on the GPUs of this machine needs; without any, report that alone."""
    gpus = list_gpus()
    if gpus is None:
        yield Finding("GPUs", "ok", "none: everything runs on the CPU")
        return
    if not gpus:
        fix = "repair the driver, or run on the CPU: trainer.device=cpu"
        yield Finding("GPUs", "warning", "nvidia-smi fails or lists none", fix)
        return
    yield Finding("GPUs", "ok", "; ".join(gpus))
    torch = read_torch()
    if torch is None:  # `import torch` has its own finding
        return
    if torch.cuda is None:
        yield Finding(
            "CUDA", "warning", "torch is a CPU build: training runs on the CPU", "make venv PLATFORM=gpu"
        )
        return
    driver = gpus[0].rpartition(", ")[2]
    yield check_cuda(torch, driver=driver, num_gpus=len(gpus), visible=environ.get("CUDA_VISIBLE_DEVICES"))
    yield check_compiler(environ.get("CC"), headers=Path(sysconfig.get_paths()["include"]))
    num_files, locked = (
        resource.getrlimit(of)[0] for of in (resource.RLIMIT_NOFILE, resource.RLIMIT_MEMLOCK)
    )
    yield from check_limits(num_files, locked, has_infiniband=Path("/dev/infiniband").is_dir())
    yield from check_variables(environ, interfaces=[name for _, name in socket.if_nameindex()])


def list_gpus() -> list[str] | None:
    """Return name, memory and driver of each GPU; None without nvidia-smi, none if it fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [] if done.returncode else done.stdout.strip().splitlines()


def read_torch() -> Torch | None:
    """Return what torch reports, in a process of its own; None if it does not load."""
    command = [sys.executable, "-c", _READ_TORCH]
    try:
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=_TORCH_TIMEOUT_S)
        return Torch(*json.loads(done.stdout))
    except (ValueError, TypeError, OSError, subprocess.TimeoutExpired):
        return None


def check_cuda(torch: Torch, *, driver: str, num_gpus: int, visible: str | None) -> Finding:
    """Check that torch can use the GPUs, else say whether the driver is the reason."""
    found = f"torch for CUDA {torch.cuda}, driver {driver}"
    needed = MIN_DRIVERS.get(int((torch.cuda or "0").partition(".")[0]))
    major = driver.partition(".")[0]
    if needed is not None and major.isdecimal() and int(major) < needed:
        fix = f"install driver {needed} or newer: with this one torch finds no GPU and trains on the CPU"
        return Finding("CUDA", "error", found, fix)
    if visible is not None:
        found += f", CUDA_VISIBLE_DEVICES={visible!r}"
    if not torch.is_available:
        fix = "unset CUDA_VISIBLE_DEVICES" if visible is not None else "in a container: docker run --gpus all"
        return Finding("CUDA", "error", f"{found}: torch finds no GPU", fix)
    if visible is None and torch.num_gpus < num_gpus:
        fix = "look at nvidia-smi for a GPU in an error state, or with MIG enabled"
        return Finding("CUDA", "warning", f"{found}: torch finds {torch.num_gpus} of {num_gpus} GPUs", fix)
    return Finding("CUDA", "ok", f"{found}, {torch.num_gpus} GPUs")


def check_compiler(compiler: str | None, *, headers: Path) -> Finding:
    """Check what Triton compiles its launchers with, when a model first runs."""
    found = shutil.which(compiler) if compiler else shutil.which("gcc") or shutil.which("clang")
    missing = [] if found else [f"compiler ({f'CC={compiler}' if compiler else 'gcc or clang'})"]
    if not (headers / "Python.h").is_file():
        missing.append(f"{headers}/Python.h")
    if not missing:
        return Finding("compiler", "ok", f"{found}, {headers}/Python.h")
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    fix = f"apt install gcc python{version}-dev (Triton compiles while a model runs)"
    return Finding("compiler", "error", f"no {', no '.join(missing)}", fix)


def check_limits(num_files: int, locked_bytes: int, *, has_infiniband: bool) -> Iterator[Finding]:
    """Check the limits of this shell, which what it starts has, too."""
    infinity = resource.RLIM_INFINITY
    if num_files == infinity or num_files >= MIN_FILES:
        yield Finding("ulimit -n", "ok", "unlimited" if num_files == infinity else f"{num_files} open files")
    else:
        fix = f"ulimit -n {MIN_FILES} (docker: --ulimit nofile={MIN_FILES})"
        yield Finding("ulimit -n", "warning", f"{num_files} open files: Ray needs more for many actors", fix)
    if has_infiniband and locked_bytes != infinity:
        found = f"{locked_bytes // 1024} kB of locked memory: InfiniBand registers its buffers there"
        yield Finding("ulimit -l", "warning", found, "ulimit -l unlimited (docker: --ulimit memlock=-1)")


def check_variables(environ: Mapping[str, str], *, interfaces: Collection[str]) -> Iterator[Finding]:
    """Report variables of NCCL and CUDA that are set, and which of them slow training down or stop it."""
    for name, value in sorted(environ.items()):
        shown = f"{name}={value}"
        if name in _SLOW_SETTINGS and value not in ("", "0"):
            yield Finding(name, "warning", f"{shown}: {_SLOW_SETTINGS[name]}", f"unset {name}")
        elif name == "NCCL_SOCKET_IFNAME":
            yield _check_interface(value, interfaces)
        elif name == "NCCL_DEBUG" and value.upper() in ("INFO", "TRACE"):
            yield Finding(name, "warning", f"{shown}: logs a lot", f"unset {name} once the cause is known")
        elif name.startswith("NCCL_"):
            yield Finding(name, "ok", shown)


def _check_interface(value: str, interfaces: Collection[str]) -> Finding:
    """Check NCCL_SOCKET_IFNAME: prefixes of names, after ^ those to leave out, after = whole names."""
    name, shown = "NCCL_SOCKET_IFNAME", f"NCCL_SOCKET_IFNAME={value}"
    wanted = value.lstrip("=").split(",")
    is_whole = value.startswith("=")
    found = [i for i in interfaces for w in wanted if (i == w if is_whole else i.startswith(w))]
    if value.startswith("^") or found:
        return Finding(name, "ok", shown)
    have = ", ".join(interfaces)
    return Finding(name, "error", f"{shown}: this machine has {have}", f"unset {name}, or name one of them")
