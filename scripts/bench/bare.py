"""vLLM and torch alone, in a process of their own, on the work of a training step: its upper bounds."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serving.vllm_rules import cpu_arguments, engine_arguments, prepare_environment
from verl.trainer.config.schema import ActorRolloutRefConfig

if TYPE_CHECKING:
    from vllm import LLM

_ENGINE: LLM | None = None


def load(config: ActorRolloutRefConfig, longest: int) -> None:
    """Load the engine with the settings of the trainer's, for `longest` tokens, and run it once."""
    global _ENGINE
    cores = len(os.sched_getaffinity(0))
    prepare_environment(on_cpu=True, num_threads=max(1, cores // 2), log_level="WARNING")
    from vllm import LLM

    rollout = config.rollout
    settings: dict[str, Any] = engine_arguments(
        model=config.model.path,
        dtype="float32",
        max_model_len=longest,
        max_num_seqs=rollout.max_num_seqs,
    ) | cpu_arguments(
        kv_cache_bytes=int(rollout.cpu_kv_cache_gib * 2**30), longest_prompt=longest, is_sharded=False
    )
    _ENGINE = LLM(**settings)
    decode([([5, 6, 7], 4)])


def decode(requests: Sequence[tuple[Sequence[int], int]]) -> float:
    """Sample as many tokens as each request says, all at once; return the seconds."""
    from vllm import SamplingParams, TokensPrompt

    assert _ENGINE is not None
    params = [
        SamplingParams(temperature=1.0, max_tokens=count, ignore_eos=True, logprobs=0)
        for _, count in requests
    ]
    _ENGINE.reset_prefix_cache()  # repeated requests cost as much as new ones
    began = time.perf_counter()
    _ENGINE.generate(
        [TokensPrompt(prompt_token_ids=list(ids)) for ids, _ in requests], params, use_tqdm=False
    )
    return time.perf_counter() - began


def train(
    rows: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]], config: ActorRolloutRefConfig
) -> float:
    """Take one plain torch step on the rows: forward, loss on the masked tokens, backward, AdamW; seconds."""
    import torch
    from torch.nn.functional import cross_entropy
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(config.model.path, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    limit = config.actor.ppo_max_token_len_per_gpu
    began = time.perf_counter()
    while order:
        width = len(rows[order[0]])
        chosen, order = order[: max(1, limit // width)], order[max(1, limit // width) :]
        ids = torch.zeros(len(chosen), width, dtype=torch.long)
        targets = torch.full((len(chosen), width), -100)
        for line, i in enumerate(chosen):
            ids[line, : len(rows[i])] = torch.tensor(rows[i])
            targets[line, : len(rows[i])] = torch.where(torch.tensor(masks[i]), torch.tensor(rows[i]), -100)
        logits = model(ids, use_cache=False).logits[:, :-1].float()
        cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), reduction="sum").backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return time.perf_counter() - began
