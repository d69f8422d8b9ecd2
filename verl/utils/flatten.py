"""Nested settings by dotted key."""

from __future__ import annotations

from collections.abc import Mapping


def flatten(tree: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """Return the values of nested sections by dotted key."""
    flat: dict[str, object] = {}
    for name, value in tree.items():
        key = f"{prefix}{name}"
        flat |= flatten(value, f"{key}.") if isinstance(value, Mapping) else {key: value}
    return flat
