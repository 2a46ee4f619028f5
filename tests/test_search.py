"""Tests of search.py: passes, beams, MCTS and the decision, scorers, methods by name.

The trees are small enough to work out by hand.
"""

import inspect
import math
import re
from collections import Counter
from functools import partial
from types import SimpleNamespace

import pytest
from conftest import NoProgress, ScriptedPolicy, StopError, drive, hint_graph
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_rollouts
import search
from llm.decoding import uniforms
from mas import CHAIN, GRAPHS, MAS, SINGLE, Agent
from search import (
    Method,
    ModelScorer,
    RandomScorer,
    best_of_n,
    decide,
    greedy,
    load_scorers,
    make_handlers,
    mcts,
    parse_method,
    path_to,
    policy_scorer,
    sbs,
    vote,
)
from support.flags import InputError
from support.progress import ignore
from support.runs import write_config
from tasks.grading import extract_answer
from tasks.problems import Problem
from tree import Candidate, Cost, Outcome, Sample, Score, expand, make_root, run_searches

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


RANDOM_SEARCHES = settings(derandomize=True, deadline=None, database=None, max_examples=25)
COUNTS = st.tuples(*[st.integers(1, 3)] * 4)


def nodes_of(root):
    """Return all nodes of a tree, parents before their children."""
    nodes = [root]
    for node in nodes:
        nodes += node.children or []
    return nodes


def terminal_nodes_below(node, mas):
    return [other for other in nodes_of(node) if mas.is_terminal(other.state)]


