"""Tests of tasks.py: problems, splits, data files and the hub."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from support.flags import InputError
from tasks import problems as tasks
from tasks.grading import extract_answer
from tasks.problems import (
    EMBEDDED,
    TASKS,
    Problem,
    is_correct,
    load_problems,
    problem_at,
    question_key,
)
from tiny import problems as tiny_problems
from tiny.problems import make_puzzle, size_of


def write_rows(path, rows):
    """Write rows as JSON lines, and return the path as a flag would give it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_one(folder, task, row):
    """Load the only problem of a file with one row."""
    data = write_rows(folder / f"{task}.jsonl", [row])
    [problem] = load_problems(task=task, data=data, split="test", num=1)
    return problem


def test_neither_of_two_numbers_will_do():
    problem = Problem("p", "test", "q", "16", "number")
    answer = extract_answer("16 − 3 = 13. Final answer: 13", "number")
    assert not is_correct(problem, answer.value)


def test_an_answer_is_compared_as_its_type_demands():
    problem = Problem("p", "test", "q", "x+1", "math")
    assert is_correct(problem, "1+x")
    assert not is_correct(problem, "1-x")
    assert not is_correct(problem, None)


def test_an_unknown_task_is_named():
    with pytest.raises(InputError, match="nonsense: unknown; it is one of tiny, tiny-score, gsm8k"):
        load_problems(task="nonsense", data=None, split="test", num=1)


# ---- Rows of data sets ---------------------------------------------------------------------------

OPTIONS = [  # the options, the answer in the data, and the letter of the right option
    (["8", "2", "24", "120"], 2, "C"),
    (["3", "2", "1", "0"], 3, "D"),
    (["1", "0", "3", "2"], 0, "A"),
    (["8", "2"], "2", "B"),
    (["red", "blue"], "blue", "B"),
    (["red", "blue"], "1", "B"),
    (["B", "A", "C"], "A", "A"),
    (["red"] * 4 + ["blue"], "E", "E"),
]


@pytest.mark.parametrize("choices, answer, letter", OPTIONS)
def test_an_option_is_given_by_letter_index_or_text(tmp_path, choices, answer, letter):
    row = {"question": "q", "choices": choices, "answer": answer}
    assert load_one(tmp_path, "mmlu", row).gold == letter


