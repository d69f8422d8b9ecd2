"""The bare vLLM engine, in a process of its own: the limit of what a service on top of it can reach.

It has the settings, the prompts' seeds and the sampling options of the service, from the service's own code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from IG.sampler import EngineOptions, SamplingOptions, engine_arguments, sampling_params, set_environment

if TYPE_CHECKING:
    from vllm import LLM

_ENGINE: LLM | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What the engine did for a list of prompts."""

    seconds: float
    num_tokens: int
    texts: list[list[str]]


def load(engine: EngineOptions, sampling: SamplingOptions) -> None:
    """Load the engine and run it once."""
    global _ENGINE
    set_environment(engine)
    from vllm import LLM

    _ENGINE = LLM(**engine_arguments(engine, device="cpu"))
    decode(["Question: 1 + 1?\nAnswer:"], sampling)


def decode(prompts: Sequence[str], sampling: SamplingOptions) -> Decoded:
    """All prompts at once, the way a caller who wants nothing but samples would ask."""
    assert _ENGINE is not None
    began = time.perf_counter()
    outputs = _ENGINE.generate(
        list(prompts), [sampling_params(sampling, prompt) for prompt in prompts], use_tqdm=False
    )
    seconds = time.perf_counter() - began
    return Decoded(
        seconds=seconds,
        num_tokens=sum(len(answer.token_ids) for output in outputs for answer in output.outputs),
        texts=[[answer.text.strip() for answer in output.outputs] for output in outputs],
    )
