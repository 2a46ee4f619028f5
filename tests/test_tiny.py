"""Tests of the embedded problems, and of who is guilty of a wrong answer to them (tiny/)."""

import random
from itertools import combinations

import pytest

from diagnosis import LostAnswer
from mas import CHAIN
from tasks import question_key
from tiny import check_blame, make_tiny
from tiny.problems import FAMILIES, SPLITS, make_puzzle, numbers_of, total


def stated_numbers(family, split):
    """Return all (a, b, n, t) that the questions of a split state."""
    stated = set()
    for a, b, x, y in numbers_of(family, split):
        stated.add((a, b, x + y, total(family, a, b, x, y)))
    return stated


def question_keys(family, split):
    """Return the keys of the first 300 questions of a split."""
    puzzles = [make_puzzle(family, split, index) for index in range(300)]
    return {question_key(puzzle.question) for puzzle in puzzles}


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_question_and_no_numbers(family):
    numbers = {split: stated_numbers(family, split) for split in SPLITS}
    questions = {split: question_keys(family, split) for split in SPLITS}
    for split, other in combinations(SPLITS, 2):
        assert not questions[split] & questions[other]
        # The agents practised on all numbers, but in other questions.
        if "agents" not in (split, other):
            assert not numbers[split] & numbers[other]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_problems_have_one_solution_and_it_is_the_answer(family):
    for index in range(50):
        puzzle = make_puzzle(family, "test", index)
        assert puzzle == make_puzzle(family, "test", index)

        solutions = []
        for x in range(puzzle.n + 1):
            y = puzzle.n - x
            if total(family, puzzle.a, puzzle.b, x, y) == puzzle.t:
                solutions.append((x, y))
        assert solutions == [(puzzle.x, puzzle.y)]

        query = puzzle.question.split(".")[-1]
        count_of_item = dict(zip(puzzle.item_names, solutions[0], strict=True))
        assert puzzle.asked_item in query
        assert puzzle.answer == count_of_item[puzzle.asked_item]


# ---- Who is guilty of a wrong answer -------------------------------------------------------------


def tree_of(messages):
    """A tree of one path, as in trees.jsonl."""
    nodes = [{"parent": None}]
    for agent, message in zip(CHAIN.agents, messages, strict=True):
        nodes.append({"parent": len(nodes) - 1, "agent": agent.name, "message": message})
    return {"id": PUZZLE.id, "question": PUZZLE.question, "nodes": nodes}


PUZZLE = make_puzzle("packs", "heldout", 3)
PAIR = (PUZZLE.x, PUZZLE.y)
WRONG_PAIR = (PUZZLE.x + 1, PUZZLE.y - 1)


def faultless_messages(pair):
    """What faultless agents say after the Planner has proposed a pair."""
    rng = random.Random(0)
    plan, check = make_tiny.planner_message(PUZZLE, *pair, rng, estimate=True)
    return [
        make_tiny.reader_message(PUZZLE, rng),
        plan + check,
        make_tiny.solver_message(PUZZLE, *pair),
        make_tiny.verifier_message(PUZZLE, *pair),
    ]


@pytest.mark.parametrize(
    "pair, changed, guilty",
    [
        (PAIR, {}, None),
        (PAIR, {"Reader": "Facts: none"}, "Reader"),
        (WRONG_PAIR, {}, "Planner"),
        (WRONG_PAIR, {"Solver": "Total: 1|1 same."}, "Planner"),  # the first one
        (PAIR, {"Solver": "Total: 1|1 same."}, "Solver"),
        (PAIR, {"Verifier": "Final answer: 0"}, "Verifier"),
    ],
)
def test_the_first_agent_that_does_not_do_its_work_is_guilty(pair, changed, guilty):
    messages = faultless_messages(pair)
    for index, agent in enumerate(CHAIN.agents):
        messages[index] = changed.get(agent.name, messages[index])
    assert check_blame.first_wrong_work(tree_of(messages), 4, CHAIN) == guilty


def test_blame_is_right_where_it_names_the_guilty_agent():
    """On p both of two blames are right, on q none of one: a mean over problems of 50 %."""
    lost = [
        LostAnswer("p", 1, "Planner", 0.5),
        LostAnswer("p", 2, "Solver", 0.5),
        LostAnswer("q", 1, None, 0.0),
    ]
    lost.append(LostAnswer("q", 2, "Planner", 0.5))
    guilty = ["Planner", "Solver", "Planner", None]
    cells = check_blame.shares_found(lost, guilty, ["Reader", "Planner", "Solver"])
    assert cells[0] == "50.0"
    assert cells[1] == "0.0 to 100.0"
    assert cells[2:] == ["-", "50.0", "100.0"]
