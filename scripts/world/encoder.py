"""The text encoder of the dense index: a tiny BERT with mean pooling and E5 prefixes, trained by contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import torch
from transformers import BertConfig, BertModel, BertTokenizer

from world import text, training
from world.facts import Fact
from world.traces import Scene
from world.training import Schedule

HIDDEN = 128
TEMPERATURE = 0.05
BATCH_SIZE = 96


def build(tokenizer: BertTokenizer, *, seed: int) -> BertModel:
    """Return the untrained model.

    Embeddings are large: at the start a text is the sum of its words, which is nearly right already. The
    pooler is not used; it is there so that `AutoModel` loads the folder without a warning.
    """
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=256,
        type_vocab_size=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    model = BertModel(config)
    with torch.no_grad():
        model.embeddings.word_embeddings.weight.normal_(std=1.0)
    return model


def embed(model: BertModel, tokenizer: BertTokenizer, texts: Sequence[str]) -> torch.Tensor:
    """Return mean-pooled, L2-normalized embeddings [N, H] of texts that carry their prefix already."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(pooled, dim=-1)


DrawPairs = Callable[..., tuple[list[str], list[str]]]
"""`(rng, count=N)` returns (queries, passages): passage i answers query i; the rest are hard negatives."""


def draw_pairs(rng: Random, *, count: int) -> tuple[list[str], list[str]]:
    """Return (queries, passages): passage i answers query i; the rest are hard negatives."""
    queries: list[str] = []
    shown: list[str] = []
    hard: list[Fact] = []
    for _ in range(count):
        scene = Scene(rng)
        fact = scene.draw_problem(hops=1).hops[0]
        query = text.query(fact.relation, fact.subject)
        if rng.random() < 0.25:
            query = text.question([fact.relation], fact.subject, wording=rng.randrange(2))
        queries.append(f"query: {query}")
        shown.append(f"passage: {text.write_contents(fact, rng)}")
        hard += scene.retrieve(fact, found=False, topk=2)
    return queries, shown + [f"passage: {text.write_contents(fact, rng)}" for fact in hard]


def train(
    model: BertModel,
    tokenizer: BertTokenizer,
    schedule: Schedule,
    *,
    seed: int,
    draw: DrawPairs = draw_pairs,
) -> None:
    """Train in place with InfoNCE over the passages of the batch."""
    rng = Random(f"encoder {seed}")

    def next_loss(_: int) -> torch.Tensor:
        queries, passages = draw(rng, count=BATCH_SIZE)
        scores = embed(model, tokenizer, queries) @ embed(model, tokenizer, passages).T / TEMPERATURE
        return torch.nn.functional.cross_entropy(scores.float(), torch.arange(len(queries)))

    training.train(model, next_loss, schedule, title="encoder")
