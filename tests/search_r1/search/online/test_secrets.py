from __future__ import annotations

import logging
from pathlib import Path

import pytest

from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.online.retriever import open_online
from tests.search_r1.search.online.fake_engines import (
    KEYS,
    NAMES,
    SECRET,
    FakeEngine,
    Fault,
    search,
)


@pytest.mark.parametrize("name", NAMES)
async def test_the_key_reaches_the_engine_and_nothing_else(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """Planted: echoed by the engine in titles, addresses, refusals and broken answers."""
    caplog.set_level(logging.DEBUG)
    for noisy in ("httpx", "httpcore", "asyncio"):
        caplog.set_level(logging.DEBUG, logger=noisy)
    cache = tmp_path / "s.sqlite"
    result = f'{{"title": "{SECRET}", "name": "{SECRET}", "link": "https://x/?k={SECRET}", "url": "u"}}'
    echo = f'{{"organic": [{result}], "organic_results": [{result}], "items": [{result}], "webPages": '
    faults = [
        Fault(status=200, body=echo + f'{{"value": [{result}]}}}}'),
        *[Fault(status=status, body=f"denied: {SECRET}") for status in (400, 401, 403, 404, 429, 500)],
        Fault(status=200, body=f"<html>{SECRET}</html>"),
        Fault(status=200, body=f'{{"said": "{SECRET}"}}'),
        Fault(hangs=True),
    ]
    seen: list[str] = []
    async with (fake := FakeEngine(name, faults=faults)).running():
        options = fake.options(mode=OnlineMode.RECORD, cache_path=cache, max_requests=100)
        retriever = open_online(name, options=options)
        for i in range(12):
            outcomes = await retriever.search([f"query {i}"], topk=3, timeout_s=0.5)
            seen += [repr(outcomes), repr(retriever.describe()), repr(retriever), repr(options)]
        await retriever.aclose()
        dead = OnlineOptions(keys=KEYS, url="http://127.0.0.1:9/")
        seen.append(repr(await search(name, dead, timeout_s=0.3)))
    assert all(SECRET in (repr(asked.params) + repr(asked.headers)) for asked in fake.asked)
    seen += [caplog.text, *(str(record.args) for record in caplog.records), *capfd.readouterr()]
    assert "HTTP Request" in caplog.text  # httpx does log addresses
    for text in seen:
        assert SECRET not in text
        assert "geheim" not in text
    for file in tmp_path.iterdir():
        assert b"geheim" not in file.read_bytes()
