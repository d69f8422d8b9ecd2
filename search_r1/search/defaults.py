"""Files of the embedded world: what builder and server use where nothing else is named, in any folder."""

from __future__ import annotations

import re
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CORPUS_PATH = REPOSITORY / "world" / "corpus.jsonl"
ENCODER_PATH = REPOSITORY / "world" / "models" / "encoder"
INDEX_DIR = REPOSITORY / "world" / "index"
RETRIEVER_NAME = "e5"


def name_index(retriever_name: str, kind: str = "Flat") -> str:
    """Return the file name of an index, as published: `e5_Flat.index`."""
    return re.sub(r"[^\w.,-]", "_", f"{retriever_name}_{kind}.index")


INDEX_PATH = INDEX_DIR / name_index(RETRIEVER_NAME)
