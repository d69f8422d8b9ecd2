"""Judge entailment between texts with a Hugging Face model; the only file of `IG` that imports transformers.

The entailment label is found by name in the model's config: published models order their labels differently.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

Pair = tuple[str, str]
"""Premise and hypothesis."""

_SMALLEST_BATCH = 16
"""Fewer pairs are not split among threads."""
_CPU_BATCH_TOKENS = 2048
"""Padded tokens of one batch on a CPU. Attention of larger batches misses the caches and asks the system for
memory at every layer: 64 pairs of 256 tokens cost 3.8 processor seconds at once and 1.5 in batches of 8."""
_MAX_TOKENS = 4096
"""Longest pair, for models without a limit of their own."""


class DeviceLostError(RuntimeError):
    """The GPU refuses further work from this process; a new process is needed."""


class EntailmentModel:
    """A sequence classifier trained on natural-language inference; make it with `load`."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase,
        entailment_index: int,
        batch_size: int,
        batch_tokens: int | None = None,
        num_threads: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._entailment_index = entailment_index
        self._batch_size = batch_size
        self._batch_tokens = batch_tokens
        self._num_threads = num_threads
        self._threads = ThreadPoolExecutor(num_threads, thread_name_prefix="ig-entailment")

    @classmethod
    def load(cls, name: str, *, device: str, batch_size: int, cpu_threads: int) -> EntailmentModel:
        """Load by folder or hub name; float32 on a CPU, bfloat16 on a GPU. Raises ValueError and OSError.

        On a CPU `cpu_threads` batches run in parallel with one thread each: threads that share a batch wait
        for each other at every operation, which is slow on busy cores.
        """
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from serving.weights import copy_weights

        if device == "cpu":
            torch.set_num_threads(1)
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        # The published default has its weights in a pickle, which torch reads without running code from it.
        model = AutoModelForSequenceClassification.from_pretrained(name, dtype=dtype, trust_remote_code=False)
        copy_weights(model)
        # Long texts lose their beginning: the answer is at the end, behind the question.
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, truncation_side="left")
        return cls(
            model.to(device).eval(),
            tokenizer=tokenizer,
            entailment_index=entailment_label(model.config.id2label, model=name),
            batch_size=batch_size,
            batch_tokens=_CPU_BATCH_TOKENS if device == "cpu" else None,
            num_threads=cpu_threads if device == "cpu" else 1,
        )

    def probabilities(self, pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
        """Return P(premise entails hypothesis) in order, from batches of pairs of similar length.

        Raises DeviceLostError, and what the model raises.
        """
        scores = np.empty(len(pairs), dtype=np.float64)
        if not pairs:
            return scores
        encoded = self._tokenizer(
            [premise for premise, _ in pairs],
            [hypothesis for _, hypothesis in pairs],
            truncation=True,
            max_length=self._max_tokens,
            split_special_tokens=True,  # "[SEP]" in an answer is plain text
        )
        lengths = np.array([len(ids) for ids in encoded["input_ids"]])
        order = np.argsort(-lengths, kind="stable")
        share = -(-len(pairs) // self._num_threads)
        size = min(self._batch_size, max(_SMALLEST_BATCH, share))
        batches = split_into_batches(order, lengths[order], most_pairs=size, most_tokens=self._batch_tokens)
        for rows, judged in zip(
            batches, self._threads.map(partial(self._judge, encoded), batches), strict=True
        ):
            scores[rows] = judged
        return scores

    def _judge(self, encoded: BatchEncoding, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        import torch

        batch = self._tokenizer.pad(
            {key: [column[row] for row in rows] for key, column in encoded.items()}, return_tensors="pt"
        )
        try:
            with torch.inference_mode():
                logits = self._model(**batch.to(self._model.device)).logits.float()  # [B, label]
            judged: npt.NDArray[np.float64] = (
                logits.softmax(dim=-1)[:, self._entailment_index].double().cpu().numpy()
            )
        except torch.AcceleratorError as error:  # running out of memory is another error
            raise DeviceLostError(f"the entailment model lost its device: {error}") from error
        return judged

    @property
    def _max_tokens(self) -> int:
        positions = count_positions(self._model) or _MAX_TOKENS
        return min(positions, int(self._tokenizer.model_max_length))


def split_into_batches(
    rows: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    *,
    most_pairs: int,
    most_tokens: int | None,
) -> list[npt.NDArray[np.int64]]:
    """Split rows, the longest first, into batches of at most `most_pairs` and `most_tokens` padded tokens.

    A row that is longer than `most_tokens` is a batch of its own.
    """
    batches, start = [], 0
    while start < len(rows):
        fitting = most_pairs if most_tokens is None else max(1, most_tokens // int(lengths[start]))
        end = start + min(most_pairs, fitting)
        batches.append(rows[start:end])
        start = end
    return batches


def count_positions(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that the model has positions for; None without a limit.

    RoBERTa-like models number positions from the padding token's id + 1, so they have fewer than
    `max_position_embeddings`.
    """
    import torch

    for module in model.modules():
        table = getattr(module, "position_embeddings", None)
        if isinstance(table, torch.nn.Embedding) and table.padding_idx is not None:
            return table.num_embeddings - table.padding_idx - 1
    positions = getattr(model.config, "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None  # XLNet's is -1


def entailment_label(id2label: object, *, model: str) -> int:
    """Return the index of the label called entailment, in any case. Raises ValueError when there is none."""
    labels = id2label if isinstance(id2label, dict) else {}
    found = [index for index, label in labels.items() if str(label).lower() in ("entailment", "entail")]
    if len(found) != 1:
        raise ValueError(
            f"entailment model {model}: its config.json has the labels {id2label}, expected one called "
            "'entailment'; choose a model trained on natural-language inference or name its labels there"
        )
    return int(found[0])
