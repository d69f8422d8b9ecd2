from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest

from IG.config import resolve_config
from IG.prompts import STOP_STRINGS
from IG.sampler import (
    EngineLostError,
    SamplingError,
    VllmSampler,
    answer_length,
    prompt_seed,
)
from serving.processes import ProcessGuard

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams


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


class Characters:
    """A token for each character, two for a line break."""

    added_tokens_decoder: Mapping[int, object] = {}
    bos_token = eos_token = pad_token = unk_token = None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [ord(character) for character in text.replace("\n", "\n\n")]

    def decode(self, ids: list[int], *, skip_special_tokens: bool) -> str:
        return "".join(map(chr, ids))


class Engine:
    """Gives the same outputs to every request."""

    errored = False

    def __init__(self, *finish_reasons: str, max_model_len: int = 64) -> None:
        self.model_config = SimpleNamespace(max_model_len=max_model_len)
        self._outputs = [SimpleNamespace(finish_reason=reason) for reason in finish_reasons]

    def get_tokenizer(self) -> Characters:
        return Characters()

    async def generate(self, *_: object) -> AsyncIterator[SimpleNamespace]:
        yield SimpleNamespace(outputs=self._outputs)


@contextmanager
def sampling(engine: Engine) -> Iterator[VllmSampler]:
    """Two answers of at most 8 tokens."""
    config = resolve_config(["--num-generations", "2", "--max-new-tokens", "8"], environ={})
    guard = ProcessGuard()
    yield VllmSampler(engine, config=config, device="cpu", guard=guard)  # type: ignore[arg-type]
    guard.close()


@pytest.mark.parametrize(
    ("finish_reasons", "error"),
    [
        (["stop", "length"], None),
        (["stop", "abort"], EngineLostError),  # half an answer must never be taken for a whole one
        (["stop"], SamplingError),
    ],
)
async def test_only_whole_answers_are_taken(finish_reasons: list[str], error: type[Exception] | None) -> None:
    with sampling(Engine(*finish_reasons)) as sampler:
        generating = sampler._generate([1, 2], params=SimpleNamespace(n=2))  # type: ignore[arg-type]
        if error is None:
            assert len(await generating) == 2
        else:
            with pytest.raises(error):
                await generating


@pytest.mark.parametrize(
    ("prompt", "reason"),
    [
        ("x" * 57, "the prompt has 57 tokens, the model takes 56 tokens before 8 new ones"),
        ("x" * 54 + "\n\n", "the prompt has 58 tokens"),
        ("x" * 5601, "the prompt has 5601 characters, the model takes 56 tokens"),
    ],
)
async def test_a_prompt_that_is_too_long_is_refused_with_a_fix(prompt: str, reason: str) -> None:
    with sampling(Engine()) as sampler:
        with pytest.raises(SamplingError, match=f"{reason}.*--max-context-words.*--max-model-len"):
            await sampler.sample(prompt)
        assert len(await sampler._encode("x" * 56)) == 56


class Scripted(Engine):
    """Plays a script of texts, one request after the other; each text ends at its first stop string."""

    def __init__(self, *script: list[str]) -> None:
        super().__init__()
        self.requests: list[tuple[str, SamplingParams]] = []
        self._script = list(script)

    async def generate(
        self, prompt: dict[str, list[int]], params: SamplingParams, _: object
    ) -> AsyncIterator[SimpleNamespace]:
        self.requests.append(("".join(map(chr, prompt["prompt_token_ids"])), params))
        yield SimpleNamespace(outputs=[self._output(text) for text in self._script.pop(0)])

    def _output(self, text: str) -> SimpleNamespace:
        found = next((stop for stop in STOP_STRINGS if stop in text), None)
        token_ids = [ord(character) for character in text]
        log_probs = [-float(len(text))] * len(text)
        return SimpleNamespace(
            text=text.partition(found)[0] if found else text,
            token_ids=token_ids,
            logprobs=SimpleNamespace(token_ids=token_ids, logprobs=log_probs),
            finish_reason="stop",
            stop_reason=found,
        )


async def test_line_breaks_before_an_answer_do_not_end_it() -> None:
    engine = Scripted(["\n", "Bolton\n"], ["\n"], ["Leeds"])
    with sampling(engine) as sampler:
        leeds, bolton = await sampler.sample("Q")
    assert (leeds.text, bolton.text) == ("Leeds", "Bolton")
    assert leeds.num_tokens == len("\n\nLeeds")
    assert leeds.mean_log_prob == pytest.approx((-1 - 1 - 5 * 5) / 7)
    assert [prompt for prompt, _ in engine.requests] == ["Q", "Q\n", "Q\n\n"]
    assert [(params.n, params.max_tokens) for _, params in engine.requests] == [(2, 8), (1, 7), (1, 6)]
    assert len({params.seed for _, params in engine.requests}) == 3


@pytest.mark.parametrize("script", [[" "], ["Question:"], ["\n"] * 8, ["\n"] * 9])
async def test_an_answer_that_never_begins_is_empty(script: list[str]) -> None:
    engine = Scripted([script[0], "Leeds"], *([text] for text in script[1:]))
    with sampling(engine) as sampler:
        empty, leeds = await sampler.sample("Q")
    assert (empty.text, leeds.text) == ("", "Leeds")
    assert len(engine.requests) == min(8, len(script))
