"""Tables and pictures, from plain records. Knows no model and no search.

Two kinds of tables: for the terminal, at most 80 columns wide, and for GitHub (table.md).
"""

import math
from pathlib import Path

# ---- V on held-out problems ----------------------------------------------------------------------


def value_table(report: dict[str, dict]) -> str:
    """Show the held-out metrics of V for the terminal, a line per agent.

    report: agent -> metrics, as in metrics.jsonl.
    """
    lines = ["held-out     edges   RMSE  (of mean)  calib.    AUC    95 % interval   top-1  chance"]
    for agent, row in report.items():
        low, high = row["auc_95"] or (None, None)
        interval = f"[{number_or_dash(low)}, {number_or_dash(high)}]"
        lines.append(
            f"{agent:10s} {row['n']:7d} {row['rmse']:6.3f} {row['rmse_of_mean']:10.3f} "
            f"{row['ece']:7.3f} {number_or_dash(row['auc']):>6s}  {interval:14s} "
            f"{number_or_dash(row['top1']):>7s} {number_or_dash(row['chance']):>7s}"
        )
    return "\n".join(lines)


def number_or_dash(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ---- Methods: the screen at the end of an evaluation ---------------------------------------------


def screen(summary: dict) -> str:
    """Show the methods, and the comparisons that matter, for a terminal of 80 columns."""
    return f"{_method_lines(summary)}\n\n{_comparison_lines(summary)}"


def _method_lines(summary: dict) -> str:
    lines = ["method                     EM %   95 % interval   calls  generated  scored  seconds"]
    for name, row in summary["methods"].items():
        interval = f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"
        lines.append(
            f"{name:25s} {100 * row['em']:5.1f} {interval:>15s} {row['agent_calls']:7.1f} "
            f"{row['generated_tokens']:10.0f} {row['scored_tokens']:7.0f} {row['seconds']:8.3f}"
        )
    n = next(iter(summary["methods"].values()))["n"]
    lines.append(f"n = {n}. Calls (sampled messages), tokens and seconds are means per problem.")
    return "\n".join(lines)


def _comparison_lines(summary: dict) -> str:
    comparisons = headline_comparisons(summary["comparisons"])
    num_all = len(summary["comparisons"])
    if not comparisons:
        return f"All {num_all} comparisons of methods are in table.md."
    lines = ["search guided by a model   against                     EM points   95 % interval"]
    for row in comparisons:
        interval = f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}"
        difference = f"{100 * row['difference']:+.1f}"
        lines.append(f"{row['method']:26s} {row['against']:26s} {difference:>10s} {interval:>15s}")
    lines.append(f"Paired, on the same problems. All {num_all} comparisons are in table.md.")
    return "\n".join(lines)


def headline_comparisons(comparisons: list[dict]) -> list[dict]:
    """Choose at most six comparisons, by a rule that does not look at results.

    They ask of each search guided by a model: is it better than a vote of like cost, than picking
    the best of N passes by the same model, and than the same search by the policy's likelihood?
    """
    chosen = []
    for row in comparisons:
        is_search = row["method"].startswith(("sbs-", "mcts-"))
        is_guided = row["method"].endswith(("-value", "-outcome"))
        asked = ("nearest vote", "nearest best-of-N", "same, by policy")
        if is_search and is_guided and row["why"] in asked:
            chosen.append(row)
    return chosen[:6]


# ---- Tables for GitHub ---------------------------------------------------------------------------


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    for row in rows:
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def method_table(summary: dict) -> str:
    """Return two tables: the methods, and all comparisons on the same problems."""
    header = ["method", "n", "EM %", "95 % interval", "agent calls", "prompt tokens", "generated"]
    header += ["scored", "seconds", "no answer", "cut"]
    rows = []
    for name, row in summary["methods"].items():
        cut = [f"{agent} {num}" for agent, num in row["truncated"].items()]
        cells = [
            name,
            str(row["n"]),
            f"{100 * row['em']:.1f}",
            f"{100 * row['low']:.1f} to {100 * row['high']:.1f}",
            f"{row['agent_calls']:.1f}",
            f"{row['prompt_tokens']:.0f}",
            f"{row['generated_tokens']:.0f}",
            f"{row['scored_tokens']:.0f}",
            f"{row['seconds']:.3f}",
            str(row["no_answer"]),
            ", ".join(cut) or "0",
        ]
        rows.append(cells)
    note = (
        "Costs are means per problem; `cut` counts messages that ran into their token limit, "
        "per agent."
    )
    return "\n".join([markdown_table(header, rows), "", note, "", comparison_table(summary)])


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
            f"{100 * row['low']:+.1f} to {100 * row['high']:+.1f}",
            f"{row['wins']} : {row['losses']}",
            f"{row['p']:.2g}",
        ]
        rows.append(cells)
    return markdown_table(header, rows)


