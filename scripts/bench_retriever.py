"""How fast is the retriever? Single queries from many clients, against its limit and against no batching.

`make bench-retriever` runs this. It makes a corpus of a million passages whose 768-dimensional vectors are
random but clustered, builds a flat index of it with the project's builder, and measures, in turn and in the
same run, with all cores each

    the server             64 clients, one query a request
    without batching       the same server and clients, each query searched by itself
    the bare index         Faiss in a process of its own, batches of 64 vectors, no text, no HTTP

Then every other kind of index is built from the same vectors and served alone: queries per second, recall@3
against the flat one, the server's memory beyond that of the same server with a thousand passages, seconds
from the command to the first answer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import psutil
from rich.table import Table
from screen import Screen

from bench import clustered
from bench.command import run_bench
from bench.load import Load, ask_continuously, load_index, search_bare
from bench.service import ROOT
from search_r1.search.ranking import compare_rows
from serving.web.settings import expand_home
from verl.utils.entry import error_line
from verl.utils.supervise import Child, Supervisor, service_environment, start_service

TOPK = 3
BATCH = 64
WARM_UP_S = 3.0
OTHER_KINDS = ("fp16", "sq8", "ivf_pq", "hnsw")
RECALL_QUERIES = 1000
CORES = len(os.sched_getaffinity(0))
Vectors: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """The figures of one kind of index."""

    qps: float
    recall_at_3: float
    memory_mb: float
    """Of the server, beyond that of a server with a thousand passages."""
    memory_vs_flat: float
    start_s: float
    disk_mb: float
    build_s: float
    build_peak_mb: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """The result, in the order of the JSON line."""

    qps_64: float
    vs_unbatched: float
    vs_bare_index: float
    p50_ms: float
    p99_ms: float
    passages: int
    clients: int
    base_memory_mb: float
    kinds: dict[str, Kind]


@dataclass(slots=True)
class Speeds:
    """The speeds of the flat index, round by round."""

    batched: list[Load] = field(default_factory=list)
    unbatched: list[Load] = field(default_factory=list)
    bare_per_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """An index on disk, and what its builder took."""

    path: Path
    seconds: float
    peak_bytes: int
    """Of the builder; pages that it maps count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a server of one index did."""

    load: Load
    start_s: float
    num_bytes: int


def main() -> int:
    """Return the exit status: 0 measured, 1 something could not be built or started."""
    arguments = parse_arguments()

    def measure_all(screen: Screen, folder: Path) -> dict[str, object]:
        summary = Bench(screen, arguments=arguments, folder=arguments.folder or folder).run()
        screen.console.print(table(summary))
        return asdict(summary)

    return run_bench(measure_all, name="bench-retriever")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--passages", type=int, default=1_000_000, help="of the corpus (default 1000000)")
    add("--dim", type=int, default=768, help="of the vectors (default 768)")
    add("--clients", type=int, default=64, help="asking at the same time (default 64)")
    add("--seconds", type=float, default=15.0, help="of each measurement (default 15)")
    add("--rounds", type=int, default=2, help="of server, no batching and bare index in turn (default 2)")
    add("--kinds", default=",".join(OTHER_KINDS), help=f"beside flat (default {','.join(OTHER_KINDS)})")
    add("--seed", type=int, default=0, help="of corpus, encoder and queries (default 0)")
    add("--folder", type=Path, help="keep corpus and indexes here and take what lies there already")
    arguments = parser.parse_args(expand_home(None))
    arguments.kinds = [kind for kind in arguments.kinds.split(",") if kind]
    unknown = sorted(set(arguments.kinds) - set(OTHER_KINDS))
    if unknown:
        parser.error(f"--kinds has {unknown}, expected some of {list(OTHER_KINDS)}")
    if arguments.passages < 10_000:
        parser.error(f"--passages is {arguments.passages}, expected at least 10000")
    return arguments


class Bench:
    """One run in one folder."""

    def __init__(self, screen: Screen, *, arguments: argparse.Namespace, folder: Path) -> None:
        self._screen = screen
        self._arguments = arguments
        self._folder = folder
        self._encoder = folder / "encoder"
        self._corpus = folder / "corpus.jsonl"

    def run(self) -> Summary:
        """Build and measure one index after the other."""
        self._folder.mkdir(parents=True, exist_ok=True)
        self._make_corpus()
        flat = self._build("flat")
        vectors, expected = self._search_exactly(flat.path)
        few = self._build("flat", corpus=self._folder / "few.jsonl")
        base_bytes = self._serve(few.path, seed=200, seconds=3.0).num_bytes
        speeds, served = self._measure_flat(flat.path, vectors)
        flat_bytes = served.num_bytes - base_bytes

        def summarize_kind(built: Built, served: Served, *, recall: float) -> Kind:
            disk = sum(file.stat().st_size for file in self._folder.glob(built.path.name + "*"))
            extra = served.num_bytes - base_bytes
            return Kind(
                qps=round(served.load.queries_per_s, 1),
                recall_at_3=round(recall, 4),
                memory_mb=round(extra / 1e6, 1),
                memory_vs_flat=round(extra / flat_bytes, 3),
                start_s=round(served.start_s, 2),
                disk_mb=round(disk / 1e6, 1),
                build_s=round(built.seconds, 1),
                build_peak_mb=round(built.peak_bytes / 1e6, 1),
            )

        kinds = {"flat": summarize_kind(flat, served, recall=1.0)}
        for kind in self._arguments.kinds:
            built = self._build(kind, source=flat.path)
            recall = compare_rows(find(built.path, vectors), expected, k=TOPK)
            kinds[kind] = summarize_kind(built, self._serve(built.path, seed=100), recall=recall)
        return summarize(speeds, kinds=kinds, arguments=self._arguments, base_bytes=base_bytes)

    def _make_corpus(self) -> None:
        size, seed = self._arguments.passages, self._arguments.seed
        if not self._encoder.exists():
            clustered.save_encoder(self._encoder, dim=self._arguments.dim, seed=seed)
        if not self._corpus.exists():
            with self._screen.phase("writing the corpus", total=size) as update:
                clustered.write_corpus(
                    self._corpus, size=size, seed=seed, report=lambda count: update(count, "passages")
                )
        with self._corpus.open(encoding="utf-8") as lines:
            (self._folder / "few.jsonl").write_text("".join(islice(lines, 1000)), encoding="utf-8")

    def _build(self, kind: str, *, source: Path | None = None, corpus: Path | None = None) -> Built:
        """Build an index in a process of its own, unless it is there. Raises ChildFailedError."""
        corpus = corpus or self._corpus
        path = self._folder / f"{corpus.stem}_{kind}.index"
        facts = self._folder / f"{path.name}-build.json"
        if path.exists() and facts.exists():
            return Built(path=path, **json.loads(facts.read_text()))
        command = [sys.executable, "-P", "-m", "search_r1.search.index_builder", "--kind", kind]
        command += ["--corpus_path", str(corpus), "--model_path", str(self._encoder)]
        command += ["--index_path", str(path), *(("--from_index", str(source)) if source else ())]
        began = time.monotonic()
        with Supervisor() as supervisor, self._screen.phase(f"building {path.name}") as update:
            child = supervisor.start(
                f"the builder of {path.name}",
                command=command,
                log=self._folder / f"{path.name}-build.log",
                cwd=ROOT,
                environment=service_environment(),
            )
            peak_bytes = 0
            while child.process.poll() is None:
                current_bytes = resident_bytes(child)
                peak_bytes = max(peak_bytes, current_bytes)
                update(0, f"{current_bytes / 1e9:.1f} GB")
                time.sleep(0.1)
            if child.process.returncode:
                child.check_alive()
        built = Built(path=path, seconds=time.monotonic() - began, peak_bytes=peak_bytes)
        facts.write_text(json.dumps({"seconds": built.seconds, "peak_bytes": peak_bytes}))
        return built

    def _serve(self, path: Path, *flags: str, seed: int, seconds: float | None = None) -> Served:
        """Start a server of this index with all cores, and ask it by all clients."""
        arguments = self._arguments
        corpus = self._folder / f"{path.name.partition('_')[0]}.jsonl"
        files = [
            "--index_path",
            str(path),
            "--corpus_path",
            str(corpus),
            "--retriever_model",
            str(self._encoder),
        ]
        began = time.monotonic()
        with (
            Supervisor() as supervisor,
            self._screen.phase(f"serving {path.name} {' '.join(flags)}") as update,
        ):
            url = start_service(
                supervisor,
                f"the retriever of {path.name}",
                module="search_r1.search.retrieval_server",
                arguments=[*files, "--num_threads", str(CORES), "--cache_size", "0", *flags],
                log=self._folder / "server.log",
                update=update,
            )
            start_s = time.monotonic() - began
            load = asyncio.run(
                ask_continuously(
                    url,
                    self._queries(50_000, seed=seed),
                    clients=arguments.clients,
                    topk=TOPK,
                    seconds=seconds or arguments.seconds,
                    warm_up_s=WARM_UP_S,
                )
            )
            return Served(load=load, start_s=start_s, num_bytes=resident_bytes(supervisor.children[0]))

    def _measure_flat(self, path: Path, vectors: Vectors) -> tuple[Speeds, Served]:
        """Measure the server, the bare index and the server without batching in turn."""
        speeds, served = Speeds(), []
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(1, spawn, initializer=load_index, initargs=(str(path), CORES)) as bare:
            bare.submit(search_bare, vectors, topk=TOPK, batch_size=BATCH, seconds=1.0).result()
            for number in range(self._arguments.rounds):
                served.append(self._serve(path, seed=2 * number))
                speeds.batched.append(served[-1].load)
                with self._screen.phase("the bare index"):
                    seconds = self._arguments.seconds
                    searched = bare.submit(search_bare, vectors, topk=TOPK, batch_size=BATCH, seconds=seconds)
                    speeds.bare_per_s.append(searched.result())
                speeds.unbatched.append(self._serve(path, "--no_batching", seed=2 * number + 1).load)
        latencies_s = [one for load in speeds.batched for one in load.latencies_s]
        every = Load(seconds=sum(load.seconds for load in speeds.batched), latencies_s=latencies_s)
        start_s = statistics.fmean(one.start_s for one in served)
        return speeds, Served(load=every, start_s=start_s, num_bytes=served[-1].num_bytes)

    def _search_exactly(self, path: Path) -> tuple[Vectors, npt.NDArray[np.int64]]:
        """Return query vectors and the rows that the flat index finds for them."""
        from search_r1.search.encoder import TextEncoder

        vectors = TextEncoder(self._encoder).encode_queries(self._queries(RECALL_QUERIES, seed=300))
        return vectors, find(path, vectors)

    def _queries(self, count: int, *, seed: int) -> list[str]:
        arguments = self._arguments
        return list(clustered.queries(arguments.passages, corpus_seed=arguments.seed, count=count, seed=seed))


def find(path: Path, vectors: Vectors) -> npt.NDArray[np.int64]:
    """Return the rows that an index finds."""
    from search_r1.search.vector_index import open_index

    return open_index(path).search(vectors, topk=TOPK)[1]


def resident_bytes(child: Child) -> int:
    """Return the memory of a process and its children, mapped pages included; 0 when it has just ended."""
    try:
        process = psutil.Process(child.process.pid)
        return sum(one.memory_info().rss for one in (process, *process.children(recursive=True)))
    except psutil.NoSuchProcess:
        return 0


def summarize(
    speeds: Speeds, *, kinds: dict[str, Kind], arguments: argparse.Namespace, base_bytes: int
) -> Summary:
    """Return the result, with ratios of the means over all rounds."""
    batched = statistics.fmean(load.queries_per_s for load in speeds.batched)
    unbatched = statistics.fmean(load.queries_per_s for load in speeds.unbatched)
    cuts = statistics.quantiles([1000 * s for load in speeds.batched for s in load.latencies_s], n=100)
    return Summary(
        qps_64=round(batched, 1),
        vs_unbatched=round(batched / unbatched, 2),
        vs_bare_index=round(batched / statistics.fmean(speeds.bare_per_s), 3),
        p50_ms=round(cuts[49], 1),
        p99_ms=round(cuts[98], 1),
        passages=arguments.passages,
        clients=arguments.clients,
        base_memory_mb=round(base_bytes / 1e6, 1),
        kinds=kinds,
    )


def table(summary: Summary) -> Table:
    """Return the result for the terminal."""
    shown = Table(
        title=f"{summary.passages} passages, {summary.clients} clients: {summary.qps_64} queries/s, "
        f"{summary.vs_unbatched} x without batching, {summary.vs_bare_index} x the bare index"
    )
    for name in ("kind", "queries/s", "recall@3", "memory MB", "of flat", "start s", "disk MB", "build s"):
        shown.add_column(name, justify="left" if name == "kind" else "right")
    shown.add_column("build peak MB", justify="right")
    for name, kind in summary.kinds.items():
        shown.add_row(name, *(f"{value:g}" for value in asdict(kind).values()))
    shown.caption = (
        f"median {summary.p50_ms} ms, 99 % {summary.p99_ms} ms; {CORES} cores shared with the clients; "
        f"memory beyond the {summary.base_memory_mb} MB of a server with a thousand passages"
    )
    return shown


if __name__ == "__main__":
    with error_line():
        sys.exit(main())
