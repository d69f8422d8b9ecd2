"""What every kind of index would cost, before any work: disk, memory, time, recall; and which one to take.

    index plan --n 21015324 --dim 768 --ram 16GB

Sizes are formulas that tests check against built indexes. Times are estimates from stated rates of one core.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields

from search_r1.search.errors import RetrieverError
from search_r1.search.estimates import (
    BATCH,
    PlanRow,
    Rates,
    Recommendation,
    estimate,
    plan,
    recommend,
    show_seconds,
)
from search_r1.search.kinds import parse_options
from search_r1.search.sizes import parse_bytes, show_bytes

_MIN_WIDTH = 120


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """All that is printed."""

    num_vectors: int
    dim: int
    ram_bytes: int
    threads: int
    rates: Rates
    measured: bool
    rows: Sequence[PlanRow]
    recommendation: Recommendation
    names: Sequence[str]
    """Of the rows, as the user called them."""

    @property
    def command(self) -> str | None:
        """That builds the recommended kind."""
        if self.recommendation.row is None:
            return None
        name = self.names[self.rows.index(self.recommendation.row)]
        return f"index build --corpus_path CORPUS.jsonl --model_path ENCODER --save_dir index --kind {name}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `index plan`."""
    add = parser.add_argument
    add("--n", required=True, type=int, help="number of passages")
    add("--dim", default=768, type=int, help="dimension of the encoder's vectors")
    add("--ram", default=None, help="of the machine, such as 16GB (10^9) or 16GiB (2^30); else this one's")
    add("--threads", default=os.cpu_count() or 1, type=int, help="cores that search and build")
    add("--batch_s", default=2.0, type=float, help=f"seconds that {BATCH} queries together may take")
    add(
        "--kind",
        default=None,
        action="append",
        help="only this one, or IVF16384,PQ64 and the like; repeatable",
    )
    add("--measure", action="store_true", help="measure the rates of this machine first (half a minute)")
    add("--json", action="store_true", help="print JSON and no table")


def run(settings: argparse.Namespace) -> int:
    """Print the table and the recommendation; exit status 1 when nothing fits. Raises RetrieverError."""
    for name in ("n", "dim", "threads", "batch_s"):
        if getattr(settings, name) <= 0:
            raise RetrieverError(f"--{name} must be greater than 0, got {getattr(settings, name)}")
    ram = parse_bytes(settings.ram) if settings.ram else _read_ram()
    rates = Rates()
    if settings.measure:
        from search_r1.search.rates import measure_rates

        rates = measure_rates(settings.dim)
    size, threads = (settings.n, settings.dim), settings.threads
    if settings.kind:
        rows = [estimate(parse_options(name), *size, threads=threads, rates=rates) for name in settings.kind]
    else:
        rows = plan(*size, threads=threads, rates=rates)
    made = _Plan(
        num_vectors=settings.n,
        dim=settings.dim,
        ram_bytes=ram,
        threads=threads,
        rates=rates,
        measured=settings.measure,
        rows=rows,
        recommendation=recommend(rows, ram, batch_s=settings.batch_s),
        names=settings.kind or [row.kind for row in rows],
    )
    if settings.json:
        _print_json(made)
    else:
        _print_table(made)
    return 0 if made.recommendation.kind else 1


def _print_json(made: _Plan) -> None:
    facts = {
        "n": made.num_vectors,
        "dim": made.dim,
        "ram_bytes": made.ram_bytes,
        "threads": made.threads,
        "batch": BATCH,
        "rates_per_core": asdict(made.rates),
        "rates_measured_here": made.measured,
        "kinds": [asdict(row) for row in made.rows],
        "recommended": made.recommendation.kind,
        "reason": made.recommendation.reason,
        "command": made.command,
    }
    sys.stdout.write(json.dumps(facts, indent=2) + "\n")


def _print_table(made: _Plan) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = max(console.width, _MIN_WIDTH)
    table = Table(title=f"{made.num_vectors:,} vectors of {made.dim} dimensions, cores: {made.threads}")
    names = ("kind", "disk", "memory", "at least", "build peak", "build*", "1 query*", f"{BATCH} queries*")
    for name in names:
        table.add_column(name, justify="left" if name == "kind" else "right", no_wrap=True)
    table.add_column("recall@3*", no_wrap=True)
    for row in made.rows:
        sizes = (row.disk_bytes, row.memory_bytes, row.mapped_bytes, row.build_peak_bytes)
        times = (row.build_s, row.query_s, row.batch_s)
        chosen = row is made.recommendation.row
        cells = (row.kind, *map(show_bytes, sizes), *map(show_seconds, times), row.recall)
        table.add_row(*cells, style="bold" if chosen else None)
    console.print(table)
    console.print(_explain_columns(made))
    recommended = made.recommendation
    console.print(
        f"\nwith {show_bytes(made.ram_bytes)} ({made.ram_bytes / 2**30:.1f} GiB) of RAM:"
        f" {recommended.kind or 'nothing'}. {recommended.reason}"
    )
    if made.command:
        console.print(f"build it: {made.command}", soft_wrap=True)


def _explain_columns(made: _Plan) -> str:
    source = "measured here" if made.measured else "assumed (--measure measures them here)"
    shown = ", ".join(f"{field.name} {getattr(made.rates, field.name):.2g}" for field in fields(made.rates))
    return (
        "Sizes are formulas, checked against built indexes; GB are 10^9 bytes. memory: process and index,"
        " when all that queries read is in memory. at least: what the process cannot give back while the file"
        " is memory-mapped; with no more than that every query reads the disk. build peak: of the process"
        " that builds from encoded vectors; until it is done these lie on the disk beside the index,"
        f" {show_bytes(4 * made.num_vectors * made.dim)}.\n"
        "* Estimates. build: without encoding the passages, which without a GPU takes far longer than all of"
        f" this. Rates of one core in a second, {source}: {shown}. recall@3: expected of embeddings of text;"
        " `index recall` measures it."
    )


def _read_ram() -> int:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
