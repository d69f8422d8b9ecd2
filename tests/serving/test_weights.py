"""No model keeps the file of its weights mapped, which others may cut short or rewrite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from IG.entailment import EntailmentModel
from search_r1.search.encoder import TextEncoder
from search_r1.search.recipes import EncoderSpec
from search_r1.search.rerank import CrossEncoderReranker
from tests.search_r1.search.subjects import Files
from verl.trainer.config.schema import ModelConfig
from verl.workers.model_io import build_model, fill_model

MODELS = Path(__file__).resolve().parents[2] / "world" / "models"


def load_policy(folder: Path) -> object:
    model = build_model(ModelConfig(path=str(folder)), device="cpu", trainable=False)
    fill_model(model, model, folder=folder, device=torch.device("cpu"))
    return model


@pytest.mark.parametrize(
    ("name", "load"),
    [
        ("encoder", lambda folder: TextEncoder(EncoderSpec(path=str(folder), family="e5"), device="cpu")),
        ("reranker", lambda folder: CrossEncoderReranker(folder, device="cpu")),
        (
            "entailment",
            lambda folder: EntailmentModel.load(str(folder), device="cpu", batch_size=1, cpu_threads=1),
        ),
        ("policy", load_policy),
    ],
)
def test_the_file_of_the_weights_is_not_mapped(
    name: str, load: Callable[[Path], object], tmp_path: Path
) -> None:
    source = Files(tmp_path).reranker if name == "reranker" else MODELS / name
    folder = shutil.copytree(source, tmp_path / "model")
    model = load(folder)
    assert str(folder) not in Path("/proc/self/maps").read_text()
    del model
