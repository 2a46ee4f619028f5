"""Problems: the tasks, their data and splits, and whether an answer is correct.

A task is embedded (tiny/*.jsonl) or a public data set. Public data comes from the Hugging Face hub
or, with `--data`, from a file in a similar format (see COLUMNS).

The rows of an embedded task name their split, and their order is that of the file. The splits of
other data depend on the questions alone, never on a seed, the size of a run, ids or line numbers:
  - "test" is the test split of the hub. With a file it is the whole file: evaluate on another file
    than you train on;
  - "heldout" is one in eight of the hub's train split, or of the file, by a hash of the question;
    "train" is the rest.
A second hash fixes the order, so that the first `num` are a fair sample of a file that is sorted by
subject. A question that occurs twice counts once. A gold answer that cannot be read is an error
that names the problem. No torch here.
"""

import hashlib
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from support.flags import ROOT, SURROGATE, InputError, Parser, positive_int
from support.records import append_jsonl, errors_name
from tasks.files import read_rows
from tasks.grading import canonical, find_boxes, is_comparable, same_answer


@dataclass(frozen=True)
class Problem:
    id: str
    split: str  # "train", "heldout" or "test"
    question: str  # with its options, if it has any
    gold: str  # the right answer, in canonical form (grading.canonical)
    answer_type: str  # "number", "letter" or "math"
    subject: str | None = None
    level: str | None = None


def is_correct(problem: Problem, answer: str | None) -> bool:
    """Return whether a canonical answer equals the gold answer. None is never correct."""
    return same_answer(answer, problem.gold, problem.answer_type)


def question_key(question: str) -> str:
    """Return a hash of a question, the same for all spellings that differ in case or spacing only.

    All other characters count, because operators do: 3-5 is not 3+5.
    """
    return _hash(" ".join(question.casefold().split())).hex()


def _split_of(key: str) -> str:
    """Return "heldout" for one in eight questions, by their keys, else "train"."""
    return "train" if _hash(f"split {key}")[0] % 8 else "heldout"


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def save_problems(file: BinaryIO, records: list[dict]) -> None:
    """Write which problems a model has seen, so that evaluate.py can refuse to test on them.

    records: each with the id, the split and the question of a problem.
    """
    for record in records:
        key = question_key(record["question"])
        append_jsonl(file, {"id": record["id"], "split": record["split"], "question_key": key})


# ---- Tasks ---------------------------------------------------------------------------------------


class Task(NamedTuple):
    """A public task, and the data set, configuration, revision and split of its data on the hub."""

    answer_type: str
    train: tuple[str, str | None, str, str]  # "heldout" is a part of it
    test: tuple[str, str | None, str, str]


TASKS = {
    "gsm8k": Task(
        "number",
        train=("openai/gsm8k", "main", "main", "train"),
        test=("openai/gsm8k", "main", "main", "test"),
    ),
    "math": Task(
        "math",
        train=("DigitalLearningGmbH/MATH-lighteval", None, "main", "train"),
        test=("HuggingFaceH4/MATH-500", None, "main", "test"),
    ),
    "mmlu": Task(
        "letter",
        train=("cais/mmlu", "all", "main", "auxiliary_train"),
        test=("cais/mmlu", "all", "main", "test"),
    ),
    "logiqa": Task(
        "letter",
        train=("lucasmccabe/logiqa", None, "refs/convert/parquet", "train"),
        test=("lucasmccabe/logiqa", None, "refs/convert/parquet", "test"),
    ),
}
EMBEDDED = {"tiny": ROOT / "tiny" / "packs.jsonl", "tiny-score": ROOT / "tiny" / "score.jsonl"}


def source(task: str, data: str | None) -> dict:
    """Return where the problems come from, for config.json."""
    from_hub = data is None and task in TASKS
    hub = {"train": TASKS[task].train, "test": TASKS[task].test} if from_hub else None
    return {"task": task, "data": data, "hub": hub}


# ---- Loading problems ----------------------------------------------------------------------------


def add_problem_arguments(parser: Parser, *, training: bool) -> None:
    """Add the flags that choose the problems. training: see `load_training_problems`."""
    add = parser.add_argument
    names = (*EMBEDDED, *TASKS)
    add("--task", choices=names, default="tiny", help="for your own data leave it out")
    help_data = "a file of problems (JSON lines, json, csv, parquet, .gz): `question`, `answer`"
    add("--data", default=None, help=help_data)
    if training:
        add("--num-train", type=positive_int, default=300, help="training problems")
        add("--num-heldout", type=positive_int, default=45, help="problems to measure on")


def load_training_problems(args) -> list[Problem]:
    """Load training problems, and held-out ones to measure on. Test problems are never loaded."""
    return load_problems(
        args.task, args.data, {"train": args.num_train, "heldout": args.num_heldout}
    )


