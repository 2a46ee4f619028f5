"""Tests of search.py: MCTS, beams, passes, scorers, methods by name. Trees worked out by hand."""

import json
import math
from collections import Counter
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from searching import (
    DUO,
    FORKED,
    Answers,
    ScriptedPolicy,
    ScriptedScorer,
    drive,
    random_value,
    run,
    scripted_handlers,
)

import search
from mas import CHAIN, load_graph
from search import (
    ModelScorer,
    RandomScorer,
    decide,
    load_scorers,
    mcts,
    parse_method,
    path_to,
    policy_scorer,
    sbs,
)
from support.flags import InputError
from support.runs import write_config
from tasks.problems import Problem
from tree import Candidate, Cost, OrmScore, Sample, Score, expand, make_root, tree_fields

GOLDEN = Path(__file__).parent / "golden"
RANDOM_SEARCHES = settings(derandomize=True, deadline=None, database=None, max_examples=25)
COUNTS = st.tuples(*[st.integers(1, 3)] * 4)


def method_named(name, mas=CHAIN):
    return parse_method(name, mas, num_candidates="3", lam=0.0)


def explore(mas, handlers, *, lam=0.0, **settings):
    """Run MCTS on scripted handlers. Returns the chosen leaf and the root."""
    leaf = drive(mcts("q", mas, lam=lam, **settings), handlers)
    return leaf, path_to(leaf)[0]


def statistics_of(nodes):
    return [(node.N, round(node.W, 9)) for node in nodes or []]


# ---- MCTS ----------------------------------------------------------------------------------------

VALUES_BY_HAND = {(0,): 0.5, (1,): 0.19}
VALUES_BY_HAND |= {(0, 0): 0.1, (0, 1): -0.3, (1, 0): 0.9, (1, 1): 0.0}

STATISTICS_BY_HAND = [
    # simulations, (N, W) of a0 and a1, of the children of a0, of the children of a1, chosen leaf
    (1, [(2, 0.60), (1, 0.19)], [(2, 0.2), (1, -0.3)], [], (0, 0)),
    (4, [(5, 0.90), (1, 0.19)], [(5, 0.5), (1, -0.3)], [], (0, 0)),
    (5, [(5, 0.90), (2, 1.09)], [(5, 0.5), (1, -0.3)], [(2, 1.8), (1, 0.0)], (1, 0)),
]


@pytest.mark.parametrize("num_simulations, of_root, of_a0, of_a1, chosen", STATISTICS_BY_HAND)
def test_mcts_with_virtual_visits_by_hand(num_simulations, of_root, of_a0, of_a1, chosen):
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
    handlers = scripted_handlers(DUO, VALUES_BY_HAND.__getitem__)
    settings = {"num_simulations": num_simulations, "num_candidates": (2, 2), "c_uct": 0.0}
    leaf, root = explore(DUO, handlers, **settings)
    a0, a1 = root.children
    assert num_simulations == root.N
    assert statistics_of(root.children) == of_root
    assert statistics_of(a0.children) == of_a0
    assert statistics_of(a1.children) == of_a1
    assert leaf.path == chosen


@pytest.mark.parametrize("lam, expected", [(0.0, 0.6), (0.25, 0.35), (1.0, -0.4)])
def test_lambda_mixes_terminal_values(lam, expected):
    """The terminal value is (1 - lambda) * 0.6 + lambda * -0.4."""
    handlers = scripted_handlers(DUO, lambda path: 0.6, orm=lambda path: -0.4)
    leaf, _ = explore(DUO, handlers, num_simulations=1, num_candidates=(1, 1), c_uct=1.0, lam=lam)
    assert leaf.value == pytest.approx(expected)
    assert leaf.N == 2 and pytest.approx(0.6 + expected) == leaf.W
    # Lambda 0 never queries the ORM.
    assert handlers[OrmScore].paths == ([(0, 0)] if lam > 0 else [])
    assert (leaf.V, leaf.orm) == (0.6, -0.4 if lam > 0 else None)


