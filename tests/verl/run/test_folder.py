from __future__ import annotations

import errno
from pathlib import Path

import pytest

from tests.scripted_run import write_run
from verl.errors import ConfigError, DataError
from verl.run.folder import (
    SKIPPED,
    has_records,
    lock_folder,
    recorded_end,
    set_aside_records,
    set_aside_run,
)
from verl.run.manifest import read_manifest
from verl.run.progress import Progress
from verl.run.records import EVALUATION, TRAJECTORIES, step_files
from verl.run.tracking import read_metrics


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the folder, what was set aside left out."""
    files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: content for name, content in files.items() if not name.startswith("previous-")}


def test_a_whole_run_is_moved(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    (run_dir / "checkpoints").mkdir()  # empty: a volume may be mounted here, which cannot be moved
    before = contents(run_dir)
    target = set_aside_run(run_dir)
    assert target is not None
    assert contents(target) == before
    assert read_manifest(run_dir) is None
    assert not has_records(run_dir)
    assert sorted(run_dir.iterdir()) == sorted([run_dir / "checkpoints", target])
    assert set_aside_run(run_dir) is None


def test_later_steps_are_moved_and_nothing_is_lost(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=4)
    (run_dir / SKIPPED).mkdir()
    (run_dir / SKIPPED / "step_000004.jsonl").write_text("{}\n")
    before = contents(run_dir)
    lines = read_metrics(run_dir)
    assert set_aside_records(run_dir, lambda kind, step: step > 4) is None
    target = set_aside_records(run_dir, lambda kind, step: step > 2)
    assert target is not None
    assert [line["step"] for line in read_metrics(run_dir)] == [0, 1, 2]
    assert read_metrics(run_dir) + read_metrics(target) == lines
    assert (list(step_files(run_dir, TRAJECTORIES)), list(step_files(target, TRAJECTORIES))) == (
        [1, 2],
        [3, 4],
    )
    assert (list(step_files(run_dir, EVALUATION)), list(step_files(target, EVALUATION))) == ([0], [4])
    after = contents(run_dir) | contents(target)
    assert after.keys() == before.keys()
    del before["metrics.jsonl"]
    assert {name: after[name] for name in before} == before


def test_metrics_that_cannot_be_read_are_left_as_they_are(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "run", steps=2)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\n")
    before = contents(run_dir)
    with pytest.raises(DataError, match=r"metrics\.jsonl:5"):
        set_aside_records(run_dir, lambda kind, step: step > 1)
    assert contents(run_dir) == before


@pytest.mark.parametrize("spoiled", ["run_manifest.json", "metrics.jsonl"])
def test_how_a_run_ended_is_raised_also_where_nothing_can_be_written(
    tmp_path: Path, spoiled: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / spoiled).write_bytes(b"\xff\n")
    with pytest.raises(OSError, match="No space left"), recorded_end(tmp_path, Progress()):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert str(tmp_path / spoiled) in caplog.text


def test_two_runs_in_one_folder_are_refused(tmp_path: Path) -> None:
    error = pytest.raises(ConfigError, match="in use by another run")
    with lock_folder(tmp_path), error, lock_folder(tmp_path):
        pass
