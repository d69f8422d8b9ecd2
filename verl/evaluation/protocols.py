"""Evaluation protocols: what a number must have in common with a paper's to be set beside it.

A protocol is the question sets, how many questions each has, the metric, and the settings that the paper
publishes; what it does not publish is left to the user. `evaluation.protocol=NAME` applies the settings;
whatever differs from the protocol in an evaluation under its name is a deviation (protocol_check.py).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from verl.evaluation import published
from verl.evaluation.published import FLASHRAG_SETS, PublishedResult

NO_PROTOCOL = "none"
BROWSECOMP_PLUS = "browsecomp_plus"

_ALIASES = {"tq": "triviaqa", "2wiki": "2wikimultihopqa", "browsecompplus": BROWSECOMP_PLUS}
"""Names of other projects, in lower case and without `-`, `_` and the prefix `searchR1_`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionSet:
    """A question set as papers evaluate it."""

    name: str
    split: str
    """The published file: test, or dev where there are no public test answers."""
    num_questions: int
    num_training: int | None = None
    """Questions that Search-R1 trains on."""


SETS: Mapping[str, QuestionSet] = {
    one.name: one
    for one in (
        QuestionSet(name="nq", split="test", num_questions=3_610, num_training=79_168),
        QuestionSet(name="triviaqa", split="test", num_questions=11_313),
        QuestionSet(name="popqa", split="test", num_questions=14_267),
        QuestionSet(name="hotpotqa", split="dev", num_questions=7_405, num_training=90_447),
        QuestionSet(name="2wikimultihopqa", split="dev", num_questions=12_576),
        QuestionSet(name="musique", split="dev", num_questions=2_417),
        QuestionSet(name="bamboogle", split="test", num_questions=125),
        QuestionSet(name=BROWSECOMP_PLUS, split="test", num_questions=830),
    )
}
"""The seven sets in FlashRAG's files (51,713 questions), as Search-R1 evaluates them, and BrowseComp-Plus."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluationProtocol:
    """What an evaluation under this name has in common with the paper's."""

    name: str
    title: str
    questions: Mapping[str, int]
    """Number of questions of each set."""
    sample: str
    """Which questions these are."""
    metrics: tuple[str, ...]
    """What is reported; the first one is set beside published numbers."""
    settings: Mapping[str, object]
    """Values of the configuration by dotted key."""
    corpus: str
    num_passages: int | None
    """Of the corpus that is searched; None: the web."""
    notes: tuple[str, ...] = ()
    published: Sequence[PublishedResult] = field(default=())

    @property
    def is_sample(self) -> bool:
        """Return whether the questions are some of a set, which their number does not identify."""
        return any(count < SETS[name].num_questions for name, count in self.questions.items())


_ALL_QUESTIONS = {name: SETS[name].num_questions for name in FLASHRAG_SETS}
_ALL = "all questions: test, else dev (scripts/prepare_data.py)"
_WIKI = "wiki-18, the 21,015,324 passages that Search-R1 publishes"
_NUM_WIKI = 21_015_324
_GREEDY: Mapping[str, object] = {"evaluation.n": 1, "evaluation.temperature": 0.0}
_SEARCH_R1: Mapping[str, object] = {
    "agent.format": "search_r1",
    "agent.tools": ["search"],
    "agent.context": "end",
    "retriever.topk": 3,
    "reward.answer_rule": "published",
    "data.max_start_length": 2048,
    "data.max_prompt_length": 4096,
    "data.max_response_length": 500,
    "data.max_obs_length": 500,
    **_GREEDY,
}

