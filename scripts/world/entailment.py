"""The entailment model: a tiny DeBERTa-v2 that knows which short answers mean the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from random import Random

import torch
from transformers import BertTokenizer, DebertaV2Config, DebertaV2ForSequenceClassification

from world import training
from world.facts import Entity, Kind, random_entity
from world.traces import Scene, draw_problem
from world.training import Schedule

HIDDEN = 96
CONTRADICTION, NEUTRAL, ENTAILMENT = 0, 1, 2
LABELS = {CONTRADICTION: "CONTRADICTION", NEUTRAL: "NEUTRAL", ENTAILMENT: "ENTAILMENT"}
SHARPNESS = 1.75
Pair = tuple[str, str, int]
SHORT_SHARE = 0.4
"""Share of the training that compares bare answers: words are learned to match sooner on short texts."""


def build(tokenizer: BertTokenizer, *, seed: int) -> DebertaV2ForSequenceClassification:
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
        _initialise(model)
    return model


def _initialise(model: DebertaV2ForSequenceClassification) -> None:
    """Start as a comparison of the two texts.

    The two token types are opposite vectors and the first layer's keys see them mirrored, so a word looks for
    itself in the *other* text; its output projection subtracts what it finds. A word with a partner thus ends
    as the bare type vector, one without keeps itself. Every weight is trained on from there.
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
    """Another entity of the same kind; half of them share a word where the kind has two words."""
    scene = Scene(rng)
    while True:
        other = random_entity(entity.kind, rng)
        if rng.random() < 0.5:
            if entity.kind in (Kind.person, Kind.firm):
                other = scene.lookalike(entity)
            elif entity.kind is Kind.award:
                first, _ = entity.name.split()
                same = [random_entity(Kind.award, rng) for _ in range(40)]
                other = next((a for a in same if a.name.startswith(first)), other)
        if other.name != entity.name:
            return other


def wording(entity: Entity, rng: Random) -> str:
    """The entity as a model may write it."""
    words = rng.choice(entity.golds)
    chance = rng.random()
    if chance < 0.12:
        return f"{words}."
    if chance < 0.2:
        return words.lower()
    if chance < 0.28:
        return f"{'by' if entity.kind in (Kind.person, Kind.firm) else 'in'} {words}"
    if chance < 0.34:
        return f"It is {words}."
    return words


def _unrelated(entity: Entity, rng: Random) -> str:
    """Something that is no rival: another kind of thing, a part of a name, or nothing."""
    chance = rng.random()
    if chance < 0.2:
        return ""
    if chance < 0.4 and " " in entity.name:
        return entity.name.split()[0]
    kinds = [kind for kind in Kind if kind not in (entity.kind, Kind.film, Kind.book)]
    return random_entity(rng.choice(kinds), rng).name


def draw_pair(rng: Random, *, asked: float = 0.85) -> Pair:
    """(premise, hypothesis, label); with chance `asked` both begin with the question, as in the service."""
    problem = draw_problem(Scene(rng), hops=1 if rng.random() < 0.5 else 2)
    entity = problem.answer
    chance = rng.random()
    if chance < 0.45:
        left, right, label = wording(entity, rng), wording(entity, rng), ENTAILMENT
    elif chance < 0.88:
        left, right, label = wording(entity, rng), wording(rival(entity, rng), rng), CONTRADICTION
    else:
        left, right, label = wording(entity, rng), _unrelated(entity, rng), NEUTRAL
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
    report: Callable[[int, float], None],
) -> None:
    rng = Random(f"entailment {seed}")

    def next_loss(step: int) -> torch.Tensor:
        short = step < SHORT_SHARE * schedule.steps
        pairs = [draw_pair(rng, asked=0.0 if short else 0.9) for _ in range(128 if short else 64)]
        inputs = tokenizer([p[0] for p in pairs], [p[1] for p in pairs], padding=True, return_tensors="pt")
        labels = torch.tensor([p[2] for p in pairs])
        return torch.nn.functional.cross_entropy(model(**inputs).logits.float(), labels)

    training.train(model, next_loss, schedule, report=report)


@torch.inference_mode()
def entails(
    model: DebertaV2ForSequenceClassification, tokenizer: BertTokenizer, pairs: Sequence[tuple[str, str]]
) -> list[bool]:
    inputs = tokenizer([p[0] for p in pairs], [p[1] for p in pairs], padding=True, return_tensors="pt")
    return [bool(row) for row in model(**inputs).logits.softmax(dim=-1)[:, ENTAILMENT] > 0.5]


def measure(
    model: DebertaV2ForSequenceClassification, tokenizer: BertTokenizer, *, seed: int, count: int = 400
) -> dict[str, float]:
    """Shares of questions whose aliases entail each other both ways, and whose unequal names do not."""
    rng = Random(f"measure entailment {seed}")
    equal: list[tuple[str, str]] = []
    unequal: list[tuple[str, str]] = []
    worded: list[tuple[str, str]] = []
    for _ in range(count):
        problem = draw_problem(Scene(rng), hops=1 + rng.randrange(2))
        name, alias = (f"{problem.question} {gold}" for gold in problem.answer.golds[:2])
        other = f"{problem.question} {rng.choice(rival(problem.answer, rng).golds)}"
        equal += [(name, alias), (alias, name)]
        unequal += [(name, other), (other, name)]
        worded += [(f"{problem.question} {wording(problem.answer, rng)}", name)]

    def both(results: list[bool]) -> list[tuple[bool, bool]]:
        return list(zip(results[::2], results[1::2], strict=True))

    return {
        "aliases_both_ways": sum(a and b for a, b in both(entails(model, tokenizer, equal))) / count,
        "unequal_refused": sum(not (a or b) for a, b in both(entails(model, tokenizer, unequal))) / count,
        "other_wordings": sum(entails(model, tokenizer, worded)) / count,
    }
