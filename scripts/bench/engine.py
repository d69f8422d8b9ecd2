"""The bare vLLM engine, in a process of its own: an upper bound for the service on top of it.

Its settings, seeds and sampling parameters come from the service's own code.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from IG.config import IGServiceConfig
from IG.sampler import engine_arguments, sampling_params, set_environment

if TYPE_CHECKING:
    from vllm import LLM

_ENGINE: LLM | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What the engine did for a list of prompts."""

    seconds: float
    num_tokens: int
    texts: list[list[str]]


def load(config: IGServiceConfig, cores: int) -> None:
    """Load the engine and run it once."""
    global _ENGINE
    set_environment(config, cores=cores)
    from vllm import LLM

    _ENGINE = LLM(**engine_arguments(config, device="cpu"))
    decode(["Question: 1 + 1?\nAnswer:"], config)


def decode(prompts: Sequence[str], config: IGServiceConfig) -> Decoded:
    """Sample from all prompts at once, as a caller who needs nothing but samples would."""
    assert _ENGINE is not None
    began = time.perf_counter()
    outputs = _ENGINE.generate(
        list(prompts), [sampling_params(config, prompt) for prompt in prompts], use_tqdm=False
    )
    seconds = time.perf_counter() - began
    return Decoded(
        seconds=seconds,
        num_tokens=sum(len(answer.token_ids) for output in outputs for answer in output.outputs),
        texts=[[answer.text.strip() for answer in output.outputs] for output in outputs],
    )
