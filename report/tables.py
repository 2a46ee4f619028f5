"""Tables, from plain records. Knows no model and no search.

For the terminal (at most 80 columns wide if the names are short), for GitHub (table.md), and as a
`Table` of texts for pages.
"""

import math
import statistics
from typing import NamedTuple


class Table(NamedTuple):
    """A table of texts."""

    header: list[str]
    rows: list[list[str]]


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Show a table in a terminal: names on the left, numbers aligned on the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for cells in (header, *rows):
        name, *numbers = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
        lines.append("  ".join([cells[0].ljust(len(name)), *numbers]))
    return "\n".join(lines)


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """Show a table on GitHub."""
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


# ---- Labels (stage 1) ----------------------------------------------------------------------------


def edges_of_agents(trees: list[dict], agents: list[str]) -> dict[str, list[dict]]:
    """Return the edges of each agent: the nodes of the trees but the roots."""
    edges: dict[str, list[dict]] = {agent: [] for agent in agents}
    for tree in trees:
        for node in tree["nodes"]:
            if "agent" in node:
                edges[node["agent"]].append(node)
    return edges


def targets_of(edges: list[dict]) -> list[float]:
    """Return the target Q of each visited edge."""
    return [edge["W"] / edge["N"] for edge in edges if edge["N"] > 0]


def labels_table(trees: list[dict], agents: list[str]) -> Table:
    """Return a row per agent about its labels. trees: lines of trees.jsonl."""
    header = ["agent", "edges", "visited", "mean Q", "|Q| = 1", "truncated"]
    rows = []
    for agent, edges in edges_of_agents(trees, agents).items():
        targets = targets_of(edges)
        cells = [
            agent,
            str(len(edges)),
            str(len(targets)),
            f"{statistics.fmean(targets):.3f}" if targets else "-",
            f"{statistics.fmean(abs(q) == 1 for q in targets):.1%}" if targets else "-",
            str(sum(edge["truncated"] for edge in edges)),
        ]
        rows.append(cells)
    return Table(header, rows)


# ---- V on held-out problems (stage 2) ------------------------------------------------------------


def value_table(report: dict[str, dict]) -> str:
    """Show the held-out metrics of V for the terminal, a line per agent.

    report: agent -> metrics, as in metrics.jsonl.
    """
    num_problems = [row["auc_problems"] for row in report.values()]
    return (
        f"{text_table(*heldout_table(report))}\n"
        f"AUC is a mean over the {min(num_problems)} to {max(num_problems)} problems "
        f"with right and wrong states."
    )


def heldout_table(report: dict[str, dict]) -> Table:
    """Return a row per agent. report: agent -> metrics of V, as in metrics.jsonl."""
    header = ["held-out", "edges", "RMSE", "of mean", "calib.", "AUC", "95 % interval"]
    header += ["top-1", "chance"]
    rows = []
    for agent, row in report.items():
        low, high = row["auc_95"] or (None, None)
        cells = [
            agent,
            str(row["n"]),
            f"{row['rmse']:.3f}",
            f"{row['rmse_of_mean']:.3f}",
            f"{row['ece']:.3f}",
            number_or_dash(row["auc"]),
            f"[{number_or_dash(low)}, {number_or_dash(high)}]",
            number_or_dash(row["top1"]),
            number_or_dash(row["chance"]),
        ]
        rows.append(cells)
    return Table(header, rows)


def number_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def mean_and_deviation(numbers: list[float | None], *, scale: float = 1.0, digits: int = 3) -> str:
    """Show the mean of a group of runs and their standard deviation: "0.95 ± 0.01"."""
    known = [scale * number for number in numbers if number is not None]
    if not known:
        return "-"
    mean = f"{statistics.fmean(known):.{digits}f}"
    if len(known) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(known):.{digits}f}"


def percent_interval(row: dict, *, signed: bool = False) -> str:
    """Show the interval of a row in percent: "27.6 to 38.2", or "-5.6 to +2.3" if signed."""
    form = "+.1f" if signed else ".1f"
    return f"{100 * row['low']:{form}} to {100 * row['high']:{form}}"


