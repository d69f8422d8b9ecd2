"""The version of this project."""

from __future__ import annotations

import importlib.metadata

_DISTRIBUTION = "inforeasoner"


def package_version() -> str:
    """Return the version of the installed distribution, `unknown` if it is not installed."""
    try:
        return importlib.metadata.version(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
