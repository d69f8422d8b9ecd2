"""Draw exact match, searches, gain and entropy of one or more runs as a paper prints them, in PDF and PNG.

    python scripts/draw_run.py runs/quickstart-20260101-120000 --out figures
    python scripts/draw_run.py runs/search_r1 runs/igpo --out figures --name two_methods

Lines are sampled episodes of training questions; squares are evaluations (greedy, held-out questions).
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from comparison.figures import Picture, open_figure, write_figure
from serving.plotting import COLORS, GREY
from serving.web.settings import expand_home
from verl.errors import ConfigError
from verl.run.tracking import METRICS_FILE, MetricsLine, read_metrics
from verl.utils.entry import error_line

Points = list[tuple[int, float]]
_LEGEND_COLUMNS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    title: str
    sampled: str
    evaluated: str | None = None
    is_share: bool = False


_PANELS = (
    _Panel(title="exact match", sampled="reward/em_mean", evaluated="val/em", is_share=True),
    _Panel(title="searches per episode", sampled="rollout/searches_mean", evaluated="val/searches_mean"),
    _Panel(title="gain, as the method measures it", sampled="ig/gain_mean"),
    _Panel(title="entropy, nats per sampled token", sampled="policy/entropy"),
)


def read_runs(folders: Sequence[Path]) -> dict[str, list[MetricsLine]]:
    """Return the metrics of each run by the name of its folder. Raises ConfigError, DataError."""
    runs: dict[str, list[MetricsLine]] = {}
    for folder in folders:
        name = folder.resolve().name
        if name in runs:
            raise ConfigError(
                f"{folder}: a run named {name} is given before; expected folders of different names"
            )
        runs[name] = read_metrics(folder)
        if not runs[name]:
            raise ConfigError(f"{folder}: expected a run folder with a line in {METRICS_FILE}")
    return runs


def draw(runs: Mapping[str, Sequence[MetricsLine]], *, name: str, folder: Path) -> Picture:
    """Write four panels over the steps with a line and squares per run; return the picture."""
    colors = dict(zip(runs, COLORS, strict=False))
    rows = math.ceil(len(runs) / _LEGEND_COLUMNS)
    height = 4.3 + 0.2 * rows
    with open_figure(name, height=height) as figure:
        grid = figure.subplots(2, 2)
        figure.subplots_adjust(
            left=0.07, right=0.985, top=0.95, bottom=(0.5 + 0.2 * rows) / height, hspace=0.3, wspace=0.16
        )
        for panel, axes in zip(_PANELS, grid.flat, strict=True):
            drawn = [_draw_run(axes, panel, lines, colors[run]) for run, lines in runs.items()]
            if not any(drawn):
                axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", color=GREY)
            axes.set_title(panel.title, fontsize=9, loc="left", pad=3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            if panel.is_share:
                axes.set_ylim(-0.02, 1.02)
        for axes in grid[1]:
            axes.set_xlabel("step")
        handles = [Line2D([], [], color=color, label=run) for run, color in colors.items()]
        if len(runs) == 1:
            (color,) = colors.values()
            handles = [
                Line2D([], [], color=color, label="sampled, training questions"),
                Line2D([], [], color=color, linestyle="", marker="s", label="greedy, held-out questions"),
            ]
        figure.legend(handles=handles, loc="lower center", ncols=_LEGEND_COLUMNS)
        return write_figure(figure, name=name, caption="", folder=folder)


def _draw_run(axes: Axes, panel: _Panel, lines: Sequence[MetricsLine], color: str) -> bool:
    sampled = _points(lines, "train", panel.sampled)
    evaluated = _points(lines, "val", panel.evaluated) if panel.evaluated else []
    if sampled:
        axes.plot(*zip(*sampled, strict=True), color=color, linewidth=1.3)
    if evaluated:
        axes.plot(*zip(*evaluated, strict=True), "s--", color=color, markersize=5, linewidth=1)
    return bool(sampled or evaluated)


def _points(lines: Sequence[MetricsLine], kind: str, metric: str) -> Points:
    return [
        (line["step"], line[metric])
        for line in lines
        if line["kind"] == kind and line.get(metric) is not None
    ]


def main(arguments: list[str] | None = None) -> None:
    """Write the figure and print its paths."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", help=f"folders with {METRICS_FILE}")
    parser.add_argument("--out", type=Path, default=Path("figures"), help="folder (default figures)")
    parser.add_argument("--name", default="curves", help="file name without its ending (default curves)")
    options = parser.parse_args(expand_home(arguments))
    with error_line():
        if len(options.run_dirs) > len(COLORS):
            raise ConfigError(f"{len(options.run_dirs)} runs: expected at most {len(COLORS)} in one figure")
        draw(read_runs(options.run_dirs), name=options.name, folder=options.out)
        print(options.out / f"{options.name}.pdf", options.out / f"{options.name}.png", sep="\n")


if __name__ == "__main__":
    main()
