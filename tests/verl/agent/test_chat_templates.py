"""The kinds of chat templates that models have, in every format: prompts, messages, cuts, forgeries."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.agents import SEARCH, make_format, make_tools, render
from tests.fakes import ScriptedSearch, make_question, make_turn
from tests.verl.rollout.tokenizers import (
    CHATML,
    FAMILIES,
    NO_BOS,
    ends_every_text,
    gemma,
    llama3,
    llama31,
    qwen,
    qwen3,
    qwen_with_tools,
    thinks_always,
    unigram_chat,
)
from verl.agent.formats import FORMATS
from verl.agent.formats.check import check_format
from verl.errors import ConfigError
from verl.protocols import PromptFormat
from verl.rollout.tokenizer import HfTokenizer
from verl.trainer.config.schema import AgentConfig, Config
from verl.trainer.wiring import make_format as make_checked_format
from verl.types import ActionKind, Message, Observation, SpanKind

Maker = Callable[[], PreTrainedTokenizerFast]
CHATML_START = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n"
CHATML_RESULT = (
    '<|im_end|>\n<|im_start|>user\n<tool_response>\nR "x"\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n"
)
LLAMA_START = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nU<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
)
LLAMA_RESULT = (
    "<|eot_id|><|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)


@pytest.mark.parametrize(
    ("make", "enable_thinking", "start", "result"),
    [
        (qwen_with_tools, None, CHATML_START, CHATML_RESULT),
        (qwen3, None, CHATML_START, CHATML_RESULT),
        (qwen3, True, CHATML_START, CHATML_RESULT),
        (qwen3, False, *(f"{text}<think>\n\n</think>\n\n" for text in (CHATML_START, CHATML_RESULT))),
        (thinks_always, None, *(f"{text}<think>\n" for text in (CHATML_START, CHATML_RESULT))),
        (llama3, None, LLAMA_START, LLAMA_RESULT.format("tool", 'R "x"')),
        (llama31, None, LLAMA_START, LLAMA_RESULT.format("ipython", r'"R \"x\""')),
        (gemma, None, "<bos><start_of_turn>user\nS\n\nU<end_of_turn>\n<start_of_turn>model\n", None),
        (
            unigram_chat,
            None,
            "[system] S </s>\n[user] U </s>\n[assistant]",
            ' </s>\n[tool] R "x" </s>\n[assistant]',
        ),
    ],
)
def test_prompts_and_results_are_what_the_template_has_for_them(
    make: Maker, enable_thinking: bool | None, start: str, result: str | None
) -> None:
    tokenizer = HfTokenizer(make(), enable_thinking=enable_thinking)
    messages = (Message(role="system", content="S"), Message(role="user", content="U"))
    assert tokenizer.decode(tokenizer.render_prompt(replace(make_question(), messages=messages))) == start
    ids = tokenizer.render_next_turn('R "x"', role="tool")
    assert (None if ids is None else tokenizer.decode(ids)) == result
    # A message of the user can follow in all of them; a turn that is over is not ended again.
    whole = tokenizer.render_next_turn("Again?") or []
    (end, *_) = (token for token in whole if token in tokenizer.control)
    after = tokenizer.render_next_turn("Again?", after=[*tokenizer.encode("hm"), end])
    assert after == whole[whole.index(end) + 1 :]
    for turn in ([], tokenizer.encode("hm")):
        assert tokenizer.render_next_turn("Again?", after=turn) == whole


def test_a_switch_that_the_template_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"agent\.enable_thinking=false: .* has no such switch; leave it"):
        HfTokenizer(gemma(), enable_thinking=False)


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda maker: maker.__name__)
def tokenizer(request: pytest.FixtureRequest) -> HfTokenizer:
    return HfTokenizer(request.param())


@pytest.fixture(scope="module", params=FORMATS)
def prompt_format(request: pytest.FixtureRequest, tokenizer: HfTokenizer) -> PromptFormat:
    return make_format(tokenizer, name=request.param)


shared = settings(
    max_examples=8,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PIECES = [
    *("<think>", "</think>", "<refine>", "</refine>", "<search>", "</search>", "<answer>", "</answer>"),
    *(
        "<tool_call>",
        "</tool_call>",
        '{"name": "search", "arguments": {"query": ["é日", "b"]}}',
        "🙂 q",
        "\n",
    ),
    '<tool_call>{"name": "web_search", "arguments": {"query": "née 日本"}}</tool_call>',
]


@shared
@given(pieces=st.lists(st.sampled_from(PIECES), max_size=6), noise=st.lists(st.integers(0, 300), max_size=4))
def test_a_completion_can_be_cut_anywhere(
    tokenizer: HfTokenizer, prompt_format: PromptFormat, pieces: list[str], noise: list[int]
) -> None:
    ids = [*noise, *itertools.chain.from_iterable(map(tokenizer.encode, pieces))]
    longest_reply = prompt_format.reply_length
    for cut in range(len(ids) + 1):
        action = prompt_format.parse(ids[:cut])
        assert (action.kind is ActionKind.TOOL) == bool(action.calls)
        end = 0
        for span in action.spans:
            assert end <= span.start <= span.end <= span.outer_end <= cut
            end = span.end
        turn = replace(make_turn(ActionKind.INVALID), output_ids=np.array(ids[:cut], np.int32))
        if action.kind is ActionKind.INVALID:
            assert len(prompt_format.render_retry(turn)) <= longest_reply


def find_control(tokenizer: HfTokenizer, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if token in tokenizer.control]


@shared
@given(data=st.data())
def test_a_result_of_any_text_is_read_as_text(
    tokenizer: HfTokenizer, prompt_format: PromptFormat, data: st.DataObject
) -> None:
    hostile = [
        *tokenizer.control.values(),
        *FORMATS["search_r1"].tags,
        "\ud83d",
        "é日🙂",
        '"\\',
        "\n",
        " ",
        "a",
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(hostile), min_size=1, max_size=8)))
    shown = prompt_format.neutralize(f"a{text}")
    assert "\ud83d" not in shown
    plain = render(prompt_format, Observation(text="xTEXTx"))
    ids = render(prompt_format, Observation(text=shown))
    assert find_control(tokenizer, ids) == find_control(tokenizer, plain)
    # Some templates strip messages, Llama 3.1's writes them in JSON.
    written = {shown, shown.strip(), json.dumps(shown, ensure_ascii=False)[1:-1]}
    assert tokenizer.decode(ids) in {tokenizer.decode(plain).replace("xTEXTx", each) for each in written}


def test_the_check_at_start_accepts_all_of_them(tokenizer: HfTokenizer, prompt_format: PromptFormat) -> None:
    (search,) = make_tools(ScriptedSearch(), ["search"])
    assert check_format(prompt_format, tokenizer=tokenizer, tools=[search.spec]) is None


@pytest.mark.parametrize("name", FORMATS)
def test_a_thought_may_be_opened_by_the_prompt(name: str) -> None:
    tokenizer = HfTokenizer(thinks_always())
    prompt_format = make_format(tokenizer, name=name)
    start = prompt_format.render_prompt(make_question())
    assert tokenizer.decode(start).endswith("assistant\n<think>\n")
    action = prompt_format.parse(tokenizer.encode(f"\nhm </think>\n{prompt_format.write_call(SEARCH)}"))
    assert [(span.kind, span.text) for span in action.spans] == [
        (SpanKind.THINK, "hm"),
        (SpanKind.QUERY, "q"),
    ]
    assert action.spans[0].num_closing > 0


def with_template(template: str | None, make: Maker = qwen) -> HfTokenizer:
    raw = make()
    raw.chat_template = template
    return HfTokenizer(raw)


@pytest.mark.parametrize(
    ("tokenizer", "problem"),
    [
        (with_template("{{ messages[0]['content'][:5] }}"), "the question is in the prompt 0 times"),
        (with_template(CHATML + CHATML), "the question is in the prompt 2 times"),
        (with_template("{{ bos_token * 2 }}" + NO_BOS, llama3), r"begins twice with <\|begin_of_text\|>"),
        (with_template(None, ends_every_text), "cannot be executed; choose another agent.format"),
    ],
)
def test_the_check_at_start_names_the_model_what_fails_and_the_fix(
    tokenizer: HfTokenizer, problem: str
) -> None:
    config = Config(agent=AgentConfig(format="search_r1"))
    config.actor_rollout_ref.model.path = "some/model"
    with pytest.raises(ConfigError, match=rf"path='some/model' with agent\.format=search_r1: .*{problem}"):
        make_checked_format(config, tokenizer=tokenizer, tools=make_tools(ScriptedSearch(), ["search"]))
