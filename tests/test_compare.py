"""Tests of compare.py: runs side by side, from records written and counted by hand."""

import json
from pathlib import Path

import pytest

import evaluate
from report import compare
from report.compare import Group, compare_runs, read_groups, write_curves
from report.tables import percent_interval
from support.flags import InputError
from support.statistics import (
    seeds_and_problems,
    seeds_and_problems_difference,
    within_runs_difference,
)

# ---- Records by hand -----------------------------------------------------------------------------


def single_runs(*runs):
    return read_groups([str(run) for run in runs])


def make_record(index, *, right):
    """The record of one of five problems. right: the indices that are answered right."""
    return {
        "id": f"p{index}",
        "question": f"question of p{index}",
        "gold": "1",
        "correct": index in right,
        "agent_calls": 4,
    }


def make_records(*, right):
    return [make_record(index, right=right) for index in range(1, 6)]


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# ---- Runs side by side ---------------------------------------------------------------------------


def test_runs_are_compared_on_their_common_problems_each_with_the_first(tmp_path):
    """The second run lacks p1, on which the first was right, and is right on p2 in addition."""
    first, second = tmp_path / "first", tmp_path / "second"
    records = make_records(right=[1])
    write_records(first / "eval" / "greedy.jsonl", records)
    for record in records:
        record["correct"] = record["id"] in ("p1", "p2", "p3")
    write_records(second / "eval" / "greedy.1of2.jsonl", records[1:3])
    write_records(second / "eval" / "greedy.0of2.jsonl", records[3:])

    table = compare_runs(single_runs(first, second))
    assert table.startswith("| method | run |")  # no V, no table of V
    rows = [line for line in table.splitlines() if line.startswith("| greedy")]
    # Two wins in four problems. Bonett and Price: 2/6 +- 1.96 sqrt((4/6 - (2/6)^2) / 6).
    assert rows == [
        f"| greedy | {first} | 4 | 0.0 | 0.0 to 49.0 | 4.0 |  |  |",
        f"| greedy | {second} | 4 | 50.0 | 15.0 to 85.0 | 4.0 | +50.0 | -26.3 to +93.0 |",
    ]


def test_runs_without_a_common_method_say_so(tmp_path):
    for run, method in (("first", "greedy"), ("second", "vote-4")):
        write_records(tmp_path / run / "eval" / f"{method}.jsonl", make_records(right=[1]))
    text = compare_runs(single_runs(tmp_path / "first", tmp_path / "second"))
    assert text == "No method was evaluated in all of these runs."


def test_only_equal_problems_are_compared(tmp_path):
    """Under one id, the second run had another question, and the third another gold answer."""
    records = make_records(right=[1])
    second = [records[0] | {"question": "another"}, *records[1:]]
    third = [records[0], records[1] | {"gold": "2"}, *records[2:]]
    runs = []
    for name, records_of_run in (("first", records), ("second", second), ("third", third)):
        write_records(tmp_path / name / "eval" / "greedy.jsonl", records_of_run)
        runs.append(str(tmp_path / name))
    table = compare_runs(single_runs(*runs))
    counts = [line.split(" | ")[2] for line in table.splitlines() if line.startswith("| greedy")]
    assert counts == ["3", "3", "3"]


# ---- Runs side by side: all cells ----------------------------------------------------------------


def write_value(run_folder, *, num_simulations, heldout, finished=True):
    """Write a V as stage 2 leaves it: its settings, and three epochs of held-out metrics."""
    folder = run_folder / "value"
    folder.mkdir(parents=True)
    settings = {
        "rollouts": {"num_simulations": num_simulations},
        "loss": "bce",
        "view": "local",
    }
    (folder / "config.json").write_text(json.dumps({"settings": settings, "finished": finished}))
    earlier_epoch = {"heldout": {"Reader": {}}}
    epochs = [earlier_epoch, earlier_epoch, {"heldout": heldout}]
    write_records(folder / "metrics.jsonl", epochs)


