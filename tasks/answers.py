r"""What an answer is, and whether two answers are equal: the rules of grading.

An answer has one of three types: "number", "letter" (an option of a multiple-choice question) or
"math" (any formula). extraction.py says which part of a message is its answer.

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
`MATH_VERIFY.timeouts` counts all of these pairs. No torch here.
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
