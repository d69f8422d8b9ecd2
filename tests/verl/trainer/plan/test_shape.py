"""Parameters are counted from config.json, and GPUs are known by the names that the driver reports."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from verl.errors import ConfigError
from verl.trainer.plan.gpus import find_gpu, identify_gpu, parse_gpus
from verl.trainer.plan.shape import KNOWN_SHAPES, UnknownShapeError, read_shape, shape_of

POLICY = Path(__file__).resolve().parents[4] / "world/models/policy"
QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def test_parameters_of_the_embedded_policy_are_those_of_its_file() -> None:
    with safe_open(POLICY / "model.safetensors", "pt") as file:
        count = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    assert read_shape(str(POLICY)).parameters == count


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(QWEN3, 596_049_920), (LLAMA, 134_515_008)],  # Qwen3-0.6B, SmolLM2-135M, as published
)
def test_parameters_of_published_models(config: dict[str, object], parameters: int) -> None:
    assert shape_of(config).parameters == parameters


@pytest.mark.parametrize(
    ("name", "parameters"), [("1.5B", 1_543_714_304), ("3B", 3_085_938_688), ("7B", 7_615_616_512)]
)
def test_parameters_of_the_models_of_the_recipes(name: str, parameters: int) -> None:
    assert KNOWN_SHAPES[f"Qwen/Qwen2.5-{name}"].parameters == parameters
    assert read_shape(f"Qwen/Qwen2.5-{name}-Instruct").parameters == parameters


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**LLAMA, "model_type": "mixtral"}, "model_type='mixtral'"),
        ({"model_type": "llama"}, "does not state the shape of the model: 'hidden_size'"),
    ],
)
def test_a_shape_that_is_unknown_is_named(config: dict[str, object], message: str) -> None:
    with pytest.raises(UnknownShapeError, match=message):
        shape_of(config)


def test_a_model_that_is_no_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="model_type='bert'"):
        read_shape(str(tmp_path))


def test_gpus_are_found_by_name_or_memory() -> None:
    assert find_gpu("h100").bandwidth == 3.35e12
    assert (find_gpu("48GB").memory, find_gpu("48GB").flops) == (48e9, None)
    with pytest.raises(ConfigError, match=r"placement\.gpu=TPU: expected one of H200, H100"):
        find_gpu("TPU")


def test_gpus_of_the_machine_are_those_that_are_visible() -> None:
    table = (
        "0, GPU-a, NVIDIA H100 80GB HBM3, 81559, 1\n"
        "1, GPU-b, NVIDIA H100 80GB HBM3, 81559, 16000\n"
        "2, GPU-c, NVIDIA A100-SXM4-40GB, [N/A], [N/A]\n"
    )
    assert [gpu.used / 2**20 for gpu in parse_gpus(table, visible=None)] == [1, 16000]
    (second,) = parse_gpus(table, visible="GPU-b")
    assert (second.gpu.name, round(second.gpu.memory / 1e9, 1), second.used) == ("H100", 85.5, 16000 * 2**20)
    assert parse_gpus(table, visible="") == ()
    assert identify_gpu("NVIDIA A100-SXM4-40GB", 42.4e9).bandwidth == 1.56e12
    assert identify_gpu("Other", 10e9).flops is None
