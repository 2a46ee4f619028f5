"""Stage 3: search for an answer, guided by V (paper section 4.3).

    python search.py                                       # an embedded test problem, MCTS by V
    python search.py --index 7 --method sbs-2x1.4.1.1-value
    python search.py --question "Tom packs 10 boxes. ..."

Prints the transcript with V per message, the tree with N, Q and V, and the cost. Methods:

    greedy                    one pass, the most likely token at every step
    vote-K                    majority vote over K sampled passes
    best_of-K-SCORER          the sampled pass with the best final score
    sbs-B1xB2-SCORER          step-level beam search: B1 beams, B2 candidates each
    mcts-N[xC]-SCORER[-lamL]  MCTS: N simulations, C candidates per expansion (default:
                              --num-candidates), lambda L (default: --lam)

B2 and C are one number, or one per agent (1.8.1.1). SCORER is value (V), policy (the policy's own
likelihood), random (the control), or outcome (the ORM in V's place).

No search sees the gold answer: a search is given the question, and no Problem.
"""

import argparse
import math
import re
import shutil
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from generate_rollouts import expected_work_of_tree
from llm.policy import (
    Policy,
    add_policy_arguments,
    add_tree_search_arguments,
    journal_of,
    make_policy,
)
from llm.sampling import uniforms
from mas import MAS, State, counts_per_agent, load_graph
from report.__main__ import tree_page, write_page
from support.flags import InputError, Parser, cli, positive_int, unit_float
from support.progress import SearchProgress, Work
from support.records import device_of_this_process
from support.runs import read_config
from tasks.answers import same_answer
from tasks.extraction import extract_answer
from tasks.problems import TASKS, Problem, check_task, is_correct, problem_at
from tree import (
    Candidate,
    Cost,
    Handler,
    Node,
    Outcome,
    Sample,
    Score,
    backup,
    expand,
    make_child,
    make_root,
    run_searches,
    select,
    tree_fields,
)
from value import ValueModel

# A search yields requests and returns the terminal node whose answer is given.
Search = Generator[Sample | Score | Outcome, list, Node]

# ---- Passes: one message per agent, no search ----------------------------------------------------


def sample_passes(
    question: str, mas: MAS, *, num: int, greedy: bool
) -> Generator[Sample, list, list[Node]]:
    """Run `num` independent passes through the agents. Returns their terminal nodes."""
    root = make_root(question)
    [candidates] = yield Sample([root], num, greedy)
    nodes = []
    for index, candidate in enumerate(candidates):
        # Passes that start with equal messages remain separate samples.
        nodes.append(make_child(mas, root, candidate, index))
    while True:
        live = [index for index, node in enumerate(nodes) if not mas.is_terminal(node.state)]
        if not live:
            return nodes
        replies = yield Sample([nodes[index] for index in live], 1, greedy)
        for index, [candidate] in zip(live, replies, strict=True):
            nodes[index] = make_child(mas, nodes[index], candidate, 0)


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
    clusters: list[tuple[str, list[Node]]] = []  # (answer, passes that give it)
    for node in nodes:
        answer = extract_answer(node.message.text, answer_type).value
        if answer is None:
            continue
        for cluster_answer, members in clusters:
            if same_answer(cluster_answer, answer, answer_type):
                members.append(node)
                break
        else:
            clusters.append((answer, [node]))
    if not clusters:
        return nodes[0]
    _, largest = max(clusters, key=lambda cluster: len(cluster[1]))
    return largest[0]


def best_of_n(question: str, mas: MAS, *, num: int) -> Search:
    """Return the pass whose final state scores best among `num` passes."""
    nodes = yield from sample_passes(question, mas, num=num, greedy=False)
    values = yield Score(nodes)
    for node, value in zip(nodes, values, strict=True):
        node.V = value
    return max(nodes, key=lambda node: node.V)


# ---- Search --------------------------------------------------------------------------------------


