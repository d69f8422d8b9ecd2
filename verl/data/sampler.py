"""Shuffled batches of questions over epochs, resumable anywhere without repeating or losing one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from verl.errors import ConfigError
from verl.types import Question
from verl.utils.seeding import derive_seed


class QuestionSampler:
    """Draws batches of different questions, in an order that depends on the seed and the epoch only.

    Questions that do not fill a batch at the end of an epoch are left out of it; each epoch is shuffled.
    """

    def __init__(self, questions: Sequence[Question], *, batch_size: int, seed: int) -> None:
        """Raise ConfigError when the questions do not fill one batch."""
        if len(questions) < batch_size:
            raise ConfigError(
                f"data.train_batch_size={batch_size} but data.train_files hold only {len(questions)} "
                "questions; lower the batch size or add data"
            )
        self._questions = tuple(questions)
        self._batch_size = batch_size
        self._seed = seed
        self._num_batches = 0

    @property
    def batches_per_epoch(self) -> int:
        """Return the number of whole batches in an epoch."""
        return len(self._questions) // self._batch_size

    @property
    def epoch(self) -> int:
        """Return the number of whole epochs drawn so far."""
        return self._num_batches // self.batches_per_epoch

    def next_batch(self) -> list[Question]:
        """Return the next `batch_size` questions, all different."""
        epoch, number = divmod(self._num_batches, self.batches_per_epoch)
        generator = np.random.default_rng(derive_seed(self._seed, "data", epoch))
        order = generator.permutation(len(self._questions))
        self._num_batches += 1
        first = number * self._batch_size
        return [self._questions[index] for index in order[first : first + self._batch_size]]

    def state_dict(self) -> dict[str, int]:
        """Return the position, as plain numbers."""
        return {
            "num_batches": self._num_batches,
            "num_questions": len(self._questions),
            "batch_size": self._batch_size,
            "seed": self._seed,
        }

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from a position. Raises ConfigError when data, batch size or seed differ."""
        own = self.state_dict()
        changed = [key for key in own if key != "num_batches" and state.get(key) != own[key]]
        if changed:
            differences = ", ".join(f"{key} was {state.get(key)} and is {own[key]}" for key in changed)
            raise ConfigError(
                f"the checkpoint's data position does not fit this run: {differences}; "
                "set them back or train from the start (trainer.resume_mode=disable)"
            )
        self._num_batches = state["num_batches"]
