"""How an encoder expects its texts: from a flag, from the model's own configuration, or from its family."""

from __future__ import annotations

import argparse
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from search_r1.search.errors import RetrieverError

logger = logging.getLogger(__name__)

POOLINGS = ("mean", "cls", "max", "last", "weighted", "mean_sqrt_len")
"""Of the token states: `weighted` is a mean with the position as weight, `last` the last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodingRecipe:
    """How an encoder expects its texts; part of the manifest of every index."""

    query_prefix: str
    passage_prefix: str
    pooling: str
    """One of POOLINGS, or several joined by "+"."""
    max_length: int
    """Tokens, prefix and special tokens included; the rest of a text is cut off."""
    normalized: bool
    """Vectors have length 1, so that their inner product is their cosine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartialRecipe:
    """The fields of a recipe that one source states; None where it states nothing."""

    query_prefix: str | None = None
    passage_prefix: str | None = None
    pooling: str | None = None
    max_length: int | None = None
    normalized: bool | None = None

    def over(self, other: PartialRecipe) -> PartialRecipe:
        """Return these fields, completed by those of `other`."""
        stated = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(other, **stated)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSpec:
    """How to load an encoder, in any process."""

    path: str
    """A folder or a hub id."""
    family: str | None = None
    """Key of FAMILIES, for what the model's files do not state; None to go by the model's name."""
    flags: PartialRecipe = field(default_factory=PartialRecipe)
    """Overrides the model's own configuration."""
    use_fp16: bool | None = None
    """None: on a GPU. Never used on a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRecipe:
    """What the files of a model state about its encoding."""

    is_sentence_encoder: bool
    """It has a modules.json: made to encode texts, and what it does not mention it does not need."""
    recipe: PartialRecipe
    length_limit: int | None
    """Tokens that the model has positions for."""


_BGE = "Represent this sentence for searching relevant passages: "
_INSTRUCTION = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery: "
_ZH = "为这个句子生成表示以用于检索相关文章："  # noqa: RUF001


def _state(
    query: str, passage: str, pooling: str, max_length: int, *, normalized: bool = True
) -> PartialRecipe:
    return PartialRecipe(
        query_prefix=query,
        passage_prefix=passage,
        pooling=pooling,
        max_length=max_length,
        normalized=normalized,
    )


# Name of a family: pattern of its models' names in lower case, recipe. The first match counts, so special
# families come before general ones. The recipes follow the model cards; taken as commonly quoted, without the
# card, are bge_m3 (no instruction), contriever, arctic, dot, and the mean of gte. The length of e5 is that of
# the published retrieval server.
FAMILIES: Mapping[str, tuple[str, PartialRecipe]] = {
    "e5_mistral": (r"e5-mistral", _state(_INSTRUCTION, "", "last", 4096)),
    "e5_instruct": (r"e5-.*instruct", _state(_INSTRUCTION, "", "mean", 512)),
    "e5": (r"(^|[/_-])e5([_-]|$)", _state("query: ", "passage: ", "mean", 256)),
    "bge_m3": (r"bge-m3", _state("", "", "cls", 8192)),
    "bge_zh": (r"bge-.*zh", _state(_ZH, "", "cls", 512)),
    "bge": (r"(^|[/_-])bge-(small|base|large)", _state(_BGE, "", "cls", 512)),
    "gte_modern": (r"gte-(modernbert|.*v1\.5)", _state("", "", "cls", 8192)),
    "gte": (r"(^|[/_-])gte-(small|base|large)", _state("", "", "mean", 512)),
    "qwen3_embedding": (r"qwen3-embedding", _state(_INSTRUCTION.rstrip(" "), "", "last", 8192)),
    "arctic_v2": (r"arctic-embed-.*v2", _state("query: ", "", "cls", 8192)),
    "arctic": (r"arctic-embed", _state(_BGE, "", "cls", 512)),
    "mxbai": (r"mxbai-embed", _state(_BGE, "", "cls", 512)),
    "nomic": (r"nomic-embed-text", _state("search_query: ", "search_document: ", "mean", 8192)),
    "contriever": (r"contriever", _state("", "", "mean", 512, normalized=False)),
    "minilm": (r"all-(minilm|mpnet|distilroberta)", _state("", "", "mean", 256)),
    # Sentence encoders trained for inner products, whose older configurations leave that to the name.
    "dot": (r"-dot(-|$)", PartialRecipe(normalized=False)),
}
_DEFAULTS = _state("", "", "mean", 512)
"""Of a sentence encoder that states nothing; those of sentence-transformers."""


def find_family(model_name: str) -> str | None:
    """Return the family of a model by its name."""
    lower = model_name.lower()
    return next((name for name, (pattern, _) in FAMILIES.items() if re.search(pattern, lower)), None)


def resolve_recipe(
    stated: ModelRecipe, *, model_name: str, family: str | None = None, flags: PartialRecipe
) -> EncodingRecipe:
    """Choose each field from `flags`, else from the model, else from its family, and log the sources.

    Raises RetrieverError for a model of no family that does not state how it expects its texts, and for a
    flag that the model cannot follow.
    """
    _check_flags(flags, family=family, limit=stated.length_limit, model_name=model_name)
    named = find_family(model_name)
    if family and named and named != family:
        logger.warning("encoder %s looks like family %s, used as %s", model_name, named, family)
    family = family or named
    published = FAMILIES[family][1] if family else PartialRecipe()
    if not stated.is_sentence_encoder and published.pooling is None:
        _require_flags(flags, model_name=model_name)
    sources = {"given": flags, "model": stated.recipe, f"family {family}": published, "default": _DEFAULTS}
    values: dict[str, object] = {}
    origins: list[str] = []
    for name in (f.name for f in fields(PartialRecipe)):
        stating = {
            source: value for source, part in sources.items() if (value := getattr(part, name)) is not None
        }
        origin, values[name] = next(iter(stating.items()))
        origins.append(f"{name} {values[name]!r} ({origin})")
        if origin == "given" and stating.get("model", values[name]) != values[name]:
            logger.warning(
                "encoder %s: its own configuration has %s %r, the given %r overrides it",
                model_name,
                name,
                stating["model"],
                values[name],
            )
    recipe = EncodingRecipe(**values)  # type: ignore[arg-type]
    logger.info("encoder %s: %s", model_name, ", ".join(origins))
    limit = stated.length_limit or recipe.max_length
    return replace(recipe, max_length=min(recipe.max_length, limit))


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a recipe, for commands that open an index."""
    add = parser.add_argument_group(
        "encoder of an index without a manifest",
        "needed only where the model states nothing itself and --retriever_name names no family",
    ).add_argument
    add("--pooling_method", metavar="X", help="of the token states: mean, cls, max, ...")
    add("--query_prefix", metavar="TEXT", help="put before every query; may be empty")
    add("--passage_prefix", metavar="TEXT", help="that was put before every passage")
    add("--max_length", metavar="N", type=int, help="tokens of a text that are read")


