from __future__ import annotations

import asyncio
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from tests.verl.workers.episodes import (
    exported,
    launch_group,
    make_actor,
    make_config,
    make_worker,
    one_rank,
    random_batch,
    row_ids,
    save,
)
from verl.branches import Branch, Tree
from verl.errors import ConfigError
from verl.utils.actors import LocalLauncher
from verl.workers.batch import TrainBatch, pack_rows
from verl.workers.losses import kl_estimates, policy_losses
from verl.workers.model import packs_rows
from verl.workers.policy import PolicyWorker
from verl.workers.weight_sync import distance, perturbed_tolerance

EMBEDDED = Path(__file__).resolve().parents[3] / "world/models/policy"


def weights_of(worker: PolicyWorker) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in worker._network.named_parameters()}


def assert_same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def padded(folder: Path, batch: TrainBatch, *, temperature: float = 1.0) -> tuple[Tensor, Tensor, nn.Module]:
    """Log-probs and entropies of the policy tokens [N] from padded rows, and the model with the gradient."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    rows = [batch.select(np.array([row], np.int32)) for row in range(batch.num_trajectories)]
    ids = pad_sequence([torch.tensor(row.token_ids).long() for row in rows], batch_first=True)
    is_policy = pad_sequence([torch.tensor(row.policy_mask) for row in rows], batch_first=True)
    is_real = pad_sequence([torch.ones(len(row.token_ids)) for row in rows], batch_first=True)
    log_softmax = (model(ids, attention_mask=is_real).logits / temperature).log_softmax(-1)[:, :-1]
    log_probs = log_softmax.gather(-1, ids[:, 1:, None])[..., 0]
    entropy = -(log_softmax.exp() * log_softmax).sum(-1)
    return log_probs[is_policy[:, 1:]], entropy[is_policy[:, 1:]], model


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_padded_forward_pass(model_folder: Path, temperature: float) -> None:
    """Whether what trajectories begin with is computed once or in a pass for each."""
    batch = random_batch(7)
    worker = make_worker(make_config(model_folder, temperature=temperature), trainable=False)
    expected = padded(model_folder, batch, temperature=temperature)[0].detach().numpy()
    prompts = sum(batch.prompt_lengths[[0, 3, 6]])
    assert len(pack_rows(batch).ids) < prompts + (batch.lengths - batch.prompt_lengths).sum()
    (together,) = worker.log_probs([batch])
    np.testing.assert_allclose(together, expected, atol=1e-5)
    apart = worker.log_probs([batch.select(np.array([row], np.int32)) for row in range(7)])
    np.testing.assert_allclose(np.concatenate(apart), expected, atol=1e-5)


def test_probe_scores_every_token_at_temperature_one(model_folder: Path) -> None:
    batch = random_batch(1)
    whole = replace(
        batch,
        policy_mask=np.arange(batch.lengths[0]) > 0,
        policy_lengths=batch.lengths - 1,
        advantages=np.zeros(batch.lengths[0] - 1, np.float32),
        sampling_log_probs=np.zeros(batch.lengths[0] - 1, np.float32),
        old_log_probs=None,
        ref_log_probs=None,
    )
    scores = make_worker(make_config(model_folder, temperature=0.7), trainable=False).probe(batch.token_ids)
    np.testing.assert_allclose(scores[1:], padded(model_folder, whole)[0].detach().numpy(), atol=1e-5)
    assert scores[0] == 0


def test_chunked_logits_give_the_same_update(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chunked = make_worker(model_folder), make_worker(model_folder)
    minis = one_rank(random_batch(4))
    plain.update(minis)
    monkeypatch.setattr("verl.workers.model._LOGITS_PER_CHUNK", 97 * 5)
    chunked.update(minis)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(chunked)[name], weight, atol=1e-5, rtol=1e-4)


def gradients(worker: PolicyWorker, batch: TrainBatch, *, max_tokens: int = 8192) -> dict[str, Tensor]:
    """What an update of one mini-batch would apply."""
    for mini in one_rank(batch, max_tokens=max_tokens):
        for micro in mini.micro_batches:
            worker._loss(micro, mini)[0].backward()
    return {name: p.grad for name, p in worker._network.named_parameters() if p.grad is not None}


def test_cutting_and_order_of_a_mini_batch_do_not_change_its_gradient(model_folder: Path) -> None:
    batch = random_batch(9)
    expected = gradients(make_worker(model_folder), batch)
    shuffled = batch.select(np.random.default_rng(0).permutation(9).astype(np.int32))
    for other, max_tokens in ((batch, 70), (batch, 1), (shuffled, 8192)):
        got = gradients(make_worker(model_folder), other, max_tokens=max_tokens)
        for name, gradient in expected.items():
            torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-4)


def test_trajectories_without_advantages_need_no_backward_pass(model_folder: Path) -> None:
    batch = random_batch(9)
    uncredited = np.repeat(batch.prompts > 0, batch.policy_lengths)
    batch = replace(batch, advantages=np.where(uncredited, np.float32(0), batch.advantages))
    config = make_config(model_folder, actor=make_actor(use_kl_loss=False, entropy_coeff=0.0))
    workers = make_worker(config), make_worker(config)
    (whole,) = one_rank(batch, max_tokens=70)
    (split,) = one_rank(batch, max_tokens=70, only_advantages=True)
    assert sum(micro.num_trajectories for micro in split.micro_batches) == 3
    expected, found = workers[0].update([whole]), workers[1].update([split])
    assert expected.pop("backward_share") == 1.0
    assert found.pop("backward_share") == pytest.approx(1 - uncredited.mean())
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    for name, weight in weights_of(workers[0]).items():
        # The first step of Adam is the sign of a gradient that may be next to nothing.
        torch.testing.assert_close(weights_of(workers[1])[name], weight, atol=5e-4, rtol=1e-3)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_loss_gradient_and_metrics_equal_a_padded_reference_computation(
    model_folder: Path, loss_agg_mode: str
) -> None:
    config = make_config(model_folder, actor=make_actor(loss_agg_mode=loss_agg_mode))
    batch = random_batch(5)
    metrics = make_worker(config).update(one_rank(batch, max_tokens=80))
    log_probs, entropy, model = padded(model_folder, batch)
    assert batch.old_log_probs is not None
    assert batch.ref_log_probs is not None
    old, sampling = torch.tensor(batch.old_log_probs), torch.tensor(batch.sampling_log_probs)
    losses, clipped = policy_losses(
        log_probs, old, torch.tensor(batch.advantages), clip_low=0.2, clip_high=0.2
    )
    losses = losses * (old - sampling).exp().clamp(max=2.0)
    kl = kl_estimates(log_probs, torch.tensor(batch.ref_log_probs), kind="low_var_kl")

    def mean(x: Tensor) -> Tensor:
        if loss_agg_mode == "token-mean":
            return x.mean()
        return torch.stack([row.mean() for row in x.split(batch.policy_lengths.tolist())]).mean()

    loss = mean(losses) + 0.05 * mean(kl) - 0.01 * mean(entropy)
    loss.backward()
    got = gradients(make_worker(config), batch, max_tokens=80)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(got[f"model.{name}"], parameter.grad, atol=1e-5, rtol=1e-4)
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert metrics["pg_loss"] == pytest.approx(mean(losses).item(), rel=1e-4)
    assert metrics["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(float(clipped.float().mean()), abs=1e-6)
    difference = np.abs(batch.old_log_probs - batch.sampling_log_probs)
    assert metrics["log_prob_difference_mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["log_prob_difference_max"] == pytest.approx(difference.max(), rel=1e-4)


def test_on_policy_update_has_ratio_one(model_folder: Path) -> None:
    metrics = make_worker(model_folder).update(one_rank(random_batch(4, with_old=False)))
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert "kl" not in metrics
    with pytest.raises(ValueError, match="2 updates need old_log_probs"):
        make_worker(model_folder).update(one_rank(random_batch(4, with_old=False), mini_batch_size=2))


def test_zero_learning_rate_changes_no_bit(model_folder: Path) -> None:
    worker = make_worker(make_config(model_folder, actor=make_actor(lr=0.0)))
    before = weights_of(worker)
    batch = random_batch(4)
    metrics = worker.update(one_rank(batch, mini_batch_size=2))
    assert metrics["num_updates"] == 2
    assert batch.old_log_probs is not None
    largest = np.abs(batch.old_log_probs - batch.sampling_log_probs).max()
    assert metrics["log_prob_difference_max"] == pytest.approx(largest, rel=1e-4)  # of both updates
    assert metrics["grad_norm"] > 0
    assert_same_bits(weights_of(worker), before)


def test_a_non_finite_update_is_skipped_without_a_trace(model_folder: Path) -> None:
    worker = make_worker(model_folder)
    good = random_batch(4)
    bad = replace(good, advantages=np.full_like(good.advantages, np.inf))
    worker.update(one_rank(good))
    weights = weights_of(worker)
    assert worker._optimizer is not None
    names = {p: name for name, p in worker._network.named_parameters()}

    def optimizer_bits() -> dict[str, Tensor]:
        assert worker._optimizer is not None
        return {
            f"{names[p]}.{k}": v.clone() for p, s in worker._optimizer.state.items() for k, v in s.items()
        }

    optimizer = optimizer_bits()
    metrics = worker.update(one_rank(bad, mini_batch_size=2))
    assert metrics == {"lr": 1e-2, "num_updates": 2, "skipped_updates": 2}
    assert_same_bits(weights_of(worker), weights)
    assert_same_bits(optimizer_bits(), optimizer)
    metrics = worker.update(one_rank(good))
    assert metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(torch.isfinite(weight).all() for weight in weights_of(worker).values())


def test_a_loaded_worker_continues_exactly(model_folder: Path, tmp_path: Path) -> None:
    actor = make_actor(optim=replace(make_actor().optim, lr_warmup_steps_ratio=0.7))
    updates = [one_rank(random_batch(4, seed=seed), mini_batch_size=2) for seed in range(6)]
    unbroken, first = (make_worker(make_config(model_folder, actor=actor)) for _ in range(2))
    for minis in updates:
        expected = unbroken.update(minis)
    for minis in updates[:3]:
        first.update(minis)
    save(first, str(tmp_path))
    second = make_worker(make_config(model_folder, actor=actor))
    second.load(str(tmp_path))
    for minis in updates[3:]:
        metrics = second.update(minis)
    assert metrics == expected
    assert_same_bits(weights_of(second), weights_of(unbroken))


def test_a_checkpoint_without_the_files_of_all_ranks_is_refused(model_folder: Path, tmp_path: Path) -> None:
    worker = make_worker(model_folder)
    with pytest.raises(ConfigError, match="files of 0 ranks"):
        worker.load(str(tmp_path))
    save(worker, str(tmp_path))
    (tmp_path / "rank_0_of_1.safetensors").rename(tmp_path / "rank_0_of_2.safetensors")
    with pytest.raises(ConfigError, match="files of 1 ranks"):
        worker.load(str(tmp_path))


def test_training_does_not_change_what_is_staged(model_folder: Path, tmp_path: Path) -> None:
    worker, before = make_worker(model_folder), make_worker(model_folder)
    worker.stage("given up")
    worker.stage("first")
    assert list(worker._staged) == ["first"], "there may be no memory for two"
    worker.update(one_rank(random_batch(4)))
    asyncio.run(worker.write("first", str(tmp_path)))
    worker.load(str(tmp_path))
    assert_same_bits(weights_of(worker), weights_of(before))


@pytest.mark.parametrize("every", [1, 2])
def test_gradient_checkpointing_changes_no_log_prob(model_folder: Path, every: int) -> None:
    worker = make_worker(
        make_config(model_folder, enable_gradient_checkpointing=True, checkpoint_every_n_layers=every)
    )
    batch = random_batch(3)
    metrics = worker.update(one_rank(batch))
    assert metrics["grad_norm"] == pytest.approx(
        make_worker(model_folder).update(one_rank(batch))["grad_norm"], rel=1e-5
    )


@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("embedded", "float32", 1e-3),
        ("tied", "float32", 1e-3),
        ("embedded", "bfloat16", 0.1),
    ],
)
def test_every_stale_weight_shows_against_perturbed_ones(
    tied_folder: Path, name: str, precision: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of an engine that keeps one weight, beside what `verify` accepts."""
    monkeypatch.setattr("verl.workers.model_io._PERTURBED_LAYERS", 2)
    worker = make_worker(make_config(EMBEDDED if name == "embedded" else tied_folder, dtype=precision))
    ids = np.arange(2, 66, dtype=np.int32)
    parameters, before, scores = (
        dict(worker._network.named_parameters()),
        weights_of(worker),
        worker.probe(ids),
    )
    largest = {name: 0.0 for name, weight in before.items() if weight.any()}
    assert worker.num_perturbations() == (2 if precision == "bfloat16" else 1)
    for index in range(worker.num_perturbations()):
        worker.perturb(index)
        perturbed, expected = weights_of(worker), worker.probe(ids)
        accepted = perturbed_tolerance(distance(scores, expected), tolerance=tolerance)
        for name in largest:
            with torch.no_grad():
                parameters[name].copy_(before[name])
                ratio = distance(worker.probe(ids), expected) / accepted
                parameters[name].copy_(perturbed[name])
            largest[name] = max(largest[name], ratio)
        worker.perturb(index, undo=True)
        assert_same_bits(weights_of(worker), before)
        np.testing.assert_array_equal(worker.probe(ids), scores)
    for name, ratio in largest.items():
        is_bias = name.endswith("bias")
        if precision == "float32":
            assert ratio > (2 if is_bias else 50), name
        elif not is_bias:
            assert ratio > 2, name


