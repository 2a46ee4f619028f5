"""Tests of evaluate.py: summaries and comparisons of records, written and counted by hand."""

import json
from types import SimpleNamespace

import pytest

import evaluate
from answers import MATH_VERIFY
from mas import CHAIN
from search import parse_method

PROBLEMS = ["p1", "p2", "p3", "p4", "p5"]


def make_methods(names):
    return [parse_method(name, CHAIN, num_candidates="3", lam=0.0) for name in names]


# ---- Records by hand -----------------------------------------------------------------------------

RIGHT = {  # method -> the problems that it answers right
    "greedy": ["p1"],
    "best_of-2-value": ["p1", "p2", "p5"],
    "mcts-2x3-value": ["p2", "p3", "p4", "p5"],
    "mcts-2x3-policy": ["p5"],
}
CALLS = {  # method -> agent calls of each problem
    "greedy": [4, 4, 4, 4, 4],
    "best_of-2-value": [8, 8, 8, 8, 8],
    "mcts-2x3-value": [12, 13, 12, 14, 12],
    "mcts-2x3-policy": [12, 12, 12, 12, 12],
}
RUNGS = ["told", "number", "told", "none", "told"]
TRUNCATED = [{}, {"Solver": 2}, {}, {"Solver": 1, "Planner": 1}, {}]


def make_record(method, index):
    problem_id = PROBLEMS[index]
    return {
        "id": problem_id,
        "question": f"question of {problem_id}",
        "gold": "1",
        "subject": None,
        "level": "hard" if problem_id in ("p1", "p2") else "easy",
        "correct": problem_id in RIGHT[method],
        "rung": RUNGS[index],
        "agent_calls": CALLS[method][index],
        "prompt_tokens": 100 * (index + 1),
        "generated_tokens": 10,
        "scored_tokens": 0,
        "seconds": 0.5,
        "truncated": TRUNCATED[index],
    }


