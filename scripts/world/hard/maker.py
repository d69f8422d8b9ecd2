"""Makes the hard world, stage by stage; its models continue from those of the embedded world."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

from world import encoder, entailment, evidence, making
from world.hard import corpus, measure, models
from world.hard.facts import WorldSize, draw_problems, draw_world
from world.training import Schedule

BASE = Path(__file__).parents[3] / "world" / "models"


@dataclass(frozen=True, slots=True)
class Plan:
    """How big the world is and how long each model is trained."""

    size: WorldSize
    encoder: Schedule
    entailment: Schedule
    evidence: Schedule
    able: Schedule
    shipped: Schedule
    generator: Schedule
    effort: measure.Effort


FULL = Plan(
    size=WorldSize(),
    encoder=Schedule(steps=60, matrix_rate=0.005, vector_rate=2e-3),
    entailment=Schedule(steps=250, matrix_rate=0.01, vector_rate=2e-3),
    evidence=Schedule(steps=520, matrix_rate=0.01, vector_rate=2e-3),
    able=Schedule(steps=300, matrix_rate=0.01, vector_rate=2e-3),
    shipped=Schedule(steps=150, matrix_rate=0.004, vector_rate=1e-3),
    generator=Schedule(steps=1500, matrix_rate=0.015, vector_rate=3e-3),
    effort=measure.Effort(),
)
SMALL = Plan(
    size=WorldSize(
        persons=60, films=16, books=16, firms=16, train_questions=60, test_questions=20, examined_questions=4
    ),
    encoder=Schedule(steps=2),
    entailment=Schedule(steps=2),
    evidence=Schedule(steps=2),
    able=Schedule(steps=2),
    shipped=Schedule(steps=2),
    generator=Schedule(steps=2),
    effort=measure.Effort(
        samples=2, deep_questions=2, deep_samples=4, output_tokens=8, max_searches=1, gain_samples=4
    ),
)


class HardMaker:
    """Makes and measures the parts of one hard world, each from what is in the output folder."""

    parts: Mapping[str, tuple[str, ...]] = {
        **making.PARTS,
        "gain": ("data", "entailment", "generator"),
        making.EVIDENCE: (making.EVIDENCE,),
    }

    def __init__(self, plan: Plan, *, seed: int, out: Path) -> None:
        self.plan, self.seed, self.out = plan, seed, out
        self.models = out / "models"
        self.able = out / making.ABLE
        self.world = draw_world(plan.size, seed=seed)

    def make_data(self) -> None:
        corpus.write_data(self.out, self.world, self.plan.size, seed=self.seed)

    def make_encoder(self) -> None:
        model = BertModel.from_pretrained(BASE / "encoder")
        words = AutoTokenizer.from_pretrained(BASE / "encoder")
        encoder.train(model, words, self.plan.encoder, seed=self.seed, draw=models.draw_query_pairs)
        making.save(model, words, self.models / "encoder")

    def make_index(self) -> None:
        making.index_corpus(self.out)

    def make_entailment(self) -> None:
        model = AutoModelForSequenceClassification.from_pretrained(BASE / "entailment")
        words = AutoTokenizer.from_pretrained(BASE / "entailment")
        entailment.train(model, words, self.plan.entailment, seed=self.seed, draw=models.draw_entailment_pair)
        making.save(model, words, self.models / "entailment")

    def make_evidence(self) -> None:
        model, words = evidence.load_start(self.models / "entailment")
        evidence.train(
            model,
            words,
            self.plan.evidence,
            seed=self.seed,
            draw=models.draw_evidence,
            draw_short=models.draw_entailment_pair,
        )
        evidence.save(model, words, self.models / making.EVIDENCE)

    def make_able(self) -> None:
        """Train what policy and generator start from; it is not shipped."""
        making.make_scratch(self.out)
        model, words = making.load_language_model(BASE / "policy")
        stream = models.able_stream(words, seed=self.seed)
        making.train_and_save(model, words, stream, schedule=self.plan.able, folder=self.able)

    def make_policy(self) -> None:
        making.train_from_able(self, models.shipped_stream, self.plan.shipped, name="policy")

    def make_generator(self) -> None:
        making.train_from_able(self, models.generator_stream, self.plan.generator, name="generator")

    @property
    def counts(self) -> dict[str, int]:
        """Count passages and questions."""
        return {
            "passages": sum(1 for _ in (self.out / "corpus.jsonl").open(encoding="utf-8")),
            "train_questions": self.plan.size.train_questions,
            "test_questions": self.plan.size.test_questions,
        }

    def measure_encoder(self) -> dict[str, float]:
        with closing(making.open_retriever(self.out)) as retriever:
            return measure.measure_encoder(retriever, self.world, seed=self.seed)

    def measure_entailment(self) -> dict[str, float]:
        return measure.measure_entailment(self.models / "entailment", seed=self.seed)

    def measure_policy(self, folder: Path, *, temperature: float) -> dict[str, float]:
        problems = draw_problems(self.world, self.plan.size, split="test", seed=self.seed)
        with closing(making.open_retriever(self.out)) as retriever:
            return measure.measure_policy(
                folder, retriever, problems, self.plan.effort, temperature=temperature
            )

    def measure_gain(self) -> dict[str, float]:
        return measure.measure_gains(self.out, self.plan.effort)

    def measure_evidence(self) -> dict[str, float]:
        """Return how well the judge separates supported answers from the rest."""
        return evidence.measure(self.models / making.EVIDENCE, seed=self.seed, draw=models.draw_evidence)


def new_maker(*, small: bool, persons: int | None, seed: int, out: Path) -> HardMaker:
    """Return the maker of the hard world. Raises ValueError when there are not enough names."""
    plan = SMALL if small else FULL
    if persons is not None:
        plan = replace(plan, size=replace(plan.size, persons=persons))
    return HardMaker(plan, seed=seed, out=out)
