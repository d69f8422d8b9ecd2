"""What the models can do: figures of the manifest, measured without services."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from statistics import fmean

import torch
from transformers import GenerationConfig, Qwen2ForCausalLM, Qwen2Tokenizer

from search_r1.search.dense import DenseRetriever
from verl.utils.reward_score.qa_em import exact_match
from world import text
from world.asking import Asked
from world.facts import Entity, Fact
from world.traces import Problem

MAX_SEARCHES = 3
ACTION = re.compile(r"<(search|answer)>(.*?)</\1>", re.DOTALL)


def search(retriever: DenseRetriever, queries: Sequence[str], *, topk: int = 3) -> list[list[str]]:
    """Return the best passages for each query, best first."""
    return [[hit.document.contents for hit in hits] for hits in retriever.search(queries, topk=topk)]


def measure_encoder(retriever: DenseRetriever, facts: Sequence[Fact], *, seed: int) -> dict[str, float]:
    """Return the share of facts whose passage each kind of query finds, among the first 1 or 3."""
    rng = Random(f"measure {seed}")
    chosen = rng.sample(list(facts), min(400, len(facts)))

    def share(make: Callable[[Fact], str], topk: int) -> float:
        found = search(retriever, [make(fact) for fact in chosen], topk=topk)
        starts = [f"\n{text.statement(fact, '')}" for fact in chosen]
        return fmean(any(start in line for line in row) for start, row in zip(starts, found, strict=True))

    return {
        "good_query_rank1": share(lambda f: text.query(f.relation, f.subject), 1),
        "question_rank1": share(lambda f: text.question([f.relation], f.subject, wording=0), 1),
        "last_word_top3": share(lambda f: f.subject.name.split()[-1], 3),
        "relation_only_top3": share(lambda f: f.relation.name, 3),
        "subject_only_top3": share(lambda f: f.subject.name, 3),
    }


@dataclass(slots=True)
class Episode:
    """One question and what the policy does with it."""

    problem: Asked
    ids: list[int]
    queries: list[str] = field(default_factory=list)
    num_invalid: int = 0
    answer: str | None = None
    done: bool = False

    @property
    def good_queries(self) -> list[str]:
        """The good query of every hop."""
        return [text.query(fact.relation, fact.subject) for fact in self.problem.hops]

    @property
    def well_formed(self) -> bool:
        """Whether the episode searched with the good query of every hop, in order, for nothing else."""
        return self.queries == self.good_queries and self.answer is not None

    @property
    def correct(self) -> bool:
        return self.answer is not None and exact_match(self.answer, self.problem.answer.golds) == 1.0

    def act(self, output: str, *, last: bool) -> bool:
        """Take the action of an output; return whether it was a search. The last turn ends the episode."""
        action = ACTION.search(output)
        self.done = last
        if action is None:
            self.num_invalid += 1
        elif action[1] == "answer":
            self.answer, self.done = action[2].strip(), True
        elif not last:
            self.queries.append(action[2].strip())
            return True
        return False


def run_episodes(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    retriever: DenseRetriever,
    problems: Sequence[Asked],
    *,
    temperature: float,
    max_new_tokens: int = 64,
    max_searches: int = MAX_SEARCHES,
) -> list[Episode]:
    """Run the agent loop on all problems at once. Temperature 0 is greedy."""

    def encode(words: str) -> list[int]:
        return list(tokenizer.encode(words, add_special_tokens=False))

    sampling = {"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = GenerationConfig(
        do_sample=temperature > 0,
        eos_token_id=[*encode("</search>"), *encode("</answer>"), tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    episodes = [Episode(p, encode(text.chat(text.prompt(p.question)))) for p in problems]
    for turn in range(max_searches + 1):
        active = [episode for episode in episodes if not episode.done]
        if not active:
            break
        outputs = _generate(model, tokenizer, [episode.ids for episode in active], settings)
        searching: list[Episode] = []
        for episode, output in zip(active, outputs, strict=True):
            episode.ids += output
            if episode.act(tokenizer.decode(output), last=turn == max_searches):
                searching.append(episode)
            elif not episode.done:
                episode.ids += encode(text.INVALID_ACTION)
        found = search(retriever, [episode.queries[-1] for episode in searching])
        for episode, contents in zip(searching, found, strict=True):
            episode.ids += encode(text.observation(contents))
    return episodes


@torch.inference_mode()
def _generate(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    contexts: Sequence[Sequence[int]],
    settings: GenerationConfig,
) -> list[list[int]]:
    """Continue each context up to a stop token, which is kept."""
    inputs = tokenizer.pad({"input_ids": list(contexts)}, padding_side="left", return_tensors="pt")
    made = model.generate(**inputs, generation_config=settings)
    outputs = []
    for row in made[:, inputs["input_ids"].shape[1] :].tolist():
        stops = (k + 1 for k, token in enumerate(row) if token in settings.eos_token_id)
        outputs.append(row[: next(stops, len(row))])
    return outputs


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return shares in [0, 1] over the episodes and over parts of them, and the mean number of searches."""
    one = [e for e in episodes if len(e.problem.hops) == 1]
    two = [e for e in episodes if len(e.problem.hops) == 2]
    good = [e for e in episodes if e.well_formed]
    return {
        "em": fmean(e.correct for e in episodes),
        "em_one_hop": fmean(e.correct for e in one),
        "em_two_hop": fmean(e.correct for e in two),
        "good_form_share": fmean(e.well_formed for e in episodes),
        "good_form_share_one_hop": fmean(e.well_formed for e in one),
        "good_form_share_two_hop": fmean(e.well_formed for e in two),
        "em_given_good_form": fmean(e.correct for e in good) if good else float("nan"),
        "good_first_query_share": fmean(e.queries[:1] == e.good_queries[:1] for e in episodes),
        "answered_share": fmean(e.answer is not None for e in episodes),
        "no_search_share": fmean(not e.queries for e in episodes),
        "invalid_share": fmean(e.num_invalid > 0 for e in episodes),
        "searches": fmean(len(e.queries) for e in episodes),
    }


