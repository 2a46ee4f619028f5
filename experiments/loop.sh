#!/usr/bin/env bash
# The second round of training: label with the new agents, train a fresh V on these labels, and
# train the agents on it. After `make demo`; half an hour. cures.sh repeats this with three seeds.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

experiments/train-agents.sh
$PYTHON generate_rollouts.py --run runs/loop --adapter runs/tiny/agents
$PYTHON train_value.py --run runs/loop
$PYTHON train_agents.py --run runs/loop --adapter runs/tiny/agents --seed 2 \
  --rollouts tree-1.8.1.1 --num-steps 4 --adapters per-agent
$PYTHON evaluate.py --run runs/loop --adapter runs/loop/agents \
  --methods greedy vote-1 vote-4 best_of-4-value sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value
$PYTHON -m experiments.compare runs/before runs/after runs/loop
