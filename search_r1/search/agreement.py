"""Do index, corpus and encoder belong together: fact by fact with the manifest, and by trying it.

The trial: ten passages of the corpus, encoded anew, must find themselves, and ten different queries must not
all get the same results. It needs no manifest.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypedDict

import numpy as np
import numpy.typing as npt

from search_r1.search.corpus import Corpus, sample_rows
from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import IndexKind
from search_r1.search.manifest import IndexManifest
from serving.answers import truncate_words

if TYPE_CHECKING:
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.vector_index import VectorIndex

logger = logging.getLogger(__name__)

FloatArray: TypeAlias = npt.NDArray[np.float32]
RowArray: TypeAlias = npt.NDArray[np.int64]

_NUM_KNOWN = 10
_NUM_LOOKED_AT = 10
_SHARED_TOPK = 3
_QUERY_WORDS = 8
# Two passages that differ only beyond the encoder's length score alike: either may come first.
_TIE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """When a trial of ten known passages is passed."""

    rank: int
    """The passage itself must be among the first `rank`."""
    lost: int
    """This many may not be."""


TOLERANCES: Mapping[IndexKind, Tolerance] = {
    IndexKind.FLAT: Tolerance(rank=1, lost=0),
    IndexKind.FP16: Tolerance(rank=1, lost=0),
    IndexKind.SQ8: Tolerance(rank=1, lost=1),
    IndexKind.IVF: Tolerance(rank=1, lost=1),
    IndexKind.IVF_PQ: Tolerance(rank=3, lost=3),
    IndexKind.HNSW: Tolerance(rank=1, lost=2),
    IndexKind.BINARY: Tolerance(rank=1, lost=2),
}
# A dot product prefers long vectors: a passage need not be its own nearest neighbour.
_UNNORMALISED = Tolerance(rank=10, lost=5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to search for, encoded."""

    rows: list[int]
    """Of the known passages."""
    passages: FloatArray
    """[rows, dim]"""
    queries: FloatArray
    """[queries, dim], of different texts"""
    normalised: bool


def prepare_trial(corpus: Corpus, encoder: TextEncoder) -> Trial:
    """Encode the known passages, and queries made of their first words."""
    rows = sample_rows(len(corpus), size=_NUM_KNOWN)
    texts = [corpus[row].contents for row in rows]
    return Trial(
        rows=rows,
        passages=encoder.encode_passages(texts),
        queries=encoder.encode_queries(sorted({shorten_to_query(text) for text in texts})),
        normalised=encoder.recipe.normalised,
    )


def shorten_to_query(contents: str) -> str:
    """The first words of a passage without quotes and line ends: something like a query about it."""
    return truncate_words(" ".join(contents.replace('"', " ").split()), max_words=_QUERY_WORDS)


def run_trial(trial: Trial, *, index: VectorIndex, corpus: Corpus, needed: str) -> None:
    """Raises RetrieverError when the trial is not passed; `needed` is what to do then."""
    tolerance = TOLERANCES[index.kind] if trial.normalised else _UNNORMALISED
    looked_at = min(max(tolerance.rank, _NUM_LOOKED_AT), len(index))
    # Together: an exact index is read once, which for tens of gigabytes is most of a start.
    scores, rows = index.search(np.concatenate([trial.passages, trial.queries]), topk=looked_at)
    known = len(trial.rows)
    own_scores = np.einsum("kd,kd->k", trial.passages, trial.passages)
    lost = [
        row
        for row, found, points, own in zip(trial.rows, rows[:known], scores[:known], own_scores, strict=True)
        if not _finds_itself(row, found, points, own_score=own, corpus=corpus, rank=tolerance.rank)
    ]
    if lost:
        ids = [corpus[row].id for row in lost]
        message = (
            f"{len(lost)} of {len(trial.rows)} known passages do not find themselves among the first "
            f"{tolerance.rank} (ids {ids})"
        )
        if len(lost) > tolerance.lost:
            raise RetrieverError(
                f"{message}, at most {tolerance.lost} may not with kind {index.kind}: the index was made by "
                f"another encoder, with other prefixes, or from another corpus; {needed}"
            )
        logger.warning("%s: expected of an approximate index only", message)
    _check_results_differ(rows[known:, :_SHARED_TOPK], needed=needed)


def _finds_itself(
    row: int, found: RowArray, scores: FloatArray, *, own_score: float, corpus: Corpus, rank: int
) -> bool:
    place = np.flatnonzero(found == row)
    if len(place) and (place[0] < rank or scores[place[0]] >= scores[rank - 1] - _TIE):
        return True
    if len(found) == _NUM_LOOKED_AT and scores[-1] >= own_score - _TIE:
        return True  # so many are the same to the encoder that the passage need not be among those shown
    contents = corpus[row].contents
    return any(corpus[int(other)].contents == contents for other in found[:rank] if other >= 0)


