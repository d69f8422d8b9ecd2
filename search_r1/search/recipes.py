"""How an encoder wants its texts: from a flag, from the model's own configuration, or from its family."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Literal

from search_r1.search.errors import RetrieverError

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "cls", "max", "last", "weighted", "mean_sqrt_len")
"""Of the token states: `weighted` is a mean with the position as weight, `last` the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingRecipe:
    """How an encoder wants its texts; goes into the manifest of every index."""

    query_prefix: str
    passage_prefix: str
    pooling: str
    """One of POOLINGS, or several joined by "+"."""
    max_length: int
    """Tokens, prefix and special tokens included; the rest of a text is cut off."""
    normalised: bool
    """Vectors have length 1, so that their inner product is their cosine."""
    similarity: Literal["inner_product"] = "inner_product"


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialRecipe:
    """The fields of a recipe that somebody states; None where nothing is stated."""

    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: str | None = None
    max_length: int | None = None
    normalised: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """Encoders that want the same."""

    pattern: str
    """Found in the lower-case name of a model."""
    recipe: PartialRecipe
    source: str
    """Where a member of it is documented."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StatedModel:
    """What the files of a model say of its encoding."""

    is_sentence_encoder: bool
    """It has a modules.json: made to encode texts, and what it does not mention it does not need."""
    modules: tuple[tuple[str, str], ...]
    """(class, folder) of what a text goes through, in order; folders relative to the model's."""
    recipe: PartialRecipe
    length_limit: int | None
    """Tokens that the model has positions for."""
    truncated_dim: int | None


_BGE = "Represent this sentence for searching relevant passages: "
_INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "


def _state(query: str, passage: str, pooling: str, max_length: int, normalised: bool = True) -> PartialRecipe:
    return PartialRecipe(
        query_prefix=query,
        passage_prefix=passage,
        pooling=pooling,
        max_length=max_length,
        normalised=normalised,
    )


# The first family that fits a name is its family, so the special come before the general. `source` is the
# card of a member, which decides in doubt. Taken as commonly quoted, without the card at hand, are: bge_m3
# (that its queries need no instruction), contriever, arctic, dot, and that gte takes the mean. The length of
# e5 is the one of the published retrieval server.
FAMILIES: Mapping[str, Family] = {
    "e5_mistral": Family(
        pattern=r"e5-mistral",
        recipe=_state(_INSTRUCTION, "", "last", 4096),
        source="huggingface.co/intfloat/e5-mistral-7b-instruct",
    ),
    "e5_instruct": Family(
        pattern=r"e5-.*instruct",
        recipe=_state(_INSTRUCTION, "", "mean", 512),
        source="huggingface.co/intfloat/multilingual-e5-large-instruct",
    ),
    "e5": Family(
        pattern=r"(^|[/_-])e5([_-]|$)",
        recipe=_state("query: ", "passage: ", "mean", 256),
        source="huggingface.co/intfloat/e5-base-v2",
    ),
    "bge_m3": Family(
        pattern=r"bge-m3", recipe=_state("", "", "cls", 8192), source="huggingface.co/BAAI/bge-m3"
    ),
    "bge_zh": Family(
        pattern=r"bge-.*zh",
        recipe=_state("为这个句子生成表示以用于检索相关文章：", "", "cls", 512),  # noqa: RUF001
        source="huggingface.co/BAAI/bge-base-zh-v1.5",
    ),
    "bge": Family(
        pattern=r"(^|[/_-])bge-(small|base|large)",
        recipe=_state(_BGE, "", "cls", 512),
        source="huggingface.co/BAAI/bge-base-en-v1.5",
    ),
    "gte_modern": Family(
        pattern=r"gte-(modernbert|.*v1\.5)",
        recipe=_state("", "", "cls", 8192),
        source="huggingface.co/Alibaba-NLP/gte-modernbert-base",
    ),
    "gte": Family(
        pattern=r"(^|[/_-])gte-(small|base|large)",
        recipe=_state("", "", "mean", 512),
        source="huggingface.co/thenlper/gte-base",
    ),
    "qwen3_embedding": Family(
        pattern=r"qwen3-embedding",
        recipe=_state(_INSTRUCTION.rstrip(" "), "", "last", 8192),
        source="huggingface.co/Qwen/Qwen3-Embedding-0.6B",
    ),
    "arctic_v2": Family(
        pattern=r"arctic-embed-.*v2",
        recipe=_state("query: ", "", "cls", 8192),
        source="huggingface.co/Snowflake/snowflake-arctic-embed-m-v2.0",
    ),
    "arctic": Family(
        pattern=r"arctic-embed",
        recipe=_state(_BGE, "", "cls", 512),
        source="huggingface.co/Snowflake/snowflake-arctic-embed-m",
    ),
    "mxbai": Family(
        pattern=r"mxbai-embed",
        recipe=_state(_BGE, "", "cls", 512),
        source="huggingface.co/mixedbread-ai/mxbai-embed-large-v1",
    ),
    "nomic": Family(
        pattern=r"nomic-embed-text",
        recipe=_state("search_query: ", "search_document: ", "mean", 8192),
        source="huggingface.co/nomic-ai/nomic-embed-text-v1.5",
    ),
    "contriever": Family(
        pattern=r"contriever",
        recipe=_state("", "", "mean", 512, normalised=False),
        source="huggingface.co/facebook/contriever-msmarco",
    ),
    "minilm": Family(
        pattern=r"all-(minilm|mpnet|distilroberta)",
        recipe=_state("", "", "mean", 256),
        source="huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
    ),
    "dot": Family(
        # Sentence encoders trained for inner products, whose older configurations leave that to the name.
        pattern=r"-dot(-|$)",
        recipe=PartialRecipe(normalised=False),
        source="huggingface.co/sentence-transformers/multi-qa-mpnet-base-dot-v1",
    ),
}


