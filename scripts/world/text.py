"""Every text of the world: passages, questions, the prompt.

Observations, the reply to an invalid action and the short-answer prompt are those of the agent loop and the
IG service: the shipped models are trained on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from IG.prompts import PromptType, build_prompt
from verl.agent.formats import FORMATS
from verl.agent.prompts import PACKAGED_FILE, load_texts
from verl.agent.tools.search import render_passages
from verl.types import Passage
from world.asking import Named
from world.facts import Entity, Fact, Kind, Relation

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TAGS = tuple(
    f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")
)

INSTRUCTION = (
    "Reason in <think> </think>. To look something up, write <search> query </search>; what is found comes "
    "back in <information> </information>. When sure, write <answer> answer </answer>.\n"
)

FIXED_TEXTS = load_texts(PACKAGED_FILE, section="search_r1", entries=FORMATS["search_r1"].texts)
INVALID_ACTION = FIXED_TEXTS["retry"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] "
    "+ '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
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
"""Second sentences of passages, by the kind of the fact's value."""


def write_contents(fact: Fact, rng: Random) -> str:
    """Return a corpus line that states a fact and goes on with a random filler."""
    filler = rng.choice(FILLERS[fact.relation.value])
    return f'"{fact.subject.name}"\n{statement(fact, fact.value.printed)}. {filler}'


def statement(fact: Fact, value: str) -> str:
    """Return the sentence that states a fact with this form of its value, without the full stop."""
    return f"The {query(fact.relation, fact.subject)} is {value}"


def query(relation: Named, subject: Named) -> str:
    """Return the query that finds the passage of a fact."""
    return f"{relation.name} of {subject.name}"


def question(relations: Sequence[Relation], subject: Entity, *, wording: int) -> str:
    """Return the question that follows one or two relations, in this order, from a subject."""
    *bridges, last = relations
    asked = f"the {query(bridges[0], subject)}" if bridges else subject.name
    return last.wordings[wording].format(x=asked)


def prompt(question: str) -> str:
    """Return the user message."""
    return f"{INSTRUCTION}Question: {question}\n"


def chat(user: str) -> str:
    """Return the user message as the chat template renders it, with the generation prompt."""
    return f"<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


def documents(contents: Sequence[str]) -> str:
    """Return search results as the agent renders them."""
    parts = (line.split("\n", 1) for line in contents)
    return render_passages([Passage(id="", title=title, text=body, score=0.0) for title, body in parts])


def observation(contents: Sequence[str]) -> str:
    """Return what the policy reads after a search."""
    return FIXED_TEXTS["observation"].format(text=documents(contents))


def short_answer_prompt(question: str, *, context: str) -> str:
    """Return the prompt of the IG service."""
    return build_prompt(question, context=context, prompt_type=PromptType.default, max_context_words=4096)