def _check_results_differ(rows: RowArray, *, needed: str) -> None:
    """`rows`: what the queries found [queries, k]; fewer than ten, of a tiny corpus, may well be the same."""
    if len(rows) == _NUM_KNOWN and (rows == rows[0]).all():
        raise RetrieverError(
            f"{len(rows)} different queries all get the same results (rows {rows[0].tolist()}): index or "
            f"encoder is broken; {needed}"
        )


def list_misfits(
    recorded: IndexManifest | None,
    *,
    index: VectorIndex,
    corpus: Corpus,
    encoder: TextEncoder,
    full: bool = False,
) -> list[str]:
    """One line, with both values and the fix, for every fact that the three do not agree on.

    `full`: read the whole corpus for its hash.
    """
    count = f"the index holds {len(index)} vectors, the corpus {len(corpus)} passages"
    dim = f"the index holds vectors of {index.dim}, the encoder makes {encoder.dim}"
    problems = compare_corpus(recorded, corpus=corpus, full=full) if recorded else []
    if len(index) != len(corpus):
        problems.append(f"count: {count}; pass --corpus_path of the corpus that the index was built from")
    if index.dim != encoder.dim:
        problems.append(f"dim: {dim}; pass --retriever_model of the encoder that the index was built with")
    if recorded:
        problems += compare_encoder(recorded, encoder=encoder)
        told = (("kind", recorded.kind, str(index.kind)), ("dim", recorded.dim, index.dim))
        problems += _compare((*told, ("count", recorded.count, len(index))), fix="rebuild the index")
    return problems


class RecipeFlags(TypedDict, total=False):
    """What an encoder is told beside its own configuration."""

    pooling: str | None
    max_length: int | None
    query_prefix: str | None
    passage_prefix: str | None
    normalised: bool | None


def read_recipe_flags(settings: argparse.Namespace) -> RecipeFlags:
    """Of `recipes.add_recipe_arguments`."""
    return {
        "pooling": settings.pooling_method,
        "max_length": settings.max_length,
        "query_prefix": settings.query_prefix,
        "passage_prefix": settings.passage_prefix,
    }


def choose_recipe(
    recorded: IndexManifest | None, *, retriever_name: str | None, told: RecipeFlags
) -> RecipeFlags:
    """What to tell the encoder beside its own configuration: what is told, then what is recorded."""
    if recorded is None:
        return told
    known: RecipeFlags = {"pooling": recorded.pooling, "max_length": recorded.max_length}
    if retriever_name is None:
        known |= {
            "query_prefix": recorded.query_prefix,
            "passage_prefix": recorded.passage_prefix,
            "normalised": recorded.normalised,
        }
    return {**known, **{name: value for name, value in told.items() if value is not None}}  # type: ignore[typeddict-item]


def compare_corpus(recorded: IndexManifest, *, corpus: Corpus, full: bool) -> list[str]:
    """Facts of the corpus that differ from the manifest's."""
    pairs: list[tuple[str, object, object]] = [("corpus.bytes", recorded.corpus.bytes, corpus.num_bytes)]
    if recorded.corpus.bytes == corpus.num_bytes:
        pairs.append(("corpus.fingerprint", recorded.corpus.fingerprint, corpus.fingerprint))
        if full:
            pairs.append(("corpus.sha256", recorded.corpus.sha256, corpus.sha256))
    return _compare(pairs, fix="pass --corpus_path of the corpus that the index was built from")


def compare_encoder(recorded: IndexManifest, *, encoder: TextEncoder) -> list[str]:
    """Facts of the encoder and its recipe that differ from the manifest's."""
    recipe = encoder.recipe
    name = f" --retriever_name {recorded.retriever_name}" if recorded.retriever_name else ""
    model = _compare(
        [("encoder_sha256", recorded.encoder_sha256, encoder.sha256)],
        fix=f"pass --retriever_model of {recorded.encoder} (this is {encoder.name})",
    )
    pairs = (
        ("pooling", recorded.pooling, recipe.pooling),
        ("query_prefix", recorded.query_prefix, recipe.query_prefix),
        ("passage_prefix", recorded.passage_prefix, recipe.passage_prefix),
        ("max_length", recorded.max_length, recipe.max_length),
        ("normalised", recorded.normalised, recipe.normalised),
        ("metric", recorded.metric, recipe.similarity),
    )
    return model + _compare(pairs, fix=f"encode as the index was built{f', with{name}' if name else ''}")


def _compare(pairs: Sequence[tuple[str, object, object]], *, fix: str) -> list[str]:
    return [
        f"{name}: index was built with {old!r}, found {new!r}; {fix}"
        for name, old, new in pairs
        if old != new
    ]
