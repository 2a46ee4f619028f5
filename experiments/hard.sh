#!/usr/bin/env bash
# A setting in which V is hard to learn: agents at temperature 1.5, 100 training problems.
# Labels of 80, 40, 20 and 10 simulations, and a V of N = 40 for each seed. All Vs are measured on
# the held-out labels of N = 80. rollout-count.sh, lambda.sh and losses.sh run this first.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2 3 4}
AGENTS="--temperature 1.5 --messages runs/hard/messages"
METHODS="greedy sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value"

for n in 80 40 20 10; do
  $PYTHON generate_rollouts.py --run runs/hard/n$n --num-train 100 --num-simulations $n $AGENTS
done

for seed in $SEEDS; do
  $PYTHON train_value.py --run runs/hard/n40-$seed --seed $seed --epochs 4 \
    --rollouts runs/hard/n40/rollouts --heldout-rollouts runs/hard/n80/rollouts
  $PYTHON evaluate.py --run runs/hard/n40-$seed $AGENTS --methods $METHODS
done
