"""Tables and pictures, from plain records. Knows no model and no search.

Two kinds of tables: for the terminal, at most 80 columns wide, and for GitHub (table.md).
"""

import itertools
import math
import re
import statistics
from pathlib import Path

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


def plot_training(records: list[dict], best_step: int, path: Path) -> None:
    """Draw what happens to accuracy, to V's reading, to the reward and to the messages.

    records: the lines of metrics.jsonl. If the mean V of an agent rises above the share of right
    answers, or its AUC falls, the agent has learnt what V reads instead of the work.
    """
    pyplot = _load_pyplot()
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), layout="constrained", sharex=True)
    accuracy, reading, ranking, reward, distance, length = axes.flat
    measured = [record for record in records if "dev" in record]
    trained = [record for record in records if record["step"] > 0]
    dev_steps = [record["step"] for record in measured]
    steps = [record["step"] for record in trained]

    # 1. Accuracy on held-out problems, and the distance from the base.
    accuracies = [100 * record["dev"]["accuracy"] for record in measured]
    accuracy.plot(dev_steps, accuracies, color=COLOURS[0], marker="o")
    accuracy.axvline(best_step, color=COLOURS[7], linestyle=":", label=f"kept: step {best_step}")
    accuracy.legend(fontsize=8)
    distance.plot(steps, [record["kl"] for record in trained], color=COLOURS[0], label="KL")
    clipped = [record["clip_share"] for record in trained]
    distance.plot(steps, clipped, color=COLOURS[3], linestyle="--", label="share clipped")
    distance.legend(fontsize=8)

    # 2. Each agent: on held-out problems, and on the messages that it is trained on.
    agents = {}
    for record in measured:
        agents |= dict.fromkeys(record["dev"]["agents"])
    for index, agent in enumerate(agents):
        marker = "osD^vP"[index % 6]
        style = {"color": COLOURS[1 + index % 6], "marker": marker, "markersize": 4}
        rows = [record["dev"]["agents"].get(agent, {}) for record in measured]
        _plot_known(reading, dev_steps, [row.get("value") for row in rows], label=agent, **style)
        _plot_known(ranking, dev_steps, [row.get("value_auc") for row in rows], **style)
        _plot_known(length, dev_steps, [row.get("tokens") for row in rows], **style)
        _plot_known(reward, steps, [record["reward"].get(agent) for record in trained], **style)
    truth = [record["dev"]["accuracy"] for record in measured]
    reading.plot(dev_steps, truth, color=COLOURS[0], linestyle="--", label="right answers")
    reading.legend(fontsize=8)
    ranking.axhline(0.5, color=COLOURS[7], linestyle=":")

    # 3. Titles.
    accuracy.set(title="held-out: right answers, one sample", ylabel="%", ylim=(0, 100))
    reading.set(title="held-out: mean (V + 1) / 2", ylim=(0, 1))
    ranking.set(title="held-out: AUC of V within a problem", ylim=(0.3, 1.03))
    reward.set(title="training: mean reward", xlabel="step")
    distance.set(title="training: KL from the base, nats per token", xlabel="step")
    length.set(title="held-out: tokens of a message", xlabel="step")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


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


def plot_learning(records_of_group: dict[str, list[list[dict]]], path: Path) -> None:
    """Draw what training has done to the agents against the messages it took, for several runs.

    records_of_group: name -> the lines of metrics.jsonl of each run of this group. Thin lines are
    runs, thick ones their mean.
    """
    pyplot = _load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    titles = ("right answers, one sample, %", "mean V minus truth, worst agent", "AUC of V there")
    for index, (name, records_of_run) in enumerate(records_of_group.items()):
        style = {"color": COLOURS[index % len(COLOURS)]}
        style["linestyle"] = "-" if index < len(COLOURS) else "--"
        curves_of_run = [_learning_curves(records) for records in records_of_run]
        for panel, number_of_curve in zip(axes, range(3), strict=True):
            curves = [curves[number_of_curve] for curves in curves_of_run]
            if len(curves) > 1:
                for curve in curves:
                    _plot_known(panel, *curve, linewidth=0.6, alpha=0.6, **style)
            _plot_known(panel, *_mean_curve(curves), label=name, linewidth=2, **style)
    for panel, title in zip(axes, titles, strict=True):
        panel.set(title=f"held-out: {title}", xlabel="messages trained on")
        panel.grid(alpha=0.3)
    axes[1].axhline(0, color=COLOURS[7], linestyle=":")
    axes[2].axhline(0.5, color=COLOURS[7], linestyle=":")
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _learning_curves(records: list[dict]) -> list[tuple[list, list]]:
    """Return (messages, numbers) of accuracy, of V minus truth, and of V's AUC."""
    measured = [record for record in records if "dev" in record]
    messages = [record["messages"] for record in measured]
    accuracies = [100 * record["dev"]["accuracy"] for record in measured]
    readings = [reading_of_v(record["dev"]) for record in measured]
    excesses, aucs = zip(*readings, strict=True)
    return [(messages, accuracies), (messages, list(excesses)), (messages, list(aucs))]


