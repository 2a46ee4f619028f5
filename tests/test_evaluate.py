"""Tests of evaluate.py: summaries and comparisons of records, written and counted by hand."""

import hashlib
import json
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from conftest import NoProgress, ScriptedPolicy

import evaluate
from llm.policy import Policy
from mas import CHAIN, GRAPHS
from search import Method, parse_method
from support.flags import InputError
from support.progress import Work
from support.records import is_mine, read_jsonl
from tasks.grading import MATH_VERIFY
from tasks.problems import Problem
from tree import Candidate, Cost, make_child, make_root

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
    assert "! answers had to be guessed" in out and "! answers had to be guessed" in table
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
    table = evaluate.breakdown_table(records, "level")
    assert table.header == ["level", "problems", *(method.name for method in make_methods(RIGHT))]
    assert table.rows == [
        ["easy", "3", "0.0", "33.3", "100.0", "33.3"],
        ["hard", "2", "50.0", "100.0", "50.0", "0.0"],
    ]


# ---- Which methods are compared ------------------------------------------------------------------


def opponents_of(name, calls):
    """Return (opponent, why) of a method among methods with these agent calls."""
    methods = make_methods(calls)
    rows = {name: {"agent_calls": num} for name, num in calls.items()}
    [method] = [method for method in methods if method.name == name]
    pairs = evaluate.opponents(method, methods, rows)
    return [(other.name, why) for other, why in pairs]


@pytest.mark.parametrize("search", ["sbs-2x2-value", "mcts-4x3-value"])
def test_every_search_meets_best_of_n_by_its_scorer(search):
    calls = {"best_of-4-value": 16, "best_of-8-policy": 16, search: 12}
    assert opponents_of(search, calls) == [("best_of-4-value", "nearest best-of-N")]


@pytest.mark.parametrize("scorer", ["value", "outcome"])
def test_a_search_by_a_trained_model_meets_itself_by_policy_and_by_chance(scorer):
    search = f"sbs-2x2-{scorer}"
    calls = {search: 12, "sbs-2x2-policy": 12, "sbs-2x2-random": 12}
    assert opponents_of(search, calls) == [
        ("sbs-2x2-policy", "same, by policy"),
        ("sbs-2x2-random", "same, by random"),
    ]
    assert opponents_of("sbs-2x2-policy", calls) == []


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


# ---- Records -------------------------------------------------------------------------------------


def make_problem(name, gold="7"):
    question = f"question of {name}"
    return Problem(name, "test", question, gold, "number", subject="sums", level="easy")


def test_the_record_of_an_answer(duo):
    """The root is no turn of the transcript; the answer is that of the last message."""
    first = make_child(duo, make_root("question of p1"), Candidate("3 + 4", 2, -0.5, False), 0)
    final = "Final answer: 7 apples in 2 bags"
    leaf = make_child(duo, first, Candidate(final, 2, -0.5, False), 0)
    first.V, leaf.V = 0.25, -0.5
    cost = Cost(
        agent_calls=2,
        prompt_tokens=30,
        generated_tokens=4,
        scored_tokens=50,
        truncated=Counter({"B": 1}),
        seconds=0.125,
    )
    record = evaluate.answer_record(
        make_problem("p1"), leaf, cost, "value#12345678", keep_tree=False
    )
    expected = {
        "id": "p1",
        "subject": "sums",
        "level": "easy",
        "question": "question of p1",
        "gold": "7",
        "answer": "7",
        "rung": "told",
        "correct": True,
        "agent_calls": 2,
        "prompt_tokens": 30,
        "generated_tokens": 4,
        "scored_tokens": 50,
        "seconds": 0.125,
        "truncated": {"B": 1},
        "scorer": "value#12345678",
        "transcript": [
            {"agent": "A", "message": "3 + 4", "V": 0.25},
            {"agent": "B", "message": final, "V": -0.5},
        ],
        "tree": None,
    }
    assert list(record.items()) == list(expected.items())

    assert first.reward is None
    leaf.reward = -0.5
    other = make_child(duo, first, Candidate("Final answer: 8", 2, -0.5, False), 1)
    other.V = other.reward = 0.5
    root = first.parent
    root.children, first.children, root.simulations = [first], [leaf, other], []
    tree = evaluate.answer_record(make_problem("p1"), leaf, cost, None, keep_tree=True)["tree"]
    assert [node.get("correct") for node in tree["nodes"]] == [None, None, True, False]
    assert [node.get("answer") for node in tree["nodes"]] == [None, None, "7", "8"]
    assert tree["chosen"] == 2

    wrong = evaluate.answer_record(make_problem("p1", gold="8"), leaf, cost, None, keep_tree=False)
    assert wrong["correct"] is False
    assert wrong["answer"] == "7"
    assert wrong["scorer"] is None


