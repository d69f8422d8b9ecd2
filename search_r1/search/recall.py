"""How much of what exact search finds an index finds: recall@k, measured on the index that will be served.

    index recall --index_path e5_SQ8.index --reference_path e5_Flat.index \\
        --corpus_path wiki-18.jsonl --retriever_model intfloat/e5-base-v2
"""

from __future__ import annotations

import argparse
import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import numpy as np

from search_r1.search.errors import RetrieverError
from search_r1.search.kinds import SCANNED_KINDS, IndexKind, SearchOptions
from search_r1.search.recipes import add_recipe_arguments

if TYPE_CHECKING:
    from search_r1.search.corpus import Corpus
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.manifest import IndexManifest
    from search_r1.search.ranking import FloatArray, RowArray
    from search_r1.search.vector_index import VectorIndex
    from search_r1.search.vector_source import VectorSource

logger = logging.getLogger(__name__)

RECALL_AT = (1, 3, 10)
_QUERIES_AT_ONCE = 64
_ENCODED_AT_ONCE = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Recall:
    """Share of the exact top k that was among the top k found, mean over the queries."""

    at: dict[int, float]
    """Recall@k by k."""
    num_queries: int
    kind: str

    def as_facts(self) -> dict[str, float | int | str]:
        """For JSON and manifest: `recall@3` and so on."""
        shares = {f"recall@{k}": round(share, 4) for k, share in self.at.items()}
        return {"kind": self.kind, "num_queries": self.num_queries, **shares}


def measure_recall(
    index: VectorIndex,
    *,
    reference: VectorIndex | VectorSource,
    queries: FloatArray,
    ks: Sequence[int] = RECALL_AT,
    report: Callable[[int, int], None] | None = None,
) -> Recall:
    """Search for queries [n, dim] and compare with `reference`: an exact index, or the vectors themselves.

    Vectors are read once, in blocks; `report(rows read, rows)`. Raises RetrieverError for a reference of
    other vectors and for no queries.
    """
    from search_r1.search.torch_index import search_source

    num_vectors = reference.shape[0] if _is_source(reference) else len(cast("VectorIndex", reference))
    if num_vectors != len(index):
        raise RetrieverError(
            f"recall: the index holds {len(index)} vectors, the reference {num_vectors};"
            " compare with the vectors that the index was built of"
        )
    if not len(queries):
        raise RetrieverError("recall: there are no queries to measure it with")
    topk = min(max(ks), num_vectors)
    if _is_source(reference):
        _, expected = search_source(reference, queries, topk=topk, report=report)
    else:
        expected = _search_in_batches(cast("VectorIndex", reference), queries, topk=topk)
    found = _search_in_batches(index, queries, topk=topk)
    return Recall(
        at={k: compare_rows(found, expected, k=min(k, topk)) for k in ks},
        num_queries=len(queries),
        kind=str(index.kind),
    )


def compare_rows(found: RowArray, expected: RowArray, *, k: int) -> float:
    """Recall@k of two rankings [n, >= k]; row -1 is nothing found."""
    hits = (found[:, :k, None] == expected[:, None, :k]) & (expected[:, None, :k] >= 0)
    return float(hits.any(axis=1).sum() / (expected[:, :k] >= 0).sum())


def take_query(contents: str) -> str:
    """A passage's first sentence without its title: the whole passage would find itself at once."""
    text = contents.split("\n", 1)[-1].strip()
    return re.split(r"(?<=[.!?])\s+", text, maxsplit=1)[0] or contents.strip()


def _search_in_batches(index: VectorIndex, queries: FloatArray, *, topk: int) -> RowArray:
    starts = range(0, len(queries), _QUERIES_AT_ONCE)
    return np.concatenate([index.search(queries[s : s + _QUERIES_AT_ONCE], topk=topk)[1] for s in starts])


def _is_source(reference: VectorIndex | VectorSource) -> TypeGuard[VectorSource]:
    return not hasattr(reference, "search")


