"""The text encoder of the dense index: a tiny BERT with mean pooling and E5 prefixes, trained by contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import BertConfig, BertModel, BertTokenizer

from world import text, training
from world.facts import Fact
from world.traces import Scene, draw_problem
from world.training import Schedule

HIDDEN = 128
TEMPERATURE = 0.05


def build(tokenizer: BertTokenizer, *, seed: int) -> BertModel:
    """Embeddings are large: at the start a text is the sum of its words, which is nearly right already.

    The pooler is not used; it is there so that `AutoModel` loads the folder without a complaint.
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
    """Mean-pooled, L2-normalised embeddings [N, H] of texts that carry their prefix already."""
    inputs = tokenizer(list(texts), padding=True, truncation=True, max_length=128, return_tensors="pt")
    hidden = model(**inputs).last_hidden_state
    mask = inputs["attention_mask"][..., None]
    pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
    return torch.nn.functional.normalize(pooled, dim=-1)


def _contrast(rng: Random, *, count: int) -> tuple[list[str], list[str]]:
    """(queries, passages): passage i answers query i; neighbours of every fact are the hard negatives."""
    queries: list[str] = []
    shown: list[str] = []
    hard: list[Fact] = []
    for _ in range(count):
        scene = Scene(rng)
        fact = draw_problem(scene, hops=1).hops[0]
        worded = rng.random() < 0.25
        query = (
            text.one_hop_question(fact.relation, fact.subject, wording=rng.randrange(2))
            if worded
            else text.query(fact.relation, fact.subject)
        )
        queries.append(f"query: {query}")
        shown.append(f"passage: {text.passage(fact, rng).contents}")
        hard += scene.retrieve(fact, found=False, topk=2)
    return queries, shown + [f"passage: {text.passage(fact, rng).contents}" for fact in hard]


def train(
    model: BertModel,
    tokenizer: BertTokenizer,
    schedule: Schedule,
    *,
    seed: int,
    report: Callable[[int, float], None],
) -> None:
    rng = Random(f"encoder {seed}")

    def next_loss(_: int) -> torch.Tensor:
        queries, passages = _contrast(rng, count=96)
        scores = embed(model, tokenizer, queries) @ embed(model, tokenizer, passages).T / TEMPERATURE
        return torch.nn.functional.cross_entropy(scores.float(), torch.arange(len(queries)))

    training.train(model, next_loss, schedule, report=report)


class Index:
    """Exact inner-product search over a corpus, as the flat index of the retriever does it."""

    def __init__(self, model: BertModel, tokenizer: BertTokenizer, passages: Sequence[text.Passage]) -> None:
        self.model, self.tokenizer, self.passages = model, tokenizer, list(passages)
        texts = [f"passage: {passage.contents}" for passage in passages]
        self.vectors = np.concatenate([self._embed(texts[i : i + 256]) for i in range(0, len(texts), 256)])

    def _embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return embed(self.model, self.tokenizer, texts).numpy()

    def search(self, queries: Sequence[str], *, topk: int = 3) -> list[list[text.Passage]]:
        if not queries:
            return []
        scores = self._embed([f"query: {query}" for query in queries]) @ self.vectors.T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :topk]
        return [[self.passages[index] for index in row] for row in best]


def measure(index: Index, facts: Sequence[Fact], *, seed: int) -> dict[str, float]:
    """Rank-1 share of good queries; top-3 share of the lazy ones."""
    rng = Random(f"measure {seed}")
    chosen = rng.sample(list(facts), min(400, len(facts)))

    def share(make: Callable[[Fact], str], topk: int) -> float:
        found = index.search([make(fact) for fact in chosen], topk=topk)
        starts = [f"The {f.relation.name} of {f.subject.name} is " for f in chosen]
        hits = [any(p.body.startswith(start) for p in row) for start, row in zip(starts, found, strict=True)]
        return sum(hits) / len(hits)

    return {
        "good_query_rank1": share(lambda f: text.query(f.relation, f.subject), 1),
        "question_rank1": share(lambda f: text.one_hop_question(f.relation, f.subject, wording=0), 1),
        "last_word_top3": share(lambda f: f.subject.name.split()[-1], 3),
        "relation_only_top3": share(lambda f: f.relation.name, 3),
        "subject_only_top3": share(lambda f: f.subject.name, 3),
    }
