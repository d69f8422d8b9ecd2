"""A Hugging Face tokenizer behind the three calls that the agent loop makes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verl.errors import ConfigError
from verl.types import Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = (
    'Where was Alice born? <search> 12 towns</search>\n\n<information>Doc 1(Title: "Zoë")</information>\n'
)


class HfTokenizer:
    """Implements `verl.protocols.Tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: str) -> HfTokenizer:
        """Load a model's tokenizer. Raises ConfigError when it is missing or loads as another one."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"actor_rollout_ref.model.path={path!r} has no usable tokenizer: {error}"
            ) from error
        _require_same_ids(tokenizer, path=path)
        return cls(tokenizer)

    @property
    def pad_id(self) -> int:
        """The padding token, else the end-of-sequence token. Raises ConfigError when there is neither."""
        for token_id in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ConfigError(
            f"the tokenizer of {self._tokenizer.name_or_path!r} has neither a pad nor an eos token"
        )

    def encode(self, text: str) -> list[int]:
        """Ids of a piece of text, no special tokens added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, special tokens and spaces kept."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def render_prompt(self, question: Question) -> list[int]:
        """Ids of the prompt: by the chat template if there is one, else the bare text of the messages."""
        if not self._tokenizer.chat_template:
            return self.encode("\n".join(message.content for message in question.messages))
        messages = [{"role": message.role, "content": message.content} for message in question.messages]
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        return self.encode(text)


def _require_same_ids(tokenizer: PreTrainedTokenizerBase, *, path: str) -> None:
    """Some tokenizer classes replace the saved pre-tokenizer by their own, silently: then ids differ."""
    saved = Path(path) / "tokenizer.json"
    if not saved.is_file():
        return
    from tokenizers import Tokenizer

    expected = Tokenizer.from_file(str(saved)).encode(_PROBE, add_special_tokens=False).ids
    loaded = tokenizer.encode(_PROBE, add_special_tokens=False)
    if list(loaded) != expected:
        raise ConfigError(
            f"the tokenizer of {path!r} gives other ids than its own {saved.name}: "
            f"{type(tokenizer).__name__} replaces the saved pre-tokenizer; build it with that class's own"
        )
