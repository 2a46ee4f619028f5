r"""Check the grading of every gold answer of a data file. Run it from the repository root:

    python -m experiments.check_golds gsm8k DATA/gsm8k_train.jsonl DATA/gsm8k_test.jsonl
    python -m experiments.check_golds math DATA/math500.jsonl

For each gold answer it checks that
  - the answer can be read, and equals itself in each form in which an agent would write it;
  - no changed version of it is accepted: the next integer, a swapped tuple, swapped entries of a
    matrix, another exponent, another denominator, another letter.
It prints counts and failures. The exit code is 1 if a check fails, else 0.
"""

import re
import sys
from collections import Counter
from pathlib import Path

from support.records import read_jsonl
from tasks.grading import MATH_VERIFY, extract_answer
from tasks.problems import Problem, is_correct, load_problems, read_row

# ---- Changed versions of a gold answer -----------------------------------------------------------

_TUPLE = re.compile(
    r"(?P<open>\\left\(|\()(?P<first>[^,]+),(?P<second>[^,]+)(?P<close>\\right\)|\))",
)
_MATRIX = re.compile(
    r"""
    (?P<begin>\\begin\{.matrix\})
    (?P<first>.*?) (?P<separator>\\\\|&) (?P<second>.*?)
    (?P<end>\s*(?:\\\\|&|\\end).*)
    """,
    re.VERBOSE,
)
_EXPONENT = re.compile(r"\^\{?(?P<number>\d+)\}?")
_DENOMINATOR = re.compile(r"\\[dt]?frac\{[^{}]*\}\{(?P<latex>\d+)\}|/(?P<plain>\d+)")
_LETTER = re.compile(r"[A-Za-z](?![A-Za-z]*[{\\])")  # not in the name of a command with braces


def changed_versions(gold: str) -> dict[str, str]:
    """Return wrong answers that look like the right one: name of the change -> wrong answer."""
    candidates = {
        "next integer": next_integer(gold),
        "last integer": last_integer(gold),
        "swapped tuple": swapped_tuple(gold),
        "swapped entries": swapped_entries(gold),
        "other exponent": other_exponent(gold),
        "other denominator": other_denominator(gold),
    }
    changed = {change: wrong for change, wrong in candidates.items() if wrong is not None}
    if not changed:
        changed["other letter"] = other_letter(gold)
    return {change: wrong for change, wrong in changed.items() if wrong != gold}


def incremented(gold: str, match: re.Match, group: int | str = 0) -> str:
    """Return the gold answer with 1 added to the integer that a group has matched."""
    start, end = match.span(group)
    return gold[:start] + str(int(match[group]) + 1) + gold[end:]


def next_integer(gold: str) -> str | None:
    """Add 1 to the first integer."""
    integers = list(re.finditer(r"\d+", gold))
    return incremented(gold, integers[0]) if integers else None


def last_integer(gold: str) -> str | None:
    """Add 1 to the last integer."""
    integers = list(re.finditer(r"\d+", gold))
    return incremented(gold, integers[-1]) if integers else None


def swapped_tuple(gold: str) -> str | None:
    match = _TUPLE.fullmatch(gold)
    if match is None or match["first"].strip() == match["second"].strip():
        return None
    return f"{match['open']}{match['second']},{match['first']}{match['close']}"


def swapped_entries(gold: str) -> str | None:
    """Swap the first two entries of a matrix."""
    match = _MATRIX.fullmatch(gold)
    if match is None or match["first"].strip() == match["second"].strip():
        return None
    swapped = f"{match['second']} {match['separator']}{match['first']}"
    return f"{match['begin']}{swapped} {match['end']}"


def other_exponent(gold: str) -> str | None:
    """Add 1 to the first exponent."""
    match = _EXPONENT.search(gold)
    if match is None or gold[match.end() :].startswith("\\circ"):
        return None
    exponent = int(match["number"]) + 1
    return f"{gold[: match.start()]}^{{{exponent}}}{gold[match.end() :]}"


def other_denominator(gold: str) -> str | None:
    """Add 1 to the first denominator."""
    match = _DENOMINATOR.search(gold)
    if match is None:
        return None
    return incremented(gold, match, "latex" if match["latex"] else "plain")


def other_letter(gold: str) -> str:
    """Replace the first letter, or append a digit if there is none."""
    match = _LETTER.search(gold)
    if match is None:
        return gold + "1"
    letter = "c" if match[0] in "bB" else "b"
    return gold[: match.start()] + letter + gold[match.end() :]


# ---- Checks --------------------------------------------------------------------------------------


def messages_with(gold: str) -> list[str]:
    """Return messages that give this answer in different forms."""
    return [
        f"So we get \\boxed{{{gold}}}",
        f"I tried 12345.\nFinal answer: {gold}",
        f"**Final Answer:**\n\n**{gold}**",
        f"12345 = 5. The final answer is ${gold}$. I hope it is correct.",
    ]


def check_problem(problem: Problem, gold: str, counts: Counter, failures: list[str]) -> None:
    """Check one gold answer as it is in the data; add to the counts and to the failures."""
    counts["golds that parse"] += 1
    for message in messages_with(gold):
        answer = extract_answer(message, problem.answer_type)
        accepted = is_correct(problem, answer.value)
        counts["equal to themselves"] += accepted
        if not accepted:
            failures.append(f"{problem.id}: {message!r} is not counted as {gold!r}")

    for change, wrong in changed_versions(gold).items():
        answer = extract_answer(f"So we get \\boxed{{{wrong}}}", problem.answer_type)
        refused = not is_correct(problem, answer.value)
        counts[f"refused, {change}"] += refused
        if not refused:
            failures.append(f"{problem.id}: {wrong!r} ({change}) is counted as {gold!r}")


def main(task: str, files: list[str]) -> int:
    """Check all files and print the result. Returns the exit code."""
    counts, failures = Counter(), []
    for file in files:
        rows = read_jsonl(Path(file))
        golds = {}  # question -> gold answer as it is in the data
        for row in rows:
            raw = read_row(row, file)
            golds[raw.question] = raw.gold
        # This raises InputError if a gold answer cannot be read.
        problems = load_problems(task, file, {"test": len(rows)})
        for problem in problems:
            check_problem(problem, golds[problem.question], counts, failures)

    for check, count in counts.items():
        print(f"{count:6d} {check}")
    print(f"{len(failures):6d} failures, {MATH_VERIFY.timeouts} comparisons timed out")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
