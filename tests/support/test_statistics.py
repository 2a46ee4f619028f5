"""Tests of support/statistics.py: how good V is, and paired comparisons, worked out by hand."""

import numpy as np
import pytest

from experiments.compare import (
    seeds_and_problems,
    seeds_and_problems_difference,
    within_runs_difference,
)
from mas import State
from support.statistics import (
    auc,
    bootstrap_interval,
    calibration_error,
    paired,
    problem_aucs,
    value_metrics,
    wilson,
)
from tree import Edge

# ---- V against labels ----------------------------------------------------------------------------


def solver_metrics(labels, values):
    """Return the metrics of V on states of the Solver. labels: (problem, parent, y) of each."""
    edges = []
    for problem_id, parent, y in labels:
        edges.append(Edge(problem_id, 9, parent, "Solver", State("q", ()), y, visits=1))
    return value_metrics(edges, values)["Solver"]


def test_auc_is_the_share_of_pairs_in_order_and_a_tie_is_half():
    assert [auc([v, 0.5], [True, False]) for v in (0.9, 0.5, 0.1)] == [1.0, 0.5, 0.0]
    # Of the four pairs of a right and a wrong state, 0.4 against 0.6 is in the wrong order.
    assert auc([0.8, 0.6, 0.4, 0.2], [True, False, True, False]) == 0.75
    assert auc([0.8, 0.4, 0.4, 0.4], [True, False, True, False]) == 0.75


# Problem a is easy (every V is high), problem b is hard (V is low at its root).
LABELS = [  # (problem, parent, y)
    ("a", 0, 1.0),
    ("a", 0, -1.0),
    ("a", 0, -1.0),
    ("b", 0, 1.0),
    ("b", 0, -0.5),
    ("b", 1, 0.5),
    ("b", 1, 0.5),
]
VALUES = [0.9, 0.8, 0.95, -0.9, -0.8, 0.1, 0.0]


