"""Stage 4: how often each method is right on fresh test problems, and what it costs.

    python evaluate.py                                       # the default methods -> runs/tiny/eval
    python evaluate.py --methods greedy vote-8 mcts-8x1.8.1.1-value --num-problems 100
    python evaluate.py --run runs/transfer --value runs/tiny/value --task tiny-score --by subject level    # transfer of a frozen V
    python evaluate.py --compare runs/n10 runs/n40           # runs side by side, from their records

Every method answers the same problems, so methods are compared in pairs. Records are kept per problem; table, tests and
picture are derived from them and can be derived again. search.py lists the methods.
"""

import hashlib
import json
import math
import re
from collections import Counter
from pathlib import Path

import scipy.stats
from tqdm import tqdm

from generate_rollouts import (Cost, Node, Policy, add_policy_arguments, append_jsonl, make_policy, mine, open_run, own_shard,
                               policy_settings, process, read_config, resume_jsonl, run)
from mas import (MAS, InputError, Parser, Problem, cli, extract_answer, is_correct, load_graph, load_problems, positive_int,
                 question_key, read_jsonl, source)
from search import Method, add_search_arguments, load_scorers, make_handlers, model_folder, parse_method, path_to

COSTS = ("agent_calls", "prompt_tokens", "generated_tokens", "scored_tokens", "seconds")


# ---------------------------------------------------------------------------------------------------------------------
# Records: one line per problem and method


def answer_record(problem: Problem, leaf: Node, cost: Cost, scorer: str | None) -> dict:
    answer = extract_answer(leaf.state.messages[-1].text, problem.kind)
    transcript = [{"agent": node.state.messages[-1].agent, "message": node.state.messages[-1].text, "V": node.V} for node in path_to(leaf)]
    return {"id": problem.id, "subject": problem.subject, "level": problem.level, "question": problem.question, "gold": problem.gold, "answer": answer, "correct": is_correct(problem, answer),
            **{name: getattr(cost, name) for name in COSTS}, "truncated": cost.truncated, "scorer": scorer, "transcript": transcript}


def evaluate_method(method: Method, problems: list[Problem], mas: MAS, policy: Policy, scorers: dict, path: Path, args) -> None:
    """Answer those of the problems that fall to this process and are not answered yet."""
    used = [name for name in (method.scorer, "outcome" if method.lam > 0 else None) if name]
    scorer = " + ".join(f"{name}#{fingerprint(args, name)}" if name in ("value", "outcome") else name for name in used) or None
    records = resume_jsonl(path)
    other = {record["scorer"] for record in records.values()} - {scorer}
    if other:
        raise InputError(f"{path} was made with the scorer {sorted(other)[0]}, now it is {scorer}; choose another --run, or start over with --overwrite")
    own = mine(problems)
    todo = [problem for problem in own if problem.id not in records]
    searches = ((problem, method.search(problem, mas, c_uct=args.c_uct)) for problem in todo)
    with open(own_shard(path), "a", encoding="utf-8") as file, \
            tqdm(total=len(own), initial=len(own) - len(todo), desc=method.name, unit="problem", disable=process()[0] > 0) as progress:
        for problem, leaf, cost in run(searches, make_handlers(method, scorers, policy), max_active=args.max_active, progress=progress):
            append_jsonl(file, answer_record(problem, leaf, cost, scorer))


def fingerprint(args, name: str) -> str:
    """Of the weights of V or the ORM: answers by another model must not end up in the same file."""
    folder = model_folder(args, name)
    parts = (folder / "head.safetensors", folder / "adapter" / "adapter_model.safetensors")
    return hashlib.blake2b(b"".join(part.read_bytes() for part in parts), digest_size=4).hexdigest()