def test_columns_of_gsm8k_are_understood(tmp_path):
    row = {"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    assert load_one(tmp_path, "gsm8k", row).gold == "42"
    with pytest.raises(InputError, match="cannot be read as a number"):
        load_one(tmp_path, "gsm8k", {"question": "How many?", "answer": "#### many"})


def test_columns_of_math_are_understood(tmp_path):
    row = {
        "problem": "Find x.",
        "solution": r"So $x = \boxed{\frac{1}{2}}$.",
        "level": "Level 5",
        "type": "Algebra",
    }
    problem = load_one(tmp_path, "math", row)
    assert problem.gold == "1/2"
    assert problem.level == "Level 5"
    assert problem.subject == "Algebra"
    assert problem.answer_type == "math"


def test_columns_of_mmlu_are_understood(tmp_path):
    row = {"question": "Which?", "choices": ["p", "q", "r", "s", "t"], "subject": "law"}
    problem = load_one(tmp_path, "mmlu", row | {"answer": 0})
    assert problem.gold == "A"
    assert problem.question == "Which?\nA) p\nB) q\nC) r\nD) s\nE) t"
    assert problem.subject == "law"
    for answer in (4, "4", "E", "t"):
        assert load_one(tmp_path, "mmlu", row | {"answer": answer}).gold == "E"
    with pytest.raises(InputError, match="'5' is none of the options"):
        load_one(tmp_path, "mmlu", {"question": "Which?", "choices": ["p", "q"], "answer": 5})


def test_columns_of_logiqa_are_understood(tmp_path):
    row = {
        "context": "All cats purr.",
        "query": "What follows?",
        "options": ["x", "y"],
        "correct_option": "1",
    }
    problem = load_one(tmp_path, "logiqa", row)
    assert problem.gold == "B"
    assert problem.question.startswith("All cats purr.\nWhat follows?\nA) x")


def test_a_row_is_read_whole():
    row = {"unique_id": 7, "problem": " p ", "answer": " 1 ", "type": "Algebra", "level": 3}
    expected = tasks.RawProblem("7", "p", "1", "Algebra", "3", "d, line 1")
    assert tasks.read_row(row, "d, line 1") == expected


def test_a_row_with_an_answer_and_a_solution_has_the_answer():
    row = {"problem": "p", "answer": "7", "solution": r"So \boxed{8}."}
    assert tasks.read_row(row, "d, line 1").gold == "7"
    row = {"problem": "p", "answer": None, "solution": r"So \boxed{8}."}
    assert tasks.read_row(row, "d, line 1").gold == "8"


def test_an_answer_under_another_name_than_solution_is_no_worked_solution():
    row = {"question": "Pick", "correct_option": "42", "solution": "we add"}
    assert tasks.read_row(row, "d, line 1").gold == "42"


NO_LISTS = [("red;green", "str"), ({"text": ["red", "green"], "label": ["A", "B"]}, "dict")]


@pytest.mark.parametrize("choices, type_name", NO_LISTS)
def test_options_that_are_no_list_are_refused(choices, type_name):
    """The options of a text would be its characters, those of a dict its keys."""
    with pytest.raises(InputError, match=f"d, line 3: the options are of type {type_name}; give"):
        tasks.read_row({"question": "Pick", "choices": choices, "answer": "B"}, "d, line 3")


@pytest.mark.parametrize("answer", [2, "2", "C", "r", "²"])
def test_an_answer_behind_the_last_option_is_refused(answer):
    row = {"question": "Which?", "choices": ["p", "q"], "answer": answer}
    with pytest.raises(InputError) as error:
        tasks.read_row(row, "d, line 3")
    assert str(error.value) == (
        f"d, line 3: the answer '{answer}' is none of the options; "
        f"give its letter, its index from 0, or its text"
    )


SOLUTIONS = [  # text, whether it is a worked solution, its gold answer
    ("3 * 4 = 12\n#### 12 apples ", False, "12 apples"),
    ("#### 1 is wrong #### 2", False, "2"),
    ("#### 1 #### 2 #### 3", False, "3"),
    (r"So \boxed{7}, then \boxed{8}.", True, "8"),
    ("So 8.", True, ""),
    (r"\boxed{8}", False, r"\boxed{8}"),
]


@pytest.mark.parametrize("text, is_solution, gold", SOLUTIONS)
def test_the_gold_answer_of_a_solution(text, is_solution, gold):
    assert tasks._gold_of_solution(text, is_solution) == gold


def test_a_formula_that_cannot_be_compared_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks, "is_comparable", lambda gold, answer_type: answer_type != "math")
    row = {"id": "a", "problem": "p", "answer": "x+1"}
    with pytest.raises(InputError, match="problem a cannot be read as a math: 'x\\+1'"):
        load_one(tmp_path, "math", row)


# ---- Splits, ids and answer types ----------------------------------------------------------------


def test_the_split_and_the_order_of_a_question_never_change():
    """A new hash would put questions that a saved V was trained on among the held-out ones."""
    raw_problems = []
    for number in range(40):
        question = f"How much is {number}+1?"
        raw_problems.append(tasks.RawProblem(str(number), question, "1", None, None, "here"))

    heldout = tasks._first_of_split(raw_problems, "heldout", 40)
    assert sorted(int(raw.id) for raw in heldout) == [5, 18, 21, 33]
    in_order = tasks._first_of_split(raw_problems[:10], "test", 9)
    assert [int(raw.id) for raw in in_order] == [1, 5, 8, 2, 3, 9, 4, 6, 7]
    assert question_key("How much is 0+1?") == "6d0b55cc1a669634"


NARROWEST = [  # the gold answers of a file, and the type that fits all
    (["A", "(B)", "C)"], "letter"),
    (["1,000", "-3", "1/2", "5 apples"], "number"),
    (["1", "A"], "math"),
    (["1", "x"], "math"),
    (["1", "Dozens: 12"], "math"),
    (["1", "3 4"], "math"),
    (["1", "AB"], "math"),
]


@pytest.mark.parametrize("golds, answer_type", NARROWEST)
def test_the_narrowest_answer_type_fits_all_answers(golds, answer_type):
    assert tasks._narrowest_answer_type(golds) == answer_type


