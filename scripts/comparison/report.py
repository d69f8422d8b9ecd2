"""Write what a comparison shows: a page, Markdown, the board, figures, and the tables on the terminal."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from markupsafe import Markup
from rich.console import Console

from comparison.campaign import TUNING, Campaign
from comparison.claims import list_claims
from comparison.figures import Picture, draw_stage, draw_variation
from comparison.plan import SOME_GROUPS, Plan, Stage
from comparison.results import RUNS, Result
from comparison.tables import (
    board_table,
    control_table,
    cost_table,
    run_table,
    score_table,
    tuning_table,
    variation_table,
)
from serving.files import write_atomically
from verl.evaluation.page import render_template
from verl.evaluation.tables import Table, as_markdown, as_rich

DEFAULT_PLAN = "default"
BOARD_STAGE = "hard"
"""Name of the stage that the board shows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where results and reports are."""

    results: Path
    """Folder of the results of all plans: no run is done for two plans."""
    report: Path
    """Folder of comparison.html and figures."""
    markdown: Path
    board: Path | None
    """None: another plan than the default one has no board."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A part of the report."""

    title: str
    lines: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


def find_places(docs: Path, *, plan: str) -> Places:
    """Return where the results of a plan go below a folder such as docs/."""
    results = docs / "comparison"
    if plan == DEFAULT_PLAN:
        return Places(
            results=results, report=results, markdown=docs / "comparison.md", board=docs / "board.md"
        )
    folder = results / Path(plan).stem
    return Places(results=results, report=folder, markdown=folder / "comparison.md", board=None)


def write_report(campaign: Campaign, *, stages: Sequence[str], places: Places, plan: str) -> Path:
    """Write all files of the report; return the page."""
    sections = make_sections(campaign, stages=stages, figures=places.report / "figures")
    done, total = campaign.count(stages)
    state = f"{done} of {total} runs are done."
    page = places.report / "comparison.html"
    shown = [
        {
            "title": section.title,
            "lines": section.lines,
            "tables": section.tables,
            "pictures": [replace(picture, svg=Markup(picture.svg)) for picture in section.pictures],
        }
        for section in sections
    ]
    write_atomically(page, render_template("methods.html", title=_title(plan), state=state, sections=shown))
    links = os.path.relpath(places.report / "figures", places.markdown.parent)
    text = _as_markdown(campaign, sections, title=_title(plan), state=state, figures=links, plan=plan)
    write_atomically(places.markdown, text)
    if places.board is not None and BOARD_STAGE in campaign.plan.stages:
        board = board_table(
            campaign, campaign.runs_of(campaign.plan.stages[BOARD_STAGE]), stage_name=BOARD_STAGE, plan=plan
        )
        write_atomically(places.board, as_markdown(board).replace("## ", "# ", 1))
    return page


def make_sections(campaign: Campaign, *, stages: Sequence[str], figures: Path) -> list[Section]:
    """Return the parts of the report; stages without a result are left out."""
    of_stages = [(name, campaign.plan.stages[name]) for name in stages if name != TUNING]
    known = [(name, stage, runs) for name, stage in of_stages if (runs := campaign.results_of(stage))]
    claims = [f"{claim.title} ({claim.source}). {claim.found}" for claim in list_claims(campaign, stages)]
    sections = [Section(title="What the results say", lines=tuple(claims))] if known and claims else []
    sections += [_stage_section(name, campaign, stage, runs, figures=figures) for name, stage, runs in known]
    tuning = campaign.plan.tuning
    tried = [trial.em for trials in campaign.trials.values() for trial in trials]
    if tuning is not None and TUNING in stages and any(em is not None for em in tried):
        table = tuning_table(
            campaign.trials, tuning, repeats=campaign.repeats(), longest=_longest(campaign.plan)
        )
        sections.append(Section(title="Tuning", tables=(table,)))
    every = {run.key: run for run in campaign.all_runs(stages)}
    sections.append(Section(title="Runs", tables=(run_table(campaign, list(every.values())),)))
    return sections


def show(campaign: Campaign, *, stages: Sequence[str], console: Console) -> None:
    """Print the tables of scores and costs, and what the results say."""
    for name in stages:
        if name != TUNING and (runs := campaign.results_of(campaign.plan.stages[name])):
            stage = campaign.plan.stages[name]
            first, *others = _stage_tables(campaign, stage, runs)
            for table in (replace(first, title=f"{name}: exact match"), *others):
                console.print(as_rich(table), "")
    for claim in list_claims(campaign, stages):
        console.print(f"[bold]{claim.title}[/bold] ({claim.source})", highlight=False)
        console.print(f"  {claim.found}\n", highlight=False, markup=False)


