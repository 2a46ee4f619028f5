"""Tests of evaluate.py: records, resume, leaks, and summaries counted by hand."""

import json
from types import SimpleNamespace

import pytest
from conftest import become_process
from searching import DUO, ScriptedPolicy, ScriptedScorer

import evaluate
from evaluate import evaluate_method, opponents, refuse_leaks
from mas import CHAIN
from search import parse_method
from support.flags import InputError
from support.records import read_jsonl
from tasks.problems import Problem, question_key


def method_named(name, mas=CHAIN):
    return parse_method(name, mas, num_candidates="3", lam=0.0)


def make_problem(name, gold="7", level="easy"):
    question = f"question of {name}"
    return Problem(name, "test", question, gold, "number", subject="sums", level=level)


# ---- Summaries -----------------------------------------------------------------------------------

RIGHT = {  # method -> the problems that it answers right, of p1 to p5
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
TRUNCATED = [{}, {"Solver": 2}, {"Solver": 0}, {"Solver": 1, "Planner": 1}, {}]


@pytest.fixture
def records():
    """Records of five problems."""
    records = {}
    for method, right in RIGHT.items():
        records[method] = []
        for index, name in enumerate(["p1", "p2", "p3", "p4", "p5"]):
            record = {
                "id": name,
                "method": {"scorer": None},
                "correct": name in right,
                "rung": "number" if name == "p2" else "told",
                "agent_calls": CALLS[method][index],
                "prompt_tokens": 100 * (index + 1),
                "generated_tokens": 10,
                "scored_tokens": 0,
                "seconds": 0.5,
                "truncated": TRUNCATED[index],
                "tree": None,
            }
            records[method].append(record)
    return records


METHODS = [method_named(name) for name in RIGHT]


def test_the_summary_of_a_method_by_hand(records):
    summary = evaluate.summarise(METHODS, records)
    assert summary["problems"] == ["p1", "p2", "p3", "p4", "p5"]
    row = summary["methods"]["mcts-2x3-value"]
    assert (row["n"], row["right"], row["em"]) == (5, 4, 0.8)
    # Wilson: (0.8 + z^2/10 +- z sqrt(0.032 + z^2/100)) / (1 + z^2/5) with z = 1.96.
    assert (row["low"], row["high"]) == pytest.approx((0.3755, 0.9638), abs=1e-4)
    assert row["agent_calls"] == pytest.approx(63 / 5)
    assert (row["prompt_tokens"], row["generated_tokens"], row["seconds"]) == (300, 10, 0.5)
    assert row["truncated"] == {"Solver": 3, "Planner": 1}
    assert row["rungs"] == {"told": 4, "number": 1}
    assert (row["algorithm"], row["scorer"], row["num"], row["lam"]) == ("mcts", "value", 2, 0.0)


def test_a_comparison_is_the_method_minus_its_opponent(records):
    """MCTS alone is right on p2 to p5, greedy alone on p1: + 3 of 5 problems."""
    comparisons = {}
    for row in evaluate.summarise(METHODS, records)["comparisons"]:
        comparisons[row["method"], row["against"], row["why"]] = row
    assert list(comparisons) == [
        ("best_of-2-value", "greedy", "greedy"),
        ("mcts-2x3-value", "greedy", "greedy"),
        ("mcts-2x3-value", "best_of-2-value", "nearest best-of-N"),
        ("mcts-2x3-value", "mcts-2x3-policy", "same, by policy"),
        ("mcts-2x3-policy", "greedy", "greedy"),
    ]
    row = comparisons["mcts-2x3-value", "greedy", "greedy"]
    assert (row["wins"], row["losses"], row["difference"]) == (4, 1, pytest.approx(3 / 5))
    # Bonett and Price: 5 wins and 2 losses of 7, half width 1.96 sqrt((1 - (3/7)^2) / 7).
    assert (row["low"], row["high"]) == (pytest.approx(3 / 7 - 0.6693, abs=1e-4), 1.0)
    assert row["p"] == pytest.approx(2 * (1 + 5) / 2**5)  # one loss or none of five, both sides


OPPONENTS = [  # agent calls of methods, a method among them, and its opponents but greedy
    # A baseline must not lose because it was given less: 28 calls are nearer to 29 than 32 are.
    ("vote-7 28 vote-8 32 vote-9 36", "mcts-4x3-value 29", ["vote-8"]),
    ("best_of-7-value 28 best_of-9-value 36", "mcts-4x3-value 29", ["best_of-9-value"]),
    # With equal calls a baseline is the nearest; if all need less, it is the largest.
    ("vote-4 16 best_of-2-orm 8 best_of-3-orm 12", "sbs-2x2-orm 16", ["vote-4", "best_of-3-orm"]),
    # It has the same scorer.
    ("best_of-8-policy 30 best_of-9-value 36", "mcts-4x3-value 29", ["best_of-9-value"]),
    ("vote-8 32 vote-9 36 best_of-8-policy 32", "best_of-8-orm 32", ["vote-8", "best_of-8-policy"]),
    # The same search differs in the scorer alone, or in lambda alone.
    ("mcts-9x3-policy 9 sbs-4x3-policy 9 mcts-4x1.3.1.1-policy 9", "mcts-4x3-value 9", []),
    ("mcts-4x3-policy 9 mcts-4x3-policy-lam0.5 9", "mcts-4x3-value 9", ["mcts-4x3-policy"]),
    (
        "mcts-4x3-policy 9 mcts-4x3-policy-lam0.5 9 mcts-4x3-value 9",
        "mcts-4x3-value-lam0.5 9",
        ["mcts-4x3-policy-lam0.5", "mcts-4x3-value"],
    ),
    ("mcts-4x3-value 9", "mcts-4x3-policy 9", []),
]


@pytest.mark.parametrize("calls, method, expected", OPPONENTS)
def test_a_method_meets_the_nearest_baselines_and_itself_by_likelihood(calls, method, expected):
    words = f"greedy 4 {calls} {method}".split()
    pairs = zip(words[::2], words[1::2], strict=True)
    rows = {name: {"agent_calls": int(num)} for name, num in pairs}
    methods = [method_named(name) for name in rows]
    assert opponents(methods[0], methods, rows) == []
    pairs = opponents(method_named(method.split()[0]), methods, rows)
    assert [other.name for other, _ in pairs] == ["greedy", *expected]


# ---- Answering problems --------------------------------------------------------------------------


class Evaluation:
    """Evaluates methods on the agents of DUO, with scripted messages, in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.args = evaluate.parse_args(["--run", str(folder), "--num-trees", "1"])

    def answer(self, names, method="greedy", *, scorer=None, gold="7"):
        """Answer problems. Returns the policy that did it. Of two candidates, the second is 8."""
        policy = ScriptedPolicy(DUO, lambda path: f"Final answer: {7 + path[-1]}")
        scorers = dict.fromkeys(("value", "policy"), scorer)
        problems = [make_problem(name, gold) for name in names]
        method = method_named(method, DUO)
        evaluate_method(method, problems, policy, scorers, self.folder, self.args)
        return policy

    def records(self, method="greedy"):
        return read_jsonl(self.folder / f"{method}.jsonl")


@pytest.fixture
def evaluation(tmp_path):
    return Evaluation(tmp_path)


def test_a_record_has_the_answer_its_cost_and_the_graded_tree(evaluation):
    """V is highest for the last candidate, so the answer is 8, not 7."""
    name = "mcts-1x1.2-policy"
    evaluation.answer(["p1", "p2"], name, scorer=ScriptedScorer(lambda path: path[-1] / 2))
    record, other = evaluation.records(name)
    tree = record.pop("tree")
    assert other["tree"] is None  # --num-trees 1
    assert (record["gold"], record["answer"], record["correct"]) == ("7", "8", False)
    assert (record["agent_calls"], record["scored_tokens"]) == (3, 3)
    assert (record["prompt_tokens"], record["generated_tokens"]) == (20, 6)
    assert record["transcript"] == [
        {"agent": "A", "message": "Final answer: 7", "V": 0.0},
        {"agent": "B", "message": "Final answer: 8", "V": 0.5},
    ]
    answers = [(node.get("answer"), node.get("correct")) for node in tree["nodes"]]
    assert answers == [(None, None), (None, None), ("7", True), ("8", False)]
    assert (tree["chosen"], tree["simulations"]) == (3, [[3]])


# ---- What keeps results apart --------------------------------------------------------------------


@pytest.fixture
def models(tmp_path):
    """Flags that name a V trained on "Asked of V?", an ORM, and finetuned agents."""
    for name, question in (("value", "V"), ("orm", "the ORM"), ("agents", "the agents")):
        (tmp_path / name).mkdir()
        row = {"id": f"{name}-1", "question_key": question_key(f"Asked of {question}?")}
        (tmp_path / name / "problems.jsonl").write_text(json.dumps(row) + "\n")
    return SimpleNamespace(run=tmp_path, value=None, orm=None, adapter=None)


def test_answers_that_were_guided_by_another_v_are_refused_and_kept(evaluation):
    """V is the one that was loaded, whatever is in its folder by now."""
    name = "sbs-1x2-value"
    scorer = ScriptedScorer(lambda path: path[-1])
    scorer.model = SimpleNamespace(fingerprint="0123456789")
    evaluation.answer(["p1"], name, scorer=scorer)
    assert evaluation.answer(["p1"], name, scorer=scorer).requests == []
    path = evaluation.folder / f"{name}.jsonl"
    before = path.read_bytes()
    scorer.model.fingerprint = "9876543210"
    with pytest.raises(InputError, match=str(path)):
        evaluation.answer(["p1", "p2"], name, scorer=scorer)
    scorer.model.fingerprint = "0123456789"
    with pytest.raises(InputError, match="p1"):  # another problem with the same id
        evaluation.answer(["p1"], name, scorer=scorer, gold="8")
    assert path.read_bytes() == before
    evaluation.answer(["p1", "p2"], name, scorer=scorer)


LEAKS = [  # method, question, and the model that was trained on it, if one that is used was
    ("mcts-2-value", "Asked of V?", "value"),
    ("best_of-2-orm", "Asked of the ORM?", "orm"),
    ("mcts-2-value-lam0.5", "Asked of the ORM?", "orm"),
    ("greedy", "Asked of the agents?", "agents"),
    ("mcts-2-value", "Asked of the ORM?", None),
    ("mcts-2-policy", "Asked of V?", None),
]


@pytest.mark.parametrize("name, question, model", LEAKS)
def test_questions_that_a_used_model_was_trained_on_are_refused(models, name, question, model):
    problems = [make_problem("fine"), Problem("mine", "test", question, "1", "number")]
    methods = [method_named("vote-2"), method_named(name)]
    if model == "agents":
        refuse_leaks(problems, methods, models)
        models.adapter = str(models.run / "agents")
    if model is None:
        refuse_leaks(problems, methods, models)
    else:
        with pytest.raises(InputError, match=f"problem mine .* {model}-1, which .*/{model} "):
            refuse_leaks(problems, methods, models)


# ---- The script ----------------------------------------------------------------------------------


def test_the_script_reports_once_all_processes_have_finished(tmp_path, monkeypatch, capsys):
    """Of four problems, some are left to the second process."""
    flags = ["--run", str(tmp_path), "--device", "cpu", "--num-threads", "1", "--num-problems", "4"]
    args = evaluate.parse_args([*flags, "--methods", "greedy", "mcts-2x1.2.1.1-random"])
    for rank in range(2):
        assert not (tmp_path / "eval" / "summary.json").exists()
        become_process(monkeypatch, rank, 2)
        evaluate.main(args)
    summary = json.loads((tmp_path / "eval" / "summary.json").read_text())
    expected = [f"packs-test-0000{index}" for index in range(4)]
    assert summary["problems"] == expected
    for row in summary["methods"].values():
        assert row["n"] == 4 and row["agent_calls"] >= 4
    become_process(monkeypatch, 0, 1)
    capsys.readouterr()
    evaluate.main(args)
    assert "\n0 messages generated" in "\n" + capsys.readouterr().out
