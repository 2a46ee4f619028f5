"""Tests of metrics.py: how good V is, and paired comparisons of answers, worked out by hand."""

import numpy as np
import pytest

from mas import State
from support import statistics as metrics
from support.statistics import (
    auc,
    bootstrap_interval,
    calibration_error,
    paired,
    seeds_and_problems,
    seeds_and_problems_difference,
    value_metrics,
    wilson,
    within_runs_difference,
)
from tree import Edge

# ---- V against labels ----------------------------------------------------------------------------


def make_edge(problem_id, parent, y):
    return Edge(
        problem_id=problem_id,
        split="heldout",
        node=parent + 1,
        parent=parent,
        agent="Solver",
        state=State("q", ()),
        y=y,
        visits=1,
    )


def solver_metrics(labels, values):
    """Return the metrics of V on states of the Solver. labels: (problem, parent, y) of each."""
    edges = [make_edge(*label) for label in labels]
    return value_metrics(edges, values)["Solver"]


def test_auc_by_hand():
    assert auc([0.9, 0.1], [True, False]) == 1.0
    assert auc([0.1, 0.9], [True, False]) == 0.0
    assert auc([0.5, 0.5], [True, False]) == 0.5
    # Of the four pairs of a right and a wrong state, 0.4 against 0.6 is in the wrong order.
    assert auc([0.8, 0.6, 0.4, 0.2], [True, False, True, False]) == 0.75


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
    assert metrics["sibling_groups"] == 2
    assert metrics["top1"] == 0.0
    assert metrics["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)

    squared_errors = []
    for (_, _, y), value in zip(LABELS, VALUES, strict=True):
        squared_errors.append((value - y) ** 2)
    assert metrics["rmse"] == pytest.approx((sum(squared_errors) / 7) ** 0.5)


def test_calibration_error_by_hand():
    """The ten bins of V have width 0.2. A bin adds |sum of V - sum of y| / number of states."""
    v = np.array([0.35, 0.25, 0.45, -0.55])
    y = np.array([1.0, -1.0, 1.0, -0.5])
    # Too high by 0.6 in [0.2, 0.4), too low by 0.55 in [0.4, 0.6) and by 0.05 in [-0.6, -0.4).
    assert calibration_error(v, y) == pytest.approx((0.6 + 0.55 + 0.05) / 4)

    errors_of_bins = [
        abs((0.9 + 0.95 + 0.8) - (1 - 1 - 1)),  # [0.8, 1]
        abs((-0.9 - 0.8) - (1 - 0.5)),  # [-1, -0.8], the same in one bin or in two
        abs((0.1 + 0.0) - (0.5 + 0.5)),  # [0, 0.2)
    ]
    by_hand = sum(errors_of_bins) / 7
    assert solver_metrics(LABELS, VALUES)["ece"] == pytest.approx(by_hand)


def test_v_of_1_is_in_the_last_bin():
    """[0.8, 1] holds both states. In bins of their own, their errors would not cancel."""
    error = calibration_error(np.array([1.0, 0.9]), np.array([0.8, 1.0]))
    assert error == pytest.approx(0.05)


def test_correlation_and_the_error_of_the_best_constant_by_hand():
    """The mean of y is 0.25: deviations 0.75, -1.25, 0.25 and 0.25. That of V is 0."""
    labels = [("a", 0, 1.0), ("a", 1, -1.0), ("b", 2, 0.5), ("b", 3, 0.5)]
    metrics = solver_metrics(labels, [0.5, -0.5, 0.25, -0.25])
    assert metrics["rmse_of_mean"] == pytest.approx((2.25 / 4) ** 0.5)
    assert metrics["pearson"] == pytest.approx(1 / (2.25 * 0.625) ** 0.5)


def test_a_state_is_right_if_its_label_is_positive_and_0_is_neither():
    labels = [("a", 0, 0.25), ("a", 0, -0.25), ("a", 0, 0.0)]
    assert solver_metrics(labels, [0.2, 0.1, 0.9])["auc"] == 1.0


def test_a_v_that_only_knows_the_problem_scores_chance():
    """Problem d is the easiest and has the largest V. Over all problems, AUC would be 0.75."""
    right_of_five = {"a": 1, "b": 2, "c": 3, "d": 4}
    labels, values, is_right = [], [], []
    for problem_id, num_right in right_of_five.items():
        for index in range(5):
            y = 1.0 if index < num_right else -1.0
            labels.append((problem_id, 0, y))
            values.append(num_right / 5)
            is_right.append(y > 0)
    assert auc(values, is_right) == 0.75
    assert solver_metrics(labels, values)["auc"] == 0.5


def test_a_constant_v_chooses_siblings_by_chance():
    labels = [("a", 0, 1.0), ("a", 0, -1.0), ("a", 0, -1.0), ("b", 0, -1.0), ("b", 0, 0.5)]
    metrics = solver_metrics(labels, [0.3] * 5)
    assert metrics["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert metrics["top1"] == metrics["chance"]


def test_siblings_with_equal_labels_are_left_out_wherever_they_are():
    edges, values = [], []
    for parent, targets in enumerate([(1.0, 1.0), (1.0, -1.0), (-1.0, -1.0), (0.5, -1.0)]):
        for index, y in enumerate(targets):
            edges.append(make_edge("p", parent, y))
            values.append(-float(index))
    row = value_metrics(edges, values)["Solver"]
    assert (row["sibling_groups"], row["top1"], row["chance"]) == (2, 1.0, 0.5)


def test_a_tie_in_v_is_a_uniform_pick_among_the_tied_siblings():
    """The three groups of siblings, with the largest V tied in each:

    group  V                   y                tied  best of the tied
    a      0.4  0.4  0.1       1  -1   1        2     1 of 2
    b      0.2  0.2  0.2 -0.5  1   1  -1  -1    3     2 of 3
    c      0.0  0.7  0.7       1  -1  -1        2     0 of 2
    """
    groups = [
        ("a", [0.4, 0.4, 0.1], [1.0, -1.0, 1.0]),
        ("b", [0.2, 0.2, 0.2, -0.5], [1.0, 1.0, -1.0, -1.0]),
        ("c", [0.0, 0.7, 0.7], [1.0, -1.0, -1.0]),
    ]
    labels, values = [], []
    for problem_id, group_values, targets in groups:
        labels += [(problem_id, 0, y) for y in targets]
        values += group_values
    metrics = solver_metrics(labels, values)
    assert metrics["sibling_groups"] == 3
    assert metrics["top1"] == pytest.approx((1 / 2 + 2 / 3 + 0) / 3)
    assert metrics["chance"] == pytest.approx((2 / 3 + 2 / 4 + 1 / 3) / 3)


def test_metrics_that_do_not_exist_are_none():
    """One right state: no pair for an AUC, no siblings to choose from, no correlation."""
    metrics = solver_metrics([("a", 0, 1.0)], [0.3])
    for name in ("pearson", "auc", "auc_95", "top1", "chance"):
        assert metrics[name] is None
    assert metrics["auc_problems"] == 0
    assert metrics["sibling_groups"] == 0

    # Equal labels have no correlation with V, and a constant V has none with the labels.
    equal_labels = [("a", 0, 1.0), ("a", 1, 1.0)]
    assert solver_metrics(equal_labels, [0.3, 0.4])["pearson"] is None
    assert solver_metrics(LABELS, [0.3] * len(LABELS))["pearson"] is None


def test_auc_that_is_the_same_for_every_problem_has_no_interval():
    """An interval of no width would say that nothing is uncertain."""
    metrics = solver_metrics(LABELS, [y for _, _, y in LABELS])
    assert metrics["auc"] == 1.0 and metrics["auc_problems"] == 2
    assert metrics["auc_95"] is None


def test_the_bootstrap_interval_by_hand():
    assert bootstrap_interval([0.7] * 5) == (pytest.approx(0.7), pytest.approx(0.7))
    samples = list(np.linspace(0, 1, 101))
    low, high = bootstrap_interval(samples)
    standard_error = np.std(samples) / 101**0.5
    assert low == pytest.approx(0.5 - 1.96 * standard_error, abs=0.004)
    assert high == pytest.approx(0.5 + 1.96 * standard_error, abs=0.004)
    assert bootstrap_interval(samples) == (low, high)  # the same at every call


# ---- Answers -------------------------------------------------------------------------------------


def test_wilson_and_paired_by_hand():
    """Of ten problems, a is right on 8 and b on 5: four only by a, one only by b."""
    low, high = wilson(50, 100)
    assert low == pytest.approx(0.4038, abs=1e-4)
    assert high == pytest.approx(0.5962, abs=1e-4)

    a = [True] * 8 + [False] * 2
    b = [True] * 4 + [False] * 5 + [True]
    result = paired(a, b)
    assert result["wins"] == 4
    assert result["losses"] == 1
    assert result["difference"] == pytest.approx(0.3)
    assert result["p"] == pytest.approx(0.375)

    # Bonett and Price: one win, one loss and two problems are added.
    win_share, loss_share, n = 5 / 12, 2 / 12, 12
    difference = win_share - loss_share
    half_width = 1.959964 * ((win_share + loss_share - difference**2) / n) ** 0.5
    assert result["low"] == pytest.approx(difference - half_width)
    assert result["high"] == pytest.approx(difference + half_width)


def test_the_exact_p_does_not_depend_on_who_wins():
    """Five losses and one win: 2 * (1 + 6) / 2^6 of the fair coin's outcomes are as uneven."""
    losing, winning = [False] * 5 + [True], [True] * 5 + [False]
    for a, b in ((losing, winning), (winning, losing)):
        assert paired(a, b)["p"] == pytest.approx(2 * (1 + 6) / 2**6)


def test_two_methods_that_never_differ_have_p_1():
    assert paired([True], [True])["p"] == 1.0


def test_the_interval_of_a_difference_stays_between_minus_1_and_1():
    """With one problem, Bonett and Price: 1/3 +- 1.07."""
    won, lost = paired([True], [False]), paired([False], [True])
    assert won["low"] == pytest.approx(1 / 3 - 1.0669, abs=1e-4)
    assert won["high"] == 1
    assert lost["low"] == -1
    assert lost["high"] == pytest.approx(1.0669 - 1 / 3, abs=1e-4)


def test_a_bin_of_the_calibration_holds_its_lower_edge():
    """0 and 0.1 are in one bin, whose mean V is 0.05; alone, each of them would be far off."""
    assert calibration_error(np.array([0.0, 0.1]), np.array([1.0, -1.0])) == pytest.approx(0.05)


# ---- Runs that differ in their seed --------------------------------------------------------------


def test_one_run_has_the_interval_of_its_problems():
    low, high = wilson(3, 4)
    expected = {"mean": 0.75, "low": low, "high": high, "deviation": None}
    assert seeds_and_problems([[True, True, True, False]]) == expected
    a, b = [True, True, False], [False, True, False]
    assert seeds_and_problems_difference([a], [b]) == paired(a, b)


def test_noise_of_training_alone_widens_the_interval():
    """Each run is right on all problems or on none, so the problems do not matter.

    The variance of the mean of four runs of which two are right is 0.5 * 0.5 / 3: the unbiased
    estimate of the variance of a run, divided by 4.
    """
    runs = [[True] * 50, [True] * 50, [False] * 50, [False] * 50]
    result = seeds_and_problems(runs)
    assert result["mean"] == pytest.approx(0.5)
    assert result["deviation"] == pytest.approx((0.25 * 4 / 3) ** 0.5)
    assert (result["low"], result["high"]) == pytest.approx((0, 1))

    rng = np.random.default_rng(0)
    means = metrics._resampled_means(np.array(runs, float), metrics._draw_problems(50, rng), rng)
    assert means.std() == pytest.approx((0.25 / 3) ** 0.5, rel=0.05)
    # Of two runs, the variance is 0.5 * 0.5 / 1.
    means = metrics._resampled_means(
        np.array(runs[1:3], float), metrics._draw_problems(50, rng), rng
    )
    assert means.std() == pytest.approx(0.5, rel=0.05)


def test_noise_of_problems_alone_is_that_of_one_run():
    """Equal runs add nothing to what one of them says: half-width 1.96 sqrt(0.25 / 400)."""
    run = [True, False] * 200
    result = seeds_and_problems([run, run, run])
    assert result["mean"] == 0.5
    assert result["deviation"] == 0
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * 0.025, rel=0.05)


def test_runs_that_are_all_alike_are_not_certain():
    """No resample differs, so the interval is that of one run."""
    right = [True] * 10
    result = seeds_and_problems([right, right])
    assert (result["mean"], (result["low"], result["high"])) == (1.0, wilson(10, 10))
    one = paired(right, right)
    for compare in (seeds_and_problems_difference, within_runs_difference):
        result = compare([right, right], [right, right])
        assert (result["difference"], result["low"], result["high"]) == (0, one["low"], one["high"])
    assert one["low"] < -0.1


def test_groups_may_have_different_numbers_of_runs():
    right, wrong = [True] * 20, [False] * 20
    one = seeds_and_problems_difference([right], [right, wrong])
    assert one["difference"] == 0.5
    assert (one["low"], one["high"]) == pytest.approx((0, 1))
    other = seeds_and_problems_difference([right, wrong], [right])
    assert other["difference"] == -0.5
    assert (other["low"], other["high"]) == pytest.approx((-1, 0))
    three = seeds_and_problems_difference([right, wrong, right], [wrong, wrong])
    assert three["difference"] == pytest.approx(2 / 3)


def test_groups_are_compared_on_the_same_problems():
    """Hard problems are hard for both groups, so they are no noise of the difference."""
    easy = [True] * 20 + [False] * 20
    same, one_run = seeds_and_problems_difference([easy, easy], [easy, easy]), paired(easy, easy)
    assert same == {"difference": 0.0, "low": one_run["low"], "high": one_run["high"]}
    better = [True] * 30 + [False] * 10
    result = seeds_and_problems_difference([better, better], [easy, easy])
    assert result["difference"] == pytest.approx(0.25)
    # 10 of 40 problems are won: half-width 1.96 sqrt(0.25 * 0.75 / 40).
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * 0.0685, rel=0.08)