# ---- Training the agents (stage 5) ---------------------------------------------------------------


def training_line(record: dict) -> str:
    """Show one line of metrics.jsonl for the terminal."""
    if record["step"] == 0:
        return f"step 0: {_dev_text(record['dev'])}"
    parts = [f"step {record['step']}: reward {_per_agent(record['reward'])}"]
    parts.append(f"KL {record['kl']:.4f}, clipped {100 * record['clip_share']:.1f} %")
    for name, text in (("cut", "cut"), ("without_reward", "without a reward")):
        if record[name] > 0:
            parts.append(f"{record[name]} messages {text}")
    if "dev" in record:
        parts.append(_dev_text(record["dev"]))
    return "; ".join(parts)


def _dev_text(dev: dict) -> str:
    return f"held-out accuracy {100 * dev['accuracy']:.1f} %"


def _per_agent(numbers: dict[str, float | None]) -> str:
    parts = []
    for agent, number in numbers.items():
        shown = "-" if number is None else f"{number:.2f}"
        parts.append(f"{agent} {shown}")
    return " ".join(parts)


def training_table(records: list[dict], best_step: int) -> str:
    """Compare the agents on held-out problems before training, when best, and at the end.

    records: the lines of metrics.jsonl.
    """
    measured = [record for record in records if "dev" in record]
    names = {0: "before", measured[-1]["step"]: "at the end"}
    names[best_step] = "kept" if best_step else "before (kept)"
    lines = ["held-out              accuracy  agent       mean V  right  AUC of V  tokens    cut"]
    for record in measured:
        if record["step"] not in names:
            continue
        label = f"{names[record['step']]}, step {record['step']}"
        start = f"{label:22s} {100 * record['dev']['accuracy']:5.1f} %"
        for agent, row in record["dev"]["agents"].items():
            lines.append(
                f"{start:30s}  {agent:10s} {number_or_dash(row['value']):>7s} "
                f"{number_or_dash(row['right']):>6s} {number_or_dash(row['value_auc']):>9s} "
                f"{row['tokens']:7.1f} {row['truncated']:6.1%}"
            )
            start = ""
    lines.append(
        "accuracy: of one sample; that of the kept step is the best of several, hence too high.\n"
        "mean V: of (V + 1) / 2, which equals `right` if V is calibrated."
    )
    return "\n".join(lines)


def reading_of_v(dev: dict) -> tuple[float | None, float | None]:
    """Return how much V overrates the agent that it overrates most, and its mean AUC of all agents.

    None without V. dev: of a line of metrics.jsonl.
    """
    agents = [row for row in dev["agents"].values() if row["value"] is not None]
    if not agents:
        return None, None
    aucs = [row["value_auc"] for row in agents if row["value_auc"] is not None]
    largest_excess = max(row["value"] - row["right"] for row in agents)
    return largest_excess, statistics.fmean(aucs) if aucs else None


# ---- Methods: the screen at the end of an evaluation ---------------------------------------------


def screen(summary: dict) -> str:
    """Show the methods, and the comparisons that matter, for a terminal of 80 columns."""
    return f"{_method_lines(summary)}\n\n{_comparison_lines(summary)}"


def _method_lines(summary: dict) -> str:
    lines = ["method                   EM %   95 % interval  calls  generated  scored  seconds"]
    for name, row in summary["methods"].items():
        interval = percent_interval(row)
        lines.append(
            f"{name:23s} {100 * row['em']:5.1f} {interval:>15s} {row['agent_calls']:6.1f} "
            f"{row['generated_tokens']:10.0f} {row['scored_tokens']:7.0f} {row['seconds']:8.3f}"
        )
    n = next(iter(summary["methods"].values()))["n"]
    lines.append(f"n = {n} problems. Calls (sampled messages), tokens and seconds are means.")
    return "\n".join(lines)


