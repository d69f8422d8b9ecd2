"""Our client and our server, over a real socket: limits of the one are no failures of the other."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from search_r1.search.client import HttpSearch
from search_r1.search.retriever import FailureKind, SearchFailure
from tests.search_r1.search.servers import EchoRetriever, serving
from verl.errors import ServiceError

TOKEN = "a-token-of-ours"


@asynccontextmanager
async def searching(
    retriever: EchoRetriever, *flags: str, timeout_s: float = 20.0, token: str = "", load_s: float = 0.0
) -> AsyncIterator[HttpSearch]:
    environ = {"RETRIEVER_TOKEN": token} if token else {}
    async with serving(retriever, *flags, environ=environ, load_s=load_s) as client:
        search = HttpSearch(str(client.base_url), topk=2, timeout_s=timeout_s, token=token or None)
        yield search
        await search.aclose()


async def ask_all(search: HttpSearch, queries: list[str]) -> list[str]:
    """The id of the best passage, or the message of the failure."""
    outcomes = await asyncio.gather(*map(search.search, queries), return_exceptions=True)
    assert all(isinstance(outcome, tuple | ServiceError) for outcome in outcomes)
    return [outcome[0].id if isinstance(outcome, tuple) else str(outcome) for outcome in outcomes]


@pytest.mark.parametrize("kind", list(FailureKind))
async def test_a_query_fails_alone_whatever_its_failure(kind: FailureKind) -> None:
    retriever = EchoRetriever(act={"bad": SearchFailure(kind=kind, reason="for a reason")})
    async with searching(retriever) as search:
        first, bad, last = await ask_all(search, ["first", "bad", "last"])
    assert (first, last) == ("first/0", "last/0")
    assert bad.startswith("retriever: http://")
    assert bad.endswith(f"{kind}: for a reason")


async def test_token_and_description() -> None:
    async with searching(EchoRetriever(), token=TOKEN) as search:
        await search.wait_ready(5.0)
        described = await search.describe()
    assert described is not None
    assert described["retriever"] == {"retriever": "echo"}
