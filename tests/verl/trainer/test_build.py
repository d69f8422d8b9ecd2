"""The composition root, as far as it goes without models."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from serving.http import MAX_CONNECTIONS
from tests.fakes import (
    CharTokenizer,
    FakeGainService,
    Reply,
    ScriptedSearch,
    ScriptedServer,
    make_question,
    make_trajectory,
)
from tests.methods import make_method
from tests.trainer_run import FakeModels
from verl.agent.prompts import PACKAGED_FILE
from verl.algorithms import ALGORITHMS
from verl.algorithms.base import Measurement, Need, Prefetch, ScorerOptions
from verl.algorithms.igpo import IGPO, IGPOConfig
from verl.algorithms.inforeasoner import InfoReasoner
from verl.algorithms.search_r1 import SearchR1, SearchR1Config
from verl.algorithms.siop import SIOP
from verl.algorithms.tips import TIPS, TIPSConfig
from verl.errors import ConfigError, ServiceError, TrainingHaltedError
from verl.protocols import ToolResources
from verl.run.manifest import MANIFEST_FILE, make_manifest, write_manifest
from verl.trainer.build import build, load_data, make_reward, make_services
from verl.trainer.config.schema import AgentConfig, Config, RewardConfig
from verl.trainer.launch import Models
from verl.trainer.wiring import connect_services, make_format, make_resources, make_tools
from verl.types import Gain, Group, Message
from verl.utils.reward_score.IG_client import GainRequest

TOKEN = "geheim-4711"
RETRIEVER_TOKEN = "verborgen-4712"
HEALTHY = Reply('{"status": "healthy", "mode": "single-CPU", "device": "cpu"}')
VERSION = Reply('{"version": "0.1.0", "generator_digest": "abc"}')
NO_ITEMS = Reply('{"scores": [], "errors": [], "details": null}')
FOUND_NOTHING = Reply('{"result": [[]]}')
INDEX = Reply('{"index_sha256": "abc"}')
REQUEST = GainRequest(question="Where?", context="There.", golds=("Bolton",))


def make_config(retriever: ScriptedServer, service: ScriptedServer | FakeGainService) -> Config:
    config = Config(agent=AgentConfig(format="search_r1"))
    config.retriever.url = f"{retriever.url}/retrieve"
    config.reward.semantic.url = service.url
    config.reward.semantic.timeout_s = 2.0
    config.trainer.service_wait_s = 2.0
    return config


async def test_the_token_reaches_the_service_and_no_file_or_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    monkeypatch.setenv("IG_TOKEN", TOKEN)
    monkeypatch.setenv("RETRIEVER_TOKEN", RETRIEVER_TOKEN)
    retriever, service = (
        ScriptedServer([FOUND_NOTHING, INDEX]),
        ScriptedServer([NO_ITEMS, HEALTHY, VERSION, NO_ITEMS]),
    )
    async with retriever.running(), service.running(), AsyncExitStack() as stack:
        config = make_config(retriever, service)
        tools = make_tools(config, make_resources(config))
        gains, services = await connect_services(config, stack, tools=tools, needs=InfoReasoner.needs)
        assert gains is not None
        await gains.submit(REQUEST)
    assert [headers["authorization"] for _, headers, _ in service.requests] == [f"Bearer {TOKEN}"] * 4
    assert [headers["authorization"] for _, headers, _ in retriever.requests] == [
        f"Bearer {RETRIEVER_TOKEN}"
    ] * 2
    write_manifest(tmp_path, make_manifest(config, services=services, prompt=make_question().text))
    manifest = json.loads((tmp_path / MANIFEST_FILE).read_text())
    assert manifest["services"]["ig_service"]["health"]["mode"] == "single-CPU"
    assert manifest["services"]["ig_service"]["version"]["generator_digest"] == "abc"
    assert manifest["services"]["retriever"]["version"]["index_sha256"] == "abc"
    written = (tmp_path / MANIFEST_FILE).read_text() + caplog.text
    assert TOKEN not in written
    assert RETRIEVER_TOKEN not in written


async def test_the_clients_of_all_engines_open_no_more_connections_than_one() -> None:
    server = ScriptedServer([Reply(FOUND_NOTHING.body, delay_s=0.05)])
    async with server.running():
        config = Config()
        config.retriever.url = server.url
        search = make_resources(config, num_replicas=MAX_CONNECTIONS).open_search()
        first = asyncio.create_task(search.search("q"))
        while not server.arrivals:
            await asyncio.sleep(0)
        await asyncio.gather(first, search.search("q"))
        await search.aclose()
    assert server.arrivals[1] - server.arrivals[0] >= 0.05


async def test_a_wrong_token_is_noticed_before_anything_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IG_TOKEN", TOKEN)
    retriever, service = ScriptedServer([FOUND_NOTHING]), ScriptedServer([Reply("{}", 401)])
    async with retriever.running(), service.running(), AsyncExitStack() as stack:
        config = make_config(retriever, service)
        tools = make_tools(config, make_resources(config))
        with pytest.raises(ServiceError, match=r"401.*not its token") as caught:
            await connect_services(config, stack, tools=tools, needs=InfoReasoner.needs)
    assert TOKEN not in str(caught.value)


async def test_entailment_is_required_of_the_ig_service_where_the_method_needs_it() -> None:
    retriever = ScriptedServer([FOUND_NOTHING, INDEX])
    judging = ScriptedServer([NO_ITEMS, HEALTHY, Reply('{"probabilities": [], "errors": []}'), VERSION])
    published = ScriptedServer([NO_ITEMS, HEALTHY, Reply("", 404)])
    async with retriever.running(), judging.running(), published.running(), AsyncExitStack() as stack:
        config = make_config(retriever, judging)
        tools = make_tools(config, make_resources(config))
        client, services = await connect_services(config, stack, tools=tools, needs=SIOP.needs)
        assert client is not None
        assert "ig_service" in services
        config = make_config(retriever, published)
        with pytest.raises(ServiceError, match=r"has no /entailment.*start it with"):
            await connect_services(config, stack, tools=[], needs=SIOP.needs)


@pytest.mark.parametrize(
    ("required", "fix"), [(InfoReasoner.needs, "is the IG service at http"), (frozenset(), "repair what the")]
)
async def test_a_halt_names_the_ig_service_only_where_the_method_asks_it(
    required: frozenset[Need], fix: str
) -> None:
    class Failing(SearchR1):
        needs = required

        async def measure(self, groups: Sequence[Group], *, prefetch: Prefetch) -> Measurement:
            return Measurement(gains=[[Gain(failure="gain_failed: x")] * len(g.trajectories) for g in groups])

    question = make_question()
    group = Group(question=question, trajectories=(make_trajectory(question, answer="x"),) * 2)
    method = Failing(SearchR1Config(), make_method().services)
    with pytest.raises(TrainingHaltedError, match=f"Fix: {fix}"):
        await make_reward(Config(reward=RewardConfig(outcome="em")), method, decode=str).score(
            [group], prefetch=Prefetch()
        )


@pytest.mark.parametrize("name", ["siop", "inforeasoner"])
async def test_an_evaluation_waits_for_no_service_of_the_method(tmp_path: Path, name: str) -> None:
    """It goes on to the model, which comes after the services."""
    retriever, closed = ScriptedServer([FOUND_NOTHING, INDEX]), ScriptedServer([Reply("", 500)])
    async with retriever.running(), AsyncExitStack() as stack:
        async with closed.running():
            config = make_config(retriever, closed)
        config.algorithm = ALGORITHMS[name].settings_class()
        config.actor_rollout_ref.model.path = str(tmp_path / "none")
        config.trainer.val_only = True
        config.trainer.service_wait_s = 0.1
        with pytest.raises(ConfigError, match=r"actor_rollout_ref\.model\.path"):
            await build(config, stack, run_dir=tmp_path, device="cpu")


@pytest.mark.parametrize("is_fresh", [True, False])
def test_old_log_probs_come_from_trees_only_where_the_update_needs_them(is_fresh: bool) -> None:
    config = Config(algorithm=IGPOConfig())
    policy: Any = FakeModels(is_fresh=is_fresh)
    models = Models(policy=policy, reference=None, engines=policy)
    services = make_services(config, models, codec=CharTokenizer(), ig_client=None)
    assert services.policy is not None
    assert services.policy.scores_trajectories is not is_fresh


def test_importing_it_loads_neither_matplotlib_nor_jinja2() -> None:
    code = "import sys, verl.trainer.build; print({'matplotlib', 'jinja2'} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_an_instruction_that_does_not_show_how_to_answer_is_refused(tmp_path: Path) -> None:
    config = Config(agent=AgentConfig(format="search_r1"))
    tools = make_tools(config, ToolResources(open_search=ScriptedSearch))
    tokenizer = CharTokenizer()
    assert make_format(config, tokenizer=tokenizer, tools=tools).stop_strings
    texts = PACKAGED_FILE.read_text().replace("<answer>", "<result>")
    (tmp_path / "prompts.yaml").write_text(texts)
    config.data.prompt_file = str(tmp_path / "prompts.yaml")
    with pytest.raises(ConfigError, match=r"prompts\.yaml': the instruction of search_r1 never says to"):
        make_format(config, tokenizer=tokenizer, tools=tools)


def test_data_prompt_holds_for_training_and_held_out_questions(tmp_path: Path) -> None:
    own = {"role": "user", "content": "Use <answer> a </answer>."}
    row = {
        "data_source": "nq",
        "prompt": [own],
        "question": "who?",
        "reward_model": {"ground_truth": {"target": ["Bolton"]}},
        "extra_info": {"split": "train", "index": 0},
    }
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    config = Config(agent=AgentConfig(format="search_r1"))
    config.data.train_files = config.data.val_files = str(tmp_path / "a.parquet")
    config.data.max_start_length = 1000
    tools = make_tools(config, ToolResources(open_search=ScriptedSearch))
    prompt_format = make_format(config, tokenizer=CharTokenizer(), tools=tools)
    written = prompt_format.write_prompt("who?")
    for prompt, asked in (("auto", (Message(**own),)), ("file", written)):
        config.data.prompt = prompt
        train, held_out = load_data(config, prompt_format)
        assert [question.messages for question in (*train, *held_out)] == [asked, asked]


def test_settings_of_a_method_say_how_its_log_probs_are_computed() -> None:
    shared = ScorerOptions(shares_prefixes=True, refresh_steps=0)
    assert IGPO.scorer_options(IGPOConfig()) == SearchR1.scorer_options(SearchR1Config()) == shared
    assert not IGPO.scorer_options(IGPOConfig(use_vectorized_gt_logprob=False)).shares_prefixes
    assert TIPS.scorer_options(TIPSConfig(refresh_steps=3)).refresh_steps == 3
