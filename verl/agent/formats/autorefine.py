"""The tags of AutoRefine (arXiv 2505.11277), the format of IG-Search: those of Search-R1 and `<refine>`.

The cycle is `<think>`, `<search>`, `<documents>` by the environment, then `<refine>`, the policy's summary of
them, and so on up to `<answer>`.
"""

from __future__ import annotations

from verl.agent.formats.search_r1 import SearchR1Format
from verl.types import SpanKind


class AutoRefineFormat(SearchR1Format):
    """The prompt format `autorefine`: Search-R1's with a part more and texts of its own."""

    name = "autorefine"
    parts = (SpanKind.THINK, SpanKind.REFINE)
