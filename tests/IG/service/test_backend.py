from __future__ import annotations

import json
from pathlib import Path

import pytest

from IG.config import resolve_config
from IG.service.models import model_digest, require_models

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