HELDOUT = {
    "Reader": {
        "rmse": 0.91,
        "ece": 0.125,
        "auc": None,
        "auc_95": None,
        "top1": None,
        "chance": None,
    },
    "Solver": {
        "rmse": 0.5,
        "ece": 0.0625,
        "auc": 0.75,
        "auc_95": [0.7, 0.8],
        "top1": 0.6,
        "chance": 0.25,
    },
}
VALUE_HEADER = (
    "| run | N | loss | view | agent | RMSE | calibration error | AUC "
    "| 95 % interval | top-1 | chance |"
)


def test_the_table_of_values_shows_the_last_epoch_of_every_run_that_has_a_v(tmp_path):
    """A run may use another run's V; it has no row, and does not end the table."""
    first, without_value, last = tmp_path / "first", tmp_path / "without", tmp_path / "last"
    write_value(first, num_simulations=10, heldout=HELDOUT)
    (without_value / "eval").mkdir(parents=True)
    write_value(last, num_simulations=40, heldout={"Solver": HELDOUT["Solver"]})

    table = compare._compare_values(single_runs(first, without_value, last))
    solver = "bce | local | Solver | 0.500 | 0.062 | 0.750 | 0.700 to 0.800 | 0.600 | 0.250 |"
    assert table.splitlines() == [
        VALUE_HEADER,
        "|---|---|---|---|---|---|---|---|---|---|---|",
        f"| {first} | 10 | bce | local | Reader | 0.910 | 0.125 | - | - to - | - | - |",
        f"| {first} | 10 | {solver}",
        f"| {last} | 40 | {solver}",
    ]


def test_a_v_that_is_not_finished_is_not_compared(tmp_path):
    write_value(tmp_path, num_simulations=10, heldout=HELDOUT, finished=False)
    with pytest.raises(InputError) as error:
        compare._compare_values(single_runs(tmp_path))
    assert str(error.value) == f"--compare {tmp_path / 'value'}: its training is not finished"


ANSWER_HEADER = (
    "| method | run | problems | EM % | 95 % interval | agent calls "
    "| against the first | 95 % interval |"
)


def test_the_table_of_answers_has_the_methods_that_all_runs_have(tmp_path):
    """The first run is right on p1 of five problems, the second on p1, p2 and p3."""
    first, second = tmp_path / "first", tmp_path / "second"
    records = make_records(right=[1])
    for name in ("vote-4", "greedy", "vote-8"):
        write_records(first / "eval" / f"{name}.jsonl", records)
    for record in records:
        record["correct"] = record["id"] in ("p1", "p2", "p3")
    for name in ("vote-4", "greedy"):
        write_records(second / "eval" / f"{name}.jsonl", records)

    table = compare._compare_answers(single_runs(first, second))
    # Two wins in five problems. Bonett and Price: 2/7 +- 1.96 sqrt((4/7 - (2/7)^2) / 7).
    first_cells = "5 | 20.0 | 3.6 to 62.4 | 4.0 |  |  |"
    second_cells = "5 | 60.0 | 23.1 to 88.2 | 4.0 | +40.0 | -23.3 to +80.4 |"
    assert table.splitlines() == [
        ANSWER_HEADER,
        "|---|---|---|---|---|---|---|---|",
        f"| greedy | {first} | {first_cells}",
        f"| greedy | {second} | {second_cells}",
        f"| vote-4 | {first} | {first_cells}",
        f"| vote-4 | {second} | {second_cells}",
    ]


def test_runs_without_a_common_problem_are_not_compared(tmp_path):
    for name, index in (("first", 0), ("second", 1)):
        path = tmp_path / name / "eval" / "greedy.jsonl"
        write_records(path, [make_record(index, right=[])])
    with pytest.raises(InputError) as error:
        compare._compare_answers(single_runs(tmp_path / "first", tmp_path / "second"))
    assert str(error.value) == (
        "--compare: no problem was answered by greedy.jsonl in all of these runs"
    )


def test_a_problem_is_common_if_all_runs_have_it_whichever_has_more():
    one, two = make_record(1, right=[1]), make_record(2, right=[1])
    assert compare._common_problems([{"p1": one}, {"p1": one, "p2": two}]) == ["p1"]
    assert compare._common_problems([{"p1": one, "p2": two}, {"p2": two}]) == ["p2"]
    assert compare._common_problems([{"p1": one, "p2": two}]) == ["p1", "p2"]


