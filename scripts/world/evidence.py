"""The judge of evidence: an entailment model that also knows whether passages support an answer.

`siop` asks whether what an episode has read entails its answer. The model of a world's IG service compares
short answers alone; this one continues from it, on pairs of both kinds.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from pathlib import Path
from random import Random
from statistics import fmean

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertTokenizer,
    DebertaV2ForSequenceClassification,
)

from verl.evaluation.statistics import area_under_curve
from world import entailment, making, text, training
from world.entailment import CONTRADICTION, ENTAILMENT, NEUTRAL, DrawPair
from world.facts import random_entity, relations_of
from world.traces import Scene
from world.training import Schedule

POSITIONS = 640
"""Longest pair in tokens: the passages of six searches."""


class Premise(Enum):
    """What is read. Training begins with short texts, from which matching words is learned sooner."""

    passage = "the passage with the answer"
    search = "the search that found it"
    episode = "all of an episode"


LESSONS = ((Premise.passage, 0.3, 48), (Premise.search, 0.52, 32), (Premise.episode, 1.0, 20))
"""What is read, until which share of the training, and pairs in a batch."""
SHORT_SHARE, SHORT_BATCH = 0.2, 64
"""Share of the batches with pairs of short answers, so that these are not unlearned, and pairs in one."""
MEASURED_AT_ONCE = 25

DrawEvidence = Callable[[Random, Premise], tuple[str, str, int]]
"""Returns (passages, question and answer, label)."""


def draw_pair(rng: Random, premise: Premise) -> tuple[str, str, int]:
    """Return (passages, question and answer, label); an episode has found all, a part or another fact."""
    scene = Scene(rng)
    problem = scene.draw_problem(hops=1 if rng.random() < 0.45 else 2)
    answer, chance = problem.answer, rng.random()
    is_episode, is_passage = premise is Premise.episode, premise is Premise.passage
    if not is_episode or chance < 0.6:
        found = problem.hops if is_episode else problem.hops[-1:]
        searches = [[fact] if is_passage else scene.retrieve(fact, found=True) for fact in found]
        label = ENTAILMENT
        if rng.random() < 0.45:
            label, named = CONTRADICTION, [fact.value for shown in searches for fact in shown]
            rivals = [value for value in named if value.kind is answer.kind and value != answer]
            answer = rng.choice(rivals) if rivals and rng.random() < 0.7 else entailment.rival(answer, rng)
    else:
        label, first = NEUTRAL, problem.hops[0]
        if chance < 0.8 and len(problem.hops) == 2:
            searches = [scene.retrieve(first, found=True)]
        else:
            own = [r for r in relations_of(first.subject.kind) if r != first.relation]
            other = scene.fact(rng.choice(own), first.subject) if own else first
            searches = [scene.retrieve(other, found=other is not first)]
        answer = rng.choice([answer, random_entity(answer.kind, rng), searches[0][0].value])
    if is_episode and rng.random() < 0.15:
        searches.insert(rng.randrange(len(searches) + 1), scene.retrieve_lazily(problem.hops[0]))
    if label == NEUTRAL:  # by chance a search shows the fact
        searches = [[fact for fact in shown if fact != problem.hops[-1]] for shown in searches]
    context = "\n".join(text.documents([text.write_contents(f, rng) for f in shown]) for shown in searches)
    return context, f"{problem.question} {entailment.wording(answer, rng)}", label


def load_start(folder: Path) -> tuple[DebertaV2ForSequenceClassification, BertTokenizer]:
    """Return the model to train on, with room for passages; its positions are relative."""
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, dtype=torch.float32, max_position_embeddings=POSITIONS
    )
    return model, AutoTokenizer.from_pretrained(folder, model_max_length=POSITIONS)


def save(model: DebertaV2ForSequenceClassification, words: BertTokenizer, folder: Path) -> None:
    """Write the model in bfloat16, which halves what a world ships."""
    making.save(model.to(torch.bfloat16), words, folder)


def train(
    model: DebertaV2ForSequenceClassification,
    tokenizer: BertTokenizer,
    schedule: Schedule,
    *,
    seed: int,
    draw: DrawEvidence = draw_pair,
    draw_short: DrawPair = entailment.draw_pair,
) -> None:
    """Train in place; `draw_short` draws pairs of short answers."""
    rng = Random(f"evidence {seed}")

    def next_loss(step: int) -> torch.Tensor:
        if rng.random() < SHORT_SHARE:
            pairs = [draw_short(rng, asked=0.9) for _ in range(SHORT_BATCH)]
        else:
            premise, size = next((what, size) for what, end, size in LESSONS if step < end * schedule.steps)
            pairs = [draw(rng, premise) for _ in range(size)]
        scored = entailment.logits(model, tokenizer, [(left, right) for left, right, _ in pairs])
        return torch.nn.functional.cross_entropy(scored.float(), torch.tensor([p[2] for p in pairs]))

    training.train(model, next_loss, schedule, title="evidence")


@torch.inference_mode()
def measure(folder: Path, *, seed: int, count: int = 300, draw: DrawEvidence = draw_pair) -> dict[str, float]:
    """Return the AUC of P(entailment) for supported answers against the rest, and its means."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    words = AutoTokenizer.from_pretrained(folder)
    rng = Random(f"measure evidence {seed}")
    pairs = [draw(rng, Premise.episode) for _ in range(count)]
    batches = [pairs[start : start + MEASURED_AT_ONCE] for start in range(0, count, MEASURED_AT_ONCE)]
    scored = [entailment.logits(model, words, [pair[:2] for pair in batch]) for batch in batches]
    entailed = torch.cat(scored).softmax(dim=-1)[:, ENTAILMENT].tolist()
    supported, contradicted, other = (
        [value for value, pair in zip(entailed, pairs, strict=True) if pair[-1] == label]
        for label in (ENTAILMENT, CONTRADICTION, NEUTRAL)
    )
    return {
        "auc": area_under_curve(supported, contradicted + other),
        "auc_against_contradicted": area_under_curve(supported, contradicted),
        "supported_mean": fmean(supported),
        "contradicted_mean": fmean(contradicted),
        "other_mean": fmean(other),
    }
