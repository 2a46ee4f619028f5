"""Tests of what the records say about failures: every signature planted, and blame by hand."""

import math

import pytest
from report.diagnosis import (
    Signature,
    agents_signatures,
    answer_signatures,
    blame,
    evidence,
    explained_share,
    label_signatures,
    most_final_states,
    regression_loss,
    value_signatures,
    warning_text,
)

AGENTS = ["Reader", "Solver"]


def triggered(signatures):
    """Return what is wrong according to the signatures."""
    return {signature.trouble for signature in signatures if signature.is_triggered}


def number_of(signatures, trouble):
    [number] = [each.number for each in signatures if each.trouble == trouble]
    return number


# ---- Labels --------------------------------------------------------------------------------------


def node_of(parent, agent, *, truncated=False, **fields):
    return {"parent": parent, "agent": agent, "truncated": truncated} | fields


def make_tree(rewards, *, num_cut=0):
    """A tree in which one Reader's message has a Solver's message for each reward."""
    nodes = [{"parent": None}, node_of(0, "Reader")]
    for index, reward in enumerate(rewards):
        nodes.append(node_of(1, "Solver", truncated=index < num_cut, reward=reward))
    return {"nodes": nodes}


MIXED, RIGHT = make_tree([1.0, -1.0]), make_tree([1.0, 1.0])
ONE_SIDED = "most problems are always solved, or never"
DUPLICATES = "candidates are nearly all duplicates"
CUT = "messages are cut"


@pytest.mark.parametrize("num_mixed, is_one_sided", [(0, True), (1, False), (4, False)])
def test_labels_of_one_kind_are_flagged(num_mixed, is_one_sided):
    """One tree of four with right and wrong answers is just enough."""
    trees = [MIXED] * num_mixed + [RIGHT] * (4 - num_mixed)
    signatures = label_signatures(trees, AGENTS, [1, 2])
    assert number_of(signatures, ONE_SIDED) == num_mixed / 4
    assert triggered(signatures) == ({ONE_SIDED} if is_one_sided else set())


def test_duplicate_candidates_are_flagged_unless_one_agent_has_different_ones():
    """Both agents are asked for five; the Reader says one thing, the Solver two things."""
    signatures = label_signatures([MIXED], AGENTS, [5, 5])
    assert number_of(signatures, DUPLICATES) == 2 / 5
    assert triggered(signatures) == {DUPLICATES}
    # Two of four are enough. An agent that is asked for one message cannot repeat itself.
    assert triggered(label_signatures([MIXED], AGENTS, [5, 4])) == set()
    assert triggered(label_signatures([MIXED], AGENTS, [1, 5])) == {DUPLICATES}
    signatures = label_signatures([MIXED], AGENTS, [1, 1])
    assert number_of(signatures, DUPLICATES) is None and not triggered(signatures)


def test_duplicates_are_counted_per_expansion():
    """The Solver speaks after two messages of the Reader: it was asked for six, and gave four."""
    nodes = [{"parent": None}, node_of(0, "Reader"), node_of(0, "Reader")]
    nodes += [node_of(1, "Solver", reward=1.0), node_of(1, "Solver", reward=-1.0)]
    nodes += [node_of(2, "Solver", reward=1.0), node_of(2, "Solver", reward=1.0)]
    signatures = label_signatures([{"nodes": nodes}], AGENTS, [6, 3])
    assert number_of(signatures, DUPLICATES) == 4 / 6


@pytest.mark.parametrize("num_cut, is_flagged", [(0, False), (1, False), (2, True)])
def test_cut_messages_are_flagged(num_cut, is_flagged):
    """Of 21 messages, one is 4.8 % and two are 9.5 %."""
    tree = make_tree([1.0, -1.0] * 9 + [1.0] * 2, num_cut=num_cut)
    signatures = label_signatures([tree], AGENTS, [1, 20])
    assert number_of(signatures, CUT) == num_cut / 21
    assert triggered(signatures) == ({CUT} if is_flagged else set())


def test_no_trees_have_no_signature():
    assert not triggered(label_signatures([], AGENTS, [3, 3]))


@pytest.mark.parametrize("demand", ["at most", "at least"])
def test_a_nan_is_always_on_the_wrong_side(demand):
    assert Signature("t", "m", math.nan, demand, 0.1, "r").is_triggered


# ---- V -------------------------------------------------------------------------------------------

