"""Endpoints of a scripted agent over real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest

from tests.processes import served_in_thread
from tests.verl.ask.asking import ReadingGenerate, make_asker_of
from verl.ask.asker import Asker, AskSettings
from verl.ask.gains import GainMeter
from verl.ask.server import create_app
from verl.ask.settings import resolve_server

Serve = Callable[..., AbstractContextManager[str]]


@contextmanager
def serving(
    generate: ReadingGenerate, *, token: str = "", meter: GainMeter | None = None, **flags: str
) -> Iterator[str]:
    """Serve an agent; yield the address."""

    async def start() -> Asker:
        return make_asker_of(generate, meter=meter)

    settings = resolve_server(flags, {"ASK_TOKEN": token})
    with served_in_thread(
        create_app(start, model="policy", settings=settings, defaults=AskSettings())
    ) as url:
        yield url


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with serving(ReadingGenerate()) as url:
        yield url
