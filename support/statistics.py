"""How good V is, and how good answers are: pure functions of labels, values and verdicts.

Intervals are 95 %, over problems, which are taken as independent of each other: with problems that
are variants of one another, intervals are too narrow. Nothing here knows a model.
"""

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import numpy as np
import scipy.stats

from tree import Edge, Node

NUM_RESAMPLES = 2000  # of a bootstrap
QUANTILES = (0.025, 0.975)

# ---- V against the labels of held-out problems ---------------------------------------------------


def problem_aucs(problem_ids: list[str], targets: list[float], values: list[float]) -> list[float]:
    """Return the AUC within each problem that has both right (y > 0) and wrong (y < 0) states.

    The area under the ROC curve is P(V of a right state > V of a wrong one); a tie counts one half.
    problem_ids, targets, values: of each state its problem, y and V.
    """
    states_of_problem = defaultdict(list)
    for problem_id, y, value in zip(problem_ids, targets, values, strict=True):
        if y != 0:
            states_of_problem[problem_id].append((value, y > 0))
    aucs = []
    for states in states_of_problem.values():
        v, is_right = map(np.array, zip(*states, strict=True))
        if len(set(is_right)) == 2:
            differences = v[is_right][:, None] - v[~is_right]  # of every pair
            aucs.append(float((np.sign(differences).mean() + 1) / 2))
    return aucs


def bootstrap_interval(samples: list[float]) -> tuple[float, float]:
    """Return the 95 % percentile bootstrap interval of the mean, over problems."""
    rng = np.random.default_rng(0)
    means = rng.choice(np.asarray(samples), size=(NUM_RESAMPLES, len(samples))).mean(1)
    return tuple(np.quantile(means, QUANTILES).tolist())


def calibration_error(v: np.ndarray, y: np.ndarray) -> float:
    """Return the expected calibration error, in units of V.

    That is |mean V - mean y| in each of ten equal bins of V, weighted by how many states it holds.
    """
    bins = np.minimum((v + 1) / 2 * 10, 9).astype(int)
    errors = np.bincount(bins, weights=v - y)  # of each bin: mean error times number of states
    return float(np.abs(errors).sum() / len(v))


def value_metrics(edges: list[Edge], values: list[float]) -> dict[str, dict]:
    """Return how well V predicts the held-out labels, per agent (see `agent_metrics`)."""
    report = {}
    for agent in dict.fromkeys(edge.agent for edge in edges):
        own = [index for index, edge in enumerate(edges) if edge.agent == agent]
        report[agent] = agent_metrics([edges[i] for i in own], [values[i] for i in own])
    return report


def agent_metrics(edges: list[Edge], values: list[float]) -> dict:
    """Return the metrics of V on the states after one agent's messages.

    rmse, rmse_of_mean: of V against y, and of the best constant.
    ece: see `calibration_error`.
    auc: right (y > 0) against wrong (y < 0) states of the same problem, averaged over the
        `auc_problems` that have both, with interval `auc_95`: None if all are equal, as nothing
        tells their spread. Separating easy from hard problems does not raise it.
    top1: how often the sibling with the largest V has the largest y, among visited siblings with
        different y (`sibling_groups` of them). `chance`: a uniform pick among the same siblings.
    """
    y = np.array([edge.y for edge in edges])
    v = np.array(values)
    aucs = problem_aucs([edge.problem_id for edge in edges], [edge.y for edge in edges], values)
    hits, chances = sibling_choices(edges, values)
    return {
        "n": len(edges),
        "rmse": float(np.sqrt(np.mean((v - y) ** 2))),
        "rmse_of_mean": float(np.std(y)),
        "ece": calibration_error(v, y),
        "auc": float(np.mean(aucs)) if aucs else None,
        "auc_95": bootstrap_interval(aucs) if len(set(aucs)) > 1 else None,
        "auc_problems": len(aucs),
        "top1": float(np.mean(hits)) if hits else None,
        "chance": float(np.mean(chances)) if chances else None,
        "sibling_groups": len(hits),
    }