def _stage_section(
    name: str, campaign: Campaign, stage: Stage, runs: Mapping[str, list[Result]], *, figures: Path
) -> Section:
    lines = [f"World {stage.world}, {stage.steps} steps, {stage.seeds} seeds.", *_warn_of_kl(campaign, stage)]
    tables = _stage_tables(campaign, stage, runs)
    if stage.vary is not None and not stage.methods:
        values = {value: runs[label] for label, value in stage.vary.names().items() if label in runs}
        setting = stage.vary.setting.rpartition(".")[2]
        picture = draw_variation(values, setting=setting, method=stage.vary.method, name=name, folder=figures)
        return Section(title=name, lines=tuple(lines), tables=tables, pictures=(picture,))
    numbers = campaign.plan.numbers(runs)
    pictures = draw_stage(runs, numbers=numbers, name=name, base=stage.base, folder=figures)
    return Section(title=name, lines=tuple(lines), tables=tables, pictures=tuple(pictures))


def _stage_tables(campaign: Campaign, stage: Stage, runs: Mapping[str, list[Result]]) -> tuple[Table, ...]:
    if stage.vary is not None and not stage.methods:
        return (variation_table(runs, setting=stage.vary.setting.rpartition(".")[2]),)
    scores = score_table(runs, base=stage.base, stage=stage)
    pairs = campaign.plan.controls(runs)
    return (scores, *([control_table(runs, pairs)] if pairs else []), cost_table(runs))


def _warn_of_kl(campaign: Campaign, stage: Stage) -> list[str]:
    """Return a sentence on methods that are trained on some groups only, and with a KL term on all."""
    acting = {
        name: runs[0].tuned.kl
        for name, runs in campaign.runs_of(stage).items()
        if runs[0].method.handicap == SOME_GROUPS and runs[0].tuned.kl > 0
    }
    if not acting:
        return []
    shown = ", ".join(f"{name} ({kl:g})" for name, kl in acting.items())
    return [f"Groups without credit are still drawn to the initial policy by the KL term of {shown}."]


def _title(plan: str) -> str:
    return "Comparison of methods" + ("" if plan == DEFAULT_PLAN else f": {Path(plan).stem}")


def _as_markdown(
    campaign: Campaign, sections: Sequence[Section], *, title: str, state: str, figures: str, plan: str
) -> str:
    parts = [
        f"# {title}\n",
        f"{state} `make compare COMPARE_ARGS='--plan {plan}'` does the others and writes this file.\n",
    ]
    parts.append(_HOW.format(tuning=_describe_tuning(campaign.plan)))
    for section in sections:
        parts.append(f"## {section.title}\n")
        parts += [f"- {line}\n" if len(section.lines) > 1 else f"{line}\n" for line in section.lines]
        for picture in section.pictures:
            parts.append(f"![{picture.caption}]({figures}/{picture.name}.png)\n")
            parts.append(f"{picture.caption} Also as [PDF]({figures}/{picture.name}.pdf).\n")
        parts += [f"#{as_markdown(table)}" for table in section.tables]
    return "\n".join(parts)


def _longest(plan: Plan) -> int:
    return max(stage.steps for stage in plan.stages.values())


def _describe_tuning(plan: Plan) -> str:
    tuning = plan.tuning
    if tuning is None:
        return f"No method is tuned; all have {plan.untuned}."
    likes = {name: method.tuned_like for name, method in plan.methods.items() if method.tuned_like}
    text = (
        f"{len(tuning.methods)} methods have {len(tuning.trials)} trials each to find learning rate, group "
        f"size and KL weight: {tuning.steps} of up to {_longest(plan)} steps, on training questions, with "
        "one seed that no other run has. The other runs use the best."
    )
    if likes:
        shown = ", ".join(f"{name} those of {other}" for name, other in likes.items())
        text += f" Variants are not tuned: {shown}."
    others = [name for name in plan.methods if name not in likes and name not in tuning.methods]
    if others:
        text += f" Not tuned, with {plan.untuned}: {', '.join(others)}."
    return text


_HOW = f"""\
All runs have the same number of episodes per step. {{tuning}}
The plan (`scripts/comparison/plans/`) names all settings and can be changed. The results are
`docs/comparison/{RUNS}/KEY.json`; KEY is a hash of the settings, the content of the world and the version
of the code that computes them (`CODE_VERSION` in `scripts/comparison/runs.py`). A run that is done is not
done again; one that was interrupted begins again.

- `--hours 8` begins no run that would end later; `--report` writes what there is, `--list`
  prints what is left.
- `--stage NAME` does one part; `--verify KEY` does one run again and records nothing.
- `--plan separates` shows that a world separates a broken reward from a right one, before the long runs.
"""
