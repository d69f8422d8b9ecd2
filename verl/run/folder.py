"""The run folder: its lock, its scratch space, how its run ends, and records that are moved aside."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from pathlib import Path

from serving.files import lock_file
from verl.errors import ConfigError, DataError
from verl.run.manifest import MANIFEST_FILE, finish_manifest
from verl.run.progress import Progress
from verl.run.records import EVALUATION, TRAJECTORIES, step_files
from verl.run.tracking import METRICS_FILE, read_metrics, write_metrics
from verl.utils.entry import describe_error
from verl.workers.checkpoint import CHECKPOINTS

logger = logging.getLogger(__name__)

LOG_FILE = "train.log"
SKIPPED = "skipped"
"""Folder of the batches whose update was skipped."""
PROFILES = "profile"
"""Folder of the traces of steps."""
_STEP_FOLDERS = (TRAJECTORIES, EVALUATION, SKIPPED)
_RUN_PARTS = (
    MANIFEST_FILE,
    METRICS_FILE,
    *_STEP_FOLDERS,
    CHECKPOINTS,
    PROFILES,
    "report.html",
    "wandb",
    "wandb_id",
)
"""What a run leaves in its folder, except for the log, which is open."""


def lock_folder(run_dir: Path, *, key: str = "trainer.default_local_dir") -> AbstractContextManager[None]:
    """Hold the lock of a run folder, which is created. Raises ConfigError if another run holds it.

    `key` is the setting that names the folder.
    """
    return lock_file(
        run_dir / ".lock",
        taken=ConfigError(
            f"{key}={str(run_dir)!r} is in use by another run; stop it or choose another folder"
        ),
    )


@contextmanager
def scratch_folder(run_dir: Path) -> Iterator[Path]:
    """Give an empty folder for files that only running processes need; remove it at the end."""
    folder = run_dir / ".scratch"
    shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def recorded_end(run_dir: Path, progress: Progress) -> Iterator[None]:
    """Record in the manifest how the block ended, and write the report, also after a failure.

    What cannot be written is logged: it must not hide how the run itself ended.
    """
    from verl.run.report.report import write_report  # loads matplotlib and jinja2

    status, reason = "completed", None
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        status = "interrupted"
        raise
    except BaseException as error:
        status, reason = "failed", f"{type(error).__name__}: {describe_error(error)}"
        raise
    finally:
        try:
            finish_manifest(run_dir, status=status, reason=reason, step=progress.step)
        except (DataError, OSError) as error:
            logger.error("the manifest cannot say how the run ended (%s): %s", status, error)
        try:
            logger.info("report: %s", write_report(run_dir))
        except Exception as error:  # a defect of the report must not hide how the run ended
            logger.error("no report: %s; repair it and run scripts/report.py %s", error, run_dir)


def has_records(run_dir: Path) -> bool:
    """Return whether a step or an evaluation was recorded. Raises DataError for unreadable metrics."""
    return bool(read_metrics(run_dir)) or any(step_files(run_dir, folder) for folder in _STEP_FOLDERS)


def set_aside_run(run_dir: Path, *, parts: Sequence[str] = _RUN_PARTS) -> Path | None:
    """Move what an earlier run left to `previous-<time>/`; return that folder, or None without any.

    `parts` are names of files and folders.
    """
    left = [path for name in parts if _has_content(path := run_dir / name)]
    if not left:
        return None
    target = _make_folder(run_dir)
    for path in left:
        path.rename(target / path.name)
    return target


def set_aside_records(run_dir: Path, is_chosen: Callable[[str, int], bool]) -> Path | None:
    """Move the records whose kind (train, val) and step are chosen to `previous-<time>/`.

    Returns that folder, or None without such records. Raises DataError for unreadable metrics.
    """
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


def _has_content(path: Path) -> bool:
    # An empty folder may be the mount point of a volume, which cannot be moved.
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _make_folder(run_dir: Path) -> Path:
    folder = run_dir / f"previous-{datetime.now(UTC):%Y%m%dT%H%M%S.%f}"
    folder.mkdir()
    return folder
