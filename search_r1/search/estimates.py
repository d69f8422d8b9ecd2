"""Estimates of every kind of index: bytes by formula, seconds from rates of one core; which kind to take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from search_r1.search.kinds import SCANNED_KINDS, IndexKind, IndexOptions, SearchOptions, Storage
from search_r1.search.sizes import PROCESS_BYTES, IndexBytes, count_bytes, show_bytes

BATCH = 64
"""Queries of the batch whose time is estimated."""
_TOPK = 3
_KMEANS_ROUNDS = 10
_PQ_CENTROIDS = 256
_USABLE_SHARE = 0.9
"""Of the RAM; the rest is for the system."""
_ENCODER_BYTES = 1_000_000_000
"""Of the query encoder and the server around it: a BERT-base in float32 and what it computes with."""


class RecallClass(StrEnum):
    """Recall@3 against flat that can be expected of embeddings of text. To be measured: `index recall`."""

    EXACT = "exact"
    NEARLY = ">= 0.99"
    HIGH = ">= 0.95"
    TUNED = "0.90 - 0.99"
    WALKED = "0.80 - 0.99"


_RECALL = {
    IndexKind.FLAT: RecallClass.EXACT,
    IndexKind.FP16: RecallClass.NEARLY,
    IndexKind.SQ8: RecallClass.HIGH,
    IndexKind.IVF: RecallClass.TUNED,
    IndexKind.IVF_PQ: RecallClass.TUNED,
    IndexKind.HNSW: RecallClass.WALKED,
    IndexKind.BINARY: RecallClass.TUNED,
}
_NOTES = {
    IndexKind.FLAT: "the reference",
    IndexKind.FP16: "the same answers for half the memory",
    IndexKind.SQ8: "every vector compared, one byte a component",
    IndexKind.IVF: "more lists searched (--nprobe): more recall, more time",
    IndexKind.IVF_PQ: "rescored from disk; --nprobe and --rescore_factor trade recall for time",
    IndexKind.HNSW: "fastest for one query; --ef_search trades recall for time; all of it in memory",
    IndexKind.BINARY: "rescored from disk; --rescore_factor trades recall for time",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What one core does in a second. The defaults: a Xeon with AVX-512, DDR5 and an NVMe disk."""

    products: float = 100e9
    """Floating-point operations of a matrix product in torch, float32."""
    stream_bytes: float = 13e9
    """Read from memory in order."""
    decode_fp16: float = 0.8e9
    """Components made float32."""
    decode_sq8: float = 3.0e9
    scan_list: float = 6.0e9
    """Components of list entries compared by Faiss."""
    bits_bytes: float = 10e9
    """Of sign bits compared by Faiss."""
    lookups: float = 1.5e9
    """Bytes of product-quantized codes compared by Faiss."""
    graph: float = 3.0e9
    """Components compared while a graph is walked, which is reading here and there."""
    gather: float = 0.3e9
    """Components decoded and scored for rescoring."""
    quantize: float = 25e9
    """Floating-point operations of product quantization in Faiss."""
    disk_bytes: float = 0.5e9
    """Written to disk, by the machine and not by a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """One kind of index for so many vectors."""

    kind: str
    disk_bytes: int
    memory_bytes: int
    """To be fast: what queries read again and again, in memory (loaded, or as cache of the mapped file)."""
    mapped_bytes: int
    """That the process cannot give back when the file is mapped and memory is short."""
    build_peak_bytes: int
    build_s: float
    """Estimate, without encoding."""
    query_s: float
    """Estimate, one query alone."""
    batch_s: float
    """Estimate, 64 queries together."""
    recall: str
    note: str
    parameters: dict[str, int | str]


def estimate(
    options: IndexOptions, num_vectors: int, dim: int, *, threads: int = 1, rates: Rates | None = None
) -> PlanRow:
    """Of an index that is not there; raises RetrieverError for what cannot be built."""
    options = options.resolve(num_vectors, dim)
    rates = rates or Rates()
    size = count_bytes(options, num_vectors, dim)
    alone = _estimate_query(options, num_vectors, dim, batch=1, rates=rates)
    together = _estimate_query(options, num_vectors, dim, batch=BATCH, rates=rates)
    return PlanRow(
        kind=str(options.kind),
        disk_bytes=size.disk,
        memory_bytes=size.main + PROCESS_BYTES + _ENCODER_BYTES,
        mapped_bytes=4 * dim * (options.num_lists or 0) + PROCESS_BYTES + _ENCODER_BYTES,
        build_peak_bytes=size.build_peak,
        build_s=_estimate_build(options, num_vectors, dim, size=size, rates=rates, threads=threads),
        query_s=alone / threads,
        batch_s=BATCH * together / threads,
        recall=str(_RECALL[options.kind]),
        note=_NOTES[options.kind],
        parameters={
            name: value for name, value in options.as_facts().items() if name not in ("kind", "seed")
        },
    )


def _estimate_query(options: IndexOptions, num_vectors: int, dim: int, *, batch: int, rates: Rates) -> float:
    """Core-seconds of one of `batch` queries that are searched together."""
    kind, components = options.kind, num_vectors * dim
    if kind in SCANNED_KINDS:
        decoding = {
            IndexKind.FLAT: 0.0,
            IndexKind.FP16: components / rates.decode_fp16,
            IndexKind.SQ8: components / rates.decode_sq8,
        }[kind]
        stored = 4 * components if kind is IndexKind.FLAT else 0
        shared = max(decoding, stored / rates.stream_bytes)
        return shared / batch + 2 * components / rates.products
    search = SearchOptions()
    rescoring = 0.0
    if options.rescore_storage not in (None, Storage.NONE):
        rescoring = search.choose_rescored(kind, _TOPK) * dim / rates.gather
    if kind is IndexKind.BINARY:
        return components / 8 / rates.bits_bytes + rescoring
    if kind is IndexKind.HNSW:
        visited = search.choose_ef_search(_TOPK) * (options.num_links or 1)
        return visited * dim / rates.graph
    num_lists = options.num_lists or 1
    share = search.choose_nprobe(num_lists) / num_lists
    coarse = 2 * num_lists * dim / rates.products
    if kind is IndexKind.IVF_PQ:
        return coarse + share * num_vectors * (options.pq_bytes or 1) / rates.lookups + rescoring
    return coarse + share * components / rates.scan_list


def _estimate_build(
    options: IndexOptions, num_vectors: int, dim: int, *, size: IndexBytes, rates: Rates, threads: int
) -> float:
    """Seconds from vectors on disk to a finished index."""
    kind, components = options.kind, num_vectors * dim
    work = (components + size.trained_on) / rates.decode_fp16  # each component converted once, bytes sampled
    if kind is IndexKind.HNSW:
        visited = 2.5 * (options.ef_construction or 1) * (options.num_links or 1)
        work += num_vectors * visited * dim / rates.graph
    if options.num_lists is not None:
        work += _KMEANS_ROUNDS * 2 * (size.trained_on / 4) * options.num_lists / rates.products
        work += 2 * components * options.num_lists / rates.products
    if kind is IndexKind.IVF_PQ:
        work += 2 * components * _PQ_CENTROIDS / rates.quantize
    if options.rescore_storage not in (None, Storage.NONE):
        work += components / rates.decode_fp16
    return work / threads + size.disk / rates.disk_bytes


def plan(num_vectors: int, dim: int, *, threads: int = 1, rates: Rates | None = None) -> list[PlanRow]:
    """Every kind with its default parameters."""
    return [
        estimate(IndexOptions(kind=kind), num_vectors, dim, threads=threads, rates=rates)
        for kind in IndexKind
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """Which kind to build, and why."""

    row: PlanRow | None
    """None: nothing fits."""
    reason: str

    @property
    def kind(self) -> str | None:
        return self.row.kind if self.row else None


_RANKS = {recall: rank for rank, recall in enumerate(reversed(RecallClass))}


def recommend(rows: Sequence[PlanRow], ram_bytes: int, *, batch_s: float = 2.0) -> Recommendation:
    """The best recall that fits into the RAM and answers 64 queries within `batch_s`; the faster of equals.

    Where none is so fast, the fastest that fits.
    """
    usable = int(_USABLE_SHARE * ram_bytes)
    fitting = [row for row in rows if max(row.memory_bytes, row.build_peak_bytes) <= usable]
    if not fitting:
        smallest = min(rows, key=lambda row: max(row.memory_bytes, row.build_peak_bytes))
        needed = max(smallest.memory_bytes, smallest.build_peak_bytes) / _USABLE_SHARE
        return Recommendation(
            row=None,
            reason=f"no kind fits {show_bytes(ram_bytes)} of RAM: the smallest, {smallest.kind},"
            f" needs {show_bytes(needed)}",
        )
    fast = [row for row in fitting if row.batch_s <= batch_s]
    best = (
        max(fast, key=lambda row: (_RANKS[RecallClass(row.recall)], -row.batch_s))
        if fast
        else min(fitting, key=lambda row: row.batch_s)
    )
    return Recommendation(
        row=best, reason=_explain(best, rows, fitting=fitting, fast=bool(fast), usable=usable)
    )


def _explain(
    best: PlanRow, rows: Sequence[PlanRow], *, fitting: Sequence[PlanRow], fast: bool, usable: int
) -> str:
    found = {
        RecallClass.EXACT: "and is exact",
        RecallClass.TUNED: "and has a recall@3 of 0.90 to 0.99, which its parameters decide",
    }.get(RecallClass(best.recall), f"and has a recall@3 of {best.recall}")
    parts = [
        f"{best.kind} needs {show_bytes(best.memory_bytes)} of {show_bytes(usable)} usable memory and"
        f" {show_bytes(best.disk_bytes)} of disk, answers {BATCH} queries in about"
        f" {show_seconds(best.batch_s)} {found}"
    ]
    too_large = [row.kind for row in rows if row not in fitting]
    if too_large:
        parts.append("too large for that memory: " + ", ".join(too_large))
    slower = [row.kind for row in fitting if row.batch_s > best.batch_s]
    if slower:
        parts.append("slower: " + ", ".join(slower))
    if not fast:
        parts.append("no kind that fits answers in the time asked for; this one is the fastest")
    return "; ".join(parts)


def show_seconds(seconds: float) -> str:
    """In the unit that gives few digits."""
    for limit, unit, name in (
        (1e-3, 1e-6, "us"),
        (1.0, 1e-3, "ms"),
        (120.0, 1.0, "s"),
        (7200.0, 60.0, "min"),
    ):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 3600:.1f} h"
