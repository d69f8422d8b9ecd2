"""The entailment model: a cross-encoder made from MiniLM that knows which short answers mean the same."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from transformers import AutoTokenizer, BertForSequenceClassification

from IG.entailment import EntailmentModel
from IG.prompts import entailment_text
from real.pairs import PairSource
from real.questions import Problem
from real.training import Plan, fit
from serving.machine import has_bfloat16
from verl.evaluation.statistics import area_under_curve

HAND_MADE = Path(__file__).with_name("hand_made_pairs.jsonl")
LABELS = {0: "NOT_ENTAILMENT", 1: "ENTAILMENT"}
PLAN = Plan(steps=800, rate=1.5e-4)
_BATCH_SIZE = 32
_FROZEN_LAYERS = 2
_THRESHOLD = 0.5


def train_entailment(
    encoder: Path, problems: Sequence[Problem], *, folder: Path, state: Path, plan: Plan = PLAN
) -> None:
    """Train on pairs of the training questions and write the model to `folder`; continues from `state`.

    Embeddings and the first layers stay as they are: they take half of the time and change little.
    """
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(encoder)
    model = BertForSequenceClassification.from_pretrained(
        encoder, id2label=LABELS, label2id={name: k for k, name in LABELS.items()}, dtype=torch.float32
    )
    frozen = [model.bert.embeddings, *model.bert.encoder.layer[:_FROZEN_LAYERS]]
    for module in frozen:
        module.requires_grad_(False)
    source, in_bfloat16 = PairSource(problems), has_bfloat16()

    def losses(step: int) -> Iterator[torch.Tensor]:
        rng = Random(f"pairs {step}")
        left, right, same = zip(*(source.draw(rng) for _ in range(_BATCH_SIZE)), strict=True)
        inputs = tokenizer(list(left), list(right), padding=True, truncation=True, return_tensors="pt")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bfloat16):
            logits = model(**inputs).logits
        yield torch.nn.functional.cross_entropy(logits.float(), torch.tensor(same, dtype=torch.long))

    fit(model, losses, plan, state=state, title="entailment")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """How a model judged the hand-made pairs."""

    pairs: int
    accuracy: float
    """Of equivalence: entailment in both directions, as the IG service decides."""
    same_found: float
    different_found: float
    auc: float
    """Of the smaller of both probabilities, between pairs that mean the same and others."""
    wrong: tuple[str, ...]


def judge_hand_made(model: Path) -> Judged:
    """Return how the entailment model of a folder judges `hand_made_pairs.jsonl`."""
    rows = [json.loads(line) for line in HAND_MADE.read_text(encoding="utf-8").splitlines()]
    texts = [[entailment_text(row["question"], row[side]) for side in ("left", "right")] for row in rows]
    judge = EntailmentModel.load(str(model), device="cpu", batch_size=32, cpu_threads=1)
    both = judge.probabilities([(a, b) for a, b in texts] + [(b, a) for a, b in texts])
    scores = [float(min(pair)) for pair in zip(both[: len(rows)], both[len(rows) :], strict=True)]
    same = [score for score, row in zip(scores, rows, strict=True) if row["same"]]
    other = [score for score, row in zip(scores, rows, strict=True) if not row["same"]]
    found = sum(score > _THRESHOLD for score in same)
    kept = sum(score <= _THRESHOLD for score in other)
    return Judged(
        pairs=len(rows),
        accuracy=(found + kept) / len(rows),
        same_found=found / len(same),
        different_found=kept / len(other),
        auc=area_under_curve(same, other),
        wrong=tuple(
            f"{row['question']} {row['left']} / {row['right']} ({score:.2f})"
            for score, row in zip(scores, rows, strict=True)
            if (score > _THRESHOLD) != row["same"]
        ),
    )
