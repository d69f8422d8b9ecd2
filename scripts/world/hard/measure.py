"""What must be true of the hard world, measured: what the models can do, and what they do at the start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path
from random import Random
from statistics import fmean, quantiles

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from IG.doctor.questions import Scenario
from search_r1.search.dense import DenseRetriever
from serving.processes import ProcessGuard
from world import entailment, evaluation, making
from world.evaluation import Episode
from world.hard import corpus, models, text
from world.hard.facts import Problem, World
from world.hard.traces import Scene

GROUP = 5
"""Episodes of a question in the trainer's recipe."""
CHUNK = 600
"""Episodes that are sampled together, which bounds memory."""


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is sampled, and the limits of an episode."""

    samples: int = 5
    deep_questions: int = 40
    deep_samples: int = 64
    output_tokens: int = 64
    max_searches: int = corpus.MAX_SEARCHES
    gain_samples: int = 32


LIMITS: dict[tuple[str, str], tuple[float, float]] = {
    ("policy_sampled", "em"): (0.02, 0.10),
    ("policy_sampled", "all_wrong_share"): (0.60, 1.0),
    ("policy_sampled", "pass_at_64"): (0.5, 1.0),
    ("able_greedy", "em"): (0.85, 1.0),
    ("gain", "first_mean"): (0.05, 0.4),
    ("gain", "all_mean"): (0.6, 1.0),
    ("gain", "rest_mean"): (-0.1, 0.6),
    ("gain", "random_mean"): (-0.1, 0.05),
    ("encoder", "good_query_rank1"): (0.9, 1.0),
    ("entailment", "aliases_both_ways"): (0.95, 1.0),
    ("entailment", "unequal_refused"): (0.95, 1.0),
    ("evidence", "auc"): (0.8, 1.0),
}
"""Least and largest value of each figure that `--check` looks at."""


SCENARIOS = {
    "first": Scenario.first,
    "rest": Scenario.rest,
    "all": Scenario.supporting,
    "random": Scenario.random,
}
"""What is read, as the doctor names it: documents of the first hop, of all others, of all hops, of others."""


def measure_encoder(retriever: DenseRetriever, world: World, *, seed: int) -> dict[str, float]:
    """Return the share of facts whose passage a good query finds, and one without the person's country."""
    stated = [fact for fact in world.facts if fact not in world.only_in_records]
    chosen = Random(f"measure {seed}").sample(stated, min(400, len(stated)))
    good = evaluation.search(retriever, [text.query(f.relation.name, f.subject) for f in chosen], topk=3)
    bare = evaluation.search(retriever, [f"{f.relation.name} of {f.subject.short}" for f in chosen], topk=3)
    lines = [text.write_fact(fact) for fact in chosen]
    kept = list(world.records.items())[:200]
    found = evaluation.search(retriever, [text.query(text.RECORDS, subject) for subject, _ in kept], topk=1)
    records = [text.write_records(subject, stated) for subject, stated in kept]
    return {
        "good_query_rank1": fmean(line == row[0] for line, row in zip(lines, good, strict=True)),
        "good_query_top3": fmean(line in row for line, row in zip(lines, good, strict=True)),
        "bare_query_rank1": fmean(line == row[0] for line, row in zip(lines, bare, strict=True)),
        "records_rank1": fmean(line == row[0] for line, row in zip(records, found, strict=True)),
    }


def measure_entailment(folder: Path, *, seed: int, count: int = 300) -> dict[str, float]:
    """Return the shares of answers whose forms entail each other both ways, and whose rivals never do."""
    judge = AutoModelForSequenceClassification.from_pretrained(folder)
    words = AutoTokenizer.from_pretrained(folder)
    rng = Random(f"measure entailment {seed}")
    equal: list[tuple[str, str]] = []
    unequal: list[tuple[str, str]] = []
    for _ in range(count):
        problem = Scene(rng).draw_problem(hops=rng.choice(models.HOPS))
        left, right = (f"{problem.question} {form}" for form in rng.sample(problem.answer.golds, 2))
        other = f"{problem.question} {rng.choice(models.rival(problem.answer, rng).golds)}"
        equal += [(left, right), (right, left)]
        unequal += [(left, other), (other, left)]
    same, different = (entailment.entails(judge, words, pairs) for pairs in (equal, unequal))
    return {
        "aliases_both_ways": fmean(a and b for a, b in zip(same[::2], same[1::2], strict=True)),
        "unequal_refused": fmean(not (a or b) for a, b in zip(different[::2], different[1::2], strict=True)),
    }


