"""Where the embedded world lies: what builder and server use when nothing else is named, whatever the cwd."""

from __future__ import annotations

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS_PATH = REPOSITORY / "world" / "corpus.jsonl"
ENCODER_PATH = REPOSITORY / "world" / "models" / "encoder"
INDEX_DIR = REPOSITORY / "world" / "index"
RETRIEVER_NAME = "e5"


def name_index(retriever_name: str) -> str:
    """File name of a flat index, as published: `e5_Flat.index`."""
    return f"{retriever_name}_Flat.index"


INDEX_PATH = INDEX_DIR / name_index(RETRIEVER_NAME)
