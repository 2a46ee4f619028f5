"""Tables, from plain records: what stages 1, 2 and 5 print, and pieces of other tables.

A table is a list of rows of texts; the first row is the header.
"""

import statistics


def text_table(table: list[list[str]]) -> str:
    """Show a table in a terminal: names on the left, numbers aligned on the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return "\n".join(lines)


def markdown_table(table: list[list[str]]) -> str:
    """Show a table on GitHub."""
    lines = []
    for row in table:
        cells = [cell.replace("|", "\\|") for cell in row]
        lines.append(f"| {' | '.join(cells)} |")
    lines.insert(1, "|---" * len(table[0]) + "|")
    return "\n".join(lines)


def mean_text(numbers: list[float | None], *, digits: int) -> str:
    """Show the mean of the known numbers and their standard deviation: "0.95 ± 0.01"."""
    known = [number for number in numbers if number is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    return mean if len(known) == 1 else f"{mean} ± {statistics.stdev(known):.{digits}f}"


def labels_table(trees: list[dict], agents: list[str]) -> list[list[str]]:
    """Return a row per agent about its labels. trees: lines of trees.jsonl."""
    table = [["agent", "edges", "visited", "cut", "mean Q", "|Q| = 1"]]
    for agent in agents:
        edges = [node for tree in trees for node in tree["nodes"][1:] if node["agent"] == agent]
        targets = [edge["W"] / edge["N"] for edge in edges if edge["N"] > 0]
        mean, sure = "-", "-"
        if targets:
            mean = f"{statistics.fmean(targets):.3f}"
            sure = f"{statistics.fmean(abs(target) == 1 for target in targets):.1%}"
        counts = [len(edges), len(targets), sum(edge["truncated"] for edge in edges)]
        table.append([agent, *map(str, counts), mean, sure])
    return table


def value_table(reports: list[dict]) -> list[list[str]]:
    """Return a row per agent about V on held-out labels: of several runs, mean and deviation.

    reports: of each run, agent -> metrics, as in metrics.jsonl.
    """
    header = ["held-out", "edges", "RMSE", "of mean", "calib.", "AUC", "top-1", "chance"]
    table = [[*header, "95 % of AUC"]]
    for agent, first in reports[0].items():
        rows = [report[agent] for report in reports if agent in report]
        cells = [agent, str(first["n"])]
        for name in ("rmse", "rmse_of_mean", "ece", "auc", "top1", "chance"):
            cells.append(mean_text([row[name] for row in rows], digits=3))
        interval = "-" if first["auc_95"] is None else "{:.3f} to {:.3f}".format(*first["auc_95"])
        table.append([*cells, interval if len(reports) == 1 else f"{len(rows)} runs"])
    return table


def training_line(record: dict) -> str:
    """Show one line of metrics.jsonl for the terminal."""
    parts = []
    if record["step"] > 0:
        rewards = [f"{agent} {mean_text([r], digits=2)}" for agent, r in record["reward"].items()]
        parts.append(f"reward {' '.join(rewards)}")
        parts.append(f"KL {record['kl']:.4f}, clipped {record['clip_share']:.1%}")
        parts.append(f"{record['cut']} messages cut, {record['without_reward']} without a reward")
    if "dev" in record:
        parts.append(f"held-out accuracy {record['dev']['accuracy']:.1%}")
    return f"step {record['step']}: {'; '.join(parts)}"


def training_table(trainings: list[tuple[list[dict], int]]) -> list[list[str]]:
    """Return rows about the agents on held-out problems: before, when best (kept), at the end.

    EM is of one sample, and too high when best. (V+1)/2 equals `right` if V is calibrated.

    trainings: of each run the lines of metrics.jsonl, and the step whose adapters were kept.
    """
    table = [["held-out", "messages", "EM", "agent", "(V+1)/2", "right", "AUC", "tokens", "cut"]]
    for moment in ("before", "kept", "at the end"):
        records = []
        for records_of_run, best_step in trainings:
            measured = {record["step"]: record for record in records_of_run if "dev" in record}
            last_step = records_of_run[-1]["step"]
            step = {"before": 0, "kept": best_step, "at the end": last_step}[moment]
            records.append(measured[step])
        start = [moment, mean_text([record["messages"] for record in records], digits=0)]
        start.append(mean_text([record["dev"]["accuracy"] for record in records], digits=3))
        for agent in records[0]["dev"]["agents"]:
            rows = [record["dev"]["agents"].get(agent, {}) for record in records]
            cells = [*start, agent]
            for name in ("value", "right", "value_auc", "tokens", "truncated"):
                digits = 1 if name == "tokens" else 3
                cells.append(mean_text([row.get(name) for row in rows], digits=digits))
            table.append(cells)
            start = ["", "", ""]
    return table