def _mean_curve(curves: list[tuple[list, list]]) -> tuple[list, list]:
    """Return the mean of runs, measurement by measurement, up to the shortest."""
    messages, means = [], []
    for points in zip(*(zip(*curve, strict=True) for curve in curves), strict=False):
        known = [number for _, number in points if number is not None]
        messages.append(statistics.fmean(num for num, _ in points))
        means.append(statistics.fmean(known) if known else None)
    return messages, means


def _load_pyplot():
    """Import matplotlib, for drawing to files: late, because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _plot_known(axes, steps: list[int], numbers: list[float | None], **style) -> None:
    """Draw the numbers that are known."""
    known = []
    for step, number in zip(steps, numbers, strict=True):
        if number is not None:
            known.append((step, number))
    if known:
        axes.plot(*zip(*known, strict=True), **style)


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


# ---- The picture ---------------------------------------------------------------------------------

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without their yellow, and
# grey and wine. Families of methods take them in this order.
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
COLOURS += ("#777777", "#882255")
MARKERS = {"greedy": "*", "vote": "o", "best_of": "s", "sbs": "^", "mcts": "D"}


def family_of(name: str) -> str:
    """Return the name of a method without its N: "mcts-Nx3-value" for "mcts-8x3-value".

    N is the number of passes, beams or simulations. The methods of a family differ in it alone.
    """
    return re.sub(r"-\d+", "-N", name, count=1)


def families_of(rows: dict[str, dict]) -> list[list[str]]:
    """Return the names of the methods of each family, in the order of their agent calls."""
    families: dict[str, list[str]] = {}
    for name in rows:
        families.setdefault(family_of(name), []).append(name)
    for names in families.values():
        names.sort(key=lambda name: rows[name]["agent_calls"])
    return list(families.values())


def plot_accuracy(summary: dict, path: Path) -> None:
    """Draw exact match against agent calls, with 95 % intervals.

    The methods of a family are one line. Its point with the most calls is labelled with the name,
    the others with their N.
    """
    pyplot = _load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    rows = summary["methods"]
    families = families_of(rows)
    colour_of, hollow = {}, set()
    for index, names in enumerate(families):
        for name in names:
            colour_of[name] = COLOURS[index % len(COLOURS)]
            if index >= len(COLOURS):  # the colours are used again
                hollow.add(name)
    for name, row in rows.items():
        _draw_point(axes, name, row, colour_of[name], is_hollow=name in hollow)
    for names in families:
        _draw_line(axes, [rows[name] for name in names], colour_of[names[0]])
    set_axes(axes, summary)
    figure.canvas.draw()  # the layout must be final before there is room to measure
    place_names(axes, rows, families, colour_of)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _draw_point(axes, name: str, row: dict, colour: str, *, is_hollow: bool) -> None:
    """Draw a method with its interval."""
    algorithm = name.split("-")[0]
    em = 100 * row["em"]
    axes.errorbar(
        row["agent_calls"],
        em,
        yerr=[[em - 100 * row["low"]], [100 * row["high"] - em]],
        color=colour,
        markerfacecolor="white" if is_hollow else colour,
        marker=MARKERS.get(algorithm, "P"),  # another algorithm
        markersize=10 if algorithm == "greedy" else 7,
        elinewidth=1,
        capsize=2,
    )


def _draw_line(axes, rows: list[dict], colour: str) -> None:
    """Connect the points of a family."""
    calls = [row["agent_calls"] for row in rows]
    accuracies = [100 * row["em"] for row in rows]
    axes.plot(calls, accuracies, color=colour, linewidth=1.2)


def set_axes(axes, summary: dict) -> None:
    """Set limits, ticks and labels of the picture from its data."""
    rows = list(summary["methods"].values())
    calls = [row["agent_calls"] for row in rows]
    lowest = 100 * min(row["low"] for row in rows)
    highest = 100 * max(row["high"] for row in rows)
    # Room for the names of the outermost points; names are preferably on the right.
    x_limits = (min(calls) / 1.5, max(calls) * 2.2)
    y_limits = (max(0, lowest - 5), min(105, highest + 8))
    axes.set(
        xscale="log",
        xlim=x_limits,
        ylim=y_limits,
        xlabel="agent calls (sampled messages) per problem, mean",
        ylabel="exact match, %",
        title=f"{rows[0]['n']} test problems, 95 % intervals",
    )
    first = math.ceil(math.log2(x_limits[0]))
    last = math.floor(math.log2(x_limits[1]))
    ticks = [2.0**exponent for exponent in range(first, last + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# Places of a name relative to its point: (x, y, alignment), in points. The first is preferred.
NAME_PLACES = []
for distance in range(0, 78, 11):
    for sign in (1, -1):
        NAME_PLACES += [(9, sign * distance, "left"), (-9, sign * distance, "right")]


def place_names(axes, rows: dict[str, dict], families: list[list[str]], colour_of: dict) -> None:
    """Write each name at the first of its places that is free, or else at the least crowded.

    Points with their intervals, lines and the names already written take up room.
    """
    # 1. The room that is taken.
    occupied = [_box_of_point(axes, row) for row in rows.values()]
    for names in families:
        for left, right in itertools.pairwise(names):
            occupied += _boxes_of_line(axes, rows[left], rows[right])

    # 2. The names first, because they need more room; then the N of the other points.
    texts = {}
    for names in families:
        texts[names[-1]] = names[-1]
    for names in families:
        for name in names[:-1]:
            texts[name] = _number_of(name)

    # 3. Their places.
    inside = axes.get_window_extent()
    for name, text in texts.items():
        best, fewest = None, math.inf
        for place in NAME_PLACES:
            written = _write(axes, text, rows[name], place, colour_of[name])
            box = written.get_window_extent()
            corners = [(box.x0, box.y0), (box.x1, box.y1)]
            is_cut_off = not all(inside.contains(x, y) for x, y in corners)
            num_overlaps = sum(box.overlaps(other) for other in occupied) + 100 * is_cut_off
            if num_overlaps < fewest:
                if best is not None:
                    best.remove()
                best, fewest = written, num_overlaps
            else:
                written.remove()
        occupied.append(best.get_window_extent())


def _number_of(name: str) -> str:
    """Return N of a method's name: "8" for "mcts-8x3-value"."""
    return re.search(r"-(\d+)", name)[1]


