from __future__ import annotations

import asyncio
from dataclasses import asdict

import pytest

from IG.sharing import Work
from serving.web.version import package_version
from tests.IG.service.backends import GOOD, FakeBackend, calling, serving


async def test_wire_format_with_one_bad_item() -> None:
    good = GOOD | {"answers": ["Bolton", "Hull"]}
    poison = GOOD | {"context": "poison"}
    long = GOOD | {"context": "good " * 200_000 + "poison"}  # of which a million characters are read
    async with serving(FakeBackend()) as client:
        # Values and unknown fields are read as by the published service.
        body = {"items": [good | {"id": 7}, poison, good, long], "include_details": "true", "batch_size": 512}
        answer = (await client.post("/compute_info_gain", json=body)).json()
    beliefs = {"beliefs_with_context", "beliefs_no_context"}
    assert set(answer) == {"scores", "errors", "details", "standard_errors", "gain_limit", "work", *beliefs}
    assert answer["beliefs_with_context"][:3] == [0.75, None, 0.75]
    assert answer["beliefs_no_context"][:3] == [0.5, None, 0.5]
    assert answer["scores"] == [pytest.approx(0.25), None, pytest.approx(0.25), pytest.approx(0.5)]
    assert answer["errors"] == [None, "RuntimeError: boom", None, None]
    assert answer["standard_errors"][0] == answer["details"][0]["gain_standard_error"] > 0
    assert answer["standard_errors"][1] is None
    work = answer["work"]
    assert (work["items"], work["conditions"], work["baselines_sampled"]) == (4, 8, 1)
    detail = answer["details"][0]
    assert answer["details"][1] is None
    assert detail["with_context"][0] == {"text": "Bolton", "mean_loglik": -1.0, "length": 1}
    assert detail["entailment_with_context"] == {
        "n_responses": 4,
        "n_answers": 2,  # row by row: the two answers of the first response come first
        "resp_entails_ans": [1.0, 0.1, 1.0, 0.1, 0.1, 0.1, 1.0, 0.1],
        "ans_entails_resp": [1.0, 0.1, 1.0, 0.1, 0.1, 0.1, 1.0, 0.1],
    }
    assert detail["clusters_with_context"] == [0, 0, 1, 0]
    assert (detail["score_with_context"], detail["score_no_context"]) == (0.75, 0.5)
    assert (detail["empty_share_with_context"], detail["empty_share_no_context"]) == (0.0, 0.0)
    assert (detail["source_with_context"], answer["details"][2]["source_with_context"]) == (
        "sampled",
        "joined",
    )


async def test_details_can_be_left_out_and_nothing_asks_for_nothing() -> None:
    async with calling(FakeBackend()) as client:
        bare = await client.post("/compute_info_gain", json={"items": [GOOD], "include_details": False})
        empty = await client.post("/compute_info_gain", json={"items": []})
    assert (bare.json()["scores"], bare.json()["errors"], bare.json()["details"]) == ([0.5], [None], None)
    assert empty.json() == {
        "scores": [],
        "errors": [],
        "details": None,
        "standard_errors": [],
        "beliefs_with_context": [],
        "beliefs_no_context": [],
        "gain_limit": 1.0,
        "work": asdict(Work()),
    }


@pytest.mark.parametrize(
    ("flags", "field", "failed_score"),
    [
        ((), {}, None),
        ((), {"compat": True}, 0.0),
        ((), {"compat": "true"}, 0.0),
        (("--compat",), {}, 0.0),
        (("--compat",), {"compat": False}, None),
        (("--compat",), {"compat": None}, 0.0),
    ],
)
async def test_a_failed_item_has_the_published_score_only_where_it_was_asked_for(
    flags: tuple[str, ...], field: dict[str, object], failed_score: float | None
) -> None:
    poison = GOOD | {"context": "poison"}
    async with calling(FakeBackend(), *flags) as client:
        answer = await client.post("/compute_info_gain", json={"items": [GOOD, poison], **field})
    body = answer.json()
    assert body["scores"] == [pytest.approx(0.5), failed_score]
    assert body["errors"] == [None, "RuntimeError: boom"]
    assert body["standard_errors"][1] is None
    assert body["details"][1] is None


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"items": [GOOD | {"question": None}]},
        {"items": [GOOD | {"answers": "Bolton"}]},
        {"items": [{"question": "Where?"}]},
        {"items": [], "timeout_s": 0},
        {"items": [], "timeout_s": 1e6},
        {"items": [], "timeout_s": "soon"},
        {"items": [], "include_details": 2},
        [],
    ],
)
async def test_a_malformed_request_is_refused(body: object) -> None:
    async with calling(FakeBackend()) as client:
        assert (await client.post("/compute_info_gain", json=body)).status_code == 422
        assert (await client.post("/compute_info_gain", json={"items": [GOOD]})).json()["errors"] == [None]


