"""`index verify`: read index and corpus whole, compare them with the manifest, show what was looked at.

A server's start compares fingerprints, in milliseconds; this reads every byte (about a second per 1.5 GB).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.table import Table

from search_r1.search import defaults
from search_r1.search.corpus import Corpus, open_corpus
from search_r1.search.errors import RetrieverError
from search_r1.search.fingerprint import describe_file
from search_r1.search.manifest import VECTORS_SUFFIX, IndexManifest, load_manifest
from search_r1.search.progress import PhaseProgress
from search_r1.search.recipes import add_recipe_arguments

if TYPE_CHECKING:
    from search_r1.search.agreement import RecipeFlags
    from search_r1.search.vector_index import VectorIndex

Report: TypeAlias = Callable[[str, int, int], None]
Value: TypeAlias = str | int | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One fact that was looked at."""

    name: str
    expected: Value
    """None when nothing says what it should be."""
    found: Value
    problem: str | None = None
    """Why it does not do, where comparing the two does not say so."""

    @property
    def verdict(self) -> str:
        if self.problem is not None or (self.expected is not None and self.expected != self.found):
            return "differs" if self.problem is None else "failed"
        return "not recorded" if self.expected is None else "same"

    @property
    def is_good(self) -> bool:
        return self.verdict in ("same", "not recorded")


def verify_index(
    index_path: Path,
    *,
    corpus_path: Path,
    encoder_path: str | None = None,
    family: str | None = None,
    told: RecipeFlags | None = None,
    report: Report | None = None,
) -> list[Check]:
    """Everything that can be checked, in order; raises RetrieverError where there is nothing to check.

    `family` and `told` say how the encoder encodes, where neither manifest nor model does.
    """
    report = report or (lambda *_: None)
    recorded = load_manifest(index_path)
    checks = list(_check_files(index_path, recorded, report))
    corpus = open_corpus(corpus_path, report=partial(report, "find lines"))
    checks += _check_corpus(corpus, recorded, report)
    if all(check.is_good for check in checks if check.name.startswith("files.")):
        checks += _check_vectors(
            index_path, corpus, recorded, encoder_path=encoder_path, family=family, told=told or {}
        )
    corpus.close()
    return checks


def _check_files(index_path: Path, recorded: IndexManifest | None, report: Report) -> Iterator[Check]:
    if not index_path.is_file():
        raise RetrieverError(
            f"index {index_path} is not a file; pass --index_path of the index, not of its folder"
        )
    expected = recorded.files if recorded else {index_path.name: None}
    for path in (index_path, index_path.with_name(index_path.name + VECTORS_SUFFIX)):
        if recorded and path.name not in expected and path.exists():
            yield Check(name=f"files.{path.name}", expected="not there", found="a file")
    for name, facts in expected.items():
        path = index_path.with_name(name)
        if not path.is_file():
            yield Check(name=f"files.{name}", expected="a file", found="nothing")
            continue
        found = describe_file(path, report=partial(report, f"read {name}"))
        for field in ("bytes", "fingerprint", "sha256"):
            yield Check(
                name=f"files.{name}.{field}",
                expected=getattr(facts, field) if facts else None,
                found=getattr(found, field),
            )


def _check_corpus(corpus: Corpus, recorded: IndexManifest | None, report: Report) -> Iterator[Check]:
    found = describe_file(corpus.path, report=partial(report, "read corpus"))
    for field in ("bytes", "fingerprint", "sha256"):
        facts = recorded.corpus if recorded else None
        yield Check(
            name=f"corpus.{field}",
            expected=getattr(facts, field) if facts else None,
            found=getattr(found, field),
        )
    yield Check(name="corpus.count", expected=recorded.count if recorded else None, found=len(corpus))
    yield _try("corpus passages", lambda: corpus.check(partial(report, "check passages")), good="well formed")


def _check_vectors(
    index_path: Path,
    corpus: Corpus,
    recorded: IndexManifest | None,
    *,
    encoder_path: str | None,
    family: str | None,
    told: RecipeFlags,
) -> Iterator[Check]:
    from search_r1.search.vector_index import open_index

    try:
        index = open_index(index_path)
    except RetrieverError as error:
        yield Check(name="index", expected=None, found="unreadable", problem=str(error))
        return
    yield Check(name="kind", expected=recorded.kind if recorded else None, found=str(index.kind))
    yield Check(name="dim", expected=recorded.dim if recorded else None, found=index.dim)
    yield Check(name="count", expected=len(corpus), found=len(index))
    if encoder_path is not None and len(index) == len(corpus):
        yield from _check_encoder(
            index, corpus, recorded, encoder_path=encoder_path, family=family, told=told
        )


