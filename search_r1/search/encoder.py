"""Texts to vectors with a sentence encoder: the only file here that imports transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.dense import Dense
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import LayerNorm, Pooling
from transformers.utils import logging as transformers_logging

from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import check_weights, find_model, hash_model, list_module_files, name_model
from search_r1.search.ranking import FloatArray
from search_r1.search.recipes import EncoderSpec, EncodingRecipe, StatedModel, find_family, resolve_recipe
from search_r1.search.stated_model import read_stated_model
from serving.weights import copy_weights

_POOLING_MODES = {
    "last": "lasttoken",
    "weighted": "weightedmean",
    "mean_sqrt_len": "mean_sqrt_len_tokens",
}


class TextEncoder:
    """Encode queries and passages. Not thread-safe. fp32 on a CPU, fp16 on a GPU."""

    def __init__(self, spec: EncoderSpec | str | Path, *, device: str | None = None) -> None:
        """Load a model; a path or hub id is a spec without flags. `device` None: a GPU if there is one.

        Raises RetrieverError when it does not load.
        """
        if not isinstance(spec, EncoderSpec):
            spec = EncoderSpec(path=str(spec))
        folder = find_model(spec.path, role="encoder")
        self.name = name_model(folder)
        stated = read_stated_model(folder)
        self.recipe: EncodingRecipe = resolve_recipe(
            stated, model_name=self.name, family=spec.family, flags=spec.flags
        )
        self.family = spec.family or find_family(self.name)
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        in_fp16 = where.type != "cpu" and spec.use_fp16 is not False
        dtype = torch.float16 if in_fp16 else torch.float32
        self._model = _load_model(folder, stated=stated, recipe=self.recipe, device=where, dtype=dtype)
        self.dim: int = self._model.get_embedding_dimension()
        transformer = folder / stated.modules[0][1]
        sentence_configs = sorted(transformer.glob("sentence_*_config.json"))
        # Of all files that the vectors depend on; what the recipe states is compared by itself.
        self.sha256 = hash_model(transformer, further=[*sentence_configs, *list_module_files(folder)])

    def encode_queries(self, queries: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """Return [queries, dim]. Raises RetrieverError when a vector is not finite."""
        return self._encode(queries, prefix=self.recipe.query_prefix, batch_size=batch_size)

    def encode_passages(self, passages: Sequence[str], *, batch_size: int = 64) -> FloatArray:
        """Return [passages, dim]. Raises RetrieverError when a vector is not finite."""
        return self._encode(passages, prefix=self.recipe.passage_prefix, batch_size=batch_size)

    def _encode(self, texts: Sequence[str], *, prefix: str, batch_size: int) -> FloatArray:
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
        if self.recipe.normalized:
            vectors /= np.linalg.norm(vectors, axis=1, keepdims=True).clip(min=1e-12)
        return vectors


def silence_transformers() -> None:
    """Turn off progress bars and tables of missing weights: models with those are refused here."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


class _WholeTransformer(Transformer):
    """Refuses weights that lack something, which would be random instead."""

    def _load_model(self, *args: object, **model_kwargs: object) -> torch.nn.Module:
        model, report = super()._load_model(*args, output_loading_info=True, **model_kwargs)
        # No pooling here uses the pooler, so encoders come without one.
        absent = sorted(key for key in report["missing_keys"] if not key.startswith("pooler."))
        absent += sorted(str(key) for key in report["mismatched_keys"])
        if absent:
            raise RetrieverError(f"encoder {args[0]} lacks the weights {absent[:3]} ({len(absent)} in all)")
        return model


def _load_model(
    folder: Path, *, stated: StatedModel, recipe: EncodingRecipe, device: torch.device, dtype: torch.dtype
) -> SentenceTransformer:
    """Load all modules but the one that normalizes: `_encode` does that, in fp32."""
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
    except RetrieverError:
        raise
    except (OSError, ValueError, RuntimeError, ImportError) as error:
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
    # A model that leaves its prompt out of the mean keeps that, whatever the flags are.
    include_prompt = True
    if place:
        include_prompt = Pooling.load(str(folder), subfolder=place, local_files_only=True).include_prompt
    return Pooling(dim, pooling_mode=modes, include_prompt=include_prompt)