def sibling_choices(edges: list[Edge], values: list[float]) -> tuple[list[float], list[float]]:
    """Return, per group of siblings with different y, the success of V's choice and of chance.

    A tie in V is a uniform pick among the tied siblings.
    """
    siblings = defaultdict(list)
    for edge, value in zip(edges, values, strict=True):
        siblings[edge.problem_id, edge.parent].append((value, edge.y))
    hits, chances = [], []
    for group in siblings.values():
        v, y = np.array(group).T
        if y.min() < y.max():
            is_best = y == y.max()
            hits.append(is_best[v == v.max()].mean())
            chances.append(is_best.mean())
    return hits, chances


# ---- Finetuned agents ----------------------------------------------------------------------------


def by_agent(nodes: Iterable[Node]) -> dict[str, list[Node]]:
    nodes_of_agent = defaultdict(list)
    for node in nodes:
        nodes_of_agent[node.message.agent].append(node)
    return nodes_of_agent


def mean_of_known(numbers: Iterable[float | None]) -> float | None:
    """Return the mean of the numbers that are not None; None if there are none."""
    known = [number for number in numbers if number is not None]
    return statistics.fmean(known) if known else None


def agent_measures(
    rollouts: dict[Node, Any], outcomes: dict[Node, float | None]
) -> dict[str, dict]:
    """Return, per agent, how good its messages are, and how good V thinks they are.

    right: share of right final answers after its messages; None if nobody has answered.
    value: mean of (V + 1) / 2, which equals `right` if V is calibrated; None without V.
    value_auc: AUC of V against right and wrong states of the same problem, see `problem_aucs`.
    tokens, truncated: mean length, and the share of messages that were cut at their limit.

    rollouts: the messages, each with its problem. outcomes: the mean outcome below each message.
    """
    measures = {}
    for agent, nodes in by_agent(rollouts).items():
        ids = [rollouts[node].id for node in nodes]
        targets = [outcomes[node] for node in nodes]
        values = [node.V for node in nodes]
        aucs = []
        if None not in targets + values:
            aucs = problem_aucs(ids, targets, values)
        measures[agent] = {
            "messages": len(nodes),
            "tokens": statistics.fmean(node.candidate.tokens for node in nodes),
            "truncated": statistics.fmean(node.candidate.truncated for node in nodes),
            "right": _mean_share(targets),
            "value": _mean_share(values),
            "value_auc": mean_of_known(aucs),
        }
    return measures


def _mean_share(numbers: list[float | None]) -> float | None:
    """Return the mean of (x + 1) / 2, which maps [-1, 1] to [0, 1]."""
    mean = mean_of_known(numbers)
    return None if mean is None else (mean + 1) / 2


# ---- Answers: exact match and paired comparisons -------------------------------------------------


def wilson(num_right: int, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of the share of right answers among n problems."""
    interval = scipy.stats.binomtest(num_right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired(a: list[bool], b: list[bool]) -> dict:
    """Compare two methods on the same problems.

    Returns the exact match of a minus that of b, its 95 % interval (Bonett and Price 2012), the
    problems that only one of them answers right, and the exact McNemar p.
    """
    n = len(a)
    differences = np.asarray(a, dtype=int) - np.asarray(b, dtype=int)
    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    # The interval adds one win and one loss, and is centred on the adjusted difference.
    win_share, loss_share = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    difference = win_share - loss_share
    variance = (win_share + loss_share - difference**2) / (n + 2)
    half_width = scipy.stats.norm.ppf(0.975) * math.sqrt(variance)
    p = float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses > 0 else 1.0
    return {
        "difference": (wins - losses) / n,
        "low": max(-1.0, difference - half_width),
        "high": min(1.0, difference + half_width),
        "wins": wins,
        "losses": losses,
        "p": p,
    }
