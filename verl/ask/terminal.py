"""Show an episode in the terminal while it runs."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.rule import Rule
from rich.text import Text

from serving.redaction import redact_text
from verl.ask.trace import CallStep, Episode, Step
from verl.types import Stop, Trajectory
from verl.utils.styles import CALL_STYLE, NOTE_STYLE, PASSAGE_STYLE, STYLES, styled

_SHOWN_CHARS = 160
"""Of a passage."""
_ENDINGS = {
    Stop.BUDGET: "no answer within the turns that it has (--max-turns)",
    Stop.LENGTH: "no answer: the context is full",
}


class TerminalView:
    """Prints what is new in each step."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._shown = -1
        """The last turn of which the sampled part was printed."""

    def begin(self, question: str) -> None:
        """Print the question."""
        self._shown = -1
        self._console.print(Rule(styled(question, "bold"), align="left"))

    def show(self, step: Step) -> None:
        """Print what was sampled, or the reply to it if that is printed already."""
        if step["turn"] > self._shown:
            self._shown = step["turn"]
            self._show_sampled(step)
        else:
            self._show_reply(step)

    def end(self, trajectory: Trajectory) -> None:
        """Print the answer, or why there is none."""
        if trajectory.answer is not None:
            self._console.print(styled(trajectory.answer or "(an empty answer)", STYLES["answer"]))
        elif trajectory.failure is not None:
            self._console.print(styled(f"failed: {redact_text(trajectory.failure)}", "bold red"))
        else:
            self._console.print(styled(_ENDINGS[trajectory.stop], NOTE_STYLE))

    def sum_up(self, episode: Episode, *, gain_unit: str | None) -> None:
        """Print the gains and what the episode took."""
        trajectory = episode.trajectory
        if gain_unit is not None:
            self._show_gains(episode, unit=gain_unit)
        calls = len(trajectory.observations)
        counts = (
            f"{calls} call{'s' * (calls != 1)}, {trajectory.num_policy_tokens} tokens written, "
            f"{trajectory.seconds:.1f} s"
        )
        self._console.print(Text(counts, style="dim"))

    def _show_sampled(self, step: Step) -> None:
        for part in step["parts"]:
            self._console.print(styled(part["text"], STYLES.get(part["kind"], "dim")))
        for call in step["calls"]:
            arguments = ", ".join(str(value) for value in call["arguments"].values())
            self._console.print(styled(f"{call['tool']}: {arguments}", CALL_STYLE))
        if step["kind"] == "invalid":
            self._console.print(styled(step["text"].strip(), STYLES["other"]))

    def _show_reply(self, step: Step) -> None:
        for call in step["calls"]:
            self._show_result(call)
        if step["note"] is not None:
            self._print_indented(styled(step["note"], NOTE_STYLE))

    def _show_result(self, call: CallStep) -> None:
        if call["passages"] is None:
            return
        for passage in call["passages"]:
            score = "" if passage["score"] is None else f"{passage['score']:.3f}  "
            text = " ".join(passage["text"].split())
            start = text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}..."
            self._print_indented(styled(f"{score}{passage['title']}  {start}", PASSAGE_STYLE))
        if not call["passages"]:
            self._print_indented(styled(call["text"] or "nothing was found", NOTE_STYLE))

    def _print_indented(self, text: Text) -> None:
        self._console.print(Padding(text, (0, 0, 0, 3), expand=False))

    def _show_gains(self, episode: Episode, *, unit: str) -> None:
        if episode.gain.failure is not None:
            self._console.print(
                styled(f"gain: not measured: {redact_text(episode.gain.failure)}", NOTE_STYLE)
            )
            return
        measured = [(step, step["gain"]) for step in episode.steps if step["gain"] is not None]
        goal = "the right answer" if episode.trajectory.question.golds else "its own answer"
        for step, gain in measured:
            action = ", ".join(str(v) for call in step["calls"] for v in call["arguments"].values())
            line = f"gain {gain:+.3f}  turn {step['turn'] + 1}  {action or step['kind']}"
            self._console.print(styled(line, "default"))
        note = f"towards {goal}, in {unit}" if measured else "gain: nothing to measure"
        self._console.print(styled(note, "dim"))
