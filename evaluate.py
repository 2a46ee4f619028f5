"""Stage 4: how often each method is right on fresh test problems, and what it costs.

    python evaluate.py                                  # the default methods -> runs/tiny/eval
    python evaluate.py --methods greedy vote-8 mcts-8x1.8.1.1-value --num-problems 100
    python evaluate.py --run runs/transfer --value runs/tiny/value --task tiny-score   # a frozen V

Every method answers the same problems, so methods are compared in pairs. Records are kept per
problem; tables and the picture are derived from them. search.py lists the methods.
"""

import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

from llm.policy import Policy, make_policy, run_settings, with_journal
from mas import MAS, load_graph
from search import (
    MODELS,
    TREE_SEARCHES,
    Method,
    add_search_arguments,
    load_scorers,
    model_folder,
    parse_method,
    path_to,
    run_method,
)
from support.flags import InputError, cli, non_negative_int, positive_int, stage_parser
from support.progress import Progress
from support.records import append_jsonl, only, process_rank, read_jsonl, read_records, unfinished
from support.runs import open_run
from support.statistics import paired, wilson
from tasks.grading import Answer, extract_answer
from tasks.problems import Problem, check_unchanged, is_correct, load_problems, question_key
from tree import Cost, Node, TooLong, tree_fields

COSTS = ("agent_calls", "prompt_tokens", "generated_tokens", "scored_tokens", "seconds")

# ---- Records: one line per problem and method ----------------------------------------------------


def answer_record(
    problem: Problem, leaf: Node | TooLong, cost: Cost, method: Method, scorer: str | None, mas: MAS
) -> dict:
    """Return the record of one answer: that of the terminal node `leaf`.

    A refused problem counts as wrong, so that all methods have the same ones; its rung tells it.
    """
    answer, path, tree = Answer(None, "refused"), [], None
    if not isinstance(leaf, TooLong):
        answer = extract_answer(leaf.message.text, problem.answer_type)
        root, *path = path_to(leaf)
        if method.algorithm in TREE_SEARCHES:  # passes have nothing in common
            tree = tree_fields(root, mas, problem.answer_type, chosen=leaf)
            for node in tree["nodes"]:
                if "answer" in node:
                    node["correct"] = is_correct(problem, node["answer"])
    transcript = []
    for node in path:
        turn = {"agent": node.message.agent, "message": node.message.text, "V": node.V}
        transcript.append(turn)
    return {
        "id": problem.id,
        "subject": problem.subject,
        "level": problem.level,
        "question": problem.question,
        "gold": problem.gold,
        "method": asdict(method),
        "scorer": scorer,
        "answer": answer.value,
        "rung": answer.rung,
        "correct": is_correct(problem, answer.value),
        **vars(cost),
        "transcript": transcript,
        "tree": tree,
    }


def evaluate_method(
    method: Method, problems: list[Problem], policy: Policy, scorers: dict, folder: Path, args
) -> None:
    """Answer those of this process's problems that have no record yet."""
    path = folder / f"{method.name}.jsonl"
    scorer = scorer_fingerprint(method, scorers)
    kept_trees = {problem.id for problem in problems[: args.num_trees]}
    keep = only("question", "gold", "scorer")
    with unfinished(path, problems, keep) as (file, records, todo, done):
        check_unchanged(problems, records, path)
        for record in records.values():
            if record["scorer"] != scorer:
                raise InputError(
                    f"{path} was made with the scorer {record['scorer']}, now it is {scorer}; "
                    f"choose another --run, or start over with --overwrite"
                )
        total = done + len(todo)
        with policy.progress.over(method.name, total, unit="problems", done=done):
            for problem, leaf, cost in run_method(method, todo, policy, scorers, args):
                record = answer_record(problem, leaf, cost, method, scorer, policy.mas)
                if problem.id not in kept_trees:
                    record["tree"] = None
                append_jsonl(file, record)


def scorer_fingerprint(method: Method, scorers: dict) -> str | None:
    """Name the scorers of a method; V and the ORM with a fingerprint of their weights.

    Answers guided by another model must not end up in the same file.
    """
    parts = []
    for name in method.scorers:
        if name in MODELS:
            name = f"{name}#{scorers[name].model.fingerprint[:8]}"
        parts.append(name)
    return " + ".join(parts) or None


