"""Tests of report/: pages, tables, pictures and comparisons, from planted records.

The trees are golden ones: a search of stage 4, whose final states have another value than V, and a
labelled tree, in which siblings of a final state are graded.
"""

import html
import json
import math
import re
import shutil
import subprocess
from urllib.parse import unquote

import pytest

from experiments import compare
from experiments.compare import compare_runs, read_groups, write_curves
from report import pictures, tables
from report.__main__ import main, parse_args, tree_page
from support.flags import ROOT, InputError

SEES = {"Reader": ["Q"], "Planner": ["Q", "Reader"], "Solver": ["Planner"], "Verifier": ["Q"]}
AGENTS = [{"name": name, "sees": sees} for name, sees in SEES.items()]
SETTINGS = {"graph": {"agents": AGENTS}, "c_uct": 1.0, "target": "search", "loss": "huber"}
SETTINGS |= {"huber_delta": 1.0}
CONFIG = {"settings": SETTINGS, "finished": True, "best_step": 2, "command": "python <b>.py"}
CONFIG |= {"commit": "0123-dirty", "started": "2026-01-01", "device": "cpu"}


MCTS = {"name": "mcts-2x1-value", "algorithm": "mcts", "scorer": "value", "num": 2}
MCTS |= {"num_candidates": [2, 1, 1, 1], "lam": 0.0}
# Golden tree -> its method and c of Eq. 2
TREES = {"mcts-16x2.3.3.3-value-lam0.5": (MCTS, 1.5), "labels": (None, 1.0)}


def read(name):
    tree = json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())
    return {"id": "p-1", "question": "q", "gold": "1"} | tree


def write(path, lines, **changes):
    """Write records, and the config.json of their folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (path.parent / "config.json").write_text(json.dumps(CONFIG | changes))


def call(*argv):
    main(parse_args(list(map(str, argv))))


def rows_of(page, first_header):
    """Return the texts of the cells of the table whose first header is this."""
    for table in re.findall(r"<table>(.*?)</table>", page, re.DOTALL):
        if re.findall(r"<th>(.*?)</th>", table)[0] == first_header:
            rows = re.findall(r"<tr>(.*?)</tr>", table.split("<tbody>")[1], re.DOTALL)
            return [[html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", r)] for r in rows]


def path_to(nodes, index):
    path = [index]
    while nodes[path[0]]["parent"] is not None:
        path.insert(0, nodes[path[0]]["parent"])
    return path


def dom_of(page, tmp_path, fragment):
    """Return the document as a browser has built it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium or google-chrome on this machine")
    (tmp_path / "tree.html").write_text(page, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-sync", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{tmp_path}/tree.html{fragment}"]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("name", TREES)
def test_the_page_replays_a_search_by_eq_2_and_ends_with_its_statistics(name, tmp_path):
    """Computed by the page, in a browser. A wrong N or Q before would choose another child."""
    record, (method, c) = read(name), TREES[name]
    nodes = record["nodes"]
    paths = [path_to(nodes, leaves[-1]) for leaves in record["simulations"]]
    page = tree_page(record, SETTINGS | {"c_uct": c}, method)
    dom = dom_of(page, tmp_path, f"#after={len(paths)}&node={paths[-1][3]}")

    shown = [json.loads(html.unescape(text)) for text in re.findall('data-selection="(.*?)"', dom)]
    assert [selection["taken"] for selection in shown] == sum([path[1:] for path in paths], [])
    for selection in shown:
        rows = selection["rows"]
        num_visits = sum(row["N"] for row in rows)
        log_sum = math.log(1 + num_visits)
        bounds = [row["Q"] + c * math.sqrt(log_sum / (1 + row["N"])) for row in rows]
        assert [row["bound"] for row in rows] == pytest.approx(bounds)
        best = rows[bounds.index(max(bounds))]["child"]
        assert selection["chance"] == (num_visits == 0)
        assert selection["chance"] or selection["taken"] == best

    for text, node in zip(dom.split('<button class="node')[1:], nodes, strict=True):
        assert int(re.search(r">N (\d+)<", text)[1]) == node["N"]
        if node["N"] > 0:
            mean = re.search(r">Q ([−+][\d.]+)<", text)[1].replace("−", "-")
            assert float(mean) == pytest.approx(node["W"] / node["N"], abs=0.0051)
    quotes = re.findall(r'<blockquote class="text"><strong>(\w+): </strong>', dom)
    assert quotes == ["Planner", "Solver"]  # what the Solver saw, and what it said


