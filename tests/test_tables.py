"""Tests of tables.py and pictures.py: for the terminal, for GitHub, and the picture."""

import math
from itertools import combinations

import pytest
from conftest import dev_record

from evaluate import DEFAULT_METHODS
from report.pictures import family_of, plot_accuracy, plot_learning, plot_training
from report.tables import (
    headline_comparisons,
    labels_table,
    method_table,
    screen,
    training_line,
    training_table,
    value_table,
)

TERMINAL_WIDTH = 80
TERMINAL_HEIGHT = 24

# ---- A summary, as of a run with the default methods ---------------------------------------------

N = 300
METHODS = [  # name, right, low, high, agent calls, prompt, generated and scored tokens, seconds
    ("greedy", 98, 0.2761, 0.3816, 4.00, 508, 197, 0, 0.044),
    ("vote-4", 93, 0.2603, 0.3645, 16.00, 1754, 788, 0, 0.126),
    ("best_of-4-value", 213, 0.6563, 0.7584, 16.00, 1754, 788, 1029, 0.179),
    ("best_of-8-value", 261, 0.8268, 0.9030, 32.00, 3417, 1576, 2058, 0.301),
    ("sbs-2x1.6.1.1-value", 252, 0.7943, 0.8771, 11.00, 802, 688, 1802, 0.316),
    ("sbs-2x1.6.1.1-policy", 67, 0.1799, 0.2738, 11.00, 802, 688, 0, 0.250),
    ("mcts-8x3-value", 281, 0.9030, 0.9591, 20.10, 1204, 1022, 2711, 0.291),
    ("mcts-8x1.8.1.1-value", 277, 0.8876, 0.9484, 12.96, 797, 846, 1912, 0.264),
    ("mcts-8x1.8.1.1-policy", 93, 0.2603, 0.3645, 18.87, 1667, 1115, 0, 0.135),
    ("mcts-8x1.8.1.1-random", 106, 0.3014, 0.4090, 14.39, 1008, 911, 0, 0.084),
]
BEST_OF = "best_of-4-value"
BEST_OF_8 = "best_of-8-value"
MCTS_UNIFORM = "mcts-8x3-value"
SBS = "sbs-2x1.6.1.1-value"
SBS_POLICY = "sbs-2x1.6.1.1-policy"
MCTS = "mcts-8x1.8.1.1-value"
MCTS_POLICY = "mcts-8x1.8.1.1-policy"
MCTS_RANDOM = "mcts-8x1.8.1.1-random"
COMPARISONS = [  # method, against, why, won, lost, low, high, p
    ("vote-4", "greedy", "greedy", 45, 50, -0.0804, 0.0473, 0.68),
    (BEST_OF, "greedy", "greedy", 129, 14, 0.3155, 0.4461, 1.8e-24),
    (BEST_OF, "vote-4", "nearest vote", 121, 1, 0.3407, 0.4540, 4.6e-35),
    (SBS, "greedy", "greedy", 160, 6, 0.4485, 0.5713, 5.9e-40),
    (SBS, "vote-4", "nearest vote", 164, 5, 0.4659, 0.5871, 3e-42),
    (SBS, BEST_OF, "nearest best-of-N", 68, 29, 0.0662, 0.1920, 9.3e-05),
    (SBS, SBS_POLICY, "same, by policy", 187, 2, 0.5554, 0.6698, 4.6e-53),
    (SBS_POLICY, "greedy", "greedy", 21, 52, -0.1576, -0.0476, 0.00037),
    (SBS_POLICY, "vote-4", "nearest vote", 31, 57, -0.1469, -0.0253, 0.0073),
    (SBS, BEST_OF_8, "costlier best-of-N", 30, 39, -0.0845, 0.0249, 0.34),
    (MCTS_UNIFORM, "greedy", "greedy", 185, 2, 0.5487, 0.6630, 1.8e-52),
    (MCTS_UNIFORM, "vote-4", "nearest vote", 189, 1, 0.5666, 0.6783, 2.4e-55),
    (MCTS_UNIFORM, BEST_OF_8, "nearest best-of-N", 32, 12, 0.0233, 0.1087, 0.0037),
    (MCTS, "greedy", "greedy", 181, 2, 0.5351, 0.6504, 2.7e-51),
    (MCTS, "vote-4", "nearest vote", 185, 1, 0.5527, 0.6658, 3.8e-54),
    (MCTS, BEST_OF, "nearest best-of-N", 78, 14, 0.1537, 0.2701, 6.2e-12),
    (MCTS, BEST_OF_8, "costlier best-of-N", 31, 15, 0.0081, 0.0979, 0.026),
    (MCTS, MCTS_POLICY, "same, by policy", 184, 0, 0.5535, 0.6651, 8.2e-56),
    (MCTS, MCTS_RANDOM, "same, by random", 171, 0, 0.5096, 0.6229, 6.7e-52),
    (MCTS_POLICY, "greedy", "greedy", 15, 20, -0.0560, 0.0229, 0.5),
    (MCTS_POLICY, "vote-4", "nearest vote", 47, 47, -0.0636, 0.0636, 1),
    (MCTS_RANDOM, "greedy", "greedy", 63, 55, -0.0445, 0.0975, 0.52),
    (MCTS_RANDOM, "vote-4", "nearest vote", 62, 49, -0.0258, 0.1119, 0.25),
]


