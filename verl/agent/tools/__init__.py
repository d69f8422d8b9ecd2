"""The tools by the names that `agent.tools` gives them."""

from __future__ import annotations

from verl.agent.tools.open_page import OpenPageTool
from verl.agent.tools.python import PythonTool
from verl.agent.tools.search import SearchTool
from verl.protocols import Tool

TOOLS: dict[str, type[Tool]] = {
    "search": SearchTool,
    "python": PythonTool,
    "open_page": OpenPageTool,
}
