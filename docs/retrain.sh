#!/bin/sh
# One round of retraining, for a person or for cron: new chats in, a merged model out.
#   docs/retrain.sh runs/support-r3 runs/support-r4 new.jsonl old.jsonl
# Model, recipe and plan come from the parent round, and what was held out there stays held out.
# The round stops before the merge where the new model is worse than the parent's by more than 2 % of held-out loss.
set -eu
parent=$1 run=$2
shift 2

sparkctl analyze "$@" --run "$run" --parent "$parent"
sparkctl recommend "$run"
sparkctl train "$run" --gate 0.02
sparkctl merge "$run"
sparkctl show "$run"
