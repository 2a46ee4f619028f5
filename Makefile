# make demo: the whole method on the embedded agents. make test, make lint: the tests and the linter;
# make mutants: wrong programs that the tests must catch; make format: fix what the linter can fix.
# make clean removes .venv, make clean-runs the results.
# The paper's experiments in small: main and transfer (both after `make demo`), rollout-count,
# lambda, losses (these three label with `hard` first), refine. train-agents and loop (after `make
# demo`) finetune the agents. All set up .venv if it is missing.
PYTHON ?= python3
RUN := .venv/bin/python
SEARCHES := sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value

.PHONY: demo test mutants lint format clean clean-runs
.PHONY: main hard rollout-count lambda transfer losses refine train-agents loop

demo: .venv/.installed
	$(RUN) generate_rollouts.py
	$(RUN) train_value.py
	$(RUN) search.py
	$(RUN) evaluate.py

test: .venv/.installed-dev
	$(RUN) -m pytest -q -n 2 --dist loadfile

# FILES="search.py metrics.py" for some files only
mutants: .venv/.installed-dev
	OMP_NUM_THREADS=1 $(RUN) tests/mutants.py $(FILES)

lint: .venv/.installed-dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .

format: .venv/.installed-dev
	.venv/bin/ruff format .
	.venv/bin/ruff check --fix .

# ---- Experiments (RESULTS.md) ----

main: .venv/.installed
	$(RUN) train_value.py --target outcome
	$(RUN) evaluate.py --methods greedy $(foreach num,4 8 16,vote-$(num)) \
	  $(foreach num,2 4 8 16,best_of-$(num)-value) best_of-8-policy best_of-8-outcome \
	  $(foreach num,1 2 4,sbs-$(num)x1.6.1.1-value) sbs-2x1.6.1.1-policy \
	  $(foreach num,2 4 8 16,mcts-$(num)x1.8.1.1-value) mcts-8x1.8.1.1-value-lam0.5 \
	  $(foreach num,4 8 16,mcts-$(num)x3-value) mcts-8x1.8.1.1-random \
	  mcts-8x1.8.1.1-policy mcts-8x1.8.1.1-policy-lam0.5

# V is hard to learn here: agents at temperature 1.5, 100 training problems. Every V is measured on
# the same held-out labels, those of 80 simulations. The runs share the messages of the agents.
HARD_AGENTS := --temperature 1.5 --messages runs/hard/messages
HARD_LABELS := $(RUN) generate_rollouts.py --num-train 100 $(HARD_AGENTS)
HARD_VALUE := $(RUN) train_value.py --heldout-rollouts runs/n80/rollouts --epochs 4
HARD_EVALUATE := $(RUN) evaluate.py $(HARD_AGENTS)

hard: .venv/.installed
	for n in 80 40; do \
	  $(HARD_LABELS) --run runs/n$$n --num-simulations $$n || exit 1; \
	done
	$(HARD_VALUE) --run runs/n40

rollout-count: hard
	for n in 10 20; do \
	  $(HARD_LABELS) --run runs/n$$n --num-simulations $$n || exit 1; \
	done
	for n in 10 20 40 80; do \
	  $(HARD_VALUE) --run runs/n$$n || exit 1; \
	  $(HARD_EVALUATE) --run runs/n$$n --methods greedy $(SEARCHES) || exit 1; \
	done
	$(RUN) evaluate.py --compare runs/n10 runs/n20 runs/n40 runs/n80

lambda: hard
	$(HARD_VALUE) --run runs/n40 --target outcome
	$(HARD_EVALUATE) --run runs/n40 --methods greedy \
	  $(foreach lam,0 0.25 0.5 0.75 1,mcts-8x1.8.1.1-value-lam$(lam))

TRANSFER_METHODS := greedy vote-4 best_of-4-value $(SEARCHES) mcts-8x1.8.1.1-policy
transfer: .venv/.installed
	$(RUN) generate_rollouts.py --run runs/score --task tiny-score
	$(RUN) train_value.py --run runs/score
	$(RUN) evaluate.py --run runs/score --task tiny-score --methods $(TRANSFER_METHODS)
	$(RUN) evaluate.py --run runs/transfer --messages runs/score/messages \
	  --value runs/tiny/value --task tiny-score --by subject level --methods $(TRANSFER_METHODS)
	$(RUN) evaluate.py --compare runs/score runs/transfer

losses: hard
	for loss in mse rank dist; do \
	  $(HARD_VALUE) --run runs/$$loss --rollouts runs/n40/rollouts --loss $$loss || exit 1; \
	done
	$(HARD_VALUE) --run runs/local --rollouts runs/n40/rollouts --view local
	for run in n40 mse rank dist local; do \
	  $(HARD_EVALUATE) --run runs/$$run --methods greedy $(SEARCHES) || exit 1; \
	done
	$(RUN) evaluate.py --compare runs/n40 runs/mse runs/rank runs/dist runs/local

refine: .venv/.installed
	$(RUN) generate_rollouts.py --run runs/refine --graph refine
	$(RUN) train_value.py --run runs/refine
	$(RUN) evaluate.py --run runs/refine --graph refine \
	  --methods greedy vote-4 sbs-2x1.6.1.1.1-value mcts-8x1.8.1.1.1-value

# Finetune the agents on V, and measure them with and without search. V is that of `make demo`.
PLANNER_TREES := --rollouts tree --num-candidates 1.8.1.1 --baseline siblings
MEASURED := --methods greedy vote-1 vote-4 best_of-4-value $(SEARCHES)

train-agents: .venv/.installed
	$(RUN) train_agents.py $(PLANNER_TREES)
	$(RUN) evaluate.py --run runs/before --messages runs/tiny/messages --value runs/tiny/value \
	  $(MEASURED)
	$(RUN) evaluate.py --run runs/after --adapter runs/tiny/agents --value runs/tiny/value \
	  $(MEASURED)
	$(RUN) evaluate.py --compare runs/before runs/after

# The second round: label with the new agents, train a fresh V on these labels, and go on.
loop: train-agents
	$(RUN) generate_rollouts.py --run runs/loop --adapter runs/tiny/agents
	$(RUN) train_value.py --run runs/loop
	$(RUN) train_agents.py --run runs/loop --adapter runs/tiny/agents $(PLANNER_TREES)
	$(RUN) evaluate.py --run runs/loop --adapter runs/loop/agents $(MEASURED)
	$(RUN) evaluate.py --compare runs/before runs/after runs/loop

# ---- Set-up ----

.venv/.installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "Python 3.10 or newer is needed, $(PYTHON) is older;" \
	    "name another one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --quiet -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	.venv/bin/pip install --quiet -r requirements-dev.txt
	touch $@

clean:
	rm -rf .venv

clean-runs:
	rm -rf runs
