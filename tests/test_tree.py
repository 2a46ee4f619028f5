"""Tests of generate_rollouts.py: Eq. 2, backup, MAS-MCTS, the driver and the records.

The trees are small enough to work out by hand.
"""

import json
import math
import random
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import NoProgress, ScriptedPolicy, drive, hint_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_rollouts
from generate_rollouts import label_tree, load_training_problems, make_searches
from llm.decoding import uniforms
from mas import CHAIN, GRAPHS, SINGLE, State
from support.runs import seeded
from tasks.problems import Problem
from tree import (
    Candidate,
    Cost,
    Sample,
    Score,
    backup,
    expand,
    label_statistics,
    make_root,
    run_searches,
    select,
    tree_paths,
    tree_record,
)

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


def test_a_fresh_node_has_no_statistics(duo):
    root = make_root("q")
    for node in [root, *expand(duo, root, make_candidates(["a", "b"]))]:
        assert (node.N, node.W, node.Q) == (0, 0.0, 0.0)
        assert node.V is None
        assert node.reward is None


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


def leaves_below(node):
    if not node.children:
        return [node]
    leaves = []
    for child in node.children:
        leaves += leaves_below(child)
    return leaves


def assert_backed_by_leaves(node):
    """N and W of an edge are those of the terminal states below it, graded anew."""
    num_visits, total = 0, 0.0
    for leaf in leaves_below(node):
        reward = 1.0 if leaf.message.text.endswith("answer: 1") else -1.0
        num_visits += leaf.N
        total += leaf.N * reward
    assert num_visits == node.N
    assert total == node.W
    assert -1 <= node.Q <= 1
    for child in node.children or []:
        assert child.parent is node
        assert_backed_by_leaves(child)


@settings(derandomize=True, deadline=None, database=None, max_examples=25)
@given(
    seed=st.integers(0, 999),
    num_simulations=st.integers(1, 15),
    num_candidates=st.tuples(*[st.integers(1, 3)] * 4),
    c_uct=st.sampled_from([0.0, 1.0, 4.0]),
)
def test_every_label_is_backed_by_terminal_rewards(seed, num_simulations, num_candidates, c_uct):
    """Every simulation counts one terminal state, and every fresh sibling of it once more."""

    def say(path):
        [uniform] = uniforms(1, seed, path)
        return f"{path[:3]} Final answer: {int(uniform * 3)}"

    search = label_tree(
        PROBLEM,
        CHAIN,
        num_simulations=num_simulations,
        num_candidates=num_candidates,
        c_uct=c_uct,
        rng=random.Random(seed),
    )
    root = drive(search, {Sample: ScriptedPolicy(say)})
    assert root.state == State("q", ())
    assert_backed_by_leaves(root)

    terminal = [leaf for leaf in leaves_below(root) if CHAIN.is_terminal(leaf.state)]
    assert all(leaf.N > 0 for leaf in terminal)
    num_expansions = len({leaf.parent for leaf in terminal})
    num_siblings = len(terminal) - num_expansions
    num_counted = num_simulations + num_siblings
    assert num_counted == root.N


def test_a_fresh_child_is_picked_by_the_trees_own_generator(duo):
    """The first simulation enters the child that the generator picks."""

    class Last:
        def choice(self, options):
            return options[-1]

    search = label_tree(
        PROBLEM, duo, num_simulations=1, num_candidates=(3, 1), c_uct=1.0, rng=Last()
    )
    root = drive(search, {Sample: ScriptedPolicy(str)})
    assert [child.N for child in root.children] == [0, 0, 1]


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


