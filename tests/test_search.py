"""Tests of search.py: passes, beams, MCTS and the decision, scorers, methods by name.

The trees are small enough to work out by hand.
"""

import inspect
import math

import pytest
from conftest import ScriptedPolicy, drive

import search
from answers import extract_answer
from generate_rollouts import expand, make_root
from policy import Candidate, Cost, Outcome, Sample, Score
from runs import InputError
from search import (
    Method,
    RandomScorer,
    best_of_n,
    decide,
    greedy,
    make_handlers,
    mcts,
    parse_method,
    policy_scorer,
    sbs,
    vote,
)
from tasks import Problem

# ---- Searches without a model --------------------------------------------------------------------


class ScriptedScorer:
    """Answers Score and Outcome requests without a model.

    Args:
        value: path of a node -> its value.

    Attributes:
        scored_paths: path of every node in a request, in order.
    """

    def __init__(self, value):
        self.value = value
        self.scored_paths = []

    def __call__(self, requests):
        replies = []
        for _, request in requests:
            paths = [node.path for node in request.nodes]
            self.scored_paths += paths
            values = [self.value(path) for path in paths]
            replies.append((values, Cost()))
        return replies


def scripted_handlers(value, *, outcome=None):
    """Return handlers whose messages are distinct: each is its path."""
    return {
        Score: ScriptedScorer(value),
        Outcome: ScriptedScorer(outcome),
        Sample: ScriptedPolicy(str),
    }


def explore(mas, handlers, *, num_simulations, num_candidates, c_uct, lam=0.0):
    """Run MCTS on scripted handlers. Returns the chosen leaf and the root."""
    guided_search = mcts(
        "q",
        mas,
        num_simulations=num_simulations,
        num_candidates=num_candidates,
        c_uct=c_uct,
        lam=lam,
    )
    leaf = drive(guided_search, handlers)
    root = leaf
    while root.parent:
        root = root.parent
    return leaf, root


# ---- MCTS ----------------------------------------------------------------------------------------

VALUES_BY_HAND = {
    (0,): 0.5,
    (1,): 0.19,
    (0, 0): 0.1,
    (0, 1): -0.3,
    (1, 0): 0.9,
    (1, 1): 0.0,
}

STATISTICS_BY_HAND = [
    # simulations, (N, W) of a0 and a1, of the children of a0, of the children of a1, chosen leaf
    (1, [(2, 0.60), (1, 0.19)], [(2, 0.2), (1, -0.3)], [], (0, 0)),
    (4, [(5, 0.90), (1, 0.19)], [(5, 0.5), (1, -0.3)], [], (0, 0)),
    (5, [(5, 0.90), (2, 1.09)], [(5, 0.5), (1, -0.3)], [(2, 1.8), (1, 0.0)], (1, 0)),
]


def rounded_statistics(nodes):
    return [(node.N, round(node.W, 9)) for node in nodes or []]


@pytest.mark.parametrize("num_simulations, of_root, of_a0, of_a1, chosen", STATISTICS_BY_HAND)
def test_mcts_with_virtual_visits_by_hand(duo, num_simulations, of_root, of_a0, of_a1, chosen):
    """With c = 0, Eq. 2 takes the largest Q. V of every state is in VALUES_BY_HAND.

    Simulation 1: a0 and a1 get N = 1 and W = V; a0 (0.5) is entered. Its children get N = 1 and
        W = V; (0, 0) is entered. Its terminal value of 0.1 is backed up:
                     (0, 0): N 2, W 0.2          a0: N 2, W 0.6,  Q 0.3
    Simulation 2:    (0, 0): N 3, W 0.3          a0: N 3, W 0.7,  Q 0.2333
    Simulation 3:    (0, 0): N 4, W 0.4          a0: N 4, W 0.8,  Q 0.2
    Simulation 4:    (0, 0): N 5, W 0.5          a0: N 5, W 0.9,  Q 0.18
        Now a1 has the larger Q (0.19), but only its virtual visit, so the decision is still a0.
    Simulation 5: a1 is entered and expanded; (1, 0) has the terminal value 0.9:
                     (1, 0): N 2, W 1.8          a1: N 2, W 1.09, Q 0.545
    """
    leaf, root = explore(
        duo,
        scripted_handlers(VALUES_BY_HAND.__getitem__),
        num_simulations=num_simulations,
        num_candidates=(2, 2),
        c_uct=0.0,
    )
    a0, a1 = root.children
    num_visits = root.N
    assert num_visits == num_simulations
    assert rounded_statistics(root.children) == of_root
    assert rounded_statistics(a0.children) == of_a0
    assert rounded_statistics(a1.children) == of_a1
    assert leaf.path == chosen