def sbs(question: str, mas: MAS, *, beam_width: int, num_candidates: tuple[int, ...]) -> Search:
    """Step-level beam search, SBS(B1, B2).

    Each of at most B1 beams gets B2 candidates from its next agent. All candidates are scored by V
    of the new state, and the best B1 stay. Finished transcripts compete with their last score.

    Args:
        beam_width: B1.
        num_candidates: B2 per agent.
    """
    beams = [make_root(question)]
    while True:
        live = [node for node in beams if not mas.is_terminal(node.state)]
        if not live:
            return beams[0]

        # 1. Candidates of every beam that is not finished.
        finished = [node for node in beams if mas.is_terminal(node.state)]
        fresh = yield from expand_all(live, mas, num_candidates)

        # 2. Score the new states; finished transcripts have their score already.
        values = yield Score(fresh)
        for node, value in zip(fresh, values, strict=True):
            node.V = value
            if mas.is_terminal(node.state):
                node.reward = value  # marks a final answer: `tree_fields` records it

        # 3. Keep the best. The sort is stable: ties go to finished transcripts, then to the first.
        beams = sorted(finished + fresh, key=lambda node: -node.V)[:beam_width]


def expand_all(
    nodes: list[Node], mas: MAS, num_candidates: tuple[int, ...]
) -> Generator[Sample, list, list[Node]]:
    """Expand several nodes and return their children."""
    children = []
    for node, candidates in (yield from sample_all(nodes, mas, num_candidates)):
        children += expand(mas, node, candidates)
    return children


def sample_all(
    nodes: list[Node], mas: MAS, num_candidates: tuple[int, ...]
) -> Generator[Sample, list, list[tuple[Node, list[Candidate]]]]:
    """Sample candidates at several nodes. Returns each node with its candidates.

    Nodes can wait for different agents, hence for different numbers of candidates; those with the
    same number are requested together.
    """
    nodes_of_num: dict[int, list[Node]] = {}
    for node in nodes:
        num = num_candidates[mas.turn_index(node.state)]
        nodes_of_num.setdefault(num, []).append(node)
    sampled = []
    for num in sorted(nodes_of_num):
        replies = yield Sample(nodes_of_num[num], num)
        sampled += zip(nodes_of_num[num], replies, strict=True)
    return sampled


def mcts(
    question: str,
    mas: MAS,
    *,
    num_simulations: int,
    num_candidates: tuple[int, ...],
    c_uct: float,
    lam: float,
) -> Search:
    """MCTS guided by V (Algorithm 2).

    Differs from `label_tree` in four places: a new child starts with a virtual visit; Eq. 2, not
    chance, picks among new children; siblings of a terminal state are not backed up; a terminal
    state is worth (1 - lam) * V + lam * ORM instead of the reward. Every simulation runs to a
    terminal state.

    Args:
        num_candidates: C per agent.
        lam: weight of the ORM in a terminal value. 0 never queries the ORM.
    """
    root = make_root(question)
    for _ in range(num_simulations):
        node = root
        while not mas.is_terminal(node.state):
            if node.children is None:
                num = num_candidates[mas.turn_index(node.state)]
                [candidates] = yield Sample([node], num)
                children = expand(mas, node, candidates)
                values = yield Score(children)
                for child, value in zip(children, values, strict=True):
                    child.V = value
                    child.N, child.W = 1, value  # virtual visit: N = 1, W = V(child)
            node = select(node, c_uct)  # Eq. 2
        if node.reward is None:
            node.reward = node.V
            if lam > 0:  # lambda mixing
                [outcome] = yield Outcome([node])
                node.outcome = outcome
                node.reward = (1 - lam) * node.V + lam * node.outcome
        backup(node, node.reward)
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


# ---- Scorers: the handlers of Score requests -----------------------------------------------------
# A search does not know which of them scores its states.


