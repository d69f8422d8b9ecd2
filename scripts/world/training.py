"""The training loop of all models, and batches of traces for the two language models."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, Qwen2ForCausalLM

from serving.machine import has_bfloat16
from world.muon import Muon
from world.side_by_side import use_free_cores
from world.traces import Piece

IGNORED = -100
HIDDEN_LAYER = re.compile(r"\.layers?\.\d+\.")
POOL_SIZE = 512
"""Traces that are drawn and sorted by length together: with 128, a quarter of a batch was padding."""

Batch = tuple[torch.Tensor, torch.Tensor]
"""Ids and labels, both int64 [B, L] and right-padded; a label is the next token or IGNORED."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps and peak learning rates: Muon trains the hidden matrices, AdamW all other weights."""

    steps: int
    matrix_rate: float = 0.02
    vector_rate: float = 3e-3
    warmup: float = 0.05
    floor: float = 0.02

    def factor(self, step: int) -> float:
        """Return the share of the peak learning rate: linear warm-up, then linear decay."""
        share = step / self.steps
        if share < self.warmup:
            return (step + 1) / (self.warmup * self.steps + 1)
        return max(self.floor, (1 - share) / (1 - self.warmup))


def encode(tokenizer: PreTrainedTokenizerBase, traces: Sequence[Sequence[Piece]]) -> list[Batch]:
    """Return ids and labels [L] of each trace; pieces are tokenized one by one, as the agent does."""
    texts = [piece.text for trace in traces for piece in trace]
    encoded = iter(tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False))
    rows = []
    for trace in traces:
        ids: list[int] = []
        targets: list[int] = []
        for piece in trace:
            piece_ids = next(encoded).ids
            ids += piece_ids
            targets += piece_ids if piece.written else [IGNORED] * len(piece_ids)
        rows.append((torch.tensor(ids), torch.tensor([*targets[1:], IGNORED])))
    return rows


def batches(
    tokenizer: PreTrainedTokenizerBase, draw: Callable[[], Sequence[Piece]], *, tokens: int
) -> Iterator[Batch]:
    """Yield batches of about `tokens` tokens without end; a pool is sorted by length to pad little."""
    while True:
        rows = sorted(encode(tokenizer, [draw() for _ in range(POOL_SIZE)]), key=lambda row: len(row[0]))
        groups: list[list[Batch]] = []
        for row in rows:
            if groups and len(row[0]) * (len(groups[-1]) + 1) <= tokens:
                groups[-1].append(row)
            else:
                groups.append([row])
        for index in torch.randperm(len(groups)).tolist():
            yield collate(groups[index], pad=tokenizer.pad_token_id)


def collate(rows: Sequence[Batch], *, pad: int) -> Batch:
    """Pad rows to the length of the longest."""
    ids, labels = zip(*rows, strict=True)
    padded = pad_sequence(ids, batch_first=True, padding_value=pad)
    return padded, pad_sequence(labels, batch_first=True, padding_value=IGNORED)


def train_language_model(
    model: Qwen2ForCausalLM, stream: Iterator[Batch], schedule: Schedule, *, title: str
) -> None:
    """Train in place on the mean cross-entropy of the written tokens."""

    def next_loss(_: int) -> torch.Tensor:
        ids, labels = next(stream)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
        chosen = labels != IGNORED
        logits = model.lm_head(hidden[chosen])  # only those that the loss needs
        return torch.nn.functional.cross_entropy(logits.float(), labels[chosen])

    train(model, next_loss, schedule, title=title)


def train(
    model: torch.nn.Module, next_loss: Callable[[int], torch.Tensor], schedule: Schedule, *, title: str
) -> None:
    """Train in place and print the smoothed loss now and then; `next_loss(step)` draws a batch.

    Matrix products run in bfloat16 (weights stay float32) where the CPU has instructions for it.
    """
    model.train()
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and HIDDEN_LAYER.search(name)]
    chosen = {id(p) for p in matrices}
    vectors = [p for p in model.parameters() if id(p) not in chosen]
    peaks = {
        Muon(matrices): schedule.matrix_rate,
        torch.optim.AdamW(vectors, betas=(0.9, 0.98), weight_decay=0.0, fused=True): schedule.vector_rate,
    }
    smooth, in_bfloat16 = 0.0, has_bfloat16()
    for step in range(schedule.steps):
        use_free_cores()
        for optimizer, peak in peaks.items():
            optimizer.param_groups[0]["lr"] = peak * schedule.factor(step)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bfloat16):
            loss = next_loss(step)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in peaks:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        smooth = value if step == 0 else 0.95 * smooth + 0.05 * value
        if step % max(1, schedule.steps // 20) == 0:
            print(f"{title}: step {step} of {schedule.steps}, loss {smooth:.4f}", file=sys.stderr)
    model.eval()
