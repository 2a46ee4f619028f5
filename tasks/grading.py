r"""Grading: what an answer is, whether two answers are equal, and which part of a message is one.

An answer has one of three types: "number", "letter" (an option of a multiple-choice question) or
"math" (any formula).

What is an answer of each type?
  number  An exact fraction. Currency signs, thousands separators, percent signs and units are
          dropped; "1 3/4", "3½", "minus 3", "1.45 million" and "1.36e+06" are understood. If the
          answer begins with a number, that number counts, else the last one. The result of an
          equation counts: 12 in "5 + 7 = 12" and in "12 = 5 + 7". A remark in parentheses does not
          count.
  letter  The letter that the answer begins with, perhaps after words such as "The correct option
          is". The article of "A train" is not an option, nor is the first letter of "T-shirt".
  math    A number if the whole answer is one, perhaps with a unit; lengths and times of day keep
          their unit. Otherwise words or LaTeX, without markup that carries no meaning. If a
          statement has exactly one formula in dollar signs, that formula is the answer.
A number or letter that is really two answers is refused: "5 or 6", "2 + 3", "C and D".

When are two answers equal?
  Numbers and letters are equal if they are the same; 0.333333 is not 1/3.
  Mathematics is compared by math-verify, in both directions, with these exceptions:
  - Text style and spaces do not count. Words are equal to the same words only, in any case.
  - Differences that math-verify ignores do count: a length is not an area, 52 in base 8 is not 52
    in base 9, a.m. is not p.m., r is not R, a set is not a tuple. "(C)" equals "(C) hyperbola".
  - If only one of the two is an equation, its right side may equal the other answer, provided that
    the equation names its result: "x = 3", "f(2) = 5", "AB = 4", "3 + 4 = 7", but not "2x + z = 1".
  A missing answer equals nothing, not even another missing answer.

math-verify runs in its own process and has 10 seconds per pair. Its own time limits are switched
off, because it reports a timeout as inequality. A pair that takes longer counts as unequal, and
`MATH_VERIFY.timeouts` counts all of these pairs.

Which part of a message is its final answer? It is found by a ladder.
A message is the text of one agent. Its answer is the first rung of this ladder that it has:
  told      The stated final answer: the last statement that can be read, else the last mention.
            Statements are "Final answer: 42", "Final answer - 42", a heading
            "**Final Answer**" with the answer below it, and a short line "#### 42". A mention is
            "the final answer is 42".
  sentence  "The answer is 42", "The correct option is B", "Answer: 42", or a heading "Answer".
  box       \boxed{42} or \fbox{42}. If there are sentences and boxes, the last of them counts.
  option    For letters only: the whole message, if it is nothing but an option, as "(B)" is.
  number    For numbers only: the last number of the message.
A message without any of these has no answer. Its rung is "none", and it is never graded as right.

These rules hold on every rung:
  - A box in a statement or in a sentence is its answer. If an explanation follows the heading
    "**Final Answer**", the last box of that section is the answer.
  - The answers of others do not count: "The Solver's answer is 7", "The Solver's \boxed{7}", and
    "\boxed{7} is wrong". Nor do remarks: "the answer is correct", "the answer is found by adding".
  - A told answer, sentence or box that cannot be read ("5 or 6", "C and D", a box that is never
    closed) is refused: nothing before it, and no weaker rung, replaces it. The exception is an
    earlier statement or mention of a final answer, which still holds.
  - "The answer is not 5" is skipped, but no last number is read from a message that says so.

No torch here.
"""

import functools
import json
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

# ---- The canonical form of an answer -------------------------------------------------------------

_OPTION_LETTER = re.compile(
    r"""
    ^\W*
    (?:                                                # "The correct answer is option"
        (?:the\s+)? (?:(?:correct|right|best|final)\s+)?
        (?:answer|options?|choice|letter)\b
        \s*(?:is\b)?\W*
    )*
    (?P<letter>[A-Z])
    (?P<rest>
        (?![\w'’/&-] | \.\w | \s*=\s*\d)               # not "I'm", "N/A", "U.S." or "x = 3"
        .*
    )
    """,
    re.IGNORECASE | re.VERBOSE | re.DOTALL,
)

# " train", the text after the article of "A train"; but "A is correct" names option A
_WORD_AFTER_ARTICLE = re.compile(r"\s+(?!(?:is|because|since|as|for|follows|holds|due)\b)[a-z]")

# " or D", "/D", " and Option D": the text after the first of two options
_SECOND_OPTION = re.compile(
    r"""
    [\s)\]]* (?:,|/|\bor\b|\band\b) \s*
    (?:options?|choice)? \s*
    \(?[A-Z]\)? \s*
    (?:[.,;)\]}]|$|\b(?:and|or|are|both)\b)
    """,
    re.IGNORECASE | re.VERBOSE,
)

# " or ", " + ", ", ": the text between two numbers that are not one answer
_BETWEEN_TWO_ANSWERS = re.compile(
    r"\s* %? \s* (?:[-+^×,]|\*\*?|\\times|\\cdot|\bor\b|\band\b|\bto\b) \s* (?:or\b\s*)? \{?",
    re.VERBOSE,
)

# " (= 0.5 days)" in "12 hours (= 0.5 days)"
_REMARK = re.compile(r"(?<=[\w%])\s*\([^()]*\)")

# "x \approx" in "x \approx 3", and "\approx 0.05" in "3/56 \approx 0.05"
_APPROXIMATION = re.compile(r"^[A-Za-z]\s*\\approx|(?<=.)\\approx.*")

# Notation that math-verify misreads: (pattern, replacement), applied in this order.
_MATH_VERIFY_NOTATION = [
    # 2^\frac{1}{2}, which is read as 1, becomes 2^{\frac{1}{2}}
    (r"\^\s*(\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})", r"^{\1}"),
    # \mathrm{i} becomes i
    (r"\\(?:mathrm|text)\s*\{([ie])\}", r" \1"),
    # 3i becomes 3 \cdot i, as the i of 3i is read as a variable
    (r"(?<=[\d})])\s*i(?![a-zA-Z])", r" \\cdot i"),
]


