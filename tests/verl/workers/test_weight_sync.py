from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from verl.errors import WeightSyncError
from verl.protocols import EnginePart
from verl.types import FloatArray, IntArray
from verl.utils.actors import ActorError
from verl.workers.weight_file import FileTransfer
from verl.workers.weight_sync import WeightPublisher, perturbed_tolerance


class Policy:
    """Its log-prob of every token is its one weight, which it writes once on each of `num_nodes`."""

    def __init__(
        self, folder: Path, *, num_nodes: int = 1, perturbations: Sequence[float] = (1.5, 3)
    ) -> None:
        self.weight = -1.0
        self.perturbations = perturbations
        self.folders = [folder / f"node-{node}" for node in range(num_nodes)]

    async def export_weights(self) -> list[str]:
        for folder in self.folders:
            folder.mkdir()
            save_file({"weight": np.array([self.weight], np.float32)}, folder / "model.safetensors")
        return [str(folder) for folder in self.folders]

    async def drop_weights(self) -> None:
        for folder in self.folders:
            shutil.rmtree(folder)

    async def probe(self, ids: IntArray) -> FloatArray:
        return np.full(len(ids), self.weight, np.float32)

    async def release(self) -> None:
        """Everything stays."""

    async def num_perturbations(self) -> int:
        return len(self.perturbations)

    async def perturb(self, index: int, *, undo: bool = False) -> None:
        factor = self.perturbations[index]
        self.weight *= 1 / factor if undo else factor


class Engine:
    """An engine that scores with the weight it loaded last; a stale one keeps its weight.

    `ignored`: a weight that it does not take.
    """

    def __init__(
        self,
        *,
        node: int = 0,
        error: float = 0.0,
        stale: bool = False,
        broken: bool = False,
        ignored: float | None = None,
    ) -> None:
        self.node = node
        self.folder = ""
        self.weight = 0.0
        self.version = -1
        self.error, self.stale, self.broken, self.ignored = error, stale, broken, ignored

    async def sleep(self) -> None:
        """It shares no GPU."""

    async def wake(self, part: EnginePart) -> None:
        """It is awake."""

    async def load_weights(self, folder: str, version: int) -> None:
        if self.broken:
            raise WeightSyncError("requests still run")
        self.folder = folder
        weight = float(load_file(Path(folder) / "model.safetensors")["weight"][0])
        if not self.stale and weight != self.ignored:
            self.weight = weight
        self.version = version

    async def score(self, ids: IntArray) -> FloatArray:
        return np.full(len(ids), self.weight + self.error, np.float32)


def make_publisher(policy: Policy, engines: list[Engine]) -> WeightPublisher:
    transfer = FileTransfer(policy, engines)
    return WeightPublisher(policy, engines, transfer, probe_ids=np.arange(5), tolerance=1e-3)


async def test_every_engine_gets_the_weights_and_the_version(tmp_path: Path) -> None:
    policy, engines = Policy(tmp_path, num_nodes=2), [Engine(), Engine(error=2e-4, node=1)]
    publisher = make_publisher(policy, engines)
    for version, weight in enumerate((-1.0, -2.5)):
        policy.weight = weight
        assert await publisher.publish(version=version) == pytest.approx(2e-4, rel=1e-2)
        assert [engine.weight for engine in engines] == [weight, weight]
        assert [engine.version for engine in engines] == [version, version]
        assert [engine.folder for engine in engines] == [str(folder) for folder in policy.folders]
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("engine", [Engine(stale=True), Engine(error=float("nan"))])
async def test_an_engine_that_keeps_other_weights_stops_the_run(engine: Engine, tmp_path: Path) -> None:
    publisher = make_publisher(Policy(tmp_path), [Engine(), engine])
    with pytest.raises(
        WeightSyncError, match=r"engine 1 .* version 7 .* (1|nan) on average.*tied embeddings"
    ):
        await publisher.publish(version=7)


async def test_a_failed_publish_leaves_no_file(tmp_path: Path) -> None:
    publisher = make_publisher(Policy(tmp_path), [Engine(broken=True)])
    with pytest.raises(WeightSyncError, match="requests still run"):
        await publisher.publish(version=0)
    assert not list(tmp_path.iterdir())


async def test_verification_ends_with_the_policys_own_weights(tmp_path: Path) -> None:
    policy, engines = Policy(tmp_path), [Engine(), Engine()]
    await make_publisher(policy, engines).verify(version=4)
    assert policy.weight == -1.0
    assert [(engine.weight, engine.version) for engine in engines] == [(-1.0, 4)] * 2


