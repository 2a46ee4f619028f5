"""Tables, from plain records. Knows no model and no search.

Two kinds of tables: for the terminal, at most 80 columns wide, and for GitHub (table.md).
"""

import statistics

# ---- V on held-out problems ----------------------------------------------------------------------


def value_table(report: dict[str, dict]) -> str:
    """Show the held-out metrics of V for the terminal, a line per agent.

    report: agent -> metrics, as in metrics.jsonl.
    """
    num_problems = [row["auc_problems"] for row in report.values()]
    lines = ["held-out    edges   RMSE  of mean  calib.    AUC   95 % interval  top-1  chance"]
    for agent, row in report.items():
        low, high = row["auc_95"] or (None, None)
        interval = f"[{number_or_dash(low)}, {number_or_dash(high)}]"
        lines.append(
            f"{agent:10s} {row['n']:6d} {row['rmse']:6.3f} {row['rmse_of_mean']:8.3f} "
            f"{row['ece']:7.3f} {number_or_dash(row['auc']):>6s}  {interval:14s} "
            f"{number_or_dash(row['top1']):>6s} {number_or_dash(row['chance']):>7s}"
        )
    lines.append(
        f"AUC is a mean over the {min(num_problems)} to {max(num_problems)} problems "
        f"with right and wrong states."
    )
    return "\n".join(lines)


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
    """Return how much better than the truth V thinks the agents are, and its AUC.

    Both of the agent whose messages V misjudges most; None without V. dev: of a line of
    metrics.jsonl.
    """
    agents = [row for row in dev["agents"].values() if row["value"] is not None]
    if not agents:
        return None, None
    worst = max(agents, key=lambda row: abs(row["value"] - row["right"]))
    return worst["value"] - worst["right"], worst["value_auc"]


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


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def method_table(summary: dict) -> str:
    """Return two tables: the methods, and all comparisons on the same problems."""
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
    note = (
        "Intervals take the problems as independent. Costs are means per problem. `answers read` "
        "counts how the answers were found (extraction.py), `none` those that hold no answer. "
        "`cut` counts messages that ran into their token limit, per agent."
    )
    return "\n".join([markdown_table(header, rows), "", note, "", comparison_table(summary)])


def counts_text(counts: dict[str, int]) -> str:
    """Show counts: "told 170, number 8"."""
    return ", ".join(f"{name} {num}" for name, num in counts.items())


def comparison_table(summary: dict) -> str:
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
    return markdown_table(header, rows)
