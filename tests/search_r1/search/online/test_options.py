from __future__ import annotations

import json
import logging
from dataclasses import asdict

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.online.options import ENGINE_NAMES, OnlineMode, OnlineOptions
from search_r1.search.online.retriever import open_online
from search_r1.search.retriever import SearchFailure
from search_r1.search.settings import resolve_server
from tests.search_r1.search.online.fake_engines import SECRET


def resolve(*flags: str, **environ: str) -> OnlineOptions:
    return resolve_server(flags, environ=environ)[1].online


def test_defaults_and_a_file_means_recording() -> None:
    assert resolve() == OnlineOptions()
    assert resolve("--online_cache", "s.sqlite").mode is OnlineMode.RECORD
    assert resolve("--online_cache", "s.sqlite", "--online_mode", "live").mode is OnlineMode.LIVE
    assert resolve("--online_cache", "s.sqlite", "--max_online_requests", "0").max_requests == 0


def test_keys_come_from_the_environment_and_hide() -> None:
    options = resolve(
        SERPER_API_KEY=SECRET, GOOGLE_API_KEY="", HOME="/root", https_proxy=f"http://u:{SECRET}@p:1"
    )
    assert set(options.keys) == {"SERPER_API_KEY"}
    assert options.keys["SERPER_API_KEY"].get_secret_value() == SECRET
    for text in (repr(options), repr(asdict(options)), json.dumps(asdict(options), default=str)):
        assert SECRET not in text


@pytest.mark.parametrize("key", [f"{SECRET}\n", f"{SECRET} x", "schlüssel-schlüssel", "short"])
def test_an_unusable_key_is_named_and_not_shown(key: str) -> None:
    with pytest.raises(RetrieverError, match="SERPAPI_API_KEY") as caught:
        resolve(SERPAPI_API_KEY=key)
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--online_mode", "replay"], "--online_mode replay needs a file: --online_cache"),
        (["--max_online_requests", "1"], "--max_online_requests needs a file"),
        (["--max_online_requests", "-1"], "--max_online_requests is '-1'"),
        (["--online_parallel", "0"], "--online_parallel is '0', expected a whole number from 1 to 256"),
        (["--online_date", "31.1.2025"], r"--online_date .* got '31\.1\.2025'"),
        (["--online_date", "2025-02-30"], "got '2025-02-30'"),
        (["--online_url", "ftp://host/"], "got 'ftp://host/'"),
        (["--online_url", "http://host:99999/"], "--online_url"),
        (["--online_url", f"https://me:{SECRET}@host/search"], "--online_url must not hold"),
        (["--online_url", f"me:{SECRET}@host/search"], "--online_url must not hold"),
        (["--online_url", f"https://me:{SECRET}@[host/search"], "--online_url must not hold"),
        (["--retriever_name", "bing"], "'bing', whose API Microsoft retired in August 2025"),
    ],
)
def test_what_does_not_go_together_is_named(flags: list[str], complaint: str) -> None:
    with pytest.raises(RetrieverError, match=complaint) as caught:
        resolve(*flags)
    assert SECRET not in str(caught.value)


def test_a_url_may_have_an_at_sign_in_its_path() -> None:
    assert resolve("--online_url", "https://host/@me/search?as=a@b").url == "https://host/@me/search?as=a@b"


async def test_every_engine_can_be_mocked_without_key_and_network(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert not resolve(IGPO_MOCK_SEARCH="false").mock
    assert resolve("--mock_search").mock
    for name in ENGINE_NAMES:
        retriever = open_online(name, options=resolve(IGPO_MOCK_SEARCH="true"))
        assert retriever.describe() == {"retriever": "mock", "stands_in_for": name}
        first, blank, other = await retriever.search(["größe ", " ", "b"], topk=3, timeout_s=1.0)
        [again] = await retriever.search(["größe"], topk=3, timeout_s=1.0)
        assert not isinstance(first, SearchFailure)
        assert first == again != other
        assert (blank, len(first)) == ((), 3)
        assert all(hit.document.contents.startswith('"Mock result') for hit in first)
        assert all("größe" in hit.document.contents for hit in first)
    assert "MOCK SEARCH" in caplog.text
