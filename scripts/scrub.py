"""Remove secrets, the user's name and the home folder from texts that leave the machine."""

from __future__ import annotations

import json
import netrc
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from serving.redaction import HIDDEN, is_secret_name, redact, redact_text

MIN_LENGTH = 4
"""Shorter values would be found in many words."""
_LOGIN = re.compile(r"://[^:/@\s]*:([^@/\s]+)@")
_KEY_END = re.compile(r"\A(?:(?!-----BEGIN)[\s\S])*?-----END [A-Z ]*PRIVATE KEY-----")
_COMMON = ("true", "false", "none", "null", "root", "user", "localhost")


class Scrubber:
    """Hides known values, and what has the form or the name of a secret."""

    def __init__(self, *, secrets: Iterable[str], home: Path, names: Mapping[str, str]) -> None:
        """Take `names`, words such as that of the user, with what replaces them."""
        hidden = {form for secret in secrets for form in _forms(secret)}
        values = sorted(filter(_is_distinct, hidden), key=len, reverse=True)
        self._secrets = re.compile("|".join(map(re.escape, values)) or r"(?!)")
        homes = {str(home), str(home.resolve())} - {"/"}
        self._homes = re.compile("|".join(rf"{re.escape(path)}(?![\w.-])" for path in homes) or r"(?!)")
        self._names = {word: by for word, by in names.items() if _is_distinct(word)}

    def text(self, text: str) -> str:
        """Return a text without them; the end of a private key whose beginning was cut off counts, too."""
        text = redact_text(self._secrets.sub(HIDDEN, _KEY_END.sub(HIDDEN, text)))
        text = self._homes.sub("~", text)
        for word, by in self._names.items():
            text = re.sub(rf"(?<![A-Za-z0-9]){re.escape(word)}(?![A-Za-z0-9])", by, text)
        return text

    def tree(self, value: Any) -> Any:
        """Return a JSON-like tree without them."""
        return self._clean(redact(value))

    def json(self, text: str) -> str:
        """Return a JSON document without them; what is none, as plain text."""
        try:
            value = json.loads(text)
        except ValueError:
            return self.text(text)
        return json.dumps(self.tree(value), ensure_ascii=False)

    def _clean(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self.text(str(name)): self._clean(inner) for name, inner in value.items()}
        return [self._clean(inner) for inner in value] if isinstance(value, list) else value


def make_scrubber(environ: Mapping[str, str], *, home: Path) -> Scrubber:
    """Return a scrubber for the secrets of this user, and the names of user and machine."""
    users = {environ.get(name, "") for name in ("USER", "LOGNAME", "SUDO_USER")} | {home.name}
    host = socket.gethostname()
    names = {**dict.fromkeys(users, "USER"), host: "HOST", host.partition(".")[0]: "HOST"}
    return Scrubber(secrets=list(find_secrets(environ, home=home)), home=home, names=names)


def find_secrets(environ: Mapping[str, str], *, home: Path) -> Iterator[str]:
    """Yield the values that are secrets on this machine."""
    for name, value in environ.items():
        if is_secret_name(name):
            yield value
        yield from _LOGIN.findall(value)
    token = Path(environ.get("HF_HOME") or home / ".cache/huggingface") / "token"
    if token.is_file():
        yield token.read_text(errors="replace").strip()
    try:
        machines = netrc.netrc(environ.get("NETRC") or str(home / ".netrc")).hosts.values()
    except (OSError, netrc.NetrcParseError):
        return
    yield from (password for *_, password in machines if password)


def _forms(secret: str) -> set[str]:
    """Return a value as text, in JSON and in URLs."""
    return {
        secret,
        json.dumps(secret)[1:-1],
        json.dumps(secret, ensure_ascii=False)[1:-1],
        quote(secret, safe=""),
    }


def _is_distinct(value: str) -> bool:
    return len(value) >= MIN_LENGTH and value.lower() not in _COMMON
