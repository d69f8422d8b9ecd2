"""Write report.html of a run folder, also of a run that crashed: `python scripts/report.py RUN_DIR`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from verl.errors import DataError
from verl.report.report import write_report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with metrics.jsonl, e.g. runs/quickstart-...")
    options = parser.parse_args(arguments)
    try:
        path = write_report(options.run_dir)
    except DataError as error:
        sys.exit(f"error: {error}")
    print(path)


if __name__ == "__main__":
    main()