class _EncodedCorpus:
    """The vectors of a corpus, made when they are read."""

    def __init__(self, corpus: Corpus, *, encoder: TextEncoder) -> None:
        self.shape = (len(corpus), encoder.dim)
        self._corpus = corpus
        self._encoder = encoder

    def __getitem__(self, rows: slice) -> FloatArray:
        texts = [self._corpus[row].contents for row in range(*rows.indices(self.shape[0]))]
        return self._encoder.encode_passages(texts, batch_size=_ENCODED_AT_ONCE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of `index recall`."""
    add = parser.add_argument
    add("--index_path", required=True, type=Path, help="the index to measure")
    add("--corpus_path", required=True, type=Path, help="the passages it was built of")
    add("--retriever_model", required=True, help="encoder: folder or cached model name")
    add("--retriever_name", default=None, help="encoder family, where the model does not say")
    add("--queries", default=None, type=Path, help='file of queries, one a line or JSONL with "question"')
    add(
        "--num_queries",
        default=200,
        type=int,
        help="passages whose first sentence is a query, or queries read",
    )
    add("--reference_path", default=None, type=Path, help="flat, fp16 or sq8 index of the same passages")
    add("--reencode", action="store_true", help="without a reference: encode all passages again")
    add("--seed", default=0, type=int, help="of the choice of passages")
    add("--nprobe", default=None, type=int, help="lists searched (ivf, ivf_pq)")
    add("--ef_search", default=None, type=int, help="candidates kept (hnsw)")
    add("--rescore_factor", default=None, type=int, help="candidates rescored per result (ivf_pq, binary)")
    add("--json", action="store_true", help="print JSON and no table")
    add_recipe_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Measure and print; raises RetrieverError."""
    from search_r1.search.agreement import choose_recipe, read_recipe_flags
    from search_r1.search.corpus import open_corpus
    from search_r1.search.encoder import TextEncoder
    from search_r1.search.manifest import load_manifest
    from search_r1.search.vector_index import open_index

    search = SearchOptions(
        nprobe=settings.nprobe, ef_search=settings.ef_search, rescore_factor=settings.rescore_factor
    )
    if settings.num_queries < 1:
        raise RetrieverError(f"--num_queries must be at least 1, got {settings.num_queries}")
    index = open_index(settings.index_path, search=search)
    corpus = open_corpus(settings.corpus_path)
    recorded = load_manifest(settings.index_path)
    told = read_recipe_flags(settings)
    recipe = choose_recipe(recorded, retriever_name=settings.retriever_name, told=told)
    encoder = TextEncoder(settings.retriever_model, retriever_name=settings.retriever_name, **recipe)
    _refuse_misfit(settings.index_path, recorded, index=index, corpus=corpus, encoder=encoder)
    reference, reference_name = _choose_reference(settings, index=index, corpus=corpus, encoder=encoder)
    texts = _read_queries(settings) if settings.queries else _sample_queries(settings, corpus)
    recall = measure_recall(index, reference=reference, queries=encoder.encode_queries(texts))
    asked = (
        f"queries of {settings.queries.name}" if settings.queries else "first sentences of sampled passages"
    )
    _show(recall, index=index, reference_name=reference_name, asked=asked, as_json=settings.json)
    corpus.close()
    return 0


def _refuse_misfit(
    path: Path,
    recorded: IndexManifest | None,
    *,
    index: VectorIndex,
    corpus: Corpus,
    encoder: TextEncoder,
) -> None:
    """Recall of things that do not belong together is a number like any other, and means nothing."""
    from search_r1.search.agreement import list_misfits
    from search_r1.search.manifest import list_changed_files

    problems = list_changed_files(recorded, path) if recorded else []
    problems += list_misfits(recorded, index=index, corpus=corpus, encoder=encoder)
    if problems:
        raise RetrieverError(f"index {path} cannot be measured with these files:\n  " + "\n  ".join(problems))


def _choose_reference(
    settings: argparse.Namespace, *, index: VectorIndex, corpus: Corpus, encoder: TextEncoder
) -> tuple[VectorIndex | VectorSource, str]:
    """What to compare with, and how to name it honestly."""
    from search_r1.search.manifest import load_manifest
    from search_r1.search.vector_index import locate_vectors, open_index, open_vectors

    if settings.reference_path is not None:
        reference = open_index(settings.reference_path)
        recorded = load_manifest(settings.reference_path)
        _refuse_misfit(settings.reference_path, recorded, index=reference, corpus=corpus, encoder=encoder)
        if reference.kind not in SCANNED_KINDS:
            raise RetrieverError(
                f"--reference_path {settings.reference_path} is of kind {reference.kind}, which is itself"
                " approximate; name a flat, fp16 or sq8 index"
            )
        return reference, f"exact search of the {reference.kind} index {settings.reference_path.name}"
    if settings.reencode:
        return _EncodedCorpus(corpus, encoder=encoder), "exact search of all passages, encoded again"
    if index.kind is IndexKind.FLAT:
        return index, "itself: a flat index is exact"
    side = locate_vectors(settings.index_path)
    if side.exists():
        stored = open_vectors(side)
        return stored, f"exact search of the index's own {side.name} (what their rounding loses is not seen)"
    raise RetrieverError(
        f"index {settings.index_path} of kind {index.kind} keeps no vectors to compare with: name a flat"
        f" index of the same passages by --reference_path, or let all {len(corpus)} passages be encoded again"
        " by --reencode"
    )


def _sample_queries(settings: argparse.Namespace, corpus: Corpus) -> list[str]:
    rows = np.random.default_rng(settings.seed).permutation(len(corpus))[: settings.num_queries]
    return [take_query(corpus[int(row)].contents) for row in np.sort(rows)]


def _read_queries(settings: argparse.Namespace) -> list[str]:
    """Raises RetrieverError that names file and line."""
    queries = []
    try:
        lines = settings.queries.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RetrieverError(f"--queries {settings.queries} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            queries.append(_parse_query(line, f"{settings.queries}:{number}"))
        if len(queries) == settings.num_queries:
            break
    if not queries:
        raise RetrieverError(f"--queries {settings.queries} holds no queries")
    return queries


def _parse_query(line: str, where: str) -> str:
    if not line.lstrip().startswith("{"):
        return line.strip()
    try:
        fields = json.loads(line)
    except ValueError as error:
        raise RetrieverError(f"{where} is not JSON ({error})") from error
    query = fields.get("question", fields.get("query"))
    if not isinstance(query, str) or not query.strip():
        raise RetrieverError(f"{where} has no 'question' or 'query', only {sorted(fields)}")
    return query


def _show(recall: Recall, *, index: VectorIndex, reference_name: str, asked: str, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = {**index.describe(), **recall.as_facts(), "reference": reference_name, "queries": asked}
    console = Console()
    if as_json:
        console.print_json(json.dumps(facts))
        return
    table = Table(title=f"{recall.num_queries} {asked} against {reference_name}")
    for name in ("kind", *(f"recall@{k}" for k in recall.at)):
        table.add_column(name, justify="right")
    table.add_row(recall.kind, *(f"{share:.3f}" for share in recall.at.values()))
    console.print(table)
