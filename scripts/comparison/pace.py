"""How fast a core of this machine is, so that runs of different machines can be compared in seconds."""

from __future__ import annotations

import statistics
import time
from functools import cache

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

STANDARD_S = 0.2
"""Reported seconds are those of a core that takes so long for the pass."""
_PASSES = 5
_SHAPE = (8, 256)


def measure_pace() -> float:
    """Return the processor seconds of a fixed piece of work: the median of five training passes.

    A pass is forward and backward over 8 x 256 tokens of a model as large as the policies of the worlds: the
    same mixture of small matrix products and calls as a training step. What else this machine does slows it
    as it slows a run, so time it shortly before or after the run.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2ForCausalLM(
            Qwen2Config(
                vocab_size=1600,
                hidden_size=128,
                intermediate_size=320,
                num_hidden_layers=4,
                num_attention_heads=4,
                num_key_value_heads=4,
            )
        )
        ids = torch.randint(1600, _SHAPE)
    seconds = []
    for _ in range(_PASSES + 1):
        began = time.process_time()
        model(input_ids=ids, labels=ids).loss.backward()
        seconds.append(time.process_time() - began)
    return statistics.median(seconds[1:])  # the first one allocates


@cache
def machine_pace() -> float:
    """Return the pace of this machine, measured once, for estimates."""
    return measure_pace()
