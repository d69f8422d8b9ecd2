from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest
from prepare_data import main as prepare_data

from tests.fakes import AnsweringServer, FakeAgent, Reply
from tests.flashrag_sample import SPLITS, write_sample
from tests.scripted_evaluation import make_result
from tests.scripted_run import decode, make_question
from verl.errors import ConfigError, DataError
from verl.evaluation.browsecomp import write_run_files
from verl.evaluation.page import write_report
from verl.evaluation.protocol_check import (
    add_protocol_settings,
    check_ids,
    check_protocol,
    find_record,
    hash_questions,
    protocol_table,
    published_table,
    with_protocol,
)
from verl.evaluation.protocols import NO_PROTOCOL, PROTOCOLS, SETS, find_set
from verl.evaluation.records import ResultWriter, read_results
from verl.evaluation.settings import open_folder
from verl.evaluation.summary import summarize
from verl.evaluation.tables import as_markdown, results_table
from verl.run.manifest import make_manifest
from verl.trainer.config.evaluation import EvaluationConfig
from verl.trainer.config.loading import compose_config
from verl.trainer.config.overrides import check_overrides
from verl.trainer.config.schema import Config
from verl.trainer.evaluate import find_version, play, trace_evidence
from verl.trainer.wiring import load_prompts, make_format, make_outcome, make_tokenizer
from verl.types import Question

ROOT = Path(__file__).resolve().parents[3]
WIKI = {"passages": 21_015_324}


def composed(*arguments: str) -> Config:
    return compose_config(check_overrides(add_protocol_settings(arguments)))


def ask(source: str, count: int) -> list[Question]:
    question = make_question(0)
    return [dataclasses.replace(question, uid=f"{source}/test/{k}", data_source=source) for k in range(count)]


def test_the_sets_have_the_published_sizes() -> None:
    seven = PROTOCOLS["search_r1"].questions
    assert sum(seven.values()) == 51_713
    assert sum(SETS[name].num_training or 0 for name in seven) == 169_615
    assert sum(PROTOCOLS["igpo"].questions.values()) == 3_197
    names = ("2wiki", "tq", "Bamboogle", "searchR1_hotpotqa", "BrowseComp-Plus", "nq", "world_onehop")
    assert [find_set(name) for name in names] == [
        *("2wikimultihopqa", "triviaqa", "bamboogle", "hotpotqa", "browsecomp_plus", "nq"),
        None,
    ]


def test_every_protocol_is_a_choice_with_settings_that_exist() -> None:
    field = next(f for f in dataclasses.fields(EvaluationConfig) if f.name == "protocol")
    assert field.default == NO_PROTOCOL
    for name in (NO_PROTOCOL, *PROTOCOLS):
        config = composed(f"evaluation.protocol={name}", "evaluation.protocol_overrides=true")
        record = check_protocol(config, [], version={})
        assert (record is None) == (name == NO_PROTOCOL)
        assert record is None or record["deviations"] == []
    with pytest.raises(ConfigError, match=r"evaluation\.protocol.*one of none, search_r1"):
        composed("evaluation.protocol=autorefine")


@pytest.mark.parametrize("name", PROTOCOLS)
def test_published_averages_are_those_of_their_rows(name: str) -> None:
    """Up to rounding: each value can be off by half of its last digit."""
    assert PROTOCOLS[name].published
    for result in PROTOCOLS[name].published:
        if result.average is not None and len(result.values) == 7:
            assert sum(result.values.values()) / 7 == pytest.approx(result.average, abs=0.11), result.model
        assert result.values.keys() <= PROTOCOLS[name].questions.keys()


def test_a_protocol_replaces_the_defaults_of_a_recipe() -> None:
    config = composed("recipe=world", "evaluation.protocol=search_r1")
    assert (config.max_turns, config.retriever.topk, config.agent.format) == (4, 3, "search_r1")
    assert (config.data.max_prompt_length, config.reward.answer_rule) == (4096, "published")
    asked = ask("nq", 3_610)
    record = check_protocol(config, asked, version=WIKI)
    assert record == {
        "name": "search_r1",
        "deviations": [],
        "unchecked": [],
        "ids": {"nq": hash_questions(asked)},
    }
    note = with_protocol(results_table(summarize([make_result("nq/test/0")])), record).note
    assert f"Questions (SHA-256): nq {hash_questions(asked)[:12]}." in note
    assert find_record({"protocol": record}) == record


