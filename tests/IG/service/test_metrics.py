from __future__ import annotations

from tests.IG.service.backends import GOOD, FakeBackend, calling
from tests.processes import read_metrics

ONE_IS_LOST = FakeBackend(devices=("cpu", "cpu", "cpu"), num_ready_workers=2, num_worker_restarts=4)


async def test_everything_is_counted_once() -> None:
    poison = GOOD | {"context": "poison"}
    blank = GOOD | {"question": " "}
    async with calling(FakeBackend()) as client:
        await client.post("/compute_info_gain", json={"items": [GOOD, poison, blank]})
        await client.post("/compute_info_gain", json={"items": [GOOD, GOOD]})
        await client.post("/compute_info_gain", json={})
        await client.get("/health")
        metrics = await read_metrics(client)
    assert metrics['ig_requests_total{status="200"}'] == 2
    assert metrics['ig_requests_total{status="422"}'] == 1
    assert metrics["ig_request_seconds_count"] == 3
    assert metrics['ig_items_total{outcome="scored"}'] == 3
    assert metrics['ig_items_total{outcome="invalid"}'] == 1
    assert metrics['ig_items_total{outcome="internal"}'] == 1
    assert metrics['ig_baselines_total{source="sampled"}'] == 1
    assert metrics['ig_baselines_total{source="shared"}'] == 3
    assert metrics['ig_prompts_total{source="sampled"}'] == 2
    assert metrics['ig_prompts_total{source="cached"}'] == 4
    assert metrics['ig_answers_total{text="written"}'] == 8
    assert metrics['ig_answers_total{text="empty"}'] == 0
    assert metrics['ig_pairs_total{source="judged"}'] > 0
    assert metrics['ig_pairs_total{source="equal"}'] > 0
    assert metrics["ig_items_in_progress"] == 0


async def test_workers_are_counted_by_state() -> None:
    async with calling(ONE_IS_LOST) as client:
        metrics = await read_metrics(client)
    assert metrics['ig_workers{state="ready"}'] == 2
    assert metrics['ig_workers{state="unavailable"}'] == 1
    assert metrics["ig_worker_restarts_total"] == 4
