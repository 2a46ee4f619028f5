"""Stage 3: search for an answer, guided by V (paper, section 4.3).

    python search.py                                       # an embedded test problem, MCTS by V
    python search.py --index 7 --method sbs-2x1.4.1.1-value

Prints the transcript, the tree with N, Q and V, and the cost. Methods:

    greedy                    one pass, the most likely token at every step
    vote-K                    majority vote over K sampled passes
    best_of-K-SCORER          the sampled pass with the best final score
    sbs-B1xB2-SCORER          step-level beam search: B1 beams, B2 candidates each
    mcts-N[xC]-SCORER[-lamL]  MCTS: N simulations, C candidates per expansion, lambda L
                              (by default --num-candidates and --lam)

B2 and C are one number, or one per agent (1.8.1.1). SCORER is value (V), policy (the policy's own
likelihood), random (the control), or orm (the ORM in V's place). No search sees the gold answer.
"""

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from llm.decoding import uniforms
from llm.policy import add_tree_search_arguments, make_policy, with_journal
from mas import MAS, State, load_graph
from support.flags import InputError, cli, positive_int, stage_parser, unit_float
from support.progress import Progress
from support.runs import read_config
from tasks.grading import extract_answer, same_answer
from tasks.problems import Problem, add_problem_arguments, load_problems
from tree import (
    Cost,
    Handler,
    Node,
    OrmScore,
    Sample,
    Score,
    TooLong,
    backup,
    expand,
    make_root,
    run_searches,
    sample_tree,
    select,
    tree_fields,
)
from value import ValueModel, add_value_arguments

# A search yields requests and returns the terminal node whose answer is given.
Search = Generator[Sample | Score | OrmScore, list, Node]
Sampling = Generator[Sample, list, list[Node]]

# ---- Passes: one message per agent, no search ----------------------------------------------------


def sample_passes(question: str, mas: MAS, *, num: int, greedy: bool) -> Sampling:
    """Run `num` passes through the agents. Returns their terminal nodes, in order.

    Passes are independent samples: those with equal messages are not merged.
    """
    num_candidates = (num,) + (1,) * (len(mas.agents) - 1)
    nodes = yield from sample_tree(question, mas, num_candidates, greedy=greedy)
    ends = [node for node in nodes if mas.is_terminal(node.state)]
    return sorted(ends, key=lambda node: node.path)


def greedy(question: str, mas: MAS) -> Search:
    """Run one pass in which every agent takes its most likely token at every step."""
    [node] = yield from sample_passes(question, mas, num=1, greedy=True)
    return node


def vote(question: str, mas: MAS, answer_type: str, *, num: int) -> Search:
    """Return a pass with the most frequent answer among `num` passes (self-consistency).

    Answers are clustered by the equality that grades them. Ties go to the answer seen first. A pass
    without an answer has no vote.
    """
    nodes = yield from sample_passes(question, mas, num=num, greedy=False)
    answers = [extract_answer(node.message.text, answer_type).value for node in nodes]
    num_of = Counter(answer for answer in answers if answer is not None)

    def num_votes(answer: str) -> int:
        equal = [other for other in num_of if same_answer(answer, other, answer_type)]
        return sum(num_of[other] for other in equal)

    winner = max(num_of, key=num_votes, default=None)
    return nodes[answers.index(winner)]


def best_of_n(question: str, mas: MAS, *, num: int) -> Search:
    """Return the pass whose final state scores best among `num` passes."""
    nodes = yield from sample_passes(question, mas, num=num, greedy=False)
    values = yield Score(nodes)
    for node, value in zip(nodes, values, strict=True):
        node.V = value
    return max(nodes, key=lambda node: node.V)


# ---- Search --------------------------------------------------------------------------------------


def sbs(question: str, mas: MAS, *, beam_width: int, num_candidates: tuple[int, ...]) -> Search:
    """Step-level beam search, SBS(B1, B2). beam_width: B1. num_candidates: B2 per agent.

    Each of at most B1 beams gets B2 candidates from its next agent. All candidates are scored by V
    of the new state, and the best B1 stay. Finished transcripts compete with their last score.
    """
    beams = [make_root(question)]
    while True:
        live = [node for node in beams if not mas.is_terminal(node.state)]
        if not live:
            return beams[0]

        # 1. Expand every beam that is not finished.
        finished = [node for node in beams if mas.is_terminal(node.state)]
        children = yield from expand_all(live, mas, num_candidates)

        # 2. Score the new states; finished transcripts have their score already.
        values = yield Score(children)
        for child, value in zip(children, values, strict=True):
            child.V = value

        # 3. Keep the best. The sort is stable: ties go to finished transcripts, then to the first.
        beams = sorted(finished + children, key=lambda node: -node.V)[:beam_width]