HUBER = {"target": "search", "loss": "huber", "huber_delta": 1.0, "label_weights": "equal"}
NOT_HELDOUT = "V fits its training problems, but not held-out ones"
EXPLAINS_FEW = "V explains little of the held-out labels"


def heldout_of(*pairs):
    """Lines of heldout.jsonl with these (V, y)."""
    return [{"V": value, "y": label} for value, label in pairs]


def test_the_loss_of_a_label_is_that_of_training():
    assert regression_loss(0.5, "huber", 1.0) == 0.125
    assert regression_loss(1.5, "huber", 1.0) == 1.0
    assert regression_loss(1.5, "huber", 0.5) == 0.625
    assert regression_loss(1.5, "mse", 0.5) == 2.25


def test_the_explained_share_by_hand():
    assert explained_share(heldout_of((1.0, 1.0), (-1.0, -1.0))) == 1.0
    assert explained_share(heldout_of((0.0, 1.0), (0.0, -1.0))) == 0.0
    assert explained_share(heldout_of((0.5, 1.0), (-0.5, -1.0))) == 0.75
    assert explained_share(heldout_of((0.5, 1.0), (0.5, 1.0))) is None


def test_a_v_that_fits_its_training_problems_only_is_flagged():
    """Held-out errors are 1: a Huber loss of 0.5, and nothing is explained."""
    no_better_than_the_mean = heldout_of((0.0, 1.0), (0.0, -1.0))
    signatures = value_signatures(0.1, no_better_than_the_mean, HUBER)
    assert number_of(signatures, NOT_HELDOUT) == pytest.approx(5.0)
    assert triggered(signatures) == {NOT_HELDOUT, EXPLAINS_FEW}
    # A V that has not learnt its training problems either is another trouble.
    assert triggered(value_signatures(0.4, no_better_than_the_mean, HUBER)) == {EXPLAINS_FEW}


def test_a_v_that_explains_most_of_the_held_out_labels_is_not_flagged():
    """Errors of 0.5 explain three quarters, however well the training problems are fitted."""
    good = heldout_of((0.5, 1.0), (-0.5, -1.0))
    assert not triggered(value_signatures(0.0001, good, HUBER))


def test_losses_that_are_no_regression_are_not_compared():
    heldout = heldout_of((0.2, 1.0), (-0.2, -1.0))
    signatures = value_signatures(0.01, heldout, HUBER | {"loss": "dist"})
    assert number_of(signatures, NOT_HELDOUT) is None
    assert number_of(signatures, EXPLAINS_FEW) == pytest.approx(0.36)
    assert number_of(value_signatures(0.01, heldout, HUBER), NOT_HELDOUT) == pytest.approx(32.0)
    # A weighted loss cannot be compared either. Values that are only ranked explain nothing.
    weighted = value_signatures(0.01, heldout, HUBER | {"label_weights": "visits"})
    assert number_of(weighted, NOT_HELDOUT) is None
    ranked = value_signatures(0.01, heldout, HUBER | {"loss": "rank"})
    assert [each.number for each in ranked] == [None, None]


@pytest.mark.parametrize("train_loss, is_flagged", [(0.151, True), (0.161, False), (0.0, True)])
def test_twice_the_training_loss_is_the_limit(train_loss, is_flagged):
    """Errors of 0.8 have a Huber loss of 0.32 and explain 36 %."""
    heldout = heldout_of((0.2, 1.0), (-0.2, -1.0))
    signatures = value_signatures(train_loss, heldout, HUBER)
    assert triggered(signatures) == ({NOT_HELDOUT} if is_flagged else set())


@pytest.mark.parametrize("value, is_compared", [(0.28, True), (0.30, False)])
def test_losses_are_compared_if_less_than_half_is_explained(value, is_compared):
    """1 - 0.72**2 = 0.48, and 1 - 0.7**2 = 0.51."""
    signatures = value_signatures(0.01, heldout_of((value, 1.0), (-value, -1.0)), HUBER)
    assert (number_of(signatures, NOT_HELDOUT) is not None) == is_compared


@pytest.mark.parametrize("value, is_flagged", [(0.04, True), (0.06, False)])
def test_a_tenth_has_to_be_explained(value, is_flagged):
    """1 - 0.96**2 = 0.08, and 1 - 0.94**2 = 0.12."""
    signatures = value_signatures(9.0, heldout_of((value, 1.0), (-value, -1.0)), HUBER)
    assert triggered(signatures) == ({EXPLAINS_FEW} if is_flagged else set())