def test_the_noise_of_both_groups_counts():
    """Runs of a group differ, the other's do not: it has the difference's noise alone.

    With both, the runs are drawn independently, so that the variances add up.
    """
    mixed = [[True] * 9, [False] * 9, [True] * 9, [False] * 9]
    constant = [[False] * 9] * 4
    one = seeds_and_problems_difference(mixed, constant)
    other = seeds_and_problems_difference(constant, mixed)
    both = seeds_and_problems_difference(mixed, mixed)
    assert (one["difference"], other["difference"], both["difference"]) == (0.5, -0.5, 0)
    assert (one["low"], one["high"]) == pytest.approx((0, 1))
    assert (other["low"], other["high"]) == pytest.approx((-1, 0))
    assert both["low"] < -0.5 and both["high"] > 0.5


def test_methods_of_the_same_runs_share_the_luck_of_their_run():
    """Both methods are right in lucky runs and wrong in others: their difference has no noise."""
    lucky, unlucky = [True] * 9, [False] * 9
    runs = [lucky, unlucky, lucky, unlucky]
    same = within_runs_difference(runs, runs)
    alike = paired(lucky, lucky)
    assert (same["difference"], same["low"], same["high"]) == (0, alike["low"], alike["high"])
    # Better in every second run: the mean of 0.5 varies from 0 to 1 with the runs that are drawn.
    result = within_runs_difference([lucky] * 4, runs)
    assert result["difference"] == 0.5
    assert (result["low"], result["high"]) == pytest.approx((0, 1))
    assert within_runs_difference(runs, [lucky] * 4)["difference"] == -0.5


def test_methods_of_the_same_runs_meet_on_the_same_problems():
    """Better on 10 of 40 problems in each run: half-width 1.96 sqrt(0.25 * 0.75 / 40)."""
    a, b = [True] * 30 + [False] * 10, [True] * 20 + [False] * 20
    result = within_runs_difference([a, a], [b, b])
    assert result["difference"] == 0.25
    assert result["high"] - result["low"] == pytest.approx(2 * 1.96 * 0.0685, rel=0.08)
    assert within_runs_difference([a], [b]) == paired(a, b)