def test_a_virtual_visit_counts_as_a_visit_in_equation_2(duo):
    """The sum of N in Eq. 2 holds the virtual visits.

    V(a0) = 0.4 and V(a1) = 0.3, and all below a0 is worth 0.4. Simulation 1 enters a0, as both
    children have N = 1. Then N(a0) = 2, N(a1) = 1, and simulation 2 compares
    0.4 + c sqrt(ln 4 / 3) with 0.3 + c sqrt(ln 4 / 2).
    """

    def value(path):
        return 0.3 if path == (1,) else 0.4

    def visits(c_uct):
        _, root = explore(
            duo,
            scripted_handlers(value),
            num_simulations=2,
            num_candidates=(2, 1),
            c_uct=c_uct,
        )
        return [child.N for child in root.children]

    switch = 0.1 / (math.sqrt(math.log(4) / 2) - math.sqrt(math.log(4) / 3))
    assert visits(switch - 1e-6) == [3, 1]
    assert visits(switch + 1e-6) == [2, 2]


MIXTURES = [  # lambda, and the terminal value (1 - lambda) * 0.6 + lambda * -0.4
    (0.00, 0.60),
    (0.25, 0.35),
    (0.50, 0.10),
    (1.00, -0.40),
]


@pytest.mark.parametrize("lam, expected", MIXTURES)
def test_lambda_mixes_terminal_values(duo, lam, expected):
    handlers = scripted_handlers(lambda path: 0.6, outcome=lambda path: -0.4)
    leaf, _ = explore(duo, handlers, num_simulations=1, num_candidates=(1, 1), c_uct=1.0, lam=lam)
    assert leaf.reward == pytest.approx(expected)
    assert leaf.N == 2
    assert pytest.approx(0.6 + expected) == leaf.W
    # Lambda 0 never queries the ORM.
    assert handlers[Outcome].scored_paths == ([(0, 0)] if lam > 0 else [])


def test_the_orm_is_asked_once_per_terminal_state(duo):
    handlers = scripted_handlers(lambda path: 0.0, outcome=lambda path: 0.0)
    explore(duo, handlers, num_simulations=9, num_candidates=(2, 2), c_uct=1.0, lam=0.5)
    paths = handlers[Outcome].scored_paths
    assert len(paths) == 4
    assert len(set(paths)) == 4


def test_lambda_changes_the_decision(duo):
    values = {(0,): 0.5, (0, 0): 0.9, (0, 1): 0.1}
    outcomes = {(0, 0): -1.0, (0, 1): 1.0}

    def chosen_path(lam):
        handlers = scripted_handlers(values.__getitem__, outcome=outcomes.__getitem__)
        leaf, _ = explore(
            duo, handlers, num_simulations=8, num_candidates=(1, 2), c_uct=1.0, lam=lam
        )
        return leaf.path

    assert chosen_path(0.0) == (0, 0)
    assert chosen_path(1.0) == (0, 1)


def test_mcts_recovers_from_a_value_that_misleads_at_first(duo):
    """a0 looks best, but all below it is bad. The search backs that up and turns to a1."""

    def value(path):
        if len(path) == 1:
            return 0.8 if path == (0,) else 0.1
        return -0.9 if path[0] == 0 else 0.7

    leaf, _ = explore(
        duo, scripted_handlers(value), num_simulations=10, num_candidates=(2, 2), c_uct=0.5
    )
    assert leaf.path[0] == 1

    # A beam of one cannot turn back.
    beam = drive(sbs("q", duo, beam_width=1, num_candidates=(2, 2)), scripted_handlers(value))
    assert beam.path[0] == 0


