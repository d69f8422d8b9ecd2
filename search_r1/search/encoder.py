"""Texts to vectors with a sentence encoder, loaded by sentence-transformers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling
from transformers.utils import logging as transformers_logging

from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import (
    check_weights,
    find_model,
    hash_model,
    list_absent_weights,
    list_module_files,
    name_model,
    read_json,
    read_length_limit,
    read_modules,
)
from search_r1.search.ranking import FloatArray
from search_r1.search.recipes import (
    POOLINGS,
    EncoderSpec,
    EncodingRecipe,
    ModelRecipe,
    PartialRecipe,
    find_family,
    resolve_recipe,
)
from serving.weights import copy_weights

# Our name of a pooling, by that of the library where they differ.
_POOLING_NAMES = {"lasttoken": "last", "weightedmean": "weighted", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_LIBRARY_NAMES = {ours: theirs for theirs, ours in _POOLING_NAMES.items()}
_NO_LENGTH = 10**9
"""Tokenizers without a length of their own state 10**30."""
_QUERY_PROMPTS = ("query", "s2p_query", "retrieval.query", "search_query", "web_search_query", "question")
_PASSAGE_PROMPTS = ("document", "passage", "corpus", "retrieval.passage", "search_document", "doc", "text")


class TextEncoder:
    """Encodes queries and passages. Not thread-safe. fp32 on a CPU, fp16 on a GPU."""

    def __init__(self, spec: EncoderSpec | str | Path, *, device: str | None = None) -> None:
        """Load a model; a path or hub id is a spec without flags. `device` None: a GPU if there is one.

        Raises RetrieverError when it does not load.
        """
        if not isinstance(spec, EncoderSpec):
            spec = EncoderSpec(path=str(spec))
        folder = find_model(spec.path, role="encoder")
        self.name = name_model(folder)
        where = find_device(device)
        in_fp16 = where.type != "cpu" and spec.use_fp16 is not False
        dtype = torch.float16 if in_fp16 else torch.float32
        self._model = _load_model(folder, device=str(where), dtype=dtype)
        transformer = folder / (read_modules(folder) or [("", "")])[0][1]
        self.recipe: EncodingRecipe = resolve_recipe(
            _read_model_recipe(self._model, folder, transformer=transformer),
            model_name=self.name,
            family=spec.family,
            flags=spec.flags,
        )
        self.family = spec.family or find_family(self.name)
        _apply(self.recipe, self._model)
        self.dim: int = self._model.get_embedding_dimension()
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


def find_device(name: str | None) -> torch.device:
    """Return the named device; by default a GPU if there is one, else the CPU.

    Raises RetrieverError for one that is unknown or not there.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    try:
        device = torch.device(name or ("cuda" if num_gpus else "cpu"))
    except RuntimeError as error:
        raise RetrieverError(f"device {name!r} is unknown to torch; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= num_gpus:
        raise RetrieverError(f"device {name!r}: torch finds {num_gpus} GPUs here; name another one, or cpu")
    return device


def _load_model(folder: Path, *, device: str, dtype: torch.dtype) -> SentenceTransformer:
    """Load a model as the library does, without code or pickles that come with it."""
    silence_transformers()
    check_weights(folder, role="encoder")
    transformer = folder / (read_modules(folder) or [("", "")])[0][1]
    if (transformer / "adapter_config.json").is_file():
        raise RetrieverError(f"encoder {folder} is an adapter; merge it into its base model first")
    config = read_json(folder / "config_sentence_transformers.json")
    if (kind := config.get("model_type", "SentenceTransformer")) != "SentenceTransformer":
        raise RetrieverError(f"encoder {folder} is a {kind}, expected a model that makes one vector per text")
    try:
        model = SentenceTransformer(
            str(folder),
            device=device,
            local_files_only=True,
            trust_remote_code=False,
            model_kwargs={"dtype": dtype, "use_safetensors": True},
        ).eval()
    except (OSError, ValueError, RuntimeError, ImportError, KeyError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [""])[0]
        raise RetrieverError(
            f"encoder {folder} does not load ({first_line}); expected a Hugging Face model folder "
            "or the name of a model on the hub"
        ) from error
    kinds = [type(module) for module in model]
    if kinds[:1] != [Transformer] or kinds.count(Pooling) != 1:
        names = [kind.__name__ for kind in kinds]
        raise RetrieverError(
            f"encoder {folder} has the modules {names}; expected a Transformer, then one Pooling and what "
            "refines it"
        )
    copy_weights(model)
    # No pooling here uses the pooler, so encoders come without one.
    absent = list_absent_weights(model.transformers_model, folder=transformer)
    absent = [name for name in absent if not name.startswith("pooler.")]
    if absent:
        raise RetrieverError(f"encoder {folder} lacks the weights {absent[:3]} ({len(absent)} in all)")
    return model


def _read_model_recipe(model: SentenceTransformer, folder: Path, *, transformer: Path) -> ModelRecipe:
    """Return what the files of a model state about its texts; a plain transformer states only its length."""
    limit = read_length_limit(transformer)
    if read_modules(folder) is None:
        return ModelRecipe(is_sentence_encoder=False, recipe=PartialRecipe(), length_limit=limit)
    config = read_json(folder / "config_sentence_transformers.json")
    query_prefix, passage_prefix = _read_prompts(config.get("prompts"))
    modes = _find_pooling(model).pooling_mode
    pooling = [_POOLING_NAMES.get(name, name) for name in ([modes] if isinstance(modes, str) else modes)]
    if unknown := sorted(set(pooling) - set(POOLINGS)):
        raise RetrieverError(f"encoder {folder} needs pooling {unknown}; known are {list(POOLINGS)}")
    normalized: bool | None = True
    if not any(isinstance(module, Normalize) for module in model):
        similarity = config.get("similarity_fn_name")
        if similarity not in (None, "cosine", "dot"):
            raise RetrieverError(
                f"encoder {folder} is made for the similarity {similarity!r}; an index here supports "
                "cosine and dot"
            )
        normalized = None if similarity is None else similarity == "cosine"
    lengths = [length for length in (model.max_seq_length, limit) if length and length < _NO_LENGTH]
    recipe = PartialRecipe(
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        pooling="+".join(pooling),
        max_length=min(lengths, default=None),
        normalized=normalized,
    )
    return ModelRecipe(is_sentence_encoder=True, recipe=recipe, length_limit=limit)


def _read_prompts(prompts: object) -> tuple[str | None, str | None]:
    """Return query and passage prefix; prompts that are all empty, as libraries write them, state nothing."""
    if not isinstance(prompts, Mapping) or not any(prompts.values()):
        return None, None
    found = [
        next((str(prompts[name] or "") for name in names if name in prompts), None)
        for names in (_QUERY_PROMPTS, _PASSAGE_PROMPTS)
    ]
    return (None, None) if found == [None, None] else (found[0] or "", found[1] or "")


def _find_pooling(model: SentenceTransformer) -> Pooling:
    return next(module for module in model if isinstance(module, Pooling))


def _apply(recipe: EncodingRecipe, model: SentenceTransformer) -> None:
    """Set pooling and length; drop the module that normalizes: `_encode` does that, in fp32."""
    model[0].max_seq_length = recipe.max_length
    for name, module in list(model.named_children()):
        if isinstance(module, Pooling):
            modes = tuple(_LIBRARY_NAMES.get(mode, mode) for mode in recipe.pooling.split("+"))
            dim = model[0].get_embedding_dimension()
            setattr(model, name, Pooling(dim, pooling_mode=modes, include_prompt=module.include_prompt))
        elif isinstance(module, Normalize):
            delattr(model, name)
