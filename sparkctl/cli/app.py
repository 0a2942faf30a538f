"""Registration of the commands, and the one boundary where an exception becomes text and an exit status."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Annotated, Any

import typer

from sparkctl import __version__
from sparkctl.cli import console
from sparkctl.errors import (
    ControlC,
    OtherOptions,
    SparkError,
    Terminated,
    UsageError,
    interruption,
    memory_ended,
    memory_error,
    refused_by_system,
    system_error,
)  # fmt: skip
from sparkctl.train.ranks import leave

# a command's file in sparkctl/cli, in the order that --help shows: groups of commands come last there
COMMANDS = ("analyze", "recommend", "train", "resume", "merge", "show", "demo", "doctor", "mtp", "verify", "bench")

BUG = 70
INTERRUPTED = 130

app = typer.Typer(
    name="sparkctl",
    help="Fine-tune Qwen3.5 losslessly on your own box: from chat data to a folder that vLLM serves.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"sparkctl {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """What stands before a command; everything else stands on the commands themselves."""


def register() -> typer.Typer:
    """The application with every command; each file in `sparkctl.cli` adds its own."""
    if not app.registered_commands:
        for name in COMMANDS:
            import_module(f"sparkctl.cli.{name}").register(app)
    return app


def command_line() -> Any:
    """The same as what takes a command line (Typer's class for it has no public name)."""
    made = typer.main.get_command(register())
    _without_type(made)
    return made


def _without_type(command: Any, above: Any = None) -> None:
    """Name no type beside a flag in a command's help: Typer calls it `<bool>`, which reads as if it took a value."""
    context = typer.Context(command, parent=above, **command.context_settings)
    for option in command.get_params(context):
        if getattr(option, "is_flag", False):
            option.metavar = ""
    for part in getattr(command, "commands", {}).values():
        _without_type(part, context)


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status; a bug's traceback is left to Python, with status 70."""
    json = "--json" in arguments
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})  # held since the process began
        status = command_line()(args=list(arguments) or ["--help"], prog_name="sparkctl", standalone_mode=False)
        if status == INTERRUPTED:  # what Typer makes of a Ctrl-C inside a command
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        context, said = getattr(error, "ctx", None), _sentence(error.format_message().replace("Value error, ", ""))
        if context and said == "missing command":
            said += f": {', '.join(context.command.commands)}"
        command = getattr(context, "command_path", "sparkctl")
        console.failure(UsageError(said, f"{command} --help"), json=json)
        return UsageError.exit_status
    except SparkError as error:
        console.failure(error.mended(arguments) if isinstance(error, OtherOptions) else error, json=json)
        return error.exit_status
    except OSError as error:
        if refused_by_system(error):
            console.failure(system_error(error), json=json)
            return 1
        if not memory_ended(error):
            raise
        return _no_memory(error, json)
    except (KeyboardInterrupt, typer.Abort, Terminated) as error:
        stopped = interruption(error)
        console.failure(stopped, json=json)
        return stopped.exit_status
    except SystemExit as ended:  # whoever read our stdout has gone (`| head`): Typer ends quietly
        return ended.code if isinstance(ended.code, int) else 1
    except (MemoryError, RuntimeError, ImportError) as error:  # the last of a library that did not fit
        if not memory_ended(error):
            raise
        return _no_memory(error, json)


def _no_memory(error: BaseException, json: bool) -> int:
    short = memory_error(error)
    console.failure(short, json=json)
    return short.exit_status


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def _on_signals() -> None:
    """Let Ctrl-C and SIGTERM leave through the boundary, so that every clean-up on the way runs; SIGTERM is heard
    once."""
    owner = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != owner:  # a child that was forked from here
            os._exit(128 + number)
        signal.signal(number, signal.SIG_IGN)
        raise Terminated

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise ControlC

    signal.signal(signal.SIGTERM, terminate)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell has it ignored for what it runs with &
        signal.signal(signal.SIGINT, interrupt)


def main() -> None:
    """The command line of this process, whose signals are let through once they can be answered."""
    console.forgiving()
    _on_signals()
    try:
        status = run(sys.argv[1:])
    except (ControlC, Terminated) as late:  # while the last words were said
        status = interruption(late).exit_status
    except Exception:
        import traceback

        traceback.print_exc()
        status = BUG
    leave(status)