HOSTILE = '</script><b>"&'


@pytest.mark.parametrize("name", TREES)
def test_texts_cannot_become_html_on_the_page_of_a_tree(name):
    record = read(name)
    record |= {"id": HOSTILE, "question": HOSTILE, "gold": HOSTILE}
    for node in record["nodes"][1:]:
        node["message"] = HOSTILE
        if "answer" in node:
            node["answer"] = HOSTILE
    method, _ = TREES[name]
    page = tree_page(record, SETTINGS, method and {"name": HOSTILE, "scorer": "orm"})
    assert "<b>" not in page and page.count("</script>") == 2
    [data] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert json.loads(data)["question"] == json.loads(data)["nodes"][1]["message"] == HOSTILE
    score = "ORM" if method else "V"
    assert f'chip("{score}", node.V)' in page and f"{score}: the" in page


# ---- The page of a run ---------------------------------------------------------------------------

MISSED = (-0.5, None, True)  # a final state: V, the ORM, and whether it is right


def search_of(problem_id, *finals):
    """The record of a search, which gives the first of its final answers."""
    nodes = [{"parent": None, "N": 1, "W": 0.0}]
    for value, orm, is_right in finals:
        node = {"parent": 0, "agent": "Verifier", "message": "m", "tokens": 1, "logprob": -1.0}
        node |= {"truncated": False, "N": 1, "W": value, "V": value, "value": value}
        node |= {"answer": "4" if is_right else "5", "correct": is_right}
        nodes.append(node | ({} if orm is None else {"orm": orm}))
    tree = {"nodes": nodes, "simulations": [[index] for index in range(1, len(nodes))]}
    record = {"id": problem_id, "question": "q", "gold": "4", "answer": nodes[1]["answer"]}
    record |= {"correct": finals[0][2], "method": MCTS, "agent_calls": 4, "truncated": {}}
    return record | {"tree": tree | {"chosen": 1}}


def write_evaluation(run, records):
    for name, of_method in records.items():
        write(run / "eval" / f"{name}.jsonl", of_method, finished=None)
    ids = [record["id"] for record in next(iter(records.values()))]
    summary = {"methods": dict.fromkeys(records, {}), "problems": ids}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    (run / "eval" / "table.md").write_text("| a |\n|---|\n| 1 |\n\nnote\n")


METRICS = {"n": 3, "rmse": 0.5, "rmse_of_mean": 0.9, "ece": 0.1, "auc": 0.75, "auc_95": [0.7, 0.8]}
METRICS |= {"top1": 0.6, "chance": None}


def training_of(*values_and_accuracies):
    """Lines of stage 5: at steps 0, 2, ... V of the Planner, and the share of right answers."""
    lines = []
    for index, (value, accuracy) in enumerate(values_and_accuracies):
        planner = {"value": value, "right": accuracy, "value_auc": None, "tokens": 9.0}
        reader = {"value": None, "right": 0.5, "value_auc": 0.5 + index / 8, "tokens": 4.0}
        agents = {"Reader": reader | {"truncated": 0.25}, "Planner": planner | {"truncated": 0.25}}
        line = {"step": 2 * index, "messages": 20 * index, "kl": index / 8, "clip_share": 0.125}
        line |= {"reward": {"Planner": index / 4}, "cut": 0, "without_reward": 1}
        lines.append(line | {"dev": {"accuracy": accuracy, "agents": agents}})
        lines.append(line | {"step": 2 * index + 1, "messages": 20 * index + 10})
    return lines[:-1]


def page_of(run):
    call(run)
    return (run / "report.html").read_text("utf-8")