class ModelScorer:
    """Score states with a trained model: V, or the ORM.

    A state is scored once, however many methods ask for it. Each of them is charged what it took.
    """

    def __init__(self, model: ValueModel, *, batch_tokens: int):
        self.model = model
        self.batch_tokens = batch_tokens
        self.known: dict[State, tuple[float, float]] = {}  # state -> (V, seconds)

    def __call__(
        self, requests: list[tuple[Problem, Score | Outcome]]
    ) -> list[tuple[list[float], Cost]]:
        states = []
        for _, request in requests:
            states += [node.state for node in request.nodes]
        self._score(list(dict.fromkeys(states)))

        replies = []
        for _, request in requests:
            values = [self.known[node.state][0] for node in request.nodes]
            # Equal states of one request are read once, and so is what its states have in common.
            distinct = list(dict.fromkeys(node.state for node in request.nodes))
            cost = Cost(scored_tokens=self.model.num_tokens(distinct))
            for state in distinct:
                cost.seconds += self.known[state][1]
            replies.append((values, cost))
        return replies

    def _score(self, states: list[State]) -> None:
        """Score those of the states that are not known yet."""
        new_states = [state for state in states if state not in self.known]
        self.model.on_rows(len(states) - len(new_states))
        if not new_states:
            return
        start = time.perf_counter()
        values = self.model.score(new_states, batch_tokens=self.batch_tokens)
        seconds_per_state = (time.perf_counter() - start) / len(new_states)
        for state, value in zip(new_states, values, strict=True):
            self.known[state] = (value, seconds_per_state)


def policy_scorer(requests: list[tuple[Problem, Score]]) -> list[tuple[list[float], Cost]]:
    """Score the newest message by the policy's own likelihood: the paper's baseline, at no cost.

    The value is 2 * exp(mean token log-probability) - 1, in [-1, 1]: the geometric mean of the
    token probabilities, scaled to the range of V.
    """
    replies = []
    for _, request in requests:
        values = [2 * math.exp(mean_logprob(node.candidate)) - 1 for node in request.nodes]
        replies.append((values, Cost()))
    return replies


def mean_logprob(candidate: Candidate) -> float:
    return candidate.logprob / candidate.tokens


