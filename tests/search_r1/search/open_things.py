"""What a process has open: files, threads, tasks, mappings."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

_SETTLE_S = 60.0


async def start_threads_of_loop() -> None:
    """As many as there will be: they are the loop's, and stay."""
    await asyncio.gather(*(asyncio.to_thread(time.sleep, 0.01) for _ in range(40)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """What this process has open."""

    num_files: int
    num_threads: int
    num_tasks: int

    def plus(self, more: int) -> Open:
        return Open(
            num_files=self.num_files + more,
            num_threads=self.num_threads + more,
            num_tasks=self.num_tasks + more,
        )

    def __le__(self, other: Open) -> bool:
        return (
            self.num_files <= other.num_files
            and self.num_threads <= other.num_threads
            and self.num_tasks <= other.num_tasks
        )


def count_open() -> Open:
    gc.collect()
    this = psutil.Process()
    return Open(
        num_files=len(os.listdir("/proc/self/fd")),
        num_threads=this.num_threads(),
        num_tasks=len(asyncio.all_tasks()),
    )


async def settle(goal: Open) -> Open:
    """Threads that were told to end, and sockets that were told to close, need a moment."""
    end = time.monotonic() + _SETTLE_S
    while not (count := count_open()) <= goal and time.monotonic() < end:
        await asyncio.sleep(0.02)
    return count


def list_mapped(folder: Path) -> list[str]:
    gc.collect()
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if str(folder) in line})
