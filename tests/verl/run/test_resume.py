"""Resuming in real run folders: nothing is truncated, and what was lost is named."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from serving.files import FileRecord
from tests.scripted_run import write_run
from verl.errors import ConfigError
from verl.run.manifest import Manifest, make_manifest, update_manifest
from verl.run.progress import Identity, Progress
from verl.run.records import EVALUATION, step_files
from verl.run.resume import find_progress, list_changes
from verl.run.tracking import read_metrics, write_metrics
from verl.trainer.config.schema import Config
from verl.workers.checkpoint import CheckpointStore

IDENTITY: Identity = {"trainer.seed": 0}


def describe(config: Config, *, services: dict[str, object] | None = None) -> Manifest:
    return make_manifest(config, services=services or {})


def resume(run_dir: Path, *, total_steps: int = 9, **settings: object) -> tuple[int, Path | None]:
    config = Config()
    for name, value in settings.items():
        setattr(config.trainer, name, value)
    manifest = describe(config)
    _, progress, newest = find_progress(
        config, run_dir, total_steps=total_steps, identity=IDENTITY, manifest=manifest
    )
    return progress.step, newest


async def make_run(run_dir: Path, *, saved: tuple[int, ...]) -> Path:
    """A run of four recorded steps."""
    write_run(run_dir, steps=4)
    store = CheckpointStore(
        run_dir / "checkpoints", keep=9, on_write=lambda step: update_manifest(run_dir, saved_step=step)
    )
    for step in saved:

        async def write(folder: Path, step: int = step) -> dict[Path, FileRecord]:
            (folder / "policy").mkdir()
            (folder / "policy" / "weights").write_bytes(b"weights")
            Progress(step=step).save(folder, identity=IDENTITY)
            return {}

        await store.write(step, write)
    return run_dir


def steps(run_dir: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run_dir) if line["kind"] == "train"]


def set_aside(run_dir: Path) -> list[Path]:
    return sorted(run_dir.glob("previous-*"))


def damage(run_dir: Path) -> None:
    for weights in (run_dir / "checkpoints").glob("*/policy/weights"):
        weights.write_bytes(b"wEights")


def lose(run_dir: Path) -> None:
    shutil.rmtree(run_dir / "checkpoints")


def unmount(run_dir: Path) -> None:
    lose(run_dir)
    (run_dir / "checkpoints").mkdir()


@pytest.mark.parametrize(
    ("spoil", "found"),
    [
        (
            damage,
            "every checkpoint is damaged: global_step_4: policy/weights has changed; global_step_2: ",
        ),
        (lose, "step 4 was saved, but there is no checkpoint"),
        (unmount, "step 4 was saved, but there is no checkpoint"),
    ],
)
async def test_lost_checkpoints_are_refused_and_no_record_is_touched(
    tmp_path: Path, spoil: Callable[[Path], None], found: str
) -> None:
    run_dir = await make_run(tmp_path / "run", saved=(2, 4))
    spoil(run_dir)
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=rf"{found}.*Restore.*resume_mode=disable"):
        resume(run_dir)
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before
    assert resume(run_dir, resume_mode="disable") == (0, None)
    assert steps(set_aside(run_dir)[0]) == [1, 2, 3, 4]


async def test_a_run_that_ended_before_its_first_checkpoint_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = await make_run(tmp_path / "run", saved=())
    assert resume(run_dir) == (0, None)
    (target,) = set_aside(run_dir)
    assert steps(target) == [1, 2, 3, 4]
    assert f"ended before its first checkpoint (completed); it was moved to {target}" in caplog.text
    assert resume(run_dir) == (0, None)
    assert set_aside(run_dir) == [target]  # there was nothing more to move


async def test_records_beyond_the_checkpoint_are_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = await make_run(tmp_path / "run", saved=(2, 3))
    (run_dir / "checkpoints" / "global_step_3" / "manifest.json").write_text("[]")
    (run_dir / "checkpoints" / "latest").write_bytes(b"\xff\xfe")
    write_metrics(run_dir, [line for line in read_metrics(run_dir) if line["step"] != 1])
    assert resume(run_dir) == (2, run_dir / "checkpoints" / "global_step_2")
    assert "1 of 2 finished steps are missing in metrics.jsonl" in caplog.text
    assert steps(run_dir) == [2]
    assert steps(set_aside(run_dir)[0]) == [3, 4]
    assert "step 3 was saved, but its checkpoint cannot be used" in caplog.text


async def test_an_evaluation_moves_only_its_predecessor_and_needs_no_step_to_be_left(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path / "run", saved=(2, 4))
    with pytest.raises(ConfigError, match=r"4 of 4 steps.*trainer\.val_only=true"):
        resume(run_dir, total_steps=4)
    newest = run_dir / "checkpoints" / "global_step_4"
    assert resume(run_dir, total_steps=4, val_only=True) == (4, newest)
    assert resume(run_dir, total_steps=0, total_training_steps=0) == (4, newest)
    (previous,) = set_aside(run_dir)
    assert [(line["kind"], line["step"]) for line in read_metrics(previous)] == [("val", 4)]
    assert list(step_files(previous, EVALUATION)) == [4]
    assert list(step_files(run_dir, EVALUATION)) == [0]
    assert steps(run_dir) == [1, 2, 3, 4]


def test_changes_are_listed() -> None:
    def index(digest: str) -> dict[str, object]:
        return {"retriever": {"version": {"retriever": {"corpus_sha256": digest, "count": 9}}}}

    config = Config()
    earlier = describe(config, services=index("ab")) | {"data": [{"path": "test.parquet", "sha256": "ab"}]}
    assert list_changes(earlier, earlier) == []
    config.retriever.topk = 5
    now = describe(config, services=index("cd")) | {"data": [{"path": "test.parquet", "sha256": "cd"}]}
    assert list_changes(earlier, now) == [
        "retriever.index.corpus_sha256: 'ab' -> 'cd'",
        "retriever.topk: 3 -> 5",
        "sha256 of test.parquet: 'ab' -> 'cd'",
    ]
    config.trainer.val_only = True  # an evaluation changes nothing
    assert len(list_changes(earlier, describe(config, services=index("ab")) | {"data": earlier["data"]})) == 1
    assert list_changes({}, now) == []  # the manifest was removed
    # A published server does not describe itself: then there is nothing to compare.
    assert list_changes(earlier, earlier | {"services": {"retriever": {"version": None}}}) == []


async def test_a_checkpoint_of_an_earlier_format_is_refused(tmp_path: Path) -> None:
    run_dir = await make_run(tmp_path / "run", saved=(2,))
    folder = run_dir / "checkpoints" / "global_step_2"
    (folder / "policy" / "weights").rename(folder / "policy_rank_0_of_1.pt")
    (folder / "policy").rmdir()
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace("policy/weights", "policy_rank_0_of_1.pt"))
    with pytest.raises(ConfigError, match=r"earlier version.*global_step_2/huggingface"):
        resume(run_dir)
