#!/usr/bin/env bash
# Which reward teaches the agents? About 6,300 messages for each kind, on the V of the demo.
# passes: four for each of 64 questions a step; tree: eight plans, each compared with its siblings.
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

for seed in $SEEDS; do
  $PYTHON evaluate.py --run runs/5/before-$seed --seed $seed --value runs/tiny/value \
    --methods $METHODS
  train_and_measure passes-outcome $seed --num-steps 6 --reward outcome
  train_and_measure passes-value $seed --num-steps 6 --reward value
  train_and_measure passes-delta $seed --num-steps 6 --reward value-delta
  train_and_measure passes-return $seed --num-steps 6 --reward value-return
  train_and_measure passes-random $seed --num-steps 6 --reward random
  train_and_measure tree-search $seed --rollouts tree-1.8.1.1 --num-steps 4 --reward search
  train_and_measure tree-value $seed --rollouts tree-1.8.1.1 --num-steps 11 --reward value
  train_and_measure tree-random $seed --rollouts tree-1.8.1.1 --num-steps 4 --reward random
done

groups=""
for kind in passes-{outcome,value,delta,return,random} tree-{search,value,random}; do
  groups+=" $kind=$(printf "runs/5/$kind-%s\n" $SEEDS | paste -sd ,)"
done
$PYTHON -m experiments.compare before=$(printf "runs/5/before-%s\n" $SEEDS | paste -sd ,) $groups
$PYTHON -m experiments.compare $groups --curves runs/5/credit.png
