from __future__ import annotations

import argparse
import json
import logging
from dataclasses import asdict
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.online.assemble import build_online
from search_r1.search.online.engines import ENGINES
from search_r1.search.online.options import (
    ONLINE_NAMES,
    OnlineMode,
    OnlineOptions,
    add_online_arguments,
    resolve_online,
)
from search_r1.search.retriever import SearchFailure
from tests.search_r1.search.online.fake_engines import KEYS, SECRET


def resolve(*flags: str, **environ: str) -> OnlineOptions:
    parser = argparse.ArgumentParser()
    add_online_arguments(parser)
    return resolve_online(parser.parse_args(flags), environ)


def test_defaults() -> None:
    options = resolve()
    assert options == OnlineOptions()
    assert options.mode is OnlineMode.LIVE


def test_a_file_means_recording() -> None:
    assert resolve("--online_cache", "s.sqlite").mode is OnlineMode.RECORD
    assert resolve("--online_cache", "s.sqlite", "--online_mode", "live").mode is OnlineMode.LIVE


def test_keys_come_from_the_environment_and_hide() -> None:
    options = resolve(
        SERPER_API_KEY=SECRET, BING_API_KEY="", HOME="/root", https_proxy=f"http://u:{SECRET}@p:1"
    )
    assert set(options.keys) == {"SERPER_API_KEY"}
    assert options.keys["SERPER_API_KEY"].get_secret_value() == SECRET
    for text in (
        repr(options),
        str(options),
        repr(asdict(options)),
        json.dumps(asdict(options), default=str),
    ):
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
        (["--online_mode", "record"], "--online_mode record needs a file"),
        (["--spend_cap_usd", "1"], "--spend_cap_usd needs a file"),
        (["--spend_cap_usd", "-1", "--online_cache", "s"], "--spend_cap_usd .* got -1"),
        (["--price_per_1000_usd", "nan"], "--price_per_1000_usd .* got nan"),
        (["--online_parallel", "0"], "--online_parallel must be in 1..256, got 0"),
        (["--online_date", "31.1.2025"], r"--online_date .* got '31\.1\.2025'"),
        (["--online_date", "2025-02-30"], "got '2025-02-30'"),
        (["--online_date", "20250131"], "got '20250131'"),
        (["--online_url", "localhost"], "--online_url .* got 'localhost'"),
        (["--online_url", "ftp://host/"], "got 'ftp://host/'"),
        (["--online_url", "http://host:99999/"], "--online_url"),
    ],
)
def test_what_does_not_go_together_is_named(flags: list[str], complaint: str) -> None:
    with pytest.raises(RetrieverError, match=complaint):
        resolve(*flags)


def test_a_password_in_the_url_is_refused_and_not_shown() -> None:
    with pytest.raises(RetrieverError, match="--online_url must not hold") as caught:
        resolve("--online_url", f"https://me:{SECRET}@host/search")
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "mocked"),
    [("true", True), ("True", True), ("1", True), ("false", False), ("0", False), ("", False)],
)
def test_the_mock_is_switched_by_the_environment(value: str, mocked: bool) -> None:
    assert resolve(IGPO_MOCK_SEARCH=value).mock is mocked
    assert resolve("--mock_search", IGPO_MOCK_SEARCH=value).mock


def test_an_unclear_switch_is_refused() -> None:
    with pytest.raises(RetrieverError, match="IGPO_MOCK_SEARCH must be true or false, got 'maybe'"):
        resolve(IGPO_MOCK_SEARCH="maybe")


def test_proxies_are_those_of_the_environment() -> None:
    options = resolve(HTTPS_PROXY="http://big:1", https_proxy="http://small:1", NO_PROXY="serpapi.com,.local")
    proxy = options.proxy_for("https://google.serper.dev/search")
    assert proxy is not None
    assert proxy.get_secret_value() == "http://small:1"
    assert options.proxy_for("https://serpapi.com/search.json") is None
    assert options.proxy_for("https://search.local/x") is None
    assert options.proxy_for("http://google.serper.dev/") is None
    assert resolve().proxy_for("https://google.serper.dev/search") is None


@pytest.mark.parametrize("name", ONLINE_NAMES)
@pytest.mark.parametrize("by", ["flag", "environment"])
async def test_every_engine_can_be_mocked_without_key_and_network(
    name: str, by: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    options = resolve("--mock_search") if by == "flag" else resolve(IGPO_MOCK_SEARCH="true")
    retriever = build_online(name, options=options)
    assert "MOCK SEARCH" in caplog.text
    assert retriever.describe() == {"retriever": "mock", "stands_in_for": name}
    first, blank, other = await retriever.search(["größe ", " ", "b"], topk=3, timeout_s=1.0)
    [again] = await build_online(name, options=options).search(["größe"], topk=3, timeout_s=1.0)
    await retriever.aclose()
    assert not isinstance(first, SearchFailure)
    assert first == again != other
    assert blank == ()
    assert len(first) == 3
    for hit in first:
        assert hit.document.id.startswith("mock://")
        assert hit.document.contents.startswith('"Mock result')
        assert "größe" in hit.document.contents
        assert "not found anywhere" in hit.document.contents


async def test_mock_is_also_a_name_of_its_own() -> None:
    assert build_online("mock", options=resolve()).describe()["retriever"] == "mock"


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_key_is_named_before_anything_is_asked(name: str) -> None:
    with pytest.raises(RetrieverError, match=" and ".join(ENGINES[name].key_variables)):
        build_online(name, options=resolve())


def test_an_unknown_engine_is_refused() -> None:
    with pytest.raises(RetrieverError, match="'yahoo'; expected one of serper"):
        build_online("yahoo", options=resolve())


def test_a_cap_needs_a_price(tmp_path: Path) -> None:
    options = OnlineOptions(keys=KEYS, cache_path=tmp_path / "s.sqlite", spend_cap_usd=1.0)
    with pytest.raises(RetrieverError, match=r"bing publishes none.*--price_per_1000_usd"):
        build_online("bing", options=options)


def test_an_address_that_was_retired_is_not_asked() -> None:
    with pytest.raises(RetrieverError, match=r"api\.bing\.microsoft\.com.* was retired; .* --online_url"):
        build_online("bing", options=OnlineOptions(keys=KEYS))