SAME_GOLD = [  # two gold answers of one question, their type, and whether they agree
    ("Dozens: 12", "12", "number", True),
    ("12", "Dozens: 12", "number", True),
    ("Dozens: 12", "13", "number", False),
    ("x+1", "1+x", "math", True),
    ("x+1", "x-1", "math", False),
    ("many", "many", "number", True),  # not readable, but the same
    ("many", "lots", "number", False),
]


@pytest.mark.parametrize("a, b, answer_type, equal", SAME_GOLD)
def test_duplicates_agree_if_their_answers_have_the_same_value(a, b, answer_type, equal):
    """In a file, the same question with another answer is refused."""
    raw_problems = [tasks.RawProblem(None, "q", gold, None, None, "here") for gold in (a, b)]
    if equal:
        kept = tasks._without_duplicates(raw_problems, answer_type, "d", from_file=True)
        assert len(kept) == 1
    else:
        with pytest.raises(InputError, match="one question, but the answers"):
            tasks._without_duplicates(raw_problems, answer_type, "d", from_file=True)


def test_of_two_duplicates_the_one_with_an_id_stays():
    named = tasks.RawProblem("a", "q", "1", "Algebra", None, "line 1")
    nameless = tasks.RawProblem(None, "q", "1", None, None, "line 2")
    for pair in ([named, nameless], [nameless, named]):
        assert tasks._without_duplicates(pair, "number", "d", from_file=True) == [named]


def test_own_data_is_split_into_train_and_heldout(tmp_path):
    rows = []
    for number in range(0, 4000, 40):
        answer = f"reasoning #### {number:,}"
        rows.append({"id": f"p{number}", "question": f"q {number}", "answer": answer})
    data = write_rows(tmp_path / "d.jsonl", rows)

    problems, ids = {}, {}
    for split in ("train", "heldout", "test"):
        problems[split] = load_problems(task="tiny", data=data, split=split, num=100)
        ids[split] = {problem.id for problem in problems[split]}
    assert not ids["train"] & ids["heldout"]
    assert ids["train"] | ids["heldout"] == ids["test"]
    assert 2 < len(ids["heldout"]) < 30

    golds = {problem.gold for problem in problems["test"]}
    assert golds == {str(number) for number in range(0, 4000, 40)}
    assert problems["test"][0].answer_type == "number"


def test_the_answer_type_of_own_data_is_found(tmp_path):
    rows = [{"question": "q", "answer": "E"}, {"question": "r", "answer": "A"}]
    data = write_rows(tmp_path / "e.jsonl", rows)
    problems = load_problems(task="tiny", data=data, split="test", num=2)
    assert [problem.answer_type for problem in problems] == ["letter", "letter"]


SAME_QUESTION = [  # two questions, and whether they are the same one
    ("How much is 3-5?", "How much is 3+5?", False),
    ("How much is 3-5?", "How much is 35?", False),
    ("How much is 3 5?", "How much is 35?", False),
    ("How much is 1.5?", "How much is 15?", False),
    ("How much is (1+2)*3?", "How much is 1+2*3?", False),
    ("How much is 3-5?", " how much  is\n3-5? ", True),
]


@pytest.mark.parametrize("a, b, equal", SAME_QUESTION)
def test_the_key_of_a_question_ignores_nothing_but_case_and_spacing(a, b, equal):
    assert (question_key(a) == question_key(b)) == equal


def problems_of(path, split, num):
    return load_problems(task="gsm8k", data=path, split=split, num=num)


def test_no_question_is_on_both_sides_of_the_split(tmp_path, capsys):
    rows = []
    for number in range(100):
        row = {"question": f"How much is {number}+1?", "answer": str(number + 1)}
        rows.append(row | {"id": f"a{number}"})
        rows.append(row | {"id": f"b{number}", "answer": f"Total: {number + 1}.0"})
    data = write_rows(tmp_path / "d.jsonl", rows)

    train, heldout = problems_of(data, "train", 200), problems_of(data, "heldout", 200)
    questions = [problem.question for problem in train + heldout]
    assert len(questions) == len(set(questions)) == 100
    assert len(heldout) > 2
    assert "100 duplicates of questions were left out" in capsys.readouterr().err

    backwards = write_rows(tmp_path / "e.jsonl", rows[::-1])
    assert problems_of(backwards, "heldout", 200) == heldout


