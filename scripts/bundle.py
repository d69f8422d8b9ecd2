"""Pack what a bug report needs of a run into one file, without secrets.

python scripts/bundle.py runs/NAME                     # bundle-NAME.tar.gz in the current folder
python scripts/bundle.py runs/NAME --trajectories 2    # also the last two recorded steps, all texts

In it: manifest with configuration and package versions, metrics, the end of the log, which files the run has,
what the doctor says, GPUs, and variables of CUDA, NCCL, Ray and vLLM. Secrets, the user's name and the home
folder are replaced. Look at the file before you send it.
"""

from __future__ import annotations

import argparse
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from scrub import Scrubber, make_scrubber

from serving.web.settings import expand_home
from verl.errors import DataError
from verl.run.folder import LOG_FILE
from verl.run.manifest import MANIFEST_FILE
from verl.run.records import EVALUATION, TRAJECTORIES, step_files
from verl.run.tracking import METRICS_FILE
from verl.utils.entry import error_line

ROOT = Path(__file__).resolve().parents[1]
VARIABLES = (
    "CUDA_",
    "NCCL_",
    "TORCH_",
    "PYTORCH_",
    "VLLM_",
    "RAY_",
    "HF_",
    "OMP_",
    "SLURM_",
    "LD_LIBRARY_PATH",
)
"""Beginnings of the names of variables that are shown."""
DOCTOR_TIMEOUT_S = 900.0
MB = 10**6


@dataclass(frozen=True, slots=True)
class Part:
    """A file of the bundle; `note` says why it is not whole."""

    name: str
    content: bytes
    note: str = ""


def main(arguments: list[str] | None = None) -> None:
    """Write the bundle and print what is in it, or exit with one line that says what is wrong."""
    options = parse_arguments(arguments)
    run_dir: Path = options.run_dir
    output: Path = options.output or Path(f"bundle-{run_dir.resolve().name}.tar.gz")
    with error_line():
        if not (run_dir / MANIFEST_FILE).is_file():
            raise DataError(f"{run_dir} holds no {MANIFEST_FILE}; give the folder of a run")
        scrubber = make_scrubber(os.environ, home=Path.home())
        parts = list(describe_machine(scrubber, environ=os.environ))
        if options.doctor:
            parts.insert(0, Part("doctor.txt", scrubber.text(run_doctor()).encode()))
        parts.append(Part("files.txt", scrubber.text(list_files(run_dir)).encode()))
        names = choose_files(run_dir, num_steps=options.trajectories)
        parts += read_parts(run_dir, names, scrubber=scrubber, max_bytes=int(options.max_mb * MB))
        write_bundle(output, parts)
    for part in parts:
        print(f"{len(part.content):12,}  {part.name}{part.note and f'  ({part.note})'}")
    size = output.stat().st_size
    print(f"{output}: {size / MB:.1f} MB, secrets and names replaced. Look at it before you send it.")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run_dir", type=Path, help="run folder")
    parser.add_argument("--output", type=Path, help="default: bundle-NAME.tar.gz in the current folder")
    parser.add_argument(
        "--trajectories",
        type=int,
        default=0,
        metavar="N",
        help="the last N recorded steps and the last evaluation, with questions, passages and answers (0)",
    )
    parser.add_argument(
        "--max-mb", type=float, default=20.0, help="of the run's files; of what is larger the end (20)"
    )
    parser.add_argument(
        "--no-doctor", dest="doctor", action="store_false", help="without the doctor, which takes minutes"
    )
    options = parser.parse_args(expand_home(arguments))
    for name in ("trajectories", "max_mb"):
        if getattr(options, name) < 0:
            parser.error(f"--{name.replace('_', '-')} must be at least 0, got {getattr(options, name)}")
    return options


def run_doctor() -> str:
    """Return what the doctor prints."""
    return _output(sys.executable, str(ROOT / "scripts/doctor.py"))


def describe_machine(scrubber: Scrubber, *, environ: Mapping[str, str]) -> Iterator[Part]:
    """Yield the GPUs, and the variables that libraries read."""
    yield Part("nvidia-smi.txt", scrubber.text(_output("nvidia-smi")).encode())
    shown = {name: value for name, value in sorted(environ.items()) if name.startswith(VARIABLES)}
    lines = [f"{name}={value}\n" for name, value in scrubber.tree(shown).items()]
    yield Part("environment.txt", "".join(lines).encode())


def list_files(run_dir: Path) -> str:
    """Return size and name of everything in a run folder; links are named, not followed."""
    lines = []
    for folder, folders, files in os.walk(run_dir):
        for name in sorted([*folders, *files]):
            path = Path(folder, name)
            if path.is_symlink():
                lines.append(f"{'link':>16}  {path.relative_to(run_dir)}\n")
            elif name in files:
                lines.append(f"{path.lstat().st_size:16,}  {path.relative_to(run_dir)}\n")
    return "".join(lines)


def choose_files(run_dir: Path, *, num_steps: int) -> list[Path]:
    """Return the files that a report needs, from the run folder on."""
    chosen = [Path(MANIFEST_FILE), Path(METRICS_FILE), Path(LOG_FILE)]
    for folder, count in ((TRAJECTORIES, num_steps), (EVALUATION, min(1, num_steps))):
        recorded = list(step_files(run_dir, folder).values())
        chosen += [path.relative_to(run_dir) for path in recorded[len(recorded) - count :]]
    return chosen


def read_parts(run_dir: Path, names: Iterable[Path], *, scrubber: Scrubber, max_bytes: int) -> Iterator[Part]:
    """Yield files of the run, all together at most `max_bytes` before secrets are replaced.

    Of a file that is too large the last lines. Links are left out: they may lead anywhere.
    """
    for name in names:
        path = run_dir / name
        if any((run_dir / part).is_symlink() for part in (name, *name.parents) if part != Path()):
            yield Part(f"run/{name}", b"", "left out: a link")
        elif path.is_file():
            size = path.stat().st_size
            kept = min(size, max_bytes)
            max_bytes -= kept
            note = "" if kept == size else f"the last {kept / MB:.1f} of {size / MB:.1f} MB"
            text = _read_end(path, num_bytes=kept)
            # A line of records is a document, whose texts may hold other line breaks; a log is plain text.
            documents = text.split("\n") if name.suffix == ".jsonl" else [text]
            clean = scrubber.text if name.suffix == ".log" else scrubber.json
            yield Part(
                f"run/{name}", "\n".join(map(clean, documents)).encode(errors="backslashreplace"), note
            )


def _read_end(path: Path, *, num_bytes: int) -> str:
    """Return the last bytes of a file as text, without a line that they cut."""
    with path.open("rb") as file:
        skipped = max(0, os.fstat(file.fileno()).st_size - num_bytes)
        file.seek(skipped)
        content = file.read(num_bytes)
    if skipped:
        content = content.partition(b"\n")[2]
    return content.decode(errors="replace")


def write_bundle(path: Path, parts: Iterable[Part]) -> None:
    """Write a tar.gz whose files have no owner and no time."""
    with tarfile.open(path, "w:gz") as bundle:
        for part in parts:
            entry = tarfile.TarInfo(f"bundle/{part.name}")
            entry.size = len(part.content)
            bundle.addfile(entry, io.BytesIO(part.content))


def _output(*command: str) -> str:
    """Return what a program prints, or why it prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCTOR_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}\n"
    return done.stdout + done.stderr


if __name__ == "__main__":
    main()