def test_a_run_may_have_a_v_alone_or_an_evaluation_alone(tmp_path):
    only_value, only_answers = tmp_path / "only_value", tmp_path / "only_answers"
    write_value(only_value, num_simulations=10, heldout=HELDOUT)
    write_records(only_answers / "eval" / "greedy.jsonl", [make_record(1, right=[1])])
    values = compare_runs(single_runs(only_value)).splitlines()
    assert values[0] == VALUE_HEADER and len(values) == 4
    answers = compare_runs(single_runs(only_answers)).splitlines()
    assert answers[0] == ANSWER_HEADER and len(answers) == 3


def test_a_folder_that_is_not_a_run_is_named(tmp_path):
    with pytest.raises(InputError) as error:
        compare_runs(single_runs(tmp_path))
    assert str(error.value) == (
        f"--compare {tmp_path}: no value/, no agents/ and no eval/ in it; it is not a run"
    )


# ---- Groups of runs that differ in their seed ----------------------------------------------------


def test_groups_are_read_as_they_are_written(tmp_path):
    named = tmp_path / "lr=1"
    named.mkdir()
    groups = read_groups(["a=r/1,r/2", "r/3", str(named)])
    assert groups == [
        Group("a", [Path("r/1"), Path("r/2")]),
        Group("r/3", [Path("r/3")]),
        Group(str(named), [named]),
    ]


@pytest.mark.parametrize("text", ["a=", "a=r,", "=r", "a=r,r", ""])
def test_a_group_without_runs_or_with_the_same_twice_is_refused(text):
    with pytest.raises(InputError, match=f"--compare {text}: give RUN, or NAME=RUN,RUN"):
        read_groups([text])


def test_two_groups_of_one_name_are_refused():
    with pytest.raises(InputError, match="--compare: a is named twice"):
        read_groups(["a=r/1", "a=r/2"])
    assert len(read_groups(["r/1", "r/1"])) == 2  # harmless


def test_a_group_is_the_mean_of_its_runs_on_the_problems_that_all_have(tmp_path):
    """Two seeds are right on p1 and on p1, p2, p3; the other group on p1, on four problems."""
    rights = {"a0": [1], "a1": [1, 2, 3], "b0": [1]}
    for run, right in rights.items():
        records = make_records(right=right)
        if run == "b0":
            records = records[:4]
        for record in records:
            record["agent_calls"] = 8 if run == "a1" else 4
        write_records(tmp_path / run / "eval" / "greedy.jsonl", records)
    groups = read_groups([str(tmp_path / "b0"), f"a={tmp_path / 'a0'},{tmp_path / 'a1'}"])
    header, _, single, group = compare_runs(groups).splitlines()
    assert header == ANSWER_HEADER + " runs | deviation |"
    single = [cell.strip() for cell in single.split("|")[1:-1]]
    group = [cell.strip() for cell in group.split("|")[1:-1]]
    assert single[:4] + single[5:] == [
        "greedy",
        str(tmp_path / "b0"),
        "4",
        "25.0",
        "4.0",
        "",
        "",
        "1",
        "-",
    ]
    # 25 % and 75 % of four problems: mean 50, deviation 50 / sqrt(2).
    assert group[:4] == ["greedy", "a", "4", "50.0"]
    assert group[5:7] == ["6.0", "+25.0"]
    assert group[8:] == ["2", "35.4"]
    a = [[True, False, False, False], [True, True, True, False]]
    assert group[4] == percent_interval(seeds_and_problems(a))
    difference = seeds_and_problems_difference(a, [a[0]])
    assert group[7] == percent_interval(difference, signed=True)


def test_v_of_a_group_is_shown_as_mean_and_deviation(tmp_path):
    """RMSE 0.5 and 0.7; the AUC of the Reader is unknown in both runs."""
    other = {"Reader": HELDOUT["Reader"], "Solver": HELDOUT["Solver"] | {"rmse": 0.7}}
    write_value(tmp_path / "0", num_simulations=10, heldout=HELDOUT)
    write_value(tmp_path / "1", num_simulations=10, heldout=other)
    table = compare_runs(read_groups([f"a={tmp_path / '0'},{tmp_path / '1'}"]))
    reader, solver = table.splitlines()[2:]
    assert "| Reader | 0.910 ± 0.000 | 0.125 ± 0.000 | - | 2 runs | - | - |" in reader
    assert "| a | 10 | bce | local | Solver | 0.600 ± 0.141 | 0.062 ± 0.000 |" in solver
    assert "| 0.750 ± 0.000 | 2 runs |" in solver


