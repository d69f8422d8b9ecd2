"""The shape of a decoder as its config.json states it, and how many parameters that makes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from serving.model_files import ModelNotFoundError, read_model_config
from verl.errors import ConfigError

_KINDS = ("llama", "mistral", "qwen2", "qwen3")


class UnknownShapeError(ConfigError):
    """A model whose parameters the plan cannot count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """A decoder of the family of Llama, Mistral, Qwen2 and Qwen3."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    is_tied: bool
    """Whether input and output embeddings are one tensor."""
    has_qkv_bias: bool = False
    has_output_bias: bool = False
    """Of the attention."""
    has_mlp_bias: bool = False
    has_qk_norm: bool = False

    @property
    def embedding_parameters(self) -> int:
        """Return the parameters of the input embedding, the largest tensor of the model."""
        return self.vocab * self.hidden

    @property
    def layer_parameters(self) -> int:
        """Return the parameters of one layer."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = self.hidden * (2 * queries + 2 * keys)
        biases = (queries + 2 * keys) * self.has_qkv_bias + self.hidden * self.has_output_bias
        mlp = 3 * self.hidden * self.intermediate
        biases += (2 * self.intermediate + self.hidden) * self.has_mlp_bias
        norms = 2 * self.hidden + 2 * self.head_dim * self.has_qk_norm
        return attention + mlp + biases + norms

    @property
    def root_parameters(self) -> int:
        """Return the parameters of head, or tied embedding, and last norm, which FSDP gathers as one unit."""
        return self.embedding_parameters + self.hidden

    @property
    def parameters(self) -> int:
        """Return the parameters of the whole model."""
        embedding = 0 if self.is_tied else self.embedding_parameters
        return self.layers * self.layer_parameters + self.root_parameters + embedding

    @property
    def matrix_parameters(self) -> int:
        """Return the parameters that multiply every token: all but an input embedding of its own."""
        return self.parameters - (0 if self.is_tied else self.embedding_parameters)

    def kv_bytes(self, bytes_per_number: int) -> int:
        """Return the bytes of keys and values of one token."""
        return 2 * self.layers * self.kv_heads * self.head_dim * bytes_per_number

    def attention_flops(self, length: float) -> float:
        """Return the FLOP of causal attention per token in a forward pass over sequences of this length."""
        return 2.0 * self.layers * self.heads * self.head_dim * length

    def pass_flops(self, length: float) -> float:
        """Return the FLOP of a forward pass per token: 2 per parameter, and attention over such a length."""
        return 2.0 * self.matrix_parameters + self.attention_flops(length)

    def lora_parameters(self, rank: int) -> int:
        """Return the parameters of LoRA adapters of this rank on every matrix of the layers."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = 2 * (self.hidden + queries) + 2 * (self.hidden + keys)
        return self.layers * rank * (attention + 3 * (self.hidden + self.intermediate))


def _qwen(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, **other: Any) -> ModelShape:
    settings: dict[str, Any] = {"vocab": 151936, "is_tied": True, "has_qkv_bias": True, **other}
    return ModelShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=128,
        **settings,
    )


KNOWN_SHAPES = {
    "Qwen/Qwen2.5-1.5B": _qwen(1536, 8960, 28, 12, 2),
    "Qwen/Qwen2.5-3B": _qwen(2048, 11008, 36, 16, 2),
    "Qwen/Qwen2.5-7B": _qwen(3584, 18944, 28, 28, 4, vocab=152064, is_tied=False),
}
"""Models that can be planned without their files; each also with `-Instruct`."""


def read_shape(path: str) -> ModelShape:
    """Return the shape of a model folder or hub id. Raises ConfigError, UnknownShapeError for its subset."""
    known = KNOWN_SHAPES.get(path.removesuffix("-Instruct"))
    if known is not None:
        return known
    try:
        return shape_of(read_model_config(path))
    except ModelNotFoundError as error:
        raise ConfigError(f"actor_rollout_ref.model.path={error}") from error


def shape_of(config: Mapping[str, Any]) -> ModelShape:
    """Return the shape that the content of a config.json states. Raises UnknownShapeError."""
    kind = config.get("model_type")
    if kind not in _KINDS:
        raise UnknownShapeError(
            f"the memory plan knows models of type {', '.join(_KINDS)}; config.json has model_type={kind!r}"
        )
    try:
        hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
        default_head_dim = 128 if kind == "qwen3" else hidden // heads
        has_bias = bool(config.get("attention_bias"))
        return ModelShape(
            vocab=int(config["vocab_size"]),
            hidden=hidden,
            intermediate=int(config["intermediate_size"]),
            layers=int(config["num_hidden_layers"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or default_head_dim),
            is_tied=bool(config.get("tie_word_embeddings", False)),
            has_qkv_bias=kind == "qwen2" or has_bias,
            has_output_bias=kind != "qwen2" and has_bias,
            has_mlp_bias=bool(config.get("mlp_bias")),
            has_qk_norm=kind == "qwen3",
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UnknownShapeError(f"config.json does not state the shape of the model: {error}") from error
