"""The tree of messages: requests, nodes, Eq. 2, the driver of searches, records and labels.

A search is a plain sequential generator: it knows one problem and no model, yields requests, and is
resumed with replies. `run_searches` advances hundreds of searches together and answers their
requests in batches. Labelling (generate_rollouts.py) and search (search.py) share all of it.
"""

import math
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

from mas import MAS, Message, State
from support.flags import InputError
from support.progress import Progress
from tasks.grading import extract_answer
from tasks.problems import Problem, is_correct

# ---- Requests ------------------------------------------------------------------------------------
# What a search may ask for. A request names nodes of a tree: whatever has a `state` (mas.State) and
# a `path` (which candidate was taken at each step from the root). The reply has one entry per node.


class Candidate(NamedTuple):
    """One sampled message.

    Attributes:
        text: without reasoning blocks; other agents, V and the answer see nothing of them.
        tokens: number of tokens generated, reasoning and the end-of-message token included.
        logprob: sum over the tokens of log pi(token | prefix) in nats, before temperature, top-k
            and top-p.
        truncated: whether its limit stopped the message, before an end-of-message token.
        token_ids: as sampled; () if the message comes from the journal.
    """

    text: str
    tokens: int
    logprob: float
    truncated: bool
    token_ids: tuple[int, ...] = ()


class Sample(NamedTuple):
    """Ask for `num` messages of the next agent at each node. Reply: `num` Candidates per node.

    greedy: take the most likely token at every step instead of sampling.
    """

    nodes: list
    num: int
    greedy: bool = False


class Score(NamedTuple):
    """Ask for the value of each node's state, by V or another scorer. Reply: floats in [-1, 1]."""

    nodes: list


class OrmScore(NamedTuple):
    """Ask for the value of each terminal state by the outcome model (ORM). Reply: as of Score."""

    nodes: list


@dataclass
class Cost:
    """Resources that a search has used.

    Attributes:
        agent_calls: sampled messages.
        prompt_tokens: prefilled tokens; a prompt counts once for all candidates sampled from it.
        generated_tokens: sampled tokens, end-of-message tokens included.
        scored_tokens: tokens read by a value or outcome model.
        truncated: agent -> messages that their limit stopped.
        seconds: share of the wall time of the steps and batches that it was part of.
    """

    agent_calls: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    truncated: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def __iadd__(self, other: "Cost") -> "Cost":
        for entry in fields(self):
            total = getattr(self, entry.name) + getattr(other, entry.name)
            setattr(self, entry.name, total)
        return self


class TooLong(InputError):
    """A text is longer than the context of a model. It stops the search of its problem alone."""


# A handler answers all waiting requests of one type: [(problem, request)] -> [(reply, cost)].
Handler = Callable[[list[tuple[Problem, Any]]], list[tuple[Any, Cost]]]

# ---- The tree ------------------------------------------------------------------------------------


@dataclass(eq=False, repr=False)
class Node:
    """A state, and the edge (s, a) that leads to it. N, W and Q are the statistics of that edge.

    Attributes:
        candidate: the sampled message a; None at the root.
        path: index of the candidate taken at each step from the root.
        children: None until the node is expanded.
        N: number of visits of the edge.
        W: sum of the values backed up through the edge.
        V: score of the state in [-1, 1], by the scorer of a search (stage 3) or by V (stage 5);
            None if it was not scored.
        outcome: of a terminal state, +1 if its answer is right, else -1 (stages 1 and 5).
        orm: the ORM's score of a terminal state; None if the ORM was not asked.
        value: of a terminal state, what MCTS backs up; None if no simulation has reached it.
        simulations: at the root, the terminal nodes that each simulation has backed up, its own
            last. The search can be replayed from them.
    """

    state: State
    parent: "Node | None"
    candidate: Candidate | None
    path: tuple[int, ...]
    children: list["Node"] | None = None
    N: int = 0
    W: float = 0.0
    V: float | None = None
    outcome: float | None = None
    orm: float | None = None
    value: float | None = None
    simulations: list[list["Node"]] = field(default_factory=list)

    @property
    def Q(self) -> float:
        """Mean value of the edge; 0, the middle of [-1, 1], if it was never visited."""
        return self.W / self.N if self.N else 0.0

    @property
    def message(self) -> Message:
        """The newest message of the state: the action a."""
        return self.state.messages[-1]


def make_root(question: str) -> Node:
    return Node(State(question, ()), parent=None, candidate=None, path=())


def make_child(mas: MAS, node: Node, candidate: Candidate, index: int) -> Node:
    state = mas.step(node.state, candidate.text)
    return Node(state, parent=node, candidate=candidate, path=(*node.path, index))


