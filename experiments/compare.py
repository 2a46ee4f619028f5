"""Runs side by side, from their records alone: V, the agents' training, and the answers.

    python -m experiments.compare runs/n10 runs/n40
    python -m experiments.compare n10=runs/n10-s0,runs/n10-s1 n40=runs/n40-s0,runs/n40-s1    # seeds

Runs that differ in their seed only are compared as a group, so that the noise of training is part
of every interval. Groups are a dict: name -> run folders.
"""

import json
import re
from itertools import chain
from pathlib import Path
from statistics import fmean

import numpy as np

from report.pictures import plot_training
from report.tables import markdown_table, training_table, value_table
from support.flags import InputError, Parser, cli
from support.records import read_jsonl, read_records
from support.runs import read_config
from support.statistics import NUM_RESAMPLES, QUANTILES, paired, wilson


def record_names(folder: Path) -> set[str]:
    """Return the names of the record files of a folder, without suffix, whatever their shards."""
    return {re.sub(r"(\.\d+of\d+)?\.jsonl$", "", path.name) for path in folder.glob("*.jsonl")}


def percent_text(name: str, row: dict, *, form: str) -> str:
    """Show a number of a row with its interval, in percent: "32.7 (27.6 to 38.2)"."""
    number, low, high = (f"{100 * row[key]:{form}}" for key in (name, "low", "high"))
    return f"{number} ({low} to {high})"


def read_groups(texts: list[str]) -> dict[str, list[Path]]:
    """Read the groups of the command line: `NAME=RUN,RUN`, or a single RUN."""
    groups = {}
    for text in texts:
        name, equals, names_of_runs = text.partition("=")
        if not equals or Path(text).is_dir():
            name, names_of_runs = text, text
        if name in groups:
            raise InputError(f"{name} is named twice")
        groups[name] = [Path(run_name) for run_name in names_of_runs.split(",")]
        for run in groups[name]:
            if not any((run / stage).is_dir() for stage in ("value", "agents", "eval")):
                raise InputError(f"{text}: no value/, no agents/ and no eval/ in {run}")
    return groups


def compare_runs(groups: dict[str, list[Path]]) -> str:
    """Compare groups of runs from their records: V and the agents on held-out problems, then EM.

    The methods of a single group are also compared with each other.
    """
    methods_of_run = [record_names(run / "eval") for run in chain(*groups.values())]
    methods = sorted(set.intersection(*methods_of_run))
    tables = [_compare_trainings(groups, stage) for stage in ("value", "agents")]
    tables.append(_compare_answers(groups, methods))
    if len(groups) == 1:
        tables.append(_compare_methods(*groups.values(), methods))
    texts = [markdown_table(table) for table in tables if len(table) > 1]
    return "\n\n".join(texts) or "These runs have nothing in common."


def write_curves(groups: dict[str, list[Path]], path: Path) -> None:
    """Draw how the agents of the runs learnt, as a PNG."""
    records = {}
    for name, runs in groups.items():
        records[name] = [read_jsonl(run / "agents" / "metrics.jsonl") for run in runs]
    plot_training(records).savefig(path, format="png")


def _compare_trainings(groups: dict[str, list[Path]], stage: str) -> list[list[str]]:
    """Return held-out metrics of V ("value") or of the agents, of the runs that have them."""
    table = []
    for name, runs in groups.items():
        trainings = []
        for folder in [run / stage for run in runs if (run / stage).is_dir()]:
            config = read_config(folder, must_be_finished=True)
            trainings.append((read_jsonl(folder / "metrics.jsonl"), config.get("best_step")))
        if trainings:
            if stage == "value":
                header, *rows = value_table([metrics[-1]["heldout"] for metrics, _ in trainings])
            else:
                header, *rows = training_table(trainings)
            table = table or [["run", *header]]
            table += [[name, *row] for row in rows]
    return table


def _compare_answers(groups: dict[str, list[Path]], methods: list[str]) -> list[list[str]]:
    """Return the methods that all runs have, each group paired with the first."""
    table = [["method", "run", "problems", "EM %", "calls", "minus the first", "runs", "SD"]]
    for method in methods:
        answers = _read_answers([(runs, method) for runs in groups.values()])
        first, _ = answers[0]
        for name, (verdicts, calls) in zip(groups, answers, strict=True):
            em = seeds_and_problems(verdicts)
            row = [method, name, str(len(verdicts[0])), percent_text("mean", em, form=".1f")]
            result = seeds_and_problems_difference(verdicts, first)
            difference = percent_text("difference", result, form="+.1f")
            row += [f"{calls:.1f}", "" if verdicts is first else difference]
            deviation = "-" if em["deviation"] is None else f"{100 * em['deviation']:.1f}"
            table.append([*row, str(len(verdicts)), deviation])
    return table


