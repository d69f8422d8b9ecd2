"""What is offloaded takes no memory outside its phases, and a step computes the same bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.verl.workers.episodes import exported, make_config, make_worker, one_rank, random_batch, save
from verl.trainer.config.schema import ActorRolloutRefConfig, FsdpConfig, RefConfig, RefFsdpConfig
from verl.workers.parallel import local_part
from verl.workers.policy import PolicyWorker


def staying(folder: Path) -> ActorRolloutRefConfig:
    """In bfloat16, because what is exported to NumPy without a copy can no longer be emptied."""
    return make_config(folder, dtype="bfloat16")


def offloading(folder: Path) -> ActorRolloutRefConfig:
    config = staying(folder)
    offload = FsdpConfig(param_offload=True, optimizer_offload=True)
    return replace(
        config,
        actor=replace(config.actor, fsdp_config=offload),
        ref=RefConfig(RefFsdpConfig(param_offload=True)),
    )


def resident(worker: PolicyWorker) -> dict[str, int]:
    """Return the bytes of weights and of optimizer state that are on the device."""
    state = worker._optimizer.state.values() if worker._optimizer else ()
    tensors = {
        "weights": list(worker._network.parameters()),
        "optimizer": [value for of_one in state for value in of_one.values() if value.dim()],
    }
    return {
        name: sum(local_part(t.detach()).untyped_storage().nbytes() for t in those)
        for name, those in tensors.items()
    }


@pytest.mark.parametrize("folder", ["model_folder", "tied_folder"])
def test_steps_with_offload_are_those_without(
    folder: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Log-probs, updates, the exported weights, checkpoints that are saved while all is in host memory."""
    model = request.getfixturevalue(folder)
    plain, frugal = make_worker(staying(model)), make_worker(offloading(model))
    minis = one_rank(random_batch(6), mini_batch_size=3)
    ids = np.arange(2, 30, dtype=np.int32)
    for step in range(2):
        for worker, name in ((plain, "plain"), (frugal, "frugal")):
            worker.metrics = worker.update(minis)  # type: ignore[attr-defined]
            with exported(worker) as file:
                (tmp_path / f"{name}_weights_{step}").mkdir()
                (tmp_path / f"{name}_weights_{step}" / "weights").write_bytes(file.read_bytes())
            worker.scores = worker.probe(ids)  # type: ignore[attr-defined]
            worker.release()
            save(worker, str(tmp_path / f"{name}_{step}"))
        assert frugal.metrics == plain.metrics  # type: ignore[attr-defined]
        np.testing.assert_array_equal(frugal.scores, plain.scores)  # type: ignore[attr-defined]
        for kind in (f"weights_{step}", f"{step}"):
            (one,), (other,) = ((tmp_path / f"{name}_{kind}").iterdir() for name in ("plain", "frugal"))
            assert one.read_bytes() == other.read_bytes()
    resumed = make_worker(offloading(model))
    resumed.load(str(tmp_path / "plain_1"))
    assert resumed.update(minis) == plain.update(minis)


def test_each_phase_has_on_the_device_what_it_needs(model_folder: Path) -> None:
    worker = make_worker(offloading(model_folder))
    all_weights = resident(worker)["weights"]
    minis = one_rank(random_batch(3))
    assert all_weights > 0
    worker.update(minis)
    assert resident(worker) == {"weights": all_weights, "optimizer": 0}
    worker.release()
    assert resident(worker) == {"weights": 0, "optimizer": 0}
    worker.log_probs([random_batch(3)])
    assert resident(worker) == {"weights": all_weights, "optimizer": 0}
    during = {}
    take_step = worker._train_on

    def observe(*args: object, **kwargs: object) -> object:
        during.update(resident(worker))
        return take_step(*args, **kwargs)  # type: ignore[arg-type]

    worker._train_on = observe  # type: ignore[method-assign,assignment]
    worker.update(minis)
    assert during == {"weights": all_weights, "optimizer": 2 * all_weights}


def test_a_frozen_model_is_there_while_it_scores_and_follows_what_it_loads(
    model_folder: Path, tmp_path: Path
) -> None:
    """It keeps one copy in host memory, which a load replaces."""
    policy = make_worker(staying(model_folder))
    frozen, other = (make_worker(config(model_folder), trainable=False) for config in (offloading, staying))
    batch = random_batch(3)
    assert resident(frozen)["weights"] == 0
    for _ in range(2):
        np.testing.assert_array_equal(frozen.log_probs([batch])[0], other.log_probs([batch])[0])
        assert resident(frozen)["weights"] == 0
    policy.update(one_rank(batch))
    policy.save(str(tmp_path / "state"), weights_only=True)
    before = other.log_probs([batch])[0]
    for model in (frozen, other):
        model.load(str(tmp_path / "state"))
    assert resident(frozen)["weights"] == 0
    after = frozen.log_probs([batch])[0]
    np.testing.assert_array_equal(after, other.log_probs([batch])[0])
    assert np.abs(after - before).max() > 0.01


class CopiedBytes(TorchDispatchMode):
    """Counts the bytes of storages that are copied."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        target = args[0] if args else None
        if func is torch.ops.aten.copy_.default and isinstance(target, torch.Tensor):
            self.count += target.nbytes * (target.dtype == torch.uint8)
        return func(*args, **(kwargs or {}))


def test_weights_below_adapters_are_copied_to_host_memory_once(model_folder: Path) -> None:
    """After that adapters alone, unless frozen weights were written to."""
    config = offloading(model_folder)
    worker = make_worker(replace(config, model=replace(config.model, lora_rank=2)))
    sizes = {True: 0, False: 0}
    for parameter in worker._network.parameters():
        sizes[parameter.requires_grad] += parameter.nbytes
    minis, copied = one_rank(random_batch(3)), []

    def release() -> None:
        with CopiedBytes() as mode:
            worker.release()
        copied.append(mode.count)

    release()
    for _ in range(2):
        worker.update(minis)
        release()
    worker.perturb(0)
    worker.perturb(0, undo=True)
    release()
    whole = sizes[True] + sizes[False]
    assert copied == [whole, sizes[True], sizes[True], whole]
    assert 0 < sizes[True] < sizes[False]
