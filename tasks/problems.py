"""Problems: the public tasks, their data and splits, and whether an answer is correct.

A task is an embedded family of problems (tiny/problems.py) or a public data set. Public data comes
from the Hugging Face hub or, with `--data`, from a file in a similar format (see COLUMNS).

The embedded families have their own splits; "heldout" and "test" have one problem for each set of
numbers. The splits of public data depend on the questions alone, never on a seed, on the size of a
run, on the ids of the problems or on their order in the file:
  - "test" is the test split of the hub. With a file it is the whole file: evaluate on another file
    than you train on;
  - "heldout" is one in eight of the hub's train split, or of the file, by a hash of the question;
    "train" is the rest.
Problems come in an order that is fixed by a second hash, so that the first `num` are a fair sample
of a file that is sorted by subject. Problems without an id get one from the hash of their question.
A question that occurs twice counts once. If its answers differ, a file is refused, and the question
is left out of hub data.

A gold answer that cannot be read is an error that names the problem. No torch here.
"""

import hashlib
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support.flags import InputError, Parser, positive_int
from support.records import read_jsonl
from tasks.answers import canonical, is_comparable, same_answer
from tasks.extraction import last_box
from tiny import problems as tiny_problems

SPLITS = ("train", "heldout", "test")
HELDOUT_ONE_IN = 8

# ---- Problems ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    id: str
    split: str  # one of SPLITS
    question: str  # with its options, if it has any
    gold: str  # the right answer, in canonical form (answers.canonical)
    answer_type: str  # "number", "letter" or "math"
    subject: str | None = None
    level: str | None = None


class RawProblem(NamedTuple):
    """A problem as it is read from a row of a data set, before its gold answer is interpreted."""

    id: str | None
    question: str
    gold: str  # as in the data
    subject: str | None
    level: str | None
    place: str  # the file and the line, for error messages


def is_correct(problem: Problem, answer: str | None) -> bool:
    """Return whether a canonical answer equals the gold answer. None is never correct."""
    return same_answer(answer, problem.gold, problem.answer_type)


def question_key(question: str) -> str:
    """Return a hash of a question, the same for all spellings that differ in case or spacing only.

    A question that was reformatted is still found by the checks for leaks. All other characters
    count, because operators do: 3-5 is not 3+5.
    """
    words = question.casefold().split()
    return hashlib.blake2b(" ".join(words).encode(), digest_size=8).hexdigest()


# ---- Tasks ---------------------------------------------------------------------------------------


class HubSplit(NamedTuple):
    """A split of a data set on the Hugging Face hub."""

    dataset: str
    configuration: str | None
    revision: str
    split: str


class Task(NamedTuple):
    """A public task: the type of its answers and its data on the hub."""

    answer_type: str
    hub: dict[str, HubSplit]  # for "train" (which includes "heldout") and for "test"


# Embedded task -> its family in tiny/problems.py
EMBEDDED = {"tiny": "packs", "tiny-score": "score"}

TASKS = {
    "gsm8k": Task(
        "number",
        {
            "train": HubSplit("openai/gsm8k", "main", "main", "train"),
            "test": HubSplit("openai/gsm8k", "main", "main", "test"),
        },
    ),
    "math": Task(
        "math",
        {
            "train": HubSplit("DigitalLearningGmbH/MATH-lighteval", None, "main", "train"),
            "test": HubSplit("HuggingFaceH4/MATH-500", None, "main", "test"),
        },
    ),
    "mmlu": Task(
        "letter",
        {
            "train": HubSplit("cais/mmlu", "all", "main", "auxiliary_train"),
            "test": HubSplit("cais/mmlu", "all", "main", "test"),
        },
    ),
    "logiqa": Task(
        "letter",
        {
            "train": HubSplit("lucasmccabe/logiqa", None, "refs/convert/parquet", "train"),
            "test": HubSplit("lucasmccabe/logiqa", None, "refs/convert/parquet", "test"),
        },
    ),
}


def source(task: str, data: str | None) -> dict:
    """Return where the problems come from, for config.json."""
    from_hub = task in TASKS and data is None
    return {"task": task, "data": data, "hub": TASKS[task].hub if from_hub else None}