def load_problems(task: str, data: str | None, num_of_split: dict[str, int]) -> list[Problem]:
    """Load the first problems of each split, in the fixed order. The data is read once.

    If a split has fewer problems, all of them are returned and a warning is printed. Raises
    InputError if the data cannot be loaded or used. task: one of EMBEDDED or TASKS.

    data: a file to read instead of the task's data (see tasks/files.py). Given with an embedded
    task, it is graded by the narrowest answer type that fits all of its answers.
    """
    # 1. Read all problems of the data.
    origin = data or task
    rows = enumerate(_read_rows(task, data, is_test="test" in num_of_split), 1)
    raw_problems = [read_row(row, f"{origin}, row {number}") for number, row in rows]
    if not raw_problems:
        raise InputError(f"{origin}: it has no problems")

    # 2. Find the answer type, from the whole file, so that all splits have the same.
    if task in TASKS:
        answer_type = TASKS[task].answer_type
    else:
        answer_type = _narrowest_answer_type([raw.gold for raw in raw_problems])

    # 3. Keep each question once.
    raw_problems = _without_duplicates(raw_problems, answer_type, origin, from_file=bool(data))

    # 4. Fix the order. The rows of an embedded task have their own order and splits.
    has_own_splits = data is None and task in EMBEDDED
    if not has_own_splits:
        raw_problems.sort(key=lambda raw: _hash(f"order {raw.key}"))

    # 5. Bring the gold answers of the first ones into canonical form.
    problems = []
    prefix = task if task in TASKS else Path(origin).stem
    for split, num in num_of_split.items():
        chosen = raw_problems
        if has_own_splits:
            chosen = [raw for raw in raw_problems if raw.split == split]
        elif split != "test":
            chosen = [raw for raw in raw_problems if _split_of(raw.key) == split]
        chosen = chosen[:num]
        if len(chosen) < num:
            note = f"{num} {split} problems were requested, but there are only {len(chosen)}"
            print(f"{origin}: {note}", file=sys.stderr)
        for raw in chosen:
            problem_id = raw.id or f"{prefix}-{raw.key}"
            gold = canonical(raw.gold, answer_type)
            if gold is None or not is_comparable(gold, answer_type):
                reason = f"cannot be read as a {answer_type}: {raw.gold!r}"
                raise InputError(f"{origin}: the answer of problem {problem_id} {reason}")
            texts = (raw.question, gold, answer_type, raw.subject, raw.level)
            problems.append(Problem(problem_id, split, *texts))
    return problems


def _narrowest_answer_type(golds: list[str]) -> str:
    """Return the first of "letter", "number" and "math" that fits all gold answers."""
    if all(re.fullmatch(r"\(?[A-Z]\)?", gold) for gold in golds):
        return "letter"
    for gold in golds:
        if re.fullmatch(r"0|-?[1-9][0-9]*", gold):
            continue  # as most are: a million would take a minute
        number = canonical(gold, "number")
        if number is None or number != canonical(gold, "math"):
            return "math"
    return "number"


def check_unchanged(problems: list[Problem], records: dict[str, dict], path: Path) -> None:
    """Raise InputError if a record with the id of a problem is about another question or answer.

    records: problem id -> record, with its `question` and `gold`. path: where they come from.
    """
    for problem in problems:
        record = records.get(problem.id, vars(problem))
        for key in ("question", "gold"):
            there, now = record[key], getattr(problem, key)
            if there != now:
                raise InputError(
                    f"{path}: the {key} of problem {problem.id} has changed "
                    f"(there {there!r:.60}, now {now!r:.60}); "
                    f"choose another --run, or start over with --overwrite"
                )


# ---- Rows of data sets ---------------------------------------------------------------------------

# Field of a problem -> its names in public data sets, tried in this order
COLUMNS = {
    "question": ("question", "problem", "query"),
    "context": ("context",),
    "choices": ("choices", "options"),
    "answer": ("answer", "correct_option", "solution"),
    "id": ("id", "unique_id"),
    "subject": ("subject", "type"),
    "level": ("level",),
}


class RawProblem(NamedTuple):
    """A problem as it is read from a row of a data set, before its gold answer is interpreted."""

    id: str | None
    question: str
    gold: str  # as in the data
    subject: str | None
    level: str | None
    place: str  # the file and the row, for error messages
    key: str  # question_key
    split: str | None  # of an embedded task