def expand(mas: MAS, node: Node, candidates: list[Candidate]) -> list[Node]:
    """Give a node one child per distinct message. Duplicates are merged; the first is kept."""
    node.children = []
    texts = set()
    for index, candidate in enumerate(candidates):
        if candidate.text not in texts:
            texts.add(candidate.text)
            node.children.append(make_child(mas, node, candidate, index))
    return node.children


def sample_tree(
    question: str, mas: MAS, num_candidates: tuple[int, ...], *, greedy: bool
) -> Generator[Sample, list, list[Node]]:
    """Give every state C candidates, agent by agent. Returns their nodes, parents first.

    Nothing is selected, and equal messages are not merged. So every message is a fair sample of its
    agent, and a mean over the candidates of a state estimates the expectation under the agents.

    num_candidates: C per agent. (K, 1, 1, 1) gives K passes; agents without an entry do not speak.
    """
    nodes = [make_root(question)]
    for turn, num in enumerate(num_candidates):
        waiting = [node for node in nodes if mas.turn_index(node.state) == turn]
        replies = (yield Sample(waiting, num, greedy)) if waiting else []  # an agent may be skipped
        for node, candidates in zip(waiting, replies, strict=True):
            node.children = [make_child(mas, node, c, i) for i, c in enumerate(candidates)]
            nodes += node.children
    return nodes[1:]


def select(node: Node, c: float) -> Node:
    """Return the child that Eq. 2 selects; ties go to the first.

    Eq. 2: argmax_a Q(s,a) + c * sqrt( ln(1 + sum_b N(s,b)) / (1 + N(s,a)) )
    """
    log_total = math.log(1 + sum(child.N for child in node.children))

    def upper_bound(child: Node) -> float:
        return child.Q + c * math.sqrt(log_total / (1 + child.N))

    return max(node.children, key=upper_bound)


def backup(node: Node, value: float) -> None:
    """Add one visit and `value` to every edge from `node` up to the root. No discount.

    The root has no edge, but counts its visits as well.
    """
    while node is not None:
        node.N += 1
        node.W += value
        node = node.parent


def grade_terminals(problem: Problem, mas: MAS, nodes: list[Node]) -> None:
    """Set the outcome of those nodes that are terminal: +1 if the answer is right, else -1."""
    for node in nodes:
        if mas.is_terminal(node.state):
            answer = extract_answer(node.message.text, problem.answer_type)
            node.outcome = 1.0 if is_correct(problem, answer.value) else -1.0


# ---- The driver: sequential searches, batched execution ------------------------------------------


@dataclass
class ActiveSearch:
    problem: Problem
    search: Generator
    cost: Cost = field(default_factory=Cost)
    request: Any = None  # the pending request


def run_searches(
    searches: Iterable[tuple[Problem, Generator]],
    handlers: dict[type, Handler],
    *,
    max_active: int,
    progress: Progress,
) -> Iterator[tuple[Problem, Any, Cost]]:
    """Advance up to `max_active` searches together; yield (problem, result, cost) as each finishes.

    All waiting requests of one type are answered in one batch. A search cannot tell how many others
    are active, so its result does not depend on them. If a request cannot be answered, the result
    is TooLong: the problem is refused, and the others go on.

    Args:
        handlers: type of request -> what answers it. Handlers are listed cheapest first, so that
            searches with cheap requests catch up and all wait for messages together.
    """
    unstarted = iter(searches)
    waiting: dict[type, list[ActiveSearch]] = {request_type: [] for request_type in handlers}

    def resume(active: ActiveSearch, reply):
        """Send a search its reply (None starts it). Yields its result if it has finished."""
        try:
            active.request = active.search.send(reply)
        except StopIteration as stop:
            progress.advance()
            yield active.problem, stop.value, active.cost
        else:
            waiting[type(active.request)].append(active)

    def num_active() -> int:
        return sum(len(actives) for actives in waiting.values())

    while True:
        # 1. Start searches while there is room for more.
        while num_active() < max_active:
            fresh = next(unstarted, None)
            if fresh is None:
                break
            problem, search = fresh
            yield from resume(ActiveSearch(problem, search), None)

        # 2. Answer all waiting requests of the cheapest type.
        waiting_types = [request_type for request_type in handlers if waiting[request_type]]
        if not waiting_types:
            return
        request_type = waiting_types[0]
        batch, waiting[request_type] = waiting[request_type], []
        replies = answer(handlers[request_type], batch)

        # 3. Resume their searches. Each then waits for its next request, or has finished.
        for active, (reply, cost) in zip(batch, replies, strict=True):
            active.cost += cost
            if isinstance(reply, TooLong):
                print(f"problem {active.problem.id} is refused: {reply}", file=sys.stderr)
                progress.advance()
                yield active.problem, reply, active.cost
            else:
                yield from resume(active, reply)


