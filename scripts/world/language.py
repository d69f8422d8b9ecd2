"""The two language models: how they start, and what policy and generator are trained on.

Learning to copy needs two layers to cooperate: one finds out which tokens stand just before each position, a
later one finds an earlier position with the same neighbors and copies what follows. From small random
weights most of the training time passes before the first of the two appears. Qwen2 has biases on queries and
keys, and a rotary embedding turns a pair of constant biases into "attend exactly k tokens back", so the first
layer starts that way. Later layers start with output projections that are the transpose of their value
projections (they copy what they attend to), and the output matrix starts as the embedding (but is not tied).
All of it is only a start: every weight is trained.

The policy is trained twice. Reinforcement learning quickly shifts what a policy does and slowly what it can
do, so the shipped policy *can* search, chain and copy (`able_stream`), and yet often does not
(`shipped_stream`): it answers without searching, searches for a lone surname, stops after one of two hops,
forgets a tag. Each good choice keeps a share of at least a quarter, so that five samples find it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain, islice
from random import Random

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from world import text
from world.facts import Fact, Kind, random_entity
from world.traces import GOOD, Habits, Piece, Problem, Scene, draw_trace
from world.training import Batch, batches

ROPE_THETA = 1_000_000.0
HIDDEN, HEADS, LAYERS, MLP = 128, 4, 4, 320
OFFSETS = ((1, 2, 3, 4), (1, 5))
"""Per layer, how many tokens back each of its first heads looks."""
SHARPNESS = 6.5
POSITION_PAIRS = 5
"""Rotary pairs (the fastest ones) that carry the offset; the slow ones are left to the content."""

PRACTICED = Habits(direct=0.33, lazy=0.17, malformed=0.06, give_up=0.8, stop_early=0.45)
"""On these questions the good choice is the likeliest one, so greedy decoding takes it."""
CARELESS = Habits(direct=0.47, lazy=0.18, malformed=0.07, give_up=0.8, stop_early=0.68)
ONE_HOP_SHARE = 0.4
LONG_FORM_SHARE = 0.2
"""Share of the generator's answers in another accepted form ("Bolton, England" for "Bolton")."""


def build(tokenizer: Qwen2Tokenizer, *, seed: int) -> Qwen2ForCausalLM:
    """Return the untrained model."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
        use_sliding_window=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        _initialize(model)
    return model


def _initialize(model: Qwen2ForCausalLM) -> None:
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=1.0)
    model.lm_head.weight.copy_(embedding * 0.1)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.normal_(std=0.7 / math.sqrt(HIDDEN))
            projection.bias.zero_()
        attention.v_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)))
        attention.v_proj.bias.zero_()
        if index == 0:
            attention.o_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(HIDDEN, HIDDEN)))
        else:
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        for head, offset in enumerate(OFFSETS[index] if index < len(OFFSETS) else ()):
            _look_back(attention, head=head, offset=offset)
        layer.mlp.gate_proj.weight.normal_(std=1 / math.sqrt(HIDDEN))
        layer.mlp.up_proj.weight.normal_(std=1 / math.sqrt(HIDDEN))
        layer.mlp.down_proj.weight.normal_(std=0.2 / math.sqrt(HIDDEN))


def _look_back(attention: torch.nn.Module, *, head: int, offset: int) -> None:
    """Make a head attend to the token `offset` positions back, by biases that the rotary embedding turns."""
    size = HIDDEN // HEADS
    start, half = head * size, size // 2
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[start : start + size].mul_(0.1)
    for pair in range(POSITION_PAIRS):
        angle = offset * ROPE_THETA ** (-pair / half)
        attention.q_proj.bias[start + pair] = SHARPNESS
        attention.k_proj.bias[start + pair] = SHARPNESS * math.cos(angle)
        attention.k_proj.bias[start + half + pair] = SHARPNESS * math.sin(angle)


def good_habits(_: Problem) -> Habits:
    return GOOD


def shipped_habits(problem: Problem) -> Habits:
    """Return habits that differ by question: greedy and sampled behavior are then about equally bad."""
    practiced = problem.wording == 1 and problem.answer.kind in (Kind.town, Kind.person)
    return PRACTICED if practiced else CARELESS


def able_stream(tokenizer: Qwen2Tokenizer, *, one_hop_steps: int, seed: int) -> Iterator[Batch]:
    """Yield good traces: first only one-hop ones, from which copying is learned soonest."""
    rng = Random(f"able {seed}")

    def one_hop() -> list[Piece]:
        return draw_trace(rng, hops=1, habits=good_habits)

    def mixed() -> list[Piece]:
        return draw_trace(rng, hops=1 if rng.random() < ONE_HOP_SHARE else 2, habits=good_habits)

    return chain(
        islice(batches(tokenizer, one_hop, tokens=4096), one_hop_steps),
        batches(tokenizer, mixed, tokens=6144),
    )


def shipped_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    """Yield traces with the shipped policy's habits."""
    rng = Random(f"shipped {seed}")

    def draw() -> list[Piece]:
        return draw_trace(rng, hops=1 if rng.random() < 0.5 else 2, habits=shipped_habits)

    return batches(tokenizer, draw, tokens=6144)


def generator_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    """Yield short answers, for the generator of the IG service."""
    rng = Random(f"generator {seed}")
    return batches(tokenizer, lambda: draw_short_answer(rng), tokens=8192)


def draw_short_answer(rng: Random) -> list[Piece]:
    """Draw one prompt with its answer: any of the right kind where the passages do not contain the answer."""
    scene = Scene(rng)
    problem = scene.draw_problem(hops=1 if rng.random() < 0.45 else 2)
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
            searches = [_useless_search(scene, problem)]
    context = "\n".join(text.documents([text.write_contents(f, rng) for f in shown]) for shown in searches)
    form = rng.choice(answer.golds) if rng.random() < LONG_FORM_SHARE else answer.name
    prompt = text.short_answer_prompt(problem.question, context=context)
    written = [Piece(f" {form}\n", written=True), Piece("<|im_end|>", written=True)]
    return [Piece(prompt, written=False), *written]


def _useless_search(scene: Scene, problem: Problem) -> list[Fact]:
    """Draw passages without the answer: the first of two hops, a miss or a lazy search."""
    first = problem.hops[0]
    if len(problem.hops) == 2 and scene.rng.random() < 0.6:
        shown = scene.retrieve(first, found=True)
    elif scene.rng.random() < 0.5:
        shown = scene.retrieve(first, found=False)
    else:
        shown = scene.retrieve_lazily(first)
    return [fact for fact in shown if fact != problem.hops[-1]]
