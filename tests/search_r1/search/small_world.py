"""Files and processes of a tiny world: a few passages, a random text encoder, the real server."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from transformers import BertConfig, BertModel

from tests.search_r1.search.tiny_models import save_tokenizer

REPOSITORY = Path(__file__).resolve().parents[3]
SERVER = REPOSITORY / "search_r1" / "search" / "retrieval_server.py"

PASSAGES = {
    "0": '"Bolton"\nBolton is a town in England.',
    "1": '"Alice Marsh"\nAlice Marsh was born in Bolton.',
    "2": '"The Silver Harbour"\nThe Silver Harbour is a film by Alice Marsh.',
    "3": '"Größe 漢字"\nÜber größe und 漢字 🎬.',
    "4": '"Calder"\nCalder is a river in Scotland.',
    "x7": '"Brann Works"\nBrann Works makes ships in Calder.',
}


@dataclass(frozen=True, slots=True)
class World:
    """Files that belong together."""

    corpus: Path
    encoder: Path
    index: Path

    @property
    def flags(self) -> list[str]:
        files = ["--corpus_path", str(self.corpus), "--index_path", str(self.index)]
        return [*files, "--retriever_model", str(self.encoder)]

    def copy(self, folder: Path) -> World:
        """The same files elsewhere."""
        shutil.copytree(self.index.parent, folder / "index")
        shutil.copy(self.corpus, folder / "corpus.jsonl")
        shutil.copytree(self.encoder, folder / "encoder")
        return World(folder / "corpus.jsonl", folder / "encoder", folder / "index" / self.index.name)


def write_corpus(path: Path, passages: dict[str, str]) -> Path:
    lines = (json.dumps({"id": key, "contents": text}, ensure_ascii=False) for key, text in passages.items())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def save_encoder(path: Path, *, seed: int, dim: int = 32) -> Path:
    """Random weights, words as tokens: texts that share words are near each other."""
    words = sorted({word for text in PASSAGES.values() for word in text.lower().replace(".", " ").split()})
    num_tokens = save_tokenizer(path, words=words, model_max_length=256)
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=num_tokens,
        hidden_size=dim,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=256,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(path)
    return path


@dataclass(frozen=True, slots=True)
class RunningServer:
    url: str
    process: subprocess.Popen[str]
    log: Path


def wait_until_ready(server: RunningServer) -> None:
    while True:
        assert server.process.poll() is None, server.log.read_text()
        try:
            if httpx.get(f"{server.url}/readyz", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
