"""Gains of every method with shared prefixes against one whole forward pass per state, with a real model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conformance.test_measuring import GROUPS, LOG_PROB_METHODS, Judge, gains_of
from tests.fakes import tiny_model
from tests.methods import make_method
from tests.verl.workers.episodes import launch_group, make_actor, make_config
from verl.types import Gain, Group
from verl.utils.actors import LocalLauncher
from verl.workers.scorer import LogProbScorer

VOCABULARY = 256


class ByteCodec:
    """One token per character of Latin text."""

    def encode(self, text: str) -> list[int]:
        return list(text.encode("latin-1"))

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("latin-1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"), vocab_size=VOCABULARY)


async def measure(
    name: str, groups: Sequence[Group], *, model: Path, shared: bool, max_tokens: int
) -> list[list[Gain]]:
    config = make_config(model, actor=make_actor(ppo_max_token_len_per_gpu=max_tokens))
    group = launch_group(LocalLauncher(), config, trainable=False)
    scorer = LogProbScorer(group, shares_prefixes=shared, scores_trajectories=False)
    method = make_method(name, entailment=Judge())
    services = replace(method.services, policy=scorer, frozen=scorer, codec=ByteCodec())
    method = type(method)(method.settings, services)
    try:
        return await gains_of(method, groups)
    finally:
        group.shutdown()


@pytest.mark.parametrize("name", LOG_PROB_METHODS)
async def test_shared_prefixes_give_the_gains_of_whole_passes(name: str, model: Path) -> None:
    naive = await measure(name, GROUPS, model=model, shared=False, max_tokens=8192)
    order = (2, 0, 1)
    for max_tokens in (8192, 400, 1):
        moved = await measure(
            name,
            [GROUPS[i] for i in order],
            model=model,
            shared=True,
            max_tokens=max_tokens,
        )
        for place, i in enumerate(order):
            for one, other in zip(moved[place], naive[i], strict=True):
                assert one.failure is None
                assert other.failure is None
                assert one.values == pytest.approx(other.values, abs=1e-4)
    assert any(gain.values for of_group in naive for gain in of_group)
