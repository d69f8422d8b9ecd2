"""The straightforward pipeline, in a process of its own: one item after the other, nothing shared.

For every item: `generate` with the context, `generate` without it, then the entailment of every pair of
answers and of every answer with every gold, in one batch. The published service works in this way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.workload import Rollout
from IG import semantics
from IG.entailment import EntailmentModel, Pair
from IG.prompts import STOP_STRINGS, PromptType, build_prompt, entailment_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PIPELINE: Pipeline | None = None


def load(generator: str, entailment: str, num_answers: int, max_new_tokens: int, cpu_threads: int) -> None:
    """Load both. `generate` gets one thread, the entailment model all: the fastest way on two cores."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    global _PIPELINE
    torch.manual_seed(0)
    _PIPELINE = Pipeline(
        AutoModelForCausalLM.from_pretrained(generator, dtype=torch.float32).eval(),
        tokenizer=AutoTokenizer.from_pretrained(generator),
        entailment=EntailmentModel.load(entailment, device="cpu", batch_size=256, cpu_threads=cpu_threads),
        num_answers=num_answers,
        max_new_tokens=max_new_tokens,
    )
    _PIPELINE.gain(Rollout(question="What is 1 + 1?", context="1 + 1 is 2.", golds=("2",)))


def measure(rollouts: Sequence[Rollout]) -> tuple[float, list[float]]:
    """Seconds and gains."""
    assert _PIPELINE is not None
    began = time.perf_counter()
    gains = [_PIPELINE.gain(rollout) for rollout in rollouts]
    return time.perf_counter() - began, gains


class Pipeline:
    """Both models, asked for one item at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        entailment: EntailmentModel,
        num_answers: int,
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._entailment = entailment
        self._num_answers = num_answers
        self._max_new_tokens = max_new_tokens

    def gain(self, rollout: Rollout) -> float:
        """Difference of the hard scores with and without the context."""
        return self._score(rollout, context=rollout.context) - self._score(rollout, context="")

    def _score(self, rollout: Rollout, *, context: str) -> float:
        texts, log_probs = self._sample(
            build_prompt(
                rollout.question, context=context, prompt_type=PromptType.default, max_context_words=4096
            )
        )
        pairs: list[Pair] = [(a, b) for a in texts for b in (*texts, *rollout.golds)]
        pairs += [(gold, a) for a in texts for gold in rollout.golds]
        asked = [
            (entailment_text(rollout.question, a), entailment_text(rollout.question, b)) for a, b in pairs
        ]
        probabilities = self._entailment.probabilities(asked)
        num_texts, num_golds = len(texts), len(rollout.golds)
        forward = probabilities[: num_texts * (num_texts + num_golds)].reshape(num_texts, -1)
        backward = probabilities[num_texts * (num_texts + num_golds) :].reshape(num_texts, num_golds)
        between, to_gold = forward[:, :num_texts], forward[:, num_texts:]
        clusters = semantics.connected_components(semantics.equivalent(between, between.T, threshold=0.5))
        matches = semantics.equivalent(to_gold, backward, threshold=0.5)
        return float(
            semantics.hard_score(
                semantics.sample_weights(log_probs), correct=semantics.correct_responses(clusters, matches)
            )
        )

    def _sample(self, prompt: str) -> tuple[list[str], semantics.FloatArray]:
        import torch

        encoded = self._tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            output = self._model.generate(
                **encoded,
                do_sample=True,
                temperature=1.0,
                top_k=0,
                num_return_sequences=self._num_answers,
                max_new_tokens=self._max_new_tokens,
                stop_strings=list(STOP_STRINGS),
                tokenizer=self._tokenizer,
                output_logits=True,
                return_dict_in_generate=True,
            )
        answers = output.sequences[:, encoded.input_ids.shape[1] :]  # [R, T]
        log_probs = torch.stack(output.logits, dim=1).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        kept = answers != self._tokenizer.pad_token_id
        means = (log_probs * kept).sum(1) / kept.sum(1).clamp(min=1)
        texts = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return [_without_stop(text) for text in texts], means.double().numpy()


def _without_stop(text: str) -> str:
    ends = [at for stop in STOP_STRINGS if (at := text.find(stop)) >= 0]
    return text[: min(ends)].strip() if ends else text.strip()