def method_row(right, low, high, calls, prompt_tokens, generated_tokens, scored_tokens, seconds):
    return {
        "n": N,
        "right": right,
        "em": right / N,
        "low": low,
        "high": high,
        "agent_calls": calls,
        "prompt_tokens": prompt_tokens,
        "generated_tokens": generated_tokens,
        "scored_tokens": scored_tokens,
        "seconds": seconds,
        "truncated": {},
        "rungs": {"told": N},
    }


def make_summary():
    """Return a summary as evaluate.summarise would."""
    rows = {name: method_row(*numbers) for name, *numbers in METHODS}
    comparisons = []
    for method, against, why, wins, losses, low, high, p in COMPARISONS:
        comparison = {
            "method": method,
            "against": against,
            "why": why,
            "lost": [],
            "calls": rows[method]["agent_calls"],
            "calls_against": rows[against]["agent_calls"],
            "difference": (wins - losses) / N,
            "low": low,
            "high": high,
            "wins": wins,
            "losses": losses,
            "p": p,
        }
        comparisons.append(comparison)
    return {"methods": rows, "comparisons": comparisons}


def test_the_summary_has_the_default_methods():
    assert list(make_summary()["methods"]) == DEFAULT_METHODS


# ---- Tables for the terminal ---------------------------------------------------------------------


def assert_fits_the_terminal(text):
    for line in text.splitlines():
        assert len(line) <= TERMINAL_WIDTH, line


def test_the_screen_fits_the_terminal_and_names_every_method():
    text = screen(make_summary())
    assert_fits_the_terminal(text)
    assert len(text.splitlines()) <= TERMINAL_HEIGHT
    for method in DEFAULT_METHODS:
        assert method in text


def test_the_screen_shows_em_interval_and_costs():
    methods, comparisons = screen(make_summary()).split("\n\n")
    [method_line] = [line for line in methods.splitlines() if line.startswith(f"{SBS} ")]
    assert "n = 300 problems." in methods
    numbers = ["84.0", "79.4", "to", "87.7", "11.0", "688", "1802", "0.316"]
    assert method_line.split() == [SBS, *numbers]
    lines = [line.split() for line in comparisons.splitlines()]
    assert [SBS, BEST_OF, "+13.0", "+6.6", "to", "+19.2"] in lines


def test_the_screen_of_a_single_method_has_no_comparisons():
    summary = make_summary()
    alone = {"methods": {"greedy": summary["methods"]["greedy"]}, "comparisons": []}
    text = screen(alone)
    assert_fits_the_terminal(text)
    assert "All 0 comparisons" in text
    assert "against" not in text


