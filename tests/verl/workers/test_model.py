from __future__ import annotations

import asyncio
import errno
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from serving.files import sha256_of_file
from tests.verl.workers.episodes import exported, make_worker, one_rank, random_batch, save
from verl.errors import ConfigError
from verl.trainer.config.schema import ModelConfig
from verl.workers.model import (
    check_model,
    compute_dtype,
    is_tied,
    packs_rows,
    resolve_model_folder,
)
from verl.workers.model_io import prepare_engine_model
from verl.workers.policy import PolicyWorker
from verl.workers.tensor_files import TensorFiles, write_weights


def logits(folder: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(2, 20)[None]).logits
    return result


def test_a_missing_model_is_named_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path=.*no config\.json"):
        resolve_model_folder(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("config.json", lambda content: b'{"model_type": "no_such_type"}'),
        (
            "config.json",
            lambda content: content.replace(b'"num_key_value_heads": ', b'"num_key_value_heads": 0'),
        ),
        ("model.safetensors", lambda content: content[:-9]),
    ],
)
def test_damaged_and_unfit_models_are_config_errors(
    tmp_path: Path, tied_folder: Path, name: str, change: Callable[[bytes], bytes]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tied_folder, folder)
    (folder / name).write_bytes(change((folder / name).read_bytes()))
    config = ModelConfig(path=str(folder))
    with pytest.raises(ConfigError, match=rf"path={folder} cannot be loaded as a causal language model"):
        make_worker(folder, trainable=False)
    with pytest.raises(ConfigError, match=rf"path={folder} cannot be loaded as a causal language model"):
        prepare_engine_model(config, device="cpu", folder=tmp_path / "engine")


def test_a_model_that_lacks_weights_or_has_others_is_refused(tmp_path: Path, model_folder: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    whole = load_file(model_folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, found in (
        ({key: weight for key, weight in whole.items() if key != name}, f"1 of {len(whole)} weights.*{name}"),
        (whole | {name: torch.zeros(3, 32)}, rf"{name} has shape \[3, 32\], not \[64, 32\]"),
    ):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConfigError, match=found):
            make_worker(folder)


@contextmanager
def file_size_limit(limit: int) -> Iterator[None]:
    """Let larger writes of this process fail, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_no_more_is_an_error_of_the_file(tmp_path: Path, model_folder: Path) -> None:
    worker = make_worker(model_folder)
    with pytest.raises(OSError, match="File too large") as caught, file_size_limit(4096):
        save(worker, str(tmp_path))
    file = str(tmp_path / "rank_0_of_1.safetensors")
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, file)
    with pytest.raises(OSError, match="File too large") as caught, file_size_limit(4096):
        worker.export_weights()
    assert caught.value.errno == errno.EFBIG
    assert not Path(caught.value.filename).parent.exists()


def export(worker: PolicyWorker, folder: Path) -> None:
    save(worker, str(folder / "state"))
    asyncio.run(worker.export_hf(str(folder / "state"), str(folder)))


@pytest.mark.parametrize(
    ("setting", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("float32", "cuda", torch.float32),
        ("bfloat16", "cpu", torch.bfloat16),
    ],
)
def test_the_precision_is_that_of_the_device_unless_it_is_set(
    setting: str, device: str, expected: torch.dtype
) -> None:
    assert compute_dtype(ModelConfig(path="m", dtype=setting), device=device) == expected


def test_settings_that_this_machine_cannot_do_are_refused(model_folder: Path) -> None:
    config = ModelConfig(path=str(model_folder))
    with pytest.raises(ConfigError, match="flash_attention_2 needs a GPU"):
        check_model(replace(config, attention="flash_attention_2"), device="cpu")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sliding_window": 64, "use_sliding_window": False}, True),
        ({"sliding_window": 64, "use_sliding_window": True, "max_window_layers": 1}, False),
        ({"layer_types": ["full_attention", "linear_attention"]}, False),
        ({"model_type": "mistral", "sliding_window": 64}, False),
        ({"model_type": "mistral", "sliding_window": 256}, True),  # as long as the longest context
        ({"model_type": "mistral", "sliding_window": None}, True),
        ({"model_type": "mamba"}, False),
        ({"model_type": "gptj"}, False),
    ],
)
def test_only_models_that_attend_to_the_whole_context_compute_trajectories_together(
    tmp_path: Path, model_folder: Path, settings: dict[str, object], expected: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    content = json.loads((folder / "config.json").read_text())
    del content["layer_types"], content["use_sliding_window"]
    (folder / "config.json").write_text(json.dumps(content | settings))
    assert packs_rows(ModelConfig(path=str(folder))) is expected


@pytest.mark.parametrize("fixture", ["model_folder", "tied_folder"])
def test_exported_model_has_the_trained_logits(
    fixture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    source: Path = request.getfixturevalue(fixture)
    worker = make_worker(source)
    worker.update(one_rank(random_batch(4)))
    export(worker, tmp_path)
    ids = np.arange(2, 20, dtype=np.int32)
    expected = worker.probe(ids)[1:]
    got = logits(tmp_path).log_softmax(-1)[0, :-1].gather(-1, torch.arange(3, 20)[:, None])[:, 0]
    np.testing.assert_allclose(got.numpy(), expected, atol=2e-5)
    assert not torch.equal(logits(tmp_path), logits(source))
    assert is_tied(tmp_path) == is_tied(source)


def test_tokenizer_files_travel_unchanged(model_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for file in model_folder.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "tokenizer.json").write_text('{"odd":   "spacing"}')
    (source / "chat_template.jinja").write_text("{{ messages }}")
    export(make_worker(source), tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"odd":   "spacing"}'
    assert (tmp_path / "out" / "chat_template.jinja").is_file()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"


def test_the_cpu_engine_gets_an_untied_copy_of_a_tied_model(
    tied_folder: Path, model_folder: Path, tmp_path: Path
) -> None:
    folder = prepare_engine_model(
        ModelConfig(path=str(tied_folder)), device="cpu", folder=tmp_path / "engine"
    )
    assert folder == tmp_path / "engine"
    assert not is_tied(folder)
    torch.testing.assert_close(logits(folder), logits(tied_folder))
    for path, device in ((model_folder, "cpu"), (tied_folder, "cuda")):
        config = ModelConfig(path=str(path))
        assert prepare_engine_model(config, device=device, folder=tmp_path / "unused") == path


def test_weights_for_the_engine_hold_the_tied_head_twice(tied_folder: Path, model_folder: Path) -> None:
    worker = make_worker(tied_folder)
    worker.update(one_rank(random_batch(4)))
    with exported(worker) as file:
        state = load_file(file)
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    with exported(make_worker(model_folder)) as file:
        assert load_file(file).keys() == state.keys()


def test_a_large_model_is_written_to_several_files_with_an_index(model_folder: Path, tmp_path: Path) -> None:
    files = TensorFiles.of_model(model_folder)
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    written = write_weights(folder, files.layout, files.read, max_bytes=20_000)
    assert len(written) > 2
    for path, record in written.items():
        assert record == {"size": path.stat().st_size, "sha256": sha256_of_file(path)}
        assert record["size"] < 30_000
    torch.testing.assert_close(logits(folder), logits(model_folder), rtol=0, atol=0)
    ids = np.arange(2, 20, dtype=np.int32)
    np.testing.assert_array_equal(make_worker(folder).probe(ids), make_worker(model_folder).probe(ids))
