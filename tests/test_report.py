"""Tests of report.py: a recorded search is replayed, in Python and on its page."""

import html
import json
import math
import re

import pytest
from conftest import NoProgress, ScriptedPolicy, dom_of

import search
from generate_rollouts import label_tree
from mas import CHAIN
from report import __main__ as report
from search import mcts, path_to, sbs, search_tree
from support.flags import InputError
from support.records import read_jsonl
from support.runs import seeded
from tasks.problems import Problem
from tree import Cost, Sample, Score, run_searches, tree_fields, tree_record

PROBLEM = Problem("p", "test", "How many? </script><b>", gold="4", answer_type="number")
GRAPH = {
    "name": "chain",
    "agents": [{"name": agent.name, "sees": list(agent.sees)} for agent in CHAIN.agents],
}
SETTINGS = {"graph": GRAPH, "c_uct": 0.8}


def say(path):
    """The Verifier's answer depends on the Planner's candidate; every message is distinct."""
    if len(path) == 4:
        return f"Final answer: {3 + path[1] % 3}"
    return f"<i>message</i> {'.'.join(map(str, path))}"


def score_by_path(requests):
    """A value that depends on the path, so that Eq. 2 has something to compare."""
    replies = []
    for _, request in requests:
        values = []
        for node in request.nodes:
            values.append(0.6 * seeded("value", node.path).random() - 0.3)
        replies.append((values, Cost()))
    return replies


@pytest.fixture(scope="module")
def searched():
    """The record of an MCTS that was guided by random values, as an evaluation keeps it."""
    search = mcts(
        PROBLEM.question, CHAIN, num_simulations=20, num_candidates=(2, 3, 1, 2), c_uct=0.8, lam=0.0
    )
    handlers = {Score: score_by_path, Sample: ScriptedPolicy(say)}
    [(_, leaf, _)] = run_searches(
        [(PROBLEM, search)], handlers, max_active=1, progress=NoProgress()
    )
    root = path_to(leaf)[0].parent
    record = {"id": "p", "question": PROBLEM.question, "gold": "4"}
    return json.loads(json.dumps(record | search_tree(leaf, "number"))), root, leaf


@pytest.fixture(scope="module")
def labelled():
    """A line of trees.jsonl."""
    tree = label_tree(
        PROBLEM,
        CHAIN,
        num_simulations=20,
        num_candidates=(2, 3, 1, 2),
        c_uct=0.8,
        rng=seeded("labels"),
    )
    handlers = {Sample: ScriptedPolicy(say)}
    [(_, root, cost)] = run_searches(
        [(PROBLEM, tree)], handlers, max_active=1, progress=NoProgress()
    )
    return json.loads(json.dumps(tree_record(PROBLEM, root, cost)))


# ---- The replay ----------------------------------------------------------------------------------


def replay(record: dict, *, c_uct: float, virtual: bool) -> list[dict]:
    """Replay a search: what Eq. 2 compared at each step of each simulation, and what was taken.

    Returns per selection: simulation, node, `rows` with (child, N, Q, bound), taken (the child that
    the simulation went to), and whether it was picked by chance, as new candidates of a labelled
    tree are.

    Args:
        virtual: new children start with a virtual visit, N = 1 and W = V (searches).
    """
    nodes = record["nodes"]
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        if node["parent"] is not None:
            children[node["parent"]].append(index)
    visits, totals = [0] * len(nodes), [0.0] * len(nodes)
    expanded = set()
    found = []
    for simulation, leaves in enumerate(record["simulations"]):
        path = path_in_record(nodes, leaves[-1])
        for node, taken in zip(path, path[1:], strict=False):
            is_new = node not in expanded
            if is_new and virtual:
                for child in children[node]:
                    visits[child], totals[child] = 1, nodes[child]["V"]
            expanded.add(node)
            log_sum = math.log(1 + sum(visits[child] for child in children[node]))
            rows = []
            for child in children[node]:
                num = visits[child]
                mean = totals[child] / num if num else 0.0
                rows.append((child, num, mean, mean + c_uct * math.sqrt(log_sum / (1 + num))))
            chance = is_new and not virtual
            selection = {"simulation": simulation, "node": node, "rows": rows, "taken": taken}
            found.append(selection | {"chance": chance})
        for leaf in leaves:
            for node in path_in_record(nodes, leaf):
                visits[node] += 1
                totals[node] += nodes[leaf]["reward"]
    return found


