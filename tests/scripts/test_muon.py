"""Muon: the same steps as torch's, which orthogonalizes in bfloat16."""

from __future__ import annotations

import torch

from world.muon import Muon, orthogonalize


def test_singular_values_are_near_one_and_vectors_stay() -> None:
    matrices = torch.randn(3, 40, 16, generator=torch.Generator().manual_seed(0))
    for shaped in (matrices, matrices.mT):
        for before, after in zip(shaped, orthogonalize(shaped), strict=True):
            left, _, right = torch.linalg.svd(before, full_matrices=False)
            inside = left.mT @ after @ right.mT
            assert 0.6 < inside.diagonal().min() < inside.diagonal().max() < 1.3
            assert (inside - inside.diagonal().diag()).abs().max() < 1e-4


def test_steps_are_those_of_torch() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((8, 8), (24, 8), (8, 24), (8, 8))
    ours = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    theirs = [torch.nn.Parameter(matrix.detach().clone()) for matrix in ours]
    one, other = Muon(ours), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    start = [matrix.detach().clone() for matrix in ours]
    one.param_groups[0]["lr"] = 0.02
    for _ in range(4):
        for matrix, copy in zip(ours, theirs, strict=True):
            matrix.grad = torch.randn(matrix.shape, generator=generator)
            copy.grad = matrix.grad.clone()
        one.step()
        other.step()
    for before, matrix, copy in zip(start, ours, theirs, strict=True):
        moved = float((copy.detach() - before).norm())
        assert float((matrix - copy).detach().norm()) < 0.02 * moved
