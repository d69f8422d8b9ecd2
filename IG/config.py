"""Settings of the IG service: one table makes its command line, its help and the table of its README."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from IG.prompts import PromptStyle, PromptType, read_prompt_file
from IG.semantics import GainKind, ScoreKind
from serving.web.settings import (
    Parse,
    Setting,
    SettingError,
    Value,
    add_settings,
    parse_choice,
    parse_integer,
    parse_path,
    parse_real,
    parse_switch,
    parse_text,
    parse_token,
    read_token_file,
    resolve_settings,
)

_ROOT = Path(__file__).resolve().parents[1]
WORLD_GENERATOR = _ROOT / "world" / "models" / "generator"
WORLD_ENTAILMENT = _ROOT / "world" / "models" / "entailment"
LARGE_ENTAILMENT = "microsoft/deberta-v2-xlarge-mnli"


def _parse_prompt_file(path: str) -> Value:
    """Return the text of a prompt file. Raises SettingError."""
    if not path:
        return ""
    expected = "expected JSON with instruction and examples, see IG/service/README.md"
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
        read_prompt_file(text)
    except OSError as error:
        raise SettingError(f"{path!r}, which cannot be read ({error.strerror}); {expected}") from None
    except ValueError as error:
        raise SettingError(f"{path!r}: {error}; {expected}") from None
    return text


def _setting(default: str, parse: Parse, meaning: str, **others: Any) -> Any:
    """Return a required field that carries the other fields of its `Setting`."""
    metadata = {"default": default, "parse": parse, "meaning": meaning, **others}
    return field(metadata=metadata, repr="parse_flag" not in others)  # a secret is never shown


@dataclass(frozen=True, slots=True, kw_only=True)
class IGServiceConfig:
    """The resolved settings of the service."""

    host: str = _setting("127.0.0.1", parse_text, "address to listen on")
    port: int = _setting("8310", parse_integer(1, 65535), "port to listen on; leading zeros do not matter")
    model_path: str = _setting(
        str(WORLD_GENERATOR),
        parse_path,
        "generator: a folder or a hub name",
        shown_default="world/models/generator",
    )
    entailment_model: str = _setting(
        "",
        parse_path,
        "entailment model: a folder or a hub name",
        shown_default=f"world/models/entailment with the default generator, else {LARGE_ENTAILMENT}",
    )
    device: str = _setting("auto", parse_text, "auto, cpu, cuda or cuda:N")
    dtype: str = _setting(
        "auto",
        parse_choice(("auto", "float32", "bfloat16")),
        "precision of the generator: auto (float32 on a CPU, as the model says on a GPU), float32, or "
        "bfloat16 (on a CPU only where it has instructions for it)",
    )
    num_generations: int = _setting("10", parse_integer(1), "answers sampled per question and condition")
    sub_batch_size: int = _setting("512", parse_integer(1), "answers the engine decodes together")
    temperature: float = _setting("1.0", parse_real(0, 10), "sampling temperature; 0 is greedy")
    max_new_tokens: int = _setting("128", parse_integer(1), "longest sampled answer, in tokens")
    max_context_words: int = _setting(
        "4096",
        parse_integer(1),
        "longest context, in words (in scripts without spaces, characters); the first ones are kept",
    )
    prompt_type: PromptType = _setting(
        "default", parse_choice(PromptType), "instruction: default, chat or long-form"
    )
    prompt_style: PromptStyle = _setting(
        "plain",
        parse_choice(PromptStyle),
        "plain: the generator completes the prompt as text, as published; chat: it reads the prompt as a "
        "message in its chat template (instruct models)",
    )
    prompt_file: str = _setting(
        "",
        _parse_prompt_file,
        "JSON file with an instruction in place of --prompt-type's, and examples of questions and answers "
        "that the generator reads first",
        shown_default="none",
    )
    computation_chunk_size: int = _setting(
        "64", parse_integer(1), "pairs the entailment model judges together"
    )
    max_concurrent_requests: int = _setting(
        "512", parse_integer(1), "requests worked on at once; others wait"
    )
    max_queued_items: int = _setting(
        "16384", parse_integer(1), "items accepted and not answered yet; more get 429"
    )
    max_items: int = _setting("4096", parse_integer(1), "items per request; more get 413")
    max_body_mb: float = _setting(
        "64", parse_real(0, 4096, open_low=True), "longest request body, in MiB; more gets 413"
    )
    request_timeout_s: float = _setting(
        "600", parse_real(0, 86400, open_low=True), "deadline of a request that carries none"
    )
    shutdown_grace_s: float = _setting(
        "30", parse_real(0, 86400), "how long accepted work may go on when asked to stop"
    )
    compat: bool = _setting(
        "false",
        parse_switch,
        "give items that fail the score 0.0, as the published service does, instead of null",
    )
    token: str = _setting(
        "",
        parse_token,
        "bearer token that callers must present; the flag takes a file that holds it",
        shown_default="none",
        parse_flag=read_token_file,
    )
    num_workers: int = _setting("1", parse_integer(1), "workers on CPUs, each with both models")
    num_gpus: int = _setting("1", parse_integer(1), "workers on GPUs, one per GPU, each with both models")
    sample_cache_size: int = _setting("50000", parse_integer(1), "prompts whose samples are remembered")
    pair_cache_size: int = _setting("500000", parse_integer(1), "pairs whose entailment is remembered")
    score: ScoreKind = _setting(
        "hard", parse_choice(ScoreKind), "hard (semantic clusters) or soft (expected entailment)"
    )
    gain: GainKind = _setting(
        "difference", parse_choice(GainKind), "difference, log_ratio or entropy (needs no answers)"
    )
    threshold: float = _setting(
        "0.5", parse_real(0, 0.999), "entailment counts strictly above this probability"
    )
    seed: int = _setting("0", parse_integer(0), "seed of all sampling")
    gpu_memory_utilization: float = _setting(
        "0.5", parse_real(0, 1, open_low=True), "share of GPU memory for the generator"
    )
    max_model_len: int = _setting(
        "0", parse_integer(0), "longest prompt and answer in tokens; 0 is the model's own limit"
    )
    cpu_cache_gb: float = _setting(
        "0.5", parse_real(0, 1024, open_low=True), "key-value cache of the generator on a CPU"
    )
    cpu_threads: int = _setting(
        "0",
        parse_integer(0),
        "threads of each model on a CPU; 0 is a worker's share of the cores, half of it for the generator",
    )

    @property
    def log_floor(self) -> float:
        """Return the smallest score of the log-ratio: R samples cannot tell 0 from a score well below 1/R."""
        return 1 / (10 * self.num_generations)

    @property
    def max_body_bytes(self) -> int:
        """Return the longest request body, in bytes."""
        return int(self.max_body_mb * 2**20)

    @property
    def worker_count(self) -> int:
        """Return the number of workers: on CPUs or on GPUs, never both."""
        return max(self.num_workers, self.num_gpus)

    @property
    def device_kind(self) -> str:
        """Return where the generator must run: `auto`, `cpu` or `cuda`."""
        if self.num_workers > 1:
            return "cpu"
        return "cuda" if self.num_gpus > 1 else self.device.partition(":")[0]

    @property
    def cuda_device(self) -> str:
        """Return the GPU by its full name; `auto` and `cuda` are the first one."""
        kind, _, index = self.device.partition(":")
        return f"cuda:{int(index)}" if kind == "cuda" and index else "cuda:0"


SETTINGS: tuple[Setting, ...] = tuple(
    Setting(
        name=setting.name,
        flag="--" + ("token_file" if setting.name == "token" else setting.name).replace("_", "-"),
        env=f"IG_{setting.name.upper()}",
        **setting.metadata,
    )
    for setting in fields(IGServiceConfig)
)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line of the service; values stay text until `resolve_config`."""
    parser = argparse.ArgumentParser(
        prog="python -m IG.service.IG_server",
        description="Serve the information gain of contexts over HTTP. A flag wins over its variable.",
        allow_abbrev=False,
    )
    add_settings(parser, SETTINGS)
    return parser


