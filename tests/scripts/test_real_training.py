"""Training in `make real`: pairs of answers, gains of passages, and episodes for the policy; tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from make_real import read_settings

from IG.config import resolve_config
from IG.messages import GainResult
from real.entailment import HAND_MADE
from real.facts import Fact, Relation
from real.gains import build_requests, summarize
from real.pairs import MAKERS, Make, PairSource, _reword, names_alike, write_number
from real.questions import Problem
from real.training import Plan, fit
from real.warmup import encode, micro_batches, write_completions
from tests.fakes import make_question, make_trajectory
from verl.trainer.config.loading import compose_config

CAPITAL = Relation(name="capital", phrase="capital of {x}", question="What is the capital of {x}?")
RULER = Relation(
    name="ruler",
    phrase="independence of {x}",
    query="country from which {x} became independent",
    question="From which country did {x} become independent?",
    leads="the country from which {x} became independent",
)


def make_fact(relation: Relation, subject: str, *golds: str) -> Fact:
    return Fact(subject=subject, relation=relation, golds=golds, contents=f'"{subject}"\n{golds[0]}')


KENYA = make_fact(CAPITAL, "Kenya", "Nairobi")
FRANCE = make_fact(CAPITAL, "France", "Paris", "Paris, France")
ALGERIA = make_fact(RULER, "Algeria", "France")
ONE_HOP = [
    Problem(text=fact.relation.question.format(x=fact.subject), hops=(fact,)) for fact in (KENYA, FRANCE)
]
TWO_HOPS = Problem(
    text="What is the capital of the country from which Algeria became independent?", hops=(ALGERIA, FRANCE)
)


def test_pairs_of_one_question_mean_the_same_or_name_another_answer() -> None:
    rng = Random(0)
    source = PairSource(ONE_HOP)
    for problem in ONE_HOP * 50:
        golds = {gold.lower() for gold in problem.golds}
        for same in (True, False):
            left, right = source._choose(problem, rng, same=same)
            assert left.lower() in golds
            assert (right.lower() in golds) is same, (problem.text, left, right)


def test_answers_are_written_as_models_write_them() -> None:
    rng = Random(3)
    written = {_reword("Nairobi", rng, phrase="capital of Kenya") for _ in range(500)}
    assert {
        "Nairobi", "nairobi", "The capital of Kenya is Nairobi.", "Capital of Kenya: Nairobi",
        "Nairobi (official)", "It is Nairobi.",
    } <= written  # fmt: skip
    assert not [text for text in written if "nairobi" not in text.lower()]
    assert {_reword("", rng, phrase="capital of Kenya") for _ in range(50)} == {""}


@pytest.mark.parametrize("make", MAKERS)
def test_made_up_pairs_differ_where_they_do_not_mean_the_same(make: Make) -> None:
    rng = Random(1)
    different = [make(rng, same=False) for _ in range(200)]
    assert not [pair for pair in different if pair[1] == pair[2]]
    same = [make(rng, same=True) for _ in range(200)]
    assert len({pair[1:] for pair in same}) > 50
    assert any(left != right for _, left, right in same)


def test_names_look_alike_that_share_a_word_or_their_first_letters_and_mean_something_else() -> None:
    groups = [
        ("North Korea",),
        ("South Korea", "Korea"),
        ("Turkish",),
        ("Turkmen",),
        ("the Gambia", "Gambia"),
        ("Kenya",),
        ("1,022 km",),
        ("1,046 km",),
    ]
    alike = names_alike(groups)
    assert {name: others for name, others in alike.items() if others} == {
        "North Korea": ("South Korea",),  # not Korea alone, which a writer may mean it by
        "South Korea": ("North Korea",),
        "Turkish": ("Turkmen",),
        "Turkmen": ("Turkish",),
    }


def test_a_subject_is_compared_with_others_that_look_like_it() -> None:
    peak = Relation(name="peak", phrase="", question="{x}?", bridge="the country whose highest point is {x}")
    facts = [make_fact(peak, *names) for names in (("North Korea", "Paektu"), ("South Korea", "Halla"))]
    source = PairSource([Problem(text=f"{fact.subject}?", hops=(fact,)) for fact in facts])
    rng = Random(0)
    pairs = {source._choose_subject(rng, same=False) for _ in range(50)}
    assert pairs == {
        ("Which is the country whose highest point is Paektu?", "North Korea", "South Korea"),
        ("Which is the country whose highest point is Halla?", "South Korea", "North Korea"),
    }


def test_numbers_in_words() -> None:
    assert [write_number(value) for value in (0, 13, 20, 88)] == [
        "zero",
        "thirteen",
        "twenty",
        "eighty-eight",
    ]


def test_a_draw_depends_on_its_seed_alone_and_half_of_the_pairs_mean_the_same() -> None:
    source = PairSource(ONE_HOP)
    assert source.draw(Random("a")) == source.draw(Random("a"))
    rng = Random(2)
    assert 0.35 < sum(source.draw(rng)[2] for _ in range(500)) / 500 < 0.55


def test_the_hand_made_pairs_are_balanced_and_none_is_listed_twice() -> None:
    rows = [json.loads(line) for line in HAND_MADE.read_text(encoding="utf-8").splitlines()]
    assert len({tuple(row.values()) for row in rows}) == len(rows) >= 65
    assert 0.4 < sum(row["same"] for row in rows) / len(rows) < 0.6


def test_gains_are_asked_with_own_and_with_foreign_passages_of_the_same_number(tmp_path: Path) -> None:
    rows = [
        {
            "question": f"Q{k}?",
            "answers": [str(k)],
            "documents": [{"text": f"d{k}{n}"} for n in range(1 + k % 2)],
        }
        for k in range(6)
    ]
    path = tmp_path / "doctor.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = build_requests(path, seed=0)
    assert requests == build_requests(path, seed=0)
    for k, (own, other) in enumerate(requests):
        assert own.context == "\n".join(f"d{k}{n}" for n in range(1 + k % 2))
        assert (own.question, own.golds) == (other.question, other.golds) == (f"Q{k}?", (str(k),))
        assert not set(own.context.split("\n")) & set(other.context.split("\n"))
        assert len(own.context) == len(other.context)


def test_failed_gains_are_counted_and_are_in_no_figure() -> None:
    def gain(value: float | None) -> GainResult:
        return GainResult(gain=value, error=None if value is not None else "late", belief_no_context=0.25)

    found = summarize([(gain(0.5), gain(0.0)), (gain(0.0), gain(0.0)), (gain(None), gain(1.0))])
    assert (found.questions, found.failed, found.auc) == (3, 1, 0.75)
    assert (found.supporting_mean, found.unrelated_mean, found.belief_without) == (0.25, 0.0, 0.25)
    assert summarize([(gain(None), gain(0.1))]).auc is None


@pytest.mark.parametrize("in_bfloat16", [False, True])
def test_the_settings_of_the_world_are_settings_of_service_and_trainer(in_bfloat16: bool) -> None:
    folder = HAND_MADE.parent
    settings = read_settings(in_bfloat16=in_bfloat16)
    trainer = compose_config(["recipe=quickstart", *settings["trainer"]])
    assert trainer.retriever.topk == 2
    flags = [flag.replace("{world}/", f"{folder}/") for flag in settings["ig_service"]]
    config = resolve_config(flags, environ={})
    assert (config.prompt_style, config.max_new_tokens) == ("plain", 16)
    precision = "bfloat16" if in_bfloat16 else "auto"
    assert (trainer.actor_rollout_ref.model.dtype, config.dtype) == (precision, precision)
    assert "Don Quixote" in config.prompt_file


def test_a_stopped_training_continues_where_it_was(tmp_path: Path) -> None:
    def run(steps: int, state: str) -> torch.nn.Linear:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)

        def losses(step: int) -> Iterator[torch.Tensor]:
            if step >= steps:
                raise KeyboardInterrupt
            for part in range(2):
                inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(10 * step + part))
                yield (model(inputs) - inputs.sum(dim=1, keepdim=True)).square().mean()

        plan = Plan(steps=6, rate=0.05, save_every=2)
        fit(model, losses, plan, state=tmp_path / state, title="linear")
        return model

    whole = run(6, "whole")
    with pytest.raises(KeyboardInterrupt):
        run(5, "stopped")
    assert torch.equal(run(6, "stopped").weight, whole.weight)
    assert torch.load(tmp_path / "whole", weights_only=True)["step"] == 6


def test_the_teacher_searches_for_each_hop_and_answers_what_it_read() -> None:
    assert write_completions(TWO_HOPS) == [
        "<think> I need the country from which Algeria became independent.</think> "
        "<search> country from which Algeria became independent </search>",
        "<think> The country from which Algeria became independent is France. I need the capital of France."
        "</think> <search> capital of France </search>",
        "<think> The capital of France is Paris.</think> <answer> Paris </answer>",
    ]


def test_labels_are_the_next_tokens_that_the_teacher_wrote() -> None:
    trace = make_trajectory(make_question(), queries=("q",), answer="a", outputs=2, observed=1)
    ids, labels = encode(trace)
    assert ids.tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
    assert labels.tolist() == [-100, -100, 0, 1, -100, 0, 1, -100]


def test_micro_batches_hold_few_tokens_or_one_row() -> None:
    rows = [(torch.ones(n, dtype=torch.long), torch.full((n,), n)) for n in (2, 3, 3, 9)]
    shapes = [tuple(ids.shape) for ids, _ in micro_batches(rows, tokens=6)]
    assert shapes == [(2, 3), (1, 3), (1, 9)]
    ids, labels = next(micro_batches(rows, tokens=6))
    assert (ids[0].tolist(), labels[0].tolist()) == ([1, 1, 0], [2, 2, -100])
