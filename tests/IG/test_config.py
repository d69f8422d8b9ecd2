from __future__ import annotations

from pathlib import Path

import pytest

import IG.config as config_module
from IG.config import SETTINGS, build_parser, require_devices, resolve_config, visible_device
from serving.web.settings import SettingError
from tests.settings_table import settings_table

README = Path(config_module.__file__).parent / "service" / "README.md"


def test_flag_wins_over_variable_wins_over_default() -> None:
    environ = {"IG_PORT": "0310", "IG_NUM_GENERATIONS": "4", "IG_TEMPERATURE": "0", "IG_HOST": ""}
    config = resolve_config(["--num-generations", "6"], environ=environ)
    assert (config.port, config.num_generations, config.temperature) == (310, 6, 0.0)
    assert (config.host, config.max_new_tokens, config.score, config.gain) == (
        "127.0.0.1",
        128,
        "hard",
        "difference",
    )


def test_entailment_model_follows_the_generator_unless_it_is_named() -> None:
    assert resolve_config([], environ={}).entailment_model.endswith("world/models/entailment")
    large = resolve_config(["--model-path", "Qwen/Qwen2.5-3B"], environ={})
    assert large.entailment_model == "microsoft/deberta-v2-xlarge-mnli"
    named = resolve_config(["--model-path", "Qwen/Qwen2.5-3B"], environ={"IG_ENTAILMENT_MODEL": "mine"})
    assert named.entailment_model == "mine"


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--port", "70000"], {}, r"--port is '70000', expected a whole number from 1 to 65535"),
        ([], {"IG_PORT": "http"}, r"\$IG_PORT is 'http', expected a whole number"),
        (["--score", "medium"], {}, r"--score is 'medium', expected one of hard, soft"),
        (["--threshold", "1"], {}, r"--threshold is '1', expected a number from 0 to 0.999"),
        (
            ["--num-gpus", "4", "--num-workers", "2"],
            {},
            r"--num-workers is 2 and --num-gpus is 4, expected one",
        ),
        (["--num-gpus", "4", "--device", "cpu"], {}, r"--num-gpus is 4, but --device is 'cpu'"),
        (["--num-gpus", "2", "--device", "cuda:1"], {}, r"but --device is 'cuda:1': use --device cuda "),
        (["--device", "cuda"], {"IG_NUM_WORKERS": "2"}, r"workers on GPUs are counted by --num-gpus"),
        (["--request-timeout-s", "inf"], {}, r"--request-timeout-s is 'inf'"),
        (
            ["--token-file", "/no/such/file"],
            {},
            r"--token-file is '/no/such/file', which cannot be read \(No such",
        ),
        (["--device", "tpu"], {}, r"--device is 'tpu', expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_a_bad_value_is_named_with_its_source(
    arguments: list[str], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(SettingError, match=message):
        resolve_config(arguments, environ=environ)


def test_a_token_comes_from_the_environment_or_a_file_and_is_never_shown(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("s3cret-of-file\n")
    assert resolve_config([], environ={}).token == ""
    from_environment = resolve_config([], environ={"IG_TOKEN": "s3cret"})
    from_file = resolve_config(["--token-file", str(file)], environ={"IG_TOKEN": "s3cret"})
    assert (from_environment.token, from_file.token) == ("s3cret", "s3cret-of-file")
    assert "s3cret" not in f"{from_environment!r} {from_environment} {from_file}"


@pytest.mark.parametrize(
    ("device", "visible", "expected", "reported"),
    [
        ("auto", "2,3", None, "cuda:0"),
        ("cuda", None, None, "cuda:0"),
        ("cuda:1", None, "1", "cuda:1"),
        ("cuda:1", "2, GPU-5a", "GPU-5a", "cuda:1"),
        ("cuda:0", "7", "7", "cuda:0"),
    ],
)
def test_a_gpu_is_counted_among_the_visible_ones(
    device: str, visible: str | None, expected: str | None, reported: str
) -> None:
    config = resolve_config(["--device", device], environ={})
    assert visible_device(config, visible=visible) == expected
    assert config.cuda_device == reported


@pytest.mark.parametrize("visible", ["", "0", "0,1"])
def test_a_gpu_that_is_not_visible_is_refused(visible: str) -> None:
    config = resolve_config(["--device", "cuda:2"], environ={})
    with pytest.raises(SettingError, match=rf"GPU 2 is needed .* but CUDA_VISIBLE_DEVICES is '{visible}'"):
        visible_device(config, visible=visible)


@pytest.mark.parametrize(
    ("flags", "num_gpus", "message"),
    [
        (["--num-gpus", "4"], 0, "--num-gpus is 4 and --device is 'auto', but PyTorch sees 0 GPUs"),
        (["--num-gpus", "4", "--device", "cuda"], 2, "PyTorch sees 2 GPUs"),
        (["--device", "cuda"], 0, "--device is 'cuda', but PyTorch sees 0 GPUs"),
        (["--device", "cuda:2"], 2, "--device is 'cuda:2', but PyTorch sees 2 GPUs"),
        (["--dtype", "bfloat16", "--device", "cpu"], 4, "--dtype is 'bfloat16', but this CPU"),
        (["--dtype", "bfloat16", "--num-workers", "2"], 4, "--dtype is 'bfloat16', but this CPU"),
        (["--dtype", "bfloat16"], 0, "--dtype is 'bfloat16', but this CPU"),
    ],
)
def test_what_the_machine_does_not_have_is_refused(flags: list[str], num_gpus: int, message: str) -> None:
    config = resolve_config(flags, environ={})
    with pytest.raises(SettingError, match=message):
        require_devices(config, count_gpus=lambda: num_gpus, has_bfloat16=lambda: False)
    require_devices(config, count_gpus=lambda: 4, has_bfloat16=lambda: True)


@pytest.mark.parametrize("flags", [[], ["--device", "cpu"], ["--num-workers", "2"]])
def test_gpus_are_not_counted_where_that_decides_nothing(flags: list[str]) -> None:
    def count() -> int:
        raise AssertionError("it takes seconds")

    require_devices(resolve_config(flags, environ={}), count_gpus=count, has_bfloat16=lambda: False)


def test_readme_has_the_table_and_help_has_every_flag() -> None:
    assert settings_table(SETTINGS) in README.read_text()
    help_text = build_parser().format_help()
    assert all(setting.flag in help_text and setting.env in help_text for setting in SETTINGS)
