"""Search: virtual visits, lambda, the decision, beams, votes; on trees that can be worked out by hand."""

import inspect
import math

import pytest
from conftest import ScriptedPolicy, drive

import search
from generate_rollouts import Candidate, Cost, Outcome, Sample, Score, expand, make_root
from mas import InputError, Problem, extract_answer
from search import Method, RandomScorer, best_of_n, decide, greedy, mcts, parse_method, policy_scorer, sbs, vote


class ScriptedScorer:
    """Answers Score (or Outcome) requests from `value(path)`; counts what it was asked."""

    def __init__(self, value):
        self.value, self.asked = value, []

    def __call__(self, requests):
        self.asked += [node.path for _, request in requests for node in request.nodes]
        return [([self.value(node.path) for node in request.nodes], Cost()) for _, request in requests]


def handlers(value, say=str, outcome=None):
    return {Score: ScriptedScorer(value), Outcome: ScriptedScorer(outcome), Sample: ScriptedPolicy(say)}


def explore(mas, value, n, c, *, candidates, lam=0.0, outcome=None, say=str):
    answered = handlers(value, say, outcome)
    leaf = drive(mcts("q", mas, num_simulations=n, num_candidates=candidates, c_uct=c, lam=lam), answered)
    root = leaf
    while root.parent:
        root = root.parent
    return leaf, root, answered


def test_mcts_with_virtual_visits_by_hand(duo):
    """V: a0 = 0.5, a1 = 0.19; below a0: 0.1, -0.3; below a1: 0.9, 0.0. c = 0: Eq. 2 is the largest Q.

    Simulation 1: children of the root get N = 1, W = V; a0 (0.5) is entered; its children get N = 1, W = V; (0,0) is entered:
    terminal value 0.1. Backed up: (0,0): N 2, W 0.2; a0: N 2, W 0.6, Q 0.3.
    Simulation 2: a0 (0.3) beats a1 (0.19): (0,0) again: N 3, W 0.3; a0: N 3, W 0.7, Q 0.2333.
    Simulation 3: a0 (0.233): N 4, W 0.8, Q 0.2.
    Simulation 4: a0 again: N 5, W 0.9, Q 0.18. Simulation 5: a1 (0.19) is entered, expanded: (1,0) = 0.9: N 2, W 1.8; a1: N 2, W 1.09.
    """
    value = {(0,): 0.5, (1,): 0.19, (0, 0): 0.1, (0, 1): -0.3, (1, 0): 0.9, (1, 1): 0.0}.__getitem__
    stats = lambda root: [(n.N, round(n.W, 9)) for n in (*root.children, *(root.children[0].children or []), *(root.children[1].children or []))]
    _, root, _ = explore(duo, value, 1, 0.0, candidates=(2, 2))
    assert stats(root) == [(2, 0.6), (1, 0.19), (2, 0.2), (1, -0.3)] and root.N == 1
    leaf, root, _ = explore(duo, value, 4, 0.0, candidates=(2, 2))
    assert stats(root) == [(5, 0.9), (1, 0.19), (5, 0.5), (1, -0.3)]
    assert leaf.path == (0, 0)       # a1 has the larger Q (0.19 against 0.18), but only its virtual visit: it has no transcript yet
    leaf, root, _ = explore(duo, value, 5, 0.0, candidates=(2, 2))
    assert stats(root) == [(5, 0.9), (2, 1.09), (5, 0.5), (1, -0.3), (2, 1.8), (1, 0.0)] and leaf.path == (1, 0)


def test_a_virtual_visit_counts_as_a_visit_in_equation_2(duo):
    """Two fresh children, N = 1 each: the first simulation's choice is argmax V + c sqrt(ln(1 + 2) / 2), hence argmax V;
    the second weighs sums of N that hold the virtual visits: ln(1 + 2 + 1)."""
    value = lambda path: {(0,): 0.4, (1,): 0.3}.get(path, 0.4)
    edge = 0.1 / (math.sqrt(math.log(4) / 2) - math.sqrt(math.log(4) / 3))
    for c, second in ((edge - 1e-6, (3, 1)), (edge + 1e-6, (2, 2))):
        _, root, _ = explore(duo, value, 2, c, candidates=(2, 1))
        assert tuple(child.N for child in root.children) == second


