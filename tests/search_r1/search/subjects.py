"""Every back end, opened on one small world for the conformance suite, as it is and behind the server."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeAlias

import torch
from transformers import BertConfig, BertForSequenceClassification

from search_r1.search.bm25 import build_bm25, load_bm25
from search_r1.search.building import BuildOptions, build_index
from search_r1.search.dense import load_dense
from search_r1.search.hybrid import HybridRetriever
from search_r1.search.kinds import IndexKind, IndexOptions
from search_r1.search.online.options import OnlineMode, OnlineOptions
from search_r1.search.online.retriever import open_online
from search_r1.search.recipes import EncoderSpec
from search_r1.search.remote import RemoteRetriever
from search_r1.search.rerank import CrossEncoderReranker, RerankedRetriever
from search_r1.search.retriever import Retriever, ThreadedRetriever
from search_r1.search.settings import DenseOptions
from tests.search_r1.search.online.fake_engines import NOTHING, SECRET, FakeEngine, Fault
from tests.search_r1.search.servers import serving
from tests.search_r1.search.small_world import PASSAGES, save_encoder, write_corpus

QUERIES = (
    "Bolton town England",
    "where was Alice Marsh born",
    "The Silver Harbour film",
    "größe 漢字",
    "river in Scotland",
    "ships of Brann Works",
    "a film in Calder",
)
NO_WORDS = "xylophone quagga zeppelin"
_NUM_PASSAGES = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """An open retriever, and what is known of its world."""

    retriever: Retriever
    queries: tuple[str, ...]
    """Each finds something, and not all the same."""
    nothing: str | None
    """Finds nothing; None where every query finds its nearest."""
    max_hits: int
    """Documents that there are for one query at most."""
    folder: Path
    """Of its files."""
    secrets: tuple[str, ...] = ()
    breaks: Callable[[], AbstractContextManager[None]] | None = None
    """Within, what was not asked before cannot be answered."""
    hangs: Callable[[], AbstractContextManager[None]] | None = None
    """Within, what was not asked before is answered too late."""
    is_exact: bool = True
    """No passage is better than those it finds."""
    is_edge: bool = False
    """It is asked by other programs, in any text."""
    counter: Iterator[int] = field(default_factory=itertools.count)

    def new_query(self) -> str:
        """Not asked before, and finds something."""
        return f"{self.queries[0]} {next(self.counter)}"


Open: TypeAlias = Callable[[], AbstractAsyncContextManager[Subject]]


@dataclass(frozen=True)
class Files:
    """The world on disk; each index is built when it is first asked for."""

    folder: Path

    @cached_property
    def corpus(self) -> Path:
        rng = random.Random(0)
        words = sorted({word for text in PASSAGES.values() for word in text.replace('"', "").split()})
        passages = dict(PASSAGES)
        for row in range(len(PASSAGES), _NUM_PASSAGES):
            title, *text = rng.choices(words, k=rng.randint(6, 16))
            passages[f"p{row}"] = f'"{title} {row}"\n{" ".join(text)}'
        return write_corpus(self.folder / "corpus.jsonl", passages)

    @cached_property
    def bm25(self) -> Path:
        build_bm25(self.corpus, index_path=self.folder / "bm25")
        return self.folder / "bm25"

    @cached_property
    def encoder(self) -> Path:
        return save_encoder(self.folder / "encoder", seed=0)

    def dense(self, kind: IndexKind) -> Path:
        index = self.folder / f"{kind}.index"
        if not index.exists():
            build_index(
                BuildOptions(
                    corpus_path=self.corpus,
                    index_path=index,
                    encoder=EncoderSpec(path=str(self.encoder), family="e5"),
                    index=IndexOptions(kind=kind),
                    num_threads=1,
                )
            )
        return index

    @cached_property
    def reranker(self) -> Path:
        folder = save_encoder(self.folder / "reranker", seed=1)
        torch.manual_seed(1)
        config = BertConfig.from_pretrained(folder, num_labels=1)
        BertForSequenceClassification(config).save_pretrained(folder)
        return folder

    @contextmanager
    def unreadable_corpus(self) -> Iterator[None]:
        """The file is there, and its content is lost."""
        content, before = self.corpus.read_bytes(), self.corpus.stat()
        _overwrite(self.corpus, b"\0" * len(content))
        try:
            yield
        finally:
            _overwrite(self.corpus, content)
            os.utime(self.corpus, ns=(before.st_atime_ns, before.st_mtime_ns))

    def subject(self, retriever: Retriever, *, nothing: str | None = None, is_exact: bool = True) -> Subject:
        """Of a retriever over the corpus."""
        return Subject(
            retriever=retriever,
            queries=QUERIES,
            nothing=nothing,
            max_hits=_NUM_PASSAGES,
            folder=self.folder,
            breaks=self.unreadable_corpus,
            is_exact=is_exact,
        )


def _overwrite(path: Path, content: bytes) -> None:
    """In place, so that mappings change too."""
    with path.open("r+b") as file:
        file.write(content)


@asynccontextmanager
async def _closing(subject: Subject) -> AsyncIterator[Subject]:
    try:
        yield subject
    finally:
        await subject.retriever.aclose()


def _load_bm25(files: Files) -> Retriever:
    search = load_bm25(files.bm25, corpus_path=files.corpus, num_threads=2)
    return ThreadedRetriever(search, facts=search.facts())


def _load_dense(files: Files, *, kind: IndexKind) -> Retriever:
    search = load_dense(
        DenseOptions(
            index_path=files.dense(kind),
            corpus_path=files.corpus,
            encoder=EncoderSpec(path=str(files.encoder)),
            num_threads=1,
        )
    )
    return ThreadedRetriever(search, facts=search.facts())


def _open_bm25(files: Files) -> AbstractAsyncContextManager[Subject]:
    return _closing(files.subject(_load_bm25(files), nothing=NO_WORDS))


def _open_dense(files: Files, *, kind: IndexKind) -> AbstractAsyncContextManager[Subject]:
    is_exact = kind not in (IndexKind.HNSW, IndexKind.IVF_PQ)
    return _closing(files.subject(_load_dense(files, kind=kind), is_exact=is_exact))


def _open_hybrid(files: Files) -> AbstractAsyncContextManager[Subject]:
    parts = [_load_dense(files, kind=IndexKind.FLAT), _load_bm25(files)]
    return _closing(files.subject(HybridRetriever(parts, depth=20)))


def _open_reranked(files: Files) -> AbstractAsyncContextManager[Subject]:
    model = CrossEncoderReranker(files.reranker, device="cpu")
    reranked = RerankedRetriever(_load_bm25(files), model=model, depth=5)
    return _closing(files.subject(reranked, nothing=NO_WORDS))


def _open_mock(files: Files) -> AbstractAsyncContextManager[Subject]:
    return _closing(
        Subject(
            retriever=open_online("mock", options=OnlineOptions()),
            queries=QUERIES,
            nothing=None,
            max_hits=100,
            folder=files.folder,
        )
    )


@asynccontextmanager
async def _open_recorded(files: Files) -> AsyncIterator[Subject]:
    async with (fake := FakeEngine("serper")).running():
        options = fake.options(mode=OnlineMode.RECORD, cache_path=files.folder / "serper.sqlite")
        subject = Subject(
            retriever=open_online("serper", options=options),
            queries=QUERIES,
            nothing=NOTHING,
            max_hits=6,
            folder=files.folder,
            secrets=(SECRET,),
            breaks=partial(_breaking, fake),
            hangs=partial(_hanging, fake),
            counter=_COUNTER,
        )
        async with _closing(subject):
            yield subject


_COUNTER = itertools.count()
"""For all of them: what was recorded is not asked again."""


@contextmanager
def _breaking(fake: FakeEngine) -> Iterator[None]:
    fake.faults += [Fault(status=500)] * 100
    try:
        yield
    finally:
        fake.faults.clear()


@contextmanager
def _hanging(fake: FakeEngine) -> Iterator[None]:
    fake.delay_s = 2.0
    try:
        yield
    finally:
        fake.delay_s = 0.0


BACK_ENDS: dict[str, Callable[[Files], AbstractAsyncContextManager[Subject]]] = {
    "bm25": _open_bm25,
    **{kind.value: partial(_open_dense, kind=kind) for kind in (IndexKind.FLAT, IndexKind.IVF_PQ)},
    "hybrid": _open_hybrid,
    "reranked": _open_reranked,
    "mock": _open_mock,
    "recorded": _open_recorded,
}


@asynccontextmanager
async def open_remote(files: Files) -> AsyncIterator[Subject]:
    """The BM25 index behind our server, over a socket, by our client."""
    async with _open_bm25(files) as behind, serving(behind.retriever) as client:
        remote = replace(behind, retriever=RemoteRetriever(str(client.base_url)), is_edge=True)
        async with _closing(remote):
            yield remote