def _check_encoder(
    index: VectorIndex,
    corpus: Corpus,
    recorded: IndexManifest | None,
    *,
    encoder_path: str,
    family: str | None,
    told: RecipeFlags,
) -> Iterator[Check]:
    from search_r1.search.agreement import choose_recipe, prepare_trial, run_trial
    from search_r1.search.encoder import TextEncoder

    recipe = choose_recipe(recorded, retriever_name=None, told=told)
    encoder = TextEncoder(encoder_path, retriever_name=family, **recipe)
    yield Check(name="encoder dim", expected=index.dim, found=encoder.dim)
    if recorded is not None:
        yield Check(name="encoder_sha256", expected=recorded.encoder_sha256, found=encoder.sha256)
        for field in ("pooling", "query_prefix", "passage_prefix", "max_length", "normalised"):
            yield Check(name=field, expected=getattr(recorded, field), found=getattr(encoder.recipe, field))
    if encoder.dim == index.dim:
        trial = prepare_trial(corpus, encoder)
        needed = "rebuild the index with this encoder"
        yield _try(
            f"{len(trial.rows)} known passages",
            lambda: run_trial(trial, index=index, corpus=corpus, needed=needed),
            good="find themselves",
        )


def _try(name: str, attempt: Callable[[], None], *, good: str) -> Check:
    try:
        attempt()
    except RetrieverError as error:
        return Check(name=name, expected=good, found="do not", problem=str(error))
    return Check(name=name, expected=good, found=good)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `index verify`."""
    add = parser.add_argument
    add("--index_path", default=str(defaults.INDEX_PATH), help="the index, or the folder of a bm25 index")
    add("--corpus_path", default=str(defaults.CORPUS_PATH), help="the corpus it should be of")
    add("--retriever_model", help="encoder it should be of, folder or name on the hub (default: not checked)")
    add("--retriever_name", help="its family, where neither manifest nor model say how it encodes")
    add_recipe_arguments(parser)


def run(settings: argparse.Namespace) -> int:
    """Show a table of what was checked. Exit status: 0 all is well, 1 something differs."""
    from search_r1.search.agreement import read_recipe_flags

    index_path, corpus_path = Path(settings.index_path), Path(settings.corpus_path)
    if index_path.is_dir():
        return _verify_words(index_path, corpus_path)
    with PhaseProgress() as progress:
        checks = verify_index(
            index_path,
            corpus_path=corpus_path,
            encoder_path=settings.retriever_model,
            family=settings.retriever_name,
            told=read_recipe_flags(settings),
            report=progress,
        )
    console = Console()
    console.print(_draw(checks, title=str(index_path)))
    for check in checks:
        if check.problem is not None:
            console.print(f"{check.name}: {check.problem}", markup=False, highlight=False)
    if load_manifest(index_path) is None:
        console.print("There is no manifest: what is not recorded cannot be vouched for.")
    bad = sum(not check.is_good for check in checks)
    console.print(f"{len(checks)} facts checked, {bad} of them wrong.")
    return 1 if bad else 0


def _verify_words(index_path: Path, corpus_path: Path) -> int:
    from search_r1.search.bm25 import load_bm25

    retriever = load_bm25(index_path, corpus_path=corpus_path, full_check=True)
    Console().print(f"{index_path}: whole, and of this corpus ({len(retriever)} passages).", highlight=False)
    retriever.close()
    return 0


def _draw(checks: list[Check], *, title: str) -> Table:
    table = Table(title=title)
    for column in ("fact", "expected", "found", ""):
        table.add_column(column, overflow="fold")
    for check in checks:
        style = None if check.is_good else "bold red"
        table.add_row(check.name, _show(check.expected), _show(check.found), check.verdict, style=style)
    return table


def _show(value: Value) -> str:
    """Hashes by their first digits: the table says whether they are the same."""
    text = (
        "-"
        if value is None
        else repr(value)
        if isinstance(value, str) and value != value.strip()
        else str(value)
    )
    return text[:16] + "…" if len(text) == 64 else text
