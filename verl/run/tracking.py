"""Metrics of a run: `metrics.jsonl` (the source of truth), a console line per step, W&B (a mirror).

A line of `metrics.jsonl` is `{"step": 12, "kind": "train", "time": 1760000000.0, "reward/mean": 0.41, ...}`.
Non-finite numbers are written as null and named in the log. Each (step, kind) appears exactly once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, with_config
from rich.console import Console
from rich.text import Text
from typing_extensions import TypedDict

from serving.files import naming_file, write_atomically
from verl.run.wandb_mirror import WandbMirror
from verl.trainer.config.schema import TrainerConfig
from verl.utils.files import parse_json

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
MetricsLine = dict[str, Any]


@with_config(ConfigDict(extra="allow"))
class _LineShape(TypedDict):
    step: int
    kind: str


_LINE_SHAPE = TypeAdapter(_LineShape)

_SHOWN = {
    "train": (
        ("reward", "reward/mean", ".3f"),
        ("math", "reward/math_mean", ".3f"),
        ("em", "reward/em_mean", ".3f"),
        ("gain", "ig/gain_mean", "+.3f"),
        ("kl", "policy/kl", ".4f"),
        ("entropy", "policy/entropy", ".3f"),
        ("searches", "rollout/searches_mean", ".2f"),
        ("length", "rollout/response_length_mean", ".0f"),
        ("failed", "reward/failed_share", ".1%"),
    ),
    "val": (
        ("math", "val/math", ".3f"),
        ("em", "val/em", ".3f"),
        ("sub_em", "val/sub_em", ".3f"),
        ("f1", "val/f1", ".3f"),
        ("searches", "val/searches_mean", ".2f"),
        ("questions", "val/questions", ".0f"),
        ("failed", "val/failed", ".0f"),
    ),
}
"""Label, metric and format of the console line of each kind; an absent metric is left out."""


class Tracker:
    """Writes every metric once to each destination."""

    def __init__(
        self,
        run_dir: Path,
        settings: TrainerConfig,
        *,
        run_config: Mapping[str, object] | None = None,
        total_steps: int | None = None,
        console: Console | None = None,
    ) -> None:
        """Continue the metrics in `run_dir`; a last line that a crash cut is dropped.

        `run_config` is the whole configuration, for the mirror.
        """
        self.path = write_metrics(run_dir, read_metrics(run_dir))
        self._file = self.path.open("a", encoding="utf-8")
        self._total_steps = total_steps
        self._console = (console or Console(soft_wrap=True)) if "console" in settings.logger else None
        self._mirror = None
        if "wandb" in settings.logger:
            self._mirror = WandbMirror(run_dir, settings, run_config=run_config or {})

    def log(self, step: int, metrics: Mapping[str, float], kind: str = "train") -> None:
        """Record the metrics of one step, `kind` train or val; once for each (step, kind)."""
        numbers = {name: _finite(step, name, float(value)) for name, value in metrics.items()}
        line = {"step": step, "kind": kind, "time": round(time.time(), 3), **numbers}
        with naming_file(self.path):
            self._file.write(json.dumps(line, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        if self._console is not None:
            self._show(console_line(step, numbers, kind=kind, total_steps=self._total_steps))
        if self._mirror is not None:
            self._mirror.log(step, {name: value for name, value in numbers.items() if value is not None})

    def finish(self) -> None:
        """Close the file and the mirror. Calling it again does nothing."""
        try:
            self._file.close()
        finally:
            if self._mirror is not None:
                self._mirror.finish()

    def _show(self, line: Text) -> None:
        """Print a line; a closed console must not end the run."""
        assert self._console is not None
        try:
            self._console.print(line)
        except OSError as error:
            self._console = None
            logger.warning("the console cannot be written any more (%s); see %s", error, self.path)


def write_metrics(run_dir: Path, lines: Sequence[MetricsLine]) -> Path:
    """Replace the metrics of a run; return the file."""
    path = run_dir / METRICS_FILE
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_metrics(run_dir: Path) -> list[MetricsLine]:
    """Return all lines of a run.

    A last line without its newline was cut by a crash and is left out. Raises DataError for other bad lines.
    """
    path = run_dir / METRICS_FILE
    if not path.is_file():
        return []
    *whole, cut = path.read_bytes().split(b"\n")
    if cut:
        logger.warning("%s: the last line was cut while being written and is left out", path)
    fix = "restore the file, or remove the line"
    for number, line in enumerate(whole, start=1):
        parse_json(line, shape=_LINE_SHAPE, where=f"{path}:{number}", fix=fix)
    return [json.loads(line) for line in whole]


def console_line(
    step: int, metrics: Mapping[str, float | None], *, kind: str, total_steps: int | None
) -> Text:
    """Return the console line of a step: its metrics, then the seconds of its phases."""
    text = Text()
    of = f"/{total_steps}" if total_steps is not None else ""
    text.append(f"step {step:>4}{of} ", style="bold")
    if kind == "val":
        text.append("held-out ", style="bold green")
    shown = [(label, metrics[name], form) for label, name, form in _SHOWN[kind] if name in metrics]
    for label, value, form in shown:
        text.append(f" {label} ", style="dim")
        text.append("-" if value is None else format(value, form))
    _append_seconds(text, metrics)
    return text


def _append_seconds(text: Text, metrics: Mapping[str, float | None]) -> None:
    seconds = {
        name.removeprefix("time/").removesuffix("_s"): value
        for name, value in metrics.items()
        if name.startswith("time/") and name.endswith("_s") and value is not None
    }
    if not seconds:
        return
    total = seconds.pop("step", None)
    text.append("  | ", style="dim")
    text.append(f"{sum(seconds.values()) if total is None else total:.1f} s", style="cyan")
    for phase, value in seconds.items():
        text.append(f" {phase} {value:.1f}", style="dim")


def _finite(step: int, name: str, value: float) -> float | None:
    if math.isfinite(value):
        return value
    logger.warning("step %d: %s is %s, written as null", step, name, value)
    return None
