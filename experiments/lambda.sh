#!/usr/bin/env bash
# Does an ORM help at final states? One beside each V of N = 40, and five weights of it.
# About ten minutes after hard.sh. The table is in docs/results.md, section 4.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2 3 4}
AGENTS="--temperature 1.5 --messages runs/hard/messages"

experiments/hard.sh
for seed in $SEEDS; do
  $PYTHON train_value.py --run runs/hard/lambda-$seed --seed $seed --epochs 4 --target outcome \
    --rollouts runs/hard/n40/rollouts --heldout-rollouts runs/hard/n80/rollouts
  $PYTHON evaluate.py --run runs/hard/lambda-$seed --value runs/hard/n40-$seed/value $AGENTS \
    --methods greedy mcts-8x1.8.1.1-value-lam0 mcts-8x1.8.1.1-value-lam0.25 \
    mcts-8x1.8.1.1-value-lam0.5 mcts-8x1.8.1.1-value-lam0.75 mcts-8x1.8.1.1-value-lam1
done

runs_of() { printf "runs/hard/$1-%s\n" $SEEDS | paste -sd ,; }  # RUN,RUN,... of a kind
$PYTHON -m experiments.compare lambda=$(runs_of lambda)
