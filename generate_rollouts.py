"""Stage 1: label every action by search, without a human (MAS-MCTS, paper section 4.1).

For each training problem, run N simulations over the agents. The final answer is worth +1 if it
is right, else -1, and is backed up along the path. The mean value Q(s, a) of an edge becomes the
target for V at next(s, a). No value model is involved.

    python generate_rollouts.py            # the embedded default -> runs/tiny/rollouts/trees.jsonl
    accelerate launch --num_processes 4 generate_rollouts.py    # the same trees, by four processes

A search is a plain sequential generator: it knows one problem and no model, yields requests, and is
resumed with replies. `run_searches` advances hundreds of searches together and answers their
requests in batches.
"""

import math
import random
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diagnosis import label_signatures, with_warnings
from extraction import extract_answer
from mas import MAS, Message, State, counts_per_agent, load_graph
from policy import (
    Candidate,
    Cost,
    Handler,
    Policy,
    Sample,
    add_policy_arguments,
    add_tree_search_arguments,
    describe_messages,
    journal_of,
    make_policy,
    search_settings,
)
from runs import (
    Parser,
    SearchProgress,
    Work,
    add_overwrite_argument,
    append_jsonl,
    cli,
    finished_message,
    is_mine,
    only,
    open_run,
    open_to_append,
    positive_int,
    process_rank,
    read_records,
    seeded,
    shard_path,
)
from tables import labels_table, text_table
from tasks import Problem, check_same_problems, is_correct, load_problems

# ---- The tree ------------------------------------------------------------------------------------


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
        outcome: the ORM's score of a terminal state; None if the ORM was not asked.
        reward: value of a terminal state. By the gold answer, +1 or -1 (stages 1 and 5); in MCTS
            the terminal value that is backed up, in SBS its V. None if not terminal, or not
            reached by MCTS.
        simulations: at the root, the terminal nodes that each simulation has backed up, its own
            last. The search can be replayed from them.
    """

    def __init__(
        self,
        state: State,
        parent: "Node | None",
        candidate: Candidate | None,
        path: tuple[int, ...],
    ):
        self.state = state
        self.parent = parent
        self.candidate = candidate
        self.path = path
        self.children: list[Node] | None = None
        self.N = 0
        self.W = 0.0
        self.V: float | None = None
        self.outcome: float | None = None
        self.reward: float | None = None
        self.simulations: list[list[Node]] = []

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


# ---- Labelling one problem -----------------------------------------------------------------------


def label_tree(
    problem: Problem,
    mas: MAS,
    *,
    num_simulations: int,
    num_candidates: tuple[int, ...],
    c_uct: float,
    rng: random.Random,
) -> Generator[Sample, list[list[Candidate]], Node]:
    """Run MAS-MCTS on one problem (Algorithm 1) and return the root of its tree.

    Departs from the paper: duplicate messages are merged (`expand`); a fresh child is picked
    uniformly; the siblings of a fresh terminal state have been sampled anyway, so each of them is
    graded and backed up once. No other search sees the gold answer.

    Args:
        num_candidates: C per agent.
        rng: the tree's own generator; it picks one of the fresh children.
    """
    root = make_root(problem.question)
    for _ in range(num_simulations):
        graded_siblings = []
        node = root
        while not mas.is_terminal(node.state):
            if node.children is None:
                num = num_candidates[mas.turn_index(node.state)]
                [candidates] = yield Sample([node], num)
                children = expand(mas, node, candidates)
                grade_terminals(problem, mas, children)
                node = rng.choice(children)  # uniform among the fresh children
                for sibling in children:
                    if sibling is not node and sibling.reward is not None:
                        backup(sibling, sibling.reward)
                        graded_siblings.append(sibling)
            else:
                node = select(node, c_uct)  # Eq. 2
        backup(node, node.reward)
        root.simulations.append([*graded_siblings, node])  # to replay the search on a page
    return root


def grade_terminals(problem: Problem, mas: MAS, nodes: list[Node]) -> None:
    """Grade those nodes that are terminal."""
    for node in nodes:
        if mas.is_terminal(node.state):
            node.reward = grade(problem, node)


def grade(problem: Problem, leaf: Node) -> float:
    """Return +1 if the answer of a terminal state is right, else -1."""
    answer = extract_answer(leaf.message.text, problem.answer_type)
    return 1.0 if is_correct(problem, answer.value) else -1.0


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
    progress: SearchProgress,
) -> Iterator[tuple[Problem, Any, Cost]]:
    """Advance up to `max_active` searches together; yield (problem, result, cost) as each finishes.

    All waiting requests of one type are answered in one batch. A search cannot tell how many others
    are active, so its result does not depend on them.

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
            progress.search_finished(active.cost.agent_calls)
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
        replies = handlers[request_type]([(active.problem, active.request) for active in batch])

        # 3. Resume their searches. Each then waits for its next request, or has finished.
        for active, (reply, cost) in zip(batch, replies, strict=True):
            active.cost += cost
            yield from resume(active, reply)


