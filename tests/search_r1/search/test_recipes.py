"""Where prefixes, pooling, normalization and lengths come from, and what is refused instead of guessed."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from search_r1.search.encoder import TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.model_files import read_length_limit
from search_r1.search.recipes import EncodingRecipe, ModelRecipe, PartialRecipe, find_family, resolve_recipe
from tests.search_r1.search.tiny_models import describe_sentence_encoder, save_transformer, write_json

SILENT = ModelRecipe(is_sentence_encoder=False, recipe=PartialRecipe(), length_limit=512)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_transformer(tmp_path / "tiny")


def read(folder: Path) -> EncodingRecipe:
    return TextEncoder(folder, device="cpu").recipe


def resolve(
    name: str, stated: ModelRecipe = SILENT, *, family: str | None = None, **flags: object
) -> EncodingRecipe:
    given = PartialRecipe(**flags)  # type: ignore[arg-type]
    return resolve_recipe(stated, model_name=name, family=family, flags=given)


def state(**recipe: object) -> ModelRecipe:
    return ModelRecipe(is_sentence_encoder=True, recipe=PartialRecipe(**recipe), length_limit=512)  # type: ignore[arg-type]


def test_families_are_known_by_their_names() -> None:
    names = {
        "intfloat/e5-base-v2": "e5",
        "intfloat/multilingual-e5-small": "e5",
        "intfloat/multilingual-e5-large-instruct": "e5_instruct",
        "intfloat/e5-mistral-7b-instruct": "e5_mistral",
        "BAAI/bge-base-en-v1.5": "bge",
        "BAAI/bge-large-zh-v1.5": "bge_zh",
        "BAAI/bge-m3": "bge_m3",
        "thenlper/gte-base": "gte",
        "Alibaba-NLP/gte-modernbert-base": "gte_modern",
        "Qwen/Qwen3-Embedding-0.6B": "qwen3_embedding",
        "Snowflake/snowflake-arctic-embed-m": "arctic",
        "Snowflake/snowflake-arctic-embed-m-v2.0": "arctic_v2",
        "mixedbread-ai/mxbai-embed-large-v1": "mxbai",
        "nomic-ai/nomic-embed-text-v1.5": "nomic",
        "facebook/contriever-msmarco": "contriever",
        "sentence-transformers/all-MiniLM-L6-v2": "minilm",
        "sentence-transformers/multi-qa-mpnet-base-dot-v1": "dot",
        "bert-base-uncased": None,
        "some-e50-net": None,
    }
    assert {name: find_family(name) for name in names} == names


def test_a_model_that_states_nothing_follows_its_family() -> None:
    e5 = EncodingRecipe(
        query_prefix="query: ", passage_prefix="passage: ", pooling="mean", max_length=256, normalized=True
    )
    assert resolve("intfloat/e5-base-v2") == resolve("encoder", family="e5") == e5
    assert resolve("bge-base-en-v1.5").query_prefix.startswith("Represent this sentence")
    assert not resolve("contriever").normalized
    assert resolve("bge-m3").max_length == 512  # the family's 8192 is for larger models


def test_an_unknown_model_that_states_nothing_is_refused_with_the_flags_named() -> None:
    with pytest.raises(RetrieverError) as caught:
        resolve("mystery", pooling="cls")
    message = str(caught.value)
    assert "--retriever_name, one of ['arctic'" in message
    assert "--query_prefix, --passage_prefix" in message
    assert "--pooling_method" not in message  # that one was given
    recipe = resolve("mystery", pooling="cls", query_prefix="q: ", passage_prefix="")
    assert (recipe.query_prefix, recipe.pooling, recipe.max_length) == ("q: ", "cls", 512)
    with pytest.raises(RetrieverError, match="--pooling_method"):
        resolve("something-dot-v1")  # a family that states only one field is not enough


def test_the_models_own_configuration_has_priority_over_its_family() -> None:
    stated = state(
        query_prefix="ask ", passage_prefix="tell ", pooling="cls", max_length=128, normalized=False
    )
    assert resolve("e5-base-v2", stated) == EncodingRecipe(
        query_prefix="ask ", passage_prefix="tell ", pooling="cls", max_length=128, normalized=False
    )
    assert resolve("e5-base-v2", state(pooling="mean")).query_prefix == "query: "
    assert resolve("my-sentence-model", state(pooling="mean")).query_prefix == ""
    assert not resolve("multi-qa-mpnet-base-dot-v1", state(pooling="mean")).normalized


def test_a_flag_overrides_the_model_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    stated = state(query_prefix="q ", pooling="cls", max_length=128)
    with caplog.at_level(logging.WARNING):
        assert resolve("model", stated, pooling="cls", query_prefix="q ").pooling == "cls"
        assert not caplog.records
        recipe = resolve("model", stated, pooling="mean", query_prefix="", max_length=64)
        assert resolve("bge-base-en", family="e5").pooling == "mean"
    assert (recipe.pooling, recipe.query_prefix, recipe.max_length) == ("mean", "", 64)
    assert "its own configuration has pooling 'cls', the given 'mean' overrides it" in caplog.text
    assert "looks like family bge, used as e5" in caplog.text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"pooling": "average"}, r"pooling 'average' is unknown; expected one of \['mean', 'cls'"),
        ({"family": "bm25"}, r"'bm25' is unknown; expected one of \['arctic'"),
        ({"max_length": 2}, "max_length 2 does not fit .* 3 to 512"),
        ({"max_length": 513}, "max_length 513 does not fit .* 3 to 512"),
    ],
)
def test_flags_out_of_range_are_refused(flags: dict[str, object], message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        resolve("e5-base", **flags)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ({"query": "q ", "document": "d "}, ("q ", "d ")),
        ({"query": "q ", "corpus": "c "}, ("q ", "c ")),
        ({"s2p_query": "q ", "s2s_query": "other "}, ("q ", "")),
        ({"query": "q ", "document": None}, ("q ", "")),
        ({"clustering": "c "}, ("", "")),
    ],
)
def test_prompts_are_read_under_all_usual_names(
    folder: Path, prompts: dict[str, str | None], expected: tuple[str, str]
) -> None:
    recipe = read(describe_sentence_encoder(folder, prompts=prompts))
    assert (recipe.query_prefix, recipe.passage_prefix) == expected


@pytest.mark.parametrize(
    ("config", "pooling"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_weightedmean_tokens": True, "pooling_mode_mean_tokens": False}, "weighted"),
        ({"pooling_mode": "lasttoken"}, "last"),
        ({"pooling_mode": ["mean", "mean_sqrt_len_tokens"]}, "mean+mean_sqrt_len"),
    ],
)
def test_pooling_is_read_from_old_and_new_configurations(
    folder: Path, config: dict[str, object], pooling: str
) -> None:
    assert read(describe_sentence_encoder(folder, pooling=config)).pooling == pooling


def test_vectors_are_normalized_by_a_module_or_for_cosine(folder: Path) -> None:
    assert read(describe_sentence_encoder(folder, similarity_fn_name="dot")).normalized
    assert read(describe_sentence_encoder(folder, normalized=False)).normalized  # cosine is the default
    dot = describe_sentence_encoder(folder, normalized=False, similarity_fn_name="dot")
    assert not read(dot).normalized
    describe_sentence_encoder(folder, similarity_fn_name="euclidean", normalized=False)
    with pytest.raises(RetrieverError, match=r"'euclidean'.*cosine and dot"):
        read(folder)


def test_positions_of_some_models_begin_after_the_padding_token(tmp_path: Path) -> None:
    config = {"model_type": "roberta", "max_position_embeddings": 514}
    for further, limit in (({}, 512), ({"pad_token_id": 3}, 510), ({"model_type": "bert"}, 514)):
        write_json(tmp_path / "config.json", config | further)
        assert read_length_limit(tmp_path) == limit


def test_what_a_model_needs_and_is_not_supported_is_refused(folder: Path) -> None:
    transformer = {"name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}
    pooling = {"name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"}
    write_json(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": 16})
    for modules, complaint in (
        ([transformer, pooling, {"name": "2", "path": "", "type": "custom_st.Head"}], "custom_st"),
        ([transformer, pooling | {"path": "../elsewhere"}], "outside of the model's folder"),
        ([transformer], "then one Pooling"),
    ):
        write_json(folder / "modules.json", modules)
        with pytest.raises(RetrieverError, match=complaint):
            read(folder)
    (folder / "modules.json").write_text("{")
    with pytest.raises(RetrieverError, match=r"modules\.json is not a list of modules"):
        read(folder)
    describe_sentence_encoder(folder, model_type="SparseEncoder")
    with pytest.raises(RetrieverError, match="is a SparseEncoder"):
        read(folder)
    describe_sentence_encoder(folder, pooling={"pooling_mode": "attention"})
    with pytest.raises(RetrieverError, match="attention"):
        read(folder)
