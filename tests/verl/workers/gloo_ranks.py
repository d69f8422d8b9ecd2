"""Load, train, save and resume on 1, 2 and 4 gloo ranks, forks of this process (see `test_ranks.py`)."""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.fakes import tiny_model
from tests.verl.workers.episodes import make_actor, make_config, random_batch, row_ids
from verl.trainer.config.schema import ActorRolloutRefConfig, FsdpConfig, ModelConfig
from verl.workers import model_io, weight_ipc
from verl.workers.batch import make_mini_batches
from verl.workers.lora import adapted_layers, is_adapter, perturb_adapters
from verl.workers.model import PolicyNetwork
from verl.workers.model_io import (
    build_model,
    fill_model,
    sharding_units,
    state_of,
    weights_of,
)
from verl.workers.parallel import (
    Placement,
    Rendezvous,
    copy_part,
    gather_tensor,
    init_distributed,
    local_part,
    shard_model,
)
from verl.workers.policy import PolicyWorker
from verl.workers.rank_state import stage_state, write_state
from verl.workers.tensor_files import TensorFiles
from verl.workers.weight_file import FileSender

TWO_NODES = Placement(world_size=4, ranks_per_node=2)
MESHES = {None: (2, 2), 1: (4, 1), -1: (4,)}
"""Shape of the mesh on these, by `fsdp_size`."""


def on_ranks(world_size: int, function: Callable[..., object], *arguments: object) -> Any:
    """Run `function(placement, *arguments)` on every rank of one node; return the result of rank 0."""
    return on_all_ranks(Placement(world_size=world_size), function, *arguments)[0]


def on_all_ranks(placement: Placement, function: Callable[..., object], *arguments: object) -> list[Any]:
    """Run `function(placement, *arguments)` on every rank; return the results."""
    context = multiprocessing.get_context("fork")
    server = Rendezvous()
    placement = replace(placement, rendezvous=server.new_group(), num_threads=1)
    processes, ends = [], []
    for rank in range(placement.world_size):
        receiver, sender = context.Pipe(duplex=False)
        arguments_of_rank = (sender, function, replace(placement, rank=rank), *arguments)
        processes.append(context.Process(target=_run, args=arguments_of_rank))
        processes[-1].start()
        sender.close()
        ends.append(receiver)
    results = [end.recv() for end in ends]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    return results


def _run(sender: Connection, function: Callable[..., object], *arguments: object) -> None:
    try:
        sender.send(function(*arguments))
    except BaseException:
        traceback.print_exc()
        raise SystemExit(1) from None


def make_worker(folder: Path, placement: Placement, *, lora_rank: int = 0) -> PolicyWorker:
    config = make_config(folder, lora_rank=lora_rank)
    return PolicyWorker(config, placement, total_steps=10, seed=0, trainable=True)


def read_loaded(placement: Placement, folder: Path) -> tuple[dict[str, np.ndarray], bool]:
    """The whole weights and buffers of a model that was loaded by slices; is its head tied?"""
    worker = make_worker(folder, placement)
    model = worker._model
    state = {name: gather_tensor(tensor).numpy() for name, tensor in weights_of(model).items()}
    state |= {name: buffer.numpy() for name, buffer in model.named_buffers()}
    return state, model.get_input_embeddings().weight is model.get_output_embeddings().weight


def compare_with_transformers(folder: Path) -> None:
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tensors = dict(expected.named_parameters()) | dict(expected.named_buffers())
    for world_size in (1, 2):
        state, is_tied = on_ranks(world_size, read_loaded, folder)
        assert state.keys() == tensors.keys(), state.keys() ^ tensors.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(state[name], tensor.detach().numpy(), err_msg=name)
        assert is_tied == expected.config.tie_word_embeddings


def read_state(worker: PolicyWorker) -> dict[str, np.ndarray]:
    """Weights and optimizer state, whole, and the random state of this rank."""
    assert worker._optimizer is not None
    state = {f"weights.{name}": tensor for name, tensor in state_of(worker._model).items()}
    for name, parameter in worker._model.named_parameters():
        for key, value in worker._optimizer.state[parameter].items():
            state[f"{key}.{name}"] = value
    return {name: gather_tensor(tensor.detach()).numpy().copy() for name, tensor in state.items()} | {
        "step": np.array(worker._step),
        "random": torch.get_rng_state().numpy(),
    }


