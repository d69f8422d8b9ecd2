"""The policy's warm-up: supervised training on episodes that a teacher plays with agent and retriever."""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM

from real.questions import Problem
from real.training import Plan, fit
from serving.machine import has_bfloat16
from verl.data.dataset import load_questions
from verl.trainer.config.schema import Config
from verl.trainer.wiring import make_format, make_resources, make_tokenizer, make_tools, open_agent
from verl.types import Completion, Finish, IntArray, Question, Sampling, Trajectory

NUM_TRACES = 400
TRACES_PER_STEP = 8
PLAN = Plan(steps=NUM_TRACES // TRACES_PER_STEP, rate=1e-4, save_every=10)
_MICRO_TOKENS = 1600
"""Of a forward pass, padding included."""
_IGNORED = -100


class Teacher:
    """Writes a good episode of a known question: a search for each hop, then the answer that was read."""

    def __init__(self, encode: Callable[[str], list[int]]) -> None:
        self._encode = encode
        self._left: list[str] = []

    def begin(self, problem: Problem) -> None:
        """Prepare the completions of the next episode."""
        self._left = write_completions(problem)

    async def generate(self, prompt_ids: IntArray, *, sampling: Sampling) -> Completion:  # noqa: ARG002
        """Return the next completion."""
        ids = np.asarray(self._encode(self._left.pop(0)), dtype=np.int32)
        return Completion(
            ids=ids, log_probs=np.zeros(len(ids), dtype=np.float32), finish=Finish.STOP, version=0
        )


def write_completions(problem: Problem) -> list[str]:
    """Return what the policy should write, turn by turn."""
    written, thought = [], ""
    for fact, query in zip(problem.hops, problem.queries, strict=True):
        written.append(f"<think> {thought}I need the {query}.</think> <search> {query} </search>")
        asked = (fact.relation.query or fact.relation.phrase).format(x=fact.subject)
        thought = f"The {asked} is {fact.value}. "
    written.append(f"<think> {thought.strip()}</think> <answer> {problem.golds[0]} </answer>")
    return written


async def play_traces(
    config: Config, problems: Sequence[Problem], *, questions: Path, count: int
) -> tuple[list[Trajectory], float]:
    """Return so many episodes in which every search found its passage, and the share of those that did.

    `problems` are the questions of the file, in its order. Raises ValueError for too few.
    """
    resources = make_resources(config)
    tokenizer = make_tokenizer(config)
    tools = make_tools(config, resources)
    prompt_format = make_format(config, tokenizer=tokenizer, tools=tools)
    rows = load_questions([str(questions)], prompt_format=prompt_format, prompt=config.data.prompt)
    teacher = Teacher(tokenizer.encode)
    traces: list[Trajectory] = []
    played = 0
    order = list(range(len(problems)))
    Random("traces").shuffle(order)
    async with open_agent(
        teacher, config=config, resources=resources, temperature=1.0, reference="none"
    ) as agent:
        for number in order:
            if len(traces) == count:
                break
            teacher.begin(problems[number])
            trajectory = await agent.run(_same(rows[number], problems[number]), sample=0, seed=0, greedy=True)
            played += 1
            if _is_found(trajectory, problems[number]):
                traces.append(trajectory)
            if played % 50 == 0:
                print(f"warm-up: {len(traces)} of {count} traces, {played} played", file=sys.stderr)
    if len(traces) < count:
        raise ValueError(f"{len(traces)} episodes found their passages, expected {count}")
    return traces, len(traces) / played


def _same(question: Question, problem: Problem) -> Question:
    assert question.golds == problem.golds, "the questions are not those of the file"
    return question


def _is_found(trajectory: Trajectory, problem: Problem) -> bool:
    """Return whether each search found the passage of its fact, whole."""
    if trajectory.answer is None or len(trajectory.turns) != len(problem.hops) + 1:
        return False
    return all(
        any(f"{passage.title}\n{passage.text}" == fact.contents for passage in turn.passages)
        for turn, fact in zip(trajectory.turns, problem.hops, strict=False)
    )


def train_policy(
    model_folder: Path, traces: Sequence[Trajectory], *, folder: Path, state: Path, plan: Plan = PLAN
) -> None:
    """Train on what the teacher wrote, and write model and tokenizer to `folder`; continues from `state`."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    rows = [encode(trace) for trace in traces]

    in_bfloat16 = has_bfloat16()

    def losses(step: int) -> Iterator[Tensor]:
        start = step * TRACES_PER_STEP % len(rows)
        chosen = sorted(rows[start : start + TRACES_PER_STEP], key=lambda row: len(row[0]))
        total = sum(int((labels != _IGNORED).sum()) for _, labels in chosen)
        for ids, labels in micro_batches(chosen, tokens=_MICRO_TOKENS):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=in_bfloat16):
                hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state  # [B, L, H]
                counted = labels != _IGNORED
                logits = model.lm_head(hidden[counted])  # only those that the loss needs
            loss = torch.nn.functional.cross_entropy(logits.float(), labels[counted], reduction="sum")
            yield loss / total

    fit(model, losses, plan, state=state, title="policy")
    model.save_pretrained(folder)
    for path in model_folder.iterdir():
        if re.match(r"tokenizer|chat_template|special_tokens|vocab|merges", path.name):
            shutil.copy(path, folder / path.name)


def encode(trace: Trajectory) -> tuple[Tensor, Tensor]:
    """Return ids [L] and labels [L], which are the next token where the teacher wrote it."""
    ids = torch.from_numpy(np.asarray(trace.token_ids, dtype=np.int64))
    labels = torch.full_like(ids, _IGNORED)
    written = torch.from_numpy(np.asarray(trace.policy_mask))[1:]
    labels[:-1][written] = ids[1:][written]
    return ids, labels


def micro_batches(rows: Sequence[tuple[Tensor, Tensor]], *, tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows, sorted by length, in right-padded batches [B, L] of at most so many tokens, or one row."""
    start = 0
    while start < len(rows):
        end = start + 1
        while end < len(rows) and len(rows[end][0]) * (end + 1 - start) <= tokens:
            end += 1
        ids, labels = zip(*rows[start:end], strict=True)
        yield (
            pad_sequence(ids, batch_first=True),
            pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
        )
        start = end