def test_headline_comparisons_ask_three_questions_of_each_guided_search():
    chosen = headline_comparisons(make_summary()["comparisons"])
    assert [(row["method"], row["against"], row["why"]) for row in chosen] == [
        (SBS, "vote-4", "nearest vote"),
        (SBS, BEST_OF, "nearest best-of-N"),
        (SBS, SBS_POLICY, "same, by policy"),
        (MCTS_UNIFORM, "vote-4", "nearest vote"),
        (MCTS_UNIFORM, BEST_OF_8, "nearest best-of-N"),
        (MCTS, "vote-4", "nearest vote"),
        (MCTS, BEST_OF, "nearest best-of-N"),
        (MCTS, MCTS_POLICY, "same, by policy"),
    ]


def test_headline_comparisons_do_not_look_at_results():
    comparisons = make_summary()["comparisons"]
    chosen = headline_comparisons(comparisons)
    for row in comparisons:
        row["difference"] *= -1
        row["low"], row["high"] = -row["high"], -row["low"]
        row["p"] = 1 - row["p"]
    assert headline_comparisons(comparisons) == chosen


def test_headline_comparisons_are_at_most_eight():
    comparisons = make_summary()["comparisons"]
    for method in ("mcts-4x3-value", "mcts-4x3-outcome"):
        comparisons.append({"method": method, "against": "vote-4", "why": "nearest vote"})
    assert len(headline_comparisons(comparisons)) == 8
    # The others qualify as well: they are left out only because there are eight already.
    assert len(headline_comparisons(comparisons[-2:])) == 2


def test_the_table_of_v_fits_the_terminal_and_shows_missing_metrics():
    planner = {"n": 438, "rmse": 0.5099, "rmse_of_mean": 0.9177, "ece": 0.1168, "auc": 0.9665}
    planner |= {"auc_problems": 31}
    planner |= {"auc_95": [0.9297, 0.9935], "top1": 0.967, "chance": 0.4689}
    solver = {"n": 123456, "rmse": 0.2117, "rmse_of_mean": 0.9218, "ece": 0.0005, "auc": None}
    solver |= {"auc_problems": 0, "auc_95": None, "top1": None, "chance": None}
    text = value_table({"Planner": planner, "Solver": solver})
    assert_fits_the_terminal(text)
    header, planner_line, solver_line, last_line = text.splitlines()
    names = ["held-out", "edges", "RMSE", "of", "mean", "calib.", "AUC", "95", "%", "interval"]
    assert header.split() == [*names, "top-1", "chance"]
    numbers = ["438", "0.510", "0.918", "0.117", "0.967", "[0.930,", "0.994]", "0.967", "0.469"]
    assert planner_line.split() == ["Planner", *numbers]
    numbers = ["123456", "0.212", "0.922", "0.001", "-", "[-,", "-]", "-", "-"]
    assert solver_line.split() == ["Solver", *numbers]
    assert "over the 0 to 31 problems" in last_line


# ---- Tables for GitHub ---------------------------------------------------------------------------


def test_the_method_table_has_a_row_per_method_and_per_comparison():
    summary = make_summary()
    summary["methods"]["greedy"]["truncated"] = {"Planner": 12, "Solver": 25}
    summary["methods"]["greedy"]["rungs"] = {"told": 289, "number": 8, "none": 3}
    methods, note, comparisons = method_table(summary).split("\n\n")

    header, ruler, *rows = methods.splitlines()
    assert header == (
        "| method | problems | EM % | 95 % interval | agent calls | prompt tokens | generated "
        "| scored | seconds | answers read | cut |"
    )
    assert len(rows) == len(METHODS)
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in DEFAULT_METHODS]
    assert rows[0] == (
        "| greedy | 300 | 32.7 | 27.6 to 38.2 | 4.0 | 508 | 197 | 0 | 0.044 "
        "| told 289, number 8, none 3 | Planner 12, Solver 25 |"
    )
    assert rows[1].endswith("| told 300 | 0 |")
    assert {row.count("|") for row in rows} == {header.count("|")} == {ruler.count("|")}
    assert "Intervals take the problems as independent." in note

    header, ruler, *rows = comparisons.splitlines()
    assert header == (
        "| method (agent calls) | against (agent calls) | EM points | 95 % interval "
        "| won : lost | p |"
    )
    assert len(rows) == len(COMPARISONS)
    assert rows[0] == (
        "| vote-4 (16.0) | greedy: greedy (4.0) | -1.7 | -8.0 to +4.7 | 45 : 50 | 0.68 |"
    )
    assert {row.count("|") for row in rows} == {header.count("|")} == {ruler.count("|")}


