"""A sample of the seven question sets in the schemas of FlashRAG's files, made here from the embedded world.

No question is of the sets themselves: only names, columns and splits are theirs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pyarrow import parquet

WORLD = Path(__file__).resolve().parents[1] / "world"
SPLITS = {
    "nq": "test",
    "triviaqa": "test",
    "popqa": "test",
    "hotpotqa": "dev",
    "2wikimultihopqa": "dev",
    "musique": "dev",
    "bamboogle": "test",
}
"""The file of each set that is evaluated. Those without a test file have a train file beside it."""


def write_sample(folder: Path, *, per_set: int) -> Path:
    """Write `per_set` questions of each set: one-hop ones for the first three sets, else two-hop ones."""
    rows = parquet.read_table(WORLD / "test.parquet").to_pylist()
    hops = {
        name: [row for row in rows if row["data_source"] == name] for name in ("world_onehop", "world_twohop")
    }
    for number, (name, split) in enumerate(SPLITS.items()):
        source = hops["world_onehop" if number < 3 else "world_twohop"]
        chosen = source[number * per_set : (number + 1) * per_set]
        lines = [_flashrag_row(name, f"{split}_{k}", row) for k, row in enumerate(chosen)]
        _write(folder / name / f"{split}.jsonl", lines)
        if split == "dev":
            _write(folder / name / "train.jsonl", [line | {"question": "Not this one?"} for line in lines])
    return folder


def _write(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _flashrag_row(name: str, row_id: str, row: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {
        "id": row_id,
        "question": row["question"].rstrip("?"),
        "golden_answers": row["golden_answers"],
    }
    passages = [text.split("\n", 1) for text in row["extra_info"]["supporting_texts"]]
    titles, texts = [title.strip('"') for title, _ in passages], [text for _, text in passages]
    facts = {"title": titles, "sent_id": [0] * len(titles)}
    other = ("Another article", "It says nothing about it.")
    if name == "popqa":
        return made | {"metadata": {"subj": titles[0], "prop": "place", "s_pop": 7, "possible_answers": "[]"}}
    if name == "hotpotqa":
        context = {"title": [other[0], *titles], "sentences": [[other[1]], *([text] for text in texts)]}
        return made | {"metadata": {"type": "bridge", "supporting_facts": facts, "context": context}}
    if name == "2wikimultihopqa":
        context = {"title": [other[0], *titles], "content": [[other[1]], *([text] for text in texts)]}
        return made | {"metadata": {"type": "compositional", "supporting_facts": facts, "context": context}}
    if name == "musique":
        paragraphs = [
            (*other, False),
            *((title, text, True) for title, text in zip(titles, texts, strict=True)),
        ]
        names = ("title", "paragraph_text", "is_supporting")
        return made | {"metadata": {"paragraphs": [dict(zip(names, one, strict=True)) for one in paragraphs]}}
    return made
