#!/usr/bin/env bash
# Does it work if an agent speaks only when needed? The Refiner speaks if the Verifier objects.
# About ten minutes. The table is in docs/results.md, section 7.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

$PYTHON generate_rollouts.py --run runs/refine --graph refine
$PYTHON train_value.py --run runs/refine
$PYTHON evaluate.py --run runs/refine --graph refine \
  --methods greedy vote-4 sbs-2x1.6.1.1.1-value mcts-8x1.8.1.1.1-value
