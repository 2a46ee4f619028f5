#!/usr/bin/env bash
# Which loss, which view? Huber (n40, of hard.sh), squared error, ranking, a distributional head,
# and the local view; five seeds of each.
# About 70 minutes after hard.sh. The tables are in docs/results.md, section 6.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2 3 4}
AGENTS="--temperature 1.5 --messages runs/hard/messages"
METHODS="greedy sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value"

train_and_measure() {  # KIND SEED FLAGS...
  local run=runs/hard/$1-$2 seed=$2
  shift 2
  $PYTHON train_value.py --run $run --seed $seed --epochs 4 "$@" \
    --rollouts runs/hard/n40/rollouts --heldout-rollouts runs/hard/n80/rollouts
  $PYTHON evaluate.py --run $run $AGENTS --methods $METHODS
}

experiments/hard.sh
for seed in $SEEDS; do
  train_and_measure mse $seed --loss mse
  train_and_measure rank $seed --loss rank
  train_and_measure dist $seed --loss dist
  train_and_measure local $seed --view local
done

runs_of() { printf "runs/hard/$1-%s\n" $SEEDS | paste -sd ,; }  # RUN,RUN,... of a kind
$PYTHON -m experiments.compare n40=$(runs_of n40) \
  mse=$(runs_of mse) rank=$(runs_of rank) dist=$(runs_of dist) local=$(runs_of local)
