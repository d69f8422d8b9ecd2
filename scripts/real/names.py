"""Accepted spellings of names, dates and numbers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip
_MAX_GOLDS = 6
_SHORT_FORMS = {
    "UK": ("United Kingdom", "Britain"),
    "US": ("United States", "USA"),
    "Soviet Union": ("USSR",),
    "United States": ("US", "USA"),
    "United Kingdom": ("UK",),
}


def fold(text: str) -> str:
    """Return the text without accents."""
    return "".join(char for char in unicodedata.normalize("NFKD", text) if not unicodedata.combining(char))


def golds(*spellings: str) -> tuple[str, ...]:
    """Return distinct spellings, the first one first, each also without accents."""
    found = [text.strip() for text in spellings if text.strip()]
    return tuple(dict.fromkeys([*found, *map(fold, found)]))[:_MAX_GOLDS]


def of_place(name: str) -> tuple[str, ...]:
    """Return spellings of a city or country: without an addition behind a comma, and usual short forms."""
    return golds(name, name.partition(",")[0], *_SHORT_FORMS.get(name, ()))


def of_peak(name: str) -> tuple[str, ...]:
    """Return spellings of a mountain: with and without `Mount`."""
    bare = re.sub(r"^(Mount|Mt\.?) ", "", name)
    return golds(name, f"Mt. {bare}", f"Mt {bare}", bare) if bare != name else golds(name)


def of_names(text: str) -> tuple[str, ...]:
    """Return the alternatives in texts such as `Parliament (Barlamane)` or `"Hatikvah" (The Hope)`."""
    text = text.replace("“", '"').replace("”", '"')
    match = re.fullmatch(r'"?([^"()\[\];:]{2,60}?)"?,?(?: \(([^()\[\];:]{2,60})\))?', text.strip())
    return golds(*(part.strip(' "') for part in match.groups() if part)) if match else ()


def of_plural(plural: str, *others: str) -> tuple[str, ...]:
    """Return a plural, its regular singular and other spellings."""
    return golds(plural, plural.removesuffix("s") if len(plural) > 3 else plural, *others)


def of_year(date: str) -> tuple[str, ...]:
    """Return the year of a date such as `12 December 1963`, then the date in both orders."""
    year = re.search(r"\b\d{4}\b", date)
    if year is None:
        return ()
    return golds(year.group(), *dates(date))


def dates(date: str) -> tuple[str, ...]:
    """Return the forms of a day, month and year; nothing for another text."""
    match = re.fullmatch(rf"(\d{{1,2}}) ({'|'.join(MONTHS)}) (\d{{4}})", date.strip())
    if match is None:
        return ()
    day, month, year = match.groups()
    return (f"{day} {month} {year}", f"{month} {day}, {year}")


def of_number(number: str, *, unit: str = "", units: Iterable[str] = ()) -> tuple[str, ...]:
    """Return a number with and without separators, and with its unit in several spellings."""
    bare = number.replace(",", "")
    written = [f"{number} {name}" for name in (unit, *units) if name]
    return golds(*written, number, bare, *([f"{bare} {unit}"] if unit else []))


def of_count(number: str) -> tuple[str, ...]:
    """Return a large count as digits and, from a million on, rounded in millions."""
    value = int(number.replace(",", ""))
    rounded = [f"{value / 1e6:.{digits}f} million" for digits in (2, 1)] if value >= 10**6 else []
    return golds(number, number.replace(",", ""), *rounded)
