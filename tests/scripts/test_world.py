"""The embedded world: what is shipped, what its models must do, and that a seed remakes it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
import torch
from make_world import FULL, Maker, main
from rich.progress import Progress
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerBase,
)

from IG.prompts import PromptType, build_prompt, entailment_text
from search_r1.search.dense import load_dense
from verl.agent.prompts import RETRY, render_passages, wrap_observation
from verl.types import Passage
from world import dataset, encoder, entailment, evaluation, generator, policy, text, tokenizer, training
from world.facts import BRIDGES, Kind, World, WorldSize, draw_world
from world.initialise import OFFSETS, language_model
from world.traces import Piece, Problem, Scene, TraceWriter, draw_problem, draw_trace

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "world"
MODELS = SHIPPED / "models"
SIZE_LIMIT = 20_000_000
TINY = WorldSize(persons=30, films=10, books=10, firms=8, train_questions=40, test_questions=20)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """The script sets the threads of its process, which here is the one of all tests."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def manifest() -> dict[str, object]:
    return json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(WorldSize(), seed=0)


@pytest.fixture(scope="module")
def held_out() -> list[Problem]:
    return dataset.problems(draw_world(WorldSize(), seed=0), WorldSize(), split="test", seed=0)


@pytest.fixture(scope="module")
def index() -> encoder.Index:
    model = AutoModel.from_pretrained(MODELS / "encoder")
    passages = [text.Passage(*_parse(line)) for line in (SHIPPED / "corpus.jsonl").open(encoding="utf-8")]
    return encoder.Index(model, AutoTokenizer.from_pretrained(MODELS / "encoder"), passages)


def _parse(line: str) -> tuple[str, str]:
    title, body = json.loads(line)["contents"].split("\n", 1)
    return title.strip('"'), body


# ---- what is shipped


def test_every_shipped_file_has_the_hash_of_the_manifest(manifest: dict[str, dict[str, str]]) -> None:
    assert manifest["sha256"]
    for name, digest in manifest["sha256"].items():
        assert hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest, name
    listed = {*manifest["sha256"], "manifest.json", "README.md"}
    present = {p.relative_to(SHIPPED).as_posix() for p in SHIPPED.rglob("*") if p.is_file()}
    assert {name for name in present if not name.startswith(".making/")} == listed
    assert any(name.startswith("index/") for name in listed)
    assert sum((SHIPPED / name).stat().st_size for name in manifest["sha256"]) < SIZE_LIMIT


