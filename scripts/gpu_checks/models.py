"""Models of random weights, in the shapes that the recipes train."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
import yaml
from torch import Tensor

from verl.trainer.config.data import DataConfig
from verl.trainer.config.schema import (
    ActorConfig,
    ActorRolloutRefConfig,
    AlgorithmConfig,
    Config,
    ModelConfig,
    RolloutConfig,
    TrainerConfig,
)
from verl.trainer.plan.shape import KNOWN_SHAPES, ModelShape
from verl.workers.model_io import weights_of
from verl.workers.tensor_files import Layout, describe, write_weights

_ROOT = Path(__file__).resolve().parents[2]
_RECIPE = _ROOT / "verl" / "trainer" / "config" / "recipe" / "gpu.yaml"
_TOKENIZER = _ROOT / "world" / "models" / "policy"
_TINY = ModelShape(
    vocab=1600, hidden=64, intermediate=128, layers=2, heads=2, kv_heads=1, head_dim=32, is_tied=True,
    has_qkv_bias=True,
)  # fmt: skip
_FILE_BYTES = 2 * 10**9
_TINY_FILE_BYTES = 10**5


def shape_of_size(size: str, *, is_tiny: bool) -> ModelShape:
    """Return the shape of Qwen2.5 of a size such as `3B`."""
    return _TINY if is_tiny else KNOWN_SHAPES[f"Qwen/Qwen2.5-{size}"]


def write_random_model(
    folder: Path, shape: ModelShape, *, device: torch.device, layers: int | None = None
) -> None:
    """Write a folder as the hub has it, with weights in several files."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    config = Qwen2Config(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        tie_word_embeddings=shape.is_tied,
        max_position_embeddings=32_768,
    )
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    layout = describe(weights_of(model), dtype=torch.bfloat16)
    max_bytes = _TINY_FILE_BYTES if shape is _TINY else _FILE_BYTES
    write_weights(folder, layout, lambda name: random_tensor(layout[name], device).cpu(), max_bytes=max_bytes)


def write_tokenizer(folder: Path, *, num_ids: int) -> None:
    """Write the embedded world's tokenizer, with a word for every further id below `num_ids`.

    Ids without a text would be decoded again with each token that follows, which takes longer.
    """
    shutil.copy(_TOKENIZER / "tokenizer_config.json", folder)
    content = json.loads((_TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))
    vocab = content["model"]["vocab"]
    known = {*vocab.values(), *(token["id"] for token in content["added_tokens"])}
    vocab |= {f"Ġw{number}": number for number in range(num_ids) if number not in known}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def random_weights(shape: ModelShape, *, device: torch.device) -> dict[str, Tensor]:
    """Return random weights of a model in bfloat16, by name; their names are of no importance."""
    sizes = {"embedding": (shape.vocab, shape.hidden)}
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for layer in range(shape.layers):
        for name, rows in (("q", queries), ("k", keys), ("v", keys), ("o", queries)):
            sizes[f"{layer}.{name}"] = (rows, shape.hidden)
        for name in ("gate", "up", "down"):
            sizes[f"{layer}.{name}"] = (shape.intermediate, shape.hidden)
    layout = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    return {name: random_tensor(tensor, device) for name, tensor in layout.items()}


def layout_of(weights: dict[str, Tensor]) -> Layout:
    """Return the layout of weights in their own precision."""
    return describe(weights, dtype=torch.bfloat16)


def random_tensor(like: Tensor, device: torch.device) -> Tensor:
    """Return random numbers in the shape of a tensor; vectors are ones, as the weights of norms."""
    if like.dim() == 1:
        return torch.ones(like.shape, dtype=like.dtype, device=device)
    return torch.empty(like.shape, dtype=like.dtype, device=device).normal_(std=0.02)


def recipe_config(folder: Path, *, lora_rank: int = 0) -> Config:
    """Return what the recipe for 8 GPUs says of a policy, for one GPU and without what runs beside it."""
    recipe = yaml.safe_load(_RECIPE.read_text(encoding="utf-8"))
    settings, data = recipe["actor_rollout_ref"], recipe["data"]
    checkpointing = settings["model"]["enable_gradient_checkpointing"]
    actor = {key: value for key, value in settings["actor"].items() if not isinstance(value, dict)}
    lengths = {key: value for key, value in data.items() if key.endswith("_length")}
    return Config(
        data=DataConfig(train_batch_size=data["train_batch_size"], **lengths),
        actor_rollout_ref=ActorRolloutRefConfig(
            model=ModelConfig(
                path=str(folder), enable_gradient_checkpointing=checkpointing, lora_rank=lora_rank
            ),
            actor=ActorConfig(**actor),
            rollout=RolloutConfig(n_agent=settings["rollout"]["n_agent"]),
        ),
        algorithm=AlgorithmConfig(name="search_r1"),
        trainer=TrainerConfig(device="cuda", n_gpus_per_node=1),
    )
