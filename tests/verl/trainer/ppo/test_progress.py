from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl.errors import ConfigError
from verl.trainer.config.schema import Config, DataConfig, TrainerConfig
from verl.trainer.ppo.progress import PROGRESS_FILE, Progress, run_identity

IDENTITY = run_identity(Config())


def test_everything_comes_back(tmp_path: Path) -> None:
    progress = Progress(step=12, sampler={"epoch": 1, "position": 48})
    progress.save(tmp_path, identity=IDENTITY)
    assert Progress.load(tmp_path, identity=IDENTITY) == progress


def test_another_run_is_refused_and_every_difference_named(tmp_path: Path) -> None:
    Progress().save(tmp_path, identity=IDENTITY)
    other = Config(data=DataConfig(train_batch_size=8), trainer=TrainerConfig(seed=7))
    with pytest.raises(ConfigError) as refused:
        Progress.load(tmp_path, identity=run_identity(other))
    message = str(refused.value)
    assert "data.train_batch_size was 16, is 8" in message
    assert "trainer.seed was 0, is 7" in message
    assert "model.path" not in message
    assert "resume_mode=disable" in message


def test_what_may_change_does_not_matter(tmp_path: Path) -> None:
    Progress(step=3).save(tmp_path, identity=IDENTITY)
    longer = Config(trainer=TrainerConfig(total_training_steps=500, test_freq=7))
    assert Progress.load(tmp_path, identity=run_identity(longer)).step == 3


@pytest.mark.parametrize(
    "text",
    [
        None,
        "{",
        "[]",
        "{}",
        json.dumps({"progress": {"stepp": 1}, "identity": IDENTITY}),
        json.dumps({"progress": 3, "identity": IDENTITY}),
    ],
    ids=["missing", "cut", "list", "empty", "unknown field", "no object"],
)
def test_a_damaged_file_is_named_with_the_fix(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / PROGRESS_FILE).write_text(text)
    with pytest.raises(ConfigError, match=r"progress\.json is not the progress of a checkpoint .*; delete"):
        Progress.load(tmp_path, identity=IDENTITY)