class RandomScorer:
    """The control: a uniform value in [-1, 1], a function of (seed, problem, path)."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, requests: list[tuple[Problem, Score]]) -> list[tuple[list[float], Cost]]:
        replies = []
        for problem, request in requests:
            values = [self._value(problem, node) for node in request.nodes]
            replies.append((values, Cost()))
        return replies

    def _value(self, problem: Problem, node: Node) -> float:
        [uniform] = uniforms(1, "random scorer", self.seed, problem.id, node.path)
        return 2 * float(uniform) - 1


# ---- Methods by name -----------------------------------------------------------------------------

SCORERS = ("value", "policy", "random", "outcome")


@dataclass(frozen=True)
class Method:
    """A search and its settings.

    Attributes:
        name: also the name of its records file.
        algorithm: greedy, vote, best_of, sbs or mcts.
        scorer: one of SCORERS; None for greedy and vote.
        num: number of passes, beams or simulations.
        num_candidates: per agent.
        lam: weight of the ORM in a terminal value (mcts).
    """

    name: str
    algorithm: str
    scorer: str | None
    num: int
    num_candidates: tuple[int, ...]
    lam: float

    def search(self, problem: Problem, mas: MAS, *, c_uct: float) -> Search:
        """Start a search for one problem. It is given the question, not the gold answer."""
        question = problem.question
        if self.algorithm == "greedy":
            return greedy(question, mas)
        if self.algorithm == "vote":
            return vote(question, mas, problem.answer_type, num=self.num)
        if self.algorithm == "best_of":
            return best_of_n(question, mas, num=self.num)
        if self.algorithm == "sbs":
            return sbs(question, mas, beam_width=self.num, num_candidates=self.num_candidates)
        return mcts(
            question,
            mas,
            num_simulations=self.num,
            num_candidates=self.num_candidates,
            c_uct=c_uct,
            lam=self.lam,
        )

    def expected_work(self, mas: MAS) -> Work:
        """Estimate the work of a search, to show the time left.

        Exact except for mcts, and if messages repeat or agents have conditions.
        """
        prompts, messages, states = 0, 0, 0
        if self.algorithm == "mcts":
            prompts, messages, _ = expected_work_of_tree(self.num, self.num_candidates)
        elif self.algorithm == "sbs":
            beams = 1
            for num in self.num_candidates:
                prompts += beams
                messages += beams * num
                beams = min(self.num, beams * num)
        else:
            prompts = 1 + self.num * (len(mas.agents) - 1)  # the passes share the first prompt
            messages = self.num * len(mas.agents)
        if self.scorer in ("value", "outcome"):
            states = self.num if self.algorithm == "best_of" else messages
        return Work(prompts, messages, states)

    @property
    def models(self) -> set[str]:
        """The trained models that it queries: "value" (V), "outcome" (the ORM), both or none."""
        models = {self.scorer} & {"value", "outcome"}
        if self.lam > 0:
            models.add("outcome")
        return models


_NUM = r"(?P<num>[1-9]\d*)"
_PER_AGENT = r"x(?P<per_agent>[\d.]+)"
_SCORER = rf"-(?P<scorer>{'|'.join(SCORERS)})"
METHOD_PATTERNS = {
    "greedy": r"greedy",
    "vote": rf"vote-{_NUM}",
    "best_of": rf"best_of-{_NUM}{_SCORER}",
    "sbs": rf"sbs-{_NUM}{_PER_AGENT}{_SCORER}",
    "mcts": rf"mcts-{_NUM}(?:{_PER_AGENT})?{_SCORER}(?:-lam(?P<lam>[\d.]+))?",
}


def parse_method(name: str, mas: MAS, *, num_candidates: str, lam: float) -> Method:
    """Read the name of a method.

    Args:
        num_candidates, lam: for an mcts whose name does not give them.

    Raises:
        InputError: if there is no such method.
    """
    algorithm, parts = _split_name(name)
    num = int(parts.get("num") or 1)
    scorer = parts.get("scorer")
    if algorithm not in ("sbs", "mcts"):
        return Method(name, algorithm, scorer, num, counts_per_agent(mas, "1", name), lam=0.0)

    # The canonical name of a search says all its settings, each in one way.
    if parts["per_agent"] is None:
        counts = counts_per_agent(mas, num_candidates, "--num-candidates")
    else:
        counts = counts_per_agent(mas, parts["per_agent"], f"method {name}:")
    if algorithm == "mcts" and parts["lam"] is not None:
        lam = _lam_of_name(name, parts["lam"])
        if lam > 0 and scorer == "outcome":
            raise InputError(f"method {name}: it is guided by the ORM; there is nothing to mix")
    elif algorithm == "sbs" or scorer == "outcome":
        lam = 0.0
    shown_counts = str(counts[0]) if len(set(counts)) == 1 else ".".join(map(str, counts))
    canonical_name = f"{algorithm}-{num}x{shown_counts}-{scorer}"
    if lam > 0:
        # 0.00001, not 1e-05: a name has digits and dots.
        canonical_name += f"-lam{np.format_float_positional(lam, trim='-')}"
    return Method(canonical_name, algorithm, scorer, num, counts, lam)


def _split_name(name: str) -> tuple[str, dict[str, str | None]]:
    """Return (algorithm, parts of the name). Raises InputError if no pattern matches."""
    for algorithm, pattern in METHOD_PATTERNS.items():
        match = re.fullmatch(pattern, name)
        if match:
            return algorithm, match.groupdict()
    raise InputError(
        f"method {name}: not one of greedy, vote-K, best_of-K-SCORER, sbs-B1xB2-SCORER, "
        f"mcts-N[xC]-SCORER[-lamL] with whole numbers of at least 1 and SCORER one of "
        f"{', '.join(SCORERS)}"
    )


def _lam_of_name(name: str, lam: str) -> float:
    try:
        return unit_float(lam)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"method {name}: lambda {error}") from None


def model_folder(args, model: str) -> Path:
    """Return the folder of V ("value") or of the ORM ("outcome")."""
    if model == "value":
        return Path(args.value or f"{args.run}/value")
    return Path(args.orm or f"{args.run}/orm")


MODEL_TARGETS = {"value": "search", "outcome": "outcome"}  # --target of train_value.py


def load_model(args, mas: MAS, model: str) -> ValueModel:
    """Load V ("value") or the ORM ("outcome"). Raises InputError if it cannot be used."""
    folder = model_folder(args, model)
    if not folder.is_dir():
        commands = {"value": "train_value.py", "outcome": "train_value.py --target outcome"}
        raise InputError(f"{folder}: no trained {model} model there; {commands[model]} makes it")
    target = read_config(folder)["settings"].get("target")
    if target in MODEL_TARGETS.values() and target != MODEL_TARGETS[model]:
        raise InputError(f"{folder}: no {model} model, it was trained with --target {target}")
    device = device_of_this_process(args.device)
    return ValueModel.load(folder, mas, device=device, dtype=args.dtype)


def load_scorers(methods: list[Method], args, mas: MAS) -> dict[str, Handler]:
    """Load the scorers that the methods need. No ORM is loaded unless a method asks for it."""
    scorers: dict[str, Handler] = {"policy": policy_scorer, "random": RandomScorer(args.seed)}
    for model in ("value", "outcome"):
        if any(model in method.models for method in methods):
            value_model = load_model(args, mas, model)
            scorers[model] = ModelScorer(value_model, batch_tokens=args.batch_tokens)
    return scorers


def make_handlers(
    method: Method, scorers: dict[str, Handler], policy: Policy
) -> dict[type, Handler]:
    """Return the handlers of a method's requests, cheapest first (see `run_searches`)."""
    handlers: dict[type, Handler] = {}
    if method.scorer:
        handlers[Score] = scorers[method.scorer]
    if method.lam > 0:
        handlers[Outcome] = scorers["outcome"]
    handlers[Sample] = policy
    for handler in handlers.values():
        if isinstance(handler, ModelScorer):
            handler.model.free_memory = policy.decoder.free_memory
    return handlers


