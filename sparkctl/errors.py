"""The one way in which this program tells its user that something is wrong.

Logic raises; `sparkctl.cli.app` alone turns the error into `error:` and `hint:` lines and an exit status.
A ValueError that reaches the boundary is a bug of ours, never a message.
"""

from __future__ import annotations


class SparkError(Exception):
    """Something the user can mend. `message`: what and where; `hint`: the command or the change that mends it."""

    exit_status = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SparkError):
    """Wrong arguments, a wrong recipe or a wrong manifest: exit status 2."""

    exit_status = 2


class Interrupted(SparkError):
    """The work stopped before its end, where it can go on: at a step's boundary, saved.

    For a signal the exit status is 128 + signal (130 or 143), else 1. `reason` says in a few words why.
    """

    def __init__(self, message: str, hint: str | None, signal: int | None = None, reason: str = "interrupted") -> None:
        super().__init__(message, hint)
        self.reason = reason
        if signal is not None:
            self.exit_status = 128 + signal
