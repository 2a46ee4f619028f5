"""Tests of generate_rollouts.py: Eq. 2, backup, MAS-MCTS, the driver and the records.

The trees are small enough to work out by hand.
"""

import json
import math
import random
from functools import partial

import pytest
from conftest import NoProgress, ScriptedPolicy, drive

from decoding import uniforms
from generate_rollouts import backup, expand, label_tree, make_root, run, select, tree_record
from policy import Candidate, Cost, Sample, Score
from runs import seeded
from tasks import Problem

PROBLEM = Problem("p", split="train", question="q", gold="1", answer_type="number")


def make_candidates(texts):
    """Make candidates; the number of tokens of each is its index."""
    candidates = []
    for index, text in enumerate(texts):
        candidates.append(Candidate(text, tokens=index, logprob=0.0, truncated=False))
    return candidates


# ---- Eq. 2 and backup ----------------------------------------------------------------------------


def root_with(mas, statistics):
    """Return a root whose children have the given (N, W)."""
    root = make_root("q")
    expand(mas, root, make_candidates([f"m{index}" for index in range(len(statistics))]))
    for child, (visits, total) in zip(root.children, statistics, strict=True):
        child.N = visits
        child.W = total
    return root


def test_select_is_equation_2(duo):
    """The children have Q = 0.5, 0.2 and 0, the last one unvisited; sum_b N(s,b) = 4."""
    root = root_with(duo, [(3, 1.5), (1, 0.2), (0, 0.0)])
    c = 1.3
    log_total = math.log(1 + 4)
    by_hand = [
        0.5 + c * math.sqrt(log_total / (1 + 3)),
        0.2 + c * math.sqrt(log_total / (1 + 1)),
        0.0 + c * math.sqrt(log_total / (1 + 0)),
    ]
    assert by_hand.index(max(by_hand)) == 2
    assert select(root, c) is root.children[2]


def test_select_without_exploration_takes_the_largest_q(duo):
    root = root_with(duo, [(3, 1.5), (1, 0.2), (0, 0.0)])
    assert select(root, 0.0) is root.children[0]
    root = root_with(duo, [(1, 0.2), (3, 1.5), (0, 0.0)])
    assert select(root, 0.0) is root.children[1]


def test_select_changes_where_the_formula_says(duo):
    """0.5 + c sqrt(ln 6 / 5) equals 0 + c sqrt(ln 6 / 2) at c = switch."""
    root = root_with(duo, [(4, 2.0), (1, 0.0)])
    first, second = root.children
    switch = 0.5 / (math.sqrt(math.log(6) / 2) - math.sqrt(math.log(6) / 5))
    assert select(root, switch - 1e-6) is first
    assert select(root, switch + 1e-6) is second


def test_ties_go_to_the_first(duo):
    root = root_with(duo, [(2, 1.0), (2, 1.0), (2, 1.0)])
    assert select(root, 1.0) is root.children[0]


def test_backup_reaches_every_edge_undiscounted(duo):
    root = make_root("q")
    [a] = expand(duo, root, make_candidates(["x"]))
    [b] = expand(duo, a, make_candidates(["y"]))
    backup(b, 1.0)
    backup(b, -1.0)
    backup(a, 1.0)
    assert (root.N, root.W) == (3, 1.0)
    assert (a.N, a.W) == (3, 1.0)
    assert (b.N, b.W) == (2, 0.0)
    assert pytest.approx(a.Q) == 1 / 3
    assert b.Q == 0


def test_duplicate_messages_are_merged_and_the_first_is_kept(duo):
    root = make_root("q")
    expand(duo, root, make_candidates(["a", "b", "a", "c", "b"]))
    assert [child.message.text for child in root.children] == ["a", "b", "c"]
    assert [child.candidate.tokens for child in root.children] == [0, 1, 3]
    assert [child.path for child in root.children] == [(0,), (1,), (3,)]


# ---- Labelling one problem -----------------------------------------------------------------------


