"""Which GPUs of a node the policy has and which the engines, and how weights get from one to the other."""

from __future__ import annotations

from verl.trainer.config.schema import ADAPTER, ActorRolloutRefConfig, Config, ModelConfig, RolloutConfig

SLOT_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks for which vLLM can have room (`MaxLoRARanks`)."""


def has_own_gpus(rollout: RolloutConfig) -> bool:
    """Return whether engines have GPUs of their own, instead of sharing those of the policy."""
    return rollout.n_gpus_per_node > 0


def policy_gpus(config: Config) -> range:
    """Return the indices within a node of the GPUs of policy and reference."""
    return range(config.trainer.n_gpus_per_node - config.actor_rollout_ref.rollout.n_gpus_per_node)


def engine_gpus(config: Config) -> range:
    """Return the indices within a node of the GPUs of engines: the last ones, or all that the policy has."""
    if has_own_gpus(config.actor_rollout_ref.rollout):
        return range(policy_gpus(config).stop, config.trainer.n_gpus_per_node)
    return policy_gpus(config)


def slot_rank(model: ModelConfig) -> int | None:
    """Return the rank for which engines have room, None where they get all weights.

    Weights below adapters stay as they are from the start of the engine on; where it sleeps it keeps them in
    host memory.
    """
    if model.lora_transfer != ADAPTER:
        return None
    return min(rank for rank in SLOT_RANKS if rank >= model.lora_rank)


def transfer_kind(settings: ActorRolloutRefConfig, *, device: str) -> str:
    """Return `file`, `ipc` or `nccl`: `rollout.weight_transfer`, where auto depends on where engines are.

    Adapters are small, and vLLM reads them from files.
    """
    rollout = settings.rollout
    if rollout.weight_transfer != "auto":
        return rollout.weight_transfer
    if device == "cpu" or settings.model.lora_transfer == ADAPTER:
        return "file"
    return "nccl" if has_own_gpus(rollout) else "ipc"


def check_adapters(settings: ActorRolloutRefConfig) -> list[str]:
    """Return what is wrong with sending adapters alone."""
    model, way = settings.model, settings.rollout.weight_transfer
    if model.lora_transfer != ADAPTER:
        return []
    key, problems = f"actor_rollout_ref.model.lora_transfer={model.lora_transfer}", []
    if not 0 < model.lora_rank <= SLOT_RANKS[-1]:
        problems.append(
            f"{key} needs actor_rollout_ref.model.lora_rank from 1 to {SLOT_RANKS[-1]}, for which vLLM has "
            f"room, got {model.lora_rank}; set it, or leave lora_transfer out"
        )
    if way not in ("auto", "file"):
        problems.append(
            f"{key} sends files, so actor_rollout_ref.rollout.weight_transfer={way} has no effect; "
            "use auto or file"
        )
    return problems


def check_pools(config: Config, *, device: str) -> list[str]:
    """Return what is wrong with the GPUs of the engines, and with how weights reach them."""
    return [*check_adapters(config.actor_rollout_ref), *_check_gpus(config, device=device)]


def _check_gpus(config: Config, *, device: str) -> list[str]:
    rollout, wanted = config.actor_rollout_ref.rollout, config.trainer.n_gpus_per_node
    own, parallel = rollout.n_gpus_per_node, rollout.tensor_model_parallel_size
    key = f"actor_rollout_ref.rollout.n_gpus_per_node={own}"
    transfer = f"actor_rollout_ref.rollout.weight_transfer={rollout.weight_transfer}"
    if device == "cpu":
        problems = [f"{key} needs GPUs; leave it out on the CPU, where engines have cores of their own"] * (
            own > 0
        )
        if rollout.weight_transfer in ("ipc", "nccl"):
            problems.append(f"{transfer} needs GPUs; use auto or file on the CPU")
        return problems
    if own >= wanted:
        return [
            f"{key} leaves no GPU for the policy: expected less than trainer.n_gpus_per_node={wanted}, which "
            "counts those of the engines, too; lower the first or raise the second"
        ]
    problems = []
    if len(engine_gpus(config)) % parallel:
        pool = key if own else f"trainer.n_gpus_per_node={wanted}"
        problems.append(
            f"{pool} is no multiple of actor_rollout_ref.rollout.tensor_model_parallel_size={parallel}"
        )
    if own and rollout.weight_transfer == "ipc":
        problems.append(
            f"{transfer} shares the memory of a GPU, and {key} gives engines other GPUs than the policy; use "
            "auto or nccl"
        )
    if not own and rollout.weight_transfer == "nccl":
        problems.append(
            f"{transfer} cannot connect two processes on one GPU; use auto or ipc, or give engines GPUs of "
            "their own (actor_rollout_ref.rollout.n_gpus_per_node)"
        )
    return problems