@pytest.mark.parametrize("num_simulations", [1, 2, 3, 7])
def test_the_decision_is_terminal_whatever_the_budget(chain, num_simulations):
    def value(path):
        return math.sin(sum((depth + 2) * index for depth, index in enumerate(path)))

    leaf, root = explore(
        chain,
        scripted_handlers(value),
        num_simulations=num_simulations,
        num_candidates=(3, 3, 3, 3),
        c_uct=2.0,
    )
    assert chain.is_terminal(leaf.state)
    assert leaf.N > 1
    assert decide(root, chain) is leaf


# ---- Every search --------------------------------------------------------------------------------

PLANTED_PATH = (1, 2, 0, 1)


def planted_value(path):
    """V that knows the planted path: it grows along it, and is low elsewhere."""
    is_planted = path == PLANTED_PATH[: len(path)]
    return 0.2 * len(path) if is_planted else -0.5


def test_mcts_finds_the_planted_path(chain):
    leaf, _ = explore(
        chain,
        scripted_handlers(planted_value),
        num_simulations=12,
        num_candidates=(2, 3, 1, 2),
        c_uct=1.0,
    )
    assert leaf.path == PLANTED_PATH


def test_sbs_finds_the_planted_path(chain):
    handlers = scripted_handlers(planted_value)
    leaf = drive(sbs("q", chain, beam_width=1, num_candidates=(2, 3, 1, 2)), handlers)
    assert leaf.path == PLANTED_PATH
    assert handlers[Sample].calls == 2 + 3 + 1 + 2


def test_best_of_n_finds_the_best_pass(chain):
    handlers = scripted_handlers(lambda path: 1.0 if path[0] == 4 else 0.0)
    assert drive(best_of_n("q", chain, num=6), handlers).path == (4, 0, 0, 0)


def test_no_search_is_given_the_gold_answer():
    for name in ("greedy", "vote", "best_of_n", "sbs", "mcts", "sample_passes"):
        parameters = inspect.signature(getattr(search, name)).parameters
        assert "problem" not in parameters
        assert "gold" not in parameters


# ---- Step-level beam search ----------------------------------------------------------------------


def test_sbs_keeps_the_best_b1_of_all_beams_and_breaks_ties_by_order(duo):
    """B1 = 2, B2 = 3 and 2.

    V of the first messages:       (0,) 0.5    (1,) 0.4    (2,) 0.9: (1,) is dropped.
    V of the second messages:      (0, 0) 0.2  (0, 1) 0.1  (2, 0) 0.8  (2, 1) 0.7
    """
    values = {
        (0,): 0.5,
        (1,): 0.4,
        (2,): 0.9,
        (0, 0): 0.2,
        (0, 1): 0.1,
        (2, 0): 0.8,
        (2, 1): 0.7,
    }
    handlers = scripted_handlers(values.__getitem__)
    leaf = drive(sbs("q", duo, beam_width=2, num_candidates=(3, 2)), handlers)
    assert leaf.path == (2, 0)
    assert handlers[Sample].calls == 3 + 2 * 2
    # Each state is scored once.
    assert sorted(handlers[Score].scored_paths) == sorted(values)

    ties = scripted_handlers(lambda path: 0.0)
    assert drive(sbs("q", duo, beam_width=2, num_candidates=(3, 2)), ties).path == (0, 0)


# ---- Passes --------------------------------------------------------------------------------------


class RecordedPolicy(ScriptedPolicy):
    """Remembers (num, greedy) of every request."""

    def __init__(self, say):
        super().__init__(say)
        self.requests = []

    def __call__(self, requests):
        for _, request in requests:
            self.requests.append((request.num, request.greedy))
        return super().__call__(requests)


