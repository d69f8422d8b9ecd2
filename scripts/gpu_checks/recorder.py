"""Figures of a check: appended to a file of JSON lines as soon as they are measured, and read again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from verl.trainer.plan import assumptions
from verl.trainer.plan.gpus import Gpu

Value = float | str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What a check works with, and where its figures go."""

    check: str
    results: Path
    scratch: Path
    """An empty folder, removed after the check."""
    gpu: Gpu
    device: torch.device
    is_tiny: bool
    """Tiny sizes, on the CPU; the figures then mean nothing."""

    def record(
        self,
        figure: str,
        value: Value,
        *,
        unit: str = "",
        planned: float | None = None,
        assumption: str | None = None,
    ) -> None:
        """Append a figure: None if it cannot be measured here.

        `assumption` names the number of `verl.trainer.plan.assumptions` that it should replace, and
        `planned` is what the plan expects of it; by default that number.
        """
        if assumption is not None and planned is None:
            planned = getattr(assumptions, assumption)
        line = {"figure": figure, "value": value, "unit": unit, "planned": planned, "assumption": assumption}
        append(self.results, {"check": self.check, "device": self.gpu.name, **line})

    def seconds(self, work: Callable[[], object], *, repeats: int = 1) -> float:
        """Return the seconds of one call, in the mean, until the device is done."""
        self.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        self.wait()
        return (time.perf_counter() - began) / repeats

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        """Begin a new measurement of `peak_gb`."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def peak_gb(self) -> float | None:
        """Return the most memory that torch's tensors had since `forget_peak`; None on a CPU."""
        if self.device.type != "cuda":
            return None
        return torch.cuda.max_memory_allocated() / assumptions.GB

    def share_of_peak(self, flops_per_s: float) -> float | None:
        """Return FLOP/s as a share of the peak of the GPU; None if that is not known."""
        return flops_per_s / self.gpu.flops if self.gpu.flops else None


def append(results: Path, line: dict[str, object]) -> None:
    """Append a line; it is in the file when this returns."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(results: Path, *, device: str) -> list[dict[str, object]]:
    """Return the lines that were measured on a device, without one that was cut off."""
    if not results.is_file():
        return []
    lines = []
    for text in results.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and line.get("device") == device:
            lines.append(line)
    return lines