def read_row(row: dict, place: str) -> RawProblem:
    """Read a row that has the columns of any of the public data sets (COLUMNS).

    Raises InputError if question or answer is missing, if they are neither texts nor numbers, or if
    the answer is none of the options. place: the file and the row, for these messages.
    """
    # 1. Find the fields.
    column_of, fields = {}, {}
    for field, names in COLUMNS.items():
        for name in names:
            if row.get(name) not in (None, ""):  # an empty cell
                column_of[field], fields[field] = name, row[name]
                break
    texts = {field: str(value).strip() for field, value in fields.items()}
    for field in ("question", "answer"):
        if not texts.get(field):
            raise InputError(f"{place}: no `{field}`; each line needs `question` and `answer`")
    for field in ("question", "context", "answer", "id"):
        _check_text(fields.get(field), place)

    # 2. Build the question and the gold answer.
    question, gold = texts["question"], texts["answer"]
    if texts.get("context"):
        question = f"{texts['context']}\n{question}"
    if fields.get("choices"):
        options, gold = _read_options(fields["choices"], fields["answer"], place)
        question += options
    elif "####" in gold:  # GSM8K: a worked solution that ends with "#### 42"
        gold = gold.rpartition("####")[-1].strip()
    elif column_of["answer"] == "solution":  # MATH: \boxed{42}
        contents = [content or "" for _, _, content in find_boxes(gold)]
        gold = contents[-1] if contents else ""
    raw = (texts.get("id"), question, gold, texts.get("subject"), texts.get("level"))
    if SURROGATE.search("".join(filter(None, raw))):
        raise InputError(f"{place}: it has half of a character (a surrogate without its pair)")
    return RawProblem(*raw, place, question_key(question), row.get("split"))


def _check_text(value, place: str) -> None:
    """Raise InputError if a value is neither None nor a text or a finite number."""
    is_finite = not isinstance(value, float) or math.isfinite(value)
    if not isinstance(value, str | int | float | None) or not is_finite:
        raise InputError(f"{place}: {value!r:.60} is neither a text nor a finite number")


def _read_options(choices: list, answer: str | int, place: str) -> tuple[str, str]:
    """Return a line "A) ..." for each option, and the letter of the right one.

    The data gives the answer by its letter, text or index from 0. An integer in the data is an
    index, even if an option has the same text.
    """
    if not isinstance(choices, list) or len(choices) > 26:
        raise InputError(f"{place}: the options are no list of 26 or fewer: {choices!r:.60}")
    for choice in choices:
        _check_text(choice, f"{place}, the options")
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    options = [f"\n{letter}) {choice}" for letter, choice in zip(letters, choices, strict=True)]
    texts = [str(choice).strip() for choice in choices]
    gold = str(answer).strip()
    if gold in texts and gold not in letters and not isinstance(answer, int):
        gold = letters[texts.index(gold)]
    elif gold.isdecimal() and int(gold) < len(letters):
        gold = letters[int(gold)]
    if gold not in letters:
        note = "give its letter, its index from 0, or its text"
        raise InputError(f"{place}: the answer {gold!r} is none of the options; {note}")
    return "".join(options), gold


def _without_duplicates(
    raw_problems: list[RawProblem], answer_type: str, origin: str, *, from_file: bool
) -> list[RawProblem]:
    """Keep one problem for each question, and print how many were left out.

    A question whose answers differ is left out if it comes from the hub, whose data cannot be
    changed. Raises InputError if it comes from a file, or if two questions have the same id.
    """
    kept, contradicted = {}, set()
    for raw in raw_problems:
        other = kept.setdefault(raw.key, raw)
        if raw.gold != other.gold and not same_answer(
            canonical(raw.gold, answer_type), canonical(other.gold, answer_type), answer_type
        ):
            contradicted.add(raw.key)
            if from_file:
                raise InputError(
                    f"{other.place} and {raw.place}: one question, but the answers "
                    f"{other.gold!r} and {raw.gold!r}; remove one of them"
                )
        # The order of the data must not matter, so the one that sorts first stays, not the first.
        if raw is not other:
            kept[raw.key] = min(raw, other, key=repr)
    for problem_id, count in Counter(raw.id for raw in kept.values() if raw.id).most_common(1):
        if count > 1:
            raise InputError(f"{origin}: the id {problem_id} occurs twice")
    if len(kept) < len(raw_problems):
        note = f"{len(raw_problems) - len(kept)} duplicates of questions were left out"
        print(f"{origin}: {note}, {len(contradicted)} with contradicting answers", file=sys.stderr)
    return [raw for key, raw in kept.items() if key not in contradicted]


def _read_rows(task: str, data: str | None, *, is_test: bool) -> Iterable[dict]:
    """Read the rows of a file, of an embedded task, or of a split of the hub."""
    if data or task in EMBEDDED:
        return read_rows(Path(data or EMBEDDED[task]))

    import datasets  # imported late: it takes a second, and nothing else needs it

    path, name, revision, split = TASKS[task].test if is_test else TASKS[task].train
    with errors_name(f"--task {task}: it cannot be loaded; if you are offline, give --data FILE"):
        return datasets.load_dataset(path, name, revision=revision, split=split).to_list()