def resolve_config(arguments: Sequence[str], *, environ: Mapping[str, str] | None = None) -> IGServiceConfig:
    """Resolve every setting. Raises SettingError; exits as argparse does on an unknown flag and on --help."""
    return resolve_flags(vars(build_parser().parse_args(arguments)), environ=environ)


def resolve_flags(flags: Mapping[str, str], *, environ: Mapping[str, str] | None = None) -> IGServiceConfig:
    """Resolve every setting from parsed flags, by name. Raises SettingError."""
    variables = os.environ if environ is None else environ
    values = resolve_settings(SETTINGS, flags=flags, environ=variables, derive_default=_derived_default)
    return _checked(IGServiceConfig(**values))  # type: ignore[arg-type]


def visible_device(config: IGServiceConfig, *, visible: str | None) -> str | None:
    """Return the CUDA_VISIBLE_DEVICES that shows only the configured GPU; None to leave it unchanged.

    `visible` is its present value. Raises SettingError when that shows too few GPUs.
    """
    kind, _, index = config.device.partition(":")
    return visible_gpu(int(index), visible=visible) if kind == "cuda" and index else None


def visible_gpu(index: int, *, visible: str | None) -> str:
    """Return the CUDA_VISIBLE_DEVICES entry of a GPU, counted from 0 among the visible ones.

    Raises SettingError when there are too few.
    """
    if visible is None:
        return str(index)
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if index >= len(names):
        raise SettingError(
            f"GPU {index} is needed (--device, --num-gpus), but CUDA_VISIBLE_DEVICES is {visible!r}, which "
            f"shows {len(names)} GPUs, counted from 0; choose one of those or let it show more"
        )
    return names[index]


