"""Tokenizers of the kinds that models have, made offline: how they begin a text and mark turns is real."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

TEXT = ["Where was Alice born 12 times? <search> the towns of 12\n\nuser assistant system Question: "] * 5
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML_WITH_TOOLS = CHATML.replace(  # as Qwen2.5's
    "{{ '<|im_start|>' + m['role']",
    "{% if m['role'] == 'tool' %}{{ '<|im_start|>user\\n<tool_response>\\n' + m['content'] + "
    "'\\n</tool_response><|im_end|>\\n' }}{% else %}{{ '<|im_start|>' + m['role']",
).replace("{% endfor %}", "{% endif %}{% endfor %}")
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
BAR = "\uff5c"
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '<|User|>' + m['content'] }}"
    "{% else %}{{ '<|Assistant|>' + m['content'] + eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|Assistant|><think>\\n' }}{% endif %}"
).replace("|", BAR)

QWEN3 = (  # thoughts are removed from all but the newest turn
    CHATML_WITH_TOOLS.replace(
        "+ '\\n' + m['content'] + '<|im_end|>",
        "+ '\\n' + (m['content'] if loop.last else m['content'].split('</think>')[-1]) + '<|im_end|>",
    ).replace(
        "assistant\\n' }}",
        "assistant\\n' }}{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}",
    )
)
THINKS_ALWAYS = CHATML_WITH_TOOLS.replace("assistant\\n' }}", "assistant\\n<think>\\n' }}")
LLAMA31 = LLAMA3.replace("m['role'] +", "('ipython' if m['role'] == 'tool' else m['role']) +").replace(
    "m['content'] | trim", "(m['content'] | tojson if m['role'] == 'tool' else m['content'] | trim)"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else m['role']) + '\\n' + m['content'] | trim "
    "+ '<end_of_turn>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
NO_BOS = (  # a space before the end of a turn, roles in ordinary text
    "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] + ' ' + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def byte_level() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    return backend


def begin_with(backend: Tokenizer, bos: str) -> None:
    backend.add_special_tokens([bos])
    backend.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, backend.token_to_id(bos))]
    )


def qwen() -> PreTrainedTokenizerFast:
    """No BOS, ChatML, control tokens that are not marked as special."""
    blank = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    backend = byte_level()
    backend.normalizer, backend.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    model = json.loads(backend.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        unk_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHATML,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tags = ("<think>", "</think>", "<|file_sep|>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    return tokenizer


def qwen_with_tools() -> PreTrainedTokenizerFast:
    """The same, with results of tools as messages of the user."""
    tokenizer = qwen()
    tokenizer.chat_template = CHATML_WITH_TOOLS
    return tokenizer


def qwen3() -> PreTrainedTokenizerFast:
    """Thinking can be switched off."""
    tokenizer = qwen()
    tokenizer.chat_template = QWEN3
    return tokenizer


def thinks_always() -> PreTrainedTokenizerFast:
    """The generation prompt opens the thought."""
    tokenizer = qwen()
    tokenizer.chat_template = THINKS_ALWAYS
    return tokenizer


def llama3() -> PreTrainedTokenizerFast:
    """BOS before every text, written by the chat template as well, which strips contents."""
    backend = byte_level()
    begin_with(backend, "<|begin_of_text|>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>"
    )
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>"]}
    )
    tokenizer.chat_template = LLAMA3
    return tokenizer


def llama31() -> PreTrainedTokenizerFast:
    """Results of tools are strings in JSON, of the role `ipython`."""
    tokenizer = llama3()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|eom_id|>", "<|python_tag|>"]})
    tokenizer.chat_template = LLAMA31
    return tokenizer


def gemma() -> PreTrainedTokenizerFast:
    """Neither a system role nor one of tools; another token ends texts than turns."""
    backend = byte_level()
    begin_with(backend, "<bos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<start_of_turn>", "<end_of_turn>"]})
    tokenizer.chat_template = GEMMA
    return tokenizer


def unigram_chat() -> PreTrainedTokenizerFast:
    """SentencePiece style, bytes for rare characters; BOS by the tokenizer, which the template leaves out."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator(
        [*TEXT, "<|/>[]"], trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["<unk>"])
    )
    settings = json.loads(backend.to_str())["model"]
    vocab = [*map(tuple, settings["vocab"]), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    backend.model = models.Unigram(vocab, settings["unk_id"], byte_fallback=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    begin_with(backend, "<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = NO_BOS
    return tokenizer


def deepseek() -> PreTrainedTokenizerFast:
    """Full-width bars; role markers that are not marked as special."""
    bos, eos = f"<{BAR}begin{BAR}>", f"<{BAR}end{BAR}>"
    backend = byte_level()
    begin_with(backend, bos)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tags = (f"<{BAR}User{BAR}>", f"<{BAR}Assistant{BAR}>", "<think>", "</think>")
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in tags])
    tokenizer.chat_template = DEEPSEEK
    return tokenizer


def llama2_base() -> PreTrainedTokenizerFast:
    """SentencePiece style: BOS, a space before every text, bytes for rare characters; no chat template."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special)
    backend.train_from_iterator([*TEXT, "<|/>"], trainer)
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = settings["added_tokens"][:3]  # bytes are ordinary tokens
    backend = Tokenizer.from_str(json.dumps(settings))
    begin_with(backend, "<s>")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def ends_every_text() -> PreTrainedTokenizerFast:
    """T5 style: the end token is a piece of the vocabulary and follows every text."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.decoder = decoders.Metaspace(prepend_scheme="never")
    trainer = trainers.UnigramTrainer(vocab_size=80, unk_token="<unk>", special_tokens=["</s>", "<unk>"])
    backend.train_from_iterator([*TEXT, "<|/>"], trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


FAMILIES = (qwen_with_tools, qwen3, thinks_always, llama3, llama31, gemma, unigram_chat)
"""The kinds of chat templates that models have."""
CHAT = (qwen, llama3, deepseek)
BASE = (llama2_base, ends_every_text)