def test_held_out_and_training_are_compared_in_the_loss_of_the_training():
    """Errors of 0.8: 0.64 squared, and 0.1 * (0.8 - 0.05) by a Huber loss of delta 0.1."""
    heldout = heldout_of((0.2, 1.0), (-0.2, -1.0))
    for changes, loss in (({"loss": "mse"}, 0.64), ({"huber_delta": 0.1}, 0.075)):
        signatures = value_signatures(0.01, heldout, HUBER | changes)
        assert number_of(signatures, NOT_HELDOUT) == pytest.approx(loss / 0.01)


def test_an_orm_is_called_so():
    wrong = heldout_of((0.0, 1.0), (0.0, -1.0))
    assert triggered(value_signatures(9.0, wrong, HUBER | {"target": "outcome"})) == {
        "the ORM explains little of the held-out labels"
    }


def test_a_training_that_diverged_is_flagged():
    diverged = heldout_of((math.nan, 1.0), (math.nan, -1.0))
    assert triggered(value_signatures(math.nan, diverged, HUBER)) == {EXPLAINS_FEW}


def test_a_v_without_held_out_values_has_no_signature():
    signatures = value_signatures(0.1, [], HUBER)
    assert [each.number for each in signatures] == [None, None]
    assert not triggered(signatures)


# ---- Answers -------------------------------------------------------------------------------------

GUESSED = "answers had to be guessed"
FEW_ANSWERS = "MCTS spends its simulations on few final answers"
DISAGREE = "V and the ORM disagree"
BELOW_POLICY = "V guides worse than the policy's likelihood"


def answer_of(*, rung="told", num_cut=0, tree=None):
    truncated = {"Solver": num_cut} if num_cut else {}
    record = {"rung": rung, "agent_calls": 4, "truncated": truncated, "tree": tree}
    return record | {"transcript": [{}] * 4}


@pytest.mark.parametrize("rung, is_weak", [("number", True), ("none", True), ("box", False)])
def test_answers_that_no_message_names_are_flagged(rung, is_weak):
    """One of ten is the limit."""
    of_ten = {"greedy": [answer_of(rung=rung)] + [answer_of()] * 9}
    assert not triggered(answer_signatures(of_ten, []))
    of_nine = {"greedy": [answer_of(rung=rung)], "vote-4": [answer_of()] * 8}
    signatures = answer_signatures(of_nine, [])
    assert number_of(signatures, GUESSED) == pytest.approx(is_weak / 9)
    assert triggered(signatures) == ({GUESSED} if is_weak else set())


def test_messages_cut_in_an_evaluation_are_flagged():
    """One of 20 messages is the limit, one of 16 is above it."""
    assert not triggered(
        answer_signatures({"greedy": [answer_of(num_cut=1)] + [answer_of()] * 4}, [])
    )
    signatures = answer_signatures({"greedy": [answer_of(num_cut=1)] + [answer_of()] * 3}, [])
    assert triggered(signatures) == {CUT}


def test_simulations_that_end_in_few_states_are_flagged():
    """Six simulations: in one final state; four in one final state and two in another."""
    stuck = {"nodes": [], "simulations": [[5, 3]] + [[3]] * 5}
    two = {"nodes": [], "simulations": [[3]] * 4 + [[3, 4]] * 2}
    signatures = answer_signatures({"mcts-6x3-value": [answer_of(tree=stuck)]}, [])
    assert number_of(signatures, FEW_ANSWERS) == 1 / 6
    assert triggered(signatures) == {FEW_ANSWERS}
    signatures = answer_signatures({"mcts-6x3-value": [answer_of(tree=two)]}, [])
    assert number_of(signatures, FEW_ANSWERS) == 2 / 6 and not triggered(signatures)
    # Eight plans for each Reader's message: 40 simulations cannot end in more than eight states.
    plans = {"nodes": [], "simulations": [[number % 2] for number in range(40)]}
    signatures = answer_signatures({"mcts-40x1.8.1.1-value": [answer_of(tree=plans)]}, [])
    assert number_of(signatures, FEW_ANSWERS) == 2 / 8 and not triggered(signatures)
    # Three candidates of a single agent cannot either.
    alone = answer_of(tree={"nodes": [], "simulations": [[1], [2], [3]] + [[3]] * 37})
    signatures = answer_signatures({"mcts-40x3-value": [alone | {"transcript": [{}]}]}, [])
    assert number_of(signatures, FEW_ANSWERS) == 1 and not triggered(signatures)
    # One guided by the ORM is held to the same.
    signatures = answer_signatures({"mcts-6x3-outcome": [answer_of(tree=stuck)]}, [])
    assert triggered(signatures) == {FEW_ANSWERS}
    # The controls may search where they like.
    for method in ("mcts-6x3-policy", "mcts-6x3-random"):
        assert (
            number_of(answer_signatures({method: [answer_of(tree=stuck)]}, []), FEW_ANSWERS) is None
        )
    # Beams have no simulations.
    beams = {"sbs-2x3-value": [answer_of(tree={"nodes": [], "simulations": []})]}
    assert number_of(answer_signatures(beams, []), FEW_ANSWERS) is None