def path_in_record(nodes: list[dict], index: int) -> list[int]:
    """Return the nodes from the root to a node."""
    path = [index]
    while nodes[path[-1]]["parent"] is not None:
        path.append(nodes[path[-1]]["parent"])
    return path[::-1]


def choice_by_equation_2(selection, c):
    """Eq. 2 from N and Q alone; the first of equal ones."""
    total = sum(N for _, N, _, _ in selection["rows"])
    bounds = []
    for _, N, Q, _ in selection["rows"]:
        bounds.append(Q + c * math.sqrt(math.log(1 + total) / (1 + N)))
    return selection["rows"][bounds.index(max(bounds))][0]


def test_equation_2_takes_what_the_search_took_at_every_selection(searched):
    record, _, _ = searched
    selections = replay(record, c_uct=0.8, virtual=True)
    assert len(selections) == 20 * 4
    for selection in selections:
        assert not selection["chance"]
        assert choice_by_equation_2(selection, 0.8) == selection["taken"]
    taken = {(selection["node"], selection["taken"]) for selection in selections}
    assert len(taken) > 10  # the search has looked around


def test_equation_2_takes_what_the_labelling_took_but_among_new_candidates(labelled):
    """Those are picked by chance, and the siblings of a terminal state count at once."""
    selections = replay(labelled, c_uct=0.8, virtual=False)
    by_chance = [selection for selection in selections if selection["chance"]]
    by_equation = [selection for selection in selections if not selection["chance"]]
    for selection in by_equation:
        assert choice_by_equation_2(selection, 0.8) == selection["taken"]
    expanded = {node["parent"] for node in labelled["nodes"]} - {None}
    assert len(by_chance) == len(expanded)
    assert len(by_equation) > 20
    for selection in by_chance:
        assert {N for _, N, _, _ in selection["rows"]} == {0}


def test_the_replay_ends_with_the_statistics_of_the_search(searched):
    """After the last simulation, N and W are those that the search has left."""
    record, root, leaf = searched
    nodes = record["nodes"]
    last = {}
    for selection in replay(record, c_uct=0.8, virtual=True):
        for child, N, Q, _ in selection["rows"]:
            last[child] = (N, N * Q, selection["simulation"])
    # The numbers were shown before a simulation; it adds one visit to what it took.
    final = record["simulations"][-1]
    path = path_in_record(nodes, final[-1])
    for child, (N, W, simulation) in last.items():
        if simulation == len(record["simulations"]) - 1 and child in path:
            N, W = N + 1, W + nodes[final[-1]]["reward"]
            assert (N, pytest.approx(W)) == (nodes[child]["N"], nodes[child]["W"])
    chosen = nodes[record["chosen"]]
    assert chosen["message"] == leaf.message.text and chosen["answer"] is not None
    messages = [nodes[index]["message"] for index in path_in_record(nodes, record["chosen"])[1:]]
    assert messages == [node.message.text for node in path_to(leaf)]
    assert nodes[0]["N"] == root.N == 20


def test_labels_are_the_same_with_and_without_the_order_of_simulations(labelled):
    leaves = [index for of_one in labelled["simulations"] for index in of_one]
    visits = [0] * len(labelled["nodes"])
    for leaf in leaves:
        for index in path_in_record(labelled["nodes"], leaf):
            visits[index] += 1
    assert visits == [node["N"] for node in labelled["nodes"]]


