"""Trees that stage 1 labels with scripted agents."""

from hashlib import blake2b

from searching import ScriptedPolicy

import generate_rollouts
from generate_rollouts import label_problems
from mas import CHAIN
from tasks.problems import Problem


def digit(*key) -> int:
    """Return 0, 1 or 2, as a function of the key."""
    return blake2b(repr(key).encode()).digest()[0] % 3


class Answers(ScriptedPolicy):
    """Every message has an answer: 0, 1 or 2, as a function of the question and the path."""

    def text(self, node, index):
        return f"Final answer: {digit(node.state.question, (*node.path, index))}"


def make_problems(num: int) -> list[Problem]:
    problems = []
    for index in range(num):
        problems.append(Problem(f"p{index}", "train", f"question {index}", "1", "number"))
    return problems


def label(problems: list[Problem], *flags) -> dict[str, dict]:
    """Label problems on the chain as the script does. Returns problem id -> record."""
    args = generate_rollouts.parse_args(list(map(str, flags)))
    agents = Answers(CHAIN, say=None)
    return {record["id"]: record for record in label_problems(problems, agents, (2, 3, 2, 2), args)}
