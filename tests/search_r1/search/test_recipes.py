"""Where prefixes, pooling, normalisation and lengths come from, and what is refused instead of guessed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from search_r1.search.errors import RetrieverError
from search_r1.search.recipes import EncodingRecipe, PartialRecipe, find_family, resolve_recipe
from search_r1.search.stated_model import read_stated_model
from tests.search_r1.search.tiny_models import describe_sentence_encoder, write_json

BGE_PREFIX = "Represent this sentence for searching relevant passages: "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A plain BERT of 512 positions; no weights, which nothing here reads."""
    write_json(tmp_path / "config.json", {"model_type": "bert", "max_position_embeddings": 512})
    return tmp_path


def resolve(
    folder: Path, name: str = "model", *, family: str | None = None, **flags: object
) -> EncodingRecipe:
    return resolve_recipe(
        read_stated_model(folder),
        model_name=name,
        family=family,
        flags=PartialRecipe(**flags),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("intfloat/e5-base-v2", "e5"),
        ("intfloat/multilingual-e5-small", "e5"),
        ("e5-large", "e5"),
        ("intfloat/multilingual-e5-large-instruct", "e5_instruct"),
        ("intfloat/e5-mistral-7b-instruct", "e5_mistral"),
        ("BAAI/bge-base-en-v1.5", "bge"),
        ("BAAI/bge-small-en", "bge"),
        ("BAAI/bge-large-zh-v1.5", "bge_zh"),
        ("BAAI/bge-m3", "bge_m3"),
        ("thenlper/gte-base", "gte"),
        ("Alibaba-NLP/gte-modernbert-base", "gte_modern"),
        ("Alibaba-NLP/gte-large-en-v1.5", "gte_modern"),
        ("Qwen/Qwen3-Embedding-0.6B", "qwen3_embedding"),
        ("Snowflake/snowflake-arctic-embed-m", "arctic"),
        ("Snowflake/snowflake-arctic-embed-m-v2.0", "arctic_v2"),
        ("mixedbread-ai/mxbai-embed-large-v1", "mxbai"),
        ("nomic-ai/nomic-embed-text-v1.5", "nomic"),
        ("facebook/contriever-msmarco", "contriever"),
        ("sentence-transformers/all-MiniLM-L6-v2", "minilm"),
        ("sentence-transformers/multi-qa-mpnet-base-dot-v1", "dot"),
        ("bert-base-uncased", None),
        ("model5", None),
        ("some-e50-net", None),
    ],
)
def test_families_are_known_by_their_names(name: str, family: str | None) -> None:
    assert find_family(name) == family


def test_a_model_that_says_nothing_follows_its_family(folder: Path) -> None:
    e5 = EncodingRecipe(
        query_prefix="query: ", passage_prefix="passage: ", pooling="mean", max_length=256, normalized=True
    )
    assert resolve(folder, "intfloat/e5-base-v2") == e5
    assert resolve(folder, "encoder", family="e5") == e5
    bge = resolve(folder, "bge-base-en-v1.5")
    assert (bge.query_prefix, bge.passage_prefix, bge.pooling, bge.max_length) == (BGE_PREFIX, "", "cls", 512)
    contriever = resolve(folder, "contriever")
    assert (contriever.pooling, contriever.normalized, contriever.query_prefix) == ("mean", False, "")


def test_an_unknown_model_that_says_nothing_is_refused_with_the_flags_named(folder: Path) -> None:
    with pytest.raises(RetrieverError) as caught:
        resolve(folder, "mystery", pooling="cls")
    message = str(caught.value)
    assert "mystery" in message
    assert "--retriever_name, one of ['arctic'" in message
    assert "--query_prefix, --passage_prefix" in message
    assert "--pooling_method" not in message  # that one was given
    recipe = resolve(folder, "mystery", pooling="cls", query_prefix="q: ", passage_prefix="")
    assert recipe == EncodingRecipe(
        query_prefix="q: ", passage_prefix="", pooling="cls", max_length=512, normalized=True
    )
    with pytest.raises(RetrieverError, match="--pooling_method"):
        resolve(folder, "something-dot-v1")  # a family that says only one thing is not enough


def test_the_models_own_configuration_comes_before_its_family(folder: Path) -> None:
    describe_sentence_encoder(
        folder,
        pooling={"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False},
        prompts={"query": "ask ", "passage": "tell "},
        max_seq_length=128,
        normalized=False,
        similarity_fn_name="dot",
    )
    assert resolve(folder, "e5-base-v2") == EncodingRecipe(
        query_prefix="ask ", passage_prefix="tell ", pooling="cls", max_length=128, normalized=False
    )


def test_a_sentence_encoder_without_prompts_gets_those_of_its_family_else_none(folder: Path) -> None:
    describe_sentence_encoder(folder, pooling={"pooling_mode_mean_tokens": True}, max_seq_length=512)
    assert resolve(folder, "e5-base-v2").query_prefix == "query: "
    assert resolve(folder, "e5-base-v2").max_length == 512
    plain = resolve(folder, "my-sentence-model")
    assert (plain.query_prefix, plain.passage_prefix) == ("", "")
    describe_sentence_encoder(folder, prompts={"query": "", "document": ""})
    assert resolve(folder, "e5-base-v2").passage_prefix == "passage: "


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q ", "document": "d "}, ("q ", "d ")),
        ({"query": "q ", "passage": "p "}, ("q ", "p ")),
        ({"query": "q ", "corpus": "c "}, ("q ", "c ")),
        ({"s2p_query": "q ", "s2s_query": "other "}, ("q ", "")),
        ({"retrieval.query": "q ", "retrieval.passage": "p "}, ("q ", "p ")),
        ({"query": "q ", "document": None}, ("q ", "")),
        ({"clustering": "c "}, ("", "")),
    ],
)
def test_prompts_under_all_usual_names(
    folder: Path, prompts: dict[str, str | None], expected: tuple[str, str]
) -> None:
    describe_sentence_encoder(folder, prompts=prompts)
    recipe = resolve(folder)
    assert (recipe.query_prefix, recipe.passage_prefix) == expected


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False}, "last"),
        ({"pooling_mode_weightedmean_tokens": True}, "weighted"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_cls_token": True}, "cls+max"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean", "mean_sqrt_len_tokens"]}, "mean+mean_sqrt_len"),
        ({}, "mean"),
    ],
)
def test_pooling_in_old_and_new_configurations(folder: Path, config: dict[str, object], pooling: str) -> None:
    describe_sentence_encoder(folder, pooling=config)
    assert resolve(folder).pooling == pooling


