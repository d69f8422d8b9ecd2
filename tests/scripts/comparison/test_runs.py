"""Keys: what makes another run, and what does not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from comparison.plan import Method, Tuned, World
from comparison.runs import ROOT, RunSpec, make_run, open_source, prepare_world
from tests.scripts.comparison.made_up import EASY, TUNED, make_plan
from verl.errors import ConfigError


def make(method: Method | None = None, *, seed: int = 0, steps: int = 10, **changes: object) -> RunSpec:
    tuned = changes.pop("tuned", TUNED)
    assert isinstance(tuned, Tuned)
    plan = make_plan(methods={"any": method or Method(algorithm="inforeasoner")}, **changes)
    return make_run(plan, method_name="any", world_name="easy", tuned=tuned, steps=steps, seed=seed)


@pytest.mark.parametrize(
    "other",
    [
        lambda: make(seed=1),
        lambda: make(steps=11),
        lambda: make(Method(algorithm="search_r1")),
        lambda: make(Method(algorithm="inforeasoner", settings={"algorithm.gain_weight": 0.2})),
        lambda: make(Method(algorithm="inforeasoner", ig_service={"num_generations": 4})),
        lambda: make(Method(algorithm="inforeasoner", handicap="shuffled_outcomes")),
        lambda: make(tuned=replace(TUNED, lr=3e-4)),
        lambda: make(tuned=replace(TUNED, group=10)),
        lambda: make(tuned=replace(TUNED, kl=0.0)),
        lambda: make(settings={"max_turns": 2}),
        lambda: make(questions=5),
    ],
)  # fmt: skip
def test_what_changes_a_result_changes_its_key(other: object) -> None:
    assert callable(other)
    assert other().key != make().key


def test_where_a_run_is_done_and_defaults_that_are_written_out_do_not_change_its_key() -> None:
    assert make(settings={"trainer.launcher": "local", "trainer.startup_timeout_s": 9.0}).key == make().key
    assert make(Method(algorithm="inforeasoner", settings={"algorithm.gain_weight": 0.6})).key == make().key
    wrapper = {"reward.answer_wrapper": "The answer is {answer}"}
    assert make(settings=wrapper).key == make().key  # inforeasoner asks for no answer's log-prob
    scored = Method(algorithm="igpo")
    assert make(scored, settings=wrapper).key != make(scored).key
    plain = Method(algorithm="search_r1")
    assert make(plain, ig_service={"num_generations": 4}).key == make(plain).key  # it asks no IG service


def test_every_group_size_plays_the_same_number_of_episodes_in_one_update() -> None:
    overrides = make(tuned=replace(TUNED, group=10)).overrides
    assert "data.train_batch_size=8" in overrides
    assert "actor_rollout_ref.rollout.n_agent=10" in overrides
    assert "actor_rollout_ref.actor.ppo_mini_batch_size=80" in overrides


def test_a_world_counts_by_its_content(tmp_path: Path) -> None:
    copied = tmp_path / "moved"
    shutil.copytree(EASY.folder, copied, ignore=shutil.ignore_patterns("hard"))
    (copied / "README.md").write_text("Another one.")
    assert make(worlds={"easy": World(folder=copied)}).key == make().key
    changed = tmp_path / "changed"
    shutil.copytree(copied, changed)
    (changed / "corpus.jsonl").write_bytes((copied / "corpus.jsonl").read_bytes()[:-1000])
    run = make(worlds={"easy": World(folder=changed)})
    assert run.key != make().key
    assert not run.has_changed()
    (changed / "corpus.jsonl").write_bytes((copied / "corpus.jsonl").read_bytes())
    assert run.has_changed()


def test_a_model_of_the_world_that_a_flag_names_counts_by_its_content_in_such_runs_alone(
    tmp_path: Path,
) -> None:
    named = Method(algorithm="siop", ig_service={"entailment_model": "{world}/models/evidence"})
    folders = [tmp_path / name for name in ("one", "moved", "changed")]
    worlds = [{"easy": World(folder=folder)} for folder in folders]
    for folder in folders:
        shutil.copytree(EASY.folder, folder, ignore=shutil.ignore_patterns("hard", "evidence"))
    with pytest.raises(ConfigError, match=r"entailment_model=.*one/models/evidence is missing .*--stages ev"):
        make(named, worlds=worlds[0])
    for folder in folders:
        (folder / "models" / "evidence").mkdir()
        (folder / "models" / "evidence" / "config.json").write_text("{}")
    config = folders[2] / "models" / "evidence" / "config.json"
    config.write_text('{"hidden_size": 4}')
    one, moved, changed = (make(named, worlds=of_one) for of_one in worlds)
    assert one.key == moved.key != changed.key
    plain = make(worlds=worlds[2])
    assert plain.key == make().key
    config.write_text('{"hidden_size": 8}')
    assert changed.has_changed()
    assert not plain.has_changed()
    used = replace(open_source(World(folder=folders[0])), folder=tmp_path / "damaged")
    assert one.service_flags(used)[-1] == f"--entailment-model={tmp_path}/damaged/models/evidence"


def test_a_run_has_the_settings_of_its_world_wherever_that_is(tmp_path: Path) -> None:
    keys = set()
    for name in ("one", "other"):
        folder = tmp_path / name
        shutil.copytree(EASY.folder, folder, ignore=shutil.ignore_patterns("hard"))
        shutil.copyfile(ROOT / "verl/agent/prompts.yaml", folder / "texts.yaml")
        arguments = ["max_turns=5", "data.prompt_file={world}/texts.yaml"]
        (folder / "quickstart.json").write_text(json.dumps({"trainer": arguments}))
        run = make(worlds={"easy": World(folder=folder)})
        assert run.settings["config"]["max_turns"] == 5
        keys.add(run.key)
    assert len(keys) == 1
    assert keys != {make().key}


def test_a_damaged_world_is_another_one_before_it_is_made(tmp_path: Path) -> None:
    def key(share: float) -> str:
        world = World(folder=tmp_path / "damaged", damaged_from=EASY.folder, share=share)
        return make(worlds={"easy": world}).key

    assert len({make().key, key(0.37), key(0.5)}) == 3


def test_a_damaged_world_is_made_once_and_not_taken_for_another_one(tmp_path: Path) -> None:
    world = World(folder=tmp_path / "damaged", damaged_from=EASY.folder, share=0.5)
    prepare_world(world)
    corpus = world.folder / "corpus.jsonl"
    lines, made = corpus.read_text().splitlines(), corpus.stat().st_mtime_ns
    assert len(lines) < len((EASY.folder / "corpus.jsonl").read_text().splitlines())
    prepare_world(world)
    assert corpus.stat().st_mtime_ns == made
    with pytest.raises(ConfigError, match=r"damaged lacks a share of 0\.5 .*the plan says 0\.37; remove the"):
        prepare_world(replace(world, share=0.37))
    manifest = world.folder / "manifest.json"
    facts = json.loads(manifest.read_text())
    facts["damaged_from"]["corpus.jsonl"] = "0" * 64
    manifest.write_text(json.dumps(facts))
    with pytest.raises(ConfigError, match=r"damaged was made from another state of .*remove"):
        prepare_world(world)


def test_a_missing_world_and_an_unknown_setting_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"worlds: the plan names one that cannot be used: .*\n.*corpus\.jsonl is missing"
    ):
        make(worlds={"easy": World(folder=tmp_path)})
    with pytest.raises(ConfigError, match=r"algorithm\.gain_wait: no such key"):
        make(Method(algorithm="inforeasoner", settings={"algorithm.gain_wait": 1}))
