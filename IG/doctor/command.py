"""The command line of the doctor: read, measure, analyse, report.

python -m IG doctor --model-path Qwen/Qwen2.5-3B --questions questions.jsonl --num-questions 50
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import random
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable

from IG.doctor.diagnosis import Diagnosis, Plan, diagnose, summary
from IG.doctor.measuring import Measured, add_work, measure_questions, measure_rollouts
from IG.doctor.questions import AskedQuestion, choose, read_questions
from IG.doctor.readings import GainRule
from IG.doctor.report import write_report
from IG.doctor.rollouts import RecordedRollout, by_group, have_gains, read_rollouts, with_gains
from IG.doctor.tables import skipped_lines, tables
from IG.service.backend import Backend, PooledBackend
from IG.service.config import (
    SETTINGS,
    WORLD_GENERATOR,
    IGServiceConfig,
    count_gpus,
    require_devices,
    resolve_config,
    visible_device,
)
from serving.logs import configure_logging
from serving.machine import has_bfloat16
from serving.questions import QuestionError
from serving.web.settings import SettingError, add_settings, expand_home

logger = logging.getLogger(__name__)

WORLD_QUESTIONS = WORLD_GENERATOR.parents[1] / "doctor.jsonl"
SHOWN_SETTINGS = (
    "model_path",
    "entailment_model",
    "score",
    "gain",
    "threshold",
    "temperature",
    "max_new_tokens",
    "prompt_type",
    "prompt_style",
    "seed",
)

StartBackend = Callable[[IGServiceConfig], Awaitable[Backend]]


class StartError(RuntimeError):
    """The models could not be loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be examined."""

    questions: Path
    num_questions: int
    rollouts: Path | None
    max_samples: int
    gain_weight: float
    out: Path
    config: IGServiceConfig
    """As training would run the service."""


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
    """Raises SettingError; exits as argparse does on an unknown flag and on --help."""
    given = vars(build_parser().parse_args(expand_home(arguments)))
    flags = [part for s in SETTINGS if s.name in given for part in (s.flag, given[s.name])]
    config = resolve_config(flags)
    if config.num_generations > given["max_samples"]:
        raise SettingError(
            f"--max-samples is {given['max_samples']}, expected at least --num-generations "
            f"({config.num_generations}): both are answers per condition, and the larger is the yardstick"
        )
    if config.temperature == 0:
        raise SettingError(
            "--temperature is 0: all samples of a prompt are the same, there is no noise to look at"
        )
    return Request(
        questions=given["questions"],
        num_questions=given["num_questions"],
        rollouts=given["rollouts"],
        max_samples=given["max_samples"],
        gain_weight=given["gain_weight"],
        out=given["out"],
        config=config,
    )


def build_parser() -> argparse.ArgumentParser:
    """The doctor's own flags and every setting of the service."""
    parser = argparse.ArgumentParser(
        prog="python -m IG doctor",
        description=(
            "Look at the information gain of a sample of questions before training on it: groups with zero "
            "variance, signal against noise, agreement with exact match, accepted answers, and what to set. "
            "The last line of the output is JSON."
        ),
        allow_abbrev=False,
    )
    own = parser.add_argument_group("what to look at")
    own.add_argument(
        "--questions",
        type=Path,
        default=WORLD_QUESTIONS,
        metavar="FILE",
        help="JSONL with answers and documents, or JSON or parquet without (default world/doctor.jsonl)",
    )
    own.add_argument(
        "--num-questions",
        type=_positive,
        default=50,
        metavar="N",
        help="how many of them, and of recorded groups whose gains must be measured (default 50)",
    )
    own.add_argument(
        "--rollouts",
        type=Path,
        metavar="PATH",
        help="trajectories that a training run recorded: a JSONL file, a folder of them, or a run folder",
    )
    own.add_argument(
        "--max-samples",
        type=_at_least_two,
        default=64,
        metavar="N",
        help="answers per condition, the yardstick for fewer (default 64)",
    )
    own.add_argument(
        "--lambda",
        dest="gain_weight",
        type=float,
        default=0.6,
        metavar="X",
        help="weight of the gain in the reward (default 0.6)",
    )
    own.add_argument(
        "--out", type=Path, default=Path("doctor"), metavar="FOLDER", help="of the report (default doctor)"
    )
    service = parser.add_argument_group("how gains are measured: settings of the service, with its variables")
    add_settings(service, SETTINGS)
    return parser


