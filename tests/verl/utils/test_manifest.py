from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from verl.errors import DataError
from verl.utils.manifest import finish_manifest, read_manifest, set_aside_previous_run, write_manifest

CONFIG = {
    "actor": {"ppo_max_token_len_per_gpu": 8192, "optim": {"lr": 1e-6}},
    "retriever": {"url": "http://me:planted-password@host:8000/retrieve"},
    "hub_token": "planted-token",
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "train.parquet").write_bytes(b"rows")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    write_manifest(
        tmp_path / "run",
        config=CONFIG,
        data_files=[tmp_path / "train.parquet"],
        model_path=str(tmp_path / "model"),
        seeds={"run": 3},
        services={"ig": {"status": "healthy", "api_key": "planted-key"}},
        prompt="Question: why?",
    )
    return tmp_path / "run"


def test_says_what_was_run(run_dir: Path) -> None:
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert manifest["status"] == "running"
    assert manifest["data"][0]["sha256"] == hashlib.sha256(b"rows").hexdigest()
    assert manifest["model"]["files"]["config.json"]["sha256"] == hashlib.sha256(b"{}").hexdigest()
    assert manifest["prompt"]["sha256"] == hashlib.sha256(b"Question: why?").hexdigest()
    assert manifest["config"]["actor"] == CONFIG["actor"]
    assert manifest["seeds"] == {"run": 3}
    assert {"numpy", "torch"} <= {name.lower() for name in manifest["packages"]}
    assert manifest["machine"]["cores"] >= 1
    assert manifest["git"] is None or len(manifest["git"]["sha"]) == 40


def test_no_secret_is_written(run_dir: Path) -> None:
    text = (run_dir / "run_manifest.json").read_text()
    assert "planted" not in text
    assert "http://***@host:8000/retrieve" in text


def test_the_end_is_recorded(run_dir: Path) -> None:
    finish_manifest(run_dir, status="failed", reason="retriever: gone, token=planted-token", steps=4)
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert (manifest["status"], manifest["results"]) == ("failed", {"steps": 4})
    assert manifest["reason"] == "retriever: gone, token=***"
    assert manifest["finished"] >= manifest["started"]


def test_a_resumed_run_remembers_its_earlier_starts(run_dir: Path) -> None:
    finish_manifest(run_dir, status="failed", reason="killed")
    write_manifest(
        run_dir, config={}, data_files=[], model_path="hub/name", seeds={}, services={}, resumed_from=4
    )
    manifest = read_manifest(run_dir)
    assert manifest is not None
    assert [start["reason"] for start in manifest["earlier_starts"]] == ["killed"]
    assert manifest["resumed_from"] == 4
    assert manifest["model"] == {"path": "hub/name", "files": None}


def test_a_fresh_start_sets_the_previous_run_aside(run_dir: Path) -> None:
    (run_dir / "checkpoints").mkdir()
    target = set_aside_previous_run(run_dir)
    assert target is not None
    assert read_manifest(run_dir) is None
    assert read_manifest(target) is not None
    assert (target / "checkpoints").is_dir()
    assert list(run_dir.iterdir()) == [target]
    assert set_aside_previous_run(run_dir) is None


def test_a_missing_data_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.parquet"):
        write_manifest(
            tmp_path, config={}, data_files=["nowhere.parquet"], model_path="m", seeds={}, services={}
        )