def test_the_page_of_a_run_shows_every_stage_in_one_file(tmp_path):
    """Its pictures are inside, those that stages have drawn as well. Its links lead to this run."""
    write(tmp_path / "rollouts" / "trees.jsonl", [read("labels")], finished=None)
    heldout = {"agent": "Planner", "V": 0.5, "y": 1.0}
    for stage in ("value", "orm"):
        write(tmp_path / stage / "heldout.jsonl", [heldout, heldout | {"V": -0.5, "y": -1.0}])
        epoch = {"epoch": 0, "train_loss": 0.1, "heldout": {"Planner": METRICS}}
        last = {"epoch": 1, "train_loss": 0.1, "heldout": {"Planner": METRICS | {"rmse": 0.3}}}
        write(tmp_path / stage / "metrics.jsonl", [epoch, last])
    write_evaluation(tmp_path, {MCTS["name"]: [search_of("p", (0.7, None, False), MISSED)]})
    lines = training_of((0.5, 0.5), (0.6, 0.6))
    lines[0]["cut"], lines[1]["cut"] = 99, 2  # of 20 messages, after the start
    write(tmp_path / "agents" / "metrics.jsonl", lines)
    (tmp_path / "eval" / "em.png").write_bytes(b"em")
    page = page_of(tmp_path)
    assert re.findall(r'<h2 id="(\w+)">', page) == ["rollouts", "value", "orm", "eval", "agents"]
    assert rows_of(page, "agent")[1][:2] == ["Planner", "5"]
    assert page.count("<td>0.300</td>") == 2  # the RMSE of the last epoch
    assert rows_of(page, "a") == [["1"]] and "<p>note</p>" in page
    [warning] = re.findall('<p class="warning text">(.*?)</p>', page, re.DOTALL)
    assert "2 of 20 messages" in warning

    sources = re.findall(r'src="(.*?)"', page)
    assert len(sources) == 3 and all(source.startswith("data:image/png") for source in sources)
    assert "<link" not in page and "<script" not in page and "http" not in page
    [target] = re.findall(r'href="([^#].*?)"', page)
    assert (tmp_path / target).is_file()


@pytest.mark.parametrize("stage", ["value", "orm", "agents", "eval"])
def test_a_stage_that_is_not_finished_is_named(tmp_path, stage):
    write(tmp_path / stage / "metrics.jsonl", [], finished=None)
    page = page_of(tmp_path)
    assert f'<h2 id="{stage}">' in page and page.count("This stage is not finished.") == 1


def test_texts_cannot_become_html_on_the_page_of_a_run(tmp_path):
    strange = f"a/b c {HOSTILE}"
    missed = search_of(strange, (0.75, None, False), MISSED) | {"answer": HOSTILE, "gold": HOSTILE}
    write_evaluation(tmp_path, {MCTS["name"]: [missed]})
    table = tables.markdown_table([["subject"], [HOSTILE]])
    (tmp_path / "eval" / "table.md").write_text(f"{HOSTILE}\n\n{table}\n")
    page = page_of(tmp_path)
    assert "<b>" not in page and "</script>" not in page
    assert rows_of(page, "subject") == [[HOSTILE]]
    assert rows_of(page, "problem")[0][-2:] == [HOSTILE, HOSTILE]
    [tree] = (tmp_path / "pages").iterdir()
    [target] = re.findall('href="(pages/.*?)"', page)
    assert unquote(html.unescape(target)) == f"pages/{tree.name}"


def test_pages_of_trees_are_written_from_the_records(tmp_path):
    labels = read("labels")
    write(tmp_path / "rollouts" / "trees.jsonl", [labels])
    write_evaluation(tmp_path, {"m": [search_of("p", (0.7, None, False))]})
    call("tree", tmp_path, labels["id"])
    [page] = (tmp_path / "pages").iterdir()
    assert "labelled by search" in page.read_text() and "Answer given" not in page.read_text()
    call("tree", tmp_path, "p", "--method", "m", "--output", tmp_path / "new" / "p.html")
    assert "Answer given: 5." in (tmp_path / "new" / "p.html").read_text()


def test_labels_are_counted_per_agent():
    """The Reader's visited edges have Q of 1, 0.5 and -1; the Refiner never spoke."""
    nodes = [{"parent": None, "N": 9, "W": 9.0}]
    for visits, total, is_cut in ((1, 1, True), (2, 1, False), (0, 0, True), (3, -3, False)):
        nodes.append({"agent": "Reader", "N": visits, "W": total, "truncated": is_cut})
    trees, agents = [{"nodes": nodes}], ["Reader", "Refiner"]
    reader = ["Reader", "4", "3", "2", "0.167", "66.7%"]
    assert tables.labels_table(trees, agents)[1:] == [reader, ["Refiner", "0", "0", "0", "-", "-"]]


