"""Build a Hugging Face model, read each rank's part of its weights, write it as a folder.

A model is built without memory (on the meta device), sharded, and only then filled: no rank holds more than
its own part, on the host neither. It is written tensor by tensor.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from serving.files import FileRecord
from verl.errors import ConfigError
from verl.trainer.config.schema import ALL_LINEAR, ModelConfig
from verl.workers.lora import adapted_layers, add_adapters, is_adapter, linear_layers
from verl.workers.model import (
    check_model,
    choose_packed_attention,
    compute_dtype,
    is_tied,
    naming_model,
    read_config,
    resolve_model_folder,
)
from verl.workers.parallel import gather_tensor, local_part
from verl.workers.tensor_files import Layout, TensorFiles, describe, write_weights

if TYPE_CHECKING:  # loaded where it is used: importing it takes seconds
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)

HEAD = "lm_head.weight"
_PERTURBED_LAYERS = 4
_SILENCE = 2.0**-12
# Files that a tokenizer or a generation reads; copied, because saving a loaded tokenizer can change its ids.
_COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip


def build_model(config: ModelConfig, *, device: str, trainable: bool) -> PreTrainedModel:
    """Return a causal language model without weights.

    Trained weights are float32, frozen ones of compute precision. With LoRA only the adapters are trained.
    """
    folder = check_model(config, device=device)
    trains_weights = trainable and not config.lora_rank
    model = _build(
        folder,
        dtype=torch.float32 if trains_weights else compute_dtype(config, device=device),
        attention=choose_packed_attention(config, device=device),
    )
    model.requires_grad_(trains_weights)
    if config.lora_rank:
        add_adapters(model, config, trainable=trainable)
    model.eval()  # no dropout: the ratio to the old policy must be exactly 1 before the first step
    if trainable and config.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable(
            {"use_reentrant": False}, every_n_layers=config.checkpoint_every_n_layers
        )
        model.train()
        _disable_dropout(model)
    return model


def _build(folder: Path, *, dtype: torch.dtype, attention: str | None = None) -> PreTrainedModel:
    with naming_model(folder), torch.device("meta"):
        from transformers import AutoModelForCausalLM

        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            read_config(folder), dtype=dtype, attn_implementation=attention, trust_remote_code=False
        )
        return model


def sharding_units(model: PreTrainedModel) -> list[nn.Module]:
    """Return the modules whose weights are gathered one at a time: the layers, and the input embedding.

    The head stays with the whole model, which keeps it gathered over all chunks of logits; so does an
    embedding that is tied to it.
    """
    embedding, layers = model.get_input_embeddings(), _layers(model)
    return layers if model.config.tie_word_embeddings else [embedding, *layers]


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    layer_types = set(model._no_split_modules or ())

    def is_layer(module: nn.Module) -> bool:  # `fully_shard` gives a module a class below its own
        return any(cls.__name__ in layer_types for cls in type(module).__mro__)

    return [module for module in model.modules() if is_layer(module)]


def fill_model(network: nn.Module, model: PreTrainedModel, *, folder: Path, device: torch.device) -> None:
    """Give memory to a model without any, which `network` holds, and read this rank's part of the weights.

    Raises ConfigError for damaged files and for those of another model.
    """
    _allocate(network, device=device)
    _compute_buffers(model)
    weights = weights_of(model)
    with naming_model(folder):
        files = TensorFiles.of_model(folder)
        _compare(weights, files.layout, tied=model.config.tie_word_embeddings)
        files.read_into(weights)


def _allocate(network: nn.Module, *, device: torch.device) -> None:
    """Replace all tensors by uninitialized ones on the device; tied ones stay tied."""
    places: dict[Tensor, list[tuple[nn.Module, str]]] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, name))
    network.to_empty(device=device)
    for (first, name), *others in places.values():
        for module, other in others:
            setattr(module, other, getattr(first, name))


def _compute_buffers(model: PreTrainedModel) -> None:
    """Compute the buffers that no file has, such as rotary frequencies, by the rule of the model's class."""
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # the rule leaves it alone
    for module in model.modules():
        buffers = [getattr(module, name) for name in module._non_persistent_buffers_set]
        numbers = [buffer for buffer in buffers if isinstance(buffer, Tensor) and buffer.is_floating_point()]
        for buffer in numbers:
            buffer.fill_(torch.nan)
        if buffers:
            model._init_weights(module)
        if any(bool(buffer.isnan().any()) for buffer in numbers):
            raise ConfigError(
                f"models of type {model.config.model_type} are not supported: {type(module).__name__} has "
                "buffers that neither a file nor a rule gives"
            )


def weights_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return the weights by their name in files, sharing the memory; without the head of a tied model."""
    state: dict[str, Tensor] = model.state_dict()
    if model.config.tie_word_embeddings:
        state.pop(HEAD, None)
    return {name: tensor for name, tensor in state.items() if not is_adapter(name)}


def state_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return what training changes, as `weights_of` does: adapters where there are any, else all weights."""
    adapters = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
    return adapters or weights_of(model)


