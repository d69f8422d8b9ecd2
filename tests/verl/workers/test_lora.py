"""Adapters: what they compute, what of them is trained, saved, exported and resumed."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

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
from verl.branches import Tree
from verl.errors import ConfigError
from verl.utils.actors import LocalLauncher
from verl.workers.lora import adapted_layers, is_adapter
from verl.workers.model_io import state_of, weights_of
from verl.workers.policy import PolicyWorker
from verl.workers.scorer import InitialPolicy, PolicyCopy
from verl.workers.tensor_files import TensorFiles
from verl.workers.weight_file import FileSender

BATCH = random_batch(6)
ALPHA = 32.0


def adapted(folder: Path, **model: object) -> PolicyWorker:
    settings = {"lora_rank": 4, "lora_alpha": ALPHA} | model
    return make_worker(make_config(folder, actor=make_actor(lr=5e-2), **settings))


def train(worker: PolicyWorker, *, seed: int = 0) -> dict[str, float]:
    return worker.update(one_rank(random_batch(6, seed=seed)))


@pytest.fixture
def trained(tied_folder: Path) -> PolicyWorker:
    worker = adapted(tied_folder)
    for seed in (0, 1):
        assert train(worker, seed=seed)["skipped_updates"] == 0
    return worker


def scores_of(folder: Path) -> np.ndarray:
    """Log-probs of a plain model."""
    return make_worker(folder, trainable=False).log_probs([BATCH])[0]


def test_it_begins_as_the_model_and_trains_nothing_but_adapters(tied_folder: Path) -> None:
    worker, expected = adapted(tied_folder), scores_of(tied_folder)
    before = {name: weight.clone() for name, weight in weights_of(worker._model).items()}
    np.testing.assert_array_equal(worker.log_probs([BATCH])[0], expected)
    assert worker.num_parameters() == make_worker(tied_folder, trainable=False).num_parameters()
    for mini in one_rank(BATCH):
        for micro in mini.micro_batches:
            worker._loss(micro, mini)[0].backward()
    gradients = {name for name, p in worker._model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, _ in worker._model.named_parameters() if is_adapter(name)}
    assert len(gradients) == 2 * 2 * 7  # A and B, layers, linear ones of each
    train(worker)
    assert worker._optimizer is not None
    assert {id(p) for p in worker._optimizer.state} == {id(p) for p in worker._parameters}
    assert np.abs(worker.log_probs([BATCH])[0] - expected).mean() > 0.01
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(worker._model).items())


def test_without_its_adapters_a_trained_policy_is_the_initial_model(
    trained: PolicyWorker, tied_folder: Path
) -> None:
    """The reference of the KL term, in the same pass as any other."""
    np.testing.assert_array_equal(trained.log_probs([BATCH], adapters=False)[0], scores_of(tied_folder))
    assert np.abs(trained.log_probs([BATCH])[0] - scores_of(tied_folder)).mean() > 0.01


def test_what_the_engine_and_a_checkpoint_get_computes_as_the_adapters_do(
    trained: PolicyWorker, tied_folder: Path, tmp_path: Path
) -> None:
    expected = trained.log_probs([BATCH])[0]
    engine = tmp_path / "engine"
    shutil.copytree(tied_folder, engine)
    with exported(trained) as path:
        shutil.copyfile(path, engine / path.name)
    assert sum(t.nbytes for t in load_file(engine / "model.safetensors").values()) == trained.export_bytes()
    save(trained, str(tmp_path / "policy"))
    written = asyncio.run(trained.export_hf(str(tmp_path / "policy"), str(tmp_path / "huggingface")))
    assert {path.relative_to(tmp_path).as_posix() for path in written} == {
        "huggingface/model.safetensors",
        "adapter/adapter_model.safetensors",
    }
    for folder in (engine, tmp_path / "huggingface"):
        np.testing.assert_allclose(scores_of(folder), expected, atol=1e-5)
    saved = TensorFiles([tmp_path / "policy/rank_0_of_1.safetensors"]).layout
    assert {name for name in saved if name.startswith("weights.")} == {
        f"weights.{name}" for name in state_of(trained._model)
    }, "the weights below the adapters are not stored again"


def test_the_adapter_folder_has_what_peft_and_vllm_read(trained: PolicyWorker, tmp_path: Path) -> None:
    save(trained, str(tmp_path / "policy"))
    asyncio.run(trained.export_hf(str(tmp_path / "policy"), str(tmp_path / "huggingface")))
    settings = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"], settings["bias"]) == (4, ALPHA, "none")
    assert {"q_proj", "down_proj"} < set(settings["target_modules"])
    assert len(settings["target_modules"]) == 7
    tensors = load_file(tmp_path / "adapter/adapter_model.safetensors")
    for name, layer in adapted_layers(trained._model).items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        assert torch.equal(tensors.pop(f"{prefix}.lora_A.weight"), layer.lora_A)
        assert torch.equal(tensors.pop(f"{prefix}.lora_B.weight"), layer.lora_B)
    assert not tensors
    sender = FileSender.of_adapters(trained._model, config=trained._config, context=trained._context)
    published = Path(str(sender.export()))
    assert json.loads((published / "adapter_config.json").read_text()) == settings
    sent, saved = (
        load_file(folder / "adapter_model.safetensors") for folder in (published, tmp_path / "adapter")
    )
    assert sent.keys() == saved.keys()
    assert all(torch.equal(sent[name], saved[name]) for name in saved)
    assert sender.num_bytes() == sum(tensor.nbytes for tensor in layers_of(trained))
    sender.drop()


def layers_of(worker: PolicyWorker) -> list[torch.Tensor]:
    return [
        matrix for layer in adapted_layers(worker._model).values() for matrix in (layer.lora_A, layer.lora_B)
    ]


def test_a_resumed_policy_goes_on_exactly(trained: PolicyWorker, tied_folder: Path, tmp_path: Path) -> None:
    save(trained, str(tmp_path))
    resumed = adapted(tied_folder)
    resumed.load(str(tmp_path))
    assert train(resumed, seed=2) == train(trained, seed=2)
    np.testing.assert_array_equal(resumed.log_probs([BATCH])[0], trained.log_probs([BATCH])[0])


def _changed(tmp_path: Path, folder: Path) -> Path:
    """The same model with other weights."""
    shutil.copytree(folder, tmp_path / "changed")
    path = tmp_path / "changed/model.safetensors"
    save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path, metadata={"format": "pt"})
    return tmp_path / "changed"


def test_a_state_belongs_to_its_base_rank_and_targets(
    trained: PolicyWorker, tied_folder: Path, tmp_path: Path
) -> None:
    save(trained, str(tmp_path / "state"))
    other = _changed(tmp_path, tied_folder)
    for worker, message in (
        (adapted(other), r"adapters for other weights than those of actor_rollout_ref\.model\.path="),
        (adapted(tied_folder, lora_rank=2), "another lora_rank or other target_modules"),
        (adapted(tied_folder, target_modules=["q_proj"]), "another lora_rank or other target_modules"),
        (adapted(tied_folder, lora_rank=0), "another lora_rank or other target_modules"),
    ):
        with pytest.raises(ConfigError, match=message):
            worker.load(str(tmp_path / "state"))


def test_only_named_layers_are_adapted_and_unknown_names_refused(tied_folder: Path, tmp_path: Path) -> None:
    worker = adapted(tied_folder, target_modules=["q_proj", "v_proj"])
    assert {name.split(".")[-2] for name in adapted_layers(worker._model)} == {"q_proj", "v_proj"}
    with pytest.raises(ConfigError, match=r"target_modules=\['w_1'\]: no linear layer .* has down_proj"):
        adapted(tied_folder, target_modules=["w_1"])
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=8, n_layer=1, n_head=1, n_positions=64))
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"lora_rank=4: .* has no linear layers"):
        adapted(tmp_path)


@pytest.mark.parametrize("transfer", ["merged", "adapter"])
def test_perturbing_changes_what_is_sent_and_is_undone_exactly(transfer: str, tied_folder: Path) -> None:
    worker = adapted(tied_folder, lora_transfer=transfer)
    train(worker)
    ids = BATCH.token_ids[:20]
    before, matrices = worker.probe(ids), [matrix.clone() for matrix in layers_of(worker)]
    worker.perturb(0)
    assert np.abs(worker.probe(ids) - before).mean() > 0.1
    changed = [not torch.equal(*pair) for pair in zip(layers_of(worker), matrices, strict=True)]
    assert changed == [False, transfer == "adapter"] * (len(changed) // 2)
    worker.perturb(0, undo=True)
    np.testing.assert_array_equal(worker.probe(ids), before)


def test_perturbing_changes_every_merged_weight_and_is_undone_exactly(trained: PolicyWorker) -> None:
    ids = BATCH.token_ids[:20]

    def publish() -> dict[str, Tensor]:
        with exported(trained) as file:
            return load_file(file)

    scores, weights = trained.probe(ids), publish()
    trained.perturb(0)
    assert np.abs(trained.probe(ids) - scores).mean() > 0.1
    changed = publish()
    assert [
        name for name in weights if torch.equal(changed[name], weights[name]) and weights[name].any()
    ] == []
    trained.perturb(0, undo=True)
    np.testing.assert_array_equal(trained.probe(ids), scores)
    for name, weight in publish().items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture
def launcher() -> Iterator[LocalLauncher]:
    launcher = LocalLauncher()
    yield launcher
    launcher.shutdown()


async def test_reference_and_refreshed_copy_of_a_group(
    launcher: LocalLauncher, tied_folder: Path, tmp_path: Path
) -> None:
    config = make_config(tied_folder, actor=make_actor(lr=5e-2), lora_rank=4)
    policy = launch_group(launcher, config)
    model = launch_group(launcher, config, name="copy", trainable=False)
    copy = PolicyCopy(policy, model, every=1, scratch=tmp_path)
    ids = row_ids(BATCH, 0)
    tree = Tree(trunk=ids, branches=(), trunk_scored=np.arange(len(ids)) > 0)
    (before,) = await policy.tree_log_probs([tree])
    await policy.update(BATCH)
    (initial,), (later,) = [await m.tree_log_probs([tree]) for m in (InitialPolicy(policy), policy)]
    np.testing.assert_array_equal(initial.trunk, before.trunk)
    assert not np.array_equal(later.trunk, before.trunk)
    initial_log_probs = await InitialPolicy(policy).log_probs(BATCH)
    np.testing.assert_allclose(initial_log_probs, scores_of(tied_folder), atol=1e-5)  # in another order
    trained = await policy.log_probs(BATCH)
    assert np.abs(await model.log_probs(BATCH) - trained).mean() > 0.001
    await copy.refresh(1)
    np.testing.assert_array_equal(await model.log_probs(BATCH), trained)
