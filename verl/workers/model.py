"""Hugging Face models: find the folder, load it, compute log-probs of chosen tokens, write it.

`PolicyNetwork` is the module that is sharded: one forward pass gives log-probs and entropies of chosen
tokens, and logits are computed for those only, one chunk at a time.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serving.files import replacing_file
from serving.model_files import ModelNotFoundError, check_weights, find_model
from serving.weights import copy_weights
from verl.errors import ConfigError
from verl.trainer.config.schema import ModelConfig
from verl.workers.losses import log_probs_and_entropy

if TYPE_CHECKING:  # loaded where it is used: importing it takes seconds
    from torch.nn.attention.flex_attention import BlockMask
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

# transformers patches the process while it builds a model, so threads (trainer.launcher=local) need a lock.
_LOADING = threading.Lock()

_KEY = "actor_rollout_ref.model"
# Files that a tokenizer or a generation reads; copied, because saving a loaded tokenizer can change its ids.
_COMPANION_FILES = (
    "tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
    "generation_config.json",
)  # fmt: skip
# Settings that change logits after the LM head, where `PolicyNetwork` computes them itself.
_UNSUPPORTED_SETTINGS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
_LOGITS_PER_CHUNK = 2**27
"""Float32 logits in memory at once: 512 MiB."""


def resolve_model_folder(path: str) -> Path:
    """Return the folder of a model, downloaded if it is one of the hub. Raises ConfigError."""
    try:
        folder = find_model(path)
        check_weights(folder)
    except ModelNotFoundError as error:
        raise ConfigError(f"{_KEY}.path={error}") from error
    return folder


def compute_dtype(config: ModelConfig, *, device: str) -> torch.dtype:
    """Return the precision of forward passes and of exported weights."""
    if config.dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return torch.bfloat16 if config.dtype == "bfloat16" else torch.float32


def trees_score_as_rows(config: ModelConfig, *, device: str) -> bool:
    """Return whether a pass over trees gives the log-probs of the update's own forward pass.

    Up to rounding in float32 it does where both use SDPA on the CPU. On GPUs and in bfloat16 the two run
    different kernels, so that the ratio of new to old probability would not begin at 1.
    """
    is_precise = compute_dtype(config, device=device) is torch.float32
    used = {_choose_attention(config, device=device), choose_tree_attention(config, device=device)}
    return device == "cpu" and is_precise and used == {"sdpa"}


def check_model(config: ModelConfig, *, device: str, scores_trees: bool = False) -> Path:
    """Return the model's folder. Raises ConfigError for what shows without loading the weights.

    `scores_trees`: the method needs log-probs from rows that hold trees.
    """
    folder = resolve_model_folder(config.path)
    _choose_attention(config, device=device)
    with _naming_model(config.path):
        settings = _read_config(folder).to_dict()
    for name in _UNSUPPORTED_SETTINGS:
        if settings.get(name) not in (None, 1.0):
            raise ConfigError(
                f"{_KEY}.path={config.path}: models with {name}={settings[name]} are not supported"
            )
    if scores_trees and (partial := _find_partial_attention(settings)) is not None:
        raise ConfigError(
            f"{_KEY}.path={config.path}: its config.json has {partial}, but this method scores several "
            "continuations in one pass, which needs attention to the whole context in every layer; take a "
            "model without sliding windows, or a method without log-probs, such as algorithm=search_r1"
        )
    return folder


def _find_partial_attention(settings: Mapping[str, object]) -> str | None:
    """Return the setting by which layers do not attend to the whole context; None where all do."""
    window, layer_types = settings.get("sliding_window"), settings.get("layer_types")
    if isinstance(layer_types, list):
        partial = [kind for kind in layer_types if kind != "full_attention"]
        return f"{partial[0]} in layer_types (sliding_window={window})" if partial else None
    if not isinstance(window, int) or settings.get("use_sliding_window") is False:
        return None
    length = settings.get("max_position_embeddings")
    is_whole = isinstance(length, int) and window >= length
    return None if is_whole else f"sliding_window={window}"


def load_model(config: ModelConfig, *, device: str, trainable: bool) -> PreTrainedModel:
    """Load a causal language model into CPU memory: in float32 if trainable, else in compute precision."""
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    folder = check_model(config, device=device)
    dtype = torch.float32 if trainable else compute_dtype(config, device=device)
    disable_progress_bar()
    with _LOADING, _naming_model(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=_choose_attention(config, device=device),
            local_files_only=True,
            trust_remote_code=False,
        )
    copy_weights(model)
    model.requires_grad_(trainable)
    model.eval()  # no dropout: the ratio to the old policy must be exactly 1 before the first step
    if trainable and config.enable_gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
        _disable_dropout(model)
    return model


@contextlib.contextmanager
def _naming_model(path: str | Path) -> Iterator[None]:
    """Raise ConfigError for every exception of the libraries: the errors of damaged files share no class."""
    try:
        yield
    except Exception as error:
        raise ConfigError(
            f"{_KEY}.path={path} cannot be loaded as a causal language model ({type(error).__name__}: "
            f"{error}); copy the model again or choose another one"
        ) from error


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TreeLayout:
    """How the tokens of rows that hold trees stand to each other; see `verl.branches`."""

    positions: Tensor
    """[B, L]"""
    previous: Tensor
    """Column of the token before each one [B, L]."""
    enters: Tensor
    leaves: Tensor
    """[B, L]"""

    def mask(self, attention: str) -> Tensor | BlockMask:
        """Return which tokens attend to which: for SDPA and eager attention [B, 1, L, L], True where so."""
        enters, leaves = self.enters, self.leaves

        def attends(row: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:  # noqa: ARG001
            return (enters[row, j] <= enters[row, i]) & (enters[row, i] < leaves[row, j])

        rows, length = enters.shape
        if attention == "flex_attention":  # computes only blocks of tokens of which some attend to others
            from torch.nn.attention.flex_attention import create_block_mask

            return create_block_mask(attends, rows, None, length, length, device=enters.device)
        row, token = (torch.arange(count, device=enters.device) for count in (rows, length))
        return attends(row[:, None, None, None], row[:1], token[:, None], token)


class PolicyNetwork(nn.Module):
    """A causal language model that returns log-probs instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        rows: Tensor,
        columns: Tensor,
        *,
        temperature: float,
        entropy_has_gradient: bool = False,
        layout: TreeLayout | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return log-probs of `input_ids[rows, columns]` and the entropies there, both float32 [N].

        `input_ids` [B, L] is right-padded; columns start at 1. Attention is causal, so no attention mask is
        needed, unless the rows are trees: then `layout` has what each token follows and attends to.
        """
        decoder = self.model.get_decoder()
        if layout is None:
            hidden = decoder(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, H]
            hidden = hidden[rows, columns - 1]  # [N, H]
        else:
            hidden = decoder(
                input_ids=input_ids,
                position_ids=layout.positions,
                attention_mask=layout.mask(self.model.config._attn_implementation),
                use_cache=False,
            ).last_hidden_state
            hidden = hidden[rows, layout.previous[rows, columns]]
        targets = input_ids[rows, columns]
        head = self.model.get_output_embeddings()

        def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
            logits = head(hidden).float() / temperature
            return log_probs_and_entropy(logits, targets, entropy_has_gradient=entropy_has_gradient)

        size = max(1, _LOGITS_PER_CHUNK // head.weight.shape[0])
        if len(targets) <= size:
            return score(hidden, targets)
        # Only one chunk of logits is in memory; the backward pass recomputes it.
        chunks = [
            checkpoint(score, *chunk, use_reentrant=False)
            for chunk in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        return torch.cat([log_probs for log_probs, _ in chunks]), torch.cat(
            [entropy for _, entropy in chunks]
        )


def is_tied(folder: Path) -> bool:
    """Return whether input and output embeddings of a model are one tensor."""
    with _naming_model(folder):
        return bool(_read_config(folder).tie_word_embeddings)


def untie(state: Mapping[str, Tensor], *, embedding: str, head: str = "lm_head.weight") -> dict[str, Tensor]:
    """Return the state of a tied model with an LM head of its own."""
    return {**state, head: state[embedding].clone()}


def prepare_engine_model(config: ModelConfig, *, device: str, folder: Path) -> Path:
    """Return the folder to start the engine from: the model's own, on the CPU an untied copy of a tied one.

    The CPU engine repacks the LM head and silently keeps the old one when tied weights are reloaded; a head
    of its own is reloaded. Training stays tied; `export_weights` writes the embedding twice.
    """
    from transformers import AutoModelForCausalLM

    source = resolve_model_folder(config.path)
    if device != "cpu" or not is_tied(source):
        return source
    logger.info("%s has tied embeddings: the CPU engine gets an untied copy in %s", config.path, folder)
    with _naming_model(config.path):
        state = {
            name: tensor
            for file in sorted(source.glob("*.safetensors"))
            for name, tensor in load_file(file).items()
        }
        with _LOADING, torch.device("meta"):  # only for the names of its parameters
            model = AutoModelForCausalLM.from_config(_read_config(source))
        untied = untie(state, embedding=embedding_name(model))
    write_model(folder, untied, source=source, tied=False)
    return folder


def embedding_name(model: PreTrainedModel) -> str:
    """Return the name of the input embedding in the model's state."""
    weight = model.get_input_embeddings().weight
    return next(name for name, parameter in model.named_parameters() if parameter is weight)


