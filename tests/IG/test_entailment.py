from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoTokenizer,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    XLNetConfig,
    XLNetForSequenceClassification,
)

from IG.config import WORLD_ENTAILMENT
from IG.entailment import (
    DeviceLostError,
    EntailmentModel,
    count_positions,
    entailment_label,
    split_into_batches,
)
from IG.prompts import entailment_text


@pytest.mark.parametrize(
    ("labels", "index"),
    [
        (["CONTRADICTION", "NEUTRAL", "ENTAILMENT"], 2),
        (["entailment", "neutral", "contradiction"], 0),
        (["contradiction", "Entailment", "neutral"], 1),
        (["not_entailment", "entailment"], 1),
    ],
)
def test_the_label_is_found_by_name(labels: list[str], index: int) -> None:
    assert entailment_label(dict(enumerate(labels)), model="m") == index


def test_a_model_without_the_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"entailment model m: .*LABEL_0.*name its labels"):
        entailment_label({0: "LABEL_0", 1: "LABEL_1"}, model="m")


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Single letters as tokens; no limit of length."""
    spelling = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    spelling.pre_tokenizer = pre_tokenizers.Whitespace()
    spelling.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=spelling,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        truncation_side="left",
    )


SMALL = {
    "vocab_size": len(WORDS),
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "num_labels": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(("padding", "limit"), [(0, 63), (1, 62), (3, 60)])
def test_a_roberta_reads_no_more_than_it_has_positions_for(padding: int, limit: int) -> None:
    """It numbers positions from the id of its padding token + 1."""
    tokenizer = make_tokenizer()
    tokenizer.pad_token = WORDS[padding]
    model = RobertaForSequenceClassification(RobertaConfig(**SMALL, pad_token_id=padding)).eval()
    assert count_positions(model) == limit
    entailment = EntailmentModel(model, tokenizer=tokenizer, entailment_index=2, batch_size=8, num_threads=1)
    long, longer = entailment.probabilities([("a", "b c d " * 50), ("a", "e " + "b c d " * 50)])
    assert long == pytest.approx(longer, abs=1e-6)  # the end counts


def test_a_model_without_a_limit_of_positions_reads_long_texts() -> None:
    config = XLNetConfig(vocab_size=12, d_model=16, n_layer=1, n_head=2, d_inner=16, num_labels=3)
    model = XLNetForSequenceClassification(config).eval()
    assert count_positions(model) is None
    judged = EntailmentModel(
        model, tokenizer=make_tokenizer(), entailment_index=2, batch_size=8, num_threads=1
    )
    assert judged.probabilities([("a", "b c d " * 50)]).shape == (1,)


def test_batches_of_any_size_judge_alike_and_in_order() -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = DebertaV2Config(**SMALL, type_vocab_size=0, relative_attention=True, pos_att_type=["p2c", "c2p"])
    model = DebertaV2ForSequenceClassification(config).eval()
    pairs = [("a b c d e", "a"), ("a", "b"), ("c d", "e f g h"), ("a", "a"), ("", "b")]

    def judge(batch_size: int, asked: list[tuple[str, str]], **settings: int) -> np.ndarray:
        judged = EntailmentModel(
            model,
            tokenizer=tokenizer,
            entailment_index=2,
            batch_size=batch_size,
            **{"num_threads": 1, **settings},
        )
        return judged.probabilities(asked)

    together = judge(8, pairs)
    assert judge(2, pairs) == pytest.approx(together, abs=1e-5)
    assert judge(8, pairs, batch_tokens=10) == pytest.approx(together, abs=1e-5)
    assert judge(8, pairs[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    assert np.unique(together.round(4)).size > 1
    for pair, probability in zip(pairs, together, strict=True):
        with torch.inference_mode():
            logits = model(**tokenizer(*pair, return_tensors="pt")).logits
        assert probability == pytest.approx(logits.softmax(-1)[0, 2].item(), abs=1e-5)
    assert judge(8, []).shape == (0,)
    forged, unknown = judge(8, [("a [SEP] b", "c"), ("a x y z b", "c")])  # the separator is three words
    assert forged == pytest.approx(unknown, abs=1e-6)
    many = pairs * 20
    assert judge(8, many, num_threads=3) == pytest.approx(np.tile(together, 20), abs=1e-5)


def test_a_batch_holds_a_limited_number_of_padded_tokens() -> None:
    rows, lengths = np.array([7, 2, 5, 0, 9, 1]), np.array([50, 20, 10, 9, 5, 5])

    def split(most_pairs: int, most_tokens: int | None) -> list[list[int]]:
        batches = split_into_batches(rows, lengths, most_pairs=most_pairs, most_tokens=most_tokens)
        return [batch.tolist() for batch in batches]

    assert split(8, 40) == [[7], [2, 5], [0, 9, 1]]  # the first row alone is over the limit
    assert split(2, 40) == [[7], [2, 5], [0, 9], [1]]
    assert split(4, None) == [[7, 2, 5, 0], [9, 1]]
    empty = np.array([], dtype=np.int64)
    assert split_into_batches(empty, empty, most_pairs=8, most_tokens=40) == []


def test_answers_count_however_long_their_question_is() -> None:
    """Cut at their end, both texts would be the same words of the question, and every answer right."""
    model = EntailmentModel.load(str(WORLD_ENTAILMENT), device="cpu", batch_size=8, cpu_threads=1)
    question = "Where was the singer of the band from Bolton in Alice Marsh born " * 30 + "?"
    leeds, same, year = (entailment_text(question, answer) for answer in ("Leeds", "leeds", "1999"))
    assert (model.probabilities([(leeds, same), (leeds, year)]) > 0.5).tolist() == [True, False]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.AcceleratorError("CUDA error: device-side assert triggered"), DeviceLostError),
        (torch.OutOfMemoryError("tried to allocate 9 GiB"), torch.OutOfMemoryError),
    ],
)
def test_a_lost_device_differs_from_a_batch_that_is_too_large(
    error: Exception, expected: type[Exception]
) -> None:
    class Broken:
        device = "cpu"
        config = DebertaV2Config(max_position_embeddings=64)

        def modules(self) -> list[torch.nn.Module]:
            return []

        def __call__(self, **_: object) -> None:
            raise error

    tokenizer = AutoTokenizer.from_pretrained(WORLD_ENTAILMENT)
    model = EntailmentModel(Broken(), tokenizer=tokenizer, entailment_index=0, batch_size=8, num_threads=1)  # type: ignore[arg-type]
    with pytest.raises(expected, match=str(error)):
        model.probabilities([("a", "b")])
