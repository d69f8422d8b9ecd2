"""The two tokenizers of the world, trained on its own text.

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
from transformers import BertTokenizer, PreTrainedTokenizerFast, Qwen2Tokenizer

from world import facts, names, text

ALL_NAMES = tuple(
    word
    for group in (
        names.WOMEN,
        names.MEN,
        names.SURNAMES,
        names.COUNTRIES,
        names.TOWNS,
        names.UNIVERSITIES,
        names.AWARDS,
        names.AWARD_KINDS,
        names.INSTRUMENTS,
        names.ADJECTIVES,
        names.NOUNS,
        names.FIRMS,
        names.FIRM_KINDS,
    )
    for word in group
)


def training_text(*, seed: int) -> Iterator[str]:
    """Text in which every name and every fixed phrase is frequent enough to become one token."""
    rng = Random(seed)
    for word in ALL_NAMES:
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
            shown = [text.passage(fact, rng) for _ in range(4)]
            yield text.observation(shown)
            yield f"<think> {text.statement(fact)}.</think><answer> {value.name}</answer>"
            yield f"<search> {text.query(relation, subject)}</search> {' '.join(value.golds)}"
            for wording in (0, 1):
                yield text.one_hop_question(relation, subject, wording=wording)
        for bridge in facts.BRIDGES:
            for relation in facts.relations_of(facts.Kind.person):
                yield text.two_hop_question(
                    bridge, facts.random_entity(bridge.subject, rng), relation, wording=0
                )


THOUGHTS = (
    "<think> I need the",
    "<think> I know this.",
    "<think> Let me search.",
    "<think> Not found.",
    "<think> I am not sure.",
)


def language_tokenizer(*, vocabulary: int, seed: int) -> Qwen2Tokenizer:
    blank = Qwen2Tokenizer(vocab={}, merges=[])
    backend = blank.backend_tokenizer
    fresh = Tokenizer(models.BPE())
    fresh.normalizer, fresh.pre_tokenizer, fresh.decoder = (
        backend.normalizer,
        backend.pre_tokenizer,
        backend.decoder,
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(text.SPECIAL) - len(text.TAGS),
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    plain = (_without_tags(line) for line in training_text(seed=seed))
    fresh.train_from_iterator(plain, trainer)
    saved = json.loads(fresh.to_str())["model"]
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
    _require_whole_names(tokenizer)
    return tokenizer


def _without_tags(line: str) -> str:
    for tag in text.TAGS:
        line = line.replace(tag, "")
    return line


def _require_whole_names(tokenizer: PreTrainedTokenizerFast) -> None:
    split = [word for word in ALL_NAMES if len(tokenizer.encode(f" {word}", add_special_tokens=False)) != 1]
    if split:
        raise ValueError(f"the vocabulary is too small: {len(split)} names are not one token, as {split[:5]}")


def text_tokenizer(*, seed: int) -> BertTokenizer:
    """Lower-casing WordPiece: the words of the world's text whole, anything else in characters.

    The vocabulary is written down rather than trained: the WordPiece trainer breaks ties differently from
    process to process.
    """
    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    words: set[str] = set()
    for line in training_text(seed=seed):
        pieces = splitter.pre_tokenize_str(normalizer.normalize_str(_without_tags(line)))
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
