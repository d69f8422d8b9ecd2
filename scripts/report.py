"""Write report.html of a run folder, also of a run that crashed: `python scripts/report.py RUN_DIR`."""

from __future__ import annotations

import argparse
from pathlib import Path

from serving.web.settings import expand_home
from verl.run.report.report import write_report
from verl.utils.entry import error_line


def main(arguments: list[str] | None = None) -> None:
    """Write the report and print its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", type=Path, help="folder with metrics.jsonl, e.g. runs/quickstart-...")
    options = parser.parse_args(expand_home(arguments))
    with error_line():
        print(write_report(options.run_dir))


if __name__ == "__main__":
    main()