def read_recipe_flags(settings: argparse.Namespace) -> PartialRecipe:
    """Return the flags of `add_recipe_arguments`."""
    return PartialRecipe(
        pooling=settings.pooling_method,
        query_prefix=settings.query_prefix,
        passage_prefix=settings.passage_prefix,
        max_length=settings.max_length,
    )


def _check_flags(flags: PartialRecipe, *, family: str | None, limit: int | None, model_name: str) -> None:
    if family is not None and family not in FAMILIES:
        raise RetrieverError(f"retriever name {family!r} is unknown; expected one of {sorted(FAMILIES)}")
    if flags.pooling is not None and not set(flags.pooling.split("+")) <= set(POOLINGS):
        raise RetrieverError(f"pooling {flags.pooling!r} is unknown; expected one of {list(POOLINGS)}")
    if flags.max_length is not None and not 3 <= flags.max_length <= (limit or flags.max_length):
        raise RetrieverError(
            f"max_length {flags.max_length} does not fit encoder {model_name}: expected 3 to {limit} tokens"
        )


def _require_flags(flags: PartialRecipe, *, model_name: str) -> None:
    names = {"pooling": "pooling_method", "query_prefix": "query_prefix", "passage_prefix": "passage_prefix"}
    missing = [f"--{flag}" for name, flag in names.items() if getattr(flags, name) is None]
    if missing:
        raise RetrieverError(
            f"encoder {model_name} does not state how it expects its texts (it has no modules.json) and its "
            f"name is of no known family; name the family (--retriever_name, one of {sorted(FAMILIES)}) or "
            f"state it yourself with {', '.join(missing)}"
        )