def report_to(progress: SearchProgress, handlers: dict[type, Handler]) -> None:
    """Let the handlers report their work to a progress bar."""
    for handler in handlers.values():
        if isinstance(handler, Policy):
            handler.on_batch = progress.sampled
        if isinstance(handler, ModelScorer):
            handler.model.on_rows = progress.scored


def add_search_arguments(parser: Parser) -> None:
    """Add the flags that search.py and evaluate.py share beyond those of the policy."""
    parser.add_argument(
        "--lam",
        type=unit_float,
        default=0.0,
        help="lambda: weight of the ORM in an mcts terminal value",
    )
    add_value_argument(parser)
    parser.add_argument("--orm", default=None, help="folder of the ORM (default: RUN/orm)")


def add_value_argument(parser: Parser) -> None:
    """Add the flag of the scripts that read V."""
    parser.add_argument("--value", default=None, help="folder of V (default: RUN/value)")


# ---- One problem in full -------------------------------------------------------------------------


def path_to(node: Node) -> list[Node]:
    """Return the nodes from the first message to `node`."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def search_tree(leaf: Node, answer_type: str) -> dict | None:
    """Return the tree in which a search has found its answer, as in `tree_fields`.

    None if it has no tree: passes have nothing in common.
    """
    root = path_to(leaf)[0].parent
    return tree_fields(root, answer_type, leaf) if root.children else None


def show_tree(root: Node, chosen: Node, *, width: int) -> str:
    """Show the tree as text, a line of at most `width` characters per node.

    * marks the path to the answer. Of a long message only the end is shown.
    """
    answer_path = set(path_to(chosen))
    lines = []
    stack = [(child, 0) for child in reversed(root.children)]
    while stack:
        node, depth = stack.pop()
        mark = "*" if node in answer_path else " "
        indent = "  " * depth
        visits = f"N {node.N:2d} Q {node.Q:+.2f} " if node.N else ""
        value = "" if node.V is None else f"V {node.V:+.2f} "
        line = f"{mark} {indent}{node.message.agent:9s}{visits}{value} "
        text = " ".join(node.message.text.split())
        room = max(20, width - len(line))
        if len(text) > room:
            text = "..." + text[-(room - 3) :]
        lines.append(line + text)
        stack += [(child, depth + 1) for child in reversed(node.children or [])]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    add_tree_search_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument(
        "--method",
        default=None,
        help="see the top of search.py (default: mcts-8x1.8.1.1-value, for a graph of four agents; "
        "mcts-8x3-value for others)",
    )
    parser.add_argument(
        "--question", default=None, help="your own question, instead of a problem of the task"
    )
    parser.add_argument(
        "--index", type=positive_int, default=None, help="which test problem of the task, from 1"
    )
    parser.add_argument("--html", default=None, help="write the tree to this file, as a page")
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Load the graph, the method, the problem and the models.
    mas = load_graph(args.graph)
    name = args.method or default_method(mas)
    method = parse_method(name, mas, num_candidates=args.num_candidates, lam=args.lam)
    if args.html is not None and method.algorithm not in ("sbs", "mcts"):
        raise InputError(f"--html: {method.name} has no tree; take an sbs or mcts --method")
    problem = choose_problem(args)
    scorers = load_scorers([method], args, mas)
    policy = make_policy(args, mas)

    # 2. Search.
    progress = SearchProgress(1, method.expected_work(mas), description=method.name)
    searches = [(problem, method.search(problem, mas, c_uct=args.c_uct))]
    handlers = make_handlers(method, scorers, policy)
    report_to(progress, handlers)
    with progress, journal_of(policy, args):
        [(_, leaf, cost)] = run_searches(searches, handlers, max_active=1, progress=progress)

    # 3. Show everything.
    print_solution(problem, method, leaf, cost)
    if args.html is not None:
        tree = search_tree(leaf, problem.answer_type)
        settings = {"graph": asdict(mas), "c_uct": args.c_uct}
        record = {"id": problem.id, "question": problem.question, "gold": problem.gold} | tree
        write_page(Path(args.html), tree_page(record, settings, method.name))


def default_method(mas: MAS) -> str:
    """Return the method of the README; for a graph without four agents, C = 3 for each of them."""
    return "mcts-8x1.8.1.1-value" if len(mas.agents) == 4 else "mcts-8x3-value"


def choose_problem(args) -> Problem:
    """Return the user's question, or a test problem of the task."""
    if args.question is None:
        return problem_at(task=args.task, data=args.data, position=args.index or 1)
    if args.index is not None:
        raise InputError("--question and --index: give one of them")
    question = args.question.strip()
    if not question:
        raise InputError(
            "--question is empty; give a question, or leave the flag out for a problem of the task"
        )
    if args.data is not None:
        answer_type = problem_at(task=args.task, data=args.data, position=1).answer_type
    else:
        check_task(args.task)
        answer_type = TASKS[args.task].answer_type if args.task in TASKS else "number"
    return Problem(id="question", split="test", question=question, gold="", answer_type=answer_type)


