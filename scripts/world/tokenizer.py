"""The two tokenizers of the world, made from its own text.

`language_tokenizer` (policy, generator) is a byte-level BPE behind Qwen2's own pre-tokenization: transformers
puts Qwen2's pre-tokenizer in the place of any other one when it loads a folder with a Qwen2 config, so a BPE
that was trained behind another one gets other ids after reloading, silently. `text_tokenizer` (encoder,
entailment) is a lower-casing WordPiece.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, Qwen2Tokenizer

from world import facts, names, text

THOUGHTS = (
    "<think> I need the",
    "<think> I know this.",
    "<think> Let me search.",
    "<think> Not found.",
    "<think> I am not sure.",
)


def training_text(*, seed: int) -> Iterator[str]:
    """Yield text without tags, in which every name and fixed phrase is frequent enough for one token."""
    for line in _tagged_text(Random(seed)):
        for tag in text.TAGS:
            line = line.replace(tag, "")
        yield line


def _tagged_text(rng: Random) -> Iterator[str]:
    for word in names.ALL:
        yield f" {word}" * 30
        yield f"{word}\n" * 4
    fixed = (
        text.prompt("Where was Alice born?"),
        text.INVALID_ACTION,
        text.short_answer_prompt("Who?", context='Doc 1(Title: "'),
        *THOUGHTS,
    )
    for _ in range(40):
        yield from fixed
    for _ in range(15):
        for relation in facts.RELATIONS:
            subject = facts.random_entity(relation.subject, rng)
            value = facts.random_entity(relation.value, rng)
            fact = facts.Fact(subject, relation, value)
            yield text.observation([text.write_contents(fact, rng) for _ in range(4)])
            yield f"<think> {text.statement(fact, value.name)}.</think><answer> {value.name}</answer>"
            yield f"<search> {text.query(relation, subject)}</search> {' '.join(value.golds)}"
            for wording in (0, 1):
                yield text.question([relation], subject, wording=wording)
        for bridge in facts.BRIDGES:
            for relation in facts.relations_of(facts.Kind.person):
                subject = facts.random_entity(bridge.subject, rng)
                yield text.question([bridge, relation], subject, wording=0)


def language_tokenizer(*, vocabulary: int, seed: int) -> Qwen2Tokenizer:
    """Train the tokenizer of policy and generator. Raises ValueError if a name is not one token."""
    qwen = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer, bpe.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(text.SPECIAL) - len(text.TAGS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(training_text(seed=seed), trainer)
    saved = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=saved["vocab"],
        merges=[tuple(pair) for pair in saved["merges"]],
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=text.CHAT_TEMPLATE,
        model_max_length=2048,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(text.SPECIAL)})
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in text.TAGS])
    split = [word for word in names.ALL if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"the vocabulary is too small: {len(split)} names are not one token, as {split[:5]}")
    return tokenizer


def text_tokenizer(*, seed: int) -> BertTokenizer:
    """Return a lower-casing WordPiece: words of the world's text whole, anything else in characters.

    The vocabulary is listed, not trained: the WordPiece trainer breaks ties differently in every process.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: set[str] = set()
    for line in training_text(seed=seed):
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(line))
        words.update(piece for piece, _ in pieces)
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    tokens = [
        *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        *characters,
        *(f"##{character}" for character in characters),
        *sorted(words - set(characters)),
    ]
    vocab = {token: index for index, token in enumerate(tokens)}
    return BertTokenizer(vocab=vocab, do_lower_case=True, model_max_length=512)
