"""Draw the doctor's plot: gains by scenario."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from IG.doctor.questions import Scenario
from serving.plotting import BLUE, ORANGE, STYLE


def draw_gains(gains: Mapping[Scenario, Sequence[float]], path: Path, *, gain: str) -> None:
    """Draw a box per scenario: quartiles, whiskers from 5 to 95 %, and every question as a dot."""
    rng = np.random.default_rng(0)
    places = np.arange(1, len(gains) + 1)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.2 + 1.2 * len(gains), 3.7), layout="constrained")
        axes = figure.subplots()
        axes.axhline(0, color="#9aa3ad", linewidth=1)
        axes.boxplot(
            [np.asarray(values) for values in gains.values()],
            positions=places,
            widths=0.55,
            whis=(5, 95),
            showfliers=False,
            medianprops={"color": ORANGE, "linewidth": 2},
            boxprops={"color": BLUE},
            whiskerprops={"color": BLUE},
            capprops={"color": BLUE},
        )
        for place, values in zip(places, gains.values(), strict=True):
            spread = place + rng.uniform(-0.2, 0.2, size=len(values))
            axes.plot(spread, values, ".", color=BLUE, alpha=0.25, markersize=4)
        axes.set_xticks(places, ["\n".join(name.rsplit(" ", 1)) for name in gains])
        axes.grid(axis="x", visible=False)
        axes.set_ylabel(f"information gain ({gain})")
        count = max(len(values) for values in gains.values())
        axes.set_title(f"{count} questions", loc="left", fontsize=10)
        figure.savefig(path, dpi=110)
