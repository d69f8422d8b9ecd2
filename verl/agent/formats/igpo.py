"""The form in which IGPO (arXiv 2510.14967) trained its released checkpoints: a stricter `tool_calls`.

The environment opens `<think>` at the beginning of every turn, search is called `web_search` and gives its
results in JSON, and an invalid action ends the episode.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import ClassVar

from verl.agent.formats.tool_calls import ToolCallsFormat
from verl.agent.spans import THINK_TAG
from verl.types import Observation, ToolCall

_SEARCH = "search"


class IgpoFormat(ToolCallsFormat):
    """The prompt format `igpo`."""

    name = "igpo"
    names: ClassVar[Mapping[str, str]] = {_SEARCH: "web_search"}
    opening = THINK_TAG
    ends_when_invalid = True

    def _write_results(self, calls: Sequence[ToolCall], observations: Sequence[Observation]) -> str:
        """Return passages in JSON, other results as they are."""
        pairs = [*zip(calls, observations, strict=True)]
        if any(call.tool != _SEARCH or (found.text and not found.passages) for call, found in pairs):
            return super()._write_results(calls, observations)
        results = [
            {
                # Cut with the passages, so that the results fit.
                "search_query": self.neutralize(str(call.arguments.get("query", "")))[: len(found.text)],
                "web_page_info_list": [
                    {"title": passage.title.strip('"'), "url": passage.id, "quick_summary": passage.text}
                    for passage in found.passages
                ],
            }
            for call, found in pairs
        ]
        return json.dumps(results, ensure_ascii=False)