def check_same_problems(problems: list[Problem], records: dict[str, dict], path: Path) -> None:
    """Raise InputError if a record with the id of a problem is about another question or answer.

    records: problem id -> record, with its `question` and `gold`. path: where they come from.
    """
    for problem in problems:
        record = records.get(problem.id)
        if record is None:
            continue
        for key in ("question", "gold"):
            there, now = record[key], getattr(problem, key)
            if there != now:
                raise InputError(
                    f"{path}: the {key} of problem {problem.id} has changed "
                    f"(there {_shorten(there)}, now {_shorten(now)}); "
                    f"choose another --run, or start over with --overwrite"
                )


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 40 else text[:37] + "...")


# ---- Loading problems ----------------------------------------------------------------------------


def load_problems(*, task: str, data: str | None, split: str, num: int) -> list[Problem]:
    """Load the first `num` problems of a split, in the fixed order.

    If the split has fewer problems, all of them are returned and a warning is printed.

    Args:
        task: a key of EMBEDDED or TASKS. A file given with an embedded task is graded by the
            narrowest answer type that fits all of its answers.
        data: a file to read instead of the hub: JSON lines, .json, .csv or .parquet.
        split: one of SPLITS.
        num: how many problems.

    Raises:
        InputError: if the task is unknown, or its data cannot be loaded or used.
    """
    problems = _first_problems(task, data, split, num)
    if len(problems) < num:
        print(
            f"{data or task}: {num} {split} problems were requested, "
            f"but there are only {len(problems)}",
            file=sys.stderr,
        )
    return problems


def problem_at(*, task: str, data: str | None, position: int) -> Problem:
    """Return the test problem at a position in the fixed order, counted from 1 (--index).

    Raises InputError if there are fewer problems, or for the reasons of `load_problems`.
    """
    problems = _first_problems(task, data, "test", position)
    if len(problems) < position:
        origin = data or f"--task {task}"
        raise InputError(f"--index {position}: {origin} has {len(problems)} test problems")
    return problems[-1]


def _first_problems(task: str, data: str | None, split: str, num: int) -> list[Problem]:
    """Return the first `num` problems of a split, or all of them if there are fewer."""
    if task in EMBEDDED and data is None:
        return _embedded_problems(EMBEDDED[task], split, num)
    check_task(task)

    # 1. Read all problems of the data.
    origin = data or task
    rows = _read_file(data) if data else _read_hub(task, split)
    if not rows:
        raise InputError(f"{origin}: it has no problems")
    raw_problems = [read_row(row, f"{origin}, line {line}") for line, row in enumerate(rows, 1)]

    # 2. Find the answer type, from the whole file, so that all splits have the same.
    if task in TASKS:
        answer_type = TASKS[task].answer_type
    else:
        answer_type = _narrowest_answer_type([raw.gold for raw in raw_problems])

    # 3. Keep each question once, and give an id to each that has none.
    from_file = data is not None
    raw_problems = _without_duplicates(raw_problems, answer_type, origin, from_file=from_file)
    id_prefix = Path(origin).stem if task in EMBEDDED else task
    raw_problems = _with_ids(raw_problems, id_prefix)
    _check_ids_are_unique(raw_problems, origin)

    # 4. Choose the problems of the split, and bring their gold answers into canonical form.
    chosen = _first_of_split(raw_problems, split, num)
    return [_to_problem(raw, answer_type, split, origin) for raw in chosen]


def check_task(task: str) -> None:
    """Raise InputError if there is no such task."""
    if task not in EMBEDDED and task not in TASKS:
        names = ", ".join((*EMBEDDED, *TASKS))
        raise InputError(
            f"--task {task}: unknown; it is one of {names} (for your own data leave it out)"
        )


def _first_of_split(raw_problems: list[RawProblem], split: str, num: int) -> list[RawProblem]:
    """Return the first `num` problems of a split, in the fixed order."""
    if split != "test":
        wanted = split == "heldout"
        raw_problems = [raw for raw in raw_problems if _is_heldout(raw.question) == wanted]
    return sorted(raw_problems, key=lambda raw: _hash(raw.question, "order"))[:num]


def _embedded_problems(family: str, split: str, num: int) -> list[Problem]:
    problems = []
    for index in range(min(num, tiny_problems.size_of(family, split))):
        puzzle = tiny_problems.make_puzzle(family, split, index)
        gold, level = str(puzzle.answer), str(puzzle.n)
        problem = Problem(puzzle.id, split, puzzle.question, gold, "number", puzzle.story, level)
        problems.append(problem)
    return problems