def measure_policy(
    folder: Path,
    retriever: DenseRetriever,
    problems: Sequence[Problem],
    effort: Effort,
    *,
    temperature: float,
) -> dict[str, float]:
    """Return exact match, how the episodes went, and, sampled, what groups and many samples find."""
    model, words = making.load_language_model(folder)

    def run(asked: Sequence[Problem]) -> list[Episode]:
        return [
            episode
            for start in range(0, len(asked), CHUNK)
            for episode in evaluation.run_episodes(
                model,
                words,
                retriever,
                asked[start : start + CHUNK],
                temperature=temperature,
                max_new_tokens=effort.output_tokens,
                max_searches=effort.max_searches,
            )
        ]

    if temperature == 0:
        return summarize(run(problems))
    episodes = run([problem for problem in problems for _ in range(effort.samples)])
    deep = run([p for p in problems[: effort.deep_questions] for _ in range(effort.deep_samples)])
    groups = _group(episodes, effort.samples)
    return summarize(episodes) | {
        "all_wrong_share": fmean(not any(group) for group in groups),
        **{
            f"pass_at_{k}": fmean(pass_at(k, group) for group in _group(deep, effort.deep_samples))
            for k in (effort.deep_samples, 8)
            if k <= effort.deep_samples
        },
    }


def _group(episodes: Sequence[Episode], size: int) -> list[list[bool]]:
    correct = [episode.correct for episode in episodes]
    return [correct[start : start + size] for start in range(0, len(correct), size)]


def pass_at(k: int, correct: Sequence[bool]) -> float:
    """Return the probability that k of these samples, drawn without replacement, hold a right one."""
    wrong = len(correct) - sum(correct)
    return 1 - comb(wrong, k) / comb(len(correct), k)


def summarize(episodes: Sequence[Episode]) -> dict[str, float]:
    """Return shares over the episodes and by number of hops."""
    figures = {
        "em": fmean(e.correct for e in episodes),
        "answered_share": fmean(e.answer is not None for e in episodes),
        "no_search_share": fmean(not e.queries for e in episodes),
        "good_first_query_share": fmean(e.queries[:1] == e.good_queries[:1] for e in episodes),
        "all_good_queries_share": fmean(e.well_formed for e in episodes),
        "invalid_share": fmean(e.num_invalid > 0 for e in episodes),
        "searches": fmean(len(e.queries) for e in episodes),
    }
    for hops in models.HOPS:
        chosen = [episode.correct for episode in episodes if len(episode.problem.hops) == hops]
        if chosen:
            figures[f"em_{hops}_hops"] = fmean(chosen)
    return figures


def measure_gains(out: Path, effort: Effort) -> dict[str, float]:
    """Return the gains of documents by the IG service's own estimator, with the world's models."""
    folder = making.make_scratch(out) / "doctor"
    command = [
        *(sys.executable, "-m", "IG", "doctor", "--questions", str(out / "doctor.jsonl")),
        *("--model-path", str(out / "models" / "generator"), "--num-questions", "100000"),
        *("--entailment-model", str(out / "models" / "entailment"), "--out", str(folder)),
        *("--num-generations", str(min(8, effort.gain_samples)), "--max-samples", str(effort.gain_samples)),
        *("--max-new-tokens", "12"),
    ]
    guard = ProcessGuard()
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}  # as many as this task may take
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | threads) as doctor:
        guard.add(doctor.pid)
    guard.close()
    if doctor.returncode != 0:
        raise RuntimeError(f"IG doctor ended with status {doctor.returncode}; its message is above")
    gains = json.loads((folder / "report.json").read_text(encoding="utf-8"))["gains"]
    return {
        f"{name}_{statistic}": value
        for name, scenario in SCENARIOS.items()
        for statistic, value in describe(gains[scenario]).items()
    }


def describe(gains: Sequence[float]) -> dict[str, float]:
    """Return mean and quartiles."""
    low, middle, high = quantiles(gains, n=4)
    return {"mean": fmean(gains), "quartile1": low, "median": middle, "quartile3": high}


def check(figures: making.Figures) -> list[str]:
    """Return a sentence for every figure that is missing or not between its limits.

    The model that can (`able`) is not shipped, so its figures may be missing.
    """
    missed = []
    for (part, name), (low, high) in LIMITS.items():
        if part == "able_greedy" and part not in figures:
            continue
        value = figures.get(part, {}).get(name)
        if value is None or not low <= value <= high:
            shown = "not measured" if value is None else f"{value:g}"
            missed.append(f"{part} {name} is {shown}, expected {low:g} to {high:g}")
    return missed
