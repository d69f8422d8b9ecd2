"""A session of the command line, with a scripted engine."""

from __future__ import annotations

import asyncio
import io
import json

from rich.console import Console

from tests.verl.ask.asking import CHARS, SCRIPT, ReadingGenerate, make_asker_of
from verl.ask.__main__ import parse
from verl.ask.output import Output
from verl.ask.session import FAILED, answer_all


def test_json_has_one_line_per_question_with_all_tokens_and_a_last_failure_is_the_exit_code() -> None:
    stdout, stderr = io.StringIO(), io.StringIO()
    with asyncio.Runner() as runner:
        code = answer_all(
            runner,
            make_asker_of(ReadingGenerate()),
            parse(["--json"]),
            questions=["Where was Gilbert Nash born?", "Is this broken?"],
            console=Console(file=stderr),
            output=Output(stdout=stdout, stderr=stderr),
        )
    answered, failed = map(json.loads, stdout.getvalue().splitlines())
    assert code == FAILED
    assert (answered["question"], answered["answer"]) == ("Where was Gilbert Nash born?", "Harwick")
    assert len(answered["token_ids"]) == answered["usage"]["total_tokens"]
    _, prompt, rest = CHARS.decode(answered["token_ids"]).partition("Gilbert Nash born?")
    search, passages, after = rest.partition("Harwick <b>&</b>.")
    assert prompt
    assert search.strip().startswith(SCRIPT[0])
    assert passages
    assert after.endswith(SCRIPT[1])
    assert (failed["answer"], failed["stop"]) == (None, "failed")
    assert "engine-0 is gone" in failed["failure"]
    assert "Harwick" in stderr.getvalue(), "the terminal shows the episode, too"
