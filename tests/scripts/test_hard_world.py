"""The hard world: its rules, its questions and the passages that answer them, and the copy with gaps."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest
import torch
from make_world import main

from serving.answers import normalize_answer
from world import evidence, making
from world.facts import Kind
from world.hard import corpus, measure, models, text
from world.hard.damage import damage, find_routes
from world.hard.facts import (
    ALL_OF,
    RULES,
    Problem,
    World,
    WorldSize,
    count_namesakes,
    draw_problems,
    draw_world,
)
from world.hard.maker import new_maker
from world.hard.traces import GOOD, Scene, TraceWriter

ROOT = Path(__file__).parents[2]
SHIPPED = ROOT / "world" / "hard"
SIZE_LIMIT = 15_000_000


@pytest.fixture(scope="module")
def world() -> World:
    return draw_world(WorldSize(), seed=0)


@pytest.fixture(scope="module")
def held_out(world: World) -> list[Problem]:
    return draw_problems(world, WorldSize(), split="test", seed=0)


# ---- what is shipped


def test_every_shipped_file_has_the_hash_of_the_manifest() -> None:
    manifest = json.loads((SHIPPED / "manifest.json").read_text(encoding="utf-8"))
    assert making.hash_files(SHIPPED) == manifest["sha256"]
    assert sum((SHIPPED / name).stat().st_size for name in manifest["sha256"]) < SIZE_LIMIT
    assert measure.check(manifest["abilities"]) == []


def test_the_shipped_corpus_and_questions_are_remade_byte_for_byte(tmp_path: Path) -> None:
    new_maker(small=False, persons=None, seed=0, out=tmp_path).make_data()
    for name in ("corpus.jsonl", "doctor.jsonl", "train.parquet", "test.parquet", "quickstart.json"):
        assert (tmp_path / name).read_bytes() == (SHIPPED / name).read_bytes(), name


def test_the_shipped_models_do_what_the_manifest_says(world: World, held_out: list[Problem]) -> None:
    retriever = making.open_retriever(SHIPPED)
    assert measure.measure_encoder(retriever, world, seed=3)["good_query_top3"] >= 0.97
    judged = measure.measure_entailment(SHIPPED / "models" / "entailment", seed=3, count=60)
    assert min(judged.values()) >= 0.9
    supported = evidence.measure(SHIPPED / "models" / "evidence", seed=3, count=60, draw=models.draw_evidence)
    assert supported["auc"] >= 0.75
    clustered = measure.measure_entailment(SHIPPED / "models" / "evidence", seed=3, count=60)
    assert min(clustered.values()) >= 0.9
    effort = measure.Effort(samples=2, deep_questions=1, deep_samples=8)
    torch.manual_seed(0)
    figures = measure.measure_policy(
        SHIPPED / "models" / "policy", retriever, held_out[:40], effort, temperature=1.0
    )
    retriever.close()
    assert figures["em"] <= 0.2
    assert figures["answered_share"] >= 0.9
    assert 0.5 <= figures["searches"] <= 2


# ---- facts and questions


def test_facts_follow_the_rules(world: World) -> None:
    kept: Counter[str] = Counter()
    for fact in world.facts:
        if fact.subject.kind is Kind.person and fact.value.kind in ALL_OF:
            kept[f"{fact.relation.name} {fact.value in RULES[fact.value.kind, fact.subject.home]}"] += 1
    assert kept["birthplace False"] == 0
    for name in ("residence", "university", "award", "instrument"):
        share = kept[f"{name} True"] / (kept[f"{name} True"] + kept[f"{name} False"])
        assert 0.8 < share < 0.97, name
    cities = {f.value for f in world.facts if f.relation.name == "headquarters" and f.subject.home == "Press"}
    assert len(cities) <= 8
    assert all(len(towns) == 7 for (kind, _), towns in RULES.items() if kind is Kind.town)


def test_persons_share_names_and_books_titles(world: World) -> None:
    assert count_namesakes(world) >= 60
    titles = {kind: {f.subject.name for f in world.facts if f.subject.kind is kind} for kind in Kind}
    assert len(titles[Kind.film] & titles[Kind.book]) >= 20


def test_questions_have_two_to_four_hops_and_three_to_six_golds(held_out: list[Problem]) -> None:
    assert Counter(len(problem.hops) for problem in held_out) == {2: 135, 3: 105, 4: 60}
    for problem in held_out:
        forms = {normalize_answer(gold) for gold in problem.answer.golds}
        assert 3 <= len(forms) <= 6
        assert all(a.value == b.subject for a, b in zip(problem.hops, problem.hops[1:], strict=False))


def test_no_passage_before_the_last_hop_holds_the_answer(world: World, held_out: list[Problem]) -> None:
    _, routes = corpus.draw_corpus(world, seed=0)
    for problem in held_out:
        golds = [f" {normalize_answer(gold)} " for gold in problem.answer.golds]
        for fact in problem.hops[:-1]:
            shown = f" {normalize_answer(text.write_fact(fact))} "
            assert not any(gold in shown for gold in golds), problem.question
        assert not any(gold in f" {normalize_answer(problem.question)} " for gold in golds)
        assert any(gold in f" {normalize_answer(routes[problem.hops[-1]][0][1])} " for gold in golds)


def test_every_fact_has_a_passage_and_many_have_two(world: World) -> None:
    passages, routes = corpus.draw_corpus(world, seed=0)
    assert len(set(passages)) == len(passages)
    counts = Counter(len(found) for found in routes.values())
    assert set(counts) == {1, 2}
    assert counts[2] > 0.1 * len(routes)
    for fact, found in routes.items():
        for number, contents in found:
            assert passages[int(number)] == contents
            assert fact.value.printed in contents
            assert fact.subject.name in contents


def test_test_questions_are_about_other_entities_than_train_questions(
    world: World, held_out: list[Problem]
) -> None:
    train = draw_problems(world, WorldSize(), split="train", seed=0)
    subjects, held_out_subjects = (
        {fact.subject for problem in split for fact in problem.hops} for split in (train, held_out)
    )
    assert not subjects & held_out_subjects
    assert held_out_subjects <= world.test_subjects


def test_a_world_that_is_too_small_is_named() -> None:
    size = WorldSize(persons=20, films=4, books=4, firms=4, train_questions=5000)
    with pytest.raises(ValueError, match="questions of 2 hops are too few for 2250"):
        draw_problems(draw_world(size, seed=0), size, split="train", seed=0)


# ---- traces


def test_a_good_trace_finds_the_answer_hop_by_hop() -> None:
    for seed in range(30):
        scene = Scene(Random(seed))
        problem = scene.draw_problem(hops=2 + seed % 3)
        pieces = TraceWriter(scene, problem, GOOD).run()
        seen = "".join(piece.text for piece in pieces if not piece.written)
        assert pieces[-1].text.endswith(f"<answer> {problem.answer.name}</answer>")
        assert all(fact.value.printed in seen for fact in problem.hops)


def test_a_careless_trace_is_mostly_wrong_and_always_answers() -> None:
    rng, right = Random(0), 0
    for _ in range(400):
        scene = Scene(rng)
        problem = scene.draw_problem(hops=rng.choice(models.HOPS))
        *_, last = TraceWriter(scene, problem, models.CARELESS).run()
        assert "<answer>" in last.text
        right += f"<answer> {problem.answer.name}</answer>" in last.text
    assert 0.02 < right / 400 < 0.2


def test_wrong_parts_are_never_called_equal() -> None:
    rng = Random(0)
    for _ in range(200):
        entity = Scene(rng).draw_problem(hops=2).answer
        assert not set(models.rival(entity, rng).golds) & set(entity.golds)


# ---- figures


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_sample() -> None:
    assert measure.pass_at(1, [True, False, False, False]) == pytest.approx(0.25)
    assert measure.pass_at(2, [True, False, False, False]) == pytest.approx(0.5)
    assert measure.pass_at(3, [True, True, False, False]) == 1.0


def test_a_world_without_its_judge_is_not_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(SHIPPED, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("evidence", ".*"))
    with pytest.raises(SystemExit, match="2"):
        main(["--world", "hard", "--out", str(tmp_path), "--check"])
    assert f"measuring needs {tmp_path}/models/evidence: make it with --stages evidence" in (
        capsys.readouterr().err
    )


def test_a_figure_outside_its_limits_is_named() -> None:
    figures = {
        part: dict.fromkeys((n for p, n in measure.LIMITS if p == part), 0.07) for part, _ in measure.LIMITS
    }
    missed = measure.check(figures)
    assert "policy_sampled all_wrong_share is 0.07, expected 0.6 to 1" in missed
    assert not any(sentence.startswith("policy_sampled em ") for sentence in missed)
    assert "gain first_mean is not measured, expected 0.05 to 0.4" in measure.check({})


# ---- the script


@pytest.mark.slow
def test_a_small_hard_world_is_made_and_remade_and_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small"
    stages = ["data", "encoder", "index", "entailment", "evidence", "able", "policy", "generator"]
    options = ["--world", "hard", "--small", "--seed", "3", "--out", str(out), "--stages"]
    main([*options, *stages])
    for split in ("train", "test"):
        for row in pq.read_table(out / f"{split}.parquet").to_pylist():
            extra = row["extra_info"]
            assert [route[0] for route in extra["routes"]] == extra["supporting_ids"]
    first = {
        name: digest for name, digest in making.hash_files(out).items() if not name.startswith("models/")
    }
    main([*options, "data", "index"])
    again = {
        name: digest for name, digest in making.hash_files(out).items() if not name.startswith("models/")
    }
    assert again == first
    (out / "manifest.json").write_text("{}")
    copies = [tmp_path / name for name in ("one", "two")]
    for copy in copies:
        main(["damaged", "--from", str(out), "--share", "0.5", "--out", str(copy)])
    assert (
        copies[0].joinpath("manifest.json").read_bytes() == copies[1].joinpath("manifest.json").read_bytes()
    )
    ids = {json.loads(line)["id"] for line in (copies[0] / "corpus.jsonl").read_text().splitlines()}
    routes = [hops for split in ("train", "test") for hops in find_routes(out / f"{split}.parquet")]
    supporting = {passage for hops in routes for hop in hops for passage in hop}
    assert len(supporting - ids) == round(0.5 * len(supporting))
    assert len(making.open_retriever(copies[0])) == len(ids)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(["damaged", "--from", str(out), "--out", str(copies[0])])
    assert "is not empty; name a new folder" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"--share is 1.5, expected 0 to 1"):
        damage(out, tmp_path / "three", share=1.5, seed=0)
