"""`python -m sparkctl`: the same as the installed command."""

from sparkctl.cli.app import main

if __name__ == "__main__":
    main()