def test_questions_can_be_pinned() -> None:
    asked = ask("nq", 3)
    lines = sorted(json.dumps([one.uid, one.text, list(one.golds)]) + "\n" for one in asked)
    expected = hashlib.sha256("".join(lines).encode()).hexdigest()
    for pinned in (expected, expected[:12], None):
        assert check_ids(asked[::-1], pinned) == expected
    with pytest.raises(
        ConfigError, match=rf"the 2 questions .* have the SHA-256 {hash_questions(asked[:2])}"
    ):
        check_ids(asked[:2], expected)
    # Other questions in the same rows of a file.
    for other in ({"text": "Who?"}, {"golds": ("Paris",)}):
        with pytest.raises(ConfigError, match=r"the 3 questions of data\.val_files have"):
            check_ids([dataclasses.replace(asked[0], **other), *asked[1:]], expected)
    with pytest.raises(ConfigError, match=r"evaluation\.expected_ids must be 12 to 64 digits"):
        composed("evaluation.expected_ids=abc")


def test_what_differs_is_an_error_that_names_all_of_it_or_is_recorded() -> None:
    arguments = ("evaluation.protocol=inforeasoner", "retriever.topk=5", "max_turns=2")
    questions = [*ask("nq", 10), *ask("mine", 2)]
    with pytest.raises(ConfigError) as refused:
        check_protocol(composed(*arguments), questions, version={"passages": 2580})
    deviations = [
        "retriever.topk is 5, the protocol has 3",
        "data.val_files has 2 questions of mine, which is not a set of the protocol",
        "data.val_files has 10 questions of nq, the protocol has 3610",
        "the retriever has a corpus of 2580 passages, the protocol searches wiki-18",
    ]
    for expected in (*deviations, "evaluation.protocol_overrides=true"):
        assert expected in str(refused.value)
    allowed = composed(*arguments, "evaluation.protocol_overrides=true")
    record = check_protocol(allowed, questions, version={"passages": 2580})
    assert record is not None
    assert len(record["deviations"]) == len(deviations)
    summary = summarize([make_result(f"nq/test/{k}") for k in range(4)])
    for table in (with_protocol(results_table(summary), record), published_table(summary, record)):
        assert "NOT COMPARABLE: retriever.topk is 5, the protocol has 3" in table.note
    assert find_record({"protocol": record}) == record


@pytest.mark.parametrize("given", [("--protocol", "search_r1"), ("--protocol=search_r1",)])
def test_the_option_protocol_is_the_setting(given: tuple[str, ...]) -> None:
    assert composed("recipe=world", *given).evaluation.protocol == "search_r1"
    assert composed("recipe=world", *given).max_turns == 4
    for wrong in (("--protocol",), ("--protocol", "max_turns=4"), ("--protocol=autorefine",)):
        with pytest.raises(
            ConfigError, match=r"--protocol .*: expected one of none, search_r1, inforeasoner"
        ):
            add_protocol_settings(wrong)


def test_a_reference_under_a_protocol_is_a_deviation() -> None:
    config = composed("evaluation.protocol=search_r1", "evaluation.reference=no_search")
    with pytest.raises(ConfigError, match=r"evaluation\.reference is no_search, the protocol has none"):
        check_protocol(config, ask("nq", 3_610), version=WIKI)


def test_igpo_is_evaluated_in_the_form_of_its_released_checkpoints() -> None:
    config = composed("evaluation.protocol=igpo")
    assert (config.agent.format, config.agent.context) == ("igpo", "end")
    assert (config.data.max_prompt_length, config.data.max_response_length) == (30_767, 2_000)
    assert config.reward.answer_rule == "published"


def test_an_online_engine_and_a_corpus_are_told_apart() -> None:
    igpo = composed("evaluation.protocol=igpo", "evaluation.protocol_overrides=true")
    sampled = check_protocol(igpo, ask("2wiki", 512), version={"passages": None})
    assert sampled is not None
    assert sampled["deviations"] == []
    (unchecked,) = sampled["unchecked"]
    assert unchecked.startswith(
        "whether the questions are the 3,197 questions of data/test.parquet in IGPO's"
    )
    for config, version in ((igpo, WIKI), (composed("evaluation.protocol=search_r1"), {"passages": None})):
        config.evaluation.protocol_overrides = True
        record = check_protocol(config, [], version=version)
        assert record is not None
        assert len(record["deviations"]) == 1
    unknown = check_protocol(composed("evaluation.protocol=search_r1"), ask("nq", 3_610), version={})
    assert unknown is not None
    assert unknown["unchecked"] == ["the corpus, as the retriever does not describe itself"]


def test_published_numbers_stand_beside_ours_as_theirs() -> None:
    record = find_record({"protocol": {"name": "igpo", "deviations": [], "unchecked": []}})
    assert record is not None
    results = [make_result(f"2wiki/test/{k}") for k in range(4)]
    for result in results:
        result["metrics"]["set_f1"] = 0.5
    shown = as_markdown(published_table(summarize(results), record))
    assert "## Beside published numbers: set F1" in shown
    ours = next(line for line in shown.splitlines() if line.startswith("| this evaluation"))
    # One of seven sets: there is no average that theirs could be compared with.
    assert ours == "| this evaluation | - | - | - | - | 50.0 | - | - | - | measured here |"
    assert "| IGPO 7B | 46.4 | 80.6 | 53.8 | 59.0 | 72.1 | 32.7 | 77.0 | 60.2 | IGPO, 2510.14967 |" in shown


