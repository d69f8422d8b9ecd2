"""Colors of an episode in the terminal, and text that cannot control it."""

from __future__ import annotations

from rich.text import Text

STYLES = {
    "think": "magenta",
    "answer": "bold dark_orange3",
    "information": "dim",
    "other": "dim",
}
CALL_STYLE = "bold blue"
PASSAGE_STYLE = "green"
NOTE_STYLE = "yellow"


def styled(text: str, style: str) -> Text:
    """Return text without control characters, with which a policy could control the terminal."""
    clean = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return Text(clean, style=style)
