"""Make the embedded world: corpus, questions, four tiny models and the index, from a seed, on two CPU cores.

    python scripts/make_world.py --seed 0 --out world            # everything, about 25 minutes
    python scripts/make_world.py --small --out /tmp/small        # a small one in under a minute, to try it
    python scripts/make_world.py --stages encoder index manifest    # some parts again, in place
    python scripts/make_world.py long-horizon --out /tmp/long       # questions many hops away, see its --help

The corpus and the questions are the same bytes for the same seed everywhere. The weights depend on the
machine (threads and instruction sets change the order of sums), so what was measured is in the manifest.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2ForCausalLM,
)

from search_r1.search.building import BuildOptions, build_index
from search_r1.search.defaults import RETRIEVER_NAME, name_index
from search_r1.search.dense import load_dense
from search_r1.search.recipes import EncoderSpec
from search_r1.search.settings import DenseOptions
from serving.files import sha256_of_file
from serving.web.settings import expand_home
from verl.utils.entry import error_line
from world import dataset, encoder, entailment, evaluation, language, long_horizon, tokenizer
from world.facts import World, WorldSize, draw_world
from world.training import Batch, Schedule, train_language_model

LANGUAGE_VOCABULARY = 1600
NOT_HASHED = ("manifest.json", "README.md")
NOT_MEASURED = ("index/", "doctor.jsonl")
"""What the figures of the manifest do not depend on: the index follows from corpus and encoder."""
STAGES: dict[str, dict[str, str]] = {
    "data": {},
    "encoder": {},
    "index": {"data": "corpus.jsonl", "encoder": "models/encoder"},
    "entailment": {},
    "able": {},
    "policy": {"able": ".making/able"},
    "generator": {"able": ".making/able"},
    "manifest": {
        **{name: f"models/{name}" for name in ("encoder", "entailment", "policy", "generator")},
        "index": f"index/{name_index(RETRIEVER_NAME)}",
    },
}
"""What each stage builds on: earlier stages and what they make."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How big the world is and how long each model is trained."""

    size: WorldSize
    encoder: Schedule
    entailment: Schedule
    able: Schedule
    able_one_hop_steps: int
    shipped: Schedule
    generator: Schedule
    output_tokens: int
    """Limit of a turn when the policy is measured."""


FULL = Plan(
    size=WorldSize(),
    encoder=Schedule(steps=120, matrix_rate=0.005, vector_rate=2e-3),
    entailment=Schedule(steps=500, vector_rate=2e-3),
    able=Schedule(steps=1100),
    able_one_hop_steps=450,
    shipped=Schedule(steps=200, matrix_rate=0.004, vector_rate=1e-3),
    generator=Schedule(steps=600, matrix_rate=0.01, vector_rate=2e-3),
    output_tokens=64,
)
SMALL = Plan(
    size=WorldSize(persons=40, films=12, books=12, firms=10, train_questions=60, test_questions=20),
    encoder=Schedule(steps=4, matrix_rate=0.005),
    entailment=Schedule(steps=4),
    able=Schedule(steps=3),
    able_one_hop_steps=2,
    shipped=Schedule(steps=2),
    generator=Schedule(steps=2),
    output_tokens=8,  # a policy that learned nothing never stops by itself
)


