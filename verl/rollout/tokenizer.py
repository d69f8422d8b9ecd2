"""A Hugging Face tokenizer behind the calls that the agent loop makes.

Text from outside (questions, passages) never becomes a control token (see `serving.encoding`); only the chat
template may write them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
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


@dataclass(frozen=True, slots=True)
class _NextTurn:
    """What follows an answer: markup of the chat template, with a mark for the message."""

    markup: str
    write: Callable[[str], str]
    """How the template writes a text."""


class HfTokenizer:
    """A tokenizer of transformers as a `verl.protocols.Tokenizer`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        tags: Sequence[str] = (),
        enable_thinking: bool | None = None,
    ) -> None:
        """Keep `tags` of the prompt format single tokens, also where they were added as special ones.

        `enable_thinking` goes to the chat template; None leaves the choice to it. Raises ConfigError for a
        template that does not know it.
        """
        self._tokenizer = tokenizer
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        if self._options and "enable_thinking" not in str(tokenizer.chat_template):
            raise ConfigError(
                f"agent.enable_thinking={str(enable_thinking).lower()}: the chat template of "
                f"{tokenizer.name_or_path!r} has no such switch; leave it null"
            )
        try:
            self._encoder = TextEncoder(tokenizer, tags=tags)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        # The check of every id that transformers makes first takes longer than decoding.
        self._decode: Callable[[list[int]], str] = (
            partial(tokenizer.backend_tokenizer.decode, skip_special_tokens=False)
            if tokenizer.is_fast
            else partial(tokenizer.decode, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        self._next_turns: dict[str, _NextTurn | None] = {}
        self._has_warned = False

    @classmethod
    def from_pretrained(
        cls, path: str, *, tags: Sequence[str] = (), enable_thinking: bool | None = None
    ) -> HfTokenizer:
        """Load a model's tokenizer. Raises ConfigError when it is missing or loads as another one."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
            _require_same_ids(tokenizer, path=path)
            return cls(tokenizer, tags=tags, enable_thinking=enable_thinking)
        except ConfigError:
            raise
        except Exception as error:  # the errors of damaged files share no class
            raise ConfigError(
                f"actor_rollout_ref.model.path={path!r} has no usable tokenizer ({type(error).__name__}: "
                f"{error}); copy the model again"
            ) from error

    @property
    def control(self) -> Mapping[int, str]:
        """Return the text of every control token by id."""
        return self._encoder.control

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text, nothing added and no control token among them."""
        return self._encoder.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens and spaces kept."""
        return self._decode(list(ids))

    def render_prompt(self, question: Question) -> list[int]:
        """Return the ids of the prompt: by the chat template, else of the bare text of the messages.

        Without a template the tokenizer adds what it puts before every text (BOS) and no end; with one, only
        the template writes BOS. A system message that the template refuses or leaves out is put before the
        first message of the user. Raises ConfigError when the template refuses the messages.
        """
        messages = question.messages
        contents = [message.content for message in messages]
        if not self._tokenizer.chat_template:
            return [*self._encoder.start_ids, *self.encode("\n".join(contents))]
        if [message.role for message in messages[:2]] == ["system", "user"] and not self._has_system:
            merged = Message(role="user", content="\n\n".join(contents[:2]))
            messages, contents = (merged, *messages[2:]), [merged.content, *contents[2:]]
        if not self._encoder.has_control("\n".join(contents)):
            return self._encoder.encode_trusted(self._render(messages))
        self._warn(question)
        marked = [
            Message(role=message.role, content=_mark(number)) for number, message in enumerate(messages)
        ]
        return self._encode_chat(self._render(marked), contents)

    def render_next_turn(
        self, text: str, *, role: str = "user", after: Sequence[int] = ()
    ) -> list[int] | None:
        """Return the ids that end a turn of the assistant, hold `text` as a message and begin the next turn.

        They begin with the token that ends a turn, unless `after`, the ids of that turn, ends with it; `text`
        is from outside. None without a chat template, and with one that renders no message of this `role`
        after an answer.
        """
        if role not in self._next_turns:
            self._next_turns[role] = self._find_next_turn(role)
        next_turn = self._next_turns[role]
        if next_turn is None:
            return None
        ids = self._encode_chat(next_turn.markup, [next_turn.write(text)])
        if not len(after) or (last := int(after[-1])) not in self.control or last not in ids:
            return ids
        # Some templates have a space before the token that ends a turn.
        start = ids.index(last)
        return ids if self.decode(ids[:start]).strip() else ids[start + 1 :]

    @cached_property
    def _has_system(self) -> bool:
        """Return whether the chat template writes messages of the role system."""
        chat = [Message(role="system", content=_mark(0)), Message(role="user", content=_mark(1))]
        with contextlib.suppress(ConfigError):
            return any(found[2] == "0" for found in _MARK.finditer(self._render(chat)))
        return False

    def _find_next_turn(self, role: str) -> _NextTurn | None:
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
            # Some templates write results of tools as a string in JSON: Llama 3.1's.
            write: Callable[[str], str] = _escape if _escape(_mark(0)) in next_turn else str
            markup = next_turn.replace(_escape(_mark(0)), _mark(0))
            is_verbatim = render(role, _VERBATIM) == _MARK.sub(lambda _: write(_VERBATIM), markup)
            problem = f"the chat template of {self._tokenizer.name_or_path!r} has none after an answer"
        except ConfigError as error:
            problem = str(error)
        else:
            # Some take a role that they do not know for another one: a result would be the policy's own text.
            for other in {"user", "assistant"} - {role}:
                with contextlib.suppress(ConfigError):
                    is_verbatim &= render(other, _mark(0)) != next_turn
            if _MARK.search(markup) and markup.endswith(opening) and is_verbatim:
                return _NextTurn(markup=markup, write=write)
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
                **self._options,
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


def _escape(text: str) -> str:
    """Return a text as it stands in a string in JSON."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


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
