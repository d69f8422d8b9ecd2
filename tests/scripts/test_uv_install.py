from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from uv_install import make_environment, translate_settings

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/uv_install.py"


def test_settings_of_pip_become_those_of_uv() -> None:
    listing = "\n".join(
        [
            ":env:.find-links='/here'",
            "global.find-links='/there'",
            "global.extra-index-url='https://a/simple\\nhttps://me:pw@b/simple'",
            "install.index-url='https://c/simple'",
            "global.cert='/ca.crt'",
            "freeze.timeout='10'",
            "global.disable-pip-version-check='1'",
        ]
    )
    assert translate_settings(listing) == {
        "UV_FIND_LINKS": "/here",
        "UV_INDEX": "https://a/simple https://me:pw@b/simple",
        "UV_DEFAULT_INDEX": "https://c/simple",
        "SSL_CERT_FILE": "/ca.crt",
    }
    environ = make_environment({"UV_FIND_LINKS": "/mine", "HOME": "/h"}, listing=listing)
    assert (environ["UV_FIND_LINKS"], environ["HOME"]) == ("/mine", "/h")


def test_uv_is_run_with_the_configuration_of_pip(tmp_path: Path) -> None:
    fake = tmp_path / "uv"
    fake.write_text('#!/bin/sh\necho "$*"\necho "$UV_FIND_LINKS"\n')
    fake.chmod(0o755)
    done = subprocess.run(
        [sys.executable, SCRIPT, fake, "-q", "torch"],
        env={**os.environ, "PIP_FIND_LINKS": "/a /b"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines() == [f"pip install --python {sys.executable} -q torch", "/a,/b"]
