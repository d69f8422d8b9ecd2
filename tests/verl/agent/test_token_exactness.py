"""Random episodes, several kinds of tokenizer: the trained ids are the sampled and the injected ones."""

from __future__ import annotations

import asyncio
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.agents import make_agent, make_format
from tests.fakes import ScriptedGenerate, ScriptedSearch, make_question
from tests.verl.rollout.tokenizers import gemma, llama2_base, llama31, qwen, qwen3, unigram_chat
from verl.agent.formats import FORMATS
from verl.rollout.tokenizer import HfTokenizer
from verl.types import Passage

TEXT = [
    'Where was Alice Marsh born? Doc 1(Title: "Bolton") Bolton is a town in England.</search>.',
    "<think> birthplace of Alice</think> <search> Alice 1987, née Zoë 日本 🙂</search>",
    "\n\n<answer>Bolton</answer>\n\n<information>Doc 2(Title: it's)</information>\n\n",
    '<tool_call>{"name": "search", "arguments": {"query": ["a \\"town\\""]}}</tool_call>',
] * 3
TAGS = list(FORMATS["search_r1"].tags)
PASSAGES = (
    Passage(id="1", title='"Zoë"', text="Zoë was born in 日本. It's so.", score=1.0),
    Passage(id="2", title='"Bolton"', text="A town " * 30, score=0.5),
)


def unigram_with_special_tags() -> PreTrainedTokenizerFast:
    """SentencePiece style; tags are special tokens."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(
        TEXT, trainers.UnigramTrainer(vocab_size=300, unk_token="<unk>", special_tokens=["<unk>", *TAGS])
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def word_piece() -> PreTrainedTokenizerFast:
    """BERT style: decoding loses spaces, so encoding a decoded text would give other ids."""
    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.train_from_iterator(TEXT, trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]"]))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.add_tokens([AddedToken(tag, special=False) for tag in TAGS])
    return tokenizer


MAKERS = [qwen, llama2_base, unigram_with_special_tags, word_piece, qwen3, llama31, gemma, unigram_chat]
CLOSING = {"search_r1": "</information>", "autorefine": "</documents>"}


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def tokenizer(request: pytest.FixtureRequest) -> HfTokenizer:
    return HfTokenizer(request.param())


PIECES = [
    "<think> I need the</think>",
    "<search> Zoë 日本 🙂</search>",
    "<search>birthplace of Alice</search>.",
    "<answer> Bolton, England</answer>",
    "<answer></answer>",
    "<refine> Alice is born",
    "</refine>",
    '<tool_call>{"name": "search", "arguments": {"query": ["Zoë 日本 🙂", "a \\"town\\""]}}</tool_call>',
    '<tool_call>{"name": "search", "arguments": {"query": "birthplace of Alice"}}</tool_call>',
    "<search> a <search>",
    "é日🙂",
    " ",
    "\n",
    "who?",
]


@pytest.mark.parametrize("name", FORMATS)
@settings(
    max_examples=4,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    outputs=st.lists(st.lists(st.sampled_from(PIECES), min_size=1, max_size=4), min_size=4, max_size=4),
    noise=st.lists(st.integers(0, 250), max_size=3),
    found=st.lists(st.sampled_from(PASSAGES), max_size=3),
)
def test_trained_ids_are_sampled_plus_injected_ids(
    tokenizer: HfTokenizer, name: str, outputs: list[list[str]], noise: list[int], found: list[Passage]
) -> None:
    # Pieces encoded one by one, and random ids: what is sampled need not be what its text encodes to.
    script = [[*noise, *itertools.chain.from_iterable(map(tokenizer.encode, pieces))] for pieces in outputs]
    generate = ScriptedGenerate(list(script))
    limit = 260 if name in CLOSING else 700
    prompt_format = make_format(tokenizer, name=name)
    queries = [str(call.arguments["query"]) for ids in script for call in prompt_format.parse(ids).calls]
    search = ScriptedSearch(dict.fromkeys(queries, tuple(found)))
    agent = make_agent(generate, search, tokenizer=tokenizer, name=name, max_turns=3, max_obs_length=limit)
    trajectory = asyncio.run(agent.run(make_question(), sample=0, seed=0, greedy=False))

    expected = prompt_format.render_prompt(make_question())
    mask = [False] * len(expected)
    for turn, output, context in zip(trajectory.turns, script, generate.contexts, strict=False):
        assert context == expected, "the engine continued something else than what is trained"
        injected = turn.observation_ids.tolist()
        expected = [*expected, *output, *injected]
        mask += [True] * len(output) + [False] * len(injected)
        assert len(injected) <= limit
        if turn.observations:
            assert tokenizer.decode(injected).rstrip().endswith(CLOSING.get(name, ""))
            assert injected == prompt_format.render_observations(turn.action.calls, turn.observations)
            assert turn.observation_truncated or turn.passages == tuple(found) * len(turn.action.calls)
        for before, span in itertools.pairwise([None, *turn.action.spans]):
            assert span is not None
            assert (before.end if before else 0) <= span.start <= span.end <= span.outer_end <= len(output)
            text = tokenizer.decode(output[span.start : span.end])
            meant = span.text if name in CLOSING else span.text.replace('"', '\\"')
            assert meant in text or "\ufffd" in text
    assert trajectory.token_ids.tolist() == expected
    assert np.array_equal(trajectory.policy_mask, mask)