def canonical(answer: str, answer_type: str) -> str | None:
    """Return an answer in the form in which answers are recorded and compared.

    answer_type "number": an exact fraction, such as "42" or "-3/4".
    answer_type "letter": the letter of an option, in upper case.
    answer_type "math": a number as above if the answer is one, else words, else LaTeX.

    Returns None if the text is not an answer of this type. Raises ValueError if there is no such
    type.
    """
    if answer_type == "letter":
        return _canonical_letter(answer)
    if answer_type == "number":
        return _canonical_number(plain_text(answer))
    if answer_type == "math":
        return _canonical_math(answer)
    raise ValueError(f"unknown answer type {answer_type!r}")


def _canonical_letter(answer: str) -> str | None:
    match = _OPTION_LETTER.match(plain_text(answer))
    if match is None:
        return None
    letter, rest = match["letter"], match["rest"]

    # "A train" begins with an article and "I would say" with a pronoun; "**A** because" does not.
    followed_by_word = letter in "AaIi" and _WORD_AFTER_ARTICLE.match(rest)
    in_bold = re.match(r"\W*\*", answer)
    if followed_by_word and not in_bold:
        return None
    if _SECOND_OPTION.match(rest):
        return None
    return letter.upper()


def _canonical_number(text: str) -> str | None:
    """Return the number that a final answer names; None if it names none, or two ("5 or 6")."""
    text = _answer_side(_REMARK.sub("", text))
    numbers = find_numbers(text)
    if not numbers:
        return None

    # "12 apples in 3 bags" names 12, "In 4 weeks she earns $12" names the last number.
    begins_with_number = not re.search(r"\w", text[: numbers[0].start])
    if begins_with_number:
        chosen, pair = numbers[0], numbers[:2]
    else:
        chosen, pair = numbers[-1], numbers[-2:]
    if len(pair) == 2:
        between = text[pair[0].end : pair[1].start]
        # In "2 + 3" the operator is the sign of the second number.
        for text_between in (between, between + pair[1].sign):
            if _BETWEEN_TWO_ANSWERS.fullmatch(text_between):
                return None
    return str(chosen.value)


def _answer_side(text: str) -> str:
    """Return the side of an equation that is the answer: 12 of "5 + 7 = 12" and "12 = 5 + 7"."""
    left, _, right = text.partition("=")
    if not right:
        return text
    if _sole_number(left) is not None and _sole_number(right) is None:
        return left
    return text.rpartition("=")[-1]


def _canonical_math(answer: str) -> str | None:
    # 1. remove what carries no meaning, and a style around the whole: \text{Evelyn} is Evelyn
    latex = _clean(answer).rstrip(". \\")
    styled = _STYLED.fullmatch(latex)
    if styled:
        latex = styled["content"].strip()

    # 2. write it the way math-verify reads it
    latex = _APPROXIMATION.sub("", latex).strip()
    latex = _rewrite(latex, _MATH_VERIFY_NOTATION)

    # 3. a number, words or LaTeX
    number = _sole_number(latex)
    if number is not None:
        return str(number)
    words = " ".join(_STYLED.sub(r" \g<content> ", latex).split()).rstrip(". ")
    is_formula = re.search(r"[\d\\^_=+*/<>|-]", words)
    return (latex if is_formula else words) or None


# ---- Cleaning LaTeX and markdown -----------------------------------------------------------------

# (text, replacement), applied in this order
_CHARACTERS = [
    ("−", "-"),  # the minus sign
    ("–", "-"),  # the en dash
    ("°", r"^\circ"),
    (r"\$", ""),
    ("$", ""),
    (r"\%", "%"),
    ("`", ""),
    (r"\degree", r"^\circ"),
    (r"\varnothing", r"\emptyset"),
    (r"\lbrace", r"\{"),
    (r"\rbrace", r"\}"),
]

_FRACTION_CHARACTER = re.compile(r"[¼-¾⅐-⅞]")

# (pattern, replacement), applied in this order
_MARKUP = [
    # the negative space of 11,\! 111
    (r"\\!\s*", ""),
    # \\[4pt] between the rows of a matrix becomes \\
    (r"\\\\\[[^\]]*\]", r"\\\\ "),
    # 1{,}234 becomes 1,234
    (r"(?<=\d)\{,\}(?=\d{3}(?!\d))", ","),
    # 1\,234 and other spaces between thousands: 1234
    (r"(?<=\d)(?:\{,\}|\\[,;: ]|~|\u202f|\u00a0)\s*(?=\d{3}(?!\d))", ""),
    # sizes of delimiters, as in \left( and \bigl(, but not \leftarrow
    (r"(?<!\\)\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])", " "),
    # styles and wide spaces
    (r"(?<!\\)\\(?:displaystyle|textstyle|q?quad)(?![a-zA-Z])", " "),
    # thin spaces \, \; and the delimiters \( \) \[ \] of a formula, but not \\
    (r"(?<!\\)\\[,;: ()\[\]]", " "),
    # non-breaking spaces
    (r"[~\u202f\u00a0]", " "),
    # emphasis, as in **x** and _x_, but not the signs of 2*x*y and 52_8
    (r"(?<![\w*])([*_]{1,3})(?=\S)(.+?)(?<=\S)\1(?![\w*])", r"\2"),
    # spaces and unpaired signs of emphasis at both ends: "** 12"
    (r"^[\s*_]+|[\s*_]+$", ""),
]

# \text{cm}, \mathrm{i}, \textbf{Evelyn}
_STYLED = re.compile(
    r"""
    \\(?: text(?:rm|bf|it|sf)? | mbox | math(?:rm|bf|sf|it) | boldsymbol | bm )
    \s* \{ (?P<content>[^{}]*) \}
    """,
    re.VERBOSE,
)

# The place before \frac in 1\frac{3}{4}, which is not 13/4
_MIXED_NUMBER_GAP = re.compile(r"(?<=\d)\s*(?=\\[dtc]?frac\s*[{\d])")