def expand_all(nodes: list[Node], mas: MAS, num_candidates: tuple[int, ...]) -> Sampling:
    """Expand nodes and return their children. Agents with equal C are asked together."""
    nodes_of_num = defaultdict(list)
    for node in nodes:
        num = num_candidates[mas.turn_index(node.state)]
        nodes_of_num[num].append(node)
    children = []
    for num, waiting in sorted(nodes_of_num.items()):
        replies = yield Sample(waiting, num)
        for node, candidates in zip(waiting, replies, strict=True):
            children += expand(mas, node, candidates)
    return children


def mcts(
    question: str,
    mas: MAS,
    *,
    num_simulations: int,
    num_candidates: tuple[int, ...],
    c_uct: float,
    lam: float,
) -> Search:
    """MCTS guided by V (Algorithm 2). num_candidates: C per agent.

    Differs from `label_tree` in four places: a new child starts with a virtual visit; Eq. 2, not
    chance, picks among new children; siblings of a terminal state are not backed up; a terminal
    state is worth (1 - lam) * V + lam * ORM instead of its outcome. With lam = 0 no ORM is asked.
    """
    root = make_root(question)
    for _ in range(num_simulations):
        node = root
        while not mas.is_terminal(node.state):
            if node.children is None:
                children = yield from expand_all([node], mas, num_candidates)
                values = yield Score(children)
                for child, value in zip(children, values, strict=True):
                    child.V = value
                    child.N, child.W = 1, value  # virtual visit: N = 1, W = V(child)
            node = select(node, c_uct)  # Eq. 2
        if node.value is None:
            node.value = node.V
            if lam > 0:  # lambda mixing
                [score] = yield OrmScore([node])
                node.orm = score
                node.value = (1 - lam) * node.V + lam * node.orm
        backup(node, node.value)
        root.simulations.append([node])
    return decide(root, mas)


def decide(root: Node, mas: MAS) -> Node:
    """Descend from the root by largest Q, among children that a simulation has passed through.

    A virtual visit alone (N = 1) is not evidence. Simulations run to the end, so this always ends
    in a terminal state, never in an unfinished transcript.
    """
    node = root
    while not mas.is_terminal(node.state):
        visited = [child for child in node.children if child.N > 1]
        node = max(visited, key=lambda child: child.Q)
    return node


def path_to(node: Node) -> list[Node]:
    """Return the nodes from the root to `node`."""
    path = [node]
    while path[-1].parent is not None:
        path.append(path[-1].parent)
    return path[::-1]


# ---- Scorers: they answer Score and OrmScore requests --------------------------------------------
# A search does not know which of them scores its states.


@dataclass
class ModelScorer:
    """Score states with a trained model: V, or the ORM.

    A state is scored once, however many methods ask for it. Each of them is charged what it took.
    """

    model: ValueModel
    batch_tokens: int
    known: dict[State, tuple[float, float]] = field(default_factory=dict)  # state -> (V, seconds)

    def __call__(self, requests: list) -> list:
        # 1. Score the states that are not known yet, all together.
        states = [node.state for _, request in requests for node in request.nodes]
        new_states = [state for state in dict.fromkeys(states) if state not in self.known]
        start = time.perf_counter()
        values = self.model.score(new_states, batch_tokens=self.batch_tokens) if new_states else []
        seconds = (time.perf_counter() - start) / max(1, len(new_states))
        for state, value in zip(new_states, values, strict=True):
            self.known[state] = (value, seconds)

        # 2. Reply. Equal states of a request are read once, as are equal beginnings.
        replies = []
        for _, request in requests:
            states = list(dict.fromkeys(node.state for node in request.nodes))
            seconds = sum(self.known[state][1] for state in states)
            cost = Cost(scored_tokens=self.model.num_tokens(states), seconds=seconds)
            replies.append(([self.known[node.state][0] for node in request.nodes], cost))
        return replies


def policy_scorer(requests: list) -> list:
    """Score the newest message by the policy's own likelihood: the paper's baseline, at no cost.

    The value is 2 * exp(mean token log-probability) - 1, in [-1, 1]: the geometric mean of the
    token probabilities, scaled to the range of V.
    """
    replies = []
    for _, request in requests:
        messages = [node.candidate for node in request.nodes]
        values = [2 * math.exp(message.logprob / message.tokens) - 1 for message in messages]
        replies.append((values, Cost()))
    return replies


@dataclass
class RandomScorer:
    """The control: a uniform value in [-1, 1], a function of (seed, problem, path)."""

    seed: int

    def __call__(self, requests: list) -> list:
        replies = []
        for problem, request in requests:
            key = ("random scorer", self.seed, problem.id)
            draws = [uniforms(1, *key, node.path).item() for node in request.nodes]
            values = [2 * draw - 1 for draw in draws]
            replies.append((values, Cost()))
        return replies