# ---- The picture ---------------------------------------------------------------------------------

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    None: "#000000",
    "value": "#D55E00",
    "policy": "#0072B2",
    "random": "#777777",
    "outcome": "#009E73",
}
MARKERS = {"greedy": "*", "vote": "o", "best_of": "s", "sbs": "^", "mcts": "D"}


def plot_accuracy(summary: dict, path: Path) -> None:
    """Draw exact match against agent calls, with 95 % intervals and a name at each point."""
    import matplotlib  # imported late: it takes a second, and only the picture needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # 1. The points, with their intervals.
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    points, names, colours = [], [], []
    for name, row in summary["methods"].items():
        algorithm = name.split("-")[0]
        scorers = [scorer for scorer in COLOURS if scorer and scorer in name.split("-")]
        colour = COLOURS[scorers[0] if scorers else None]
        em, low, high = 100 * row["em"], 100 * row["low"], 100 * row["high"]
        axes.errorbar(
            row["agent_calls"],
            em,
            yerr=[[em - low], [high - em]],
            color=colour,
            marker=MARKERS[algorithm],
            markersize=10 if algorithm == "greedy" else 7,
            elinewidth=1,
            capsize=2,
        )
        points.append((row["agent_calls"], em))
        names.append(name)
        colours.append(colour)

    # 2. Axes that fit the data.
    set_axes(axes, summary)

    # 3. A name at each point, where there is room for it.
    figure.canvas.draw()
    place_names(axes, points, names, colours)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def set_axes(axes, summary: dict) -> None:
    """Set limits, ticks and labels of the picture from its data."""
    rows = list(summary["methods"].values())
    calls = [row["agent_calls"] for row in rows]
    lowest = 100 * min(row["low"] for row in rows)
    highest = 100 * max(row["high"] for row in rows)
    # A margin, in which the names of the outermost points have room.
    x_limits = (min(calls) / 1.5, max(calls) * 1.5)
    y_limits = (max(0, lowest - 5), min(100, highest + 5))
    axes.set(
        xscale="log",
        xlim=x_limits,
        ylim=y_limits,
        xlabel="agent calls (sampled messages) per problem, mean",
        ylabel="exact match, %",
        title=f"n = {rows[0]['n']} test problems, 95 % intervals",
    )
    first = math.ceil(math.log2(x_limits[0]))
    last = math.floor(math.log2(x_limits[1]))
    ticks = [2.0**exponent for exponent in range(first, last + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# Places of a name relative to its point: (x, y, alignment), in points. The first is preferred.
NAME_PLACES = (
    (9, 0, "left"),
    (-9, 0, "right"),
    (9, 11, "left"),
    (9, -11, "left"),
    (-9, 11, "right"),
    (-9, -11, "right"),
    (9, 22, "left"),
    (9, -22, "left"),
    (-9, 22, "right"),
    (-9, -22, "right"),
)


def place_names(axes, points: list, names: list[str], colours: list[str]) -> None:
    """Write each name where it overlaps least with points, intervals and the names before it."""
    from matplotlib.transforms import Bbox

    occupied = []
    for x, y in axes.transData.transform(points):
        occupied.append(Bbox.from_extents(x - 7, y - 7, x + 7, y + 7))
    for container in axes.containers:
        for line in container.lines[2]:
            occupied.append(line.get_window_extent().padded(2))
    inside = axes.get_window_extent()

    for point, name, colour in zip(points, names, colours, strict=True):
        candidates = []
        for place in NAME_PLACES:
            dx, dy, alignment = place
            text = axes.annotate(
                name,
                point,
                xytext=(dx, dy),
                textcoords="offset points",
                ha=alignment,
                va="center",
                fontsize=9,
                color=colour,
            )
            box = text.get_window_extent()
            overlap = sum(_overlap(box, other) for other in occupied)
            outside = box.width * box.height - _overlap(box, inside)
            candidates.append((overlap + outside, len(candidates), text, box))
        _, chosen, _, box = min(candidates, key=lambda candidate: candidate[:2])
        occupied.append(box)
        for _, index, text, _ in candidates:
            if index != chosen:
                text.remove()


def _overlap(box, other) -> float:
    """Return the area that two boxes share, in square pixels."""
    width = min(box.x1, other.x1) - max(box.x0, other.x0)
    height = min(box.y1, other.y1) - max(box.y0, other.y0)
    return max(0.0, width) * max(0.0, height)
