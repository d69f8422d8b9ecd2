"""Does one text entail another? The entailment model, and a queue that batches what many ask of it.

The only file of `IG` that imports transformers. Labels are found by name in the model's own config, never by
number: published models order them differently.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

Pair = tuple[str, str]
"""Premise and hypothesis."""


class Entailment(Protocol):
    """Judge pairs of texts."""

    def probabilities(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
        """P(premise entails hypothesis) of every pair, in order. Blocking; called from one thread only."""
        ...


class EntailmentModel:
    """A sequence classifier trained on natural-language inference; make it with `load`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        entailment_index: int,
        batch_size: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._entailment_index = entailment_index
        self._batch_size = batch_size

    @classmethod
    def load(cls, name: str, *, device: str, batch_size: int, cpu_threads: int) -> EntailmentModel:
        """Load by folder or hub name; float32 on a CPU, bfloat16 on a GPU. Raises ValueError and OSError."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        if device == "cpu":
            torch.set_num_threads(cpu_threads)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return cls(
            model.to(device).eval(),
            tokenizer=tokenizer,
            entailment_index=entailment_label(model.config.id2label, model=name),
            batch_size=batch_size,
        )

    def probabilities(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
        """P(premise entails hypothesis), in order: batches of pairs of like length, long ones first."""
        import torch

        scores = np.empty(len(pairs), dtype=np.float64)
        if not pairs:
            return scores
        encoded = self._tokenizer(
            [premise for premise, _ in pairs],
            [hypothesis for _, hypothesis in pairs],
            truncation=True,
            max_length=self._max_tokens,
        )
        lengths = np.asarray([len(ids) for ids in encoded["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        for start in range(0, len(pairs), self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = self._tokenizer.pad(
                {key: [column[row] for row in rows] for key, column in encoded.items()}, return_tensors="pt"
            ).to(self._model.device)
            with torch.inference_mode():
                logits = self._model(**batch).logits.float()  # [B, label]
            scores[rows] = logits.softmax(dim=-1)[:, self._entailment_index].double().cpu().numpy()
        return scores

    @property
    def _max_tokens(self) -> int:
        positions: int = self._model.config.max_position_embeddings
        return min(positions, int(self._tokenizer.model_max_length))


def entailment_label(id2label: dict[int, str], *, model: str) -> int:
    """Index of the label called entailment, whatever its case. Raises ValueError when there is none."""
    found = [index for index, label in id2label.items() if label.lower() in ("entailment", "entail")]
    if len(found) != 1:
        raise ValueError(
            f"entailment model {model}: its config.json has the labels {dict(id2label)}, expected one called "
            "'entailment'; choose a model trained on natural-language inference or name its labels there"
        )
    return int(found[0])


class EntailmentQueue:
    """Judges pairs for many callers at once: what waits while a batch runs becomes the next batch.

    Every pair is judged once: while it waits or runs it is shared, later its probability is remembered.
    A pair without a finite probability fails whoever asked for it, and nobody else.
    """

    def __init__(self, model: Entailment, *, cache_size: int = 200_000) -> None:
        self._model = model
        self._cache_size = cache_size
        self._known: OrderedDict[Pair, float] = OrderedDict()
        self._asked: dict[Pair, asyncio.Future[float]] = {}
        self._waiting: list[Pair] = []
        self._runner: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ig-entailment")

    async def probabilities(self, pairs: Sequence[Pair]) -> dict[Pair, float]:
        """P(premise entails hypothesis) by pair. Raises what the model raises, ValueError for a NaN."""
        known: dict[Pair, float] = {}
        futures: dict[Pair, asyncio.Future[float]] = {}
        for pair in pairs:
            probability = self._known.get(pair)
            if probability is None:
                futures[pair] = self._ask(pair)
            else:
                known[pair] = probability
        for pair, future in futures.items():
            known[pair] = await asyncio.shield(future)
        return known

    async def aclose(self) -> None:
        """Stop the thread after the running batch."""
        if self._runner is not None:
            self._runner.cancel()
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    def _ask(self, pair: Pair) -> asyncio.Future[float]:
        future = self._asked.get(pair)
        if future is None:
            loop = asyncio.get_running_loop()
            future = self._asked[pair] = loop.create_future()
            self._waiting.append(pair)
            if self._runner is None:
                self._runner = loop.create_task(self._run())
        return future

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch, self._waiting = self._waiting, []
                for pair, outcome in zip(batch, await self._judge(batch), strict=True):
                    self._settle(pair, outcome)
                while len(self._known) > self._cache_size:
                    self._known.popitem(last=False)
        finally:
            # Ended, cancelled or broken: whoever asks next gets a new runner, whoever still waits an answer.
            self._runner = None
            self._waiting = []
            for pair in list(self._asked):
                self._settle(pair, RuntimeError("the entailment queue stopped before it judged this pair"))

    async def _judge(self, batch: list[Pair]) -> Sequence[float | Exception]:
        """The probability of every pair, or why there is none; never a value that is no number."""
        loop = asyncio.get_running_loop()
        try:
            scores = await loop.run_in_executor(self._thread, self._model.probabilities, batch)
            if scores.shape != (len(batch),):
                raise ValueError(
                    f"the entailment model gave scores of shape {scores.shape} for {len(batch)} pairs"
                )
            judged: list[float] = scores.tolist()
        except Exception as error:  # the callers get it; the queue goes on
            return [error] * len(batch)
        return [
            score
            if math.isfinite(score)
            else ValueError(f"the entailment model gave {score} for {pair}, expected a probability")
            for pair, score in zip(batch, judged, strict=True)
        ]

    def _settle(self, pair: Pair, outcome: float | Exception) -> None:
        future = self._asked.pop(pair)
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
            future.exception()  # a caller who went away must not leave a warning behind
        else:
            self._known[pair] = outcome
            future.set_result(outcome)
