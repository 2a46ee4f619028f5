"""Runs side by side, from their records alone: V, the agents' training, and the answers.

Called by `evaluate.py --compare`. Runs that differ in their seed only are compared as a group, so
that the noise of training is part of every interval.
"""

import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from report.pictures import plot_learning
from report.tables import (
    markdown_table,
    mean_and_deviation,
    number_or_dash,
    percent_interval,
    reading_of_v,
)
from support.flags import InputError
from support.records import read_jsonl, read_records, record_names
from support.runs import read_config
from support.statistics import (
    seeds_and_problems,
    seeds_and_problems_difference,
    within_runs_difference,
)


@dataclass
class Group:
    """Runs that differ in their seed only: `NAME=RUN,RUN` on the command line, or a single RUN."""

    name: str
    runs: list[Path]


def read_groups(texts: list[str]) -> list[Group]:
    """Read the groups of --compare. Raises InputError if one is none, or two have the same name."""
    groups = []
    for text in texts:
        name, equals, names_of_runs = text.partition("=")
        if not equals or Path(text).is_dir():
            name, names_of_runs = text, text
        runs = [Path(run_name) for run_name in names_of_runs.split(",")]
        if not name or len(set(runs)) < len(runs) or Path() in runs:
            raise InputError(f"--compare {text}: give RUN, or NAME=RUN,RUN with different runs")
        if any(group.name == name and group.runs != runs for group in groups):
            raise InputError(f"--compare: {name} is named twice")
        groups.append(Group(name, runs))
    return groups


def compare_runs(groups: list[Group]) -> str:
    """Compare groups of runs from their records: V and the agents on held-out problems, then EM.

    A single group is compared with itself: its methods with each other.

    Raises InputError if a run has no V, no evaluation and no trained agents.
    """
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        if not any((run / stage).is_dir() for stage in ("value", "agents", "eval")):
            raise InputError(
                f"--compare {run}: no value/, no agents/ and no eval/ in it; it is not a run"
            )
    tables = []
    for stage, compare in (
        ("value", _compare_values),
        ("agents", _compare_agents),
        ("eval", _compare_answers),
    ):
        if any((run / stage).is_dir() for run in runs):
            tables.append(compare(groups))
    if len(groups) == 1 and len(runs) > 1 and (runs[0] / "eval" / "summary.json").is_file():
        tables.append(_compare_methods(groups[0]))
    return "\n\n".join(tables)


def _compare_values(groups: list[Group]) -> str:
    """Return a table of the held-out metrics of V: of a group, the mean and deviation of its Vs."""
    header = ["run", "N", "loss", "view", "agent", "RMSE", "calibration error", "AUC"]
    header += ["95 % interval", "top-1", "chance"]
    rows = []
    for group in groups:
        # A run that used another run's V has none of its own.
        folders = [run / "value" for run in group.runs if (run / "value").is_dir()]
        if not folders:
            continue
        configs = [_finished_config(folder) for folder in folders]
        settings = configs[0]["settings"]
        last_epochs = []
        for folder in folders:
            last_epochs.append(read_jsonl(folder / "metrics.jsonl")[-1]["heldout"])
        for agent in last_epochs[0]:
            if not all(agent in epoch for epoch in last_epochs):
                continue  # some run has no held-out labels of it
            metrics = [epoch[agent] for epoch in last_epochs]
            low, high = metrics[0]["auc_95"] or (None, None)
            interval = f"{number_or_dash(low)} to {number_or_dash(high)}"
            cells = [
                group.name,
                str(settings["rollouts"]["num_simulations"]),
                settings["loss"],
                settings["view"],
                agent,
                mean_and_deviation([row["rmse"] for row in metrics]),
                mean_and_deviation([row["ece"] for row in metrics]),
                mean_and_deviation([row["auc"] for row in metrics]),
                interval if len(folders) == 1 else f"{len(folders)} runs",
                mean_and_deviation([row["top1"] for row in metrics]),
                mean_and_deviation([row["chance"] for row in metrics]),
            ]
            rows.append(cells)
    return markdown_table(header, rows)


def _finished_config(folder: Path) -> dict:
    """Return the config.json of a model. Raises InputError if its training is not finished."""
    config = read_config(folder)
    if not config.get("finished"):
        raise InputError(f"--compare {folder}: its training is not finished")
    return config


def _compare_agents(groups: list[Group]) -> str:
    """Return a table of the agents on held-out problems: before, when best (kept), at the end.

    `V - truth` is how much V overrates the agent that it overrates most; `AUC of V` is the mean of
    all agents.
    """
    header = ["agents", "runs", "reward", "messages", "held-out %", "V - truth", "AUC of V"]
    rows = []
    for group in groups:
        folders = [run / "agents" for run in group.runs if (run / "agents").is_dir()]
        if not folders:
            continue
        configs = [_finished_config(folder) for folder in folders]
        moments = []
        for folder, config in zip(folders, configs, strict=True):
            moments.append(_moments_of_training(folder, config["best_step"]))
        for moment in moments[0]:
            records = [of_run[moment] for of_run in moments]
            accuracies = [record["dev"]["accuracy"] for record in records]
            readings = [reading_of_v(record["dev"]) for record in records]
            cells = [
                f"{group.name}, {moment}",
                str(len(folders)),
                configs[0]["settings"]["reward"],
                f"{statistics.fmean(record['messages'] for record in records):.0f}",
                mean_and_deviation(accuracies, scale=100, digits=1),
                mean_and_deviation([excess for excess, _ in readings]),
                mean_and_deviation([auc for _, auc in readings]),
            ]
            rows.append(cells)
    return markdown_table(header, rows)


