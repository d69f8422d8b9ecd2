"""GPUs: memory and speed by name, and what `nvidia-smi` reports of this machine."""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace

from verl.errors import ConfigError
from verl.trainer.plan.assumptions import GB

_QUERY = "index,uuid,name,memory.total,memory.used"
_TIMEOUT_S = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of GPU."""

    name: str
    memory: float
    """Bytes."""
    flops: float | None = None
    """Peak FLOP/s in bfloat16, dense; None for a kind that is not in `KNOWN`."""
    bandwidth: float | None = None
    """Bytes/s of its memory."""


# Data sheets of NVIDIA; the first whose name is in the name that nvidia-smi reports.
KNOWN = (
    Gpu(name="H200", memory=150e9, flops=989e12, bandwidth=4.8e12),
    Gpu(name="H100", memory=85e9, flops=989e12, bandwidth=3.35e12),
    Gpu(name="A100-40GB", memory=42.3e9, flops=312e12, bandwidth=1.56e12),
    Gpu(name="A100", memory=85e9, flops=312e12, bandwidth=2.04e12),
    Gpu(name="L40S", memory=48e9, flops=362e12, bandwidth=0.864e12),
    Gpu(name="RTX 4090", memory=25.3e9, flops=165e12, bandwidth=1.01e12),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasuredGpu:
    """A GPU of this machine, with what runs on it."""

    gpu: Gpu
    used: float
    """Bytes that programs use now."""


def find_gpu(name: str) -> Gpu:
    """Return the GPU of a name in `KNOWN`, or of a memory such as `48GB`. Raises ConfigError."""
    if found := re.fullmatch(r"(\d+(?:\.\d+)?) ?GB", name, flags=re.IGNORECASE):
        return Gpu(name=name, memory=float(found[1]) * GB)
    for gpu in KNOWN:
        if gpu.name.lower() == name.lower():
            return gpu
    raise ConfigError(
        f"placement.gpu={name}: expected one of {', '.join(gpu.name for gpu in KNOWN)}, or the memory of one "
        "GPU such as 48GB (10^9 bytes)"
    )


def identify_gpu(reported_name: str, memory: float) -> Gpu:
    """Return a GPU by the name and the bytes that the driver reports."""
    for gpu in KNOWN:
        is_same_size = 0.9 < memory / gpu.memory < 1.1
        if gpu.name.partition("-")[0] in reported_name and is_same_size:
            return replace(gpu, memory=memory)
    return Gpu(name=reported_name, memory=memory)


def measure_gpus(*, visible: str | None) -> tuple[MeasuredGpu, ...]:
    """Return the GPUs of this machine that `visible` (CUDA_VISIBLE_DEVICES) shows, in its order.

    Returns none where nvidia-smi is missing or fails. It takes no memory on the GPUs, as CUDA would.
    """
    command = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_gpus(done.stdout, visible=visible)


def parse_gpus(table: str, *, visible: str | None) -> tuple[MeasuredGpu, ...]:
    """Return the GPUs of a table of nvidia-smi, see `measure_gpus`, leaving out those without numbers."""
    found: dict[str, MeasuredGpu] = {}
    order = []
    for row in csv.reader(table.splitlines(), skipinitialspace=True):
        if len(row) != len(_QUERY.split(",")) or not (row[3].isdigit() and row[4].isdigit()):
            continue
        index, uuid, name, total, used = row
        gpu = identify_gpu(name, float(total) * 2**20)
        found[index] = found[uuid] = MeasuredGpu(gpu=gpu, used=float(used) * 2**20)
        order.append(index)
    chosen: Sequence[str] = order
    if visible is not None:
        chosen = [entry.strip() for entry in visible.split(",")]
    return tuple(found[entry] for entry in chosen if entry in found)