def refuse_leaks(problems: list[Problem], args, names: set[str]) -> None:
    """No test question may be among those that V or the ORM was trained on (or chosen by)."""
    for name in names & {"value", "outcome"}:
        folder = model_folder(args, name)
        seen = {row["question_key"]: row["id"] for row in read_jsonl(folder / "problems.jsonl")}
        for problem in problems:
            if question_key(problem.question) in seen:
                raise InputError(f"test problem {problem.id} has the question of {seen[question_key(problem.question)]}, which {folder} was "
                                 f"trained or chosen on; test on other problems")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def wilson(right: int, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a proportion."""
    interval = scipy.stats.binomtest(right, n).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def paired(a: list[bool], b: list[bool]) -> dict:
    """EM of a minus EM of b on the same problems: difference, 95 % interval (Bonett and Price 2012), exact McNemar p."""
    n, wins, losses = len(a), sum(x and not y for x, y in zip(a, b)), sum(y and not x for x, y in zip(a, b))
    p, q = (wins + 1) / (n + 2), (losses + 1) / (n + 2)
    half = scipy.stats.norm.ppf(0.975) * math.sqrt((p + q - (p - q) ** 2) / (n + 2))
    return {"difference": (wins - losses) / n, "low": p - q - half, "high": p - q + half, "wins": wins, "losses": losses,
            "p": float(scipy.stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0}


def summarise(methods: list[Method], records: dict[str, list[dict]]) -> dict:
    """EM and mean cost per method, and the paired comparisons, from the records alone."""
    rows = {}
    for method in methods:
        own = records[method.name]
        right = sum(record["correct"] for record in own)
        low, high = wilson(right, len(own))
        rows[method.name] = {"n": len(own), "right": right, "em": right / len(own), "low": low, "high": high,
                             **{name: sum(record[name] for record in own) / len(own) for name in COSTS},
                             "no_answer": sum(record["answer"] is None for record in own), "truncated": dict(sum((Counter(record["truncated"]) for record in own), Counter()))}
    comparisons = []
    for method in methods:
        for against, why in opponents(method, methods, rows):
            result = paired(*([record["correct"] for record in records[name]] for name in (method.name, against.name)))
            comparisons.append({"method": method.name, "against": against.name, "why": why,
                                "lost": [a["id"] for a, b in zip(records[method.name], records[against.name]) if b["correct"] and not a["correct"]],
                                "calls": rows[method.name]["agent_calls"], "calls_against": rows[against.name]["agent_calls"], **result})
    return {"methods": rows, "comparisons": comparisons}


def opponents(method: Method, methods: list[Method], rows: dict[str, dict]) -> list[tuple[Method, str]]:
    """Whom a method is compared with: greedy; the vote, and for a search best-of-N by the same scorer, nearest in agent calls;
    for a method guided by a model, itself guided by the policy's likelihood and by chance."""
    if method.kind == "greedy":
        return []
    calls = lambda other: abs(math.log(rows[other.name]["agent_calls"] / rows[method.name]["agent_calls"]))
    found = [(other, "greedy") for other in methods if other.kind == "greedy"]
    if method.kind != "vote" and (votes := [other for other in methods if other.kind == "vote"]):
        found.append((min(votes, key=calls), "nearest vote"))
    if method.kind in ("sbs", "mcts") and (picks := [m for m in methods if m.kind == "best_of" and m.scorer == method.scorer]):
        found.append((min(picks, key=calls), "nearest best-of-N"))
    if method.scorer in ("value", "outcome"):
        found += [(other, f"same, by {other.scorer}") for other in methods if other.scorer in ("policy", "random") and (
            other.kind, other.num, other.num_candidates) == (method.kind, method.num, method.num_candidates)]
    if method.lam > 0:
        found += [(other, "same, lambda = 0") for other in methods if other.lam == 0 and (other.kind, other.scorer, other.num, other.num_candidates) == (
            method.kind, method.scorer, method.num, method.num_candidates)]
    return found


def table(summary: dict) -> str:
    """Two GitHub tables: the methods, and the comparisons on the same problems."""
    lines = ["| method | n | EM % | 95 % interval | agent calls | prompt tokens | generated | scored | seconds | no answer | cut |",
             "|---|---|---|---|---|---|---|---|---|---|---|"]
    for name, row in summary["methods"].items():
        lines.append(f"| {name} | {row['n']} | {100 * row['em']:.1f} | {100 * row['low']:.1f} to {100 * row['high']:.1f} | {row['agent_calls']:.1f} | "
                     f"{row['prompt_tokens']:.0f} | {row['generated_tokens']:.0f} | {row['scored_tokens']:.0f} | {row['seconds']:.3f} | "
                     f"{row['no_answer']} | {', '.join(f'{agent} {n}' for agent, n in row['truncated'].items()) or 0} |")
    lines += ["", "Costs are means per problem; `cut` counts messages that ran into their token limit, per agent.", "",
              "| method (agent calls) | against (agent calls) | EM points | 95 % interval | won : lost | p |", "|---|---|---|---|---|---|"]
    for row in summary["comparisons"]:
        lines.append(f"| {row['method']} ({row['calls']:.1f}) | {row['why']}: {row['against']} ({row['calls_against']:.1f}) | "
                     f"{100 * row['difference']:+.1f} | {100 * row['low']:+.1f} to {100 * row['high']:+.1f} | {row['wins']} : {row['losses']} | {row['p']:.2g} |")
    return "\n".join(lines)


def breakdown(methods: list[Method], records: dict[str, list[dict]], field: str) -> str:
    """EM of each method per subject or level, from the records."""
    groups = sorted({str(record[field]) for record in next(iter(records.values()))})
    lines = [f"| {field} | n | " + " | ".join(method.name for method in methods) + " |", "|---" * (len(methods) + 2) + "|"]
    for group in groups:
        own = [[record["correct"] for record in records[method.name] if str(record[field]) == group] for method in methods]
        lines.append(f"| {group} | {len(own[0])} | " + " | ".join(f"{100 * sum(right) / len(right):.1f}" for right in own) + " |")
    return "\n".join(lines)


def compare(runs: list[str]) -> str:
    """Runs side by side, from their records: V on held-out problems, then EM per method, paired with the first run."""
    lines = ["| run | N | loss | view | agent | RMSE | calibration error | AUC | 95 % interval | top-1 | chance |", "|---" * 11 + "|"]
    show = lambda x: "-" if x is None else f"{x:.3f}"
    for run_name in runs:
        if not (Path(run_name) / "value").is_dir():   # it used another run's V
            continue
        settings = read_config(Path(run_name) / "value")["settings"]
        for agent, m in read_jsonl(Path(run_name) / "value" / "metrics.jsonl")[-1]["heldout"].items():
            low, high = m["auc_95"] or (None, None)
            lines.append(f"| {run_name} | {settings['rollouts']['num_simulations']} | {settings['loss']} | {settings['view']} | {agent} | {m['rmse']:.3f} | {m['ece']:.3f} | "
                         f"{show(m['auc'])} | {show(low)} to {show(high)} | {show(m['top1'])} | {show(m['chance'])} |")
    lines += ["", "| method | run | n | EM % | 95 % interval | agent calls | against the first | 95 % interval |", "|---" * 8 + "|"]
    folders = [Path(run_name) / "eval" for run_name in runs]
    names = [sorted({re.sub(r"(\.\d+of\d+)?\.jsonl$", "", path.name) for path in folder.glob("*.jsonl")}) for folder in folders]
    for name in (name for name in names[0] if all(name in others for others in names)):
        found = [resume_jsonl(folder / f"{name}.jsonl") for folder in folders]
        ids = [problem for problem in found[0] if all(problem in others for others in found)]
        for run_name, own in zip(runs, found):
            right = [own[problem]["correct"] for problem in ids]
            result, (low, high) = paired(right, [found[0][problem]["correct"] for problem in ids]), wilson(sum(right), len(ids))
            against = "| |" if run_name == runs[0] else f"{100 * result['difference']:+.1f} | {100 * result['low']:+.1f} to {100 * result['high']:+.1f} |"
            lines.append(f"| {name} | {run_name} | {len(ids)} | {100 * sum(right) / len(ids):.1f} | {100 * low:.1f} to {100 * high:.1f} | "
                         f"{sum(own[problem]['agent_calls'] for problem in ids) / len(ids):.1f} | {against}")
    return "\n".join(lines)


def plot(methods: list[Method], summary: dict, path: Path) -> None:
    """EM against agent calls, with 95 % intervals; a line joins the methods of one kind and scorer."""
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    colours = {None: "black", "value": "tab:red", "policy": "tab:blue", "random": "tab:gray", "outcome": "tab:green"}
    markers = {"greedy": "*", "vote": "o", "best_of": "s", "sbs": "^", "mcts": "D"}
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    groups: dict[tuple, list[Method]] = {}
    for method in methods:
        groups.setdefault((method.kind, method.scorer), []).append(method)
    for (kind, scorer), members in groups.items():
        rows = sorted((summary["methods"][m.name] for m in members), key=lambda row: row["agent_calls"])
        em = [100 * row["em"] for row in rows]
        errors = [[100 * (row["em"] - row["low"]) for row in rows], [100 * (row["high"] - row["em"]) for row in rows]]
        axes.errorbar([row["agent_calls"] for row in rows], em, yerr=errors, color=colours[scorer], marker=markers[kind], capsize=2,
                      linestyle="-" if kind != "vote" else "--", linewidth=1, markersize=9 if kind == "greedy" else 6,
                      label=kind.replace("_", "-") + (f" by {scorer}" if scorer else ""))
    axes.set(xscale="log", xlabel="agent calls (sampled messages) per problem, mean", ylabel="exact match, %", ylim=(0, 100),
             title=f"n = {next(iter(summary['methods'].values()))['n']} test problems, 95 % intervals")
    ticks = [4, 8, 16, 32, 64, 128]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ---------------------------------------------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    add_search_arguments(parser)
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="names as in search.py", default=[
        "greedy", "vote-4", "best_of-4-value", "sbs-2x1.6.1.1-value", "sbs-2x1.6.1.1-policy",
        "mcts-8x1.8.1.1-value", "mcts-8x1.8.1.1-policy", "mcts-8x1.8.1.1-random"])
    parser.add_argument("--by", nargs="+", choices=("subject", "level"), default=[], help="break EM down")
    parser.add_argument("--compare", nargs="+", metavar="RUN", default=None, help="only print these runs side by side, from their records")
    parser.add_argument("--num-problems", type=positive_int, default=300, help="test problems")
    parser.add_argument("--overwrite", action="store_true", help="start over where the folder holds another configuration")
    return parser.parse_args(argv)


