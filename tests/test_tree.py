"""Tests of tree.py: Eq. 2, backup, the driver of searches, the records of trees, and the labels.

The trees are small enough to work out by hand.
"""

import json
import math
from collections import Counter

import pytest
from searching import label, make_problems

from mas import State
from support.progress import Progress
from tasks.problems import Problem
from tree import (
    Candidate,
    Cost,
    Sample,
    Score,
    TooLong,
    backup,
    expand,
    make_root,
    run_searches,
    select,
    tree_paths,
    tree_record,
)


def make_candidates(*texts: str) -> list[Candidate]:
    """Make candidates; the number of tokens of each is its index."""
    candidates = []
    for index, text in enumerate(texts):
        candidates.append(Candidate(text, tokens=index, logprob=-0.12345, truncated=False))
    return candidates


# ---- Eq. 2, backup, expand -----------------------------------------------------------------------


def root_with(mas, *statistics: tuple[int, float]):
    """Return a root whose children have the given (N, W)."""
    root = make_root("q")
    expand(mas, root, make_candidates(*[f"m{index}" for index in range(len(statistics))]))
    for child, (visits, total) in zip(root.children, statistics, strict=True):
        child.N = visits
        child.W = total
    return root


def test_select_is_equation_2(duo):
    """0.5 + c sqrt(ln 5 / 4) equals 0 + c sqrt(ln 5 / 1) at c = switch: sum_b N(s,b) = 4."""
    root = root_with(duo, (3, 1.5), (1, 0.2), (0, 0.0))
    root.N = 99  # the sum is over the children
    first, _, unvisited = root.children
    switch = 0.5 / (math.sqrt(math.log(5)) - math.sqrt(math.log(5) / 4))
    assert select(root, 0.0) is first
    assert select(root, switch - 1e-6) is first
    assert select(root, switch + 1e-6) is unvisited


def test_ties_go_to_the_first(duo):
    root = root_with(duo, (2, 0.5), (2, 1.0), (2, 1.0))
    assert select(root, 1.0) is root.children[1]


def test_backup_reaches_every_edge_undiscounted(duo):
    root = make_root("q")
    [a, other] = expand(duo, root, make_candidates("x", "z"))
    [b] = expand(duo, a, make_candidates("y"))
    for node, value in ((b, 1.0), (b, -1.0), (a, 0.5)):
        backup(node, value)
    statistics = [(node.N, node.W, node.Q) for node in (root, a, b, other)]
    assert statistics == [(3, 0.5, 0.5 / 3), (3, 0.5, 0.5 / 3), (2, 0.0, 0.0), (0, 0.0, 0.0)]


def test_duplicate_messages_are_merged_and_the_first_is_kept(duo):
    root = make_root("q")
    children = expand(duo, root, make_candidates("a", "b", "a", "c", "b"))
    assert children is root.children
    assert [child.message for child in children] == [("A", "a"), ("A", "b"), ("A", "c")]
    assert [child.candidate.tokens for child in children] == [0, 1, 3]
    assert [child.path for child in children] == [(0,), (1,), (3,)]
    assert all(child.parent is root for child in children)


# ---- The driver ----------------------------------------------------------------------------------


@pytest.mark.parametrize("max_active", [7, 100])
def test_searches_that_advance_together_give_the_trees_of_one_by_one(max_active):
    problems = make_problems(20)
    one_by_one = label(problems, "--num-simulations", 12, "--max-active", 1)
    assert len(one_by_one) == 20
    assert label(problems, "--num-simulations", 12, "--max-active", max_active) == one_by_one


def test_cheap_requests_are_answered_first_for_as_many_searches_as_may_be_active():
    """Odd searches ask for a score first; then all of them wait for one large batch."""
    order = []

    def search(index):
        score = (yield Score([])) if index % 2 else None
        message = yield Sample([], 1)
        return score, message

    def handler_named(name):
        def answer(requests):
            order.append((name, [problem.id for problem, _ in requests]))
            return [(f"{name} of {p.id}", Cost(agent_calls=1, seconds=0.5)) for p, _ in requests]

        return answer

    progress = Progress(shown=True)
    with progress.over("searches", 6, unit="problems"):
        finished = run_searches(
            [(problem, search(index)) for index, problem in enumerate(make_problems(6))],
            {Score: handler_named("score"), Sample: handler_named("message")},
            max_active=4,
            progress=progress,
        )
        results = {problem.id: (result, cost) for problem, result, cost in finished}
        assert progress.bar.n == len(results) == 6
    assert order == [
        ("score", ["p1", "p3"]),
        ("message", ["p0", "p2", "p1", "p3"]),
        ("score", ["p5"]),
        ("message", ["p4", "p5"]),
    ]
    # Costs go to the search that caused them.
    assert results["p2"] == ((None, "message of p2"), Cost(agent_calls=1, seconds=0.5))
    expected = ("score of p3", "message of p3")
    assert results["p3"] == (expected, Cost(agent_calls=2, seconds=1.0))


