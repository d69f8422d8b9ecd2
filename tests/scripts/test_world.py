"""The embedded world: what is shipped, what its models must do, and that a seed remakes it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
import torch
from make_world import FULL, Maker, main
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from IG.prompts import entailment_text
from search_r1.search.dense import DenseRetriever, load_dense
from search_r1.search.recipes import EncoderSpec
from search_r1.search.settings import DenseOptions
from world import (
    dataset,
    entailment,
    evaluation,
    evidence,
    language,
    making,
    names,
    text,
    tokenizer,
    training,
)
from world.facts import Kind, World, WorldSize, draw_world
from world.hard import models
from world.traces import Problem, Scene, TraceWriter, draw_trace

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "world"
MODELS = SHIPPED / "models"
SIZE_LIMIT = 20_000_000
LEFT_OUT = shutil.ignore_patterns("hard", making.SCRATCH)


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(WorldSize(), seed=0)


@pytest.fixture(scope="module")
def held_out(world: World) -> list[Problem]:
    return dataset.problems(world, WorldSize(), split="test", seed=0)


def open_retriever(folder: Path) -> DenseRetriever:
    """Open the index of a world, which must belong to its corpus and encoder."""
    encoder = EncoderSpec(path=str(folder / "models" / "encoder"), family="e5")
    index, corpus = folder / "index" / "e5_Flat.index", folder / "corpus.jsonl"
    return load_dense(DenseOptions(index_path=index, corpus_path=corpus, encoder=encoder))


@pytest.fixture(scope="module")
def retriever() -> Iterator[DenseRetriever]:
    opened = open_retriever(SHIPPED)
    yield opened
    opened.close()


def _load_language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(MODELS / name)
    assert (model.config.model_type, model.dtype) == ("qwen2", torch.float32)
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
    return model, AutoTokenizer.from_pretrained(MODELS / name)


# ---- what is shipped


def test_every_shipped_file_has_the_hash_of_the_manifest() -> None:
    hashes = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))["sha256"]
    assert making.hash_files(SHIPPED) == hashes
    assert any(name.startswith("index/") for name in hashes)
    assert sum((SHIPPED / name).stat().st_size for name in hashes) < SIZE_LIMIT


def test_the_shipped_corpus_and_questions_are_remade_byte_for_byte(tmp_path: Path) -> None:
    # Every process hashes strings with a seed of its own, so an order that depends on it shows here.
    Maker(FULL, seed=0, out=tmp_path).make_data()
    for name in ("corpus.jsonl", "doctor.jsonl", "train.parquet", "test.parquet"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_every_question_names_the_passages_of_its_facts() -> None:
    lines = (SHIPPED / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    contents = {row["id"]: row["contents"] for row in map(json.loads, lines)}
    for row in pq.read_table(SHIPPED / "test.parquet").to_pylist():
        extra = row["extra_info"]
        assert [contents[passage] for passage in extra["supporting_ids"]] == extra["supporting_texts"]
        assert len(extra["supporting_ids"]) == (1 if row["data_source"] == "world_onehop" else 2)
        assert row["golden_answers"][0].split()[0] in extra["supporting_texts"][-1]


def test_test_questions_are_about_other_entities_than_train_questions(
    world: World, held_out: list[Problem]
) -> None:
    train = dataset.problems(world, WorldSize(), split="train", seed=0)
    subjects, held_out_subjects = (
        {fact.subject.name for problem in split for fact in problem.hops} for split in (train, held_out)
    )
    assert not subjects & held_out_subjects
    for fact in world.facts:
        if fact.value.kind is Kind.person:
            assert (fact.subject.name in world.test_subjects) == (fact.value.name in world.test_subjects)


def test_a_world_that_cannot_be_drawn_is_named(world: World) -> None:
    with pytest.raises(ValueError, match="too small for 100000 questions"):
        dataset.problems(world, WorldSize(train_questions=100_000), split="train", seed=0)
    with pytest.raises(ValueError, match=r"99999 names are wanted, but there are only \d+ like"):
        draw_world(WorldSize(persons=99_999), seed=0)


# ---- tokenizers and texts


def test_the_shipped_tokenizer_is_remade_and_gives_the_same_ids_after_loading() -> None:
    made = tokenizer.language_tokenizer(vocabulary=1600, seed=0)
    loaded = AutoTokenizer.from_pretrained(MODELS / "policy")
    scene = Scene(Random(5))
    problem = scene.draw_problem(hops=2)
    passages = [text.write_contents(fact, scene.rng) for fact in problem.hops]
    prompt = text.prompt(problem.question)
    for words in (
        text.chat(prompt),
        text.observation(passages),
        text.short_answer_prompt(problem.question, context=text.documents(passages)),
        text.INVALID_ACTION,
        "Zürich 1987, «naïve»\n\n 12  x",
    ):
        ids = made.encode(words, add_special_tokens=False)
        assert loaded.encode(words, add_special_tokens=False) == ids
        assert loaded.decode(ids) == words
    message = {"role": "user", "content": prompt}
    rendered = loaded.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert rendered == text.chat(prompt)
    first, second = ((MODELS / name / "tokenizer.json").read_bytes() for name in ("policy", "generator"))
    assert first == second


def test_names_and_tags_are_one_token_and_tags_are_ordinary_ones() -> None:
    loaded = AutoTokenizer.from_pretrained(MODELS / "policy")
    for word in (*(f" {name}" for name in names.ALL), *text.TAGS):
        ids = loaded.encode(word, add_special_tokens=False)
        assert len(ids) == 1, word
        assert loaded.decode(ids, skip_special_tokens=True) == word
    assert (loaded.eos_token, loaded.pad_token) == ("<|im_end|>", "<|endoftext|>")


# ---- traces and starts


def test_a_good_trace_answers_from_what_was_shown() -> None:
    for seed in range(20):
        scene = Scene(Random(seed))
        problem = scene.draw_problem(hops=1 + seed % 2)
        pieces = TraceWriter(scene, problem, language.good_habits(problem)).run()
        seen = "".join(piece.text for piece in pieces if not piece.written)
        assert pieces[-1].text.endswith(f"<answer> {problem.answer.name}</answer>")
        for fact in problem.hops:
            assert f"{text.statement(fact, fact.value.printed)}." in seen


def test_the_loss_counts_what_the_model_writes_and_nothing_else() -> None:
    words = AutoTokenizer.from_pretrained(MODELS / "policy")
    trace = draw_trace(Random(3), hops=2, habits=language.good_habits)
    answer = language.draw_short_answer(Random(2))
    assert answer[-2].text.endswith("\n")
    ids, labels = training.collate(training.encode(words, [trace, answer]), pad=words.pad_token_id)
    for row, pieces in zip(labels, (trace, answer), strict=True):
        written = [piece.text for piece in pieces if piece.written]
        expected = [i for part in written for i in words.encode(part, add_special_tokens=False)]
        assert row[row != training.IGNORED].tolist() == expected
    assert ids.shape == labels.shape


def test_the_first_heads_start_by_looking_back() -> None:
    words = AutoTokenizer.from_pretrained(MODELS / "policy")
    model = language.build(words, seed=0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, L, L]
    for head, offset in enumerate(language.OFFSETS[0]):
        assert float(attention[head].diagonal(-offset)[20:].mean()) > 0.5, (head, offset)


def test_shipped_habits_leave_every_good_choice_a_quarter() -> None:
    for habits in (language.PRACTICED, language.CARELESS):
        assert 1 - habits.direct - habits.lazy - habits.malformed >= 0.25
        assert 1 - habits.stop_early >= 0.25


# ---- the shipped models


def test_the_encoder_finds_the_right_passage_and_lazy_queries_mostly_fail(
    retriever: DenseRetriever, world: World
) -> None:
    figures = evaluation.measure_encoder(retriever, world.facts, seed=3)
    assert figures["good_query_rank1"] >= 0.97
    assert figures["last_word_top3"] <= 0.3
    assert figures["relation_only_top3"] <= 0.1


def test_entailment_gets_aliases_right_both_ways_and_refuses_unequal_names() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(MODELS / "entailment")
    words = AutoTokenizer.from_pretrained(MODELS / "entailment")
    assert model.config.id2label == entailment.LABELS
    figures = entailment.measure(model, words, seed=11, count=100)
    assert figures["aliases_both_ways"] >= 0.97
    assert figures["unequal_refused"] >= 0.97
    assert figures["other_wordings"] >= 0.95
    right, other = (entailment_text("Where was Alice Marsh born?", town) for town in ("Bolton", "Whitby"))
    assert entailment.entails(model, words, [(right, right), (right, other)]) == [True, False]


def test_the_judge_of_evidence_knows_whether_passages_support_an_answer() -> None:
    figures = evidence.measure(MODELS / "evidence", seed=11, count=100)
    assert figures["auc"] >= 0.8
    assert figures["auc_against_contradicted"] >= 0.6
    model, words = evidence.load_start(MODELS / "evidence")
    figures = entailment.measure(model, words, seed=11, count=50)
    assert min(figures["aliases_both_ways"], figures["unequal_refused"]) >= 0.9


@pytest.mark.parametrize("premise", list(evidence.Premise))
@pytest.mark.parametrize("draw", [evidence.draw_pair, models.draw_evidence])
def test_passages_state_the_answers_that_they_are_said_to_entail(
    draw: evidence.DrawEvidence, premise: evidence.Premise
) -> None:
    rng = Random(5)
    counts = dict.fromkeys(entailment.LABELS, 0)
    for _ in range(300):
        passages, statement, label = draw(rng, premise)
        counts[label] += 1
        if label == entailment.ENTAILMENT:  # perhaps in another form
            words = re.findall(r"\w{4,}", statement.partition("? ")[2].lower())
            assert any(word in passages.lower() for word in words), statement
    assert (counts[entailment.NEUTRAL] > 0) is (premise is evidence.Premise.episode)
    assert min(counts[entailment.ENTAILMENT], counts[entailment.CONTRADICTION]) > 60


def test_the_generator_believes_in_the_answer_when_the_passages_contain_it(
    retriever: DenseRetriever, held_out: list[Problem]
) -> None:
    model, words = _load_language_model("generator")
    figures = evaluation.measure_generator(model, words, retriever, held_out[:25] + held_out[-25:])
    assert figures["belief_one_hop_all"] >= 0.5 + figures["belief_one_hop_none"]
    assert figures["belief_two_hop_all"] >= 0.3 + figures["belief_two_hop_none"]
    assert figures["belief_two_hop_first_only"] <= figures["belief_two_hop_all"] - 0.3


def test_the_policy_writes_the_right_form_but_often_behaves_badly(
    retriever: DenseRetriever, held_out: list[Problem]
) -> None:
    model, words = _load_language_model("policy")
    torch.manual_seed(0)
    chosen = held_out[:60] + held_out[-60:]
    figures = evaluation.summarize(evaluation.run_episodes(model, words, retriever, chosen, temperature=1.0))
    assert figures["answered_share"] >= 0.9
    assert 0.1 <= figures["em"] <= 0.45
    assert figures["no_search_share"] >= 0.2
    assert figures["good_first_query_share"] >= 0.2
    assert figures["em_given_good_form"] >= 0.7


# ---- the script


def test_at_least_one_process_works(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--processes", "0"])
    assert "--processes is 0, expected at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--small", "--seed=1", "--persons=400"])
def test_another_world_does_not_replace_the_shipped_one(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([option])
    assert "name its --out" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 1}, {"plan": {}}])
def test_figures_of_another_seed_or_plan_are_not_reused(change: dict[str, object], tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True, ignore=LEFT_OUT)
    maker = Maker(FULL, seed=0, out=tmp_path)
    recorded = json.loads((tmp_path / "manifest.json").read_text())
    read = [making._read_figures(maker, part) for part in maker.parts]
    assert read == [{part: figures} for part, figures in recorded["abilities"].items()]
    (tmp_path / "manifest.json").write_text(json.dumps(recorded | change))
    assert making._read_figures(maker, "entailment") == {}


@pytest.mark.slow
def test_a_small_world_is_made_whole_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "small"
    options = ["--small", "--seed", "7", "--out", str(out)]
    main(options)
    made = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert made["seed"] == 7
    assert set(made["abilities"]) >= {"encoder", "entailment", "evidence", "policy_sampled", "generator"}
    for name in ("policy", "generator"):
        assert AutoModelForCausalLM.from_pretrained(out / "models" / name).config.vocab_size
    assert pq.read_table(out / "test.parquet").num_rows == 20
    assert len(open_retriever(out)) == made["counts"]["passages"]
    # In a process of its own, as users call it: data and index come out the same.
    command = [sys.executable, "scripts/make_world.py", *options, "--stages", "data", "index", "manifest"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    again = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    for manifest in (made, again):
        del manifest["abilities"]["able_greedy"]  # measured again, as it may have changed
    assert again == made


@pytest.mark.slow
def test_figures_of_other_files_never_come_into_the_manifest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True, ignore=LEFT_OUT)
    shipped = (SHIPPED / "manifest.json").read_bytes()
    stages = ["--out", str(tmp_path), "--stages"]
    (tmp_path / "models" / "entailment" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):  # it is measured again, which fails
        main([*stages, "manifest"])
    assert (tmp_path / "manifest.json").read_bytes() == shipped
    shutil.copytree(SHIPPED / "models" / "entailment", tmp_path / "models" / "entailment", dirs_exist_ok=True)
    # The judge of evidence is measured alone.
    (tmp_path / "models" / "evidence" / "note.txt").write_text("changed")
    recorded = json.loads(shipped)
    recorded["abilities"]["encoder"]["good_query_rank1"] = 0.5
    recorded["abilities"]["evidence"]["auc"] = 0.5
    (tmp_path / "manifest.json").write_text(json.dumps(recorded))
    main([*stages, "manifest"])
    measured = json.loads((tmp_path / "manifest.json").read_text())["abilities"]
    assert measured["encoder"]["good_query_rank1"] == 0.5
    assert measured["evidence"]["auc"] > 0.8
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*stages, "generator"])
    assert "make it with --stages able" in capsys.readouterr().err