def refuse_leaks(problems: list[Problem], methods: list[Method], args) -> None:
    """Raise InputError if V, the ORM or the agents were trained or selected on a test question."""
    models = {name for method in methods for name in method.scorers if name in MODELS}
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

    Problems count as independent. If they are variants of one another, intervals are too narrow.
    """
    rows = {method.name: summarise_method(method, records[method.name]) for method in methods}
    comparisons = []
    for method in methods:
        is_right = [record["correct"] for record in records[method.name]]
        for other, why in opponents(method, methods, rows):
            is_right_against = [record["correct"] for record in records[other.name]]
            comparison = {"method": method.name, "against": other.name, "why": why}
            comparisons.append(comparison | paired(is_right, is_right_against))
    ids = [record["id"] for record in records[methods[0].name]]
    return {"problems": ids, "methods": rows, "comparisons": comparisons}


def summarise_method(method: Method, records: list[dict]) -> dict:
    """Return the settings of a method, its exact match with interval, and its mean cost.

    rungs: how the answers were read (`Answer.rung`). truncated: messages cut, per agent.
    """
    n = len(records)
    num_right = sum(record["correct"] for record in records)
    low, high = wilson(num_right, n)
    row = asdict(method) | {"n": n, "right": num_right, "em": num_right / n}
    row |= {"low": low, "high": high}
    for name in COSTS:
        row[name] = fmean(record[name] for record in records)
    row["rungs"] = dict(Counter(record["rung"] for record in records).most_common())
    truncated = Counter()
    for record in records:
        truncated.update(record["truncated"])
    row["truncated"] = dict(+truncated)
    return row


def opponents(
    method: Method, methods: list[Method], rows: dict[str, dict]
) -> list[tuple[Method, str]]:
    """Return the methods that a method is compared with, and why.

    A baseline must not lose because it was given less: the nearest vote and best-of-N are the
    nearest ones with at least as many agent calls. rows: their costs.
    """

    def calls(other: Method) -> float:
        return rows[other.name]["agent_calls"]

    def nearest(others: list[Method]) -> Method:
        costlier = [other for other in others if calls(other) >= calls(method)]
        return min(costlier, key=calls) if costlier else max(others, key=calls)

    if method.algorithm == "greedy":
        return []
    pairs = [(other, "greedy") for other in methods if other.algorithm == "greedy"]
    votes = [other for other in methods if other.algorithm == "vote"]
    if votes and method.algorithm != "vote":
        pairs.append((nearest(votes), "nearest vote"))
    best_of = [other for other in methods if other.algorithm == "best_of"]
    best_of = [other for other in best_of if other.scorer == method.scorer]
    if best_of and method.algorithm in TREE_SEARCHES:
        pairs.append((nearest(best_of), "nearest best-of-N"))
    for other in methods:
        same_search = replace(other, name=method.name, scorer=method.scorer, lam=method.lam)
        if same_search != method or other == method:
            continue
        if other.scorer == "policy" and other.lam == method.lam:
            pairs.append((other, "same, by policy"))
        if other.scorer == method.scorer and other.lam == 0:
            pairs.append((other, "same, lambda = 0"))
    return pairs


# ---- Tables: lists of rows of texts, the header first --------------------------------------------


def methods_table(summary: dict) -> list[list[str]]:
    """Return a row per method. The first seven columns fit a screen."""
    table = [["method", "EM %", "95 % interval", "calls", "generated", "scored", "seconds"]]
    table[0] += ["prompt", "answers read", "cut"]
    for name, row in summary["methods"].items():
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        cells = [name, f"{100 * row['em']:.1f}", interval, f"{row['agent_calls']:.1f}"]
        cells += [f"{row['generated_tokens']:.0f}", f"{row['scored_tokens']:.0f}"]
        cells += [f"{row['seconds']:.3f}", f"{row['prompt_tokens']:.0f}"]
        for counts in (row["rungs"], row["truncated"]):
            texts = [f"{key} {count}" for key, count in counts.items()]
            cells.append(", ".join(texts) or "0")
        table.append(cells)
    return table


def comparisons_table(comparisons: list[dict]) -> list[list[str]]:
    """Return a row per comparison. The first four columns fit a screen."""
    table = [["method", "against", "EM points", "95 % interval", "won : lost", "p", "why"]]
    for row in comparisons:
        interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        cells = [row["method"], row["against"], f"{100 * row['difference']:+.1f}", interval]
        cells += [f"{row['wins']} : {row['losses']}", f"{row['p']:.2g}", row["why"]]
        table.append(cells)
    return table


def breakdown_table(records: dict[str, list[dict]], key: str) -> list[list[str]]:
    """Return EM % per method and per subject or level (key). records: method -> its records."""
    table = [[key, "problems", *records]]
    [first_records, *_] = records.values()
    groups = {str(record[key]) for record in first_records}
    for group in sorted(groups, key=lambda group: (len(group), group)):  # "2" before "10"
        cells = []
        for of_method in records.values():
            in_group = [record for record in of_method if str(record[key]) == group]
            cells.append(f"{100 * fmean(record['correct'] for record in in_group):.1f}")
        table.append([group, str(len(in_group)), *cells])
    return table


NOTE = (
    "Intervals are 95 %, and take problems as independent; comparisons are paired. Costs "
    "are means per problem: calls (sampled messages), tokens, seconds. `answers read` counts how "
    "answers were found, `none` those without, and `refused` what was too long for a model; `cut` "
    "counts messages at their limit, per agent."
)


def write_report(methods: list[Method], records: dict[str, list[dict]], folder: Path, args) -> None:
    """Derive summary.json, table.md and the picture from the records; print one screen."""
    from report.pictures import plot_accuracy
    from report.tables import markdown_table, text_table
    from report.warnings import answer_warnings

    # 1. Numbers.
    summary = summarise(methods, records)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
    plot_accuracy(summary).savefig(folder / "em_vs_calls.png")

    # 2. All tables, for GitHub.
    tables = [methods_table(summary), comparisons_table(summary["comparisons"])]
    tables += [breakdown_table(records, key) for key in args.by]
    texts = [NOTE, *[markdown_table(table) for table in tables]]
    (folder / "table.md").write_text("\n\n".join(texts) + "\n", "utf-8")

    # 3. One screen: the columns that fit; of the comparisons, whether guided search is worth it.
    searches = [method for method in methods if method.algorithm in TREE_SEARCHES]
    guided = [method.name for method in searches if method.scorer in MODELS]
    comparisons = [row for row in summary["comparisons"] if row["method"] in guided]
    comparisons = [row for row in comparisons if row["why"] != "greedy"]
    tables[0] = [cells[:7] for cells in tables[0]]
    tables[1] = [cells[:4] for cells in comparisons_table(comparisons)]
    print("", *[text_table(table) for table in tables], sep="\n\n")
    print("\n".join(["", *answer_warnings(records, model_folder(args, "value"))]))
    print(f"n = {len(summary['problems'])} problems; {folder}/table.md has all numbers")


# ---- The script ----------------------------------------------------------------------------------

DEFAULT_METHODS = ["greedy", "vote-4", "best_of-4-value", "best_of-8-value"]
DEFAULT_METHODS += ["sbs-2x1.6.1.1-value", "sbs-2x1.6.1.1-policy", "mcts-8x3-value"]
DEFAULT_METHODS += ["mcts-8x1.8.1.1-value", "mcts-8x1.8.1.1-policy", "mcts-8x1.8.1.1-random"]


def parse_args(argv=None):
    parser = stage_parser(__doc__, writes=True)
    add_search_arguments(parser)
    add = parser.add_argument
    add("--methods", nargs="+", default=DEFAULT_METHODS, help="names as in search.py")
    add("--by", nargs="+", choices=("subject", "level"), default=[], help="show EM per group, too")
    add("--num-problems", type=positive_int, default=178, help="`tiny` has 178")
    add("--num-trees", type=non_negative_int, default=178, help="problems to keep the trees of")
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Load the graph, the methods, the problems and the models.
    mas = load_graph(args.graph)
    methods = read_methods(args, mas)
    problems = load_problems(args.task, args.data, {"test": args.num_problems})
    scorers = load_scorers(methods, args, mas)
    refuse_leaks(problems, methods, args)
    progress = Progress(shown=process_rank()[0] == 0)
    policy = make_policy(args, mas, progress=progress)

    # 2. Start the run folder, or resume it.
    folder = Path(args.run) / "eval"
    settings = run_settings(args, policy) | {"c_uct": args.c_uct}
    open_run(folder, settings, device=args.device, overwrite=args.overwrite)

    # 3. Answer all problems with each method.
    with with_journal(policy, args) as policy:
        for method in methods:
            evaluate_method(method, problems, policy, scorers, folder, args)
    print(progress.describe_messages())

    # 4. Report, once all processes have finished.
    records, num_missing = {}, 0
    for method in methods:
        record_of = read_records(folder / f"{method.name}.jsonl")
        present = [problem.id for problem in problems if problem.id in record_of]
        num_missing += len(problems) - len(present)
        records[method.name] = [record_of[problem_id] for problem_id in present]
    if num_missing > 0:
        print(f"{num_missing} answers are left to other processes, or to this command, run again")
    else:
        write_report(methods, records, folder, args)


def read_methods(args, mas: MAS) -> list[Method]:
    """Read the names of the methods. A method that is named twice is evaluated once."""
    names = args.methods
    if names == DEFAULT_METHODS and len(mas.agents) != 4:
        names = [name for name in names if "." not in name]
    methods = {}
    for name in names:
        method = parse_method(name, mas, num_candidates=args.num_candidates, lam=args.lam)
        methods[method.name] = method
    return list(methods.values())


if __name__ == "__main__":
    cli(parse_args, main)
