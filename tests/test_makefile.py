"""Tests of experiments.mk: the commands of the experiments have the flags that they should."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

import evaluate
import generate_rollouts
import search
import train_agents
import train_value
from mas import CHAIN, GRAPHS
from support.flags import HERE

TARGETS = ["demo", "main", "seeds", "hard", "rollout-count", "lambda", "transfer", "losses"]
TARGETS += ["refine", "train-agents", "loop", "credit", "cures"]


@pytest.fixture(scope="module")
def commands():
    """The flags of every script that the experiments run: [(script, flags)]."""
    command = ["make", "--dry-run", "--always-make", "--no-print-directory", *TARGETS]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=True)
    commands = []
    for line in done.stdout.replace("\\\n", " ").splitlines():
        for seed in range(5) if "$seed" in line else [0]:
            shown = line.replace("$seed", str(seed)).replace("$n", "80")
            for script, flags in re.findall(r"bin/python (\w+\.py)([^;&|]*)", shown):
                commands.append((script, shlex.split(flags)))
    return commands


SCRIPTS = {
    "generate_rollouts.py": generate_rollouts,
    "train_value.py": train_value,
    "train_agents.py": train_agents,
    "evaluate.py": evaluate,
    "search.py": search,
}


def args_of(commands, script):
    return [SCRIPTS[script].parse_args(flags) for name, flags in commands if name == script]


def test_the_makefile_gives_flags_that_exist_and_go_together(commands):
    assert len(commands) > 200
    for args in args_of(commands, "train_agents.py"):
        train_agents.check_flags(args)
        train_agents.candidates_of_rollouts(args, CHAIN)
    for args in args_of(commands, "evaluate.py"):
        graph = GRAPHS[args.graph]
        for name in args.methods or []:
            search.parse_method(name, graph, num_candidates=args.num_candidates, lam=args.lam)


def test_runs_of_a_seed_have_it(commands):
    """Else the noise of training that is reported would be none."""
    num_checked = 0
    for script in ("generate_rollouts.py", "train_value.py", "train_agents.py", "evaluate.py"):
        for args in args_of(commands, script):
            name = Path(args.run).name
            trained = script != "evaluate.py" or args.run.startswith("runs/5/")
            if not trained or getattr(args, "compare", None):
                continue
            if args.run.startswith("runs/v"):
                assert args.seed == int(name[1:])
            elif args.run.startswith(("runs/hard/", "runs/5/")) and "-" in name:
                kind, _, seed = name.rpartition("-")
                # A further round of training asks other questions than the rounds before it.
                rounds = {"second": 20, "third": 30} if script == "train_agents.py" else {}
                assert args.seed == rounds.get(kind, 0) + int(seed), (script, args.run)
            else:
                continue
            num_checked += 1
    assert num_checked > 100


def test_values_that_are_compared_are_measured_on_the_same_labels(commands):
    hard = [a for a in args_of(commands, "train_value.py") if a.run.startswith("runs/hard/")]
    assert len(hard) == 5 * 9
    assert {args.heldout_rollouts for args in hard} == {"runs/hard/n80/rollouts"}
    assert {args.epochs for args in hard} == {4}
    kinds = {Path(args.run).name.rpartition("-")[0]: args for args in hard}
    for kind in ("n10", "n20", "n40", "n80"):
        assert kinds[kind].rollouts == f"runs/hard/{kind}/rollouts"
    for kind in ("mse", "rank", "dist", "local", "lambda"):
        assert kinds[kind].rollouts == "runs/hard/n40/rollouts"
    assert (kinds["local"].view, kinds["lambda"].target) == ("local", "outcome")
    losses = {kind: kinds[kind].loss for kind in ("n40", "mse", "rank", "dist")}
    assert losses == {"n40": "huber", "mse": "mse", "rank": "rank", "dist": "dist"}
    temperatures = set()
    for script in ("generate_rollouts.py", "evaluate.py"):
        for args in args_of(commands, script):
            if args.run.startswith("runs/hard/"):
                temperatures.add((args.temperature, args.messages))
    assert temperatures == {(1.5, "runs/hard/messages")}


def test_runs_of_stage_5_are_measured_with_their_own_agents(commands):
    """And on the V that everybody is measured on, unless it is a fresh one."""
    trained = {args.run for args in args_of(commands, "train_agents.py")}
    num_checked = 0
    for args in args_of(commands, "evaluate.py"):
        name = Path(args.run).name
        if not args.run.startswith("runs/5/"):
            continue
        num_checked += 1
        if args.run in trained:
            assert args.adapter == f"{args.run}/agents"
        elif name.startswith("fresh-"):
            assert args.adapter == f"runs/5/{name.removeprefix('fresh-')}/agents"
            assert args.value is None
        else:
            assert name.startswith("before-") and args.adapter is None
    assert num_checked > 30
    by_run = {args.run: args for args in args_of(commands, "evaluate.py")}
    assert by_run["runs/after"].adapter == "runs/tiny/agents"
    assert by_run["runs/before"].adapter is None
    assert by_run["runs/loop"].adapter == "runs/loop/agents"
    first, second = [
        args
        for args in args_of(commands, "train_agents.py")
        if args.run in ("runs/tiny", "runs/loop")
    ]
    assert (first.adapter, second.adapter) == (None, "runs/tiny/agents")
    assert first.seed != second.seed