def body_of(question: str, context: str = '""', answers: str = "[]") -> str:
    return f'{{"items": [{{"question": {question}, "context": {context}, "answers": {answers}}}]}}'


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ('{"items": [{"question": NaN}]}', ["items", 0, "question"]),
        (body_of('"Where?"', answers="[Infinity]"), ["items", 0, "answers", 0]),
        (r'{"items": [{"question": "\ud800", "context": ""}]}', ["items", 0, "answers"]),
        (body_of('"Where?"', r'"\udc00"'), ["items", 0, "context"]),
        (body_of('"Where?"', answers=r'["a", "\ud800"]'), ["items", 0, "answers", 1]),
        (r'{"items": [], "include_details": "\ud800"}', ["include_details"]),
        ('{"items": [], "timeout_s": NaN}', ["timeout_s"]),
        (f'{{"items": [], "timeout_s": {"9" * 4000}}}', ["timeout_s"]),
        ('{"items": [', []),
        ("NaN", []),
        ("[" * 500 + "]" * 500, []),
        ("\x00", []),
    ],
)
async def test_what_cannot_be_echoed_is_refused_and_named(body: str, named: list[object]) -> None:
    """NaN and lone surrogates get through Python's JSON reader, but not back through its writer."""
    async with calling(FakeBackend()) as client:
        answer = await client.post(
            "/compute_info_gain", content=body, headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 422
    assert any(problem["loc"][1 : 1 + len(named)] == named for problem in answer.json()["detail"])


async def test_thousands_of_bad_items_are_one_problem() -> None:
    async with calling(FakeBackend()) as client:
        answer = await client.post("/compute_info_gain", json={"items": [0] * 4096})
    assert answer.status_code == 422
    assert [problem["loc"] for problem in answer.json()["detail"]] == [["body", "items", 0]]


async def test_requests_before_the_models_are_loaded_are_refused() -> None:
    async with serving(FakeBackend(), load_s=60) as client:
        health = await client.get("/health")
        assert (health.status_code, health.json()) == (
            200,
            {"status": "unhealthy", "message": "Models not loaded", "version": package_version()},
        )
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/version")).json()["generator_digest"] is None
        refused = await client.post("/compute_info_gain", json={"items": [GOOD]})
        assert (refused.status_code, refused.json()) == (503, {"detail": "Models not loaded"})
        assert int(refused.headers["Retry-After"]) >= 1


@pytest.mark.parametrize(
    ("backend", "expected", "ready", "works"),
    [
        (FakeBackend(devices=("cuda:2",)), {"mode": "single-GPU", "device": "cuda:2"}, 200, 200),
        (
            FakeBackend(devices=("cuda:0", "cuda:1"), num_ready_workers=2),
            {"mode": "multi-GPU", "num_workers": 2, "devices": ["cuda:0", "cuda:1"]},
            200,
            200,
        ),
        (
            FakeBackend(devices=("cpu", "cpu", "cpu"), num_ready_workers=2),
            {
                "message": "Some workers are unhealthy",
                "reason": "1 of 3 workers are being replaced or could not be",
            },
            200,
            200,
        ),
        (FakeBackend(num_ready_workers=0), {"message": "No workers available"}, 503, 200),
        (
            FakeBackend(num_ready_workers=0, failure="no worker starts"),
            {"message": "No workers available", "reason": "no worker starts"},
            503,
            503,
        ),
    ],
    ids=["one", "two", "one of three is lost", "the only one is lost", "none can be started"],
)
async def test_health_has_the_published_words(
    backend: FakeBackend, expected: dict[str, object], ready: int, works: int
) -> None:
    """Work waits for a worker that is being replaced; it is refused only when none can be started."""
    status = "unhealthy" if "message" in expected else "healthy"
    async with serving(backend, wait_ready=False) as client:
        health = (await client.get("/health")).json()
        assert health == expected | {"status": status, "version": package_version()}
        assert (await client.get("/readyz")).status_code == ready
        assert (await client.post("/compute_info_gain", json={"items": [GOOD]})).status_code == works
        assert (await client.get("/livez")).json() == {"status": "alive"}


async def test_version_names_what_the_numbers_depend_on() -> None:
    async with calling(FakeBackend(), "--seed", "7", "--gain", "entropy") as client:
        version = (await client.get("/version")).json()
    assert (version["seed"], version["gain"], version["score"]) == (7, "entropy", "hard")
    assert (version["generator_digest"], version["entailment_digest"]) == ("aa", "bb")
    assert version["version"] == package_version() != ""


async def test_health_answers_under_full_load_and_turns_are_limited() -> None:
    backend = FakeBackend(gate=asyncio.Event())
    async with serving(backend, "--max-concurrent-requests", "2") as client:
        body = {"items": [GOOD | {"context": f"good {number}"} for number in range(200)]}
        work = [asyncio.create_task(client.post("/compute_info_gain", json=body)) for _ in range(4)]
        while backend.running < 2:
            await asyncio.sleep(0.01)
        assert (await client.get("/health")).json()["status"] == "healthy"
        assert not any(task.done() for task in work)
        backend.gate.set()
        assert [(await task).json()["scores"] for task in work] == [[0.5] * 200] * 4
    assert (backend.most, backend.closed) == (2, True)


async def test_a_backend_that_breaks_gives_every_item_its_error() -> None:
    async with calling(FakeBackend(error=OSError("the disk is gone"))) as client:
        answer = await client.post("/compute_info_gain", json={"items": [GOOD, GOOD]})
    assert answer.status_code == 200
    assert answer.json()["scores"] == [None, None]
    assert answer.json()["errors"] == ["OSError: the disk is gone"] * 2


async def test_no_page_of_another_site_may_read_it() -> None:
    async with calling(FakeBackend()) as client:
        answer = await client.get("/health", headers={"Origin": "https://elsewhere.example"})
        asked = await client.options(
            "/compute_info_gain",
            headers={"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"},
        )
    assert not [name for name in [*answer.headers, *asked.headers] if name.startswith("access-control")]
    assert asked.status_code == 405
