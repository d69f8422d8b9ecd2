"""Make a world: corpus, questions, five tiny models and the index, from a seed, on two CPU cores.

    python scripts/make_world.py --seed 0 --out world            # the embedded one
    python scripts/make_world.py --world hard --out world/hard   # the hard one, from models of that one
    python scripts/make_world.py --world hard --check            # measure it, compare with what must be true
    python scripts/make_world.py --small --out /tmp/small        # a small one in about a minute, to try it
    python scripts/make_world.py --stages encoder index manifest    # some parts again, in place
    python scripts/make_world.py long-horizon --out /tmp/long       # questions many hops away, see its --help
    python scripts/make_world.py damaged --out /tmp/damaged         # the hard one with gaps, see its --help

The corpus and the questions are the same bytes for the same seed everywhere. The weights depend on the
machine and on what runs beside (threads and instruction sets change the order of sums), so what was
measured is in the manifest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer

from serving.web.settings import expand_home
from verl.utils.entry import describe_error, error_line
from world import (
    dataset,
    encoder,
    entailment,
    evaluation,
    evidence,
    language,
    long_horizon,
    making,
    tokenizer,
)
from world.facts import World, WorldSize, draw_world
from world.hard import damage, maker, report
from world.making import STAGES
from world.traces import Problem
from world.training import Schedule

COMMANDS: dict[str, Callable[[Sequence[str]], None]] = {
    "long-horizon": long_horizon.main,
    "damaged": damage.main,
}
LANGUAGE_VOCABULARY = 1600


@dataclass(frozen=True, slots=True)
class Plan:
    """How big the world is and how long each model is trained."""

    size: WorldSize
    encoder: Schedule
    entailment: Schedule
    evidence: Schedule
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
    evidence=Schedule(steps=520, matrix_rate=0.01, vector_rate=2e-3),
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
    evidence=Schedule(steps=4),
    able=Schedule(steps=3),
    able_one_hop_steps=2,
    shipped=Schedule(steps=2),
    generator=Schedule(steps=2),
    output_tokens=8,  # a policy that learned nothing never stops by itself
)


class Maker:
    """Makes and measures the parts of one world, each from what is in the output folder."""

    parts: Mapping[str, tuple[str, ...]] = {
        **making.PARTS,
        "generator": (*making.SEARCHED, "generator"),
        making.EVIDENCE: (making.EVIDENCE,),
    }

    def __init__(self, plan: Plan, *, seed: int, out: Path) -> None:
        self.plan, self.seed, self.out = plan, seed, out
        self.models = out / "models"
        self.able = out / making.ABLE
        self.world: World = draw_world(plan.size, seed=seed)

    def make_data(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        size, seed = self.plan.size, self.seed
        passages = dataset.corpus(self.world, seed=seed)
        dataset.write_corpus(self.out / "corpus.jsonl", passages.values())
        numbered = dataset.number_passages(passages)
        for split in ("train", "test"):
            problems = dataset.problems(self.world, size, split=split, seed=seed)
            routes = [[numbered[fact] for fact in problem.hops] for problem in problems]
            dataset.write_questions(self.out / f"{split}.parquet", problems, routes=routes, split=split)
        examined, count = self.out / "doctor.jsonl", size.examined_questions
        dataset.write_examined(examined, problems, num_questions=count, world=self.world, seed=seed)

    def make_encoder(self) -> None:
        words = tokenizer.text_tokenizer(seed=self.seed)
        model = encoder.build(words, seed=self.seed)
        encoder.train(model, words, self.plan.encoder, seed=self.seed)
        making.save(model, words, self.models / "encoder")

    def make_index(self) -> None:
        """Build the index with the retriever's own builder, so that the server accepts it."""
        making.index_corpus(self.out)

    def make_entailment(self) -> None:
        words = tokenizer.text_tokenizer(seed=self.seed)
        model = entailment.build(words, seed=self.seed)
        entailment.train(model, words, self.plan.entailment, seed=self.seed)
        making.save(model, words, self.models / "entailment")

    def make_evidence(self) -> None:
        model, words = evidence.load_start(self.models / "entailment")
        evidence.train(model, words, self.plan.evidence, seed=self.seed)
        evidence.save(model, words, self.models / making.EVIDENCE)

    def make_able(self) -> None:
        """Train what policy and generator start from; it is not shipped."""
        words = tokenizer.language_tokenizer(vocabulary=LANGUAGE_VOCABULARY, seed=self.seed)
        model = language.build(words, seed=self.seed)
        stream = language.able_stream(words, one_hop_steps=self.plan.able_one_hop_steps, seed=self.seed)
        making.make_scratch(self.out)
        making.train_and_save(model, words, stream, schedule=self.plan.able, folder=self.able)

    def make_policy(self) -> None:
        making.train_from_able(self, language.shipped_stream, self.plan.shipped, name="policy")

    def make_generator(self) -> None:
        making.train_from_able(self, language.generator_stream, self.plan.generator, name="generator")

    @property
    def counts(self) -> dict[str, int]:
        """Count passages and questions."""
        return {
            "passages": len(self.world.facts),
            "train_questions": self.plan.size.train_questions,
            "test_questions": self.plan.size.test_questions,
        }

    def measure_encoder(self) -> dict[str, float]:
        with closing(making.open_retriever(self.out)) as retriever:
            return evaluation.measure_encoder(retriever, self.world.facts, seed=self.seed)

    def measure_entailment(self) -> dict[str, float]:
        folder = self.models / "entailment"
        judge = AutoModelForSequenceClassification.from_pretrained(folder)
        return entailment.measure(judge, AutoTokenizer.from_pretrained(folder), seed=self.seed)

    def measure_policy(self, folder: Path, *, temperature: float) -> dict[str, float]:
        model, words = making.load_language_model(folder)
        with closing(making.open_retriever(self.out)) as retriever:
            episodes = evaluation.run_episodes(
                model,
                words,
                retriever,
                self._test_problems(),
                temperature=temperature,
                max_new_tokens=self.plan.output_tokens,
            )
        return evaluation.summarize(episodes)

    def measure_generator(self) -> dict[str, float]:
        model, words = making.load_language_model(self.models / "generator")
        with closing(making.open_retriever(self.out)) as retriever:
            return evaluation.measure_generator(model, words, retriever, self._test_problems())

    def measure_evidence(self) -> dict[str, float]:
        """Return how well the judge separates supported answers from the rest."""
        return evidence.measure(self.models / making.EVIDENCE, seed=self.seed)

    def _test_problems(self) -> list[Problem]:
        return dataset.problems(self.world, self.plan.size, split="test", seed=self.seed)


