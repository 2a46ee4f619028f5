"""Stage 3: search for an answer, guided by V (paper section 4.3). No search here ever sees the gold answer.

    python search.py                                         # an embedded test problem, MCTS guided by V
    python search.py --index 7 --method sbs-2x1.4.1.1-value
    python search.py --question "Tom packs 10 boxes. ..."

Prints the transcript with V per message, the tree with N, Q and V, and what it cost. Methods:

    greedy                    one pass, the most likely token at every step
    vote-K                    majority vote over K sampled passes
    best_of-K-SCORER          the sampled pass with the best final score
    sbs-B1xB2-SCORER          step-level beam search: B1 beams, B2 candidates each
    mcts-N[xC]-SCORER[-lamL]  MCTS with N simulations, C candidates per expansion (default: --num-candidates), lambda L (--lam)

B2 and C are one number or one per agent (1.8.1.1). SCORER is value (V), policy (the policy's own likelihood), random,
or outcome (the ORM in V's place).
"""

import argparse
import math
import re
import time
from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from generate_rollouts import (Cost, Handler, Node, Outcome, Policy, Sample, Score, add_policy_arguments, backup, expand,
                               make_child, make_policy, make_root, own_device, run, select, uniforms)
from mas import (MAS, TASKS, InputError, Parser, Problem, cli, extract_answer, is_correct, load_graph, load_problems, positive_int,
                 same_answer, unit_float)
from train_value import ValueModel

Search = Generator[Sample | Score | Outcome, list, Node]  # returns the terminal node whose answer is given

# ---------------------------------------------------------------------------------------------------------------------
# Passes: one message per agent, no search


def sample_passes(question: str, mas: MAS, *, num: int, greedy: bool) -> Search:
    """`num` independent passes through the agents. Returns their terminal nodes."""
    root = make_root(question)
    [candidates] = yield Sample([root], num, greedy)
    nodes = [make_child(mas, root, candidate, k) for k, candidate in enumerate(candidates)]
    while live := [i for i, node in enumerate(nodes) if not mas.is_terminal(node.state)]:
        replies = yield Sample([nodes[i] for i in live], 1, greedy)
        for i, [candidate] in zip(live, replies):
            nodes[i] = make_child(mas, nodes[i], candidate, 0)
    return nodes


def greedy(question: str, mas: MAS) -> Search:
    """One pass; every agent takes its most likely token at every step."""
    [node] = yield from sample_passes(question, mas, num=1, greedy=True)
    return node


def vote(question: str, mas: MAS, kind: str, *, num: int) -> Search:
    """Majority vote (self-consistency): the most frequent answer among `num` passes; ties go to the one seen first.

    Answers are clustered by the equality that grades them. A pass without an answer has no vote.
    """
    nodes = yield from sample_passes(question, mas, num=num, greedy=False)
    clusters: list[list[Node]] = []
    for node in nodes:
        answer = extract_answer(node.state.messages[-1].text, kind)
        same = (c for c in clusters if same_answer(extract_answer(c[0].state.messages[-1].text, kind), answer, kind))
        if answer is not None and (cluster := next(same, None)) is not None:
            cluster.append(node)
        elif answer is not None:
            clusters.append([node])
    return max(clusters, key=len)[0] if clusters else nodes[0]


def best_of_n(question: str, mas: MAS, *, num: int) -> Search:
    """Of `num` passes the one whose final state scores best."""
    nodes = yield from sample_passes(question, mas, num=num, greedy=False)
    for node, node.V in zip(nodes, (yield Score(nodes))):
        pass
    return max(nodes, key=lambda node: node.V)


# ---------------------------------------------------------------------------------------------------------------------
# Search


def sbs(question: str, mas: MAS, *, beam_width: int, num_candidates: tuple[int, ...]) -> Search:
    """Step-level beam search, SBS(B1, B2): each beam gets B2 candidates from the agent on turn, all are scored by V of the
    new state, the best B1 stay. `num_candidates` is B2 per agent. Finished transcripts compete with their last score."""
    beams = [make_root(question)]
    while live := [node for node in beams if not mas.is_terminal(node.state)]:
        pool = [node for node in beams if mas.is_terminal(node.state)]
        width = {node: num_candidates[mas.index(node.state)] for node in live}
        for num in sorted(set(width.values())):
            nodes = [node for node in live if width[node] == num]
            for node, candidates in zip(nodes, (yield Sample(nodes, num))):
                pool += expand(mas, node, candidates)
        fresh = [node for node in pool if node.V is None]
        for node, node.V in zip(fresh, (yield Score(fresh))):
            pass
        beams = sorted(pool, key=lambda node: -node.V)[:beam_width]   # stable: ties go to the first
    return beams[0]


