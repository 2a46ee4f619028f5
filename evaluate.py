"""Stage 4: how often each method is right on fresh test problems, and what it costs.

    python evaluate.py                                  # the default methods -> runs/tiny/eval
    python evaluate.py --methods greedy vote-8 mcts-8x1.8.1.1-value --num-problems 100
    python evaluate.py --run runs/transfer --value runs/tiny/value --task tiny-score   # a frozen V
    python evaluate.py --compare runs/n10 runs/n40      # runs side by side, from their records
    python evaluate.py --compare n10=runs/n10-s0,runs/n10-s1 n40=runs/n40-s0,runs/n40-s1   # seeds

Every method answers the same problems, so methods are compared in pairs. Records are kept per
problem; tables and the picture are derived from them. search.py lists the methods.
"""

import json
from collections import Counter
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
from mas import MAS, load_graph
from report.compare import compare_runs, read_groups, write_curves
from report.diagnosis import answer_signatures, warning_text
from report.pictures import plot_accuracy
from report.tables import breakdown_table, markdown_table, method_table, screen
from search import (
    Method,
    add_search_arguments,
    load_scorers,
    make_handlers,
    model_folder,
    parse_method,
    path_to,
    report_to,
    search_tree,
)
from support.flags import (
    InputError,
    Parser,
    add_overwrite_argument,
    cli,
    non_negative_int,
    positive_int,
)
from support.progress import SearchProgress
from support.records import (
    append_jsonl,
    finished_message,
    is_mine,
    only,
    open_to_append,
    process_rank,
    read_jsonl,
    read_records,
    record_names,
    shard_path,
)
from support.runs import open_run
from support.statistics import paired, wilson
from tasks.answers import MATH_VERIFY
from tasks.extraction import extract_answer
from tasks.problems import Problem, check_same_problems, is_correct, load_problems, question_key
from tree import Cost, Node, run_searches
from value import weights_fingerprint

COSTS = ("agent_calls", "prompt_tokens", "generated_tokens", "scored_tokens", "seconds")

# ---- Records: one line per problem and method ----------------------------------------------------


def answer_record(
    problem: Problem, leaf: Node, cost: Cost, scorer: str | None, *, keep_tree: bool
) -> dict:
    """Return the record of one answer. leaf: the terminal node whose answer is given.

    keep_tree: whether to include the tree of a search; report.py shows it.
    """
    answer = extract_answer(leaf.message.text, problem.answer_type)
    transcript = []
    for node in path_to(leaf):
        turn = {"agent": node.message.agent, "message": node.message.text, "V": node.V}
        transcript.append(turn)
    record = {
        "id": problem.id,
        "subject": problem.subject,
        "level": problem.level,
        "question": problem.question,
        "gold": problem.gold,
        "answer": answer.value,
        "rung": answer.rung,
        "correct": is_correct(problem, answer.value),
    }
    for name in COSTS:
        record[name] = getattr(cost, name)
    record["truncated"] = cost.truncated
    record["scorer"] = scorer
    record["transcript"] = transcript
    record["tree"] = graded_tree(problem, leaf) if keep_tree else None
    return record


def graded_tree(problem: Problem, leaf: Node) -> dict | None:
    """Return the tree of a search (`search_tree`), with a verdict on every final answer."""
    tree = search_tree(leaf, problem.answer_type)
    if tree is None:
        return None
    final_nodes = [node for node in tree["nodes"] if "answer" in node]
    answers = {node["answer"] for node in final_nodes}
    # Each answer is graded once: some comparisons take seconds (answers.py).
    correct = {answer: is_correct(problem, answer) for answer in answers}
    for node in final_nodes:
        node["correct"] = correct[node["answer"]]
    return tree


