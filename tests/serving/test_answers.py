from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from serving.answers import (
    AnswerRule,
    complete_question,
    find_answer,
    fold,
    normalize_answer,
    same_text_key,
    split_words,
    truncate_words,
)

TEXTS = st.text(max_size=12) | st.text(
    alphabet="aB the\"'.,!?5-\u201c\u201d\u2019\u2013\uff15\u0301\u200b\u3002京ガ", max_size=10
)


@pytest.mark.parametrize(
    ("text", "published", "folded"),
    [
        ("The U.S. Army", "us army", "us army"),
        (" An  Apple-pie ", "applepie", "applepie"),
        ("Zürich\n東京", "zürich 東京", "zürich 東京"),
        # Typography.
        ("\u201cquoted\u201d it\u2019s", "\u201cquoted\u201d it\u2019s", "quoted its"),
        ("1939\u20131945", "1939\u20131945", "19391945"),
        ("\u22125", "\u22125", "5"),  # as "-5" by either rule
        ("\uff11\uff19\uff19\uff10", "\uff11\uff19\uff19\uff10", "1990"),
        ("Cafe\u0301", "cafe\u0301", "caf\u00e9"),
        ("New\u200b York", "new\u200b york", "new york"),
        ("ジョン\u30fbミル", "ジョン\u30fbミル", "ジョン\u00b7ミル"),
        # What has a meaning of its own stays.
        ("10\u00b2", "10\u00b2", "10\u00b2"),
        ("\u00bd", "\u00bd", "\u00bd"),
        # What the rule of SQuAD leaves nothing of.
        ("A.", "", "a"),
        ("The The", "", "the the"),
        ("!!! ", "", "!!!"),
        ("\u3000", "", ""),
    ],
)
def test_normalization(text: str, published: str, folded: str) -> None:
    assert normalize_answer(text, rule=AnswerRule.published) == published
    assert normalize_answer(text) == folded


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_rules_differ_on_ascii_only_where_the_published_one_leaves_nothing(text: str) -> None:
    published = normalize_answer(text, rule=AnswerRule.published)
    assert fold(text) == text
    assert (published or bool(text.split())) == (published or bool(normalize_answer(text)))
    if published:
        assert normalize_answer(text) == published


@given(TEXTS)
@example('"\u20180\u2018\u201c')
def test_keys_of_composed_and_decomposed_text_are_equal_and_stable(text: str) -> None:
    decomposed = unicodedata.normalize("NFD", text)
    assert fold(fold(text)) == fold(text) == fold(decomposed)
    for key_of in (normalize_answer, same_text_key):
        assert key_of(text) == key_of(decomposed)
    assert same_text_key(same_text_key(text)) == same_text_key(text)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (" two\twords ", ["two", "words"]),
        ("我在東京 2020年 used iPhone", ["我", "在", "東", "京", "2020", "年", "used", "iPhone"]),
        ("ไทย", list("ไทย")),
        ("대한 민국", ["대한", "민국"]),  # Hangul has spaces
        ("Москва — Тверь", ["Москва", "—", "Тверь"]),
        ("\U00020bb7野家", ["\U00020bb7", "野", "家"]),
        ("", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(st.text(alphabet="ab \n\u3000京"), st.integers(1, 5))
def test_truncation_keeps_words_and_nothing_else(text: str, max_words: int) -> None:
    kept = truncate_words(text, max_words=max_words)
    assert split_words(kept) == split_words(text)[:max_words]
    assert truncate_words("a\nb  c d", max_words=3) == "a b c"
    assert (kept == text) or len(split_words(text)) > max_words
    if "京" not in text:
        assert kept in (text, " ".join(text.split()[:max_words]))


@pytest.mark.parametrize(
    ("golds", "index"),
    [
        (["bolton"], 0),
        (["silver harbour", "x"], 1),
        (["the silver, harbour!"], 1),
        (["東京 タワー"], 2),
        (["京都"], 3),
        (["\uff76\uff9e"], 3),
        (["2020年"], 4),
        (["เชียงใหม่"], 5),
        (["The The"], 6),
        (["!!!"], 7),
        (["the"], 1),
        (["nothing", ""], None),
    ],
)
def test_the_first_text_with_the_words_of_a_gold_in_a_row(golds: list[str], index: int | None) -> None:
    texts = [
        '"Bolton, England"\nPartying.',
        "The silver\u2013free and silver, harbour film",
        "日本の東京タワーは高い。",
        "京都とガ",
        "それは2020年です",
        "จังหวัดเชียงใหม่",
        "A band: \u201cThe The\u201d.",
        "A band: !!!",
    ]
    assert find_answer(texts, golds, rule=AnswerRule.folded) == index
    if golds in (["The The"], ["!!!"], ["the"], ["東京 タワー"]):
        assert find_answer(texts, golds, rule=AnswerRule.published) == (2 if "東京 タワー" in golds else None)


SAME = [
    ("Bolton", " bolton."),
    ("\u201cBolton.\u201d", "'Bolton'."),
    ("\u300c\u6771\u4eac\u300d\u3002", "\u6771\u4eac\u3000"),
    ("New\u00a0 York", "new york!"),
    ("1939\u20131945", "1939-1945"),
    ("caf\u00e9", "cafe\u0301"),  # composed, decomposed
    ("\uff11\uff19\uff19\uff10\uff0e", "1990"),  # full width
    ("\uff76\uff9e", "\u30ac"),  # half-width katakana with a separate mark
]
DIFFERENT = [
    ("-5", "5"),
    ("\uff0d\uff15", "5"),  # full-width minus
    ("C", "C++"),
    ("50", "50%"),
    ("1,000", "1.000"),
    ("3.5", "35"),
    ("10\u00b2", "102"),
    ("\u00bd", "12"),
    ("5\u2032", "5"),
    ('"', "'"),
    ("?", ""),
    ("été", "ete"),
    ("Ma\u00dfe", "Masse"),
    ("The Bolton", "Bolton"),
]


@pytest.mark.parametrize(
    ("one", "other", "equal"), [(*pair, True) for pair in SAME] + [(*pair, False) for pair in DIFFERENT]
)
def test_texts_are_the_same_or_different(one: str, other: str, equal: bool) -> None:
    assert (same_text_key(one) == same_text_key(other)) is equal


@given(
    st.lists(st.text(alphabet="ab the.,-'京\u2019", max_size=12), min_size=1, max_size=4),
    st.text("ab the.京", max_size=9),
)
def test_what_exact_match_accepts_is_found_where_it_is_quoted(golds: list[str], around: str) -> None:
    for rule in AnswerRule:
        for gold in golds:
            if normalize_answer(gold, rule=rule):
                assert find_answer([f"{around} . {gold} . {around}"], golds, rule=rule) == 0


@pytest.mark.parametrize(
    ("question", "completed"),
    [
        (" who wrote it ", "who wrote it?"),
        ("Who wrote it?", "Who wrote it?"),
        ("谁写的\uff1f", "谁写的\uff1f"),
        ("من كتبه\u061f", "من كتبه\u061f"),
    ],
)
def test_a_question_ends_in_one_question_mark(question: str, completed: str) -> None:
    assert complete_question(question) == completed
