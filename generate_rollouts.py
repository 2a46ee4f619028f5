"""Stage 1: label every action by search, without a human (MAS-MCTS, paper section 4.1).

For each training problem, run N simulations over the agents. The final answer is worth +1 if it
is right, else -1, and is backed up along the path. The mean value Q(s, a) of an edge becomes the
target for V at next(s, a). No value model is involved.

    python generate_rollouts.py            # the embedded default -> runs/tiny/rollouts/trees.jsonl
    accelerate launch --num_processes 4 generate_rollouts.py    # the same trees, by four processes
"""

import random
from collections.abc import Generator
from pathlib import Path

from llm.policy import Policy, add_tree_search_arguments, make_policy, run_settings, with_journal
from mas import MAS, load_graph
from support.flags import cli, positive_int, stage_parser
from support.progress import Progress
from support.records import append_jsonl, only, process_rank, read_records, unfinished
from support.runs import open_run, seeded
from tasks.problems import Problem, add_problem_arguments, check_unchanged, load_training_problems
from tree import (
    Candidate,
    Node,
    Sample,
    TooLong,
    backup,
    expand,
    grade_terminals,
    make_root,
    run_searches,
    select,
    tree_record,
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
                    if sibling is not node and sibling.outcome is not None:
                        backup(sibling, sibling.outcome)
                        graded_siblings.append(sibling)
            else:
                node = select(node, c_uct)  # Eq. 2
        backup(node, node.outcome)
        root.simulations.append([*graded_siblings, node])  # to replay the search on a page
    return root


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = stage_parser(__doc__, writes=True)
    add_problem_arguments(parser, training=True)
    add_tree_search_arguments(parser)
    parser.add_argument(
        "--num-simulations", type=positive_int, default=40, help="N, simulations per problem"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Load the graph, the problems and the agents.
    mas = load_graph(args.graph)
    num_candidates = mas.counts_per_agent(args.num_candidates, "--num-candidates")
    problems = load_training_problems(args)
    progress = Progress(shown=process_rank()[0] == 0)
    policy = make_policy(args, mas, progress=progress)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / "rollouts"
    settings = run_settings(args, policy) | {"c_uct": args.c_uct}
    settings["num_simulations"] = args.num_simulations
    settings["num_candidates"] = num_candidates
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)

    # 3. Label the problems that are not labelled yet, one line per tree.
    path = folder / "trees.jsonl"
    resumed = unfinished(path, problems, only("question", "gold"))
    with resumed as (file, labelled, todo, done), with_journal(policy, args) as policy:
        check_unchanged(problems, labelled, path)
        print(f"labelling {len(todo)} problems; {done} are finished already -> {path}")
        with progress.over("trees", done + len(todo), unit="problems", done=done):
            for record in label_problems(todo, policy, num_candidates, args):
                append_jsonl(file, record)
    print(progress.describe_messages())

    # 4. Report, once all processes have finished.
    trees = read_records(path)
    num_missing = sum(problem.id not in trees for problem in problems)
    if num_missing > 0:
        print(f"{num_missing} problems are left to other processes, or to this command, run again")
    else:
        report_labels(list(trees.values()), mas)


def label_problems(
    problems: list[Problem], policy: Policy, num_candidates: tuple[int, ...], args
) -> Generator[dict, None, None]:
    """Label problems together; yield the record of each tree as it finishes."""
    searches = []
    for problem in problems:
        search = label_tree(
            problem,
            policy.mas,
            num_simulations=args.num_simulations,
            num_candidates=num_candidates,
            c_uct=args.c_uct,
            rng=seeded(args.seed, problem.id),
        )
        searches.append((problem, search))
    for problem, root, cost in run_searches(
        searches, {Sample: policy}, max_active=args.max_active, progress=policy.progress
    ):
        if isinstance(root, TooLong):
            root = make_root(problem.question)  # alone, it gives no labels
        yield tree_record(problem, root, cost, policy.mas)


def report_labels(trees: list[dict], mas: MAS) -> None:
    """Print the labels per agent, from the records alone."""
    from report.tables import labels_table, text_table
    from report.warnings import label_warnings

    num_mixed, num_leaves, num_unanswered = 0, 0, 0
    for tree in trees:
        leaves = [node for node in tree["nodes"] if "reward" in node]
        num_mixed += len({leaf["reward"] for leaf in leaves}) == 2
        num_leaves += len(leaves)
        num_unanswered += sum(leaf["answer"] is None for leaf in leaves)
    print(text_table(labels_table(trees, [agent.name for agent in mas.agents])))
    num_refused = sum(len(tree["nodes"]) == 1 for tree in trees)
    print(f"{len(trees)} trees, {num_mixed} of them with both right and wrong answers")
    print(f"{num_refused} problems were refused: too long for the agents (no labels)")
    print(f"{num_unanswered} of {num_leaves} final messages held no answer (graded wrong)")
    for line in label_warnings(trees):
        print(line)


if __name__ == "__main__":
    cli(parse_args, main)
