from __future__ import annotations

import asyncio
import itertools
import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.verl.workers.episodes import (
    launch_group,
    make_actor,
    make_config,
    make_worker,
    random_batch,
    row_ids,
)
from tests.verl.workers.test_tree_log_probs import random_tree
from verl.errors import ConfigError, TrainingHaltedError
from verl.utils.actors import ActorError, Launcher, make_launcher
from verl.workers.parallel import Placement, Rendezvous
from verl.workers.scorer import PolicyCopy
from verl.workers.worker_group import WorkerGroup


def launch(
    launcher: Launcher,
    folder: Path,
    *,
    name: str = "policy",
    world_size: int = 1,
    trainable: bool = True,
) -> WorkerGroup:
    config = make_config(folder, actor=make_actor(ppo_max_token_len_per_gpu=100, ppo_mini_batch_size=4))
    placement = Placement(world_size=world_size, num_threads=1)
    return launch_group(launcher, config, placement, name=name, trainable=trainable)


@pytest.fixture
def local() -> Iterator[Launcher]:
    launcher = make_launcher("local")
    yield launcher
    launcher.shutdown()


async def test_one_local_rank_does_what_the_worker_does(
    local: Launcher, model_folder: Path, tmp_path: Path
) -> None:
    group, worker = launch(local, model_folder), make_worker(model_folder)
    batch = random_batch(7)
    assert await group.wait_until_ready() == worker.num_parameters()
    address, port = await group.find_endpoint()
    socket.create_connection((address, port)).close()
    assert await group.describe_weights() == worker.send("nccl", "describe")
    np.testing.assert_allclose(await group.log_probs(batch), worker.log_probs([batch])[0], atol=2e-5)
    assert (await group.update(batch))["num_updates"] == 2
    await group.save(tmp_path)
    ids = row_ids(batch, 0)
    expected = await group.probe(ids)
    await group.update(batch)
    assert not np.allclose(await group.probe(ids), expected)
    await group.load(tmp_path)
    np.testing.assert_array_equal(await group.probe(ids), expected)
    group.shutdown()
    group.shutdown()
    with pytest.raises(ActorError, match="policy-0"):
        await group.probe(ids)


@pytest.mark.parametrize(
    ("changes", "is_split"),
    [({}, True), ({"entropy_coeff": 0.01}, False), ({"use_kl_loss": True}, False)],
)
async def test_trajectories_without_advantages_need_no_backward_pass_unless_the_loss_has_other_terms(
    local: Launcher, model_folder: Path, changes: dict[str, object], is_split: bool
) -> None:
    plain: dict[str, object] = {"entropy_coeff": 0.0, "use_kl_loss": False, "ppo_max_token_len_per_gpu": 20}
    group = launch_group(local, make_config(model_folder, actor=make_actor(**(plain | changes))))
    batch = random_batch(4)
    is_credited = np.repeat(batch.prompts == 1, batch.policy_lengths)
    metrics = await group.update(replace(batch, advantages=batch.advantages * is_credited))
    assert metrics["backward_share"] == pytest.approx(is_credited.mean() if is_split else 1.0)


async def test_weights_are_saved_while_a_checkpoint_is_being_written(
    local: Launcher, model_folder: Path, tmp_path: Path
) -> None:
    group, checkpoint = launch(local, model_folder), tmp_path / "checkpoint"
    await group.stage("checkpoint")
    checkpoint.mkdir()
    pipe = checkpoint / f".rank_0_of_1.safetensors.{os.getpid()}.partial"
    os.mkfifo(pipe)  # who opens it to write waits for a reader
    writing = asyncio.create_task(group.write("checkpoint", checkpoint))
    try:
        async with asyncio.timeout(60):
            await group.save(tmp_path / "weights", weights_only=True)
        assert not writing.done()
    finally:
        await asyncio.to_thread(read_once, pipe)
        await writing
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["rank_0_of_1.safetensors"]


def read_once(pipe: Path) -> None:
    """Let what is written to a pipe through, and put an empty file into its place."""
    with pipe.open("rb") as content:
        pipe.unlink()
        pipe.touch()
        content.read()


async def test_a_refreshed_copy_goes_on_after_a_resume_as_without_one(
    local: Launcher, model_folder: Path, tmp_path: Path
) -> None:
    """Refreshed after steps 2 and 4; a run that resumes from step 3 scores steps 4 and 5 alike."""

    def start(name: str) -> tuple[WorkerGroup, PolicyCopy]:
        policy = launch(local, model_folder, name=name)
        frozen = launch(local, model_folder, name=f"{name} copy", trainable=False)
        return policy, PolicyCopy(policy, frozen, every=2, scratch=tmp_path)

    batches = [random_batch(4, seed=seed) for seed in range(5)]
    ids = row_ids(batches[0], 0)
    policy, copy = start("unbroken")
    initial, unbroken = await policy.probe(ids), []
    for step, batch in enumerate(batches, start=1):
        unbroken.append(await copy.model.probe(ids))  # what scores in this step
        await policy.update(batch)
        await copy.refresh(step)
        if step == 2:
            np.testing.assert_array_equal(await copy.model.probe(ids), await policy.probe(ids))
        if step == 3:
            await policy.save(tmp_path / "checkpoint")
            await copy.stage("step 3")
            await copy.write("step 3", tmp_path / "checkpoint")
    np.testing.assert_array_equal(unbroken[1], initial)
    assert not np.array_equal(unbroken[2], initial)
    assert not np.array_equal(unbroken[4], unbroken[3])

    policy, copy = start("resumed")
    await copy.load(tmp_path / "checkpoint")
    await policy.load(tmp_path / "checkpoint")
    for step in (4, 5):
        np.testing.assert_array_equal(await copy.model.probe(ids), unbroken[step - 1])
        await policy.update(batches[step - 1])
        await copy.refresh(step)
    with pytest.raises(ConfigError, match=r"no copy of the policy.*refresh_steps=2"):
        await copy.load(tmp_path)
    assert not (tmp_path / "policy_copy").exists()


