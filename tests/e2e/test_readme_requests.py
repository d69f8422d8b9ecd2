"""The README's requests, sent as printed, get the answers that the README promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.e2e.running import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(900)]


def requests() -> list[str]:
    """Return every curl command of the block that asks the IG service."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "/compute_info_gain" in block and "curl" in block]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the requests are written for curl")
def test_requests_get_their_answers(retriever: str, gain_service: str) -> None:
    answers = []
    for command in requests():
        for printed, real in (("8000", retriever), ("8310", gain_service)):
            command = command.replace(f"http://127.0.0.1:{printed}", real)
        sent = subprocess.run(
            ["bash", "-euc", command], env={**os.environ, "NO_PROXY": "*"}, capture_output=True, text=True
        )
        assert sent.returncode == 0, sent.stderr
        answers.append(json.loads(sent.stdout))
    one_query, queries, health, gain = answers
    for found in (one_query, queries):
        assert [len(passages) for passages in found["result"]] == [3]
    assert health["status"] == "healthy"
    assert gain["errors"] == [None]
    assert isinstance(gain["scores"][0], float)