# ---- Answering problems --------------------------------------------------------------------------


class RecordedProgress(NoProgress):
    """Keeps the arguments of the progress bars that were made."""

    made = []

    def __init__(self, num_searches, expected, **settings):
        self.settings = {"num_searches": num_searches, "expected": expected} | settings
        RecordedProgress.made.append(self)

    def __enter__(self):
        return self

    def __exit__(self, *exception): ...


class CountedPolicy(ScriptedPolicy, Policy):
    """A scripted policy to which `report_to` gives the hook of a progress bar."""


class Evaluation:
    """Evaluates one method on the two agents of `duo`, with scripted messages."""

    def __init__(self, folder, mas):
        self.folder = folder
        self.mas = mas
        self.args = SimpleNamespace(c_uct=1.0, max_active=2, num_trees=1)

    def answer(self, names, method_name="greedy", scorers=None):
        """Answer problems. Returns the policy that did it."""
        method = parse_method(method_name, self.mas, num_candidates="2", lam=0.0)
        problems = [make_problem(name) for name in names]
        policy = CountedPolicy(lambda path: f"Final answer: {7 + path[-1]}")
        path = self.path(method_name)
        evaluate.evaluate_method(method, problems, self.mas, policy, scorers or {}, path, self.args)
        return policy

    def path(self, method_name="greedy"):
        return self.folder / f"{method_name}.jsonl"


@pytest.fixture
def evaluation(tmp_path, duo, monkeypatch):
    monkeypatch.setattr(evaluate, "SearchProgress", RecordedProgress)
    monkeypatch.setattr(RecordedProgress, "made", [])
    return Evaluation(tmp_path, duo)


def test_every_problem_has_one_record_in_the_order_they_finish(evaluation):
    """Two searches at a time: the third problem starts when the first two have finished."""
    policy = evaluation.answer(["p1", "p2", "p3"])
    assert policy.batches == [2, 2, 1, 1]
    records = read_jsonl(evaluation.path())
    assert [record["id"] for record in records] == ["p1", "p2", "p3"]
    turns = [
        {"agent": "A", "message": "Final answer: 7", "V": None},
        {"agent": "B", "message": "Final answer: 7", "V": None},
    ]
    for record in records:
        assert record["question"] == f"question of {record['id']}"
        assert record["correct"] is True
        assert record["agent_calls"] == 2
        assert record["scorer"] is None
        assert record["transcript"] == turns


def test_finished_problems_are_not_answered_again(evaluation):
    assert evaluation.answer(["p1"]).calls == 2
    line_of_p1 = evaluation.path().read_text()
    assert evaluation.answer(["p1", "p2", "p3"]).calls == 4  # p2 and p3, two messages each
    assert evaluation.path().read_text().startswith(line_of_p1)
    assert [record["id"] for record in read_jsonl(evaluation.path())] == ["p1", "p2", "p3"]
    assert evaluation.answer(["p1", "p2", "p3"]).calls == 0