def replay(root, c_uct, terminal_value):
    """Replay a search from the order of its final states: check Eq. 2 at every step.

    Returns N and W of each node. terminal_value: what is backed up from a final state.
    """
    N, W = Counter(), Counter()
    expanded = set()
    for [end] in root.simulations:
        path = path_to(end)
        for node, taken in pairwise(path):
            if node not in expanded:
                expanded.add(node)
                N.update({child: 1 for child in node.children})  # virtual visits
                W.update({child: child.V for child in node.children})
            log_total = math.log(1 + sum(N[child] for child in node.children))
            bounds = []
            for child in node.children:
                bounds.append(W[child] / N[child] + c_uct * math.sqrt(log_total / (1 + N[child])))
            assert node.children[bounds.index(max(bounds))] is taken
        N.update(path)
        W.update(dict.fromkeys(path, terminal_value(end)))
    return N, W


SETTINGS = {
    "num_simulations": st.integers(1, 12),
    "num_candidates": COUNTS,
    "c_uct": st.sampled_from([0.0, 0.5, 3.0]),
    "lam": st.sampled_from([0.0, 0.3, 1.0]),
}


@RANDOM_SEARCHES
@given(seed=st.integers(0, 999), settings=st.fixed_dictionaries(SETTINGS))
def test_mcts_is_eq_2_on_virtual_visits_and_terminal_values(seed, settings):
    value, orm = partial(random_value, "value", seed), partial(random_value, "orm", seed)
    handlers = scripted_handlers(CHAIN, value, orm=orm)
    leaf, root = explore(CHAIN, handlers, **settings)
    lam = settings["lam"]

    def terminal_value(end):
        assert CHAIN.is_terminal(end.state)
        return (1 - lam) * value(end.path) + lam * orm(end.path)

    # 1. The statistics. A final state is sent to the ORM once; at lambda = 0 none is.
    N, W = replay(root, settings["c_uct"], terminal_value)
    assert N[root] == settings["num_simulations"]
    for node in N:
        assert (node.N, pytest.approx(node.W)) == (N[node], W[node])
    reached = {end.path for [end] in root.simulations}
    assert sorted(handlers[OrmScore].paths) == (sorted(reached) if lam > 0 else [])

    # 2. The decision: at every step the best Q of those that a simulation has passed through.
    assert CHAIN.is_terminal(leaf.state)
    assert decide(root, CHAIN) is leaf
    for node in path_to(leaf)[1:]:
        rivals = [child.Q for child in node.parent.children if child.N > 1]
        assert node.N > 1 and max(rivals) == node.Q


# ---- Step-level beam search ----------------------------------------------------------------------


def test_sbs_keeps_the_best_b1_of_all_beams_and_breaks_ties_by_order():
    """B1 = 2, B2 = 3 and 2.

    V of the first messages:       (0,) 0.5    (1,) 0.4    (2,) 0.9: (1,) is dropped.
    V of the second messages:      (0, 0) 0.2  (0, 1) 0.1  (2, 0) 0.8  (2, 1) 0.7
    """
    values = {(0,): 0.5, (1,): 0.4, (2,): 0.9}
    values |= {(0, 0): 0.2, (0, 1): 0.1, (2, 0): 0.8, (2, 1): 0.7}
    handlers = scripted_handlers(DUO, values.__getitem__)
    leaf = drive(sbs("q", DUO, beam_width=2, num_candidates=(3, 2)), handlers)
    assert leaf.path == (2, 0)
    # The best beam comes first; both are asked together, and each state is scored once.
    assert [request[1:3] for request in handlers[Sample].requests] == [
        ([()], 3),
        ([(2,), (0,)], 2),
    ]
    assert sorted(handlers[Score].paths) == sorted(values)

    ties = scripted_handlers(DUO, lambda path: 0.0)
    assert drive(sbs("q", DUO, beam_width=2, num_candidates=(3, 2)), ties).path == (0, 0)


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

    handlers = scripted_handlers(CHAIN, value)
    searched = sbs("q", CHAIN, beam_width=beam_width, num_candidates=num_candidates)
    assert drive(searched, handlers).path == beams[0]
    assert handlers[Score].paths == scored


