"""The installed command, and `python -m sparkctl`: a signal at the start or the end of Python is no traceback."""

from __future__ import annotations

import signal

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def main() -> None:
    """Run the command line of this process, and exit."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # while Python imports; the boundary lets them through
    from sparkctl.cli import app

    try:
        app.main()
    finally:
        for number in SIGNALS:  # all is said and done: torch alone takes a second to end
            signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    main()