def test_most_final_states_of_a_method():
    assert most_final_states("mcts-64x1.8.2.1-value-lam0.5", num_turns=4) == 16
    assert most_final_states("mcts-64x3-value", num_turns=4) == 81
    assert most_final_states("mcts-64x3-value", num_turns=1) == 3
    assert most_final_states("mcts-64x1-value", num_turns=4) == 1


def scored(*pairs):
    """A tree whose final states have these values of V and of the ORM."""
    nodes = [{"V": 0.9}]  # not final
    nodes += [{"V": value, "outcome": outcome} for value, outcome in pairs]
    return {"nodes": nodes, "simulations": [[index] for index in range(len(pairs))]}


def test_a_v_and_an_orm_that_disagree_are_flagged():
    agreeing = scored((0.9, 0.1), (-0.9, -0.1), (0.5, 0.5), (0.5, 0.5), (0.2, -0.2))
    signatures = answer_signatures({"mcts-5x3-value-lam0.5": [answer_of(tree=agreeing)]}, [])
    assert number_of(signatures, DISAGREE) == 0.2 and not triggered(signatures)
    one_of_four = scored((0.9, 0.1), (-0.9, -0.1), (0.5, 0.5), (0.2, -0.2))
    signatures = answer_signatures({"mcts-4x3-value-lam0.5": [answer_of(tree=one_of_four)]}, [])
    assert triggered(signatures) == {DISAGREE}
    split = scored((0.9, 0.1), (-0.9, 0.1))
    signatures = answer_signatures({"mcts-2x3-value-lam0.5": [answer_of(tree=split)]}, [])
    assert number_of(signatures, DISAGREE) == 0.5
    assert triggered(signatures) == {DISAGREE}


@pytest.mark.parametrize("high, is_worse", [(-0.01, True), (0.0, False), (0.2, False)])
def test_a_v_below_the_likelihood_is_flagged(high, is_worse):
    """Only if all of the interval is below zero, in the same search."""
    row = {"method": "sbs-2x3-value", "why": "same, by policy", "high": high}
    better = row | {"high": 0.5}
    against_greedy = row | {"why": "greedy", "high": -0.5}
    of_the_orm = row | {"method": "sbs-2x3-outcome", "high": -0.5}
    comparisons = [better, row, against_greedy, of_the_orm]
    signatures = answer_signatures({"greedy": [answer_of()]}, comparisons)
    assert number_of(signatures, BELOW_POLICY) == high
    assert triggered(signatures) == ({BELOW_POLICY} if is_worse else set())


# ---- The agents ----------------------------------------------------------------------------------


HACKED = "V thinks better of the agents than they are"


def training_of(*numbers_of_step):
    """Lines of metrics.jsonl: of each step, (mean V, right) of the Reader and of the Solver."""
    records = [{"step": 0}]
    for step, numbers in enumerate(numbers_of_step):
        agents = {}
        for agent, (value, right) in zip(AGENTS, numbers, strict=True):
            agents[agent] = {"value": value, "right": right, "value_auc": 0.7}
        records.append({"step": step, "dev": {"accuracy": 0.5, "agents": agents}})
    return records


@pytest.mark.parametrize("value, is_hacked", [(0.61, True), (0.59, False), (0.1, False)])
def test_agents_of_whom_v_thinks_too_well_are_flagged(value, is_hacked):
    """Of the adapters that are kept, not of the last ones. To think too little is no harm."""
    records = training_of([(0.1, 0.5)] * 2, [(0.1, 0.5), (value, 0.5)], [(0.9, 0.1)] * 2)
    signatures = agents_signatures(records, best_step=1)
    assert number_of(signatures, HACKED) == pytest.approx(value - 0.5)
    assert triggered(signatures) == ({HACKED} if is_hacked else set())


