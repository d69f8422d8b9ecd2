"""Agents and prompt formats with the packaged texts, for tests."""

from __future__ import annotations

from collections.abc import Sequence

from tests.fakes import ScriptedSearch
from verl.agent.formats import FORMATS
from verl.agent.loop import EpisodeLimits, ToolAgent
from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.agent.tools import TOOLS
from verl.agent.tools.search import render_passages
from verl.protocols import Generate, PromptFormat, Search, Tokenizer, ToolResources
from verl.types import Observation, Passage

LIMITS = {
    "max_turns": 2,
    "max_start_length": 100,
    "max_prompt_length": 4000,
    "max_response_length": 60,
    "max_obs_length": 400,
}


def make_format(
    tokenizer: Tokenizer, *, name: str = "search_r1", tools: Sequence[str] = ("search",)
) -> PromptFormat:
    """Return a prompt format for these tools."""
    resources = ToolResources(search=ScriptedSearch(), search_timeout_s=30)
    texts = load_texts(PACKAGED_FILE, section=name, entries=FORMATS[name].texts)
    specs = [TOOLS[tool](resources).spec for tool in tools]
    return FORMATS[name](tokenizer=tokenizer, texts=texts, tools=specs)


def make_agent(
    generate: Generate,
    search: Search,
    *,
    tokenizer: Tokenizer,
    name: str = "search_r1",
    tools: Sequence[str] = ("search",),
    search_timeout_s: float = 30,
    **limits: int,
) -> ToolAgent:
    """Return an agent with `LIMITS`, some of them replaced."""
    resources = ToolResources(search=search, search_timeout_s=search_timeout_s)
    return ToolAgent(
        generate=generate,
        prompt_format=make_format(tokenizer, name=name, tools=tools),
        tools=[TOOLS[tool](resources) for tool in tools],
        limits=EpisodeLimits(**(LIMITS | limits), temperature=0.7),
    )


def make_observation(*passages: Passage) -> Observation:
    """Return what the tool `search` makes of these passages."""
    return Observation(text=render_passages(passages), passages=passages)
