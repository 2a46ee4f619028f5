"""Tests of tasks/grading.py: reading an answer, its canonical form, and equality.

reading.txt holds messages and their answers, equality.txt pairs of answers that are equal or not.
"""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.grading import (
    RUNGS,
    Answer,
    MathVerify,
    canonical,
    extract_answer,
    same_answer,
)

# ---- Reading an answer ---------------------------------------------------------------------------


def lines_of(name):
    """Return the lines of a table beside this file, without its comments."""
    lines = Path(__file__).with_name(name).read_text().split("\n")
    return [line for line in lines if line and not line.startswith("# ")]


def readings():
    """Return (message, answer type, value, rung) for each line of reading.txt."""
    rows = []
    for line in lines_of("reading.txt"):
        if line in ("[number]", "[letter]", "[math]"):
            answer_type = line.strip("[]")
            continue
        message, _, answer = line.rpartition(" => ")
        value, _, rung = answer.removesuffix("]").rpartition("[")
        rows.append((message.replace("⏎", "\n"), answer_type, value.strip() or None, rung))
    return rows


@pytest.mark.parametrize("message, answer_type, value, rung", readings())
def test_the_answer_of_a_message_and_its_rung(message, answer_type, value, rung):
    assert extract_answer(message, answer_type) == Answer(value, rung)


LONG = [  # (message, the number that is read from it)
    ("Final answer: " + "1" * 5000, None),
    ("Final answer: 1/" + "9" * 5000, None),
    ("0." + "3" * 5000 + r"\overline{3}. Final answer: 12", "12"),
    ("Final answer: " + "0" * 199 + "7 apples", "7"),
    ("Final answer: " + "0" * 200 + "7 apples cost 8", "8"),
    ("", None),
]


@pytest.mark.parametrize("message, number", LONG)
def test_a_number_has_at_most_200_characters(message, number):
    assert extract_answer(message, "number").value == number


# ---- Properties of every message -----------------------------------------------------------------

# What messages are made of, so that random messages come near the rules
FRAGMENTS = [
    *("Final answer", "final answer is", "#### ", "The answer is", "Answer", "the best option is"),
    *("The Solver's", "not", "wrong", "therefore", " or ", " and ", " is ", ": ", "\n", ". "),
    *("\\boxed{", "\\boxed", "\\fbox{", "{", "}", "$", "\\[", "\\(", "\\)", "**", "(", ")"),
    *("\\frac{", "\\frac", "\\sqrt", "\\text{", "\\overline{", "^", "_", "=", "-", "+", "/", "%"),
    *("0", "7", "1,234", ".5", "1/0", "9" * 300, "10^{999}", " million", "A", "B", "x", "cm"),
    *("½", "²", "①", "٣", "−", "\u202f", "\u2028", "\x00", "é", "ﬁ", "数"),
]
MESSAGES = st.lists(st.sampled_from(FRAGMENTS), max_size=12).map("".join)
PROPERTY = settings(max_examples=150, deadline=None, derandomize=True, database=None)

TOLD = [  # answer type, an answer, its canonical form
    ("number", "-1,234.5", "-2469/2"),
    ("letter", "(C)", "C"),
    ("math", r"\frac{3}{4}", "3/4"),
    ("math", r"$2\sqrt{x}$", r"2\sqrt{x}"),
    ("math", r"$\boxed{x+1}$", "x+1"),
]


@PROPERTY
@given(message=MESSAGES, told=st.sampled_from(TOLD))
def test_every_text_is_read_and_a_final_answer_at_its_end_is_its_answer(message, told):
    answer_type, answer, told_value = told
    value, rung = extract_answer(message, answer_type)
    assert rung in RUNGS
    assert (value is None) == (rung == "none")
    if value is not None and answer_type != "math":
        assert canonical(value, answer_type) == value
    text = f"{message}\nFinal answer: {answer}"
    assert extract_answer(text, answer_type) == Answer(told_value, "told")


def spellings_of(number):
    """Return ways to write a fraction."""
    magnitude = abs(number)
    whole, rest = divmod(magnitude, 1)
    written = [f"{magnitude.numerator}/{magnitude.denominator}"]
    written.append(rf"\frac{{{magnitude.numerator}}}{{{magnitude.denominator}}}")
    if rest:
        written.append(f"{whole} {rest.numerator}/{rest.denominator}")
    else:
        written += [f"{whole}", f"{whole:,}", f"{whole}.00", f"{whole} apples"]
    if 1000 % magnitude.denominator == 0:
        written += [f"{float(magnitude):,.3f}", f"{float(magnitude):.4f}%"]
    forms = ["{}", "${}", "**{}**", r"\boxed{{{}}}", "{}. Done."]
    if number < 0:
        forms = ["-{}", "−{}", "-${}", "Minus {}", r"\boxed{{-{}}}"]
    return [form.format(text) for form in forms for text in written]