@pytest.mark.parametrize("tied", [False, True])
def test_the_size_of_exported_weights_is_known_before(
    model_folder: Path, tied_folder: Path, tied: bool
) -> None:
    worker = make_worker(tied_folder if tied else model_folder)
    header = 8192
    with exported(worker) as file:
        assert 0 <= file.stat().st_size - worker.export_bytes() < header


def test_bfloat16_on_the_cpu_trains_float32_weights(model_folder: Path) -> None:
    """It is correct on every CPU, and refused before on those where it is slow."""
    worker, precise = make_worker(make_config(model_folder, dtype="bfloat16")), make_worker(model_folder)
    batch = random_batch(4)
    (before,), (expected,) = worker.log_probs([batch]), precise.log_probs([batch])
    assert 1e-3 < distance(before, expected) < 0.1  # rounded: matrix products are in bfloat16
    assert worker.update(one_rank(batch))["grad_norm"] > 0
    assert not np.array_equal(worker.log_probs([batch])[0], before)
    with exported(worker) as file:
        assert {tensor.dtype for tensor in load_file(file).values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in worker._parameters} == {torch.float32}


def test_a_frozen_worker_is_not_updated(model_folder: Path) -> None:
    with pytest.raises(RuntimeError, match="frozen"):
        make_worker(model_folder, trainable=False).update(one_rank(random_batch(2)))


async def test_a_model_with_a_sliding_window_computes_each_trajectory_by_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It attends as Transformers defines it, which is not what one sequence of all trajectories computes."""
    mistral = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    MistralForCausalLM(mistral).save_pretrained(tmp_path / "model")
    config = make_config(tmp_path / "model")
    assert not packs_rows(config.model)
    caplog.set_level("INFO", logger="verl.workers.worker_group")
    group = launch_group(LocalLauncher(), config)
    assert "model computes one trajectory per forward pass" in caplog.text
    batch = random_batch(4)
    expected = padded(tmp_path / "model", batch)[0].detach().numpy()
    np.testing.assert_allclose(await group.log_probs(batch), expected, atol=1e-5)
    trunk = row_ids(batch, 0)
    branch = Branch(ids=row_ids(batch, 1)[:6], start=8, scored=(0, 6))
    path = np.concatenate([trunk[:8], branch.ids])
    (found,) = await group.tree_log_probs([Tree(trunk=trunk, branches=(branch,))])
    np.testing.assert_allclose(found.branches[0], (await group.probe(path))[8:], atol=1e-5)
    alone = replace(batch, old_log_probs=None)
    assert (await group.update(alone))["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    group.shutdown()
