#!/usr/bin/env bash
# How large is the noise of training V, beside that of the problems? Five Vs from the demo's labels.
# After `make demo`; about a quarter of an hour. The tables are in docs/results.md, section 2.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

for seed in 0 1 2 3 4; do
  $PYTHON train_value.py --run runs/v$seed --rollouts runs/tiny/rollouts --seed $seed
  $PYTHON evaluate.py --run runs/v$seed --messages runs/tiny/messages --methods greedy vote-4 \
    best_of-4-value best_of-8-value sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value mcts-8x3-value
done

FIVE=runs/v0,runs/v1,runs/v2,runs/v3,runs/v4
$PYTHON -m experiments.compare runs/v0 V=$FIVE
$PYTHON -m experiments.compare V=$FIVE