@pytest.mark.parametrize("lam, expected", [(0.0, 0.6), (0.5, 0.1), (1.0, -0.4), (0.25, 0.35)])
def test_lambda_mixes_terminal_values(duo, lam, expected):
    leaf, _, answered = explore(duo, lambda path: 0.6, 1, 1.0, candidates=(1, 1), lam=lam, outcome=lambda path: -0.4)
    assert leaf.reward == pytest.approx(expected) and leaf.N == 2 and leaf.W == pytest.approx(0.6 + expected)
    assert answered[Outcome].asked == ([] if lam == 0 else [(0, 0)])          # lambda 0 never asks the ORM


def test_the_orm_is_asked_once_per_terminal_state(duo):
    _, _, answered = explore(duo, lambda path: 0.0, 9, 1.0, candidates=(2, 2), lam=0.5, outcome=lambda path: 0.0)
    assert len(answered[Outcome].asked) == len(set(answered[Outcome].asked)) == 4


def test_lambda_changes_the_decision(duo):
    value = lambda path: {(0, 0): 0.9, (0, 1): 0.1}.get(path, 0.5)
    outcome = lambda path: {(0, 0): -1.0, (0, 1): 1.0}[path]
    pick = lambda lam: explore(duo, value, 8, 1.0, candidates=(1, 2), lam=lam, outcome=outcome)[0].path
    assert pick(0.0) == (0, 0) and pick(1.0) == (0, 1)


def planted(path, best=(1, 2, 0, 1)):
    """V that is right about one path: it grows along it, and is low elsewhere."""
    return 0.2 * len(path) if path == best[:len(path)] else -0.5


def test_every_search_finds_the_planted_best_path(chain):
    leaf, _, answered = explore(chain, planted, 12, 1.0, candidates=(2, 3, 1, 2))
    assert leaf.path == (1, 2, 0, 1)
    answered = handlers(planted)
    assert drive(sbs("q", chain, beam_width=1, num_candidates=(2, 3, 1, 2)), answered).path == (1, 2, 0, 1)
    assert answered[Sample].calls == 2 + 3 + 1 + 2
    last = lambda path: 1.0 if path[0] == 4 else 0.0
    assert drive(best_of_n("q", chain, num=6), handlers(last)).path == (4, 0, 0, 0)


def test_mcts_recovers_from_a_value_that_misleads_at_first(duo):
    """a0 looks best but all below it is bad; search must back up what it finds and turn to a1."""
    value = lambda path: {(0,): 0.8, (1,): 0.1}.get(path, -0.9 if path[0] == 0 else 0.7)
    assert explore(duo, value, 10, 0.5, candidates=(2, 2))[0].path[0] == 1
    assert drive(sbs("q", duo, beam_width=1, num_candidates=(2, 2)), handlers(value)).path[0] == 0   # a beam of one cannot


def test_the_decision_is_terminal_whatever_the_budget(chain):
    for n in (1, 2, 3, 7):
        leaf, root, _ = explore(chain, lambda path: math.sin(sum((i + 2) * p for i, p in enumerate(path))), n, 2.0, candidates=(3, 3, 3, 3))
        assert chain.is_terminal(leaf.state) and leaf.N > 1 and decide(root, chain) is leaf


def test_sbs_keeps_the_best_b1_of_all_beams_and_breaks_ties_by_order(duo):
    value = lambda path: {(0,): 0.5, (1,): 0.4, (2,): 0.9}.get(path, {0: 0.2, 1: 0.8, 2: 0.8}[path[0]] - 0.1 * path[-1])
    answered = handlers(value)
    leaf = drive(sbs("q", duo, beam_width=2, num_candidates=(3, 2)), answered)
    assert leaf.path == (2, 0) and answered[Sample].calls == 3 + 2 * 2                 # (1,) was dropped: not among the best two
    assert sorted(answered[Score].asked) == [(0,), (0, 0), (0, 1), (1,), (2,), (2, 0), (2, 1)]   # each state is scored once
    assert drive(sbs("q", duo, beam_width=2, num_candidates=(3, 2)), handlers(lambda path: 0.0)).path == (0, 0)


def test_greedy_asks_for_greedy_messages_only(chain):
    seen = []

    class Policy(ScriptedPolicy):
        def __call__(self, requests):
            seen.extend((request.num, request.greedy) for _, request in requests)
            return super().__call__(requests)
    drive(greedy("q", chain), {Sample: Policy(str)})
    assert seen == [(1, True)] * 4