def mcts(question: str, mas: MAS, *, num_simulations: int, num_candidates: tuple[int, ...], c_uct: float, lam: float) -> Search:
    """MCTS guided by V (Algorithm 2). Differs from `label_tree` in three places: a new child starts with a virtual visit,
    Eq. 2 (not chance) picks among new children, and a terminal state is worth a mix of V and ORM instead of the reward.

    Every simulation runs to a terminal state. lam = 0 never asks the ORM.
    """
    root = make_root(question)
    for _ in range(num_simulations):
        node = root
        while not mas.is_terminal(node.state):
            if node.children is None:
                [candidates] = yield Sample([node], num_candidates[mas.index(node.state)])
                children = expand(mas, node, candidates)
                for child, child.V in zip(children, (yield Score(children))):
                    child.N, child.W = 1, child.V                             # virtual visit: N = 1, W = V(child)
            node = select(node, c_uct)                                        # Eq. 2
        if node.reward is None:
            [outcome] = (yield Outcome([node])) if lam > 0 else [0.0]
            node.reward = (1 - lam) * node.V + lam * outcome                  # terminal value, lambda mixing
        backup(node, node.reward)
    return decide(root, mas)


def decide(root: Node, mas: MAS) -> Node:
    """From the root descend by largest Q among children that a simulation passed through: a virtual visit alone (N = 1) is
    no evidence. As simulations run to the end, this always ends in a terminal state, never in an unfinished transcript."""
    node = root
    while not mas.is_terminal(node.state):
        node = max((child for child in node.children if child.N > 1), key=lambda child: child.Q)
    return node


# ---------------------------------------------------------------------------------------------------------------------
# Scorers: what answers a Score request. The searches do not know which it is.


class ModelScorer:
    """V (or the ORM), by the trained model."""

    def __init__(self, model: ValueModel, *, batch_tokens: int):
        self.model, self.batch_tokens = model, batch_tokens

    def __call__(self, requests: list[tuple[Problem, Score | Outcome]]) -> list[tuple[list[float], Cost]]:
        start = time.perf_counter()
        values, tokens = self.model.score([node.state for _, request in requests for node in request.nodes], batch_tokens=self.batch_tokens)
        seconds = (time.perf_counter() - start) / len(values)
        replies, at = [], 0
        for _, request in requests:
            end = at + len(request.nodes)
            replies.append((values[at:end], Cost(scored_tokens=sum(tokens[at:end]), seconds=seconds * (end - at))))
            at = end
        return replies


def policy_scorer(requests: list[tuple[Problem, Score]]) -> list[tuple[list[float], Cost]]:
    """The paper's likelihood baseline: how likely the policy found the newest message it sampled, as a value in [-1, 1]:
    2 * exp(mean token log-probability) - 1, i.e. the geometric mean of the token probabilities. Costs nothing."""
    value = lambda candidate: 2 * math.exp(candidate.logprob / candidate.tokens) - 1
    return [([value(node.candidate) for node in request.nodes], Cost()) for _, request in requests]