@pytest.mark.parametrize("value_of_other, winner", [(0.5, (0,)), (0.6, (0,)), (0.61, (1, 0))])
def test_a_finished_transcript_competes_with_its_last_score(value_of_other, winner):
    """A says "stop" (V 0.6) or "go" (V 0.7), then B speaks. The finished one wins a tie."""
    values = {(0,): 0.6, (1,): 0.7, (1, 0): value_of_other}
    texts = ["stop", "go"]
    handlers = scripted_handlers(FORKED, values.__getitem__, say=lambda path: texts[path[0]])
    beams = sbs("q", FORKED, beam_width=2, num_candidates=(2, 1, 1))
    assert drive(beams, handlers).path == winner
    # The finished one is not scored again.
    assert handlers[Score].paths == [(0,), (1,), (1, 0)]


def test_beams_that_wait_for_different_agents_get_the_candidates_of_their_agent():
    """After A, one beam waits for B (3 candidates) and two wait for C (2 candidates)."""
    handlers = scripted_handlers(
        FORKED,
        lambda path: path[-1] / 10,
        say=lambda path: ["go", "on", "on too"][path[0]] + str(path[1:]),
    )
    leaf = drive(sbs("q", FORKED, beam_width=3, num_candidates=(3, 3, 2)), handlers)
    assert [request[1:3] for request in handlers[Sample].requests] == [
        ([()], 3),
        ([(2,), (1,)], 2),
        ([(0,)], 3),
    ]
    assert leaf.path == (0, 2)


# ---- Passes --------------------------------------------------------------------------------------

VOTES = [  # answer type, the answers of the passes, and which pass wins
    ("number", ["1", "2.0", "2", "4/2"], 1),
    ("letter", ["A", "(b)", "B.", "C"], 1),
    # By their texts, these three answers would tie, and 3 would win.
    ("math", ["3", r"$\sqrt{12}$", r"$2\sqrt{3}$"], 1),
    # A tie goes to the answer seen first.
    ("number", ["7", "1", "2", "2", "1"], 1),
    # A pass without an answer has no vote.
    ("number", ["none", "none", "7"], 2),
    ("number", ["none", "none"], 0),
]


@pytest.mark.parametrize("answer_type, answers, winner", VOTES)
def test_a_vote_clusters_answers_by_the_equality_that_grades(answer_type, answers, winner):
    handlers = scripted_handlers(DUO, None, say=lambda path: f"Final answer: {answers[path[0]]}")
    problem = problem_about("q", answer_type=answer_type)
    method = method_named(f"vote-{len(answers)}", DUO)
    assert drive(method.search(problem, DUO, c_uct=1.0), handlers).path == (winner, 0)


def test_passes_are_independent_even_if_they_start_with_equal_messages():
    """Equal first messages must not make equal second ones: each pass is an independent sample."""
    handlers = scripted_handlers(DUO, lambda path: path[0], say=lambda path: "same")
    search_passes = method_named("best_of-3-value", DUO).search(problem_about("q"), DUO, c_uct=1.0)
    assert drive(search_passes, handlers).path == (2, 0)
    asked = [(len(paths), num) for _, paths, num, _ in handlers[Sample].requests]
    assert asked == [(1, 3), (3, 1)]


def test_of_passes_with_equal_scores_the_first_wins_even_if_a_later_one_ends_earlier():
    handlers = scripted_handlers(FORKED, lambda path: 0.0, say=lambda path: ["go", "stop"][path[0]])
    method = method_named("best_of-2-value", FORKED)
    assert drive(method.search(problem_about("q"), FORKED, c_uct=1.0), handlers).path == (0, 0)


# ---- Every search --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mcts-16x2.3.3.3-value-lam0.5", "sbs-3x2.3.3.3-value"])
def test_the_whole_tree_of_a_search_is_the_golden_one(name):
    """Of the candidates of a state, the second and third are equal: they are merged."""
    scorers = {name: ScriptedScorer(partial(random_value, name)) for name in ("value", "orm")}
    policy = ScriptedPolicy(CHAIN, lambda path: f"{path[:-1]} Final answer: {min(path[-1], 1)}")
    [(_, leaf, _)] = run(
        method_named(name), [problem_about("q")], policy, scorers, c_uct=1.5, max_active=1
    )
    tree = tree_fields(path_to(leaf)[0], CHAIN, "number", chosen=leaf)
    for node in tree["nodes"]:
        node.pop("rung", None)
    assert json.loads(json.dumps(tree)) == json.loads((GOLDEN / f"{name}.json").read_text())


