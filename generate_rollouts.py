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

import random
from collections.abc import Generator, Iterator
from pathlib import Path

from llm.policy import (
    Policy,
    add_policy_arguments,
    add_tree_search_arguments,
    describe_messages,
    journal_of,
    make_policy,
    search_settings,
)
from mas import MAS, counts_per_agent, load_graph
from report.diagnosis import label_signatures, with_warnings
from support.flags import Parser, add_overwrite_argument, cli, positive_int
from support.progress import SearchProgress, Work
from support.records import (
    append_jsonl,
    finished_message,
    is_mine,
    only,
    open_to_append,
    process_rank,
    read_records,
    shard_path,
)
from support.runs import open_run, seeded
from tasks.extraction import extract_answer
from tasks.problems import Problem, check_same_problems, is_correct, load_problems
from tree import (
    Candidate,
    Node,
    Sample,
    backup,
    expand,
    label_statistics,
    make_root,
    run_searches,
    select,
    tree_record,
    without_texts,
)

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
