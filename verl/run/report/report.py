"""`write_report(run_dir)`: one self-contained HTML file about a run, its curves and its trajectories.

Model output, passages and questions are untrusted text: the templates escape everything except our charts.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from serving.files import write_atomically
from verl.run.report.charts import draw_curves, draw_phases
from verl.run.report.credit import (
    LEVELS,
    credit_pieces,
    credit_scale,
    describe_credit,
    gain_scale,
    segment_parts,
    shade,
    shade_color,
)
from verl.run.report.examples import is_right, pick_extremes, pick_pairs, pick_steps
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
from verl.run.report.speed import list_traces, phase_rows
from verl.run.report.text import gain_of, mask_strip, names_gold, reward_of, split_output
from verl.utils.failures import failure_name

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
    """Write `report.html` for a run that has ended or crashed. Raises DataError for another folder."""
    run = read_run(run_dir)
    path = run_dir / REPORT_FILE
    write_atomically(path, render_report(run))
    return path


def render_report(run: RunData) -> str:
    """Return the report as HTML."""
    phases_chart = draw_phases(run)
    pairs, steps, extremes = pick_pairs(run), pick_steps(run), pick_extremes(run)
    shown = [record for step in steps for group in step.groups for record in group]
    shown += [*extremes.best, *extremes.worst]
    credit_full, gain_full = credit_scale(shown), gain_scale(shown)
    environment = make_environment(
        credit_full=credit_full, gain_full=gain_full, old_gain_weight=run.old_gain_weight
    )
    return environment.get_template("report.html").render(
        title=run.setting("trainer.experiment_name") or run.run_dir.resolve().name,
        run=run,
        facts=run_facts(run),
        tiles=headline(run),
        status=run.manifest.get("status"),
        measures=[(name, label) for name, label in MEASURES if run.series(f"val/{name}", kind="val").steps],
        sources=compare_evaluations(run),
        evaluated_steps=[line["step"] for line in run.val],
        charts=[(title, meaning, Markup(svg)) for title, meaning, svg in draw_curves(run)],
        phases=phase_rows(run),
        phases_chart=None if phases_chart is None else Markup(phases_chart),
        traces=list_traces(run),
        pairs=pairs,
        steps=steps,
        extremes=extremes,
        credit_scale=credit_full,
        gain_scale=gain_full,
        shades=[(_shade_class(level).strip(), shade_color(level)) for level in range(-LEVELS, LEVELS + 1)],
        metrics=metrics_table(run),
        config=json.dumps(run.manifest.get("config", {}), indent=2, ensure_ascii=False),
        services=run.manifest.get("services") or {},
        style=Markup((TEMPLATES / "style.css").read_text(encoding="utf-8")),
        script=Markup((TEMPLATES / "page.js").read_text(encoding="utf-8")),
    )


def make_environment(
    *,
    credit_full: float,
    gain_full: float,
    old_gain_weight: float = 0.0,
    folders: Sequence[Path] = (),
) -> Environment:
    """Return the templates and what they call; colors are full at these sizes of an advantage and a gain.

    `folders` have further templates, which come before those of the same name here. `old_gain_weight` is for
    records of format 1.
    """
    # Everything but our own SVG, style and script is text from outside, and escaped.
    environment = Environment(
        loader=FileSystemLoader([*folders, TEMPLATES]),
        autoescape=True,
        undefined=StrictUndefined,  # a misspelled name in a template is an error, not an empty text
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "segments": split_output,
        "signed": _signed,
        "number": _plain,
        "failure": failure_name,
    }
    environment.tests |= {"right": is_right}
    environment.globals |= {
        "searches": count_searches,
        "gain": gain_of,
        "reward": partial(reward_of, gain_weight=old_gain_weight),
        "names_gold": names_gold,
        "mask_strip": mask_strip,
        "pieces": credit_pieces,
        "parts": segment_parts,
        "describe_credit": describe_credit,
        "credit_shade": lambda value: _shade_class(shade(value, scale=credit_full)),
        "gain_shade": lambda value: _shade_class(shade(value, scale=gain_full)),
    }
    return environment


def _shade_class(level: int) -> str:
    """Return the CSS class of a shade after a space."""
    return f" {'neg' if level < 0 else 'pos'}{abs(level)}" if level else " zero"


def headline(run: RunData) -> list[Tile]:
    """Return the most important numbers; those that were not measured are left out."""
    tiles = []
    names = run.names() + run.names(kind="val")
    # What says whether an answer is right: math where it was graded so.
    name, measure = (
        ("math", "equal expressions") if {"val/math", "reward/math_mean"} & {*names} else ("em", "EM")
    )
    held_out = run.series(f"val/{name}", kind="val")
    if held_out.values:
        before, *later = (f"{value:.1%}" for value in held_out.values)
        steps = " and ".join(map(str, dict.fromkeys((held_out.steps[0], held_out.steps[-1]))))
        note = f"greedy, step {steps}"
        tiles.append(
            Tile(label=f"Held-out {measure}", before=before, after=later[-1] if later else None, note=note)
        )
    for label, metric, form in (
        (f"Sampled {measure}", f"reward/{name}_mean", ".1%"),
        ("Information gain", "ig/gain_mean", "+.3f"),
        ("Searches per question", "rollout/searches_mean", ".2f"),
    ):
        series = run.series(metric)
        if series.first is not None and series.last is not None:
            before, after = format(series.first, form), format(series.last, form)
            note = f"mean of the first and last {min(WINDOW, len(series.steps))} steps"
            tiles.append(Tile(label=label, before=before, after=after, note=note))
    if duration := format_seconds(run.seconds):
        seconds = run.series("time/step_s").values
        note = f"{sum(seconds) / len(seconds):.1f} s per step" if seconds else ""
        tiles.append(Tile(label="Duration", before=duration, after=None, note=note))
    return tiles


def metrics_table(run: RunData) -> list[tuple[str, ...]]:
    """Return name, first, last, lowest and highest value of every metric."""
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