def write_model(folder: Path, state: Mapping[str, Tensor], *, source: Path, tied: bool | None = None) -> None:
    """Write a Hugging Face folder: weights, with the configuration and tokenizer files of `source`."""
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in _COMPANION_FILES:
        for file in source.glob(pattern):
            with contextlib.suppress(shutil.SameFileError):
                shutil.copyfile(file, folder / file.name)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = str(next(iter(state.values())).dtype).removeprefix("torch.")
    if tied is not None:
        config["tie_word_embeddings"] = tied
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_weights(folder, state)


def write_weights(folder: Path, state: Mapping[str, Tensor]) -> None:
    """Write `model.safetensors` atomically."""
    path = folder / "model.safetensors"
    with replacing_file(path) as partial, writing_tensors(path):
        save_file(dict(state), partial, metadata={"format": "pt"})


@contextlib.contextmanager
def writing_tensors(path: Path) -> Iterator[None]:
    """Raise the OSError, such as a full disk, that safetensors and torch wrap in errors of their own."""
    try:
        yield
    except (SafetensorError, RuntimeError) as error:
        cause, named = error.__context__, re.search(r"os error (\d+)", str(error))
        number = cause.errno if isinstance(cause, OSError) else int(named[1]) if named else None
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def _read_config(folder: Path) -> PretrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _choose_attention(config: ModelConfig, *, device: str) -> str:
    has_flash = importlib.util.find_spec("flash_attn") is not None
    if config.attention == "auto":
        return "flash_attention_2" if device != "cpu" and has_flash and config.dtype != "float32" else "sdpa"
    if config.attention == "flash_attention_2" and (device == "cpu" or not has_flash):
        raise ConfigError(
            f"{_KEY}.attention=flash_attention_2 needs a GPU and the package flash-attn; use auto or sdpa"
        )
    return config.attention


def choose_tree_attention(config: ModelConfig, *, device: str) -> str:
    """Return how rows that hold trees are computed; flash attention has no mask per row."""
    if config.tree_attention != "auto":
        return config.tree_attention
    return "sdpa" if device == "cpu" else "flex_attention"


@contextlib.contextmanager
def using_attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    """Compute attention by another implementation, and by the model's own one afterwards."""
    before = model.config._attn_implementation
    if before == implementation:
        yield
        return
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
