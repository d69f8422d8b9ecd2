"""Answers of servers, ours and published ones."""

from __future__ import annotations

import json
from typing import Any

import pytest

from search_r1.search.remote import RemoteRetriever
from search_r1.search.retriever import FailureKind, Outcome, SearchFailure
from tests.fakes import AnsweringServer, Reply


def find(query: str) -> list[dict[str, Any]]:
    return [{"document": {"id": query, "contents": f"T\n{query}"}, "score": 1.0}]


def answer(body: dict[str, Any]) -> Reply:
    """Ignores what it does not know, as the published server."""
    return Reply(json.dumps({"result": [find(query) for query in body["queries"]]}))


async def ask(server: AnsweringServer, queries: list[str], *, timeout_s: float = 5.0) -> list[Outcome]:
    async with server.running():
        remote = RemoteRetriever(server.url)
        outcomes = await remote.search(queries, topk=3, timeout_s=timeout_s)
        await remote.aclose()
    return outcomes


def ids(outcomes: list[Outcome]) -> list[str]:
    """Of the best document; the kind of a failure, nothing where nothing was found."""
    return [
        outcome.kind if isinstance(outcome, SearchFailure) else outcome[0].document.id if outcome else ""
        for outcome in outcomes
    ]


async def test_a_published_server_answers_in_one_request() -> None:
    server = AnsweringServer(answer)
    assert ids(await ask(server, ["a", " ", "b"])) == ["a", "", "b"]
    assert [body["queries"] for body in server.bodies] == [["a", "b"]]


@pytest.mark.parametrize(("status", "kind"), [(500, FailureKind.INTERNAL), (413, FailureKind.REFUSED)])
async def test_a_query_that_a_published_server_cannot_take_fails_alone(
    status: int, kind: FailureKind
) -> None:
    server = AnsweringServer(lambda body: Reply(status=status) if "bad" in body["queries"] else answer(body))
    assert ids(await ask(server, ["a", "b", "bad", "c"], timeout_s=60.0)) == ["a", "b", kind, "c"]


async def test_a_server_that_takes_fewer_queries_gets_fewer() -> None:
    server = AnsweringServer(lambda body: Reply(status=413) if len(body["queries"]) > 3 else answer(body))
    queries = [f"q{row}" for row in range(10)]
    assert ids(await ask(server, queries, timeout_s=60.0)) == queries


async def test_what_cannot_be_read_fails_alone_too() -> None:
    lists: list[object] = [find("a"), [{"document": {}, "score": 1.0}], None, "text", find("b") * 4, []]
    outcomes = await ask(
        AnsweringServer(lambda _: Reply(json.dumps({"result": lists}))), [f"q{row}" for row in range(6)]
    )
    assert ids(outcomes) == ["a", *[FailureKind.MALFORMED] * 4, ""]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"kind": "deadline", "reason": "5 s are over"}, FailureKind.DEADLINE),
        ({"kind": "brand_new", "reason": "?"}, FailureKind.INTERNAL),
        ({}, FailureKind.INTERNAL),
        ("plain words", FailureKind.INTERNAL),
        ({"kind": "x" * 10**6, "reason": "y" * 10**6}, FailureKind.INTERNAL),
    ],
)
async def test_the_error_of_a_query_is_a_failure_even_beside_documents(
    error: object, kind: FailureKind
) -> None:
    body = {"result": [find("Error: engine down"), find("b")], "errors": [error, None]}
    outcomes = await ask(AnsweringServer(lambda _: Reply(json.dumps(body))), ["a", "b"])
    assert ids(outcomes) == [kind, "b"]
    assert isinstance(outcomes[0], SearchFailure)
    assert len(outcomes[0].reason) < 1000


async def test_half_characters_spoil_neither_a_request_nor_a_passage() -> None:
    document = '{"document": {"id": "1", "contents": "T\\nhalf \\ud83d of it"}, "score": 1}'
    server = AnsweringServer(lambda body: Reply(f'{{"result": [[{document}]]}}'))
    (outcome,) = await ask(server, ["half \ud83d too"])
    assert not isinstance(outcome, SearchFailure)
    assert "half" in outcome[0].document.contents
    assert outcome[0].document.contents.encode()
    assert server.bodies[0]["queries"] == ["half ? too"]
