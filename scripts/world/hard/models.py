"""What the models of the hard world are trained on; most continue from those of the embedded world.

The policy is trained twice, as there: until it can find every answer, then on traces with bad habits, which
reinforcement learning has to remove one by one. Which bad choice is how likely differs by relation, so that
what is learned about one relation says little about the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from transformers import Qwen2Tokenizer

from world import entailment, evidence, names
from world.facts import Kind, relations_of
from world.hard import text
from world.hard.facts import (
    ALL_OF,
    BY_NAME,
    RULES,
    Entity,
    Fact,
    Problem,
    chains,
    make_person,
    random_entity,
)
from world.hard.traces import CONFUSED, GOOD, Habits, Scene, TraceWriter, imagine
from world.traces import Piece
from world.training import Batch, batches

HOPS, HOP_WEIGHTS = (2, 3, 4), (0.45, 0.35, 0.2)
CONFUSED_SHARES = {
    "director": 0.8,
    "composer": 0.55,
    "studio": 0.7,
    "author": 0.6,
    "translator": 0.8,
    "publisher": 0.65,
    "founder": 0.75,
    "chair": 0.55,
    "headquarters": 0.65,
    "birthplace": 0.75,
    "residence": 0.55,
    "university": 0.6,
    "award": 0.7,
    "instrument": 0.6,
    "spouse": 0.65,
}
"""By relation, how often a careless search looks for another one."""
CARELESS = Habits(direct=0.25, confused=CONFUSED_SHARES, bare=0.35, vague=0.1, stop=0.25, give_up=0.8)
LONG_FORM_SHARE = 0.25
"""Share of the generator's answers in another accepted form."""
RULE_SHARE = 0.2
"""Share of the generator's questions about a person or a company without documents, to learn the rules by."""


def draw_trace(rng: Random, *, habits: Habits) -> list[Piece]:
    """Draw a question and a trace with these habits."""
    scene = Scene(rng)
    (hops,) = rng.choices(HOPS, HOP_WEIGHTS)
    return TraceWriter(scene, scene.draw_problem(hops=hops), habits).run()


def able_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    """Yield good traces."""
    rng = Random(f"hard able {seed}")
    return batches(tokenizer, lambda: draw_trace(rng, habits=GOOD), tokens=6144)


def shipped_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    """Yield traces with the shipped policy's habits."""
    rng = Random(f"hard shipped {seed}")
    return batches(tokenizer, lambda: draw_trace(rng, habits=CARELESS), tokens=6144)


def generator_stream(tokenizer: Qwen2Tokenizer, *, seed: int) -> Iterator[Batch]:
    """Yield short answers, for the generator of the IG service."""
    rng = Random(f"hard generator {seed}")
    return batches(tokenizer, lambda: draw_short_answer(rng), tokens=6144)


def draw_short_answer(rng: Random) -> list[Piece]:
    """Draw a prompt of the IG service with its answer.

    Where the passages lead only a part of the way, the answer is drawn by the rules from there; passages that
    do not begin with the question's subject mostly belong to another question.
    """
    scene = Scene(rng)
    if rng.random() < RULE_SHARE:
        subject = random_entity(rng.choice([Kind.person, Kind.person, Kind.firm]), rng)
        relation = rng.choice([chain[0] for chain in chains(subject.kind, 1)])
        fact = scene.fact(relation, subject)
        return _write_short_answer(Problem((fact,)).question, "", fact.value, rng)
    (hops,) = rng.choices(HOPS, HOP_WEIGHTS)
    problem = scene.draw_problem(hops=hops)
    chance = rng.random()
    shown, known = problem.hops, hops  # documents of which hops, and how far they lead
    if chance < 0.08:
        shown, known = (), 0
    elif chance < 0.5:
        known = rng.randrange(1, hops) if rng.random() < 0.4 else 1
        shown = problem.hops[:known]
    elif chance < 0.7:
        start = rng.randrange(1, hops) if rng.random() < 0.4 else 1
        known = hops if rng.random() < 0.15 else 0
        relations = [fact.relation for fact in problem.hops]
        other = scene.follow(relations, random_entity(relations[0].subject, rng))
        shown = (problem.hops if known else other)[start:]
    searches = [_search(scene, fact, rng) for fact in shown]
    if rng.random() < 0.15:
        searches.insert(rng.randrange(len(searches) + 1), _useless_search(scene, rng))
    answer = problem.answer
    if known < hops:
        subject = problem.hops[known - 1].value if known else problem.hops[0].subject
        answer = imagine(problem, subject, known, rng)
    context = "\n".join(text.documents(passages) for passages in searches)
    return _write_short_answer(problem.question, context, answer, rng)


def _write_short_answer(question: str, context: str, answer: Entity, rng: Random) -> list[Piece]:
    form = rng.choice(answer.golds) if rng.random() < LONG_FORM_SHARE else answer.name
    prompt = text.short_answer_prompt(question, context=context)
    written = [Piece(f" {form}\n", written=True), Piece("<|im_end|>", written=True)]
    return [Piece(prompt, written=False), *written]


def _search(scene: Scene, fact: Fact, rng: Random) -> list[str]:
    return scene.retrieve_records(fact) if rng.random() < 0.12 else scene.retrieve(fact)


def _useless_search(scene: Scene, rng: Random) -> list[str]:
    kind = rng.choice([Kind.person, Kind.film, Kind.book, Kind.firm])
    return [text.write_fact(fact) for fact in scene.retrieve_vaguely(random_entity(kind, rng))]


