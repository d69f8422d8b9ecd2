"""Folders of tiny random models, in the layouts that published encoders and rerankers come in."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
)

DIM = 16
WORDS = [
    "query",
    "passage",
    ":",
    "a",
    "the",
    "cat",
    "sat",
    "old",
    "ship",
    "lies",
    "in",
    "harbour",
    "river",
    "flows",
]


def save_tokenizer(
    folder: Path,
    *,
    words: Sequence[str] = WORDS,
    padding_side: str = "right",
    model_max_length: int = 64,
) -> int:
    """Words as tokens; returns how many tokens there are."""
    vocabulary = {word: row for row, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        padding_side=padding_side,
        model_max_length=model_max_length,
    ).save_pretrained(folder)
    return len(vocabulary)


def save_transformer(folder: Path, *, seed: int = 0) -> Path:
    """A plain transformer, which says nothing of prefixes and pooling."""
    save_tokenizer(folder)
    torch.manual_seed(seed)
    BertModel(_config()).save_pretrained(folder)
    return folder


def save_decoder(folder: Path) -> Path:
    """As Qwen3-Embedding: each token sees those before it, positions are relative, padding is on the left."""
    save_tokenizer(folder, padding_side="left")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=4 + len(WORDS),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        pad_token_id=0,
    )
    Qwen3Model(config).save_pretrained(folder)
    return folder


def save_without_length(folder: Path) -> Path:
    """A T5 encoder, which has no limit of positions, and a tokenizer that states none."""
    save_tokenizer(folder, model_max_length=10**30)
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=4 + len(WORDS), d_model=DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2, pad_token_id=0
    )
    T5EncoderModel(config).save_pretrained(folder)
    return folder


def save_cross_encoder(folder: Path, *, seed: int = 0, num_labels: int = 1, **settings: object) -> Path:
    """A sequence classifier over pairs."""
    save_tokenizer(folder)
    torch.manual_seed(seed)
    BertForSequenceClassification(_config(num_labels=num_labels, **settings)).save_pretrained(folder)
    return folder


def _config(**settings: object) -> BertConfig:
    return BertConfig(
        vocab_size=4 + len(WORDS),
        hidden_size=DIM,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.5,
        hidden_dropout_prob=0.5,
        **settings,
    )


def describe_sentence_encoder(
    folder: Path,
    *,
    pooling: Mapping[str, object] | None = None,
    normalized: bool = True,
    prompts: Mapping[str, str | None] | None = None,
    max_seq_length: int | None = None,
    further: Sequence[str] = (),
    **settings: object,
) -> Path:
    """Write what sentence-transformers writes beside a transformer; `settings` go into its configuration."""
    kinds = ["Transformer", "Pooling", *further, *(["Normalize"] if normalized else [])]
    places = ["", *(f"{number}_{kind}" for number, kind in enumerate(kinds) if number)]
    entries = [
        {"idx": number, "name": str(number), "path": place, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, place) in enumerate(zip(kinds, places, strict=True))
    ]
    write_json(folder / "modules.json", entries)
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": DIM, **(pooling or {})})
    facts: dict[str, object] = {"__version__": {"sentence_transformers": "2.0.0"}, **settings}
    write_json(
        folder / "config_sentence_transformers.json",
        facts if prompts is None else facts | {"prompts": prompts},
    )
    if max_seq_length is not None:
        write_json(folder / "sentence_bert_config.json", {"max_seq_length": max_seq_length})
    return folder


def save_dense(folder: Path, *, seed: int, out_features: int = 8) -> dict[str, torch.Tensor]:
    """A projection of the pooled vector; returns its weights."""
    torch.manual_seed(seed)
    weights = {"linear.weight": torch.randn(out_features, DIM), "linear.bias": torch.randn(out_features)}
    activation = "torch.nn.modules.linear.Identity"
    write_json(
        folder / "config.json",
        {"in_features": DIM, "out_features": out_features, "bias": True, "activation_function": activation},
    )
    save_file(weights, folder / "model.safetensors")
    return weights


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
