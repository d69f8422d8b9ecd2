"""The Hugging Face tokenizer adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.fakes import make_question
from verl.errors import ConfigError
from verl.rollout.tokenizer import HfTokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tokenizer(*, template: str | None) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    text = ["Where was Alice born 12 times? <search> the towns of 12"] * 5
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")
    tokenizer.chat_template = template
    return tokenizer


def test_prompt_is_rendered_by_the_chat_template_or_is_the_bare_text() -> None:
    question = make_question(text="Who?")
    with_template = HfTokenizer(make_tokenizer(template=TEMPLATE))
    assert with_template.decode(with_template.render_prompt(question)) == "<user>Who?<assistant>"
    bare = HfTokenizer(make_tokenizer(template=None))
    assert bare.decode(bare.render_prompt(question)) == "Who?"


def test_special_tokens_are_kept_in_texts_and_not_added_to_ids() -> None:
    raw = make_tokenizer(template=None)
    tokenizer = HfTokenizer(raw)
    assert tokenizer.decode(tokenizer.encode("a b<eos>")) == "a b<eos>"
    assert raw.eos_token_id in tokenizer.encode("a b<eos>")
    assert raw.bos_token_id not in tokenizer.encode("a b")
    assert tokenizer.pad_id == raw.eos_token_id


def test_ids_are_the_same_after_loading(tmp_path: Path) -> None:
    raw = make_tokenizer(template=TEMPLATE)
    raw.save_pretrained(tmp_path)
    text = "Where was Alice born 12 times?"
    assert HfTokenizer.from_pretrained(str(tmp_path)).encode(text) == HfTokenizer(raw).encode(text)


def test_a_class_that_replaces_the_saved_pre_tokenizer_is_refused(tmp_path: Path) -> None:
    make_tokenizer(template=None).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "Qwen2Tokenizer"})
    )
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    with pytest.raises(ConfigError, match=r"gives other ids than its own tokenizer\.json"):
        HfTokenizer.from_pretrained(str(tmp_path))


def test_a_missing_tokenizer_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no usable tokenizer"):
        HfTokenizer.from_pretrained(str(tmp_path))
