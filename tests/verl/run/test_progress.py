from __future__ import annotations

import json
from pathlib import Path

import pytest

from verl.errors import ConfigError
from verl.run.manifest import Manifest
from verl.run.progress import PROGRESS_FILE, Identity, Progress, run_identity
from verl.trainer.config.data import DataConfig
from verl.trainer.config.schema import ActorRolloutRefConfig, Config, ModelConfig, TrainerConfig

QUESTIONS = {"path": "world/train.parquet", "sha256": "ab" * 32}
WEIGHTS = {"bytes": 8, "sha256": "cd" * 32}
MANIFEST = {"data": [QUESTIONS], "model": {"path": "m", "files": {"model.safetensors": WEIGHTS}}}
IDENTITY = run_identity(Config(), MANIFEST)
LORA = ActorRolloutRefConfig(model=ModelConfig(lora_rank=8))


def test_everything_comes_back(tmp_path: Path) -> None:
    progress = Progress(step=12, sampler={"epoch": 1, "position": 48})
    progress.save(tmp_path, identity=IDENTITY)
    assert Progress.load(tmp_path, identity=IDENTITY) == progress


def with_file(name: str, digest: str) -> Manifest:
    files = {**MANIFEST["model"]["files"], name: {"bytes": 8, "sha256": digest * 32}}
    return {**MANIFEST, "model": {"path": "m", "files": files}}


@pytest.mark.parametrize(
    ("identity", "named"),
    [
        (run_identity(Config(data=DataConfig(train_batch_size=8)), MANIFEST),
         ["data.train_batch_size was 16, is 8"]),
        (run_identity(Config(actor_rollout_ref=LORA), MANIFEST),
         ["actor_rollout_ref.model.lora_rank was '0', is '8, lora_alpha=16, target_modules=all-linear'"]),
        (run_identity(Config(trainer=TrainerConfig(seed=7)), MANIFEST),
         ["trainer.seed was 0, is 7"]),
        (run_identity(Config(), {**MANIFEST, "data": [QUESTIONS | {"sha256": "ef" * 32}]}),
         ["data.train_files was ['world/train.parquet (abababababab)'], is ['world/train.parquet (efefef"]),
        (run_identity(Config(), with_file("model.safetensors", "ee")),
         ["actor_rollout_ref.model.path was 'world/models/policy ("]),
        (run_identity(Config(), with_file("chat_template.jinja", "ee")),
         ["actor_rollout_ref.model.path was"]),
    ],
)  # fmt: skip
def test_another_run_is_refused_and_every_difference_named(
    tmp_path: Path, identity: Identity, named: list[str]
) -> None:
    Progress().save(tmp_path, identity=IDENTITY)
    with pytest.raises(
        ConfigError, match=r"cannot be resumed with this configuration.*resume_mode=disable"
    ) as e:
        Progress.load(tmp_path, identity=identity)
    assert [text for text in named if text not in str(e.value)] == []
    assert str(e.value).count(" was ") == len(named)


def test_what_may_change_does_not_matter(tmp_path: Path) -> None:
    Progress(step=3).save(tmp_path, identity=IDENTITY)
    longer = Config(trainer=TrainerConfig(total_training_steps=500, test_freq=7))
    identity = run_identity(longer, with_file("README.md", "ee"))
    assert Progress.load(tmp_path, identity=identity).step == 3


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "is missing"),
        (b"{", "Invalid JSON"),
        (b"\xff", "Invalid JSON"),
        (b"[]", "Input should be"),
        (b"{}", "progress: Field required"),
        (json.dumps({"progress": {"stepp": 1}, "identity": IDENTITY}).encode(), "progress.stepp"),
        (json.dumps({"progress": {"step": "x"}, "identity": IDENTITY}).encode(), "progress.step: "),
        (json.dumps({"progress": {"sampler": {"seed": []}}, "identity": IDENTITY}).encode(), "sampler.seed"),
    ],
)
def test_a_damaged_file_is_named_with_the_fix(tmp_path: Path, text: bytes | None, named: str) -> None:
    if text is not None:
        (tmp_path / PROGRESS_FILE).write_bytes(text)
    with pytest.raises(ConfigError, match=rf"progress\.json.*{named}.*; delete .* so that an older one"):
        Progress.load(tmp_path, identity=IDENTITY)
