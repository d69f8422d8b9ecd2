"""Read recorded trajectories in the terminal.

python scripts/view_rollouts.py runs/NAME                        # the last recorded step
python scripts/view_rollouts.py runs/NAME --step 12 --only wrong
python scripts/view_rollouts.py runs/NAME/evaluation/step_000050.jsonl --limit 3
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

from serving.web.settings import expand_home
from verl.errors import DataError
from verl.run.records import (
    EVALUATION,
    TRAJECTORIES,
    TrajectoryRecord,
    TurnRecord,
    count_calls,
    iterate_records,
    step_files,
)
from verl.run.report.credit import (
    LEVELS,
    Piece,
    credit_pieces,
    credit_scale,
    mean_advantage,
    segment_parts,
    shade,
    shade_color,
    span_credits,
)
from verl.run.report.examples import is_right
from verl.run.report.run_data import count_searches
from verl.run.report.text import gain_of, split_output
from verl.utils.entry import error_line
from verl.utils.styles import CALL_STYLE, NOTE_STYLE, PASSAGE_STYLE, STYLES, styled

COLORS = {"right": "green", "wrong": "red", "failed": "bold red"}
"""Of the verdicts."""


def main(arguments: list[str] | None = None, *, console: Console | None = None) -> None:
    """Print the chosen trajectories, or exit with one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="run folder or one step_*.jsonl")
    parser.add_argument("--step", type=int, help="step of the run folder (default: the last one)")
    parser.add_argument("--evaluation", action="store_true", help="held-out questions instead of training")
    parser.add_argument("--only", choices=COLORS, help="only trajectories with this verdict")
    parser.add_argument(
        "--contains", default="", metavar="TEXT", help="only questions that contain this text"
    )
    parser.add_argument(
        "--limit", type=int, default=5, metavar="N", help="at most N trajectories (default 5)"
    )
    options = parser.parse_args(expand_home(arguments))
    if options.limit < 0:
        parser.error(f"--limit must be at least 0, got {options.limit}")
    console = console or Console(soft_wrap=False)
    with error_line():
        path = find_file(options.path, step=options.step, evaluation=options.evaluation)
        chosen = select(path, only=options.only, contains=options.contains)
        records = list(islice(chosen, options.limit))
        scale = credit_scale(records)
        for record in records:
            console.print(render(record, scale=scale))
    if scale:
        console.print(render_legend(scale))
    console.print(Text(f"{len(records)} trajectories of {path}", style="dim"))


def find_file(path: Path, *, step: int | None, evaluation: bool) -> Path:
    """Return the file to show. Raises DataError that lists the recorded steps."""
    if path.is_file():
        return path
    files = step_files(path, EVALUATION if evaluation else TRAJECTORIES)
    if not files:
        raise DataError(f"{path} holds no recorded trajectories; give a run folder or a step_*.jsonl file")
    if step is not None and step not in files:
        raise DataError(f"{path} has no step {step}; recorded are {', '.join(map(str, files))}")
    return files[max(files) if step is None else step]


def select(path: Path, *, only: str | None, contains: str) -> Iterator[TrajectoryRecord]:
    """Yield the trajectories with this verdict and this text in the question. Raises DataError."""
    for record in iterate_records(path):
        if (only is None or verdict(record) == only) and contains.lower() in record["question"].lower():
            yield record


def verdict(record: TrajectoryRecord) -> str:
    """Return right, wrong or failed."""
    if record["failure"] is not None:
        return "failed"
    return "right" if is_right(record) else "wrong"


def render(record: TrajectoryRecord, *, scale: float) -> Panel:
    """Return one trajectory as a panel; sampled text has the color of its advantage, full at `scale`."""
    parts: list[RenderableType] = [styled(f"accepted: {' / '.join(record['golds'])}", "dim")]
    gains = record.get("turn_gains") or [None] * len(record["turns"])
    turns = zip(record["turns"], gains, credit_pieces(record), strict=True)
    for number, (turn, gain, pieces) in enumerate(turns, start=1):
        parts += _render_turn(turn, number=number, gain=gain, pieces=pieces, scale=scale)
    if record["failure"] is not None:
        parts.append(styled(f"left out of training: {record['failure']}", "bold red"))
    parts.append(_render_end(record))
    title = styled(record["question"], "bold")
    where = styled(f"step {record['step']} · {record['uid']} · attempt {record['sample'] + 1}", "dim")
    return Panel(Group(*parts), title=title, subtitle=where, title_align="left", subtitle_align="right")


def render_legend(scale: float) -> Text:
    """Return the colors of advantages from `-scale` to `scale`."""
    legend = Text(f"advantage {-scale:+.3g} ", style="dim")
    for level in range(-LEVELS, LEVELS + 1):
        legend.append("  ", style=f"on {shade_color(level)}")
    return legend.append(f" {scale:+.3g}", style="dim")


def _render_turn(
    turn: TurnRecord, *, number: int, gain: float | None, pieces: Sequence[Piece], scale: float
) -> list[RenderableType]:
    lines: list[RenderableType] = []
    if num_dropped := turn.get("num_dropped"):
        lines.append(styled(f"     written without the results of turns 1 to {num_dropped}", NOTE_STYLE))
    for segment in split_output(turn["output_text"]):
        style = STYLES.get(segment.kind, CALL_STYLE)
        label = "" if segment.kind == "other" else f"{segment.kind}:"
        line = styled(f"{number}  {label}", style)
        for part in segment_parts(segment, turn["output_text"], pieces):
            if not part.is_tag:
                line.append_text(styled(part.text, _credit_style(part.piece, scale=scale) or style))
        lines.append(line)
    if (whole := mean_advantage(pieces)) is not None:
        values = (*span_credits(pieces), ("whole turn", whole))
        lines.append(Text("     credit" + "".join(f"   {kind} {value:+.4f}" for kind, value in values)))
    for passage in turn["passages"]:
        score = "" if passage["score"] is None else f"{passage['score']:.3f}  "
        lines.append(styled(f"     {score}{passage['title']}  {passage['text']}", PASSAGE_STYLE))
    if not turn["passages"] and turn["observation_text"].strip():
        lines.append(styled(f"     environment: {turn['observation_text'].strip()}", NOTE_STYLE))
    if count_calls(turn) and not turn["observation_ids"]:
        lines.append(styled("     the context had no room for the result of the call", NOTE_STYLE))
    if gain is not None:
        lines.append(styled(f"     gain of this turn {gain:+.3f}", "default"))
    return lines


def _credit_style(piece: Piece | None, *, scale: float) -> str | None:
    level = 0 if piece is None else shade(piece.advantage, scale=scale)
    return f"#000000 on {shade_color(level)}" if level else None


def _render_end(record: TrajectoryRecord) -> Text:
    end = Text(verdict(record), style=COLORS[verdict(record)])
    values = {"outcome": record["outcome"], "gain": gain_of(record), "advantage": record["advantage"]}
    for name, value in values.items():
        end.append(f"   {name} {'-' if value is None else format(value, '+.3f')}", style="default")
    end.append(f"   searches {count_searches(record)}   stopped: {record['stop']}", style="default")
    return end


if __name__ == "__main__":
    main()