# ---- Records -------------------------------------------------------------------------------------


def tree_record(problem: Problem, root: Node, cost: Cost) -> dict:
    """Return a whole tree as one JSON-lines record, enough to grade and label it again offline."""
    return {
        "id": problem.id,
        "split": problem.split,
        "question": problem.question,
        "gold": problem.gold,
        "kind": problem.answer_type,  # the name in the file format
        "subject": problem.subject,
        "level": problem.level,
        **tree_fields(root, problem.answer_type),
        "cost": vars(cost),
    }


def tree_fields(root: Node, answer_type: str, chosen: Node | None = None) -> dict:
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
        nodes.append(_node_record(node, index_of.get(node.parent), answer_type))
        stack += reversed(node.children or [])
    simulations = []
    for leaves in root.simulations:
        simulations.append([index_of[leaf] for leaf in leaves])
    fields = {"nodes": nodes, "simulations": simulations}
    if chosen is not None:
        fields["chosen"] = index_of[chosen]
    return fields


def _node_record(node: Node, parent_index: int | None, answer_type: str) -> dict:
    record = {"parent": parent_index}
    if node.parent is not None:
        record |= _message_fields(node)
    record |= {"N": node.N, "W": node.W}
    for name in ("V", "outcome", "reward"):
        if getattr(node, name) is not None:
            record[name] = getattr(node, name)
    if node.reward is not None:  # a final answer
        answer = extract_answer(node.message.text, answer_type)
        record |= {"answer": answer.value, "rung": answer.rung}
    return record


def _message_fields(node: Node) -> dict:
    return {
        "agent": node.message.agent,
        "message": node.message.text,
        "tokens": node.candidate.tokens,
        "logprob": round(node.candidate.logprob, 4),
        "truncated": node.candidate.truncated,
    }


def without_texts(record: dict) -> dict:
    """Return the nodes of a tree without their messages, which take most of its memory."""
    nodes = []
    for node in record["nodes"]:
        nodes.append({name: node[name] for name in node if name != "message"})
    return {"nodes": nodes}


def label_statistics(records: list[dict], mas: MAS) -> str:
    """Show the labels per agent, from the records alone."""
    table = text_table(*labels_table(records, [agent.name for agent in mas.agents]))
    num_mixed, num_leaves, num_unanswered = 0, 0, 0
    for record in records:
        leaves = [node for node in record["nodes"] if "reward" in node]
        rewards = {leaf["reward"] for leaf in leaves}
        num_mixed += len(rewards) == 2
        num_leaves += len(leaves)
        num_unanswered += sum(leaf["answer"] is None for leaf in leaves)
    return (
        f"{table}\n{len(records)} trees, {num_mixed} of them with both right and wrong answers\n"
        f"{num_unanswered} of {num_leaves} final messages held no answer (graded wrong)"
    )


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
    split: str
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
                    split=record["split"],
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


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    add_tree_search_arguments(parser)
    add_training_problems_arguments(parser)
    parser.add_argument(
        "--num-simulations", type=positive_int, default=40, help="N, simulations per problem"
    )
    add_overwrite_argument(parser)
    return parser.parse_args(argv)


