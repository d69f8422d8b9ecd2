"""Where the time of a step went: seconds, speed and share of the hardware's limit per phase."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from verl.run.folder import PROFILES
from verl.run.report.run_data import RunData

_STEP = "time/step_s"


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseRow:
    """One line of the table, means over the steps; None: not measured."""

    name: str
    seconds: float
    step_share: float | None
    tokens_per_s: float | None = None
    flops_per_s: float | None = None
    limit_share: float | None = None
    detail: str = ""


def phase_rows(run: RunData) -> list[PhaseRow]:
    """Return the phases in their order, what is in none of them, and the checkpoints."""
    names = [name for name in run.names() if name.startswith("time/") and name != _STEP]
    whole = _mean(run, _STEP)
    rows = [_phase_row(run, name.removeprefix("time/").removesuffix("_s"), whole=whole) for name in names]
    rest = None if whole is None else whole - sum(row.seconds for row in rows)
    if whole and rest is not None and rest > 0:
        rows.append(PhaseRow(name="between the phases", seconds=rest, step_share=rest / whole))
    written, written_s = _mean(run, "perf/checkpoint_bytes"), _mean(run, "perf/checkpoint_s")
    if written is not None and written_s:
        detail = f"{_bytes(written)} at {_bytes(written / written_s)}/s, beside later steps"
        rows.append(PhaseRow(name="a checkpoint", seconds=written_s, step_share=None, detail=detail))
    return rows


def list_traces(run: RunData) -> list[str]:
    """Return the traces of recorded steps, as paths from the run folder on, in order of steps and ranks."""

    def numbers(path: Path) -> list[int]:
        return [int(part) for part in path.name.partition(".")[0].split("_") if part.isdecimal()]

    found = sorted((run.run_dir / PROFILES).glob("step_*_rank_*.json.gz"), key=numbers)
    return [str(path.relative_to(run.run_dir)) for path in found]


def _phase_row(run: RunData, phase: str, *, whole: float | None) -> PhaseRow:
    seconds = _mean(run, f"time/{phase}_s") or 0.0
    tokens = "perf/sampled_tokens_per_s" if phase == "rollout" else f"perf/{phase}_tokens_per_s"
    share = "perf/rollout_bandwidth_share" if phase == "rollout" else f"perf/{phase}_flops_share"
    return PhaseRow(
        name=phase.replace("_", "-"),
        seconds=seconds,
        step_share=seconds / whole if whole else None,
        tokens_per_s=_mean(run, tokens),
        flops_per_s=_mean(run, f"perf/{phase}_flops_per_s"),
        limit_share=_mean(run, share),
        detail=_detail(run, phase),
    )


def _detail(run: RunData, phase: str) -> str:
    if phase == "rollout" and (read := _mean(run, "perf/prefilled_tokens_per_s")) is not None:
        return f"tokens sampled; {read:,.0f}/s read"
    if phase == "reward" and (visible := _mean(run, "perf/gain_visible_s")) is not None:
        hidden = _mean(run, "perf/gain_hidden_s") or 0.0
        return f"gains: waited {visible:.1f} s, {hidden:.1f} s more during the rollout"
    if phase == "publish" and (sent := _mean(run, "perf/publish_bytes")) is not None:
        rate = _mean(run, "perf/publish_bytes_per_s")
        return f"{_bytes(sent)}{'' if rate is None else f' at {_bytes(rate)}/s'}"
    return ""


def _mean(run: RunData, name: str) -> float | None:
    values = run.series(name).values
    return sum(values) / len(values) if values else None


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
