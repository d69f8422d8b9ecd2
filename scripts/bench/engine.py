"""The bare vLLM engine, in a process of its own: the limit of what a service on top of it can reach."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm import LLM

_ENGINE: LLM | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoded:
    """What the engine did for a list of prompts."""

    seconds: float
    num_tokens: int
    texts: list[list[str]]


def load(model: str, max_num_seqs: int, cpu_threads: int) -> None:
    """Load the engine with the settings of the service's."""
    global _ENGINE
    os.environ |= {
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(cpu_threads),
    }
    from vllm import LLM

    _ENGINE = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        max_num_seqs=max_num_seqs,
        kv_cache_memory_bytes=2**29,
        block_size=32,
        enable_chunked_prefill=False,
        max_num_batched_tokens=4096,
        enable_prefix_caching=True,
        generation_config="vllm",
        disable_log_stats=True,
    )
    decode(["Question: 1 + 1?\nAnswer:"], [0], num_answers=2, max_new_tokens=2, stop=["\n"])


def decode(
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    num_answers: int,
    max_new_tokens: int,
    stop: Sequence[str],
) -> Decoded:
    """All prompts at once, the way a caller who wants nothing but samples would ask."""
    from vllm import SamplingParams

    assert _ENGINE is not None
    began = time.perf_counter()
    outputs = _ENGINE.generate(
        list(prompts),
        [
            SamplingParams(
                n=num_answers,
                temperature=1.0,
                max_tokens=max_new_tokens,
                seed=seed,
                stop=list(stop),
                logprobs=0,
            )
            for seed in seeds
        ],
        use_tqdm=False,
    )
    seconds = time.perf_counter() - began
    return Decoded(
        seconds=seconds,
        num_tokens=sum(len(answer.token_ids) for output in outputs for answer in output.outputs),
        texts=[[answer.text.strip() for answer in output.outputs] for output in outputs],
    )
