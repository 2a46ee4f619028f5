#!/usr/bin/env bash
# Does V transfer to another task? V of the sums, frozen, on the differences, and one trained there.
# After `make demo`; a quarter of an hour. The tables are in docs/results.md, section 5.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

METHODS="greedy vote-4 best_of-4-value sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value
  mcts-8x1.8.1.1-policy"

$PYTHON generate_rollouts.py --run runs/score --task tiny-score
$PYTHON train_value.py --run runs/score
$PYTHON evaluate.py --run runs/score --task tiny-score --methods $METHODS

$PYTHON evaluate.py --run runs/transfer --task tiny-score --value runs/tiny/value \
  --messages runs/score/messages --by subject level --methods $METHODS
$PYTHON -m experiments.compare runs/score runs/transfer
