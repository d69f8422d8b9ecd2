"""The command line of the doctor: read questions, measure, analyze, report.

python -m IG doctor --model-path Qwen/Qwen2.5-3B --questions questions.jsonl --num-questions 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from IG.config import (
    SETTINGS,
    WORLD_GENERATOR,
    IGServiceConfig,
    count_gpus,
    require_devices,
    resolve_flags,
    visible_device,
)
from IG.doctor.diagnosis import Diagnosis, diagnose, rows, summary
from IG.doctor.questions import AskedQuestion, choose, read_questions
from IG.doctor.readings import Measured, measure_questions
from IG.service.backend import Backend, PooledBackend
from serving.logs import configure_logging
from serving.machine import has_bfloat16
from serving.questions import QuestionError
from serving.web.settings import SettingError, add_settings, expand_home

logger = logging.getLogger(__name__)

WORLD_QUESTIONS = WORLD_GENERATOR.parents[1] / "doctor.jsonl"

StartBackend = Callable[[IGServiceConfig], Awaitable[Backend]]


class StartError(RuntimeError):
    """The models could not be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to examine."""

    questions: Path
    num_questions: int
    max_samples: int
    out: Path
    config: IGServiceConfig
    """The service as training will run it."""


def main(arguments: Sequence[str] | None = None, *, start_backend: StartBackend = PooledBackend.start) -> int:
    """Examine and report. Exit status: 0 done, 1 wrong input or settings or no models, 130 interrupted."""
    configure_logging(
        "%(asctime)s %(levelname)s %(name)s: %(message)s", quiet=("httpx", "vllm"), quiet_level=logging.ERROR
    )
    try:
        request = parse_arguments(sys.argv[1:] if arguments is None else arguments)
        device = visible_device(request.config, visible=os.environ.get("CUDA_VISIBLE_DEVICES"))
        require_devices(request.config, count_gpus=count_gpus, has_bfloat16=has_bfloat16)
        if device is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        line = asyncio.run(examine(request, start_backend=start_backend))
    except (QuestionError, SettingError, StartError, OSError) as error:
        logger.error("%s", error)
        return 1
    except KeyboardInterrupt:
        return 130
    sys.stdout.write(line + "\n")
    return 0


def parse_arguments(arguments: Sequence[str]) -> Request:
    """Return the request. Raises SettingError; exits as argparse does on an unknown flag and on --help."""
    given = vars(build_parser().parse_args(expand_home(arguments)))
    config = resolve_flags(given)
    if config.num_generations > given["max_samples"]:
        raise SettingError(
            f"--max-samples is {given['max_samples']}, expected at least --num-generations "
            f"({config.num_generations}): gains of fewer samples are compared with those of --max-samples"
        )
    if config.temperature == 0:
        raise SettingError("--temperature is 0: all samples of a prompt are equal and gains have no noise")
    own = ("questions", "num_questions", "max_samples", "out")
    return Request(config=config, **{name: given[name] for name in own})


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the doctor's own flags and every setting of the service."""
    parser = argparse.ArgumentParser(
        prog="python -m IG doctor",
        description=(
            "Measure gains on a sample of your questions before training on them: how noisy they are, "
            "whether helpful documents gain more than random ones, whether the entailment judge agrees with "
            "exact match, and what to set. The last line of the output is JSON."
        ),
        allow_abbrev=False,
    )
    own = parser.add_argument_group("what to examine")
    own.add_argument(
        "--questions",
        type=Path,
        default=WORLD_QUESTIONS,
        metavar="FILE",
        help="JSONL with answers and documents, or JSON or parquet without (default world/doctor.jsonl)",
    )
    own.add_argument(
        "--num-questions", type=_at_least(1), default=50, metavar="N", help="how many of them (default 50)"
    )
    own.add_argument(
        "--max-samples",
        type=_at_least(2),
        default=64,
        metavar="N",
        help="answers per condition; gains of fewer are compared with gains of these (default 64)",
    )
    own.add_argument(
        "--out", type=Path, default=Path("doctor"), metavar="FOLDER", help="of the report (default doctor)"
    )
    service = parser.add_argument_group("how gains are measured: settings of the service, with its variables")
    add_settings(service, SETTINGS)
    return parser


async def examine(request: Request, *, start_backend: StartBackend) -> str:
    """Measure, write the report, print the table; return the JSON line."""
    started = time.perf_counter()
    config = request.config
    questions = choose(read_questions(request.questions), count=request.num_questions, seed=config.seed)
    try:
        request.out.mkdir(parents=True, exist_ok=True)  # before measuring, which takes long
    except OSError as error:
        raise SettingError(
            f"--out is {request.out}, expected a folder or a place for one ({error.strerror})"
        ) from None
    measured = await _measure(request, questions, start_backend=start_backend)
    if not measured.readings:
        raise QuestionError(f"no question could be measured, the first: {measured.failures[0]}")
    diagnosis = diagnose(measured, config)
    seconds = round(time.perf_counter() - started, 1)
    _write_report(diagnosis, request, seconds=seconds)
    _show(diagnosis, request)
    return json.dumps(summary(diagnosis, config) | {"seconds": seconds}, allow_nan=False)


async def _measure(
    request: Request, questions: Sequence[AskedQuestion], *, start_backend: StartBackend
) -> Measured:
    config = replace(request.config, num_generations=request.max_samples)
    columns = (TextColumn("{task.description:<15}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        loading = progress.add_task("loading models", total=None)
        try:
            backend = await start_backend(config)
        except (OSError, ValueError, RuntimeError) as error:  # raised by models, engines and settings
            raise StartError(f"the models could not be loaded: {error}") from error
        progress.update(loading, total=1, completed=1)
        bar = progress.add_task("questions", total=len(questions))
        try:
            return await measure_questions(
                backend, questions, seed=config.seed, on_progress=lambda: progress.advance(bar)
            )
        finally:
            await backend.aclose()


def _write_report(diagnosis: Diagnosis, request: Request, *, seconds: float) -> None:
    """Write `report.json`."""
    settings = asdict(replace(request.config, token="")) | {
        "questions": str(request.questions),
        "num_questions": request.num_questions,
        "max_samples": request.max_samples,
    }
    del settings["token"]
    written = {"settings": settings, "seconds": seconds, **asdict(diagnosis)}
    text = json.dumps(written, indent=2, ensure_ascii=False, allow_nan=False)
    (request.out / "report.json").write_text(text + "\n", encoding="utf-8")


def _show(diagnosis: Diagnosis, request: Request) -> None:
    console = Console(file=sys.stdout)
    table = Table(title=f"Gains of {diagnosis.num_questions} questions", title_justify="left")
    table.add_column("measured")
    table.add_column("value", justify="right")
    for row in rows(diagnosis, request.config):
        table.add_row(*row)
    console.print(table)
    lines = list(diagnosis.advice)
    if diagnosis.failures:
        lines.append(
            f"{len(diagnosis.failures)} gains could not be measured, the first: {diagnosis.failures[0]}"
        )
    lines.append(f"Report: {request.out / 'report.json'}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
        return int(text)

    return parse
