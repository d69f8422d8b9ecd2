"""Which checkpoint is asked, and by which settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from serving.files import FileRecord
from verl.ask.checkpoint import find_checkpoint, make_config
from verl.errors import ConfigError
from verl.trainer.config.schema import Config
from verl.workers.checkpoint import CheckpointStore

REPOSITORY = Path(__file__).resolve().parents[3]


async def make_run(folder: Path, *, config: Config | None = None, steps: tuple[int, ...] = (10, 20)) -> Path:
    """A run folder with checkpoints that hold no weights."""
    folder.mkdir(parents=True)
    recorded = json.loads(json.dumps(dataclasses.asdict(config or Config())))
    services = {"retriever": {"url": "http://r", "version": {"index": "a"}}}
    manifest = {"status": "completed", "config": recorded, "services": services}
    (folder / "run_manifest.json").write_text(json.dumps(manifest))
    store = CheckpointStore(folder / "checkpoints", keep=9)

    async def write(checkpoint: Path) -> dict[Path, FileRecord]:
        (checkpoint / "huggingface").mkdir()
        (checkpoint / "huggingface" / "config.json").write_text("{}")
        return {}

    for step in steps:
        await store.write(step, write)
    return folder


async def test_the_newest_quickstart_with_a_checkpoint_is_asked(tmp_path: Path) -> None:
    for name, steps in (("20260101-000000", (10,)), ("20260301-000000", (10, 20)), ("20260401-000000", ())):
        await make_run(tmp_path / f"quickstart-{name}", steps=steps)
    await make_run(tmp_path / "zzz")
    found = find_checkpoint(None, runs=tmp_path)
    assert found.name == "quickstart-20260301-000000/global_step_20"
    assert found.retriever == {"index": "a"}
    with pytest.raises(ConfigError, match=r"no quickstart with a checkpoint in .*make quickstart"):
        find_checkpoint(None, runs=tmp_path / "empty")


@pytest.mark.parametrize("part", ["", "checkpoints/global_step_10", "checkpoints/global_step_10/huggingface"])
async def test_the_settings_are_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = Config()
    config.agent.format, config.max_turns, config.retriever.topk = "autorefine", 7, 5
    config.data.max_obs_length, config.trainer.seed = 333, 9
    config.reward.answer_wrapper = "So: {answer}"
    monkeypatch.chdir(tmp_path)  # recorded paths are those of the repository
    run_dir = await make_run(tmp_path / "run", config=config)
    found = find_checkpoint(str(run_dir / part))
    made = make_config(found)
    data = dataclasses.replace(config.data, val_files=[str(REPOSITORY / "world/test.parquet")])
    assert (made.agent, made.data, made.retriever) == (config.agent, data, config.retriever)
    assert made.max_turns == 7
    assert made.reward.answer_wrapper == "So: {answer}"
    step = 10 if part else 20
    assert made.actor_rollout_ref.model.path.endswith(f"checkpoints/global_step_{step}/huggingface")
    assert (made.trainer.launcher, made.trainer.n_gpus_per_node) == ("local", 1)
    changed = make_config(found, max_turns=2, overrides=["retriever.topk=1"])
    assert (changed.max_turns, changed.retriever.topk) == (2, 1)


async def test_recorded_settings_that_no_longer_exist_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = await make_run(tmp_path / "run")
    path = run_dir / "run_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["config"]["data"]["of_old"] = 1
    path.write_text(json.dumps(manifest))
    assert make_config(find_checkpoint(str(run_dir))).data.max_obs_length == Config().data.max_obs_length
    assert "this version does not have: data.of_old" in caplog.text


def test_a_model_without_a_run_has_the_defaults_and_wrong_settings_are_named(tmp_path: Path) -> None:
    found = find_checkpoint("some/model")
    assert (found.model, found.run_dir, found.name, found.retriever) == ("some/model", None, "model", None)
    config = make_config(found)
    assert (config.agent.format, config.actor_rollout_ref.model.path) == ("search_r1", "some/model")
    unknown = "expected NAME=VALUE with a setting of .*, such as agent.format=tool_calls"
    wrong = (
        ("retriever.topk=0", "retriever.topk must be"),
        ("data.x=1", f"--set data.x=1: {unknown}"),
        ("data=1", f"--set data=1: {unknown}"),
        ("max_turns", f"--set max_turns: {unknown}"),
    )
    for override, message in wrong:
        with pytest.raises(ConfigError, match=message):
            make_config(found, overrides=[override])
