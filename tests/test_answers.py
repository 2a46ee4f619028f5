"""Tests of answers.py and extraction.py: reading an answer, its canonical form, and equality."""

import os
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.grading import (
    MATH_VERIFY,
    RUNGS,
    Answer,
    MathVerify,
    canonical,
    extract_answer,
    is_comparable,
    last_box,
    same_answer,
)

# ---- Reading an answer ---------------------------------------------------------------------------

NUMBERS = [  # (message, the number that is read from it)
    # signs, currency, decimals and fractions
    ("16 − 3 = 13. Final answer: 13", "13"),
    ("There are 6 boxes of 7. Final answer: 42 apples", "42"),
    ("Final answer: $1,234.50", "2469/2"),
    ("Final answer: -3/4", "-3/4"),
    ("Final answer: −7 degrees", "-7"),
    ("Final answer: .5", "1/2"),
    ("Final answer: 0.50", "1/2"),
    ("Final answer: 50%", "50"),
    ("Final answer: 10 / 4", "5/2"),
    ("Final answer: 1/0", None),
    ("Final answer: 1 3/4 cups", "7/4"),
    (r"\boxed{1\frac{3}{4}}", "7/4"),
    ("Final answer: -1 1/2", "-3/2"),
    ("Final answer: 3½", "7/2"),
    ("Final answer: 3 and 1/2", "7/2"),
    ("Final answer: minus 3", "-3"),
    ("Final answer: $1.45 million", "1450000"),
    ("Final answer: 1.45 Million", "1450000"),
    ("Final answer: 1.36329e+06", "1363290"),
    ("Final answer: -2E3 dollars", "-2000"),
    ("Final answer: 5e-1", "1/2"),
    ("Final answer: 2e", "2"),
    ("Final answer: Minus 3", "-3"),
    ("It is Negative 3", "-3"),
    ("Final answer: 1,23,456", "123456"),
    (r"\boxed{1\,234}", "1234"),
    (r"\boxed{\frac{1,000}{3}}", "1000/3"),
    ("Final answer: " + "1" * 5000, None),
    ("Final answer: 1/" + "9" * 5000, None),
    ("0." + "3" * 5000 + r"\overline{3}. Final answer: 12", "12"),
    ("Final answer: 5 rbillion", "5"),
    # forms of a statement
    ("**Final answer:** **73**", "73"),
    ("**Final answer**: 73.", "73"),
    ("The final answer is 12.", "12"),
    ("#### 72", "72"),
    ("#### $1,200 per year", "1200"),
    ("Final answer:\n18", "18"),
    ("**Final Answer:**\n\n**12**", "12"),
    ("The final answer is:\n\n$12$", "12"),
    ("### Final Answer\n7", "7"),
    ("Final answer - 12", "12"),
    ("**Final Answer**\n\nThe answer is 18.", "18"),
    # the last statement, and no mention or heading after it
    ("Final answer: 3\nWait. Final answer: 4", "4"),
    ("Final answer: 12\nThe Solver's final answer is correct.", "12"),
    ("Final answer: 12\n\nThis is the final answer.", "12"),
    ("Let's find the final answer.\n\nTotal = 5 + 7 = 12", "12"),
    ("#### Step 1\n5 + 7\n#### Step 2\n5+7=12\nSo she has 12 apples.", "12"),
    # boxes
    (r"so \boxed{42} it is, not 7", "42"),
    (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{1} then \boxed{2}", "2"),
    (r"\boxed 7", "7"),
    (r"\boxed {12}", "12"),
    (r"\boxed{}" "\nFinal answer: 12", "12"),
    # the last number
    ("5 + 8 = 13", "13"),
    ("first 2, then 1,000", "1000"),
    ("the range 3-5", "5"),
    ("the years 1990 1991", "1991"),
    ("Total: 3*4 and 2*15", "15"),
    ("The answer is -6.", "-6"),
    ("She is left with **-6** dollars", "-6"),
    ("Final answer: The temperature is -10", "-10"),
    ("x-3", "3"),
    ("f(2) - 3", "3"),
    # no number
    ("I do not know", None),
    ("Final answer: none", None),
    ("", None),
    # two numbers
    ("Final answer: 5 or 6", None),
    ("Final answer: Between 5 and 6", None),
    ("Final answer: Between 5, 6 and 7", None),
    ("Final answer: 5, 6", None),
    ("Final answer: 5 or 6 or 7", None),
    ("Final answer: 2 + 3", None),
    ("Final answer: 12 - 15", None),
    ("Final answer: -3 - 4", None),
    ("Final answer: 12-15 apples", None),
    ("Final answer: $5–$6", None),
    ("Final answer: 10%-20%", None),
    ("Final answer: 10% to 20%", None),
    ("Final answer: 1/2-3/4", None),
    ("Final answer: 2**3", None),
    ("Final answer: from 5 to -3", None),
    ("Final answer: 16 - 3 = 13", "13"),
    ("Final answer: 16-3=13", "13"),
    ("Final answer: -3", "-3"),
    ("Final answer: 3 (5 - 2)", "3"),
    ("Final answer: 5 (five) or 6 (six)", None),
    ("Final answer: 2^3", None),
    (r"\boxed{2 \times 3}", None),
    # equations and remarks
    ("Final answer: 16-3=13", "13"),
    ("Final answer: 5 = 2 + 3", "5"),
    (r"\boxed{12=5+7}", "12"),
    ("Final answer: 12 = 5 + 7 = 10 + 2", "12"),
    ("Final answer: 5 + 7 = 10 + 2 = 12", "12"),
    ("Final answer: total = 12 apples in 3 bags", "12"),
    ("Final answer: 7 (see step 2)", "7"),
    ("Final answer: 12 hours (= 0.5 days)", "12"),
    ("Final answer: 12 dollars (1 dollar = 100 cents)", "12"),
    ("Final answer: In 4 weeks she earns $12.", "12"),
    ("Final answer: Total for 2 people: $17", "17"),
]

LETTERS = [  # (message, the letter that is read from it)
    # marks around a letter
    ("Final answer: A", "A"),
    ("Final answer: (b)", "B"),
    ("Final answer: (J)", "J"),
    ("Final answer: Option E.", "E"),
    ("Final answer: **C**", "C"),
    ("Final answer: $C$", "C"),
    ("Final answer: [C]", "C"),
    ('Final answer: "C"', "C"),
    ("Final answer: <C>", "C"),
    ("Final answer: C) Paris", "C"),
    (r"\boxed{D}", "D"),
    (r"\boxed{\text{(C)}}", "C"),
    (r"\boxed{\textrm{B}}", "B"),
    (r"Final answer: $\mathrm{D}$", "D"),
    # words before or after a letter
    ("Final answer: A is correct", "A"),
    ("Final answer: **A** because it follows", "A"),
    ("Final answer: The correct answer is C", "C"),
    ("Final answer: The correct option is (C).", "C"),
    ("Final Answer: The final answer is $C$. I hope it is correct.", "C"),
    ("Final answer: Answer: C", "C"),
    # forms of a statement
    ("**Final answer**: B", "B"),
    ("Final Answer:\nC", "C"),
    ("### Final Answer\nC", "C"),
    ("Final answer: C\n\n#### Explanation\nB is wrong.", "C"),
    ("Final answer - C", "C"),
    ("#### C", "C"),
    ("#### Step B", None),
    # two letters
    ("Final answer: C or D", None),
    ("Final answer: A, B and C", None),
    ("Final answer: B and C are both right", None),
    ("Final answer: A or B, both hold", None),
    ("Final answer: C, a fair choice", "C"),
    ("Final answer: C/D", None),
    ("Final answer: Option C and Option D", None),
    (r"\boxed{A, B}", None),
    # letters that are not options
    ("A train leaves town", None),
    ("Final answer: A train", None),
    ("Final answer: a train", None),
    ("Final answer: I would say so", None),
    ("Final answer: I’m not sure", None),
    ("Final answer: N/A", None),
    ("Final answer: e.g. dogs", None),
    ("Final answer: U.S. law", None),
    ("Final answer: T-shirt", None),
    ("Final answer: x = 3", None),
    ("Final answer: None of these", None),
]

FORMULAS = [  # (message, the formula that is read from it)
    (r"Final answer: the length is $2\sqrt{3}$.", r"2\sqrt{3}"),
    (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", "1/2"),
    ("Final answer:\n$$x+1$$", "x+1"),
    ("**Final answer:** $x+1$", "x+1"),
    (r"Final answer: \(x+1\)", "x+1"),
    ("#### Explanation", None),
    ("Final answer: x+1\nMy final answer is right.", "x+1"),
]


@pytest.mark.parametrize("text, answer", NUMBERS)
def test_numbers_are_read_from_the_final_answer(text, answer):
    assert extract_answer(text, "number").value == answer


@pytest.mark.parametrize("text, letter", LETTERS)
def test_letters_are_read_only_where_an_answer_is_given(text, letter):
    assert extract_answer(text, "letter").value == letter


@pytest.mark.parametrize("text, answer", FORMULAS)
def test_formulas_are_read_from_the_final_answer(text, answer):
    assert extract_answer(text, "math").value == answer


def test_boxes_with_inner_braces_are_read_whole():
    assert extract_answer(r"thus \boxed{2\sqrt{3}}", "math").value == r"2\sqrt{3}"
    assert extract_answer(r"thus \boxed{\frac{3}{4}}", "math").value == "3/4"
    assert extract_answer(r"thus \boxed{\frac{3}{4}", "math").value is None  # never closed


# ---- The ladder ----------------------------------------------------------------------------------

LADDER = [  # (message, answer type, the answer, the rung on which it is read)
    # told
    ("The Solver's \\boxed{7} is wrong.\nFinal answer: 9", "number", "9", "told"),
    ("Final answer: 9\nThe Solver's \\boxed{7} is wrong.", "number", "9", "told"),
    ("Final answer: 9\nThe Solver wrote \\boxed{7}.", "number", "9", "told"),
    ("The final answer is 9. The Solver wrote \\boxed{7}.", "number", "9", "told"),
    ("Final answer: 9\nSo the answer is 7.", "number", "9", "told"),
    ("Final answer: 9\nSo the final answer is 7.", "number", "9", "told"),
    ("The final answer is 9, not \\boxed{7}.", "number", "9", "told"),
    ("#### 9\nThe answer is 7.", "number", "9", "told"),
    ("#### \\boxed{9}\nThe answer is 7.", "number", "9", "told"),
    ("#### $\\boxed{9}$\nThe answer is 7.", "number", "9", "told"),
    ("#### 9 apples\nThe answer is 7.", "number", "9", "told"),
    ("The answer is 7.\nSo my final answer 9 apples", "number", "9", "told"),
    ("The final answer is 7. No, the final answer is 9.", "number", "9", "told"),
    ("\\boxed{7}\nFinal answer: $\\boxed{\\frac{3}{4}}$.", "math", "3/4", "told"),
    ("**Final Answer**\n\\[\n\\boxed{12}\n\\]", "number", "12", "told"),
    ("**Final Answer**\n$$\nx + 1\n$$", "math", "x + 1", "told"),
    ("**Final Answer**\n\nThere are 3 ways, so\n\\boxed{12}", "number", "12", "told"),
    ("**Final Answer**\n\nThe number of ways is\n\\boxed{12}", "math", "12", "told"),
    ("**Final Answer**\n12\n\nThe Solver had \\boxed{7}.", "number", "12", "told"),
    ("**Final Answer**\n12 apples\n\nThe Solver had \\boxed{7}.", "number", "12", "told"),
    ("**Final Answer**\n9\n**Final Answer**\nIt must be\n\\boxed{12}", "number", "12", "told"),
    ("Final answer: a set of all the odd numbers", "math", "a set of all the odd numbers", "told"),
    ("Final answer: right", "math", "right", "told"),
    ("The final answer should be (C).", "letter", "C", "told"),
    ("The final answer to the question is C.", "letter", "C", "told"),
    ("Final answer (C)", "letter", "C", "told"),
    ("Final answer: \\boxed{3}, no, \\boxed{4}", "number", "4", "told"),
    ("Final answer: therefore C", "letter", "C", "told"),
    # sentences
    ("The correct answer is C.", "letter", "C", "sentence"),
    ("The answer is (B)", "letter", "B", "sentence"),
    ("Answer: D", "letter", "D", "sentence"),
    ("the correct option is B", "letter", "B", "sentence"),
    ("The best choice is (B).", "letter", "B", "sentence"),
    ("The answer choice is **B**.", "letter", "B", "sentence"),
    ("**Answer:** 5", "number", "5", "sentence"),
    ("**Answer**: 5 apples in 2 bags", "number", "5", "sentence"),
    ("Answer:\n\n5\n\nI used step 3.", "number", "5", "sentence"),
    ("### Answer\n5\n\nI used step 3.", "number", "5", "sentence"),
    ("Answer - 5 (see step 3)", "number", "5", "sentence"),
    ("Thus the answer is 12. I used rule 3.", "number", "12", "sentence"),
    ("The answer is therefore B, as A fails.", "letter", "B", "sentence"),
    ("The answer should be 9, not 7.", "number", "9", "sentence"),
    ("The answer to the question is 5, by rule 3.", "number", "5", "sentence"),
    ("The answer (in cm) is 5, by rule 3.", "number", "5", "sentence"),
    ("The answer is $\\frac{3}{4}$.", "math", "3/4", "sentence"),
    ("The answer is $\\frac{3}{4}.$ So we are done with $n = 3$.", "math", "3/4", "sentence"),
    ("The answer is east.", "math", "east", "sentence"),
    ("The answer is the set of odd primes.", "math", "the set of odd primes", "sentence"),
    ("The answer is the set of all odd primes.", "math", None, "none"),
    ("The answer is approximately 3.5.", "math", "7/2", "sentence"),
    ("The answer is:\n\\[\nx + 1\n\\]", "math", "x + 1", "sentence"),
    ("That's the answer: C", "letter", "C", "sentence"),
    ("Let's answer: C", "letter", "C", "sentence"),
    # whichever comes last; a box in a sentence is its answer
    ("The answer is 5. No: \\boxed{6}.", "number", "6", "box"),
    ("\\boxed{6}. No, the answer is 5.", "number", "5", "sentence"),
    ("By rule 3 the answer is $\\boxed{6}$ in 7 steps.", "number", "6", "sentence"),
    ("The answer is found by adding: \\boxed{6}, see 7.", "number", "6", "sentence"),
    ("The answer is B. The answer is not A, because A is hot.", "letter", "B", "sentence"),
    ("The answer is not A; the answer is B.", "letter", "B", "sentence"),
    ("The answer is B. The answer is a surprise.", "letter", "B", "sentence"),
    ("\\boxed{120}. The answer is the number of all ways to arrange them.", "math", "120", "box"),
    # a bare option
    ("B", "letter", "B", "option"),
    ("(B)", "letter", "B", "option"),
    ("**B**", "letter", "B", "option"),
    ("B.", "letter", "B", "option"),
    (" option b\n", "letter", "B", "option"),
    ("$\\text{(B)}$", "letter", "B", "option"),
    ("A", "letter", "A", "option"),
    ("B", "math", None, "none"),
    ("So \\boxed{7}, and thus \\boxed{ }", "number", "7", "box"),
    # options that are only discussed
    ("Option A is wrong because it is hot.", "letter", None, "none"),
    ("A is tempting, but B is too.", "letter", None, "none"),
    ("A train leaves. The answer is a train.", "letter", None, "none"),
    ("The answer is A train.", "letter", None, "none"),
    ("The wrong answer is A.", "letter", None, "none"),
    ("Is it A? Perhaps the answer is A?", "letter", None, "none"),
    ("Is it A? Perhaps the answer is A? ", "letter", None, "none"),
    ("A) The first\nB) The second", "letter", None, "none"),
    # the answers of others, and remarks on an answer
    ("The Solver's answer is 7, but it should be 9", "number", "9", "number"),
    ("The Solver's answer is C, which is wrong.", "letter", None, "none"),
    ("The Solver's final answer is C, which is wrong.", "letter", None, "none"),
    ("The Solver's \\boxed{C} is close.", "letter", None, "none"),
    ("\\boxed{C} is wrong.", "letter", None, "none"),
    ("\\boxed{C}is wrong.", "letter", None, "none"),
    ("I checked the answer: it is right", "math", None, "none"),
    ("\\boxed{7}\nI checked the final answer: it is right.", "math", "7", "box"),
    ("\\boxed{7}\nThe Solver's final answer is correct.", "math", "7", "box"),
    ("\\boxed{7}\nThe final answer is rounded to 2 decimals.", "number", "7", "box"),
    ("\\boxed{7}\nThe answer is wrong.", "math", "7", "box"),
    ("7\nThe answer is correct: 3 + 4 = 7", "number", "7", "number"),
    ("3 + 4 = 7, and I checked the final answer: it is right.", "number", "7", "number"),
    ("3 + 4 = 7, so the answer is easy.", "number", "7", "number"),
    ("What is the final answer if x is 5? It is 7.", "number", "7", "number"),
    ("I look for the final answer by rule 5.\n3 + 4 = 7", "number", "7", "number"),
    # the answer is not 5
    ("The answer is not 5.", "number", None, "none"),
    ("The answer isn't 5.", "number", None, "none"),
    ("The answer cannot be 5.", "number", None, "none"),
    ("The answer is more than 5.", "number", None, "none"),
    ("The final answer is not 5.", "number", None, "none"),
    ("Final answer: not 5", "number", None, "none"),
    ("Final answer: not sure, 4 or so", "number", None, "none"),
    ("\\boxed{7}, as the answer is not 5.", "number", "7", "box"),
    ("The answer is not \\boxed{5}.", "number", None, "none"),
    ("In 3 steps: the answer isn't \\boxed{x}.", "number", None, "none"),
    ("**Final Answer**\nmore than \\boxed{5}", "number", None, "none"),
    # refused answers are not replaced by a worse guess
    ("The answer is 5 or 6. I took 3 steps.", "number", None, "none"),
    ("\\boxed{7}\nThe answer is 5 or 6.", "number", None, "none"),
    ("\\boxed{7}\nFinal answer: 5 or 6", "number", None, "none"),
    ("\\boxed{7}\n**Final Answer**\n5 or 6", "number", None, "none"),
    ("The answer is 7.\nFinal answer: 5 or 6", "number", None, "none"),
    ("The answer is 7.\nThe final answer is 5 or 6.", "number", None, "none"),
    ("The answer is B. The answer is C or D.", "letter", None, "none"),
    ("The answer is B. My final answer C, D", "letter", None, "none"),
    ("The answer is 7. My final answer 1/0", "number", None, "none"),
    ("The answer is 7, but \\boxed{2 \\times 3}", "number", None, "none"),
    ("The answer is 7. \\boxed{12", "number", None, "none"),
    ("The answer is B. \\boxed{", "letter", None, "none"),
    # ... but by a later one, and an earlier statement holds still
    ("Final answer: 5 or 6\nSo \\boxed{6}", "number", "6", "box"),
    ("Final answer: see below.\nThe answer is 6.", "number", "6", "sentence"),
    ("**Final Answer**\nas in the table\nThe answer is 6.", "number", "6", "sentence"),
    ("**Final Answer**\nSo\n\\boxed{9}\nFinal answer: 5 or 6\n\\boxed{8}", "number", "9", "told"),
    ("Final answer: 4\nFinal answer: 5 or 6", "number", "4", "told"),
    ("The final answer is 4. The final answer is 5 or 6.", "number", "4", "told"),
    ("\\boxed{7}\nFinal answer:", "number", "7", "box"),
    ("We took 3 steps.\nFinal answer:", "number", None, "none"),
    # the last number
    ("5 + 8 = 13", "number", "13", "number"),
    ("I do not know", "number", None, "none"),
    ("5 + 8 = 13", "math", None, "none"),
    ("I get \\boxed{9} rather than \\boxed{7}.", "number", "9", "box"),
    ("\\boxed{9}. The \\boxed{7} is not correct.", "number", "9", "box"),
    ("\\boxed{7}\nThe answer is given in step 3.", "number", "7", "box"),
    ("The answer equals 5, by rule 3.", "number", "5", "sentence"),
    ("Final answer: 2 billion", "number", "2000000000", "told"),
    ("Final answer: –7", "number", "-7", "told"),
]


@pytest.mark.parametrize("text, answer_type, value, rung", LADDER)
def test_the_ladder_reads_the_answer_on_the_right_rung(text, answer_type, value, rung):
    assert extract_answer(text, answer_type) == Answer(value, rung)


def test_a_box_over_several_lines_is_told_whole():
    text = "Final answer: \\boxed{\\begin{pmatrix}1\\\\\n2\\end{pmatrix}}"
    value, rung = extract_answer(text, "math")
    assert rung == "told"
    assert same_answer(value, canonical(pmatrix(r"1\\2"), "math"), "math")


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
@given(message=MESSAGES, answer_type=st.sampled_from(["number", "letter", "math"]))
def test_every_text_is_read_without_an_error(message, answer_type):
    value, rung = extract_answer(message, answer_type)
    assert rung in RUNGS
    assert (value is None) == (rung == "none")
    if value is not None and answer_type != "math":
        assert canonical(value, answer_type) == value


@PROPERTY
@given(message=MESSAGES, told=st.sampled_from(TOLD))
def test_a_final_answer_at_the_end_is_the_answer_of_any_message(message, told):
    answer_type, answer, value = told
    text = f"{message}\nFinal answer: {answer}"
    assert extract_answer(text, answer_type) == Answer(value, "told")


def spellings_of(number):
    """Return ways to write a fraction."""
    magnitude = abs(number)
    whole, rest = divmod(magnitude, 1)
    written = [f"{magnitude.numerator}/{magnitude.denominator}"]
    written.append(rf"\frac{{{magnitude.numerator}}}{{{magnitude.denominator}}}")
    if rest:
        written.append(f"{whole} {rest.numerator}/{rest.denominator}")
    else:
        written += [
            f"{whole}",
            f"{whole:,}",
            f"{whole}.00",
            f"{whole} apples",
            f"{whole * 1000}/1000",
        ]
    if 1000 % magnitude.denominator == 0:
        written += [f"{float(magnitude):,.3f}", f"{float(magnitude):.4f}%"]

    signed = []
    for text in written:
        if number >= 0:
            signed += [text, f"${text}", f"**{text}**", rf"\boxed{{{text}}}", f"{text}. Done."]
        else:
            signed += [f"-{text}", f"−{text}", f"-${text}", f"Minus {text}", rf"\boxed{{-{text}}}"]
    return signed


@PROPERTY
@given(
    numerator=st.integers(-(10**7), 10**7),
    denominator=st.sampled_from([1, 1, 2, 3, 7, 8, 10, 1000]),
)
def test_a_number_is_read_back_however_it_is_written(numerator, denominator):
    number = Fraction(numerator, denominator)
    for spelling in spellings_of(number):
        answer = extract_answer(f"I tried 5.\nFinal answer: {spelling}", "number")
        assert answer == Answer(str(number), "told"), spelling


# ---- Equality ------------------------------------------------------------------------------------


def pmatrix(entries):
    return r"\begin{pmatrix}" + entries + r"\end{pmatrix}"


MATH = [  # two answers as agents and data sets write them, and whether they are equal
    # numbers
    ("42", "42.0", True),
    (r"\text{42}", "42", True),
    ("-3", "3", False),
    ("−3", "-3", True),
    (r"\frac{3}{4}", "3", False),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"\frac12", "0.5", True),
    (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    (r"-\frac{1}{2}", r"\frac{1}{2}", False),
    (r"\frac{2}{4}", r"\frac{1}{2}", True),
    (r"1\frac{1}{2}", r"\frac{3}{2}", True),
    ("0.25", r"\frac{1}{4}", True),
    ("0.333333", r"\frac{1}{3}", False),
    (r"0.\overline{36}", r"\frac{4}{11}", True),
    (r"2.1\overline{6}", r"\frac{13}{6}", True),
    (r"-.1\overline{6}", r"-\frac{1}{6}", True),
    (r"-.1\overline{6}", r"\frac{1}{6}", False),
    (r"0.\overline{36}", r"\frac{4}{10}", False),
    ("10^{3}", "1000", True),
    ("1.5e3", "1500", False),
    (".0000672", r"6.72 \times 10^{-5}", True),
    ("2^3", "8", True),
    ("2^3", "9", False),
    (r"5!", "120", True),
    ("2:3", "3:2", False),
    # thousands
    ("1,234", "1234", True),
    (r"1{,}234", "1234", True),
    (r"1\!,234", "1234", True),
    (r"11,\! 111,\! 100", "11,111,100", True),
    (r"10\,080", "10080", True),
    (r"\frac{448}{15,625}", r"\frac{448}{15625}", True),
    ("7,8", "78", False),
    # signs of percent, currency and degrees
    ("12%", "12", True),
    (r"12\%", "12", True),
    ("$12", "12", True),
    (r"\$12", "12", True),
    (r"90^\circ", "90", True),
    (r"90^\circ", "91", False),
    ("145°", r"145^\circ", True),
    (r"145\degree", r"145^\circ", True),
    # roots, logarithms and constants
    (r"2\sqrt{3}", "23", False),
    (r"2\sqrt{3}", "2", False),
    (r"\sqrt{12}", r"2\sqrt{3}", True),
    (r"\sqrt{2}", "1.41", False),
    (r"\sqrt[3]{8}", "2", True),
    (r"\sqrt[3]{2}", r"\sqrt{2}", False),
    (r"\log 2", r"\log 3", False),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", True),
    (r"\pi", "3.14", False),
    (r"\pi", r"\pi", True),
    (r"\frac{\pi}{2}", r"\pi/2", True),
    (r"\frac{\pi}{2}", r"\frac{\pi}{3}", False),
    (r"\infty", r"-\infty", False),
    # complex numbers
    (r"3+4i", "4i+3", True),
    ("3+4i", "3-4i", False),
    (r"\frac32 i", r"\frac{3i}{2}", True),
    ("2i", r"2\mathrm{i}", True),
    ("2i", "-2i", False),
    ("2i", "2", False),
    # variables
    ("x^2+1", "x^2-5", False),
    ("x^2+1", "1+x^2", True),
    ("x^{2}", "x^{3}", False),
    ("x^2", "x^{2}", True),
    ("3x", "x3", True),
    ("ab", "ba", True),
    ("a-b", "b-a", False),
    ("3r^2", "3R^2", False),
    ("5", "5x", False),
    # a fraction before a factor
    (r"\frac{\pi}{2}", r"\frac{1}{2}\pi", True),
    (r"\frac12\pi", r"\frac{1}{2\pi}", False),
    (r"\frac{3\sqrt3}{4}", r"\frac{3}{4}\sqrt3", True),
    (r"\frac{x+1}{2}", r"\frac12(x+1)", True),
    (r"-\frac12x+3", r"3-\frac{1}{2x}", False),
    ("1", r"2^\frac{1}{2}", False),
    (r"\sqrt2", r"2^\frac{1}{2}", True),
    (r"y=\frac12x+1", r"y=\frac x2+1", True),
    # subscripts and stars are not markdown
    ("52_8", "528", False),
    ("52_8", "52_{8}", True),
    ("52_8", "52_9", False),
    ("4210_{5}", "4210_5", True),
    ("a_1", "a1", False),
    ("23", "2*3", False),
    ("2xy", "2*x*y", True),
    ("**x^2**", "x^2", True),
    # tuples, intervals and sets
    ("(3,4)", "(3,7)", False),
    ("(3, 4)", "(3,4)", True),
    ("(3,4)", "(4,3)", False),
    ("[3,4]", "(3,4)", False),
    (r"\left[3,4\right)", "[3,4)", True),
    (r"(-\infty, 3]", "(-\\infty,3]", True),
    (r"(-\infty, 3]", r"(-\infty, 3)", False),
    (r"\{1,2\}", r"\{2,1\}", True),
    (r"\{1,2\}", r"\{1,3\}", False),
    (r"\{1,2\}", "(1,2)", False),
    (r"\{(1,1),(2,2)\}", "(1,1),(2,2)", True),
    (r"\emptyset", r"\varnothing", True),
    ("1,2", "2,1", True),
    ("1,2", "1,3", False),
    # matrices: \\ is the end of a row, not a space
    (pmatrix(r"1\\2"), pmatrix(r"1\\2"), True),
    (pmatrix(r"1\\2"), pmatrix(r"2\\1"), False),
    (pmatrix(r" -2 \\ -14 \\ -7 "), pmatrix(r" -14 \\ -2 \\ -7 "), False),
    (pmatrix(r" -7 \\ 16 "), pmatrix(r"-7\\16"), True),
    (pmatrix(r" -1 & 0 \\ 0 & -1 "), pmatrix(r" -1 & 5 \\ 0 & -1 "), False),
    (pmatrix(r" -7 \\ 16 "), pmatrix(r" -7 \\[4pt] 16 "), True),
    (pmatrix(r" 1/5 \\ -18/5 "), pmatrix(r"\frac15\\-\frac{18}{5}"), True),
    # relations, equations and approximations
    ("x=5", "5", True),
    ("x=5", "6", False),
    ("y=2x+3", "y=3x+2", False),
    ("y=2x+3", "y=3+2x", True),
    ("5", "f(2)=5", True),
    ("5", "f(5)=2", False),
    ("4", "x=3, y=4", False),
    ("4", "x=3 and(y)=4", False),
    ("2e-1", "0.2", False),
    ("x=1, x=2", "1,2", True),
    ("x=1,y=2", "(1,2)", True),
    ("(x,y)=(1,2)", "(1,2)", True),
    # only an equation that names its result equals its right side
    ("x = 3", "3", True),
    ("x_1 = 4", "4", True),
    (r"\theta = \pi/2", r"\pi/2", True),
    (r"\overline{AB} = 4", "4", True),
    ("AB = 4", "4", True),
    (r"\text{Area} = 4", "4", True),
    ("y=2x+3", "2x+3", True),
    ("f^{-1}(3) = 7", "7", True),
    ("f(2, x+1) = 7", "7", True),
    (r"\cos\theta = \frac12", r"\frac12", True),
    (r"P(A \cup B) = \frac12", r"\frac12", True),
    ("f(2) = x(x+1)", "x^2+x", True),
    ("f(2) = 2x+3 = 7", "7", True),
    ("x = 3+4 = 7", "7", True),
    ("3+4 = 7", "7", True),
    (r"\sqrt{49} = 7", "7", True),
    ("2x+z=1", "1", False),
    ("a^2+b=0", "0", False),
    ("x^2 = 4", "4", False),
    ("2x = 6", "6", False),
    ("2X = 6", "6", False),
    ("xy = 6", "6", False),
    ("x(x+1) = 6", "6", False),
    ("x + y = 3+4 = 7", "7", False),
    ("|x| = 3", "3", False),
    ("5 = 2x+1", "2x+1", False),
    (r"\frac{x}{2} = 3", "3", False),
    (r"x\in[-2,7]", r"-2 \le x \le 7", True),
    ("(3,4]", r"3<x\le4", True),
    ("(3,4]", "3<x<4", False),
    (r"\frac{3}{56}", r"\frac{3}{56} \approx 0.0536", True),
    # units: words after a number are not variables
    ("36", r"36\text{ dollars}", True),
    ("36", r"35\text{ dollars}", False),
    ("36", "36 dollars", True),
    (r"\$18.90", r"18.90 \text{ dollars}", True),
    ("58,500", r"58,500\text{ people}", True),
    # units: an area is not a length
    (r"15\mbox{ cm}^2", "15", True),
    (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3", False),
    (r"15\text{ cm}^2", r"15 \text{ cm}^2", True),
    (r"15\mbox{ cm}^2", r"15\text{ cm}^2", True),
    (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True),
    (r"15\text{ m}^2", r"15\text{ m}", False),
    (r"12\pi", r"12\pi \text{ cm}^2", True),
    (r"5\text{ square feet}", r"5\text{ feet}", False),
    (r"864 \mbox{ inches}^2", r"864 \text{ in}^2", True),
    # times of day
    (r"9:30\text{ p.m.}", r"9:30\text{ a.m.}", False),
    (r"9:30\text{ p.m.}", r"9:30 \text{ p.m.}", True),
    ("3:00 p.m.", "3:00 PM", True),
    ("3:00 A.M.", "3:00 pm", False),
    # a variable is no unit
    ("m(m+1)", "m^2+m", True),
    ("m+m^2", "m^2+m", True),
    (r"15\,m", r"15\,m^2", False),
    # words in any case, variables and commands as they are
    (r"5\text{ Square units}", r"5\text{ square units}", True),
    (r"5\text{ Square units}", r"5\text{ units}", False),
    (r"\Delta", r"\delta", False),
    (r"\text{east}", "East", True),
    ("NO", "no", True),
    ("NO", "on", False),
    (r"\text{east}", "seat", False),
    (r"\text{Evelyn}", "Evelyn", True),
    (r"\textbf{Evelyn}", r"\mbox{Evelyn}", True),
    (r"\text{even}", "odd", False),
    (r"\text{No}", "no", True),
    (r"\text{Friday, June 5}", "Friday, June 5", True),
    (r"\text{Friday, June 5}", "Friday, June 6", False),
    (r"\text{Friday}, June 5", "Friday,June 5", True),
    (r"\text{(B)}", "(B)", True),
    (r"\text{(B)}", "(C)", False),
    (r"\text{(C)}", r"\text{(C) hyperbola}", True),
    (r"\text{(C)}", r"\text{(D) circle}", False),
    (r"\text{(C) hyperbola}", r"\text{(C) circle}", False),
    (r"5\text{ cubic cm}", r"5\text{ cm}^3", True),
    (r"5\text{ cubic feet}", r"5\text{ square feet}", False),
    (r"5\text{ square units}", r"5\text{ units}", False),
]


@pytest.mark.parametrize("a, b, equal", MATH)
def test_symbolic_equality_is_right_and_symmetric(a, b, equal):
    a, b = canonical(a, "math"), canonical(b, "math")
    assert same_answer(a, b, "math") == same_answer(b, a, "math") == equal


MATH_ANSWERS = [canonical(answer, "math") for answer in sum([[a, b] for a, b, _ in MATH], [])]


@settings(PROPERTY, max_examples=50)
@given(a=st.sampled_from(MATH_ANSWERS), b=st.sampled_from(MATH_ANSWERS))
def test_equality_is_symmetric(a, b):
    assert same_answer(a, b, "math") == same_answer(b, a, "math")


def test_no_answer_equals_nothing():
    assert not same_answer(None, None, "number")
    assert not same_answer(None, "0", "number")
    assert same_answer("0", "0", "number")


# The start of a program in which every alarm ends the process
WITHOUT_ALARM = """
import os
import signal

signal.alarm = lambda seconds: os._exit(1)
"""


def test_a_comparison_that_takes_forever_is_given_up_and_counted(monkeypatch, capsys):
    program = "import time; print('ready', flush=True); input(); time.sleep(60)"
    math_verify = MathVerify()
    monkeypatch.setattr(MathVerify, "SECONDS", 0.1)
    monkeypatch.setattr(MathVerify, "PROGRAM", program)
    for number, pair in enumerate([("x", "y"), ("x", "z")], start=1):
        assert not math_verify.equal(*pair)
        assert math_verify.timeouts == number
        assert "took more than 0.1 s; counted as unequal" in capsys.readouterr().err

    # A fresh process answers the next one. It must not set an alarm: a comparison that math-verify
    # gives up by itself is reported as unequal, and nobody would count it.
    monkeypatch.undo()
    monkeypatch.setattr(MathVerify, "PROGRAM", WITHOUT_ALARM + MathVerify.PROGRAM)
    assert math_verify.equal("x+y", "y+x")
    assert os.getsid(math_verify.process.pid) == math_verify.process.pid  # out of reach of Ctrl-C
    math_verify.process.kill()


def test_a_comparison_that_fails_is_an_error_that_names_the_pair(monkeypatch):
    monkeypatch.setattr(MathVerify, "PROGRAM", "print('ready', flush=True); input(); exit(1)")
    with pytest.raises(RuntimeError, match="math-verify failed on 'x' and 'y'"):
        MathVerify().equal("x", "y")


def test_math_verify_is_started_again_after_it_has_ended(monkeypatch):
    """Killed by somebody else it has not run out of time: nothing may count as unequal."""
    math_verify = MathVerify()
    monkeypatch.setattr(MathVerify, "PROGRAM", "print('ready', flush=True); input(); exit(1)")
    with pytest.raises(RuntimeError, match="math-verify failed on 'x' and 'y'$"):
        math_verify.equal("x", "y")
    dying = "import os; print('ready', flush=True); input(); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(MathVerify, "PROGRAM", dying)
    with pytest.raises(RuntimeError, match="failed on 'x' and 'y', perhaps out of memory"):
        math_verify.equal("x", "y")
    answering = "print('ready', flush=True)\nwhile input(): print('true', flush=True)"
    monkeypatch.setattr(MathVerify, "PROGRAM", answering)
    assert math_verify.equal("x", "y")
    math_verify.process.kill()
    math_verify.process.wait()
    assert math_verify.equal("x", "z")
    assert math_verify.timeouts == 0
    math_verify.process.kill()


def test_symbolic_answers_are_compared_from_any_thread():
    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(same_answer, "x+1", "1+x", "math")
        assert future.result(timeout=30) is True


# ---- Rules that a wrong program would pass -------------------------------------------------------


def test_a_formula_is_comparable_if_math_verify_finds_it_equal_to_itself(monkeypatch):
    asked = []

    def equal(*pair):
        asked.append(pair)
        return pair[0] == "x+1"

    monkeypatch.setattr(MATH_VERIFY, "equal", equal)
    assert is_comparable("x+1", "math")
    assert not is_comparable("x+", "math")
    assert asked == [("x+1", "x+1"), ("x+", "x+")]
    # These need no math-verify.
    for answer in ("3/4", "New York"):
        assert is_comparable(answer, "math")
    for answer_type in ("number", "letter"):
        assert is_comparable("?", answer_type)
    assert len(asked) == 2


CANONICAL_MATH = [  # an answer as it is written, and its canonical form
    # the end of a sentence or a line, but no capital letter
    ("x+1.", "x+1"),
    ("x+1 \\ ", "x+1"),
    ("2X", "2X"),
    ("5X", "5X"),
    # styles of the whole and of its parts
    (r"\mathbf{x^2}", "x^2"),
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


def test_a_number_has_at_most_200_characters():
    """What is longer is skipped: the next number counts, and a formula stays as it is."""
    at_most, too_long = "0" * 199 + "7", "0" * 200 + "7"
    assert canonical(f"{at_most} apples", "number") == "7"
    assert canonical(f"{too_long} apples cost 8", "number") == "8"
    assert canonical(at_most, "math") == "7"
    assert canonical(too_long, "math") == too_long


def test_a_division_by_zero_is_skipped():
    assert canonical("1/0 is no number, 7 is", "number") == "7"


def test_an_unknown_answer_type_is_an_error():
    with pytest.raises(ValueError, match="unknown answer type 'words'"):
        canonical("7", "words")


ARTICLES = [("**A** train", "A"), ("A train", None), ("X train", "X"), ("i would say", None)]


@pytest.mark.parametrize("text, letter", ARTICLES)
def test_an_article_is_an_option_in_bold_only(text, letter):
    assert canonical(text, "letter") == letter


SIGNS = [("a loss of -3", "-3"), ("total x - 3", "3"), ("total x-3", "3")]


@pytest.mark.parametrize("text, number", SIGNS)
def test_a_minus_subtracts_or_is_a_sign(text, number):
    assert canonical(text, "number") == number


EQUATIONS = [
    ("x=5", "y=5", False),
    ("y=x(x+1)", "x^2+x", True),
    ("a=b=5", "5", True),
    ("x<=5", "5", False),
    ("x>=5", "5", False),
    ("x!=5", "5", False),
    ("5 sq. cm", "5 cm", False),
]


@pytest.mark.parametrize("a, b, equal", EQUATIONS)
def test_an_equation_yields_its_right_side_and_nothing_else(a, b, equal):
    assert same_answer(canonical(a, "math"), canonical(b, "math"), "math") == equal


def test_a_text_without_a_box_has_no_last_box():
    assert last_box("no box") is None
    assert last_box(r"\boxed{1} and \boxed{\frac{2}{3}}") == r"\frac{2}{3}"
