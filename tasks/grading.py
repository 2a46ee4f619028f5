r"""Grading: what an answer is, whether two answers are equal, and which part of a message is one.

Answers have one of three types.
  number  An exact fraction, without currency, thousands separators, percent signs and units. The
          result of an equation counts (12 in "5 + 7 = 12" and "12 = 5 + 7"), of several numbers the
          first that a sentence tells ("In 4 weeks she earns $12 for 2 jobs" names 12).
  letter  The option that an answer begins with, or the only one that it names. The article of "A
          train" is no option, nor is an option that is excluded ("not B", "B is wrong").
  math    A number if the answer is one, perhaps with a unit, else words, else LaTeX.
An answer that names two numbers or options is refused: "5 or 6", "2 + 3", "C and D".

Numbers and letters are equal if they are the same. Mathematics is compared by math-verify, but
words equal the same words only; 52_8 is not 52_9, a length no area, a.m. not p.m., a set no tuple,
r not R. An equation equals its right side if it names its result: "x = 3", "f(2) = 5", "3 + 4 = 7".

Where opinions differ: 50% is 50, not 1/2. Nothing is rounded: 0.33 is not 1/3, and 33.3 not 100/3.
Units may be missing or differ, except for 5 cm and 5 cm^2; a base may be missing, but not differ.
"a + b = 12" and "x^2 = 4" do not equal 12 and 4.
2:30 is no number. A thousands separator is a comma: "1000,99" and "1 000" are refused.

The answer of a message is found on the first rung of this ladder that the message has:
  told      The last statement ("Final answer: 42", "#### 42", a heading "Final Answer" above the
            answer), else the last mention ("the final answer is 42").
  sentence  "The answer is 42", "Answer: 42", ..., or
  box       \boxed{42}, whichever comes last; for mathematics, boxes come before sentences.
  option    A letter that the message begins with, or that its last sentence decides for.
  number    The last number of the message.
A box in a statement or sentence is its answer. Answers of others ("the Solver's answer is 7"),
remarks ("the answer is correct") and denials ("not 5") do not count. If the answer on a rung cannot
be read ("5 or 6", a box that is never closed), the message has none: nothing weaker replaces it.
"""

import functools
import itertools
import json
import re
import subprocess
import sys
import threading
import unicodedata
from fractions import Fraction
from typing import NamedTuple

MAX_MESSAGE = 10_000  # characters of a message that are read, counted from its end
MAX_CUES = 50  # cues such as "the answer is", counted from the end
MAX_LINE = 500  # characters after a cue
MAX_NUMBER = 200  # characters of a number: int() refuses thousands of digits

# ---- One notation --------------------------------------------------------------------------------

_CHARACTERS = {
    **dict.fromkeys("−–—‐", "-"),
    **{"‘": "'", "’": "'", "“": '"', "”": '"', "⁄": "/", "÷": "/", "°": r"^\circ "},
    **{"×": r"\times ", "·": r"\cdot ", "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne "},
    **{"≈": r"\approx ", "±": r"\pm ", "∞": r"\infty ", "π": r"\pi ", "θ": r"\theta "},
    **{"∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset "},
}

# Rules (pattern, replacement), applied in this order: for every text, ...
_SPELLING = [
    (r"√(\w+)|(?:√|(?<![\\A-Za-z])sqrt)\(((?:[^()\n]|\([^()\n]*\))*)\)", r"\\sqrt{\1\2}"),
    (r"```\w*|</?[A-Za-z_]{3,}>", "\n"),  # fences of code, and tags such as </answer>
    (r"<(\d[\d.,/]*)>|<<[^<>\n]*>>", r"\1"),  # <12>, and the <<3+4=7>> of GSM8K
]
# ... for every answer: markup without meaning, ...
_MARKUP = [
    (r"\\!\s*|\\?\$|`", ""),
    (r"\\degree", r"^\\circ"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\\\\\[[^\]\n]*\]", r"\\\\ "),  # \\[4pt] between the rows of a matrix
    (r"(?<=\d)\s*\{\s*,\s*\}\s*(?=\d{3}(?!\d))", ","),  # 1{,}234 becomes 1,234
    (r"(?<=\d)(?:\\[,;: ]|~)\s*(?=\d{3}(?!\d))", ""),  # 1\,234 becomes 1234
    (r"(?<!\\)\\[,;: ()\[\]]|~", " "),  # spaces, and the delimiters of a formula
    (r"^[\s*_#>]+|[\s*_]+$", ""),  # marks at both ends, as in **x**
]
# \text{cm}, \mathrm{i}, \textbf{Evelyn}
_STYLED = re.compile(r"\\(?:text|mbox|math|boldsymbol|bm)(?:rm|bf|sf|it)?\s*\{([^{}]*)\}")
# ... and for numbers and letters: \frac34 becomes 3/4, 1\frac34 becomes 1 3/4.
_PLAIN = [
    (r"(?<=\d)\s*(?=\\[dtc]?frac\s*[{\d])", " "),
    (r"\\[dtc]?frac\s*(?:\{\s*(-?[\d,.]+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))", r"\1\2/\3\4"),
    (_STYLED.pattern, r" \1 "),
    (r"(?i)\b(?:minus|negative)\s+(?=\d)", "-"),
    (r"(?<!\d)(\d{1,9}) dollars? and (\d\d) cents?", r"\1.\2 dollars"),
    (r"(?<=[A-Za-z])\s*\^\s*\{?[23]\}?(?!\d)", ""),  # the power of a unit: m^2
]


