"""The document says what the server does: generated requests, good and bad, over every operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import Case
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.processes import served_in_thread
from tests.search_r1.search.servers import EchoRetriever, make_app

FLAGS = ("--max_queries", "50")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_in_thread(make_app(EchoRetriever(), *FLAGS)) as address:
        yield address


schema = schemathesis.openapi.from_dict(make_app(EchoRetriever(), *FLAGS).openapi())


@schema.parametrize()
@hypothesis.settings(
    max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
def test_no_request_breaks_the_contract(case: Case, url: str) -> None:
    """Generated requests, half of them malformed: documented statuses and shapes, and never a 5xx.

    What the document does not promise is accepted too, such as "3" for 3: the published server accepts it.
    """
    answer = case.call(base_url=url)
    if answer.status_code == 504:  # they may ask for an answer within 5e-324 s
        assert case.body["timeout_s"] < 1
        return
    if answer.status_code == 413:  # is told before anything of it is looked at
        assert len(case.body["queries"]) > 50
        return
    case.validate_response(answer, excluded_checks=[negative_data_rejection])


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    made: dict[str, Any] = make_app(EchoRetriever()).openapi()
    return made


def test_everything_is_described_with_examples(document: dict[str, Any]) -> None:
    models = document["components"]["schemas"]
    for name, model in models.items():
        assert model.get("description") or "ValidationError" in name, name  # FastAPI's own have none
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert all(response["description"] for response in operation["responses"].values()), path
    assert models["RetrieveRequest"]["examples"]


def test_every_refusal_is_documented(document: dict[str, Any]) -> None:
    work = document["paths"]["/retrieve"]["post"]["responses"]
    assert set(work) == {
        *(
            "200",
            "400",
            "401",
            "402",
            "403",
            "408",
            "413",
            "415",
            "422",
            "424",
            "429",
            "500",
            "502",
            "503",
            "504",
        )
    }
    assert "Retry-After" in work["429"]["headers"]
    assert "Retry-After" in work["503"]["headers"]


@pytest.mark.parametrize("token", ["", "some-token"])
def test_the_token_is_documented_where_it_is_asked_for(token: str) -> None:
    paths = make_app(EchoRetriever(), environ={"RETRIEVER_TOKEN": token}).openapi()["paths"]
    guarded = {
        path for path, operations in paths.items() if any("security" in o for o in operations.values())
    }
    assert guarded == ({"/retrieve", "/page", "/metrics", "/version"} if token else set())