def add_training_problems_arguments(parser: Parser) -> None:
    """Add the flags of the scripts that use training problems (`load_training_problems`)."""
    parser.add_argument("--num-train", type=positive_int, default=300, help="training problems")
    parser.add_argument(
        "--num-heldout",
        type=positive_int,
        default=45,
        help="held-out problems, on which V and the agents are measured; 45 is all that `tiny` has",
    )


def main(args) -> None:
    # 1. Load the graph, the problems and the agents.
    mas = load_graph(args.graph)
    num_candidates = counts_per_agent(mas, args.num_candidates, "--num-candidates")
    problems = load_training_problems(args)
    policy = make_policy(args, mas)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / "rollouts"
    settings = search_settings(args, policy)
    settings["num_simulations"] = args.num_simulations
    settings["num_candidates"] = num_candidates
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)

    # 3. Label the problems that are not labelled yet, one line per tree.
    path = folder / "trees.jsonl"
    label_problems(problems, mas, policy, num_candidates, path, args)

    # 4. Report, once all processes have finished.
    records = read_records(path, without_texts)
    num_missing = sum(problem.id not in records for problem in problems)
    if num_missing > 0:
        print(finished_message(num_missing, "problems"))
    else:
        trees = list(records.values())
        agents = [agent.name for agent in mas.agents]
        signatures = label_signatures(trees, agents, num_candidates)
        print(with_warnings(label_statistics(trees, mas), signatures))


def load_training_problems(args) -> list[Problem]:
    """Load training problems, and held-out ones to measure on. Test problems are never loaded."""
    problems = []
    for split, num in (("train", args.num_train), ("heldout", args.num_heldout)):
        problems += load_problems(task=args.task, data=args.data, split=split, num=num)
    return problems


def label_problems(
    problems: list[Problem],
    mas: MAS,
    policy: Policy,
    num_candidates: tuple[int, ...],
    path: Path,
    args,
) -> None:
    """Label those of this process's problems that have no record yet.

    Each tree is appended to this process's shard as it finishes.
    """
    with open_to_append(shard_path(path)) as file, journal_of(policy, args):
        # 1. See which records exist already.
        labelled = read_records(path, only("question", "gold"))
        check_same_problems(problems, labelled, path)
        my_problems = [problem for problem in problems if is_mine(problem.id)]
        todo = [problem for problem in my_problems if problem.id not in labelled]
        num_labelled = sum(problem.id in labelled for problem in problems)
        print(
            f"labelling {len(todo)} problems, N = {args.num_simulations}, C = {num_candidates}; "
            f"{num_labelled} of {len(problems)} are finished already\n"
            f"-> {shard_path(path)}"
        )
        if not todo:
            return

        # 2. Label the others.
        progress = SearchProgress(
            len(todo),
            expected_work_of_tree(args.num_simulations, num_candidates),
            description="trees",
            num_finished_before=len(my_problems) - len(todo),
            shown=process_rank()[0] == 0,
        )
        policy.on_batch = progress.sampled
        searches = make_searches(todo, mas, num_candidates, args)
        with progress:
            for problem, root, cost in run_searches(
                searches, {Sample: policy}, max_active=args.max_active, progress=progress
            ):
                append_jsonl(file, tree_record(problem, root, cost))
        print(describe_messages(policy))


def expected_work_of_tree(num_simulations: int, num_candidates: tuple[int, ...]) -> Work:
    """Estimate how many prompts and messages a tree search needs.

    The first simulation expands once per agent. Each later one adds about one message, because most
    of its path exists already.
    """
    later_messages = num_simulations - 1
    prompts = len(num_candidates) + later_messages / num_candidates[-1]
    return Work(prompts, sum(num_candidates) + later_messages)


def make_searches(
    problems: list[Problem], mas: MAS, num_candidates: tuple[int, ...], args
) -> Iterator[tuple[Problem, Generator]]:
    for problem in problems:
        search = label_tree(
            problem,
            mas,
            num_simulations=args.num_simulations,
            num_candidates=num_candidates,
            c_uct=args.c_uct,
            rng=seeded(args.seed, problem.id),
        )
        yield problem, search


if __name__ == "__main__":
    cli(parse_args, main)
