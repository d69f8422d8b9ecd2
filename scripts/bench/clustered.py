"""A corpus whose vectors are random but clustered, and the tiny encoder that makes them: any size, one seed.

The encoder is a table: a text's vector is the normalized mean of its words' random vectors. A passage has the
words of its topic and some of its own, so that its neighbors are the passages of its topic. Thus corpus,
encoder and index belong together as real ones do, and the server's checks hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from serving.files import replacing_file

NUM_WORDS = 20_000
TOPIC_WORDS, OWN_WORDS = 6, 10
PASSAGES_PER_TOPIC = 200
_BLOCK = 10_000


def save_encoder(folder: Path, *, dim: int, seed: int) -> None:
    """Write a sentence-transformers folder: mean pooling, unit vectors, 32 tokens."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1} | {_word(number): number + 2 for number in range(NUM_WORDS)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32
    )
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=dim,
        num_hidden_layers=0,
        num_attention_heads=8,
        intermediate_size=8,
        max_position_embeddings=32,
    )
    torch.manual_seed(seed)
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_()
        model.embeddings.position_embeddings.weight.zero_()
        model.embeddings.token_type_embeddings.weight.zero_()
    plain = folder / "plain"
    model.save_pretrained(plain)
    fast.save_pretrained(plain)
    transformer = Transformer(str(plain), max_seq_length=32)
    SentenceTransformer(
        modules=[transformer, Pooling(dim, pooling_mode="mean"), Normalize()], device="cpu"
    ).save(str(folder))


def write_corpus(path: Path, *, size: int, seed: int, report: Callable[[int], None]) -> None:
    """Write one passage a line; `report` gets the number written so far."""
    rng = np.random.default_rng((seed, 1))
    topics = _topics(size, seed=seed)
    with replacing_file(path) as partial, partial.open("w", encoding="utf-8") as lines:
        for start in range(0, size, _BLOCK):
            rows = np.arange(start, min(start + _BLOCK, size))
            own = rng.integers(NUM_WORDS, size=(len(rows), OWN_WORDS))
            for row, numbers in zip(rows, np.hstack([topics[rows % len(topics)], own]), strict=True):
                text = " ".join(map(_word, numbers))
                lines.write(json.dumps({"id": str(row), "contents": f'"{_word(numbers[0])}"\n{text}'}) + "\n")
            report(start + len(rows))


def queries(size: int, *, corpus_seed: int, count: int, seed: int) -> Iterator[str]:
    """Yield distinct questions: most words of a topic of the corpus and a few others."""
    rng = np.random.default_rng((corpus_seed, 2, seed))
    topics = _topics(size, seed=corpus_seed)
    for _ in range(count):
        topic = rng.choice(topics[rng.integers(len(topics))], size=TOPIC_WORDS - 1, replace=False)
        yield " ".join(map(_word, [*topic, *rng.integers(NUM_WORDS, size=OWN_WORDS // 2)]))


def _topics(size: int, *, seed: int) -> npt.NDArray[np.int64]:
    """Return [topics, words]."""
    rng = np.random.default_rng((seed, 0))
    return rng.integers(NUM_WORDS, size=(max(1, size // PASSAGES_PER_TOPIC), TOPIC_WORDS))


def _word(number: int) -> str:
    return f"w{number}"