class RandomScorer:
    """The control: uniform in [-1, 1], a function of (seed, problem, path)."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self, requests: list[tuple[Problem, Score]]) -> list[tuple[list[float], Cost]]:
        value = lambda problem, node: 2 * float(uniforms(1, "random scorer", self.seed, problem.id, node.path)[0]) - 1
        return [([value(problem, node) for node in request.nodes], Cost()) for problem, request in requests]


# ---------------------------------------------------------------------------------------------------------------------
# Methods by name


@dataclass(frozen=True)
class Method:
    name: str                             # canonical; also the name of its records file
    kind: str                             # greedy, vote, best_of, sbs or mcts
    scorer: str | None                    # value, policy, random, outcome
    num: int                              # passes, beams or simulations
    num_candidates: tuple[int, ...]       # per agent
    lam: float

    def search(self, problem: Problem, mas: MAS, *, c_uct: float) -> Search:
        """A fresh search for one problem. It is given the question, not the gold answer."""
        question = problem.question
        if self.kind == "greedy":
            return greedy(question, mas)
        if self.kind == "vote":
            return vote(question, mas, problem.kind, num=self.num)
        if self.kind == "best_of":
            return best_of_n(question, mas, num=self.num)
        if self.kind == "sbs":
            return sbs(question, mas, beam_width=self.num, num_candidates=self.num_candidates)
        return mcts(question, mas, num_simulations=self.num, num_candidates=self.num_candidates, c_uct=c_uct, lam=self.lam)


_METHOD = re.compile(r"(?P<kind>greedy|vote|best_of|sbs|mcts)(?:-(?P<num>\d+)(?:x(?P<per_agent>[\d.]+))?)?"
                     r"(?:-(?P<scorer>value|policy|random|outcome))?(?:-lam(?P<lam>[\d.]+))?")
_FORMS = {  # kind: (what its name must hold, what it may hold)
    "greedy": (set(), set()), "vote": ({"num"}, set()), "best_of": ({"num", "scorer"}, set()),
    "sbs": ({"num", "per_agent", "scorer"}, set()), "mcts": ({"num", "scorer"}, {"per_agent", "lam"})}


def parse_method(name: str, mas: MAS, *, num_candidates: str, lam: float) -> Method:
    """Read a method's name; num_candidates and lam stand in where an mcts name does not give them."""
    match = _METHOD.fullmatch(name)
    given = {key for key, value in match.groupdict().items() if value is not None and key != "kind"} if match else set()
    required, optional = _FORMS[match["kind"]] if match else (None, None)
    if not match or not required <= given <= required | optional or "num" in given and int(match["num"]) < 1:
        raise InputError(f"method {name}: not one of greedy, vote-K, best_of-K-SCORER, sbs-B1xB2-SCORER, mcts-N[xC]-SCORER[-lamL] "
                         f"with whole numbers of at least 1 and SCORER one of value, policy, random, outcome")
    if match["kind"] != "mcts":
        counts = mas.per_agent(match["per_agent"] or "1", f"method {name}:")
        return Method(name, match["kind"], match["scorer"], int(match["num"] or 1), counts, 0.0)
    counts = mas.per_agent(match["per_agent"] or num_candidates, f"method {name}:" if match["per_agent"] else "--num-candidates")
    if match["lam"] is not None:
        try:
            lam = unit_float(match["lam"])
        except argparse.ArgumentTypeError as error:
            raise InputError(f"method {name}: lambda {error}") from None
    shown = str(counts[0]) if len(set(counts)) == 1 else ".".join(map(str, counts))
    canonical = f"mcts-{int(match['num'])}x{shown}-{match['scorer']}" + (f"-lam{lam:g}" if lam else "")
    return Method(canonical, "mcts", match["scorer"], int(match["num"]), counts, lam)


def model_folder(args, name: str) -> Path:
    """Where V ("value") or the ORM ("outcome") of this run lies."""
    return Path({"value": args.value or f"{args.run}/value", "outcome": args.orm or f"{args.run}/orm"}[name])


def load_scorers(methods: list[Method], args, mas: MAS) -> dict[str, Handler]:
    """What the methods need and nothing else: no ORM is loaded unless a method asks for it."""
    needed = {method.scorer for method in methods} | {"outcome" for method in methods if method.lam > 0}
    scorers: dict[str, Handler] = {"policy": policy_scorer, "random": RandomScorer(args.seed)}
    for name, fix in (("value", "train_value.py makes it"), ("outcome", "train_value.py --target outcome makes it")):
        if name in needed:
            folder = model_folder(args, name)
            if not folder.is_dir():
                raise InputError(f"{folder}: no trained {name} model there; {fix}")
            scorers[name] = ModelScorer(ValueModel.load(folder, mas, device=own_device(args.device)), batch_tokens=args.batch_tokens)
    return scorers


def make_handlers(method: Method, scorers: dict[str, Handler], policy: Policy) -> dict[type, Handler]:
    """Cheap kinds first (see `run`)."""
    handlers: dict[type, Handler] = {Sample: policy}
    if method.lam > 0:
        handlers = {Outcome: scorers["outcome"]} | handlers
    if method.scorer:
        handlers = {Score: scorers[method.scorer]} | handlers
    return handlers


