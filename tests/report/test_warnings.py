"""Tests of the five warnings: each is planted on both sides of its limit."""

import json
import math

import pytest

from report.warnings import agents_warnings, answer_warnings, label_warnings, value_warnings


@pytest.mark.parametrize("num_cut, is_warned", [(0, False), (5, False), (6, True)])
def test_one_cut_message_in_twenty_is_the_limit(num_cut, is_warned, tmp_path):
    """Of 100 messages. The root is none; step 0 of a training trains on none."""
    nodes = [{"parent": None}] + [{"truncated": index < num_cut} for index in range(100)]
    records = [{"step": 0, "messages": 0, "cut": 9}, {"step": 1, "messages": 100, "cut": num_cut}]
    answer = {"agent_calls": 50, "tree": None, "truncated": {"Solver": num_cut}}
    answers = {"greedy": [answer], "vote-4": [answer | {"truncated": {}}]}
    for lines in (
        label_warnings([{"nodes": nodes[:1]}, {"nodes": nodes}]),
        agents_warnings(records),
        answer_warnings(answers, tmp_path),
    ):
        assert bool(lines) == is_warned


HUBER = {"target": "search", "loss": "huber", "huber_delta": 1.0}


@pytest.mark.parametrize(
    "value, train_loss, changes, is_warned",
    [
        # Errors of 0.8: a Huber loss of 0.32, and 36 % are explained.
        (0.2, 0.159, {}, True),
        (0.2, 0.161, {}, False),
        (0.2, 0.0, {"target": "outcome"}, True),
        (0.2, 0.037, {"huber_delta": 0.1}, True),  # 0.1 * (0.8 - 0.05) = 0.075
        (0.2, 0.038, {"huber_delta": 0.1}, False),
        # 1 - 0.72**2 = 0.48, and 1 - 0.7**2 = 0.51.
        (0.28, 0.01, {}, True),
        (0.30, 0.01, {}, False),
        (0.2, 0.01, {"loss": "bce"}, False),  # it cannot be compared
        (math.nan, 0.01, {}, True),
        (0.2, math.nan, {}, True),
    ],
)
def test_a_v_that_fits_its_training_problems_only(value, train_loss, changes, is_warned):
    heldout = [{"V": value, "y": 1.0}, {"V": -value, "y": -1.0}]
    assert bool(value_warnings(train_loss, heldout, HUBER | changes)) == is_warned


def searches(*trees, algorithm="mcts", scorer="value", num_candidates=(3, 3, 3, 3)):
    """Records of searches. trees: (final states, simulations) of each."""
    method = {"algorithm": algorithm, "scorer": scorer, "num_candidates": num_candidates}
    records = []
    for index, (finals, simulations) in enumerate(trees):
        nodes = [{"parent": None}, {"V": 0.9}, *[{"agent": "B"} | final for final in finals]]
        record = {"id": f"p{index}", "method": method, "agent_calls": 4, "truncated": {}}
        records.append(record | {"tree": {"nodes": nodes, "simulations": simulations}})
    return {"m": records}


STUCK = [[5, 3]] + [[3]] * 5


@pytest.mark.parametrize(
    "simulations, settings, is_warned",
    [
        (STUCK, {}, True),  # one of six
        (STUCK, {"scorer": "policy"}, False),  # controls search where they like
        (STUCK[:5], {}, False),  # one of five
        (STUCK * 7, {"num_candidates": (1, 6, 1, 1)}, True),  # there are six final states
        (STUCK * 7, {"num_candidates": (1, 5, 1, 1)}, False),
    ],
)
def test_an_mcts_without_distinct_final_answers(simulations, settings, is_warned, tmp_path):
    lines = answer_warnings(searches(([], simulations), **settings), tmp_path)
    assert bool(lines) == is_warned


@pytest.mark.parametrize("num_different, is_warned", [(0, False), (2, False), (3, True)])
def test_a_v_and_an_orm_that_disagree(num_different, is_warned, tmp_path):
    """Of ten final states in two trees; what one of them has not scored does not count."""
    finals = [{"V": 0.9, "orm": 0.1}, {"V": -0.9, "orm": -0.1}] * 5 + [{"V": -0.9}]
    for index in range(num_different):
        finals[index] = {"V": finals[index]["V"], "orm": -finals[index]["orm"]}
    trees = [(finals[:3], []), (finals[3:], [])]
    assert bool(answer_warnings(searches(*trees, algorithm="sbs"), tmp_path)) == is_warned


def ranked(*, num_bad, num_good):
    """Trees in which V prefers the wrong final state to the right one, and the other way round."""
    good = [{"V": 0.9, "correct": True}, {"V": -0.9, "correct": False}]
    bad = [{"V": -0.9, "correct": True}, {"V": 0.9, "correct": False}]
    return [(bad, [])] * num_bad + [(good, [])] * num_good


@pytest.mark.parametrize(
    "trees, auc, scorer, is_warned",
    [
        (ranked(num_bad=4, num_good=8), 1.0, "value", True),
        (ranked(num_bad=4, num_good=8), None, "value", False),
        (ranked(num_bad=4, num_good=8), 1.0, "orm", False),
        (ranked(num_bad=9, num_good=0), 1.0, "value", False),  # too few problems with both
        (ranked(num_bad=10, num_good=0), 0.051, "value", True),  # 0 is below by more than 0.05
        (ranked(num_bad=10, num_good=0), 0.049, "value", False),
        ([([{"V": math.nan, "correct": index < 1} for index in (0, 1)], [])] * 10, 0.7, "value", 1),
    ],
)
def test_a_v_that_ranks_worse_than_on_held_out_problems(trees, auc, scorer, is_warned, tmp_path):
    """Held-out, after the last epoch and after the last agent."""
    epochs = [{"heldout": {"A": {"auc": 0.0}, "B": {"auc": value}}} for value in (0.0, auc)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(epoch) + "\n" for epoch in epochs))
    records = searches(*trees, algorithm="sbs", scorer=scorer)
    assert bool(answer_warnings(records, tmp_path)) == is_warned
    assert answer_warnings(records, tmp_path / "no V") == []
