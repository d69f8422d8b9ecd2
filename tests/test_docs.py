"""The README is true: blocks opened by ```bash run are run, its files and its tree exist."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
UNSHOWN = {".gitignore", ".pre-commit-config.yaml", ".ci", ".github", "LICENSE"}
"""Tooling that the tree need not show."""


def blocks(opening: str) -> list[str]:
    """Return the code blocks of the README that are opened by these words."""
    return re.findall(rf"^```{opening}\n(.*?)^```$", README.read_text(), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("block", blocks("bash run"))
def test_block_runs(block: str) -> None:
    """In the repository's root, with this environment's python first on the path."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=ROOT,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block}\n{done.stdout}\n{done.stderr}"


def test_links_lead_somewhere() -> None:
    targets = re.findall(r"\]\((?!https?://|#|mailto:)([^)#\s]+)", README.read_text())
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_tree_shows_what_git_tracks() -> None:
    """Both ways, for the top level of the ```text block that draws the tree."""
    assert blocks("bash run")
    (tree,) = [block for block in blocks("text") if re.search(r"^├── ", block, flags=re.MULTILINE)]
    shown: set[str] = set()
    for line in tree.splitlines():
        if line.startswith(("├── ", "└── ")):
            names = re.split(r"\s{2,}|#", line[4:])[0]
            shown |= {name.strip().rstrip("/").split("/")[0] for name in names.split("·")}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    top = {name.split("/")[0] for name in tracked}
    assert shown - top == set()
    assert top - shown - UNSHOWN == set()


def test_make_knows_its_targets() -> None:
    (names,) = re.findall(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    targets = names.split()
    assert len(targets) > 15
    done = subprocess.run(["make", "--dry-run", *targets], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    head = itertools.takewhile(
        lambda line: line.startswith("# "), (ROOT / "Makefile").read_text().splitlines()
    )
    command = ["make", "--no-print-directory", "help"]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.splitlines()
    assert shown == [line.removeprefix("# ") for line in head]