def evaluate_method(
    method: Method,
    problems: list[Problem],
    mas: MAS,
    policy: Policy,
    scorers: dict,
    path: Path,
    args,
) -> None:
    """Answer those of this process's problems that have no record yet.

    Raises InputError if the records were made with another scorer.
    """
    with open_to_append(shard_path(path)) as file:
        # 1. See which records exist already.
        records = read_records(path, only("question", "gold", "scorer"))
        check_same_problems(problems, records, path)
        scorer = scorer_fingerprint(method, args)
        other_scorers = {record["scorer"] for record in records.values()} - {scorer}
        if other_scorers:
            raise InputError(
                f"{path} was made with the scorer {sorted(other_scorers)[0]}, now it is {scorer}; "
                f"choose another --run, or start over with --overwrite"
            )
        my_problems = [problem for problem in problems if is_mine(problem.id)]
        todo = [problem for problem in my_problems if problem.id not in records]
        if not todo:
            return

        # 2. Search for the other answers, one line per problem as it finishes.
        progress = SearchProgress(
            len(todo),
            method.expected_work(mas),
            description=method.name,
            num_finished_before=len(my_problems) - len(todo),
            shown=process_rank()[0] == 0,
        )
        searches = ((problem, method.search(problem, mas, c_uct=args.c_uct)) for problem in todo)
        handlers = make_handlers(method, scorers, policy)
        report_to(progress, handlers)
        kept_trees = {problem.id for problem in problems[: args.num_trees]}
        with progress:
            for problem, leaf, cost in run_searches(
                searches, handlers, max_active=args.max_active, progress=progress
            ):
                keep_tree = problem.id in kept_trees
                record = answer_record(problem, leaf, cost, scorer, keep_tree=keep_tree)
                append_jsonl(file, record)


def scorer_fingerprint(method: Method, args) -> str | None:
    """Name the scorers of a method; V and the ORM with a fingerprint of their weights.

    Answers guided by another model must not end up in the same file.
    """
    names = [method.scorer] if method.scorer else []
    if method.lam > 0:
        names.append("outcome")
    parts = []
    for name in names:
        if name in ("value", "outcome"):
            parts.append(f"{name}#{weights_fingerprint(model_folder(args, name))}")
        else:
            parts.append(name)
    return " + ".join(parts) or None


def refuse_leaks(problems: list[Problem], methods: list[Method], args) -> None:
    """Raise InputError if V, the ORM or the agents were trained or selected on a test question."""
    models = set().union(*(method.models for method in methods))
    folders = [model_folder(args, model) for model in sorted(models)]
    if args.adapter is not None:
        folders.append(Path(args.adapter))
    for folder in folders:
        seen = {row["question_key"]: row["id"] for row in read_jsonl(folder / "problems.jsonl")}
        for problem in problems:
            key = question_key(problem.question)
            if key in seen:
                raise InputError(
                    f"test problem {problem.id} has the question of {seen[key]}, which {folder} "
                    f"was trained or selected on; test on other problems"
                )


# ---- Numbers -------------------------------------------------------------------------------------


def summarise(methods: list[Method], records: dict[str, list[dict]]) -> dict:
    """Return EM and mean cost per method, and the paired comparisons, from the records alone.

    Intervals and tests take the problems as independent of each other. If problems are variants of
    one another, their n is too large and the intervals are too narrow.
    """
    rows = {}
    for method in methods:
        rows[method.name] = summarise_method(records[method.name])
        rows[method.name]["rungs"] = count_rungs(records[method.name])
    comparisons = []
    for method in methods:
        for other, why in opponents(method, methods, rows):
            comparison = {
                "method": method.name,
                "against": other.name,
                "why": why,
                "lost": lost_problems(records[method.name], records[other.name]),
                "calls": rows[method.name]["agent_calls"],
                "calls_against": rows[other.name]["agent_calls"],
            }
            comparison |= compare_methods(records[method.name], records[other.name])
            comparisons.append(comparison)
    ids = [record["id"] for record in records[methods[0].name]]
    return {"problems": ids, "methods": rows, "comparisons": comparisons}


def summarise_method(records: list[dict]) -> dict:
    n = len(records)
    num_right = sum(record["correct"] for record in records)
    low, high = wilson(num_right, n)
    row = {"n": n, "right": num_right, "em": num_right / n, "low": low, "high": high}
    for name in COSTS:
        row[name] = sum(record[name] for record in records) / n
    truncated = Counter()
    for record in records:
        truncated += Counter(record["truncated"])
    row["truncated"] = dict(truncated)
    return row


def count_rungs(records: list[dict]) -> dict[str, int]:
    """Return how the answers were read, the most frequent way first (`Answer.rung`)."""
    counts = Counter(record["rung"] for record in records)
    return dict(counts.most_common())


def lost_problems(records: list[dict], records_against: list[dict]) -> list[str]:
    """Return the ids of the problems that only the other method answers right."""
    lost = []
    for record, against in zip(records, records_against, strict=True):
        if against["correct"] and not record["correct"]:
            lost.append(record["id"])
    return lost


