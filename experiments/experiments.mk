# The experiments of RESULTS.md, on the embedded agents; the Makefile includes this file.
# After `make demo`: main, seeds, transfer; train-agents and loop finetune the agents, credit and
# cures compare ways to do it. On their own: hard, rollout-count, lambda, losses, refine.

.PHONY: main seeds hard rollout-count lambda transfer losses refine train-agents loop credit cures

SEARCHES := sbs-2x1.6.1.1-value mcts-8x1.8.1.1-value

main: .venv/.installed
	$(PY) train_value.py --target outcome
	$(PY) evaluate.py --methods greedy $(foreach num,4 8 16,vote-$(num)) \
	  $(foreach num,2 4 8 16,best_of-$(num)-value) best_of-8-policy best_of-8-outcome \
	  $(foreach num,1 2 4,sbs-$(num)x1.6.1.1-value) sbs-2x1.6.1.1-policy \
	  $(foreach num,2 4 8 16,mcts-$(num)x1.8.1.1-value) mcts-8x1.8.1.1-value-lam0.5 \
	  $(foreach num,4 8 16,mcts-$(num)x3-value) mcts-8x1.8.1.1-random \
	  mcts-8x1.8.1.1-policy mcts-8x1.8.1.1-policy-lam0.5

# The noise of training beside that of the problems: five Vs from the labels of the demo.
seeds: .venv/.installed
	for seed in 0 1 2 3 4; do \
	  $(PY) train_value.py --run runs/v$$seed --rollouts runs/tiny/rollouts --seed $$seed && \
	  $(PY) evaluate.py --run runs/v$$seed --messages runs/tiny/messages --methods greedy vote-4 \
	    best_of-4-value best_of-8-value $(SEARCHES) mcts-8x3-value || exit 1; \
	done
	$(PY) evaluate.py --compare runs/v0 V=runs/v0,runs/v1,runs/v2,runs/v3,runs/v4
	$(PY) evaluate.py --compare V=runs/v0,runs/v1,runs/v2,runs/v3,runs/v4

# Below, a run of a KIND and a SEED is FOLDER/KIND-SEED. Two runs at a time:
#   OMP_NUM_THREADS=1 make -j2 rollout-count
# $(call tables,FOLDER,KINDS,SEEDS): the runs; $(call groups,...): KIND=RUN,RUN,... for --compare
tables = $(foreach seed,$(3),$(patsubst %,$(1)/%-$(seed)/eval/table.md,$(2)))
groups = $(foreach kind,$(2),$(kind)=$(call commas,$(foreach seed,$(3),$(1)/$(kind)-$(seed))))
comma := ,
commas = $(subst $() ,$(comma),$(strip $(1)))
SEED = $(lastword $(subst -, ,$*))
FLAGS = $(flags-$(patsubst %-$(SEED),%,$*))
.PRECIOUS: runs/hard/%/eval/table.md runs/5/%/eval/table.md

# V is hard to learn here: agents at temperature 1.5, 100 training problems. Five Vs of each kind are
# measured on the same held-out labels, those of 80 simulations. All share the agents' messages.
HARD_AGENTS := --temperature 1.5 --messages runs/hard/messages
hard: .venv/.installed
	for n in 80 40 20 10; do \
	  $(PY) generate_rollouts.py --run runs/hard/n$$n --num-train 100 $(HARD_AGENTS) \
	    --num-simulations $$n || exit 1; \
	done

HARD_VALUE = $(PY) train_value.py --seed $(SEED) --epochs 4 \
  --heldout-rollouts runs/hard/n80/rollouts $(FLAGS)
HARD_EVALUATE := $(PY) evaluate.py $(HARD_AGENTS)
runs/hard/%/eval/table.md: | hard
	$(HARD_VALUE) --run runs/hard/$*
	$(HARD_EVALUATE) --run runs/hard/$* --methods greedy $(SEARCHES)

N40 := --rollouts runs/hard/n40/rollouts
flags-n10 := --rollouts runs/hard/n10/rollouts
flags-n20 := --rollouts runs/hard/n20/rollouts
flags-n40 := $(N40)
flags-n80 := --rollouts runs/hard/n80/rollouts
rollout-count: $(call tables,runs/hard,n10 n20 n40 n80,0 1 2 3 4)
	$(PY) evaluate.py --compare $(call groups,runs/hard,n10 n20 n40 n80,0 1 2 3 4)

