"""Passages of real English and questions on them: the language reference that every Python carries."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics

from tests.search_r1.search.small_world import write_corpus

_WORDS_PER_PASSAGE = 100
_LONGEST_TOPIC = 30_000  # characters
_OTHERS_KEPT = 8
"""One in so many passages without an answer is kept."""

QUESTIONS = {
    "Which statement lets me check a condition only while debugging?": "assert expression",
    "How do I leave a loop early?": "terminates the nearest enclosing loop",
    "How can I skip the rest of the loop body and go on with the next round?": "next cycle of the nearest",
    "Which statement does nothing at all?": "null operation",
    "How do I define an anonymous function?": "anonymous functions",
    "What makes a function a generator?": "generator function",
    "How do I run cleanup code whether or not an error occurred?": '"finally"',
    "How are very long numbers written so that people can read them?": "underscores",
    "How does integer division round negative numbers?": "floor",
    "What does the interpreter do when an imported name is not in the module?": '"importerror" is raised',
    "How can I set a breakpoint and step through my program?": "breakpoint",
    "How do I assign to a variable of the enclosing function?": "previously bound variables",
    "How do I remove an element from a dictionary?": "del d[key]",
    "Which values count as false?": "considered false",
    "How do I turn a string into capital letters?": "uppercase",
    "How do I cut whitespace off both ends of a string?": "leading and trailing characters removed",
    "Which method is called just before an object is destroyed?": "__del__",
    "How do I pad a number with zeros when printing it?": "zero-padding",
    "How are chained comparisons such as a < b < c evaluated?": "chained arbitrarily",
    "What must be true of two equal objects that are used as dictionary keys?": "same hash value",
    "How do I write a complex number?": "imaginary",
    "How do I reorder a list in place?": "in place",
    "How do I assign to a variable of the module from within a function?": "to be interpreted as globals",
    "In which order are the operands of an expression evaluated?": "left to right",
}
"""Question to the words, in lower case, that a passage with its answer contains."""


def cut_passages() -> list[str]:
    """Each topic in pieces of equal length; without the longest topics, which repeat much of the others."""
    passages: dict[str, None] = {}
    for topic, text in sorted(topics.items()):
        if len(text) > _LONGEST_TOPIC:
            continue
        words = text.split()
        num_pieces = math.ceil(len(words) / _WORDS_PER_PASSAGE)
        cuts = [len(words) * number // num_pieces for number in range(num_pieces + 1)]
        for start, end in pairwise(cuts):
            passages[f'"{topic}"\n{" ".join(words[start:end])}'] = None
    return list(passages)


def write_real_corpus(path: Path) -> list[str]:
    """As JSONL, ids from 0; returns the passages: all with an answer and some of the others."""
    passages = [
        text
        for row, text in enumerate(cut_passages())
        if row % _OTHERS_KEPT == 0 or any(words in text.lower() for words in QUESTIONS.values())
    ]
    write_corpus(path, {str(row): text for row, text in enumerate(passages)})
    return passages
