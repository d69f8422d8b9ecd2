"""Batches over epochs, and resuming anywhere."""

from __future__ import annotations

import pytest

from tests.fakes import make_question
from verl.data.sampler import QuestionSampler
from verl.errors import ConfigError

QUESTIONS = [make_question(f"nq/train/{k}") for k in range(11)]


def make_sampler(seed: int = 0, batch_size: int = 4) -> QuestionSampler:
    return QuestionSampler(QUESTIONS, batch_size=batch_size, seed=seed)


def deal(sampler: QuestionSampler, num_batches: int) -> list[list[str]]:
    return [[question.uid for question in sampler.next_batch()] for _ in range(num_batches)]


def test_an_epoch_deals_whole_batches_without_repeating_a_question() -> None:
    sampler = make_sampler()
    assert sampler.batches_per_epoch == 2
    for _ in range(3):
        dealt = [uid for batch in deal(sampler, 2) for uid in batch]
        assert len(set(dealt)) == 8
    assert sampler.epoch == 3


def test_epochs_and_seeds_differ_and_the_same_seed_repeats() -> None:
    batches = deal(make_sampler(), 8)
    assert batches[:2] != batches[2:4]
    assert batches == deal(make_sampler(), 8)
    assert batches != deal(make_sampler(seed=1), 8)
    assert {uid for batch in deal(make_sampler(), 40) for uid in batch} == {q.uid for q in QUESTIONS}


@pytest.mark.parametrize("num_before", [0, 1, 2, 3, 4])
def test_resuming_goes_on_exactly_where_it_was(num_before: int) -> None:
    unbroken = make_sampler()
    deal(unbroken, num_before)
    resumed = make_sampler()
    resumed.load_state_dict(unbroken.state_dict())
    assert deal(resumed, 5) == deal(unbroken, 5)


def test_a_state_of_other_data_is_refused() -> None:
    state = make_sampler().state_dict()
    with pytest.raises(ConfigError, match="seed was 0 and is 1"):
        make_sampler(seed=1).load_state_dict(state)
    with pytest.raises(ConfigError, match="batch_size was 4 and is 5"):
        make_sampler(batch_size=5).load_state_dict(state)


def test_fewer_questions_than_a_batch() -> None:
    with pytest.raises(ConfigError, match=r"data\.train_batch_size=12 .* only 11 questions"):
        make_sampler(batch_size=12)
