"""Tests of tasks/problems.py: problems, splits, data files and the hub."""

import gzip
import io
import json
import math
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from support.flags import InputError, Parser
from tasks.problems import (
    Problem,
    add_problem_arguments,
    check_unchanged,
    load_problems,
    load_training_problems,
    question_key,
    read_row,
)


def write_rows(path, rows):
    """Write rows as JSON lines, and return the path as a flag would give it."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load_rows(folder, rows, *, task, split="test", num=1000):
    """Load the problems of a file with these rows."""
    data = write_rows(folder / "d.jsonl", rows)
    return load_problems(task, data, {split: num})


def sums(numbers):
    """Return a row for each number: how much is the number and 1?"""
    return [{"question": f"How much is {i}+1?", "answer": str(i + 1)} for i in numbers]


# ---- Rows of data sets ---------------------------------------------------------------------------

OPTIONS = [  # the options, the answer in the data, and the letter of the right option
    (["1", "0", "3", "2"], 0, "A"),  # an integer is an index, from 0
    (["8", "2"], "2", "B"),
    (["red", "blue"], "blue", "B"),
    (["red", "blue"], "1", "B"),
    (["B", "A", "C"], "A", "A"),  # a letter before a text
    (["red", "blue"], "C", None),
    (["red", "blue"], 2, None),
    (["red", "blue"], "²", None),
    (["red"] * 26, "Z", "Z"),
    (["red"] * 27, "A", None),  # there is no letter
    (["red", {"text": "blue"}], "A", None),
    ("red;blue", "B", None),  # the options of a text would be its characters
]


@pytest.mark.parametrize("choices, answer, letter", OPTIONS)
def test_an_option_is_given_by_letter_index_or_text(choices, answer, letter):
    row = {"question": "Which?", "choices": choices, "answer": answer}
    if letter is not None:
        assert read_row(row, "d").gold == letter
    else:
        with pytest.raises(InputError, match="d, line 3.* options"):
            read_row(row, "d, line 3")


def test_the_columns_of_the_public_data_sets_are_understood(tmp_path):
    gsm8k = {"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}
    [problem] = load_rows(tmp_path, [gsm8k], task="gsm8k")
    assert problem.gold == "42"

    math = {"problem": "Find x.", "solution": r"So $x = \boxed{\frac{1}{2}}$."}
    math |= {"level": "Level 5", "type": "Algebra", "unique_id": 7}
    [problem] = load_rows(tmp_path, [math], task="math")
    assert problem == Problem("7", "test", "Find x.", "1/2", "math", "Algebra", "Level 5")

    mmlu = {"question": "Which?", "choices": ["p", "q"], "answer": 0, "subject": "law"}
    [problem] = load_rows(tmp_path, [mmlu | {"id": "m"}], task="mmlu")
    assert problem == Problem("m", "test", "Which?\nA) p\nB) q", "A", "letter", "law")

    logiqa = {"context": "All cats purr.", "query": "So?", "options": ["x", "y"]}
    [problem] = load_rows(tmp_path, [logiqa | {"correct_option": "1", "id": "l"}], task="logiqa")
    assert problem == Problem("l", "test", "All cats purr.\nSo?\nA) x\nB) y", "B", "letter")


GOLDS = [  # columns, and the gold answer that they give
    ({"answer": "7", "solution": r"So \boxed{8}."}, "7"),
    ({"answer": 7, "solution": 7}, "7"),
    ({"answer": None, "solution": r"So \boxed{7}, then \boxed{8}."}, "8"),
    ({"correct_option": "42", "solution": r"So \boxed{8}."}, "42"),
    ({"answer": r"\boxed{8}"}, r"\boxed{8}"),
    ({"answer": "3 * 4 = 12\n#### 12 apples "}, "12 apples"),
    ({"answer": "#### 1 #### 2 #### 3"}, "3"),
]


@pytest.mark.parametrize("columns, gold", GOLDS)
def test_the_gold_answer_of_a_row(columns, gold):
    assert read_row({"question": "q"} | columns, "d").gold == gold


BAD_ROWS = [  # rows, and the complaint about them
    ([{"question": "q"}], "row 1: no `answer`"),
    ([{"question": " ", "answer": "1"}], "row 1: no `question`"),
    ([{"id": "a", "question": q, "answer": "1"} for q in "qr"], "d.jsonl: the id a occurs twice"),
    ([{"id": "a", "question": "q", "answer": "$$"}], "d.jsonl: the answer of problem a cannot"),
    ([{"id": "a", "question": "q", "answer": "}{"}], "problem a cannot be read as a math"),
    ([{"question": "q", "answer": math.nan}], "row 1: NaN is not a finite number"),
    ([{"question": "q", "answer": {"value": 1}}], "row 1: {.* is neither"),
    ([{"id": "\udc80", "question": "q", "answer": "1"}], "row 1: it has half of a character"),
    ([], "d.jsonl: it has no problems"),
]


@pytest.mark.parametrize("rows, complaint", BAD_ROWS)
def test_bad_data_is_refused_with_its_place(tmp_path, rows, complaint):
    with pytest.raises(InputError, match=complaint):
        load_rows(tmp_path, rows, task="tiny")


# ---- Splits, ids and answer types ----------------------------------------------------------------


def test_the_split_and_the_order_of_a_question_never_change(tmp_path):
    """A new hash would put questions that a saved V was trained on among the held-out ones."""
    rows = [row | {"id": str(i)} for i, row in enumerate(sums(range(40)))]
    heldout = load_rows(tmp_path, rows, task="gsm8k", split="heldout")
    assert sorted(int(problem.id) for problem in heldout) == [5, 18, 21, 33]
    in_order = load_rows(tmp_path, rows[:10], task="gsm8k", num=9)
    assert [int(problem.id) for problem in in_order] == [1, 5, 8, 2, 3, 9, 4, 6, 7]
    assert question_key("How much is 0+1?") == "6d0b55cc1a669634"


def test_split_and_order_depend_on_the_questions_alone(tmp_path):
    rows = [row | {"id": f"a{i}"} for i, row in enumerate(sums(range(80)))]
    renamed = [row | {"id": f"b{i}"} for i, row in enumerate(rows)][::-1]
    nameless = sums(range(80))
    ids = {}
    for split in ("train", "heldout", "test"):
        variants = []
        for variant in (rows, renamed, nameless, nameless[::-1]):
            variants.append(load_rows(tmp_path, variant, task="gsm8k", split=split))
        questions = [[problem.question for problem in problems] for problems in variants]
        assert questions[0] == questions[1] == questions[2] == questions[3]
        assert variants[2] == variants[3]  # ids from the hash of the question
        assert {problem.split for problem in variants[0]} == {split}
        ids[split] = {problem.id for problem in variants[0]}
    assert not ids["train"] & ids["heldout"]
    assert ids["train"] | ids["heldout"] == ids["test"]
    assert len(ids["test"]) == 80


NARROWEST = [  # the gold answers of a file, and the type that fits all
    (["A", "(B)", "C)"], "letter"),
    (["1,000", "-3", "1/2", "5 apples"], "number"),
    (["1", "A"], "math"),
    (["1", "Dozens: 12"], "math"),
    (["1", "AB"], "math"),
]


@pytest.mark.parametrize("golds, answer_type", NARROWEST)
def test_the_narrowest_answer_type_fits_all_answers_of_a_file(tmp_path, golds, answer_type):
    rows = [{"question": f"q {gold}", "answer": gold} for gold in golds]
    [problem] = load_rows(tmp_path, rows, task="tiny", num=1)  # all of the file, not the first
    assert problem.answer_type == answer_type


def test_the_key_of_a_question_ignores_nothing_but_case_and_spacing():
    sums = ("How much is 3-5?", "How much is 3+5?", "How much is 3 5?", "How much is 35?")
    assert len({question_key(question) for question in sums}) == 4
    assert question_key(" how much  is\n3-5? ") == question_key(sums[0])


DUPLICATES = [  # two gold answers of one question, the task, and whether they agree
    ("Dozens: 12", "12", "gsm8k", True),
    ("Dozens: 12", "13", "gsm8k", False),
    ("x+1", "1+x", "math", True),
    ("x+1", "x-1", "math", False),
    ("many", "lots", "gsm8k", False),
]


@pytest.mark.parametrize("a, b, task, agree", DUPLICATES)
def test_a_question_that_occurs_twice_counts_once_if_its_answers_agree(
    tmp_path, capsys, a, b, task, agree
):
    rows = [{"question": "How much is 1+1?", "answer": a}, {"question": "Q", "answer": "1"}]
    rows += [{"id": "z", "question": "how much is  1+1?", "answer": b}]
    if agree:
        problems = load_rows(tmp_path, rows, task=task)
        assert problems == load_rows(tmp_path, rows[::-1], task=task)
        assert "z" in {problem.id for problem in problems}  # the one with an id stays
        assert len(problems) == 2
        assert "1 duplicates" in capsys.readouterr().err
    else:
        with pytest.raises(InputError, match=r"d.jsonl, row 1 and .*d.jsonl, row 3: one"):
            load_rows(tmp_path, rows, task=task)


def test_training_problems_are_of_the_task_that_the_flags_name(tmp_path):
    parser = Parser("doc")
    add_problem_arguments(parser, training=True)
    problems = load_training_problems(parser.parse_args(["--num-train", "7"]))
    assert [problem.split for problem in problems] == ["train"] * 7 + ["heldout"] * 45
    assert {problem.id.split("-")[0] for problem in problems} == {"packs"}

    flags = ["--task", "gsm8k", "--data", write_rows(tmp_path / "d.jsonl", sums(range(40)))]
    problems = load_training_problems(parser.parse_args([*flags, "--num-heldout", "2"]))
    assert [problem.split for problem in problems] == ["train"] * 36 + ["heldout"] * 2


# ---- Files and the hub ---------------------------------------------------------------------------

ROWS = [{"question": "a\nb", "choices": ["x", "NA"], "answer": "NA", "id": "007"}]
ROWS += [{"question": "ü", "choices": ["x", "y", "z"], "answer": "2", "id": None}]
LINES = "".join(json.dumps(row) + "\n\n" for row in ROWS)
BOM = "\ufeff"
PARQUET = io.BytesIO()
parquet.write_table(pyarrow.Table.from_pylist(ROWS), PARQUET)
FILES = {  # name -> content
    "D.JSONL": (BOM + LINES.replace("\n", "\r\n")).encode(),
    "d.json": LINES.encode(),
    "d.Json.GZ": gzip.compress(f"{BOM} {json.dumps(ROWS, indent=1)}".encode()),
    "data": LINES.encode(),
    "d.Parquet": PARQUET.getvalue(),
}


def load_file(path, content, *, task):
    path.write_bytes(content)
    return load_problems(task, str(path), {"test": 2})


@pytest.mark.parametrize("name", FILES)
def test_a_data_file_is_read_as_its_name_says(tmp_path, name):
    """Lists of a parquet are lists, and whatever its kind, "NA" is a text."""
    problems = load_file(tmp_path / name, FILES[name], task="mmlu")
    read = {problem.question: (problem.gold, problem.id) for problem in problems}
    assert read["a\nb\nA) x\nB) NA"] == ("B", "007")
    assert read["ü\nA) x\nB) y\nC) z"][0] == "C"


def test_cells_of_a_csv_are_texts_and_empty_ones_are_not_there(tmp_path):
    """Also BOM, CRLF, quotes, newlines, empty lines, a short line, and a long cell."""
    text = f'{BOM}id,question,answer,solution,level\r\n007,"a ""b""\nc",NA,,\r\n\r\n'
    text += f",{'long ' * 50_000},,So \\boxed{{8}}.\r\n"
    problems = load_file(tmp_path / "d.csv", text.encode(), task="math")
    first, second = sorted(problems, key=lambda problem: len(problem.question))
    assert first == Problem("007", "test", 'a "b"\nc', "NA", "math")
    assert (second.gold, len(second.question)) == ("8", 50_000 * 5 - 1)


def test_a_file_that_has_changed_is_read_again_whatever_its_time(tmp_path):
    for gold in ("7", "8"):
        data = tmp_path / "d.csv"
        data.write_text(f"question,answer\nHow many?,{gold}\n")
        os.utime(data, (1, 1))
        [problem] = load_problems("gsm8k", str(data), {"test": 1})
        assert problem.gold == gold


DAMAGED = [  # name, content, and what the line names
    ("d.csv", b"question,answer\nq,1\nq,1,2\n", "row 2"),
    ("d.csv", b'question,answer\nq,"1', "end of data"),
    ("d.csv", b"question,answer\n\xfc,1\n", "utf-8"),
    ("d.csv", b"question,answer\nq,1\nr,\n", "row 2: no `answer`"),
    ("d.json", b'[{"question": "q", "answer": NaN}]', "NaN"),
    ("d.json", b'[{"question": "q", "answer": "1"}, 5]', "row 2"),
    ("d.parquet", b"PAR1", "Parquet"),
    ("d.jsonl.gz", gzip.compress(LINES.encode(), mtime=0)[:-12], ""),
    ("d.gz", b"q", "gzip"),
]


@pytest.mark.parametrize("name, content, reason", DAMAGED)
def test_a_damaged_data_file_is_named(tmp_path, name, content, reason):
    with pytest.raises(InputError, match=f"^{tmp_path / name}.*{reason}"):
        load_file(tmp_path / name, content, task="tiny")


def test_a_split_is_read_from_its_data_set_of_the_hub(monkeypatch, capsys):
    """A question with two answers is left out, as nobody can change the hub."""
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(path, name, *, revision, split):
        calls.append((path, name, revision, split))
        golds = [("q", 2), *((f"How many in {split}, {i}?", 3) for i in range(40)), ("q", 4)]
        rows = [{"question": question, "answer": f"#### {gold}"} for question, gold in golds]
        return SimpleNamespace(to_list=lambda: rows)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for split, hub_split in (("train", "train"), ("heldout", "train"), ("test", "test")):
        problems = load_problems("gsm8k", None, {split: 100})
        assert calls.pop() == ("openai/gsm8k", "main", "main", hub_split)
        assert all(problem.question.startswith(f"How many in {hub_split}") for problem in problems)
        assert "1 with contradicting answers" in capsys.readouterr().err
    assert len(problems) == 40

    def offline(path, name, **options):
        raise ConnectionError("Couldn't reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(InputError, match="--data FILE: Couldn't reach the hub"):
        load_problems("gsm8k", None, {"test": 1})


@pytest.mark.parametrize("change", [{}, {"question": "How much?"}, {"gold": "8"}])
def test_a_record_of_another_problem_is_refused(change):
    """A problem without a record comes first: the others must still be checked."""
    problems = [Problem(id, "test", "How many?", "7", "number") for id in ("p0", "p1")]
    records = {"p1": {"question": "How many?", "gold": "7"} | change, "p2": {"question": ""}}
    complaint = f"t.jsonl: the {''.join(change)} of problem p1 has changed"
    with pytest.raises(InputError, match=complaint) if change else nullcontext():
        check_unchanged(problems, records, Path("t.jsonl"))