def test_the_documentation_has_the_table_of_the_protocols() -> None:
    assert protocol_table() in (ROOT / "docs" / "evaluation.md").read_text()


def test_run_files_are_what_the_evaluator_of_browsecomp_plus_reads(tmp_path: Path) -> None:
    results = [
        make_result("browsecomp_plus/test/769", num_searches=2) | {"passages": [["7", "9"], ["9", "3"], []]},
        make_result("browsecomp_plus/test/770", em=0.0, prediction=None),
        make_result("browsecomp_plus/test/771", failure="search_failed: late"),
        make_result("browsecomp_plus/test/769", sample=1),
        make_result("nq/test/769", prediction="of another set"),
    ]
    target = write_run_files(tmp_path, results, model="m")
    (target / "run_old.json").write_text("{}")
    assert write_run_files(tmp_path, results, model="m") == target
    runs = {path.name: json.loads(path.read_text()) for path in sorted(target.iterdir())}
    assert list(runs) == ["run_769.json", "run_770.json"]
    assert runs["run_769.json"] == {
        "metadata": {"model": "m"},
        "query_id": "769",
        "tool_call_counts": {"search": 2},
        "status": "completed",
        "retrieved_docids": ["7", "9", "3"],
        "result": [{"type": "output_text", "tool_name": None, "arguments": None, "output": "Bolton"}],
    }
    assert runs["run_770.json"]["status"] == "incomplete"
    with pytest.raises(DataError, match=r"BrowseComp-Plus/test/769 is the second query .* run_769\.json"):
        write_run_files(tmp_path, [*results, make_result("BrowseComp-Plus/test/769")], model="m")
    assert (target / "run_769.json").is_file()


async def test_a_sample_of_the_seven_sets_is_evaluated_under_a_protocol(tmp_path: Path) -> None:
    """Questions of the embedded world in the schemas of the sets, from files to tables."""
    flashrag = write_sample(tmp_path / "flashrag", per_set=2)
    prepare_data(["--flashrag-dir", str(flashrag), "--test", *SPLITS, "--out-dir", str(tmp_path / "data")])
    config = composed(
        *("--protocol", "search_r1", "recipe=world", f"data.val_files=[{tmp_path / 'data/test.parquet'}]"),
        f"actor_rollout_ref.model.path={ROOT / 'world/models/policy'}",
        *("data.max_start_length=512", "data.max_prompt_length=1024", "data.max_response_length=96"),
        *("data.max_obs_length=192", "evaluation.protocol_overrides=true"),
    )
    prompt_format = make_format(config, tokenizer=make_tokenizer(config), tools=[])
    questions = load_prompts(config, config.data.val_paths, prompt_format=prompt_format)
    services = {"retriever": {"version": {"passages": 2580}}}
    protocol = check_protocol(config, questions, version=find_version(services))
    assert protocol is not None
    assert config.max_turns == 4
    assert "data.val_files has 2 questions of nq, the protocol has 3610" in protocol["deviations"]
    assert any(text.startswith("the retriever has a corpus of 2580 pass") for text in protocol["deviations"])

    folder = tmp_path / "evaluation"
    settings = make_manifest(
        config, services=services, model_folder=None, prompt_file=None, prompt="", trains=False
    )
    open_folder(folder, settings | {"protocol": protocol}, resume=True)
    writer = ResultWriter(folder, decode=decode)
    outcome = make_outcome(config, decode=decode)
    await play(config, FakeAgent(), questions, max_concurrent=9, outcome=outcome, writer=writer)
    writer.sort([(question.uid, 0) for question in questions])
    writer.close()
    golds = [{"id": question.uid, "contents": f"T\n{question.golds[0]}"} for question in questions]
    hits = [{"document": document, "score": 1.0} for document in golds]
    server = AnsweringServer(lambda body: Reply(json.dumps({"result": [hits] * len(body["queries"])})))
    async with server.running():
        config.retriever.url = server.url
        await trace_evidence(config, questions, folder=folder, services=services)
    write_report(folder)

    assert [r["data_source"] for r in read_results(folder)] == [name for name in SPLITS for _ in range(2)]
    tables = (folder / "table.md").read_text()
    assert "| Search-R1 3B base, PPO | 40.6 |" in tables
    assert tables.count("DEVIATES FROM IT, NOT COMPARABLE") == tables.count("## ")
    losses = json.loads((folder / "summary.json").read_text())["losses"]["groups"]
    assert losses["musique"]["evidence"] == {"supporting_ids": 2}
    assert losses["nq"]["evidence"] == {"gold_strings": 2}
    assert losses["nq"]["evidence_in_depth"]["value"] == 1.0
