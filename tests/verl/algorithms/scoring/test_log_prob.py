"""How answers are encoded to be scored; what is measured with them is in tests/conformance."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import pytest

from tests.fakes import make_question, make_trajectory
from verl.algorithms.scoring.log_prob import AnswerProbes


class NormalizingCodec:
    """One token per character of the text in a normal form, as tokenizers of Qwen (NFC) and T5 (NFKC)."""

    def __init__(self, form: str) -> None:
        self._form = form

    def encode(self, text: str) -> list[int]:
        return [ord(c) for c in unicodedata.normalize(self._form, text)]  # type: ignore[arg-type]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


@pytest.mark.parametrize(
    ("form", "answer", "scored"),
    [("NFC", "Beyonce\u0301", "Beyonc\u00e9"), ("NFKC", "H\u2082O", "H2O"), ("NFC", "Bolton", "Bolton")],
)
def test_an_answer_that_the_tokenizer_normalizes_is_found(form: str, answer: str, scored: str) -> None:
    codec = NormalizingCodec(form)
    (probe,) = AnswerProbes(codec, "<answer> {answer} </answer>").encode_all(
        [answer, " "], trajectory=make_trajectory(make_question())
    )
    first, end = probe.scored
    assert codec.decode(probe.ids[first:end].tolist()) == scored
