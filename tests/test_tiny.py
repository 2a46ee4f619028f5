"""Tests of the embedded problems (tiny/problems.py)."""

from itertools import combinations

import pytest

from tasks import question_key
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
