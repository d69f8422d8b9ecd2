"""The prompt formats by the name that `agent.format` gives them."""

from __future__ import annotations

from verl.agent.formats.autorefine import AutoRefineFormat
from verl.agent.formats.igpo import IgpoFormat
from verl.agent.formats.search_r1 import SearchR1Format
from verl.agent.formats.tool_calls import ToolCallsFormat
from verl.protocols import PromptFormat

FORMATS: dict[str, type[PromptFormat]] = {
    "search_r1": SearchR1Format,
    "autorefine": AutoRefineFormat,
    "tool_calls": ToolCallsFormat,
    "igpo": IgpoFormat,
}
