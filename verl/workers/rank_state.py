"""The training state of a rank: copied to host memory, written to a file of its own, read on any ranks.

The files are in the format of `torch.distributed.checkpoint`, so that other ranks, more or fewer, find their
parts of every tensor. No rank waits for another, neither when it writes nor when it reads.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from serving.files import FileRecord, sha256_of_file
from verl.errors import ConfigError
from verl.trainer.config.schema import ModelConfig
from verl.utils.seeding import derive_seed
from verl.workers.checkpoint import ADAPTER
from verl.workers.lora import adapter_scale, is_adapter, read_merged, write_adapters
from verl.workers.model_io import state_of, write_model
from verl.workers.offload import copy_to_host
from verl.workers.parallel import ParallelContext
from verl.workers.tensor_files import TensorFiles, describe, write_tensors

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

Copy = Callable[[Tensor], Tensor]
"""Gives this rank's part of a tensor in host memory, not shared with it."""

_WEIGHTS, _OPTIMIZER, _RANDOM, _STEP, _BASE = "weights.", "optimizer.", "random.", "step", "base"
_HASHING_THREADS = 8


@dataclass(frozen=True, slots=True)
class StagedState:
    """This rank's part of the state in host memory; training does not change it."""

    parts: dict[str, Tensor] = field(default_factory=dict)
    offsets: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """Where each part begins in the whole tensor."""
    source: Path | None = None
    """The folder of the model, of whose weights the parts are adapters."""

    def add(self, name: str, tensor: Tensor, *, context: ParallelContext, copy: Copy) -> None:
        """Copy the local part, unless another rank has the same."""
        offsets = (0,) * tensor.dim()
        if isinstance(tensor, DTensor):
            place = tensor.device_mesh.get_coordinate() or []
            if any(p.is_replicate() and at > 0 for p, at in zip(tensor.placements, place, strict=True)):
                return
            (chunk,) = tensor.__create_chunk_list__()
            offsets = tuple(chunk.offsets)
        elif context.rank > 0:
            return
        self.parts[name] = copy(tensor)
        self.offsets[name] = offsets


def stage_state(
    model: PreTrainedModel,
    *,
    optimizer: Optimizer | None,
    step: int,
    source: Path,
    context: ParallelContext,
    copy: Copy = copy_to_host,
) -> StagedState:
    """Copy the weights that change, and with an optimizer its state, the step and the random state."""
    weights = state_of(model)
    staged = StagedState(source=source if any(map(is_adapter, weights)) else None)
    add = partial(staged.add, context=context, copy=copy)
    for name, weight in weights.items():
        add(f"{_WEIGHTS}{name}", weight)
    if optimizer is None:
        return staged
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            add(f"{_OPTIMIZER}{key}.{name}", value)
    add(_STEP, torch.tensor(step))
    staged.parts[f"{_RANDOM}{context.rank}"] = torch.get_rng_state()
    staged.offsets[f"{_RANDOM}{context.rank}"] = (0,)
    return staged


def write_state(folder: Path, staged: StagedState, *, context: ParallelContext) -> dict[Path, FileRecord]:
    """Write this rank's file. Raises OSError with its path.

    Adapters are worthless with another model: the hash of its weights goes with them.
    """
    if context.rank == 0 and staged.source is not None:
        staged.parts[_BASE], staged.offsets[_BASE] = hash_weights(staged.source), (0,)
    path = folder / f"rank_{context.rank}_of_{context.world_size}.safetensors"
    return {
        path: write_tensors(path, describe(staged.parts), staged.parts.__getitem__, offsets=staged.offsets)
    }