# "minus " in "minus 3"
_SPELLED_MINUS = re.compile(r"\b(?:minus|negative)\s+(?=\d)", re.IGNORECASE)

# \frac{3}{4}, \frac34, \frac{1,000}{3}
_NUMERIC_FRACTION = re.compile(
    r"""
    \\[dtc]?frac \s*
    (?: \{\s* (?P<top>-?[\d,]*\.?\d+) \s*\} | (?P<top_digit>\d) ) \s*
    (?: \{\s* (?P<bottom>[\d,]+) \s*\} | (?P<bottom_digit>\d) )
    """,
    re.VERBOSE,
)


def _rewrite(text: str, rules: list[tuple[str, str]]) -> str:
    """Apply rewriting rules (pattern, replacement) one after the other."""
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _clean(text: str) -> str:
    """Remove LaTeX and markdown that carry no meaning, and write the rest in one way."""
    for character, replacement in _CHARACTERS:
        text = text.replace(character, replacement)
    text = _FRACTION_CHARACTER.sub(_spell_fraction, text)
    return _rewrite(text, _MARKUP)


def _spell_fraction(match: re.Match) -> str:
    """Write ½ as " 1/2", so that 3½ becomes "3 1/2"."""
    return " " + unicodedata.normalize("NFKC", match[0]).replace("⁄", "/")


def plain_text(text: str) -> str:
    """Clean a text and write its fractions as a/b. Serves numbers and letters, not formulas."""
    text = _MIXED_NUMBER_GAP.sub(" ", _clean(text))
    text = _NUMERIC_FRACTION.sub(_slash_fraction, text)
    text = _SPELLED_MINUS.sub("-", text)
    return _STYLED.sub(r" \g<content> ", text).strip()


def _slash_fraction(match: re.Match) -> str:
    r"""Write \frac{1,000}{3} as 1000/3."""
    top = match["top"] or match["top_digit"]
    bottom = match["bottom"] or match["bottom_digit"]
    return f"{top}/{bottom}".replace(",", "")


# ---- Numbers in a text ---------------------------------------------------------------------------

