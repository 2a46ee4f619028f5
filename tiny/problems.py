"""The embedded problems: seeded, endless word problems that are easier to check than to solve.

Two families, each with one integer answer. In both, two kinds of things add up to a known count:

    packs   a*x + b*y = t    "small boxes hold 3, big boxes hold 5; 6 boxes, 24 pens: how many big boxes?"
    score   a*x - b*y = t    "a hit wins 7, a miss loses 2; 6 darts, 24 points: how many hits?"

To solve one, divide; to check a candidate (x, y), multiply and add. A question also carries sentences that do not matter.

Splits are kept apart by hashes, whatever the seed. A problem's numbers (a, b, x + y, t) belong to exactly one of `train`
(search labels), `heldout` and `test`: no two of these share even the numbers of a problem. A question's text belongs either to
them or to `agents`, the stream that the tiny agents were trained on, which has all numbers but none of those questions.
"""

import functools
import hashlib
import itertools
import random
from dataclasses import dataclass

FAMILIES = ("packs", "score")
SPLITS = {"agents": (0, 100), "train": (0, 35), "heldout": (35, 50), "test": (50, 100)}  # percent of all (a, b, n, t)

# family -> what a, b and n = x + y may be; x and y are at least 1, the total has two digits. MOST: the largest n outside of `agents`,
# who have practised on more. It sets the operating point: the more ways to split n, the rarer a guess is right.
RANGES = {"packs": (range(2, 10), range(2, 10), range(4, 9)), "score": (range(3, 10), range(1, 7), range(5, 9))}
MOST = {"packs": 6, "score": 8}

NAMES = "Anna Ben Carla David Emma Finn Greta Hugo Ida Jonas Kira Leo Mia Nils Olga Paul Rosa Sam Tom Vera".split()

# family -> stories: (the two kinds, the facts in the order told, the question)
STORIES = {
    "packs": (
        (("small", "big"), "{name} packs {n} boxes.|A small box holds {a} pens and a big box holds {b} pens.|"
                           "{name} packs {t} pens in all.", "How many {kind} boxes are there?"),
        (("red", "blue"), "{name} buys {n} stamps.|A red stamp costs {a} cents and a blue stamp costs {b} cents.|"
                          "{name} pays {t} cents in all.", "How many {kind} stamps are there?"),
        (("short", "long"), "{name} takes {n} rides.|A short ride lasts {a} minutes and a long ride lasts {b} minutes.|"
                            "{name} rides {t} minutes in all.", "How many {kind} rides are there?"),
    ),
    "score": (
        (("hit", "miss"), "{name} throws {n} darts.|A hit wins {a} points and a miss loses {b} points.|"
                          "{name} ends with {t} points.", "How many times is it a {kind}?"),
        (("right", "wrong"), "{name} gives {n} answers.|A right answer wins {a} points and a wrong answer loses {b} points.|"
                             "{name} ends with {t} points.", "How many {kind} answers are there?"),
        (("gold", "black"), "{name} draws {n} cards.|A gold card wins {a} points and a black card loses {b} points.|"
                            "{name} ends with {t} points.", "How many {kind} cards are there?"),
    ),
}
DISTRACTORS = ("{other} is {r} years old.", "There are {r} chairs in the room.", "It is {r} degrees outside.",
               "{other} has {r} books.", "The bus comes in {r} minutes.", "{other} lives at number {r}.")


@dataclass(frozen=True)
class Puzzle:
    """One problem with its numbers; only `question` and `answer` are ever shown to a search."""
    id: str
    family: str
    question: str
    kinds: tuple[str, str]   # e.g. ("small", "big")
    a: int                   # what one of the first kind adds
    b: int                   # what one of the second kind adds (packs) or takes (score)
    n: int                   # x + y
    t: int                   # a*x + b*y (packs) or a*x - b*y (score)
    x: int                   # the solution: how many of the first kind ...
    y: int                   # ... and of the second
    asked: int               # 0: the question asks for x, 1: for y

    @property
    def story(self) -> str:
        """What is counted."""
        return f"{self.kinds[0]} and {self.kinds[1]}"

    @property
    def answer(self) -> int:
        return (self.x, self.y)[self.asked]


def total(family: str, a: int, b: int, x: int, y: int) -> int:
    """What x of the first kind and y of the second come to."""
    return a * x + b * y if family == "packs" else a * x - b * y


@functools.cache
def numbers_of(family: str, split: str) -> list[tuple[int, int, int, int]]:
    """All (a, b, x, y) of a split, in a fixed shuffled order.

    The hash is of what the problem tells, (a, b, n, t), so equal tellings cannot end up in two splits; for `packs`
    swapping the kinds changes only their names, so a <= b there.
    """
    found = []
    for a, b, n in itertools.product(*RANGES[family]):
        for x in range(1, n):
            t = total(family, a, b, x, n - x)
            if 10 <= t <= 99 and (a < b or family == "score") and (n <= MOST[family] or split == "agents"):
                digest = hashlib.blake2b(f"{family} {a} {b} {n} {t}".encode(), digest_size=4).digest()
                point = int.from_bytes(digest, "big") % 100
                if SPLITS[split][0] <= point < SPLITS[split][1]:
                    found.append((a, b, x, n - x))
    random.Random(f"{family}/{split}").shuffle(found)
    return found


def make_puzzle(family: str, split: str, index: int) -> Puzzle:
    """Problem number `index` of a split, the same at every call. Numbers recur only after all of the split were used."""
    rng = random.Random(f"{family}/{split}/{index}")
    numbers = numbers_of(family, split)
    a, b, x, y = numbers[index % len(numbers)]
    if family == "packs" and rng.random() < 0.5:
        a, b, x, y = b, a, y, x
    n, t = x + y, total(family, a, b, x, y)
    while True:
        kinds, facts, ask = rng.choice(STORIES[family])
        name, other = rng.sample(NAMES, 2)
        asked = rng.randrange(2)
        sentences = facts.split("|")
        for distractor in rng.sample(DISTRACTORS, rng.randint(1, 2)):
            sentences.insert(rng.randint(0, len(sentences)), distractor.replace("{r}", str(rng.randint(2, 60))))
        question = " ".join(sentences + [ask]).format(name=name, other=other, n=n, a=a, b=b, t=t, kind=kinds[asked])
        belongs_to_agents = hashlib.blake2b(question.encode(), digest_size=1).digest()[0] % 4 > 0
        if belongs_to_agents == (split == "agents"):
            break
    return Puzzle(f"{family}-{split}-{index:05d}", family, question, kinds, a, b, n, t, x, y, asked)
