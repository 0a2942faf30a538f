"""Registration of the commands, and the one boundary where an exception becomes text and an exit status."""

from __future__ import annotations

import errno
import signal
import sys
from collections.abc import Sequence
from importlib import import_module

import typer

from sparkctl.cli import console
from sparkctl.errors import Interrupted, SparkError, UsageError

# a command's file in sparkctl/cli, in the order that --help shows: groups of commands come last there
COMMANDS = ("analyze", "recommend", "train", "resume", "merge", "show", "demo", "verify", "bench")

BUG = 70
INTERRUPTED = 130

app = typer.Typer(
    name="sparkctl",
    help="Fine-tune Qwen3.5 losslessly on your own box: from chat data to a folder that vLLM serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def register() -> typer.Typer:
    """The application with every command; each file in `sparkctl.cli` adds its own."""
    if not app.registered_commands:
        for name in COMMANDS:
            import_module(f"sparkctl.cli.{name}").register(app)
    return app


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit status; a bug's traceback is left to Python, with status 70."""
    json = "--json" in arguments
    try:
        status = register()(args=list(arguments), prog_name="sparkctl", standalone_mode=False)
        if status == INTERRUPTED:  # what Typer makes of a Ctrl-C inside a command
            raise KeyboardInterrupt
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        command = getattr(getattr(error, "ctx", None), "command_path", "sparkctl")
        console.failure(UsageError(_sentence(error.format_message()), f"{command} --help"), json=json)
        return UsageError.exit_status
    except SparkError as error:
        console.failure(error, json=json)
        return error.exit_status
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in DISK_FULL):
            raise
        console.failure(system_error(error), json=json)
        return 1
    except (KeyboardInterrupt, typer.Abort):
        console.failure(Interrupted("interrupted", None, signal.SIGINT), json=json)
        return INTERRUPTED
    except SystemExit as ended:  # whoever read our stdout has gone (`| head`): Typer ends quietly
        return ended.code if isinstance(ended.code, int) else 1


DISK_FULL = {errno.ENOSPC, errno.EDQUOT}


def system_error(error: OSError) -> SparkError:
    """What the operating system refused, as a message: the place, the reason, the mend."""
    where = f" at `{error.filename}`" if error.filename else ""
    reason = (error.strerror or str(error)).lower()
    hints = {
        **dict.fromkeys(
            DISK_FULL, "free some space there, then run the same command again: nothing was left half-written"
        ),
        errno.EACCES: "check the permissions of that path",
        errno.EEXIST: "choose another target, or `--force` to replace it",
        errno.ENOENT: "check the path",
    }
    return SparkError(f"{reason}{where}", hints.get(error.errno or 0))


def _sentence(text: str) -> str:
    text = text.strip().rstrip(".")
    return text[:1].lower() + text[1:]


def main() -> None:
    """The installed command."""
    try:
        status = run(sys.argv[1:])
    except Exception:
        import traceback

        traceback.print_exc()
        status = BUG
    sys.exit(status)
