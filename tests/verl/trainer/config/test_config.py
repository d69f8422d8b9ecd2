"""The YAML cannot drift from the schema, unknown keys are refused with a hint, and bad values are named."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from hydra.errors import ConfigCompositionException

from verl.errors import ConfigError
from verl.trainer.config.loading import check_override_keys, load_config, register_schema, schema_keys
from verl.trainer.config.schema import Config
from verl.trainer.config.validate import validate

REPOSITORY = Path(__file__).resolve().parents[4]


def composed(overrides: Sequence[str] = ()) -> Config:
    register_schema()
    with initialize_config_module("verl.trainer.config", version_base=None):
        return load_config(compose("ppo_trainer", overrides=list(overrides)))


def test_yaml_states_exactly_the_defaults_of_the_schema() -> None:
    defaults = Config()
    folder = "runs/${trainer.project_name}/${trainer.experiment_name}"
    assert defaults.trainer.default_local_dir == folder
    defaults.trainer.default_local_dir = "runs/inforeasoner/grpo"
    assert dataclasses.asdict(composed()) == dataclasses.asdict(defaults)


def test_yaml_names_every_key_of_the_schema() -> None:
    text = (REPOSITORY / "verl/trainer/config/ppo_trainer.yaml").read_text()
    missing = [key for key in schema_keys() if f"{key.rsplit('.', 1)[-1]}:" not in text]
    assert missing == []


def test_every_key_is_read_by_code() -> None:
    sources = [p.read_text() for p in (REPOSITORY / "verl").rglob("*.py") if p.name != "schema.py"]
    schema = (REPOSITORY / "verl/trainer/config/schema.py").read_text()
    leaves = {key.rsplit(".", 1)[-1] for key in schema_keys()}
    derived = {"train_files", "val_files"}  # read through DataConfig.train_paths and val_paths
    unread = [leaf for leaf in leaves - derived if not any(f".{leaf}" in source for source in sources)]
    assert "train_paths" in schema
    assert unread == []


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("data.train_batch_sise=4", "data.train_batch_size"),
        ("actor_rollout_ref.actor.lr=1e-5", "actor_rollout_ref.actor.optim.lr"),
        ("+trainer.n_gpu_per_node=2", "trainer.n_gpus_per_node"),
    ],
)
def test_unknown_key_names_the_nearest(override: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        check_override_keys([override, "trainer.seed=1"])


def test_known_keys_hydra_keys_and_flags_pass() -> None:
    check_override_keys(["data.train_batch_size=4", "hydra.run.dir=x", "--cfg", "--config-name=mine"])


def test_wrong_type_is_refused_with_its_key() -> None:
    with pytest.raises(ConfigCompositionException) as error:
        composed(["data.train_batch_size=many"])
    assert "many" in str(error.value) + str(error.value.__cause__)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_batch_size=0", "data.train_batch_size must be greater than 0, got 0"),
        ("actor_rollout_ref.actor.kl_loss_type=k9", "one of low_var_kl"),
        ("reward.max_failure_share=1.5", r"reward.max_failure_share must be in \[0, 1\]"),
        ("retriever.url=localhost:8000", "an http"),
        ("trainer.logger=[tensorboard]", "trainer.logger must be one of"),
    ],
)
def test_bad_value_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        composed([override])


def test_validation_lists_every_problem_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = composed(
        ["data.train_files=gone.parquet", "actor_rollout_ref.model.path=./gone", "trainer.device=cuda"],
    )
    with pytest.raises(ConfigError) as error:
        validate(config, num_gpus=0)
    message = str(error.value)
    assert "data.train_files: no such file 'gone.parquet'" in message
    assert "actor_rollout_ref.model.path: no such folder" in message
    assert "this machine has 0 GPUs" in message


def test_file_lists_and_single_files_are_both_taken() -> None:
    assert composed(["data.train_files=[a.parquet,b.parquet]"]).data.train_paths == ("a.parquet", "b.parquet")
    assert composed(["data.train_files=a.parquet"]).data.train_paths == ("a.parquet",)