def add_search_arguments(parser: Parser) -> None:
    """The flags that search.py and evaluate.py share beyond those of the policy."""
    parser.add_argument("--lam", type=unit_float, default=0.0, help="lambda: weight of the ORM in an mcts terminal value")
    parser.add_argument("--value", default=None, help="folder of V (default: RUN/value)")
    parser.add_argument("--orm", default=None, help="folder of the ORM (default: RUN/orm)")


# ---------------------------------------------------------------------------------------------------------------------
# One problem, in full


def path_to(node: Node) -> list[Node]:
    """The nodes from the first message to `node`."""
    path = []
    while node.parent is not None:
        path.append(node)
        node = node.parent
    return path[::-1]


def show_tree(root: Node, chosen: Node) -> str:
    """The tree as text: a line per node with N, Q and V; * marks the path to the answer."""
    answer_path, lines, stack = set(path_to(chosen)), [], [(child, 0) for child in reversed(root.children or [])]
    while stack:
        node, depth = stack.pop()
        v = "" if node.V is None else f"V {node.V:+.2f}"
        stats = f"N {node.N:3d}  Q {node.Q:+.2f}  " if node.N else ""
        text = " ".join(node.state.messages[-1].text.split())
        lines.append(f"{'*' if node in answer_path else ' '} {'   ' * depth}{node.state.messages[-1].agent:9s} {stats}{v}  "
                     f"{text if len(text) <= 90 else '...' + text[-87:]}")
        stack += [(child, depth + 1) for child in reversed(node.children or [])]
    return "\n".join(lines)


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument("--method", default="mcts-8x1.8.1.1-value", help="see the top of search.py")
    parser.add_argument("--question", default=None, help="your own question, instead of a problem of the task")
    parser.add_argument("--index", type=positive_int, default=1, help="which test problem of the task, from 1")
    return parser.parse_args(argv)


def main(args) -> None:
    mas = load_graph(args.graph)
    if args.question is not None and not args.question.strip():
        raise InputError("--question is empty; give a question, or leave the flag out for an embedded problem")
    method = parse_method(args.method, mas, num_candidates=args.num_candidates, lam=args.lam)
    if args.question is not None:
        problem = Problem("question", "test", args.question.strip(), "", TASKS[args.task].kind if args.task in TASKS else "number")
    else:
        problems = load_problems(task=args.task, data=args.data, split="test", num=args.index)
        if len(problems) < args.index:
            raise InputError(f"--index {args.index}: {args.data} has {len(problems)} problems")
        problem = problems[-1]
    scorers = load_scorers([method], args, mas)
    policy = make_policy(args, mas)
    with tqdm(total=1, desc=method.name, unit="problem", leave=False) as progress:
        [(_, leaf, cost)] = run([(problem, method.search(problem, mas, c_uct=args.c_uct))], make_handlers(method, scorers, policy),
                                max_active=1, progress=progress)
    report(problem, method, leaf, cost)


def report(problem: Problem, method: Method, leaf: Node, cost: Cost) -> None:
    root, name = path_to(leaf)[0].parent, {"value": "V", "outcome": "ORM"}.get(method.scorer, method.scorer)
    print(f"Question: {problem.question}\n")
    for node in path_to(leaf):
        print(f"{node.state.messages[-1].agent}: {node.state.messages[-1].text}")
        print(f"    {'' if node.V is None else f'{name} = {node.V:+.3f}, '}mean token log-probability {node.candidate.logprob / node.candidate.tokens:.3f}"
              f"{', cut at its token limit' if node.candidate.truncated else ''}")
    answer = extract_answer(leaf.state.messages[-1].text, problem.kind)
    verdict = "" if not problem.gold else f"   (gold {problem.gold}: {'right' if is_correct(problem, answer) else 'wrong'})"
    print(f"\nAnswer: {answer if answer is not None else 'none was given'}{verdict}")
    if root.children:
        print(f"\nThe tree ({name} stands under V; N counts the virtual visit):\n{show_tree(root, leaf)}")
    print(f"\n{method.name}: {cost.agent_calls} agent calls; tokens: {cost.prompt_tokens} prompt, {cost.generated_tokens} generated, "
          f"{cost.scored_tokens} scored; {cost.truncated.total()} messages cut; {cost.seconds:.2f} s")


if __name__ == "__main__":
    cli(parse_args, main)