def compare_methods(records: list[dict], records_against: list[dict]) -> dict:
    """Compare two methods on the same problems, in the same order (see `paired`)."""
    is_right = [record["correct"] for record in records]
    is_right_against = [record["correct"] for record in records_against]
    return paired(is_right, is_right_against)


def opponents(
    method: Method, methods: list[Method], rows: dict[str, dict]
) -> list[tuple[Method, str]]:
    """Return the methods that a method is compared with, and why.

    A vote is compared with greedy; every other method with greedy and with the nearest vote
    (`_nearest_in_calls`). A search is also compared with best-of-N by the same scorer, the nearest
    and all that need more calls; with the same search by likelihood or by chance; and with itself
    at lambda = 0.
    """
    if method.algorithm == "greedy":
        return []
    pairs = [(other, "greedy") for other in methods if other.algorithm == "greedy"]
    if method.algorithm != "vote":
        votes = [other for other in methods if other.algorithm == "vote"]
        if votes:
            pairs.append((_nearest_in_calls(method, votes, rows), "nearest vote"))
    if method.algorithm in ("sbs", "mcts"):
        pairs += _best_of_opponents(method, methods, rows)
    return pairs + _variants(method, methods)


def _best_of_opponents(
    method: Method, methods: list[Method], rows: dict[str, dict]
) -> list[tuple[Method, str]]:
    """Return the nearest best-of-N by the same scorer, and all others that need more calls."""
    same_scorer = []
    for other in methods:
        if other.algorithm == "best_of" and other.scorer == method.scorer:
            same_scorer.append(other)
    if not same_scorer:
        return []
    nearest = _nearest_in_calls(method, same_scorer, rows)
    pairs = [(nearest, "nearest best-of-N")]
    for other in same_scorer:
        costs_more = rows[other.name]["agent_calls"] > rows[method.name]["agent_calls"]
        if other is not nearest and costs_more:
            pairs.append((other, "costlier best-of-N"))
    return pairs


def _nearest_in_calls(method: Method, others: list[Method], rows: dict[str, dict]) -> Method:
    """Return the nearest of the methods that need at least as many agent calls.

    A baseline must not lose because it was given less. If all need fewer calls, return the one that
    needs most.
    """
    calls = rows[method.name]["agent_calls"]

    def calls_of(other: Method) -> float:
        return rows[other.name]["agent_calls"]

    at_least_as_many = [other for other in others if calls_of(other) >= calls]
    if at_least_as_many:
        return min(at_least_as_many, key=calls_of)
    return max(others, key=calls_of)


def _variants(method: Method, methods: list[Method]) -> list[tuple[Method, str]]:
    """Return the same search by the policy's likelihood and by chance, and with lambda = 0.

    Only one thing differs: a search by another scorer has the same lambda.
    """
    pairs = []
    is_guided = method.scorer in ("value", "outcome")
    for other in methods:
        if not _is_same_search(other, method):
            continue
        if is_guided and other.scorer in ("policy", "random") and other.lam == method.lam:
            pairs.append((other, f"same, by {other.scorer}"))
        if other.scorer == method.scorer and other.lam == 0 and method.lam > 0:
            pairs.append((other, "same, lambda = 0"))
    return pairs


def _is_same_search(method: Method, other: Method) -> bool:
    """Return whether two methods differ at most in scorer and lambda."""
    settings = (method.algorithm, method.num, method.num_candidates)
    return settings == (other.algorithm, other.num, other.num_candidates)


# ---- The script ----------------------------------------------------------------------------------

DEFAULT_METHODS = [
    "greedy",
    "vote-4",
    "best_of-4-value",
    "best_of-8-value",
    "sbs-2x1.6.1.1-value",
    "sbs-2x1.6.1.1-policy",
    "mcts-8x3-value",
    "mcts-8x1.8.1.1-value",
    "mcts-8x1.8.1.1-policy",
    "mcts-8x1.8.1.1-random",
]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    add_tree_search_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument(
        "--methods",
        nargs="+",
        metavar="METHOD",
        default=None,
        help="names as in search.py (default: those of the README, as far as they fit the graph)",
    )
    parser.add_argument(
        "--by",
        nargs="+",
        choices=("subject", "level"),
        default=[],
        help="show EM per subject or level as well",
    )
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="RUN",
        default=None,
        help="only compare finished runs, from their records; NAME=RUN,RUN is a group of runs that "
        "differ in their seed alone; of a single group, the methods are compared",
    )
    parser.add_argument(
        "--curves",
        metavar="PNG",
        default=None,
        help="with --compare: draw how the agents of these runs learnt (stage 5)",
    )
    parser.add_argument(
        "--num-problems",
        type=positive_int,
        default=178,
        help="test problems; 178 is all that `tiny` has",
    )
    parser.add_argument(
        "--num-trees",
        type=non_negative_int,
        default=178,
        help="keep the trees of the searches for that many problems, to show them (report.py)",
    )
    add_overwrite_argument(parser)
    return parser.parse_args(argv)


