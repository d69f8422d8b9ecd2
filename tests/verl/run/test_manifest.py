from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from verl.agent.prompts import PACKAGED_FILE
from verl.errors import DataError
from verl.run.manifest import (
    describe_file,
    finish_manifest,
    make_manifest,
    read_manifest,
    update_manifest,
    write_manifest,
)
from verl.trainer.config.data import DataConfig
from verl.trainer.config.schema import Config, RetrieverConfig


def make_config(folder: Path) -> Config:
    config = Config(retriever=RetrieverConfig(url="http://me:planted-password@host:8000/retrieve"))
    config.data.train_files = [str(folder / "train.parquet")]
    config.actor_rollout_ref.model.path = str(folder / "model")
    return config


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "train.parquet").write_bytes(b"rows")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    services = {"ig": {"status": "healthy", "api_key": "planted-key"}}
    manifest = make_manifest(
        make_config(tmp_path), services=services, prompt_file=PACKAGED_FILE, prompt="Question: why?"
    )
    write_manifest(tmp_path / "run", manifest)
    return tmp_path / "run"


def test_the_manifest_describes_the_run(run_dir: Path) -> None:
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert manifest["status"] == "running"
    assert manifest["data"][0]["sha256"] == hashlib.sha256(b"rows").hexdigest()
    assert manifest["model"]["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert manifest["prompt_file"]["sha256"] == hashlib.sha256(PACKAGED_FILE.read_bytes()).hexdigest()
    assert manifest["prompt"]["sha256"] == hashlib.sha256(b"Question: why?").hexdigest()
    assert manifest["config"]["data"]["train_batch_size"] == 16
    assert manifest["seeds"] == {"trainer.seed": 0}
    assert {"numpy", "torch"} <= {name.lower() for name in manifest["packages"]}
    assert manifest["machine"]["cores"] >= 1
    assert manifest["machine"]["processor"]
    assert manifest["git"] is None or len(manifest["git"]["sha"]) == 40


def test_no_secret_is_written(run_dir: Path) -> None:
    text = (run_dir / "run_manifest.json").read_text()
    assert "planted" not in text
    assert "http://***@host:8000/retrieve" in text


def test_the_end_is_recorded(run_dir: Path) -> None:
    finish_manifest(run_dir, status="failed", reason="retriever: gone, token=planted-token", step=4)
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert (manifest["status"], manifest["results"]) == ("failed", {"step": 4})
    assert manifest["reason"] == "retriever: gone, token=***"
    assert manifest["finished"] >= manifest["started"]


def test_a_resumed_run_lists_its_earlier_starts_and_what_was_saved(run_dir: Path) -> None:
    config = make_config(run_dir.parent)
    config.actor_rollout_ref.model.path = "hub/name"
    again = make_manifest(config, services={})
    finish_manifest(run_dir, status="failed", reason="retriever: gone", step=4)
    update_manifest(run_dir, saved_step=4)
    write_manifest(run_dir, again, resumed_from=4)
    write_manifest(run_dir, again, resumed_from=4)  # the start before was killed: its end is not recorded
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert [start["status"] for start in manifest["earlier_starts"]] == ["failed", "killed"]
    assert manifest["earlier_starts"][0]["reason"] == "retriever: gone"
    assert (manifest["resumed_from"], manifest["saved_step"]) == (4, 4)
    assert manifest["model"] == {"path": "hub/name", "files": None}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"", "Invalid JSON"),
        (b"[]", "dictionary|object"),
        (b'{"status": "\xff"}', "invalid unicode"),
        (b'{"config": 3}', "config: Input should be"),
        (b'{"git": {}}', "git.sha: Field required"),
        (b'{"earlier_starts": [7]}', "earlier_starts.0: Input should be"),
    ],
)
def test_a_damaged_manifest_is_named(run_dir: Path, text: bytes, named: str) -> None:
    (run_dir / "run_manifest.json").write_bytes(text)
    with pytest.raises(DataError, match=rf"run_manifest\.json: .*({named}).*; restore it, or remove it"):
        read_manifest(run_dir)


def test_of_a_large_file_the_beginning_is_hashed(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"abcdef")
    assert describe_file(tmp_path / "weights", max_hashed_bytes=3) == {
        "bytes": 6,
        "sha256": None,
        "sha256_of_beginning": hashlib.sha256(b"abc").hexdigest(),
    }


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        make_manifest(Config(data=DataConfig(train_files="nowhere.parquet")), services={})
