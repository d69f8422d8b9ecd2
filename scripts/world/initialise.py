"""Starting weights that already look back: what makes a tiny model learn to copy in minutes.

Learning to copy needs two layers to cooperate: one tells each position which tokens stand just before it, a
later one finds an earlier position with the same neighbours and copies what follows. From small random
weights most of the training time passes before the first of the two appears. Qwen2 has biases on queries and
keys, and a rotary embedding turns a pair of constant biases into "attend exactly k tokens back", so the first
layer starts that way. Later layers start with output projections that are the transpose of their value
projections (they copy what they attend to), and the output matrix starts as the embedding (but is not tied).
All of it is only a start: every weight is trained.
"""

from __future__ import annotations

import math

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

ROPE_THETA = 1_000_000.0
HIDDEN, HEADS, LAYERS, MLP = 128, 4, 4, 320
OFFSETS = ((1, 2, 3, 4), (1, 5))
"""Per layer, how many tokens back each of its first heads looks."""
SHARPNESS = 6.5
POSITION_PAIRS = 5
"""Rotary pairs (the fastest ones) that carry the offset; the slow ones are left to the content."""


def language_model(tokenizer: Qwen2Tokenizer, *, seed: int, layers: int = LAYERS) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=MLP,
        num_hidden_layers=layers,
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
        _initialise(model)
    return model


def _initialise(model: Qwen2ForCausalLM) -> None:
    hidden = model.config.hidden_size
    embedding = model.model.embed_tokens.weight
    embedding.normal_(std=1.0)
    model.lm_head.weight.copy_(embedding * 0.1)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.normal_(std=0.7 / math.sqrt(hidden))
            projection.bias.zero_()
        attention.v_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(hidden, hidden)))
        attention.v_proj.bias.zero_()
        if index == 0:
            attention.o_proj.weight.copy_(torch.nn.init.orthogonal_(torch.empty(hidden, hidden)))
        else:
            attention.o_proj.weight.copy_(attention.v_proj.weight.T)
        for head, offset in enumerate(OFFSETS[index] if index < len(OFFSETS) else ()):
            _look_back(attention, head=head, offset=offset)
        layer.mlp.gate_proj.weight.normal_(std=1 / math.sqrt(hidden))
        layer.mlp.up_proj.weight.normal_(std=1 / math.sqrt(hidden))
        layer.mlp.down_proj.weight.normal_(std=0.2 / math.sqrt(hidden))


def _look_back(attention: torch.nn.Module, *, head: int, offset: int) -> None:
    size = HIDDEN // HEADS
    start, half = head * size, size // 2
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight[start : start + size].mul_(0.1)
    for pair in range(POSITION_PAIRS):
        angle = offset * ROPE_THETA ** (-pair / half)
        attention.q_proj.bias[start + pair] = SHARPNESS
        attention.k_proj.bias[start + pair] = SHARPNESS * math.cos(angle)
        attention.k_proj.bias[start + half + pair] = SHARPNESS * math.sin(angle)
