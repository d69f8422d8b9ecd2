"""`write_report(run_dir)`: one self-contained HTML file that shows what was run, what it learned, and why.

Model output, passages and questions are untrusted text: templates escape everything but the charts made here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from serving.files import write_atomically
from verl.run.report.charts import draw_curves
from verl.run.report.examples import failure_label, is_right, pick_extremes, pick_pairs, pick_steps
from verl.run.report.run_data import (
    MEASURES,
    WINDOW,
    RunData,
    compare_evaluations,
    count_searches,
    format_seconds,
    read_run,
    run_facts,
)
from verl.run.report.text import gain_of, mask_strip, names_gold, split_output

REPORT_FILE = "report.html"
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One headline number."""

    label: str
    before: str
    after: str | None
    note: str


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into the run folder, crashed or not. Raises DataError if it is no such folder."""
    run = read_run(run_dir)
    path = run_dir / REPORT_FILE
    write_atomically(path, render_report(run))
    return path


def render_report(run: RunData) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "segments": split_output,
        "signed": _signed,
        "number": _plain,
        "failure": failure_label,
    }
    environment.tests |= {"right": is_right}
    environment.globals |= {
        "searches": count_searches,
        "gain": gain_of,
        "names_gold": names_gold,
        "mask_strip": mask_strip,
    }
    return environment.get_template("report.html").render(
        title=run.setting("trainer", "experiment_name") or run.run_dir.resolve().name,
        run=run,
        facts=run_facts(run),
        tiles=headline(run),
        status=run.manifest.get("status"),
        measures=MEASURES,
        sources=compare_evaluations(run),
        evaluated_steps=list(run.evaluations),
        charts=[(title, meaning, Markup(svg)) for title, meaning, svg in draw_curves(run)],
        pairs=pick_pairs(run),
        steps=pick_steps(run),
        extremes=pick_extremes(run),
        metrics=metrics_table(run),
        config=json.dumps(run.manifest.get("config", {}), indent=2, ensure_ascii=False),
        services=run.manifest.get("services") or {},
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )


def headline(run: RunData) -> list[Tile]:
    """The numbers to see first; those that were not measured are left out."""
    held_out = run.series("val/em", kind="val")
    tiles = []
    if held_out.values:
        after = held_out.values[-1] if len(held_out.values) > 1 else None
        note = f"greedy, step {held_out.steps[0]}"
        note += f" and {held_out.steps[-1]}" if after is not None else ""
        tiles.append(
            Tile(label="Held-out EM", before=_percent(held_out.values[0]), after=_percent(after), note=note)
        )
    for label, metric, form in (
        ("Sampled EM", "reward/em_mean", "%"),
        ("Information gain", "ig/gain_mean", "+.3f"),
        ("Searches per question", "rollout/searches_mean", ".2f"),
    ):
        series = run.series(metric)
        if series.first is not None and series.last is not None:
            first, last = (
                _percent(v) if form == "%" else format(v, form) for v in (series.first, series.last)
            )
            note = f"mean of the first and last {min(WINDOW, len(series.steps))} steps"
            tiles.append(Tile(label=label, before=str(first), after=str(last), note=note))
    seconds = run.series("time/step_s").values
    if run.seconds is not None:
        note = f"{sum(seconds) / len(seconds):.1f} s per step" if seconds else ""
        tiles.append(Tile(label="Duration", before=format_seconds(run.seconds) or "", after=None, note=note))
    return tiles


def metrics_table(run: RunData) -> list[tuple[str, ...]]:
    """Name, first, last, lowest, highest of every metric."""
    rows: list[tuple[str, ...]] = []
    for kind in ("train", "val"):
        for name in sorted(run.names(kind=kind)):
            values = run.series(name, kind=kind).values
            cells = (values[0], values[-1], min(values), max(values)) if values else (None,) * 4
            rows.append((name, *(_plain(value) for value in cells)))
    return rows


def _signed(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def _plain(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