def test_the_bar_counts_the_problems_that_are_left(evaluation):
    evaluation.answer(["p1"])
    policy = evaluation.answer(["p1", "p2", "p3"])
    evaluation.answer(["p1", "p2", "p3"])  # nothing is left: no bar
    first, progress = RecordedProgress.made
    assert first.settings["num_finished_before"] == 0
    assert progress.settings == {
        "num_searches": 2,
        "expected": Work(prompts=2, messages=2, states=0),
        "description": "greedy",
        "num_finished_before": 1,
        "shown": True,
    }
    assert policy.on_batch == progress.sampled


def test_a_search_is_guided_by_the_scorer_of_its_method(evaluation):
    """V is highest for the last candidate, so the answer is 8, not 7."""

    def score_by_index(requests):
        replies = []
        for _, request in requests:
            values = [node.path[-1] / 2 for node in request.nodes]
            replies.append((values, Cost()))
        return replies

    name = "mcts-4x2-policy"
    evaluation.answer(["p1"], name, scorers={"policy": score_by_index})
    [record] = read_jsonl(evaluation.path(name))
    assert record["scorer"] == "policy"
    assert record["answer"] == "8"
    assert record["correct"] is False
    assert [turn["V"] for turn in record["transcript"]] == [0.5, 0.5]
    again = evaluation.answer(["p1"], name, scorers={"policy": score_by_index})
    assert again.calls == 0  # the same scorer resumes


def test_records_of_another_scorer_are_refused_and_kept(evaluation):
    evaluation.answer(["p1"])
    path = evaluation.path()
    [record] = read_jsonl(path)
    write_records(path, [record | {"scorer": "value#12345678"}])
    content = path.read_bytes()
    with pytest.raises(InputError) as error:
        evaluation.answer(["p1", "p2"])
    assert str(error.value) == (
        f"{path} was made with the scorer value#12345678, now it is None; "
        f"choose another --run, or start over with --overwrite"
    )
    assert path.read_bytes() == content


def test_records_of_another_question_are_refused(evaluation):
    evaluation.answer(["p1"])
    path = evaluation.path()
    [record] = read_jsonl(path)
    write_records(path, [record | {"question": "another"}])
    with pytest.raises(InputError) as error:
        evaluation.answer(["p1", "p2"])
    assert str(error.value).startswith(f"{path}: the question of problem p1 has changed")


def test_two_processes_share_the_problems(evaluation, monkeypatch):
    """Each appends to its own file, and only the first shows a bar."""
    names = [f"p{number}" for number in range(1, 9)]
    monkeypatch.setenv("WORLD_SIZE", "2")
    ids_of_rank = []
    for rank in (0, 1):
        monkeypatch.setenv("RANK", str(rank))
        mine = [name for name in names if is_mine(name)]
        policy = evaluation.answer(names)
        assert policy.calls == 2 * len(mine)
        shard = evaluation.folder / f"greedy.{rank}of2.jsonl"
        assert [record["id"] for record in read_jsonl(shard)] == mine
        progress = RecordedProgress.made[-1]
        assert progress.settings["num_searches"] == len(mine)
        assert progress.settings["num_finished_before"] == 0
        assert progress.settings["shown"] == (rank == 0)
        ids_of_rank.append(mine)
    assert all(ids_of_rank)
    assert sorted(ids_of_rank[0] + ids_of_rank[1]) == names
    assert not evaluation.path().exists()


def test_a_search_has_the_c_of_the_flags(evaluation, monkeypatch):
    given = []
    start = Method.search

    def recorded(self, problem, mas, *, c_uct):
        given.append(c_uct)
        return start(self, problem, mas, c_uct=c_uct)

    monkeypatch.setattr(Method, "search", recorded)
    evaluation.args.c_uct = 0.25
    evaluation.answer(["p1"])
    assert given == [0.25]


def test_the_trees_of_the_first_problems_are_kept_also_after_a_kill(evaluation):
    """--num-trees 1: of p1, although p2 is the first of those that are left."""

    def score(requests):
        return [([0.0] * len(request.nodes), Cost()) for _, request in requests]

    name = "mcts-4x2-policy"
    evaluation.answer(["p1"], name, scorers={"policy": score})
    evaluation.answer(["p1", "p2", "p3"], name, scorers={"policy": score})
    records = read_jsonl(evaluation.path(name))
    assert [record["tree"] is not None for record in records] == [True, False, False]