def new_easy_maker(*, small: bool, persons: int | None, seed: int, out: Path) -> Maker:
    """Return the maker of the embedded world. Raises ValueError when there are not enough names."""
    plan = SMALL if small else FULL
    if persons is not None:
        plan = replace(plan, size=replace(plan.size, persons=persons))
    return Maker(plan, seed=seed, out=out)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the given stages; exit with status 2, and with what to do, if one cannot be made."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] and given[0] in COMMANDS:
        COMMANDS[given[0]](expand_home(given[1:]))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--world", choices=("easy", "hard"), default="easy", help="which one (default easy)")
    parser.add_argument("--seed", type=int, default=0, help="what the world is drawn from (default 0)")
    parser.add_argument("--out", type=Path, help="output folder (default world, or world/hard)")
    parser.add_argument(
        "--small", action="store_true", help="a small, hardly trained world, to try the script"
    )
    parser.add_argument("--persons", type=int, help="number of persons (default 300; hard 280)")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, help="make only these parts")
    parser.add_argument(
        "--processes", type=int, default=2, help="parts made at once, on as many cores (default 2)"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="make nothing: measure the hard world in --out and say whether it is as it must be",
    )
    chosen = parser.parse_args(expand_home(given))
    is_hard = chosen.world == "hard"
    if chosen.check and not is_hard:
        parser.error("--check needs --world hard")
    if chosen.out is None and (chosen.small or chosen.seed or chosen.persons is not None):
        parser.error("--small, --seed and --persons make another world than the shipped one: name its --out")
    if chosen.processes < 1:
        parser.error(f"--processes is {chosen.processes}, expected at least 1")
    out = chosen.out or Path("world/hard" if is_hard else "world")
    new_maker = maker.new_maker if is_hard else new_easy_maker
    try:
        chosen_maker = new_maker(small=chosen.small, persons=chosen.persons, seed=chosen.seed, out=out)
        if chosen.check:
            sys.exit(report.show(making.measure_all(chosen_maker, processes=chosen.processes)))
        making.make_all(chosen_maker, chosen.stages, processes=chosen.processes)
    except (FileNotFoundError, ValueError) as error:
        parser.error(describe_error(error))


if __name__ == "__main__":
    with error_line():
        main()
