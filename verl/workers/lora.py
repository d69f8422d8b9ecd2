"""Low-rank adapters (LoRA, arXiv 2106.09685): small trained matrices beside frozen weights.

An adapted layer computes W x + b + scale B (A x), with A [rank, in], B [out, rank], scale = alpha / rank. B
begins as 0, so that the policy begins as the model of its folder; with the adapters off it is that model, bit
for bit, whatever was trained.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from serving.files import FileRecord, write_json_atomically
from verl.errors import ConfigError
from verl.trainer.config.schema import ALL_LINEAR, ModelConfig
from verl.utils.seeding import derive_seed
from verl.workers.parallel import copy_part, gather_tensor, local_part
from verl.workers.tensor_files import Layout, write_tensors

if TYPE_CHECKING:  # importing it takes seconds
    from transformers import PreTrainedModel

_KEY = "actor_rollout_ref.model"
_A, _B = "lora_A", "lora_B"
_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


class LoraLinear(nn.Linear):
    """A linear layer with an adapter in float32, which `is_on` says whether to add."""

    def __init__(self, base: nn.Linear, *, rank: int, scale: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight = base.weight
        self.register_parameter("bias", base.bias)
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, rank, device=device))
        self.scale = scale
        self.is_on = True
        self.saved_B: Tensor | None = None
        """This rank's part of B while `perturb_adapters` replaces it."""

    def forward(self, input: Tensor) -> Tensor:  # as torch names it
        """Return [..., out] in the dtype of the input."""
        output = super().forward(input)
        if not self.is_on:
            return output
        reduced = linear(input, self.lora_A.to(input.dtype))  # [..., rank]
        return output + self.scale * linear(reduced, self.lora_B.to(input.dtype))

    def merged(self, weight: Tensor) -> Tensor:
        """Return the whole of `weight`, which may be sharded, with the adapter in it. Collective."""
        whole, a, b = (gather_tensor(t.detach()) for t in (weight, self.lora_A, self.lora_B))
        return merge(whole, a, b, scale=self.scale)


def adapter_scale(config: ModelConfig) -> float:
    """Return the factor of the adapters."""
    return config.lora_alpha / config.lora_rank


def merge(weight: Tensor, a: Tensor, b: Tensor, *, scale: float) -> Tensor:
    """Return W + scale B A, computed in float32, in the dtype of W [out, in]."""
    return (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)


def add_adapters(model: PreTrainedModel, config: ModelConfig, *, trainable: bool) -> None:
    """Freeze a model and adapt the linear layers of its decoder that `config.target_modules` names.

    Raises ConfigError for a name that no layer has.
    """
    model.requires_grad_(False)
    decoder = model.get_decoder()
    names = linear_layers(model)
    wanted = None if config.target_modules == ALL_LINEAR else config.target_modules
    ends = {name.rpartition(".")[2] for name in names}
    for name in wanted or ():
        if name not in ends:
            raise ConfigError(
                f"{_KEY}.target_modules={config.target_modules!r}: no linear layer of {config.path} is named "
                f"{name!r}; it has {', '.join(sorted(ends)) or 'none'}"
            )
    if not names:
        raise ConfigError(
            f"{_KEY}.lora_rank={config.lora_rank}: {config.path} has no linear layers (torch.nn.Linear) to "
            "adapt; set it to 0 to train all weights"
        )
    for name in names:
        parent, _, end = name.rpartition(".")
        if wanted is None or end in wanted:
            base = decoder.get_submodule(name)
            adapted = LoraLinear(base, rank=config.lora_rank, scale=adapter_scale(config))
            adapted.lora_A.requires_grad_(trainable)
            adapted.lora_B.requires_grad_(trainable)
            setattr(decoder.get_submodule(parent), end, adapted)


def linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names, within the decoder, of the layers that can have adapters."""
    return [name for name, module in model.get_decoder().named_modules() if type(module) is nn.Linear]


def init_adapters(model: PreTrainedModel, *, seed: int) -> None:
    """Draw A as `torch.nn.Linear` draws weights, the same on any number of ranks, and set B to 0."""
    for name, layer in adapted_layers(model).items():
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
        bound = layer.in_features**-0.5
        whole = torch.empty(layer.lora_A.shape).uniform_(-bound, bound, generator=generator)
        copy_part(whole, layer.lora_A)
        local_part(layer.lora_B.detach()).zero_()


def adapted_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the adapted layers by the names of their weights."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    return {f"{name}.weight": layer for name, layer in layers.items()}


def is_adapter(name: str) -> bool:
    """Return whether a tensor of a model's state is part of an adapter."""
    return name.endswith((f".{_A}", f".{_B}"))


def perturb_adapters(model: PreTrainedModel, *, undo: bool) -> None:
    """Replace every B by random numbers, so that each adapted layer computes something else.

    An adapter then adds about a third of the root mean square of its input. `undo` restores every bit.
    """
    for name, layer in adapted_layers(model).items():
        part = local_part(layer.lora_B.detach())
        if undo:
            assert layer.saved_B is not None
            part.copy_(layer.saved_B)
            layer.saved_B = None
            continue
        layer.saved_B = part.clone()
        generator = torch.Generator().manual_seed(derive_seed(0, "perturb", name))
        bound = layer.lora_A.shape[0] ** -0.5 / layer.scale
        whole = torch.empty(layer.lora_B.shape).uniform_(-bound, bound, generator=generator)
        copy_part(whole, layer.lora_B)


@contextlib.contextmanager
def adapters_switched(model: nn.Module, *, on: bool) -> Iterator[None]:
    """Compute with or without the adapters inside the block."""
    layers = adapted_layers(model).values()
    for layer in layers:
        layer.is_on = on
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True


def read_merged(
    name: str, *, base: Callable[[str], Tensor], adapters: Layout, read: Callable[[str], Tensor], scale: float
) -> Tensor:
    """Return a weight of `base`, with its adapter if `adapters` has one, which `read` gives."""
    prefix = name.removesuffix("weight")
    if f"{prefix}{_A}" not in adapters:
        return base(name)
    return merge(base(name), read(f"{prefix}{_A}"), read(f"{prefix}{_B}"), scale=scale)


def write_adapters(
    folder: Path,
    layout: Layout,
    read: Callable[[str], Tensor],
    *,
    config: ModelConfig,
    is_writer: bool = True,
) -> dict[Path, FileRecord]:
    """Write adapters as a folder that PEFT and vLLM load; return what its file of weights must be.

    Where `read` is collective all ranks call this, and the others than `is_writer` only read.
    """
    if not is_writer:
        for name in layout:
            read(name)
        return {}
    names = {f"base_model.model.{name}.weight": name for name in layout}
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.path,
        "r": config.lora_rank,
        "lora_alpha": round(config.lora_alpha) if config.lora_alpha % 1 == 0 else config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in layout}),
        "inference_mode": True,
    }
    write_json_atomically(folder / _CONFIG, settings)
    path = folder / _FILE
    record = write_tensors(path, {to: layout[name] for to, name in names.items()}, lambda to: read(names[to]))
    return {path: record}
