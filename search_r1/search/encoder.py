"""Texts to vectors with a sentence encoder: the only file here that imports transformers."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers.utils import logging as transformers_logging

from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import check_weights, find_model, hash_model, list_module_files, name_model
from search_r1.search.recipes import (
    EncodingRecipe,
    PartialRecipe,
    StatedModel,
    find_family,
    resolve_recipe,
)
from search_r1.search.stated_model import read_stated_model
from serving.weights import copy_weights

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float32]

_POOLING_MODES = {
    "last": "lasttoken",
    "weighted": "weightedmean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
}


class TextEncoder:
    """Encode queries and passages. Not thread-safe. fp32 on a CPU, fp16 on a GPU."""

    def __init__(
        self,
        path: str | Path,
        *,
        retriever_name: str | None = None,
        device: str | None = None,
        use_fp16: bool | None = None,
        max_length: int | None = None,
        pooling: str | None = None,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        normalised: bool | None = None,
    ) -> None:
        """Raises RetrieverError when `path`, a folder or the name of a hub model, does not load.

        `retriever_name`: the model's family, for what its files do not say; None where its name tells it.
        `device` None: a GPU if there is one. `use_fp16` None: on a GPU; it is never used on a CPU. The others
        overrule the model's own configuration.
        """
        folder = find_model(path, role="encoder")
        self.path = str(path)
        self.name = name_model(folder)
        stated = read_stated_model(folder)
        self.recipe: EncodingRecipe = resolve_recipe(
            stated,
            model_name=self.name,
            retriever_name=retriever_name,
            flags=PartialRecipe(
                query_prefix=query_prefix,
                passage_prefix=passage_prefix,
                pooling=pooling,
                max_length=max_length,
                normalised=normalised,
            ),
        )
        self.retriever_name = retriever_name or find_family(self.name)
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        in_fp16 = self._device.type != "cpu" and use_fp16 is not False
        self._model = _load_model(
            folder,
            stated=stated,
            recipe=self.recipe,
            device=self._device,
            dtype=torch.float16 if in_fp16 else torch.float32,
        )
        self.dim: int = self._model.get_embedding_dimension()
        self.sha256 = hash_encoder(folder, stated=stated)

    def encode_queries(self, queries: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """[queries, dim]"""
        return self._encode(queries, prefix=self.recipe.query_prefix, batch_size=batch_size)

    def encode_passages(self, passages: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """[passages, dim]"""
        return self._encode(passages, prefix=self.recipe.passage_prefix, batch_size=batch_size)

    def _encode(self, texts: Sequence[str], *, prefix: str, batch_size: int) -> FloatArray:
        """Batches are of like length; raises RetrieverError when a vector is not finite."""
        if not texts:
            return np.empty((0, self.dim), dtype=np.float32)
        # An empty prompt and no prompt differ: without one the model's default prompt would be used.
        vectors = self._model.encode(
            list(texts), prompt=prefix, batch_size=batch_size, show_progress_bar=False, convert_to_numpy=True
        ).astype(np.float32, copy=False)
        if not np.isfinite(vectors).all():
            row = int(np.flatnonzero(~np.isfinite(vectors).all(axis=1))[0])
            raise RetrieverError(
                f"encoder {self.name} makes a vector that is not finite of {texts[row][:80]!r}; "
                "in fp16 some models overflow: use fp32"
            )
        if self.recipe.normalised:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return vectors


def silence_transformers() -> None:
    """No progress bars, and no tables of missing weights: whoever loads a model here refuses those."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


class _WholeTransformer(Transformer):
    """Refuses weights that lack something, which would be random instead."""

    def _load_model(self, *args: object, **model_kwargs: object) -> torch.nn.Module:
        model, report = super()._load_model(*args, output_loading_info=True, **model_kwargs)
        # No pooling here has a use for the pooler, so encoders come without one; all else would be random.
        absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        absent += sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise RetrieverError(f"encoder {args[0]} lacks the weights {absent[:3]} ({len(absent)} in all)")
        return model


def _load_model(
    folder: Path, *, stated: StatedModel, recipe: EncodingRecipe, device: torch.device, dtype: torch.dtype
) -> SentenceTransformer:
    """Vectors are normalised by the caller, in fp32, so a module for that is left out."""
    silence_transformers()
    modules: list[torch.nn.Module] = []
    try:
        for kind, place in stated.modules:
            if kind == "Transformer":
                modules.append(_load_transformer(folder, place=place, recipe=recipe, dtype=dtype))
            elif kind == "Pooling":
                dim = modules[0].get_embedding_dimension()
                modules.append(_load_pooling(folder, place=place, pooling=recipe.pooling, dim=dim))
            elif kind in ("Dense", "LayerNorm"):
                check_weights(folder / place, role="encoder")
                library = Dense if kind == "Dense" else LayerNorm
                modules.append(library.load(str(folder), subfolder=place, local_files_only=True))
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        if isinstance(error, RetrieverError):
            raise
        first_line = (str(error).splitlines() or [""])[0]
        raise RetrieverError(
            f"encoder {folder} does not load ({first_line}); expected a Hugging Face model folder "
            "or the name of a model on the hub"
        ) from error
    model = SentenceTransformer(
        modules=modules, device=str(device), local_files_only=True, truncate_dim=stated.truncated_dim
    ).eval()
    copy_weights(model)
    return model


def _load_transformer(folder: Path, *, place: str, recipe: EncodingRecipe, dtype: torch.dtype) -> Transformer:
    check_weights(folder / place, role="encoder")
    if (folder / place / "adapter_config.json").is_file():
        raise RetrieverError(f"encoder {folder} is an adapter; merge it into its base model first")
    transformer = _WholeTransformer.load(
        str(folder),
        subfolder=place,
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"dtype": dtype, "use_safetensors": True},
    )
    transformer.max_seq_length = recipe.max_length
    return transformer


def _load_pooling(folder: Path, *, place: str, pooling: str, dim: int) -> Pooling:
    modes = tuple(_POOLING_MODES.get(name, name) for name in pooling.split("+"))
    # A model that wants its prompt left out of the mean keeps that, whatever the flags say.
    include_prompt = True
    if place:
        include_prompt = Pooling.load(str(folder), subfolder=place, local_files_only=True).include_prompt
    return Pooling(dim, pooling_mode=modes, include_prompt=include_prompt)


def hash_encoder(folder: Path, *, stated: StatedModel) -> str:
    """One hash of all files that the vectors depend on; what the recipe says is not among them."""
    transformer = folder / stated.modules[0][1]
    sentence_configs = sorted(transformer.glob("sentence_*_config.json"))
    return hash_model(transformer, further=[*sentence_configs, *list_module_files(folder)])
