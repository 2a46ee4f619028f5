"""Tests of the report of a run (report.py): planted records, read back from the page."""

import html
import json
import math
import re
from urllib.parse import unquote

import pytest
from conftest import dom_of

import evaluate
from mas import CHAIN
from report import __main__ as report
from report.pictures import plot_epochs, plot_reliability, plot_targets
from search import parse_method
from support.flags import InputError

# ---- A run folder --------------------------------------------------------------------------------

AGENTS = [{"name": agent.name, "sees": list(agent.sees)} for agent in CHAIN.agents]
CONFIG = {
    "settings": {
        "graph": {"name": "chain", "agents": AGENTS},
        "c_uct": 1.0,
        "num_candidates": [2, 1, 1, 1],
        "loss": "huber",
        "huber_delta": 1.0,
        "target": "search",
        "label_weights": "equal",
    },
    "command": "python <script>.py",
    "commit": "0123456789abcdef-dirty",
    "started": "2026-01-01 00:00:00",
    "device": "cpu",
}
METRICS = {"n": 3, "rmse": 0.5, "rmse_of_mean": 0.9, "ece": 0.1, "auc": 0.75, "auc_95": [0.7, 0.8]}
METRICS |= {"auc_problems": 3, "top1": None, "chance": None}
MCTS = "mcts-2x1.2.1.1-value"


def path_of_nodes(start, answers):
    """Return the nodes of a path of four messages for each (V, ORM, answer, correct)."""
    nodes = []
    for value, outcome, answer, correct in answers:
        for depth, agent in enumerate(CHAIN.agents):
            parent = 0 if depth == 0 else start + len(nodes) - 1
            node = {"parent": parent, "agent": agent.name, "message": "<b>", "tokens": 3}
            node |= {"logprob": -1.0, "truncated": False, "N": 1, "W": value, "V": value}
            nodes.append(node)
        nodes[-1] |= {"reward": value, "answer": answer, "rung": "told"}
        if correct is not None:
            nodes[-1]["correct"] = correct
        if outcome is not None:
            nodes[-1]["outcome"] = outcome
    return nodes


def search_of(problem_id, *answers, chosen=0):
    """A record of a search. answers: (V, ORM, answer, whether it is right) of each final state."""
    nodes = [{"parent": None, "N": 2, "W": 0.0}, *path_of_nodes(1, answers)]
    simulations = [[4 * number + 4] for number in range(len(answers))]
    tree = {"nodes": nodes, "simulations": simulations, "chosen": simulations[chosen][0]}
    value, _, answer, correct = answers[chosen]
    transcript = [
        {"agent": agent.name, "message": "<b>", "V": value if agent.name != "Reader" else None}
        for agent in CHAIN.agents
    ]
    return record_of(problem_id, answer, bool(correct)) | {"tree": tree, "transcript": transcript}


def record_of(problem_id, answer, correct):
    record = {"id": problem_id, "question": "q", "gold": "4", "answer": answer, "correct": correct}
    record |= {"subject": "sums" if problem_id < "p3" else "<products>", "level": "1"}
    record |= {"rung": "told", "agent_calls": 4, "truncated": {}, "tree": None, "transcript": []}
    return record | dict.fromkeys(
        ("prompt_tokens", "generated_tokens", "scored_tokens", "seconds"), 10
    )


def write(path, lines, config=CONFIG):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path.parent / "config.json").write_text(json.dumps(config))


def write_evaluation(folder, records):
    methods = [parse_method(name, CHAIN, num_candidates=None, lam=0.0) for name in records]
    for name, records_of_method in records.items():
        write(folder / f"{name}.jsonl", records_of_method)
    summary = evaluate.summarise(methods, records)
    (folder / "summary.json").write_text(json.dumps(summary))


RIGHT_AND_WRONG = ((0.9, None, "5", False), (-0.5, None, "4", True))