def test_a_report_is_written_once_every_problem_is_answered(tmp_path, monkeypatch, capsys):
    """Of two problems, the second is left to another process."""
    two = [Problem(name, "test", f"{name}?", "1", "number") for name in "ab"]
    done = ["a"]

    def answer(method, problems, mas, policy, scorers, path, args):
        lines = [json.dumps({"id": name}) + "\n" for name in done]
        path.write_text("".join(lines))

    written = []
    policy = SimpleNamespace(settings={}, num_generated=0, num_recalled=0)
    monkeypatch.setattr(evaluate, "make_policy", lambda args, mas: policy)
    monkeypatch.setattr(evaluate, "load_problems", lambda **options: two)
    monkeypatch.setattr(evaluate, "journal_of", lambda policy, args: nullcontext())
    monkeypatch.setattr(evaluate, "search_settings", lambda args, policy: {})
    monkeypatch.setattr(evaluate, "evaluate_method", answer)
    monkeypatch.setattr(evaluate, "write_report", lambda *args: written.append(args))
    flags = ["--run", str(tmp_path), "--methods", "greedy", "--by", "subject", "level"]
    args = evaluate.parse_args(flags)
    evaluate.main(args)
    assert written == [] and "1 answers are left to the others" in capsys.readouterr().out
    done.append("b")
    evaluate.main(args)
    [(methods, records, folder, keys)] = written
    assert [method.name for method in methods] == ["greedy"]
    assert records == {"greedy": [{"id": "a"}, {"id": "b"}]}
    assert (folder, keys) == (tmp_path / "eval", ["subject", "level"])


def test_no_problem_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "load_problems", lambda **options: [])
    with pytest.raises(InputError, match="own.jsonl: no test problems"):
        evaluate.main(evaluate.parse_args(["--data", "own.jsonl", "--methods", "greedy"]))


# ---- Which methods and which weights -------------------------------------------------------------


def test_a_method_that_is_named_twice_is_evaluated_once(duo):
    """The flags complete a name, so that two names can mean one method."""
    names = ["vote-4", "mcts-8-value", "greedy", "mcts-8x1.3-value-lam0.5", "vote-4"]
    args = SimpleNamespace(methods=names, num_candidates="1.3", lam=0.5)
    methods = evaluate.read_methods(args, duo)
    described = [(method.name, method.num_candidates, method.lam) for method in methods]
    assert described == [
        ("vote-4", (1, 1), 0.0),
        ("mcts-8x1.3-value-lam0.5", (1, 3), 0.5),
        ("greedy", (1, 1), 0.0),
    ]


@pytest.mark.parametrize("name", GRAPHS)
def test_the_default_methods_fit_every_graph(name):
    """And are those of the README if there are four agents."""
    args = evaluate.parse_args([])
    methods = [method.name for method in evaluate.read_methods(args, GRAPHS[name])]
    assert {"greedy", "vote-4", "best_of-8-value", "mcts-8x3-value"} <= set(methods)
    if name == "chain":
        assert methods == evaluate.DEFAULT_METHODS


def test_the_fingerprint_of_weights_covers_the_head_and_the_adapter(tmp_path):
    head = tmp_path / "head.safetensors"
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    fingerprints = []
    for contents in ((b"head", b"adapter"), (b"HEAD", b"adapter"), (b"head", b"ADAPTER")):
        head.write_bytes(contents[0])
        adapter.write_bytes(contents[1])
        fingerprints.append(evaluate.weights_fingerprint(tmp_path))
    assert len(set(fingerprints)) == 3
    # The hash of the weights in this order; records that exist already name it.
    digest = hashlib.blake2b(b"headadapter", digest_size=4).hexdigest()
    assert fingerprints[0] == digest
