"""How good V is, and how good answers are: pure functions of labels, values and verdicts.

Intervals are 95 %, over problems, which are taken as independent of each other: with problems that
are variants of one another, intervals are too narrow. Nothing here knows a model.
"""

import math
from collections import defaultdict

import numpy as np
import scipy.stats

from tree import Edge

NUM_RESAMPLES = 2000  # of a bootstrap

# ---- V against the labels of held-out problems ---------------------------------------------------


def auc(values: list[float], is_right: list[bool]) -> float:
    """Return P(V of a right state > V of a wrong one): the area under the ROC curve.

    A tie counts one half.
    """
    ranks = scipy.stats.rankdata(values)
    num_right = sum(is_right)
    num_wrong = len(is_right) - num_right
    ranks_of_right = sum(rank for rank, right in zip(ranks, is_right, strict=True) if right)
    smallest_possible = num_right * (num_right + 1) / 2
    return (ranks_of_right - smallest_possible) / (num_right * num_wrong)


def bootstrap_interval(samples: list[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, over problems."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(samples), size=(NUM_RESAMPLES, len(samples))).mean(1)
    return _percentiles(means)


def _auc_interval(aucs: list[float]) -> tuple[float, float] | None:
    """Return the interval of the mean; None if all are equal: nothing tells their spread."""
    return bootstrap_interval(aucs) if len(set(aucs)) > 1 else None


def calibration_error(v: np.ndarray, y: np.ndarray) -> float:
    """Return the expected calibration error, in units of V.

    That is |mean V - mean y| in each of ten equal bins of V, weighted by how many states it holds.
    """
    bins = np.minimum((v + 1) / 2 * 10, 9).astype(int)
    error = 0.0
    for index in np.unique(bins):
        in_bin = bins == index
        error += abs(v[in_bin].mean() - y[in_bin].mean()) * in_bin.mean()
    return float(error)


def value_metrics(edges: list[Edge], values: list[float]) -> dict[str, dict]:
    """Return how well V predicts the held-out labels, per agent (see `agent_metrics`)."""
    edges_of_agent, values_of_agent = defaultdict(list), defaultdict(list)
    for edge, value in zip(edges, values, strict=True):
        edges_of_agent[edge.agent].append(edge)
        values_of_agent[edge.agent].append(value)
    report = {}
    for agent, agent_edges in edges_of_agent.items():
        report[agent] = agent_metrics(agent_edges, values_of_agent[agent])
    return report


def agent_metrics(edges: list[Edge], values: list[float]) -> dict:
    """Return the metrics of V on the states after one agent's messages.

    rmse, rmse_of_mean: of V against y, and of the best constant.
    ece: see `calibration_error`.
    pearson: correlation of V and y.
    auc: right (y > 0) against wrong (y < 0) states of the same problem, averaged over the
        `auc_problems` that have both, with interval `auc_95`. Separating easy from hard problems
        does not raise it.
    top1: how often the sibling with the largest V has the largest y, among visited siblings with
        different y (`sibling_groups` of them). `chance`: a uniform pick among the same siblings.
    """
    y = np.array([edge.y for edge in edges])
    v = np.array(values)
    both_vary = np.std(v) > 0 and np.std(y) > 0
    aucs = problem_aucs([edge.problem_id for edge in edges], [edge.y for edge in edges], values)
    hits, chances = sibling_choices(edges, values)
    return {
        "n": len(edges),
        "rmse": float(np.sqrt(np.mean((v - y) ** 2))),
        "rmse_of_mean": float(np.std(y)),
        "ece": calibration_error(v, y),
        "pearson": float(np.corrcoef(v, y)[0, 1]) if both_vary else None,
        "auc": float(np.mean(aucs)) if aucs else None,
        "auc_95": _auc_interval(aucs),
        "auc_problems": len(aucs),
        "top1": float(np.mean(hits)) if hits else None,
        "chance": float(np.mean(chances)) if chances else None,
        "sibling_groups": len(hits),
    }


def problem_aucs(problem_ids: list[str], targets: list[float], values: list[float]) -> list[float]:
    """Return the AUC within each problem that has both right (y > 0) and wrong (y < 0) states.

    Args:
        problem_ids, targets, values: of each state its problem, y and V.
    """
    states_of_problem = defaultdict(list)
    for problem_id, y, value in zip(problem_ids, targets, values, strict=True):
        if y != 0:
            states_of_problem[problem_id].append((value, y > 0))
    aucs = []
    for states in states_of_problem.values():
        problem_values, is_right = zip(*states, strict=True)
        if len(set(is_right)) == 2:
            aucs.append(auc(problem_values, is_right))
    return aucs


def sibling_choices(edges: list[Edge], values: list[float]) -> tuple[list[float], list[float]]:
    """Return, per group of siblings with different y, the success of V's choice and of chance.

    A tie in V is a uniform pick among the tied siblings.
    """
    siblings = defaultdict(list)
    for edge, value in zip(edges, values, strict=True):
        siblings[edge.problem_id, edge.parent].append((value, edge.y))
    hits, chances = [], []
    for group in siblings.values():
        targets = [y for _, y in group]
        largest_y = max(targets)
        if min(targets) == largest_y:
            continue
        largest_v = max(value for value, _ in group)
        targets_of_choice = [y for value, y in group if value == largest_v]
        hits.append(np.mean([y == largest_y for y in targets_of_choice]))
        chances.append(np.mean([y == largest_y for y in targets]))
    return hits, chances


# ---- Answers: exact match and paired comparisons -------------------------------------------------


def wilson(num_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the share of right answers among n problems."""
    test = scipy.stats.binomtest(num_right, n)
    interval = test.proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired(a: list[bool], b: list[bool]) -> dict:
    """Compare two methods on the same problems.

    Returns the exact match of a minus that of b, its 95 % interval (Bonett and Price 2012), the
    problems that only one of them answers right, and the exact McNemar p.
    """
    n = len(a)
    wins, losses = 0, 0
    for a_is_right, b_is_right in zip(a, b, strict=True):
        wins += a_is_right and not b_is_right
        losses += b_is_right and not a_is_right
    # The interval adds one win and one loss, and is centred on the adjusted difference.
    win_share = (wins + 1) / (n + 2)
    loss_share = (losses + 1) / (n + 2)
    difference = win_share - loss_share
    variance = (win_share + loss_share - difference**2) / (n + 2)
    half_width = scipy.stats.norm.ppf(0.975) * math.sqrt(variance)
    p = 1.0
    if wins + losses > 0:
        p = float(scipy.stats.binomtest(wins, wins + losses).pvalue)
    return {
        "difference": (wins - losses) / n,
        "low": max(-1.0, difference - half_width),
        "high": min(1.0, difference + half_width),
        "wins": wins,
        "losses": losses,
        "p": p,
    }


# ---- Several runs of one kind: training seeds ----------------------------------------------------


def seeds_and_problems(verdicts: list[list[bool]]) -> dict:
    """Return the mean exact match of runs that differ in their seed, with its interval.

    mean, low, high: with several runs, runs and problems are both resampled; with one, `wilson`,
        and also if all verdicts are equal: no resample differs then, but nothing is certain.
    deviation: standard deviation of the exact match over the runs alone; None if there is one.

    Args:
        verdicts: whether each run is right on each problem: [runs][problems].
    """
    right = np.asarray(verdicts, dtype=float)
    num_runs, n = right.shape
    if num_runs == 1:
        low, high = wilson(int(right.sum()), n)
        return {"mean": float(right.mean()), "low": low, "high": high, "deviation": None}
    rng = np.random.default_rng(0)
    means = _resampled_means(right, _draw_problems(n, rng), rng)
    low, high = _interval(means, of_one_run=wilson(int(right[0].sum()), n))
    deviation = float(right.mean(1).std(ddof=1))
    return {"mean": float(right.mean()), "low": low, "high": high, "deviation": deviation}


def seeds_and_problems_difference(a: list[list[bool]], b: list[list[bool]]) -> dict:
    """Compare two kinds of runs on the same problems: the mean of a minus that of b, its interval.

    The problems are resampled together, the runs of a and of b each on their own. The noise of
    training is left out for a kind with a single run. One run against one is `paired`, and so is
    the interval if no resample differs.
    """
    if len(a) == len(b) == 1:
        return paired(a[0], b[0])
    right_a, right_b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    rng = np.random.default_rng(0)
    problems = _draw_problems(right_a.shape[1], rng)
    means_a = _resampled_means(right_a, problems, rng)
    means_b = _resampled_means(right_b, problems, rng)
    one_run = paired(a[0], b[0])
    low, high = _interval(means_a - means_b, of_one_run=(one_run["low"], one_run["high"]))
    return {"difference": float(right_a.mean() - right_b.mean()), "low": low, "high": high}


def within_runs_difference(a: list[list[bool]], b: list[list[bool]]) -> dict:
    """Compare two methods in the same runs, on the same problems: the mean of a minus that of b.

    Runs and problems are both resampled, together for a and b. A single run is `paired`, and so is
    the interval if no resample differs.
    """
    if len(a) == 1:
        return paired(a[0], b[0])
    differences = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(0)
    problems = _draw_problems(differences.shape[1], rng)
    means = _resampled_means(differences, problems, rng)
    one_run = paired(a[0], b[0])
    low, high = _interval(means, of_one_run=(one_run["low"], one_run["high"]))
    return {"difference": float(differences.mean()), "low": low, "high": high}


def _draw_problems(n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n problems of n, with replacement: share of each problem, [resamples, problems]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES) / n


def _resampled_means(
    right: np.ndarray, problems: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return the mean of each resample: [resamples]. right: [runs, problems], or a difference.

    Of S runs, S - 1 are drawn: drawing S of so few would make the interval too narrow, as the
    variance of S draws is (S - 1) / S of what it should be.
    """
    num_runs = len(right)
    num_drawn = max(1, num_runs - 1)
    runs = rng.multinomial(num_drawn, np.full(num_runs, 1 / num_runs), size=NUM_RESAMPLES)
    return np.einsum("kr,rp,kp->k", runs / num_drawn, right, problems)


# Resampled means that differ by less than this differ by rounding only.
SMALLEST_WIDTH = 1e-9


def _interval(means: np.ndarray, *, of_one_run: tuple[float, float]) -> tuple[float, float]:
    """Return the 95 % interval of resampled means; if they are all equal, that of one run."""
    low, high = _percentiles(means)
    return of_one_run if high - low < SMALLEST_WIDTH else (low, high)


def _percentiles(means: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)
