"""Vectors against hand computation, for every pooling and layout; what is refused; silence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules.normalize import Normalize
from sentence_transformers.base.modules.transformer import Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from transformers import AutoModel, AutoTokenizer

from search_r1.search.encoder import FloatArray, TextEncoder
from search_r1.search.errors import RetrieverError
from search_r1.search.recipes import EncoderSpec, EncodingRecipe, PartialRecipe
from tests.search_r1.search.tiny_models import (
    DIM,
    describe_sentence_encoder,
    save_decoder,
    save_dense,
    save_transformer,
    save_without_length,
    write_json,
)

TEXTS = ["the cat sat", "a", "the old ship lies in the harbour", "river flows", ""]
LEGACY = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len": "pooling_mode_mean_sqrt_len_tokens",
    "weighted": "pooling_mode_weightedmean_tokens",
    "last": "pooling_mode_lasttoken",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_transformer(tmp_path / "tiny")


def of(folder: Path, family: str | None = None, **flags: object) -> EncoderSpec:
    return EncoderSpec(path=str(folder), family=family, flags=PartialRecipe(**flags))  # type: ignore[arg-type]


def token_states(folder: Path, text: str, *, max_length: int = 64) -> FloatArray:
    """[tokens, DIM], of one text, so without padding."""
    tokens = AutoTokenizer.from_pretrained(folder)(
        text, return_tensors="pt", truncation=True, max_length=max_length
    )
    with torch.no_grad():
        states = AutoModel.from_pretrained(folder)(
            input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
        )
    return np.asarray(states.last_hidden_state[0].numpy())


def pool(states: FloatArray, pooling: str) -> FloatArray:
    """By the definitions, one text at a time."""
    weights = np.arange(1, len(states) + 1)[:, None]
    values = {
        "cls": states[0],
        "max": states.max(axis=0),
        "mean": states.mean(axis=0),
        "mean_sqrt_len": states.sum(axis=0) / np.sqrt(len(states)),
        "weighted": (states * weights).sum(axis=0) / weights.sum(),
        "last": states[-1],
    }
    return np.concatenate([values[name] for name in pooling.split("+")])


def unit(vector: FloatArray) -> FloatArray:
    return vector / np.linalg.norm(vector)


def seen_tokens(encoder: TextEncoder, texts: list[str], *, queries: bool) -> list[list[int]]:
    """The ids that really reach the network, batch by batch."""
    seen: list[list[int]] = []
    table = encoder._model.transformers_model.get_input_embeddings()
    hook = table.register_forward_pre_hook(lambda _module, args: seen.extend(args[0].tolist()))
    (encoder.encode_queries if queries else encoder.encode_passages)(texts, batch_size=1)
    hook.remove()
    return seen


@pytest.mark.parametrize("pooling", [*LEGACY, "cls+max"])
def test_pooling_is_what_its_name_says(folder: Path, pooling: str) -> None:
    """In one padded batch, against each text alone by hand."""
    keys = [LEGACY[name] for name in pooling.split("+")]
    describe_sentence_encoder(
        folder,
        pooling={"pooling_mode_mean_tokens": False} | dict.fromkeys(keys, True),
        normalized=False,
        similarity_fn_name="dot",
    )
    encoder = TextEncoder(folder, device="cpu")
    vectors = encoder.encode_passages(TEXTS)
    assert encoder.recipe.pooling == pooling
    assert vectors.shape == (len(TEXTS), encoder.dim)
    assert vectors.dtype == np.float32
    for text, vector in zip(TEXTS, vectors, strict=True):
        np.testing.assert_allclose(vector, pool(token_states(folder, text), pooling), atol=2e-6)


def test_the_last_token_is_found_where_padding_is_on_the_left(tmp_path: Path) -> None:
    folder = save_decoder(tmp_path / "Qwen3-Embedding-tiny")
    encoder = TextEncoder(folder, device="cpu")
    assert (encoder.family, encoder.recipe.pooling) == ("qwen3_embedding", "last")
    for text, vector in zip(TEXTS, encoder.encode_passages(TEXTS), strict=True):
        np.testing.assert_allclose(vector, unit(token_states(folder, text)[-1]), atol=2e-6)


def test_explicit_flags_are_followed(folder: Path) -> None:
    describe_sentence_encoder(folder, prompts={"query": "query: "})
    spec = of(folder, pooling="last", query_prefix="a ", passage_prefix="the ", normalized=False)
    encoder = TextEncoder(spec, device="cpu")
    expected = pool(token_states(folder, "a cat"), "last")
    np.testing.assert_allclose(encoder.encode_queries(["cat"])[0], expected, atol=1e-6)
    expected = pool(token_states(folder, "the cat"), "last")
    np.testing.assert_allclose(encoder.encode_passages(["cat"])[0], expected, atol=1e-6)


def test_a_tokenizer_without_a_length_states_none(tmp_path: Path) -> None:
    folder = describe_sentence_encoder(save_without_length(tmp_path / "tiny"))
    assert TextEncoder(folder, device="cpu").recipe.max_length == 512


def test_what_the_library_writes_today_is_read_as_it_reads_it(folder: Path, tmp_path: Path) -> None:
    transformer = Transformer(str(folder))
    transformer.max_seq_length = 20
    published = SentenceTransformer(
        modules=[transformer, Pooling(DIM, "weightedmean"), Normalize()],
        prompts={"query": "query: ", "document": "passage: "},
        device="cpu",
    )
    published.save_pretrained(str(tmp_path / "saved"))
    encoder = TextEncoder(tmp_path / "saved", device="cpu")
    assert encoder.recipe == EncodingRecipe(
        query_prefix="query: ", passage_prefix="passage: ", pooling="weighted", max_length=20, normalized=True
    )
    texts = [*TEXTS, "the old ship lies in the harbour " * 5]
    np.testing.assert_allclose(encoder.encode_queries(texts), published.encode_query(texts), atol=1e-6)
    np.testing.assert_allclose(encoder.encode_passages(texts), published.encode_document(texts), atol=1e-6)


def test_no_prefix_is_no_prefix_even_where_the_model_has_a_default_prompt(folder: Path) -> None:
    describe_sentence_encoder(folder, prompts={"query": "query: "}, default_prompt_name="query")
    encoder = TextEncoder(folder, device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert seen_tokens(encoder, ["the cat"], queries=False) == [tokenizer("the cat")["input_ids"]]


def test_long_texts_are_cut_at_the_models_length(folder: Path) -> None:
    describe_sentence_encoder(folder, max_seq_length=8)
    encoder = TextEncoder(folder, device="cpu")
    text = "the old ship lies in the harbour " * 30
    assert [len(ids) for ids in seen_tokens(encoder, [text], queries=True)] == [8]
    expected = unit(pool(token_states(folder, text, max_length=8), "mean"))
    np.testing.assert_allclose(encoder.encode_passages([text])[0], expected, atol=1e-6)
    longer = TextEncoder(of(folder, max_length=12), device="cpu")
    assert [len(ids) for ids in seen_tokens(longer, [text], queries=True)] == [12]


def test_a_model_may_leave_its_prompt_out_of_the_mean(folder: Path) -> None:
    describe_sentence_encoder(folder, pooling={"include_prompt": False}, prompts={"query": "query: "})
    states = token_states(folder, "query: the cat")  # [CLS] query : the cat [SEP]
    expected = unit(states[3:].mean(axis=0))
    np.testing.assert_allclose(
        TextEncoder(folder, device="cpu").encode_queries(["the cat"])[0], expected, atol=1e-6
    )


def test_a_projection_behind_the_pooling_is_applied_and_hashed(folder: Path) -> None:
    describe_sentence_encoder(folder, further=["Dense"])
    weights = save_dense(folder / "2_Dense", seed=1)
    encoder = TextEncoder(folder, device="cpu")
    pooled = pool(token_states(folder, "the cat"), "mean")
    expected = unit(weights["linear.weight"].numpy() @ pooled + weights["linear.bias"].numpy())
    assert encoder.dim == 8
    np.testing.assert_allclose(encoder.encode_passages(["the cat"])[0], expected, atol=1e-5)
    save_dense(folder / "2_Dense", seed=2)
    assert TextEncoder(folder, device="cpu").sha256 != encoder.sha256
    torch.save(weights, folder / "2_Dense" / "pytorch_model.bin")
    (folder / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(RetrieverError, match=r"pytorch_model\.bin only, a pickle"):
        TextEncoder(folder, device="cpu")


def test_one_hash_for_the_files_that_the_vectors_depend_on(folder: Path) -> None:
    first = TextEncoder(of(folder, "e5"), device="cpu").sha256
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    lines = [f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in names]
    assert first == hashlib.sha256("".join(lines).encode()).hexdigest()
    (folder / "README.md").write_text("# A model card changes no vector")
    assert TextEncoder(of(folder, "bge"), device="cpu").sha256 == first
    save_transformer(folder, seed=1)
    assert TextEncoder(of(folder, "e5"), device="cpu").sha256 != first


def test_the_name_is_never_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = tmp_path / "models--intfloat--e5-tiny" / "snapshots" / "0123abc"
    save_transformer(snapshot)
    encoder = TextEncoder(snapshot, device="cpu")
    assert (encoder.name, encoder.family) == ("intfloat/e5-tiny", "e5")
    monkeypatch.chdir(snapshot)
    assert TextEncoder(".", device="cpu").name == "intfloat/e5-tiny"


def test_missing_weights_are_refused_and_not_made_up(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    save_file({key: value for key, value in weights.items() if not key.startswith("pooler.")}, path)
    TextEncoder(of(folder, "e5"), device="cpu")  # no pooling needs the pooler
    save_file({key: value for key, value in weights.items() if "LayerNorm" not in key}, path)
    with pytest.raises(RetrieverError, match=r"tiny lacks the weights \['embeddings\.LayerNorm"):
        TextEncoder(of(folder, "e5"), device="cpu")


def test_folders_that_are_no_encoder_are_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RetrieverError, match=r"encoder .*nowhere: no such folder"):
        TextEncoder(of(tmp_path / "nowhere", "e5"))
    with pytest.raises(RetrieverError, match=r"no config\.json"):
        TextEncoder(of(tmp_path, "e5"))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    TextEncoder(of(folder, "e5"), device="cpu")
    (folder / "model.safetensors").unlink()
    with pytest.raises(RetrieverError, match=r"pytorch_model\.bin only, a pickle, .*save_pretrained"):
        TextEncoder(of(folder, "e5"), device="cpu")


def test_code_that_comes_with_a_model_is_never_run(folder: Path, tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    (folder / "modeling_x.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass X: pass\n")
    config = {"model_type": "x", "auto_map": {"AutoConfig": "modeling_x.X", "AutoModel": "modeling_x.X"}}
    write_json(folder / "config.json", config)
    with pytest.raises(RetrieverError, match="does not load"):
        TextEncoder(of(folder, "e5"), device="cpu")
    assert not ran.exists()


def test_vectors_that_are_not_finite_are_refused(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["embeddings.word_embeddings.weight"][4:] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(RetrieverError, match="not finite of 'the cat'"):
        TextEncoder(of(folder, "e5"), device="cpu").encode_queries(["the cat"])


@pytest.mark.parametrize(
    ("device", "message"),
    [("gpu0", "'gpu0' is unknown to torch; expected cpu"), ("cuda:99", "torch finds . GPUs here")],
)
def test_a_device_that_is_not_there_is_named(device: str, message: str) -> None:
    with pytest.raises(RetrieverError, match=message):
        TextEncoder("world/models/encoder", device=device)
