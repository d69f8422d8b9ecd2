"""The real engine on the CPU: exact log-probs, exact seeds, weights in place, no process left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from verl.errors import RolloutError, WeightSyncError
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import RolloutConfig
from verl.types import Completion, Finish, FloatArray, IntArray, Sampling

pytestmark = [pytest.mark.slow, pytest.mark.vllm]
VOCAB = 258
SAMPLING = Sampling(temperature=0.7, max_tokens=24, stop=("</search>", "</answer>"), seed=11)


def make_model(folder: Path, *, seed: int) -> Path:
    """A random untied Qwen2 with one token per byte; its generation config asks for truncated sampling."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator([], trainers.BpeTrainer(vocab_size=256, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, top_k=2, temperature=0.1, repetition_penalty=1.5
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def transformers_log_probs(folder: Path, ids: IntArray, *, temperature: float = 1.0) -> FloatArray:
    """Log-prob of every token given those before it; position 0 holds 0."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    row = torch.tensor(ids[None].astype(np.int64))
    with torch.no_grad():
        log_probs = torch.log_softmax(model(row).logits[0] / temperature, dim=-1)
    found = log_probs[:-1].gather(-1, row[0, 1:, None])[:, 0].numpy()
    return np.concatenate([np.zeros(1, np.float32), found])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return make_model(folder / "one", seed=0), make_model(folder / "two", seed=1)


@pytest.fixture(scope="module")
def loop() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def config() -> RolloutConfig:
    return RolloutConfig(cpu_kv_cache_gib=0.05)


@pytest.fixture(scope="module")
def engine(config: RolloutConfig, models: tuple[Path, Path], loop: asyncio.Runner) -> Iterator[VllmEngine]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    engine = VllmEngine(config, model_path=str(models[0]), max_model_len=256, dtype="float32", num_threads=1)
    children = psutil.Process().children(recursive=True)
    cores = [child for child in children if child.pid not in before and "EngineCore" in child.name()]
    assert cores
    yield engine
    loop.run(engine.shutdown())
    assert psutil.wait_procs(cores, timeout=200)[1] == []


def make_prompts(count: int) -> list[IntArray]:
    random = np.random.default_rng(0)
    return [random.integers(0, 256, size=random.integers(5, 150)).astype(np.int32) for _ in range(count)]


START = """
import sys, time
from verl.rollout.vllm_engine import VllmEngine
from verl.trainer.config.schema import RolloutConfig
import psutil
if __name__ == "__main__":
    config = RolloutConfig(cpu_kv_cache_gib=0.05)
    engine = VllmEngine(config, model_path=sys.argv[1], max_model_len=64, num_threads=1)
    print(*[child.pid for child in psutil.Process().children(recursive=True)], flush=True)
    time.sleep(600)
