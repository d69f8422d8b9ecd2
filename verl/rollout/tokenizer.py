"""A Hugging Face tokenizer behind the calls that the agent loop makes.

Text from outside (questions, passages) never becomes a control token (see `serving.encoding`); only the chat
template may write them.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from serving.encoding import TextEncoder
from verl.errors import ConfigError
from verl.types import Message, Question

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_PROBE = (
    'Where was Alice born? <search> 12 towns</search>\n\n<information>Doc 1(Title: "Zoë")</information>\n'
)
_PLACEHOLDER = "xPLACEHOLDERx"
_MARK = re.compile(rf"(\t?){_PLACEHOLDER}(\d+){_PLACEHOLDER}\t?")
"""The place of a content in a rendered chat. Some templates strip contents: then its tabs are gone."""

_VERBATIM = 'a "b" <c> & é'
"""Escaping of any kind would change this."""


class HfTokenizer:
    """A tokenizer of transformers as a `verl.protocols.Tokenizer`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, tags: Sequence[str] = ()) -> None:
        """`tags` of the prompt format stay single tokens also where they were added as special ones."""
        self._tokenizer = tokenizer
        try:
            self._encoder = TextEncoder(tokenizer, tags=tags)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        self._next_turns: dict[str, str | None] = {}
        self._has_warned = False

    @classmethod
    def from_pretrained(cls, path: str, *, tags: Sequence[str] = ()) -> HfTokenizer:
        """Load a model's tokenizer. Raises ConfigError when it is missing or loads as another one."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            _require_same_ids(tokenizer, path=path)
            return cls(tokenizer, tags=tags)
        except ConfigError:
            raise
        except Exception as error:  # the errors of damaged files share no class
            raise ConfigError(
                f"actor_rollout_ref.model.path={path!r} has no usable tokenizer ({type(error).__name__}: "
                f"{error}); copy the model again"
            ) from error

    @property
    def pad_id(self) -> int:
        """Return the padding token, else the end-of-sequence token. Raises ConfigError without both."""
        for token_id in (self._tokenizer.pad_token_id, self._tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ConfigError(
            f"the tokenizer of {self._tokenizer.name_or_path!r} has neither a pad nor an eos token"
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text, nothing added and no control token among them."""
        return self._encoder.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens and spaces kept."""
        text = self._tokenizer.decode(
            list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the prompt: by the chat template, else of the bare text of the messages.

        Without a template the tokenizer adds what it puts before every text (BOS) and no end. Raises
        ConfigError when the template refuses the messages.
        """
        contents = [message.content for message in question.messages]
        if not self._tokenizer.chat_template:
            return [*self._encoder.start_ids, *self.encode("\n".join(contents))]
        if not self._encoder.has_control("\n".join(contents)):
            return self._encoder.encode_trusted(self._render(question.messages))
        self._warn(question)
        marked = [
            Message(role=message.role, content=_mark(number))
            for number, message in enumerate(question.messages)
        ]
        return self._encode_chat(self._render(marked), contents)

    def render_next_turn(self, text: str, *, role: str = "user") -> list[int] | None:
        """Return the ids that end a turn of the assistant, hold `text` as a message and begin the next turn.

        They begin with the token that ends a turn; `text` is from outside. None without a chat template, and
        with one that renders no message of this `role` after an answer.
        """
        if role not in self._next_turns:
            self._next_turns[role] = self._find_next_turn(role)
        next_turn = self._next_turns[role]
        return None if next_turn is None else self._encode_chat(next_turn, [text])

    def _find_next_turn(self, role: str) -> str | None:
        """Return what the chat template writes from the end of an answer on, with a mark for the message."""
        if not self._tokenizer.chat_template:
            return None
        first = Message(role="user", content="Who?")
        answer = Message(role="assistant", content=_PLACEHOLDER)

        def render(role: str, content: str) -> str:
            text = self._render([first, answer, Message(role=role, content=content)])
            return text.partition(_PLACEHOLDER)[2]

        try:
            opening = self._render([first]).removeprefix(self._render([first], is_open=False))
            next_turn = render(role, _mark(0))
            # Some templates write results of tools in JSON.
            is_verbatim = render(role, _VERBATIM) == _MARK.sub(_VERBATIM, next_turn)
            problem = f"the chat template of {self._tokenizer.name_or_path!r} has none after an answer"
        except ConfigError as error:
            problem = str(error)
        else:
            # Some take a role that they do not know for another one: a result would be the policy's own text.
            for other in {"user", "assistant"} - {role}:
                with contextlib.suppress(ConfigError):
                    is_verbatim &= render(other, _mark(0)) != next_turn
            if _MARK.search(next_turn) and next_turn.endswith(opening) and is_verbatim:
                return next_turn
        logger.warning("the policy gets no messages of the role %s: %s", role, problem)
        return None

    def _encode_chat(self, rendered: str, contents: Sequence[str]) -> list[int]:
        """Return the ids of what the chat template wrote, marks replaced by contents from outside.

        Only the text of the template may become control tokens. Where the contents hold no text of one, all
        is encoded as a whole, so that a model reads the borders as in other chats.
        """
        # [text of the template, a tab if spaces were kept, number of the content, text of the template, ...]
        parts = _MARK.split(rendered)
        marks = zip(parts[1::3], parts[2::3], strict=True)
        filled = [contents[int(n)] if has_space else contents[int(n)].strip() for has_space, n in marks]
        pieces = [parts[0]]
        for content, after in zip(filled, parts[3::3], strict=True):
            pieces += [content, after]
        if not any(map(self._encoder.has_control, filled)):
            return self._encoder.encode_trusted("".join(pieces))
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += self.encode(piece) if number % 2 else self._encoder.encode_trusted(piece)
        return ids

    def _render(self, messages: Sequence[Message], *, is_open: bool = True) -> str:
        """Return the text of a chat, `is_open` for the next turn of the assistant. Raises ConfigError."""
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.content} for message in messages],
                add_generation_prompt=is_open,
                tokenize=False,
            )
        except Exception as error:  # a template is a program that came with the model
            roles = ", ".join(message.role for message in messages)
            raise ConfigError(
                f"the chat template of {self._tokenizer.name_or_path!r} refuses messages of {roles}: "
                f"{error}; give it messages of roles that it accepts or change the template"
            ) from error
        assert isinstance(text, str)
        return text

    def _warn(self, question: Question) -> None:
        """Warn once that a prompt contains text of control tokens, which may have been intended."""
        if not self._has_warned:
            self._has_warned = True
            logger.warning(
                "the prompt of %s holds text of control tokens (this tokenizer has %s and others): in all "
                "prompts it is read as ordinary text. Give roles as messages in the column `prompt`",
                question.uid,
                next(iter(self._encoder.control.values())),
            )


def _mark(number: int) -> str:
    """Return what stands for a content in a rendered chat: see `_MARK`."""
    return f"\t{_PLACEHOLDER}{number}{_PLACEHOLDER}\t"


def _require_same_ids(tokenizer: PreTrainedTokenizerBase, *, path: str) -> None:
    """Raise ConfigError where the class replaced the saved pre-tokenizer by its own, as some do silently."""
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
