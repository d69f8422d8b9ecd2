from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from verl.errors import ConfigError, DataError
from verl.evaluation.protocols import BROWSECOMP_PLUS
from verl.evaluation.records import HOPS_FILE, RESULTS_FILE, SETTINGS_FILE
from verl.evaluation.settings import list_differences, open_folder
from verl.run.manifest import make_manifest
from verl.trainer.config.schema import Config

INDEX = {"index_sha256": "abc", "kind": "flat"}


def make_config(folder: Path) -> Config:
    model = folder / "model"
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text("{}")
    (folder / "test.parquet").write_bytes(b"rows")
    config = Config()
    config.data.val_files = str(folder / "test.parquet")
    config.actor_rollout_ref.model.path = str(model)
    return config


def open_with(config: Config, folder: Path, *, resume: bool = True, index: object = INDEX) -> None:
    services = {"retriever": {"url": config.retriever.url, "version": {"retriever": index}}}
    open_folder(folder, make_manifest(config, services=services, trains=False), resume=resume)


def test_settings_that_change_no_answer_may_differ(tmp_path: Path) -> None:
    config, folder = make_config(tmp_path), tmp_path / "evaluation"
    open_with(config, folder)
    config.trainer.num_cpu_engines = 2
    config.trainer.max_concurrent_episodes = 3
    config.reward.max_failure_share = 0.5
    config.placement.gpu = "H100"
    config.retriever.url = "http://127.0.0.1:9000/retrieve"  # the same index
    config.data.train_files = "elsewhere.parquet"
    moved = (tmp_path / "model").rename(tmp_path / "moved")
    config.actor_rollout_ref.model.path = str(moved)
    open_with(config, folder)
    settings = json.loads((folder / SETTINGS_FILE).read_text())
    assert settings["config"]["trainer"]["num_cpu_engines"] == 1
    assert settings["services"]["retriever"]["version"]["retriever"] == INDEX


def set_turns(config: Config) -> None:
    config.max_turns = 9


def change_data(config: Config) -> None:
    Path(str(config.data.val_files)).write_bytes(b"other rows")


def change_model(config: Config) -> None:
    (Path(config.actor_rollout_ref.model.path) / "config.json").write_text('{"a": 1}')


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (set_turns, "max_turns was 3, is 9"),
        (change_data, r"data\.val_files was '\S+test\.parquet \(\w{12}\)', is '\S+test\.parquet \(\w{12}\)'"),
        (change_model, r"actor_rollout_ref\.model\.path was '\S+model \(\w{12}\)', is"),
        (lambda config: setattr(config.evaluation, "seed", 4), r"evaluation\.seed was 0, is 4"),
    ],
)
def test_other_settings_are_refused_by_key_and_values(
    tmp_path: Path, change: Callable[[Config], None], difference: str
) -> None:
    config, folder = make_config(tmp_path), tmp_path / "evaluation"
    open_with(config, folder)
    change(config)
    with pytest.raises(ConfigError, match=f"{difference}.*Fix: .*evaluation.output_dir"):
        open_with(config, folder)
    for name in (RESULTS_FILE, HOPS_FILE):
        (folder / name).write_text("{}\n")
    (folder / BROWSECOMP_PLUS).mkdir()
    (folder / BROWSECOMP_PLUS / "run_7.json").write_text("{}\n")
    open_with(config, folder, resume=False)
    (previous,) = folder.glob("previous-*")
    left = [BROWSECOMP_PLUS, HOPS_FILE, RESULTS_FILE, SETTINGS_FILE]
    assert sorted(path.name for path in previous.iterdir()) == sorted(left)
    open_with(config, folder)


def test_another_index_is_refused_and_without_a_description_another_url(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    open_with(config, tmp_path / "a")
    with pytest.raises(ConfigError, match=r"retriever\.index\.index_sha256 was 'abc', is 'def'"):
        open_with(config, tmp_path / "a", index=INDEX | {"index_sha256": "def"})
    open_with(config, tmp_path / "b", index=None)
    config.retriever.url = "http://127.0.0.1:9000/retrieve"
    with pytest.raises(ConfigError, match=r"retriever\.url was 'http://127\.0\.0\.1:8000/retrieve', is "):
        open_with(config, tmp_path / "b", index=None)


def test_the_retriever_of_an_evaluation_without_a_search_is_no_difference(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    services = {"retriever": {"url": config.retriever.url, "version": {"retriever": {"sha256": "ab" * 32}}}}
    searched = make_manifest(config, services=services, trains=False)
    assert list_differences(make_manifest(config, services={}, trains=False), searched) == [
        "retriever.index.sha256 was None, is 'abababababab'",
        "retriever.url was 'http://127.0.0.1:8000/retrieve', is None",
    ]
    config.evaluation.reference = "no_search"
    assert list_differences(make_manifest(config, services={}, trains=False), searched) == [
        "evaluation.reference was 'no_search', is 'none'"
    ]


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    for name, problem in (
        ("run_manifest.json", "is the folder of a training run"),
        (RESULTS_FILE, r"has results\.jsonl without settings\.json"),
    ):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("{}")
        with pytest.raises(ConfigError, match=problem):
            open_with(config, folder)
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / SETTINGS_FILE).write_text('{"config": {')
    with pytest.raises(DataError, match=r"settings\.json.*evaluation\.resume=false"):
        open_with(config, damaged)
