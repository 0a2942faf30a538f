"""The installed command, and `python -m sparkctl`: a signal waits while Python imports, then it is answered."""

from __future__ import annotations

import signal


def main() -> None:
    """Run the command line of this process, and exit."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # the boundary lets them through
    from sparkctl.cli import app

    app.main()


if __name__ == "__main__":
    main()
