"""`make gpu-check` measures every figure at a tiny size, with torch and transformers alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path

import gpu_check
import pytest
import torch
from gpu_check import DRY_RUN, Check, run_checks
from gpu_checks.policy import accept_older_torch
from gpu_checks.recorder import Bench, read_lines
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from torch.nn.attention import varlen

SCRIPT = Path(gpu_check.__file__)


@pytest.fixture(scope="module")
def bare_packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with torch, transformers and what they require, and no other package."""
    folder = tmp_path_factory.mktemp("bare")
    waiting, known = ["torch", "transformers"], set[str]()
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in known:
            continue
        known.add(name)
        package = distribution(name)
        needed = (Requirement(text) for text in package.requires or ())
        waiting += [need.name for need in needed if not need.marker or need.marker.evaluate({"extra": ""})]
        for entry in {file.parts[0] for file in package.files or ()} - {"..", "__pycache__"}:
            (folder / entry).symlink_to(Path(str(package.locate_file(entry))))
    assert not {"ray", "vllm", "hydra-core", "fastapi", "faiss-cpu", "pyarrow"} & known
    return folder


def test_a_bare_machine_measures_every_figure_once(bare_packages: Path, tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"

    def run(*checks: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", str(SCRIPT), "--dry-run", "--results", str(results), *checks],
            env=os.environ | {"PYTHONPATH": str(bare_packages)},
            capture_output=True,
            text=True,
        )

    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert set(figures["status"].values()) == {"ok"}
    for name in ("update_share", "log_probs_tokens_per_s", "load_s"):
        assert f"policy_3b.{name}" in figures
    assert figures["publish.ipc_bytes_per_s"] > 0
    assert figures["engine.vllm"] == "not installed"
    assert "TRAIN_SHARE" in done.stdout
    before = results.read_text()
    again = run("publish", "search")
    assert (again.returncode, results.read_text()) == (0, before)


@pytest.mark.vllm
def test_an_engine_is_measured_where_vllm_is_installed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(SCRIPT),
        "--dry-run",
        "--results",
        str(tmp_path / "results.jsonl"),
        "engine",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["engine.decode_64_ms"] > 0
    assert figures["engine.read_tokens_per_s"] > 0


def test_all_checks_together_end_in_8_minutes() -> None:
    assert sum(check.limit_s for check in gpu_check.CHECKS) <= 480


def test_what_a_check_measured_before_its_end_is_kept(tmp_path: Path) -> None:
    results = tmp_path / "results.jsonl"

    def hang(bench: Bench) -> None:
        bench.record("before", 1.0)
        time.sleep(600)

    def fail(bench: Bench) -> None:
        bench.record("before", 2.0)
        raise ValueError("no room")

    def die(bench: Bench) -> None:
        bench.record("before", 3.0)
        os._exit(9)

    checks = [
        Check(name=work.__name__, run=work, limit_s=limit_s)
        for work, limit_s in ((hang, 3), (fail, 60), (die, 60))
    ]
    run_checks(checks, results=results, gpu=DRY_RUN, seconds=600)
    with results.open("a") as file:
        file.write('{"check": "cut o')
    lines = read_lines(results, device=DRY_RUN.name)
    assert [line["value"] for line in lines if "figure" in line] == [1, 2, 3]
    hung, failed, died = (str(line["status"]) for line in lines if "status" in line)
    assert hung.startswith("ended after its limit")
    assert failed == "failed: ValueError: no room"
    assert died == "failed: its process ended with exit code 9"


def test_attention_of_older_torch_gets_as_many_heads_of_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    def older(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, max_q: int) -> torch.Tensor:
        return query + key + value

    monkeypatch.setattr(varlen, "varlen_attn", older)
    accept_older_torch()
    query, key = torch.zeros(3, 4, 1), torch.tensor([[[1.0], [2.0]]]).expand(3, 2, 1)
    result = varlen.varlen_attn(query=query, key=key, value=key, max_q=3, enable_gqa=True)
    assert result[0, :, 0].tolist() == [2, 2, 4, 4]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_named(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--results", str(tmp_path / "results.jsonl"), "device"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: torch finds no GPU; run this where there is one (make doctor), or with --dry-run\n"
    )