flags-mse := $(N40) --loss mse
flags-rank := $(N40) --loss rank
flags-dist := $(N40) --loss dist
flags-local := $(N40) --view local
losses: $(call tables,runs/hard,n40 mse rank dist local,0 1 2 3 4)
	$(PY) evaluate.py --compare $(call groups,runs/hard,n40 mse rank dist local,0 1 2 3 4)

# An ORM beside each V of kind n40.
runs/hard/lambda-%/eval/table.md: runs/hard/n40-%/eval/table.md
	$(HARD_VALUE) --run runs/hard/lambda-$* $(N40) --target outcome
	$(HARD_EVALUATE) --run runs/hard/lambda-$* --value runs/hard/n40-$*/value \
	  --methods greedy $(foreach lam,0 0.25 0.5 0.75 1,mcts-8x1.8.1.1-value-lam$(lam))
lambda: $(call tables,runs/hard,lambda,0 1 2 3 4)
	$(PY) evaluate.py --compare $(call groups,runs/hard,lambda,0 1 2 3 4)

TRANSFER_METHODS := greedy vote-4 best_of-4-value $(SEARCHES) mcts-8x1.8.1.1-policy
transfer: .venv/.installed
	$(PY) generate_rollouts.py --run runs/score --task tiny-score
	$(PY) train_value.py --run runs/score
	$(PY) evaluate.py --run runs/score --task tiny-score --methods $(TRANSFER_METHODS)
	$(PY) evaluate.py --run runs/transfer --messages runs/score/messages \
	  --value runs/tiny/value --task tiny-score --by subject level --methods $(TRANSFER_METHODS)
	$(PY) evaluate.py --compare runs/score runs/transfer

refine: .venv/.installed
	$(PY) generate_rollouts.py --run runs/refine --graph refine
	$(PY) train_value.py --run runs/refine
	$(PY) evaluate.py --run runs/refine --graph refine \
	  --methods greedy vote-4 sbs-2x1.6.1.1.1-value mcts-8x1.8.1.1.1-value

# ---- Experiments on stage 5, with the V of `make demo` ----

PLANNER_TREES := --rollouts tree --num-candidates 1.8.1.1 --baseline siblings
V := --value runs/tiny/value
FEW_METHODS := --methods greedy vote-1 $(SEARCHES)
MEASURED := --methods greedy vote-1 vote-4 best_of-4-value $(SEARCHES)

# Finetune the agents on V, and measure them with and without search. Few steps, and an adapter for
# each agent: then V still reads the new agents as they are (RESULTS.md, section 15).
FEW_STEPS := $(PLANNER_TREES) --num-steps 4 --adapters per-agent
train-agents: .venv/.installed
	$(PY) train_agents.py $(FEW_STEPS)
	$(PY) evaluate.py --run runs/before --messages runs/tiny/messages $(V) $(MEASURED)
	$(PY) evaluate.py --run runs/after --adapter runs/tiny/agents $(V) $(MEASURED)
	$(PY) evaluate.py --compare runs/before runs/after

# The second round: label with the new agents, train a fresh V on these labels, and go on.
loop: train-agents
	$(PY) generate_rollouts.py --run runs/loop --adapter runs/tiny/agents
	$(PY) train_value.py --run runs/loop
	$(PY) train_agents.py --run runs/loop --adapter runs/tiny/agents --seed 2 $(FEW_STEPS)
	$(PY) evaluate.py --run runs/loop --adapter runs/loop/agents $(MEASURED)
	$(PY) evaluate.py --compare runs/before runs/after runs/loop

# A run of a kind without flags is not trained.
runs/5/%/eval/table.md: .venv/.installed
	$(if $(FLAGS),$(PY) train_agents.py --run runs/5/$* --seed $(SEED) $(V) $(FLAGS))
	$(PY) evaluate.py --run runs/5/$* --seed $(SEED) $(V) \
	  $(if $(FLAGS),--adapter runs/5/$*/agents) $(FEW_METHODS)

