"""`index plan`: disk and memory of every kind of index by formula, before any work.

index plan --n 21015324 --dim 768 --ram 16GB
"""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from typing import Literal

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import IndexKind, IndexOptions, parse_options

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_COMPONENT_BYTES = {"Flat": 4.0, "SQfp16": 2.0, "SQ8": 1.0, "SQ6": 0.75, "SQ4": 0.5}
_PROCESS_BYTES = 1_500_000_000
"""Of a process with torch, Faiss, a query encoder of BERT-base's size and one block of vectors."""
_USABLE_SHARE = 0.9
"""Of the RAM; the rest is for the system."""
_TRAINING_ROWS_PER_LIST = 48
# Best recall first; hnsw comes last because its recall depends most on the data.
_ORDER = (IndexKind.FLAT, IndexKind.FP16, IndexKind.SQ8, IndexKind.IVF_PQ, IndexKind.HNSW)
# Of ivf_pq, measured on the embedded world's vectors and on 20,000 clustered random ones of 128 dimensions:
# 0.98 and 0.98, without refining 0.84 and 0.63.
_NOT_REFINED = "0.6 - 0.8"
_RECALL = {
    IndexKind.FLAT: "exact",
    IndexKind.FP16: ">= 0.99",
    IndexKind.SQ8: ">= 0.95",
    IndexKind.IVF_PQ: "0.98",
    IndexKind.HNSW: "0.8 - 0.99",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """The cost of one kind of index, in bytes."""

    options: IndexOptions
    disk: int
    """Of the finished file."""
    hot: int
    """The part of the file that every query reads; it must be in memory for searches to be fast."""
    build: int
    """Peak memory of the process that builds it from encoded vectors."""

    @property
    def memory(self) -> int:
        """Return the memory of a server whose hot part is in memory."""
        return self.hot + _PROCESS_BYTES

    @property
    def recall(self) -> str:
        """Return the recall of the best three to expect for vectors of an encoder."""
        is_refined = self.options.kind is not IndexKind.IVF_PQ or "R" in str(self.options.factory)
        return _RECALL[self.options.kind] if is_refined else _NOT_REFINED

    def fits(self, ram_bytes: int) -> bool:
        """Return whether the index can be built and served in so much RAM."""
        return max(self.memory, self.build) <= _USABLE_SHARE * ram_bytes


def estimate(options: IndexOptions, num_vectors: int, dim: int) -> PlanRow:
    """Return the cost of an index. Raises RetrieverError for what cannot be built."""
    options = options.resolve(num_vectors, dim)
    factory = options.factory or ""
    training = 4 * dim * min(num_vectors, 100_000)
    if found := re.match(r"IVF(\d+).*PQ(\d+)(?:x(\d+))?(?:,R(?:efine\()?(\w+)\)?)?$", factory):
        num_lists, num_parts, bits = int(found[1]), int(found[2]), int(found[3] or 8)
        # Code and id of 8 bytes per vector, centroids of the lists, codebooks.
        hot = num_vectors * ((num_parts * bits + 7) // 8 + 8) + num_lists * (4 * dim + 8) + 4 * 2**bits * dim
        # Of the whole vectors a query reads a few dozen.
        refined = int(num_vectors * dim * _COMPONENT_BYTES[found[4]]) if found[4] else 0
        training = 4 * dim * min(num_vectors, max(100_000, _TRAINING_ROWS_PER_LIST * num_lists))
        build = 2 * hot + training + _PROCESS_BYTES
        return PlanRow(options=options, disk=hot + refined, hot=hot, build=build)
    if found := re.match(r"HNSW(\d+)[,_]?(.*)", factory):
        links = int(found[1])
        stored = dim * _COMPONENT_BYTES.get(found[2] or "Flat", 4)
        # 2 M links in the lowest layer, M in each of 1 / (M - 1) others on average, offset and level.
        disk = int(num_vectors * (stored + 4 * (2 * links + links / max(1, links - 1)) + 12))
        return PlanRow(options=options, disk=disk, hot=disk, build=2 * disk + training + _PROCESS_BYTES)
    disk = int(num_vectors * dim * _COMPONENT_BYTES[factory])
    return PlanRow(options=options, disk=disk, hot=disk, build=training + _PROCESS_BYTES)


def recommend(rows: list[PlanRow], ram_bytes: int) -> PlanRow | None:
    """Return the first row of the best recall that fits, None where nothing does."""
    return next((row for row in rows if row.fits(ram_bytes)), None)


def parse_bytes(text: str) -> int:
    """Return the bytes of `16GB` (16 * 10^9) or `16GiB` (16 * 2^30). Raises RetrieverError for any other."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]+)\s*", text)
    unit = _UNITS.get(found[2].upper()) if found else None
    if found is None or unit is None or float(found[1]) <= 0:
        raise RetrieverError(
            f"--ram {text!r} is not clear; write for example 16GB (10^9 bytes) or 16GiB (2^30 bytes)"
        )
    return int(float(found[1]) * unit)


def show_bytes(count: float) -> str:
    """Write a size in decimal units, as disks are sold: `64.6 GB`."""
    for unit in ("TB", "GB", "MB", "KB"):
        if count >= _UNITS[unit]:
            return f"{count / _UNITS[unit]:.1f} {unit}"
    return f"{int(count)} B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `index plan`."""
    add = parser.add_argument
    add("--n", required=True, type=int, help="number of passages")
    add("--dim", default=768, type=int, help="dimension of the encoder's vectors")
    add("--ram", default=None, help="of the machine, such as 16GB (10^9) or 16GiB (2^30); else this one's")
    add("--kind", action="append", help="only this one, or IVF16384,PQ64 and the like; repeatable")


def run(settings: argparse.Namespace) -> int:
    """Print the table and a recommendation; exit status 1 when nothing fits. Raises RetrieverError."""
    from rich.console import Console
    from rich.table import Table

    for name in ("n", "dim"):
        if getattr(settings, name) <= 0:
            raise RetrieverError(f"--{name} must be greater than 0, got {getattr(settings, name)}")
    ram = (
        parse_bytes(settings.ram)
        if settings.ram
        else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    )
    kinds = [parse_options(name) for name in settings.kind or _ORDER]
    rows = [estimate(options, settings.n, settings.dim) for options in kinds]
    chosen = recommend(rows, ram)
    table = Table(title=f"{settings.n:,} vectors of {settings.dim} dimensions")
    for name in ("kind", "Faiss factory", "disk", "memory", "memory to build", "recall@3 (expected)"):
        justify: Literal["left", "right"] = "left" if name in ("kind", "Faiss factory") else "right"
        table.add_column(name, justify=justify, overflow="fold")
    for row in rows:
        kind = row.options.kind
        sizes = map(show_bytes, (row.disk, row.memory, row.build))
        style = "bold" if row is chosen else None
        table.add_row(kind, row.options.factory, *sizes, row.recall, style=style)
    console = Console()
    console.print(table)
    console.print(
        "memory: process and what every query reads of the index; a mapped file works with less and reads "
        "the disk. ivf_pq leaves the vectors that refine a search on disk. While an index is built, the "
        f"encoded vectors ({show_bytes(4 * settings.n * settings.dim)}) and, but for hnsw, a second copy of "
        "what it stores of them are on disk beside it. `index build` measures the recall at its end.",
        soft_wrap=True,
    )
    if chosen is None:
        smallest = min(max(row.memory, row.build) for row in rows) / _USABLE_SHARE
        console.print(
            f"With {show_bytes(ram)} of RAM nothing fits; the smallest needs {show_bytes(smallest)}."
        )
        return 1
    name = (settings.kind or list(_ORDER))[rows.index(chosen)]
    console.print(f"With {show_bytes(ram)} of RAM: {name}. Build it:")
    console.print(
        f"index build --corpus_path CORPUS.jsonl --model_path ENCODER --save_dir index --kind {name}",
        soft_wrap=True,
    )
    return 0
