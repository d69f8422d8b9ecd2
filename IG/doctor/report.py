"""The report of a diagnosis: `report.json`, two pictures, and one page that holds it all."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from IG.doctor.diagnosis import Diagnosis, Plan
from IG.doctor.plots import draw_estimation_error, draw_gain_by_scenario
from IG.doctor.tables import Table, skipped_lines, tables

ERROR_PICTURE = "estimation_error.png"
SCENARIO_PICTURE = "gain_by_scenario.png"
_CAPTIONS = {
    ERROR_PICTURE: "Error of the gain against the number of samples per condition.",
    SCENARIO_PICTURE: "Gain by what was found: boxes are quartiles, whiskers 5 to 95 %, dots questions.",
}
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #e3e7eb; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { color: #5b6470; font-weight: 600; }
p.meaning { color: #5b6470; max-width: 48rem; }
img { max-width: 100%; }
p.advice { background: #eef6fb; border-left: 4px solid #0072b2; padding: .8rem 1rem; }
"""
_TITLE = "Information gain, examined"


def write_report(
    diagnosis: Diagnosis, plan: Plan, folder: Path, *, settings: Mapping[str, object], seconds: float
) -> None:
    """Write all files into the folder; pictures of an earlier report are removed."""
    for name in _CAPTIONS:
        (folder / name).unlink(missing_ok=True)
    if diagnosis.noise is not None:
        draw_estimation_error(diagnosis.noise, folder / ERROR_PICTURE, gain=str(plan.rule.gain))
    if diagnosis.gains:
        draw_gain_by_scenario(diagnosis.gains, folder / SCENARIO_PICTURE, gain=str(plan.rule.gain))
    written = {"settings": dict(settings), "seconds": round(seconds, 1), **asdict(diagnosis)}
    (folder / "report.json").write_text(
        json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
    )
    page = _page(diagnosis, tables(diagnosis, plan), folder, settings=settings)
    (folder / "report.html").write_text(page, encoding="utf-8")


def _page(
    diagnosis: Diagnosis, shown: Sequence[Table], folder: Path, *, settings: Mapping[str, object]
) -> str:
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        f"<title>{_TITLE}</title><style>{_STYLE}</style></head><body><h1>{_TITLE}</h1>",
        f"<p>{diagnosis.num_questions} questions.</p>",
        f'<p class="advice">{escape(diagnosis.advice.sentence)}</p>',
        *(f"<p>{escape(line)}</p>" for line in skipped_lines(diagnosis)),
        *(_figure(folder / name, caption=caption) for name, caption in _CAPTIONS.items()),
        *(_table(table) for table in shown),
        _table(
            Table(
                title="Settings",
                meaning="What this was measured with.",
                columns=("setting", "value"),
                rows=tuple((name, str(value)) for name, value in settings.items()),
            )
        ),
        "</body></html>\n",
    ]
    return "\n".join(part for part in parts if part)


def _figure(path: Path, *, caption: str) -> str:
    if not path.exists():
        return ""
    encoded = base64.b64encode(path.read_bytes()).decode()
    return (
        f'<p><img alt="{escape(caption)}" src="data:image/png;base64,{encoded}"></p><p>{escape(caption)}</p>'
    )


def _table(table: Table) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    rows = "\n".join(line(row, "td") for row in table.rows)
    return (
        f'<h2>{escape(table.title)}</h2><p class="meaning">{escape(table.meaning)}</p>\n'
        f"<table>{line(table.columns, 'th')}\n{rows}</table>"
    )