def _moments_of_training(folder: Path, best_step: int) -> dict[str, dict]:
    """Return three held-out measurements of stage 5: before, of the adapters kept, at the end."""
    measured = {}
    for record in read_jsonl(folder / "metrics.jsonl"):
        if "dev" in record:
            measured[record["step"]] = record
    last_step = max(measured)
    return {
        "before": measured[0],
        "kept": measured[best_step],
        "at the end": measured[last_step],
    }


def write_curves(groups: list[Group], path: Path) -> None:
    """Draw how the agents of the runs learnt. Raises InputError if a run has not trained any."""
    if path.suffix != ".png":
        raise InputError(f"--curves {path}: the picture is a PNG; give a name that ends in .png")
    records_of_group = {}
    for group in groups:
        records_of_run = []
        for run in group.runs:
            _finished_config(run / "agents")
            records_of_run.append(read_jsonl(run / "agents" / "metrics.jsonl"))
        records_of_group[group.name] = records_of_run
    path.parent.mkdir(parents=True, exist_ok=True)
    plot_learning(records_of_group, path)
    print(f"\n{path} shows how the agents learnt")


def _compare_answers(groups: list[Group]) -> str:
    """Return a table of the methods that all runs have, each group paired with the first."""
    has_seeds = any(len(group.runs) > 1 for group in groups)
    header = ["method", "run", "problems", "EM %", "95 % interval", "agent calls"]
    header += ["against the first", "95 % interval"]
    if has_seeds:
        header += ["runs", "deviation"]
    runs = [run for group in groups for run in group.runs]
    names = _common_methods(runs)
    if not names:
        return "No method was evaluated in all of these runs."
    rows = []
    for name in names:
        records_of_run = {run: read_records(run / "eval" / name) for run in runs}
        ids = _common_problems(list(records_of_run.values()))
        if not ids:
            raise InputError(f"--compare: no problem was answered by {name} in all of these runs")
        first_verdicts = _verdicts(groups[0], records_of_run, ids)
        for group in groups:
            verdicts = _verdicts(group, records_of_run, ids)
            em = seeds_and_problems(verdicts)
            calls = []
            for run in group.runs:
                calls += [records_of_run[run][problem_id]["agent_calls"] for problem_id in ids]
            cells = [
                name.removesuffix(".jsonl"),
                group.name,
                str(len(ids)),
                f"{100 * em['mean']:.1f}",
                percent_interval(em),
                f"{statistics.fmean(calls):.1f}",
            ]
            if group is groups[0]:
                cells += ["", ""]
            else:
                result = seeds_and_problems_difference(verdicts, first_verdicts)
                cells.append(f"{100 * result['difference']:+.1f}")
                cells.append(percent_interval(result, signed=True))
            if has_seeds:
                deviation = em["deviation"]
                shown = "-" if deviation is None else f"{100 * deviation:.1f}"
                cells += [str(len(group.runs)), shown]
            rows.append(cells)
    return markdown_table(header, rows)


def _compare_methods(group: Group) -> str:
    """Return the comparisons of the first run's table.md, each over all runs of the group."""
    records_of_method = {}
    for name in _common_methods(group.runs):
        records_of_run = {run: read_records(run / "eval" / name) for run in group.runs}
        records_of_method[name.removesuffix(".jsonl")] = records_of_run
    summary = json.loads((group.runs[0] / "eval" / "summary.json").read_text("utf-8"))
    rows = []
    for pair in summary["comparisons"]:
        if not {pair["method"], pair["against"]} <= set(records_of_method):
            continue
        records = records_of_method[pair["method"]]
        records_against = records_of_method[pair["against"]]
        ids = _common_problems([*records.values(), *records_against.values()])
        if not ids:
            continue
        result = within_runs_difference(
            _verdicts(group, records, ids), _verdicts(group, records_against, ids)
        )
        cells = [
            pair["method"],
            f"{pair['why']}: {pair['against']}",
            f"{100 * result['difference']:+.1f}",
            percent_interval(result, signed=True),
        ]
        rows.append(cells)
    return markdown_table(["method", "against", "EM points", "95 % interval"], rows)


def _verdicts(group: Group, records_of_run: dict[Path, dict], ids: list[str]) -> list[list[bool]]:
    """Return whether each run of a group is right on each problem: [runs][problems]."""
    verdicts = []
    for run in group.runs:
        verdicts.append([records_of_run[run][problem_id]["correct"] for problem_id in ids])
    return verdicts


def _common_problems(records_of_runs: list[dict[str, dict]]) -> list[str]:
    """Return the ids of the problems that all runs have, with equal questions and gold answers."""
    ids = []
    for problem_id, first in records_of_runs[0].items():
        others = [records.get(problem_id, {}) for records in records_of_runs[1:]]
        if all(_is_same_problem(first, other) for other in others):
            ids.append(problem_id)
    return ids


def _is_same_problem(record: dict, other: dict) -> bool:
    return all(record[key] == other.get(key) for key in ("question", "gold"))


def _common_methods(runs: list[Path]) -> list[str]:
    """Return the names of the records files that every run has, whatever their shards."""
    names = set.intersection(*[record_names(run / "eval") for run in runs])
    return sorted(f"{name}.jsonl" for name in names)
