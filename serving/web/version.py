"""Which version of this project runs."""

from __future__ import annotations

import importlib.metadata

_DISTRIBUTION = "inforeasoner"


def package_version() -> str:
    """Of the installed distribution; `unknown` where this folder is used without installing it."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