"""


def test_the_engine_dies_with_its_parent_even_by_kill_9(models: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "start.py").write_text(START)
    parent = subprocess.Popen(
        [sys.executable, str(tmp_path / "start.py"), str(models[0])],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        text=True,
    )
    assert parent.stdout is not None
    pids = next([int(word) for word in line.split()] for line in parent.stdout if line[:1].isdigit())
    assert pids
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while any(map(psutil.pid_exists, pids)):
        time.sleep(0.1)


def test_log_probs_are_those_of_transformers_under_the_temperature(
    engine: VllmEngine, models: tuple[Path, Path], loop: asyncio.Runner
) -> None:
    for prompt in make_prompts(4):
        completion = loop.run(engine.generate(prompt, sampling=SAMPLING))
        ids = np.concatenate([prompt, completion.ids])
        expected = transformers_log_probs(models[0], ids, temperature=0.7)[len(prompt) :]
        assert np.abs(completion.log_probs - expected).max() < 1e-4
        assert (completion.finish, completion.version) == (Finish.LENGTH, 0)
        assert np.abs(loop.run(engine.score(ids)) - transformers_log_probs(models[0], ids)).max() < 1e-4


def test_a_seed_gives_the_same_ids_alone_and_together(engine: VllmEngine, loop: asyncio.Runner) -> None:
    prompts = make_prompts(40)

    async def sample_all() -> list[Completion]:
        return await asyncio.gather(
            *(engine.generate(prompt, sampling=replace(SAMPLING, seed=k)) for k, prompt in enumerate(prompts))
        )

    together = loop.run(sample_all())
    for k in (0, 7, 39):
        alone = loop.run(engine.generate(prompts[k], sampling=replace(SAMPLING, seed=k)))
        assert np.array_equal(alone.ids, together[k].ids)
        assert np.abs(alone.log_probs - together[k].log_probs).max() < 1e-4
    other = loop.run(engine.generate(prompts[0], sampling=replace(SAMPLING, seed=1000)))
    assert not np.array_equal(other.ids, together[0].ids)


def test_the_checkpoints_generation_config_does_not_truncate_sampling(
    engine: VllmEngine, loop: asyncio.Runner
) -> None:
    prompt = make_prompts(1)[0]

    async def first_tokens() -> list[Completion]:
        hot = replace(SAMPLING, temperature=1.0, max_tokens=1)
        return await asyncio.gather(
            *(engine.generate(prompt, sampling=replace(hot, seed=k)) for k in range(60))
        )

    assert len({int(completion.ids[0]) for completion in loop.run(first_tokens())}) > 2


def test_a_completion_ends_with_its_stop_string_or_the_token_that_ends_a_turn(
    engine: VllmEngine, models: tuple[Path, Path], loop: asyncio.Runner
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    prompt = make_prompts(1)[0]
    greedy = replace(SAMPLING, temperature=0.0, stop=())
    whole = loop.run(engine.generate(prompt, sampling=greedy)).ids
    texts = (tokenizer.decode(whole[k : k + 2]) for k in range(2, 20))
    stop = next(text for text in texts if "\ufffd" not in text and text.strip())
    stopped = loop.run(engine.generate(prompt, sampling=replace(greedy, stop=(stop,))))
    assert stopped.finish is Finish.STOP
    assert tokenizer.decode(stopped.ids).endswith(stop)
    assert np.array_equal(stopped.ids, whole[: len(stopped.ids)])

    async def sample() -> list[Completion]:
        wild = replace(SAMPLING, temperature=2.0, max_tokens=100, stop=())
        return await asyncio.gather(
            *(engine.generate(prompt, sampling=replace(wild, seed=k)) for k in range(60))
        )

    eos, completions = tokenizer.eos_token_id, loop.run(sample())
    ended = [completion for completion in completions if eos in completion.ids]
    assert ended
    for completion in completions:
        assert completion.finish is (Finish.STOP if eos in completion.ids else Finish.LENGTH)
    assert all(completion.ids.tolist().index(eos) == len(completion.ids) - 1 for completion in ended)


def test_requests_end_at_their_deadline_and_too_long_ones_at_once(
    config: RolloutConfig, engine: VllmEngine, loop: asyncio.Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = make_prompts(1)[0]
    with pytest.raises(RolloutError, match="max_model_len of 256"):
        loop.run(engine.generate(prompt, sampling=replace(SAMPLING, max_tokens=500)))
    monkeypatch.setattr(config, "request_timeout_s", 0.001)
    with pytest.raises(RolloutError, match=r"within 0\.001 s .*request_timeout_s"):
        loop.run(engine.generate(prompt, sampling=replace(SAMPLING, max_tokens=100)))


def test_new_weights_are_taken_over_in_place_but_not_under_running_requests(
    engine: VllmEngine, models: tuple[Path, Path], loop: asyncio.Runner
) -> None:
    prompt = make_prompts(1)[0]

    async def load_while_running() -> None:
        request = asyncio.create_task(engine.generate(prompt, sampling=SAMPLING))
        await asyncio.sleep(0)
        with pytest.raises(WeightSyncError, match="1 requests still run"):
            await engine.load_weights(str(models[1]), 5)
        assert (await request).version == 0

    loop.run(load_while_running())
    with pytest.raises(WeightSyncError, match=r"no \*\.safetensors"):
        loop.run(engine.load_weights(str(models[1] / "none"), 5))
    before = loop.run(engine.generate(prompt, sampling=SAMPLING))
    loop.run(engine.load_weights(str(models[1]), 5))
    after = loop.run(engine.generate(prompt, sampling=SAMPLING))
    assert (before.version, after.version, loop.run(engine.version())) == (0, 5, 5)
    for seen in (prompt, np.concatenate([prompt, before.ids])):
        assert np.abs(loop.run(engine.score(seen)) - transformers_log_probs(models[1], seen)).max() < 1e-4
    loop.run(engine.load_weights(str(models[0]), 6))
    assert np.array_equal(loop.run(engine.generate(prompt, sampling=SAMPLING)).ids, before.ids)