def test_a_model_that_is_not_there_shows_at_the_launch(local: Launcher, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such folder"):
        launch(local, Path("/no/such/model"))


@pytest.mark.slow
@pytest.mark.timeout(900)  # two processes import torch and transformers on busy cores
async def test_two_gloo_ranks_do_what_one_does(local: Launcher, tied_folder: Path, tmp_path: Path) -> None:
    launcher = make_launcher("ray", object_store_mb=80)
    try:
        two = launch(launcher, tied_folder, name="two", world_size=2)
        one = launch(local, tied_folder)
        await _compare_with_one(two, one, out=tmp_path)
        two._actors[1].kill()
        with pytest.raises(ActorError, match="two-1"):
            await two.update(random_batch(4))
    finally:
        launcher.shutdown()


async def read_exported(group: WorkerGroup) -> dict[str, Tensor]:
    (folder,) = await group.export_weights()
    state = load_file(Path(folder) / "model.safetensors")
    await group.drop_weights()
    assert not Path(folder).exists()
    return state


async def _compare_trees(two: WorkerGroup, one: WorkerGroup) -> None:
    trees = [random_tree(np.random.default_rng(seed), turns=seed) for seed in range(4)]
    for some, shared in itertools.product((trees, trees[1:2]), (True, False)):
        pairs = zip(
            await two.tree_log_probs(some, shared=shared),
            await one.tree_log_probs(some, shared=shared),
            strict=True,
        )
        for got, expected in pairs:
            for of_two, of_one in zip(got.branches, expected.branches, strict=True):
                np.testing.assert_allclose(of_two, of_one, atol=2e-5)
            assert (got.trunk is None) == (expected.trunk is None)
            if got.trunk is not None:
                np.testing.assert_allclose(got.trunk, expected.trunk, atol=2e-5)


async def _compare_with_one(two: WorkerGroup, one: WorkerGroup, *, out: Path) -> None:
    # 9 rows in mini-batches of 5 and 4, and of 100 tokens: the ranks have unequal numbers of micro-batches.
    batch = random_batch(9)
    single = random_batch(1)
    assert await two.wait_until_ready() == await one.wait_until_ready()
    for each in (batch, single):  # with one row, one of the ranks has none
        np.testing.assert_allclose(await two.log_probs(each), await one.log_probs(each), atol=2e-5)
    await _compare_trees(two, one)
    for _ in range(3):
        got, expected = await two.update(batch), await one.update(batch)
        # Trajectories share tokens within a pass, and two ranks have others than one.
        assert 0 < expected.pop("computed_share") <= got.pop("computed_share") < 1
        for name, value in expected.items():
            # Rounding can move a ratio across the border of clipping: one token of 40 in a mini-batch.
            allowed = 0.02 if name == "clip_fraction" else 1e-4
            assert got[name] == pytest.approx(value, rel=2e-3, abs=allowed), name
    await two.save(out / "checkpoint")
    state, expected_state = await read_exported(two), await read_exported(one)
    assert state.keys() == expected_state.keys()
    for name, weight in expected_state.items():
        np.testing.assert_allclose(state[name].numpy(), weight.numpy(), atol=2e-3, err_msg=name)
    ids = row_ids(batch, 0)
    before = await two.probe(ids)
    for group in (two, one):
        await group.perturb(0)
    np.testing.assert_allclose(await two.probe(ids), await one.probe(ids), atol=0.1)
    assert np.abs(await two.probe(ids) - before)[1:].mean() > 0.3
    await two.perturb(0, undo=True)
    np.testing.assert_array_equal(await two.probe(ids), before)
    assert await two.export_bytes() == await one.export_bytes()
    await two.update(single)
    after = await two.probe(ids)
    await two.load(out / "checkpoint")
    np.testing.assert_array_equal(await two.probe(ids), before)
    await two.update(single)
    np.testing.assert_array_equal(await two.probe(ids), after)


class FullRank:
    """A rank whose GPU has no memory left."""

    node = 0

    async def call(self, method: str, /, *args: object, **kwargs: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    def kill(self) -> None:
        """There is nothing to end."""


async def test_a_gpu_without_memory_is_an_error_with_settings_to_change() -> None:
    group = WorkerGroup(
        [FullRank()], config=make_actor(), packs=True, rendezvous=Rendezvous(), address="127.0.0.1"
    )
    with pytest.raises(TrainingHaltedError, match=r"'probe': CUDA out of memory.*ppo_max_token_len_per_gpu"):
        await group.probe(np.arange(4))
