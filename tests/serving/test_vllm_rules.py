from __future__ import annotations

import gc
import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving import vllm_rules
from serving.machine import socket_root
from serving.vllm_rules import (
    MachineError,
    collection_paused,
    cpu_arguments,
    prepare_environment,
    sampled_log_probs,
)


@pytest.fixture(autouse=True)
def _own_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_missing_library_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_rules, "_LIBNUMA", "libnuma-of-another-machine.so.1")
    with pytest.raises(MachineError, match=r"libnuma-of-another-machine\.so\.1.*apt install libnuma1"):
        prepare_environment(on_cpu=True)


@pytest.mark.parametrize("is_there", [True, False], ids=["fails", "is missing"])
def test_lscpu_is_replaced_where_it(is_there: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if is_there:
        (tmp_path / "lscpu").symlink_to("/bin/false")
    (tmp_path / "sh").symlink_to("/bin/sh")
    monkeypatch.setenv("PATH", str(tmp_path))
    prepare_environment(on_cpu=True, num_threads=3)
    found = subprocess.check_output("lscpu --json --extended=CPU,CORE,NODE --online", shell=True, text=True)
    assert json.loads(found) == {"cpus": []}
    assert os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["VLLM_RPC_BASE_PATH"] == socket_root()


def test_a_gpu_keeps_its_executor_and_threads() -> None:
    os.environ.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    prepare_environment(on_cpu=False)
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in os.environ


def test_a_batch_holds_the_longest_prompt() -> None:
    for longest, expected in ((100, 4096), (10_000, 10_000)):
        arguments = cpu_arguments(kv_cache_bytes=1, longest_prompt=longest)
        assert arguments["max_num_batched_tokens"] == expected


def test_garbage_is_not_collected_while_vllm_is_imported_but_later() -> None:
    with collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("sampled", "logged", "expected"),
    [((7, 8), [7, 8], [-0.5, -1.0]), ((), [], None), ((7, 8), [7], None), ((7, 9), [7, 8], None)],
)
def test_log_probs_are_those_of_the_sampled_tokens_or_missing(
    sampled: tuple[int, ...], logged: list[int], expected: list[float] | None
) -> None:
    log_probs = SimpleNamespace(token_ids=logged, logprobs=[-0.5, -1.0][: len(logged)])
    completion: Any = SimpleNamespace(token_ids=sampled, logprobs=log_probs)
    assert sampled_log_probs(completion) == expected
    completion.logprobs = None
    assert sampled_log_probs(completion) is None
