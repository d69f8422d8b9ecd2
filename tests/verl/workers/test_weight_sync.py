from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from verl.errors import WeightSyncError
from verl.types import FloatArray, IntArray
from verl.workers.weight_sync import WeightPublisher, find_memory


class Policy:
    """Its log-prob of every token is its one weight."""

    def __init__(self, *, perturbation: float = 1.5) -> None:
        self.weight = -1.0
        self.perturbation = perturbation

    async def export_weights(self, folder: Path) -> None:
        folder.mkdir()
        save_file({"weight": np.array([self.weight], np.float32)}, folder / "model.safetensors")

    async def export_bytes(self) -> int:
        return 4

    async def probe(self, ids: IntArray) -> FloatArray:
        return np.full(len(ids), self.weight, np.float32)

    async def perturb(self, *, undo: bool = False) -> None:
        self.weight *= 1 / self.perturbation if undo else self.perturbation


class Engine:
    """An engine that scores with the weight it loaded last; a stale one keeps its weight."""

    def __init__(self, *, error: float = 0.0, stale: bool = False, broken: bool = False) -> None:
        self.weight = 0.0
        self.version = -1
        self.error, self.stale, self.broken = error, stale, broken

    async def load_weights(self, folder: str, version: int) -> None:
        if self.broken:
            raise WeightSyncError("requests still run")
        if not self.stale:
            self.weight = float(load_file(Path(folder) / "model.safetensors")["weight"][0])
        self.version = version

    async def score(self, ids: IntArray) -> FloatArray:
        return np.full(len(ids), self.weight + self.error, np.float32)


def make_publisher(policy: Policy, engines: list[Engine], memory: Path) -> WeightPublisher:
    return WeightPublisher(policy, engines, probe_ids=np.arange(5), tolerance=1e-3, memory=memory)


async def test_every_engine_gets_the_weights_and_the_version(tmp_path: Path) -> None:
    policy, engines = Policy(), [Engine(), Engine(error=2e-4)]
    publisher = make_publisher(policy, engines, tmp_path)
    for version, weight in enumerate((-1.0, -2.5)):
        policy.weight = weight
        assert await publisher.publish(version=version) == pytest.approx(2e-4, rel=1e-2)
        assert [engine.weight for engine in engines] == [weight, weight]
        assert [engine.version for engine in engines] == [version, version]
        assert not list(tmp_path.rglob("*.safetensors"))
    publisher.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", [Engine(stale=True), Engine(error=float("nan"))])
async def test_an_engine_that_keeps_other_weights_stops_the_run(engine: Engine, tmp_path: Path) -> None:
    publisher = make_publisher(Policy(), [Engine(), engine], tmp_path)
    with pytest.raises(
        WeightSyncError, match=r"engine 1 .* version 7 .* (1|nan) on average.*tied embeddings"
    ):
        await publisher.publish(version=7)


async def test_a_failed_publish_leaves_no_file(tmp_path: Path) -> None:
    publisher = make_publisher(Policy(), [Engine(broken=True)], tmp_path)
    with pytest.raises(WeightSyncError, match="requests still run"):
        await publisher.publish(version=0)
    assert not list(tmp_path.rglob("*.safetensors"))


async def test_verification_ends_with_the_policys_own_weights(tmp_path: Path) -> None:
    policy, engines = Policy(), [Engine(), Engine()]
    await make_publisher(policy, engines, tmp_path).verify(version=4)
    assert policy.weight == -1.0
    assert [(engine.weight, engine.version) for engine in engines] == [(-1.0, 4)] * 2


async def test_verification_catches_an_engine_that_keeps_stale_weights(tmp_path: Path) -> None:
    policy, stale = Policy(), Engine(stale=True)
    stale.weight = policy.weight  # as at the start of a run
    publisher = make_publisher(policy, [stale], tmp_path)
    assert await publisher.publish(version=0) == 0.0  # as after every small update
    with pytest.raises(WeightSyncError, match=r"engine 0 .* by 0\.5 on average.*keeps stale weights"):
        await publisher.verify(version=0)
    assert policy.weight == -1.0


async def test_stale_weights_are_noticed_also_where_the_perturbation_hardly_moves_the_probe(
    tmp_path: Path,
) -> None:
    policy, stale = Policy(perturbation=1.0005), Engine(stale=True)
    stale.weight = policy.weight
    with pytest.raises(WeightSyncError, match="engine 0 does not sample from the policy"):
        await make_publisher(policy, [stale], tmp_path).verify(version=0)
    await make_publisher(policy, [Engine()], tmp_path).verify(version=0)


async def test_a_perturbation_that_moves_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="moves no log-prob of the probe sequence"):
        await make_publisher(Policy(perturbation=1.0), [Engine()], tmp_path).verify(version=0)


def test_weights_go_where_there_is_room(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert find_memory(4, shared=tmp_path) == tmp_path
    assert not caplog.records
    elsewhere = Path(tempfile.gettempdir())
    free = shutil.disk_usage(tmp_path).free
    assert find_memory(free, shared=tmp_path) == elsewhere
    assert "--shm-size" in caplog.text
    assert find_memory(4, shared=tmp_path / "none") == elsewhere


async def test_folders_of_killed_runs_are_removed_and_those_of_running_ones_kept(tmp_path: Path) -> None:
    running = make_publisher(Policy(), [], tmp_path)
    await running.publish(version=0)
    stale_folder = tmp_path / "verl-weights-stale"
    stale_folder.mkdir()
    (stale_folder / "lock").touch()
    for folder in tmp_path.iterdir():
        os.utime(folder, (0, 0))
    other = make_publisher(Policy(), [], tmp_path)
    await other.publish(version=0)
    other.close()
    assert not stale_folder.exists()
    assert len(list(tmp_path.iterdir())) == 1
    running.close()


async def test_links_and_folders_of_other_users_are_neither_opened_nor_removed(tmp_path: Path) -> None:
    memory, elsewhere = tmp_path / "memory", tmp_path / "elsewhere"
    trap = memory / "verl-weights-trap"  # opening its lock must not block
    for folder in (memory, elsewhere, trap):
        folder.mkdir()
    (elsewhere / "lock").touch()
    (memory / "verl-weights-link").symlink_to(elsewhere)
    os.mkfifo(trap / "lock")
    if is_foreign := os.geteuid() == 0:  # only root can give a folder away
        os.chown(trap, 65534, 65534)
    for path in (*memory.iterdir(), elsewhere):
        os.utime(path, (0, 0), follow_symlinks=False)
    publisher = make_publisher(Policy(), [], memory)
    await publisher.publish(version=0)
    publisher.close()
    assert trap.exists() is is_foreign
    assert (memory / "verl-weights-link").is_symlink()
    assert (elsewhere / "lock").exists()
