"""Hugging Face models: find the folder, load it, compute log-probs of chosen tokens, write it.

`PolicyNetwork` is the module that is sharded: one forward pass gives log-probs and entropies of chosen
tokens, and logits are computed for those only, one chunk at a time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
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
from verl.workers.attention import AttentionBlocks, attend_by_flash, attend_by_sdpa
from verl.workers.losses import log_probs_and_entropy

if TYPE_CHECKING:  # loaded where it is used: importing it takes seconds
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
# Names of our attention in transformers, which would look for a package if one contained "flash".
_PACKED_ATTENTION = {"sdpa": "packed_sdpa", "flash_attention_2": "packed_varlen"}
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


def packs_rows(config: ModelConfig) -> bool:
    """Return whether the model can compute several trajectories in one sequence, see `verl.forest`.

    A model with sliding windows, or with layers that carry a state from token to token, computes each
    trajectory in a forward pass of its own, with the attention that Transformers defines for it.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    with _naming_model(config.path):
        settings = _read_config(resolve_model_folder(config.path))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        takes_attention = model_class._supports_attention_backend and not model_class._is_stateful
    return takes_attention and _attends_to_all(settings.to_dict())


def check_model(config: ModelConfig, *, device: str) -> Path:
    """Return the model's folder. Raises ConfigError for what shows without loading the weights."""
    folder = resolve_model_folder(config.path)
    _choose_attention(config, device=device)
    with _naming_model(config.path):
        settings = _read_config(folder).to_dict()
    for name in _UNSUPPORTED_SETTINGS:
        if settings.get(name) not in (None, 1.0):
            raise ConfigError(
                f"{_KEY}.path={config.path}: models with {name}={settings[name]} are not supported"
            )
    return folder


def _attends_to_all(settings: Mapping[str, object]) -> bool:
    """Return whether all layers attend to the whole context."""
    window, layer_types = settings.get("sliding_window"), settings.get("layer_types")
    if isinstance(layer_types, list):
        return set(layer_types) <= {"full_attention"}
    if not isinstance(window, int) or settings.get("use_sliding_window") is False:
        return True
    length = settings.get("max_position_embeddings")
    return isinstance(length, int) and window >= length


def load_model(config: ModelConfig, *, device: str, trainable: bool) -> PreTrainedModel:
    """Load a causal language model into CPU memory: in float32 if trainable, else in compute precision."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    folder = check_model(config, device=device)
    AttentionInterface.register(_PACKED_ATTENTION["sdpa"], attend_by_sdpa)
    AttentionInterface.register(_PACKED_ATTENTION["flash_attention_2"], attend_by_flash)
    attention = _choose_attention(config, device=device)
    dtype = torch.float32 if trainable else compute_dtype(config, device=device)
    disable_progress_bar()
    with _LOADING, _naming_model(config.path):
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            attn_implementation=_PACKED_ATTENTION[attention] if packs_rows(config) else None,
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


class PolicyNetwork(nn.Module):
    """A causal language model that returns log-probs instead of logits."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        previous: Tensor,
        targets: Tensor,
        *,
        blocks: AttentionBlocks | None,
        temperature: float,
        entropy_has_gradient: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Return the log-probs of `targets` [N] after those in columns `previous` [N], and the entropies.

        `ids` and `positions` [T] are those of a forest and `blocks` what its tokens attend to; None for one
        trajectory of a model that computes them one by one. Both results are float32 [N].
        """
        layout = {} if blocks is None else {"position_ids": positions[None], "blocks": blocks}
        decoder = self.model.get_decoder()
        hidden = decoder(input_ids=ids[None], use_cache=False, **layout).last_hidden_state[0, previous]
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
    is_short = compute_dtype(config, device=device) is torch.bfloat16
    if config.attention == "auto":
        return "flash_attention_2" if device != "cpu" and is_short else "sdpa"
    if config.attention == "flash_attention_2" and (device == "cpu" or not is_short):
        raise ConfigError(
            f"{_KEY}.attention=flash_attention_2 needs a GPU and {_KEY}.dtype=bfloat16; use auto or sdpa"
        )
    return config.attention


def _disable_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif "attention_dropout" in vars(module):
            module.attention_dropout = 0.0