@RANDOM_SEARCHES
@given(
    seed=st.integers(0, 999),
    num_simulations=st.integers(1, 12),
    num_candidates=COUNTS,
    c_uct=st.sampled_from([0.0, 0.5, 3.0]),
    lam=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_the_statistics_of_mcts_are_virtual_visits_and_terminal_values(
    seed, num_simulations, num_candidates, c_uct, lam
):
    """Every simulation passes from the root to one terminal state, and is counted on its way."""
    handlers = scripted_handlers(
        partial(random_value, "value", seed), outcome=partial(random_value, "outcome", seed)
    )
    leaf, root = explore(
        CHAIN,
        handlers,
        num_simulations=num_simulations,
        num_candidates=num_candidates,
        c_uct=c_uct,
        lam=lam,
    )
    for node in nodes_of(root):
        # 1. Visits: the virtual one, and one per simulation that has passed through.
        virtual_visits = 0 if node is root else 1
        num_passed = node.N - virtual_visits
        if node is root:
            assert num_passed == num_simulations
        if node.children is not None:
            assert num_passed == sum(child.N - 1 for child in node.children)

        # 2. Values: the virtual one, and the terminal value of each of these simulations.
        total = virtual_visits * (node.V or 0.0)
        for terminal in terminal_nodes_below(node, CHAIN):
            if terminal.N > 1:
                outcome = random_value("outcome", seed, terminal.path)
                terminal_value = (1 - lam) * terminal.V + lam * outcome
                total += (terminal.N - 1) * terminal_value
        assert pytest.approx(total) == node.W
        assert -1 <= node.Q <= 1

    # 3. The decision: at every step the best Q of those that a simulation has passed through.
    assert CHAIN.is_terminal(leaf.state)
    answer_path = path_to(leaf)
    assert [len(node.path) for node in answer_path] == [1, 2, 3, 4]
    for node in answer_path:
        assert node.N > 1
        rivals = [child.Q for child in node.parent.children if child.N > 1]
        assert max(rivals) == node.Q


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


class WithoutGold:
    """A problem whose gold answer nobody may read: it has a question, an id and an answer type."""

    id, question, answer_type = "p", "q", "number"

    def __getattr__(self, name):
        raise AssertionError(f"a search has read the {name} of its problem")


EVERY_METHOD = [
    "greedy",
    "vote-3",
    "best_of-3-value",
    "best_of-3-outcome",
    "sbs-2x2-value",
    "sbs-2x3.2.1.2-policy",
    "mcts-5x2-value",
    "mcts-5x2-random",
    "mcts-5x2-value-lam0.5",
]


def random_value(*key):
    """Return a value in [-1, 1], a function of the key."""
    [uniform] = uniforms(1, *key)
    return 2 * float(uniform) - 1


def solve(name, problem, mas):
    """Run a method by `run`. Returns all that it asks and its answer."""
    method = parse_method(name, mas, num_candidates="3", lam=0.0)
    scorers = {
        "value": ScriptedScorer(partial(random_value, "value")),
        "outcome": ScriptedScorer(partial(random_value, "outcome")),
        "policy": policy_scorer,
        "random": RandomScorer(0),
    }
    policy = RecordedPolicy(lambda path: f"Final answer: {sum(path)} {path}")
    handlers = make_handlers(method, scorers, policy)
    searches = [(problem, method.search(problem, mas, c_uct=1.0))]
    [(_, leaf, cost)] = run_searches(searches, handlers, max_active=1, progress=NoProgress())
    scored = [scorers[model].scored_paths for model in ("value", "outcome")]
    return leaf.path, leaf.state, cost, policy.requests, scored


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_no_search_is_given_the_gold_answer(chain, name):
    """Problems that differ in everything but question, id and answer type are solved alike."""
    first = Problem("p", "test", "q", gold="1", answer_type="number", subject="x", level="1")
    other = Problem("p", "train", "q", gold="2", answer_type="number", subject="y", level="2")
    solution = solve(name, first, chain)
    assert solve(name, other, chain) == solution
    assert solve(name, WithoutGold(), chain) == solution


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_every_search_is_about_its_question_and_only_greedy_is_greedy(chain, name):
    def handler(answer):
        def checked(requests):
            for _, request in requests:
                assert all(node.state.question == "q" for node in request.nodes)
                if isinstance(request, Sample):
                    assert request.greedy is (name == "greedy")
            return answer(requests)

        return checked

    handlers = scripted_handlers(random_value, outcome=random_value)
    checked_handlers = {}
    for request_type, answer in handlers.items():
        checked_handlers[request_type] = handler(answer)
    method = parse_method(name, chain, num_candidates="3", lam=0.0)
    drive(method.search(WithoutGold(), chain, c_uct=1.0), checked_handlers)
    assert handlers[Sample].calls > 0


@pytest.mark.parametrize("name", ["mcts-1x1.3.4-random", "sbs-9x1.3.4-random"])
def test_a_search_gives_an_agent_its_own_candidates_also_after_one_that_is_skipped(name):
    graph = hint_graph()
    method = search.parse_method(name, graph, num_candidates="1", lam=0.0)
    policy = ScriptedPolicy(lambda path: "fine" if len(path) == 1 else f"word {path}")
    problem = Problem("p", "test", "q", "1", "number")

    def scores(requests):
        return [([0.0] * len(request.nodes), None) for _, request in requests]

    leaf = drive(method.search(problem, graph, c_uct=1.0), {Sample: policy, search.Score: scores})
    assert len(leaf.parent.children) == 4


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


@RANDOM_SEARCHES
@given(seed=st.integers(0, 999), beam_width=st.integers(1, 4), num_candidates=COUNTS)
def test_the_beams_are_the_best_of_all_candidates(seed, beam_width, num_candidates):
    """By brute force. The last score of a path decides, not the sum of its scores."""
    value = partial(random_value, seed)
    beams = [()]
    scored = []
    for num in num_candidates:
        paths = [(*beam, index) for beam in beams for index in range(num)]
        scored += paths
        paths.sort(key=value, reverse=True)
        beams = paths[:beam_width]

    handlers = scripted_handlers(value)
    search_beams = sbs("q", CHAIN, beam_width=beam_width, num_candidates=num_candidates)
    assert drive(search_beams, handlers).path == beams[0]
    assert handlers[Score].scored_paths == scored


def conditional_graph():
    """A, then B if A says "go", and C if A says "on"."""
    a = Agent("A", sees=("Q",), prompt="", max_new_tokens=1)
    b = Agent("B", sees=("A",), prompt="", max_new_tokens=1, when=("A", "go"))
    c = Agent("C", sees=("A",), prompt="", max_new_tokens=1, when=("A", "on"))
    return MAS("conditional", (a, b, c))


def test_a_finished_transcript_competes_with_its_last_score():
    """A says "stop" (V 0.6) or "go" (V 0.7). After B, the other transcript is worth 0.5 only."""
    values = {(0,): 0.6, (1,): 0.7, (1, 0): 0.5}
    handlers = {
        Score: ScriptedScorer(values.__getitem__),
        Sample: ScriptedPolicy(lambda path: ["stop", "go"][path[0]]),
    }
    beams = sbs("q", conditional_graph(), beam_width=2, num_candidates=(2, 1, 1))
    assert drive(beams, handlers).path == (0,)
    # The finished one is not scored again.
    assert handlers[Score].scored_paths == [(0,), (1,), (1, 0)]

    # It wins a tie, and it can lose.
    values[1, 0] = 0.6
    beams = sbs("q", conditional_graph(), beam_width=2, num_candidates=(2, 1, 1))
    assert drive(beams, handlers).path == (0,)
    values[1, 0] = 0.61
    beams = sbs("q", conditional_graph(), beam_width=2, num_candidates=(2, 1, 1))
    assert drive(beams, handlers).path == (1, 0)


def test_beams_that_wait_for_different_agents_get_the_candidates_of_their_agent():
    """After A, one beam waits for B (3 candidates) and two wait for C (2 candidates)."""
    policy = RecordedPolicy(lambda path: ["go", "on", "on too"][path[0]] + str(path[1:]))
    handlers = {Score: ScriptedScorer(lambda path: path[-1] / 10), Sample: policy}
    beams = sbs("q", conditional_graph(), beam_width=3, num_candidates=(3, 3, 2))
    leaf = drive(beams, handlers)
    assert policy.requests == [(3, False), (2, False), (3, False)]
    assert policy.calls == 3 + 2 * 2 + 3
    assert leaf.path == (0, 2)


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
    # By their texts, these three answers would tie, and 3 would win.
    ("math", ["3", r"$\sqrt{12}$", r"$2\sqrt{3}$"], {r"\sqrt{12}", r"2\sqrt{3}"}),
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
    answer = extract_answer(leaf.message.text, answer_type).value
    assert answer in winners
    if answer is None:
        assert leaf.path[0] == 0


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
    # From a stream of its own, which never changes: not the one that its message is sampled with.
    [uniform] = uniforms(1, "random scorer", 0, "p", (0,))
    assert values(0, "p")[0] == 2 * uniform - 1
    [uniform_of_message] = uniforms(1, 0, "p", (0,))
    assert uniform != uniform_of_message
    assert -1 <= min(values(0, "p")) < -0.9
    assert 0.9 < max(values(0, "p")) <= 1


def test_scorers_change_handlers_not_searches():
    for function in (mcts, sbs, best_of_n):
        source = inspect.getsource(function)
        for scorer in search.SCORERS:
            assert f'"{scorer}"' not in source


def test_each_request_is_answered_by_its_own_model():
    """V answers Score, the ORM answers Outcome, and no ORM is there at lambda = 0."""
    scorers = {"value": "V", "outcome": "ORM", "policy": "likelihood"}

    def handlers(scorer, lam):
        method = Method("m", "mcts", scorer, 2, (1, 1, 1, 1), lam=lam)
        return list(make_handlers(method, scorers, "agents").items())

    # The cheapest comes first.
    assert handlers("value", 0.0) == [(Score, "V"), (Sample, "agents")]
    assert handlers("value", 0.5) == [(Score, "V"), (Outcome, "ORM"), (Sample, "agents")]
    assert handlers("policy", 0.5) == [(Score, "likelihood"), (Outcome, "ORM"), (Sample, "agents")]
    assert handlers("outcome", 0.0) == [(Score, "ORM"), (Sample, "agents")]
    assert handlers(None, 0.0) == [(Sample, "agents")]


def load_scorers_of(names, mas, tmp_path, monkeypatch, **flags):
    """Load the scorers of methods; instead of a model, each folder's name is loaded."""
    targets = {"value": "search", "orm": "outcome", "another": None}
    for name, target in targets.items():
        (tmp_path / name).mkdir(exist_ok=True)
        write_config(tmp_path / name, {"settings": {"target": target}})

    def load(folder, mas, *, device, dtype):
        return folder.name, mas.name, device, dtype

    monkeypatch.setattr(search.ValueModel, "load", load)
    flags = {"value": None, "orm": None, "device": "cpu", "dtype": "float32"} | flags
    args = SimpleNamespace(run=tmp_path, seed=5, batch_tokens=99, **flags)
    methods = [parse_method(name, mas, num_candidates="3", lam=0.0) for name in names]
    return load_scorers(methods, args, mas)


def test_only_the_models_that_a_method_queries_are_loaded(chain, tmp_path, monkeypatch):
    load = partial(load_scorers_of, mas=chain, tmp_path=tmp_path, monkeypatch=monkeypatch)
    scorers = load(["greedy", "sbs-2x2-random"])
    assert scorers.keys() == {"policy", "random"}
    assert scorers["random"].seed == 5

    scorers = load(["greedy", "mcts-3-value"])
    assert scorers.keys() == {"policy", "random", "value"}
    assert scorers["value"].model == ("value", "chain", "cpu", "float32")
    assert scorers["value"].batch_tokens == 99

    scorers = load(["mcts-3-value-lam0.5"])
    assert scorers["value"].model == ("value", "chain", "cpu", "float32")
    assert scorers["outcome"].model == ("orm", "chain", "cpu", "float32")

    another = str(tmp_path / "another")
    assert load(["mcts-3-value"], value=another)["value"].model[0] == "another"
    assert load(["best_of-3-outcome"], orm=another)["outcome"].model[0] == "another"


@pytest.mark.parametrize(
    "method, flags", [("mcts-3-value", {"value": "orm"}), ("best_of-3-outcome", {"orm": "value"})]
)
def test_v_is_not_taken_for_the_orm_nor_the_orm_for_v(chain, tmp_path, monkeypatch, method, flags):
    """A method that mixes V with itself would carry the name of one with an ORM."""
    paths = {flag: str(tmp_path / folder) for flag, folder in flags.items()}
    with pytest.raises(InputError, match="it was trained with --target (search|outcome)"):
        load_scorers_of([method], chain, tmp_path, monkeypatch, **paths)


class CountingModel:
    """A value model whose value of a state is its number of messages, at two tokens each."""

    def __init__(self):
        self.num_scored = 0
        self.on_rows = ignore

    def score(self, states, *, batch_tokens):
        assert batch_tokens == 99
        self.num_scored += len(states)
        return [len(state.messages) for state in states]

    def num_tokens(self, states):
        prefixes = set()
        for state in states:
            for length in range(1, len(state.messages) + 1):
                prefixes.add(state.messages[:length])
        return 2 * len(prefixes)


def test_a_model_scores_all_requests_together_and_each_gets_its_own(duo, monkeypatch):
    times = iter([100.0, 102.5])
    monkeypatch.setattr(search.time, "perf_counter", lambda: next(times))
    root = make_root("q")
    first = expand(duo, root, [Candidate(text, 1, 0.0, False) for text in "xyz"])
    second = expand(duo, first[0], [Candidate(text, 1, 0.0, False) for text in "xy"])
    requests = [(None, Score(second)), (None, Outcome(first)), (None, Score([second[0]]))]
    replies = ModelScorer(CountingModel(), batch_tokens=99)(requests)

    assert [values for values, _ in replies] == [[2, 2], [1, 1, 1], [2]]
    costs = [cost for _, cost in replies]
    # The two children of one node share its message.
    assert [cost.scored_tokens for cost in costs] == [2 + 2 + 2, 2 + 2 + 2, 2 + 2]
    # The 2.5 seconds are divided by the number of distinct states.
    assert [cost.seconds for cost in costs] == [1.0, 1.5, 0.5]
    for cost in costs:
        assert (cost.agent_calls, cost.prompt_tokens, cost.generated_tokens) == (0, 0, 0)


def test_a_state_is_scored_once_and_every_method_is_charged_for_it(duo):
    root = make_root("q")
    states = expand(duo, root, [Candidate(text, 1, 0.0, False) for text in "xyz"])
    model = CountingModel()
    scorer = ModelScorer(model, batch_tokens=99)
    [first] = scorer([(None, Score(states[:2]))])
    progress = []
    model.on_rows = progress.append
    assert scorer([(None, Score(states[:2]))]) == [first]
    assert model.num_scored == 2
    assert sum(progress) == 2
    [(values, cost)] = scorer([(None, Score(states))])
    assert values == [1, 1, 1]
    assert model.num_scored == 3
    assert cost.scored_tokens == 3 * 2
    assert sum(progress) == 2 + 2  # those that were known; the model reports the others

    # Equal states of one request, as passes with equal messages have, are read once.
    [(values, cost)] = scorer([(None, Score([states[0], states[0]]))])
    assert values == [1, 1]
    assert cost.scored_tokens == 2


def test_a_launched_process_loads_v_on_its_own_gpu(chain, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    scorers = load_scorers_of(["mcts-3-value"], chain, tmp_path, monkeypatch, device="cuda")
    assert scorers["value"].model == ("value", "chain", "cuda:3", "float32")


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


def test_a_search_by_the_orm_has_no_lambda(chain):
    """Its terminal values are those of the ORM already."""
    with pytest.raises(InputError, match="lam0.5: it is guided by the ORM"):
        parse_method("mcts-8x3-outcome-lam0.5", chain, num_candidates="3", lam=0.0)
    assert parse_method("mcts-8x3-outcome", chain, num_candidates="3", lam=0.5).lam == 0.0
    assert parse_method("mcts-8x3-outcome-lam0", chain, num_candidates="3", lam=0.5).lam == 0.0


@pytest.mark.parametrize("name", GRAPHS)
def test_the_default_method_fits_every_graph(name):
    graph = GRAPHS[name]
    method = parse_method(search.default_method(graph), graph, num_candidates="3", lam=0.0)
    assert method.scorer == "value" and len(method.num_candidates) == len(graph.agents)
    if name == "chain":
        assert method.name == "mcts-8x1.8.1.1-value"


def test_one_method_has_one_name_and_so_one_file_of_records(chain):
    for name in ("sbs-2x3-value", "mcts-2x3-value"):
        spelled_out = name.replace("x3", "x3.3.3.3")
        assert parse_method(spelled_out, chain, num_candidates="1", lam=0.0).name == name


def trace(guided_search):
    """Drive a search. Returns all its requests, then the path of its answer."""
    scorers = {
        Score: ScriptedScorer(partial(random_value, "value")),
        Outcome: ScriptedScorer(partial(random_value, "outcome")),
    }
    policy = ScriptedPolicy(lambda path: f"Final answer: {sum(path) % 3}")
    requests = []

    def recorded(requested):
        [(_, request)] = requested
        paths = [node.path for node in request.nodes]
        requests.append((type(request).__name__, paths, request[1:]))
        handler = scorers.get(type(request), policy)
        return handler(requested)

    leaf = drive(guided_search, dict.fromkeys((Score, Outcome, Sample), recorded))
    return [*requests, leaf.path]


def mcts_with(*, c_uct, lam):
    counts = (1, 3, 2, 2)
    return mcts("q", CHAIN, num_simulations=9, num_candidates=counts, c_uct=c_uct, lam=lam)


STARTED = [  # name, c of Eq. 2, and the search that it starts
    ("greedy", 1.0, lambda: greedy("q", CHAIN)),
    ("vote-5", 1.0, lambda: vote("q", CHAIN, "number", num=5)),
    ("best_of-4-value", 1.0, lambda: best_of_n("q", CHAIN, num=4)),
    ("sbs-2x3-value", 1.0, lambda: sbs("q", CHAIN, beam_width=2, num_candidates=(3, 3, 3, 3))),
    (
        "sbs-3x1.3.1.2-value",
        1.0,
        lambda: sbs("q", CHAIN, beam_width=3, num_candidates=(1, 3, 1, 2)),
    ),
    ("mcts-9x1.3.2.2-value", 0.0, lambda: mcts_with(c_uct=0.0, lam=0.0)),
    ("mcts-9x1.3.2.2-value", 4.0, lambda: mcts_with(c_uct=4.0, lam=0.0)),
    ("mcts-9x1.3.2.2-value-lam0.5", 1.0, lambda: mcts_with(c_uct=1.0, lam=0.5)),
    ("mcts-9x1.3.2.2-value-lam1", 1.0, lambda: mcts_with(c_uct=1.0, lam=1.0)),
]


def test_a_method_starts_the_search_it_names_with_its_settings():
    problem = Problem("p", "test", "q", gold="1", answer_type="number")
    traces = []
    for name, c_uct, start in STARTED:
        method = parse_method(name, CHAIN, num_candidates="7", lam=0.0)
        traced = trace(method.search(problem, CHAIN, c_uct=c_uct))
        assert traced == trace(start()), name
        assert traced not in traces, name  # every setting changes the search
        traces.append(traced)


def test_a_vote_is_given_the_answer_type_of_its_problem(duo):
    answers = ["A", "(b)", "B."]
    policy = ScriptedPolicy(lambda path: f"Final answer: {answers[path[0]]}")
    problem = Problem("p", "test", "q", gold="A", answer_type="letter")
    method = parse_method("vote-3", duo, num_candidates="1", lam=0.0)
    leaf = drive(method.search(problem, duo, c_uct=1.0), {Sample: policy})
    assert leaf.path[0] != 0 and leaf.message.text == "Final answer: (b)"


@pytest.mark.parametrize("lam", [0.1234567, 0.12345671, 1e-7, 0.3, 1.0])
def test_every_lambda_has_a_name_of_its_own_that_can_be_read(chain, lam):
    method = parse_method("mcts-8x2-value", chain, num_candidates="1", lam=lam)
    assert parse_method(method.name, chain, num_candidates="1", lam=0.0) == method
    assert method.lam == lam


def test_flags_complete_the_name_of_an_mcts(chain):
    """The flags give what the name leaves out, and the canonical name says it."""
    method = parse_method("mcts-8-value", chain, num_candidates="1.5.1.1", lam=0.25)
    assert method.name == "mcts-8x1.5.1.1-value-lam0.25"
    assert (method.num_candidates, method.lam) == ((1, 5, 1, 1), 0.25)
    method = parse_method("mcts-8x2-value-lam0", chain, num_candidates="1.5.1.1", lam=0.25)
    assert method.name == "mcts-8x2-value"
    assert (method.num_candidates, method.lam) == ((2, 2, 2, 2), 0.0)
    method = parse_method("mcts-8-value", SINGLE, num_candidates="4", lam=0.0)
    assert method.name == "mcts-8x4-value"
    # Lambda belongs to mcts alone.
    method = parse_method("sbs-2x2-value", chain, num_candidates="3", lam=0.25)
    assert (method.name, method.lam, method.models) == ("sbs-2x2-value", 0.0, {"value"})
    assert parse_method("best_of-3-value", chain, num_candidates="3", lam=0.25).lam == 0.0


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
    "sbs-2x1.2-value",
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
    with pytest.raises(InputError, match=f"^method {re.escape(name)}:? "):
        parse_method(name, chain, num_candidates="3", lam=0.0)


def test_a_bad_flag_for_an_mcts_is_named(chain):
    with pytest.raises(InputError, match="^--num-candidates 0: "):
        parse_method("mcts-8-value", chain, num_candidates="0", lam=0.0)


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


@pytest.mark.parametrize("method", ["greedy", "vote-4", "best_of-4-value"])
def test_a_page_of_a_method_without_a_tree_is_refused_before_it_searches(monkeypatch, method):
    monkeypatch.setattr(search, "choose_problem", None)  # to go on would raise a TypeError
    args = search.parse_args(["--method", method, "--html", "tree.html"])
    with pytest.raises(InputError, match=f"--html: {method} has no tree; take an sbs or mcts"):
        search.main(args)


# ---- The script ----------------------------------------------------------------------------------


def test_the_defaults_of_a_search_are_those_of_the_readme():
    args = generate_rollouts.parse_args([])
    assert (args.num_simulations, args.num_candidates, args.c_uct) == (40, "3", 1.0)
    assert (args.temperature, args.top_k, args.top_p) == (1.0, 0, 1.0)
    assert search.parse_args([]).lam == 0.0


@pytest.mark.parametrize("task, kind", [("tiny", "number"), ("math", "math"), ("mmlu", "letter")])
def test_a_question_of_the_user_has_the_answer_type_of_the_task(task, kind):
    args = search.parse_args(["--task", task, "--question", " Which? "])
    expected = Problem("question", "test", "Which?", gold="", answer_type=kind)
    assert search.choose_problem(args) == expected


def test_a_question_beside_own_data_has_the_answer_type_of_the_data(tmp_path):
    data = tmp_path / "own.jsonl"
    data.write_text('{"question": "Which?", "answer": "B", "choices": ["x", "y"]}\n')
    args = search.parse_args(["--data", str(data), "--question", "Who?"])
    assert search.choose_problem(args).answer_type == "letter"


def test_a_single_search_explores_as_the_flag_says(tmp_path, monkeypatch):
    given = []

    def stop(self, problem, mas, *, c_uct):
        given.append(c_uct)
        raise StopError

    monkeypatch.setattr(Method, "search", stop)
    monkeypatch.setattr(search, "make_policy", lambda args, mas: None)
    flags = ["--run", str(tmp_path), "--method", "mcts-2-random", "--c-uct", "0.25"]
    with pytest.raises(StopError):
        search.main(search.parse_args(flags))
    assert given == [0.25]


def test_the_tree_shows_n_q_and_v_of_each_node_and_the_path_to_the_answer(duo):
    """After the five simulations worked out above."""
    handlers = scripted_handlers(VALUES_BY_HAND.__getitem__)
    leaf, root = explore(duo, handlers, num_simulations=5, num_candidates=(2, 2), c_uct=0.0)
    lines = search.show_tree(root, leaf, width=80).splitlines()
    assert [line.split()[:7] for line in lines] == [
        ["A", "N", "5", "Q", "+0.18", "V", "+0.50"],
        ["B", "N", "5", "Q", "+0.10", "V", "+0.10"],
        ["B", "N", "1", "Q", "-0.30", "V", "-0.30"],
        ["*", "A", "N", "2", "Q", f"{1.09 / 2:+.2f}", "V"],
        ["*", "B", "N", "2", "Q", "+0.90", "V"],
        ["B", "N", "1", "Q", "+0.00", "V", "+0.00"],
    ]


def test_what_guides_a_search_has_its_name_in_what_is_printed(duo, capsys):
    problem = Problem("p", "test", "q", "7", "number")
    for scorer, name in (("policy", "policy"), ("value", "V"), ("outcome", "ORM")):
        method = parse_method(f"sbs-1x2-{scorer}", duo, num_candidates="1", lam=0.0)
        handlers = scripted_handlers(lambda path: 0.5)
        leaf = drive(method.search(problem, duo, c_uct=1.0), handlers)
        cost = Cost(truncated=Counter({"A": 2, "B": 1}))
        search.print_solution(problem, method, leaf, cost)
        out = capsys.readouterr().out
        assert f"    {name} = +0.500, mean" in out and "3 messages cut" in out
        assert (f"The tree; V is {name}" in out) == (name != "V")


@pytest.mark.parametrize("gold, verdict", [("7", "right"), ("8", "wrong")])
def test_the_verdict_and_the_cost_of_a_search_are_printed(duo, capsys, gold, verdict):
    problem = Problem("p", "test", "q", gold, "number")
    method = parse_method("greedy", duo, num_candidates="1", lam=0.0)
    policy = ScriptedPolicy(lambda path: "Final answer: 7")
    leaf = drive(method.search(problem, duo, c_uct=1.0), {Sample: policy})
    cost = Cost(agent_calls=2, prompt_tokens=30, generated_tokens=4, scored_tokens=50, seconds=1.5)
    search.print_solution(problem, method, leaf, cost)
    out = capsys.readouterr().out
    assert f"Answer: 7   (gold {gold}: {verdict})" in out
    assert "greedy: 2 agent calls, 1.50 s, 0 messages cut" in out
    assert "tokens: 30 prompt, 4 generated, 50 scored" in out
