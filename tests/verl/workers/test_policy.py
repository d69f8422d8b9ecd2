from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.verl.workers.episodes import make_actor, make_config, make_worker, one_shard, random_batch
from verl.errors import ConfigError
from verl.workers.batch import TrainBatch
from verl.workers.losses import kl_estimates, policy_losses
from verl.workers.policy import PolicyWorker


def weights_of(worker: PolicyWorker) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in worker._network.named_parameters()}


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name


def naive_log_probs(folder: Path, batch: TrainBatch, *, temperature: float = 1.0) -> np.ndarray:
    """Row by row, without padding, full softmax; 0 where the policy did not act."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = np.zeros(batch.input_ids.shape, np.float32)
    for row, length in enumerate(batch.lengths):
        ids = torch.tensor(batch.input_ids[row : row + 1, :length]).long()
        with torch.no_grad():
            log_softmax = (model(ids).logits / temperature).log_softmax(-1)[0, :-1]
        result[row, 1:length] = log_softmax.gather(-1, ids[0, 1:, None])[:, 0].numpy()
    return result * batch.policy_mask


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_equal_a_naive_forward_for_any_micro_batches(
    model_folder: Path, temperature: float
) -> None:
    batch = random_batch(7)
    worker = make_worker(make_config(model_folder, temperature=temperature), trainable=False)
    expected = naive_log_probs(model_folder, batch, temperature=temperature)
    for max_tokens in (8192, 60, 1):
        np.testing.assert_allclose(
            worker.log_probs(one_shard(batch, max_tokens=max_tokens)), expected, atol=2e-5
        )


def test_probe_scores_every_token_at_temperature_one(model_folder: Path) -> None:
    batch = random_batch(1)
    whole = replace(batch, policy_mask=np.arange(batch.input_ids.shape[1])[None] > 0)
    scores = make_worker(model_folder, trainable=False).probe(batch.input_ids[0])
    np.testing.assert_allclose(scores, naive_log_probs(model_folder, whole)[0], atol=2e-5)


def test_chunked_logits_give_the_same_update(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, chunked = make_worker(model_folder), make_worker(model_folder)
    shard = one_shard(random_batch(4))
    plain.update(shard)
    monkeypatch.setattr("verl.workers.model._LOGITS_PER_CHUNK", 97 * 5)
    chunked.update(shard)
    for name, weight in weights_of(plain).items():
        torch.testing.assert_close(weights_of(chunked)[name], weight, atol=1e-5, rtol=1e-4)


def gradients(folder: Path, batch: TrainBatch, *, max_tokens: int = 8192) -> dict[str, torch.Tensor]:
    """What an update of one mini-batch would apply."""
    worker = make_worker(folder)
    shard = one_shard(batch, max_tokens=max_tokens)
    for mini in shard.mini_batches:
        for rows in mini.micro_batches:
            worker._loss(shard.batch.select(rows), mini)[0].backward()
    return {name: p.grad for name, p in worker._network.named_parameters() if p.grad is not None}


def test_cutting_and_order_of_a_mini_batch_do_not_change_its_gradient(model_folder: Path) -> None:
    batch = random_batch(9)
    expected = gradients(model_folder, batch)
    shuffled = batch.select(np.random.default_rng(0).permutation(9).astype(np.int32))
    for other in (gradients(model_folder, batch, max_tokens=70), gradients(model_folder, shuffled)):
        for name, gradient in expected.items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("loss_agg_mode", ["token-mean", "seq-mean-token-mean"])
def test_loss_and_metrics_equal_a_padded_reference_computation(
    model_folder: Path, loss_agg_mode: str
) -> None:
    actor = make_actor(loss_agg_mode=loss_agg_mode)
    batch = random_batch(5)
    metrics = make_worker(make_config(model_folder, actor=actor)).update(one_shard(batch, max_tokens=80))
    log_probs = torch.tensor(naive_log_probs(model_folder, batch))
    assert batch.old_log_probs is not None
    assert batch.ref_log_probs is not None
    losses, clipped = policy_losses(
        log_probs,
        torch.tensor(batch.old_log_probs),
        torch.tensor(batch.advantages),
        clip_low=0.2,
        clip_high=0.2,
    )
    sampling = torch.tensor(batch.sampling_log_probs)
    losses = losses * (torch.tensor(batch.old_log_probs) - sampling).exp().clamp(max=2.0)
    kl = kl_estimates(log_probs, torch.tensor(batch.ref_log_probs), kind="low_var_kl")
    mask = torch.tensor(batch.policy_mask).float()

    def mean(x: torch.Tensor) -> float:
        if loss_agg_mode == "token-mean":
            return float((x * mask).sum() / mask.sum())
        return float(((x * mask).sum(1) / mask.sum(1)).mean())

    assert metrics["pg_loss"] == pytest.approx(mean(losses), rel=1e-4)
    assert metrics["kl"] == pytest.approx(float((kl * mask).sum() / mask.sum()), rel=1e-4)
    assert metrics["clip_fraction"] == pytest.approx(float((clipped * mask).sum() / mask.sum()), abs=1e-6)
    if loss_agg_mode == "token-mean":
        total = metrics["pg_loss"] + 0.05 * metrics["kl"] - 0.01 * metrics["entropy"]
        assert metrics["loss"] == pytest.approx(total, rel=1e-5)
    difference = np.abs(batch.old_log_probs - batch.sampling_log_probs)[batch.policy_mask]
    assert metrics["log_prob_difference_mean"] == pytest.approx(difference.mean(), rel=1e-4)
    assert metrics["log_prob_difference_max"] == pytest.approx(difference.max(), rel=1e-4)


def test_values_at_masked_tokens_do_not_reach_the_gradient(model_folder: Path) -> None:
    batch = random_batch(6)
    expected = gradients(model_folder, batch)
    assert batch.old_log_probs is not None
    assert batch.ref_log_probs is not None
    masked = ~batch.policy_mask
    changed = replace(
        batch,
        advantages=np.where(masked, np.float32(9), batch.advantages),
        old_log_probs=np.where(masked, np.float32(-3), batch.old_log_probs),
        ref_log_probs=np.where(masked, np.float32(-7), batch.ref_log_probs),
        sampling_log_probs=np.where(masked, np.float32(-2), batch.sampling_log_probs),
    )
    assert_same_bits(gradients(model_folder, changed), expected)


def test_on_policy_update_has_ratio_one(model_folder: Path) -> None:
    metrics = make_worker(model_folder).update(one_shard(random_batch(4, with_old=False)))
    assert metrics["ratio_mean"] == pytest.approx(1.0, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert "kl" not in metrics
    with pytest.raises(ValueError, match="2 updates need old_log_probs"):
        make_worker(model_folder).update(one_shard(random_batch(4, with_old=False), mini_batch_size=2))


def test_zero_learning_rate_changes_no_bit(model_folder: Path) -> None:
    worker = make_worker(make_config(model_folder, actor=make_actor(lr=0.0)))
    before = weights_of(worker)
    metrics = worker.update(one_shard(random_batch(4), mini_batch_size=2))
    assert metrics["num_updates"] == 2
    assert metrics["grad_norm"] > 0
    assert_same_bits(weights_of(worker), before)


def test_a_non_finite_update_is_skipped_without_a_trace(model_folder: Path) -> None:
    worker = make_worker(model_folder)
    good = random_batch(4)
    bad = replace(good, advantages=np.where(good.policy_mask, np.float32(np.inf), good.advantages))
    worker.update(one_shard(good))
    weights = weights_of(worker)
    assert worker._optimizer is not None
    names = {p: name for name, p in worker._network.named_parameters()}

    def optimizer_bits() -> dict[str, torch.Tensor]:
        assert worker._optimizer is not None
        return {
            f"{names[p]}.{k}": v.clone() for p, s in worker._optimizer.state.items() for k, v in s.items()
        }

    optimizer = optimizer_bits()
    metrics = worker.update(one_shard(bad, mini_batch_size=2))
    assert metrics == {"lr": 1e-2, "num_updates": 2, "skipped_updates": 2}
    assert_same_bits(weights_of(worker), weights)
    assert_same_bits(optimizer_bits(), optimizer)
    metrics = worker.update(one_shard(good))
    assert metrics["skipped_updates"] == 0
    assert all(math.isfinite(value) for value in metrics.values())
    assert all(torch.isfinite(weight).all() for weight in weights_of(worker).values())


def test_a_loaded_worker_continues_exactly(model_folder: Path, tmp_path: Path) -> None:
    actor = make_actor(optim=replace(make_actor().optim, lr_warmup_steps_ratio=0.7))
    shards = [one_shard(random_batch(4, seed=seed), mini_batch_size=2) for seed in range(6)]
    unbroken, first = (make_worker(make_config(model_folder, actor=actor)) for _ in range(2))
    for shard in shards:
        expected = unbroken.update(shard)
    for shard in shards[:3]:
        first.update(shard)
    first.save(str(tmp_path))
    second = make_worker(make_config(model_folder, actor=actor))
    second.load(str(tmp_path))
    for shard in shards[3:]:
        metrics = second.update(shard)
    assert metrics == expected
    assert_same_bits(weights_of(second), weights_of(unbroken))


def test_load_refuses_another_number_of_workers(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"policy_rank_0_of_1\.pt"):
        make_worker(model_folder).load(str(tmp_path))


def test_gradient_checkpointing_changes_no_log_prob(model_folder: Path) -> None:
    worker = make_worker(make_config(model_folder, enable_gradient_checkpointing=True))
    batch = random_batch(3)
    metrics = worker.update(one_shard(batch))
    assert metrics["grad_norm"] == pytest.approx(
        make_worker(model_folder).update(one_shard(batch))["grad_norm"], rel=1e-5
    )


@pytest.mark.parametrize("tied", [False, True])
def test_a_perturbed_model_scores_visibly_differently_until_that_is_undone(
    model_folder: Path, tied_folder: Path, tied: bool
) -> None:
    worker = make_worker(tied_folder if tied else model_folder)
    ids = random_batch(1).input_ids[0]
    before, scores = weights_of(worker), worker.probe(ids)
    worker.perturb()
    assert np.abs(worker.probe(ids) - scores)[1:].mean() > 1.0
    worker.perturb(undo=True)
    assert_same_bits(weights_of(worker), before)
    np.testing.assert_array_equal(worker.probe(ids), scores)


@pytest.mark.parametrize("tied", [False, True])
def test_the_size_of_exported_weights_is_known_before(
    model_folder: Path, tied_folder: Path, tmp_path: Path, tied: bool
) -> None:
    worker = make_worker(tied_folder if tied else model_folder)
    worker.export_weights(str(tmp_path))
    header = 8192
    assert 0 <= (tmp_path / "model.safetensors").stat().st_size - worker.export_bytes() < header


def test_bfloat16_on_the_cpu_trains_float32_weights(model_folder: Path, tmp_path: Path) -> None:
    """It is correct on every CPU, and refused before on those where it is slow."""
    worker, precise = make_worker(make_config(model_folder, dtype="bfloat16")), make_worker(model_folder)
    shard = one_shard(random_batch(4))
    np.testing.assert_allclose(worker.log_probs(shard), precise.log_probs(shard), atol=0.1)
    before = worker.log_probs(shard)
    assert worker.update(shard)["grad_norm"] > 0
    assert not np.array_equal(worker.log_probs(shard), before)
    worker.export_weights(str(tmp_path))
    exported = load_file(tmp_path / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in worker._parameters} == {torch.float32}


def test_a_frozen_worker_is_not_updated(model_folder: Path) -> None:
    with pytest.raises(RuntimeError, match="frozen"):
        make_worker(model_folder, trainable=False).update(one_shard(random_batch(2)))