def test_beams_have_answers_at_their_final_states_only():
    """Four agents: two beams of two candidates; V is the value of a final answer."""
    search = sbs(PROBLEM.question, CHAIN, beam_width=2, num_candidates=(2, 2, 2, 2))
    handlers = {Score: score_by_path, Sample: ScriptedPolicy(say)}
    [(_, leaf, _)] = run_searches(
        [(PROBLEM, search)], handlers, max_active=1, progress=NoProgress()
    )
    tree = search_tree(leaf, "number")
    finals = [node for node in tree["nodes"][1:] if node["agent"] == "Verifier"]
    assert len(finals) == 2  # the same answer of both candidates is one
    assert all(node["reward"] == node["V"] and "answer" in node for node in finals)
    assert all("answer" not in node for node in tree["nodes"] if node not in finals)
    answer = tree["nodes"][tree["chosen"]]["answer"]
    record = {"id": "p", "question": PROBLEM.question, "gold": "4"} | tree
    assert f"it answers {answer}" in report.tree_page(record, SETTINGS, "sbs-2x2-value")


def test_a_search_without_a_tree_has_none(searched):
    _, root, leaf = searched
    assert tree_fields(root, "number")["simulations"] == searched[0]["simulations"]
    root.children, children = None, root.children
    assert search_tree(leaf, "number") is None
    root.children = children


# ---- The page ------------------------------------------------------------------------------------


def data_of(page: str) -> dict:
    """Return what the page's script reads."""
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    return json.loads(text)


def test_a_message_cannot_become_html(searched):
    page = report.tree_page(searched[0], SETTINGS, "mcts-20x2.3.1.2-value")
    assert "</script><b>" not in page and "<i>message" not in page
    assert data_of(page)["question"] == PROBLEM.question
    assert page.count("</script>") == 2


def test_the_page_says_what_the_tree_is(searched, labelled):
    page = report.tree_page(searched[0], SETTINGS, "mcts-20x2.3.1.2-policy")
    num = len(searched[0]["nodes"]) - 1
    assert f"{num} messages, 20 simulations; it answers" in page
    assert data_of(page)["scorer"] == "likelihood" and data_of(page)["virtual"] is True
    assert "the policy’s likelihood" in page or "the policy&#39;s likelihood" in page
    assert data_of(page)["sees"]["Solver"] == ["Planner"]
    page = report.tree_page(labelled, SETTINGS, None)
    assert "final answers are right" in page
    assert data_of(page)["virtual"] is False and data_of(page)["chosen"] is None


@pytest.mark.parametrize(
    "method, name",
    [
        (None, "V"),
        ("mcts-8x3-value", "V"),
        ("mcts-8x3-value-lam0.5", "V"),
        ("sbs-2x1-outcome", "ORM"),
        ("mcts-8x3-random", "random"),
        ("sbs-2x1-policy", "likelihood"),
    ],
)
def test_the_scores_of_a_search_have_their_name(method, name):
    assert report.scorer_name(method) == name


def test_a_tree_of_the_version_before_has_no_slider(labelled):
    before = {name: value for name, value in labelled.items() if name != "simulations"}
    page = report.tree_page(before, SETTINGS, None)
    assert data_of(page)["simulations"] == []
    assert 'id="time"' not in page and 'id="selections"' not in page