@pytest.mark.parametrize("culprits", [{"p2"}, {"p0", "p5"}, {f"p{index}" for index in range(6)}])
def test_a_request_that_is_too_long_stops_the_search_of_its_problem_alone(culprits, capsys):
    def search():
        return (yield Sample([], 1))

    def handler(requests):
        if culprits & {problem.id for problem, _ in requests}:
            raise TooLong("900 tokens")
        return [(f"reply to {problem.id}", Cost(agent_calls=1)) for problem, _ in requests]

    searches = [(problem, search()) for problem in make_problems(6)]
    options = {"max_active": 4, "progress": Progress(shown=False)}
    results = {
        p.id: result for p, result, _ in run_searches(searches, {Sample: handler}, **options)
    }
    assert len(results) == 6
    for name, result in results.items():
        assert isinstance(result, TooLong) if name in culprits else result == f"reply to {name}"
    printed = capsys.readouterr().err
    assert {name for name in results if f"{name} is refused: 900 tokens" in printed} == culprits


# ---- Records and labels --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records() -> list[dict]:
    """Trees of the chain, as they are read from a file."""
    trees = label(make_problems(6), "--num-simulations", 15)
    return json.loads(json.dumps(list(trees.values())))


def test_a_search_can_be_replayed_from_its_record(records):
    """Backing up the terminal nodes of each simulation gives N and W of every node."""
    for record in records:
        visits, totals = Counter(), Counter()
        for leaf in sum(record["simulations"], []):
            index = leaf
            while index is not None:
                visits[index] += 1
                totals[index] += record["nodes"][leaf]["reward"]
                index = record["nodes"][index]["parent"]
        for index, node in enumerate(record["nodes"]):
            assert (node["N"], node["W"]) == (visits[index], totals[index])
            # A fresh terminal state is counted, and so is each sibling of it.
            assert node["N"] > 0 or "reward" not in node


def test_every_visited_edge_is_labelled_exactly_once_with_its_q(chain, records):
    for record in records:
        nodes = record["nodes"]
        labelled = []
        for path in tree_paths(record, chain, "search"):
            for edge, next_edge in zip(path, path[1:], strict=False):
                assert next_edge.parent == edge.node  # from the root down, without gaps
            # Up to a leaf: no child of the last node was visited.
            assert not any(node["parent"] == path[-1].node and node["N"] for node in nodes)
            labelled += path
        visited = [index for index in range(1, len(nodes)) if nodes[index]["N"] > 0]
        assert sorted(edge.node for edge in labelled) == visited
        assert len({edge.y for edge in labelled}) > 2
        for edge in labelled:
            node = nodes[edge.node]
            assert (edge.y, edge.visits) == (node["W"] / node["N"], node["N"])
            assert (edge.parent, edge.agent) == (node["parent"], node["agent"])
            assert edge.problem_id == record["id"]
            spoken = []
            while node["parent"] is not None:
                spoken.append((node["agent"], node["message"]))
                node = nodes[node["parent"]]
            assert edge.state == State(record["question"], tuple(spoken[::-1]))


def test_label_paths_by_hand(duo):
    """a0 leads to a right and a wrong answer; a1 is never visited.

    So there is one path of two edges, and one of one edge. The ORM learns terminal states.
    """
    problem = Problem("p", "train", "q", "B", "letter")
    root = make_root("q")
    a0, _ = expand(duo, root, make_candidates("a0", "a1"))
    right, wrong = expand(duo, a0, make_candidates("Final answer: (b)", "No idea."))
    right.outcome, wrong.outcome = 1.0, -1.0
    for leaf in (wrong, right, right):
        backup(leaf, leaf.outcome)
    record = tree_record(problem, root, Cost(), duo)

    def labels(target):
        paths = []
        for path in tree_paths(record, duo, target):
            paths.append([(edge.parent, edge.node, edge.y) for edge in path])
        return paths

    assert labels("search") == [[(0, 1, 1 / 3), (1, 2, 1.0)], [(1, 3, -1.0)]]
    assert labels("outcome") == [[(1, 2, 1.0)], [(1, 3, -1.0)]]
