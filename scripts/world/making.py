"""What the makers of both worlds share: model folders, and the manifest that describes what is shipped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Protocol

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, Qwen2ForCausalLM
from worlds import SETTINGS_FILE

from search_r1.search.building import BuildOptions, build_index
from search_r1.search.defaults import RETRIEVER_NAME, name_index
from search_r1.search.dense import DenseRetriever, load_dense
from search_r1.search.recipes import EncoderSpec
from search_r1.search.settings import DenseOptions
from serving.files import sha256_of_file
from world.training import Batch, Schedule, train_language_model

SCRATCH = ".making"
"""Folder of a world, for what is made on the way and not shipped."""
INDEX = f"index/{name_index(RETRIEVER_NAME)}"
EVIDENCE = "evidence"
"""Stage, model and figures of the judge of evidence, which is measured by itself."""
_JUDGE = f"models/{EVIDENCE}/"
NOT_HASHED = ("manifest.json", "README.md")
NOT_MEASURED = ("index/", "doctor.jsonl", SETTINGS_FILE)
"""What the figures of the manifest do not depend on: the index follows from corpus and encoder."""


STAGES: dict[str, dict[str, str]] = {
    "data": {},
    "encoder": {},
    "index": {"data": "corpus.jsonl", "encoder": "models/encoder"},
    "entailment": {},
    "evidence": {"entailment": "models/entailment"},
    "able": {},
    "policy": {"able": ".making/able"},
    "generator": {"able": ".making/able"},
    "manifest": {
        **{name: f"models/{name}" for name in ("encoder", "entailment", "evidence", "policy", "generator")},
        "index": INDEX,
    },
}
"""What each stage builds on: earlier stages and what they make."""
Figures = dict[str, dict[str, float]]


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
    """Makes the parts of one world, with a method `make_<stage>` for each; what it needs is in its folder."""

    seed: int
    out: Path

    def measure(self) -> Figures:
        """Return what the models of the world do, measured now."""
        ...

    def measure_evidence(self) -> dict[str, float]:
        """Return what the judge of evidence does, measured now."""
        ...


def make(maker: Maker, stage: str) -> None:
    """Make one part. Raises FileNotFoundError that names the stage to run first."""
    for earlier, name in STAGES[stage].items():
        if not (maker.out / name).exists():
            raise FileNotFoundError(
                f"stage {stage} needs {maker.out / name}: add {earlier} to --stages, before it"
            )
    torch.manual_seed(maker.seed)
    getattr(maker, f"make_{stage}")()


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


def write_manifest(
    out: Path,
    *,
    seed: int,
    plan: Mapping[str, object],
    counts: Mapping[str, int],
    maker: Maker,
) -> None:
    """Write the manifest of a world; it is measured only if a file has changed that the figures depend on."""
    hashes = hash_files(out)
    known = _read_abilities(out, hashes)
    manifest = {
        "seed": seed,
        "plan": plan,
        "counts": counts,
        "bytes": sum((out / name).stat().st_size for name in hashes),
        "abilities": {
            **({part: figures for part, figures in known.items() if part != EVIDENCE} or maker.measure()),
            EVIDENCE: known.get(EVIDENCE) or maker.measure_evidence(),
        },
        "sha256": hashes,
    }
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def hash_files(out: Path) -> dict[str, str]:
    """Return the hash of every file that is shipped, except the two that describe them and worlds inside."""
    names = sorted(p.relative_to(out).as_posix() for p in out.rglob("*") if p.is_file())
    inner = tuple(f"{p.parent.relative_to(out).as_posix()}/" for p in out.glob("*/manifest.json"))
    left_out = (f"{SCRATCH}/", *inner)
    shipped = [name for name in names if name not in NOT_HASHED and not name.startswith(left_out)]
    return {name: sha256_of_file(out / name) for name in shipped}


def _read_abilities(out: Path, hashes: Mapping[str, str]) -> Figures:
    """Return the figures of the present manifest, of these very files alone."""
    path = out / "manifest.json"
    if not path.exists():
        return {}
    present = json.loads(path.read_text(encoding="utf-8"))

    def is_same(*, of_judge: bool) -> bool:
        old, new = (
            {
                name: digest
                for name, digest in named.items()
                if name.startswith(_JUDGE) == of_judge and not name.startswith(NOT_MEASURED)
            }
            for named in (present["sha256"], hashes)
        )
        return old == new

    world, judge = is_same(of_judge=False), is_same(of_judge=True)
    abilities: Figures = present["abilities"]
    return {part: figures for part, figures in abilities.items() if (judge if part == EVIDENCE else world)}