def _box_of_point(axes, row: dict):
    """Return the box, in pixels, of a point with its interval."""
    from matplotlib.transforms import Bbox

    ends = [(row["agent_calls"], 100 * row["low"]), (row["agent_calls"], 100 * row["high"])]
    (x, bottom), (_, top) = axes.transData.transform(ends)
    return Bbox.from_extents(x - 6, bottom, x + 6, top)


def _boxes_of_line(axes, row: dict, next_row: dict) -> list:
    """Return small boxes, in pixels, that cover the line between two points."""
    from matplotlib.transforms import Bbox

    ends = []
    for end in (row, next_row):
        ends.append((end["agent_calls"], 100 * end["em"]))
    (x0, y0), (x1, y1) = axes.transData.transform(ends)
    boxes = []
    for step in range(21):
        x = x0 + (x1 - x0) * step / 20
        y = y0 + (y1 - y0) * step / 20
        boxes.append(Bbox.from_extents(x - 2, y - 2, x + 2, y + 2))
    return boxes


def _write(axes, text: str, row: dict, place: tuple[int, int, str], colour: str):
    """Write a text at a place relative to a point. Returns it."""
    dx, dy, alignment = place
    return axes.annotate(
        text,
        (row["agent_calls"], 100 * row["em"]),
        xytext=(dx, dy),
        textcoords="offset points",
        ha=alignment,
        va="center",
        fontsize=9,
        color=colour,
    )
