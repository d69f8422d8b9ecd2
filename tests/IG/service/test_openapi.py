"""The document says what the service does: generated requests, good and bad, over every operation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck
from schemathesis import Case
from schemathesis.specs.openapi.checks import negative_data_rejection

from tests.IG.service.backends import FakeBackend, make_app
from tests.processes import served_in_thread

FLAGS = ("--max-items", "50")


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_in_thread(make_app(FakeBackend(), *FLAGS)) as address:
        yield address


schema = schemathesis.openapi.from_dict(make_app(FakeBackend(), *FLAGS).openapi())


@schema.parametrize()
@hypothesis.settings(
    max_examples=30, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
def test_no_request_breaks_the_contract(case: Case, url: str) -> None:
    """Generated requests, half of them malformed: documented statuses and shapes, and never a 5xx.

    What the document does not promise is accepted too, such as "3" for 3: the published server accepts it.
    """
    case.call_and_validate(base_url=url, excluded_checks=[negative_data_rejection])


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    made: dict[str, Any] = make_app(FakeBackend()).openapi()
    return made


def test_everything_is_described_with_examples(document: dict[str, Any]) -> None:
    models = document["components"]["schemas"]
    for name, model in models.items():
        assert model.get("description") or "ValidationError" in name, name  # FastAPI's own have none
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert operation["description"], path
            assert all(response["description"] for response in operation["responses"].values()), path
    described = {"InfoGainItem", "ResponseDetail", "ErrorResponse"}
    for name in described:
        assert all("examples" in field for field in models[name]["properties"].values()), name
    assert models["Work"]["properties"]["baselines"]["description"] == "Conditions without context."


def test_every_refusal_is_documented(document: dict[str, Any]) -> None:
    for path in ("/compute_info_gain", "/entailment"):
        work = document["paths"][path]["post"]["responses"]
        assert set(work) == {"200", "400", "401", "403", "408", "413", "415", "422", "429", "503"}
        assert "Retry-After" in work["429"]["headers"]
        assert "Retry-After" in work["503"]["headers"]
    assert set(document["paths"]["/readyz"]["get"]["responses"]) == {"200", "403", "503"}


@pytest.mark.parametrize("token", ["", "some-token"])
def test_the_token_is_documented_where_it_is_asked_for(token: str) -> None:
    paths = make_app(FakeBackend(), environ={"IG_TOKEN": token}).openapi()["paths"]
    guarded = {
        path for path, operations in paths.items() if any("security" in o for o in operations.values())
    }
    assert guarded == ({"/compute_info_gain", "/entailment", "/metrics", "/version"} if token else set())