@PROPERTY
@given(st.integers(-(10**7), 10**7), st.sampled_from([1, 1, 2, 3, 7, 8, 10, 1000]))
def test_a_number_is_read_back_however_it_is_written(numerator, denominator):
    number = Fraction(numerator, denominator)
    for spelling in spellings_of(number):
        answer = extract_answer(f"I tried 5.\nFinal answer: {spelling}", "number")
        assert answer == Answer(str(number), "told"), spelling


# What models repeat until they are cut off
REPEATED = [
    *("the answer is ", "The answer is A. ", "answer ", "Answer: ", "Final answer: ", "final "),
    *(
        "#### ",
        "#### 1\n",
        "\\boxed{",
        "\\boxed{1} ",
        "\\frac{",
        "\\text{",
        "{",
        "}",
        "(a ",
        "$",
        "\\[",
    ),
    *(
        "*a ",
        "=",
        "**",
        "_",
        "`",
        "```",
        "1",
        "1,",
        "1/",
        "1 ",
        "-",
        "A ",
        "A, ",
        "(A)",
        "A\n",
        "a) ",
    ),
    *(
        "⑽",
        "1\\,1 x 10 ",
        " ",
        "\n",
        ".",
        "word ",
        "Word. ",
        "not ",
        "Solver's ",
        "to the ",
        "\\begin{",
        "²",
        "½",
        "<",
    ),
]


@pytest.mark.parametrize("answer_type", ["number", "letter", "math"])
@pytest.mark.parametrize("beginning", ["", "Final answer: ", "\\boxed{"])
def test_repetition_is_read_in_no_time(beginning, answer_type):
    for repeated in REPEATED:
        message = beginning + repeated * (4 * 4096 // len(repeated))  # 4,096 tokens or more
        start = time.process_time()
        extract_answer(message, answer_type)
        assert time.process_time() - start < 0.5, repeated  # a fifth of it on an idle machine


def test_the_end_of_a_long_message_is_read():
    message = "Final answer: 7\n" + "I check it again. " * 2000
    assert extract_answer(message, "number") == Answer()
    assert extract_answer(message + "Final answer: 8", "number") == Answer("8", "told")


# ---- Equality ------------------------------------------------------------------------------------


def pairs():
    """Return (a, b, whether they are equal) for each line of equality.txt."""
    rows = []
    for line in lines_of("equality.txt"):
        operator = " == " if " == " in line else " != "
        a, b = line.split(operator)
        rows.append((a, b, operator == " == "))
    return rows


@pytest.mark.parametrize("a, b, equal", pairs())
def test_symbolic_equality_is_right_and_symmetric(a, b, equal):
    a, b = canonical(a, "math"), canonical(b, "math")
    assert same_answer(a, b, "math") == same_answer(b, a, "math") == equal


def test_a_missing_answer_equals_nothing():
    assert not same_answer(None, None, "number")
    assert not same_answer(None, "0", "number")
    assert same_answer("0", "0", "number")


CANONICAL_MATH = [  # an answer as it is written, and the form in which it is recorded
    # the end of a sentence or a line, but no capital letter
    ("x+1.", "x+1"),
    ("x+1 \\ ", "x+1"),
    ("2X", "2X"),
    # styles of the whole and of its parts
    (r"\text{Evelyn.}", "Evelyn"),
    (r"\text{east} and \text{west}", "east and west"),
    (r"\text{Room X}", "Room X"),
    # what is a number, and what is more
    ("12%", "12"),
    (r"x \approx 3", "3"),
    (r"2\sqrt{3} \approx 3.46", r"2\sqrt{3}"),
]


@pytest.mark.parametrize("text, answer", CANONICAL_MATH)
def test_a_formula_is_recorded_in_one_form(text, answer):
    assert canonical(text, "math") == answer


# ---- math-verify in its own process --------------------------------------------------------------


def test_a_comparison_that_takes_forever_is_given_up_and_counted():
    """It is stopped after a part of a second; the next one is made as before."""
    math_verify = MathVerify()
    assert math_verify.equal("x+y", "y+x")
    start = time.monotonic()
    for number, formula in enumerate(("9^{9^{9^9}}", "2^{10^9}", "{" * 10_000), 1):
        assert not math_verify.equal(formula, "5")
        assert math_verify.timeouts == number
    assert time.monotonic() - start < 30
    assert math_verify.equal("x+z", "z+x")
    assert math_verify.timeouts == 3
    assert os.getsid(math_verify.process.pid) == math_verify.process.pid  # out of reach of Ctrl-C
    math_verify.process.kill()


class WithoutAlarm(MathVerify):
    PROGRAM = "import os, signal\nsignal.alarm = lambda seconds: os._exit(1)\n" + MathVerify.PROGRAM


def test_math_verify_sets_no_alarm_of_its_own():
    """What it gives up by itself it reports as unequal, and nobody would count it."""
    math_verify = WithoutAlarm()
    assert math_verify.equal("x+y", "y+x")
    math_verify.process.kill()


def test_symbolic_answers_are_compared_from_any_thread():
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(same_answer, "x+1", "1+x", "math")
        assert future.result(timeout=30) is True