# Which reward teaches the agents? About 6,300 messages for each.
# passes: four for each of 64 questions a step; tree: only the Planner learns, from siblings; all: all agents do.
CREDIT := passes-outcome passes-value passes-delta passes-return passes-random \
  tree-search tree-value tree-random all-search all-value own-search
PASSES := --num-steps 6
ALL_AGENTS := --rollouts tree --num-candidates 1.8.1.1 --num-steps 4
flags-passes-outcome := $(PASSES) --reward outcome
flags-passes-value := $(PASSES) --reward value
flags-passes-delta := $(PASSES) --reward value-delta
flags-passes-return := $(PASSES) --reward value-delta --credit return
flags-passes-random := $(PASSES) --reward random
flags-tree-search := $(PLANNER_TREES) --num-steps 4 --reward search
flags-tree-value := $(PLANNER_TREES) --num-steps 11 --reward value
flags-tree-random := $(PLANNER_TREES) --num-steps 4 --reward random
flags-all-search := $(ALL_AGENTS) --reward search
flags-all-value := $(ALL_AGENTS) --reward value
flags-own-search := $(ALL_AGENTS) --reward search --adapters per-agent

credit: $(call tables,runs/5,before $(CREDIT),0 1 2)
	$(PY) evaluate.py --compare $(call groups,runs/5,before $(CREDIT),0 1 2)
	$(PY) evaluate.py --compare $(call groups,runs/5,$(CREDIT),0 1 2) --curves runs/5/credit.png

# Is V hacked, and what helps? About 14,000 messages for each; labels for a fresh V not counted.
CURES := hacked owned mixed searched returned
flags-hacked := $(PLANNER_TREES) --num-steps 24 --reward value
flags-owned := $(flags-hacked) --adapters per-agent
flags-mixed := $(PLANNER_TREES) --num-steps 9 --reward value --outcome-share 0.5
flags-searched := $(PLANNER_TREES) --num-steps 9 --reward search
flags-returned := --num-steps 14 --reward value-delta --credit return
flags-first := $(PLANNER_TREES) --num-steps 8 --reward value
flags-early := $(FEW_STEPS) --reward value

# fresh-KIND-SEED: a fresh V, from labels of the agents of KIND-SEED.
runs/5/fresh-%/eval/table.md: runs/5/%/eval/table.md
	$(PY) generate_rollouts.py --run runs/5/fresh-$* --adapter runs/5/$*/agents --seed $(SEED)
	$(PY) train_value.py --run runs/5/fresh-$* --seed $(SEED)
	$(PY) evaluate.py --run runs/5/fresh-$* --adapter runs/5/$*/agents --seed $(SEED) \
	  $(FEW_METHODS)

# The loop: second and third train the agents of the round before on its fresh V, four steps each.
# $(call round,FROM,TO,SEED,NUMBER): each round draws its questions with another seed.
define round
	$(PY) train_agents.py --run $(2) --adapter $(1)/agents --seed $(4)$(3) $(flags-early) \
	  --value $(subst /5/,/5/fresh-,$(1))/value
	$(PY) evaluate.py --run $(2) --adapter $(2)/agents --seed $(3) \
	  --value $(subst /5/,/5/fresh-,$(1))/value $(FEW_METHODS)
endef
runs/5/second-%/eval/table.md: runs/5/fresh-early-%/eval/table.md
	$(call round,runs/5/early-$*,runs/5/second-$*,$*,2)
runs/5/third-%/eval/table.md: runs/5/fresh-second-%/eval/table.md
	$(call round,runs/5/second-$*,runs/5/third-$*,$*,3)

ALL_CURES := $(CURES) early first fresh-early fresh-first second fresh-second third fresh-searched
TRAINED := $(CURES) early first second third
cures: $(call tables,runs/5,before $(ALL_CURES),0 1 2)
	$(PY) evaluate.py --compare $(call groups,runs/5,before $(ALL_CURES),0 1 2)
	$(PY) evaluate.py --compare $(call groups,runs/5,$(TRAINED),0 1 2) --curves runs/5/cures.png