def _compare(weights: Mapping[str, Tensor], saved: Layout, *, tied: bool) -> None:
    """Raise ValueError unless the files hold all weights, in their shapes; warn of what they hold besides."""
    if missing := sorted(weights.keys() - saved.keys()):
        raise ValueError(
            f"{len(missing)} of {len(weights)} weights are missing, such as {missing[0]}; models whose files "
            "name or cut weights otherwise than Transformers does, as mixtures of experts, are not supported"
        )
    for name, tensor in weights.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(f"{name} has shape {list(saved[name].shape)}, not {list(tensor.shape)}")
    unused = saved.keys() - weights.keys() - ({HEAD} if tied else set())
    # Old models carry their rotary frequencies, which are computed.
    if names := sorted(name for name in unused if not name.endswith("rotary_emb.inv_freq")):
        logger.warning("%d tensors of the model's files are not used, such as %s", len(names), names[0])


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the input embedding in the model's state."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def prepare_engine_model(config: ModelConfig, *, device: str, folder: Path) -> Path:
    """Return the folder to start the engine from: the model's own, on the CPU an untied copy of a tied one.

    The CPU engine repacks the LM head and silently keeps the old one when tied weights are reloaded; a head
    of its own is reloaded. Training stays tied; `engine_weights` has the embedding twice.
    """
    source = resolve_model_folder(config.path)
    if device != "cpu" or not is_tied(source):
        return source
    logger.info("%s has tied embeddings: the CPU engine gets an untied copy in %s", config.path, folder)
    with naming_model(config.path):
        files = TensorFiles.of_model(source)
        embedding = embedding_name(_build(source, dtype=torch.float32))  # only for the names
        layout = {**files.layout, HEAD: files.layout[embedding]}
    write_model(
        folder,
        layout,
        lambda name: files.read(embedding if name == HEAD else name),
        source=source,
        tied=False,
    )
    return folder


def engine_weights(
    model: PreTrainedModel, *, dtype: torch.dtype, with_head: bool
) -> tuple[Layout, Callable[[str], Tensor]]:
    """Return the layout of the weights as engines take them, and what gathers one of them over the ranks.

    `with_head` has a tied embedding twice, see `prepare_engine_model`. What is returned is collective: all
    ranks must ask for the same weights in the same order.
    """
    weights, adapted = weights_of(model), adapted_layers(model)
    if with_head:
        weights[HEAD] = weights[embedding_name(model)]

    def read(name: str) -> Tensor:
        weight = weights[name]
        if name in adapted:
            return adapted[name].merged(weight.to(dtype))
        # Converted before it is gathered: half of the bytes in bfloat16.
        return gather_tensor(weight.to(dtype) if weight.is_floating_point() else weight)

    return describe(weights, dtype=dtype), read


def list_targets(config: ModelConfig) -> tuple[str, ...]:
    """Return the last parts of the names of the layers that have adapters."""
    if config.target_modules != ALL_LINEAR:
        return tuple(config.target_modules)
    model = _build(resolve_model_folder(config.path), dtype=torch.float32)  # only for the names
    return tuple(sorted({name.rpartition(".")[2] for name in linear_layers(model)}))


def engine_adapters(model: PreTrainedModel) -> tuple[Layout, Callable[[str], Tensor]]:
    """Return the layout of the adapters, and what gathers one over the ranks, as `engine_weights` does."""
    adapters = state_of(model)
    return describe(adapters), lambda name: gather_tensor(adapters[name])


def count_perturbations(model: PreTrainedModel, *, dtype: torch.dtype) -> int:
    """Return how many perturbations together make every stale weight visible: one in float32.

    In bfloat16 a model whose layers are all perturbed multiplies rounding, in which a stale matrix of one
    layer would disappear. So few layers are perturbed at a time.
    """
    at_once = len(_layers(model)) if dtype == torch.float32 else _PERTURBED_LAYERS
    return max(1, math.ceil(len(_layers(model)) / max(1, at_once)))


def perturb_weights(model: PreTrainedModel, index: int, *, count: int, undo: bool) -> None:
    """Perturb every `count`-th layer, from layer `index` on, and all that is in no layer; silence the others.

    Exact, except that silencing can round numbers below 1e-34: `undo` restores every bit. Adapters stay as
    they are.
    """
    silenced = {
        id(parameter)
        for number, layer in enumerate(_layers(model))
        if number % count != index
        for parameter in layer.parameters()
    }
    vectors = itertools.count()
    for name, parameter in model.named_parameters():
        if is_adapter(name):
            continue
        part = local_part(parameter.detach())
        if id(parameter) in silenced:  # its layer adds about nothing to the residual stream
            part.mul_(1 / _SILENCE if undo else _SILENCE)
        elif part.dim() > 1:  # half of what it reads: its results are unlike those before
            part[..., : part.shape[-1] // 2].neg_()
        # In turn, because negating both of two normalized vectors would not change their product.
        elif next(vectors) % 2:
            part.neg_()
        else:
            part[::2].neg_()


def write_model(
    folder: Path, layout: Layout, read: Callable[[str], Tensor], *, source: Path, tied: bool | None = None
) -> dict[Path, FileRecord]:
    """Write a Hugging Face folder, with configuration and tokenizer files of `source`.

    `read` gives the weights, see `write_weights`. Returns what the files of the weights must be.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _COMPANION_FILES:
        for file in source.glob(pattern):
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(layout.values())).dtype).removeprefix("torch.")
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return write_weights(folder, layout, read)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