# ---- The picture ---------------------------------------------------------------------------------


@pytest.fixture
def draw(tmp_path, figures):
    """Return a function that draws a summary through plot_accuracy and returns its figure."""

    def draw_summary(summary):
        path = tmp_path / "picture.png"
        plot_accuracy(summary, path)
        assert path.stat().st_size > 0
        figure = figures[-1]
        figure.canvas.draw()
        return figure

    return draw_summary


SEVERAL_N = [  # name, share of right answers, agent calls
    ("best_of-2-value", 0.50, 8),
    ("best_of-16-value", 0.93, 64),
    ("mcts-2x3-value", 0.62, 9),
    ("mcts-4x3-value", 0.82, 13.5),
    ("mcts-16x3-value", 0.95, 28),
    ("vote-8", 0.33, 32),
    ("vote-16", 0.335, 64),
]


def summary_with_several_n():
    """Return a summary in which three families have several N."""
    summary = make_summary()
    for name, em, calls in SEVERAL_N:
        row = method_row(round(N * em), em - 0.04, em + 0.04, calls, 800, 800, 0, 0.1)
        summary["methods"][name] = row
    return summary


def assert_texts_are_apart_and_inside(axes):
    inside = axes.get_window_extent()
    boxes = [(text.get_text(), text.get_window_extent()) for text in axes.texts]
    for name, box in boxes:
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1, name
        assert inside.y0 <= box.y0 and box.y1 <= inside.y1, name
    for (name, box), (other_name, other_box) in combinations(boxes, 2):
        assert not box.overlaps(other_box), (name, other_name)
    for container in axes.containers:
        point = container.lines[0].get_window_extent()
        for name, box in boxes:
            assert not box.overlaps(point), name


@pytest.mark.parametrize("most_calls", [18.87, 400])
def test_no_two_names_in_the_picture_overlap_and_none_is_cut_off(draw, most_calls):
    """With 400 calls, the name of the point on the right has room on its left only."""
    summary = make_summary()
    summary["methods"][MCTS_POLICY]["agent_calls"] = most_calls
    [axes] = draw(summary).axes
    texts = {text.get_text() for text in axes.texts}
    assert texts == set(DEFAULT_METHODS) - {BEST_OF} | {"4"}
    assert_texts_are_apart_and_inside(axes)


