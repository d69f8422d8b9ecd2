from __future__ import annotations

from verl.utils.styles import styled


def test_control_characters_do_not_reach_the_terminal() -> None:
    assert styled("a\x1b[2J\x07b\nc", "dim").plain == "a\ufffd[2J\ufffdb\nc"