def go_on(
    placement: Placement, folder: Path, lora_rank: int, source: Path | None, target: Path | None
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Load or train, save, and train one step more; return the state that was saved and the last metrics."""
    worker = make_worker(folder, placement, lora_rank=lora_rank)

    def train(seed: int) -> dict[str, float]:
        batch = random_batch(8, seed=seed)
        minis = make_mini_batches(batch, num_ranks=placement.world_size, mini_batch_size=8, max_tokens=100)
        return worker.update(minis[placement.rank])

    if source is None:
        train(0)
        torch.rand(3 + placement.rank)
    else:
        worker.load(str(source))
    if target is not None:
        worker.stage("x")
        asyncio.run(worker.write("x", str(target)))
    return read_state(worker), train(1)


def assert_equal_states(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name in one.keys() - {"random"}:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)


def assert_close_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    """All but the share of tokens that is computed: other ranks have other passes."""
    assert 0 < found["computed_share"] <= 1
    for name, value in expected.items():
        if name != "computed_share":
            np.testing.assert_allclose(found[name], value, rtol=2e-3, atol=1e-4, err_msg=name)


def resume_on_other_ranks(folder: Path, *, out: Path, lora_rank: int = 0) -> None:
    """From 2 ranks to 1, 2 and 4, and from 4 back to 2 and 1."""
    state, metrics = on_ranks(2, go_on, folder, lora_rank, None, out / "two")
    again, metrics_again = on_ranks(2, go_on, folder, lora_rank, out / "two", None)
    assert_equal_states(again, state)
    np.testing.assert_array_equal(again["random"], state["random"])
    assert metrics_again == metrics, "as many ranks go on exactly"
    for source, world_size in (("two", 4), ("two", 1), ("4", 2), ("4", 1)):
        target = out / str(world_size)
        found, others = on_ranks(world_size, go_on, folder, lora_rank, out / source, target)
        assert_equal_states(found, state)
        assert_close_metrics(others, metrics)


def adapt(placement: Placement, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The whole gradients of adapters, and what an engine gets: merged weights, or perturbed adapters."""
    worker = make_worker(folder, placement, lora_rank=2)
    for layer in adapted_layers(worker._model).values():
        copy_part(torch.linspace(-0.2, 0.3, layer.lora_B.numel()).view(layer.lora_B.shape), layer.lora_B)
    batch = random_batch(8)
    minis = make_mini_batches(batch, num_ranks=placement.world_size, mini_batch_size=8, max_tokens=100)
    for mini in minis[placement.rank]:
        for micro in mini.micro_batches:
            worker._loss(micro, mini)[0].backward()
    named = worker._model.named_parameters()
    gradients = {name: gather_tensor(p.grad).numpy() for name, p in named if p.grad is not None}
    sent: dict[str, np.ndarray] = {}
    alone = FileSender.of_adapters(worker._model, config=worker._config, context=worker._context)
    for sender in (worker._file, alone):
        if (folder := sender.export()) is not None:
            (file,) = Path(folder).glob("*.safetensors")
            sent |= {name: tensor.numpy().copy() for name, tensor in load_file(file).items()}
        sender.drop()
        perturb_adapters(worker._model, undo=sender is alone)
    return gradients, sent


def adapt_on_ranks(folder: Path) -> None:
    """Four ranks share the two rows of A, so that some have none."""
    (expected, sent), *others = (on_ranks(world_size, adapt, folder) for world_size in (1, 2, 4))
    assert all(is_adapter(name) for name in expected)
    for gradients, same in others:
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6, err_msg=name)
        assert_equal_states(same, sent)


def perturb(placement: Placement, folder: Path) -> list[dict[str, np.ndarray]]:
    """What an engine gets of matrices after each perturbation in bfloat16, one layer at a time."""
    model_io._PERTURBED_LAYERS = 1
    config = make_config(folder, dtype="bfloat16")
    worker = PolicyWorker(config, placement, total_steps=10, seed=0, trainable=True)
    results = []
    for index in range(worker.num_perturbations()):
        worker.perturb(index)
        weights = weights_of(worker._model).items()
        whole = {name: gather_tensor(tensor).numpy().copy() for name, tensor in weights}
        results.append({name: weight for name, weight in whole.items() if weight.ndim > 1})
        worker.perturb(index, undo=True)
    return results


def perturb_on_ranks(folder: Path) -> None:
    """Sharded layers are perturbed and silenced as whole ones are."""
    expected, found = (on_ranks(world_size, perturb, folder) for world_size in (1, 2))
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found, strict=True):
        assert_equal_states(one, other)


def save_on_two_nodes(placement: Placement, folder: Path, target: Path) -> None:
    """Write the weights of a model of which two groups of two ranks hold a copy each."""
    context = init_distributed(placement)
    model = build_model(ModelConfig(path=str(folder)), device="cpu", trainable=True)
    network = PolicyNetwork(model)
    shard_model(network, context=context, units=sharding_units(model), dtype=torch.float32)
    fill_model(network, model, folder=folder, device=context.device)
    staged = stage_state(model, optimizer=None, step=0, source=folder, context=context)
    write_state(target, staged, context=context)


def save_copies_once(folder: Path, *, out: Path) -> None:
    on_all_ranks(TWO_NODES, save_on_two_nodes, folder, out)
    files = [out / f"rank_{rank}_of_4.safetensors" for rank in range(4)]
    held = [TensorFiles([file]).layout for file in files]
    assert held[0].keys() == held[1].keys()
    assert not held[2]
    assert not held[3]
    saved, source = TensorFiles(files), TensorFiles.of_model(folder)
    for name in source.layout:
        assert torch.equal(saved.read(f"weights.{name}"), source.read(name)), name