def test_one_question_with_two_answers_is_refused(tmp_path):
    rows = [
        {"question": "How much is 1+1?", "answer": "2"},
        {"question": "How much is 1+2?", "answer": "3"},
        {"question": "how much is  1+1?", "answer": "3"},
    ]
    data = write_rows(tmp_path / "d.jsonl", rows)
    complaint = r"d.jsonl, line 1 and .*d.jsonl, line 3: one question.*'2' and '3'"
    with pytest.raises(InputError, match=complaint) as error:
        problems_of(data, "test", 3)
    assert "\n" not in str(error.value)


def test_a_question_of_the_hub_with_two_answers_is_left_out_and_counted(monkeypatch, capsys):
    rows = [
        {"question": "How much is 1+1?", "answer": "#### 2"},
        {"question": "How much is 1+2?", "answer": "#### 3"},
        {"question": "How much is 1+1?", "answer": "#### 4"},
    ]
    monkeypatch.setattr(tasks, "_read_hub", lambda task, split: rows)
    [problem] = load_problems(task="gsm8k", data=None, split="test", num=1)
    assert problem.question == "How much is 1+2?"
    printed = capsys.readouterr().err
    assert "gsm8k: 1 questions with contradicting answers were left out" in printed


def test_test_problems_of_the_hub_come_from_its_test_split(monkeypatch):
    def read_hub(task, split):
        return [{"question": f"How many in {split}?", "answer": "#### 2"}]

    monkeypatch.setattr(tasks, "_read_hub", read_hub)
    [problem] = load_problems(task="gsm8k", data=None, split="test", num=1)
    assert problem.question == "How many in test?"


@pytest.mark.parametrize("task, prefix", [("tiny", "own"), ("gsm8k", "gsm8k")])
def test_an_id_names_the_file_or_the_public_task(tmp_path, task, prefix):
    """The file names own data; a copy of a public data set has the ids of the data set."""
    data = write_rows(tmp_path / "own.jsonl", [{"question": "How many?", "answer": "2"}])
    [problem] = load_problems(task=task, data=data, split="test", num=1)
    assert problem.id == f"{prefix}-{question_key('How many?')}"


def test_split_and_order_depend_on_the_questions_alone(tmp_path):
    rows = []
    for number in range(80):
        row = {"question": f"How much is {number}+1?", "answer": str(number + 1)}
        rows.append(row | {"id": f"a{number}"})
    renamed = [row | {"id": f"b{number}"} for number, row in enumerate(rows)]
    nameless = [{"question": row["question"], "answer": row["answer"]} for row in rows]

    questions = {}
    for split in ("train", "heldout", "test"):
        for name, variant in (("a", rows), ("b", renamed[::-1]), ("c", nameless)):
            data = write_rows(tmp_path / f"{name}.jsonl", variant)
            questions[name] = [problem.question for problem in problems_of(data, split, 80)]
        assert questions["a"] == questions["b"] == questions["c"]


def test_rows_without_ids_keep_theirs_when_the_file_is_reordered(tmp_path):
    rows = [{"question": f"How much is {i}+1?", "answer": str(i + 1)} for i in range(40)]
    rows += [{"question": "How much is 5-3?", "answer": "2"}]
    rows += [{"question": "How much is 5+3?", "answer": "8"}]
    forwards = write_rows(tmp_path / "a.jsonl", rows)
    backwards = write_rows(tmp_path / "b.jsonl", rows[::-1])

    all_forwards = load_problems(task="gsm8k", data=forwards, split="test", num=42)
    all_backwards = load_problems(task="gsm8k", data=backwards, split="test", num=42)
    golds = {problem.id: problem.gold for problem in all_forwards}
    assert golds == {problem.id: problem.gold for problem in all_backwards}
    assert len(golds) == 42

    first_five = load_problems(task="gsm8k", data=forwards, split="test", num=5)
    ids = [problem.id for problem in all_backwards]
    assert [problem.id for problem in first_five] == ids[:5]