# ---- Methods by name -----------------------------------------------------------------------------

TREE_SEARCHES = ("sbs", "mcts")
_NUM = r"(?P<num>[1-9]\d*)"
_PER_AGENT = r"x(?P<per_agent>[\d.]+)"
_SCORER = r"-(?P<scorer>value|policy|random|orm)"
_LAM = r"-lam(?P<lam>0?\.\d+|[01]|1\.0+|\d(?:\.\d+)?e-\d+)"  # a number from 0 to 1
METHOD_PATTERNS = {
    "greedy": r"greedy",
    "vote": rf"vote-{_NUM}",
    "best_of": rf"best_of-{_NUM}{_SCORER}",
    "sbs": rf"sbs-{_NUM}{_PER_AGENT}{_SCORER}",
    "mcts": rf"mcts-{_NUM}(?:{_PER_AGENT})?{_SCORER}(?:(?<!-orm){_LAM})?",
}


@dataclass(frozen=True)
class Method:
    """A search and its settings. Its canonical name is also the name of its records file."""

    name: str
    algorithm: str  # a key of METHOD_PATTERNS
    scorer: str | None  # None for greedy and vote
    num: int  # of passes, beams or simulations
    num_candidates: tuple[int, ...]  # per agent
    lam: float  # weight of the ORM in a terminal value of mcts

    @property
    def scorers(self) -> list[str]:
        """All that it asks for scores: its scorer, and the ORM if it is mixed in."""
        names = [self.scorer] if self.scorer else []
        return [*names, "orm"] if self.lam > 0 else names

    def search(self, problem: Problem, mas: MAS, *, c_uct: float) -> Search:
        """Start a search for one problem. It is given the question, not the gold answer."""
        question, counts = problem.question, self.num_candidates
        if self.algorithm == "greedy":
            return greedy(question, mas)
        if self.algorithm == "vote":
            return vote(question, mas, problem.answer_type, num=self.num)
        if self.algorithm == "best_of":
            return best_of_n(question, mas, num=self.num)
        if self.algorithm == "sbs":
            return sbs(question, mas, beam_width=self.num, num_candidates=counts)
        settings = {"num_candidates": counts, "c_uct": c_uct, "lam": self.lam}
        return mcts(question, mas, num_simulations=self.num, **settings)


def parse_method(name: str, mas: MAS, *, num_candidates: str, lam: float) -> Method:
    """Read the name of a method. Raises InputError if there is no such method.

    num_candidates, lam: for an mcts whose name does not give them.
    """
    algorithm = name.partition("-")[0]
    match = re.fullmatch(METHOD_PATTERNS.get(algorithm, "(?!)"), name)  # (?!) matches nothing
    if match is None:
        raise InputError(f"method {name}: unknown; the top of search.py lists the methods")
    parts = {"num": "1", "scorer": None, "lam": None} | match.groupdict()
    num, scorer = int(parts["num"]), parts["scorer"]
    if algorithm not in TREE_SEARCHES:
        return Method(name, algorithm, scorer, num, (1,) * len(mas.agents), lam=0.0)

    # The canonical name of a search says all its settings, each in one way.
    if parts["per_agent"] is None:
        counts = mas.counts_per_agent(num_candidates, "--num-candidates")
    else:
        counts = mas.counts_per_agent(parts["per_agent"], f"method {name}:")
    if parts["lam"] is not None:
        lam = float(parts["lam"])
    elif algorithm == "sbs" or scorer == "orm":
        lam = 0.0
    shown_counts = str(counts[0]) if len(set(counts)) == 1 else ".".join(map(str, counts))
    shown_lam = f"-lam{lam:.12g}" if lam > 0 else ""
    name = f"{algorithm}-{num}x{shown_counts}-{scorer}{shown_lam}"
    return Method(name, algorithm, scorer, num, counts, lam)


# ---- The script ----------------------------------------------------------------------------------

MODELS = {"value": "search", "orm": "outcome"}  # V and the ORM: scorer -> its --target of stage 2


def model_folder(args, model: str) -> Path:
    """Return the folder of V ("value") or of the ORM ("orm")."""
    return Path(vars(args)[model] or f"{args.run}/{model}")