def test_metrics_by_hand():
    """AUC is within problems, so that it does not reward knowing which problem is easy.

    a: 1 of 2 pairs is in order. b: 2 of 3, because the right state at -0.9 is below the wrong one.
    V picks a wrong sibling in both groups; the siblings under (b, 1) are equally good.
    """
    metrics = solver_metrics(LABELS, VALUES)
    assert metrics["n"] == 7
    assert metrics["auc"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert metrics["auc_problems"] == 2
    assert metrics["auc_95"] == bootstrap_interval([1 / 2, 2 / 3])
    assert (metrics["sibling_groups"], metrics["top1"]) == (2, 0.0)
    assert metrics["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    errors = [value - y for (_, _, y), value in zip(LABELS, VALUES, strict=True)]
    assert metrics["rmse"] == pytest.approx((sum(error**2 for error in errors) / 7) ** 0.5)
    assert metrics["rmse_of_mean"] == pytest.approx(np.std([y for _, _, y in LABELS]))
    assert metrics["ece"] == calibration_error(np.array(VALUES), np.array([y for *_, y in LABELS]))


CALIBRATIONS = [  # V, y, and the sum over ten bins of |sum of V - sum of y|
    # Too high by 0.6 in [0.2, 0.4), too low by 0.55 in [0.4, 0.6) and by 0.05 in [-0.6, -0.4).
    ([0.35, 0.25, 0.45, -0.55], [1.0, -1.0, 1.0, -0.5], 0.6 + 0.55 + 0.05),
    # V of 1 is in the last bin, and a bin holds its lower edge: these errors cancel.
    ([1.0, 0.9], [0.8, 1.0], 0.1),
    ([0.0, 0.1], [1.0, -1.0], 0.1),
]


@pytest.mark.parametrize("v, y, total", CALIBRATIONS)
def test_calibration_error_by_hand(v, y, total):
    assert calibration_error(np.array(v), np.array(y)) == pytest.approx(total / len(v))


def test_a_v_that_only_knows_the_problem_scores_chance():
    """Problem d is the easiest and has the largest V. Over all problems, AUC would be 0.75."""
    ids, targets, values = [], [], []
    for num_right, problem_id in enumerate("abcd", 1):
        ids += [problem_id] * 5
        targets += [1.0] * num_right + [-1.0] * (5 - num_right)
        values += [num_right / 5] * 5
    assert auc(values, [y > 0 for y in targets]) == 0.75
    assert problem_aucs(ids, targets, values) == [0.5] * 4
    # A label of 0 is neither right nor wrong; a problem with one kind of states has no AUC.
    ids, targets = ["a", "a", "a", "b", "b"], [0.25, -0.25, 0.0, 1.0, 0.5]
    assert problem_aucs(ids, targets, [0.2, 0.1, 0.9, 0.2, 0.1]) == [1.0]


def test_a_tie_in_v_is_a_uniform_pick_among_the_tied_siblings():
    """The groups of siblings, with the largest V tied in the first three:

    group  V                   y                tied  best of the tied
    a      0.4  0.4  0.1       1  -1   1        2     1 of 2
    b      0.2  0.2  0.2 -0.5  1   1  -1  -1    3     2 of 3
    c      0.0  0.7  0.7       1  -1  -1        2     0 of 2
    d      0.0  0.1            0.5 0.5          equal labels: left out
    """
    values = [0.4, 0.4, 0.1, 0.2, 0.2, 0.2, -0.5, 0.0, 0.7, 0.7, 0.0, 0.1]
    targets = [1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, -1.0, -1.0, 0.5, 0.5]
    labels = [(problem, 0, y) for problem, y in zip("aaabbbbcccdd", targets, strict=True)]
    metrics = solver_metrics(labels, values)
    assert metrics["sibling_groups"] == 3
    assert metrics["top1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert metrics["chance"] == pytest.approx((2 / 3 + 2 / 4 + 1 / 3) / 3)


def test_metrics_that_do_not_exist_are_none():
    """One right state: no pair for an AUC, no siblings to choose from."""
    metrics = solver_metrics([("a", 0, 1.0)], [0.3])
    assert [metrics[name] for name in ("auc", "auc_95", "top1", "chance")] == [None] * 4
    # AUC that is the same for every problem has no interval: nothing tells its spread.
    metrics = solver_metrics(LABELS, [y for _, _, y in LABELS])
    assert (metrics["auc"], metrics["auc_problems"], metrics["auc_95"]) == (1.0, 2, None)


def test_the_bootstrap_interval_is_that_of_the_normal_distribution():
    samples = list(np.linspace(0, 1, 101))
    low, high = bootstrap_interval(samples)
    half_width = 1.96 * np.std(samples) / 101**0.5
    assert (low, high) == pytest.approx((0.5 - half_width, 0.5 + half_width), abs=0.004)
    assert bootstrap_interval(samples) == (low, high)  # the same at every call


# ---- Answers -------------------------------------------------------------------------------------


def test_wilson_and_paired_by_hand():
    """Of ten problems, a is right on 8 and b on 5: four only by a, one only by b."""
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)
    a = [True] * 8 + [False] * 2
    b = [True] * 4 + [False] * 5 + [True]
    # Bonett and Price: one win, one loss and two problems are added.
    win_share, loss_share, n = 5 / 12, 2 / 12, 12
    center = win_share - loss_share
    half_width = 1.959964 * ((win_share + loss_share - center**2) / n) ** 0.5
    expected = {"difference": 0.3, "low": center - half_width, "high": center + half_width}
    # Of five that differ, one loss or none, and the same of wins: 2 * (1 + 5) / 2^5.
    assert paired(a, b) == pytest.approx(expected | {"wins": 4, "losses": 1, "p": 0.375})
    other = paired(b, a)
    assert (other["difference"], other["p"]) == pytest.approx((-0.3, 0.375))


def test_a_difference_stays_between_minus_1_and_1():
    """With one problem, Bonett and Price: 1/3 +- 1.07. Methods that never differ have p = 1."""
    won, lost = paired([True], [False]), paired([False], [True])
    assert (won["low"], won["high"]) == (pytest.approx(1 / 3 - 1.0669, abs=1e-4), 1)
    assert (lost["low"], lost["high"]) == (-1, pytest.approx(1.0669 - 1 / 3, abs=1e-4))
    assert paired([True], [True])["p"] == 1.0


# ---- Runs that differ in their seed --------------------------------------------------------------

RIGHT, WRONG = [True] * 40, [False] * 40
COMPARISONS = (seeds_and_problems_difference, within_runs_difference)


def interval(result):
    return result["low"], result["high"]


def test_one_run_has_the_interval_of_its_problems():
    low, high = wilson(3, 4)
    expected = {"mean": 0.75, "low": low, "high": high, "deviation": None}
    assert seeds_and_problems([[True, True, True, False]]) == expected
    for compare in COMPARISONS:
        assert compare([[True, True, False]], [[False, True, False]]) == (
            paired([True, True, False], [False, True, False])
        )


def test_runs_that_are_all_alike_have_the_interval_of_one():
    result = seeds_and_problems([RIGHT, RIGHT])
    assert (result["mean"], interval(result)) == (1.0, wilson(40, 40))
    for compare in COMPARISONS:
        result = compare([RIGHT, RIGHT], [RIGHT, RIGHT])
        assert result["difference"] == 0
        assert interval(result) == interval(paired(RIGHT, RIGHT))


def test_the_noise_of_training_widens_the_interval():
    """Each run is right on all problems or on none, so the problems do not matter.

    Of 16 runs half are right: the variance of their mean is 0.25 / 15, that of a run, estimated
    without bias, divided by 16. A kind of run without noise adds none; two kinds add theirs.
    """
    runs = [RIGHT, WRONG] * 8
    result = seeds_and_problems(runs)
    assert (result["mean"], result["deviation"]) == pytest.approx((0.5, (0.25 * 16 / 15) ** 0.5))
    one = 2 * 1.96 * (0.25 / 15) ** 0.5
    assert result["high"] - result["low"] == pytest.approx(one, rel=0.08)
    for a, b, expected in ((runs, [WRONG], 0.5), ([RIGHT] * 2, runs, 0.5), (runs, runs, 0)):
        result = seeds_and_problems_difference(a, b)
        width = one if expected else one * 2**0.5
        assert result["difference"] == expected
        assert result["high"] - result["low"] == pytest.approx(width, rel=0.08)
    # Of six runs five are drawn, so that none of them is right in 3 % of the resamples.
    assert interval(seeds_and_problems([RIGHT, WRONG] * 3)) == pytest.approx((0, 1))
    # Methods of the same runs share the luck of their run: their difference has no noise.
    assert interval(within_runs_difference(runs, runs)) == interval(paired(RIGHT, RIGHT))
    result = within_runs_difference([RIGHT] * 16, runs)
    assert result["high"] - result["low"] == pytest.approx(one, rel=0.08)


def test_the_noise_of_problems_is_that_of_one_run():
    """Equal runs add nothing to what one of them says; hard problems are hard for both kinds."""
    run = [True, False] * 200
    result = seeds_and_problems([run, run, run])
    assert (result["mean"], result["deviation"]) == (0.5, 0)
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * 0.025, rel=0.05)
    a, b = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    for compare in COMPARISONS:
        result = compare([a, a], [b, b])
        assert result["difference"] == 0.25
        # 10 of 40 problems are won: half-width 1.96 sqrt(0.25 * 0.75 / 40).
        assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * 0.0685, rel=0.08)
