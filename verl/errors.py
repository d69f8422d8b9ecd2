"""Every error that crosses a package border: who failed, what was wrong, what to do about it."""

from __future__ import annotations


class UserError(Exception):
    """What a user can repair: entry points show its message as one line, without a traceback."""


class ConfigError(UserError, ValueError):
    """A setting is wrong: the message names the key, its value, what was expected and the fix."""


class DataError(UserError, ValueError):
    """A data file is missing or malformed: the message names the file, the row and the fix."""


class ServiceError(UserError, RuntimeError):
    """A service (retriever, IG service) did not give a usable answer within its deadline."""

    def __init__(self, service: str, message: str, *, status: int | None = None) -> None:
        super().__init__(service, message)
        self.service = service
        """Short name of the service, used to count failures by cause."""
        self.status = status
        """HTTP status of a final refusal; None when there was none."""

    def __str__(self) -> str:
        return ": ".join(self.args)


class RolloutError(UserError, RuntimeError):
    """The engine did not give a usable completion, or one sampled from other weights than claimed."""


class WeightSyncError(UserError, RuntimeError):
    """Engine and trainer disagree about the weights after a publish."""


class TrainingHaltedError(UserError, RuntimeError):
    """The run stopped itself (too many failures, too many non-finite updates) and names the reason."""