def test_agents_without_v_or_without_training_have_no_signature():
    without_v = training_of([(None, 0.5)] * 2, [(None, 0.5)] * 2)
    assert number_of(agents_signatures(without_v, best_step=1), HACKED) is None
    untrained = training_of([(0.9, 0.1)] * 2, [(0.9, 0.1)] * 2)
    assert number_of(agents_signatures(untrained, best_step=0), HACKED) is None


# ---- Texts ---------------------------------------------------------------------------------------


def test_only_triggered_signatures_are_printed_with_number_and_remedy():
    signatures = label_signatures([RIGHT, RIGHT], AGENTS, [1, 2])
    assert warning_text(signatures) == (
        "! most problems are always solved, or never: share of trees with both right and wrong "
        "answers: 0.000, should be at least 0.25\n"
        "  Take easier or harder problems, or another --temperature"
    )
    assert warning_text(label_signatures([MIXED], AGENTS, [1, 2])) == ""


def test_evidence_says_which_side_is_fine():
    one_sided, duplicates, cut = label_signatures([MIXED], AGENTS, [1, 1])
    assert evidence(one_sided).endswith("answers: 1.000, should be at least 0.25")
    assert evidence(duplicates).endswith("most of them: nothing to measure")
    assert evidence(cut).endswith("token limit: 0.000, should be at most 0.05")


# ---- Blame ---------------------------------------------------------------------------------------


def edge(node, parent, agent, value, label, problem_id="p"):
    return {"id": problem_id, "node": node, "parent": parent, "agent": agent} | {
        "V": value,
        "y": label,
    }


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


def test_the_blamed_message_has_the_largest_drop_below_its_siblings():
    """Below the other candidate of each state."""
    assert blame(EDGES, by="V", below="siblings") == [
        ("p", 5, "Planner", 1.25),  # 0.75 + 0.5; its Reader is above the other
        ("p", 8, "Solver", 1.5),  # 0.5 + 1; its Reader falls by 0.5
        ("p", 9, "Reader", 0.5),  # its Solver is above the other
    ]


def test_a_drop_is_below_the_mean_of_the_others():
    """Three plans of V 0.5, 0.25 and -1: the last falls by 1.375, however many siblings it has."""
    plans = [edge(1, 0, "Planner", 0.5, 1.0), edge(2, 0, "Planner", 0.25, 1.0)]
    plans.append(edge(3, 0, "Planner", -1.0, -1.0))
    assert blame(plans, by="V", below="siblings") == [("p", 3, "Planner", 1.375)]


def test_blame_by_the_labels():
    """The Readers have y of 0.5 and -1, the first plans of 1 and -1."""
    assert blame(EDGES, by="y", below="siblings") == [
        ("p", 5, "Planner", 2.0),
        ("p", 8, "Reader", 1.5),
        ("p", 9, "Reader", 1.5),
    ]


def test_a_message_may_fall_below_the_state_before_it():
    """V of the paths: 0.25, -0.5, -1; -0.25, -0.5, -1; -0.25, -0.5, 0.5."""
    assert blame(EDGES, by="V", below="before") == [
        ("p", 5, "Planner", 0.75),
        ("p", 8, "Reader", 0.5),  # as the Solver's, which comes later
        ("p", 9, "Reader", 0.5),
    ]


def test_of_equal_drops_the_first_message_is_blamed_and_without_siblings_nobody():
    equal = [
        edge(1, 0, "Reader", -0.5, 0.0),
        edge(2, 0, "Reader", 0.5, 0.0),
        edge(3, 1, "Solver", -0.5, -1.0),
        edge(4, 1, "Solver", 0.5, 1.0),
    ]
    # The second Reader's message has no labelled continuation; its label counts as an answer's.
    assert blame(equal, by="V", below="siblings")[1:] == [("p", 3, "Reader", 1.0)]
    alone = [edge(1, 0, "Reader", 0.9, -1.0), edge(2, 1, "Solver", -0.9, -1.0)]
    assert blame(alone, by="V", below="siblings") == [("p", 2, None, 0.0)]


def test_trees_of_different_problems_are_not_mixed():
    other = [each | {"id": "q"} for each in EDGES]
    losses = blame(EDGES + other, by="V", below="siblings")
    assert [loss.problem_id for loss in losses] == ["p", "p", "p", "q", "q", "q"]
    assert [loss[1:] for loss in losses[3:]] == [loss[1:] for loss in losses[:3]]