class First:
    """A generator that always picks the first."""

    def choice(self, options):
        return options[0]


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
        is_right = path == (1, 0)
        return f"Final answer: {1 if is_right else 7 + path[1]}"

    search = label_tree(
        PROBLEM, duo, num_simulations=2, num_candidates=(2, 2), c_uct=1.0, rng=First()
    )
    root = drive(search, {Sample: ScriptedPolicy(say)})

    a0, a1 = root.children
    assert (root.N, root.W) == (4, -2.0)
    assert (a0.N, a0.W) == (2, -2.0)
    assert (a1.N, a1.W) == (2, 0.0)
    leaves = a0.children + a1.children
    assert [(leaf.N, leaf.W, leaf.reward) for leaf in leaves] == [
        (1, -1.0, -1.0),
        (1, -1.0, -1.0),
        (1, 1.0, 1.0),
        (1, -1.0, -1.0),
    ]


def test_siblings_of_a_fresh_terminal_are_counted_once_and_revisits_again(duo):
    """Simulation 1 counts both terminal states. Simulations 2 to 5 visit the better one (c = 0)."""

    def say(path):
        return "a" if len(path) == 1 else f"Final answer: {path[1]}"

    search = label_tree(
        PROBLEM, duo, num_simulations=5, num_candidates=(1, 2), c_uct=0.0, rng=First()
    )
    root = drive(search, {Sample: ScriptedPolicy(say)})

    [a] = root.children
    wrong, right = a.children
    assert (wrong.N, wrong.W) == (1, -1.0)
    assert (right.N, right.W) == (5, 5.0)
    assert a.N == 6
    assert root.N == 6


@pytest.mark.parametrize("seed", range(5))
def test_every_simulation_ends_in_a_terminal_state(chain, seed):
    search = label_tree(
        PROBLEM,
        chain,
        num_simulations=15,
        num_candidates=(2, 3, 2, 2),
        c_uct=1.0,
        rng=random.Random(seed),
    )
    policy = ScriptedPolicy(lambda path: f"Final answer: {hash((seed, path)) % 5}")
    stack = [drive(search, {Sample: policy})]
    while stack:
        node = stack.pop()
        if chain.is_terminal(node.state):
            assert node.reward in (1.0, -1.0)
            assert node.N * node.reward == node.W
        elif node.N > 0:
            # No simulation stops at an inner node, so its visits are those of its children.
            assert node.children
            assert sum(child.N for child in node.children) == node.N
            stack += node.children


def test_labels_find_the_planted_path(chain):
    """Only Planner candidate 2 can lead to the right answer: it gets the best Q at every turn."""

    def say(path):
        if len(path) < 4:
            return f"{path}"
        is_right = path[1] == 2
        return f"Final answer: {1 if is_right else 104} {path}"

    search = label_tree(
        PROBLEM,
        chain,
        num_simulations=40,
        num_candidates=(3, 3, 3, 3),
        c_uct=1.0,
        rng=random.Random(0),
    )
    root = drive(search, {Sample: ScriptedPolicy(say)})
    num_compared = 0
    for reader in root.children:
        plans = reader.children or []
        if plans and all(plan.N > 0 for plan in plans):
            best = max(plans, key=lambda plan: plan.Q)
            assert best.path[1] == 2
            num_compared += 1
    assert num_compared > 0


# ---- The driver ----------------------------------------------------------------------------------


class ScriptedByProblem(ScriptedPolicy):
    """A scripted policy whose messages depend on the problem as well.

    Args:
        say_for: (problem id, path of a candidate) -> text of its message.
    """

    def __init__(self, say_for):
        super().__init__(say=None)
        self.say_for = say_for

    def __call__(self, requests):
        replies = []
        for problem, request in requests:
            self.say = partial(self.say_for, problem.id)
            replies += super().__call__([(problem, request)])
        return replies


def random_answer(problem_id, path):
    """Answer 0, 1 or 2 at random, as a function of the problem and the path."""
    [uniform] = uniforms(1, problem_id, path)
    return f"Final answer: {int(uniform * 3)}"


def label_searches(mas, num_problems, *, num_simulations=12, num_candidates=(2, 2, 2, 2)):
    for index in range(num_problems):
        problem = Problem(f"p{index}", "train", f"question {index}", str(index % 3), "number")
        search = label_tree(
            problem,
            mas,
            num_simulations=num_simulations,
            num_candidates=num_candidates,
            c_uct=1.0,
            rng=seeded(0, problem.id),
        )
        yield problem, search


def tree_records(chain, max_active):
    finished = run(
        label_searches(chain, 20),
        {Sample: ScriptedByProblem(random_answer)},
        max_active=max_active,
        progress=NoProgress(),
    )
    return {problem.id: tree_record(problem, root, cost) for problem, root, cost in finished}


