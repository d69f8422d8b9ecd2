"""What the files of a sentence encoder state about how it expects its texts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import read_json, read_modules
from search_r1.search.recipes import POOLINGS, PartialRecipe, StatedModel

_MODULES = ("Transformer", "Pooling", "Dense", "LayerNorm", "Normalize")
_PLAIN = (("Transformer", ""), ("Pooling", ""))
_SENTENCE_CONFIGS = (
    "sentence_bert_config.json",
    "sentence_roberta_config.json",
    "sentence_distilbert_config.json",
    "sentence_camembert_config.json",
    "sentence_albert_config.json",
    "sentence_xlm-roberta_config.json",
    "sentence_xlnet_config.json",
)
_POOLING_KEYS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
    "pooling_mode_weightedmean_tokens": "weighted",
    "pooling_mode_lasttoken": "last",
}
_POOLING_NAMES = {"lasttoken": "last", "weightedmean": "weighted", "mean_sqrt_len_tokens": "mean_sqrt_len"}
_QUERY_PROMPTS = ("query", "s2p_query", "retrieval.query", "search_query", "web_search_query", "question")
_PASSAGE_PROMPTS = ("document", "passage", "corpus", "retrieval.passage", "search_document", "doc", "text")
_POSITIONS_AFTER_PADDING = (
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)
"""Types of models that number positions from the id of the padding token + 1."""


def read_stated_model(folder: Path) -> StatedModel:
    """Read the files of a model. Raises RetrieverError when they are broken or need what is not supported."""
    listed = read_modules(folder)
    is_sentence_encoder = listed is not None
    modules = _PLAIN if listed is None else _check_modules(folder, listed)
    transformer = folder / modules[0][1]
    config = read_json(folder / "config_sentence_transformers.json")
    kind = config.get("model_type", "SentenceTransformer")
    if kind != "SentenceTransformer":
        raise RetrieverError(f"encoder {folder} is a {kind}, expected a model that makes one vector per text")
    prompts = config.get("prompts")
    query_prefix, passage_prefix = _read_prompts(prompts if isinstance(prompts, dict) else {})
    limit = read_length_limit(transformer)
    truncated_dim = config.get("truncate_dim")
    recipe = PartialRecipe(
        query_prefix=query_prefix,
        passage_prefix=passage_prefix,
        pooling=_read_pooling(folder, modules) if is_sentence_encoder else None,
        max_length=_read_max_length(transformer, limit=limit) if is_sentence_encoder else None,
        normalized=_read_normalized(folder, modules, config) if is_sentence_encoder else None,
    )
    return StatedModel(
        is_sentence_encoder=is_sentence_encoder,
        modules=modules,
        recipe=recipe,
        length_limit=limit,
        truncated_dim=truncated_dim if isinstance(truncated_dim, int) else None,
    )


def _check_modules(folder: Path, modules: list[tuple[str, str]]) -> tuple[tuple[str, str], ...]:
    """Return the modules with the bare names of their classes. Raises RetrieverError for other ones."""
    checked = []
    for reference, place in modules:
        kind = reference.rsplit(".", 1)[-1]
        if not reference.startswith("sentence_transformers.") or kind not in _MODULES:
            raise RetrieverError(
                f"encoder {folder} needs a module {reference!r}; supported are {list(_MODULES)} of "
                "sentence_transformers, and code that comes with a model is never run"
            )
        checked.append((kind, place))
    kinds = [kind for kind, _ in checked]
    if kinds[:1] != ["Transformer"] or kinds.count("Transformer") > 1 or kinds.count("Pooling") != 1:
        raise RetrieverError(
            f"encoder {folder} has the modules {kinds}; expected a Transformer, then one Pooling and what "
            "refines it"
        )
    return tuple(checked)


def _read_prompts(prompts: Mapping[str, object]) -> tuple[str | None, str | None]:
    """Return query and passage prefix; prompts that are all empty, as libraries write them, state nothing."""
    if not any(prompts.values()):
        return None, None

    def first(names: tuple[str, ...]) -> str | None:
        return next((str(prompts[name] or "") for name in names if name in prompts), None)

    query, passage = first(_QUERY_PROMPTS), first(_PASSAGE_PROMPTS)
    if query is None and passage is None:
        return None, None
    return query or "", passage or ""


def _read_pooling(folder: Path, modules: tuple[tuple[str, str], ...]) -> str | None:
    place = next(place for kind, place in modules if kind == "Pooling")
    config = read_json(folder / place / "config.json") if place else {}
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [name for key, name in _POOLING_KEYS.items() if config.get(key)]
    names = [modes] if isinstance(modes, str) else list(modes) if isinstance(modes, list) else []
    pooling = [_POOLING_NAMES.get(str(name), str(name)) for name in names]
    unknown = sorted(set(pooling) - set(POOLINGS))
    if unknown:
        raise RetrieverError(f"encoder {folder} needs pooling {unknown}; known are {list(POOLINGS)}")
    return "+".join(pooling) or None


def _read_normalized(
    folder: Path, modules: tuple[tuple[str, str], ...], config: Mapping[str, object]
) -> bool | None:
    """Return None where neither a module nor the similarity that it was made for states it."""
    if any(kind == "Normalize" for kind, _ in modules):
        return True
    similarity = config.get("similarity_fn_name")
    if similarity not in (None, "cosine", "dot"):
        raise RetrieverError(
            f"encoder {folder} is made for the similarity {similarity!r}; an index here supports "
            "cosine and dot"
        )
    return None if similarity is None else similarity == "cosine"


def _read_max_length(transformer: Path, *, limit: int | None) -> int | None:
    for name in _SENTENCE_CONFIGS:
        stated = read_json(transformer / name).get("max_seq_length")
        if isinstance(stated, int):
            return _shorter(stated, limit)
    stated = read_json(transformer / "tokenizer_config.json").get("model_max_length")
    # Tokenizers without a limit state 10^30.
    return _shorter(stated, limit) if isinstance(stated, int) and stated < 10**9 else limit


def _shorter(length: int, limit: int | None) -> int:
    return length if limit is None else min(length, limit)


def read_length_limit(transformer: Path) -> int | None:
    """Return the longest sequence that the model has positions for; None where it does not state it."""
    config = read_json(transformer / "config.json")
    positions, padding = config.get("max_position_embeddings"), config.get("pad_token_id", 1)
    if not isinstance(positions, int) or positions < 1:
        return None
    if config.get("model_type") in _POSITIONS_AFTER_PADDING and isinstance(padding, int):
        return positions - padding - 1
    return positions
