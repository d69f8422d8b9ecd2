"""A training loop on the CPU that continues where it was stopped."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from serving.files import replacing_file

_WARMUP = 0.06
_FLOOR = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How long and how fast a model is trained."""

    steps: int
    rate: float
    """Peak learning rate of AdamW."""
    save_every: int = 50

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate: linear warm-up, then linear decay."""
        share = step / self.steps
        return (step + 1) / (_WARMUP * self.steps + 1) if share < _WARMUP else max(_FLOOR, 1 - share)


def fit(
    model: torch.nn.Module,
    losses: Callable[[int], Iterator[torch.Tensor]],
    plan: Plan,
    *,
    state: Path,
    title: str,
) -> None:
    """Train in place; `losses(step)` yields the losses of one step, whose sum is minimized.

    A step must depend on its number alone: a run that was stopped continues from `state`. Matrix products run
    in bfloat16 where the CPU has instructions for it; weights stay float32.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    first = _restore(state, model, optimizer)
    model.train()
    started = time.perf_counter()
    smooth: float | None = None
    for step in range(first, plan.steps):
        optimizer.param_groups[0]["lr"] = plan.rate * plan.factor(step)
        total = 0.0
        for loss in losses(step):
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = total if smooth is None else 0.95 * smooth + 0.05 * total
        done = step + 1
        if done % 10 == 0 or done == plan.steps:
            each = (time.perf_counter() - started) / (done - first)
            left = each * (plan.steps - done) / 60
            print(
                f"{title}: step {done} of {plan.steps}, loss {smooth:.4f}, {each:.1f} s each, "
                f"{left:.0f} minutes left",
                file=sys.stderr,
            )
        if done % plan.save_every == 0 or done == plan.steps:
            kept = {"step": done, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            with replacing_file(state) as partial:
                torch.save(kept, partial)
    model.eval()


def _restore(state: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load what was saved, and return how many steps were done."""
    with suppress(FileNotFoundError):
        kept = torch.load(state, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        return int(kept["step"])
    return 0