class Maker:
    """Makes the parts of one world; every stage reads what it needs from the output folder."""

    def __init__(self, plan: Plan, *, seed: int, out: Path) -> None:
        self.plan, self.seed, self.out = plan, seed, out
        self.models = out / "models"
        self.scratch = out / ".making"
        self.able = self.scratch / "able"
        self.index = out / "index" / name_index(RETRIEVER_NAME)
        self.encoder = EncoderSpec(path=str(self.models / "encoder"), family=RETRIEVER_NAME)
        self.world: World = draw_world(plan.size, seed=seed)

    def run(self, stage: str) -> None:
        """Make one part. Raises FileNotFoundError that names the stage to run first."""
        for earlier, name in STAGES[stage].items():
            if not (self.out / name).exists():
                raise FileNotFoundError(
                    f"stage {stage} needs {self.out / name}: add {earlier} to --stages, before it"
                )
        torch.manual_seed(self.seed)
        getattr(self, f"make_{stage}")()

    def make_data(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        size, seed = self.plan.size, self.seed
        passages = dataset.corpus(self.world, seed=seed)
        dataset.write_corpus(self.out / "corpus.jsonl", passages.values())
        for split in ("train", "test"):
            problems = dataset.problems(self.world, size, split=split, seed=seed)
            dataset.write_questions(self.out / f"{split}.parquet", problems, passages=passages, split=split)
        examined, count = self.out / "doctor.jsonl", size.examined_questions
        dataset.write_examined(examined, problems, num_questions=count, world=self.world, seed=seed)

    def make_encoder(self) -> None:
        words = tokenizer.text_tokenizer(seed=self.seed)
        model = encoder.build(words, seed=self.seed)
        encoder.train(model, words, self.plan.encoder, seed=self.seed)
        _save(model, words, self.models / "encoder")

    def make_index(self) -> None:
        """Build the index with the retriever's own builder, so that the server accepts it."""
        build_index(
            BuildOptions(
                corpus_path=self.out / "corpus.jsonl",
                index_path=self.index,
                encoder=self.encoder,
                devices=("cpu",),
            )
        )

    def make_entailment(self) -> None:
        words = tokenizer.text_tokenizer(seed=self.seed)
        model = entailment.build(words, seed=self.seed)
        entailment.train(model, words, self.plan.entailment, seed=self.seed)
        _save(model, words, self.models / "entailment")

    def make_able(self) -> None:
        """Train what policy and generator start from; it is not shipped."""
        words = tokenizer.language_tokenizer(vocabulary=LANGUAGE_VOCABULARY, seed=self.seed)
        model = language.build(words, seed=self.seed)
        stream = language.able_stream(words, one_hop_steps=self.plan.able_one_hop_steps, seed=self.seed)
        self.scratch.mkdir(parents=True, exist_ok=True)
        (self.scratch / ".gitignore").write_text("*\n", encoding="utf-8")
        _train(model, words, stream, schedule=self.plan.able, folder=self.able)

    def make_policy(self) -> None:
        model, words = _load_language_model(self.able)
        stream = language.shipped_stream(words, seed=self.seed)
        _train(model, words, stream, schedule=self.plan.shipped, folder=self.models / "policy")

    def make_generator(self) -> None:
        model, words = _load_language_model(self.able)
        stream = language.generator_stream(words, seed=self.seed)
        _train(model, words, stream, schedule=self.plan.generator, folder=self.models / "generator")

    def _measure(self) -> dict[str, dict[str, float]]:
        """Return what the models do on the test questions."""
        problems = dataset.problems(self.world, self.plan.size, split="test", seed=self.seed)
        corpus = self.out / "corpus.jsonl"
        retriever = load_dense(DenseOptions(index_path=self.index, corpus_path=corpus, encoder=self.encoder))
        judge = AutoModelForSequenceClassification.from_pretrained(self.models / "entailment")
        texts = AutoTokenizer.from_pretrained(self.models / "entailment")
        figures = {
            "encoder": evaluation.measure_encoder(retriever, self.world.facts, seed=self.seed),
            "entailment": entailment.measure(judge, texts, seed=self.seed),
        }
        limit = self.plan.output_tokens
        for name, folder, temperature in (
            ("able_greedy", self.able, 0.0),
            ("policy_greedy", self.models / "policy", 0.0),
            ("policy_sampled", self.models / "policy", 1.0),
        ):
            if not folder.exists():
                continue
            model, words = _load_language_model(folder)
            torch.manual_seed(self.seed)
            episodes = evaluation.run_episodes(
                model, words, retriever, problems, temperature=temperature, max_new_tokens=limit
            )
            figures[name] = evaluation.summarize(episodes)
        model, words = _load_language_model(self.models / "generator")
        figures["generator"] = evaluation.measure_generator(model, words, retriever, problems)
        retriever.close()
        return {part: {k: round(v, 4) for k, v in shown.items()} for part, shown in figures.items()}

    def make_manifest(self) -> None:
        """Write the manifest, with new figures if a measured file has changed."""
        hashes = self._hash_files()
        manifest = {
            "seed": self.seed,
            "plan": asdict(self.plan),
            "counts": {
                "passages": len(self.world.facts),
                "train_questions": self.plan.size.train_questions,
                "test_questions": self.plan.size.test_questions,
            },
            "bytes": sum((self.out / name).stat().st_size for name in hashes),
            "abilities": self._read_abilities(hashes) or self._measure(),
            "sha256": hashes,
        }
        (self.out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def _hash_files(self) -> dict[str, str]:
        """Return the hash of every file that is shipped, except the two that describe them."""
        names = sorted(p.relative_to(self.out).as_posix() for p in self.out.rglob("*") if p.is_file())
        shipped = [n for n in names if n not in NOT_HASHED and not n.startswith(f"{self.scratch.name}/")]
        return {name: sha256_of_file(self.out / name) for name in shipped}

    def _read_abilities(self, hashes: dict[str, str]) -> dict[str, dict[str, float]] | None:
        """Return the figures of the present manifest, None unless they are those of these very files."""

        def select(named: dict[str, str]) -> dict[str, str]:
            return {name: digest for name, digest in named.items() if not name.startswith(NOT_MEASURED)}

        path = self.out / "manifest.json"
        present = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sha256": {}}
        return present["abilities"] if select(present["sha256"]) == select(hashes) else None


def _train(
    model: Qwen2ForCausalLM,
    words: PreTrainedTokenizerBase,
    stream: Iterator[Batch],
    *,
    schedule: Schedule,
    folder: Path,
) -> None:
    train_language_model(model, stream, schedule, title=folder.name)
    _save(model, words, folder)


def _save(model: PreTrainedModel, words: PreTrainedTokenizerBase, folder: Path) -> None:
    words.backend_tokenizer.no_padding()  # settings of the last batch
    words.backend_tokenizer.no_truncation()
    model.save_pretrained(folder)
    words.save_pretrained(folder)
    for path in folder.iterdir():
        path.chmod(0o644)


def _load_language_model(folder: Path) -> tuple[Qwen2ForCausalLM, PreTrainedTokenizerBase]:
    return Qwen2ForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the given stages; exit with status 2, and with what to do, if one cannot be made."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["long-horizon"]:
        long_horizon.main(expand_home(given[1:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="what the world is drawn from (default 0)")
    parser.add_argument("--out", type=Path, default=Path("world"), help="output folder (default world)")
    parser.add_argument(
        "--small", action="store_true", help="a small, hardly trained world, to try the script"
    )
    parser.add_argument("--persons", type=int, help="number of persons (default 300; 40 with --small)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="make only these parts")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for training (default 2)")
    chosen = parser.parse_args(expand_home(given))
    plan = SMALL if chosen.small else FULL
    if chosen.persons is not None:
        plan = replace(plan, size=replace(plan.size, persons=chosen.persons))
    torch.set_num_threads(chosen.threads)
    try:
        maker = Maker(plan, seed=chosen.seed, out=chosen.out)
        for stage in (stage for stage in STAGES if stage in chosen.stages):
            started = time.perf_counter()
            maker.run(stage)
            print(f"{stage}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    except (FileNotFoundError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    with error_line():
        main()
