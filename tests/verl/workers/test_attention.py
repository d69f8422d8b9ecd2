from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.verl.test_forest import paths_of
from tests.verl.workers.test_tree_log_probs import random_tree
from verl.branches import pack
from verl.forest import Forest
from verl.workers.attention import AttentionBlocks, attend_by_flash, attend_by_sdpa, varlen_arguments
from verl.workers.batch import pack_whole

CPU = torch.device("cpu")


@pytest.fixture(params=["trees", "rows"])
def forest(request: pytest.FixtureRequest) -> Forest:
    rng = np.random.default_rng(5)
    trees = [random_tree(rng, turns=turns) for turns in (3, 1)]
    return pack(trees) if request.param == "trees" else pack_whole(trees[0].trunk)


def heads(forest: Forest) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values; two query heads for each of keys."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, count, len(forest.ids), 8, requires_grad=True) for count in (4, 2, 2))
    return query, key, value


def attend_one_by_one(forest: Forest, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax over the keys that each token attends to [1, T, heads, D]."""
    results = []
    for column, path in enumerate(paths_of(forest)):
        columns = torch.tensor(path).long()
        of_token = []
        for head in range(query.shape[1]):
            scores = key[0, head // 2, columns] @ query[0, head, column] / math.sqrt(query.shape[-1])
            of_token.append(scores.softmax(0) @ value[0, head // 2, columns])
        results.append(torch.stack(of_token))
    return torch.stack(results)[None]


def varlen_reference(
    *,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` documents, which needs a GPU: [tokens, heads, D]."""
    assert window_size == (-1, 0)  # causal
    assert enable_gqa
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    results = []
    borders = zip(
        *(x.tolist() for x in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], cu_seq_k[1:])), strict=True
    )
    for q_begin, q_end, k_begin, k_end in borders:
        keys, values = (x[k_begin:k_end].repeat_interleave(2, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query[q_begin:q_end], keys) / math.sqrt(query.shape[-1])
        offset = (k_end - k_begin) - (q_end - q_begin)  # the last query is that of the last key
        visible = torch.ones(q_end - q_begin, k_end - k_begin, dtype=torch.bool).tril(offset)
        scores = scores.masked_fill(~visible, -torch.inf)
        results.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), values))
    return torch.cat(results)


def test_both_kernels_attend_to_the_path_of_each_token(forest: Forest) -> None:
    query, key, value = heads(forest)
    blocks = AttentionBlocks(forest, device=CPU)
    expected = attend_one_by_one(forest, query, key, value)
    by_sdpa, _ = attend_by_sdpa(nn.Identity(), query, key, value, None, blocks=blocks)
    by_varlen = varlen_reference(**varlen_arguments(query, key, value, blocks=blocks))[None]
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad((expected * weights).sum(), (query, key, value))
    for result in (by_sdpa, by_varlen):
        torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-5)
        got = torch.autograd.grad((result * weights).sum(), (query, key, value))
        torch.testing.assert_close(got, gradients, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlashAttention needs a GPU")
def test_flash_attention_equals_sdpa(forest: Forest) -> None:
    device = torch.device("cuda")
    heads_of = [x.detach().to(device, torch.bfloat16).requires_grad_() for x in heads(forest)]
    blocks = AttentionBlocks(forest, device=device)
    results, gradients = [], []
    for attend in (attend_by_flash, attend_by_sdpa):
        result, _ = attend(nn.Identity(), *heads_of, None, blocks=blocks)
        results.append(result)
        gradients.append(torch.autograd.grad(result.float().square().sum(), heads_of))
    torch.testing.assert_close(results[0], results[1], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(gradients[0], gradients[1], atol=5e-2, rtol=5e-2)


@pytest.mark.parametrize("settings", [{"softcap": 30.0}, {"s_aux": torch.ones(4)}, {"sliding_window": 8}])
def test_an_attention_that_is_not_computed_is_refused(settings: dict[str, Any]) -> None:
    forest = pack_whole(np.arange(9, dtype=np.int32))
    query, key, value = heads(forest)
    blocks = AttentionBlocks(forest, device=CPU)
    (name,) = settings
    with pytest.raises(ValueError, match=f"Identity asks for attention with .*{name}"):
        attend_by_sdpa(nn.Identity(), query, key, value, None, blocks=blocks, **settings)
    attend_by_sdpa(nn.Identity(), query, key, value, None, blocks=blocks, sliding_window=9, softcap=None)
