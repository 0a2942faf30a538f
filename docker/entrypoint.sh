#!/bin/sh
# NVIDIA's entrypoint enables the image's newer user-mode driver where the host's is older, so it is kept. It prints a
# banner on stdout, where the answer of the command belongs (`sparkctl … --json`): that goes to stderr.
exec 3>&1 1>&2
exec /opt/nvidia/nvidia_entrypoint.sh sh -c 'exec "$@" 1>&3 3>&-' sh "$@"