def make_run(run):
    """All stages: on p2 the search prefers a wrong answer, on p3 a vote is right and it is not."""
    labels = {"id": "p1", "nodes": [{"parent": None, "N": 2, "W": 0.0}]}
    labels["nodes"] += path_of_nodes(1, [(1.0, None, "4", True), (-1.0, None, "5", False)])
    write(run / "rollouts" / "trees.jsonl", [labels])

    epoch = {"epoch": 0, "train_loss": 0.1, "heldout": {"Planner": METRICS}}
    finished = CONFIG | {"finished": True, "best_step": 0}
    last = {"epoch": 1, "train_loss": 0.2, "heldout": {"Planner": METRICS | {"rmse": 0.4}}}
    heldout = []
    # V and label after each message: of two facts, the second has two plans.
    for node, parent, agent, value, label in (
        (1, 0, "Reader", 0.6, -1.0),
        (2, 0, "Reader", 0.5, 0.5),
        (3, 2, "Planner", 0.9, 1.0),
        (4, 2, "Planner", -0.9, -1.0),
        (5, 1, "Planner", -0.5, -1.0),
    ):
        line = {"id": "p9", "node": node, "parent": parent, "agent": agent, "N": 1}
        heldout.append(line | {"y": label, "V": value})
    outcome = finished | {"settings": CONFIG["settings"] | {"target": "outcome"}}
    for stage, config in (("value", finished), ("orm", outcome)):
        write(run / stage / "metrics.jsonl", [epoch, last], config)
        lines = "".join(json.dumps(line) + "\n" for line in heldout)
        (run / stage / "heldout.jsonl").write_text(lines)

    records = {
        "greedy": [record_of(name, "4", name == "p1") for name in ("p1", "p2", "p3")],
        "vote-4": [record_of(name, "4", name == "p3") for name in ("p1", "p2", "p3")],
        MCTS: [
            search_of("p1", (0.9, None, "4", True)),
            search_of("p2", *RIGHT_AND_WRONG),
            search_of("p3", (0.7, None, "5", False)),
        ],
    }
    write_evaluation(run / "eval", records)

    agent = {"value": 0.9, "right": 0.5, "value_auc": 0.7, "tokens": 9.0}
    dev = {"accuracy": 0.5, "agents": {"Planner": agent}}
    steps = [{"step": 0, "messages": 0, "dev": dev}]
    steps.append(steps[0] | {"step": 1, "reward": {}, "kl": 0.0, "clip_share": 0.0})
    write(run / "agents" / "metrics.jsonl", steps, finished | {"best_step": 1})
    return run


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A run and its page, with its pictures."""
    run = make_run(tmp_path_factory.mktemp("runs") / "night")
    return run, report.run_page(run)


@pytest.fixture
def whole_run(tmp_path, monkeypatch):
    """A run whose report has no pictures, which take seconds."""
    monkeypatch.setattr(report, "picture", lambda name, *_, **__: report.Picture(name, "data:,"))
    return make_run(tmp_path / "night")


def page_of(run):
    return report.run_page(run)


def rows_of(page, first_header):
    """Return the cells of the table whose first header is this."""
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        header = re.findall(r"<th>(.*?)</th>", table)
        if header[0] == first_header:
            rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
            return [re.findall(r"<td.*?>(.*?)</td>", row, re.DOTALL) for row in rows]
    raise AssertionError(f"no table of {first_header}")


# ---- The page ------------------------------------------------------------------------------------


def test_the_report_shows_every_stage(drawn):
    _, page = drawn
    titles = re.findall(r'<h2 id="part-\d+">(.*?)</h2>', page)
    assert titles == ["Labels", "V", "ORM", "Answers", "Finetuned agents", "Instructive problems"]
    assert "Run night" in page and "Not in this run" not in page
    assert rows_of(page, "agent")[1][:3] == ["Planner", "2", "2"]
    assert rows_of(page, "held-out")[0][:3] == ["Planner", "3", "0.400"]  # the last epoch
    assert len(rows_of(page, "method (agent calls)")) == 3
    assert [row[0] for row in rows_of(page, "method")] == ["greedy", "vote-4", MCTS]
    assert len(re.findall("<figure>", page)) == 1 + 2 + 2 + 2 + 1


def test_the_report_is_one_file(drawn):
    """Its pictures are inside. Its links lead to its own parts, and to pages of this run."""
    run, page = drawn
    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 8
    assert len(set(sources)) == 6  # V and ORM have the same records here
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "<link" not in page and "<script" not in page and "http" not in page
    for target in re.findall(r'href="(.*?)"', page):
        if not target.startswith("#part-"):
            assert (run / html.unescape(target)).is_file()


def test_records_cannot_become_html(drawn):
    _, page = drawn
    assert "python &lt;script&gt;.py, commit 0123456-dirty" in page
    assert "&lt;products&gt;" in page and "<products>" not in page


def test_what_is_triggered_is_shown_first_with_its_number(drawn):
    """V thinks that the Planner is right in 90 %, and it is in 50 %."""
    _, page = drawn
    [flag] = re.findall(r'<div class="flag">(.*?)</div>', page, re.DOTALL)
    assert "<strong>V thinks better of the agents than they are</strong> (Finetuned agents)" in flag
    assert "right answers, worst agent: 0.400, should be at most 0.1" in flag
    assert "10 are not triggered, 2 could not be measured" in page
    assert "is triggered." not in page


def test_a_healthy_run_says_so(whole_run):
    (whole_run / "agents" / "metrics.jsonl").unlink()
    (whole_run / "agents" / "config.json").unlink()
    (whole_run / "agents").rmdir()
    page = page_of(whole_run)
    assert "None of the 10 that could be measured is triggered." in page
    assert '<div class="flag">' not in page and "Not in this run: agents." in page


def test_accuracy_is_broken_down_where_there_is_more_than_one_group(drawn):
    _, page = drawn
    assert rows_of(page, "subject") == [
        ["&lt;products&gt;", "1", "0.0", "100.0", "0.0"],
        ["sums", "2", "50.0", "0.0", "50.0"],
    ]
    with pytest.raises(AssertionError, match="no table of level"):
        rows_of(page, "level")


def test_lost_answers_are_counted_per_agent(drawn):
    """Node 4: its plan falls by 1.4 from the facts, 1.8 below the other plan; labels: 1.5 and 2.

    Node 5: its plan falls by 1.1 and has no siblings. By the labels, its facts fall by 1.5.
    """
    _, page = drawn
    header = re.findall(r"<th>(.*?)</th>", page.split("<th>lost by</th>")[1])[:4]
    assert header[:2] == ["by V, below state before", "by V, below siblings"]
    assert header[2:] == ["by labels, below state before", "by labels, below siblings"]
    assert rows_of(page, "lost by") == [
        ["Reader", "0", "0", "1", "1"],
        ["Planner", "2", "1", "1", "1"],
        ["Solver", "0", "0", "0", "0"],
        ["Verifier", "0", "0", "0", "0"],
        ["nobody", "0", "1", "0", "0"],
    ]
    assert page.count("<th>lost by</th>") == 1  # not for the ORM


@pytest.mark.parametrize("width", [500, 1200])
def test_the_page_is_never_wider_than_the_window(drawn, tmp_path, width):
    """Wide tables and pictures scroll on their own. 500 is the narrowest window of Chromium."""
    _, page = drawn
    measure = "document.documentElement.scrollWidth + ' of ' + document.documentElement.clientWidth"
    page += f"<script>document.title = {measure}</script>"
    [title] = re.findall("<title>(.*?)</title>", dom_of(page, tmp_path, width=width))
    scroll_width, client_width = map(int, title.split(" of "))
    assert scroll_width <= client_width <= width


# ---- Instructive problems ------------------------------------------------------------------------


def test_instructive_problems_are_linked_with_the_values_of_their_messages(drawn):
    run, page = drawn
    names = ["problem", "method", "what happened", "answer", "gold", "V from message to message"]
    assert "".join(f"<th>{name}</th>" for name in names) in page
    first, second = rows_of(page, "problem")
    link = f'<a href="pages/p2-{MCTS}.html">p2</a>'
    values = "Planner +0.90, Solver +0.90, Verifier +0.90"
    why = "V prefers a wrong answer (+0.90) to a right one (-0.50)"
    assert first == [link, MCTS, why, "5", "4", values]
    assert second[2] == "vote-4 is right; V of the search&#39;s wrong answer is +0.70"
    tree_page = (run / "pages" / f"p2-{MCTS}.html").read_text()
    assert f"p2, {MCTS}" in tree_page and "it answers 5" in tree_page


def missed(problem_id, wrong, right):
    """A search that preferred a wrong answer with one V to a right answer with another."""
    return search_of(problem_id, (wrong, None, "5", False), (right, None, "4", True))


def chosen(records):
    return [(each.record["id"], each.method) for each in report.choose_instances(records)]


def test_the_strongest_of_each_kind_come_first_and_each_problem_once():
    """Three kinds in turn: missed right answers, V against the ORM, votes that are right."""
    mixed = "mcts-2x1.2.1.1-value-lam0.5"
    records = {
        "vote-4": [record_of("p1", "4", True), record_of("p2", "4", True)],
        MCTS: [
            missed("p1", 0.5, 0.4),
            missed("p2", 0.9, -0.9),
            search_of("p3", (0.1, None, "4", True)),
        ],
        mixed: [
            search_of("p1", (0.1, 0.0, "4", True)),
            search_of("p2", (0.9, -0.9, "4", True)),
            search_of("p3", (0.5, -0.5, "4", True)),
        ],
    }
    # Missed: p2, then p1. Disagreements: p2, p3, p1. Votes: p2, p1.
    assert chosen(records) == [("p2", MCTS), ("p3", mixed), ("p1", MCTS)]


def test_there_are_at_most_ten():
    records = {MCTS: [missed(f"p{number}", number / 20, -0.5) for number in range(12)]}
    assert [name for name, _ in chosen(records)] == [f"p{number}" for number in range(11, 1, -1)]


def test_what_happened_is_said_of_the_strongest_state():
    """Of two right answers the one that V likes more; where V and ORM differ most; the surest."""
    two_right = search_of(
        "p1", (0.25, None, "5", False), (0.5, None, "4", True), (-0.5, None, "4", True)
    )
    [instance] = report.missed_answers({MCTS: [two_right]})
    assert instance.why == "V of the wrong answer is +0.25, of a right one +0.50"
    assert instance.strength == -0.25
    mixed = search_of("p1", (0.5, 0.25, "4", True), (0.75, -0.5, "5", False))
    [instance] = report.disagreements({"mcts-2x1.2.1.1-value-lam0.5": [mixed]})
    assert instance.why == "V +0.75, ORM -0.50 of a wrong answer"
    assert instance.strength == 1.25
    [instance] = report.lost_to_vote(
        {"vote-4": [record_of("p1", "4", True)], MCTS: [search_of("p1", (0.5, None, "5", False))]}
    )
    assert instance.strength == 0.5


def test_levels_are_sorted_as_numbers():
    levels = ("10", "2", "word")
    records = [record_of(level, "4", True) | {"level": level} for level in levels]
    table = report.breakdown_table({"greedy": records}, "level")
    assert [row[0] for row in table.rows] == ["2", "10", "word"]


@pytest.mark.parametrize(
    "method, record",
    [
        (MCTS, search_of("p", (0.9, None, "4", True), (0.1, None, "5", False))),  # it is right
        (MCTS, search_of("p", (0.9, None, "5", False), (0.1, None, "6", False))),  # nothing to miss
        ("mcts-2x1.2.1.1-policy", missed("p", 0.9, 0.1)),  # not by V
        (MCTS, search_of("p", (0.9, None, "5", None), (0.1, None, "4", None))),  # of an old version
        (MCTS, record_of("p", "5", False)),  # its tree was not kept
    ],
)
def test_what_teaches_nothing_is_left_out(method, record):
    assert chosen({method: [record]}) == []


# ---- Runs that lack something --------------------------------------------------------------------


def test_a_run_with_labels_only(whole_run):
    for stage in ("value", "orm", "eval", "agents"):
        for path in (whole_run / stage).iterdir():
            path.unlink()
        (whole_run / stage).rmdir()
    page = page_of(whole_run)
    assert "Not in this run: value, orm, eval, agents." in page
    assert "Instructive problems" not in page


def test_a_run_of_the_version_before_says_what_is_missing(whole_run):
    for stage in ("value", "orm"):
        (whole_run / stage / "heldout.jsonl").unlink()
    summary = json.loads((whole_run / "eval" / "summary.json").read_text())
    del summary["problems"]
    (whole_run / "eval" / "summary.json").write_text(json.dumps(summary))
    page = page_of(whole_run)
    assert len(rows_of(page, "problem")) == 2
    assert "train_value.py of that version kept no held-out values" in page
    assert "lost by" not in page
    assert rows_of(page, "held-out")[0][0] == "Planner"


@pytest.mark.parametrize("stage, text", [("value", "Its"), ("agents", "Their")])
def test_a_training_that_is_not_finished_is_named(whole_run, stage, text):
    (whole_run / stage / "config.json").write_text(json.dumps(CONFIG))
    assert f"{text} training is not finished." in page_of(whole_run)


def test_an_evaluation_that_is_not_finished_is_named(whole_run):
    (whole_run / "eval" / "summary.json").unlink()
    page = page_of(whole_run)
    assert "The evaluation is not finished: no summary.json." in page
    assert "The evaluation is not finished." in page


def test_more_records_than_the_last_command_asked_for(whole_run):
    """The summary is of p2 and p3; another method and p1 are of earlier commands."""
    path = whole_run / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    summary["problems"] = ["p2", "p3"]
    del summary["methods"]["vote-4"]
    path.write_text(json.dumps(summary))
    page = page_of(whole_run)
    assert [row[0] for row in rows_of(page, "method")] == ["greedy", MCTS]
    assert rows_of(page, "subject") == [
        ["&lt;products&gt;", "1", "0.0", "0.0"],
        ["sums", "1", "0.0", "0.0"],
    ]
    assert [row[2] for row in rows_of(page, "problem")] == [
        "V prefers a wrong answer (+0.90) to a right one (-0.50)"
    ]


def test_a_kill_between_the_files_of_an_epoch(whole_run):
    (whole_run / "value" / "metrics.jsonl").unlink()
    page = page_of(whole_run)
    assert "lost by" not in page


def test_without_trees_no_problem_is_instructive(whole_run):
    records = [record_of(name, "4", False) for name in ("p1", "p2", "p3")]
    write(whole_run / "eval" / f"{MCTS}.jsonl", records)
    assert "No search guided by V has kept its trees" in page_of(whole_run)


def test_a_run_without_a_mistake_has_no_instructive_problem(whole_run):
    records = [search_of(name, (0.9, None, "4", True)) for name in ("p1", "p2", "p3")]
    write(whole_run / "eval" / f"{MCTS}.jsonl", records)
    assert "None: no search by V missed a right answer." in page_of(whole_run)


def test_a_page_is_found_whatever_its_id(whole_run):
    """An id is the user's: no folder and no part of an address may be made from it."""
    strange = "/etc/../a #1?50%"
    summary = json.loads((whole_run / "eval" / "summary.json").read_text())
    summary["problems"] = [strange]
    (whole_run / "eval" / "summary.json").write_text(json.dumps(summary))
    for method in summary["methods"]:
        record = search_of(strange, *RIGHT_AND_WRONG)
        write(whole_run / "eval" / f"{method}.jsonl", [record])
    [[link, *_]] = rows_of(page_of(whole_run), "problem")
    [target] = re.findall('href="(.*?)"', link)
    [page] = (whole_run / "pages").iterdir()
    assert unquote(html.unescape(target)) == f"pages/{page.name}"