# ---- Embedded problems ---------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["heldout", "test"])
@pytest.mark.parametrize("task", EMBEDDED)
def test_embedded_problems_to_measure_on_are_independent(capsys, task, split):
    family = EMBEDDED[task]
    problems = load_problems(task=task, data=None, split=split, num=99_999_999)
    assert len(problems) == size_of(family, split)
    sets = set()
    for index, problem in enumerate(problems):
        puzzle = make_puzzle(family, split, index)
        assert problem.question == puzzle.question
        pair = (puzzle.a, puzzle.b)
        if family == "packs":  # swapping the items changes only their names
            pair = tuple(sorted(pair))
        sets.add((*pair, puzzle.n, puzzle.t))
    assert len(sets) == len(problems)

    warning = f"{task}: 99999999 {split} problems were requested, but there are only {len(sets)}"
    assert warning in capsys.readouterr().err


def test_an_embedded_problem_has_all_fields_of_its_puzzle():
    [problem] = load_problems(task="tiny", data=None, split="test", num=1)
    assert problem == Problem(
        id="packs-test-00000",
        split="test",
        question="Finn takes 5 rides. A short ride lasts 4 minutes and a long ride lasts 6 minutes."
        " Finn rides 26 minutes in all. Anna has 10 books. How many long rides are there?",
        gold="3",
        answer_type="number",
        subject="short and long",
        level="5",
    )


def test_embedded_training_problems_end(monkeypatch):
    """The split `train` repeats numbers in other words, but not for ever."""
    assert size_of("packs", "train") == 100_000
    monkeypatch.setattr(tiny_problems, "MAX_TRAIN", 500)
    problems = load_problems(task="tiny", data=None, split="train", num=99_999_999)
    assert len(problems) == 500
    assert len({problem.id for problem in problems}) == 500


def test_one_test_problem_is_found_by_its_place(tmp_path, capsys):
    problems = load_problems(task="tiny", data=None, split="test", num=3)
    assert problem_at(task="tiny", data=None, position=3) == problems[2]
    with pytest.raises(InputError, match="--index 99999999: --task tiny has 178 test problems"):
        problem_at(task="tiny", data=None, position=99_999_999)

    data = write_rows(tmp_path / "d.jsonl", [{"question": "q", "answer": "1"}])
    with pytest.raises(InputError, match="--index 2: .*d.jsonl has 1 test problems"):
        problem_at(task="tiny", data=data, position=2)
    assert capsys.readouterr().err == ""  # the error is the only line


# ---- Files and the hub ---------------------------------------------------------------------------

BAD_ROWS = [  # rows, and the complaint about them
    ([{"question": "q"}], "line 1: no `answer`"),
    ([{"question": "", "answer": "1"}], "line 1: no `question`"),
    ([{"question": "\ud83d?", "answer": "1"}], "line 1: it has half of a character"),
    ([{"id": "a", "question": q, "answer": "1"} for q in "qr"], "d.jsonl: the id a occurs twice"),
    (
        [{"id": "a", "question": "q", "answer": "$$"}],
        "d.jsonl: the answer of problem a cannot be read as a",
    ),
]


@pytest.mark.parametrize("rows, complaint", BAD_ROWS)
def test_bad_data_is_refused_with_its_place(tmp_path, rows, complaint):
    data = write_rows(tmp_path / "d.jsonl", rows)
    with pytest.raises(InputError, match=complaint):
        load_problems(task="tiny", data=data, split="test", num=1)


def test_data_without_problems_is_named(tmp_path):
    with pytest.raises(InputError, match="d.jsonl: it has no problems"):
        load_problems(task="tiny", data=write_rows(tmp_path / "d.jsonl", []), split="test", num=1)


