"""Traces of the short-answer prompt, for the generator of the IG service, and what it believes afterwards."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from world import text
from world.encoder import Index
from world.facts import Entity, Fact, random_entity
from world.traces import Piece, Problem, Scene, draw_problem

LONG_FORM_SHARE = 0.2
"""Share of answers in another accepted form ("Bolton, England" for "Bolton")."""


def draw_short_answer(rng: Random) -> list[Piece]:
    """One prompt with its answer; where the passages do not tell, any answer of the right kind is as good."""
    scene = Scene(rng)
    problem = draw_problem(scene, hops=1 if rng.random() < 0.45 else 2)
    chance = rng.random()
    searches: list[list[Fact]] = []
    answer = problem.answer
    if chance < 0.72:
        searches = [scene.retrieve(fact, found=True) for fact in problem.hops]
        if rng.random() < 0.1:
            searches.insert(0, scene.retrieve_lazily(problem.hops[0]))
    else:
        answer = random_entity(answer.kind, rng)
        if chance < 0.92:
            searches = _useless_searches(scene, problem)
    context = "\n".join(text.documents([text.passage(f, rng) for f in shown]) for shown in searches)
    form = rng.choice(answer.golds) if rng.random() < LONG_FORM_SHARE else answer.name
    prompt = text.short_answer_prompt(problem.question, context=context)
    return [
        Piece(prompt, written=False),
        Piece(f" {form}\n", written=True),
        Piece("<|im_end|>", written=True),
    ]


def _useless_searches(scene: Scene, problem: Problem) -> list[list[Fact]]:
    """Passages that do not tell the answer: a miss, a lazy search, or only the first of two hops."""
    first = problem.hops[0]
    searches = []
    if len(problem.hops) == 2 and scene.rng.random() < 0.6:
        searches.append(scene.retrieve(first, found=True))
    elif scene.rng.random() < 0.5:
        searches.append(scene.retrieve(first, found=False))
    else:
        searches.append(scene.retrieve_lazily(first))
    return [[fact for fact in shown if fact != problem.hops[-1]] for shown in searches]


@torch.inference_mode()
def belief(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, question: str, answer: Entity, *, context: str
) -> float:
    """Probability that the model gives the answer in one of its accepted forms (exact, no sampling)."""
    prompt = tokenizer.encode(text.short_answer_prompt(question, context=context), add_special_tokens=False)
    forms = [tokenizer.encode(f" {gold}\n", add_special_tokens=False) for gold in answer.golds]
    longest = max(len(form) for form in forms)
    ids = torch.tensor([prompt + form + [tokenizer.pad_token_id] * (longest - len(form)) for form in forms])
    log_probs = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(dim=-1)
    total = 0.0
    for row, form in zip(log_probs, forms, strict=True):
        total += float(row[range(len(form)), form].sum().exp())
    return total


def measure(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, index: Index, problems: Sequence[Problem]
) -> dict[str, float]:
    """Mean belief in the right answer with all, with some and with no passages of the good searches."""
    beliefs: dict[str, list[float]] = {}
    for problem in problems:
        found = index.search([text.query(fact.relation, fact.subject) for fact in problem.hops])
        shown = [text.documents(passages) for passages in found]
        hops = "one_hop" if len(problem.hops) == 1 else "two_hop"
        contexts = {"none": "", "all": "\n".join(shown)}
        if hops == "two_hop":
            contexts["first_only"] = shown[0]
        for name, context in contexts.items():
            value = belief(model, tokenizer, problem.question, problem.answer, context=context)
            beliefs.setdefault(f"belief_{hops}_{name}", []).append(value)
    return {name: sum(values) / len(values) for name, values in sorted(beliefs.items())}
