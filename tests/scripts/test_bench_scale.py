"""`make bench-scale` measures the parts that are named and ends with one line of JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scale.step import fit_exponents, fit_turns

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/bench_scale.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def test_the_plan_is_a_part() -> None:
    done = run("plan")
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["failed"] == []
    assert figures["plan"]["memory_distance"] < 0.06
    assert "| `gpu` | 7B |" in done.stdout


def test_a_part_that_does_not_exist_is_named() -> None:
    done = run("plan", "engines")
    assert (done.returncode, done.stdout) == (2, "")
    assert "engines: no such part; there are " in done.stderr


def test_the_growth_of_a_step_is_fitted() -> None:
    seconds = {(episodes, turns): 0.002 * episodes * turns**0.5 for episodes in (4, 16) for turns in (1, 8)}
    assert fit_exponents(seconds) == pytest.approx((1.0, 0.5))
    assert fit_turns({1: 0.75, 4: 1.5, 8: 2.5}) == pytest.approx((0.5, 0.25))
