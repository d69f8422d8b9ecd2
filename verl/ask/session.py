"""A session in the terminal: start what answers, ask the questions one by one, end it again."""

from __future__ import annotations

import argparse
import asyncio
import json
from collections.abc import Iterable

from rich.console import Console
from rich.text import Text

from verl.ask.asker import BY_LOG_PROB, Asker, AskSettings, Update, ignore
from verl.ask.checkpoint import Checkpoint, find_checkpoint, make_config
from verl.ask.output import Output
from verl.ask.terminal import TerminalView
from verl.ask.trace import Episode, episode_record
from verl.errors import RolloutError
from verl.types import Stop

FAILED, INTERRUPTED = 1, 130


def run_session(
    runner: asyncio.Runner,
    options: argparse.Namespace,
    *,
    questions: Iterable[str],
    console: Console,
    output: Output,
) -> int:
    """Answer the questions; return the exit code. Ctrl-C ends an episode, and between two the session.

    The runner is left between questions, so that a question can be typed meanwhile.
    """
    try:
        asker = start_visibly(runner, options, console)
    except RolloutError as error:
        output.explain(error)
        raise
    except KeyboardInterrupt:
        return INTERRUPTED
    return answer_all(runner, asker, options, questions=questions, console=console, output=output)


def answer_all(
    runner: asyncio.Runner,
    asker: Asker,
    options: argparse.Namespace,
    *,
    questions: Iterable[str],
    console: Console,
    output: Output,
) -> int:
    """Answer the questions, then close the asker; return the exit code."""
    view = TerminalView(console)
    code = 0
    try:
        for question in questions:
            try:
                episode = runner.run(ask(asker, question, options, view))
                if options.json:
                    record = episode_record(episode, gain_unit=asker.gain_unit)
                    line = json.dumps(record, ensure_ascii=False, allow_nan=False)
                    print(line, file=output.stdout, flush=True)
            except KeyboardInterrupt:
                if options.question:
                    raise
                console.print(Text("interrupted", style="yellow"))
                continue
            code = FAILED if episode.trajectory.stop is Stop.FAILED else 0
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        runner.run(asker.aclose())
    return code


async def start(options: argparse.Namespace, checkpoint: Checkpoint, *, update: Update = ignore) -> Asker:
    """Start what the arguments name."""
    measures = options.gains or options.gold
    return await Asker.start(
        make_config(checkpoint, max_turns=options.max_turns, overrides=options.overrides),
        checkpoint=checkpoint,
        retriever=options.retriever,
        gains=options.ig_service or (BY_LOG_PROB if measures else None),
        update=update,
    )


def start_visibly(runner: asyncio.Runner, options: argparse.Namespace, console: Console) -> Asker:
    """Start what the arguments name, and show what is waited for."""
    checkpoint = find_checkpoint(options.model)
    with console.status(Text(f"starting {checkpoint.name}")) as line:

        def update(_: int, note: str) -> None:
            line.update(Text(f"starting {checkpoint.name}: {note}"))

        asker = runner.run(start(options, checkpoint, update=update))
    console.print(Text(f"{checkpoint.name} is ready ({checkpoint.model})", style="dim"), soft_wrap=True)
    return asker


async def ask(asker: Asker, question: str, options: argparse.Namespace, view: TerminalView) -> Episode:
    """Ask a question and show the episode."""
    view.begin(question)
    settings = AskSettings(temperature=options.temperature, golds=tuple(options.gold))
    episode = await asker.ask(question, settings=settings, on_step=view.show, on_end=view.end)
    view.sum_up(episode, gain_unit=asker.gain_unit)
    return episode
