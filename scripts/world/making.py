"""What the makers of both worlds share: stages, model folders, and the manifest of what was measured."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

from search_r1.search.building import BuildOptions, build_index
from search_r1.search.defaults import RETRIEVER_NAME, name_index
from search_r1.search.dense import DenseRetriever, load_dense
from search_r1.search.recipes import EncoderSpec
from search_r1.search.settings import DenseOptions
from serving.files import sha256_of_file
from world import side_by_side
from world.side_by_side import Task
from world.training import Batch, Schedule, train_language_model

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

SCRATCH = ".making"
"""Folder of a world, for what is made on the way and not shipped."""
ABLE = f"{SCRATCH}/able"
"""What policy and generator continue from."""
INDEX = f"index/{name_index(RETRIEVER_NAME)}"
EVIDENCE = "evidence"
"""Stage, model and figures of the judge of evidence."""
MANIFEST = "manifest"
NOT_HASHED = ("manifest.json", "README.md")


@dataclass(frozen=True, slots=True)
class Stage:
    """What a stage makes in the folder of a world, and the stages that it needs."""

    makes: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    is_shipped: bool = True


STAGES = {
    "data": Stage(("corpus.jsonl", "train.parquet", "test.parquet", "doctor.jsonl")),
    "able": Stage((ABLE,), is_shipped=False),
    "encoder": Stage(("models/encoder",)),
    "index": Stage((INDEX, f"{INDEX}.manifest.json"), ("data", "encoder")),
    "entailment": Stage(("models/entailment",)),
    EVIDENCE: Stage((f"models/{EVIDENCE}",), ("entailment",)),
    "generator": Stage(("models/generator",), ("able",)),
    "policy": Stage(("models/policy",), ("able",)),
    MANIFEST: Stage((), ("data", "encoder", "index", "entailment", EVIDENCE, "generator", "policy")),
}
"""In the order in which they begin if they can: the longest chain, `able` and `generator`, begins early."""
Figures = dict[str, dict[str, float]]
SEARCHED = ("data", "encoder", "index")
"""The stages whose files a search depends on."""
POLICIES = {
    "able_greedy": (ABLE, 0.0),
    "policy_greedy": ("models/policy", 0.0),
    "policy_sampled": ("models/policy", 1.0),
}
"""Parts that are measured on episodes: the model, and the temperature that it samples with."""
PARTS: Mapping[str, tuple[str, ...]] = {
    "encoder": SEARCHED,
    "entailment": ("entailment",),
    "able_greedy": (*SEARCHED, "able", "policy"),  # with the policy made from it, where it is not here
    "policy_greedy": (*SEARCHED, "policy"),
    "policy_sampled": (*SEARCHED, "policy"),
}
"""What both makers measure, and the stages whose files these figures depend on."""


def train_and_save(
    model: Qwen2ForCausalLM,
    words: PreTrainedTokenizerBase,
    stream: Iterator[Batch],
    *,
    schedule: Schedule,
    folder: Path,
) -> None:
    """Train a language model and write its folder."""
    train_language_model(model, stream, schedule, title=folder.name)
    save(model, words, folder)


def save(model: PreTrainedModel, words: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a model with its tokenizer."""
    words.backend_tokenizer.no_padding()  # settings of the last batch
    words.backend_tokenizer.no_truncation()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def load_language_model(folder: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    """Return a policy or a generator with its tokenizer."""
    return Qwen2ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


class Maker(Protocol):
    """Makes and measures the parts of one world; what it needs is in its folder.

    There is a method `make_<stage>` for each stage but the manifest, and `measure_<part>` for each part but
    those of POLICIES.
    """

    seed: int
    out: Path

    @property
    def plan(self) -> DataclassInstance:
        """Return how big the world is and how long each model is trained."""
        ...

    @property
    def parts(self) -> Mapping[str, tuple[str, ...]]:
        """Return the parts in the manifest's order, and the stages whose files each depends on."""
        ...

    @property
    def counts(self) -> dict[str, int]:
        """Count passages and questions."""
        ...

    def measure_policy(self, folder: Path, *, temperature: float) -> dict[str, float]:
        """Return what a model does on the test questions."""
        ...


class OpenStream(Protocol):
    """Open a stream of batches without end."""

    def __call__(self, tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]: ...


def train_from_able(maker: Maker, open_stream: OpenStream, schedule: Schedule, *, name: str) -> None:
    """Train a model of a world on from `able` and write its folder."""
    model, words = load_language_model(maker.out / ABLE)
    folder = maker.out / "models" / name
    train_and_save(model, words, open_stream(words, seed=maker.seed), schedule=schedule, folder=folder)


def make_all(maker: Maker, stages: Collection[str], *, processes: int) -> None:
    """Make these parts of a world, side by side where they do not need each other.

    Raises FileNotFoundError that names the stage to add, before anything is made, ChildProcessError if a
    process was killed, and what a stage raises.
    """
    for stage in stages:
        _check_needs(maker.out, stage, f"stage {stage}", made=stages)
    tasks: dict[str, Task[Figures]] = {
        stage: Task(partial(_make, maker, stage), after=STAGES[stage].needs)
        for stage in STAGES
        if stage in stages and stage != MANIFEST
    }
    if MANIFEST in stages:
        tasks |= {
            f"measuring {part}": Task(partial(_read_or_measure, maker, part), after=after)
            for part, after in maker.parts.items()
        }
    results = side_by_side.run(tasks, processes=processes)
    if MANIFEST in stages:
        _write_manifest(maker, _join(results.values()))


def measure_all(maker: Maker, *, processes: int) -> Figures:
    """Return all figures of a world, measured now. Raises FileNotFoundError if a part is missing."""
    _check_needs(maker.out, MANIFEST, "measuring")
    tasks = {f"measuring {part}": Task(partial(_measure, maker, part)) for part in maker.parts}
    return _join(side_by_side.run(tasks, processes=processes).values())


def _check_needs(out: Path, stage: str, what: str, *, made: Collection[str] = ()) -> None:
    for earlier in STAGES[stage].needs:
        missing = [name for name in STAGES[earlier].makes if not (out / name).exists()]
        if missing and earlier not in made:
            raise FileNotFoundError(f"{what} needs {out / missing[0]}: make it with --stages {earlier}")


def _make(maker: Maker, stage: str) -> Figures:
    started = time.perf_counter()
    torch.manual_seed(maker.seed)
    getattr(maker, f"make_{stage}")()
    print(f"{stage}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return {}


def _read_or_measure(maker: Maker, part: str) -> Figures:
    return _read_figures(maker, part) or _measure(maker, part)


def _measure(maker: Maker, part: str) -> Figures:
    """Return the figures of one part, none if it is of a model that is not shipped and not here."""
    stages = [STAGES[stage] for stage in maker.parts[part]]
    if not all((maker.out / name).exists() for stage in stages for name in stage.makes):
        return {}
    started = time.perf_counter()
    torch.manual_seed(maker.seed)
    if part in POLICIES:
        folder, temperature = POLICIES[part]
        figures = maker.measure_policy(maker.out / folder, temperature=temperature)
    else:
        figures = getattr(maker, f"measure_{part}")()
    print(f"measuring {part}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    return {part: {name: round(value, 4) for name, value in figures.items()}}


def _join(found: Iterable[Figures]) -> Figures:
    return {part: figures for one in found for part, figures in one.items()}


def make_scratch(out: Path) -> Path:
    """Make the folder of a world for what is not shipped, which git does not see."""
    folder = out / SCRATCH
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".gitignore").write_text("*\n", encoding="utf-8")
    return folder


def index_corpus(out: Path) -> None:
    """Build the index of a world with the retriever's own builder, so that the server accepts it."""
    build_index(
        BuildOptions(
            corpus_path=out / "corpus.jsonl",
            index_path=out / INDEX,
            encoder=_encoder(out),
            devices=("cpu",),
        )
    )


def open_retriever(out: Path) -> DenseRetriever:
    """Open the index of a world."""
    return load_dense(
        DenseOptions(index_path=out / INDEX, corpus_path=out / "corpus.jsonl", encoder=_encoder(out))
    )


def _encoder(out: Path) -> EncoderSpec:
    return EncoderSpec(path=str(out / "models" / "encoder"), family=RETRIEVER_NAME)


def _write_manifest(maker: Maker, figures: Figures) -> None:
    hashes = hash_files(maker.out)
    manifest = {
        "seed": maker.seed,
        "plan": asdict(maker.plan),
        "counts": maker.counts,
        "bytes": sum((maker.out / name).stat().st_size for name in hashes),
        "abilities": figures,
        "sha256": hashes,
    }
    (maker.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def hash_files(out: Path) -> dict[str, str]:
    """Return the hash of every file that is shipped, except the two that describe them and worlds inside."""
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    inner = tuple(f"{p.parent.relative_to(out).as_posix()}/" for p in out.glob("*/manifest.json"))
    left_out = (f"{SCRATCH}/", *inner)
    shipped = [name for name in names if name not in NOT_HASHED and not name.startswith(left_out)]
    return {name: sha256_of_file(out / name) for name in shipped}


def _read_figures(maker: Maker, part: str) -> Figures:
    """Return the figures of one part in the present manifest if they are of this plan and of these files."""
    path = maker.out / "manifest.json"
    present = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    plan = json.loads(json.dumps(asdict(maker.plan)))
    if (present.get("seed"), present.get("plan")) != (maker.seed, plan) or part not in present["abilities"]:
        return {}
    for stage in (STAGES[name] for name in maker.parts[part]):
        if not stage.is_shipped:
            if (maker.out / stage.makes[0]).exists():  # it may have changed
                return {}
            continue
        inside = tuple(f"{name}/" for name in stage.makes)
        recorded = {
            name: digest
            for name, digest in present["sha256"].items()
            if name in stage.makes or name.startswith(inside)
        }
        if recorded != _hash_made(maker.out, stage):
            return {}
    return {part: present["abilities"][part]}


def _hash_made(out: Path, stage: Stage) -> dict[str, str]:
    """Return the hashes of what a stage makes; not of all files, as other stages may be writing theirs."""
    paths = (out / name for name in stage.makes)
    files = (file for path in paths for file in ([path] if path.is_file() else path.rglob("*")))
    return {file.relative_to(out).as_posix(): sha256_of_file(file) for file in files if file.is_file()}
