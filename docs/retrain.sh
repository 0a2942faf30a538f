#!/bin/sh
# One round of retraining, for a person or for cron: new chats in, a model with its MTP head out.
#   docs/retrain.sh runs/support-r3 runs/support-r4 new.jsonl old.jsonl
# Model, recipe and plan come from the parent round, and what was held out there stays held out.
# The round stops before the merge where the new model is worse than the parent's by more than 2 % of held-out loss.
# After an interruption run the same line again: a training that stopped is resumed, and resume keeps to the gate.
set -eu
if [ $# -lt 3 ]; then
    echo "usage: $0 PARENT_RUN NEW_RUN DATA..." >&2
    exit 2
fi
parent=$1 run=$2
shift 2

sparkctl analyze "$@" --run "$run" --parent "$parent"
sparkctl recommend "$run"
case $(sparkctl show "$run" --get train.status 2>/dev/null || true) in
running | interrupted | failed) sparkctl resume "$run" ;;
*) sparkctl train "$run" --gate 0.02 ;; # of a finished training the gate alone
esac
sparkctl merge "$run"
sparkctl mtp train "$run" # the head that drafts for a server; a model that has none is skipped
sparkctl mtp inject "$run" --mode trained
sparkctl show "$run"