def main(args) -> None:
    if args.curves is not None and not args.compare:
        raise InputError("--curves draws the runs of --compare; give --compare RUN ...")
    if args.compare:
        groups = read_groups(args.compare)
        print(compare_runs(groups))
        if args.curves is not None:
            write_curves(groups, Path(args.curves))
        return

    # 1. Load the graph, the methods, the problems and the models.
    mas = load_graph(args.graph)
    methods = read_methods(args, mas)
    problems = load_problems(task=args.task, data=args.data, split="test", num=args.num_problems)
    if not problems:
        raise InputError(f"{args.data or args.task}: no test problems")
    scorers = load_scorers(methods, args, mas)
    refuse_leaks(problems, methods, args)
    policy = make_policy(args, mas)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / "eval"
    open_run(folder, search_settings(args, policy), device=args.device, overwrite=args.overwrite)

    # 3. Answer all problems with each method.
    with journal_of(policy, args):
        for method in methods:
            path = folder / f"{method.name}.jsonl"
            evaluate_method(method, problems, mas, policy, scorers, path, args)
    print(describe_messages(policy))

    # 4. Report, once all processes have finished.
    records, num_missing = collect_records(methods, problems, folder)
    if num_missing > 0:
        print(finished_message(num_missing, "answers"))
        print("The last of them prints the table.")
        return
    write_report(methods, records, folder, args.by)


def read_methods(args, mas: MAS) -> list[Method]:
    """Read the names of the methods. A method that is named twice is evaluated once."""
    methods = {}
    for name in args.methods or default_methods(mas):
        method = parse_method(name, mas, num_candidates=args.num_candidates, lam=args.lam)
        methods[method.name] = method
    return list(methods.values())


def default_methods(mas: MAS) -> list[str]:
    """Return DEFAULT_METHODS; without four agents, those that give no count per agent."""
    if len(mas.agents) == 4:
        return DEFAULT_METHODS
    return [name for name in DEFAULT_METHODS if "." not in name]


def collect_records(
    methods: list[Method], problems: list[Problem], folder: Path
) -> tuple[dict[str, list[dict]], int]:
    """Return the records of each method in the order of the problems, and how many are missing."""
    records = {}
    num_missing = 0
    for method in methods:
        record_of = read_records(folder / f"{method.name}.jsonl")
        present = [problem.id for problem in problems if problem.id in record_of]
        num_missing += len(problems) - len(present)
        records[method.name] = [record_of[problem_id] for problem_id in present]
    return records, num_missing


def write_report(
    methods: list[Method], records: dict[str, list[dict]], folder: Path, keys: list[str]
) -> None:
    """Derive summary.json, table.md and the picture from the records; print one screen.

    keys: break EM down by "subject", "level", both or none.
    """
    summary = summarise(methods, records)
    breakdowns = [markdown_table(*breakdown_table(records, key)) for key in keys]
    flags = warning_text(answer_signatures(records, summary["comparisons"]))
    table = "\n\n".join([method_table(summary), *breakdowns, flags]).rstrip()
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    (folder / "table.md").write_text(table + "\n", "utf-8")
    plot_accuracy(summary, folder / "em_vs_calls.png")
    print("\n\n".join(["", screen(summary), *breakdowns, flags]).rstrip())
    if MATH_VERIFY.timeouts > 0:
        # Those of other processes, and of earlier ones that were resumed, are in their own output.
        print(
            f"{MATH_VERIFY.timeouts} comparisons of answers by this process took more than "
            f"{MATH_VERIFY.SECONDS:g} s each and count as unequal."
        )
    print(f"\n{folder} holds the records, summary.json, table.md and em_vs_calls.png")
    others = sorted(record_names(folder) - records.keys())
    if others:
        print(f"recorded, but not in this table: {', '.join(others)}; --methods names its methods")


if __name__ == "__main__":
    cli(parse_args, main)