_NUMBER = re.compile(
    r"""
    (?P<sign>[-+])? \s*[€£₹]?\s*
    (?P<whole> \d{1,3}(?:,\d{2,3})*,\d{3}(?!\d) | \d+ )?    # "1,234", "1,23,456" or "1234"
    (?P<decimals> \.\d+ )?
    (?: (?<=\d)e(?P<exponent>[-+]?\d{1,2})(?!\w) )?         # "1.36e+06"
    (?:                                                     # a fraction ...
        (?: [ ]+(?:and[ ]+)? (?P<part>\d+) )?               # ... of a mixed number: "1 3/4"
        \s*/\s* (?P<denominator> \d+(?!\.?\d) )
    )?
    (?: \s*(?P<multiplier>thousand|million|billion|trillion)\b )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_MULTIPLIERS = {
    "": 1,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_MAX_LENGTH = 200  # of a number, in characters

# "6.72 \times 10^{-5}"
_SCIENTIFIC = re.compile(
    r"""
    (?P<factor>-?\d*\.?\d+) \s*
    (?:\\times|\\cdot|\*|×) \s*
    10 \s*\^\s* \{?\s* (?P<exponent>-?\d{1,3}) \s*\}?
    """,
    re.VERBOSE,
)

# "2e-1" in a formula, where e is Euler's number
_EULER = re.compile(r"\de", re.IGNORECASE)

# "0.1\overline{36}", which is 0.1363636...
_REPEATING = re.compile(
    r"""
    (?P<sign>-?) (?P<whole>\d*) \. (?P<decimals>\d*)
    \\overline\s*\{ (?P<repeated>\d{1,9}) \}
    """,
    re.VERBOSE,
)

_TRAILING_UNIT = re.compile(
    r"""
    (?:
        \s*\\(?:text|mbox|mathrm|textrm)\s*\{[A-Za-z /.]{2,}\}    # 36\text{ dollars}
      | (?<=[\d}])\s+[A-Za-z]{3,}(?:[ ][A-Za-z]+)*                # "36 US dollars"
    )$
    """,
    re.VERBOSE,
)


class _Number(NamedTuple):
    value: Fraction
    sign: str  # as it is written, perhaps ""
    start: int  # its place in the text, with its sign
    end: int


def find_numbers(text: str) -> list[_Number]:
    """Return every number of a plain text. Numbers of over 200 characters are left out."""
    numbers = []
    for match in _NUMBER.finditer(text):
        if match["whole"] is None and match["decimals"] is None:
            continue
        if len(match[0]) > _MAX_LENGTH:  # before int(), which refuses thousands of digits
            continue
        if match["denominator"] and int(match["denominator"]) == 0:
            continue
        value = _absolute_value(match)
        if match["sign"] == "-" and not _is_subtraction(text, match):
            value = -value
        numbers.append(_Number(value, match["sign"] or "", match.start(), match.end()))
    return numbers


def _absolute_value(match: re.Match) -> Fraction:
    """Return the value of a match of _NUMBER, without its sign."""
    whole = (match["whole"] or "0").replace(",", "")
    value = Fraction(whole + (match["decimals"] or ""))
    if match["exponent"]:
        value *= Fraction(10) ** int(match["exponent"])
    if match["part"]:
        value += Fraction(int(match["part"]), int(match["denominator"]))
    elif match["denominator"]:
        value /= int(match["denominator"])
    multiplier = (match["multiplier"] or "").lower()
    return value * _MULTIPLIERS[multiplier]


def _is_subtraction(text: str, match: re.Match) -> bool:
    """Return whether the minus before a number subtracts it: the one of "16 - 3" does."""
    before = text[: match.start()]
    last_character = before.rstrip()[-1:]
    if last_character.isdigit() or last_character == ")":
        return True
    # After a letter, the spaces decide: "x - 3" and "x-3", but "a loss of -3".
    space_before = before != before.rstrip()
    space_after = match[0].startswith("- ")
    return last_character.isalpha() and (space_after or not space_before)


def _sole_number(latex: str) -> Fraction | None:
    """Return the number that the whole of an answer is, apart from a unit; None if it is more."""
    # 1. notations of the whole answer
    if len(latex) > _MAX_LENGTH:
        return None
    scientific = _SCIENTIFIC.fullmatch(latex)
    if scientific:
        return Fraction(scientific["factor"]) * Fraction(10) ** int(scientific["exponent"])
    repeating = _REPEATING.fullmatch(latex)
    if repeating:
        return _repeating_decimal(repeating)

    # 2. one number, with nothing before and after it
    plain = plain_text(_without_unit(latex))
    numbers = find_numbers(plain)
    if len(numbers) != 1 or _EULER.search(plain):
        return None
    [number] = numbers
    rest = plain[: number.start] + plain[number.end :]
    return None if rest.strip(" %.{}") else number.value


def _repeating_decimal(match: re.Match) -> Fraction:
    """Return the value of a match of _REPEATING: 0.36 repeated is 36/99."""
    decimals, repeated = match["decimals"], match["repeated"]
    value = Fraction(f"{match['whole'] or 0}.{decimals or 0}")
    value += Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))
    return -value if match["sign"] else value


def _without_unit(latex: str) -> str:
    """Remove a unit at the end, unless it is a length (which may be an area) or a time of day."""
    unit = _TRAILING_UNIT.search(latex)
    if unit is None or _LENGTH_UNIT.search(unit[0]) or _HALF_DAY.search(unit[0]):
        return latex
    return latex[: unit.start()]


# ---- Equality ------------------------------------------------------------------------------------

_FRACTION = re.compile(r"-?\d+(/\d+)?")  # "42", "-3/4": a number in canonical form
_WORDS = re.compile(r"(?:[A-Za-z]{3,}|[Nn][Oo])(?:[ -][A-Za-z]+)*")  # "east", "no", "New York"

_LENGTH_UNIT = re.compile(
    r"""
    (?P<word>(?i:square|cubic|sq\.?|cu\.?))? \s*\b
    (?:
        (?(word) | (?: (?<=[\d{}]) | (?<=[\d{}]\s) | (?<=\\[,\s]) ) )
        [ckm]?m                                             # but m(m+1) has a variable
      | (?:centi|kilo|milli)?met(?:er|re)s?
      | in | inch | inches | ft | foot | feet | yd | yards? | miles? | units?
    )\b
    [.}\s]*
    (?: \^\{? (?P<power>\d) )?                              # the 2 of \text{cm}^2
    """,
    re.VERBOSE,
)
_POWER_OF_WORD = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}

_HALF_DAY = re.compile(r"\b(?P<half>[ap])(?:\.\s?m\b\.?|\s?m\b)", re.IGNORECASE)  # "a.m.", "PM"
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")  # "Square", but not "\Delta"
_NUMBER_WITH_BASE = re.compile(  # 52_8, 52_{8}, 52_{\text{8}}
    r"\d+ \s*_\s* \{?(?:\\text\{)?\s* (?P<base>\d+) \s*\}*",
    re.VERBOSE,
)
_OPTION_LABEL = re.compile(r"\(?(?P<letter>[A-Z])\)")  # "(C)" or "C)"
_TUPLE = re.compile(r"\([^()]*\)")  # "(1,2)"
_EQUALS = re.compile(r"(?<![<>!\\])=")  # but not ">=" and "!="
_SEVERAL_EQUATIONS = re.compile(r",|;|\\text\b|\band\b|\bor\b")  # "x=3, y" before the last "="
_ARGUMENTS = re.compile(r"\([^()]*\)")

# What an equation may define: "x", "x_1", "\theta", "f(2)", "\text{Area}", "AB", "\cos\theta"
_NAME = re.compile(
    r"""
    (?:
        (?:
            \\(?:text|mbox|mathrm|mathbf|mathbb|vec|hat|bar|overline|angle)\s*\{[^{}]*\}
          | m?\s*\\(?:angle|triangle)\s*[A-Z]{1,3}        # an angle, by its points
          | [A-Z]{2} | [A-Za-z]{4,}                       # a segment "AB"; a word
          | [A-Za-z] | \\(?!frac|sqrt)[A-Za-z]+           # "x", "\theta"
        )
        (?: _(?:\w|\{[^{}]*\}) )?                         # "_1", "_{10}"
        '*
      | \\(?:sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|log|ln) \b [^-+*/,;=]+
      | (?![abckmnxyz]) [A-Za-z]                          # "f(2)", but x(x+1) is a product
        (?: _(?:\w|\{[^{}]*\}) )? '* (?: \^\{-1\} )? \s*
        [(\[] [^()\[\]]* [)\]]
    )
    """,
    re.VERBOSE,
)
_NAMES = re.compile(r"\(\s*[A-Za-z](?:\s*,\s*[A-Za-z])+\s*\)")  # "(x, y)"

# Commands of arithmetic: what remains of "\sqrt{49} = 7" has no letters
_ARITHMETIC = re.compile(r"\\(?:[dtc]?frac|sqrt|[dt]?binom|times|cdot|div|pi|circ)(?![a-zA-Z])")


def same_answer(a: str | None, b: str | None, answer_type: str) -> bool:
    """Return whether two canonical answers are equal. Symmetric; None equals nothing."""
    if a is None or b is None:
        return False
    if a == b:
        return True
    return answer_type == "math" and _same_math(a, b)


def is_comparable(answer: str, answer_type: str) -> bool:
    """Return whether `same_answer` can tell that an answer of the same value equals this one.

    It cannot if the answer is a formula that math-verify cannot read.
    """
    if answer_type != "math":
        return True
    if _FRACTION.fullmatch(answer) or _WORDS.fullmatch(answer):
        return True
    return MATH_VERIFY.equal(answer, answer)


def _same_math(a: str, b: str) -> bool:
    """Return whether two different canonical answers of type "math" have the same value."""
    # 1. Pairs that need no math-verify, or whose difference it would ignore.
    for compare in (_compare_words, _compare_properties, _compare_options, _compare_notation):
        verdict = compare(a, b)
        if verdict is not None:
            return verdict

    # 2. An equation equals its right side only if it defines it: y = 2x + 3, but not 2x + z = 1.
    if _is_equation(a) != _is_equation(b) and not (_may_define(a) and _may_define(b)):
        return False

    # 3. math-verify. The pair is sorted, so that the result is symmetric and cached once.
    first, second = sorted((a, b))
    if MATH_VERIFY.equal(first, second):
        return True
    return _equation_yields(a, b) or _equation_yields(b, a)


def _compare_words(a: str, b: str) -> bool | None:
    r"""Compare words and fractions; \text{June 20} equals June 20. None if a formula is left."""
    if _without_style(a) == _without_style(b):
        return True
    a_is_words, b_is_words = _WORDS.fullmatch(a), _WORDS.fullmatch(b)
    if a_is_words or b_is_words:  # "east" is not the product of e, a, s and t
        return a.lower().split() == b.lower().split()
    if _FRACTION.fullmatch(a) and _FRACTION.fullmatch(b):  # they differ, and are reduced
        return False
    return None


def _compare_properties(a: str, b: str) -> bool | None:
    """Return False if both have a unit, a base or a half of the day, and these differ."""
    for property_of in (_unit_power, _base, _half_day):
        property_a, property_b = property_of(a), property_of(b)
        if None not in (property_a, property_b) and property_a != property_b:
            return False
    return None


def _compare_options(a: str, b: str) -> bool | None:
    """Compare options by their letters; "(C)" equals "(C) hyperbola". None for other answers."""
    label_a, label_b = _OPTION_LABEL.match(a), _OPTION_LABEL.match(b)
    if label_a is None or label_b is None:
        return None
    one_is_only_a_label = label_a[0] == a or label_b[0] == b
    return label_a["letter"] == label_b["letter"] if one_is_only_a_label else None


def _compare_notation(a: str, b: str) -> bool | None:
    """Return False for 3r^2 and 3R^2, and for a set and a tuple; True for 3 PM and 3 p.m."""
    if _with_usual_case(a) == _with_usual_case(b):
        return True
    if a.lower() == b.lower():
        return False
    if _is_set_and_tuple(a, b) or _is_set_and_tuple(b, a):
        return False
    return None


def _with_usual_case(answer: str) -> str:
    """Write words and halves of the day in one way. Variables keep their case, and commands."""
    answer = _HALF_DAY.sub(lambda match: f"{match['half'].lower()}m", answer)
    return _WORD.sub(lambda match: match[0].lower(), answer)


def _without_style(answer: str) -> str:
    """Remove text styles and all spaces."""
    return "".join(_STYLED.sub(r"\g<content>", answer).split())


def _unit_power(answer: str) -> int | None:
    """Return 1 for a length, 2 for an area, 3 for a volume; None if the answer has no such unit."""
    match = _LENGTH_UNIT.search(answer)
    if match is None:
        return None
    if match["power"]:
        return int(match["power"])
    if match["word"]:
        return _POWER_OF_WORD[match["word"].lower().rstrip(".")]
    return 1


def _base(answer: str) -> str | None:
    """Return the base of a number with a subscript: the 8 of 52_8."""
    match = _NUMBER_WITH_BASE.fullmatch(answer)
    return match["base"] if match else None


def _half_day(answer: str) -> str | None:
    """Return "a" for a time with a.m., "p" for one with p.m."""
    match = _HALF_DAY.search(answer)
    return match["half"].lower() if match else None


def _is_set_and_tuple(a: str, b: str) -> bool:
    return a.startswith(r"\{") and _TUPLE.fullmatch(b) is not None


def _is_equation(answer: str) -> bool:
    return _EQUALS.search(answer) is not None


def _may_define(answer: str) -> bool:
    """Return False for an equation whose left side is neither a name nor arithmetic.

    Several equations are left to math-verify, and so are answers without an equals sign.
    """
    if not _is_equation(answer) or _has_several_equations(answer):
        return True
    left = _EQUALS.split(answer)[0].strip()
    if _NAME.fullmatch(left) or _NAMES.fullmatch(left):
        return True
    is_arithmetic = not re.search(r"[A-Za-z]", _ARITHMETIC.sub("", answer))
    return is_arithmetic


def _has_several_equations(answer: str) -> bool:
    """Return whether a separator stands before the last equals sign, and not among arguments."""
    left = answer.rpartition("=")[0]
    return _SEVERAL_EQUATIONS.search(_ARGUMENTS.sub("", left)) is not None


def _equation_yields(equation: str, answer: str) -> bool:
    """Return whether the right side of an equation equals an answer that is not an equation."""
    if "=" in answer:
        return False
    return same_answer(_right_side(equation), answer, "math")


def _right_side(answer: str) -> str | None:
    """Return the 5 of f(2) = 5; None if there is no equation, or more than one."""
    if not _is_equation(answer) or _has_several_equations(answer):
        return None
    return _canonical_math(_EQUALS.split(answer)[-1])


# ---- math-verify in its own process --------------------------------------------------------------

# What the process runs: for each line with a JSON pair of answers, it prints a JSON boolean.
_PROGRAM = r"""
import json
import logging
import sys

import math_verify

logging.disable(logging.CRITICAL)
math_verify.parse("$1$", parsing_timeout=None)  # the first call loads sympy
print("ready", flush=True)
for line in sys.stdin:
    a, b = [
        math_verify.parse("\\boxed{" + answer + "}", parsing_timeout=None)
        for answer in json.loads(line)
    ]
    equal = bool(a and b)
    for gold, answer in ((a, b), (b, a)):
        equal = equal and math_verify.verify(
            gold, answer, allow_set_relation_comp=True, timeout_seconds=None
        )
    print(json.dumps(equal), flush=True)
"""


class MathVerify:
    """Compare two LaTeX answers by math-verify in its own process.

    SymPy may run forever, and only a process can be stopped at any moment and from any thread.
    `timeouts` counts the comparisons that were stopped; they count as unequal.
    """

    SECONDS = 10.0  # for one comparison

    PROGRAM = _PROGRAM

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()
        self.timeouts = 0
        self.equal = functools.lru_cache(maxsize=1 << 16)(self._equal)

    def _equal(self, a: str, b: str) -> bool:
        """Return whether two LaTeX answers are equal; False if either cannot be parsed."""
        with self.lock:
            if self.process is None or self.process.poll() is not None:
                self._start()
            reply, timed_out = self._ask(a, b)
            if reply:
                return json.loads(reply)

            # No reply: the process was killed by the timer, or it failed.
            exit_code = self.process.wait()
            if not timed_out:
                reason = ", perhaps out of memory" if exit_code == -signal.SIGKILL else ""
                raise RuntimeError(f"math-verify failed on {a!r} and {b!r}{reason}")
            self.timeouts += 1
            print(
                f"comparing {a[:80]!r} with {b[:80]!r} took more than {self.SECONDS:g} s; "
                f"counted as unequal",
                file=sys.stderr,
            )
            return False

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # an interrupt (Ctrl-C) is for this process alone
        )
        self.process.stdout.readline()  # "ready": loading sympy takes seconds and is not timed

    def _ask(self, a: str, b: str) -> tuple[str, bool]:
        """Return the reply (JSON, or "" for none), and whether the timer stopped the process."""
        timed_out = threading.Event()

        def stop():
            timed_out.set()
            self.process.kill()

        timer = threading.Timer(self.SECONDS, stop)
        timer.daemon = True
        self.process.stdin.write(json.dumps([a, b]) + "\n")
        self.process.stdin.flush()
        timer.start()
        try:
            return self.process.stdout.readline(), timed_out.is_set()
        finally:
            timer.cancel()


MATH_VERIFY = MathVerify()


# ---- The answer of a message ---------------------------------------------------------------------

RUNGS = ("told", "sentence", "box", "option", "number", "none")


class Answer(NamedTuple):
    """The answer of a message, and how it was read."""

    value: str | None  # in canonical form; None if the message has no answer
    rung: str  # one of RUNGS; "none" if the message has no answer


NO_ANSWER = Answer(None, "none")


class _Box(NamedTuple):
    r"""A \boxed{...} and its place in a message."""

    start: int
    end: int
    content: str | None  # None if the box is never closed


class _Phrase(NamedTuple):
    """A place in a message that may give its answer."""

    start: int
    end: int
    rung: str  # "told", "sentence" or "box"
    text: str  # what the phrase names as the answer
    box: _Box | None  # a box in the phrase, which is then its answer
    status: str  # "given", "denied" (the answer is not 5) or "remark" (the answer is correct)
    is_statement: bool  # "Final answer: 42", which counts before "the final answer is 42"


def extract_answer(text: str, answer_type: str) -> Answer:
    """Return the canonical final answer of a message, and the rung on which it was found.

    The module docstring describes the rungs. This never raises, whatever the text.
    """
    # 1. told: statements before mentions, and the last one first
    boxes = _own_boxes(text)
    statements, mentions = _find_told(text, boxes, answer_type)
    told = statements + mentions
    for phrase in told:
        value = _value_of(phrase, answer_type)
        if value is not None:
            return Answer(value, phrase.rung)

    # 2. the last sentence or box, but none before a told answer that was refused
    refused_until = 0
    for phrase in told:
        if _is_refused(phrase, answer_type):
            refused_until = max(refused_until, phrase.end)
    sentences = _find_sentences(text, boxes)
    others = sentences + _free_boxes(boxes, told + sentences)
    others.sort(key=lambda phrase: phrase.start, reverse=True)
    for phrase in others:
        if phrase.start < refused_until:
            break
        value = _value_of(phrase, answer_type)
        if value is not None:
            return Answer(value, phrase.rung)
        if _is_refused(phrase, answer_type):
            return NO_ANSWER

    # 3. the whole message, if it is an option
    if answer_type == "letter":
        option = _BARE_OPTION.fullmatch(plain_text(text))
        return Answer(option["letter"].upper(), "option") if option else NO_ANSWER

    # 4. the last number, unless a told answer or a sentence speaks against it
    if answer_type != "number" or any(map(_forbids_last_number, told + others)):
        return NO_ANSWER
    numbers = find_numbers(plain_text(text))
    return Answer(str(numbers[-1].value), "number") if numbers else NO_ANSWER


def _value_of(phrase: _Phrase, answer_type: str) -> str | None:
    """Return the canonical answer that a phrase gives; None if it gives none that can be read."""
    if phrase.status != "given":
        return None
    if phrase.box is not None:
        content = phrase.box.content
        return None if content is None else canonical(content, answer_type)
    answer = _ADVERB.sub("", phrase.text)
    if answer_type == "math":
        # "the answer is the number of ways to arrange them" describes an answer
        num_words = len(_WORD_OUTSIDE_LATEX.findall(_FORMULA.sub("", answer)))
        if num_words > _MAX_WORDS and not phrase.is_statement:
            return None
        answer = _only_formula(answer)
    return canonical(answer, answer_type)


def _is_refused(phrase: _Phrase, answer_type: str) -> bool:
    """Return whether a phrase without a readable answer tries to give one, such as "5 or 6"."""
    if phrase.status != "given":
        return False
    if phrase.box is not None:
        return True
    if phrase.is_statement:
        return phrase.text.strip() != ""
    if answer_type == "number":
        return _DIGIT.search(phrase.text) is not None
    return answer_type == "letter" and _TWO_OPTIONS.search(phrase.text) is not None


def _forbids_last_number(phrase: _Phrase) -> bool:
    """Return whether the last number would be a guess against a phrase: "the answer is not 5"."""
    if phrase.status == "remark":
        return False
    has_content = phrase.box is not None or _DIGIT.search(phrase.text) is not None
    return phrase.is_statement or has_content


# ---- Statements, sentences and boxes -------------------------------------------------------------

# "is", "isn't", "should be", "cannot be". A negation is left to the text after the verb.
_VERB = r"""
    (?:
        (?:is|was|are|equals) (?:\b|(?=n['’]t))
      | (?:would|should|must|will) \s+ be\b
      | (?:would|should|must|will|can|could) (?=\s*not\b|n['’]t)
    )
"""

# " to the question", " in cm": words between "answer" and its verb
_ADDITION = r"(?: \s*\b (?:to|for|in|here|I|we)\b [^.:=\n]{0,60}? )?"

# The answer is on this line, or on the next line that has text. "\[" and "$$" open a formula.
_ANSWER_LINE = r"""
    [ \t*_`]*\s*
    (?: (?:\\\[|\$\$) [ \t]*\n\s* )?
    (?= (?P<answer>[^\n]*) )
"""

_FINAL_ANSWER = re.compile(
    rf"""
    final\s+answer\b [ \t]*
    (?: \((?!\w\))[^()\n]*\) )? [ \t]*            # a remark: "Final answer (in cm): 42"
    (?: {_ADDITION} \s* (?P<verb>{_VERB}) )?
    (?P<statement>                                # the sign of a statement:
        [*_`]*\s*[:：=]                           #   "**Final answer:** 42"
      | [-–—][ \t]                                #   "Final answer - 42"
      | (?<!is) [*_`#]*[ \t]*\n                   #   "**Final Answer**" as a heading
    )?
    {_ANSWER_LINE}
    """,
    re.IGNORECASE | re.VERBOSE,
)

_SENTENCE = re.compile(
    rf"""
    (?:
        \b (?: answers? (?:\s+(?:choice|option))? | (?:correct|right|best)\s+(?:choice|option) ) \b
        (?: [ \t]*\([^()\n]*\) )?                 # a remark: "The answer (in cm) is 42"
        (?:
            {_ADDITION} \s+ {_VERB} (?:[*_`]*\s*[:：])?
          | [*_`]*\s*[:：=]                       # "**Answer:** 42"
          | [ \t]+[-–—][ \t]                      # "Answer - 42"
        )
      | ^[ \t#*_]* answer [*_]*[ \t]*\n           # "### Answer" as a heading
    )
    {_ANSWER_LINE}
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)

# "#### 42", as GSM8K ends its solutions. Five signs are a heading.
_HASH_LINE = re.compile(r"^[ \t]*####[ \t]*(?!#)(?P<answer>[^\n]*)", re.MULTILINE)

# ". " before a capital letter or a formula: the end of a sentence, and not of "9:30 p.m. on"
_SENTENCE_END = re.compile(r"""[.!?][.!?$*"”)\]}]*(?=\s+[A-Z$\\*("“])""")

# "the Solver's ", "your ", "another possible ": before an answer that the message only discusses
_NOT_OWN = re.compile(
    r"""
    \b
    (?:
        (?!let['’]) \w+['’]s
      | your | his | her | their
      | wrong | incorrect | other | another | possible | proposed | previous | partial
      | not | rather\s+than | instead\s+of
    )
    \s+
    (?: (?:correct|right|final|own|possible|first) \s+ )?
    [$*]* $
    """,
    re.IGNORECASE | re.VERBOSE,
)

# " is wrong" after a box
_REJECTION = re.compile(
    r"[$*)\].]*\s*(?:is|was)\s*(?:n['’]t|not\b|wrong\b|incorrect\b)", re.IGNORECASE
)

# "not 5", "n't 5", "more than 5"
_DENIAL = re.compile(
    r"""
    \W*
    (?: n['’]t | not | never | neither | (?:more|less|fewer|greater|larger|smaller)\s+than )
    \b
    """,
    re.IGNORECASE | re.VERBOSE,
)

# "correct", "it is wrong", "found by adding": remarks on an answer, which do not give it
_REMARK_ON_ANSWER = re.compile(
    r"""
    \W*
    (?P<pronoun> (?:it|this|that) \s* (?:['’]s|is|was|looks|seems) \s+ )?
    (?: (?:also|indeed|still|clearly|just|simply|really|now) \s+ )?
    (?:
        correct | incorrect | wrong | right (?!\s+(?:tri)?angle) | clear | unclear | obvious
      | below | above | as\ follows | in | on | based | given | found | shown | seen | written
      | rounded | obtained | computed | calculated | derived | determined | expressed | asked
    )
    \b
    """,
    re.IGNORECASE | re.VERBOSE,
)

# "therefore, " before an answer
_ADVERB = re.compile(
    r"""
    ^\W*
    (?:
        therefore | thus | then | hence | so | indeed | simply | just | clearly | exactly
      | approximately | about | (?:most\s+)? likely
    )
    \b [\s,:]*
    """,
    re.IGNORECASE | re.VERBOSE,
)

# The whole message "B", "(B)", "**B**", "Option B."
_BARE_OPTION = re.compile(
    r"\W* (?:(?:option|choice|answer)\s+)? \W* (?P<letter>[A-Z]) \W*", re.IGNORECASE | re.VERBOSE
)

# "C or D", "(C) and (D)"
_TWO_OPTIONS = re.compile(r"\b[A-Z]\b\)?\s*(?:,|/|\bor\b|\band\b)\s*(?:[Oo]ption\s+)?\(?[A-Z]\b")

_DIGIT = re.compile(r"\d")

# "$1,200 per year": a number and at most two words
_SHORT_NUMBER = re.compile(
    r"""
    [\s$*€£-]*
    \d[\d,]* (?:\.\d+)? (?:\s*/\s*\d+)?     # "1,200", "1,200.50", "3/4"
    \s*%? (?:\s+[A-Za-z]+){0,2}             # "%", "per year"
    [\s.*]*
    """,
    re.VERBOSE,
)

# "Step", but neither \frac nor \text{cm}
_WORD_OUTSIDE_LATEX = re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{2,}")
_MAX_WORDS = 5  # of a formula that is told in a sentence

# "$x+1$", "$$x+1$$", "\(x+1\)"
_FORMULA = re.compile(
    r"""
    (?<!\\)\$+ (?P<in_dollars>(?:\\.|[^$\\])+) \$+
    | \\\( (?P<in_parentheses>.+?) \\\)
    """,
    re.VERBOSE,
)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*(?P<content>\{|-?\w[\w.]*)")  # "\boxed{" or "\boxed 7"


def _find_told(
    text: str, boxes: list[_Box], answer_type: str
) -> tuple[list[_Phrase], list[_Phrase]]:
    """Return the statements and the mentions of a final answer, each with the last one first."""
    matches, mentions = [], []
    for match in _FINAL_ANSWER.finditer(text):
        if match["statement"]:
            matches.append(match)
            continue
        mention = _sentence(text, match, "told", boxes)
        if match["verb"] is None and not _is_short(mention.text, answer_type):
            mention = mention._replace(status="remark")  # "Let's find the final answer to it."
        mentions.append(mention)
    for match in _HASH_LINE.finditer(text):
        line = match["answer"]
        if _is_short(line, answer_type) or _BOX.match(line.lstrip("$* ")):
            matches.append(match)
    matches.sort(key=re.Match.start)

    statements = []
    section_end = len(text)
    for match in reversed(matches):
        statements.append(_statement(text, match, section_end, boxes, answer_type))
        section_end = match.start()
    return statements, mentions[::-1]


def _statement(
    text: str, match: re.Match, section_end: int, boxes: list[_Box], answer_type: str
) -> _Phrase:
    """Return the statement at a match of _FINAL_ANSWER or _HASH_LINE.

    section_end: the place of the next statement, or the end of the text. A heading with more than
    a short answer below it begins a section; a box in this section is its answer.
    """
    answer = match["answer"]
    end = match.end("answer")
    is_heading = "\n" in text[match.start() : match.start("answer")]
    if is_heading and not _is_short(answer, answer_type):
        end = section_end
    box = _last_box_between(match.start("answer"), end, boxes)
    if box is None:
        end = match.end("answer")

    status = "given"
    remark = _REMARK_ON_ANSWER.match(answer)
    if _DENIAL.match(answer):
        status = "denied"
    elif remark and remark["pronoun"] and box is None:  # "I checked the final answer: it is right"
        status = "remark"
    return _Phrase(match.start(), end, "told", answer, box, status, is_statement=True)


def _find_sentences(text: str, boxes: list[_Box]) -> list[_Phrase]:
    """Return the sentences such as "the answer is 42", in the order of the message."""
    return [_sentence(text, match, "sentence", boxes) for match in _SENTENCE.finditer(text)]


def _sentence(text: str, match: re.Match, rung: str, boxes: list[_Box]) -> _Phrase:
    """Return the phrase from a match up to the end of its sentence."""
    start = match.start("answer")
    sentence_end = _SENTENCE_END.search(match["answer"])
    length = sentence_end.end() if sentence_end else len(match["answer"])
    answer = match["answer"][:length]
    end = start + length
    box = _last_box_between(start, end, boxes)

    status = "given"
    if _is_discussed(text, match.start()):
        status = "remark"
    elif _DENIAL.match(answer):
        status = "denied"
    elif box is None and (_REMARK_ON_ANSWER.match(answer) or answer.rstrip().endswith("?")):
        status = "remark"
    return _Phrase(match.start(), end, rung, answer, box, status, is_statement=False)


def _is_short(line: str, answer_type: str) -> bool:
    """Return whether a line is an answer and little more, and not a heading or an explanation."""
    if answer_type == "number":
        return _SHORT_NUMBER.fullmatch(line) is not None
    return _WORD_OUTSIDE_LATEX.search(line) is None


def _only_formula(phrase: str) -> str:
    r"""Return the formula of a phrase that has exactly one ("the length is $2\sqrt{3}$")."""
    formulas = list(_FORMULA.finditer(phrase))
    if len(formulas) != 1:
        return phrase
    return formulas[0]["in_dollars"] or formulas[0]["in_parentheses"]


def last_box(text: str) -> str | None:
    r"""Return the content of the last \boxed{...} or \boxed 7, with inner braces matched.

    Returns None if there is no box, or if the last one is never closed.
    """
    boxes = _find_boxes(text)
    return boxes[-1].content if boxes else None


def _find_boxes(text: str) -> list[_Box]:
    """Return all boxes of a text, in its order."""
    boxes = []
    for match in _BOX.finditer(text):
        if match["content"] != "{":
            boxes.append(_Box(match.start(), match.end(), match["content"]))
            continue
        closing = _closing_brace(text, match.end())
        content = None if closing is None else text[match.end() : closing]
        end = len(text) if closing is None else closing + 1
        boxes.append(_Box(match.start(), end, content))
    return boxes


def _closing_brace(text: str, start: int) -> int | None:
    """Return the place of the brace that closes the one before `start`; None if there is none."""
    depth = 1
    for position in range(start, len(text)):
        if text[position] == "{":
            depth += 1
        elif text[position] == "}":
            depth -= 1
        if depth == 0:
            return position
    return None


def _own_boxes(text: str) -> list[_Box]:
    r"""Return the boxes that may hold the answer: not empty, not "the Solver's \boxed{7}"."""
    own = []
    for box in _find_boxes(text):
        is_empty = box.content is not None and not box.content.strip()
        is_rejected = _REJECTION.match(text, box.end) is not None
        if not is_empty and not is_rejected and not _is_discussed(text, box.start):
            own.append(box)
    return own


def _is_discussed(text: str, start: int) -> bool:
    """Return whether the answer that starts at a place of a text is another agent's."""
    return _NOT_OWN.search(text[max(0, start - 80) : start]) is not None


def _last_box_between(start: int, end: int, boxes: list[_Box]) -> _Box | None:
    """Return the last box that starts at a place from start up to end."""
    for box in reversed(boxes):
        if start <= box.start < end:
            return box
    return None


def _free_boxes(boxes: list[_Box], phrases: list[_Phrase]) -> list[_Phrase]:
    """Return the boxes that are not part of a phrase, as phrases of their own."""
    free = []
    for box in boxes:
        if not any(phrase.start <= box.start < phrase.end for phrase in phrases):
            free.append(_Phrase(box.start, box.end, "box", "", box, "given", is_statement=False))
    return free
