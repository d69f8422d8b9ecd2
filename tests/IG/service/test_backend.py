from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from IG.config import resolve_config
from IG.sampler import SampledAnswer, SamplingError
from IG.service.backend import PooledBackend
from IG.service.models import model_digest, require_models
from IG.service.pool import WorkerPool
from IG.sharing import ModelIdentity
from tests.fakes import FakeAnswerSampler, FakeEntailment

IDENTITY = ModelIdentity(generator="g", generator_digest="1", entailment="e", entailment_digest="2")


class FakeWorker:
    """Samples and judges as configured; never lost."""

    device = "cpu"

    def __init__(self, answers: Sequence[str] | Exception) -> None:
        self._sampler = FakeAnswerSampler({"": answers})
        self.entailment = FakeEntailment()
        self.is_closed = False

    async def sample(self, prompt: str) -> tuple[SampledAnswer, ...]:
        return await self._sampler.sample(prompt)

    async def judge(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        scores: list[float] = self.entailment.probabilities(pairs).tolist()
        return scores

    async def wait_lost(self) -> str:
        await asyncio.Event().wait()
        raise AssertionError

    async def aclose(self) -> None:
        self.is_closed = True


async def backend_over(worker: FakeWorker) -> PooledBackend:
    async def start(rank: int) -> FakeWorker:
        return worker

    pool = WorkerPool(start, num_workers=1, max_prompts_in_flight=8, pairs_per_batch=64)
    await pool.start()
    config = resolve_config(["--num-generations", "2"], environ={})
    return PooledBackend(pool, config=config, identity=IDENTITY)


async def test_warming_up_uses_both_models_and_closing_frees_them() -> None:
    worker = FakeWorker(["Paris", "Lyon"])
    backend = await backend_over(worker)
    await backend.warm_up()
    assert worker.entailment.batches
    assert (backend.workers.devices, backend.workers.num_ready) == (("cpu",), 1)
    await backend.aclose()
    assert worker.is_closed


async def test_models_that_cannot_measure_a_gain_are_not_ready() -> None:
    backend = await backend_over(FakeWorker(SamplingError("the prompt has 30 tokens, the model takes 20")))
    with pytest.raises(RuntimeError, match="first gain could not be measured: the prompt has 30 tokens"):
        await backend.warm_up()
    await backend.aclose()


LABELS = {"id2label": {"0": "entailment", "1": "neutral"}}


@pytest.mark.parametrize(
    ("flags", "generator", "entailment", "message"),
    [
        ([], {}, {}, "entailment model .* expected one called 'entailment'"),
        ([], {}, {"id2label": {"0": "yes", "1": 1}}, "has the labels .*'yes'"),
        ([], {}, {"id2label": ["entailment"]}, "has the labels .*'entailment'"),
        (["--max-new-tokens", "64"], {"max_position_embeddings": 64}, LABELS, "leaves no room for a prompt"),
        (["--max-new-tokens", "64", "--max-model-len", "32"], {}, LABELS, "leaves no room for a prompt"),
        (
            ["--max-model-len", "65"],
            {"max_position_embeddings": 64, "rope_scaling": ["yarn"]},
            LABELS,
            "has 64 positions",
        ),
        (["--prompt-style", "chat"], {}, LABELS, "--prompt-style chat: .* has no chat template"),
    ],
)
def test_models_that_do_not_fit_the_settings_are_refused_before_anything_starts(
    flags: list[str],
    generator: dict[str, object],
    entailment: dict[str, object],
    message: str,
    tmp_path: Path,
) -> None:
    for name, settings in (("generator", generator), ("entailment", entailment)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(settings))
    models = ["--model-path", str(tmp_path / "generator"), "--entailment-model", str(tmp_path / "entailment")]
    with pytest.raises(ValueError, match=message):
        require_models(resolve_config([*models, *flags], environ={}))


def test_a_stretched_rotary_embedding_takes_longer_prompts(tmp_path: Path) -> None:
    settings = LABELS | {"max_position_embeddings": 64, "rope_scaling": {"rope_type": "yarn", "factor": 4}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    folder = str(tmp_path)
    flags = ["--max-model-len", "256", "--model-path", folder, "--entailment-model", folder]
    require_models(resolve_config(flags, environ={}))


@pytest.mark.parametrize(
    ("file", "text"), [("tokenizer_config.json", '{"chat_template": "x"}'), ("chat_template.jinja", "x")]
)
def test_a_chat_template_is_found_where_models_have_it(file: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LABELS))
    (tmp_path / file).write_text(text)
    folder = str(tmp_path)
    flags = ["--prompt-style", "chat", "--model-path", folder, "--entailment-model", folder]
    require_models(resolve_config(flags, environ={}))


def test_a_digest_tells_models_apart_by_what_makes_them(tmp_path: Path) -> None:
    def model(name: str, **files: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for file, text in ({"config.json": "{}", "model.safetensors": "weights"} | files).items():
            (folder / file).write_text(text)
        return folder

    digest = model_digest(model("one"))
    assert len(digest) == 64
    assert model_digest(model("same", **{"README.md": "a note"})) == digest
    others = [
        model("config", **{"config.json": "{ }"}),
        model("weights", **{"model.safetensors": "Weights"}),
        model("shard", **{"model-2.safetensors": "weights"}),
        model("tokenizer", **{"tokenizer.json": "{}"}),
    ]
    assert len({digest, *map(model_digest, others)}) == 5
