from __future__ import annotations

import pytest

from IG.sampler import answer_length, prompt_seed


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
