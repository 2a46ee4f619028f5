#!/usr/bin/env bash
# What do the agents gain from four steps on V, with and without search? An adapter for each agent.
# After `make demo`; 5 minutes. The numbers are in docs/results.md, section 13.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}

METHODS="greedy vote-1 vote-4 best_of-4-value sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value"

$PYTHON train_agents.py --rollouts tree-1.8.1.1 --num-steps 4 --adapters per-agent
$PYTHON evaluate.py --run runs/before --messages runs/tiny/messages --value runs/tiny/value \
  --methods $METHODS
$PYTHON evaluate.py --run runs/after --adapter runs/tiny/agents --value runs/tiny/value \
  --methods $METHODS
$PYTHON -m experiments.compare runs/before runs/after
