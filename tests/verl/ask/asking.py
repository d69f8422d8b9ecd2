"""An asker whose engine and search engine are scripted, in characters as tokens."""

from __future__ import annotations

from collections.abc import Sequence

from tests.agents import make_format, make_tools
from tests.fakes import CharTokenizer, ScriptedGenerate, ScriptedSearch
from verl.ask.asker import Asker, Parts
from verl.ask.gains import GainMeter
from verl.trainer.config.schema import Config
from verl.types import Passage

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
) -> tuple[Asker, ScriptedGenerate]:
    script: list[Sequence[int] | Exception] = [CHARS.encode(o) if isinstance(o, str) else o for o in outputs]
    generate = ScriptedGenerate(script)
    parts = Parts(
        generate=generate,
        prompt_format=make_format(CHARS),
        tools=make_tools(search or ScriptedSearch(dict(FOUND)), ["search"]),
        codec=CHARS,
        meter=meter,
    )
    return Asker(make_config(), parts), generate