def load_scorers(methods: list[Method], args, mas: MAS) -> dict[str, Handler]:
    """Load the scorers that the methods need. No ORM is loaded unless a method asks for it."""
    scorers: dict[str, Handler] = {"policy": policy_scorer, "random": RandomScorer(args.seed)}
    for name, target in MODELS.items():
        if any(name in method.scorers for method in methods):
            folder = model_folder(args, name)
            trained_for = read_config(folder)["settings"].get("target")
            if trained_for != target:
                raise InputError(f"{folder}: trained with --target {trained_for}, not {target}")
            model = ValueModel.load(folder, mas, args, must_be_finished=True)
            scorers[name] = ModelScorer(model, batch_tokens=args.batch_tokens)
    return scorers


def run_method(method: Method, problems: list[Problem], policy, scorers: dict, args) -> Iterator:
    """Answer problems by a method; yield (problem, node of the answer or TooLong, cost)."""
    searches = (
        (problem, method.search(problem, policy.mas, c_uct=args.c_uct)) for problem in problems
    )
    # Cheapest first. Scorers that are not loaded are not asked.
    handlers = {Score: scorers.get(method.scorer), OrmScore: scorers.get("orm"), Sample: policy}
    return run_searches(searches, handlers, max_active=args.max_active, progress=policy.progress)


def add_search_arguments(parser) -> None:
    """Add the flags that search.py and evaluate.py share."""
    add_problem_arguments(parser, training=False)
    add_tree_search_arguments(parser)
    add_value_arguments(parser)
    add = parser.add_argument
    add("--lam", type=unit_float, default=0.0, help="lambda: weight of the ORM in a terminal value")
    add("--orm", default=None, help="folder of the ORM (default: RUN/orm)")


def parse_args(argv=None):
    parser = stage_parser(__doc__, writes=False)
    add_search_arguments(parser)
    add = parser.add_argument
    add("--method", default="mcts-8x3-value", help="see the top of search.py")
    add("--question", default=None, help="your own, instead of a test problem")
    add("--index", type=positive_int, default=1, help="which test problem, from 1")
    add("--html", default=None, help="write the tree to this file, as a page")
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Load the graph, the method, the problem and the models.
    mas = load_graph(args.graph)
    method = parse_method(args.method, mas, num_candidates=args.num_candidates, lam=args.lam)
    if args.html is not None and method.algorithm not in TREE_SEARCHES:
        raise InputError(f"--html: {method.name} has no tree; take an sbs or mcts --method")
    problems = load_problems(args.task, args.data, {"test": args.index})
    if len(problems) < args.index:
        raise InputError(f"--index {args.index}: there are {len(problems)} test problems")
    problem = problems[-1]
    if args.question is not None:  # it has the answer type of the task
        problem = replace(problem, id="question", question=args.question, gold="?")
    scorers = load_scorers([method], args, mas)
    policy = make_policy(args, mas, progress=Progress(shown=True))

    # 2. Search.
    with with_journal(policy, args) as policy, policy.progress.over("search", 1, unit="problems"):
        [(_, leaf, cost)] = run_method(method, [problem], policy, scorers, args)
    if isinstance(leaf, TooLong):
        raise leaf

    # 3. Show the transcript, the answer, the tree and the cost.
    root, *path = path_to(leaf)
    print(f"Question: {problem.question}\n")
    for node in path:
        score = "" if node.V is None else f"  [{method.scorer} {node.V:+.3f}]"
        print(f"{node.message.agent}: {node.message.text}{score}")
    answer = extract_answer(leaf.message.text, problem.answer_type).value
    print(f"\nAnswer: {answer} (gold: {problem.gold})\n")
    if method.algorithm in TREE_SEARCHES:
        print("\n".join(tree_lines(root, path)), end="\n\n")
    print(
        f"{method.name}: {cost.agent_calls} agent calls, {cost.seconds:.2f} s, tokens: "
        f"{cost.prompt_tokens} prompt, {cost.generated_tokens} generated, "
        f"{cost.scored_tokens} scored; {cost.truncated.total()} messages cut"
    )
    if args.html is not None:
        from report.__main__ import tree_page, write_page

        record = asdict(problem) | tree_fields(root, mas, problem.answer_type, leaf)
        settings = {"graph": asdict(mas), "c_uct": args.c_uct}
        write_page(Path(args.html), tree_page(record, settings, asdict(method)))


def tree_lines(node: Node, answer_path: list[Node]) -> list[str]:
    """Return a line per node below `node`. * marks the path to the answer."""
    lines = []
    for child in node.children or []:
        mark = "* " if child in answer_path else "  "
        agent = mark + "  " * len(node.path) + child.message.agent
        numbers = f"N {child.N:2d}  Q {child.Q:+.2f}  V {child.V:+.2f}"
        lines.append(f"{agent:18s} {numbers}  {child.message.text[-35:]!r}")
        lines += tree_lines(child, answer_path)
    return lines


if __name__ == "__main__":
    cli(parse_args, main)
