#!/usr/bin/env bash
# How many simulations do labels need? V from labels of N = 10, 20, 40 and 80, five seeds of each.
# About an hour. The tables are in docs/results.md, section 3.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2 3 4}
AGENTS="--temperature 1.5 --messages runs/hard/messages"
METHODS="greedy sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value"

experiments/hard.sh
for seed in $SEEDS; do
  for n in 10 20 80; do
    $PYTHON train_value.py --run runs/hard/n$n-$seed --seed $seed --epochs 4 \
      --rollouts runs/hard/n$n/rollouts --heldout-rollouts runs/hard/n80/rollouts
    $PYTHON evaluate.py --run runs/hard/n$n-$seed $AGENTS --methods $METHODS
  done
done

runs_of() { printf "runs/hard/$1-%s\n" $SEEDS | paste -sd ,; }  # RUN,RUN,... of a kind
$PYTHON -m experiments.compare \
  n10=$(runs_of n10) n20=$(runs_of n20) n40=$(runs_of n40) n80=$(runs_of n80)