def require_devices(
    config: IGServiceConfig, *, count_gpus: Callable[[], int], has_bfloat16: Callable[[], bool]
) -> None:
    """Refuse devices and precisions that this machine does not have. Raises SettingError.

    GPUs are counted only where the number matters: it takes seconds.
    """
    kind, _, index = config.device.partition(":")
    if kind == "cuda" or config.num_gpus > 1:
        wanted, found = int(index) + 1 if index else config.num_gpus, count_gpus()
        if found < wanted:
            raise SettingError(
                f"--num-gpus is {config.num_gpus} and --device is {config.device!r}, but PyTorch sees "
                f"{found} GPUs here; lower them, let CUDA_VISIBLE_DEVICES show more, or use --device cpu"
            )
    elif (
        config.dtype == "bfloat16"
        and not has_bfloat16()
        and (kind == "cpu" or config.num_workers > 1 or count_gpus() == 0)
    ):
        raise SettingError(
            "--dtype is 'bfloat16', but this CPU has no instructions for it (avx512_bf16 or amx_bf16); use "
            "--dtype auto, which is float32 on a CPU"
        )


def count_gpus() -> int:
    """Return how many GPUs PyTorch sees, asked in a child process: CUDA must not start in this one."""
    code = "import torch; print(torch.cuda.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def _derived_default(setting: Setting, values: Mapping[str, Value]) -> str:
    if setting.name != "entailment_model":
        return setting.default
    return str(WORLD_ENTAILMENT) if values["model_path"] == str(WORLD_GENERATOR) else LARGE_ENTAILMENT


def _checked(config: IGServiceConfig) -> IGServiceConfig:
    """Return the configuration if its devices fit together. Raises SettingError."""
    kind, _, index = config.device.partition(":")
    if kind not in ("auto", "cpu", "cuda") or (index and (kind != "cuda" or not index.isdigit())):
        raise SettingError(f"--device is {config.device!r}, expected auto, cpu, cuda or cuda:N")
    problem = ""
    if config.num_workers > 1 and config.num_gpus > 1:
        problem = ", expected one of them to be 1: workers are either on CPUs or on GPUs, one per GPU"
    elif config.num_workers > 1 and kind == "cuda":
        problem = f", but --device is {config.device!r}: workers on GPUs are counted by --num-gpus"
    elif config.num_gpus > 1 and (kind == "cpu" or index):
        problem = (
            f", but --device is {config.device!r}: use --device cuda (CUDA_VISIBLE_DEVICES says which GPUs), "
            "or --num-workers for workers on CPUs"
        )
    if problem:
        counts = f"--num-workers is {config.num_workers} and --num-gpus is {config.num_gpus}"
        raise SettingError(counts + problem)
    return config
