from __future__ import annotations

import json
from pathlib import Path

import pytest

from serving.model_files import (
    ModelNotFoundError,
    check_weights,
    find_local_model,
    find_model,
    find_model_file,
    read_model_config,
)


def test_a_name_is_a_folder_with_a_model_or_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_local_model("owner/name") is None
    for name in ("/no/folder", "./gone", "name", "a/b/c", "../owner/name"):
        with pytest.raises(ModelNotFoundError, match=f"^{name}: no such folder, and not a hub id"):
            find_local_model(name)
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    with pytest.raises(ModelNotFoundError, match=r"^owner/name: the folder has no config\.json"):
        find_local_model("owner/name")
    (folder / "config.json").write_text("{}")
    assert find_local_model("owner/name") == find_model("owner/name") == Path("owner/name")
    with pytest.raises(ModelNotFoundError, match=r"no tokenizer\.json"):
        find_model_file("owner/name", "tokenizer.json")


def test_the_reason_why_the_hub_gives_nothing_is_quoted() -> None:
    with pytest.raises(ModelNotFoundError, match=r"the Hugging Face hub did not give it \(.+\); check"):
        find_model("no-such-owner/no-such-model")


@pytest.mark.parametrize("text", ["", "[]", "{"])
def test_a_broken_configuration_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelNotFoundError, match=r"its config\.json is not "):
        read_model_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x"}))
    assert read_model_config(tmp_path) == {"model_type": "x"}


def test_weights_must_be_safetensors(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"no \*\.safetensors"):
        check_weights(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ModelNotFoundError, match=r"pytorch_model\.bin only, a pickle.*save_pretrained"):
        check_weights(tmp_path)
    (tmp_path / "model.safetensors").touch()
    check_weights(tmp_path)