def print_solution(problem: Problem, method: Method, leaf: Node, cost: Cost) -> None:
    """Print the question, the transcript, the answer, the tree and the cost."""
    score_names = {"value": "V", "outcome": "ORM"}
    score_name = score_names.get(method.scorer, method.scorer)

    # 1. The transcript.
    print(f"Question: {problem.question}\n")
    for node in path_to(leaf):
        score = "" if node.V is None else f"{score_name} = {node.V:+.3f}, "
        truncated = ", cut at its token limit" if node.candidate.truncated else ""
        logprob = f"mean token log-probability {mean_logprob(node.candidate):.3f}"
        print(f"{node.message.agent}: {node.message.text}")
        print(f"    {score}{logprob}{truncated}")

    # 2. The answer.
    answer = extract_answer(leaf.message.text, problem.answer_type).value
    verdict = ""
    if problem.gold:
        right_or_wrong = "right" if is_correct(problem, answer) else "wrong"
        verdict = f"   (gold {problem.gold}: {right_or_wrong})"
    print(f"\nAnswer: {'none was given' if answer is None else answer}{verdict}")

    # 3. The tree.
    root = path_to(leaf)[0].parent
    if root.children:
        notes = []
        if score_name != "V":
            notes.append(f"V is {score_name}")
        if root.N > 0:
            notes.append("N counts the virtual visit")
        print("\n" + "; ".join(["The tree", *notes]) + ":")
        print(show_tree(root, leaf, width=shutil.get_terminal_size().columns))

    # 4. The cost.
    print(
        f"\n{method.name}: {cost.agent_calls} agent calls, {cost.seconds:.2f} s, "
        f"{cost.truncated.total()} messages cut\n"
        f"tokens: {cost.prompt_tokens} prompt, {cost.generated_tokens} generated, "
        f"{cost.scored_tokens} scored"
    )


if __name__ == "__main__":
    cli(parse_args, main)
