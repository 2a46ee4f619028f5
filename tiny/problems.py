"""Generate the embedded problems: word problems that are easier to check than to solve.

There are two families of problems. Each problem counts two kinds of item, called the first and the
second item, and has one integer answer:

    packs   a*x + b*y = t    "A small box holds 3 pens and a big box holds 5 pens ..."
    score   a*x - b*y = t    "A hit wins 7 points and a miss loses 2 points ..."

The question states a, b, the total t and the count n = x + y. It asks for x or for y. Solving it
takes a division; checking a candidate (x, y) takes only multiplications and additions. A question
also contains one or two sentences that do not matter.

A hash assigns each problem to its split, so the splits do not depend on a seed:

- Every set of numbers (a, b, n, t) belongs to exactly one of `train`, `heldout` and `test`.
- Every question text belongs either to these three splits or to `agents`, the split that the tiny
  agents were trained on. `agents` uses all numbers, but shares no question with the other splits.

`write_problems` writes the problems of the other splits to packs.jsonl and score.jsonl.
"""

import functools
import hashlib
import itertools
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

FAMILIES = ("packs", "score")

# For each split, the percentiles of the number sets that it uses: from the first up to the second.
SPLITS = {"agents": (0, 100), "train": (0, 35), "heldout": (35, 50), "test": (50, 100)}

# For each family, the values of a, of b and of n = x + y.
RANGES = {
    "packs": (range(2, 10), range(2, 10), range(4, 9)),
    "score": (range(3, 10), range(1, 7), range(5, 9)),
}

# The largest n outside the split `agents`. The agents practised on all values of n in RANGES.
# This limit sets how hard the problems are: a larger n has more pairs (x, y) to guess from.
MAX_COUNT = {"packs": 6, "score": 8}

# The smallest and the largest total: totals have two digits.
MIN_TOTAL = 10
MAX_TOTAL = 99

# The number of problems of `train` in the data files. They repeat numbers in other words.
NUM_TRAIN = 500


# ---- Wordings ------------------------------------------------------------------------------------


class Story(NamedTuple):
    """A wording of one family, with placeholders in braces."""

    item_names: tuple[str, str]
    count_fact: str
    item_fact: str
    total_fact: str
    query: str


STORIES = {
    "packs": (
        Story(
            ("small", "big"),
            "{name} packs {n} boxes.",
            "A small box holds {a} pens and a big box holds {b} pens.",
            "{name} packs {t} pens in all.",
            "How many {item} boxes are there?",
        ),
        Story(
            ("red", "blue"),
            "{name} buys {n} stamps.",
            "A red stamp costs {a} cents and a blue stamp costs {b} cents.",
            "{name} pays {t} cents in all.",
            "How many {item} stamps are there?",
        ),
        Story(
            ("short", "long"),
            "{name} takes {n} rides.",
            "A short ride lasts {a} minutes and a long ride lasts {b} minutes.",
            "{name} rides {t} minutes in all.",
            "How many {item} rides are there?",
        ),
    ),
    "score": (
        Story(
            ("hit", "miss"),
            "{name} throws {n} darts.",
            "A hit wins {a} points and a miss loses {b} points.",
            "{name} ends with {t} points.",
            "How many times is it a {item}?",
        ),
        Story(
            ("right", "wrong"),
            "{name} gives {n} answers.",
            "A right answer wins {a} points and a wrong answer loses {b} points.",
            "{name} ends with {t} points.",
            "How many {item} answers are there?",
        ),
        Story(
            ("gold", "black"),
            "{name} draws {n} cards.",
            "A gold card wins {a} points and a black card loses {b} points.",
            "{name} ends with {t} points.",
            "How many {item} cards are there?",
        ),
    ),
}

# Sentences that do not matter. {r} is a random number, {other} a person outside the story.
DISTRACTORS = (
    "{other} is {r} years old.",
    "There are {r} chairs in the room.",
    "It is {r} degrees outside.",
    "{other} has {r} books.",
    "The bus comes in {r} minutes.",
    "{other} lives at number {r}.",
)