def test_the_methods_of_a_family_are_one_line_with_the_n_of_each(draw):
    """The line follows the agent calls, not N or the order of the methods."""
    summary = summary_with_several_n()
    summary["methods"]["best_of-16-value"]["agent_calls"] = 30  # fewer than best_of-8-value
    [axes] = draw(summary).axes
    assert_texts_are_apart_and_inside(axes)
    texts = [text.get_text() for text in axes.texts]
    for text, num in [("best_of-8-value", 1), ("mcts-16x3-value", 1), ("vote-16", 1), ("8", 2)]:
        assert texts.count(text) == num, text

    rows = summary["methods"]
    best_of_calls = []
    for num in (2, 4, 16, 8):
        best_of_calls.append(rows[f"best_of-{num}-value"]["agent_calls"])
    lines = [list(line.get_xdata()) for line in axes.lines]
    assert best_of_calls in lines
    assert [9, 13.5, 20.1, 28] in lines  # mcts-Nx3-value
    assert [16, 32, 64] in lines  # vote-N

    # One colour per family, another one for each.
    colours = {}
    for name, container in zip(rows, axes.containers, strict=True):
        colours.setdefault(family_of(name), set()).add(container.lines[0].get_color())
    assert all(len(of_family) == 1 for of_family in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == 9


@pytest.mark.parametrize(
    "name, family",
    [
        ("greedy", "greedy"),
        ("vote-4", "vote-N"),
        ("best_of-8-value", "best_of-N-value"),
        ("mcts-8x1.8.1.1-value", "mcts-Nx1.8.1.1-value"),
        ("mcts-8x3-value-lam0.5", "mcts-Nx3-value-lam0.5"),
    ],
)
def test_the_methods_of_a_family_differ_in_n_alone(name, family):
    assert family_of(name) == family


@pytest.mark.parametrize("scale", [1, 0.3, 20])
def test_ticks_of_the_picture_are_powers_of_two_in_the_range_of_the_data(draw, scale):
    summary = make_summary()
    for row in summary["methods"].values():
        row["agent_calls"] *= scale
    figure = draw(summary)
    [axes] = figure.axes
    left, right = axes.get_xlim()
    calls = [row["agent_calls"] for row in summary["methods"].values()]
    assert left < min(calls)
    assert right > max(calls)
    # The limits leave room for names, but not for another power of two without data.
    assert left > min(calls) / 2
    assert right < max(calls) * 4

    ticks = list(axes.get_xticks())
    exponents = [math.log2(tick) for tick in ticks]
    assert all(exponent == int(exponent) for exponent in exponents)
    assert all(left <= tick <= right for tick in ticks)
    assert len(ticks) >= 2
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{tick:g}" for tick in ticks]


def test_the_picture_shows_every_method_with_its_interval(draw):
    """Also a method that somebody has added to search.py, as the README shows."""
    summary = make_summary()
    summary["methods"]["reject-8-value"] = summary["methods"][MCTS] | {"agent_calls": 24}
    [axes] = draw(summary).axes
    assert len(axes.containers) == len(METHODS) + 1
    low, high = axes.get_ylim()
    for container, row in zip(axes.containers, summary["methods"].values(), strict=True):
        [(x, y)] = container.lines[0].get_xydata()
        assert x == row["agent_calls"]
        assert y == pytest.approx(100 * row["em"])
        assert low <= 100 * row["low"]
        assert 100 * row["high"] <= high


def test_tokens_are_those_of_prompts_messages_and_scoring(tmp_path, figures):
    summary = make_summary()
    plot_accuracy(summary, tmp_path / "p.png", cost="tokens")
    [axes] = figures[-1].axes
    assert axes.get_xlabel().startswith("tokens (prompts, generated, scored)")
    for container, row in zip(axes.containers, summary["methods"].values(), strict=True):
        [(cost, _)] = container.lines[0].get_xydata()
        assert cost == row["prompt_tokens"] + row["generated_tokens"] + row["scored_tokens"]


def test_the_bars_of_the_picture_are_the_intervals(tmp_path, figures):
    summary = make_summary()
    plot_accuracy(summary, tmp_path / "p.png")
    [axes] = figures[-1].axes
    for container, row in zip(axes.containers, summary["methods"].values(), strict=True):
        [[(_, low), (_, high)]] = container.lines[2][0].get_segments()
        assert (low, high) == pytest.approx((100 * row["low"], 100 * row["high"]))


TRAINING = [dev_record(0, 0.9, 0.4, 0.7), dev_record(1, 0.95, 0.5, 0.6)]


def lines_of(panel):
    return [[tuple(point) for point in line.get_xydata()] for line in panel.lines]


def test_the_picture_of_training_has_each_number_in_its_panel(tmp_path, figures):
    plot_training(TRAINING, 1, tmp_path / "p.png")
    accuracy, reading, ranking, reward, distance, length = figures[-1].axes
    assert [panel.get_title() for panel in figures[-1].axes] == [
        "held-out: right answers, one sample",
        "held-out: mean (V + 1) / 2",
        "held-out: AUC of V within a problem",
        "training: mean reward",
        "training: KL from the base, nats per token",
        "held-out: tokens of a message",
    ]
    assert lines_of(accuracy)[0] == [(0, 40), (1, 50)]
    assert lines_of(reading)[:2] == [[(0, 0.9), (1, 0.95)], [(0, 0.4), (1, 0.5)]]
    assert lines_of(ranking)[0] == [(0, 0.7), (1, 0.6)]
    assert lines_of(reward) == [[(1, 0.25)]]
    assert lines_of(distance) == [[(1, 0.125)], [(1, 0.0625)]]
    assert lines_of(length) == [[(0, 9), (1, 9)]]


@pytest.mark.parametrize("best_step", [0, 1])
def test_the_picture_of_training_shows_the_kept_step(tmp_path, figures, best_step):
    plot_training(TRAINING, best_step, tmp_path / "p.png")
    kept = figures[-1].axes[0].lines[1]
    assert kept.get_label() == f"kept: step {best_step}"
    assert set(kept.get_xdata()) == {best_step}


def test_the_picture_of_several_runs_has_their_means_in_its_panels(tmp_path, figures):
    other = [dev_record(0, 0.9, 0.4, 0.7), dev_record(1, 0.75, 0.7, 0.4)]
    plot_learning({"a": [TRAINING, other]}, tmp_path / "p.png")
    accuracy, excess, ranking = figures[-1].axes
    assert [panel.get_title() for panel in figures[-1].axes] == [
        "held-out: right answers, one sample, %",
        "held-out: V minus truth, worst agent",
        "held-out: AUC of V, mean of agents",
    ]
    assert lines_of(accuracy)[2] == [(0, 40), (10, 60)]
    assert lines_of(excess)[2] == [(0, 0.5), (10, pytest.approx(0.25))]
    assert lines_of(ranking)[2] == [(0, 0.7), (10, 0.5)]


def test_the_table_of_training_tells_v_from_the_truth():
    before, kept = [line.split() for line in training_table(TRAINING, 1).splitlines()[1:3]]
    assert before[-6:] == ["Planner", "0.900", "0.400", "0.700", "9.0", "0.0%"]
    assert kept[-6:] == ["Planner", "0.950", "0.500", "0.600", "9.0", "0.0%"]


def test_groups_of_runs_have_colours_of_their_own(tmp_path, figures):
    plot_learning({"a": [TRAINING], "b": [TRAINING]}, tmp_path / "p.png")
    accuracy, _, _ = figures[-1].axes
    colours = {line.get_label(): line.get_color() for line in accuracy.lines}
    assert len(colours) == len(set(colours.values())) == 2


def test_the_table_of_training_goes_on_after_the_kept_step():
    """There one sees whether it broke. Shares are percent."""
    records = [*TRAINING, dev_record(2, 0.9, 0.1, 0.5)]
    records[2]["dev"]["agents"]["Planner"]["truncated"] = 0.25
    header, *rows = training_table(records, 1).splitlines()
    names = ["held-out", "accuracy", "agent", "mean", "V", "right", "AUC", "of", "V", "tokens"]
    assert header.split() == [*names, "cut"]
    starts = [row.partition("%")[0].split() for row in rows[:3]]
    assert starts == [
        ["before,", "step", "0", "40.0"],
        ["kept,", "step", "1", "50.0"],
        ["at", "the", "end,", "step", "2", "10.0"],
    ]
    assert rows[2].split()[-1] == "25.0%"


def test_the_line_of_a_step_shows_shares_in_percent():
    line = training_line(TRAINING[1] | {"cut": 3, "without_reward": 0})
    assert "KL 0.1250, clipped 6.2 %" in line and "3 messages cut" in line


def test_an_agent_that_never_spoke_has_no_mean():
    root = {"parent": None, "N": 1, "W": 1.0}
    table = labels_table([{"nodes": [root]}], ["Refiner"])
    assert table.rows == [["Refiner", "0", "0", "-", "-", "0"]]
