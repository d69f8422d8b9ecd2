"""A run folder as a whole: what a run leaves in it, and how that is moved out of the way, never deleted."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from verl.run.manifest import MANIFEST_FILE
from verl.run.records import EVALUATION, TRAJECTORIES, step_files
from verl.run.tracking import METRICS_FILE, read_metrics, write_metrics

CHECKPOINTS = "checkpoints"
SKIPPED = "skipped"
"""Folder of the batches whose update was skipped."""
_STEP_FOLDERS = (TRAJECTORIES, EVALUATION, SKIPPED)
_RUN_PARTS = (MANIFEST_FILE, METRICS_FILE, *_STEP_FOLDERS, CHECKPOINTS, "report.html", "wandb", "wandb_id")
"""What a run leaves in its folder, except for the log, which is open."""


def has_records(run_dir: Path) -> bool:
    """Whether a step or an evaluation was recorded. Raises DataError for metrics that cannot be read."""
    return bool(read_metrics(run_dir)) or any(step_files(run_dir, folder) for folder in _STEP_FOLDERS)


def set_aside_run(run_dir: Path) -> Path | None:
    """Move all that an earlier run left here to `previous-<time>/`; None if there is nothing."""
    left = [path for name in _RUN_PARTS if _is_something(path := run_dir / name)]
    if not left:
        return None
    target = _make_folder(run_dir)
    for path in left:
        path.rename(target / path.name)
    return target


def set_aside_later_steps(run_dir: Path, *, step: int) -> Path | None:
    """Move the records of steps after `step` to `previous-<time>/`; None if there are none.

    A run that goes on from `step` writes them again. Raises DataError for metrics that cannot be read.
    """
    return _set_aside(run_dir, lambda _, number: number > step)


def set_aside_evaluation(run_dir: Path, *, step: int) -> Path | None:
    """Move the evaluation after `step` updates to `previous-<time>/`, as another one takes its place."""
    return _set_aside(run_dir, lambda kind, number: (kind, number) == ("val", step))


def _set_aside(run_dir: Path, is_chosen: Callable[[str, int], bool]) -> Path | None:
    """Move the records whose kind (train, val) and step are chosen."""
    lines = read_metrics(run_dir)
    chosen = [line for line in lines if is_chosen(line["kind"], line["step"])]
    files = [
        path
        for folder in _STEP_FOLDERS
        for step, path in step_files(run_dir, folder).items()
        if is_chosen("val" if folder == EVALUATION else "train", step)
    ]
    if not chosen and not files:
        return None
    target = _make_folder(run_dir)
    write_metrics(target, chosen)
    for path in files:
        (target / path.parent.name).mkdir(exist_ok=True)
        path.rename(target / path.parent.name / path.name)
    write_metrics(run_dir, [line for line in lines if line not in chosen])
    return target


def _is_something(path: Path) -> bool:
    # An empty folder may be where a volume is mounted, which cannot be moved.
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _make_folder(run_dir: Path) -> Path:
    folder = run_dir / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    folder.mkdir()
    return folder