def train_with_all(placement: Placement, folder: Path) -> list[dict[str, Any]]:
    """Train with every `fsdp_size`. The models of a process share its process group."""
    return [train_with(placement, folder, size) for size in MESHES]


def train_with(placement: Placement, folder: Path, fsdp_size: int | None) -> dict[str, Any]:
    """Take two steps, with trajectories that need no backward pass, and export the weights."""
    actor = make_actor(fsdp_config=FsdpConfig(fsdp_size=fsdp_size), use_kl_loss=False, entropy_coeff=0.0)
    worker = PolicyWorker(make_config(folder, actor=actor), placement, total_steps=10, seed=0, trainable=True)
    batch = random_batch(9)
    is_credited = np.repeat(batch.prompts == 1, batch.policy_lengths)
    batch = replace(batch, advantages=batch.advantages * is_credited)
    minis = make_mini_batches(
        batch, num_ranks=placement.world_size, mini_batch_size=4, max_tokens=10, only_advantages=True
    )
    assert all(mini.uncredited for mini in minis[placement.rank])
    metrics = [worker.update(minis[placement.rank]) for _ in range(2)]
    exported = worker.export_weights()
    worker.drop_weights()
    mesh, parameter = worker._context.mesh, worker._parameters[0]
    return {
        "metrics": metrics,
        "probe": worker.probe(row_ids(batch, 0)),
        "mesh": None if mesh is None else tuple(mesh.shape),
        "share": local_part(parameter).numel() / parameter.numel(),
        "exported": exported is not None,
    }


def train_on_two_nodes(folder: Path) -> None:
    """As on one rank: gradients are summed over shards and copies, their norm counts every weight once."""
    (one,) = on_all_ranks(Placement(), train_with, folder, None)
    for number, of_rank in enumerate(on_all_ranks(TWO_NODES, train_with_all, folder)):
        for got, mesh in zip(of_rank, MESHES.values(), strict=True):
            np.testing.assert_allclose(got["probe"], one["probe"], atol=2e-4)
            for metrics, expected in zip(got["metrics"], one["metrics"], strict=True):
                assert_close_metrics(metrics, expected)
            assert got["mesh"] == mesh
            assert abs(got["share"] - 1 / mesh[-1]) < 0.05
            assert got["exported"] == (number in (0, 2)), "the first rank of each node writes"


def train_offloaded(placement: Placement, config: ActorRolloutRefConfig) -> list[Any]:
    """Metrics, chunks for an engine and the state of this rank, of two steps with a release between."""
    weight_ipc.BUFFER_BYTES = 5000
    worker = PolicyWorker(config, placement, total_steps=10, seed=0, trainable=True)
    batch, ids = random_batch(8), np.arange(2, 30, dtype=np.int32)
    minis = make_mini_batches(batch, num_ranks=placement.world_size, mini_batch_size=4, max_tokens=100)
    results: list[Any] = []
    for step in range(2):
        results.append(worker.update(minis[placement.rank]))
        chunks, handles = worker.send("ipc", "share")
        (mapping,) = handles.values()
        for index, chunk in enumerate(chunks):
            worker.send("ipc", "fill", index)
            buffer = torch.from_file(*mapping, dtype=torch.uint8)
            results.append({name: view.tolist() for name, view in chunk.views(buffer)})
        worker.send("ipc", "unshare")
        assert not Path(mapping[0]).exists()
        worker.release()
        worker.stage(str(step))
        results.append({name: part.tolist() for name, part in worker._staged[str(step)].parts.items()})
        results.append(worker.probe(ids).tolist())
    return results


def compare_offloaded(folder: Path) -> None:
    """A step on two ranks with offload and without."""
    plain = make_config(folder)
    offload = FsdpConfig(param_offload=True, optimizer_offload=True)
    offloading = replace(plain, actor=replace(plain.actor, fsdp_config=offload))
    of_plain, of_offloading = (on_ranks(2, train_offloaded, config) for config in (plain, offloading))
    assert of_plain == of_offloading, "offload changes a step"
    assert len(of_plain) > 2 * 5


def make_llama(folder: Path) -> Path:
    """A random Llama with the frequencies of Llama 3.1, and layers that do not divide evenly by the ranks."""
    config = LlamaConfig(
        vocab_size=97, hidden_size=24, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, eos_token_id=1, pad_token_id=0,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)  # with other weights rounding errors may exceed what the tests allow
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return folder


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir()
    tied = tiny_model(out / "tied", tied=True)
    llama = make_llama(out / "llama")
    for folder in (tied, tiny_model(out / "qwen2"), llama):
        compare_with_transformers(folder)
    for folder in (tied, llama):
        resume_on_other_ranks(folder, out=out / f"{folder.name}-states")
        compare_offloaded(folder)
    adapt_on_ranks(llama)
    perturb_on_ranks(llama)
    resume_on_other_ranks(llama, out=out / "adapters", lora_rank=2)
    save_copies_once(llama, out=out / "copies")
    train_on_two_nodes(tied)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