PROTOCOLS: Mapping[str, EvaluationProtocol] = {
    one.name: one
    for one in (
        EvaluationProtocol(
            name="search_r1",
            title="Search-R1 (2503.09516)",
            questions=_ALL_QUESTIONS,
            sample=_ALL,
            metrics=("em",),
            settings={**_SEARCH_R1, "max_turns": 4},
            corpus=_WIKI,
            num_passages=_NUM_WIKI,
            notes=(
                "Four searches as in the paper; its scripts in other places have 2. The wording of the "
                "instruction is ours unless the questions bring a prompt.",
                "Search-R1's loop cuts the beginning of a context beyond 4096 tokens, here the episode ends.",
            ),
            published=published.SEARCH_R1,
        ),
        EvaluationProtocol(
            name="inforeasoner",
            title="InfoReasoner",
            questions=_ALL_QUESTIONS,
            sample=_ALL,
            metrics=("em",),
            settings={**_SEARCH_R1, "max_turns": 2},
            corpus=_WIKI,
            num_passages=_NUM_WIKI,
            notes=(
                "Its numbers for TriviaQA, PopQA, HotpotQA, 2WikiMultihopQA and MuSiQue are all multiples of "
                "0.002, as those of 500 questions are. No sample is published, so all questions are asked.",
            ),
            published=published.INFOREASONER,
        ),
        EvaluationProtocol(
            name="igpo",
            title="IGPO (2510.14967)",
            questions={name: min(512, size) for name, size in _ALL_QUESTIONS.items()},
            sample="the 3,197 questions of data/test.parquet in IGPO's repository, up to 512 of each set",
            metrics=("set_f1",),
            settings={
                "agent.format": "igpo",
                "agent.tools": ["search"],
                "agent.context": "end",
                "reward.answer_rule": "published",
                "retriever.topk": 5,
                "max_turns": 9,
                "data.max_prompt_length": 30_767,
                "data.max_response_length": 2_000,
                **_GREEDY,
            },
            corpus="the web (Google by Serper, the first 5 results of each query)",
            num_passages=None,
            notes=(
                "Ten completions, as IGPO's max_turns=10. The wording of the instruction is ours.",
                "The web changes: record the searches (--online_cache) to repeat an evaluation.",
            ),
            published=published.IGPO,
        ),
        EvaluationProtocol(
            name="review",
            title="agents of several papers under equal conditions; defined by this project, by no paper",
            questions=_ALL_QUESTIONS,
            sample=_ALL,
            metrics=("em", "f1"),
            settings={
                "agent.tools": ["search"],
                "agent.context": "end",
                "retriever.topk": 3,
                "max_turns": 5,
                "reward.answer_rule": "published",
                "data.max_start_length": 2048,
                "data.max_prompt_length": 8192,
                "data.max_response_length": 500,
                "data.max_obs_length": 500,
                **_GREEDY,
            },
            corpus=_WIKI,
            num_passages=_NUM_WIKI,
            notes=(
                "Each agent keeps its own format (agent.format). Five searches are the most that Search-R1, "
                "AutoRefine and IG-Search publish; the context has room for all of them.",
                "The published numbers are those of the papers' own conditions.",
            ),
            published=published.REVIEW,
        ),
        EvaluationProtocol(
            name=BROWSECOMP_PLUS,
            title="BrowseComp-Plus (2508.06600)",
            questions={BROWSECOMP_PLUS: SETS[BROWSECOMP_PLUS].num_questions},
            sample="all questions",
            metrics=("judge",),
            settings={"retriever.topk": 5, "data.max_obs_length": 2560, "evaluation.n": 1},
            corpus="the 100,195 documents of Tevatron/browsecomp-plus-corpus",
            num_passages=100_195,
            notes=(
                "Theirs cuts each of the 5 documents at 512 tokens, here the observation is cut at 5 x 512. "
                "Turns and sampling are not prescribed.",
                "Accuracy is the verdict of their evaluator on the files in browsecomp_plus/; our judge has "
                "another prompt.",
            ),
            published=published.BROWSECOMP_PLUS,
        ),
    )
}


def find_set(data_source: str) -> str | None:
    """Return the name of a set by the name that this or another project gives it; None for any other."""
    plain = re.sub(r"^searchr1_", "", data_source.lower())
    name = _ALIASES.get(re.sub("[-_]", "", plain), plain)
    return name if name in SETS else None