def test_vectors_are_normalized_by_a_module_or_for_cosine(folder: Path) -> None:
    assert resolve(describe_sentence_encoder(folder, similarity_fn_name="dot")).normalized
    describe_sentence_encoder(folder, normalized=False)
    assert resolve(folder).normalized  # the library's own similarity is the cosine
    assert not resolve(folder, "multi-qa-mpnet-base-dot-v1").normalized
    assert not resolve(
        describe_sentence_encoder(folder, normalized=False, similarity_fn_name="dot")
    ).normalized
    describe_sentence_encoder(folder, similarity_fn_name="euclidean", normalized=False)
    with pytest.raises(RetrieverError, match=r"'euclidean'.*cosine and dot"):
        resolve(folder)


def test_a_flag_overrules_the_model_and_says_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    describe_sentence_encoder(
        folder, pooling={"pooling_mode": "cls"}, prompts={"query": "q "}, max_seq_length=128
    )
    with caplog.at_level(logging.WARNING):
        assert resolve(folder, pooling="cls", query_prefix="q ").pooling == "cls"
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert resolve(folder, "e5", pooling="cls+max", query_prefix="q ").pooling == "cls+max"
    assert "the given 'cls+max' overrides it" in caplog.text
    caplog.clear()
    recipe = resolve(
        folder, pooling="mean", query_prefix="", passage_prefix="p ", max_length=64, normalized=False
    )
    assert recipe == EncodingRecipe(
        query_prefix="", passage_prefix="p ", pooling="mean", max_length=64, normalized=False
    )
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 5
    assert "its own configuration has pooling 'cls', the given 'mean' overrides it" in "\n".join(warnings)


def test_a_family_that_the_name_contradicts_is_followed_and_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert resolve(folder, "bge-base-en", family="e5").pooling == "mean"
    assert "looks like family bge, used as e5" in caplog.text


def test_lengths_fit_the_positions_of_the_model(folder: Path) -> None:
    assert resolve(folder, "bge-m3").max_length == 512  # the family's 8192 is for larger models
    with pytest.raises(RetrieverError, match=r"max_length 513 does not fit .* 3 to 512"):
        resolve(folder, "e5-base", max_length=513)
    write_json(folder / "config.json", {"model_type": "xlm-roberta", "max_position_embeddings": 514})
    assert resolve(folder, "bge-m3").max_length == 512  # positions begin after the padding token's id, 1
    config = {"model_type": "roberta", "max_position_embeddings": 514, "pad_token_id": 3}
    write_json(folder / "config.json", config)
    assert resolve(folder, "bge-m3").max_length == 510
    write_json(folder / "config.json", config | {"pad_token_id": 1})
    describe_sentence_encoder(folder)
    write_json(folder / "tokenizer_config.json", {"model_max_length": 100})
    assert resolve(folder).max_length == 100
    write_json(folder / "tokenizer_config.json", {"model_max_length": 10**30})
    assert resolve(folder).max_length == 512


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pooling": "average"}, r"pooling 'average' is unknown; expected one of \['mean', 'cls'"),
        ({"family": "bm25"}, r"'bm25' is unknown; expected one of \['arctic'"),
        ({"max_length": 2}, "max_length 2 does not fit"),
    ],
)
def test_flags_out_of_range_are_refused(folder: Path, flags: dict[str, object], message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        resolve(folder, "e5-base", **flags)  # type: ignore[arg-type]


def test_what_a_model_wants_and_is_not_supported_is_refused(folder: Path) -> None:
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    pooling = {"path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    write_json(folder / "modules.json", [*modules, pooling, {"path": "", "type": "custom_st.Head"}])
    with pytest.raises(RetrieverError, match=r"needs a module 'custom_st\.Head'.*never run"):
        read_stated_model(folder)
    write_json(folder / "modules.json", [*modules, pooling | {"path": "../elsewhere"}])
    with pytest.raises(RetrieverError, match="outside of the model's folder"):
        read_stated_model(folder)
    write_json(folder / "modules.json", modules)
    with pytest.raises(RetrieverError, match="then one Pooling"):
        read_stated_model(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(RetrieverError, match=r"modules\.json is not a list of modules"):
        read_stated_model(folder)
    describe_sentence_encoder(folder, model_type="SparseEncoder")
    with pytest.raises(RetrieverError, match="is a SparseEncoder"):
        read_stated_model(folder)
    describe_sentence_encoder(folder, pooling={"pooling_mode": "attention"})
    with pytest.raises(RetrieverError, match=r"needs pooling \['attention'\]"):
        read_stated_model(folder)
