"""Pictures, from plain records. Each function returns a figure of matplotlib, to be saved."""

import math
import statistics

# The colours of Okabe and Ito, which colour-blind readers can tell apart, and grey.
COLOURS = ["#000000", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#777777"]
MARKERS = "os^Dv*P"


def _panels(titles: list[str], *, num_columns: int, xlabel: str, ylabel: str):
    """Return a figure and its panels."""
    from matplotlib.figure import Figure  # imported late, because it takes a second

    num_rows = math.ceil(len(titles) / num_columns)
    figure = Figure(figsize=(4 * num_columns, 3.5 * num_rows), dpi=100, layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for panel, title in zip(panels, titles, strict=True):
        panel.set(title=title, xlabel=xlabel, ylabel=ylabel)
        panel.grid(alpha=0.3)
    return figure, panels


def _draw(panel, xs: list, ys: list[float | None], *, label: str, index: int) -> None:
    """Draw a curve; unknown y are left out. index: of its colour and marker."""
    style = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[index % len(MARKERS)]}
    _, labels = panel.get_legend_handles_labels()
    panel.plot(xs, ys, label=None if label in labels else label, markersize=5, **style)
    panel.legend(fontsize=8)


def plot_reliability(heldout: list[dict], agents: list[str]):
    """Draw the mean label against V, a panel per agent: on the diagonal V is calibrated.

    heldout: lines of heldout.jsonl. Of each of ten bins of V, a point shows the means; its area is
    the share of the states.
    """
    figure, panels = _panels(agents, num_columns=len(agents), xlabel="V", ylabel="mean label")
    for panel, agent in zip(panels, agents, strict=True):
        bins = {}
        for edge in heldout:
            if edge["agent"] == agent:
                bins.setdefault(min(9, int((edge["V"] + 1) / 2 * 10)), []).append(edge)
        values = [statistics.fmean(edge["V"] for edge in edges) for edges in bins.values()]
        labels = [statistics.fmean(edge["y"] for edge in edges) for edges in bins.values()]
        num_states = sum(len(edges) for edges in bins.values())
        areas = [20 + 400 * len(edges) / num_states for edges in bins.values()]
        panel.plot((-1, 1), (-1, 1), color=COLOURS[7], linestyle=":")
        panel.scatter(values, labels, s=areas, color=COLOURS[1], alpha=0.7)
    return figure


def plot_accuracy(summary: dict):
    """Draw exact match against agent calls, with 95 % intervals.

    Methods that differ only in N, their number of passes, beams or simulations, are one line.
    summary: of summary.json.
    """
    lines: dict[str, list[dict]] = {}
    for row in summary["methods"].values():
        settings = [row[key] for key in ("algorithm", "scorer", "num_candidates", "lam")]
        lines.setdefault(repr(settings), []).append(row)
    title = f"{len(summary['problems'])} test problems, 95 % intervals"
    axes = {"xlabel": "agent_calls per problem", "ylabel": "exact match, %"}
    figure, [panel] = _panels([title], num_columns=1, **axes)
    figure.set_size_inches(10, 6)
    for index, rows in enumerate(lines.values()):
        rows.sort(key=lambda row: row["agent_calls"])
        calls = [row["agent_calls"] for row in rows]
        ems, lows, highs = ([100 * row[key] for row in rows] for key in ("em", "low", "high"))
        _draw(panel, calls, ems, label=", ".join(row["name"] for row in rows), index=index)
        panel.vlines(calls, lows, highs, color=COLOURS[index % len(COLOURS)], linewidth=1)
    panel.set_xscale("log", base=2)
    panel.xaxis.set_major_formatter("{x:,g}")
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def plot_training(records_of_group: dict[str, list[list[dict]]]):
    """Draw what training has done to the agents, against the messages that it took.

    If the mean of (V + 1) / 2 of an agent rises above its share of right answers, or its AUC falls,
    the agent has learnt what V reads instead of the work.

    records_of_group: name -> of each run of a group, the lines of metrics.jsonl of stage 5. The
    agents of a single run have a colour each; otherwise each group has one.
    """
    titles = ["held-out: share right, one sample", "held-out: (V + 1) / 2 minus share right"]
    titles += ["held-out: AUC of V within a problem", "held-out: tokens of a message"]
    titles += ["training: mean reward", "training: KL from the base, nats per token"]
    figure, panels = _panels(titles, num_columns=3, xlabel="sampled messages", ylabel="")
    runs = [(name, records) for name, runs in records_of_group.items() for records in runs]
    for name, records in runs:
        style = {"label": name, "index": list(records_of_group).index(name)}
        measured = [record for record in records if "dev" in record]
        trained = [record for record in records if record["step"] > 0]
        messages, dev_messages = ([r["messages"] for r in rows] for rows in (trained, measured))
        _draw(panels[0], dev_messages, [r["dev"]["accuracy"] for r in measured], **style)
        _draw(panels[5], messages, [record["kl"] for record in trained], **style)
        for index, agent in enumerate(measured[-1]["dev"]["agents"]):
            if len(runs) == 1:
                style = {"label": agent, "index": index}
            rows = [record["dev"]["agents"].get(agent, {}) for record in measured]
            excesses = []
            for row in rows:
                is_known = row.get("value") is not None
                excesses.append(row["value"] - row["right"] if is_known else None)
            _draw(panels[1], dev_messages, excesses, **style)
            _draw(panels[2], dev_messages, [row.get("value_auc") for row in rows], **style)
            _draw(panels[3], dev_messages, [row.get("tokens") for row in rows], **style)
            _draw(panels[4], messages, [r["reward"].get(agent) for r in trained], **style)
    return figure