def test_two_groups_are_not_paired_run_by_run(tmp_path):
    rights = {"a0": [1, 2, 3, 4], "a1": [1], "b0": [1, 2, 3], "b1": []}
    verdicts = {}
    for run, right in rights.items():
        write_records(tmp_path / run / "eval" / "greedy.jsonl", make_records(right=right))
        verdicts[run] = [index in right for index in range(1, 6)]
    texts = [f"{name}={tmp_path}/{name}0,{tmp_path}/{name}1" for name in "ab"]
    line = compare_runs(read_groups(texts)).splitlines()[-1]
    a, b = [verdicts["a0"], verdicts["a1"]], [verdicts["b0"], verdicts["b1"]]
    interval = percent_interval(seeds_and_problems_difference(b, a), signed=True)
    assert f"| -20.0 | {interval} |" in line
    assert interval != percent_interval(within_runs_difference(b, a), signed=True)


def test_an_agent_without_held_out_labels_in_some_run_has_no_row(tmp_path):
    write_value(tmp_path / "0", num_simulations=10, heldout=HELDOUT)
    write_value(tmp_path / "1", num_simulations=10, heldout={"Solver": HELDOUT["Solver"]})
    table = compare_runs(read_groups([f"a={tmp_path / '0'},{tmp_path / '1'}"]))
    [line] = table.splitlines()[2:]
    assert "| Solver |" in line


def write_evaluation(run, *, greedy, vote):
    """Write two methods with the pair `vote against greedy`, and one whose method is not there."""
    write_records(run / "eval" / "greedy.jsonl", make_records(right=greedy))
    write_records(run / "eval" / "vote-4.jsonl", make_records(right=vote))
    pair = {"method": "vote-4", "against": "greedy", "why": "greedy"}
    summary = {"comparisons": [pair, pair | {"method": "vote-8"}]}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))


def test_the_methods_of_a_single_group_are_compared_over_its_runs(tmp_path):
    """Of five problems, a vote is right on one more in each run; one run is lucky."""
    write_evaluation(tmp_path / "0", greedy=[1, 2, 3], vote=[1, 2, 3, 4])
    write_evaluation(tmp_path / "1", greedy=[], vote=[5])
    group = f"a={tmp_path / '0'},{tmp_path / '1'}"
    answers, pairs = compare_runs(read_groups([group])).split("\n\n")
    assert "| vote-4 | a | 5 | 50.0 |" in answers
    header, _, line = pairs.splitlines()
    assert header == "| method | against | EM points | 95 % interval |"
    greedy, vote = [[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 0], [0, 0, 0, 0, 1]]
    interval = percent_interval(within_runs_difference(vote, greedy), signed=True)
    assert line == f"| vote-4 | greedy: greedy | +20.0 | {interval} |"
    # The same runs, so their luck is shared.
    assert interval != percent_interval(seeds_and_problems_difference(vote, greedy), signed=True)

    two_groups = compare_runs(read_groups([group, str(tmp_path / "0")]))
    assert "| vote-4 | greedy: greedy |" not in two_groups


def test_methods_of_a_group_are_compared_on_the_problems_that_both_have_answered(tmp_path):
    """More problems were asked of the vote: of p1 to p4 it wins p2."""
    for run in "01":
        write_records(tmp_path / run / "eval" / "greedy.jsonl", make_records(right=[1])[:4])
        write_records(tmp_path / run / "eval" / "vote-4.jsonl", make_records(right=[1, 2, 5]))
        pair = {"method": "vote-4", "against": "greedy", "why": "greedy"}
        summary = json.dumps({"comparisons": [pair]})
        (tmp_path / run / "eval" / "summary.json").write_text(summary)
    table = compare_runs(read_groups([f"a={tmp_path / '0'},{tmp_path / '1'}"]))
    assert "| vote-4 | greedy: greedy | +25.0 |" in table


