"""Sample short answers with their log-probs; the only file of `IG` that imports vLLM.

The samples of a prompt depend only on the prompt, the sampling settings and the service seed, not on the
batch or on earlier requests. So equal prompts share their samples, and a score can be reproduced.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Protocol

from IG.config import IGServiceConfig
from IG.frames import make_frame
from IG.prompts import STOP_STRINGS
from serving import vllm_rules
from serving.encoding import TextEncoder
from serving.processes import ProcessGuard, list_multiprocessing_children
from serving.vllm_rules import (
    PLAIN_SAMPLING,
    collection_paused,
    cpu_arguments,
    prepare_environment,
    sampled_log_probs,
)
from serving.web.loading import load_in_thread

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
    from vllm.outputs import CompletionOutput
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.async_llm import AsyncLLM


_SHORT_PROMPT_CHARS = 20_000
"""Tokenized on the event loop, within milliseconds; longer prompts in a thread."""
_MAX_CHARS_PER_TOKEN = 100
"""Text has 2 to 5; a prompt with more than this per allowed token is refused without tokenizing it."""
_MAX_LEADING_BREAKS = 8
"""Most line breaks before an answer; each takes a request to the engine."""


class SamplingError(RuntimeError):
    """This prompt could not be sampled from; others may succeed."""


class PoisonedError(SamplingError):
    """Two workers were lost while they had this item; it is quarantined."""


class EngineLostError(RuntimeError):
    """The engine process is gone, and its requests with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledAnswer:
    """One sampled answer."""

    text: str
    """Stripped, also of leading line breaks; without the stop string; possibly empty."""
    mean_log_prob: float
    """Mean log-prob, at temperature 1, of the tokens that write the answer."""
    num_tokens: int
    """Number of those tokens, at least 1."""


class AnswerSampler(Protocol):
    """Sample answers to one prompt."""

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return the same answers for the same prompt. Raises SamplingError."""
        ...


def prompt_seed(service_seed: int, prompt: str) -> int:
    """Return the seed of the first sample of a prompt; the engine counts up from it for the others."""
    digest = hashlib.sha256(f"{service_seed}\x00{prompt}".encode()).digest()
    return int.from_bytes(digest[:6], "big")


def answer_length(token_ids: Sequence[int], text: str, *, tokenizer: PreTrainedTokenizerBase) -> int:
    """Return how many leading tokens write the answer: the shortest prefix with its whole text, at least one.

    The sampled tokens end with the stop string or the end-of-sequence token, which are not part of the answer
    or its likelihood. An empty answer keeps one token: how likely it was to say nothing.
    """
    wanted = len(text.rstrip("\ufffd"))
    length = len(token_ids)
    while length > 1:
        shorter = tokenizer.decode(list(token_ids[: length - 1]), skip_special_tokens=True)
        if len(shorter.strip().rstrip("\ufffd")) < wanted:  # an unfinished character decodes to U+FFFD
            break
        length -= 1
    return length


class VllmSampler:
    """Samples from a vLLM engine; make it with `start`."""

    def __init__(
        self,
        engine: AsyncLLM,
        *,
        config: IGServiceConfig,
        device: str,
        guard: ProcessGuard,
    ) -> None:
        self.device = device
        """`cpu` or `cuda`, depending on the vLLM build."""
        self._engine = engine
        self._config = config
        self._tokenizer = engine.get_tokenizer()
        self._encoder = TextEncoder(self._tokenizer)
        self._frame = make_frame(
            self._tokenizer,
            encoder=self._encoder,
            prompt_style=config.prompt_style,
            prompt_file=config.prompt_file,
        )
        self._max_prompt_tokens = engine.model_config.max_model_len - config.max_new_tokens
        self._request_ids = itertools.count()
        self._guard = guard

    @classmethod
    async def start(cls, config: IGServiceConfig, *, cores: float) -> VllmSampler:
        """Load the model in a child process, which dies with this one. Raises what vLLM raises.

        `cores` is the worker's share of the machine.

        Cancelling it ends that process at once and leaves the loading thread behind, see serving.web.loading.
        """
        guard = ProcessGuard()
        loading = load_in_thread(lambda: _load_engine(config, cores=cores), name="engine")
        try:
            with guard.adding(list_multiprocessing_children):
                loaded, device = await loading
        except BaseException:
            loading.cancel()
            guard.close()
            raise
        return cls(loaded, config=config, device=device, guard=guard)

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        """Return all answers to a prompt, from one engine request; cancelling it stops that.

        Raises SamplingError and EngineLostError.
        """
        prompt_ids = await self._encode(prompt)
        outputs = await self._generate(prompt_ids, params=self._params(prompt, config=self._config))
        answers = await asyncio.gather(
            *(self._answer(output, prompt_ids, key=f"{prompt}\x00{k}") for k, output in enumerate(outputs))
        )
        # Greedy: every sample is the same.
        return tuple(answers) * (self._config.num_generations if len(outputs) == 1 else 1)

    @property
    def alive(self) -> bool:
        """Return whether the engine process still works."""
        return not self._engine.errored

    async def aclose(self) -> None:
        """Stop the engine process."""
        # On the event loop: its output task must be cancelled before the engine is gone.
        self._engine.shutdown()
        # Its finalizer would repeat this at interpreter exit, when modules are gone.
        self._engine.shutdown = lambda *_: None
        self._guard.close()

    async def _encode(self, prompt: str) -> list[int]:
        """Return the token ids of a framed prompt. Raises SamplingError when it is too long."""
        takes = (
            f"the model takes {self._max_prompt_tokens} tokens before {self._config.max_new_tokens} new "
            "ones; shorten the context (--max-context-words) or let the model take more (--max-model-len)"
        )
        if len(prompt) > _MAX_CHARS_PER_TOKEN * self._max_prompt_tokens:
            raise SamplingError(f"the prompt has {len(prompt)} characters, {takes}")
        if len(prompt) <= _SHORT_PROMPT_CHARS:
            encoded = self._encoder.encode(prompt)
        else:
            encoded = await asyncio.to_thread(self._encoder.encode, prompt)
        prompt_ids = [*self._frame.before, *encoded, *self._frame.after]
        if len(prompt_ids) > self._max_prompt_tokens:
            raise SamplingError(f"the prompt has {len(prompt_ids)} tokens, {takes}")
        return prompt_ids

    async def _generate(self, prompt_ids: list[int], *, params: SamplingParams) -> list[CompletionOutput]:
        from vllm.v1.engine.exceptions import EngineDeadError

        outputs: list[CompletionOutput] = []
        request_id = f"gain-{next(self._request_ids)}"
        try:
            async for output in self._engine.generate({"prompt_token_ids": prompt_ids}, params, request_id):
                outputs = output.outputs
        except EngineDeadError as error:
            raise EngineLostError("the generator's engine process died") from error
        if any(output.finish_reason == "abort" for output in outputs):  # not by us: it is shutting down
            raise EngineLostError("the generator's engine process stops; it left this prompt undone")
        if len(outputs) != params.n:
            raise SamplingError(f"the engine gave {len(outputs)} answers, expected {params.n}")
        return outputs

    async def _answer(self, output: CompletionOutput, prompt_ids: list[int], *, key: str) -> SampledAnswer:
        """Return the answer of an output; an answer that is only line breaks is continued."""
        token_ids, log_probs = list(output.token_ids), _log_probs(output)
        for _ in range(_MAX_LEADING_BREAKS):
            num_left = self._config.max_new_tokens - len(token_ids)
            if not _ended_in_break(output) or num_left < 1:
                break
            rest = replace(self._config, num_generations=1, max_new_tokens=num_left)
            params = self._params(f"{key}\x00{len(token_ids)}", config=rest)
            (output,) = await self._generate([*prompt_ids, *token_ids], params=params)
            token_ids += output.token_ids
            log_probs += _log_probs(output)
        text = output.text.strip()
        length = answer_length(token_ids, text, tokenizer=self._tokenizer)
        return SampledAnswer(text=text, mean_log_prob=sum(log_probs[:length]) / length, num_tokens=length)

    def _params(self, key: str, *, config: IGServiceConfig) -> SamplingParams:
        return sampling_params(config, key, stop_token_ids=self._frame.stop_token_ids)


def _log_probs(output: CompletionOutput) -> list[float]:
    """Return the log-prob of every sampled token. Raises SamplingError when there are none."""
    log_probs = sampled_log_probs(output)
    if log_probs is None:
        raise SamplingError("the engine gave an answer without a log-prob for each token")
    return log_probs


def _ended_in_break(output: CompletionOutput) -> bool:
    """Return whether a line break ended the output before any text."""
    stop = output.stop_reason
    return isinstance(stop, str) and not stop.strip() and not output.text.strip()


def sampling_params(
    config: IGServiceConfig, key: str, *, stop_token_ids: Sequence[int] = ()
) -> SamplingParams:
    """Return the engine's parameters; their seed is derived from the service seed and `key`, the prompt."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    greedy = config.temperature == 0
    return SamplingParams(
        n=1 if greedy else config.num_generations,
        **PLAIN_SAMPLING,
        temperature=config.temperature,
        max_tokens=config.max_new_tokens,
        seed=None if greedy else prompt_seed(config.seed, key),
        stop=list(STOP_STRINGS),
        stop_token_ids=list(stop_token_ids),
        output_kind=RequestOutputKind.FINAL_ONLY,
    )