def test_torn_or_missing_data_is_named(tmp_path):
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"question": "q", "answer": "1"}\n{"quest')
    with pytest.raises(InputError, match="torn.jsonl, line 2"):
        load_problems(task="tiny", data=str(torn), split="test", num=1)

    missing = tmp_path / "none.jsonl"
    with pytest.raises(InputError, match="no such file"):
        load_problems(task="tiny", data=str(missing), split="test", num=1)


def test_a_damaged_file_is_not_blamed_on_the_network(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bad.parquet"
    path.write_text("question,answer\nq,1\n")
    with pytest.raises(InputError, match="bad.parquet: cannot be loaded") as error:
        load_problems(task="tiny", data=str(path), split="test", num=1)
    assert "offline" not in str(error.value)


def test_parquet_files_are_read_as_the_hub_stores_them(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([{"question": "q", "answer": "#### 7"}]).to_parquet(path)
    [problem] = load_problems(task="gsm8k", data=str(path), split="test", num=1)
    assert problem.gold == "7"


@pytest.mark.parametrize("task", TASKS)
def test_a_data_set_that_cannot_be_loaded_is_one_line(monkeypatch, task):
    import datasets

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach the hub\nsecond line")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    complaint = f"--task {task}: cannot be loaded .Couldn't reach the hub.; .* --data FILE"
    with pytest.raises(InputError, match=complaint) as error:
        load_problems(task=task, data=None, split="test", num=1)
    assert "\n" not in str(error.value)


HUB_SPLITS = [  # task, split, the arguments of load_dataset: set, configuration, revision, split
    ("gsm8k", "train", "openai/gsm8k", "main", "main", "train"),
    ("gsm8k", "heldout", "openai/gsm8k", "main", "main", "train"),
    ("gsm8k", "test", "openai/gsm8k", "main", "main", "test"),
    ("math", "heldout", "DigitalLearningGmbH/MATH-lighteval", None, "main", "train"),
    ("math", "test", "HuggingFaceH4/MATH-500", None, "main", "test"),
    ("mmlu", "train", "cais/mmlu", "all", "main", "auxiliary_train"),
    ("logiqa", "test", "lucasmccabe/logiqa", None, "refs/convert/parquet", "test"),
]


@pytest.mark.parametrize("task, split, dataset, configuration, revision, hub_split", HUB_SPLITS)
def test_a_split_is_read_from_its_data_set_of_the_hub(
    monkeypatch, task, split, dataset, configuration, revision, hub_split
):
    import datasets

    calls = []

    def load_dataset(*args, **options):
        calls.append((args, options))
        return SimpleNamespace(to_list=lambda: [{"question": "q"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert tasks._read_hub(task, split) == [{"question": "q"}]
    assert calls == [((dataset, configuration), {"revision": revision, "split": hub_split})]


def test_the_source_of_problems_is_recorded():
    hub = TASKS["gsm8k"].hub
    assert tasks.source("gsm8k", None) == {"task": "gsm8k", "data": None, "hub": hub}
    assert tasks.source("gsm8k", "d.csv") == {"task": "gsm8k", "data": "d.csv", "hub": None}
    assert tasks.source("tiny", None) == {"task": "tiny", "data": None, "hub": None}


FILES = {
    "d.csv": "question,answer\nHow many?,7\n",
    "d.json": '[{"question": "How many?", "answer": 7}]',
}


@pytest.mark.parametrize("name", FILES)
def test_csv_and_json_are_read_by_their_name(tmp_path, monkeypatch, name):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / name).write_text(FILES[name])
    [problem] = load_problems(task="tiny", data=str(tmp_path / name), split="test", num=1)
    assert (problem.question, problem.gold) == ("How many?", "7")


# ---- Records of earlier problems -----------------------------------------------------------------

RECORDED = Problem("p1", "test", "How many?", "7", "number")


def test_records_of_the_same_problems_are_accepted():
    missing = Problem("p0", "test", "Which?", "1", "number")
    records = {"p1": {"question": "How many?", "gold": "7"}, "p2": {"question": "", "gold": ""}}
    tasks.check_same_problems([missing, RECORDED], records, Path("trees.jsonl"))


CHANGES = [  # what is recorded, the key that the message names, and both of its values
    ({"question": "How much?"}, "question", "'How much?'", "'How many?'"),
    ({"gold": "8"}, "gold", "'8'", "'7'"),
    ({"question": "q" * 40}, "question", f"'{'q' * 40}'", "'How many?'"),
    ({"question": "q" * 41}, "question", f"'{'q' * 37}...'", "'How many?'"),
]


@pytest.mark.parametrize("change, key, there, now", CHANGES)
def test_a_record_of_another_problem_is_refused(change, key, there, now):
    """A problem without a record comes first: the others must still be checked."""
    missing = Problem("p0", "test", "Which?", "1", "number")
    records = {"p1": {"question": "How many?", "gold": "7"} | change}
    with pytest.raises(InputError) as error:
        tasks.check_same_problems([missing, RECORDED], records, Path("trees.jsonl"))
    assert str(error.value) == (
        f"trees.jsonl: the {key} of problem p1 has changed (there {there}, now {now}); "
        f"choose another --run, or start over with --overwrite"
    )
