"""What differs from `tool_calls` in the form of IGPO's released checkpoints."""

from __future__ import annotations

import json

from tests.agents import make_agent, make_format
from tests.fakes import ScriptedGenerate, ScriptedSearch, make_question
from tests.verl.rollout.tokenizers import qwen_with_tools
from verl.rollout.tokenizer import HfTokenizer
from verl.types import ActionKind, Passage, Stop

BOLTON = Passage(id="1", title='"Bolton"', text='A "town".', score=0.9)
OPENED = "<|im_start|>assistant\n<think>"


async def test_an_episode_with_opened_thoughts_and_results_in_json_ends_at_an_invalid_action() -> None:
    tokenizer = HfTokenizer(qwen_with_tools())
    outputs = [
        ' hm </think>\n<tool_call>{"name": "web_search", "arguments": {"query": ["who", "no"]}}</tool_call>',
        ' hm </think>\n<tool_call>{"name": "search", "arguments": {"query": "who"}}</tool_call>',
    ]
    generate = ScriptedGenerate([tokenizer.encode(output) for output in outputs])
    search = ScriptedSearch({"who": (BOLTON,)})
    agent = make_agent(generate, search, tokenizer=tokenizer, name="igpo", max_response_length=200)
    trajectory = await agent.run(make_question(), sample=0, seed=0, greedy=False)

    first, second = trajectory.turns
    assert (search.queries, [span.text for span in first.action.spans]) == (
        ["who", "no"],
        ["hm", "who", "no"],
    )
    assert tokenizer.decode(trajectory.prompt_ids.tolist()).endswith(OPENED)
    read = tokenizer.decode(first.observation_ids.tolist())
    assert read.endswith(f"</tool_response><|im_end|>\n{OPENED}")
    page = {"title": "Bolton", "url": "1", "quick_summary": 'A "town".'}
    assert json.loads(read.partition("<tool_response>\n")[2].partition("\n</tool_response>")[0]) == [
        {"search_query": "who", "web_page_info_list": [page]},
        {"search_query": "", "web_page_info_list": []},
    ]
    assert second.action.kind is ActionKind.INVALID
    assert (trajectory.stop, trajectory.answer, len(second.observation_ids)) == (Stop.BUDGET, None, 0)


def test_its_signature_and_calls_have_the_published_name() -> None:
    tokenizer = HfTokenizer(qwen_with_tools())
    prompt_format = make_format(tokenizer, name="igpo", tools=["search", "python"])
    signatures = prompt_format.write_prompt("Who?")[0].content
    assert '"name": "web_search"' in signatures
    assert '"name": "python"' in signatures
