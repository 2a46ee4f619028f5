#!/usr/bin/env bash
# What goes wrong if agents are trained on one V for long, and what helps? About 14,000 messages for
# each of hacked, owned, searched and returned. The loop: four steps (early), labels and a fresh V,
# four steps on it (second), and again (third).
# After `make demo`; hours. The tables are in docs/results.md, section 13.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-.venv/bin/python}
SEEDS=${SEEDS:-0 1 2}
METHODS="greedy vote-1 sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value"

train_and_measure() {  # KIND SEED FLAGS...
  local run=runs/5/$1-$2 seed=$2
  shift 2
  $PYTHON train_agents.py --run $run --seed $seed --value runs/tiny/value "$@"
  $PYTHON evaluate.py --run $run --seed $seed --value runs/tiny/value --adapter $run/agents \
    --methods $METHODS
}

fresh_value() {  # KIND SEED: labels of the agents of KIND, and a V of them
  local run=runs/5/fresh-$1-$2 agents=runs/5/$1-$2/agents
  $PYTHON generate_rollouts.py --run $run --adapter $agents --seed $2
  $PYTHON train_value.py --run $run --seed $2
  $PYTHON evaluate.py --run $run --adapter $agents --seed $2 --methods $METHODS
}

next_round() {  # FROM TO SEED NUMBER: a round draws its questions with a seed of its own
  local run=runs/5/$2-$3 value=runs/5/fresh-$1-$3/value
  $PYTHON train_agents.py --run $run --adapter runs/5/$1-$3/agents --seed $4$3 --value $value \
    --rollouts tree-1.8.1.1 --num-steps 4 --adapters per-agent --reward value
  $PYTHON evaluate.py --run $run --adapter $run/agents --seed $3 --value $value --methods $METHODS
}

for seed in $SEEDS; do
  $PYTHON evaluate.py --run runs/5/before-$seed --seed $seed --value runs/tiny/value \
    --methods $METHODS
  train_and_measure early $seed --rollouts tree-1.8.1.1 --num-steps 4 --adapters per-agent
  fresh_value early $seed
  next_round early second $seed 2
  fresh_value second $seed
  next_round second third $seed 3

  train_and_measure first $seed --rollouts tree-1.8.1.1 --num-steps 8
  train_and_measure hacked $seed --rollouts tree-1.8.1.1 --num-steps 24
  train_and_measure owned $seed --rollouts tree-1.8.1.1 --num-steps 24 --adapters per-agent
  train_and_measure searched $seed --rollouts tree-1.8.1.1 --num-steps 9 --reward search
  train_and_measure returned $seed --num-steps 14 --reward value-return
  fresh_value first $seed
  fresh_value searched $seed
done

trained="" others=""
for kind in hacked owned searched returned early first second third; do
  trained+=" $kind=$(printf "runs/5/$kind-%s\n" $SEEDS | paste -sd ,)"
done
for kind in before fresh-early fresh-second fresh-first fresh-searched; do
  others+=" $kind=$(printf "runs/5/$kind-%s\n" $SEEDS | paste -sd ,)"
done
$PYTHON -m experiments.compare $others $trained
$PYTHON -m experiments.compare $trained --curves runs/5/cures.png
