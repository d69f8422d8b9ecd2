"""The tool `open_page`: a whole document of the search engine, in parts, by the id of one of its passages."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from verl.errors import ServiceError
from verl.protocols import FixedText, Page, Tool, ToolResources
from verl.trainer.config.fields import positive, setting
from verl.types import Observation, Passage, ToolSpec

logger = logging.getLogger(__name__)

_GRACE_S = 1.0
"""The client reports a call that took too long better than the agent loop can, which cancels it."""
_PROBE = "no passage has this id"
"""With an id that is not the number of a row, the server makes its table of ids: before the first episode."""
_FIRST_PAGE_S = 1800.0
_MAX_PART_DIGITS = 9


@dataclass
class OpenPageConfig:
    """Settings of the tool `open_page`; the search engine is that of the section `retriever`."""

    part_chars: int = setting(2000, lambda value: 100 <= value <= 100_000, "from 100 to 100000")
    timeout_s: float = positive(30.0)


class OpenPageTool(Tool):
    """The tool `open_page`."""

    section = "open_page"
    settings_class = OpenPageConfig
    searches = True
    texts: ClassVar[Mapping[str, FixedText]] = {
        "heading": FixedText(required=("part", "parts"), optional=("title",)),
        "unknown_id": FixedText(),
        "unknown_part": FixedText(optional=("parts",)),
    }

    def __init__(
        self, settings: OpenPageConfig, *, texts: Mapping[str, str], resources: ToolResources
    ) -> None:
        self._settings = settings
        self._texts = texts
        self._search = resources.open_search()
        self.spec = ToolSpec(
            name="open_page",
            description="read the whole document that a search result is from, part by part",
            parameters={"id": "the id of the search result", "part": "the number of the part, from 1"},
            timeout_s=settings.timeout_s + _GRACE_S,
        )

    async def connect(self, timeout_s: float) -> Mapping[str, object]:
        """Wait until the search engine has opened a page; return what pages depend on."""
        await self._search.wait_ready(timeout_s)
        logger.info("opening a page: for this a retriever may read its corpus once, minutes for millions")
        await self._open(_PROBE, part=1, timeout_s=max(timeout_s, _FIRST_PAGE_S))
        return {"part_chars": self._settings.part_chars, "version": await self._search.describe()}

    async def call(self, arguments: Mapping[str, object], *, deadline: float) -> Observation:
        """Return a part of the document, or what is wrong with the id or the part."""
        number = str(arguments["part"]).strip()
        # A number so long or so odd is no part of any document.
        is_number = number.isascii() and number.isdecimal() and len(number) <= _MAX_PART_DIGITS
        part = int(number) if is_number else 0
        left_s = deadline - time.monotonic() - _GRACE_S
        try:
            page = await self._open(str(arguments["id"]).strip(), part=max(part, 1), timeout_s=left_s)
        except ServiceError as error:
            return Observation(failure=str(error))
        if page is None:
            return Observation(text=self._texts["unknown_id"].format())
        if part < 1 or part > page.num_parts:
            return Observation(text=self._texts["unknown_part"].format(parts=page.num_parts))
        heading = self._texts["heading"].format(title=page.title, part=part, parts=page.num_parts)
        body = " ".join(piece.text for piece in page.passages)
        return Observation(text=f"{' '.join(heading.split())}\n{body}", passages=page.passages)

    def shorten(self, observation: Observation, max_chars: int) -> Observation:
        """Return the first `max_chars` characters, and the pieces of passages that can be read in them."""
        text = observation.text[:max_chars].rstrip()
        _, _, body = text.partition("\n")
        if not observation.passages:
            return replace(observation, text=text)
        pieces: list[Passage] = []
        left = len(body)
        for piece in observation.passages:
            if left <= 0:
                break
            is_cut = piece.is_cut or len(piece.text.rstrip()) > left
            pieces.append(replace(piece, text=piece.text[:left], is_cut=is_cut))
            left -= len(piece.text) + 1
        return Observation(text=text, passages=tuple(pieces))

    async def aclose(self) -> None:
        """Close the connections to the search engine."""
        await self._search.aclose()

    async def _open(self, page_id: str, *, part: int, timeout_s: float) -> Page | None:
        size = self._settings.part_chars
        return await self._search.open_page(page_id, part=part, part_chars=size, timeout_s=timeout_s)
