"""Every gold answer of a data file parses, equals itself as an agent would write it, and equals none of its changed versions.

    python tests/check_golds.py gsm8k DATA/gsm8k_train.jsonl DATA/gsm8k_test.jsonl
    python tests/check_golds.py math DATA/math500.jsonl

Changed: the next integer, a swapped tuple, swapped matrix entries, another exponent, another denominator, another letter or word. Prints counts; exit code 1
if one check fails.
"""

import re
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mas import SYMPY, _read_row, extract_answer, is_correct, load_problems, read_jsonl  # noqa: E402


def changed(gold: str) -> dict[str, str]:
    """Wrong answers that look like the right one."""
    found = {}
    if re.search(r"\d", gold):
        found["next integer"] = re.sub(r"\d+", lambda m: str(int(m[0]) + 1), gold, count=1)
        found["last integer"] = next(gold[:m.start()] + str(int(m[0]) + 1) + gold[m.end():] for m in reversed(list(re.finditer(r"\d+", gold))))
    if match := re.fullmatch(r"(?P<open>\\left\(|\()(?P<a>[^,]+),(?P<b>[^,]+)(?P<close>\\right\)|\))", gold):
        if match["a"].strip() != match["b"].strip():
            found["swapped tuple"] = f"{match['open']}{match['b']},{match['a']}{match['close']}"
    if match := re.fullmatch(r"(\\begin\{.matrix\})(.*?)(\\\\|&)(.*?)(\s*(?:\\\\|&|\\end).*)", gold):
        if match[2].strip() != match[4].strip():
            found["swapped entries"] = f"{match[1]}{match[4]} {match[3]}{match[2]} {match[5]}"
    if match := re.search(r"\^\{?(\d+)\}?", gold):
        if not gold[match.end():].startswith("\\circ"):
            found["other exponent"] = gold[:match.start()] + f"^{{{int(match[1]) + 1}}}" + gold[match.end():]
    if match := re.search(r"(\\[dt]?frac\{[^{}]*\}\{)(\d+)(\})|(/)(\d+)", gold):
        digits = 2 if match[2] else 5
        found["other denominator"] = gold[:match.start(digits)] + str(int(match[digits]) + 1) + gold[match.end(digits):]
    if not found:
        letter = re.search(r"[A-Za-z](?![A-Za-z]*[{\\])", gold)
        found["other letter"] = gold[:letter.start()] + ("b" if letter[0] not in "bB" else "c") + gold[letter.end():] if letter else gold + "1"
    return {what: wrong for what, wrong in found.items() if wrong != gold}


def main(task: str, files: list[str]) -> int:
    counts, failures = Counter(), []
    for file in files:
        raw = {}
        for row in read_jsonl(Path(file)):
            found = _read_row(row, file)
            raw[found["question"]] = found["gold"]
        for problem in load_problems(task=task, data=file, split="test", num=10**9):   # stops at a gold that cannot be parsed
            gold = raw[problem.question]
            counts["golds that parse"] += 1
            for form in (f"So we get \\boxed{{{gold}}}", f"I tried 12345.\nFinal answer: {gold}", f"**Final Answer:**\n\n**{gold}**",
                         f"12345 = 5. The final answer is ${gold}$. I hope it is correct."):
                right = is_correct(problem, extract_answer(form, problem.kind))
                counts["equal to themselves"] += right
                if not right:
                    failures.append(f"{problem.id}: {form!r} is not counted as {gold!r}")
            for what, wrong in changed(gold).items():
                refused = not is_correct(problem, extract_answer(f"So we get \\boxed{{{wrong}}}", problem.kind))
                counts[f"refused, {what}"] += refused
                if not refused:
                    failures.append(f"{problem.id}: {wrong!r} ({what}) is counted as {gold!r}")
    for what, count in counts.items():
        print(f"{count:6d} {what}")
    print(f"{len(failures):6d} failures, {SYMPY.timeouts} comparisons timed out")
    print("\n".join(failures))
    return 1 if failures else 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1], sys.argv[2:]))