def test_the_shipped_corpus_and_questions_are_remade_byte_for_byte(tmp_path: Path) -> None:
    # Every process hashes strings with a seed of its own, so an order that hung on it would show here.
    Maker(FULL, seed=0, out=tmp_path, progress=Progress()).run("data")
    for name in ("corpus.jsonl", "doctor.jsonl", "train.parquet", "test.parquet"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_the_corpus_is_in_the_wiki_18_form() -> None:
    lines = [json.loads(line) for line in (SHIPPED / "corpus.jsonl").open(encoding="utf-8")]
    assert len(lines) >= 2000
    assert [line["id"] for line in lines] == [str(k) for k in range(len(lines))]
    assert all(line["contents"].startswith('"') and '"\n' in line["contents"] for line in lines)
    assert len({line["contents"] for line in lines}) == len(lines)


@pytest.mark.parametrize(("split", "count"), [("train", 2000), ("test", 300)])
def test_the_questions_are_in_the_search_r1_form(split: str, count: int) -> None:
    rows = pq.read_table(SHIPPED / f"{split}.parquet").to_pylist()
    assert len(rows) == count
    assert {row["data_source"] for row in rows} == {"world_onehop", "world_twohop"}
    keys = {(row["data_source"], row["extra_info"]["index"]) for row in rows}
    assert len(keys) == count
    for row in rows:
        assert row["extra_info"]["split"] == split
        assert row["ability"] == "fact-reasoning"
        assert row["reward_model"]["style"] == "rule"
        golds = row["reward_model"]["ground_truth"]["target"]
        assert golds == row["golden_answers"]
        assert len(set(golds)) >= 2
        assert row["question"].endswith("?")
        (message,) = row["prompt"]
        assert message["role"] == "user"
        assert message["content"].endswith(f"Question: {row['question']}\n")
    assert len({row["id"] for row in rows}) == count


def test_the_doctors_questions_come_with_the_passages_that_answer_them() -> None:
    lines = [json.loads(line) for line in (SHIPPED / "doctor.jsonl").open(encoding="utf-8")]
    corpus = (SHIPPED / "corpus.jsonl").read_text(encoding="utf-8").splitlines()
    passages = {f'(Title: "{title}") {body}' for title, body in map(_parse, corpus)}
    roles = [[document["role"] for document in line["documents"]] for line in lines]
    assert roles == [["first"]] * 100 + [["first", "second"]] * 100
    rows = pq.read_table(SHIPPED / "test.parquet").to_pylist()
    asked = {row["question"]: row["golden_answers"] for row in rows}
    for line in lines:
        assert asked[line["question"]] == line["answers"]
        shown = [document["text"].split("\n") for document in line["documents"]]
        for search in shown:
            assert [each[: len("Doc 1")] for each in search] == ["Doc 1", "Doc 2", "Doc 3"]
            assert {each[len("Doc 1") :] for each in search} <= passages
        assert any(gold in shown[-1][0] for gold in line["answers"])


def test_test_questions_are_about_other_entities_than_train_questions(world: World) -> None:
    train = dataset.problems(world, WorldSize(), split="train", seed=0)
    held_out = dataset.problems(world, WorldSize(), split="test", seed=0)
    subjects = [
        {fact.subject.name for problem in split for fact in problem.hops} for split in (train, held_out)
    ]
    assert not subjects[0] & subjects[1]


# ---- the tokenizers


def _sample_texts() -> list[str]:
    rng = Random(5)
    shown = []
    for hops in (1, 2, 1, 2):
        problem = draw_problem(Scene(rng), hops=hops)
        passages = [text.passage(fact, rng) for fact in problem.hops]
        context = text.documents(passages)
        shown += [
            text.chat(text.prompt(problem.question)),
            text.observation(passages),
            text.short_answer_prompt(problem.question, context=context),
            *problem.answer.golds,
        ]
    return [*shown, text.INVALID_ACTION, "Zürich 1987, «naïve»\n\n 12  x"]


def test_ids_are_the_same_before_saving_after_loading_and_in_a_fresh_process() -> None:
    made = tokenizer.language_tokenizer(vocabulary=1600, seed=0)
    loaded = AutoTokenizer.from_pretrained(MODELS / "policy")
    texts = _sample_texts()
    expected = [made.encode(words, add_special_tokens=False) for words in texts]
    assert [loaded.encode(words, add_special_tokens=False) for words in texts] == expected
    assert [loaded.decode(ids) for ids in expected] == texts
    program = (
        "import json, sys; from transformers import AutoTokenizer; "
        "t = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(json.dumps([t.encode(w, add_special_tokens=False) for w in json.load(sys.stdin)]))"
    )
    fresh = subprocess.run(
        [sys.executable, "-c", program, str(MODELS / "policy")],
        input=json.dumps(texts),
        text=True,
        check=True,
        capture_output=True,
        timeout=120,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert json.loads(fresh.stdout) == expected


def test_names_are_one_token_and_tags_are_ordinary_ones() -> None:
    loaded = AutoTokenizer.from_pretrained(MODELS / "policy")
    for name in tokenizer.ALL_NAMES:
        assert len(loaded.encode(f" {name}", add_special_tokens=False)) == 1, name
    for tag in text.TAGS:
        ids = loaded.encode(tag, add_special_tokens=False)
        assert len(ids) == 1
        assert loaded.decode(ids, skip_special_tokens=True) == tag
    assert loaded.eos_token == "<|im_end|>"
    assert loaded.pad_token == "<|endoftext|>"


def test_policy_and_generator_share_one_tokenizer() -> None:
    first, second = ((MODELS / name / "tokenizer.json").read_bytes() for name in ("policy", "generator"))
    assert first == second


# ---- the texts are those of the agent and the service


def test_prompts_and_observations_are_the_agents_own() -> None:
    rng = Random(1)
    problem = draw_problem(Scene(rng), hops=2)
    ours = [text.passage(fact, rng) for fact in problem.hops]
    theirs = [Passage(id="0", title=f'"{p.title}"', text=p.body, score=0.0) for p in ours]
    assert text.observation(ours) == wrap_observation(render_passages(theirs))
    assert text.INVALID_ACTION == RETRY
    loaded = AutoTokenizer.from_pretrained(MODELS / "policy")
    message = {"role": "user", "content": text.prompt(problem.question)}
    rendered = loaded.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    assert rendered == text.chat(text.prompt(problem.question))


@pytest.mark.parametrize("context", ["", 'Doc 1(Title: "X") It is so.'])
def test_the_short_answer_prompt_is_the_services_own(context: str) -> None:
    theirs = build_prompt("Who?", context=context, prompt_type=PromptType.default, max_context_words=4096)
    assert text.short_answer_prompt("Who?", context=context) == theirs


# ---- traces and starts


@pytest.mark.parametrize("seed", range(20))
def test_a_good_trace_answers_from_what_was_shown(seed: int) -> None:
    scene = Scene(Random(seed))
    problem = draw_problem(scene, hops=1 + seed % 2)
    pieces = TraceWriter(scene, problem, policy.good_habits(problem)).run()
    seen = "".join(piece.text for piece in pieces if not piece.written)
    assert pieces[-1].text.endswith(f"<answer> {problem.answer.name}</answer>")
    for fact in problem.hops:
        assert f"The {fact.relation.name} of {fact.subject.name} is {fact.value.printed}." in seen


def test_the_loss_counts_what_the_policy_writes_and_nothing_else() -> None:
    words = AutoTokenizer.from_pretrained(MODELS / "policy")
    trace = draw_trace(Random(3), hops=2, habits=policy.good_habits)
    (row,) = training.encode(words, [trace])
    batch = training.collate([row, ([5, 6], [False, True])], pad=words.pad_token_id)
    targets = batch.labels[0][batch.labels[0] != training.IGNORED].tolist()
    assert targets == [i for p in trace if p.written for i in words.encode(p.text, add_special_tokens=False)]
    assert batch.labels[1].tolist() == [6] + [training.IGNORED] * (batch.ids.shape[1] - 1)


def test_the_first_heads_start_by_looking_back() -> None:
    words = AutoTokenizer.from_pretrained(MODELS / "policy")
    model = language_model(words, seed=0).eval()
    model.set_attn_implementation("eager")
    ids = torch.randint(0, 1000, (1, 60), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        attention = model(input_ids=ids, output_attentions=True).attentions[0][0]  # [heads, L, L]
    for head, offset in enumerate(OFFSETS[0]):
        looked = attention[head].diagonal(-offset)[20:]
        assert float(looked.mean()) > 0.5, f"head {head} does not look {offset} back"


def test_shipped_habits_leave_every_good_choice_a_quarter() -> None:
    for habits in (policy.PRACTISED, policy.CARELESS):
        assert 1 - habits.direct - habits.lazy - habits.malformed >= 0.25
        assert 1 - habits.stop_early >= 0.25


def test_values_are_never_drawn_across_splits(world: World) -> None:
    for fact in world.facts:
        if fact.relation in BRIDGES or fact.relation.value is Kind.person:
            assert (fact.subject.name in world.test_subjects) == (fact.value.name in world.test_subjects)


def test_a_world_that_is_too_small_says_so() -> None:
    with pytest.raises(ValueError, match="too small for 100000 questions"):
        dataset.problems(draw_world(TINY, seed=0), WorldSize(train_questions=100_000), split="train", seed=0)


def test_a_world_of_more_persons_than_names_says_so() -> None:
    with pytest.raises(ValueError, match=r"99999 names are wanted, but there are only \d+ like"):
        draw_world(WorldSize(persons=99_999), seed=0)


# ---- the shipped models


def test_the_encoder_finds_the_right_passage_and_lazy_queries_mostly_fail(
    index: encoder.Index, world: World
) -> None:
    figures = encoder.measure(index, world.facts, seed=3)
    assert figures["good_query_rank1"] >= 0.97
    assert figures["last_word_top3"] <= 0.3
    assert figures["relation_only_top3"] <= 0.1


def test_entailment_gets_aliases_right_both_ways_and_refuses_unequal_names() -> None:
    model = AutoModelForSequenceClassification.from_pretrained(MODELS / "entailment")
    words = AutoTokenizer.from_pretrained(MODELS / "entailment")
    assert model.config.id2label == {0: "CONTRADICTION", 1: "NEUTRAL", 2: "ENTAILMENT"}
    figures = entailment.measure(model, words, seed=11, count=200)
    assert figures["aliases_both_ways"] >= 0.97
    assert figures["unequal_refused"] >= 0.97
    assert figures["other_wordings"] >= 0.95
    question = "Where was Alice Marsh born?"
    same = [(entailment_text(question, "Bolton"), entailment_text(question, "Bolton, England"))]
    assert entailment.entails(model, words, same + [pair[::-1] for pair in same]) == [True, True]
    assert entailment.entails(model, words, [(f"{question} Bolton", f"{question} Whitby")]) == [False]


def test_the_generator_believes_in_the_answer_when_the_passages_tell_it(
    index: encoder.Index, held_out: list[Problem]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "generator")
    words = AutoTokenizer.from_pretrained(MODELS / "generator")
    figures = generator.measure(model, words, index, held_out[:25] + held_out[-25:])
    assert figures["belief_one_hop_all"] >= 0.5 + figures["belief_one_hop_none"]
    assert figures["belief_two_hop_all"] >= 0.3 + figures["belief_two_hop_none"]
    assert figures["belief_two_hop_first_only"] <= figures["belief_two_hop_all"] - 0.3


def test_the_policy_writes_the_right_form_but_often_behaves_badly(
    index: encoder.Index, held_out: list[Problem]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "policy")
    words: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(MODELS / "policy")
    torch.manual_seed(0)
    chosen: Sequence[Problem] = held_out[:60] + held_out[-60:]
    figures = evaluation.summarise(evaluation.run_episodes(model, words, index, chosen, temperature=1.0))
    assert figures["answered_share"] >= 0.9
    assert 0.1 <= figures["em"] <= 0.45
    assert figures["no_search_share"] >= 0.2
    assert figures["good_first_query_share"] >= 0.2
    assert figures["em_given_good_form"] >= 0.7


def test_the_language_models_are_untied_fp32() -> None:
    for name in ("policy", "generator"):
        model = AutoModelForCausalLM.from_pretrained(MODELS / name)
        assert model.config.model_type == "qwen2"
        assert not model.config.tie_word_embeddings
        assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()
        assert model.dtype == torch.float32


# ---- a small world


@pytest.mark.slow
def test_a_small_world_is_made_whole_and_loads(tmp_path: Path) -> None:
    out = tmp_path / "small"
    main(["--small", "--seed", "7", "--threads", "1", "--out", str(out)])
    made = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
    assert made["seed"] == 7
    assert set(made["abilities"]) >= {"encoder", "entailment", "policy_sampled", "generator"}
    for name in ("policy", "generator"):
        assert AutoModelForCausalLM.from_pretrained(out / "models" / name).config.vocab_size
    assert len(pq.read_table(out / "test.parquet").to_pylist()) == 20
    retriever = load_dense(
        out / "index" / "e5_Flat.index",
        corpus_path=out / "corpus.jsonl",
        encoder_path=str(out / "models" / "encoder"),
        retriever_name="e5",
    )
    assert len(retriever) == made["counts"]["passages"]
    # In a process of its own, as users call it; only the hashes of what did not change come out the same.
    command = [sys.executable, "scripts/make_world.py", "--small", "--seed", "7", "--threads", "1"]
    again = [*command, "--out", str(out), "--stages", "data", "index", "manifest"]
    run = subprocess.run(again, cwd=ROOT, timeout=120, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((out / "manifest.json").read_text(encoding="utf-8")) == made


def test_figures_of_other_files_never_come_into_the_manifest(tmp_path: Path) -> None:
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True)
    stages = ["--threads", "1", "--out", str(tmp_path), "--stages", "manifest"]
    main(stages)
    assert (tmp_path / "manifest.json").read_bytes() == (SHIPPED / "manifest.json").read_bytes()
    (tmp_path / "models" / "policy" / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(stages)
    assert (tmp_path / "manifest.json").read_bytes() == (SHIPPED / "manifest.json").read_bytes()


@pytest.mark.parametrize(
    ("stage", "earlier"),
    [("generator", "able"), ("index", "data"), ("measure", "encoder"), ("manifest", "measure")],
)
def test_a_stage_that_lacks_an_earlier_one_names_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], stage: str, earlier: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--threads", "1", "--stages", stage, "--out", str(tmp_path)])
    assert ended.value.code == 2
    assert f"add {earlier} to --stages" in capsys.readouterr().err


def test_pieces_of_a_short_answer_end_with_the_newline_and_the_end() -> None:
    pieces = generator.draw_short_answer(Random(2))
    assert pieces[0].text.endswith("\nAnswer:")
    assert pieces[1].text.endswith("\n")
    assert pieces[2] == Piece("<|im_end|>", written=True)
