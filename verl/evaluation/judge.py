"""Judge answers by a language model: `python -m verl.evaluation.judge FOLDER [--settings judge.yaml]`.

Exact matches are right and missing answers wrong without a call. The others go to an endpoint with the
chat completions of OpenAI. Verdicts are cached on disk by the content of the request, so that a repeated
start asks only what is left. They are written to the folder of the evaluation (`judgements.jsonl`,
`judge.json`), and its tables and page are written again. The last line of stdout is JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from urllib.parse import urlsplit

from serving.files import write_atomically, write_json_atomically
from serving.http import CallError, JsonService
from serving.redaction import redact_text
from serving.web.settings import expand_home
from verl.errors import ConfigError, ServiceError
from verl.evaluation.judge_settings import PACKAGED_FILE, JudgeSettings, load_settings
from verl.evaluation.metrics import is_right
from verl.evaluation.page import write_report
from verl.evaluation.records import JUDGE_FILE, VERDICTS_FILE, ResultRecord, read_results
from verl.evaluation.verdicts import JudgeRecord, VerdictRecord
from verl.utils.entry import error_line
from verl.utils.http import translated_settings

CACHE = Path("~/.cache/inforeasoner/judge")
_VERDICTS = {"correct": 1.0, "incorrect": 0.0}
_MESSAGE_TOKENS = 64
"""More than the tokens that a chat template puts around one message."""
_REFUSED = frozenset({400, 401, 403, 404})
"""Statuses of a wrong key, model or URL, which every further call would meet again."""
_MAX_FAILURES_IN_A_ROW = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """The verdict on one request, or why there is none."""

    verdict: float | None
    source: str
    failure: str | None = None


@dataclass(slots=True, kw_only=True)
class Budget:
    """Calls and tokens that are left. A call takes an upper bound and gives back what it did not use."""

    calls: int
    tokens: int

    def take(self, tokens: int) -> bool:
        """Return whether a call of at most so many tokens fits; if so, it is taken."""
        if self.calls < 1 or self.tokens < tokens:
            return False
        self.calls -= 1
        self.tokens -= tokens
        return True


class Judge:
    """Asks the endpoint, with a cache on disk and a budget. Use it on one event loop, and close it."""

    def __init__(self, settings: JudgeSettings, *, token: str | None, cache: Path) -> None:
        """Raise ConfigError for a bad URL or token."""
        self._settings = settings
        self._cache = cache
        self.budget = Budget(calls=settings.max_calls, tokens=settings.max_tokens)
        self.models: set[str] = set()
        """Names under which the endpoint replied."""
        self._failures_in_a_row = 0
        self._slots = asyncio.Semaphore(settings.max_concurrent)
        with translated_settings():
            self._service = JsonService(
                settings.base_url,
                name="judge",
                timeout_s=settings.timeout_s,
                max_connections=settings.max_concurrent,
                fix="check base_url, the model and the key, or raise timeout_s",
                token=token,
                use_proxy=not settings.is_local,
            )

    async def judge(self, requests: Sequence[str]) -> dict[str, Reply]:
        """Return the reply to each prompt. Raises ServiceError if the endpoint refuses or does not work."""
        distinct = list(dict.fromkeys(requests))
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._judge(prompt)) for prompt in distinct]
        except BaseExceptionGroup as stopped:
            raise stopped.exceptions[0] from None
        return dict(zip(distinct, (task.result() for task in tasks), strict=True))

    async def aclose(self) -> None:
        """Close the connections."""
        await self._service.aclose()

    async def _judge(self, prompt: str) -> Reply:
        payload = self._payload(prompt)
        content = json.dumps([self._settings.base_url, payload], sort_keys=True)
        path = self._cache / f"{sha256(content.encode()).hexdigest()}.json"
        if (verdict := _read_cached(path)) is not None:
            return Reply(verdict=verdict, source="cache")
        async with self._slots:
            # A token has at least one byte of text.
            bound = len(prompt.encode()) + _MESSAGE_TOKENS + self._settings.max_reply_tokens
            if not self.budget.take(bound):
                return Reply(verdict=None, source="capped", failure="capped: max_calls or max_tokens")
            reply = await self._ask(payload, bound=bound)
        if reply.verdict is not None:
            write_json_atomically(path, {"verdict": reply.verdict, "request": payload})
        return reply

    def _payload(self, prompt: str) -> dict[str, object]:
        return {
            "model": self._settings.model,
            "messages": [{"role": "user", "content": prompt}],
            "temperature": 0,
            "seed": 0,
            "max_tokens": self._settings.max_reply_tokens,
        }

    async def _ask(self, payload: Mapping[str, object], *, bound: int) -> Reply:
        try:
            answer = await self._service.post("/chat/completions", payload)
        except CallError as error:
            message = redact_text(error.message)
            if error.status in _REFUSED:
                raise ServiceError("judge", message) from error
            return self._failed(f"judge_failed: {message}")
        if (used := _total_tokens(answer)) is not None:
            self.budget.tokens += bound - used
        self.models.add(str(answer.get("model")))
        verdict, text = parse_verdict(answer)
        if verdict is None:
            return self._failed(f"unreadable_verdict: {text}")
        self._failures_in_a_row = 0
        return Reply(verdict=verdict, source="judge")

    def _failed(self, failure: str) -> Reply:
        """Return a reply without a verdict. Raises ServiceError if nothing but failures came lately."""
        self._failures_in_a_row += 1
        if self._failures_in_a_row >= _MAX_FAILURES_IN_A_ROW:
            raise ServiceError(
                "judge",
                f"{self._failures_in_a_row} answers in a row could not be judged; last failure: {failure}. "
                "The same command asks only what is left",
            )
        return Reply(verdict=None, source="failed", failure=failure)


def parse_verdict(answer: Mapping[str, object]) -> tuple[float | None, str]:
    """Return the verdict of a chat completion and its text; None unless it is exactly one of the words."""
    try:
        text = answer["choices"][0]["message"]["content"]  # type: ignore[index]
    except (KeyError, IndexError, TypeError):
        return None, f"no choices[0].message.content in {str(answer)[:200]!r}"
    if not isinstance(text, str):
        return None, f"the content is {str(text)[:200]!r}"
    return _VERDICTS.get(text.strip().strip(".\"'*`").lower()), repr(text[:200])


def _total_tokens(answer: Mapping[str, object]) -> int | None:
    usage = answer.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, Mapping) else None
    return total if isinstance(total, int) and total >= 0 else None


def _read_cached(path: Path) -> float | None:
    """Return a cached verdict; None if there is none, also in a file that is damaged."""
    try:
        verdict = json.loads(path.read_bytes())["verdict"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return float(verdict) if verdict in _VERDICTS.values() else None


async def judge_folder(
    folder: Path, *, settings: JudgeSettings, digest: str, token: str | None, cache: Path
) -> JudgeRecord:
    """Judge the answers of an evaluation folder; return what `judge.json` says.

    Raises DataError for a folder without results, ServiceError for an endpoint that does not work.
    """
    results = [result for result in read_results(folder) if result["failure"] is None]
    prompts = [settings.write_prompt(r["question"], r["golds"], r["prediction"] or "") for r in results]
    known = [_judge_without_call(result) for result in results]
    judge = Judge(settings, token=token, cache=cache)
    try:
        asked = [prompt for prompt, reply in zip(prompts, known, strict=True) if reply is None]
        replies = await judge.judge(asked)
    finally:
        await judge.aclose()
    records = [
        _make_record(result, reply or replies[prompt])
        for result, prompt, reply in zip(results, prompts, known, strict=True)
    ]
    failures = Counter(r["failure"].partition(":")[0] for r in records if r["failure"] is not None)
    summary: JudgeRecord = {
        "format": 1,
        "model": settings.model,
        "replied_as": sorted(judge.models),
        "sha256": digest,
        "settings": settings.model_dump(),
        "answers": len(records),
        "sources": dict(Counter(record["source"] for record in records).most_common()),
        "not_judged": sum(record["verdict"] is None for record in records),
        "failures": dict(failures.most_common()),
        "calls": settings.max_calls - judge.budget.calls,
        "tokens": settings.max_tokens - judge.budget.tokens,
    }
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(folder / VERDICTS_FILE, "".join(lines))
    write_json_atomically(folder / JUDGE_FILE, summary)
    return summary


def _judge_without_call(result: ResultRecord) -> Reply | None:
    if is_right(result):
        return Reply(verdict=1.0, source="exact_match")
    if not (result["prediction"] or "").strip():
        return Reply(verdict=0.0, source="no_answer")
    return None


def _make_record(result: ResultRecord, reply: Reply) -> VerdictRecord:
    return {
        "uid": result["uid"],
        "sample": result["sample"],
        "prediction": result["prediction"],
        "verdict": reply.verdict,
        "source": reply.source,
        "failure": reply.failure,
    }


def read_token(settings: JudgeSettings) -> str | None:
    """Return the key from the environment. Raises ConfigError if the endpoint needs one and there is none."""
    token = os.environ.get(settings.key_variable) or None
    if token is None and not settings.is_local:
        raise ConfigError(
            f"the environment variable {settings.key_variable} is not set; it must have the key of "
            f"{urlsplit(settings.base_url).hostname} (key_variable in the settings of the judge names it)"
        )
    return token


def main(arguments: Sequence[str] | None = None) -> None:
    """Judge an evaluation, or exit with one line that says why that is not possible."""
    parser = argparse.ArgumentParser(
        prog="python -m verl.evaluation.judge",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of an evaluation")
    parser.add_argument(
        "--settings", type=Path, default=PACKAGED_FILE, help="YAML file (default: %(default)s)"
    )
    parser.add_argument(
        "--cache", type=Path, default=CACHE, help="folder of all verdicts (default: %(default)s)"
    )
    options = parser.parse_args(expand_home(arguments))
    with error_line():
        settings, digest = load_settings(options.settings)
        token = read_token(settings)
        cache = options.cache.expanduser()
        summary = asyncio.run(
            judge_folder(options.folder, settings=settings, digest=digest, token=token, cache=cache)
        )
        write_report(options.folder)
        print(json.dumps(summary), flush=True)  # noqa: T201 (for the program that started this one)


if __name__ == "__main__":
    main()
