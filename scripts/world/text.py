"""Every text of the world: passages, questions, the prompt, observations, the short-answer prompt.

The formats of the agent loop and of the services are repeated here on purpose (this script must run without
them); the tests of the agent loop compare the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from world.facts import Entity, Fact, Kind, Relation

TAGS = (
    "<think>",
    "</think>",
    "<search>",
    "</search>",
    "<information>",
    "</information>",
    "<answer>",
    "</answer>",
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

INSTRUCTION = (
    "Reason in <think> </think>. To look something up, write <search> query </search>; what is found comes "
    "back in <information> </information>. When sure, write <answer> answer </answer>.\n"
)

INVALID_ACTION = (
    "\nMy previous action is invalid. To search, I must put the query between <search> and </search>. "
    "To answer, I must put the answer between <answer> and </answer>. Let me try again.\n"
)

FILLERS: dict[Kind, tuple[str, ...]] = {
    Kind.town: (
        "It lies near the coast.",
        "The old market is still held there.",
        "A plaque marks the house.",
        "It is known for its mills.",
    ),
    Kind.person: (
        "They first met in the spring.",
        "The papers wrote about it at length.",
        "It was made public years later.",
        "Few people knew it then.",
    ),
    Kind.university: (
        "The library keeps the letters.",
        "The records name three teachers.",
        "A portrait hangs in the hall.",
        "The course took four years.",
    ),
    Kind.award: (
        "The ceremony was held in autumn.",
        "The jury was of one mind.",
        "It came with a small sum.",
        "It was given for early work.",
    ),
    Kind.instrument: (
        "Some early recordings survive.",
        "Lessons began at the age of six.",
        "It was a gift from an uncle.",
        "Concerts were given each year.",
    ),
    Kind.firm: (
        "The contract was signed in winter.",
        "Both sides were pleased with it.",
        "The deal was renewed twice.",
        "It remained so for years.",
    ),
}


@dataclass(frozen=True, slots=True)
class Passage:
    title: str
    body: str

    @property
    def contents(self) -> str:
        """The form of a wiki-18 corpus line."""
        return f'"{self.title}"\n{self.body}'


def statement(fact: Fact) -> str:
    """The sentence that says a fact, without the full stop, as a thought says it."""
    return f"The {fact.relation.name} of {fact.subject.name} is {fact.value.name}"


def passage(fact: Fact, rng: Random) -> Passage:
    filler = rng.choice(FILLERS[fact.relation.value])
    body = f"The {fact.relation.name} of {fact.subject.name} is {fact.value.printed}. {filler}"
    return Passage(fact.subject.name, body)


def query(relation: Relation, subject: Entity) -> str:
    """The good query for a fact."""
    return f"{relation.name} of {subject.name}"


def one_hop_question(relation: Relation, subject: Entity, *, wording: int) -> str:
    return relation.wordings[wording].format(x=subject.name)


def two_hop_question(bridge: Relation, subject: Entity, relation: Relation, *, wording: int) -> str:
    return relation.wordings[wording].format(x=f"the {bridge.name} of {subject.name}")


def prompt(question: str) -> str:
    """The user message."""
    return f"{INSTRUCTION}Question: {question}\n"


def chat(user: str) -> str:
    """The user message as the chat template renders it, with the generation prompt."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def documents(passages: Sequence[Passage]) -> str:
    lines = [f'Doc {k}(Title: "{p.title}") {p.body}\n' for k, p in enumerate(passages, start=1)]
    return "".join(lines).strip()


def observation(passages: Sequence[Passage]) -> str:
    return f"\n\n<information>{documents(passages)}</information>\n\n"


def short_answer_prompt(question: str, *, context: str) -> str:
    """The prompt of the IG service."""
    given = f"Context: {context}\n" if context else ""
    return f"Answer the following question as briefly as possible.\n{given}Question: {question}\nAnswer:"


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