def draw_query_pairs(rng: Random, *, count: int) -> tuple[list[str], list[str]]:
    """Return (queries, passages) for the encoder, hard negatives last."""
    queries: list[str] = []
    shown: list[str] = []
    hard: list[str] = []
    for _ in range(count):
        scene = Scene(rng)
        subject = random_entity(rng.choice([Kind.person, Kind.person, Kind.film, Kind.book, Kind.firm]), rng)
        fact = scene.fact(rng.choice(relations_of(subject.kind)), subject)
        chance = rng.random()
        topic = text.RECORDS if chance < 0.12 else fact.relation.name
        passage = scene.records(subject, of=fact) if chance < 0.24 else text.write_fact(fact)
        shown.append(f"passage: {passage}")
        queries.append(f"query: {text.query(topic, subject)}")
        hard += scene.retrieve(fact, found=False, topk=2)
    return queries, shown + [f"passage: {passage}" for passage in hard]


def rival(entity: Entity, rng: Random) -> Entity:
    """Return another entity of the same kind, half of the time a likely one."""
    while True:
        other = random_entity(entity.kind, rng)
        if rng.random() < 0.5:
            other = _likely_rival(entity, rng)
        if not set(other.golds) & set(entity.golds):
            return other


def _likely_rival(entity: Entity, rng: Random) -> Entity:
    if entity.kind is Kind.person:
        first, last = entity.short.split()
        if rng.random() < 0.5:
            return make_person(rng.choice(names.WOMEN + names.MEN), last, entity.home)
        return make_person(first, rng.choice(names.SURNAMES), entity.home)
    if entity.kind is Kind.town:
        return rng.choice(RULES[Kind.town, entity.home])
    words = entity.name.split()
    near = [other for other in ALL_OF[entity.kind] if other.name.split()[0] == words[0]]
    return rng.choice(near)


def draw_entailment_pair(rng: Random, *, asked: float) -> tuple[str, str, int]:
    """Return (premise, hypothesis, label); with probability `asked` both begin with the question."""
    (hops,) = rng.choices(HOPS, HOP_WEIGHTS)
    problem = Scene(rng).draw_problem(hops=hops)
    chance = rng.random()
    left, entity = entailment.wording(problem.answer, rng), problem.answer
    if chance < 0.45:
        right, label = entailment.wording(entity, rng), entailment.ENTAILMENT
    elif chance < 0.9:
        right, label = entailment.wording(rival(entity, rng), rng), entailment.CONTRADICTION
    else:
        kinds = [kind for kind in ALL_OF if kind is not entity.kind]
        right, label = rng.choice(["", random_entity(rng.choice(kinds), rng).name]), entailment.NEUTRAL
    if rng.random() < 0.5:
        left, right = right, left
    if rng.random() < asked:
        left, right = f"{problem.question} {left}", f"{problem.question} {right}"
    return left, right, label


def draw_evidence(rng: Random, premise: evidence.Premise) -> tuple[str, str, int]:
    """Return (passages, question and answer, label); an episode has found all, a part or other facts."""
    scene = Scene(rng)
    (hops,) = rng.choices(HOPS, HOP_WEIGHTS)
    problem = scene.draw_problem(hops=hops)
    answer, shown, label = problem.answer, problem.hops, entailment.NEUTRAL
    chance = rng.random()
    is_episode = premise is evidence.Premise.episode
    if not is_episode:
        shown, label = problem.hops[-1:], entailment.ENTAILMENT
    elif chance < 0.55:
        label = entailment.ENTAILMENT
    elif chance < 0.8:
        shown = problem.hops[: rng.randrange(1, hops)]
        reached = shown[-1].value
        guess = imagine(problem, reached, len(shown), rng)
        (answer,) = rng.choices([guess, answer, reached], [0.5, 0.2, 0.3])
    else:
        shown = tuple(_follow_confused(scene, problem))
        answer = shown[-1].value
    is_passage = premise is evidence.Premise.passage
    searches = [[text.write_fact(fact)] if is_passage else _search(scene, fact, rng) for fact in shown]
    if label == entailment.ENTAILMENT and rng.random() < 0.45:
        label, answer = entailment.CONTRADICTION, _other_answer(scene, problem.answer)
    if is_episode and rng.random() < 0.15:
        searches.insert(rng.randrange(len(searches) + 1), _useless_search(scene, rng))
    if label == entailment.NEUTRAL:  # by chance a search shows the fact
        asked = text.statement(problem.hops[-1], problem.answer.printed)
        searches = [[passage for passage in found if asked not in passage] for found in searches]
    context = "\n".join(text.documents(passages) for passages in searches)
    form = answer.name if rng.random() < 0.7 else rng.choice(answer.golds)
    return context, f"{problem.question} {form}", label


def _follow_confused(scene: Scene, problem: Problem) -> list[Fact]:
    """Return the facts that a searcher finds who mistakes one relation of the question for another."""
    relations = [fact.relation for fact in problem.hops]
    mistaken = scene.rng.randrange(len(relations))
    relations[mistaken] = BY_NAME[CONFUSED[relations[mistaken].name]]
    found: list[Fact] = []
    subject = problem.hops[0].subject
    for relation in relations:
        if subject.kind is not relation.subject:
            break
        found.append(scene.fact(relation, subject))
        subject = found[-1].value
    return found


def _other_answer(scene: Scene, answer: Entity) -> Entity:
    """Return an entity of the answer's kind, half of the time one that the passages name."""
    values = (fact.value for fact in scene.known.values())
    named = [v for v in values if v.kind is answer.kind and not set(v.golds) & set(answer.golds)]
    return scene.rng.choice(named) if named and scene.rng.random() < 0.5 else rival(answer, scene.rng)
