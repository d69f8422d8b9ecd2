"""Results that papers publish, in percent, to print beside ours. They are the papers', measured by them.

`second hand`: quoted by others, not read in the paper itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

FLASHRAG_SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")
"""The seven question sets, by their names in FlashRAG's files."""
_Row: TypeAlias = tuple[str | float | None, ...]
"""Model, the value of each of the seven sets, and their average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedResult:
    """One row of a paper's table, by the metric of the protocol that it stands with."""

    model: str
    source: str
    values: Mapping[str, float]
    """By set; what is not published is left out."""
    average: float | None = None
    """As published; None where there is only one set."""


def _list_rows(source: str, *rows: _Row) -> tuple[PublishedResult, ...]:
    results = []
    for model, *values, average in map(list, rows):
        known = {
            name: value for name, value in zip(FLASHRAG_SETS, values, strict=True) if isinstance(value, float)
        }
        assert isinstance(average, float)
        results.append(PublishedResult(model=str(model), source=source, values=known, average=average))
    return tuple(results)


_SEARCH_R1_3B_GRPO: _Row = (
    "Search-R1 3B base, GRPO", 42.1, 58.3, 41.3, 29.7, 27.4, 6.6, 12.8, 31.2,
)  # fmt: skip

SEARCH_R1 = (
    *_list_rows(
        "2503.09516, second hand",
        ("Search-R1 7B base, PPO", 48.0, 63.8, 45.7, 43.3, 38.2, 19.6, 43.2, 43.1),
        ("Search-R1 7B instruct, PPO", 39.3, 61.0, 39.7, 37.0, 41.4, 14.6, 36.8, 38.5),
        ("Search-R1 3B base, PPO", 40.6, 58.7, 43.5, 28.4, 27.3, 4.9, 8.8, 30.3),
        ("Search-R1 3B instruct, PPO", 34.1, 54.5, 37.8, 32.4, 31.9, 10.3, 26.4, 32.5),
    ),
    *_list_rows(
        "AutoRefine, 2505.11277",
        _SEARCH_R1_3B_GRPO,
        ("Search-R1 3B instruct, GRPO", 39.7, 56.5, 39.1, 33.1, 31.0, 12.4, 23.2, 33.6),
    ),
)
INFOREASONER = _list_rows(
    "InfoReasoner's project page",
    ("RAG 3B", 34.8, 54.4, 38.7, 25.5, 22.6, 4.7, 8.0, 27.0),
    ("Search-R1 3B instruct", 40.5, 56.6, 35.4, 31.6, 22.4, 5.6, 18.4, 30.1),
    ("InfoReasoner 3B", 45.3, 63.4, 44.2, 34.4, 32.4, 8.0, 14.4, 34.6),
    ("Search-R1 7B instruct", 40.7, 59.0, 39.0, 34.0, 19.4, 8.0, 36.0, 33.7),
    ("AutoRefine 7B base", 43.9, 60.8, 40.2, 41.0, 24.2, 11.6, 36.8, 36.9),
    ("InfoReasoner 7B", 44.7, 61.4, 41.6, 41.4, 30.2, 12.0, 42.4, 39.1),
)
IGPO = _list_rows(
    "IGPO, 2510.14967",
    ("CoT", 19.8, 45.6, 17.0, 24.4, 26.4, 8.5, 22.1, 23.4),
    ("CoT + RAG", 42.0, 68.9, 46.9, 37.1, 24.4, 10.0, 25.4, 36.4),
    ("Search-R1 7B base", 45.4, 71.9, 43.2, 55.9, 44.6, 26.7, 56.5, 49.2),
    ("DeepResearcher", 39.6, 78.4, 48.5, 52.8, 59.7, 27.1, 71.0, 53.9),
    ("GiGPO", 46.4, 64.7, 46.1, 41.6, 43.6, 18.9, 68.9, 47.2),
    ("IGPO 7B", 46.4, 80.6, 53.8, 59.0, 72.1, 32.7, 77.0, 60.2),
)
REVIEW = (
    *_list_rows(
        "AutoRefine, 2505.11277",
        _SEARCH_R1_3B_GRPO,
        ("AutoRefine 3B base", 46.7, 62.0, 45.0, 40.5, 39.3, 15.7, 34.4, 40.5),
        ("AutoRefine 3B instruct", 43.6, 59.7, 44.7, 40.4, 38.0, 16.9, 33.6, 39.6),
    ),
    *_list_rows(
        "MR-Search",
        ("MR-Search 3B", 47.7, 63.5, 46.0, 41.9, 40.1, 16.5, 34.4, 41.4),
        ("MR-Search 7B", 50.2, 66.6, 47.2, 46.8, 43.6, 22.1, 45.2, 46.0),
    ),
    *_list_rows(
        "2604.15148, second hand",
        ("IG-Search 3B base", None, None, None, None, None, None, 42.4, 43.0),
    ),
)
BROWSECOMP_PLUS = tuple(
    PublishedResult(model=model, source="2508.06600", values={"browsecomp_plus": value})
    for model, value in (
        ("Search-R1, BM25", 3.86),
        ("GPT-5, BM25", 55.9),
        ("GPT-5, Qwen3-Embedding-8B", 70.1),
    )
)