@pytest.mark.parametrize("kind", ["searched", "labelled"])
def test_the_numbers_on_the_page_are_those_of_the_replay(kind, request, tmp_path):
    """Every selection of the search, computed by the page's script in a real browser."""
    record = request.getfixturevalue(kind)
    record, method = (record[0], "mcts-20x3-value") if kind == "searched" else (record, None)
    dom = dom_of(report.tree_page(record, SETTINGS, method), tmp_path, "#after=3&node=1")
    shown = [json.loads(html.unescape(text)) for text in re.findall('data-selection="(.*?)"', dom)]
    expected = replay(record, c_uct=0.8, virtual=kind == "searched")
    assert len(shown) == len(expected)
    for on_page, selection in zip(shown, expected, strict=True):
        for name in ("simulation", "node", "taken", "chance"):
            assert on_page[name] == selection[name]
        for row, (child, N, Q, bound) in zip(on_page["rows"], selection["rows"], strict=True):
            assert (row["child"], row["N"]) == (child, N)
            assert (row["Q"], row["bound"]) == pytest.approx((Q, bound))
    assert "after 3 of 20 simulations" in dom
    assert "What the Reader saw" in dom and "Simulation 4 chooses here by Eq. 2" in dom


def test_the_summary_of_a_labelled_tree_counts_its_right_answers():
    nodes = [{"parent": None}, {"reward": 1.0}, {"reward": -1.0}, {"reward": -1.0}]
    record = {"nodes": nodes, "simulations": [[1], [2, 3]]}
    expected = "3 messages, 2 simulations; 1 of 3 final answers are right."
    assert report.tree_summary(record, None) == expected


# ---- The script ----------------------------------------------------------------------------------


@pytest.fixture
def finished_run(searched, labelled, tmp_path):
    record, _, _ = searched
    tree = {name: record[name] for name in ("nodes", "simulations", "chosen")}
    answer = {"id": "p", "question": record["question"], "gold": "4", "tree": tree}
    passes = answer | {"tree": None}
    for name, records in (
        ("rollouts/trees", [labelled]),
        ("eval/mcts-20x2.3.1.2-value", [answer]),
        ("eval/vote-4", [passes]),
    ):
        path = tmp_path / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(records[0]) + "\n")
        (path.parent / "config.json").write_text(json.dumps({"settings": SETTINGS}))
    return tmp_path


def call(*argv):
    report.main(report.parse_args([str(argument) for argument in argv]))


def test_pages_are_written_from_the_records(finished_run, capsys):
    call("tree", finished_run, "p")
    labels = finished_run / "pages" / "p-labels.html"
    assert f"{labels} (" in capsys.readouterr().out
    assert "labelled by search" in labels.read_text()
    call("tree", finished_run, "p", "--method", "mcts-20x2.3.1.2-value", "--output", labels)
    assert "p, mcts-20x2.3.1.2-value" in labels.read_text()


@pytest.mark.parametrize(
    "argv, message",
    [
        (["q"], "q: no such problem in .*rollouts; one of them is p"),
        (["p", "--method", "mcts"], "--method mcts: not in .*; it has mcts-20x2.3.1.2-value, vote"),
        (["p", "--method", "vote-4"], "p: vote-4 kept no tree of it; only sbs and mcts have trees"),
    ],
)
def test_what_cannot_be_shown_is_named(finished_run, argv, message):
    with pytest.raises(InputError, match=message):
        call("tree", finished_run, *argv)


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(InputError, match="no config.json here"):
        call("tree", tmp_path, "p")


def test_a_search_keeps_its_messages_and_its_page_says_its_c(tmp_path, capsys):
    """And it has the candidates of the flag: 2 + 2 + 2 + 2 messages, and at most one more."""
    flags = ["--run", tmp_path, "--method", "mcts-2-random", "--num-candidates", 2]
    flags += ["--c-uct", 0.25, "--html", tmp_path / "t.html", "--max-new-tokens", 128]
    flags += ["--device", "cpu", "--num-threads", 1]
    search.main(search.parse_args([str(flag) for flag in flags]))
    assert "mcts-2x2-random: " in capsys.readouterr().out
    [journal] = (tmp_path / "messages").glob("*.jsonl")
    assert len(read_jsonl(journal)) >= 8
    page = data_of((tmp_path / "t.html").read_text())
    assert (page["c_uct"], len(page["simulations"])) == (0.25, 2)
