"""Agents and prompt formats with the packaged texts, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes import ScriptedSearch
from verl.agent.formats import FORMATS
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.agent.tools import TOOLS
from verl.agent.tools.search import render_passages
from verl.protocols import Generate, PromptFormat, Search, Tokenizer, Tool, ToolResources
from verl.trainer.config.schema import RetrieverConfig
from verl.types import Observation, Passage, ToolCall

LIMITS = {
    "max_turns": 2,
    "max_start_length": 100,
    "max_prompt_length": 4000,
    "max_response_length": 60,
    "max_obs_length": 400,
}


def make_tools(search: Search, names: Sequence[str], *, search_timeout_s: float = 30) -> list[Tool]:
    """Return the tools of these names."""
    resources = ToolResources(open_search=lambda: search, tools=tuple(names))
    settings = {name: TOOLS[name].settings_class() for name in names}
    for each in settings.values():
        if isinstance(each, RetrieverConfig):
            each.timeout_s = search_timeout_s
    texts = {
        name: load_texts(PACKAGED_FILE, section=f"tools.{name}", entries=TOOLS[name].texts) for name in names
    }
    return [TOOLS[name](settings[name], texts=texts[name], resources=resources) for name in names]


def make_format(
    tokenizer: Tokenizer, *, name: str = "search_r1", tools: Sequence[str] = ("search",)
) -> PromptFormat:
    """Return a prompt format for these tools."""
    texts = load_texts(PACKAGED_FILE, section=name, entries=FORMATS[name].texts)
    specs = [tool.spec for tool in make_tools(ScriptedSearch(), tools)]
    return FORMATS[name](tokenizer=tokenizer, texts=texts, tools=specs)


def make_agent(
    generate: Generate,
    search: Search,
    *,
    tokenizer: Tokenizer,
    name: str = "search_r1",
    tools: Sequence[str] = ("search",),
    search_timeout_s: float = 30,
    dropped_text: str | None = None,
    **limits: int,
) -> ToolAgent:
    """Return an agent with `LIMITS`, some of them replaced."""
    return ToolAgent(
        generate=generate,
        prompt_format=make_format(tokenizer, name=name, tools=tools),
        tools=make_tools(search, tools, search_timeout_s=search_timeout_s),
        limits=EpisodeLimits(**(LIMITS | limits), temperature=0.7),
        dropped_text=dropped_text,
    )


SEARCH = ToolCall(tool="search", arguments={"query": "q"})


def render(prompt_format: PromptFormat, observation: Observation) -> list[int]:
    """Return what the policy reads after one search."""
    return prompt_format.render_observations([SEARCH], [observation])


def make_observation(*passages: Passage) -> Observation:
    """Return what the tool `search` makes of these passages."""
    return Observation(text=render_passages(passages), passages=passages)
