"""Draw how much reading parts of the evidence gains in a world, from a report of `python -m IG doctor`.

    python scripts/make_world.py --world hard --out world/hard --check
    python scripts/draw_gains.py world/hard/.making/doctor/report.json

The check leaves that report. Beside the figure, gains.pdf and gains.png, its numbers are written to
gains.json, which this command reads as well.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from comparison.figures import open_figure, write_figure
from IG.doctor.questions import Scenario
from serving.files import write_atomically
from serving.plotting import BLUE, GREY, INK, ORANGE
from serving.web.settings import expand_home
from verl.errors import ConfigError
from verl.utils.entry import error_line

ROWS = {
    Scenario.random: "unrelated documents",
    Scenario.first: "the first document alone",
    Scenario.rest: "all others, without the first",
    Scenario.supporting: "all together",
}
"""From top to bottom."""
_DIGITS = 4
_SETTINGS = ("num_generations", "max_samples", "max_new_tokens", "score", "gain", "seed")
Gains = Mapping[Scenario, Sequence[float]]


def read_report(path: Path) -> tuple[Gains, dict[str, object]]:
    """Return the gains of each scenario, one per question, and how they were measured. Raises ConfigError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        gains = {row: [round(value, _DIGITS) for value in report["gains"][row]] for row in ROWS}
        return gains, {name: report["settings"][name] for name in _SETTINGS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}: expected report.json of `python -m IG doctor`, or gains.json: {error!r}"
        ) from error


def draw(gains: Gains, *, folder: Path) -> None:
    """Write a row per scenario: a box (quartiles, median; whiskers to 1.5 of its width) over all gains."""
    rng = np.random.default_rng(0)
    places = range(len(ROWS), 0, -1)
    ink = {"color": INK}
    with open_figure("gains", height=2.3) as figure:
        axes = figure.subplots()
        figure.subplots_adjust(left=0.26, right=0.985, top=0.97, bottom=0.2)
        for place, row in zip(places, ROWS, strict=True):
            spread = rng.uniform(-0.2, 0.2, size=len(gains[row]))
            axes.plot(gains[row], place + spread, ".", color=BLUE, alpha=0.4, markersize=4, markeredgewidth=0)
        axes.boxplot(
            [gains[row] for row in ROWS],
            positions=list(places),
            orientation="horizontal",
            widths=0.6,
            showfliers=False,
            boxprops=ink,
            whiskerprops=ink,
            capprops=ink,
            medianprops={"color": ORANGE, "linewidth": 2},
        )
        axes.axvline(0, color=GREY, linewidth=0.8, zorder=0)
        axes.set_yticks(list(places), list(ROWS.values()))
        axes.set_xlabel("information gain: rise of the probability of the right answer")
        axes.grid(visible=False, axis="y")
        write_figure(figure, name="gains", caption="Gains of parts of the evidence", folder=folder)


def main(arguments: list[str] | None = None) -> None:
    """Write the figure and its numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("report", type=Path, help="report.json of the doctor, or gains.json")
    parser.add_argument("--out", type=Path, default=Path("docs/worlds"), help="folder (default docs/worlds)")
    options = parser.parse_args(expand_home(arguments))
    with error_line():
        gains, settings = read_report(options.report)
        draw(gains, folder=options.out)
        rows = ",\n".join(f"  {json.dumps(row)}: {json.dumps(gains[row])}" for row in ROWS)
        text = f'{{"settings": {json.dumps(settings)},\n"gains": {{\n{rows}\n}}}}\n'
        write_atomically(options.out / "gains.json", text)


if __name__ == "__main__":
    main()