def write_records(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.fixture
def folder(tmp_path):
    """An evaluation of five problems, in another order, and of one more that is not asked for."""
    for method in RIGHT:
        records = [make_record(method, index) for index in (3, 0, 4, 2, 1)]
        another = make_record(method, 0) | {"id": "another", "correct": True}
        write_records(tmp_path / f"{method}.jsonl", [*records, another])
    return tmp_path


def collect(folder):
    problems = [SimpleNamespace(id=problem_id) for problem_id in PROBLEMS]
    return evaluate.collect_records(make_methods(RIGHT), problems, folder)


@pytest.fixture
def summary(folder):
    """The summary of these records."""
    records, num_missing = collect(folder)
    assert num_missing == 0
    return evaluate.summarise(make_methods(RIGHT), records)


# ---- Summaries -----------------------------------------------------------------------------------


def test_the_summary_of_a_method_by_hand(summary):
    assert list(summary["methods"]) == list(RIGHT)
    row = summary["methods"]["mcts-2x3-value"]
    assert row["n"] == 5
    assert row["right"] == 4
    assert row["em"] == 0.8
    # Wilson: (0.8 + z^2/10 +- z sqrt(0.032 + z^2/100)) / (1 + z^2/5) with z = 1.96.
    assert row["low"] == pytest.approx(0.3755, abs=1e-4)
    assert row["high"] == pytest.approx(0.9638, abs=1e-4)
    assert row["agent_calls"] == pytest.approx(63 / 5)
    assert row["prompt_tokens"] == 300
    assert row["generated_tokens"] == 10
    assert row["seconds"] == 0.5
    assert row["truncated"] == {"Solver": 3, "Planner": 1}
    assert list(row["rungs"].items()) == [("told", 3), ("number", 1), ("none", 1)]


def test_a_comparison_is_the_method_minus_its_opponent(summary):
    """MCTS alone is right on p2 to p5, greedy alone on p1: + 3 of 5 problems."""
    [row] = [
        row
        for row in summary["comparisons"]
        if row["method"] == "mcts-2x3-value" and row["against"] == "greedy"
    ]
    assert row["wins"] == 4
    assert row["losses"] == 1
    assert row["lost"] == ["p1"]
    assert row["difference"] == pytest.approx(3 / 5)
    assert row["calls"] == pytest.approx(63 / 5)
    assert row["calls_against"] == 4
    # Bonett and Price: 5 wins and 2 losses of 7, half width 1.96 sqrt((1 - (3/7)^2) / 7).
    assert row["low"] == pytest.approx(3 / 7 - 0.6693, abs=1e-4)
    assert row["high"] == 1  # not 3 / 7 + 0.6693
    assert row["p"] == pytest.approx(2 * (1 + 5) / 2**5)  # one loss or none of five, both sides


def test_a_problem_is_lost_if_only_the_opponent_is_right(summary):
    """Both MCTS and best-of-2 are right on p2 and p5."""
    lost = {}
    for row in summary["comparisons"]:
        lost[row["method"], row["against"]] = row["lost"]
    assert lost["mcts-2x3-value", "best_of-2-value"] == ["p1"]
    assert lost["mcts-2x3-value", "mcts-2x3-policy"] == []


def test_every_pair_of_the_summary_has_its_reason(summary):
    pairs = [(row["method"], row["against"], row["why"]) for row in summary["comparisons"]]
    assert pairs == [
        ("best_of-2-value", "greedy", "greedy"),
        ("mcts-2x3-value", "greedy", "greedy"),
        ("mcts-2x3-value", "best_of-2-value", "nearest best-of-N"),
        ("mcts-2x3-value", "mcts-2x3-policy", "same, by policy"),
        ("mcts-2x3-policy", "greedy", "greedy"),
    ]


def test_the_report_is_derived_from_the_records(folder, summary, monkeypatch, capsys):
    """Comparisons that timed out are reported by the process that made them."""
    records, _ = collect(folder)
    for timeouts in (0, 2):
        monkeypatch.setattr(MATH_VERIFY, "timeouts", timeouts)
        evaluate.write_report(make_methods(RIGHT), records, folder, ["level"])
        out = capsys.readouterr().out
        assert ("2 comparisons of answers by this process" in out) == (timeouts == 2)
    assert "| hard | 2 | 50.0 | 100.0 | 50.0 | 0.0 |" in out

    assert json.loads((folder / "summary.json").read_text()) == summary
    table = (folder / "table.md").read_text()
    assert "| mcts-2x3-value | 5 | 80.0 | 37.6 to 96.4 | 12.6 |" in table
    assert "| told 3, number 1, none 1 | Solver 3, Planner 1 |" in table
    assert "| +60.0 | -24.1 to +100.0 | 4 : 1 |" in table
    assert "| hard | 2 | 50.0 | 100.0 | 50.0 | 0.0 |" in table
    assert (folder / "em_vs_calls.png").stat().st_size > 0


def test_missing_records_are_counted(folder):
    path = folder / "greedy.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if '"p3"' not in line))
    records, num_missing = collect(folder)
    assert num_missing == 1
    assert [record["id"] for record in records["greedy"]] == ["p1", "p2", "p4", "p5"]
    assert [record["id"] for record in records["mcts-2x3-value"]] == PROBLEMS


def test_the_breakdown_by_hand(folder):
    """p1 and p2 are hard: MCTS has one of the two, and all three others."""
    records, _ = collect(folder)
    lines = evaluate.breakdown(make_methods(RIGHT), records, "level").splitlines()
    assert lines[2:] == [
        "| easy | 3 | 0.0 | 33.3 | 100.0 | 33.3 |",
        "| hard | 2 | 50.0 | 100.0 | 50.0 | 0.0 |",
    ]


# ---- Runs side by side ---------------------------------------------------------------------------


def test_runs_are_compared_on_their_common_problems_each_with_the_first(tmp_path):
    """The second run lacks p1, on which the first was right, and is right on p2 in addition."""
    first, second = tmp_path / "first", tmp_path / "second"
    records = [make_record("greedy", index) for index in range(5)]
    write_records(first / "eval" / "greedy.jsonl", records)
    for record in records:
        record["correct"] = record["id"] in ("p1", "p2", "p3")
    write_records(second / "eval" / "greedy.1of2.jsonl", records[1:3])
    write_records(second / "eval" / "greedy.0of2.jsonl", records[3:])

    table = evaluate.compare_runs([str(first), str(second)])
    rows = [line for line in table.splitlines() if line.startswith("| greedy")]
    # Two wins in four problems. Bonett and Price: 2/6 +- 1.96 sqrt((4/6 - (2/6)^2) / 6).
    assert rows == [
        f"| greedy | {first} | 4 | 0.0 | 0.0 to 49.0 | 4.0 |  |  |",
        f"| greedy | {second} | 4 | 50.0 | 15.0 to 85.0 | 4.0 | +50.0 | -26.3 to +93.0 |",
    ]


def test_only_equal_problems_are_compared(tmp_path):
    """Under one id, the second run had another question, and the third another gold answer."""
    records = [make_record("greedy", index) for index in range(5)]
    second = [records[0] | {"question": "another"}, *records[1:]]
    third = [records[0], records[1] | {"gold": "2"}, *records[2:]]
    runs = []
    for name, records_of_run in (("first", records), ("second", second), ("third", third)):
        write_records(tmp_path / name / "eval" / "greedy.jsonl", records_of_run)
        runs.append(str(tmp_path / name))
    table = evaluate.compare_runs(runs)
    counts = [line.split(" | ")[2] for line in table.splitlines() if line.startswith("| greedy")]
    assert counts == ["3", "3", "3"]


# ---- Which methods are compared ------------------------------------------------------------------


def opponents_of(name, calls):
    """Return (opponent, why) of a method among methods with these agent calls."""
    methods = make_methods(calls)
    rows = {name: {"agent_calls": num} for name, num in calls.items()}
    [method] = [method for method in methods if method.name == name]
    pairs = evaluate.opponents(method, methods, rows)
    return [(other.name, why) for other, why in pairs]


def test_opponents_are_the_nearest_with_at_least_as_many_calls():
    """A baseline must not lose because it was given less: 28 calls are nearer to 29 than 32 are."""
    calls = {
        "greedy": 4,
        "vote-7": 28,
        "vote-8": 32,
        "best_of-2-value": 8,
        "best_of-7-value": 28,
        "best_of-8-value": 32,
        "best_of-16-value": 64,
        "best_of-8-policy": 30,  # nearer, but by another scorer
        "mcts-4x3-value": 29,
        "mcts-4x3-policy": 29,
        "mcts-4x3-random": 29,
        "mcts-9x3-policy": 50,
    }
    assert opponents_of("mcts-4x3-value", calls) == [
        ("greedy", "greedy"),
        ("vote-8", "nearest vote"),
        ("best_of-8-value", "nearest best-of-N"),
        ("best_of-16-value", "costlier best-of-N"),
        ("mcts-4x3-policy", "same, by policy"),
        ("mcts-4x3-random", "same, by random"),
    ]
    assert opponents_of("best_of-8-value", calls) == [
        ("greedy", "greedy"),
        ("vote-8", "nearest vote"),
        ("best_of-8-policy", "same, by policy"),
    ]
    assert opponents_of("vote-8", calls) == [("greedy", "greedy")]
    assert opponents_of("greedy", calls) == []


def test_a_baseline_with_the_same_calls_is_the_nearest():
    calls = {"vote-4": 16, "vote-8": 32, "best_of-4-value": 16, "best_of-8-value": 32}
    assert opponents_of("mcts-6x3-value", calls | {"mcts-6x3-value": 16}) == [
        ("vote-4", "nearest vote"),
        ("best_of-4-value", "nearest best-of-N"),
        ("best_of-8-value", "costlier best-of-N"),
    ]


def test_without_a_costlier_baseline_the_costliest_is_the_opponent():
    calls = {"vote-2": 8, "vote-4": 16, "best_of-4-value": 16, "mcts-8x3-value": 20}
    assert opponents_of("mcts-8x3-value", calls) == [
        ("vote-4", "nearest vote"),
        ("best_of-4-value", "nearest best-of-N"),
    ]


def test_a_search_meets_itself_by_another_scorer_only_with_the_same_lambda():
    calls = {
        "mcts-4x3-value": 20,
        "mcts-4x3-value-lam0.5": 20,
        "mcts-4x3-policy": 20,
        "mcts-4x3-policy-lam0.5": 20,
        "mcts-4x3-random": 20,
        "mcts-4x1.3.1.1-policy": 20,
    }
    assert opponents_of("mcts-4x3-value", calls) == [
        ("mcts-4x3-policy", "same, by policy"),
        ("mcts-4x3-random", "same, by random"),
    ]
    assert opponents_of("mcts-4x3-value-lam0.5", calls) == [
        ("mcts-4x3-value", "same, lambda = 0"),
        ("mcts-4x3-policy-lam0.5", "same, by policy"),
    ]
    assert opponents_of("mcts-4x3-policy-lam0.5", calls) == [
        ("mcts-4x3-policy", "same, lambda = 0"),
    ]
    assert opponents_of("mcts-4x3-policy", calls) == []
