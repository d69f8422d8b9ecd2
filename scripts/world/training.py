"""The training loop of all four models, and batches of traces for the two language models."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from world.traces import Piece

IGNORED = -100
HIDDEN_LAYER = re.compile(r"\.layers?\.\d+\.")


@dataclass(frozen=True, slots=True)
class Batch:
    ids: torch.Tensor  # [B, L] int64, right-padded
    labels: torch.Tensor  # [B, L] int64, the next token or IGNORED


@dataclass(frozen=True, slots=True)
class Schedule:
    steps: int
    matrix_rate: float = 0.02
    """Peak learning rate of Muon (hidden matrices)."""
    vector_rate: float = 3e-3
    """Peak learning rate of AdamW (embeddings, output matrix, biases, norms)."""
    warmup: float = 0.05
    floor: float = 0.02


def encode(
    tokenizer: Qwen2Tokenizer, traces: Sequence[Sequence[Piece]]
) -> list[tuple[list[int], list[bool]]]:
    """Ids and "written by the policy" of each trace; pieces are tokenised one by one, as the agent does."""
    texts = [piece.text for trace in traces for piece in trace]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    rows = []
    for trace in traces:
        ids: list[int] = []
        written: list[bool] = []
        for piece in trace:
            piece_ids = next(encoded).ids
            ids += piece_ids
            written += [piece.written] * len(piece_ids)
        rows.append((ids, written))
    return rows


def collate(rows: Sequence[tuple[list[int], list[bool]]], *, pad: int) -> Batch:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), pad, dtype=torch.long)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for index, (row, written) in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        targets = [token if mine else IGNORED for token, mine in zip(row[1:], written[1:], strict=True)]
        labels[index, : len(targets)] = torch.tensor(targets)
    return Batch(ids, labels)


def batches(
    tokenizer: Qwen2Tokenizer, draw: Callable[[], Sequence[Piece]], *, tokens: int
) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens; a pool is sorted by length so that little is padding."""
    while True:
        rows = sorted(encode(tokenizer, [draw() for _ in range(128)]), key=lambda row: len(row[0]))
        start = 0
        ready: list[Batch] = []
        while start < len(rows):
            stop = start + 1
            while stop < len(rows) and len(rows[stop][0]) * (stop + 1 - start) <= tokens:
                stop += 1
            ready.append(collate(rows[start:stop], pad=tokenizer.pad_token_id))
            start = stop
        order = torch.randperm(len(ready)).tolist()
        yield from (ready[index] for index in order)


def loss_of(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy of the written tokens; logits are made for those only."""
    hidden = model.model(input_ids=batch.ids, use_cache=False).last_hidden_state
    chosen = batch.labels != IGNORED
    logits = model.lm_head(hidden[chosen])
    return torch.nn.functional.cross_entropy(logits.float(), batch.labels[chosen])


def optimizers(model: torch.nn.Module, schedule: Schedule) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and HIDDEN_LAYER.search(name)]
    chosen = {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=schedule.matrix_rate, weight_decay=0.01),
        torch.optim.AdamW(vectors, lr=schedule.vector_rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def factor(step: int, schedule: Schedule) -> float:
    """One-cycle factor: linear warm-up, then linear decay."""
    share = step / schedule.steps
    if share < schedule.warmup:
        return (step + 1) / (schedule.warmup * schedule.steps + 1)
    return max(schedule.floor, (1 - share) / (1 - schedule.warmup))


def train(
    model: torch.nn.Module,
    next_loss: Callable[[int], torch.Tensor],
    schedule: Schedule,
    *,
    report: Callable[[int, float], None],
) -> None:
    """Train in place; `next_loss(step)` draws a batch, `report(step, smoothed loss)` hears of every step.

    Matrix products run in bfloat16 (weights stay float32), much faster where the CPU has instructions for it.
    """
    model.train()
    chosen = optimizers(model, schedule)
    smooth = 0.0
    for step in range(schedule.steps):
        scale = factor(step, schedule)
        chosen[0].param_groups[0]["lr"] = schedule.matrix_rate * scale
        chosen[1].param_groups[0]["lr"] = schedule.vector_rate * scale
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = next_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        smooth = value if step == 0 else 0.95 * smooth + 0.05 * value
        report(step, smooth)
    model.eval()


def train_language_model(
    model: Qwen2ForCausalLM,
    stream: Iterator[Batch],
    schedule: Schedule,
    *,
    report: Callable[[int, float], None],
) -> None:
    train(model, lambda _: loss_of(model, next(stream)), schedule, report=report)
