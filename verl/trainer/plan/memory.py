"""Memory of every GPU in every phase of a step, item by item.

Items of one phase are added although some of them do not meet: the allocators of torch keep blocks of other
sizes, so that the sum is nearer to what a GPU must have than the largest moment is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from verl.trainer.plan.assumptions import (
    ASLEEP_BYTES,
    BROADCAST_BYTES,
    CHUNK_BYTES,
    CONTEXT_BYTES,
    ENTAILMENT_BYTES,
    FORWARD_HIDDENS,
    FORWARD_INTERMEDIATES,
    LAYER_HIDDENS,
    LAYER_INTERMEDIATES,
    LOGITS_COPIES,
    LOGITS_PER_CHUNK,
    RETRIEVER_BYTES,
    SAVED_PER_TOKEN,
)
from verl.trainer.plan.setup import Setup
from verl.trainer.plan.shape import ModelShape

FLOAT32 = 4
ADAM_BYTES = 8
"""Per trained parameter: the two moments in float32."""


class Phase(StrEnum):
    """The phases of a step; before the first one the models are loaded."""

    LOAD = "load"
    ROLLOUT = "rollout"
    REWARD = "reward"
    LOG_PROBS = "log_probs"
    UPDATE = "update"
    PUBLISH = "publish"


ALL = tuple(Phase)
STEP = ALL[1:]
_ENGINE_AWAKE = (Phase.LOAD, Phase.ROLLOUT)
_TRAINING = (Phase.REWARD, Phase.LOG_PROBS, Phase.UPDATE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """What one thing takes of a GPU."""

    name: str
    amounts: Mapping[Phase, float]
    """Bytes in each phase in which it is there."""
    gpus: range
    """Indices within a node."""


def list_items(setup: Setup) -> list[Item]:
    """Return everything that is on the GPUs of the driver's node, without what takes nothing."""
    pools = (
        ({**_states(setup), **_activations(setup)}, setup.policy_gpus),
        (_engine(setup), setup.pool_gpus),
    )
    items = [
        Item(name=name, amounts=amounts, gpus=gpus)
        for of_pool, gpus in pools
        for name, amounts in of_pool.items()
    ]
    services = list(_services(setup))
    items += services
    for index, used in enumerate(setup.other_bytes):
        planned = sum(item.amounts[Phase.ROLLOUT] for item in services if index in item.gpus)
        amounts = dict.fromkeys(ALL, used - planned)
        if used > planned and index < setup.num_gpus:
            items.append(Item(name="other programs", amounts=amounts, gpus=range(index, index + 1)))
    return [item for item in items if item.gpus and any(item.amounts.values())]


def total(items: Iterable[Item], phase: Phase, *, gpu: int) -> float:
    """Return the bytes of all items on a GPU in a phase."""
    return sum(item.amounts.get(phase, 0.0) for item in items if gpu in item.gpus)


def policy_bytes(setup: Setup) -> float:
    """Return the bytes of the policy's weights over all ranks, with those of adapters."""
    whole, trained = setup.shape.parameters, setup.trained_parameters
    # Adapters are trained in float32; the weights below them are then frozen, in compute precision.
    return whole * setup.number_bytes + trained * FLOAT32 if setup.lora_rank else whole * FLOAT32


def _states(setup: Setup) -> dict[str, dict[Phase, float]]:
    """Return weights, optimizer state and gradient of one rank, and the frozen models beside it."""
    whole, trained = setup.shape.parameters, setup.trained_parameters
    shards, offload = setup.num_shards, setup.offload
    frozen = setup.frozen.count * whole * setup.number_bytes / shards
    phases = STEP if setup.trains else (Phase.ROLLOUT, Phase.PUBLISH)
    scoring = [Phase.LOG_PROBS, *([Phase.REWARD] if setup.scores_log_probs else [])]
    uses = (*scoring, Phase.UPDATE, Phase.PUBLISH) if offload.policy else phases
    contexts = (1 + setup.frozen.count) * CONTEXT_BYTES
    kind = "weights, adapters" if setup.lora_rank else "float32 weights"
    states = {
        f"policy: {kind}": dict.fromkeys(uses, policy_bytes(setup) / shards),
        "reference": dict.fromkeys((Phase.REWARD, Phase.LOG_PROBS) if offload.reference else phases, frozen),
        "CUDA contexts": dict.fromkeys(phases, contexts),
    }
    if setup.trains:
        moments = (Phase.UPDATE,) if offload.optimizer else phases
        states["optimizer: Adam"] = dict.fromkeys(moments, trained * ADAM_BYTES / shards)
        states["gradient"] = {Phase.UPDATE: trained * FLOAT32 / shards}
    return states


