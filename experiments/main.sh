#!/usr/bin/env bash
# What accuracy do calls buy: by V, by an ORM, by likelihood, by chance, by a vote?
# After `make demo`; 5 minutes. The table is in docs/results.md, section 2.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

$PYTHON train_value.py --target outcome
$PYTHON evaluate.py --methods greedy vote-4 vote-8 vote-16 \
  best_of-2-value best_of-4-value best_of-8-value best_of-16-value \
  best_of-8-policy best_of-8-orm \
  sbs-1x1.6.1.1-value sbs-2x1.6.1.1-value sbs-4x1.6.1.1-value sbs-2x1.6.1.1-policy \
  mcts-2x1.8.1.1-value mcts-4x1.8.1.1-value mcts-8x1.8.1.1-value mcts-16x1.8.1.1-value \
  mcts-8x1.8.1.1-value-lam0.5 mcts-4x3-value mcts-8x3-value mcts-16x3-value \
  mcts-8x1.8.1.1-random mcts-8x1.8.1.1-policy mcts-8x1.8.1.1-policy-lam0.5
