r"""Which part of a message is its final answer: the ladder.

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

answers.py says what an answer of each type is. No torch here.
"""

import re
from typing import NamedTuple

from tasks.answers import canonical, find_numbers, plain_text

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