class WithoutGold:
    """A problem whose gold answer nobody may read: it has a question, an id and an answer type."""

    id, question, answer_type = "p", "q", "number"

    def __getattr__(self, name):
        raise AssertionError(f"a search has read the {name} of its problem")


EVERY_METHOD = ["greedy", "vote-3", "best_of-3-value", "best_of-3-orm", "sbs-2x2-value"]
EVERY_METHOD += ["sbs-2x3.2.1.2-policy", "mcts-5x2-value", "mcts-5x2-random"]
EVERY_METHOD += ["mcts-5x2-value-lam0.5"]


def problem_about(question, **fields):
    fields = {"id": "p", "split": "test", "gold": "1", "answer_type": "number"} | fields
    return Problem(question=question, **fields)


def solve(name, problem):
    """Run a method. Returns all that it asks, its answer and its cost."""
    scorers = {
        "value": ScriptedScorer(partial(random_value, "value")),
        "orm": ScriptedScorer(partial(random_value, "orm")),
        "policy": policy_scorer,
        "random": RandomScorer(0),
    }
    policy = ScriptedPolicy(CHAIN, lambda path: f"Final answer: {sum(path)} {path}")
    [(_, leaf, cost)] = run(method_named(name), [problem], policy, scorers, c_uct=1.0, max_active=1)
    asked = (policy.requests, scorers["value"].paths, scorers["orm"].paths)
    return asked, leaf.path, leaf.state, cost


@pytest.mark.parametrize("name", EVERY_METHOD)
def test_no_search_is_given_the_gold_answer(name):
    """Problems that differ in everything but question, id and answer type are solved alike."""
    solution = solve(name, problem_about("q", subject="x"))
    assert solve(name, problem_about("q", split="train", gold="2", level="1")) == solution
    assert solve(name, WithoutGold()) == solution

    (requests, of_value, of_orm), _, state, cost = solution
    assert state.question == "q"
    assert all(is_greedy is (name == "greedy") for *_, is_greedy in requests)
    # Each request is answered, and charged, by its own scorer.
    assert (len(of_value) > 0, len(of_orm) > 0) == ("value" in name, "orm" in name or "lam" in name)
    assert cost.scored_tokens == len(of_value) + len(of_orm)
    assert cost.agent_calls == sum(num * len(paths) for _, paths, num, _ in requests)


@pytest.mark.parametrize("name", ["vote-3", "sbs-2x3-random", "mcts-6x1.3.2.2-random-lam0.5"])
def test_200_searches_together_give_the_trees_of_one_at_a_time(name):
    problems = [problem_about(f"q{index}", id=f"p{index}") for index in range(200)]
    scorers = {"random": RandomScorer(0), "orm": RandomScorer(1)}
    solutions = []
    for max_active in (200, 1):
        policy = Answers(CHAIN, say=None)
        solved = {}
        for problem, leaf, cost in run(
            method_named(name), problems, policy, scorers, c_uct=1.0, max_active=max_active
        ):
            assert leaf.state.question == problem.question
            tree = tree_fields(path_to(leaf)[0], CHAIN, "number", None) if "x" in name else None
            solved[problem.id] = (leaf.path, leaf.state, cost, tree)
        solutions.append(solved)
    assert solutions[0] == solutions[1] and len(solutions[0]) == 200


# ---- Scorers -------------------------------------------------------------------------------------


def children_of(root, *texts):
    return expand(DUO, root, [Candidate(text, 1, 0.0, False) for text in texts])


def test_the_policy_scorer_maps_the_mean_token_logprob():
    """2 * exp(mean log-probability) - 1: probability 1 maps to 1, and 1/2 to 0 at any length."""
    half = math.log(0.5)
    candidates = [
        Candidate("sure", tokens=4, logprob=0.0, truncated=False),
        Candidate("half", tokens=2, logprob=2 * half, truncated=False),
        Candidate("long", tokens=8, logprob=8 * half, truncated=False),
        Candidate("rare", tokens=2, logprob=4 * half, truncated=False),
    ]
    nodes = expand(DUO, make_root("q"), candidates)
    [(values, cost)] = policy_scorer([(None, Score(nodes))])
    assert values == pytest.approx([1.0, 0.0, 0.0, -0.5])
    assert cost == Cost()