@pytest.mark.parametrize(
    ("engine", "difference"), [(Engine(stale=True), r"0\.5"), (Engine(ignored=-3.0), r"1\.5")]
)
async def test_verification_catches_an_engine_that_keeps_what_a_perturbation_changes(
    engine: Engine, difference: str, tmp_path: Path
) -> None:
    policy = Policy(tmp_path)
    engine.weight = policy.weight  # as at the start of a run
    publisher = make_publisher(policy, [engine])
    assert await publisher.publish(version=0) == 0.0  # as after every small update
    with pytest.raises(WeightSyncError, match=rf"engine 0 .* by {difference} on average.*install that of"):
        await publisher.verify(version=0)
    assert policy.weight == -1.0


async def test_stale_weights_are_noticed_also_where_the_perturbation_hardly_moves_the_probe(
    tmp_path: Path,
) -> None:
    policy, stale = Policy(tmp_path, perturbations=(1.0005,)), Engine(stale=True)
    stale.weight = policy.weight
    with pytest.raises(WeightSyncError, match="engine 0 does not sample from the policy"):
        await make_publisher(policy, [stale]).verify(version=0)
    await make_publisher(policy, [Engine()]).verify(version=0)


class EndedPolicy(Policy):
    """A policy that ends in the first transfer."""

    async def export_weights(self) -> list[str]:
        raise WeightSyncError("the GPUs do not reach each other")

    async def drop_weights(self) -> None:
        """There are none."""

    async def perturb(self, index: int, *, undo: bool = False) -> None:
        if undo:
            raise ActorError("actor 'policy-0' died")
        await super().perturb(index)


async def test_a_policy_that_cannot_undo_does_not_hide_why_the_transfer_failed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(WeightSyncError, match="do not reach each other"):
        await make_publisher(EndedPolicy(tmp_path), [Engine()]).verify(version=0)
    assert "policy-0" in caplog.text


async def test_a_perturbation_that_moves_nothing_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightSyncError, match="moves no log-prob of the probe sequence"):
        await make_publisher(Policy(tmp_path, perturbations=(2.0, 1.0)), [Engine()]).verify(version=0)


async def test_weights_that_travel_over_the_disk_are_reported_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = make_publisher(Policy(tmp_path), [Engine()])
    for version in range(2):
        await publisher.publish(version=version)
    assert caplog.text.count("--shm-size") == 1


class Notes:
    """A policy, a transfer and an engine on one GPU, which note what is called."""

    def __init__(self, *, fails: str | None = None) -> None:
        self.calls: list[str] = []
        self.fails = fails

    def note(self, call: str) -> None:
        self.calls.append(call)
        if call == self.fails:
            raise WeightSyncError(f"{call} failed")

    async def send(self, version: int) -> None:
        self.note(f"send {version}")

    async def probe(self, ids: IntArray) -> FloatArray:
        self.note("probe")
        return np.full(len(ids), -1.0, np.float32)

    async def release(self) -> None:
        self.note("release")

    async def num_perturbations(self) -> int:
        return 1

    async def perturb(self, index: int, *, undo: bool = False) -> None:
        self.note("perturb")

    async def sleep(self) -> None:
        self.note("sleep")

    async def wake(self, part: EnginePart) -> None:
        self.note(f"wake {part}")

    async def score(self, ids: IntArray) -> FloatArray:
        self.note("score")
        return np.full(len(ids), -1.0, np.float32)


async def test_the_policy_leaves_the_gpu_before_the_cache_of_the_engine_comes_back() -> None:
    notes = Notes()
    await WeightPublisher(notes, [notes], notes, probe_ids=np.arange(5), tolerance=1e-3).publish(version=3)
    assert notes.calls == ["sleep", "wake weights", "send 3", "probe", "release", "wake kv_cache", "score"]


async def test_an_engine_without_weights_is_not_woken() -> None:
    notes = Notes(fails="send 3")
    publisher = WeightPublisher(notes, [notes], notes, probe_ids=np.arange(5), tolerance=1e-3)
    with pytest.raises(WeightSyncError, match="send 3 failed"):
        await publisher.publish(version=3)
    assert notes.calls == ["sleep", "wake weights", "send 3"]


@pytest.mark.parametrize(
    ("shift", "tolerance", "accepted"),
    [(100.0, 0.1, 0.5), (5.0, 0.1, 0.25), (1.0, 0.1, 0.1), (5.0, 0.4, 0.4), (0.03, 0.1, 0.01)],
)
def test_a_larger_tolerance_accepts_more_rounding_but_never_stale_weights(
    shift: float, tolerance: float, accepted: float
) -> None:
    assert perturbed_tolerance(shift, tolerance=tolerance) == pytest.approx(accepted)