def test_v_is_shown_with_its_interval_or_as_mean_and_deviation_of_runs():
    """The Reader is in one run only, and its AUC is unknown there."""
    reader = METRICS | {"auc": None, "auc_95": None}
    runs = [{"Reader": reader, "Planner": METRICS}, {"Planner": METRICS | {"rmse": 0.7}}]
    known = ["3", "0.500", "0.900", "0.100"]
    assert tables.value_table(runs[:1])[1:] == [
        ["Reader", *known, "-", "0.600", "-", "-"],
        ["Planner", *known, "0.750", "0.600", "-", "0.700 to 0.800"],
    ]
    of_both = [(row[2], row[-1]) for row in tables.value_table(runs)]
    assert of_both[1:] == [("0.500", "1 runs"), ("0.600 ± 0.141", "2 runs")]


def test_the_agents_are_shown_before_when_kept_and_at_the_end():
    rows = tables.training_table([(training_of((0.5, 0.5), (0.75, 0.7), (0.6, 0.6)), 2)])[1:]
    assert rows[2:4] == [
        ["kept", "20", "0.700", "Reader", "-", "0.500", "0.625", "4.0", "0.250"],
        ["", "", "", "Planner", "0.750", "0.700", "-", "9.0", "0.250"],
    ]
    moments = [["before", "0", "0.500"], ["kept", "20", "0.700"], ["at the end", "40", "0.600"]]
    assert [row[:3] for row in rows[::2]] == moments


def test_reliability_shows_the_means_of_each_bin():
    """V of 0.90, 0.94 and 1 are in one bin; -1 is alone; another agent's is not."""
    values_and_labels = [(0.9, 1.0), (0.94, 0.0), (1.0, -1.0), (-1.0, -0.5)]
    edges = [{"agent": "Planner", "V": value, "y": label} for value, label in values_and_labels]
    edges.append({"agent": "Solver", "V": 0.2, "y": 1.0})
    planner, _ = pictures.plot_reliability(edges, ["Planner", "Solver"]).axes
    [points] = planner.collections
    assert points.get_offsets().tolist() == [[pytest.approx(2.84 / 3), 0.0], [-1.0, -0.5]]
    assert points.get_sizes().tolist() == [20 + 300, 20 + 100]


# ---- Runs side by side ---------------------------------------------------------------------------


def answers(*, right, num=5, calls=4):
    """Records of p1, p2, ...: those in `right` are answered right."""
    records = []
    for index in range(1, num + 1):
        record = {"id": f"p{index}", "question": f"q{index}", "gold": "1", "agent_calls": calls}
        records.append(record | {"correct": index in right})
    return records


def cells_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_runs_are_compared_with_the_first_on_the_problems_that_all_have(tmp_path):
    """The first is right on p1, the second on p2 and p3. It lacks p1, the third has another p5."""
    first, second, third = tmp_path / "first", tmp_path / "second", tmp_path / "third"
    write(first / "eval" / "greedy.jsonl", answers(right=[1]))
    write(first / "eval" / "vote-4.jsonl", answers(right=[1]))
    records = answers(right=[2, 3])
    write(second / "eval" / "greedy.1of2.jsonl", records[1:3])
    write(second / "eval" / "greedy.0of2.jsonl", records[3:])
    rows = cells_of(compare_runs(read_groups([str(first), str(second)])))
    assert [row[:2] for row in rows] == [["greedy", str(first)], ["greedy", str(second)]]
    # Two wins in four problems. Bonett and Price: 2/6 +- 1.96 sqrt((4/6 - (2/6)^2) / 6).
    assert rows[0][2:] == ["4", "0.0 (0.0 to 49.0)", "4.0", "", "1", "-"]
    assert rows[1][2:] == ["4", "50.0 (15.0 to 85.0)", "4.0", "+50.0 (-26.3 to +93.0)", "1", "-"]

    for change in ({"question": "another"}, {"gold": "2"}):
        write(third / "eval" / "greedy.jsonl", [*records[:4], records[4] | change])
        rows = cells_of(compare_runs(read_groups([str(first), str(second), str(third)])))
        assert [row[2] for row in rows] == ["3", "3", "3"]
        assert rows[2][5] == rows[1][5] != ""
    write(third / "eval" / "greedy.jsonl", records[:1])
    with pytest.raises(InputError, match="no problem was answered by greedy in all"):
        compare_runs(read_groups([str(first), str(second), str(third)]))


