"""Which models a run has beside the policy, by its method and the KL term."""

from __future__ import annotations

from dataclasses import dataclass

from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Need
from verl.trainer.config.schema import Config

USE_IG_SERVICE = frozenset({Need.IG_SERVICE, Need.ENTAILMENT})
"""Needs that the IG service meets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenModels:
    """Models that score and are not trained."""

    has_kl: bool
    """Whether the update has a KL term, for which the initial policy computes log-probs."""
    has_reference: bool
    """The initial policy: for the KL term, or for a method that scores with it."""
    refresh_steps: int
    """Above 0, the method scores with a copy of the policy that is refreshed after so many steps."""
    reference_is_policy: bool = False
    """With LoRA the policy without its adapters is the reference, so that none is loaded."""

    @property
    def loads_reference(self) -> bool:
        return self.has_reference and not self.reference_is_policy

    @property
    def count(self) -> int:
        """Return the number of models that are loaded, each as large as the policy."""
        return self.loads_reference + bool(self.refresh_steps)


def find_needs(config: Config) -> frozenset[Need]:
    """Return what the method measures with; an evaluation measures no gain."""
    return frozenset() if config.trainer.evaluates_only else ALGORITHMS[config.algorithm.name].needs


def find_frozen_models(config: Config) -> FrozenModels:
    """Return which frozen models the run needs; an evaluation needs the policy alone."""
    options = ALGORITHMS[config.algorithm.name].scorer_options(config.algorithm)
    trains = not config.trainer.evaluates_only
    refresh_steps = options.refresh_steps if trains else 0
    has_kl = trains and config.actor_rollout_ref.actor.use_kl_loss
    scores_with_reference = Need.FROZEN_LOG_PROBS in find_needs(config) and not refresh_steps
    return FrozenModels(
        has_kl=has_kl,
        has_reference=has_kl or scores_with_reference,
        refresh_steps=refresh_steps,
        reference_is_policy=config.actor_rollout_ref.model.lora_rank > 0,
    )
