"""The one way in which this program tells its user that something is wrong.

Logic raises; `sparkctl.cli.app` alone turns the error into `error:` and `hint:` lines and an exit status.
A ValueError that reaches the boundary is a bug of ours, never a message.
"""

from __future__ import annotations

import errno
import re
import shlex
import signal
from collections.abc import Sequence
from typing import Any


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


class OtherOptions(UsageError):
    """Wrong arguments that other values of some options mend: the hint is the user's own command line with those.

    options: values by their flag's name, without dashes; None leaves the flag out.
    """

    def __init__(self, message: str, **options: object) -> None:
        self.options = {f"--{name.replace('_', '-')}": value for name, value in options.items()}
        given = [f"`{flag} {value}`" if value is not None else f"no `{flag}`" for flag, value in self.options.items()]
        super().__init__(message, f"give {' and '.join(given)}")

    def mended(self, arguments: Sequence[str]) -> UsageError:
        """The same with the command line for a hint. arguments: the user's."""
        words, kept = iter(arguments), []
        for word in words:
            if word.partition("=")[0] not in self.options:
                kept.append(word)
            elif "=" not in word:
                next(words, None)  # its value
        for flag, value in self.options.items():
            kept += [flag, str(value)] if value is not None else []
        return UsageError(self.message, shlex.join(["sparkctl", *kept]))


class NoMemory(SparkError):
    """An allocation that failed."""


class Interrupted(SparkError):
    """The work stopped before its end, where it can go on: at a step's boundary, saved.

    For a signal the exit status is 128 + signal (130 or 143, 138 of SIGUSR1), else 1. `reason` says in a few words why.
    answer: what was found until then, as the command's JSON object would say it.
    """

    def __init__(
        self, message: str, hint: str | None, signal: int | None = None, reason: str = "interrupted",
        answer: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(message, hint)
        self.reason, self.answer = reason, answer or {}
        if signal is not None:
            self.exit_status = 128 + signal


AGAIN = "run the same command again: nothing was left half-written"


class ControlC(KeyboardInterrupt):
    """Ctrl-C, under a class of its own.

    Where KeyboardInterrupt itself has left an `exec` of text, of which dataclasses are made, `python -m` ends by
    SIGINT, whatever status it was to exit with.
    """


class Terminated(BaseException):
    """SIGTERM. No Exception, so that no `except` on its way takes it for a failure of the work."""


def interruption(stop: BaseException, answer: dict[str, Any] | None = None) -> Interrupted:
    """What Ctrl-C or SIGTERM comes to where nothing is to be saved. answer: what was found before it."""
    number = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
    return Interrupted("interrupted", AGAIN, number, answer=answer)


NO_MEMORY = re.compile(
    r"out of memory|can(?:no|')t allocate memory|STATUS_ALLOC_FAILED|std::bad_alloc|failed to map segment",
    re.IGNORECASE,
)
GPU_MEMORY = re.compile(r"CUDA|CUBLAS|CUDNN|HIP")
ASKED_AND_FREE = re.compile(r"Tried to allocate ([\d.]+ \w+).*?total capacity of ([\d.]+ \w+) of which ([\d.]+ \w+) is")


def reason(error: OSError) -> str:
    """Why the system refuses, in its words, as they stand in a message."""
    return (error.strerror or str(error)).lower()


DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
DISK = {*DISK_FULL, errno.EFBIG, errno.EIO, errno.ESTALE}  # what fails in an open file, whose name is not told then


def refused_by_system(error: OSError) -> bool:
    """Whether the operating system refused something other than memory; other errors of this class are bugs."""
    told = error.errno is not None and (error.filename is not None or error.errno in DISK)
    return told and not memory_ended(error)


def system_error(error: OSError, again: str = AGAIN) -> SparkError:
    """What the operating system refused, as a message: the place, the reason, the mend. again: what to do after it."""
    where = f" at `{error.filename}`" if error.filename else ""
    hints = {
        **dict.fromkeys(DISK_FULL, f"free some space there, then {again}"),
        **dict.fromkeys((errno.EACCES, errno.EPERM), "check the permissions of that path"),
        errno.EFBIG: "that file system, or `ulimit -f`, takes no file so large: lift that, or choose another place",
        errno.EEXIST: "choose another target, or `--force` to replace it",
        errno.ENOENT: "check the path",
        errno.EISDIR: "that is a folder: name a file in it",
        errno.ENOTDIR: "a part of that path is a file, not a folder: choose another path",
        errno.EROFS: "that file system is mounted read-only: choose another path",
    }
    other = f"mend what the system says there, then {again}"
    return SparkError(f"{reason(error)}{where}", hints.get(error.errno or 0, other))


def memory_ended(error: BaseException) -> bool:
    """Whether memory ended, a device's or the host's: the world's fault. torch's own class is known by its name."""
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return True
    named = type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, RuntimeError | ImportError) and (named or NO_MEMORY.search(str(error)) is not None)


def memory_error(error: BaseException) -> SparkError:
    """An allocation that failed, as a message: how much was asked for and free, where that was said, and who has it."""
    text = str(error)
    gpu = GPU_MEMORY.search(text)
    said = ASKED_AND_FREE.search(text)
    message = "not enough GPU memory" if gpu else "not enough memory"
    if said:
        asked, total, free = said.groups()
        message += f": {asked} were asked for, {free} of {total} are free"
    holders = "nvidia-smi" if gpu else "ps -eo rss,args --sort=-rss | head"
    return NoMemory(message, f"`{holders}` shows who holds it; end that, or ask for less, then {AGAIN}")