def test_the_random_scorer_is_a_function_of_seed_problem_and_path():
    nodes = children_of(make_root("q"), *map(str, range(200)))

    def values(seed, problem_id):
        [(reply, _)] = RandomScorer(seed)([(problem_about("q", id=problem_id), Score(nodes))])
        return reply

    assert values(0, "p") != values(1, "p") != values(1, "q")
    assert len(set(values(0, "p"))) == 200
    # From a stream of its own: not the one that its message is sampled with.
    assert values(0, "p")[0] == random_value("random scorer", 0, "p", (0,))
    assert -1 <= min(values(0, "p")) < -0.9
    assert 0.9 < max(values(0, "p")) <= 1


class CountingModel:
    """A value model that reads the value of a state from its newest message."""

    num_scored = 0

    def score(self, states, *, batch_tokens):
        self.num_scored += len(states)
        return [int(state.messages[-1].text) for state in states]

    def num_tokens(self, states):
        return 2 * len(states)


def test_a_state_is_scored_once_and_every_request_is_charged_for_what_it_reads():
    first = children_of(make_root("q"), "1", "2", "3")
    second = children_of(first[0], "4", "5")
    model = CountingModel()
    scorer = ModelScorer(model, batch_tokens=99)
    requests = [(None, Score(second)), (None, OrmScore(first)), (None, Score([second[1]] * 2))]
    replies = scorer(requests)
    assert [values for values, _ in replies] == [[4, 5], [1, 2, 3], [5, 5]]
    assert [cost.scored_tokens for _, cost in replies] == [4, 6, 2]
    # Another method asks again: nothing is scored, and the same is charged.
    assert scorer(requests) == replies
    assert model.num_scored == 5


def test_v_is_not_taken_for_the_orm_nor_the_orm_for_v(tmp_path):
    """A method that mixes V with itself would carry the name of one with an ORM."""
    args = search.parse_args(["--value", str(tmp_path), "--orm", str(tmp_path)])
    for target, name in (("outcome", "mcts-3-value"), ("search", "sbs-1x1-orm")):
        write_config(tmp_path, {"settings": {"target": target}})
        with pytest.raises(InputError, match=f"{tmp_path}: trained with --target {target}"):
            load_scorers([method_named(name)], args, CHAIN)


# ---- Methods by name -----------------------------------------------------------------------------

FLAGS = [  # name, --num-candidates, --lam, graph, and the canonical name
    ("mcts-8-value", "1.5.1.1", 0.25, CHAIN, "mcts-8x1.5.1.1-value-lam0.25"),
    ("mcts-8x2-value-lam0", "1.5.1.1", 0.25, CHAIN, "mcts-8x2-value"),
    ("mcts-8-value", "4", 0.0, load_graph("single"), "mcts-8x4-value"),
    ("mcts-8x2.2.2.2-value-lam1.0", "1", 0.0, CHAIN, "mcts-8x2-value-lam1"),
    # Every lambda has a name of its own.
    ("mcts-8x2-value", "3", 0.12345671, CHAIN, "mcts-8x2-value-lam0.12345671"),
    ("mcts-8x2-value", "3", 1e-7, CHAIN, "mcts-8x2-value-lam1e-07"),
    # Lambda belongs to mcts alone, and not to one that is guided by the ORM.
    ("sbs-2x2-value", "3", 0.25, CHAIN, "sbs-2x2-value"),
    ("best_of-3-value", "3", 0.25, CHAIN, "best_of-3-value"),
    ("mcts-8x3-orm", "3", 0.5, CHAIN, "mcts-8x3-orm"),
]


@pytest.mark.parametrize("name, num_candidates, lam, graph, canonical", FLAGS)
def test_flags_complete_the_name_of_an_mcts(name, num_candidates, lam, graph, canonical):
    """The canonical name says all settings, so that a method has one file of records."""
    method = parse_method(name, graph, num_candidates=num_candidates, lam=lam)
    assert method.name == canonical
    assert parse_method(canonical, graph, num_candidates="9", lam=0.0) == method
