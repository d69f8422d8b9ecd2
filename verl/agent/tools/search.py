"""The tool `search`: the passages that the search engine finds, one line per passage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar

from verl.errors import ServiceError
from verl.protocols import FixedText, Tool, ToolResources
from verl.trainer.config.schema import RetrieverConfig
from verl.types import Observation, Passage, ToolSpec, Trajectory

_GRACE_S = 1.0
"""The client reports a search that took too long better than the agent loop can, which cancels the call."""
_MAX_SHOWN_ID = 64


def render_passages(passages: Sequence[Passage], *, shows_ids: bool = False) -> str:
    """Return `Doc k(Title: title) text`, one line per passage, k from 1: Search-R1's lines, byte for byte.

    With ids they are `Doc k(Id: id, Title: title) text`; ids of more than 64 characters are left out.
    """
    lines = []
    for k, passage in enumerate(passages, start=1):
        is_shown = shows_ids and 0 < len(passage.id) <= _MAX_SHOWN_ID
        name = f"Id: {passage.id}, Title: {passage.title}" if is_shown else f"Title: {passage.title}"
        lines.append(f"Doc {k}({name}) {passage.text}\n")
    return "".join(lines).strip()


def render_context(trajectory: Trajectory) -> str:
    """Return all passages that the policy read, one block per search: the context for the IG service."""
    return "\n".join(render_passages(turn.passages) for turn in trajectory.turns if turn.passages)


class SearchTool(Tool):
    """The tool `search`: asks the search engine."""

    section = "retriever"
    settings_class = RetrieverConfig
    searches = True
    texts: ClassVar[Mapping[str, FixedText]] = {"nothing_found": FixedText()}

    def __init__(
        self, settings: RetrieverConfig, *, texts: Mapping[str, str], resources: ToolResources
    ) -> None:
        self._settings = settings
        self._search = resources.open_search()
        self._render = partial(render_passages, shows_ids="open_page" in resources.tools)
        self.spec = ToolSpec(
            name="search",
            description="search for passages that help to answer the question",
            parameters={"query": "what to search for"},
            timeout_s=settings.timeout_s + _GRACE_S,
            shortest_text=self._render([Passage(id="0" * _MAX_SHOWN_ID, title="", text="", score=0.0)]),
            empty_text=texts["nothing_found"].format(),
        )

    async def connect(self, timeout_s: float) -> Mapping[str, object]:
        """Wait for the search engine; return what the passages depend on: other indexes, other passages."""
        await self._search.wait_ready(timeout_s)
        version = await self._search.describe()
        return {"url": self._settings.url, "topk": self._settings.topk, "version": version}

    async def call(
        self,
        arguments: Mapping[str, object],
        *,
        deadline: float,  # noqa: ARG002 (the client of the search engine has a limit that ends before)
    ) -> Observation:
        """Return the passages for `query`, or the failure of the search engine."""
        try:
            passages = await self._search.search(str(arguments["query"]))
        except ServiceError as error:
            return Observation(failure=str(error))
        return Observation(text=self._render(passages), passages=passages)

    async def aclose(self) -> None:
        """Close the connections to the search engine."""
        await self._search.aclose()

    def shorten(self, observation: Observation, max_chars: int) -> Observation:
        """Return the passages that can be read in the first `max_chars` characters.

        The last one keeps the text that is left of it, and one of which only the heading would be left is
        dropped. The first one is never dropped: its title is cut instead.
        """
        passages, documents = observation.passages, observation.text
        shown: tuple[Passage, ...] = ()
        for count in range(len(passages), 0, -1):
            *whole, last = passages[:count]
            heading = self._render([*whole, replace(last, text="")])
            end = min(max_chars, len(self._render(passages[:count])))
            if len(documents[:max_chars].rstrip()) > len(heading):
                text = documents[:end].rstrip()[len(heading) + 1 :]
                shown = (
                    *whole,
                    replace(last, text=text, is_cut=last.is_cut or len(text) < len(last.text.rstrip())),
                )
                break
        else:
            if passages:
                start = len(self._render([replace(passages[0], title="", text="")])) - 1
                title = documents[start : min(start + len(passages[0].title), max_chars)]
                shown = (replace(passages[0], title=title, text="", is_cut=True),)
        return Observation(text=self._render(shown), passages=shown)
