"""Whether index, corpus and encoder belong together: fact by fact with the manifest, and by a trial.

In the trial ten passages of the corpus, encoded now, must find themselves, and ten different queries must not
all get the same results. It needs no manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from search_r1.search.corpus import Corpus, compare_corpus, sample_rows
from search_r1.search.errors import RetrieverError
from search_r1.search.files import compare_facts
from search_r1.search.kinds import IndexKind
from search_r1.search.manifest import IndexManifest
from search_r1.search.ranking import FloatArray, RowArray
from search_r1.search.recipes import EncoderSpec, PartialRecipe
from serving.answers import truncate_words

if TYPE_CHECKING:
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.vector_index import VectorIndex

logger = logging.getLogger(__name__)

_NUM_KNOWN = 10
_DEPTH = 10
_SHARED_TOPK = 3
_QUERY_WORDS = 8
# Two passages that differ only beyond the encoder's length score alike: either may come first.
_TIE = 1e-3


TOLERANCES: Mapping[IndexKind, tuple[int, int]] = {
    IndexKind.FLAT: (1, 0),
    IndexKind.FP16: (1, 0),
    IndexKind.SQ8: (1, 1),
    IndexKind.IVF_PQ: (3, 3),
    IndexKind.HNSW: (1, 2),
}
"""The rank at which a known passage must find itself, and how many of ten may not."""
# A dot product prefers long vectors: a passage need not be its own nearest neighbor.
_UNNORMALIZED = (10, 5)


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to search for, encoded."""

    rows: list[int]
    """Of the known passages."""
    passages: FloatArray
    """[rows, dim]"""
    queries: FloatArray
    """[queries, dim], of different texts"""
    normalized: bool


def prepare_trial(corpus: Corpus, encoder: TextEncoder) -> Trial:
    """Encode the known passages, and queries made of their first words."""
    rows = sample_rows(len(corpus), size=_NUM_KNOWN)
    texts = [corpus[row].contents for row in rows]
    return Trial(
        rows=rows,
        passages=encoder.encode_passages(texts),
        queries=encoder.encode_queries(sorted({shorten_to_query(text) for text in texts})),
        normalized=encoder.recipe.normalized,
    )


def shorten_to_query(contents: str) -> str:
    """Return the first words of a passage without quotes and line ends, similar to a query about it."""
    return truncate_words(" ".join(contents.replace('"', " ").split()), max_words=_QUERY_WORDS)


def run_trial(trial: Trial, *, index: VectorIndex, corpus: Corpus, fix: str) -> None:
    """Raise RetrieverError, which ends with `fix`, unless the trial passes."""
    rank, max_lost = TOLERANCES[index.kind] if trial.normalized else _UNNORMALIZED
    # In one search: an exact index is read once, which for tens of gigabytes is most of a start.
    scores, rows = index.search(np.concatenate([trial.passages, trial.queries]), topk=min(_DEPTH, len(index)))
    own_scores = np.einsum("kd,kd->k", trial.passages, trial.passages)
    lost = [
        corpus[row].id
        for number, row in enumerate(trial.rows)
        if not _finds_itself(
            row, rows[number], scores[number], own_score=own_scores[number], corpus=corpus, rank=rank
        )
    ]
    message = (
        f"{len(lost)} of {len(trial.rows)} known passages do not find themselves among the first {rank} "
        f"(ids {lost})"
    )
    if len(lost) > max_lost:
        raise RetrieverError(
            f"{message}, expected at most {max_lost} for kind {index.kind}: the index was made "
            f"by another encoder, with other prefixes, or from another corpus; {fix}"
        )
    if lost:
        logger.warning("%s, which an approximate index may do", message)
    # Fewer than ten queries, of a tiny corpus, may well find the same.
    shared = rows[len(trial.rows) :, :_SHARED_TOPK]
    if len(shared) == _NUM_KNOWN and (shared == shared[0]).all():
        raise RetrieverError(
            f"{len(shared)} different queries all get the same results (rows {shared[0].tolist()}): index or "
            f"encoder is broken; {fix}"
        )


def _finds_itself(
    row: int, found: RowArray, scores: FloatArray, *, own_score: float, corpus: Corpus, rank: int
) -> bool:
    place = np.flatnonzero(found == row)
    rank = min(rank, len(found))
    if len(place) and (place[0] < rank or scores[place[0]] >= scores[rank - 1] - _TIE):
        return True
    if len(found) == _DEPTH and scores[-1] >= own_score - _TIE:
        return True  # so many are equal to the encoder that the passage need not be among those shown
    contents = corpus[row].contents
    return any(corpus[int(other)].contents == contents for other in found[:rank] if other >= 0)


def complete_spec(spec: EncoderSpec, recorded: IndexManifest | None) -> EncoderSpec:
    """Return the spec with what the manifest records where the flags state nothing.

    A named family keeps its own prefixes, so that one that does not fit the index is refused.
    """
    if recorded is None:
        return spec
    known = PartialRecipe(pooling=recorded.pooling, max_length=recorded.max_length)
    if spec.family is None:
        known = replace(
            known,
            query_prefix=recorded.query_prefix,
            passage_prefix=recorded.passage_prefix,
            normalized=recorded.normalized,
        )
    return replace(spec, flags=spec.flags.over(known))


def list_misfits(
    recorded: IndexManifest | None,
    *,
    index: VectorIndex,
    corpus: Corpus,
    encoder: TextEncoder | None,
    full: bool = False,
) -> list[str]:
    """Return one line, with both values and the fix, for every fact on which they do not agree.

    `full` reads the whole corpus for its hash.
    """
    problems = compare_corpus(recorded.corpus, corpus=corpus, full=full) if recorded else []
    if len(index) != len(corpus):
        problems.append(
            f"count: the index holds {len(index)} vectors, the corpus {len(corpus)} passages; "
            "pass --corpus_path of the corpus that the index was built from"
        )
    if encoder is not None and index.dim != encoder.dim:
        problems.append(
            f"dim: the index holds vectors of {index.dim}, the encoder makes {encoder.dim}; "
            "pass --retriever_model of the encoder that the index was built with"
        )
    if recorded:
        problems += compare_encoder(recorded, encoder=encoder) if encoder is not None else []
        pairs = (
            ("kind", recorded.kind, str(index.kind)),
            ("dim", recorded.dim, index.dim),
            ("count", recorded.count, len(index)),
        )
        problems += compare_facts(pairs, fix="rebuild the index")
    return problems


def compare_encoder(recorded: IndexManifest, *, encoder: TextEncoder) -> list[str]:
    """Return the facts of the encoder and its recipe that differ from the manifest's."""
    name = f", with --retriever_name {recorded.retriever_name}" if recorded.retriever_name else ""
    model = compare_facts(
        [("encoder_sha256", recorded.encoder_sha256, encoder.sha256)],
        fix=f"pass --retriever_model of {recorded.encoder} (this is {encoder.name})",
    )
    names = ("pooling", "query_prefix", "passage_prefix", "max_length", "normalized")
    pairs = [(name, getattr(recorded, name), getattr(encoder.recipe, name)) for name in names]
    return model + compare_facts(pairs, fix=f"encode as the index was built{name}")
