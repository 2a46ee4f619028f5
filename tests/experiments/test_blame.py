"""Tests of experiments/blame.py: who lost a problem, worked by hand."""

import pytest

from experiments.blame import blame


def edge(node, parent, agent, value, label, problem_id="p"):
    fields = {"id": problem_id, "node": node, "parent": parent, "agent": agent}
    return fields | {"V": value, "y": label}


# Two facts; the first has two plans, each with one result; the second has one plan and two results.
EDGES = [
    edge(1, 0, "Reader", 0.25, 0.5),
    edge(2, 1, "Planner", 0.75, 1.0),
    edge(3, 2, "Solver", 1.0, 1.0),
    edge(4, 1, "Planner", -0.5, -1.0),
    edge(5, 4, "Solver", -1.0, -1.0),
    edge(6, 0, "Reader", -0.25, -1.0),
    edge(7, 6, "Planner", -0.5, -1.0),
    edge(8, 7, "Solver", -1.0, -1.0),
    edge(9, 7, "Solver", 0.5, -1.0),
]
# Three plans; the last falls below the mean of the others.
PLANS = [edge(1, 0, "P", 0.5, 1.0), edge(2, 0, "P", 0.25, 1.0), edge(3, 0, "P", -1.0, -1.0)]
ALONE = [edge(1, 0, "Reader", 0.9, -1.0), edge(2, 1, "Solver", -0.9, -1.0)]


@pytest.mark.parametrize(
    "edges, by, below, expected",
    [
        (EDGES, "V", "siblings", [(5, "Planner", 1.25), (8, "Solver", 1.5), (9, "Reader", 0.5)]),
        (EDGES, "y", "siblings", [(5, "Planner", 2.0), (8, "Reader", 1.5), (9, "Reader", 1.5)]),
        # Of node 8, Reader and Solver fall by 0.5: the first one is blamed.
        (EDGES, "V", "before", [(5, "Planner", 0.75), (8, "Reader", 0.5), (9, "Reader", 0.5)]),
        (PLANS, "V", "siblings", [(3, "P", 1.375)]),
        (ALONE, "V", "siblings", [(2, None, 0.0)]),
    ],
)
def test_the_message_with_the_largest_drop_is_blamed(edges, by, below, expected):
    lost = [("p", *answer) for answer in expected]
    assert blame(edges, by=by, below=below) == lost
    # Trees of different problems are not mixed.
    other = [each | {"id": "q"} for each in edges]
    assert blame(edges + other, by=by, below=below)[: len(lost)] == lost
