"""The agent loop in one process, to measure what a policy does and can: same texts, no services."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import Qwen2ForCausalLM, Qwen2Tokenizer

from verl.utils.reward_score.qa_em import exact_match
from world import text
from world.encoder import Index
from world.traces import Problem

MAX_TURNS = 3
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


@dataclass(slots=True)
class Episode:
    problem: Problem
    ids: list[int]
    outputs: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)
    num_invalid: int = 0
    answer: str | None = None
    done: bool = False

    @property
    def correct(self) -> bool:
        return self.answer is not None and exact_match(self.answer, self.problem.answer.golds) == 1.0

    @property
    def well_formed(self) -> bool:
        """Every hop was asked for with the good query, in order, and nothing else was searched."""
        wanted = [text.query(fact.relation, fact.subject) for fact in self.problem.hops]
        return self.queries == wanted and self.answer is not None

    @property
    def good_so_far(self) -> bool:
        """The first search was the good one (the ability to go on from there is what is asked)."""
        first = self.problem.hops[0]
        return bool(self.queries) and self.queries[0] == text.query(first.relation, first.subject)


@torch.inference_mode()
def generate(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    contexts: Sequence[Sequence[int]],
    *,
    temperature: float,
    stop_ids: Sequence[int],
    max_new_tokens: int,
) -> list[list[int]]:
    """Continue each context up to a stop token, which is kept. Temperature 0 is greedy."""
    pad = tokenizer.pad_token_id
    longest = max(len(context) for context in contexts)
    ids = torch.tensor([[pad] * (longest - len(context)) + list(context) for context in contexts])
    mask = torch.tensor([[0] * (longest - len(context)) + [1] * len(context) for context in contexts])
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        eos_token_id=list(stop_ids),
        pad_token_id=pad,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    rows = []
    for row in made[:, longest:].tolist():
        stop = next((k + 1 for k, token in enumerate(row) if token in stop_ids), len(row))
        rows.append(row[:stop])
    return rows


def run_episodes(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    index: Index,
    problems: Sequence[Problem],
    *,
    temperature: float,
    max_new_tokens: int = 64,
) -> list[Episode]:
    def encode(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False))

    episodes = [Episode(p, encode(text.chat(text.prompt(p.question)))) for p in problems]
    stop_ids = [*encode("</search>"), *encode("</answer>"), tokenizer.eos_token_id]
    for turn in range(MAX_TURNS + 1):
        active = [episode for episode in episodes if not episode.done]
        if not active:
            break
        contexts = [episode.ids for episode in active]
        outputs = generate(
            model,
            tokenizer,
            contexts,
            temperature=temperature,
            stop_ids=stop_ids,
            max_new_tokens=max_new_tokens,
        )
        searching: list[Episode] = []
        for episode, output in zip(active, outputs, strict=True):
            episode.ids = episode.ids + output
            episode.outputs.append(tokenizer.decode(output))
            if _act(episode, last=turn == MAX_TURNS):
                searching.append(episode)
            elif not episode.done:
                episode.ids = episode.ids + encode(text.INVALID_ACTION)
        found = index.search([episode.queries[-1] for episode in searching])
        for episode, passages in zip(searching, found, strict=True):
            episode.ids = episode.ids + encode(text.observation(passages))
    return episodes


def _act(episode: Episode, *, last: bool) -> bool:
    """Take the action of the newest output; True if it was a search."""
    action = ACTION.search(episode.outputs[-1])
    if action is None:
        episode.num_invalid += 1
        episode.done = last
        return False
    kind, content = action.group(1), action.group(2).strip()
    if kind == "answer":
        episode.answer, episode.done = content, True
        return False
    if last:
        episode.done = True
        return False
    episode.queries.append(content)
    return True


def summarise(episodes: Sequence[Episode]) -> dict[str, float]:
    """Shares in [0, 1] over the episodes, and of the parts that matter."""

    def em(chosen: Sequence[Episode]) -> float:
        return sum(e.correct for e in chosen) / len(chosen) if chosen else float("nan")

    one = [e for e in episodes if len(e.problem.hops) == 1]
    two = [e for e in episodes if len(e.problem.hops) == 2]
    good = [e for e in episodes if e.well_formed]
    return {
        "em": em(episodes),
        "em_one_hop": em(one),
        "em_two_hop": em(two),
        "good_form_share": len(good) / len(episodes),
        "good_form_share_one_hop": sum(e.well_formed for e in one) / len(one),
        "good_form_share_two_hop": sum(e.well_formed for e in two) / len(two),
        "em_given_good_form": em(good),
        "good_first_query_share": sum(e.good_so_far for e in episodes) / len(episodes),
        "answered_share": sum(e.answer is not None for e in episodes) / len(episodes),
        "no_search_share": sum(not e.queries for e in episodes) / len(episodes),
        "invalid_share": sum(e.num_invalid > 0 for e in episodes) / len(episodes),
        "searches": sum(len(e.queries) for e in episodes) / len(episodes),
    }
