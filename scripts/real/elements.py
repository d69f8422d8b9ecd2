"""Chemical elements of the package `mendeleev`, read from its database, as records."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path

from real import names
from real.facts import Record, Relation, clean, state

Row = Mapping[str, object]

SYMBOL = Relation(
    name="symbol",
    phrase="chemical symbol of {x}",
    question="What is the chemical symbol of {x}?",
    bridge="the element with the chemical symbol {x}",
)
NUMBER = Relation(
    name="number",
    phrase="atomic number of {x}",
    question="What is the atomic number of {x}?",
)
DISCOVERER = Relation(name="discoverer", phrase="discoverer of {x}", question="Who discovered {x}?")
YEAR = Relation(name="year", phrase="discovery year of {x}", question="In which year was {x} discovered?")
PLACE = Relation(
    name="place",
    phrase="discovery place of {x}",
    question="In which country was {x} discovered?",
    leads="the country where {x} was discovered",
)
SERIES = Relation(
    name="series", phrase="series of {x}", question="To which series of elements does {x} belong?"
)
CAS = Relation(name="cas", phrase="CAS number of {x}", question="What is the CAS number of {x}?")

_TOPICS: dict[str, tuple[tuple[str, str], ...]] = {
    "identity": (
        (SYMBOL.phrase, "symbol"), (NUMBER.phrase, "atomic_number"), (SERIES.phrase, "series"),
        (CAS.phrase, "cas"), ("electron configuration of {x}", "electronic_configuration"),
        ("atomic weight of {x}", "atomic_weight"), ("density of {x} in g/cm3", "density"),
    ),
    "discovery": (
        (DISCOVERER.phrase, "discoverers"), (YEAR.phrase, "discovery_year"),
        (PLACE.phrase, "discovery_location"), ("origin of the name of {x}", "name_origin"),
    ),
    "description": (("description of {x}", "description"),),
    "use": (
        ("sources of {x}", "sources"), ("uses of {x}", "uses"),
        ("largest producers of {x}", "top_3_producers"),
    ),
}  # fmt: skip


def read_elements(package: Path) -> list[Record]:
    """Return a record for each element, by atomic number. Raises FileNotFoundError."""
    path = package / "elements.db"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the database of elements")
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)) as database:
        database.row_factory = sqlite3.Row
        rows = database.execute(
            "select elements.*, series.name as series from elements "
            "left join series on series.id = elements.series_id order by atomic_number"
        ).fetchall()
    return [make_element({key: row[key] for key in row.keys()}) for row in rows]  # noqa: SIM118


def make_element(row: Row) -> Record:
    """Return the record of a row of the table of elements."""
    record = Record(subject=str(row["name"]).lower(), kind="element")
    texts = {key: "" if value is None else clean(str(value)) for key, value in row.items()}
    for topic, fields in _TOPICS.items():
        lines = [(phrase.format(x=record.subject), texts[key]) for phrase, key in fields if texts[key]]
        record.add_passages(topic, [state(phrase[0].upper() + phrase[1:], text) for phrase, text in lines])
    for relation, key, find in _GOLDS:
        if texts[key]:
            record.add_fact(relation, find(texts[key]))
    return record


def _discoverers(text: str) -> tuple[str, ...]:
    """Return the full name and the surname of a single discoverer."""
    if any(mark in text for mark in (",", ";", " and ", "&", "Known")) or len(text.split()) > 4:
        return ()
    return names.golds(text, text.split()[-1])


def _series(text: str) -> tuple[str, ...]:
    return names.of_plural(text, text.lower(), text.lower().removesuffix("s"))


def _place(text: str) -> tuple[str, ...]:
    return names.of_place(text) if text[0].isupper() and "," not in text and "/" not in text else ()


_GOLDS: tuple[tuple[Relation, str, Callable[[str], tuple[str, ...]]], ...] = (
    (SYMBOL, "symbol", names.golds),
    (NUMBER, "atomic_number", names.golds),
    (DISCOVERER, "discoverers", _discoverers),
    (YEAR, "discovery_year", names.golds),
    (PLACE, "discovery_location", _place),
    (SERIES, "series", _series),
    (CAS, "cas", names.golds),
)