def test_greedy_asks_for_greedy_messages_only(chain):
    policy = RecordedPolicy(str)
    drive(greedy("q", chain), {Sample: policy})
    assert policy.requests == [(1, True)] * 4


VOTES = [  # answer type, the answers of the passes, and the answers that may win
    ("number", ["1", "2.0", "2", "4/2"], {"2"}),
    ("letter", ["A", "(b)", "B.", "C"], {"B"}),
    ("math", [r"$\sqrt{12}$", "3", r"$2\sqrt{3}$"], {r"\sqrt{12}", r"2\sqrt{3}"}),
    # A tie goes to the answer seen first.
    ("number", ["1", "2"], {"1"}),
    # A pass without an answer has no vote.
    ("number", ["none", "none", "7"], {"7"}),
    ("number", ["none", "none"], {None}),
]


@pytest.mark.parametrize("answer_type, answers, winners", VOTES)
def test_vote_clusters_answers_by_the_equality_that_grades(duo, answer_type, answers, winners):
    policy = ScriptedPolicy(lambda path: f"Final answer: {answers[path[0]]}")
    leaf = drive(vote("q", duo, answer_type, num=len(answers)), {Sample: policy})
    assert extract_answer(leaf.message.text, answer_type).value in winners


def test_passes_are_independent_even_if_they_start_with_equal_messages(duo):
    """Equal first messages must not make equal second ones: each pass is an independent sample."""

    def say(path):
        return "same" if len(path) == 1 else f"Final answer: {path}"

    handlers = {Sample: ScriptedPolicy(say), Score: ScriptedScorer(lambda path: path[0])}
    assert drive(best_of_n("q", duo, num=3), handlers).path == (2, 0)
    assert handlers[Sample].calls == 6


# ---- Scorers -------------------------------------------------------------------------------------


def test_policy_scorer_maps_mean_token_logprob(duo):
    """2 * exp(mean log-probability) - 1: probability 1 maps to 1, and 1/2 to 0 at any length."""
    half = math.log(0.5)
    candidates = [
        Candidate("sure", tokens=4, logprob=0.0, truncated=False),
        Candidate("half", tokens=2, logprob=2 * half, truncated=False),
        Candidate("long", tokens=8, logprob=8 * half, truncated=False),
    ]
    nodes = expand(duo, make_root("q"), candidates)
    [(values, cost)] = policy_scorer([(None, Score(nodes))])
    assert values == pytest.approx([1.0, 0.0, 0.0])
    assert cost == Cost()


def test_random_scorer_is_a_function_of_seed_problem_and_path(duo):
    candidates = [Candidate(str(index), 1, 0.0, False) for index in range(200)]
    nodes = expand(duo, make_root("q"), candidates)

    def values(seed, problem_id):
        problem = Problem(problem_id, "test", "", "", "")
        [(reply, _)] = RandomScorer(seed)([(problem, Score(nodes))])
        return reply

    assert values(0, "p") == values(0, "p")
    assert values(0, "p") != values(1, "p")
    assert values(1, "p") != values(1, "q")
    assert -1 <= min(values(0, "p")) < -0.9
    assert 0.9 < max(values(0, "p")) <= 1


def test_scorers_change_handlers_not_searches():
    for function in (mcts, sbs, best_of_n):
        source = inspect.getsource(function)
        for scorer in search.SCORERS:
            assert f'"{scorer}"' not in source


def test_no_handler_of_the_orm_is_made_at_lambda_0():
    method = Method("m", "mcts", "value", 2, (1, 1, 1, 1), lam=0.0)
    handlers = make_handlers(method, {"value": 1}, 2)
    assert list(handlers) == [Score, Sample]


# ---- Methods by name -----------------------------------------------------------------------------

