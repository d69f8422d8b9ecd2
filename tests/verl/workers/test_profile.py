from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from tests.verl.workers.episodes import launch_group, make_actor, make_config, random_batch
from verl.trainer.ppo.profiler import Profiler
from verl.utils.actors import make_launcher
from verl.utils.timing import Timer
from verl.workers import profile
from verl.workers.parallel import Placement

SETTINGS = make_actor(ppo_max_token_len_per_gpu=40, ppo_mini_batch_size=4)


async def test_a_step_is_one_trace_of_trainer_and_rank(
    model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two steps one is recorded; its first passes alone, all on the same clock."""
    monkeypatch.setattr(profile, "MAX_PASSES", 2)
    caplog.set_level(logging.INFO)
    launcher, timer, batch = make_launcher("local"), Timer(), random_batch(12)
    policy = launch_group(launcher, make_config(model_folder, actor=SETTINGS), Placement(num_threads=1))
    profiler = Profiler(folder=tmp_path / "profile", steps=frozenset([2]))
    for step in (1, 2):
        async with profiler.recorded(step, policy=policy, timer=timer):
            timer.reset()
            with timer("log_probs"):
                await policy.log_probs(batch)
            with timer("update"):
                await policy.update(batch)
    launcher.shutdown()
    (path,) = (tmp_path / "profile").iterdir()
    assert path.name == "step_2_rank_0.json.gz"
    assert "https://ui.perfetto.dev" in caplog.text
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(names.values()) == ["rank 0", "rank 0: calls", "trainer: phases"]
    spans = {(names[e["pid"]], e["name"]): (e["ts"], e["ts"] + e["dur"]) for e in events if e.get("dur")}
    recorded: dict[str, list[str]] = {"log_probs": [], "update": []}
    for call, operations in recorded.items():
        outer, inner = spans["trainer: phases", call], spans["rank 0: calls", call]
        assert outer[0] <= inner[0] <= inner[1] <= outer[1]
        within = [e for e in events if e.get("cat") == "cpu_op" and inner[0] <= e["ts"] <= inner[1]]
        operations += [e["name"] for e in within]
    # An embedding per pass.
    assert [operations.count("aten::embedding") for operations in recorded.values()] == [2, 2]
    assert "aten::embedding_dense_backward" in recorded["update"]


def test_a_long_trace_is_cut_and_a_full_disk_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "MAX_EVENTS", 20)
    recorded = profile.Profile()
    recorded._events = [{"name": "operation", "ph": "X", "ts": k, "dur": 1, "pid": 1} for k in range(100)]
    recorded.write(tmp_path / "trace.json.gz", rank=0, spans=[])
    events = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))["traceEvents"]
    assert len(events) == 20
    assert "the first 14 of 100 events" in caplog.text
    (tmp_path / "file").touch()
    recorded.write(tmp_path / "file/trace.json.gz", rank=0, spans=[])
    assert "is not complete" in caplog.text
