"""Pictures, from plain records (matplotlib). Knows no model and no search."""

import itertools
import math
import re
import statistics
from pathlib import Path
from typing import BinaryIO

from report.tables import reading_of_v

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without their yellow, and
# grey and wine. Families of methods take them in this order.
COLOURS = ("#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00")
COLOURS += ("#777777", "#882255")
MARKERS = {"greedy": "*", "vote": "o", "best_of": "s", "sbs": "^", "mcts": "D"}


def _load_pyplot():
    """Import matplotlib, for drawing to files: late, because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# ---- Exact match against cost --------------------------------------------------------------------

# What a method may be charged with: the records' names of its parts, and what they are called.
COST_PARTS = {
    "agent calls": {"agent_calls": "sampled messages"},
    "tokens": {
        "prompt_tokens": "prompts",
        "generated_tokens": "generated",
        "scored_tokens": "scored",
    },
}


def family_of(name: str) -> str:
    """Return the name of a method without its N: "mcts-Nx3-value" for "mcts-8x3-value".

    N is the number of passes, beams or simulations. The methods of a family differ in it alone.
    """
    return re.sub(r"-\d+", "-N", name, count=1)


def families_of(rows: dict[str, dict]) -> list[list[str]]:
    """Return the names of the methods of each family, in the order of their cost."""
    families: dict[str, list[str]] = {}
    for name in rows:
        families.setdefault(family_of(name), []).append(name)
    for names in families.values():
        names.sort(key=lambda name: rows[name]["cost"])
    return list(families.values())


def plot_accuracy(summary: dict, file: Path | BinaryIO, *, cost: str = "agent calls") -> None:
    """Draw exact match against cost, with 95 % intervals.

    The methods of a family are one line. Its costliest point is labelled with the name, the others
    with their N.

    Args:
        cost: one of COST_PARTS.
    """
    pyplot = _load_pyplot()
    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    rows = {}
    for name, row in summary["methods"].items():
        rows[name] = row | {"cost": sum(row[part] for part in COST_PARTS[cost])}
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
    set_axes(axes, list(rows.values()), cost)
    figure.canvas.draw()  # the layout must be final before there is room to measure
    place_names(axes, rows, families, colour_of)
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _draw_point(axes, name: str, row: dict, colour: str, *, is_hollow: bool) -> None:
    """Draw a method with its interval."""
    algorithm = name.split("-")[0]
    em = 100 * row["em"]
    axes.errorbar(
        row["cost"],
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
    costs = [row["cost"] for row in rows]
    accuracies = [100 * row["em"] for row in rows]
    axes.plot(costs, accuracies, color=colour, linewidth=1.2)


def set_axes(axes, rows: list[dict], cost: str) -> None:
    """Set limits, ticks and labels of the picture from its data."""
    costs = [row["cost"] for row in rows]
    lowest = 100 * min(row["low"] for row in rows)
    highest = 100 * max(row["high"] for row in rows)
    # Room for the names of the outermost points; names are preferably on the right.
    x_limits = (min(costs) / 1.5, max(costs) * 2.2)
    y_limits = (max(0, lowest - 5), min(105, highest + 8))
    axes.set(
        xscale="log",
        xlim=x_limits,
        ylim=y_limits,
        xlabel=f"{cost} ({', '.join(COST_PARTS[cost].values())}) per problem, mean",
        ylabel="exact match, %",
        title=f"{rows[0]['n']} test problems, 95 % intervals",
    )
    first = math.ceil(math.log2(x_limits[0]))
    last = math.floor(math.log2(x_limits[1]))
    ticks = [2.0**exponent for exponent in range(first, last + 1)]
    axes.set_xticks(ticks, [f"{tick:g}" if tick < 1e6 else f"{tick:.0f}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


# Places of a name relative to its point: (x, y, alignment), in points. The first is preferred.
NAME_PLACES = [
    (x, sign * y, alignment)
    for y in range(0, 78, 11)
    for sign in (1, -1)
    for x, alignment in ((9, "left"), (-9, "right"))
]


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

    ends = [(row["cost"], 100 * row["low"]), (row["cost"], 100 * row["high"])]
    (x, bottom), (_, top) = axes.transData.transform(ends)
    return Bbox.from_extents(x - 6, bottom, x + 6, top)


def _boxes_of_line(axes, row: dict, next_row: dict) -> list:
    """Return small boxes, in pixels, that cover the line between two points."""
    from matplotlib.transforms import Bbox

    ends = []
    for end in (row, next_row):
        ends.append((end["cost"], 100 * end["em"]))
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
        (row["cost"], 100 * row["em"]),
        xytext=(dx, dy),
        textcoords="offset points",
        ha=alignment,
        va="center",
        fontsize=9,
        color=colour,
    )


# ---- Labels, and V against them ------------------------------------------------------------------


def plot_targets(targets_of_agent: dict[str, list[float]], file: Path | BinaryIO) -> None:
    """Draw the distribution of the targets, a panel per agent."""
    pyplot, figure, panels = _panel_per_agent(list(targets_of_agent))
    for panel, (agent, targets) in zip(panels, targets_of_agent.items(), strict=True):
        shares = [1 / len(targets)] * len(targets)
        panel.hist(targets, bins=20, range=(-1, 1), weights=shares, color=COLOURS[1])
        panel.set(title=f"{agent}, {len(targets)} labels", xlabel="target y", ylim=(0, 1))
    panels[0].set(ylabel="share of the labels")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def plot_reliability(edges_of_agent: dict[str, list[dict]], file: Path | BinaryIO) -> None:
    """Draw the mean label against V, a panel per agent: on the diagonal V is calibrated.

    edges_of_agent: agent -> lines of heldout.jsonl. Of each of ten bins of V, a point shows the
    means; its area is the number of states.
    """
    pyplot, figure, panels = _panel_per_agent(list(edges_of_agent))
    for panel, (agent, edges) in zip(panels, edges_of_agent.items(), strict=True):
        bins: dict[int, list[dict]] = {}
        for edge in edges:
            if math.isfinite(edge["V"]):
                bins.setdefault(min(9, int((edge["V"] + 1) / 2 * 10)), []).append(edge)
        values, labels, areas = [], [], []
        for states in bins.values():
            values.append(statistics.fmean(edge["V"] for edge in states))
            labels.append(statistics.fmean(edge["y"] for edge in states))
            areas.append(20 + 400 * len(states) / len(edges))
        panel.plot((-1, 1), (-1, 1), color=COLOURS[7], linestyle=":")
        panel.scatter(values, labels, s=areas, color=COLOURS[1], alpha=0.7)
        panel.set(title=f"{agent}, {len(edges)} states", xlabel="V", xlim=(-1.1, 1.1))
        panel.set(ylim=(-1.1, 1.1), aspect="equal")
    panels[0].set(ylabel="mean label")
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def plot_epochs(epochs: list[dict], file: Path | BinaryIO) -> None:
    """Draw how V learnt. epochs: the lines of metrics.jsonl of stage 2."""
    pyplot = _load_pyplot()
    figure, (loss, error, ranking) = pyplot.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    loss.plot(numbers, [epoch["train_loss"] for epoch in epochs], color=COLOURS[0], marker="o")
    for index, agent in enumerate(epochs[-1]["heldout"]):
        marker = "osD^vP"[index % 6]
        style = {"color": COLOURS[1 + index % 6], "marker": marker, "label": agent}
        metrics = [epoch["heldout"][agent] for epoch in epochs]
        _plot_known(error, numbers, [row["rmse"] for row in metrics], **style)
        _plot_known(ranking, numbers, [row["auc"] for row in metrics], **style)
    loss.set(title="training: loss", ylim=(0, None))
    error.set(title="held-out: RMSE of V", ylim=(0, None))
    error.legend(fontsize=8)
    ranking.set(title="held-out: AUC of V within a problem", ylim=(-0.03, 1.03))
    ranking.axhline(0.5, color=COLOURS[7], linestyle=":")
    for panel in (loss, error, ranking):
        panel.set(xlabel="epoch", xticks=numbers)
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def _panel_per_agent(agents: list[str]):
    """Return pyplot, a figure and its panels, at most four in a row."""
    pyplot = _load_pyplot()
    num_columns = min(4, len(agents))
    num_rows = math.ceil(len(agents) / num_columns)
    size = (3 * num_columns, 3.2 * num_rows)
    figure, axes = pyplot.subplots(
        num_rows, num_columns, figsize=size, layout="constrained", squeeze=False
    )
    panels = list(axes.flat)
    for panel in panels[len(agents) :]:
        panel.remove()
    for panel in panels[: len(agents)]:
        panel.grid(alpha=0.3)
    return pyplot, figure, panels[: len(agents)]


# ---- Training the agents (stage 5) ---------------------------------------------------------------


def plot_training(records: list[dict], best_step: int, file: Path | BinaryIO) -> None:
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
    ranking.set(title="held-out: AUC of V within a problem", ylim=(-0.03, 1.03))
    reward.set(title="training: mean reward", xlabel="step")
    distance.set(title="training: KL from the base, nats per token", xlabel="step")
    length.set(title="held-out: tokens of a message", xlabel="step")
    for panel in axes.flat:
        panel.grid(alpha=0.3)
    figure.savefig(file, dpi=100)
    pyplot.close(figure)


def plot_learning(records_of_group: dict[str, list[list[dict]]], file: Path | BinaryIO) -> None:
    """Draw what training has done to the agents against the messages it took, for several runs.

    records_of_group: name -> the lines of metrics.jsonl of each run of this group. Thin lines are
    runs, thick ones their mean.
    """
    pyplot = _load_pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5), layout="constrained")
    measures = ["right answers, one sample, %", "V minus truth, worst agent"]
    measures.append("AUC of V, mean of agents")
    for index, (name, records_of_run) in enumerate(records_of_group.items()):
        style = {"color": COLOURS[index % len(COLOURS)]}
        style["linestyle"] = "-" if index < len(COLOURS) else "--"
        curves_of_run = [_learning_curves(records) for records in records_of_run]
        for panel, *curves in zip(axes, *curves_of_run, strict=True):
            if len(curves) > 1:
                for curve in curves:
                    _plot_known(panel, *curve, linewidth=0.6, alpha=0.6, **style)
            _plot_known(panel, *_mean_curve(curves), label=name, linewidth=2, **style)
    for panel, measure in zip(axes, measures, strict=True):
        panel.set(title=f"held-out: {measure}", xlabel="sampled messages")
        panel.grid(alpha=0.3)
    axes[1].axhline(0, color=COLOURS[7], linestyle=":")
    axes[2].axhline(0.5, color=COLOURS[7], linestyle=":")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=100)
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


def _plot_known(axes, steps: list[int], numbers: list[float | None], **style) -> None:
    """Draw the numbers that are known."""
    known = []
    for step, number in zip(steps, numbers, strict=True):
        if number is not None:
            known.append((step, number))
    if known:
        axes.plot(*zip(*known, strict=True), **style)