NAMES = (
    *("Anna", "Ben", "Carla", "David", "Emma", "Finn", "Greta", "Hugo", "Ida", "Jonas"),
    *("Kira", "Leo", "Mia", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tom", "Vera"),
)


# ---- Numbers -------------------------------------------------------------------------------------


def total(family: str, a: int, b: int, x: int, y: int) -> int:
    """Return the total t of x first items and y second items."""
    if family == "packs":
        return a * x + b * y
    return a * x - b * y


@functools.cache
def numbers_of(family: str, split: str) -> list[tuple[int, int, int, int]]:
    """Return all (a, b, x, y) of a split, in a fixed shuffled order."""
    start, end = SPLITS[split]
    numbers = []
    for a, b, n in itertools.product(*RANGES[family]):
        # Swapping the items of `packs` changes only their names, so one order is enough. If a = b,
        # every pair (x, y) has the same total and the problem has no single solution.
        if family == "packs" and a >= b:
            continue
        if split != "agents" and n > MAX_COUNT[family]:
            continue
        for x in range(1, n):
            y = n - x
            t = total(family, a, b, x, y)
            if not MIN_TOTAL <= t <= MAX_TOTAL:
                continue
            if start <= _percentile(family, a, b, n, t) < end:
                numbers.append((a, b, x, y))
    random.Random(f"{family}/{split}").shuffle(numbers)
    return numbers


def _percentile(family: str, a: int, b: int, n: int, t: int) -> int:
    """Hash the numbers that a question states to 0..99.

    The solution (x, y) is not hashed, so two questions with equal numbers are in the same split.
    """
    text = f"{family} {a} {b} {n} {t}"
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 100


# ---- Problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Puzzle:
    """One problem with its numbers. A search is shown only `question` and graded by `answer`."""

    id: str
    family: str
    question: str
    item_names: tuple[str, str]  # of the first and the second item, e.g. ("small", "big")
    a: int  # what one first item adds
    b: int  # what one second item adds (packs) or takes (score)
    n: int  # the count, x + y
    t: int  # the total, a*x + b*y (packs) or a*x - b*y (score)
    x: int  # the solution: the number of first items
    y: int  # the solution: the number of second items
    asked_index: int  # 0 if the question asks for x, 1 if it asks for y

    @property
    def story(self) -> str:
        """The names of both items; they identify the wording."""
        return f"{self.item_names[0]} and {self.item_names[1]}"

    @property
    def asked_item(self) -> str:
        """The name of the item that the question asks for."""
        return self.item_names[self.asked_index]

    @property
    def solution(self) -> tuple[int, int]:
        return self.x, self.y

    @property
    def answer(self) -> int:
        """The number that the question asks for."""
        return self.solution[self.asked_index]

    def total_of(self, x: int, y: int) -> int:
        """Return the total that x first items and y second items would have."""
        return total(self.family, self.a, self.b, x, y)


def make_puzzle(family: str, split: str, index: int) -> Puzzle:
    """Return problem number `index` of a split. Equal arguments give equal problems.

    Numbers are repeated, in other words, only after all numbers of the split have been used.
    """
    rng = random.Random(f"{family}/{split}/{index}")

    # 1. choose the numbers
    numbers = numbers_of(family, split)
    a, b, x, y = numbers[index % len(numbers)]
    if family == "packs" and rng.random() < 0.5:
        # `numbers_of` lists only a < b. Questions have both orders equally often.
        a, b = b, a
        x, y = y, x
    n = x + y
    t = total(family, a, b, x, y)

    # 2. put them into words, until the words belong to this split
    while True:
        story = rng.choice(STORIES[family])
        name, other = rng.sample(NAMES, 2)
        asked_index = rng.randrange(2)
        asked_item = story.item_names[asked_index]
        facts = [story.count_fact, story.item_fact, story.total_fact]
        template = " ".join([*_with_distractors(facts, rng), story.query])
        question = template.format(name=name, other=other, n=n, a=a, b=b, t=t, item=asked_item)
        # three quarters of all texts are for the split `agents` alone
        digest = hashlib.blake2b(question.encode(), digest_size=1).digest()
        if (digest[0] % 4 > 0) == (split == "agents"):
            break

    puzzle_id = f"{family}-{split}-{index:05d}"
    return Puzzle(puzzle_id, family, question, story.item_names, a, b, n, t, x, y, asked_index)


def _with_distractors(facts: list[str], rng: random.Random) -> list[str]:
    """Insert one or two sentences that do not matter at random places among the facts."""
    sentences = list(facts)
    num_distractors = rng.randint(1, 2)
    for distractor in rng.sample(DISTRACTORS, num_distractors):
        place = rng.randint(0, len(sentences))
        number = rng.randint(2, 60)
        sentences.insert(place, distractor.replace("{r}", str(number)))
    return sentences


# ---- Data files ----------------------------------------------------------------------------------


def write_problems(folder: Path) -> None:
    """Write FAMILY.jsonl: all problems of each family to train on or to measure on.

    `heldout` and `test` have one problem for each set of numbers. Problems with equal numbers are
    solved or missed together, so a second one in other words would not be an independent
    measurement.
    """
    for family in FAMILIES:
        lines = []
        for split in ("train", "heldout", "test"):
            size = NUM_TRAIN if split == "train" else len(numbers_of(family, split))
            for index in range(size):
                puzzle = make_puzzle(family, split, index)
                row = {"id": puzzle.id, "split": split, "question": puzzle.question}
                row |= {"answer": puzzle.answer, "subject": puzzle.story, "level": puzzle.n}
                lines.append(json.dumps(row) + "\n")
        (folder / f"{family}.jsonl").write_text("".join(lines))
