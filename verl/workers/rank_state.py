"""The file of one rank in a checkpoint: its part of the weights, the optimizer's state, the random state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from verl.errors import ConfigError
from verl.workers.model import writing_tensors
from verl.workers.parallel import ParallelContext, local_part


def rank_file(folder: str, context: ParallelContext) -> Path:
    """Return the path of a rank's file."""
    return Path(folder) / f"policy_rank_{context.rank}_of_{context.world_size}.pt"


def write_rank(
    folder: str, network: nn.Module, *, optimizer: Optimizer | None, step: int, context: ParallelContext
) -> None:
    """Write this rank's weights, optimizer state (if any), step and random state."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    states = {} if optimizer is None else optimizer.state
    record = {
        "world_size": context.world_size,
        "step": step,
        "weights": {name: _copy_part(p.detach()) for p, name in names.items()},
        "optimizer": {
            names[p]: {key: _copy_part(value) for key, value in state.items()} for p, state in states.items()
        },
        "random": torch.get_rng_state(),
    }
    path = rank_file(folder, context)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing_tensors(path), path.open("wb") as file:
        torch.save(record, file)


def read_rank(
    folder: str, network: nn.Module, *, optimizer: Optimizer | None, source: Path, context: ParallelContext
) -> int:
    """Take over what `write_rank` wrote; return the step. Without an optimizer only the weights count.

    Raises ConfigError if the ranks differ, or the model does from `source`.
    """
    path = rank_file(folder, context)
    if not path.is_file():
        raise ConfigError(
            f"{folder} has no {path.name}: it was saved by another number of workers. Resume with that "
            "number, or start from its huggingface folder with actor_rollout_ref.model.path"
        )
    record = torch.load(path, map_location="cpu", weights_only=True)
    parameters = dict(network.named_parameters())
    shapes = {name: local_part(p).shape for name, p in parameters.items()}
    if shapes != {name: saved.shape for name, saved in record["weights"].items()}:
        raise ConfigError(f"{path} holds another model than actor_rollout_ref.model.path={source}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            local_part(parameter).copy_(record["weights"][name])
            if optimizer is not None and name in record["optimizer"]:
                optimizer.state[parameter] = _restore_state(parameter, record["optimizer"][name])
    torch.set_rng_state(record["random"])
    step: int = record["step"]
    return step


def _copy_part(tensor: Tensor) -> Tensor:
    # Cloned: a part may be a view of a larger buffer, which torch.save would write whole.
    return local_part(tensor).cpu().clone()


def _restore_state(parameter: Tensor, saved: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {}
    for key, value in saved.items():
        if value.dim() == 0:  # the step count
            state[key] = value
            continue
        state[key] = torch.zeros_like(parameter)
        local_part(state[key]).copy_(value)
    return state
