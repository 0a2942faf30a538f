#!/bin/sh
# Runs its arguments with Python 3.11 or newer: $PYTHON where it is set, else the first that is found.
set -eu

suits() { # can it make virtual environments, and is it new enough?
    "$1" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

if [ -n "${PYTHON:-}" ]; then
    suits "$PYTHON" && exec "$PYTHON" "$@"
else
    for python in python3.11 python3.12 python3.13 python3.14 python3 python; do
        suits "$python" && exec "$python" "$@"
    done
fi
found=$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || found=none
echo "error: Python 3.11 or newer with its venv module is needed, and \`${PYTHON:-python3}\` is $found" >&2
echo "hint: install one (Debian, Ubuntu: \`apt install python3.11 python3.11-venv\`), or name it: \`make PYTHON=/path/to/python …\`" >&2
exit 1