def _compare_methods(runs: list[Path], methods: list[str]) -> list[list[str]]:
    """Return the comparisons of the first run's table.md, each over all runs of the group."""
    table = [["method", "against", "EM points"]]
    path = runs[0] / "eval" / "summary.json"
    summary = json.loads(path.read_text("utf-8")) if path.is_file() else {"comparisons": []}
    for pair in summary["comparisons"]:
        if pair["method"] in methods and pair["against"] in methods:
            answers = _read_answers([(runs, pair["method"]), (runs, pair["against"])])
            [(verdicts, _), (verdicts_against, _)] = answers
            result = within_runs_difference(verdicts, verdicts_against)
            difference = percent_text("difference", result, form="+.1f")
            table.append([pair["method"], f"{pair['why']}: {pair['against']}", difference])
    return table


def _read_answers(pairs: list[tuple[list[Path], str]]) -> list[tuple[list[list[bool]], float]]:
    """Return the verdicts [runs][problems] and the mean agent calls of each pair (runs, method).

    Only problems count that all of these runs have answered: id, question and gold answer are
    equal. Raises InputError if there are none.
    """
    records = []
    for runs, method in pairs:
        records.append([read_records(run / "eval" / f"{method}.jsonl") for run in runs])
    problems = []
    for of_run in chain(*records):
        problems.append({(name, row["question"], row["gold"]) for name, row in of_run.items()})
    ids = sorted(name for name, _, _ in set.intersection(*problems))
    if not ids:
        raise InputError(f"no problem was answered by {method} in all of these runs")
    answers = []
    for of_runs in records:
        verdicts = [[of_run[name]["correct"] for name in ids] for of_run in of_runs]
        calls = fmean(of_run[name]["agent_calls"] for of_run in of_runs for name in ids)
        answers.append((verdicts, calls))
    return answers


# ---- Several runs of one kind: training seeds ----------------------------------------------------
# Verdicts of a kind of run say whether each run is right on each problem: [runs][problems].


def seeds_and_problems(verdicts: list[list[bool]]) -> dict:
    """Return the mean exact match of runs that differ in their seed, with its interval.

    Runs and problems are both resampled. One run has the interval of `wilson`. deviation: standard
    deviation of the exact match over the runs alone; None if there is one.
    """
    right = np.asarray(verdicts, dtype=float)
    one_run = wilson(int(right[0].sum()), right.shape[1])
    low, high = _resampled_interval([right], one_run)
    deviation = float(right.mean(1).std(ddof=1)) if len(right) > 1 else None
    return {"mean": float(right.mean()), "low": low, "high": high, "deviation": deviation}


def seeds_and_problems_difference(a: list[list[bool]], b: list[list[bool]]) -> dict:
    """Compare two kinds of runs on the same problems: the mean of a minus that of b, its interval.

    The problems are resampled together, the runs of a and of b each on their own. The noise of
    training is left out for a kind with a single run. One run against one is `paired`.
    """
    return _difference(a, b, [np.asarray(a, dtype=float), -np.asarray(b, dtype=float)])


def within_runs_difference(a: list[list[bool]], b: list[list[bool]]) -> dict:
    """Compare two methods in the same runs, on the same problems: the mean of a minus that of b.

    Runs and problems are both resampled, together for a and b. A single run is `paired`.
    """
    return _difference(a, b, [np.asarray(a, dtype=float) - np.asarray(b, dtype=float)])


def _difference(a: list[list[bool]], b: list[list[bool]], summands: list[np.ndarray]) -> dict:
    one_run = paired(a[0], b[0])
    if len(a) == len(b) == 1:
        return one_run
    low, high = _resampled_interval(summands, (one_run["low"], one_run["high"]))
    return {"difference": float(np.mean(a) - np.mean(b)), "low": low, "high": high}


def _resampled_interval(summands: list[np.ndarray], of_one_run: tuple) -> tuple[float, float]:
    """Return the interval of the sum of the means of `summands`, each [runs, problems].

    Of S runs, S - 1 are drawn: drawing S of so few would make the interval too narrow, as the
    variance of S draws is (S - 1) / S of what it should be. If no resample differs, nothing is
    certain still: the interval is then that of one run.
    """
    if max(len(summand) for summand in summands) == 1:
        return of_one_run
    rng = np.random.default_rng(0)
    n = summands[0].shape[1]
    problems = rng.multinomial(n, np.full(n, 1 / n), size=NUM_RESAMPLES) / n
    means = np.zeros(NUM_RESAMPLES)
    for summand in summands:
        num_runs, num_drawn = len(summand), max(1, len(summand) - 1)
        runs = rng.multinomial(num_drawn, np.full(num_runs, 1 / num_runs), size=NUM_RESAMPLES)
        means += np.einsum("kr,rp,kp->k", runs / num_drawn, summand, problems)
    low, high = np.quantile(means, QUANTILES).tolist()
    return (low, high) if high - low > 1e-9 else of_one_run  # less is rounding


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("groups", nargs="+", metavar="GROUP", help="RUN, or NAME=RUN,RUN (seeds)")
    parser.add_argument("--curves", default=None, help="PNG of stage 5's learning, to write")
    return parser.parse_args(argv)


def main(args) -> None:
    groups = read_groups(args.groups)
    print(compare_runs(groups))
    if args.curves is not None:
        write_curves(groups, Path(args.curves))


if __name__ == "__main__":
    cli(parse_args, main)
