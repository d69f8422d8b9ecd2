"""Muon in float32, on matrices of one shape together.

`torch.optim.Muon` orthogonalizes in bfloat16, matrix by matrix: on a processor without instructions for
bfloat16 that took a third of a training step of these models.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

_MOMENTUM = 0.95
_WEIGHT_DECAY = 0.01
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5
_EPSILON = 1e-7


class Muon(torch.optim.Optimizer):
    """What `torch.optim.Muon` does by default, but for precision and weight decay.

    Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/: the step of a matrix is its Nesterov
    momentum with all singular values near 1, times sqrt(max(1, rows / columns)).
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter]) -> None:
        """Take matrices, each [rows, columns]; the learning rate is set before every step."""
        super().__init__(matrices, {"lr": 0.0})

    @torch.no_grad()
    def step(self) -> None:
        """Take one step from the gradients."""
        for group in self.param_groups:
            by_shape: defaultdict[torch.Size, list[torch.nn.Parameter]] = defaultdict(list)
            for matrix in group["params"]:
                by_shape[matrix.shape].append(matrix)
            for shape, matrices in by_shape.items():
                update = orthogonalize(torch.stack([self._momentum(matrix) for matrix in matrices]))
                scale = math.sqrt(max(1.0, shape[0] / shape[1]))
                torch._foreach_mul_(matrices, 1 - group["lr"] * _WEIGHT_DECAY)
                torch._foreach_add_(matrices, list(update), alpha=-group["lr"] * scale)

    def _momentum(self, matrix: torch.nn.Parameter) -> torch.Tensor:
        assert matrix.grad is not None
        state = self.state[matrix]
        if not state:
            state["momentum"] = torch.zeros_like(matrix)
        momentum: torch.Tensor = state["momentum"].lerp_(matrix.grad, 1 - _MOMENTUM)
        return matrix.grad.lerp(momentum, _MOMENTUM)


def orthogonalize(matrices: torch.Tensor) -> torch.Tensor:
    """Return matrices [N, rows, columns] with the same singular vectors and singular values near 1."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if is_tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if is_tall else x