def answer(handler: Handler, batch: list[ActiveSearch]) -> list[tuple[Any, Cost]]:
    """Answer the requests of searches together. Returns (reply or TooLong, cost) of each."""
    try:
        return handler([(active.problem, active.request) for active in batch])
    except TooLong as error:  # which of them is it?
        if len(batch) == 1:
            return [(error, Cost())]
        middle = len(batch) // 2
        return answer(handler, batch[:middle]) + answer(handler, batch[middle:])


# ---- Records -------------------------------------------------------------------------------------


def tree_record(problem: Problem, root: Node, cost: Cost, mas: MAS) -> dict:
    """Return a whole tree as one JSON-lines record, enough to grade and label it again offline."""
    return {
        "id": problem.id,
        "split": problem.split,
        "question": problem.question,
        "gold": problem.gold,
        "kind": problem.answer_type,  # the name in the file format
        "subject": problem.subject,
        "level": problem.level,
        **tree_fields(root, mas, problem.answer_type, chosen=None),
        "cost": vars(cost),
    }


def tree_fields(root: Node, mas: MAS, answer_type: str, chosen: Node | None) -> dict:
    """Return the nodes of a tree, depth first, so that parents come before their children.

    `simulations`: `Node.simulations` as indices of nodes; `chosen`: the index of the node whose
    answer a search has given.
    """
    nodes = []
    index_of = {}
    stack = [root]
    while stack:
        node = stack.pop()
        index_of[node] = len(nodes)
        record = _node_record(node, index_of.get(node.parent))
        if mas.is_terminal(node.state):
            answer = extract_answer(node.message.text, answer_type)
            record |= {"answer": answer.value, "rung": answer.rung}
        nodes.append(record)
        stack += reversed(node.children or [])
    simulations = []
    for leaves in root.simulations:
        simulations.append([index_of[leaf] for leaf in leaves])
    tree = {"nodes": nodes, "simulations": simulations}
    if chosen is not None:
        tree["chosen"] = index_of[chosen]
    return tree


def _node_record(node: Node, parent_index: int | None) -> dict:
    record = {"parent": parent_index}
    if node.parent is not None:
        record |= {
            "agent": node.message.agent,
            "message": node.message.text,
            "tokens": node.candidate.tokens,
            "logprob": round(node.candidate.logprob, 4),
            "truncated": node.candidate.truncated,
        }
    record |= {"N": node.N, "W": node.W}
    numbers = {"V": node.V, "orm": node.orm, "value": node.value}
    numbers["reward"] = node.outcome  # the name in the file format
    for name, number in numbers.items():
        if number is not None:
            record[name] = number
    return record


# ---- Labels: one per visited edge ----------------------------------------------------------------


@dataclass(frozen=True)
class Edge:
    """One visited edge (s, a) of a tree, and its label.

    Attributes:
        node: index of next(s, a) in its tree.
        parent: index of s in its tree; edges with equal parents are siblings.
        agent: who said a.
        state: next(s, a), the state that V scores.
        y: the target in [-1, 1]: Q(s, a), or the reward for an outcome model.
        visits: N(s, a).
    """

    problem_id: str
    node: int
    parent: int
    agent: str
    state: State
    y: float
    visits: int


def tree_paths(record: dict, mas: MAS, target: str) -> list[list[Edge]]:
    """Return one path per visited leaf: its labelled edges, from the root down.

    Every visited edge is labelled in exactly one path, the first that reaches it. One forward of V
    over each path then trains every edge once. A path can be empty if the target is "outcome".

    Args:
        record: one line of trees.jsonl.
        target: "search" labels every visited edge with y = W / N; "outcome" labels terminal states
            only, with their reward.
    """
    # 1. The state of every node. Parents come before their children.
    nodes = record["nodes"]
    states = [State(record["question"], ())]
    for node in nodes[1:]:
        states.append(mas.step(states[node["parent"]], node["message"]))

    # 2. The visited leaves: visited nodes without a visited child.
    visited = [index for index in range(1, len(nodes)) if nodes[index]["N"] > 0]
    parents = {nodes[index]["parent"] for index in visited}
    leaves = [index for index in visited if index not in parents]

    # 3. Climb from each leaf until an edge is reached that is labelled already.
    paths = []
    labelled = {0}  # the root has no edge
    for leaf in leaves:
        path = []
        index = leaf
        while index not in labelled:
            labelled.add(index)
            node = nodes[index]
            y = node["W"] / node["N"] if target == "search" else node.get("reward")
            if y is not None:
                edge = Edge(
                    problem_id=record["id"],
                    node=index,
                    parent=node["parent"],
                    agent=node["agent"],
                    state=states[index],
                    y=y,
                    visits=node["N"],
                )
                path.append(edge)
            index = node["parent"]
        paths.append(path[::-1])
    return paths
