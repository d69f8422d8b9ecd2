from __future__ import annotations

from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from IG.lifeline import Lifeline
from IG.sampler import (
    EngineLostError,
    SamplingError,
    SamplingOptions,
    VllmSampler,
    answer_length,
    prompt_seed,
)


class Spelling:
    """Decodes a token to the piece of text it is; pieces that are unfinished characters decode to U+FFFD."""

    def __init__(self, *pieces: bytes) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        text = b"".join(self.pieces[token] for token in ids).decode(errors="replace")
        return text.replace("<eos>", "") if skip_special_tokens else text


@pytest.mark.parametrize(
    ("pieces", "text", "length"),
    [
        ((b" Bolton", b"\n"), "Bolton", 1),
        ((b" Bolton", b"<eos>"), "Bolton", 1),
        ((b" Bolton", b".\n"), "Bolton.", 2),  # half of the last token belongs to the answer
        ((b" Bolton", b" ", b" \n"), "Bolton", 1),
        ((b" ", b"Bol", b"ton", b" Question", b":"), "Bolton", 3),
        ((b"\n",), "", 1),
        ((b" ", b"\n"), "", 1),
        ((b" Boll", b"ton", b", England"), "Bollton, England", 3),
        ((b" caf", b"\xc3", b"\xa9", b"\n"), "caf\u00e9", 3),
        ((b" caf", b"\xc3"), "caf\ufffd", 1),
    ],
)
def test_only_the_tokens_that_write_the_answer_count(
    pieces: tuple[bytes, ...], text: str, length: int
) -> None:
    tokenizer = Spelling(*pieces)
    assert answer_length(range(len(pieces)), text, tokenizer=tokenizer) == length  # type: ignore[arg-type]


def test_the_seed_depends_on_prompt_and_service_seed_alone() -> None:
    assert prompt_seed(0, "a") == prompt_seed(0, "a")
    assert len({prompt_seed(0, "a"), prompt_seed(0, "b"), prompt_seed(1, "a")}) == 3
    assert 0 <= prompt_seed(0, "a") < 2**48


class Engine:
    """Gives the same outputs to every request."""

    errored = False
    model_config = SimpleNamespace(max_model_len=64)

    def __init__(self, *finish_reasons: str) -> None:
        self._outputs = [SimpleNamespace(finish_reason=reason) for reason in finish_reasons]

    def get_tokenizer(self) -> None:
        return None

    async def generate(self, *_: object) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(outputs=self._outputs)


@pytest.mark.parametrize(
    ("finish_reasons", "error"),
    [
        (["stop", "length"], None),
        (["stop", "abort"], EngineLostError),  # half an answer must never be taken for a whole one
        (["stop"], SamplingError),
    ],
)
async def test_only_whole_answers_are_taken(finish_reasons: list[str], error: type[Exception] | None) -> None:
    options = SamplingOptions(num_answers=2, temperature=1.0, max_new_tokens=8, seed=0)
    engine = Engine(*finish_reasons)
    lifeline = Lifeline()
    sampler = VllmSampler(engine, options=options, device="cpu", lifeline=lifeline)  # type: ignore[arg-type]
    generating = sampler._generate([1, 2], params=SimpleNamespace(n=2))  # type: ignore[arg-type]
    if error is None:
        assert len(await generating) == 2
    else:
        with pytest.raises(error):
            await generating
    lifeline.cut()
