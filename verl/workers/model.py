"""Hugging Face models: find and check the folder, compute log-probs of chosen tokens.

`PolicyNetwork` is the module that is sharded: one forward pass gives log-probs and entropies of chosen
tokens, and logits are computed for those only, one chunk at a time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serving.model_files import ModelNotFoundError, check_weights, find_model
from verl.errors import ConfigError
from verl.trainer.config.schema import ModelConfig
from verl.workers.attention import AttentionBlocks, attend_by_flash, attend_by_sdpa
from verl.workers.losses import log_probs_and_entropy

if TYPE_CHECKING:  # loaded where it is used: importing it takes seconds
    from transformers import PretrainedConfig, PreTrainedModel

KEY = "actor_rollout_ref.model"
_TRANSFORMERS = threading.RLock()
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
        raise ConfigError(f"{KEY}.path={error}") from error
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
    with naming_model(config.path):
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

        settings = read_config(resolve_model_folder(config.path))
        model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(settings)]
        takes_attention = model_class._supports_attention_backend and not model_class._is_stateful
    return takes_attention and _attends_to_all(settings.to_dict())


def check_model(config: ModelConfig, *, device: str) -> Path:
    """Return the model's folder. Raises ConfigError for what shows without loading the weights."""
    folder = resolve_model_folder(config.path)
    _choose_attention(config, device=device)
    with naming_model(config.path):
        settings = read_config(folder).to_dict()
    for name in _UNSUPPORTED_SETTINGS:
        if settings.get(name) not in (None, 1.0):
            raise ConfigError(
                f"{KEY}.path={config.path}: models with {name}={settings[name]} are not supported"
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


def choose_packed_attention(config: ModelConfig, *, device: str) -> str | None:
    """Return the name of our attention, which Transformers then knows; None where a model defines its own."""
    with naming_model(config.path):
        from transformers import AttentionInterface

        AttentionInterface.register(_PACKED_ATTENTION["sdpa"], attend_by_sdpa)
        AttentionInterface.register(_PACKED_ATTENTION["flash_attention_2"], attend_by_flash)
    return _PACKED_ATTENTION[_choose_attention(config, device=device)] if packs_rows(config) else None


@contextlib.contextmanager
def naming_model(path: str | Path) -> Iterator[None]:
    """Raise ConfigError for every exception of the libraries: the errors of damaged files share no class.

    One thread at a time (trainer.launcher=local has several): transformers imports its parts when they are
    first used, and patches the process while it builds a model.
    """
    try:
        with _TRANSFORMERS:
            yield
    except Exception as error:
        raise ConfigError(
            f"{KEY}.path={path} cannot be loaded as a causal language model ({type(error).__name__}: "
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
    with naming_model(folder):
        return bool(read_config(folder).tie_word_embeddings)


def read_config(folder: Path) -> PretrainedConfig:
    """Return the configuration of a model's folder."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _choose_attention(config: ModelConfig, *, device: str) -> str:
    is_short = compute_dtype(config, device=device) is torch.bfloat16
    if config.attention == "auto":
        return "flash_attention_2" if device != "cpu" and is_short else "sdpa"
    if config.attention == "flash_attention_2" and (device == "cpu" or not is_short):
        raise ConfigError(
            f"{KEY}.attention=flash_attention_2 needs a GPU and {KEY}.dtype=bfloat16; use auto or sdpa"
        )
    return config.attention
