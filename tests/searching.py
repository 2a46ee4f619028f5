"""Searches without a model: scripted messages and scores, and graphs small enough for hand work."""

from hashlib import blake2b
from types import SimpleNamespace

import generate_rollouts
from generate_rollouts import label_problems
from llm.decoding import uniforms
from mas import CHAIN, MAS, Agent
from search import run_method
from support.progress import Progress
from tasks.problems import Problem
from tree import Candidate, Cost, OrmScore, Sample, Score


def make_agent(name: str, sees: tuple[str, ...], when: tuple[str, str] | None = None) -> Agent:
    return Agent(name, sees, prompt=f"You are {name}.", max_new_tokens=16, when=when)


DUO = MAS("duo", (make_agent("A", ("Q",)), make_agent("B", ("Q", "A"))))

# B may be skipped: then the second message is C's, the third agent's.
HINT = MAS(
    "hint",
    (
        make_agent("A", ("Q",)),
        make_agent("B", ("A",), when=("A", "help")),
        make_agent("C", ("Q", "A", "B")),
    ),
)

# A, then B if A says "go", and C if A says "on". A transcript may end after A.
FORKED = MAS(
    "forked",
    (
        make_agent("A", ("Q",)),
        make_agent("B", ("A",), when=("A", "go")),
        make_agent("C", ("A",), when=("A", "on")),
    ),
)


class ScriptedPolicy:
    """Answers Sample requests without a model. say: path of a candidate -> text of its message.

    requests: (problem id or None, paths of the nodes, num, greedy) of every request.
    """

    def __init__(self, mas, say):
        self.mas = mas
        self.say = say
        self.progress = Progress(shown=False)
        self.requests = []

    def __call__(self, requests):
        replies = []
        for problem, request in requests:
            paths = [node.path for node in request.nodes]
            self.requests.append((problem and problem.id, paths, request.num, request.greedy))
            num = request.num * len(paths)
            cost = Cost(agent_calls=num, prompt_tokens=10 * len(paths), generated_tokens=2 * num)
            reply = []
            for node in request.nodes:
                texts = [self.text(node, index) for index in range(request.num)]
                reply.append([Candidate(text, 2, -0.5, truncated=False) for text in texts])
            replies.append((reply, cost))
        return replies

    def text(self, node, index: int) -> str:
        return self.say((*node.path, index))


class ScriptedScorer:
    """Answers Score and OrmScore requests by path, without a model. Keeps the paths, in order."""

    def __init__(self, value):
        self.value = value
        self.paths = []

    def __call__(self, requests):
        replies = []
        for _, request in requests:
            paths = [node.path for node in request.nodes]
            self.paths += paths
            values = [self.value(path) for path in paths]
            replies.append((values, Cost(scored_tokens=len(paths))))
        return replies


def scripted_handlers(mas, value, *, orm=None, say=str):
    """Return handlers of all requests. By default each message is its path, so all are distinct."""
    return {
        Score: ScriptedScorer(value),
        OrmScore: ScriptedScorer(orm),
        Sample: ScriptedPolicy(mas, say),
    }


def drive(search, handlers):
    """Answer the requests of one search, one at a time. Returns its result."""
    reply = None
    while True:
        try:
            request = search.send(reply)
        except StopIteration as stop:
            return stop.value
        [(reply, _)] = handlers[type(request)]([(None, request)])


def run(method, problems, policy, scorers, *, c_uct, max_active):
    """Run a method as the scripts do. Returns (problem, leaf, cost) in the order of finishing."""
    args = SimpleNamespace(c_uct=c_uct, max_active=max_active)
    return list(run_method(method, problems, policy, scorers, args))


def random_value(*key) -> float:
    """Return a value in [-1, 1], a function of the key."""
    return 2 * uniforms(1, *key).item() - 1


# ---- Trees that stage 1 labels -------------------------------------------------------------------


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