async def examine(request: Request, *, start_backend: StartBackend) -> str:
    """Measure, write the report, print the tables; returns the JSON line."""
    started = time.perf_counter()
    config = request.config
    questions = choose(
        read_questions(request.questions), count=request.num_questions, rng=random.Random(config.seed)
    )
    rollouts = None if request.rollouts is None else read_rollouts(request.rollouts)
    _make_folder(request.out)  # not after hours of measuring
    measured, rollouts = await _measure(request, questions, rollouts, start_backend=start_backend)
    if not measured.readings:
        raise QuestionError(f"no question could be measured, the first: {measured.failures[0]}")
    plan = Plan(
        rule=GainRule(score=config.score, gain=config.gain, threshold=config.threshold),
        num_generations=config.num_generations,
        gain_weight=request.gain_weight,
        seed=config.seed,
    )
    diagnosis = diagnose(measured, plan, rollouts=rollouts)
    seconds = time.perf_counter() - started
    write_report(diagnosis, plan, request.out, settings=_settings(request), seconds=seconds)
    _show(diagnosis, plan, request.out)
    return json.dumps(summary(diagnosis, plan) | {"seconds": round(seconds, 1)}, allow_nan=False)


async def _measure(
    request: Request,
    questions: Sequence[AskedQuestion],
    rollouts: list[RecordedRollout] | None,
    *,
    start_backend: StartBackend,
) -> tuple[Measured, list[RecordedRollout] | None]:
    config = replace(request.config, num_generations=request.max_samples)
    with _progress() as progress:
        loading = progress.add_task("loading models", total=None)
        async with _running(start_backend, config) as backend:
            progress.update(loading, total=1, completed=1)
            bar = progress.add_task("questions", total=len(questions))
            measured = await measure_questions(
                backend, questions, seed=config.seed, advance=lambda done: progress.advance(bar, done)
            )
            if rollouts is not None and not have_gains(rollouts):
                groups = choose(
                    list(by_group(rollouts).values()),
                    count=request.num_questions,
                    rng=random.Random(config.seed),
                )
                chosen = [rollout for members in groups for rollout in members]
                contexts = {(each.question, each.context) for each in chosen if each.is_measurable}
                again = progress.add_task("recorded rollouts", total=len(contexts))
                found = await measure_rollouts(
                    backend, chosen, advance=lambda done: progress.advance(again, done)
                )
                rollouts = with_gains(chosen, found.gains)
                measured = replace(measured, failures=(*measured.failures, *sorted(found.failures)))
                add_work(measured.work, found.work)
    return measured, rollouts


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingError(
            f"--out is {path}, expected a folder or a place for one ({error.strerror})"
        ) from None


@asynccontextmanager
async def _running(start_backend: StartBackend, config: IGServiceConfig) -> AsyncIterator[Backend]:
    try:
        backend = await start_backend(config)
    except (OSError, ValueError, RuntimeError) as error:  # what models, engines and settings raise
        raise StartError(f"the models could not be loaded: {error}") from error
    try:
        yield backend
    finally:
        await backend.aclose()


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description:<20}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
    )


def _settings(request: Request) -> dict[str, object]:
    known = asdict(request.config)
    return {
        "questions": str(request.questions),
        "rollouts": None if request.rollouts is None else str(request.rollouts),
        "num_questions": request.num_questions,
        "max_samples": request.max_samples,
        "num_generations": request.config.num_generations,
        "lambda": request.gain_weight,
        **{name: str(known[name]) for name in SHOWN_SETTINGS},
    }


def _show(diagnosis: Diagnosis, plan: Plan, out: Path) -> None:
    console = Console(file=sys.stdout)
    for table in tables(diagnosis, plan):
        shown = RichTable(title=table.title, title_justify="left")
        for number, column in enumerate(table.columns):
            shown.add_column(column, justify="right" if number else "left")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
        _say(console, table.meaning + "\n")
    for line in skipped_lines(diagnosis):
        _say(console, line)
    _say(console, diagnosis.advice.sentence)
    _say(console, f"Report: {out / 'report.html'}")


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=not console.is_terminal)


def _positive(text: str) -> int:
    return _whole(text, least=1)


def _at_least_two(text: str) -> int:
    return _whole(text, least=2)


def _whole(text: str, *, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a whole number of at least {least}")
    return value
