"""Install packages with uv as `pip install` would, from the places that pip is configured to use.

    python scripts/uv_install.py UV ARGUMENT...    # runs UV pip install ARGUMENT... into this Python

uv reads none of pip's configuration files and variables. They are passed on in the environment, because an
address can contain a password.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping

# By name of pip's setting: uv's variable, and what separates several values there.
_VARIABLES = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", " "),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "constraint": ("UV_CONSTRAINT", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),
}
# pip's sections in the order in which later ones win.
_SECTIONS = ("global", "install", ":env:")


def translate_settings(listing: str) -> dict[str, str]:
    """Return uv's variables for the output of `pip config list`."""
    found: dict[str, dict[str, str]] = {section: {} for section in _SECTIONS}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in found and name in _VARIABLES:
            found[section][name] = str(ast.literal_eval(value))
    settings: dict[str, str] = {}
    for section in _SECTIONS:
        for name, value in found[section].items():
            variable, separator = _VARIABLES[name]
            settings[variable] = separator.join(value.split())
    return settings


def make_environment(environ: Mapping[str, str], *, listing: str) -> dict[str, str]:
    """Return the environment for uv; variables that the user has set for uv win."""
    # Like pip: the best version of all places, not the first place that has the package at all.
    defaults = {"UV_INDEX_STRATEGY": "unsafe-best-match", "UV_PYTHON_DOWNLOADS": "never"}
    return {**defaults, **translate_settings(listing), **environ}


def main() -> None:
    """Replace this process by uv."""
    uv, *arguments = sys.argv[1:]
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    command = [uv, "pip", "install", "--python", sys.executable, *arguments]
    os.execvpe(uv, command, make_environment(os.environ, listing=listing))


if __name__ == "__main__":
    main()