def test_groups_of_seeds_are_not_paired_run_by_run(tmp_path):
    rights = {"a0": [1, 2, 3, 4], "a1": [1], "b0": [1, 2, 3], "b1": []}
    verdicts = {}
    for name, right in rights.items():
        calls = 8 if name == "b1" else 4
        write(tmp_path / name / "eval" / "greedy.jsonl", answers(right=right, calls=calls))
        verdicts[name] = [index in right for index in range(1, 6)]
    texts = [f"{name}={tmp_path}/{name}0,{tmp_path}/{name}1" for name in "ab"]
    _, row = cells_of(compare_runs(read_groups(texts)))
    a, b = [verdicts["a0"], verdicts["a1"]], [verdicts["b0"], verdicts["b1"]]
    result = compare.seeds_and_problems_difference(b, a)
    difference = compare.percent_text("difference", result, form="+.1f")
    em = compare.percent_text("mean", compare.seeds_and_problems(b), form=".1f")
    assert em.startswith("30.0 (") and difference.startswith("-20.0 (")
    assert row == ["greedy", "b", "5", em, "6.0", difference, "2", "42.4"]  # 60 / sqrt(2)


def test_the_methods_of_a_single_group_are_compared_over_its_runs(tmp_path):
    """Of p1 to p4 the vote wins p4 in both; one run is lucky. Only the vote was asked p5."""
    for run, right in (("0", [1, 2, 3]), ("1", [])):
        write(tmp_path / run / "eval" / "greedy.jsonl", answers(right=right, num=4))
        write(tmp_path / run / "eval" / "vote-4.jsonl", answers(right=[*right, 4, 5]))
    pair = {"method": "vote-4", "against": "greedy", "why": "greedy"}
    summary = {"comparisons": [pair, pair | {"method": "vote-8"}]}
    (tmp_path / "0" / "eval" / "summary.json").write_text(json.dumps(summary))
    _, pairs = compare_runs(read_groups([f"a={tmp_path}/0,{tmp_path}/1"])).split("\n\n")
    greedy, vote = [[1, 1, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [0, 0, 0, 1]]
    result = compare.within_runs_difference(vote, greedy)
    difference = compare.percent_text("difference", result, form="+.1f")
    assert difference.startswith("+25.0 (")
    assert cells_of(pairs) == [["vote-4", "greedy: greedy", difference]]


def test_trainings_are_compared_after_the_last_epoch_and_at_their_own_best_step(tmp_path):
    """A run that used another's V has none of its own, and does not end the table."""
    for name, rmse, step in (("0", 0.5, 2), ("1", 0.7, 4)):
        epochs = [{"heldout": {"Planner": {}}}, {"heldout": {"Planner": METRICS | {"rmse": rmse}}}]
        write(tmp_path / name / "value" / "metrics.jsonl", epochs)
        lines = training_of((0.5, 0.5), (0.75, 0.7), (0.85, 0.9))
        write(tmp_path / name / "agents" / "metrics.jsonl", lines, best_step=step)
    (tmp_path / "2" / "eval").mkdir(parents=True)
    groups = read_groups([f"{tmp_path}/2", f"a={tmp_path}/0,{tmp_path}/1", f"b={tmp_path}/1"])
    values, agents = compare_runs(groups).split("\n\n")
    assert [row[3] for row in cells_of(values)] == ["0.600 ± 0.141", "0.700"]
    kept = [row[:4] for row in cells_of(agents) if row[1] == "kept"]
    assert kept == [["a", "kept", "30 ± 14", "0.800 ± 0.141"], ["b", "kept", "40", "0.900"]]
    write_curves(read_groups([f"b={tmp_path}/1"]), tmp_path / "curves")
    assert (tmp_path / "curves").read_bytes().startswith(b"\x89PNG")
    for stage in ("value", "agents"):
        write(tmp_path / "3" / stage / "metrics.jsonl", [], finished=False)
        with pytest.raises(InputError, match="not finished"):
            compare_runs(read_groups([f"{tmp_path}/3"]))
        (tmp_path / "3" / stage).rename(tmp_path / stage)


def test_groups_are_read_as_they_are_written(tmp_path):
    one, two, named = tmp_path / "1", tmp_path / "2", tmp_path / "lr=1"
    for run in (one, two, named):
        (run / "eval").mkdir(parents=True)
    groups = read_groups([f"a={one},{two}", str(one), str(named)])
    assert groups == {"a": [one, two], str(one): [one], str(named): [named]}
    with pytest.raises(InputError, match="a is named twice"):
        read_groups([f"a={one}", f"a={two}"])
    for text in ("a=", f"a={one},", f"{one}/eval"):
        with pytest.raises(InputError, match="no value/, no agents/ and no eval/"):
            read_groups([text])
