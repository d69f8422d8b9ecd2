"""The rules by which all vLLM engines of this project run, on the CPU and on GPUs; imports no vLLM.

On the CPU: a request with a seed kills the engine if its prompt is prefilled in chunks; compiling needs a C++
compiler; the multiprocess executor and idle OpenMP threads spin by default, which makes an engine that shares
its cores many times slower.
"""

from __future__ import annotations

import ctypes
import gc
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from serving.machine import socket_root
from serving.ray_start import prepare_ray_import

if TYPE_CHECKING:
    from vllm.outputs import CompletionOutput

_LSCPU = ("lscpu", "--json", "--extended=CPU,CORE,NODE", "--online")
_BIN = Path(__file__).with_name("bin")
_LIBNUMA = "libnuma.so.1"
_CPU_BLOCK_TOKENS = 32
"""Tokens per block of the key-value cache. vLLM's default of 128 suits long texts: each request reads whole
blocks, and prompts here have a few hundred tokens."""
_CPU_BATCHED_TOKENS = 4096
"""Tokens of one batch on the CPU; more at once only miss the caches."""

PLAIN_SAMPLING: Mapping[str, object] = {
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
    "logprobs": 0,
    "flat_logprobs": True,
}
"""Sampling parameters: no truncation and no penalty, and the log-prob of each sampled token, in one list for
a completion: engines of small models are limited by what Python does for each token."""


def sampled_log_probs(completion: CompletionOutput) -> list[float] | None:
    """Return the log-prob of every token sampled with `PLAIN_SAMPLING`; None if it has no tokens, or not all
    of their log-probs."""
    found = completion.logprobs
    if not completion.token_ids or found is None or found.token_ids != list(completion.token_ids):
        return None
    return list(found.logprobs)


class MachineError(RuntimeError):
    """The machine lacks something; the message names what to install."""


def prepare_environment(*, on_cpu: bool, num_threads: int | None = None, log_level: str = "ERROR") -> None:
    """Set what vLLM and its child processes read from the environment. Call it before vllm is imported.

    `num_threads` are those of the CPU engine; None stands for one per core. Raises MachineError when vLLM's
    CPU build cannot start here.
    """
    os.environ.setdefault("VLLM_LOGGING_LEVEL", log_level)
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    prepare_ray_import()  # vLLM imports Ray, and this process may still have to start it
    os.environ["VLLM_RPC_BASE_PATH"] = socket_root()
    # A forked process would hold the pipe of the process guard open.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    if not on_cpu:
        return
    # One process for the model instead of two: otherwise vLLM replaces the executor "uni" by "mp".
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # Bound threads of several engines and the trainer would all share the same cores.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(num_threads or len(os.sched_getaffinity(0)))
    os.environ["OMP_WAIT_POLICY"] = "passive"
    # Every batch has another shape, and the default keeps the code for 1,024 of them: 0.4 GB (measured).
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16")
    # Even with enforce_eager, vLLM compiles a few functions at the first request, which takes a C++ compiler
    # and 7 s of processor time for each engine; decoding takes as much with them as without.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    _provide_libnuma()
    _provide_lscpu()


@contextmanager
def collection_paused() -> Iterator[None]:
    """Pause garbage collection while vLLM is imported: it takes a quarter of that time (measured: 1.4 s).

    What is imported lives as long as the process, so later collections leave it out.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def engine_arguments(
    *, model: str, dtype: str, max_model_len: int | None, max_num_seqs: int
) -> dict[str, object]:
    """Return the engine arguments that hold on every device."""
    return {
        "model": model,
        "trust_remote_code": False,
        "generation_config": "vllm",  # sampling follows the request, not the suggestions of the checkpoint
        "dtype": dtype,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
    }


def cpu_arguments(
    *,
    kv_cache_bytes: int,
    longest_prompt: int,
    batched_tokens: int | None = None,
    is_sharded: bool = False,
) -> dict[str, object]:
    """Return the engine arguments to add on a CPU. A batch has room for `longest_prompt` tokens."""
    return {
        "enforce_eager": True,
        "kv_cache_memory_bytes": kv_cache_bytes,
        "block_size": _CPU_BLOCK_TOKENS,
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(batched_tokens or _CPU_BATCHED_TOKENS, longest_prompt),
        "distributed_executor_backend": "mp" if is_sharded else "uni",
    }


def _provide_libnuma() -> None:
    """Let this process and its children load libnuma: the system's, or the copy that `make venv` made."""
    with suppress(OSError):
        ctypes.CDLL(_LIBNUMA)
        return
    folder = f"{sys.prefix}/lib/libnuma"
    try:
        ctypes.CDLL(f"{folder}/{_LIBNUMA}", mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise MachineError(
            f"vLLM's CPU build needs the system library {_LIBNUMA}, which is missing here; "
            "install it: apt install libnuma1 (Debian, Ubuntu), dnf install numactl-libs (Fedora)"
        ) from error
    os.environ["LD_LIBRARY_PATH"] = _prepend(folder, to="LD_LIBRARY_PATH")


def _provide_lscpu() -> None:
    with suppress(OSError):
        if subprocess.run(_LSCPU, capture_output=True).returncode == 0:
            return
    os.environ["PATH"] = _prepend(str(_BIN), to="PATH")


def _prepend(folder: str, *, to: str) -> str:
    return os.pathsep.join(filter(None, (folder, os.environ.get(to))))