@pytest.mark.parametrize("is_asked, num_last", [(False, 4), (True, 3)])
def test_an_agent_gets_its_own_number_of_candidates_also_after_one_that_is_skipped(
    is_asked, num_last
):
    first = "help" if is_asked else "fine"
    search_of = label_tree(
        Problem("p", "train", "q", "1", "number"),
        hint_graph(),
        num_simulations=1,
        num_candidates=(1, 3, 4),
        c_uct=1.0,
        rng=random.Random(0),
    )
    policy = ScriptedPolicy(lambda path: first if len(path) == 1 else f"word {path}")
    root = drive(search_of, {Sample: policy})
    [a] = root.children
    assert len(a.children) == num_last


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
    finished = run_searches(
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
    list(run_searches(searches, {Sample: policy}, max_active=4, progress=NoProgress()))
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
    list(run_searches(searches, handlers, max_active=6, progress=NoProgress()))
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
    finished = run_searches(searches, {Sample: handler}, max_active=9, progress=NoProgress())
    costs = {problem.id: cost for problem, _, cost in finished}
    assert costs.keys() == {"1", "3"}
    assert (costs["1"].agent_calls, costs["1"].seconds) == (1, 0.5)
    assert (costs["3"].agent_calls, costs["3"].seconds) == (3, 1.5)


@settings(derandomize=True, deadline=None, database=None, max_examples=10)
@given(max_active=st.integers(1, 12), num_problems=st.integers(0, 8))
def test_trees_do_not_depend_on_how_many_are_active(max_active, num_problems):
    def trees(max_active):
        searches = label_searches(CHAIN, num_problems, num_simulations=4)
        policy = ScriptedByProblem(random_answer)
        found = {}
        for problem, root, cost in run_searches(
            searches, {Sample: policy}, max_active=max_active, progress=NoProgress()
        ):
            found[problem.id] = tree_record(problem, root, cost)
        assert max(policy.batches, default=0) <= max_active
        return found

    assert trees(max_active) == trees(1)


def test_a_handler_that_forgets_a_search_is_a_programming_error(duo):
    policy = ScriptedPolicy(str)
    searches = label_searches(duo, 2, num_candidates=(1, 1))
    handlers = {Sample: lambda requests: policy(requests[:1])}
    with pytest.raises(ValueError, match="shorter"):
        list(run_searches(searches, handlers, max_active=2, progress=NoProgress()))


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
    finished = run_searches(
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
    [(problem, root, cost)] = run_searches(
        searches, {Sample: policy}, max_active=1, progress=NoProgress()
    )
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


def finished_tree(mas, problem, say, *, num_candidates, num_simulations=4):
    """Label one problem with scripted messages. Returns its record."""
    search = label_tree(
        problem,
        mas,
        num_simulations=num_simulations,
        num_candidates=num_candidates,
        c_uct=1.0,
        rng=First(),
    )
    policy = ScriptedPolicy(say)
    [(_, root, cost)] = run_searches(
        [(problem, search)], {Sample: policy}, max_active=1, progress=NoProgress()
    )
    return tree_record(problem, root, cost)


def test_a_tree_record_by_hand(duo):
    """The answer is a letter. N = 1 visits a0 and both of its children; a1 is never visited."""

    def say(path):
        return f"a{path[0]}" if len(path) == 1 else f"Final answer: ({'bc'[path[1]]})"

    problem = Problem("p", "train", "q", "B", "letter", subject="logic", level="2")
    record = finished_tree(duo, problem, say, num_candidates=(2, 2), num_simulations=1)
    nodes = record.pop("nodes")
    cost = record.pop("cost")
    assert cost["agent_calls"] == 4
    assert record == {
        "id": "p",
        "split": "train",
        "question": "q",
        "gold": "B",
        "kind": "letter",
        "subject": "logic",
        "level": "2",
        "simulations": [[3, 2]],  # its own answer is last, after its sibling
    }
    message = {"tokens": 2, "logprob": -0.5, "truncated": False}
    assert nodes == [
        {"parent": None, "N": 2, "W": 0.0},
        {"parent": 0, "agent": "A", "message": "a0", "N": 2, "W": 0.0} | message,
        {"parent": 1, "agent": "B", "message": "Final answer: (b)", "N": 1, "W": 1.0}
        | {"reward": 1.0, "answer": "B", "rung": "told"}
        | message,
        {"parent": 1, "agent": "B", "message": "Final answer: (c)", "N": 1, "W": -1.0}
        | {"reward": -1.0, "answer": "C", "rung": "told"}
        | message,
        {"parent": 0, "agent": "A", "message": "a1", "N": 0, "W": 0.0} | message,
    ]


def test_label_paths_by_hand(duo):
    """The tree of the test above has one path of two edges, and one of one edge."""

    def say(path):
        return f"a{path[0]}" if len(path) == 1 else f"Final answer: {path[1]}"

    record = finished_tree(duo, PROBLEM, say, num_candidates=(2, 2), num_simulations=1)

    def labels(target):
        paths = []
        for path in tree_paths(record, duo, target):
            paths.append([(edge.parent, edge.state.messages[-1], edge.y) for edge in path])
        return paths

    first, wrong = (0, ("A", "a0"), 0.0), (1, ("B", "Final answer: 0"), -1.0)
    right = (1, ("B", "Final answer: 1"), 1.0)
    assert labels("search") == [[first, wrong], [right]]
    assert labels("outcome") == [[wrong], [right]]
    [[edge, _], _] = tree_paths(record, duo, "search")
    assert (edge.problem_id, edge.split, edge.agent, edge.visits) == ("p", "train", "A", 2)
    assert edge.state.question == "q"


def test_every_answer_of_a_single_agent_is_labelled():
    """Without a multi-agent system, every node but the root is a leaf."""
    record = finished_tree(
        SINGLE, PROBLEM, lambda path: f"Final answer: {path[0]}", num_candidates=(3,)
    )
    paths = tree_paths(record, SINGLE, "search")
    assert [[edge.y for edge in path] for path in paths] == [[-1.0], [1.0], [-1.0]]


def edge_of(agent, visits, total, *, truncated=False, **leaf):
    return {"agent": agent, "N": visits, "W": total, "truncated": truncated} | leaf


def test_label_statistics_by_hand(duo):
    """A has targets 0.25 and 1, B has -1, 1 and 0; unvisited edges have no target."""
    mixed = [
        {"N": 5, "W": 3.0},
        edge_of("A", 4, 1.0),
        edge_of("A", 0, 0.0, truncated=True),
        edge_of("B", 2, -2.0, reward=-1.0, answer=None),
        edge_of("B", 3, 3.0, truncated=True, reward=1.0, answer="1"),
    ]
    all_right = [
        {"N": 2, "W": 2.0},
        edge_of("A", 1, 1.0, truncated=True),
        edge_of("B", 2, 0.0, reward=1.0, answer="1"),
    ]
    records = [{"nodes": mixed}, {"nodes": all_right}, {"nodes": [{"N": 0, "W": 0.0}]}]
    statistics = label_statistics(records, duo)
    rows = [line.split() for line in statistics.splitlines()]
    assert rows[0] == ["agent", "edges", "visited", "mean", "Q", "|Q|", "=", "1", "truncated"]
    assert rows[1] == ["A", "3", "2", "0.625", "50.0%", "2"]
    assert rows[2] == ["B", "3", "3", "0.000", "66.7%", "1"]
    assert statistics.splitlines()[3:] == [
        "3 trees, 1 of them with both right and wrong answers",
        "1 of 3 final messages held no answer (graded wrong)",
    ]


def test_label_statistics_of_one_label_and_of_none(duo):
    nodes = [edge_of("A", 0, 0.0), edge_of("B", 1, -1.0, reward=-1.0, answer="7")]
    statistics = label_statistics([{"nodes": nodes}], duo)
    assert statistics.splitlines()[1].split() == ["A", "1", "0", "-", "-", "0"]
    assert statistics.splitlines()[2].split() == ["B", "1", "1", "-1.000", "100.0%", "0"]


# ---- What a run labels ---------------------------------------------------------------------------


def test_training_and_held_out_problems_are_labelled(tmp_path):
    flags = ["--num-train", "5", "--num-heldout", "2"]
    problems = load_training_problems(generate_rollouts.parse_args(flags))
    assert [problem.split for problem in problems] == ["train"] * 5 + ["heldout"] * 2
    assert len({problem.question for problem in problems}) == 7

    # Problems of a file come from the file alone.
    data = tmp_path / "mine.jsonl"
    rows = [json.dumps({"question": f"mine {index}?", "answer": "3"}) for index in range(60)]
    data.write_text("\n".join(rows))
    problems = load_training_problems(generate_rollouts.parse_args([*flags, "--data", str(data)]))
    assert [problem.split for problem in problems] == ["train"] * 5 + ["heldout"] * 2
    assert all(problem.question.startswith("mine") for problem in problems)


def test_each_problem_is_searched_with_the_settings_of_the_flags(chain):
    """The trees are those of label_tree with N, C, c and the seed of the flags."""
    problems = [PROBLEM, Problem("p2", "train", "q2", "2", "number")]

    def trees(num_simulations, c_uct, seed):
        flags = ["--num-simulations", num_simulations, "--c-uct", c_uct, "--seed", seed]
        args = generate_rollouts.parse_args(list(map(str, flags)))
        searches = make_searches(problems, chain, (2, 3, 2, 2), args)
        return records_of(searches)

    def records_of(searches):
        records = []
        for problem, root, cost in run_searches(
            searches,
            {Sample: ScriptedByProblem(random_answer)},
            max_active=9,
            progress=NoProgress(),
        ):
            records.append(tree_record(problem, root, cost))
        return records

    def by_hand(num_simulations, c_uct, seed):
        searches = []
        for problem in problems:
            search = label_tree(
                problem,
                chain,
                num_simulations=num_simulations,
                num_candidates=(2, 3, 2, 2),
                c_uct=c_uct,
                rng=seeded(seed, problem.id),
            )
            searches.append((problem, search))
        return records_of(searches)

    seen = []
    for num_simulations, c_uct, seed in [(9, 1.0, 0), (9, 1.0, 3), (9, 0.0, 0), (2, 1.0, 0)]:
        records = trees(num_simulations, c_uct, seed)
        assert records == by_hand(num_simulations, c_uct, seed)
        assert records not in seen, (num_simulations, c_uct, seed)  # every setting counts
        seen.append(records)


def test_as_many_problems_are_labelled_together_as_the_flag_says(tmp_path, monkeypatch):
    given = []

    def look(searches, handlers, *, max_active, progress):
        given.append((max_active, list(handlers)))
        return iter(())

    monkeypatch.setattr(generate_rollouts, "run_searches", look)
    problems_to_label = [Problem("p", "train", "q", "1", "number")]
    policy = SimpleNamespace(settings={}, num_generated=0, num_recalled=0)
    args = generate_rollouts.parse_args(["--run", str(tmp_path), "--max-active", "77"])
    path = tmp_path / "trees.jsonl"
    generate_rollouts.label_problems(problems_to_label, CHAIN, policy, (1, 1, 1, 1), path, args)
    assert given == [(77, [Sample])]


def test_statistics_are_shown_once_every_problem_is_labelled(tmp_path, monkeypatch, capsys):
    """Of two problems, the second is left to another process."""
    two = [Problem(name, "train", f"{name}?", "1", "number") for name in "ab"]
    root = {"parent": None, "N": 1, "W": 1.0}
    message = {"parent": 0, "agent": "Solver", "message": "Final answer: 1", "N": 1, "W": 1.0}
    message |= {"tokens": 2, "truncated": False, "reward": 1.0, "answer": "1", "rung": "told"}
    done = ["a"]

    def label(problems, mas, policy, num_candidates, path, args):
        lines = []
        for name in done:
            record = {"id": name, "split": "train", "question": f"{name}?", "gold": "1"}
            record |= {"kind": "number", "nodes": [root, message], "simulations": [[1]]}
            lines.append(json.dumps(record) + "\n")
        path.write_text("".join(lines))

    policy = SimpleNamespace(mas=GRAPHS["single"], settings={})
    monkeypatch.setattr(generate_rollouts, "make_policy", lambda args, mas: policy)
    monkeypatch.setattr(generate_rollouts, "load_training_problems", lambda args: two)
    monkeypatch.setattr(generate_rollouts, "label_problems", label)
    args = generate_rollouts.parse_args(["--run", str(tmp_path), "--graph", "single"])
    generate_rollouts.main(args)
    out = capsys.readouterr().out
    assert "1 problems are left to the others" in out and "trees" not in out
    done.append("b")
    generate_rollouts.main(args)
    out = capsys.readouterr().out
    assert "2 trees, 0 of them with both right and wrong answers" in out and "left" not in out
    assert "! most problems are always solved, or never" in out