def _rewrite(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _spell(text: str) -> str:
    """Write the characters of a text in one way: −3½x² becomes -3 1/2x^{2}."""
    text = re.sub("[⁰¹²³⁴-⁹]+", r"^{\g<0>}", re.sub("[¼-¾⅐-⅞]", r" \g<0>", text))
    text = unicodedata.normalize("NFKC", text)
    text = "".join(_CHARACTERS.get(c) or str(unicodedata.decimal(c, c)) for c in text)
    return _rewrite(text, _SPELLING)


def plain_text(text: str) -> str:
    r"""Return a text without LaTeX that numbers and letters do not need: 1 3/4 for 1\frac34."""
    return _rewrite(_spell(text), _MARKUP + _PLAIN).strip()


# ---- Numbers -------------------------------------------------------------------------------------

_NUMBER = re.compile(
    r"""
    (?P<sign> (?<![\w)%])(?<![\d)%]\s)-(?=[€£₹¥.\d]) )?       # but not that of "16 - 3" and "x-3"
    [€£₹¥]?
    (?P<whole> \d+(?:,\d+)* )? (?P<decimals> (?<![A-Za-z])\.\d+ )?     # but "No.5" is 5
    (?:                                                     # "1.36e+06", "3 \times 10^{8}"
        (?<=\d) (?: e | \s*(?:\\times|\\cdot|\*|x)\s*10\s*\^\s*\{?\s* )
        (?P<exponent> [-+]?\d{1,2} ) (?!\w) \}?
    )?
    (?:                                                     # "3/4", "1 3/4", "1 and 3/4"
        (?<=\d) (?: [ ]+(?:and[ ]+)? (?P<part>\d+) )? \s*/\s* (?P<denominator> \d+(?!\.?\d) )
    )?
    (?: \s*(?P<multiplier>thousand|million|billion|trillion)\b )?
    """,
    re.IGNORECASE | re.VERBOSE,
)
_GROUPED = re.compile(r"\d+|\d{1,3}(?:,\d{2,3})*,\d{3}")  # "1234", "1,234", "1,23,456"
_MULTIPLIERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_UNIT = re.compile(  # 36\text{ dollars}, 36 US dollars, 5 km/h
    r"\s*\\(?:text|mbox|math)(?:rm)?\s*\{[A-Za-z /.]{2,}\}$"
    r"|(?<=[\d}])\s+(?!(?:or|and|[a-fn-rt-z])\b)[A-Za-z]+(?:[ /][A-Za-z]+)*$"
)
# The text between two numbers that are not one answer: " or ", " + ", ", "
_BETWEEN_TWO = re.compile(
    r"\s+|[\s*\"]*%?\s*(?:[-+^,:]|\*\*?|\\times|\\cdot|\bor\b|\band\b|\bto\b)"
    r"\s*(?:(?:or|maybe|perhaps)\b\s*)*[*\"{+-]*"
)
_REMARK = re.compile(r"(?<=[\w%$}*])\s*(?<!\\)\((?:[^()]|\([^()]*\))*\)")  # 12 hours (= 0.5 days)
_CLAUSE = re.compile(r"[,;]?\s+(?:because|since|as|which|where)\b.*", re.DOTALL)
# "2\sqrt{3}", "x = 3 or x = 4"
_NO_NUMBER = re.compile(r"\\(?:sqrt|pi|overline)|\b[a-z] = ?[^\s=]+ (?:or |and )?[a-z] = ?[^\s=]+$")
# "In 4 weeks", "for 2 people": a number that is not what a sentence tells
_BESIDE = re.compile(r"(?i)\b(?:in|for|after|of|on|at|by|with|per|every|each|the|all|than)\W*$")


def _find_numbers(text: str) -> list[tuple[int, int, Fraction | None]]:
    """Return (start, end, value) of every number of a plain text; None for "1/0" and "125,96"."""
    numbers = []
    for match in _NUMBER.finditer(text):
        if not (match["whole"] or match["decimals"]) or len(match[0]) > MAX_NUMBER:
            continue
        whole, denominator = match["whole"] or "0", int(match["denominator"] or 1)
        value = None
        if _GROUPED.fullmatch(whole) and denominator != 0:
            value = Fraction(whole.replace(",", "") + (match["decimals"] or ""))
            value *= Fraction(10) ** int(match["exponent"] or 0)
            part = Fraction(int(match["part"] or 0), denominator)
            value = value + part if match["part"] else value / denominator
            value *= _MULTIPLIERS.get((match["multiplier"] or "").lower(), 1)
            value *= -1 if match["sign"] else 1
        numbers.append((*match.span(), value))
    return numbers


def _canonical_number(answer: str) -> str | None:
    """Return the number that an answer names; None if it names none, or two ("5 or 6")."""
    full = _CLAUSE.sub("", plain_text(answer))
    text = _REMARK.sub("", full)
    text = text if re.search(r"\d", text) else full  # "twelve (12)"
    if _NO_NUMBER.search(text):
        return None
    if "=" in text:  # the answer is 12 in "5 + 7 = 12" and in "12 = 5 + 7"
        first, *_, last = text.split("=")
        text = first if _sole_number(first) and not _sole_number(last) else last
    numbers = _find_numbers(text)
    # "12 apples in 3 bags" names 12, "In 4 weeks she earns $12 for 2 jobs" names 12, too.
    chosen = numbers[-1] if numbers else (0, 0, None)
    for number in reversed(numbers):
        if not _BESIDE.search(text[max(0, number[0] - 20) : number[0]]):
            chosen = number
    for one, other in itertools.pairwise(numbers):
        is_pair = _BETWEEN_TWO.fullmatch(text[one[1] : other[0]])
        if is_pair and chosen in (one, other) and one[2] != other[2]:
            return None
    return None if chosen[2] is None else str(chosen[2])


def _sole_number(latex: str) -> str | None:
    """Return the number that the whole of an answer is, apart from a unit; None if it is more."""
    unit = _UNIT.search(latex)
    if unit and not _LENGTH.search(unit[0]) and not _HALF_DAY.search(unit[0]):
        latex = latex[: unit.start()]
    plain = plain_text(latex)
    numbers = _find_numbers(plain)
    if len(numbers) != 1 or re.search(r"\de", plain):  # 2e - 1 has Euler's number
        return None
    [(start, end, value)] = numbers
    is_all = not (plain[:start] + plain[end:]).strip(" %.{}")
    return str(value) if is_all and value is not None else None


# ---- Letters -------------------------------------------------------------------------------------

_REJECTED = (
    r"[$*)\].]*\s*(?:is|was|are|do|does|ca|can|could|seems|must be|(?=fails))"
    r"\s*(?:n't|not\b|fails\b|(?:a )?(?:wrong|incorrect|false)\b)"
)
_CHOOSING = r"(?: (?:be|choose|select|pick|go with|think))?(?: option)?"
_LETTERS = [
    # "**B**", "[B]", "'B'", "$B$" become "(B)"
    (r"(?<![\w(])[*_$\"'`<\[(]{1,4}([A-Za-z])[*_$\"'`>\])]{1,4}(?!\w)", r"(\1)"),
    (r"(?i)\b(?:agent|debater|plan|vitamin)s?\s+[A-Z]\b(?:'s\b)?", ""),
    # "not B" and "B is wrong" name no option
    (r"(?:not|n't|\bthan|\bnor|\bneither|\bexcept|\bnever)\b" + _CHOOSING + r"\W*\b[A-Z]\b", ""),
    (r"\b[A-Z]\b" + _REJECTED, ""),
]
# B, (B), B) or (b); "A" and "I" before a word are an article and a pronoun
_OPTION = re.compile(
    r"(?<![\w'.\\^=-])(?:\((?=[A-Za-z]\))|(?=[A-Za-z]\)|(?:[A-Z]|^\W*[a-z](?:[.:]\s|\W*$))))"
    r"(?![AI]\s+(?!(?:is|because|since|as|for|fits|works|seems|follows|holds|due|and|or)\b)[a-z])"
    r"([A-Za-z])\)?(?![\w'^#]|\+\+|[.-]\w)"
)
# The text between two options of one answer, and before the one that an answer begins with
_TOGETHER = re.compile(
    r"(?i)|[\s*$\"'`(]*(?:,?\s*(?:and|or|plus|as well as)\b|[,;|/&+-])"
    r"\s*(?:(?:options?|choice|maybe|also)\s*)*"
)
_BEGINNING = re.compile(r"(?i)(?:the|correct|right|best|final|answer|options?|choice|is|\W)*")
# "B) 4", "**B**", "b. 4", "B - 4": a line that begins with an option
_OPTION_LINE = re.compile(
    r"(?i)\W*(?:(?:options?|choice|answer)\W+)?([A-Z])"
    r"(?:[).:](?=\s|$)|\s+-\s|,? (?:because|since)\b|\W*$)"
)
# Words of a sentence that decides for an option
_DECISION = re.compile(
    r"\b(?:correct|right|best|answer|closest|choose|select|pick|go with|think)\b"
    r"|(?:^|\b(?:is|be|matches|to|for|[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore)\b|'s)\W*"
    r"(?:(?:option|choice) )?\(?[A-Z]\)?\W*$"
)


def _option_text(text: str) -> str:
    return plain_text(_rewrite(_spell(text), _LETTERS))


def _canonical_letter(answer: str) -> str | None:
    """Return the option that an answer names; None if it names none, or two."""
    text = _option_text(answer)
    options = list(_OPTION.finditer(text))
    begins = options and _BEGINNING.fullmatch(text[: options[0].start()])
    for one, other in itertools.pairwise(options[:2] if begins else options):
        if one[1] != other[1] and _TOGETHER.fullmatch(text[one.end() : other.start()]):
            return None
    letters = {option[1].upper() for option in (options[:1] if begins else options)}
    return letters.pop() if len(letters) == 1 else None


def _option_without_cue(text: str) -> str | None:
    """Return the option that a message begins with, or that its last sentence decides for."""
    text = "" if _BOX.search(text) else _option_text(text)
    begun = [_OPTION_LINE.match(line) for line in text.split("\n") if line.strip()]
    if sum(map(bool, begun)) == 1 and (begun[0] or begun[-1]):  # but not a list of all options
        return (begun[0] or begun[-1])[1].upper()
    for sentence in reversed(re.split(r"(?<=[.!?])\s+(?=[A-Z(])|\n", text)):
        letters = set(_OPTION.findall(re.split(r"\b(?:because|since)\b", sentence)[0]))
        if letters and _DECISION.search(sentence) and not sentence.endswith("?"):
            return letters.pop() if len(letters) == 1 else None
    return None


# ---- Mathematics ---------------------------------------------------------------------------------

# Notation that math-verify misreads
_LATEX = [
    # "x \approx 3" and "3/56 \approx 0.05"
    (r"^(?:[A-Za-z]\s*)?\\approx|(?<=.)\\approx.*|^(?:approximately|about|approx\.?)\s", ""),
    (r"\^\s*(\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})", r"^{\1}"),  # 2^\frac{1}{2}, read as 1
    (r"\\(?:mathrm|text)\s*\{([ie])\}", r" \1"),  # \mathrm{i} becomes i
    (r"(\{\d{1,3}),(\d{3}\})", r"\1\2"),  # {15,625}
    (r"(?<=[\d})])\s*i(?![a-zA-Z])", r" \\cdot i"),  # 3i becomes 3 \cdot i
    (r"(?<![\\A-Za-z{])(pi|theta|ln|log|sin|cos|tan)(?![A-Za-z])", r"\\\1 "),
    (r"(?i)\b(?:square|sq\b\.?)\s*([a-z]+)\b", r"\1^2"),  # "square cm" becomes cm^2
    (r"(?i)\ba\.?\s?m\b\.?", "am"),  # a.m.
    (r"(?i)\bp\.?\s?m\b\.?", "pm"),
    # 5 cm^2 becomes 5\text{ cm}^2
    (r"(?<=[\d})i])\s+(?!(?:[ap]m|or|and)\b)([A-Za-z]{2,}|m)(?=[\s^{\d}]*$)", r"\\text{ \1}"),
]
_VERB = re.compile(r"\b(?:is|are|was|were|be|equals|has|have|gets?|takes?|holds)\b")


def _canonical_math(answer: str) -> str | None:
    """Return a number, words or LaTeX, in one notation."""
    latex = _rewrite(_spell(answer), _MARKUP).strip(" \"'").rstrip(".,; \\").lstrip("+")
    latex = _rewrite(latex, _LATEX).strip()
    number = _sole_number(latex)
    if number is not None:
        return number
    words = " ".join(_STYLED.sub(r" \1 ", latex).split()).rstrip(". ")
    if _VERB.search(words) and len(_find_numbers(words)) == 1 and "\\" not in words:
        return _canonical_number(words)  # "There are 12 ways"
    return (latex if re.search(r"[\d\\^_=+*/<>|-]", words) else words) or None


def canonical(answer: str, answer_type: str) -> str | None:
    """Return an answer in the form in which answers are recorded and compared.

    That is "42" or "-3/4" for a number, "B" for a letter, and a number, words or LaTeX for "math".
    Returns None if the text is not an answer of this type. Raises KeyError for another type.
    """
    readers = {"number": _canonical_number, "letter": _canonical_letter, "math": _canonical_math}
    return readers[answer_type](answer)


# ---- Equality ------------------------------------------------------------------------------------

_FRACTION = re.compile(r"-?\d+(/\d+)?")  # "42", "-3/4": a number in canonical form
_WORDS = re.compile(r"(?:[A-Za-z]{3,}|[Nn][Oo])(?:[ -][A-Za-z]+)*")  # "east", "no", "New York"
_LENGTH = re.compile(  # but the m of m(m+1) is a variable
    r"(?:(?:(?<=[\d{}])|(?<=[\d{}]\s)|(?<=\\[,\s]))[ckm]?m|\b(?:(?:centi|kilo|milli)?met(?:er|re)s?"
    r"|in|inch|inches|ft|foot|feet|yd|yards?|miles?|units?))(?![A-Za-z])[.}\s]*(?:\^\{?(?P<value>\d))?"
)
_HALF_DAY = re.compile(r"(?<!\\)\b(?P<value>[ap])m\b")
_PROPERTIES = [  # two answers that have one of them are unequal if it differs
    _LENGTH,  # its power: 1, or 2 for an area, or 3 for a volume
    _HALF_DAY,
    re.compile(r"^\d+\s*_\s*\{?(?:\\text\{)?\s*(?P<value>\d+)\s*\}*$"),  # the base of 52_8
    re.compile(r"^\\?(?P<value>\{|\((?=[^()]*\)$))"),  # a set is not a tuple
]
_EQUALS = re.compile(r"(?<![<>!\\])=(?![^{}]*\})")  # but not ">=", "!=" and \sum_{k=1}
# What an equation may define: x_1, AB, \theta, \angle ABC, a word, f(2), a ratio, (x, y)
_ATOM = (
    r"(?:\\(?!frac|sqrt)[A-Za-z]+\s*(?:\{[^{}]*\}|[A-Z]{1,3}\b)?|[A-Z]{2}|[A-Za-z]{4,}|[A-Za-z])"
    r"(?:_(?:\w|\{[^{}]*\}))?'*"
)
_NAME = re.compile(
    rf"{_ATOM}(?:\s*:\s*{_ATOM})?|\\frac\{{[A-Za-z]+\}}\{{[A-Za-z]+\}}|\([A-Za-z](?:,\s*[A-Za-z])+\)"
    rf"|(?![abckmnxyz]){_ATOM}(?:\^\{{-1\}})?\s*[(\[][^()\[\]]*[)\]]"
    r"|\\(?:sin|cos|tan|cot|sec|csc|arc\w+|log|ln)(?![a-z])[^-+*/,;=]+"
)
_ARITHMETIC = re.compile(r"(?:\\(?:[dtc]?frac|sqrt|[dt]?binom|times|cdot|pi|circ)|[^A-Za-z\\])+")


def same_answer(a: str | None, b: str | None, answer_type: str) -> bool:
    """Return whether two canonical answers are equal. Symmetric; None equals nothing."""
    if a is None or b is None:
        return False
    return a == b or (answer_type == "math" and _same_math(*sorted((a, b))))


def is_comparable(answer: str, answer_type: str) -> bool:
    """Return False for a formula that math-verify cannot read: it would equal only itself."""
    if answer_type != "math" or _FRACTION.fullmatch(answer) or _WORDS.fullmatch(answer):
        return True
    return MATH_VERIFY.equal(answer, answer)


def _same_math(a: str, b: str) -> bool:
    """Return whether two different canonical answers of type "math" have the same value."""
    # 1. Words, and what math-verify would ignore.
    if any(re.search(r"(?<![_\d])\d+\s+\d", answer) for answer in (a, b)):  # "3 4" is not 34
        return a.split() == b.split()
    plain_a, plain_b = ["".join(_STYLED.sub(r"\1", answer).split()) for answer in (a, b)]
    if plain_a == plain_b:
        return True
    if _WORDS.fullmatch(a) or _WORDS.fullmatch(b):  # "east" is not the product of e, a, s and t
        return plain_a.lower() == plain_b.lower()
    if plain_a.lower() == plain_b.lower():  # 3r^2 is not 3R^2
        return False
    for pattern in _PROPERTIES:
        matches = [pattern.search(answer) for answer in (a, b)]
        if len({(match["value"] or "1").lower() for match in matches if match}) > 1:
            return False

    # 2. An equation that defines something equals its right side: y = 2x + 3, not 2x + z = 1.
    equation, answer = (a, b) if _EQUALS.search(a) else (b, a)
    left, *sides = _EQUALS.split(equation)
    has_several = re.search(r"[,;]|\\text\b|\b(?:and|or)\b", re.sub(r"\([^()]*\)", "", equation))
    if not sides or _EQUALS.search(answer) or has_several:
        return MATH_VERIFY.equal(a, b)
    is_defined = _NAME.fullmatch(left.strip()) or _ARITHMETIC.fullmatch(equation)
    return bool(is_defined) and same_answer(_canonical_math(sides[-1]), answer, "math")


# ---- math-verify in its own process --------------------------------------------------------------


class MathVerify:
    """Compare two LaTeX answers by math-verify in another process.

    SymPy may run forever, and only a process can be stopped at any moment and from any thread.
    `timeouts` counts comparisons that took too much time or memory; they count as unequal.
    """

    # For each line with a JSON pair of answers, it prints true, false or null (stopped). A child
    # compares; if it is killed by its timer, or runs out of memory, the next one takes its place.
    PROGRAM = r"""
import json, logging, os, resource, signal, sys
from math_verify import LatexExtractionConfig, parse, verify
logging.disable(logging.CRITICAL)
latex = [LatexExtractionConfig()]
options = {"numeric_precision": 100, "allow_set_relation_comp": True, "timeout_seconds": None}
parse("$1$", latex, parsing_timeout=None)
while (pid := os.fork()) and os.waitpid(pid, 0)[1] != 0:
    print("null", flush=True)
if pid == 0:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # bytes
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, 0.7)  # seconds of computing
        a, b = [parse(f"\\boxed{{{x}}}", latex, parsing_timeout=None) for x in json.loads(line)]
        equal = bool(a and b) and verify(a, b, **options) and verify(b, a, **options)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(equal), flush=True)
"""

    def __init__(self):
        self.process = None
        self.lock = threading.Lock()
        self.timeouts = 0
        self.equal = functools.lru_cache(maxsize=1 << 16)(self._equal)

    def _equal(self, a: str, b: str) -> bool:
        """Return whether two LaTeX answers are equal; False if either cannot be parsed."""
        with self.lock:
            if self.process is None:
                command = [sys.executable, "-c", self.PROGRAM]
                pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
                # In its own session: an interrupt (Ctrl-C) is for this process alone.
                self.process = subprocess.Popen(command, **pipes, start_new_session=True)
            self.process.stdin.write(json.dumps([a, b]) + "\n")
            self.process.stdin.flush()
            equal = json.loads(self.process.stdout.readline())
        if equal is None:
            self.timeouts += 1
            pair = f"{a[:80]!r} with {b[:80]!r}"
            print(f"comparing {pair} takes too long; counted as unequal", file=sys.stderr)
        return bool(equal)


MATH_VERIFY = MathVerify()


# ---- The answer of a message ---------------------------------------------------------------------

RUNGS = ("told", "sentence", "box", "option", "number", "none")

_CUE = re.compile(
    r"""
    (?P<hashes> (?<![#\w])\#{4} (?![ \t]*(?:[A-Za-z#]{2}|\d+[.)]\s|$)) )     # "#### 42"
  | \b (?P<final>final\s+)?
    (?: answers? (?:\ (?:choice|option|letter))? | result | output | ans\b
      | (?:(?:correct|right|best|final|selected)\s+)(?:choice|option|statement|letter) )
    \b [*_]* [ \t]*
    (?: \( (?!\w\)) [^()\n]{0,80} \) )? [ \t]*                # a remark: "Answer (in cm): 42"
    (?:
        (?: \b(?:to|for|in|here|I|we)\b [^.:=\n]{0,60}? )?    # "to the question"
        (?: \b(?:is|was|are|equals|(?:would|should|must|will|seems\ to)\ be)(?:\b|(?=n't))[*_]*\s*:?
          | \b(?:would|wo|should|must|will|ca|can|could)(?=\ ?not\b|n't)
          | (?P<sign> [*_`"']*\s*(?::|=+>?|→)+ ) )
      | (?P<line> -[ \t] | [*_`#]*[ \t]*\n )                  # "Answer - 42", "### Answer"
      | (?(final)(?-i:(?=[*$(]*(?:\d|[A-Z]\b|\\))) | (?!) )   # "my final answer 42"
    )
    """,
    re.IGNORECASE | re.VERBOSE | re.MULTILINE,
)
_GAP = re.compile(r"[\s*_`#>]*(?:(?:\\\[|\$\$)\s*)?")  # between a cue and the answer
# A line up to ". " before a capital letter or a formula, but not up to that of "9:30 p.m. on"
_SENTENCE = re.compile(r""".*?[.!?][.!?$*")\]}]*(?=\s+[A-Z$\\*("])|.*""")
_VERDICT = re.compile(r"(?i)(final answer\W{1,9})the check (?:holds|fails)\b[.,:;]?\s*")
# A formula over several lines; "$x+1$", "\(x+1\)" and "\[x+1\]"; "\boxed{" and "\boxed 7"
_DISPLAY = re.compile(r"(?s)\\\[[^]]{0,600}?\\\]|\$\$[^$]{1,600}\$\$|\\begin\{.{0,600}?\\end\{")
_FORMULA = re.compile(r"(?<!\\)\$+((?:\\.|[^$\\]){1,600})\$+|\\[(\[](.{1,600}?)\\[)\]]")
_BRACES = r"[^{}]"
for _ in range(6):
    _BRACES = rf"(?:[^{{}}]|\{{{_BRACES}*\}})"  # with braces inside, up to this depth
_BOX = re.compile(rf"\\(?:boxed|fbox)[ ]*(?:\{{({_BRACES}*)\}}|(\{{)|(-?\w[\w.]*))")
# Between two boxes or formulas that are one answer, as in "\(x = 1\) or \(x = 2\)"
_AND = r"(?:\$|\\\))\s*(?:[,;]|,?\s*(?:\\text\{\s*)?\b(?:and|or)\b\s*\}?)\s*(?:\$|\\\()"
# "the Solver's ", "your ", "another possible ": before an answer that the message only discusses
_NOT_OWN = re.compile(
    r"(?i)\b(?:(?!(?:let|that|it|he|she|here|there|what)'s)\w+'s|your|his|her|their|wrong|incorrect"
    r"|other|another|possible|proposed|previous|not|rather than|instead of"
    r"|(?:claims|says|argues|thinks)(?: that)? the|(?:you|solver|(?:agent|debater) \w+)"
    r" (?:wrote|ha[ds]|got|gave|found|says?|said|claim\w+|answered)(?: that)?(?: the)?"
    r"|(?:check|verify)(?:ing|ed)? (?:the|this|our)) +(?:(?:correct|final|own|first) +)?[$*]*$"
)
_DOUBT = re.compile(r"(?i)(?:(?:n't|not) (?:think|believe|say|true)|doubt|false)\b[^.\n]*\Z")
_DENIAL = re.compile(r"(?i)\W*(?:n't|not|never|(?:more|less|fewer|greater|smaller)\s+than)\b")
# "correct", "it is wrong", "found by adding": remarks on an answer, which do not give it
_ABOUT = re.compile(
    r"(?i)\W*(?:(?:it|this|that)\s*(?:'s|is|was)\s+)?(?:also\s+)?(?:(?:in)?correct|wrong|clear|below"
    r"|right(?!\s+(?:tri)?angle)|as follows|in|based|given(?! by)|found|rounded|obtained)\b"
)
_SPOKEN_REMARK = re.compile(r"\s\((?=[^()\n]{0,80}(?:(?<![\\A-Za-z])[A-Za-z]{3}|=))[^()\n]*\)")
_CONTENT = {"number": re.compile(r"\d"), "letter": _OPTION, "math": re.compile(r"\S")}


class Answer(NamedTuple):
    """The answer of a message, and how it was read."""

    value: str | None = None  # in canonical form; None if the message has no answer
    rung: str = "none"  # one of RUNGS; "none" if the message has no answer


def extract_answer(text: str, answer_type: str) -> Answer:
    """Return the canonical final answer of a message, and the rung on which it was found.

    The module docstring describes the rungs. This never raises, whatever the text.
    """
    text = _spell(re.sub("(?i)<answer>", "\nFinal answer: ", text[-MAX_MESSAGE:]))
    text = _DISPLAY.sub(lambda match: match[0].replace("\n", " "), _VERDICT.sub(r"\1", text))
    answers = _find_answers(text, answer_type)
    if answers:
        return max(answers)[-1]
    value, rung = None, "option"
    if answer_type == "letter":
        value = _option_without_cue(text)
    elif answer_type == "number":
        numbers = _find_numbers(plain_text(text))
        value, rung = (numbers[-1][2] if numbers else None), "number"
    return Answer() if value is None else Answer(str(value), rung)


def _find_answers(text: str, answer_type: str) -> list[tuple[int, int, Answer]]:
    """Return (priority, place, answer) of what is told, of sentences and of boxes.

    The answer of a place is missing if it cannot be read ("5 or 6"), or is denied ("not 5").
    Priorities: 3 for statements ("Final answer: 42"), 2 for mentions ("the final answer is 42"), 1
    for boxes in mathematics, 0 for sentences and other boxes, and -1 for denials.
    """
    boxes = [box for box in find_boxes(text) if _is_own(text, box)]
    free = list(boxes)  # those in no phrase
    answers = []
    section_end = len(text)
    for cue in reversed(list(_CUE.finditer(text))[-MAX_CUES:]):
        # 1. A statement is a line, and a box below a heading; anything else is a sentence.
        start = _GAP.match(text, cue.end()).end()
        line = text[start : start + MAX_LINE].partition("\n")[0]
        is_told = bool(cue["hashes"] or cue["final"])
        is_statement = is_told and bool(cue["hashes"] or cue["sign"] or cue["line"])
        line = line if is_statement else _SENTENCE.match(line)[0]
        is_heading = is_statement and "\n" in text[cue.start() : start] and not line[:1].isdigit()
        end = section_end if is_heading else start + len(line)
        own = [box for box in boxes if start <= box[0] < end]
        free = [box for box in free if box not in own]
        section_end = cue.start() if is_statement else section_end

        # 2. Does it give an answer, or deny one, or is it a remark on an answer?
        is_about = not is_statement and (_ABOUT.match(line) or line.rstrip().endswith("?"))
        before = text[max(0, cue.start() - 80) : cue.start()]
        is_remark = _NOT_OWN.search(before) or (is_about and not own)
        is_given = not (is_remark or _DOUBT.search(before) or _DENIAL.match(line))
        value = _read(line, own, answer_type) if is_given else None
        names_one = own or is_statement or _CONTENT[answer_type].search(_option_text(line))
        if not names_one or (is_remark and answer_type != "letter"):
            continue
        priority = int(bool(own) and answer_type == "math")
        if not is_given or not line.strip():
            priority = -1
        elif is_told:
            priority = 3 if is_statement else 2
        rung = "told" if is_told else "sentence"
        answers.append((priority, cue.start(), Answer(value, rung) if value else Answer()))
    for box in free:
        value = _read("", [box], answer_type)
        answer = Answer(value, "box") if value else Answer()
        answers.append((int(answer_type == "math"), box[0], answer))
    return answers


def _read(line: str, boxes: list[tuple], answer_type: str) -> str | None:
    """Return the canonical answer of a phrase: its last box, or else what its line says."""
    if boxes:
        return boxes[-1][2] and canonical(boxes[-1][2], answer_type)
    if answer_type != "math":
        return canonical(line, answer_type)
    line = re.sub(_AND, ", ", _CLAUSE.sub("", _SPOKEN_REMARK.sub("", line)))
    line = re.sub(r".*\b(?:is|equals) (?=-?\d[^$]*$)", "", line)  # "the value of $x$ is 3"
    # The first formula after the last verb counts, in "the value of $x$ is $3$ at $y = 2$".
    after_verb = re.split(r"\b(?:is|are|equals)\b", line)[-1]
    formulas = _FORMULA.findall(after_verb)[:1] or _FORMULA.findall(line)[-1:]
    return canonical("".join(formulas[0]) if formulas else line, "math")


def find_boxes(text: str) -> list[tuple[int, int, str | None]]:
    r"""Return (start, end, content) of each \boxed{...} and \boxed 7; None if it is never closed.

    "\boxed{1} and \boxed{2}" are one box with both contents.
    """
    boxes = []
    for match in _BOX.finditer(text):
        content, unclosed, bare = match.groups()
        content = None if unclosed else (content or bare or "").strip()
        start = match.start()
        between = text[boxes[-1][1] : start].strip("$()\\") if boxes else ""
        if content and re.fullmatch(_AND, f"${between}$"):
            start, _, first = boxes.pop()
            content = f"{first}, {content}"
        boxes.append((start, match.end(), content))
    return boxes


def _is_own(text: str, box: tuple[int, int, str | None]) -> bool:
    r"""Return whether a box may hold the answer: not empty, not "the Solver's \boxed{7}"."""
    start, end, content = box
    before = text[max(0, start - 80) : start]
    is_remark = re.search(r"(?<!\\)\([A-Za-z][^()\n]*$", before)  # "(the draft had"
    is_rejected = re.compile(_REJECTED).match(text, end)
    return content != "" and not (_NOT_OWN.search(before) or is_remark or is_rejected)