def _without_duplicates(
    raw_problems: list[RawProblem], answer_type: str, origin: str, *, from_file: bool
) -> list[RawProblem]:
    """Keep one problem for each question, and print how many were left out.

    A question whose answers differ is left out if it comes from the hub, whose data cannot be
    changed. Raises InputError if it comes from a file.
    """
    kept: dict[str, RawProblem] = {}
    contradicted = set()
    for raw in raw_problems:
        key = question_key(raw.question)
        other = kept.setdefault(key, raw)
        if not _have_same_gold(raw, other, answer_type):
            contradicted.add(key)
            if from_file:
                raise InputError(
                    f"{other.place} and {raw.place}: one question, but the answers "
                    f"{other.gold!r} and {raw.gold!r}; remove one of them"
                )
        # The order of the data must not matter, so the one that sorts first stays, not the first.
        kept[key] = min(raw, other, key=repr)

    for count, what in (
        (len(raw_problems) - len(kept), "duplicates of questions"),
        (len(contradicted), "questions with contradicting answers"),
    ):
        if count > 0:
            print(f"{origin}: {count} {what} were left out", file=sys.stderr)
    return [raw for key, raw in kept.items() if key not in contradicted]


def _have_same_gold(raw: RawProblem, other: RawProblem, answer_type: str) -> bool:
    if raw.gold == other.gold:
        return True
    gold, other_gold = canonical(raw.gold, answer_type), canonical(other.gold, answer_type)
    return same_answer(gold, other_gold, answer_type)


def _with_ids(raw_problems: list[RawProblem], prefix: str) -> list[RawProblem]:
    """Give an id to each problem that has none, from the hash of its question."""
    with_ids = []
    for raw in raw_problems:
        if raw.id is None:
            raw = raw._replace(id=f"{prefix}-{question_key(raw.question)}")
        with_ids.append(raw)
    return with_ids


def _check_ids_are_unique(raw_problems: list[RawProblem], origin: str) -> None:
    counts = Counter(raw.id for raw in raw_problems)
    for problem_id, count in counts.items():
        if count > 1:
            raise InputError(f"{origin}: the id {problem_id} occurs twice")


def _narrowest_answer_type(golds: list[str]) -> str:
    """Return the first of "letter", "number" and "math" that fits all gold answers."""
    if all(re.fullmatch(r"\(?[A-Z]\)?", gold) for gold in golds):
        return "letter"
    if all(_is_only_a_number(gold) for gold in golds):
        return "number"
    return "math"


def _is_only_a_number(gold: str) -> bool:
    """Return whether a gold answer is a number and nothing more."""
    number = canonical(gold, "number")
    return number is not None and number == canonical(gold, "math")


def _is_heldout(question: str) -> bool:
    return _hash(question, "split")[0] % HELDOUT_ONE_IN == 0


def _hash(question: str, purpose: str) -> bytes:
    """Return a hash of a question, a different one for each purpose."""
    text = f"{purpose} {question_key(question)}"
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _to_problem(raw: RawProblem, answer_type: str, split: str, origin: str) -> Problem:
    """Build a Problem. Raises InputError if its gold answer cannot be read and compared."""
    gold = canonical(raw.gold, answer_type)
    if gold is None or not is_comparable(gold, answer_type):
        raise InputError(
            f"{origin}: the answer of problem {raw.id} cannot be read as a {answer_type}: "
            f"{raw.gold!r}"
        )
    return Problem(raw.id, split, raw.question, gold, answer_type, raw.subject, raw.level)


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


def read_row(row: dict, place: str) -> RawProblem:
    """Read a row that has the columns of any of the public data sets (COLUMNS).

    Args:
        row: column -> value.
        place: the file and line of the row, for error messages.

    Raises:
        InputError: if question or answer is missing or no valid text, if the options are no list,
            or if the answer is none of them.
    """
    fields = {field: _first_value(row, names) for field, names in COLUMNS.items()}
    for field in ("question", "answer"):
        if fields[field] is None or not str(fields[field]).strip():
            raise InputError(f"{place}: no `{field}`; each line needs `question` and `answer`")

    question = str(fields["question"]).strip()
    if fields["context"]:
        question = f"{str(fields['context']).strip()}\n{question}"

    choices = fields["choices"]
    if choices and not isinstance(choices, list):
        raise InputError(
            f"{place}: the options are of type {type(choices).__name__}; give a list of texts, "
            f"in JSON lines or parquet"
        )
    if choices:
        question += _options_text(choices)
        gold = _option_letter(fields["answer"], choices, place)
    else:
        is_solution = all(row.get(name) is None for name in ("answer", "correct_option"))
        gold = _gold_of_solution(str(fields["answer"]).strip(), is_solution)

    try:
        f"{question}{gold}".encode()
    except UnicodeEncodeError:
        raise InputError(
            f"{place}: it has half of a character (a surrogate without its pair)"
        ) from None
    return RawProblem(
        id=_optional_text(fields["id"]),
        question=question,
        gold=gold,
        subject=_optional_text(fields["subject"]),
        level=_optional_text(fields["level"]),
        place=place,
    )


