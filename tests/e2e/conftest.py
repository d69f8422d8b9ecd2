"""Both services and one quickstart, real, one of each for all tests here."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.bare_machine import strip_machine
from tests.e2e.running import running_service

RETRIEVER = ("search_r1.search.retrieval_server",)
GAIN_SERVICE = ("IG.service.IG_server", "--num-generations", "4", "--max-new-tokens", "8")


@pytest.fixture(scope="session")
def retriever(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(*RETRIEVER, folder=tmp_path_factory.mktemp("retriever")) as (_, url):
        yield url


@pytest.fixture(scope="session")
def gain_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_service(*GAIN_SERVICE, folder=tmp_path_factory.mktemp("gain_service")) as (_, url):
        yield url


@dataclass(frozen=True, slots=True, kw_only=True)
class Quickstart:
    """A short quickstart that has ended, on a machine without all that the README says is not needed."""

    finished: subprocess.CompletedProcess[str]
    run_dir: Path
    obstacle: str
    """Why nothing could be taken away from the machine; empty if it was."""


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    folder = tmp_path_factory.mktemp("quickstart")
    run_python, obstacle = strip_machine(folder)
    finished = run_python("scripts/quickstart.py", "--smoke", "--run-dir", str(folder / "run"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return Quickstart(finished=finished, run_dir=folder / "run", obstacle=obstacle)