def _load_engine(config: IGServiceConfig, *, cores: float) -> tuple[AsyncLLM, str]:
    """Import vLLM, after setting its environment, and load the model.

    Runs in a thread of its own: the engine process inherits the signal mask that is set here.
    """
    # Ctrl-C reaches the whole process group, but this process decides when the engine ends. The resource
    # tracker starts first, because when it starts with the engine it unblocks the signal.
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    set_environment(config, cores=cores)
    with collection_paused():
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine.async_llm import AsyncLLM

    device = "cpu" if current_platform.is_cpu() else "cuda"
    if config.device_kind not in ("auto", device):
        raise ValueError(
            f"--device {config.device_kind}: the vLLM that is installed here runs on {device}; "
            f"use --device {device} or install the other build"
        )
    arguments = AsyncEngineArgs(**engine_arguments(config, device=device))
    return AsyncLLM.from_engine_args(arguments), device


def set_environment(config: IGServiceConfig, *, cores: float) -> None:
    """Set the environment that vLLM reads when it is imported. Raises MachineError."""
    import torch

    kind = config.device_kind
    prepare_environment(
        on_cpu=kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()),
        num_threads=config.cpu_threads or max(1, int(cores / 2)),
    )


def engine_arguments(config: IGServiceConfig, *, device: str) -> dict[str, object]:
    """Return the engine arguments for a device, `cpu` or `cuda`."""
    from vllm.engine.arg_utils import EngineArgs

    arguments = vllm_rules.engine_arguments(
        model=config.model_path,
        dtype="float32" if device == "cpu" and config.dtype == "auto" else config.dtype,
        max_model_len=config.max_model_len or None,
        max_num_seqs=config.sub_batch_size,
    )
    if device != "cpu":
        return arguments | {"gpu_memory_utilization": config.gpu_memory_utilization}
    longest = EngineArgs(**arguments).create_model_config().max_model_len
    return arguments | cpu_arguments(
        kv_cache_bytes=int(config.cpu_cache_gb * 2**30), longest_prompt=max(longest, config.sub_batch_size)
    )
