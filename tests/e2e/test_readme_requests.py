"""The README's requests, sent as printed, get the answers that the README promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess

import pytest

from tests.e2e.running import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def requests() -> list[str]:
    """Every curl command of the block that asks the IG service."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "/compute_info_gain" in block and "curl" in block]
    return [line for line in block.replace("\\\n", " ").splitlines() if line.startswith("curl")]


def send(command: str, *, retriever: str, gain_service: str) -> dict[str, list[object]]:
    for printed, real in (("8000", retriever), ("8310", gain_service)):
        command = re.sub(rf"http://(127\.0\.0\.1|localhost):{printed}", real, command)
    done = subprocess.run(
        ["bash", "-euc", command],
        env={**os.environ, "NO_PROXY": "*", "no_proxy": "*"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert isinstance(answer, dict)
    return answer


@pytest.mark.skipif(
    shutil.which("curl") is None, reason="this machine has no curl, which the requests are written for"
)
def test_requests_get_their_answers(retriever: str, gain_service: str) -> None:
    asked = set()
    for command in requests():
        answer = send(command, retriever=retriever, gain_service=gain_service)
        body = re.search(r"-d '(.*)'", command)
        wanted = json.loads(body.group(1)) if body else {}
        if "/retrieve" in command:
            kind = "queries" if "queries" in wanted else "query"
            queries = wanted["queries"] if kind == "queries" else [wanted["query"]]
            assert len(answer["result"]) == len(queries)
            assert all(len(passages) == wanted["topk"] for passages in answer["result"])  # type: ignore[arg-type]
        elif "/compute_info_gain" in command:
            kind = "gain"
            assert answer["errors"] == [None] * len(wanted["items"])
            assert all(isinstance(score, float) for score in answer["scores"])
            assert len(answer["scores"]) == len(wanted["items"])
        else:
            kind = "health"
            assert "status" in answer
            assert str(answer["status"]) in ("healthy", "ok")
        asked.add(kind)
    assert asked == {"query", "queries", "gain", "health"}