def test_vote_clusters_answers_by_the_equality_that_grades(duo):
    def winner(answers, kind):
        leaf = drive(vote("q", duo, kind, num=len(answers)), {Sample: ScriptedPolicy(lambda path: f"Final answer: {answers[path[0]]}")})
        return extract_answer(leaf.state.messages[-1].text, kind)
    assert winner(["1", "2.0", "2", "4/2"], "number") == "2"
    assert winner(["A", "(b)", "B.", "C"], "letter") == "B"
    assert winner([r"$\sqrt{12}$", "3", r"$2\sqrt{3}$"], "math") in (r"\sqrt{12}", r"2\sqrt{3}")
    assert winner(["1", "2"], "number") == "1"                                            # ties: the one seen first
    assert winner(["none", "none", "7"], "number") == "7"                                 # no answer has no vote
    assert winner(["none", "none"], "number") is None


def test_passes_are_independent_even_where_they_begin_alike(duo):
    """Equal first messages must not make equal second ones: passes are samples, not one sample many times."""
    say = lambda path: "same" if len(path) == 1 else f"Final answer: {path}"
    answered = {Sample: ScriptedPolicy(say), Score: ScriptedScorer(lambda path: path[0])}
    assert drive(best_of_n("q", duo, num=3), answered).path == (2, 0) and answered[Sample].calls == 6


def test_policy_scorer_maps_mean_token_logprob(duo):
    root = make_root("q")
    expand(duo, root, [Candidate("sure", 4, 0.0, False), Candidate("half", 2, 2 * math.log(0.5), False), Candidate("long", 8, 8 * math.log(0.5), False)])
    [(values, cost)] = policy_scorer([(None, Score(root.children))])
    assert values == pytest.approx([1.0, 0.0, 0.0]) and cost == Cost()


def test_random_scorer_is_a_function_of_seed_problem_and_path(duo):
    root = make_root("q")
    expand(duo, root, [Candidate(str(i), 1, 0.0, False) for i in range(200)])
    ask = lambda seed, name: RandomScorer(seed)([(Problem(name, "test", "", "", ""), Score(root.children))])[0][0]
    assert ask(0, "p") == ask(0, "p") != ask(1, "p") != ask(1, "q")
    assert -1 <= min(ask(0, "p")) < -0.9 and 0.9 < max(ask(0, "p")) <= 1


def test_no_search_is_given_the_gold_answer():
    for name in ("greedy", "vote", "best_of_n", "sbs", "mcts", "sample_passes"):
        assert not {"problem", "gold"} & set(inspect.signature(getattr(search, name)).parameters)


@pytest.mark.parametrize("name, expected", [
    ("greedy", ("greedy", None, 1, (1, 1, 1, 1), 0.0)), ("vote-8", ("vote", None, 8, (1, 1, 1, 1), 0.0)),
    ("best_of-5-outcome", ("best_of", "outcome", 5, (1, 1, 1, 1), 0.0)), ("sbs-2x1.4.1.1-policy", ("sbs", "policy", 2, (1, 4, 1, 1), 0.0)),
    ("mcts-8-value", ("mcts", "value", 8, (3, 3, 3, 3), 0.0)), ("mcts-8x1.2.3.4-value-lam0.5", ("mcts", "value", 8, (1, 2, 3, 4), 0.5))])
def test_methods_are_read_by_name(chain, name, expected):
    method = parse_method(name, chain, num_candidates="3", lam=0.0)
    assert (method.kind, method.scorer, method.num, method.num_candidates, method.lam) == expected
    assert parse_method(method.name, chain, num_candidates="9", lam=0.0) == method      # the canonical name says it all


@pytest.mark.parametrize("name", ["beam", "vote", "vote-0", "vote-3-value", "best_of-3", "sbs-2-value", "mcts-value", "mcts-0-value", "mcts-8-gold",
                                  "mcts-8x0-value", "mcts-8x1.2-value", "mcts-8-value-lam1.5", "mcts-8-value-lam", "greedy-2", "mcts--1-value", ""])
def test_methods_that_make_no_sense_are_refused(chain, name):
    with pytest.raises(InputError, match="method"):
        parse_method(name, chain, num_candidates="3", lam=0.0)


def test_scorers_change_handlers_not_searches(chain):
    source = inspect.getsource(search.mcts) + inspect.getsource(search.sbs) + inspect.getsource(search.best_of_n)
    assert not any(f'"{scorer}"' in source for scorer in ("value", "policy", "random", "outcome"))
    method = Method("m", "mcts", "value", 2, (1, 1, 1, 1), 0.0)
    assert list(search.make_handlers(method, {"value": 1}, 2)) == [Score, Sample]       # no Outcome handler at lambda 0
