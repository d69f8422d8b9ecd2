"""Encode text for a language model so that text from outside never becomes a control token.

Control tokens are the special tokens of a tokenizer and other added tokens like `<|User|>`; only trusted
text (a chat template) may contain them. Of other text, what looks like one is encoded as ordinary text. Text
without any of them gets the ids that the tokenizer gives it as a whole.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CONTROL = re.compile(r"<[|\uff5c].+[|\uff5c]>")
"""Of added tokens that are not marked as special, those that frame turns or files: Qwen's `<|file_sep|>`,
DeepSeek's role markers with full-width bars."""


def replace_surrogates(text: str) -> str:
    """Replace lone surrogates, which tokenizers and JSON may produce and UTF-8 cannot represent."""
    return text.encode("utf-8", "replace").decode("utf-8")


class TextEncoder:
    """Encodes trusted and untrusted text with the tokenizer of a model."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, tags: Sequence[str] = ()) -> None:
        """Take `tags`, added tokens allowed in any text. Raises ValueError for an unusable tokenizer."""
        self._tokenizer = tokenizer
        self.control = _find_control_tokens(tokenizer, tags=tags)
        """Text of every control token by id."""
        self.start_ids = _find_start_ids(tokenizer)
        """What the tokenizer puts before a text (BOS)."""
        self._control_text = re.compile("|".join(map(re.escape, self.control.values())), re.IGNORECASE)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a piece of text, nothing added and no control token among them.

        Text of control tokens is cut after its first character and the parts are encoded separately.
        """
        ids = self.encode_trusted(text)
        if self.control.keys().isdisjoint(ids):
            return ids
        borders = [0, *(found.start() + 1 for found in self._control_text.finditer(text)), len(text)]
        parts = (text[start:end] for start, end in itertools.pairwise(borders))
        # A tokenizer that normalizes text can produce a control token whose text does not occur.
        return [token for part in parts for token in self.encode_trusted(part) if token not in self.control]

    def has_control(self, text: str) -> bool:
        """Return whether encoding this text as trusted gives a control token."""
        # Searching is much faster than encoding; no normalization makes a control token of other ASCII text.
        if text.isascii() and self._control_text.search(text) is None:
            return False
        return not self.control.keys().isdisjoint(self.encode_trusted(text))

    def encode_trusted(self, text: str) -> list[int]:
        """Return the ids of trusted text: that of a control token becomes this token."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))


def _find_control_tokens(tokenizer: PreTrainedTokenizerBase, *, tags: Sequence[str]) -> dict[int, str]:
    """Return the text of every control token by id."""
    # The unknown token stands for text without another one, unless it has a second role.
    roles = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token}
    harmless = {*tags, tokenizer.unk_token} - roles
    return {
        token_id: token.content
        for token_id, token in tokenizer.added_tokens_decoder.items()
        if token.content not in harmless and (token.special or _CONTROL.fullmatch(token.content))
    }


def _find_start_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text. Raises ValueError if that cannot be determined."""
    bare = list(tokenizer.encode("a", add_special_tokens=False))
    whole = list(tokenizer.encode("a"))
    for start in range(len(whole)):
        if whole[start : start + len(bare)] == bare:
            return whole[:start]
    raise ValueError(
        f"the tokenizer of {tokenizer.name_or_path!r} gives 'a' the ids {bare}, and {whole} with its special "
        "tokens: expected the former inside the latter"
    )
