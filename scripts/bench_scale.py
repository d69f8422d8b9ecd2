"""Measure on this machine what decides how a run scales, and print plans for machines with GPUs.

`make bench-scale` calls `measure()` of every module of scripts/scale, each in a process of its own, and
prints its figures; docs/scale.md says what they mean. The last line of the output is JSON: the figures of
each part by name, and under `failed` the parts that gave none.
"""

from __future__ import annotations

import argparse
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

import scale
import scale.plan
from verl.utils.entry import error_line

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Return the exit status: 0 if every part gave its figures."""
    parts = [module.name for module in pkgutil.iter_modules(scale.__path__)]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", help=f"parts to measure: {', '.join(parts)} (default: all)")
    chosen = parser.parse_args().parts or parts
    if unknown := sorted({*chosen} - {*parts}):
        parser.error(f"{', '.join(unknown)}: no such part; there are {', '.join(parts)}")
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    figures: dict[str, object] = {}
    failed = []
    for part in chosen:
        console.print(f"measuring {part} ...")
        measured = measure(part)
        if measured is None:
            failed.append(part)
            continue
        figures[part] = measured
        console.print(show(part, measured))
        if part == "plan":
            console.print(*scale.plan.tables())
            rows = [*scale.plan.recipe_rows(), *scale.plan.lora_rows(), *scale.plan.stage_rows()]
            console.print("\n".join(rows), soft_wrap=True)
    print(json.dumps({**figures, "failed": failed}))
    return 1 if failed else 0


def measure(part: str) -> dict[str, float] | None:
    """Return the figures of a part; None if it failed, which it then has reported on stderr.

    A process of its own, because parts start engines, process groups and Ray.
    """
    code = f"import json; from scale.{part} import measure; print(json.dumps(measure()))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,  # actors have the working folder of their driver, and the world is here
        env={**os.environ, "PYTHONPATH": str(ROOT / "scripts")},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode != 0:
        return None
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def show(part: str, figures: dict[str, float]) -> Table:
    """Return the figures for the terminal."""
    table = Table(part, "", show_header=True)
    for name, value in figures.items():
        table.add_row(name, f"{value:g}")
    return table


if __name__ == "__main__":
    with error_line():
        sys.exit(main())