def read_state(
    folder: Path,
    model: PreTrainedModel,
    *,
    optimizer: Optimizer | None,
    source: Path,
    context: ParallelContext,
    seed: int,
) -> int:
    """Take over what all ranks wrote; return the step. Without an optimizer only the weights count.

    On another number of ranks the random state comes from the seed. Raises ConfigError if the model differs
    from `source`.
    """
    files = _open(folder)
    layout = files.layout
    weights = {f"{_WEIGHTS}{name}": weight for name, weight in state_of(model).items()}
    saved = {name: tensor.shape for name, tensor in layout.items() if name.startswith(_WEIGHTS)}
    if saved != {name: weight.shape for name, weight in weights.items()}:
        raise ConfigError(
            f"{folder} holds another model than actor_rollout_ref.model.path={source}, or was trained with "
            "another lora_rank or other target_modules"
        )
    is_checked = context.rank == 0 and _BASE in layout  # its error ends the other ranks, too
    if is_checked and not torch.equal(files.read(_BASE), hash_weights(source)):
        raise ConfigError(
            f"{folder} holds adapters for other weights than those of actor_rollout_ref.model.path={source}; "
            "restore the model with which the run began"
        )
    if optimizer is None:
        files.read_into(weights)
        return 0
    state = weights | {_STEP: torch.zeros((), dtype=torch.int64)}
    parameters = dict(model.named_parameters())
    for full in (name for name in layout if name.startswith(_OPTIMIZER)):
        _, key, name = full.split(".", 2)
        is_scalar = layout[full].dim() == 0  # the optimizer's count of steps, which stays on the CPU
        state[full] = torch.zeros(()) if is_scalar else torch.zeros_like(parameters[name].detach())
        optimizer.state[parameters[name]][key] = state[full]
    random = f"{_RANDOM}{context.rank}"
    ranks = sum(name.startswith(_RANDOM) for name in layout)
    if ranks == context.world_size:
        state[random] = torch.zeros(layout[random].shape, dtype=torch.uint8)
    files.read_into(state)
    step = int(state[_STEP])
    if random in state:
        torch.set_rng_state(state[random])
        return step
    torch.manual_seed(derive_seed(seed, "resume", step, context.rank))
    if context.rank == 0:
        logger.warning(
            "%s was saved by %d ranks and goes on with %d: from the same weights, with other rounding errors",
            folder,
            ranks,
            context.world_size,
        )
    return step


def export_state(
    folder: Path, target: Path, *, source: Path, dtype: torch.dtype, config: ModelConfig
) -> dict[Path, FileRecord]:
    """Write the weights that all ranks wrote as a Hugging Face folder, one tensor in memory at a time.

    With LoRA the adapters are merged into the weights of `source`, and a folder beside it has them alone.
    """
    files = _open(folder)
    saved = {
        name.removeprefix(_WEIGHTS): tensor
        for name, tensor in files.layout.items()
        if name.startswith(_WEIGHTS)
    }

    def read(name: str) -> Tensor:
        return files.read(f"{_WEIGHTS}{name}")

    if not config.lora_rank:
        layout = describe(saved, dtype=dtype)
        return write_model(target, layout, lambda name: read(name).to(layout[name].dtype), source=source)
    base = TensorFiles.of_model(source)
    layout = describe(base.layout, dtype=dtype)
    merged = partial(
        read_merged,
        # In the precision in which the policy holds it, as the engine gets it.
        base=lambda name: base.read(name).to(layout[name].dtype),
        adapters=saved,
        read=read,
        scale=adapter_scale(config),
    )
    records = write_model(target, layout, merged, source=source)
    return records | write_adapters(target.with_name(ADAPTER), saved, read, config=config)


@cache
def hash_weights(folder: Path) -> Tensor:
    """Return the SHA-256 of the safetensors files of a folder as bytes [32]; they are read once a process."""
    paths = sorted(folder.glob("*.safetensors"))
    with ThreadPoolExecutor(_HASHING_THREADS) as pool:
        digests = "".join(pool.map(sha256_of_file, paths))
    return torch.tensor([*hashlib.sha256(digests.encode()).digest()], dtype=torch.uint8)


def _open(folder: Path) -> TensorFiles:
    paths = sorted(folder.glob("rank_*_of_*.safetensors"))
    counts = {path.stem.rpartition("_of_")[2] for path in paths}
    if len(counts) != 1 or len(paths) != int(*counts):
        raise ConfigError(
            f"{folder} holds the files of {len(paths)} ranks, not those of one whole checkpoint; resume from "
            "another one, or start from a huggingface folder with actor_rollout_ref.model.path"
        )
    return TensorFiles(paths)
