"""Tests of generate_rollouts.py: MAS-MCTS by hand, on a golden tree, and as a script."""

import json
from pathlib import Path

import pytest
from conftest import become_process, output_of, read_lines
from searching import HINT, Answers, ScriptedPolicy, digit, drive, label, make_problems

import generate_rollouts
from generate_rollouts import label_tree
from mas import State
from support.records import read_records
from support.runs import seeded
from tasks.problems import Problem
from tree import Sample, tree_fields

PROBLEM = Problem("p", split="train", question="q", gold="1", answer_type="number")


class First:
    """Stands in for random.Random: picks the first option."""

    def choice(self, options):
        return options[0]


def label_by(say, mas, *, num_simulations, num_candidates, rng=None):
    """Label PROBLEM with scripted messages. Returns the root."""
    search = label_tree(
        PROBLEM,
        mas,
        num_simulations=num_simulations,
        num_candidates=num_candidates,
        c_uct=1.0,
        rng=rng or First(),
    )
    return drive(search, {Sample: ScriptedPolicy(mas, say)})


# ---- By hand -------------------------------------------------------------------------------------


def test_a_labelled_tree_by_hand(duo):
    """C = 2, N = 2, and B's answer is right only on path (1, 0).

    Simulation 1 expands the root and enters a0. It expands a0 into two terminal states, both
    wrong, and counts each of them once: N(a0) = 2, Q(a0) = -1.
    Simulation 2 selects a1, which is unvisited (Q = 0). It expands a1 into a right state (+1) and
    its wrong sibling (-1).
    """

    def say(path):
        if len(path) == 1:
            return f"a{path[0]}"
        return f"Final answer: {1 if path == (1, 0) else 7 + path[1]}"

    root = label_by(say, duo, num_simulations=2, num_candidates=(2, 2))
    assert root.state == State("q", ())
    a0, a1 = root.children
    assert [(node.N, node.W) for node in (root, a0, a1)] == [(4, -2.0), (2, -2.0), (2, 0.0)]
    leaves = a0.children + a1.children
    outcomes = [(leaf.N, leaf.W, leaf.outcome) for leaf in leaves]
    assert outcomes == [(1, -1.0, -1.0), (1, -1.0, -1.0), (1, 1.0, 1.0), (1, -1.0, -1.0)]
    # A simulation's own leaf is last, after its siblings.
    replayed = [[leaf.path for leaf in leaves] for leaves in root.simulations]
    assert replayed == [[(0, 1), (0, 0)], [(1, 1), (1, 0)]]


@pytest.mark.parametrize("first_message, num_last", [("fine", 4), ("help", 3)])
def test_an_agent_gets_its_own_number_of_candidates_also_after_one_that_is_skipped(
    first_message, num_last
):
    def say(path):
        return first_message if len(path) == 1 else f"word {path}"

    root = label_by(say, HINT, num_simulations=1, num_candidates=(1, 3, 4))
    [a] = root.children
    assert len(a.children) == num_last


def test_a_labelled_tree_is_as_it_always_was(chain):
    """All of it: duplicates, siblings, unvisited nodes, and nodes that are visited again."""

    def say(path):
        return f"Final answer: {digit(10, path)}" if len(path) == 4 else f"word {digit(10, path)}"

    root = label_by(say, chain, num_simulations=16, num_candidates=(2, 3, 2, 3), rng=seeded(0, "p"))
    tree = tree_fields(root, chain, "number", chosen=None)
    for node in tree["nodes"]:
        node.pop("rung", None)
    golden = Path(__file__).parent / "golden" / "labels.json"
    assert json.loads(json.dumps(tree)) == json.loads(golden.read_text())


# ---- Labelling many problems ---------------------------------------------------------------------


def test_each_problem_is_searched_with_the_settings_of_the_flags(chain):
    """The trees are those of label_tree with N, C, c and the seed of the flags."""
    problems = make_problems(3)
    seen = []
    for num_simulations, c_uct, seed in ((9, 1.0, 0), (4, 1.0, 0), (9, 0.0, 0), (9, 1.0, 3)):
        flags = ["--num-simulations", num_simulations, "--c-uct", c_uct, "--seed", seed]
        records = label(problems, *flags)
        assert records not in seen, flags  # every setting counts
        seen.append(records)
        for problem in problems:
            search = label_tree(
                problem,
                chain,
                num_simulations=num_simulations,
                num_candidates=(2, 3, 2, 2),
                c_uct=c_uct,
                rng=seeded(seed, problem.id),
            )
            root = drive(search, {Sample: Answers(chain, say=None)})
            tree = tree_fields(root, chain, "number", chosen=None)
            assert records[problem.id].items() >= tree.items()


# ---- The script ----------------------------------------------------------------------------------

ROLLOUTS = ["--num-train", 3, "--num-heldout", 2, "--num-simulations", 3, "--num-candidates", 2]


def trees_in(run) -> dict[str, dict]:
    """Return problem id -> tree, without what depends on the clock or on rounding."""
    records = read_records(run / "rollouts" / "trees.jsonl")
    for record in records.values():
        record["cost"].pop("seconds")
        for node in record["nodes"]:
            node.pop("logprob", None)
    return records


def test_two_processes_give_the_trees_of_one(tmp_path, monkeypatch):
    output_of(generate_rollouts, "--run", tmp_path / "one", *ROLLOUTS)
    shares = []
    for rank in range(2):
        become_process(monkeypatch, rank, 2)
        output_of(generate_rollouts, "--run", tmp_path, *ROLLOUTS)
        shares.append(read_lines(tmp_path / "rollouts" / f"trees.{rank}of2.jsonl"))
    assert all(shares) and len(shares[0]) + len(shares[1]) == 5
    assert trees_in(tmp_path) == trees_in(tmp_path / "one")

    # One process alone finds all of them labelled.
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    output_of(generate_rollouts, "--run", tmp_path, *ROLLOUTS)
    assert not read_lines(tmp_path / "rollouts" / "trees.jsonl")
