"""An asker whose engine and search engine are scripted, in characters as tokens."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tests.agents import make_format, make_tools
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch
from verl.ask.asker import Asker, Parts
from verl.ask.gains import GainMeter
from verl.errors import RolloutError
from verl.protocols import Generate
from verl.trainer.config.schema import Config
from verl.types import Completion, Finish, IntArray, Passage, Sampling

CHARS = CharTokenizer()
HARWICK = Passage(id="637", title='"Gilbert Nash"', text="The birthplace is Harwick <b>&</b>.", score=0.7)
SCRIPT = ("<think> I need it. </think><search> Gilbert Nash </search>", "<answer> Harwick </answer>")
FOUND = {"Gilbert Nash": (HARWICK,)}


def make_config() -> Config:
    config = Config()
    config.data.max_start_length, config.data.max_prompt_length = 3000, 6000
    config.data.max_obs_length, config.data.max_response_length = 1000, 200
    return config


def make_asker(
    outputs: Sequence[str | Exception] = SCRIPT,
    *,
    meter: GainMeter | None = None,
    search: ScriptedSearch | None = None,
    config: Config | None = None,
) -> tuple[Asker, ScriptedGenerate]:
    script: list[Sequence[int] | Exception] = [CHARS.encode(o) if isinstance(o, str) else o for o in outputs]
    generate = ScriptedGenerate(script)
    return make_asker_of(generate, meter=meter, search=search, config=config), generate


def make_asker_of(
    generate: Generate,
    *,
    meter: GainMeter | None = None,
    search: ScriptedSearch | None = None,
    config: Config | None = None,
) -> Asker:
    prompt_format = make_format(CHARS)
    parts = Parts(
        generate=generate,
        prompt_format=prompt_format,
        tools=make_tools(search or ScriptedSearch(dict(FOUND)), ["search"]),
        codec=CHARS,
        write_prompt=prompt_format.write_prompt,
        meter=meter,
    )
    return Asker(config or make_config(), parts)


@dataclass(slots=True)
class ReadingGenerate:
    """Searches, then answers; words of the question hold it, or let it fail before or after the search."""

    is_held: threading.Event = field(default_factory=threading.Event)
    is_free: threading.Event = field(default_factory=threading.Event)
    is_cancelled: threading.Event = field(default_factory=threading.Event)
    seeds: list[int | None] = field(default_factory=list)

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:
        question, _, read = CHARS.decode(prompt_ids.tolist()).rpartition("Question:")[2].partition("?")
        has_read = "Harwick" in read
        self.seeds.append(sampling.seed)
        if "defective" in question and has_read:
            raise ZeroDivisionError("a detail of the inside")
        if "broken" in question or ("unlucky" in question and has_read):
            raise RolloutError("engine-0 is gone: https://user:secret@host/")
        if "slow" in question and has_read:
            await self._hold()
        other = {"lost": "<search>nothing</search>", "empty": "<answer></answer>"}
        scripted = next((text for word, text in other.items() if word in question), SCRIPT[has_read])
        ids = CHARS.encode(scripted)
        return Completion(
            ids=np.array(ids, np.int32),
            log_probs=np.full(len(ids), -1.0, np.float32),
            finish=Finish.STOP,
            version=0,
        )

    async def _hold(self) -> None:
        self.is_held.set()
        try:
            while not self.is_free.is_set():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            self.is_cancelled.set()
            raise
