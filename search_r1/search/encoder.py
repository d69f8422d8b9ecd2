"""Texts to unit vectors with a Hugging Face encoder: the only file here that imports transformers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModel, AutoTokenizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from search_r1.search.errors import RetrieverError

FloatArray = npt.NDArray[np.float32]

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "sentencepiece.bpe.model")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingRecipe:
    """How a family of encoders wants its texts; goes into the manifest of every index."""

    query_prefix: str
    passage_prefix: str
    pooling: str
    max_length: int
    """Tokens; the rest of a text is cut off."""
    normalised: bool


RECIPES = {
    "e5": EncodingRecipe(
        query_prefix="query: ", passage_prefix="passage: ", pooling="mean", max_length=256, normalised=True
    ),
}


class TextEncoder:
    """Encode queries and passages. Not thread-safe. fp32 on a CPU, fp16 on a GPU."""

    def __init__(self, path: str | Path, *, retriever_name: str, device: str | None = None) -> None:
        """Raises RetrieverError when `path`, a folder or the name of a hub model, does not load.

        `device` None: a GPU if there is one.
        """
        if retriever_name not in RECIPES:
            raise RetrieverError(f"retriever name {retriever_name!r} is unknown; known are {sorted(RECIPES)}")
        self.recipe = RECIPES[retriever_name]
        self.path = str(path)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        dtype = torch.float16 if self._device.type == "cuda" else torch.float32
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()  # its report on missing weights; see below
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(self.path, trust_remote_code=False)
            model, report = AutoModel.from_pretrained(
                self.path, trust_remote_code=False, dtype=dtype, output_loading_info=True
            )
        except (OSError, ValueError) as error:
            first_line = (str(error).splitlines() or [""])[0]
            message = (
                f"encoder {self.path} does not load ({first_line}); expected a Hugging Face model folder"
            )
            raise RetrieverError(f"{message} or the name of a model in the local cache") from error
        # Mean pooling has no use for the pooler, so encoders come without one; all else would be random.
        absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        if absent:
            raise RetrieverError(f"encoder {self.path} lacks the weights {absent[:3]} ({len(absent)} in all)")
        self._model = model.to(self._device).eval()
        self.dim: int = self._model.config.hidden_size
        self.sha256 = hash_encoder(self.path)

    def encode_queries(self, queries: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """[queries, dim]"""
        return self._encode([self.recipe.query_prefix + text for text in queries], batch_size)

    def encode_passages(self, passages: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """[passages, dim]"""
        return self._encode([self.recipe.passage_prefix + text for text in passages], batch_size)

    def _encode(self, texts: list[str], batch_size: int) -> FloatArray:
        vectors = np.empty((len(texts), self.dim), dtype=np.float32)
        # Batches of like length waste little on padding.
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            with torch.inference_mode():
                vectors[rows] = self._encode_batch([texts[row] for row in rows]).cpu().numpy()
        return vectors

    def _encode_batch(self, texts: list[str]) -> torch.Tensor:
        tokens = self._tokenizer(
            texts, padding=True, truncation=True, max_length=self.recipe.max_length, return_tensors="pt"
        ).to(self._device)
        states = self._model(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        ).last_hidden_state.float()  # [B, L, dim]
        mask = tokens["attention_mask"].unsqueeze(-1).float()  # [B, L, 1]
        pooled = (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
        return torch.nn.functional.normalize(pooled, dim=-1)  # [B, dim]


def hash_encoder(path: str) -> str:
    """One hash of weights, configuration and tokenizer: which encoder made these vectors.

    Files are hashed, not tensors, because those depend on the device's precision.
    """
    config_file = cached_file(path, "config.json")
    if config_file is None:
        raise RetrieverError(f"encoder {path} has no config.json")
    folder = Path(config_file).parent
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    tokenizer = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    digest = hashlib.sha256()
    for file in [folder / "config.json", *weights, *tokenizer]:
        with file.open("rb") as stream:
            digest.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()