@torch.inference_mode()
def belief(
    model: Qwen2ForCausalLM, tokenizer: Qwen2Tokenizer, question: str, answer: Entity, *, context: str
) -> float:
    """Return the probability of the answer in its accepted forms, exactly, without sampling."""
    prompt = tokenizer.encode(text.short_answer_prompt(question, context=context), add_special_tokens=False)
    forms = [tokenizer.encode(f" {gold}\n", add_special_tokens=False) for gold in answer.golds]
    longest = max(map(len, forms))
    ids = torch.tensor([prompt + form + [tokenizer.pad_token_id] * (longest - len(form)) for form in forms])
    log_probs = model(input_ids=ids).logits[:, len(prompt) - 1 : -1].log_softmax(dim=-1)  # [forms, L, V]
    return sum(
        float(row[range(len(form)), form].sum().exp()) for row, form in zip(log_probs, forms, strict=True)
    )


def measure_generator(
    model: Qwen2ForCausalLM,
    tokenizer: Qwen2Tokenizer,
    retriever: DenseRetriever,
    problems: Sequence[Problem],
) -> dict[str, float]:
    """Return the mean belief in the right answer with all, some and no passages of good searches."""
    beliefs: dict[str, list[float]] = {}
    for problem in problems:
        found = search(retriever, [text.query(fact.relation, fact.subject) for fact in problem.hops])
        shown = [text.documents(contents) for contents in found]
        contexts = {"one_hop_none": "", "one_hop_all": shown[0]}
        if len(shown) == 2:
            contexts = {"two_hop_none": "", "two_hop_all": "\n".join(shown), "two_hop_first_only": shown[0]}
        for name, context in contexts.items():
            value = belief(model, tokenizer, problem.question, problem.answer, context=context)
            beliefs.setdefault(f"belief_{name}", []).append(value)
    return {name: fmean(values) for name, values in sorted(beliefs.items())}