def test_a_folder_without_any_stage_is_named(tmp_path):
    with pytest.raises(InputError, match="none of rollouts, value, orm, eval, agents is in it"):
        page_of(tmp_path)


# ---- The script ----------------------------------------------------------------------------------


def call(*argv):
    report.main(report.parse_args([str(argument) for argument in argv]))


def test_the_report_lies_in_the_run_and_is_named_last(whole_run, capsys):
    call(whole_run)
    assert (whole_run / "report.html").read_text() == page_of(whole_run)
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"{whole_run / 'report.html'} (")
    call(whole_run, "--output", whole_run / "other.html")
    assert (whole_run / "other.html").is_file()


def test_wrong_arguments_are_named(whole_run, tmp_path):
    with pytest.raises(InputError, match="give RUN for its report, or tree RUN ID"):
        call(whole_run, "p1")
    with pytest.raises(InputError, match="give RUN for its report, or tree RUN ID"):
        call("leaf", whole_run, "p1")
    with pytest.raises(InputError, match="--method is for a tree"):
        call(whole_run, "--method", MCTS)
    with pytest.raises(InputError, match="a report has to lie in"):
        call(whole_run, "--output", tmp_path / "report.html")


# ---- The pictures --------------------------------------------------------------------------------


@pytest.fixture
def panels_of(tmp_path, figures):
    """Return a function that draws a picture and returns the panels of its figure."""

    def draw(plot, records):
        plot(records, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 0
        return figures[-1].axes

    return draw


def test_reliability_shows_the_means_of_each_bin(panels_of):
    """V of 0.90 and 0.94 are in one bin, 1 in the same one; -1 is alone."""
    values_and_labels = [(0.9, 1.0), (0.94, 0.0), (1.0, -1.0), (-1.0, -0.5)]
    edges = [{"V": value, "y": label} for value, label in values_and_labels]
    [planner, solver] = panels_of(plot_reliability, {"Planner": edges, "Solver": edges[3:]})
    [points] = planner.collections
    assert points.get_offsets().tolist() == [[pytest.approx(2.84 / 3), 0.0], [-1.0, -0.5]]
    assert points.get_sizes().tolist() == [20 + 300, 20 + 100]
    assert planner.get_title() == "Planner, 4 states" and solver.get_title() == "Solver, 1 states"


def test_targets_are_shown_as_shares(panels_of):
    [reader] = panels_of(plot_targets, {"Reader": [1.0, 1.0, -1.0, 0.04]})
    heights = [patch.get_height() for patch in reader.patches]
    assert heights == [0.25, *[0] * 9, 0.25, *[0] * 8, 0.5]


def test_more_than_four_agents_take_several_rows(panels_of):
    panels = panels_of(plot_targets, {f"agent {number}": [0.0] for number in range(6)})
    assert [panel.get_title() for panel in panels] == [f"agent {n}, 1 labels" for n in range(6)]


def test_epochs_show_loss_error_and_ranking(panels_of):
    epochs = []
    for epoch, (loss, rmse, auc) in enumerate([(0.5, 0.9, None), (0.25, 0.6, 0.75)]):
        heldout = {"Planner": {"rmse": rmse, "auc": auc}}
        epochs.append({"epoch": epoch, "train_loss": loss, "heldout": heldout})
    loss, error, ranking = panels_of(plot_epochs, epochs)
    assert loss.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.25]]
    assert error.lines[0].get_xydata().tolist() == [[1, 0.9], [2, 0.6]]
    assert ranking.lines[0].get_xydata().tolist() == [[2, 0.75]]


def test_a_v_that_diverged_has_a_picture_without_points(tmp_path, figures):
    edges = [{"V": math.nan, "y": 1.0}, {"V": 0.5, "y": 1.0}]
    plot_reliability({"Planner": edges}, tmp_path / "p.png")
    [panel] = figures[-1].axes
    assert panel.get_title() == "Planner, 2 states"
    assert panel.collections[0].get_offsets().tolist() == [[0.5, 1.0]]