def find_family(model_name: str) -> str | None:
    """The family of a model by its name."""
    for name, family in FAMILIES.items():
        if re.search(family.pattern, model_name.lower()):
            return name
    return None


def resolve_recipe(
    stated: StatedModel, *, model_name: str, retriever_name: str | None = None, flags: PartialRecipe
) -> EncodingRecipe:
    """Each field from `flags`, else from the model, else from its family.

    `retriever_name`: a key of FAMILIES; None for the family of `model_name`, if it has one. Raises
    RetrieverError for a model of no family that does not say how it wants its texts, and for a flag that the
    model cannot follow.
    """
    _check_flags(flags, retriever_name=retriever_name, limit=stated.length_limit, model_name=model_name)
    named = find_family(model_name)
    family = retriever_name or named
    if retriever_name and named and named != retriever_name:
        logger.warning("encoder %s looks like one of family %s, taken as %s", model_name, named, family)
    published = FAMILIES[family].recipe if family else PartialRecipe()
    if not stated.is_sentence_encoder and published.pooling is None:
        _demand_flags(flags, model_name=model_name)
    sources = {"given": flags, "model": stated.recipe, f"family {family}": published, "default": _DEFAULTS}
    chosen: dict[str, object] = {}
    origins: dict[str, str] = {}
    for field in fields(PartialRecipe):
        said = {name: getattr(part, field.name) for name, part in sources.items()}
        said = {name: value for name, value in said.items() if value is not None}
        origin = next(iter(said))
        chosen[field.name], origins[field.name] = said[origin], origin
        if origin == "given" and said.get("model", said["given"]) != said["given"]:
            logger.warning(
                "encoder %s: %s %r of its own configuration is overruled by the given %r",
                model_name,
                field.name,
                said["model"],
                said["given"],
            )
    recipe = EncodingRecipe(**chosen)  # type: ignore[arg-type]
    if stated.length_limit is not None and recipe.max_length > stated.length_limit:
        recipe = EncodingRecipe(**(asdict(recipe) | {"max_length": stated.length_limit}))
    facts = (f"{name} {getattr(recipe, name)!r} ({origin})" for name, origin in origins.items())
    logger.info("encoder %s: %s", model_name, ", ".join(facts))
    return recipe


def add_recipe_arguments(parser: argparse.ArgumentParser, *, default: str | None = None) -> None:
    """The flags of a recipe, for those who open an index."""
    add = parser.add_argument_group(
        "encoder of an index without a manifest",
        "only where the model says nothing itself and --retriever_name names no family",
    ).add_argument
    add("--pooling_method", metavar="X", default=default, help="of the token states: mean, cls, max, ...")
    add("--query_prefix", metavar="TEXT", default=default, help="put before every query; may be empty")
    add("--passage_prefix", metavar="TEXT", default=default, help="what was put before every passage")
    add("--max_length", metavar="N", default=default, type=int, help="tokens of a text that are read")


# Of a model that was made to encode texts and mentions nothing of the kind; sentence-transformers' own.
_DEFAULTS = PartialRecipe(query_prefix="", passage_prefix="", pooling="mean", max_length=512, normalised=True)


def _check_flags(
    flags: PartialRecipe, *, retriever_name: str | None, limit: int | None, model_name: str
) -> None:
    if retriever_name is not None and retriever_name not in FAMILIES:
        raise RetrieverError(f"retriever name {retriever_name!r} is unknown; known are {sorted(FAMILIES)}")
    if flags.pooling is not None and not set(flags.pooling.split("+")) <= set(POOLINGS):
        raise RetrieverError(f"pooling {flags.pooling!r} is unknown; known are {list(POOLINGS)}")
    if flags.max_length is not None and not 3 <= flags.max_length <= (limit or flags.max_length):
        raise RetrieverError(
            f"max_length {flags.max_length} does not fit encoder {model_name}: expected 3 to {limit} tokens"
        )


def _demand_flags(flags: PartialRecipe, *, model_name: str) -> None:
    names = {"pooling": "pooling_method", "query_prefix": "query_prefix", "passage_prefix": "passage_prefix"}
    missing = [f"--{flag}" for field, flag in names.items() if getattr(flags, field) is None]
    if missing:
        raise RetrieverError(
            f"encoder {model_name} does not say how it wants its texts (it has no modules.json) and its name "
            f"is of no known family; name the family (--retriever_name, one of {sorted(FAMILIES)}) "
            f"or say it yourself with {', '.join(missing)}"
        )