def _first_value(row: dict, names: tuple[str, ...]):
    """Return the value of the first of these columns that the row has; None if it has none."""
    for name in names:
        if row.get(name) is not None:
            return row[name]
    return None


def _optional_text(value) -> str | None:
    return None if value is None else str(value)


def _letters(choices: list) -> list[str]:
    return [chr(ord("A") + index) for index in range(len(choices))]


def _options_text(choices: list) -> str:
    """Return a line "A) ..." for each option."""
    text = ""
    for letter, choice in zip(_letters(choices), choices, strict=True):
        text += f"\n{letter}) {choice}"
    return text


def _option_letter(answer, choices: list, place: str) -> str:
    """Return the letter of the right option, which the data gives by letter, text or index from 0.

    An integer in the data is an index, even if an option has the same text.
    """
    letters = _letters(choices)
    texts = [str(choice).strip() for choice in choices]
    gold = str(answer).strip()
    if gold in letters:
        return gold
    if gold in texts and not isinstance(answer, int):
        return letters[texts.index(gold)]
    if gold.isdecimal() and int(gold) < len(letters):
        return letters[int(gold)]
    raise InputError(
        f"{place}: the answer {gold!r} is none of the options; "
        f"give its letter, its index from 0, or its text"
    )


def _gold_of_solution(text: str, is_solution: bool) -> str:
    r"""Return the gold answer of a text that may be a worked solution.

    GSM8K ends a solution with "#### 42". MATH (is_solution) has the answer in \boxed{...}.
    """
    if "####" in text:
        return text.rpartition("####")[-1].strip()
    if is_solution:
        return last_box(text) or ""
    return text


# ---- Files and the hub ---------------------------------------------------------------------------

# File name extension -> the builder of `datasets` that reads it; other files are JSON lines
FILE_FORMATS = {".json": "json", ".csv": "csv", ".parquet": "parquet"}


def _read_file(data: str) -> list[dict]:
    path = Path(data)
    if path.suffix not in FILE_FORMATS:
        return read_jsonl(path)
    if not path.is_file():
        raise InputError(f"--data {data}: no such file")
    return _load_dataset(
        f"--data {data}",
        FILE_FORMATS[path.suffix],
        data_files=data,
        split="train",
    )


def _read_hub(task: str, split: str) -> list[dict]:
    hub = TASKS[task].hub["test" if split == "test" else "train"]
    return _load_dataset(
        f"--task {task}",
        hub.dataset,
        hub.configuration,
        revision=hub.revision,
        split=hub.split,
    )


def _load_dataset(flag: str, *args, **options) -> list[dict]:
    """Load rows with the package `datasets`, which uses its own cache if there is no network."""
    import datasets  # imported late: it takes a second, and the embedded tasks do not need it

    try:
        return datasets.load_dataset(*args, **options).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        remedy = "; if you are offline, give --data FILE" if flag.startswith("--task") else ""
        raise InputError(f"{flag}: cannot be loaded ({reason}){remedy}") from None


# ---- Flags ---------------------------------------------------------------------------------------


def add_problem_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--task", default="tiny", help=f"{', '.join(EMBEDDED)} (embedded), or {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--data",
        default=None,
        help="problems from a file (JSON lines, json, csv, parquet) with `question` and `answer`; "
        "graded as --task, or by the narrowest answer type that fits if that is embedded",
    )


def add_training_problems_arguments(parser: Parser) -> None:
    """Add the flags of the scripts that use training problems (`load_training_problems`)."""
    parser.add_argument("--num-train", type=positive_int, default=300, help="training problems")
    parser.add_argument(
        "--num-heldout",
        type=positive_int,
        default=45,
        help="held-out problems, on which V and the agents are measured; 45 is all that `tiny` has",
    )


def load_training_problems(args) -> list[Problem]:
    """Load training problems, and held-out ones to measure on. Test problems are never loaded."""
    problems = []
    for split, num in (("train", args.num_train), ("heldout", args.num_heldout)):
        problems += load_problems(task=args.task, data=args.data, split=split, num=num)
    return problems
