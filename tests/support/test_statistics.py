"""Tests of support/statistics.py: how good V is, and paired comparisons, worked out by hand."""

import numpy as np
import pytest

from experiments.compare import (
    seeds_and_problems,
    seeds_and_problems_difference,
    within_runs_difference,
)
from mas import State
from support.statistics import bootstrap_interval, calibration_error, paired, value_metrics, wilson
from tree import Edge

# ---- V against labels ----------------------------------------------------------------------------

# Problem a is easy (every V is high), problem b is hard (V is low at its root).
LABELS = [  # problem, parent, y and V
    ("a", 0, 1.0, 0.9),
    ("a", 0, -1.0, 0.8),
    ("a", 0, -1.0, 0.9),
    ("b", 0, 1.0, -0.9),
    ("b", 0, -0.5, -0.8),
    ("b", 1, 0.5, 0.1),
    ("b", 1, 0.5, 0.0),
    ("c", 0, 1.0, 0.2),
    ("c", 0, 0.5, 0.2),
    ("c", 0, 1.0, 0.2),
    ("c", 0, -1.0, 0.1),
    ("c", 0, 0.0, -0.5),
]


def test_metrics_by_hand():
    """AUC is within problems, so that it does not reward knowing which problem is easy.

    Pairs of a right and a wrong state in order, where a tie is half and y = 0 is neither:
        a: 1.5 of 2.  b: 2 of 3, the right state at -0.9 is below the wrong one.  c: 3 of 3.
    V's pick among siblings is uniform among the tied, of which the best are:
        a: 1 of 2.  b: 0 of 1; the siblings under (b, 1) are equally good.  c: 2 of 3.
    """
    targets, values = [y for _, _, y, _ in LABELS], [value for *_, value in LABELS]
    edges = []
    for problem_id, parent, y, _ in LABELS:
        edges.append(Edge(problem_id, 9, parent, "Solver", State("q", ()), y, visits=1))
    metrics = value_metrics(edges, values)["Solver"]
    assert metrics["n"] == 12
    assert metrics["auc"] == pytest.approx((3 / 4 + 2 / 3 + 1) / 3)
    assert metrics["auc_problems"] == 3
    assert metrics["auc_95"] == bootstrap_interval([3 / 4, 2 / 3, 1.0])
    assert metrics["sibling_groups"] == 3
    assert metrics["top1"] == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    assert metrics["chance"] == pytest.approx((1 / 3 + 1 / 2 + 2 / 5) / 3)
    errors = [value - y for y, value in zip(targets, values, strict=True)]
    assert metrics["rmse"] == pytest.approx((sum(error**2 for error in errors) / 12) ** 0.5)
    assert metrics["rmse_of_mean"] == pytest.approx(np.std(targets))
    assert metrics["ece"] == calibration_error(np.array(values), np.array(targets))


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
