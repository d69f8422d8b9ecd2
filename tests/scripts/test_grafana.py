"""The dashboard of the services: what Grafana imports, over metrics that the services have."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.IG.service.backends import GOOD, FakeBackend, calling
from tests.search_r1.search.servers import EchoRetriever, serving

FILE = Path(__file__).resolve().parents[2] / "scripts/grafana/services.json"
METRIC = re.compile(r"\b(?:retriever|ig)_\w+")
LABELS = re.compile(r"by \((\w+)\)")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


async def test_every_query_asks_for_what_a_service_reports(dashboard: dict[str, Any]) -> None:
    """And everything that the services count is shown; labels and histograms are those of the metric."""
    async with serving(EchoRetriever()) as retriever, calling(FakeBackend()) as ig_service:
        # Counts by status or outcome begin with the first of their kind.
        await retriever.post("/retrieve", json={"query": "a"})
        await ig_service.post("/compute_info_gain", json={"items": [GOOD]})
        texts = [(await service.get("/metrics")).text for service in (retriever, ig_service)]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith("#")]
    samples = {re.split(r"[ {]", line)[0] for line in lines}
    labels = {(re.split(r"[ {]", line)[0], name) for line in lines for name in re.findall(r'(\w+)="', line)}
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = {name for query in queries for name in METRIC.findall(query)}
    assert asked - samples == set()
    families = {re.sub(r"_(bucket|sum|count|total|created)$", "", name) for name in samples}
    shown = {re.sub(r"_(bucket|sum|count|total)$", "", name) for name in asked}
    assert families - shown == set()
    for query in queries:
        assert query.count("(") == query.count(")")
        for metric in METRIC.findall(query):
            assert all((metric, label) in labels for label in LABELS.findall(query)), query


def test_it_has_the_form_that_grafana_imports(dashboard: dict[str, Any]) -> None:
    assert {"title", "uid", "schemaVersion", "panels", "templating", "time"} <= dashboard.keys()
    assert "id" not in dashboard  # Grafana gives one at the import
    (variable,) = dashboard["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == (
        "datasource",
        "datasource",
        "prometheus",
    )
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in (panel for panel in panels if panel["type"] != "row"):
        sources = [panel["datasource"], *(target["datasource"] for target in panel["targets"])]
        assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)
        names = [target["refId"] for target in panel["targets"]]
        assert names == sorted(set(names))
    for one, other in combinations([panel["gridPos"] for panel in panels], 2):
        is_beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert is_beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