def _comparison_lines(summary: dict) -> str:
    comparisons = headline_comparisons(summary["comparisons"])
    num_all = len(summary["comparisons"])
    if not comparisons:
        return f"All {num_all} comparisons of methods are in table.md."
    lines = ["search guided by a model   against                     EM points   95 % interval"]
    for row in comparisons:
        interval = percent_interval(row, signed=True)
        difference = f"{100 * row['difference']:+.1f}"
        lines.append(f"{row['method']:26s} {row['against']:26s} {difference:>10s} {interval:>15s}")
    lines.append(f"Paired, on the same problems. All {num_all} comparisons are in table.md.")
    return "\n".join(lines)


def headline_comparisons(comparisons: list[dict]) -> list[dict]:
    """Choose at most eight comparisons, by a rule that does not look at accuracy.

    For each search guided by V or by the ORM alone, they show whether it beats a vote with at least
    as many calls, best-of-N with the same model, and the same search by the policy's likelihood.
    """
    reasons = ("nearest vote", "nearest best-of-N", "same, by policy")
    chosen = []
    for row in comparisons:
        is_search = row["method"].startswith(("sbs-", "mcts-"))
        is_guided = row["method"].endswith(("-value", "-outcome"))
        if is_search and is_guided and row["why"] in reasons:
            chosen.append(row)
    return chosen[:8]


# ---- Tables for GitHub ---------------------------------------------------------------------------


METHODS_NOTE = (
    "Intervals take the problems as independent. Costs are means per problem. `answers read` "
    "counts how the answers were found (extraction.py), `none` those that hold no answer. "
    "`cut` counts messages that ran into their token limit, per agent."
)


def method_table(summary: dict) -> str:
    """Return two tables: the methods, and all comparisons on the same problems."""
    methods = markdown_table(*methods_table(summary))
    comparisons = markdown_table(*comparisons_table(summary))
    return "\n".join([methods, "", METHODS_NOTE, "", comparisons])


def methods_table(summary: dict) -> Table:
    """Return a row per method: its exact match and its cost."""
    header = ["method", "problems", "EM %", "95 % interval", "agent calls", "prompt tokens"]
    header += ["generated", "scored", "seconds", "answers read", "cut"]
    rows = []
    for name, row in summary["methods"].items():
        cells = [
            name,
            str(row["n"]),
            f"{100 * row['em']:.1f}",
            percent_interval(row),
            f"{row['agent_calls']:.1f}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['generated_tokens']:.0f}",
            f"{row['scored_tokens']:.0f}",
            f"{row['seconds']:.3f}",
            counts_text(row["rungs"]),
            counts_text(row["truncated"]) or "0",
        ]
        rows.append(cells)
    return Table(header, rows)


def counts_text(counts: dict[str, int]) -> str:
    """Show counts: "told 170, number 8"."""
    return ", ".join(f"{name} {num}" for name, num in counts.items())


def comparisons_table(summary: dict) -> Table:
    """Return every comparison of two methods on the same problems."""
    header = ["method (agent calls)", "against (agent calls)", "EM points", "95 % interval"]
    header += ["won : lost", "p"]
    rows = []
    for row in summary["comparisons"]:
        cells = [
            f"{row['method']} ({row['calls']:.1f})",
            f"{row['why']}: {row['against']} ({row['calls_against']:.1f})",
            f"{100 * row['difference']:+.1f}",
            percent_interval(row, signed=True),
            f"{row['wins']} : {row['losses']}",
            f"{row['p']:.2g}",
        ]
        rows.append(cells)
    return Table(header, rows)


def _numbers_first(text: str) -> tuple[float, str]:
    """Return a key that sorts "2" before "10", and both before words."""
    return (float(text) if text.isdigit() else math.inf, text)


def breakdown_table(records: dict[str, list[dict]], key: str) -> Table:
    """Return EM per method and per subject or level (key). records: method -> its records."""
    first_records = next(iter(records.values()))
    rows = []
    for group in sorted({str(record[key]) for record in first_records}, key=_numbers_first):
        num_problems = sum(str(record[key]) == group for record in first_records)
        shares = []
        for records_of_method in records.values():
            verdicts = []
            for record in records_of_method:
                if str(record[key]) == group:
                    verdicts.append(record["correct"])
            shares.append(f"{100 * sum(verdicts) / len(verdicts):.1f}")
        rows.append([group, str(num_problems), *shares])
    return Table([key, "problems", *records], rows)