def main(args) -> None:
    if args.compare:
        return print(compare(args.compare))
    mas = load_graph(args.graph)
    methods = [parse_method(name, mas, num_candidates=args.num_candidates, lam=args.lam) for name in args.methods]
    methods = list({method.name: method for method in methods}.values())
    problems = load_problems(task=args.task, data=args.data, split="test", num=args.num_problems)
    scorers = load_scorers(methods, args, mas)
    refuse_leaks(problems, args, set(scorers))
    policy = make_policy(args, mas)
    folder = Path(args.run) / "eval"
    open_run(folder, policy_settings(args, mas) | source(args.task, args.data) | {"c_uct": args.c_uct}, overwrite=args.overwrite)
    for method in methods:
        evaluate_method(method, problems, mas, policy, scorers, folder / f"{method.name}.jsonl", args)
    done = {method.name: resume_jsonl(folder / f"{method.name}.jsonl") for method in methods}
    if missing := sum(problem.id not in found for found in done.values() for problem in problems):
        print(f"process {process()[0]} of {process()[1]} is done; {missing} answers are left to others, the last of whom prints the table (or this command, once more)")
        return
    records = {name: [found[problem.id] for problem in problems] for name, found in done.items()}
    summary = summarise(methods, records)
    text = "\n\n".join([table(summary), *(breakdown(methods, records, field) for field in args.by)])
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    (folder / "table.md").write_text(text + "\n")
    plot(methods, summary, folder / "em_vs_calls.png")
    print(f"\n{text}\n\ntable {folder / 'table.md'}, picture {folder / 'em_vs_calls.png'}, records {folder}/METHOD.jsonl")


if __name__ == "__main__":
    cli(parse_args, main)