def _activations(setup: Setup) -> dict[str, dict[Phase, float]]:
    """Return what forward and backward passes of one rank add."""
    shape, tokens, size = setup.shape, setup.micro_tokens, setup.number_bytes

    def layer(intermediates: float, hiddens: float) -> float:
        return tokens * size * (intermediates * shape.intermediate + hiddens * shape.hidden)

    backward = layer(LAYER_INTERMEDIATES, LAYER_HIDDENS)
    forward = layer(FORWARD_INTERMEDIATES, FORWARD_HIDDENS)
    whole = layer(LAYER_INTERMEDIATES - 2, LAYER_HIDDENS - 2)  # without the gradients in flight
    share = setup.recomputed_share
    saved = shape.layers * (share * layer(0, SAVED_PER_TOKEN) + (1 - share) * whole)
    chunk = min(LOGITS_PER_CHUNK, tokens * shape.vocab) * FLOAT32 * LOGITS_COPIES
    publish = {Phase.PUBLISH: _sent(setup)}
    if not setup.trains:
        return {"gathered weights": publish}
    scoring = [Phase.LOG_PROBS, *([Phase.REWARD] if setup.scores_log_probs else [])]
    gathered = size * (shape.root_parameters + max(2 * shape.layer_parameters, _embedding_unit(shape)))
    return {
        "activations of all layers": {Phase.UPDATE: saved},
        "activations of a layer": {Phase.UPDATE: backward, **dict.fromkeys(scoring, forward)},
        "logits of a chunk": dict.fromkeys((Phase.UPDATE, *scoring), chunk),
        "gathered weights": {
            Phase.UPDATE: _fsdp_buffers(setup),
            **dict.fromkeys(scoring, gathered),
            **publish,
        },
    }


def _sent(setup: Setup) -> float:
    """Return what sending the weights adds to a rank: the largest one, gathered, and chunks.

    By IPC one in the buffer and one in the engine; by NCCL, of the first rank, one that is packed and two
    under way.
    """
    largest = float(setup.shape.embedding_parameters * setup.number_bytes)
    if setup.slot_rank is not None:
        return setup.lora_rank * setup.shape.intermediate * float(FLOAT32)
    if setup.transfer == "file":
        return largest
    if setup.transfer == "nccl":
        return largest + 3 * _broadcast_chunk(setup)
    return largest + 2 * min(max(CHUNK_BYTES, largest), setup.shape.parameters * setup.number_bytes)


def _broadcast_chunk(setup: Setup) -> float:
    """Return the most bytes of a broadcast, which ends with the weight that exceeds its size."""
    shape = setup.shape
    largest = BROADCAST_BYTES + shape.embedding_parameters * setup.number_bytes
    return min(largest, float(shape.parameters * setup.number_bytes))


def _fsdp_buffers(setup: Setup) -> float:
    """Return what FSDP2 gathers and reduces in an update (torch 2.13, `_fsdp_param_group.py`).

    The root unit is gathered from the forward pass on, and of the layers the present one and the next; after
    the layers an embedding of its own. A gradient is in compute precision, then the input of a reduction in
    float32, then a shard of it; one rank alone divides a copy.
    """
    shape, size, shards = setup.shape, setup.number_bytes, setup.num_shards
    reduced = size + FLOAT32 + FLOAT32 / shards + (FLOAT32 if shards == 1 else 0)
    if setup.lora_rank:  # frozen weights have no gradient
        reduced = 0.0
    layers = shape.layer_parameters * (2 * size + reduced)
    embedding = _embedding_unit(shape) * (size + reduced)
    return shape.root_parameters * (size + reduced) + max(layers, embedding)


def _embedding_unit(shape: ModelShape) -> int:
    """Return the parameters of the FSDP unit of the input embedding; a tied one is in the root unit."""
    return 0 if shape.is_tied else shape.embedding_parameters


def _engine(setup: Setup) -> dict[str, dict[Phase, float]]:
    """Return the share of an engine, which has the weights, and a cache of all that is left of the share.

    While it takes over weights its cache is still asleep.
    """
    share = setup.gpu.memory * setup.engine_share
    awake = _ENGINE_AWAKE if setup.frees_engine else ALL
    asleep = (*_TRAINING, Phase.PUBLISH) if setup.frees_engine else ()
    weights = setup.engine_weight_bytes
    return {
        "engine: weights": dict.fromkeys({*awake, Phase.PUBLISH}, weights),
        "engine: cache, graphs": dict.fromkeys(awake, max(0.0, share - weights)),
        "engine, asleep": dict.fromkeys(asleep, ASLEEP_BYTES),
        "engine: received weights": {
            Phase.PUBLISH: 2 * _broadcast_chunk(setup) if setup.transfer == "nccl" else 0.0
        },
    }


def _services(setup: Setup) -> Iterable[Item]:
    """Yield the services on the GPUs of the driver's node, which stay there in every phase."""
    if setup.uses_ig_service:
        size = setup.gpu.memory * setup.ig_share + ENTAILMENT_BYTES
        yield Item(name="IG service", amounts=dict.fromkeys(ALL, size), gpus=range(setup.ig_gpus))
    if setup.retriever_gpus:
        size = setup.index_bytes / setup.retriever_gpus + RETRIEVER_BYTES
        yield Item(name="retriever", amounts=dict.fromkeys(ALL, size), gpus=range(setup.retriever_gpus))
