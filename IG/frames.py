"""Frame a prompt with BOS, or with the model's chat template."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from IG.prompts import PromptStyle, example_turns
from serving.encoding import TextEncoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PLACEHOLDER = "xPLACEHOLDERx"


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """Token ids around every prompt."""

    before: tuple[int, ...]
    after: tuple[int, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end an answer, besides the end-of-sequence token of the model's configuration."""


def make_frame(
    tokenizer: PreTrainedTokenizerBase,
    *,
    encoder: TextEncoder,
    prompt_style: PromptStyle,
    prompt_file: str = "",
) -> Frame:
    """Return the frame of a prompt style: BOS, or the chat template with the examples. Raises ValueError."""
    if prompt_style is PromptStyle.plain:
        return Frame(before=tuple(encoder.start_ids))
    from jinja2 import TemplateError

    messages = [
        {"role": role, "content": content}
        for turn in [*example_turns(prompt_file), (_PLACEHOLDER, "")]
        for role, content in zip(("user", "assistant"), turn, strict=True)
    ][:-1]
    try:
        text = tokenizer.apply_chat_template(
            messages,
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,  # ignored by templates without it; a short answer has no room for thoughts
        )
    except (TemplateError, ValueError) as error:
        raise ValueError(
            f"--prompt-style chat: the chat template of {tokenizer.name_or_path!r} cannot be used ({error}); "
            "take an instruct model or --prompt-style plain"
        ) from error
    before, _, after = str(text).partition(_PLACEHOLDER)
    after_ids = encoder.encode_trusted(after)
    # The token that ends a turn; some models' configurations do not name it.
    turn_ends = [token for token in after_ids if token in encoder.control][:1]
    ends = [*turn_ends, *([] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)])]
    return Frame(
        before=tuple(encoder.encode_trusted(before)),
        after=tuple(after_ids),
        stop_token_ids=tuple(dict.fromkeys(ends)),
    )