METHODS = [  # name, and its algorithm, scorer, num, num_candidates and lam
    ("greedy", ("greedy", None, 1, (1, 1, 1, 1), 0.0)),
    ("vote-8", ("vote", None, 8, (1, 1, 1, 1), 0.0)),
    ("best_of-5-outcome", ("best_of", "outcome", 5, (1, 1, 1, 1), 0.0)),
    ("sbs-2x1.4.1.1-policy", ("sbs", "policy", 2, (1, 4, 1, 1), 0.0)),
    ("mcts-8-value", ("mcts", "value", 8, (3, 3, 3, 3), 0.0)),
    ("mcts-8x1.2.3.4-value-lam0.5", ("mcts", "value", 8, (1, 2, 3, 4), 0.5)),
]


@pytest.mark.parametrize("name, expected", METHODS)
def test_methods_are_read_by_name(chain, name, expected):
    method = parse_method(name, chain, num_candidates="3", lam=0.0)
    algorithm, scorer, num, num_candidates, lam = expected
    assert method.algorithm == algorithm
    assert method.scorer == scorer
    assert method.num == num
    assert method.num_candidates == num_candidates
    assert method.lam == lam
    # The canonical name says all settings.
    assert parse_method(method.name, chain, num_candidates="9", lam=0.0) == method


MODELS = [  # name, and the trained models that the method queries
    ("greedy", set()),
    ("sbs-2x2-policy", set()),
    ("best_of-5-outcome", {"outcome"}),
    ("mcts-8-value", {"value"}),
    ("mcts-8-random-lam0.5", {"outcome"}),
    ("mcts-8-value-lam0.5", {"value", "outcome"}),
]


@pytest.mark.parametrize("name, models", MODELS)
def test_a_method_names_the_models_it_queries(chain, name, models):
    assert parse_method(name, chain, num_candidates="3", lam=0.0).models == models


BAD_METHODS = [
    "beam",
    "vote",
    "vote-0",
    "vote-08",
    "vote-3-value",
    "best_of-3",
    "sbs-2-value",
    "mcts-value",
    "mcts-0-value",
    "mcts-8-gold",
    "mcts-8x0-value",
    "mcts-8x1.2-value",
    "mcts-8-value-lam1.5",
    "mcts-8-value-lam",
    "greedy-2",
    "mcts--1-value",
    "",
]


@pytest.mark.parametrize("name", BAD_METHODS)
def test_methods_that_do_not_exist_are_refused(chain, name):
    with pytest.raises(InputError, match="method"):
        parse_method(name, chain, num_candidates="3", lam=0.0)


# ---- The expected work ---------------------------------------------------------------------------

EXPECTED_WORK = [  # method, and its prompts, messages and scored states on the chain
    ("greedy", (4, 4, 0)),
    ("vote-3", (1 + 3 * 3, 3 * 4, 0)),
    ("best_of-5-value", (1 + 5 * 3, 5 * 4, 5)),
    ("best_of-5-policy", (1 + 5 * 3, 5 * 4, 0)),
    ("sbs-1x3-value", (4, 3 + 3 + 3 + 3, 12)),
    ("sbs-2x3.2.1.4-value", (1 + 2 + 2 + 2, 3 + 2 * 2 + 2 * 1 + 2 * 4, 17)),
    ("sbs-4x1.3.2.1-random", (1 + 1 + 3 + 4, 1 + 3 + 3 * 2 + 4 * 1, 0)),
]


@pytest.mark.parametrize("name, work", EXPECTED_WORK)
def test_the_work_is_known_beforehand(chain, name, work):
    method = parse_method(name, chain, num_candidates="3", lam=0.0)
    assert method.expected_work(chain) == work

    handlers = scripted_handlers(planted_value)
    problem = Problem("p", "test", "q", gold="", answer_type="number")
    drive(method.search(problem, chain, c_uct=1.0), handlers)
    _, num_messages, _ = work
    assert handlers[Sample].calls == num_messages


def test_the_number_of_messages_of_mcts_is_an_estimate(chain):
    """All agents in the first simulation, and one message of the last agent for each later one."""
    method = parse_method("mcts-8x1.4.2.3-value", chain, num_candidates="3", lam=0.0)
    num_messages = (1 + 4 + 2 + 3) + 8 - 1
    assert method.expected_work(chain) == (4 + (8 - 1) / 3, num_messages, num_messages)
