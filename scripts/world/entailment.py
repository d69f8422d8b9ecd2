"""The entailment model: a tiny DeBERTa-v2 that knows which short answers mean the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random
from statistics import fmean

import torch
from transformers import BertTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

from world import training
from world.asking import Answer
from world.facts import Entity, Kind, random_entity
from world.traces import Scene
from world.training import Schedule

HIDDEN = 96
CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
LABELS = {CONTRADICTION: "CONTRADICTION", NEUTRAL: "NEUTRAL", ENTAILMENT: "ENTAILMENT"}
SHARPNESS = 1.75
SHORT_SHARE = 0.4
"""Share of the training that compares bare answers: words are learned to match sooner on short texts."""


def build(tokenizer: BertTokenizer, *, seed: int) -> DebertaV2ForSequenceClassification:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = DebertaV2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=192,
        max_position_embeddings=256,
        type_vocab_size=2,
        relative_attention=True,
        max_relative_positions=64,
        position_buckets=32,
        pos_att_type=["p2c", "c2p"],
        share_att_key=True,
        norm_rel_ebd="layer_norm",
        position_biased_input=False,
        pooler_hidden_size=HIDDEN,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pooler_dropout=0.0,
        cls_dropout=0.0,
        pad_token_id=tokenizer.pad_token_id,
        id2label=LABELS,
        label2id={name: index for index, name in LABELS.items()},
        dtype="float32",
    )
    model = DebertaV2ForSequenceClassification(config)
    with torch.no_grad():
        _initialize(model)
    return model


def _initialize(model: DebertaV2ForSequenceClassification) -> None:
    """Set the weights so that the model starts as a comparison of the two texts.

    The two token types are opposite vectors and the first layer's keys are mirrored, so a word attends to
    itself in the *other* text, and the output projection subtracts what is found there. A word with a partner
    becomes the bare type vector, one without stays as it is. Every weight is trained from there.
    """
    embeddings = model.deberta.embeddings
    embeddings.word_embeddings.weight.normal_(std=1.0)
    side = torch.randn(HIDDEN)
    embeddings.token_type_embeddings.weight.copy_(torch.stack([side, -side]))
    mirror = torch.eye(HIDDEN) - 2 * torch.outer(side, side) / side.dot(side)
    encoder = model.deberta.encoder
    encoder.LayerNorm.weight.fill_(0.1)
    for index, layer in enumerate(encoder.layer):
        attention, output = layer.attention.self, layer.attention.output.dense
        attention.query_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)) * SHARPNESS)
        attention.value_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)))
        if index == 0:
            attention.key_proj.weight.copy_(attention.query_proj.weight @ mirror)
            output.weight.copy_(-attention.value_proj.weight.T)
        else:
            attention.query_proj.weight.mul_(0.3)
            attention.key_proj.weight.copy_(attention.query_proj.weight)
            output.weight.normal_(std=0.5 / math.sqrt(HIDDEN))
        layer.intermediate.dense.weight.normal_(std=1 / math.sqrt(HIDDEN))


def rival(entity: Entity, rng: Random) -> Entity:
    """Return another entity of the same kind; half of them share a word where the kind has two words."""
    scene = Scene(rng)
    while True:
        other = random_entity(entity.kind, rng)
        if rng.random() < 0.5:
            if entity.kind in (Kind.person, Kind.firm):
                other = scene.lookalike(entity)
            elif entity.kind is Kind.award:
                first, _ = entity.name.split()
                drawn = [random_entity(Kind.award, rng) for _ in range(40)]
                other = next((award for award in drawn if award.name.startswith(first)), other)
        if other.name != entity.name:
            return other


def wording(entity: Answer, rng: Random) -> str:
    """Return the entity as a model may write it."""
    words = rng.choice(entity.golds)
    chance = rng.random()
    if chance < 0.12:
        return f"{words}."
    if chance < 0.2:
        return words.lower()
    if chance < 0.28:
        return f"{'by' if entity.kind in (Kind.person, Kind.firm) else 'in'} {words}"
    return f"It is {words}." if chance < 0.34 else words


def _unrelated(entity: Entity, rng: Random) -> str:
    """Return a text that is not an alternative: another kind of entity, a part of the name, or nothing."""
    chance = rng.random()
    if chance < 0.2:
        return ""
    if chance < 0.4 and " " in entity.name:
        return entity.name.split()[0]
    kinds = [kind for kind in Kind if kind not in (entity.kind, Kind.film, Kind.book)]
    return random_entity(rng.choice(kinds), rng).name


DrawPair = Callable[..., tuple[str, str, int]]
"""`(rng, asked=P)` returns (premise, hypothesis, label)."""


def draw_pair(rng: Random, *, asked: float) -> tuple[str, str, int]:
    """Return (premise, hypothesis, label); with probability `asked` both begin with the question."""
    problem = Scene(rng).draw_problem(hops=1 if rng.random() < 0.5 else 2)
    entity = problem.answer
    chance = rng.random()
    left = wording(entity, rng)
    if chance < 0.45:
        right, label = wording(entity, rng), ENTAILMENT
    elif chance < 0.88:
        right, label = wording(rival(entity, rng), rng), CONTRADICTION
    else:
        right, label = _unrelated(entity, rng), NEUTRAL
    if rng.random() < 0.5:
        left, right = right, left
    if rng.random() < asked:
        left, right = f"{problem.question} {left}", f"{problem.question} {right}"
    return left, right, label


def train(
    model: DebertaV2ForSequenceClassification,
    tokenizer: BertTokenizer,
    schedule: Schedule,
    *,
    seed: int,
    draw: DrawPair = draw_pair,
) -> None:
    """Train in place, first on bare answers, then on answers behind their question, as in the service."""
    rng = Random(f"entailment {seed}")

    def next_loss(step: int) -> torch.Tensor:
        short = step < SHORT_SHARE * schedule.steps
        pairs = [draw(rng, asked=0.0 if short else 0.9) for _ in range(128 if short else 64)]
        scored = logits(model, tokenizer, [(left, right) for left, right, _ in pairs])
        return torch.nn.functional.cross_entropy(scored.float(), torch.tensor([p[2] for p in pairs]))

    training.train(model, next_loss, schedule, title="entailment")


def logits(
    model: DebertaV2ForSequenceClassification, tokenizer: BertTokenizer, pairs: Sequence[tuple[str, str]]
) -> torch.Tensor:
    """Return the logits [N, 3] of (premise, hypothesis) pairs."""
    left, right = map(list, zip(*pairs, strict=True))
    return model(**tokenizer(left, right, padding=True, return_tensors="pt")).logits


@torch.inference_mode()
def entails(
    model: DebertaV2ForSequenceClassification, tokenizer: BertTokenizer, pairs: Sequence[tuple[str, str]]
) -> list[bool]:
    """Return for each pair whether the premise entails the hypothesis."""
    return (logits(model, tokenizer, pairs).softmax(dim=-1)[:, ENTAILMENT] > 0.5).tolist()


def measure(
    model: DebertaV2ForSequenceClassification, tokenizer: BertTokenizer, *, seed: int, count: int = 400
) -> dict[str, float]:
    """Return the shares of answers whose forms entail each other both ways, and whose rivals never do."""
    rng = Random(f"measure entailment {seed}")
    equal: list[tuple[str, str]] = []
    unequal: list[tuple[str, str]] = []
    worded: list[tuple[str, str]] = []
    for _ in range(count):
        problem = Scene(rng).draw_problem(hops=1 + rng.randrange(2))
        name, alias = (f"{problem.question} {gold}" for gold in problem.answer.golds)
        other = f"{problem.question} {rng.choice(rival(problem.answer, rng).golds)}"
        equal += [(name, alias), (alias, name)]
        unequal += [(name, other), (other, name)]
        worded += [(f"{problem.question} {wording(problem.answer, rng)}", name)]
    same, different = entails(model, tokenizer, equal), entails(model, tokenizer, unequal)
    return {
        "aliases_both_ways": fmean(a and b for a, b in zip(same[::2], same[1::2], strict=True)),
        "unequal_refused": fmean(not (a or b) for a, b in zip(different[::2], different[1::2], strict=True)),
        "other_wordings": fmean(entails(model, tokenizer, worded)),
    }