# ---- The training of the agents ------------------------------------------------------------------


def write_agents(run_folder, accuracies, *, best_step, finished=True):
    """Write stage 5 as it is left: V says 0.9 of the Planner, whatever the truth; 10 messages."""
    lines = []
    for step, accuracy in enumerate(accuracies):
        planner = {"value": 0.9, "right": accuracy, "value_auc": 1 - accuracy}
        reader = {"value": accuracy, "right": accuracy, "value_auc": 0.5}
        dev = {"accuracy": accuracy, "agents": {"Reader": reader, "Planner": planner}}
        lines.append({"step": 2 * step, "messages": 10 * step, "dev": dev})
        lines.append({"step": 2 * step + 1, "messages": 10 * step + 5})  # not measured
    write_records(run_folder / "agents" / "metrics.jsonl", lines)
    config = {"settings": {"reward": "value"}, "finished": finished, "best_step": best_step}
    (run_folder / "agents" / "config.json").write_text(json.dumps(config))


def test_the_agents_are_compared_before_when_kept_and_at_the_end(tmp_path):
    """V - truth is that of the Planner, whom V overrates more. Its AUC is a mean of both agents."""
    write_agents(tmp_path / "0", [0.3, 0.6, 0.5], best_step=2)
    write_agents(tmp_path / "1", [0.3, 0.4, 0.7], best_step=4)
    table = compare_runs(read_groups([f"a={tmp_path / '0'},{tmp_path / '1'}"]))
    assert table.splitlines()[2:] == [
        "| a, before | 2 | value | 0 | 30.0 ± 0.0 | 0.600 ± 0.000 | 0.600 ± 0.000 |",
        "| a, kept | 2 | value | 15 | 65.0 ± 7.1 | 0.250 ± 0.071 | 0.425 ± 0.035 |",
        "| a, at the end | 2 | value | 20 | 60.0 ± 14.1 | 0.300 ± 0.141 | 0.450 ± 0.071 |",
    ]


def test_agents_whose_training_is_not_finished_are_not_compared(tmp_path):
    write_agents(tmp_path, [0.3, 0.6], best_step=2, finished=False)
    unfinished = f"--compare {tmp_path / 'agents'}: its training is not finished"
    for compare_them in (compare_runs, lambda groups: write_curves(groups, tmp_path / "c.png")):
        with pytest.raises(InputError) as error:
            compare_them(single_runs(tmp_path))
        assert str(error.value) == unfinished


def test_curves_are_those_of_every_run_of_every_group(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "plot_learning", lambda records, path: drawn.append(records))
    for name, accuracies in (("0", [0.3, 0.6]), ("1", [0.3, 0.4]), ("2", [0.3, 0.5])):
        write_agents(tmp_path / name, accuracies, best_step=2)
    groups = [f"a={tmp_path / '0'},{tmp_path / '1'}", f"b={tmp_path / '2'}"]
    flags = ["--compare", *groups, "--curves", str(tmp_path / "c.png")]
    evaluate.main(evaluate.parse_args(flags))
    [records] = drawn
    last = {}
    for name, of_runs in records.items():
        last[name] = [[r["dev"]["accuracy"] for r in run if "dev" in r][-1] for run in of_runs]
    assert last == {"a": [0.6, 0.4], "b": [0.5]}


def test_curves_are_drawn_for_groups_without_v_too(tmp_path, capsys):
    write_agents(tmp_path / "0", [0.3, 0.6, 0.5], best_step=2)
    write_agents(tmp_path / "1", [0.3, 0.4], best_step=2)
    path = tmp_path / "1" / "agents" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"value": 0.9', '"value": null'))
    groups = read_groups([f"a={tmp_path / '0'},{tmp_path / '1'}"])
    write_curves(groups, tmp_path / "new" / "c.png")
    assert (tmp_path / "new" / "c.png").stat().st_size > 10_000
    with pytest.raises(InputError, match=r"--curves c.abc: .* a name that ends in .png"):
        write_curves(groups, Path("c.abc"))
    assert "c.png shows how the agents learnt" in capsys.readouterr().out
