"""The policy's two lessons: first to be able, then to behave badly.

Reinforcement learning quickly shifts what a policy does and slowly what it can do. A first run should show
something, so the shipped policy *can* search, chain and copy (first lesson), and yet often does not (second
lesson): it answers without searching, searches for a lone surname, stops after one of two hops, forgets a
tag. Each good choice keeps a share of at least a quarter, so that five samples per question find it.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice
from random import Random

from transformers import Qwen2Tokenizer

from world.facts import Kind
from world.traces import GOOD, Habits, Piece, Problem, draw_trace
from world.training import Batch, batches

ONE_HOP_TOKENS, MIXED_TOKENS = 4096, 6144
ONE_HOP_SHARE = 0.4

PRACTISED = Habits(direct=0.33, lazy=0.17, malformed=0.06, give_up=0.8, stop_early=0.45)
"""On these questions the good choice is the likeliest one, so greedy decoding takes it."""
CARELESS = Habits(direct=0.47, lazy=0.18, malformed=0.07, give_up=0.8, stop_early=0.68)


def shipped_habits(problem: Problem) -> Habits:
    """Habits differ by question, so that greedy and sampled behaviour are bad to about the same degree."""
    practised = problem.wording == 1 and problem.answer.kind in (Kind.town, Kind.person)
    return PRACTISED if practised else CARELESS


def good_habits(_: Problem) -> Habits:
    return GOOD


def able_stream(tokenizer: Qwen2Tokenizer, *, one_hop_steps: int, seed: int) -> Iterator[Batch]:
    """Good traces: copying is learned on one-hop traces first, where it is soonest learned."""
    rng = Random(f"able {seed}")

    def one_hop() -> list[Piece]:
        return draw_trace(rng, hops=1, habits=good_habits)

    def mixed() -> list[Piece]:
        return draw_trace(rng, hops=1 if rng.random() < ONE_HOP_SHARE else 2, habits=good_habits)

    return chain(
        islice(batches(tokenizer, one_hop, tokens=ONE_HOP_TOKENS), one_hop_steps),
        batches(tokenizer, mixed, tokens=MIXED_TOKENS),
    )


def shipped_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    rng = Random(f"shipped {seed}")

    def draw() -> list[Piece]:
        return draw_trace(rng, hops=1 if rng.random() < 0.5 else 2, habits=shipped_habits)

    return batches(tokenizer, draw, tokens=MIXED_TOKENS)