def test_interleaved_equals_one_by_one(chain):
    one_by_one = tree_records(chain, max_active=1)
    assert len(one_by_one) == 20
    assert tree_records(chain, max_active=7) == one_by_one
    assert tree_records(chain, max_active=100) == one_by_one


def test_the_driver_batches_all_waiting_requests_of_one_type(duo):
    """Ten searches of two requests each, four active: 4 and 4, 4 and 4, 2 and 2."""
    policy = ScriptedPolicy(lambda path: "Final answer: 1")
    searches = label_searches(duo, 10, num_candidates=(1, 1), num_simulations=1)
    list(run(searches, {Sample: policy}, max_active=4, progress=NoProgress()))
    assert policy.batches == [4, 4, 4, 4, 2, 2]


def test_cheap_requests_are_answered_first(duo):
    """Every second search asks for a score first; then all of them wait for one large batch."""
    order = []

    def search(index):
        if index % 2:
            yield Score([])
        yield Sample([], 1)

    def handler(name):
        def answer(requests):
            order.append((name, len(requests)))
            return [([], Cost()) for _ in requests]

        return answer

    searches = [(PROBLEM, search(index)) for index in range(6)]
    handlers = {Score: handler("score"), Sample: handler("sample")}
    list(run(searches, handlers, max_active=6, progress=NoProgress()))
    assert order == [("score", 3), ("sample", 6)]


def test_costs_go_to_the_search_that_caused_them():
    def search(num_requests):
        for _ in range(num_requests):
            yield Sample([], 1)

    def handler(requests):
        return [([], Cost(agent_calls=1, seconds=0.5)) for _ in requests]

    searches = []
    for num_requests in (1, 3):
        problem = Problem(str(num_requests), "train", "", "", "")
        searches.append((problem, search(num_requests)))
    finished = run(searches, {Sample: handler}, max_active=9, progress=NoProgress())
    costs = {problem.id: cost for problem, _, cost in finished}
    assert costs.keys() == {"1", "3"}
    assert (costs["1"].agent_calls, costs["1"].seconds) == (1, 0.5)
    assert (costs["3"].agent_calls, costs["3"].seconds) == (3, 1.5)


class RecordedProgress(NoProgress):
    """Remembers how many messages each finished search has sampled."""

    def __init__(self):
        self.finished = []

    def search_finished(self, num_messages):
        self.finished.append(num_messages)


@pytest.mark.parametrize("max_active", [1, 3, 100])
def test_progress_is_given_the_messages_of_each_finished_search(chain, max_active):
    progress = RecordedProgress()
    policy = ScriptedByProblem(random_answer)
    finished = run(
        label_searches(chain, 10), {Sample: policy}, max_active=max_active, progress=progress
    )
    agent_calls = [cost.agent_calls for _, _, cost in finished]
    assert len(agent_calls) == 10
    assert len(set(agent_calls)) > 1
    assert progress.finished == agent_calls
    assert sum(progress.finished) == policy.calls


# ---- Records -------------------------------------------------------------------------------------

MESSAGE_FIELDS = {"parent", "agent", "message", "tokens", "logprob", "truncated", "N", "W"}


def test_a_tree_record_holds_all_that_is_needed_to_label_again(chain):
    def text_of(path):
        is_told = path[-1] == 0
        return f"Final answer: {sum(path)}" if is_told else f"The answer is {sum(path)}."

    policy = ScriptedPolicy(text_of)
    searches = label_searches(chain, 1)
    [(problem, root, cost)] = run(searches, {Sample: policy}, max_active=1, progress=NoProgress())
    record = json.loads(json.dumps(tree_record(problem, root, cost)))

    nodes = record["nodes"]
    assert nodes[0]["parent"] is None
    for index, node in enumerate(nodes[1:], 1):
        assert node["parent"] < index
        assert node.keys() >= MESSAGE_FIELDS

    leaves = [node for node in nodes if node.get("agent") == "Verifier"]
    assert leaves
    for leaf in leaves:
        is_right = leaf["answer"] == record["gold"]
        assert leaf["reward"] == (1.0 if is_right else -1.0)
        assert leaf["rung"] == ("told" if leaf["message"].startswith("Final") else "sentence")
    assert {leaf["rung"] for leaf in leaves} == {"told", "sentence"}
