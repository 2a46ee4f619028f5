"""The multi-agent system: who speaks when, who sees what, what a state is, and what counts as a right answer.

A multi-agent system (MAS) is agents 1..n on a directed communication graph with a fixed schedule (paper, section 3).
An edge j -> i lets agent i see agent j's message, an edge Q -> i lets it see the question. Nothing else is visible.
A state s is the question and the messages so far; an action a is one agent's whole message; next(s, a) appends it.

No torch here: this file is the problem, not the model.
"""

import argparse
import functools
import hashlib
import json
import math
import random
import re
import signal
import subprocess
import sys
import threading
import unicodedata
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

from tiny import problems as tiny_problems

HERE = Path(__file__).resolve().parent


class InputError(Exception):
    """What the user gave cannot be used. Carries one line that says what is wrong and what would be right."""


class Parser(argparse.ArgumentParser):
    """argparse, but a wrong flag is one line like all bad input; --help shows the defaults."""

    def __init__(self, doc: str):
        super().__init__(description=doc.split("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter,
                         allow_abbrev=False)

    def error(self, message):
        raise InputError(f"{message} (--help lists the flags)")


def positive_int(text: str) -> int:
    if not re.fullmatch(r"\+?\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    return 0 if re.fullmatch(r"[-+]?0+", text) else positive_int(text)


def positive_float(text: str) -> float:
    return _float(text, low=0, open_below=True, high=math.inf)


def non_negative_float(text: str) -> float:
    return _float(text, low=0, open_below=False, high=math.inf)


def unit_float(text: str) -> float:
    return _float(text, low=0, open_below=False, high=1)


def positive_unit_float(text: str) -> float:
    return _float(text, low=0, open_below=True, high=1)


def _float(text: str, *, low: float, open_below: bool, high: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (low < value or value == low and not open_below) or not value <= high or math.isinf(value):
        bound = f"{'above' if open_below else 'at least'} {low}" + (f" and at most {high}" if high < math.inf else "")
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
    return value


def cli(parse_args, main) -> None:
    """Run a script: bad input prints one line and exits with 2; an interrupt says that nothing is lost and exits with 130."""
    try:
        main(parse_args())
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{Path(sys.argv[0]).name}: interrupted; what is finished is saved, the same command goes on from there",
              file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------------
# Agents, states, the graph


@dataclass(frozen=True)
class Agent:
    name: str
    sees: tuple[str, ...]    # in-edges of the graph: "Q" for the question, else the name of an earlier agent
    prompt: str              # the system prompt: the agent's role
    max_new_tokens: int      # limit of one message, in tokens
    when: tuple[str, str] | None = None   # (earlier agent, words): speaks only if these words are in that agent's message


ANSWER_FORMS = {"number": "<number>", "letter": "<letter of the option>", "math": "\\boxed{<answer in LaTeX>}"}  # kind of answer -> how to give it


class Message(NamedTuple):
    agent: str
    text: str


@dataclass(frozen=True)
class State:
    """s: the question and the messages so far, in the order spoken. Immutable and hashable."""
    question: str
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class MAS:
    """Agents in the order of the schedule. Which agent is on turn is a function of the state alone.

    An agent with a condition (`when`) that does not hold is passed over: transcripts of one graph differ in length.
    """
    name: str
    agents: tuple[Agent, ...]

    def __post_init__(self):
        earlier: list[str] = ["Q"]
        always = {"Q"}   # what is there in every transcript
        for agent in self.agents:
            who = f"graph {self.name}: {agent.name}"
            if agent.name in earlier:
                raise InputError(f"{who} is the name of two agents; each needs a name of its own" if agent.name != "Q" else
                                 f"{who} is the name of the question; call the agent something else")
            if len(set(agent.sees)) < len(agent.sees):
                raise InputError(f"{who} sees {_listed(agent.sees)}; name each of them once")
            later = [name for name in agent.sees if name not in earlier]
            if later:
                others = {other.name for other in self.agents}
                why = "itself" if later[0] == agent.name else "a later agent, which closes a cycle" if later[0] in others else "nobody of this graph"
                raise InputError(f"{who} sees {later[0]}, {why}; it can see {_listed(earlier)}")
            if not always & set(agent.sees):
                raise InputError(f"{who} sees {_listed(agent.sees) or 'nothing'}; it must see the question (Q) or an agent that always speaks")
            if agent.when and (agent.when[0] not in earlier[1:] or not _words(agent.when[1])):
                raise InputError(f"{who} speaks when {agent.when[0]} says {agent.when[1]!r}; it can wait for words of {_listed(earlier[1:]) or 'nobody'}")
            earlier.append(agent.name)
            always |= {agent.name} if not agent.when else set()
        if not always - {"Q"}:
            raise InputError(f"graph {self.name}: it has no agent that always speaks")
        unheard = [agent.name for agent in self.agents[:-1] if not any(agent.name in other.sees for other in self.agents)]
        unheard = [name for name in unheard if not all(other.when for other in self.agents[earlier.index(name):])]
        if unheard:
            raise InputError(f"graph {self.name}: nobody sees {unheard[0]}, and the answer is another's; let a later agent see it, or drop it")

    @classmethod
    def from_dict(cls, fields: dict) -> "MAS":
        """The graph that a config.json records."""
        return cls(fields["name"], tuple(map(_agent, fields["agents"])))

    def turn(self, state: State) -> Agent | None:
        """The agent on turn, or None where the state is terminal."""
        said = {message.agent: message.text for message in state.messages}
        last = state.messages[-1].agent if state.messages else None
        waiting = last is None
        for agent in self.agents:
            if waiting and (agent.when is None or _words(agent.when[1]) in _words(said.get(agent.when[0], ""))):
                return agent
            waiting = waiting or agent.name == last
        return None

    def index(self, state: State) -> int:
        """The place in the schedule of the agent on turn, which is also its place in a count per agent (`per_agent`)."""
        return self.agents.index(self.turn(state))

    def is_terminal(self, state: State) -> bool:
        return self.turn(state) is None

    def step(self, state: State, text: str) -> State:
        """next(s, a): the agent on turn says `text`."""
        return State(state.question, state.messages + (Message(self.turn(state).name, text),))

    def observe(self, state: State, agent: Agent) -> list[Message]:
        """What `agent` sees: the in-edges of the graph and nothing else, each message with its sender."""
        everything = (Message("Q", state.question),) + state.messages
        return [message for message in everything if message.agent in agent.sees]

    def prompt(self, state: State, kind: str) -> list[dict[str, str]]:
        """The chat that asks the agent on turn for its message (an action a ~ pi_i(. | what i observes)).

        kind: of the answer; `<answer>` in a role says in its place how an answer of this kind is given (ANSWER_FORMS).
        """
        agent = self.turn(state)
        seen = "\n\n".join(_labelled(message) for message in self.observe(state, agent))
        return [{"role": "system", "content": agent.prompt.replace("<answer>", ANSWER_FORMS[kind])}, {"role": "user", "content": seen}]

    def value_text(self, state: State, view: str) -> tuple[str, ...]:
        """The one rendering of a state for V, in training, search and evaluation: segments, the newest message last.

        view "full":  the whole transcript. The segments of a state are a prefix of those of each of its children.
        view "local": what the newest message's agent could see, then its message.

        The value model closes every segment with the tokenizer's end-of-message token and reads V at the last of them.
        Segments are tokenised one by one, so that the prefix property holds for token ids, too.
        """
        if view == "full" or not state.messages:
            shown = [Message("Q", state.question), *state.messages]
        else:
            agent = next(a for a in self.agents if a.name == state.messages[-1].agent)
            shown = [*self.observe(state, agent), state.messages[-1]]
        return tuple(_labelled(message) for message in shown)

    def per_agent(self, spec: str, what: str) -> tuple[int, ...]:
        """Read a count per agent: "3" for all, "1.8.1.1" in the order of the schedule, or "Reader=1,Planner=8,...".

        With names, agents left out get 1.
        """
        names = [agent.name for agent in self.agents]
        try:
            if "=" in spec:
                counts = {name: int(count) for name, count in (pair.split("=") for pair in spec.split(","))}
                unknown = set(counts) - set(names)
                if unknown:
                    raise InputError(f"{what} {spec}: no agent {sorted(unknown)[0]} in graph {self.name}; it has {', '.join(names)}")
                result = tuple(counts.get(name, 1) for name in names)
            else:
                counts = [int(count) for count in spec.split(".")]
                result = tuple(counts * len(names) if len(counts) == 1 else counts)
        except ValueError:
            raise InputError(f"{what} {spec}: give one whole number, or one per agent as 1.8.1.1 or Planner=8,Solver=2") from None
        if len(result) != len(names) or min(result) < 1:
            raise InputError(f"{what} {spec}: needs one number of at least 1 for each of {', '.join(names)}")
        return result


def _words(text: str) -> str:
    """The words of a text alone, so that case, markdown and punctuation cannot hide a condition: "**Check**  FAILS." -> " check fails "."""
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} " if words else ""


def _agent(fields: dict) -> Agent:
    """An agent from JSON or TOML, which have lists where an Agent has tuples."""
    return Agent(**{key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()})


def _listed(names) -> str:
    return ", ".join(names)


def _labelled(message: Message) -> str:
    return f"{'Question' if message.agent == 'Q' else message.agent}: {message.text}"


_READER = Agent("Reader", ("Q",), "You are the Reader. List the facts of the question that matter and say what is asked. Do not solve it.", 256)
_PLANNER = Agent("Planner", ("Q", "Reader"), "You are the Planner. Propose a way to the answer. The Solver sees only your message, "
                                             "so repeat the facts it needs.", 256)
_SOLVER = Agent("Solver", ("Planner",), "You are the Solver. Carry out the plan step by step and check the result.", 512)
_VERIFIER = Agent("Verifier", ("Q", "Solver"), "You are the Verifier. Compare the work with the question: say that the check holds or that "
                                               "the check fails. Your last line is: Final answer: <answer>", 256)

GRAPHS = {graph.name: graph for graph in (
    MAS("chain", (_READER, _PLANNER, _SOLVER, _VERIFIER)),
    MAS("single", (
        Agent("Solver", ("Q",), "You solve the question step by step. Your last line is: Final answer: <answer>", 512),
    )),
    MAS("debate", (
        Agent("First", ("Q",), "You are the first debater. Choose an answer and argue for it in a few sentences.", 256),
        Agent("Second", ("Q", "First"), "You are the second debater. Say where the first debater is wrong, or what is missing. Then choose an answer and argue "
                                        "for it in a few sentences.", 256),
        Agent("Judge", ("Q", "First", "Second"), "You are the judge. Weigh both arguments against the question. Your last line is: Final answer: <answer>", 256),
    )),
    MAS("constraints", (
        Agent("Extractor", ("Q",), "You are the Extractor. List every statement and every condition of the text, one per line, and what is asked. "
                                   "Do not choose an option.", 384),
        Agent("Builder", ("Q", "Extractor"), "You are the Builder. For each option, say which of the conditions it meets and which it breaks. "
                                             "Then name the option that breaks none.", 512),
        Agent("Checker", ("Q", "Builder"), "You are the Checker. Check the reasoning against the text. Your last line is: Final answer: <answer>", 256),
    )),
    MAS("refine", (_READER, _PLANNER, _SOLVER, _VERIFIER,
        Agent("Refiner", ("Q", "Planner", "Solver", "Verifier"), "You are the Refiner. The check of this plan fails. Find a better answer. "
                                                                 "Your last line is: Final answer: <answer>", 512, ("Verifier", "check fails")),
    )),
)}


def load_graph(name: str) -> MAS:
    """A graph by name, or from a TOML file: [[agents]] with name, sees, prompt, max_new_tokens and perhaps when."""
    if name in GRAPHS:
        return GRAPHS[name]
    path = Path(name)
    if path.suffix != ".toml":
        raise InputError(f"--graph {name}: unknown; it is one of {', '.join(GRAPHS)}, or a file FILE.toml")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--graph {name}: no such file") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--graph {name}: not TOML ({error})") from None
    agents = table.get("agents")
    if not isinstance(agents, list) or not all(isinstance(agent, dict) for agent in agents):
        raise InputError(f"--graph {name}: it has no [[agents]] tables")
    return MAS(str(table.get("name", path.stem)), tuple(_read_agent(agent, f"--graph {name}, agent {i}") for i, agent in enumerate(agents, 1)))


def _read_agent(fields: dict, where: str) -> Agent:
    types = {"name": str, "sees": list, "prompt": str, "max_new_tokens": int, "when": list}
    for key, value in fields.items():
        if key not in types:
            raise InputError(f"{where}: unknown key {key}; an agent has {_listed(types)}")
        if not isinstance(value, types[key]) or isinstance(value, list) and not all(isinstance(entry, str) for entry in value):
            raise InputError(f"{where}: {key} = {value!r} should be a {'list of strings' if types[key] is list else types[key].__name__}")
    missing = [key for key in types if key not in fields and key != "when"]
    if missing:
        raise InputError(f"{where}: {missing[0]} is missing")
    if not re.fullmatch(r"\w+", fields["name"]) or fields["max_new_tokens"] < 1 or len(fields.get("when", ("", ""))) != 2:
        raise InputError(f"{where}: name is one word, max_new_tokens at least 1, when = [\"Agent\", \"words it says\"]")
    return _agent(fields)


# ---------------------------------------------------------------------------------------------------------------------
# Answers: one extraction, one equality


_NUMBER = re.compile(r"""(?P<sign>[-+])?\s*[€£₹]?\s*
                         (?: (?P<whole>\d{1,3}(?:,\d{2,3})*,\d{3}(?!\d)|\d+)? (?P<decimals>\.\d+)? )
                         (?: (?:[ ]+(?:and[ ]+)?(?P<part>\d+))? \s*/\s* (?P<denominator>\d+(?!\.?\d)) )?    # 1 3/4: one and three quarters
                         (?: \s*(?P<times>thousand|[mbtr]+illion)\b )?""", re.VERBOSE)
_TIMES = {None: 1, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_JOINED = re.compile(r"\s*(?:[-+*^×,]|\\times|\\cdot|\bor\b|\band\b|\bto\b)\s*(?:or\b\s*)?\{?")   # "5 or 6", "5 + 6": that is no number
_FINAL = re.compile(r"""final\s+answer\b [ \t]*(?:\([^()\n]*\))? [ \t]*(?:is\b)? (?P<told>[*_`]*\s*[:：=] | [-–—][ \t] | [*_`#]*[ \t]*\n)?
                        [ \t*_`]*\s*(?P<answer>[^\n]*)""", re.IGNORECASE | re.VERBOSE)   # what was said is on this line or on the next one with text
_HASHES = re.compile(r"^[ \t]*####[ \t]*(?!#)(?P<answer>[^\n]*)", re.MULTILINE)
_STYLED = re.compile(r"\\(?:text(?:rm|bf|it|sf)?|mbox|math(?:rm|bf|sf|it)|boldsymbol|bm)\s*\{([^{}]*)\}")
_LETTER = re.compile(r"""^\W*(?:(?:the\s+)?(?:(?:correct|right|best|final)\s+)?(?:answer|options?|choice|letter)\b\s*(?:is\b)?\W*)*
                         (?P<letter>[A-Z])(?P<rest>(?![\w'’/&-]|\.\w|\s*=\s*\d).*)""", re.IGNORECASE | re.VERBOSE | re.DOTALL)
_ARTICLE = re.compile(r"\s+(?!(?:is|because|since|as|for|follows|holds|due)\b)[a-z]")   # "A train ..." names no option
_SECOND = re.compile(r"""[\s)\]]*(?:,|/|\bor\b|\band\b)\s*(?:options?|choice)?\s*\(?[A-Z]\)?\s*(?:[.,;)\]}]|$)""", re.IGNORECASE)


def _clean(text: str) -> str:
    r"""LaTeX and markdown without what carries no meaning: dollar signs, thin spaces, emphasis; one way to write a minus, a degree
    sign, thousands, 1½ and the rows of a matrix (\\ stays, \\[4pt] becomes \\)."""
    for sign, plain in (("−", "-"), ("–", "-"), ("°", r"^\circ"), ("\\$", ""), ("$", ""), ("\\%", "%"), ("`", ""),
                        (r"\degree", r"^\circ"), (r"\varnothing", r"\emptyset"), (r"\lbrace", r"\{"), (r"\rbrace", r"\}")):
        text = text.replace(sign, plain)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]).replace("⁄", "/"), text)
    text = re.sub(r"\\!\s*", "", text)
    text = re.sub(r"\\\\\[[^\]]*\]", r"\\\\ ", text)
    text = re.sub(r"(?<=\d)(?:\{,\}|\\[,;: ]|~|\u202f|\u00a0)\s*(?=\d{3}(?!\d))", lambda m: "," if m[0] == "{,}" else "", text)
    text = re.sub(r"(?<!\\)\\(?:(?:left|right|[bB]igg?[lr]?|displaystyle|textstyle|q?quad)(?![a-zA-Z])|[,;: ()\[\]])|[~\u202f\u00a0]", " ", text)
    text = re.sub(r"(?<![\w*])([*_]{1,3})(?=\S)(.+?)(?<=\S)\1(?![\w*])", r"\2", text)
    return re.sub(r"^[\s*_]+|[\s*_]+$", "", text)


def _plain(text: str) -> str:
    """The cleaned text without LaTeX around words, fractions as a/b: for reading numbers and letters, not for mathematics."""
    text = re.sub(r"(?<=\d)\s*(?=\\[dtc]?frac\s*[{\d])", " ", _clean(text))   # 1\frac{3}{4} is not 13/4
    text = re.sub(r"\\[dtc]?frac\s*(?:\{\s*(-?[\d,]*\.?\d+)\s*\}|(\d))\s*(?:\{\s*([\d,]+)\s*\}|(\d))",
                  lambda m: f"{m[1] or m[2]}/{m[3] or m[4]}".replace(",", ""), text)
    text = re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text)
    return _STYLED.sub(r" \1 ", text).strip()


def _numbers(text: str) -> list[tuple[Fraction, int, int]]:
    """Every number in `text` with where it starts and ends."""
    found = []
    for match in _NUMBER.finditer(text):
        if match["whole"] is None and match["decimals"] is None or match["denominator"] and int(match["denominator"]) == 0 or len(match[0]) > 200:
            continue
        value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ""))
        if match["part"]:
            value += Fraction(int(match["part"]), int(match["denominator"]))
        else:
            value /= int(match["denominator"] or 1)
        value *= _TIMES[match["times"]]
        head = text[:match.start()]
        before, spaced = head.rstrip()[-1:], head != head.rstrip() and not match[0].startswith(("- ", "+ "))
        minus = before.isdigit() or before == ")" or before.isalpha() and not spaced   # "16 - 3" and "x-3" hold no -3, "a loss of -3" does
        found.append((-value if match["sign"] == "-" and not minus else value, match.start(), match.end()))
    return found


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched (or \boxed 7); None where there is none or it is never closed."""
    boxes = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|-?\w[\w.]*)", text))
    if not boxes or boxes[-1][1] != "{":
        return boxes[-1][1] if boxes else None
    start, depth = boxes[-1].end() - 1, 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1:i]
    return None


def canonical(answer: str, kind: str) -> str | None:
    """An answer in the form in which answers are recorded and compared; None if it is not an answer of this kind.

    kind "number": an exact fraction, e.g. "42", "-3/4" (units, currency, commas, percent signs dropped)
    kind "letter": the letter of an option, upper case
    kind "math":   a number as above where it is one (with or without a unit), a word as it is, else LaTeX
    """
    if kind == "letter":
        match = _LETTER.match(_plain(answer))
        article = match and match["letter"] in "AaIi" and _ARTICLE.match(match["rest"]) and not re.match(r"\W*\*", answer)
        return match["letter"].upper() if match and not article and not _SECOND.match(match["rest"]) else None
    if kind == "number":
        return _the_number(_plain(answer))
    latex = _clean(answer).rstrip(". \\")
    if whole := _STYLED.fullmatch(latex):                                       # \text{Evelyn}
        latex = whole[1].strip()
    latex = re.sub(r"^[A-Za-z]\s*\\approx|(?<=.)\\approx.*", "", latex).strip()    # 3/56 \approx 0.05
    latex = re.sub(r"\^\s*(\\[dt]?frac\s*\{[^{}]*\}\s*\{[^{}]*\})", r"^{\1}", latex)   # math-verify reads 2^\frac{1}{2} as 1
    latex = re.sub(r"\\(?:mathrm|text)\s*\{([ie])\}", r" \1", latex)
    latex = re.sub(r"(?<=[\d})])\s*i(?![a-zA-Z])", r" \\cdot i", latex)                    # to math-verify the i of 3i is another one
    number = _whole_number(latex)
    if number is not None:
        return str(number)
    unstyled = " ".join(_STYLED.sub(r" \1 ", latex).split()).rstrip(". ")
    return (latex if re.search(r"[\d\\^_=+*/<>|-]", unstyled) else unstyled) or None


def _the_number(text: str) -> str | None:
    """The number that a final answer names: the one it begins with, else the last one; None for two answers ("5 or 6")."""
    text = re.sub(r"(?<=[\w%])\s*\([^()]*\)", "", text)                        # 12 hours (= 1/2 day)
    left, _, right = text.partition("=")
    if right:
        alone = _whole_number(left)                                           # 12 = 5 + 7, but 5 + 7 = 12
        text = left if alone is not None and _whole_number(right) is None else text.rsplit("=", 1)[-1]
    numbers = _numbers(text)
    if not numbers:
        return None
    leads = not re.search(r"\w", text[:numbers[0][1]])
    chosen = 0 if leads else len(numbers) - 1
    if any(numbers[chosen] in pair and _JOINED.fullmatch(text[pair[0][2]:pair[1][1]]) for pair in zip(numbers, numbers[1:])):
        return None
    return str(numbers[chosen][0])


def _whole_number(latex: str) -> Fraction | None:
    """The number that the whole of an answer is, units apart; None where it is more, or where an area or a volume is meant."""
    if match := re.fullmatch(r"(-?\d*\.?\d+)\s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*\{?\s*(-?\d{1,3})\s*\}?", latex):
        return Fraction(match[1]) * Fraction(10) ** int(match[2])
    if match := re.fullmatch(r"(-?)(\d*)\.(\d*)\\overline\s*\{(\d{1,9})\}", latex):
        digits = Fraction(int(match[4]), (10 ** len(match[4]) - 1) * 10 ** len(match[3]))
        return (Fraction(f"{match[2] or 0}.{match[3] or 0}") + digits) * (-1 if match[1] else 1)
    unit = re.search(r"(?:\s*\\(?:text|mbox|mathrm|textrm)\s*\{[A-Za-z /.]{2,}\}|(?<=[\d}])\s+[A-Za-z]{3,}(?: [A-Za-z]+)*)$", latex)
    if unit and not _UNIT.search(unit[0]) and not _HALF_DAY.search(unit[0]):
        latex = latex[:unit.start()]
    plain = _plain(latex)
    numbers = _numbers(plain)
    alone = len(numbers) == 1 and not (plain[:numbers[0][1]] + plain[numbers[0][2]:]).strip(" %.{}")
    return numbers[0][0] if alone else None


def extract_answer(text: str, kind: str) -> str | None:
    r"""The final answer of a message: the last \boxed{}, else what the last "final answer:" or "####" line says, else, for numbers
    only, the last number. None where there is none: that is counted, never guessed."""
    boxed = _boxed(text)
    if boxed is not None and boxed.strip():
        return canonical(boxed, kind)
    told, mentioned = [], []
    for match in _FINAL.finditer(text):
        (told if match["told"] else mentioned).append((match.start(), match["answer"]))
    told += [(match.start(), match["answer"]) for match in _HASHES.finditer(text) if _is_short(match["answer"], kind)]
    for answers in (told, mentioned):   # "Final answer: 12. I checked the final answer."
        for _, answer in sorted(answers, reverse=True):
            formulas = re.findall(r"(?<!\\)\$+((?:\\.|[^$\\])+)\$+|\\\((.+?)\\\)", answer) if kind == "math" else []
            if len(formulas) == 1:                                              # the length is $2\sqrt{3}$. I hope it is correct.
                answer = "".join(formulas[0])
            if (found := canonical(answer, kind)) is not None:
                return found
    given = told or any(re.search(r"\d", answer) for _, answer in mentioned)   # "final answer: 5 or 6" is not mended by another number
    numbers = _numbers(_plain(text)) if kind == "number" and not given else []
    return str(numbers[-1][0]) if numbers else None


def _is_short(line: str, kind: str) -> bool:
    """Whether a line behind #### is an answer and not a heading ("#### Step 1: add")."""
    if kind == "number":
        return re.fullmatch(r"[\s$*€£-]*\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?\s*%?(?:\s+[A-Za-z]+){0,2}[\s.*]*", line) is not None
    return re.search(r"(?<![\\A-Za-z{])[A-Za-z]{2,}", line) is None


def same_answer(a: str | None, b: str | None, kind: str) -> bool:
    """Whether two canonical answers are equal; symmetric. No answer equals nothing."""
    if a is None or b is None:
        return False
    if a == b or kind != "math":
        return a == b
    if len({"".join(_STYLED.sub(r"\1", answer).split()) for answer in (a, b)}) == 1:   # \text{June 20} and June 20
        return True
    plain = [_NUMERAL.fullmatch(answer) is not None for answer in (a, b)]
    words = [_WORDS.fullmatch(answer) is not None for answer in (a, b)]
    if any(words) or all(plain):   # "east" is no product of e, a, s and t; two different fractions are not equal
        return all(words) and a.lower().split() == b.lower().split()
    for told in (_unit_power, _base, _half_day):   # math-verify drops these: 15 cm^2 is not 15 cm^3, 52 in base 8 not 52 in base 9
        if None not in (both := (told(a), told(b))) and both[0] != both[1]:
            return False
    letters = [re.match(r"\(?([A-Z])\)", answer) for answer in (a, b)]
    if all(letters) and any(letter.end() == len(answer) for letter, answer in zip(letters, (a, b))):   # (C) and (C) hyperbola
        return letters[0][1] == letters[1][1]
    if a.lower() == b.lower() or any(one.startswith("\\{") and re.fullmatch(r"\([^()]*\)", other) for one, other in ((a, b), (b, a))):
        return False   # R is not r; a set is no tuple
    ends = [_end_of_equation(answer) if "=" not in other else None for answer, other in ((a, b), (b, a))]
    return SYMPY.equal(*sorted((a, b))) or any(end is not None and same_answer(end, other, kind) for end, other in zip(ends, (b, a)))


_NUMERAL = re.compile(r"-?\d+(/\d+)?")
_UNIT = re.compile(r"(?P<named>square|cubic|sq\.?|cu\.?)?\s*\b(?:[ckm]?m|in|inch|inches|ft|foot|feet|yd|yards?|miles?|units?|(?:centi|kilo|milli)?met(?:er|re)s?)\b"
                   r"[.}\s]*(?:\^\{?(?P<power>\d))?")
_HALF_DAY = re.compile(r"\b([ap])\.?\s?m\b", re.IGNORECASE)
_WORDS = re.compile(r"(?:[A-Za-z]{3,}|[Nn]o)(?:[ -][A-Za-z]+)*")


def _unit_power(answer: str) -> int | None:
    """1 for a length, 2 for an area, 3 for a volume; None where no such unit is given."""
    match = _UNIT.search(answer)
    return match and (int(match["power"] or 1) if match["power"] or not match["named"] else {"s": 2, "c": 3}[match["named"][0]])


def _base(answer: str) -> str | None:
    """The 8 of 52_8."""
    match = re.fullmatch(r"\d+\s*_\s*\{?(?:\\text\{)?\s*(\d+)\s*\}*", answer)
    return match and match[1]


def _half_day(answer: str) -> str | None:
    """a or p, of a.m. and p.m."""
    match = _HALF_DAY.search(answer)
    return match and match[1].lower()


def _end_of_equation(answer: str) -> str | None:
    """5 of f(2) = 5; None where there is no equation, or more than one."""
    left, equals, right = answer.rpartition("=")
    several = re.search(r",|;|\\text|\band\b|\bor\b", re.sub(r"\([^()]*\)", "", left)) or left.endswith(("<", ">", "!", "\\"))
    return canonical(right, "math") if equals and not several else None


class _Sympy:
    """math-verify in a process of its own. Sympy can take forever, and only a process can be stopped at any moment and from any
    thread. `timeouts` counts the comparisons that were given up; they count as unequal."""

    SECONDS = 10.0
    PROGRAM = """if True:
        import json, logging, sys, math_verify
        logging.disable(logging.CRITICAL)
        math_verify.parse("$1$")   # imports what it needs
        print("ready", flush=True)
        for line in sys.stdin:
            parsed = [math_verify.parse(chr(92) + "boxed{" + answer + "}") for answer in json.loads(line)]
            print(json.dumps(all(parsed) and all(math_verify.verify(a, b, allow_set_relation_comp=True) for a, b in (parsed, parsed[::-1]))), flush=True)
    """

    def __init__(self):
        self.process, self.lock, self.timeouts = None, threading.Lock(), 0
        self.equal = functools.lru_cache(maxsize=1 << 16)(self._equal)

    def _equal(self, a: str, b: str) -> bool:
        """Whether two LaTeX answers are equal, in both directions; False where either cannot be parsed."""
        with self.lock:
            if self.process is None:
                self.process = subprocess.Popen([sys.executable, "-c", self.PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                self.process.stdout.readline()   # "ready": loading sympy takes seconds and is not timed
            timer = threading.Timer(self.SECONDS, self.process.kill)
            self.process.stdin.write(json.dumps([a, b]) + "\n")
            self.process.stdin.flush()
            timer.start()
            reply = self.process.stdout.readline()
            timer.cancel()
            if reply:
                return json.loads(reply)
            if self.process.wait() != -signal.SIGKILL:
                raise RuntimeError(f"math-verify failed on {a!r} and {b!r}")
            self.process = None
            self.timeouts += 1
            print(f"comparing {a!r} with {b!r} took more than {self.SECONDS:g} s; counted as unequal", file=sys.stderr)
            return False


SYMPY = _Sympy()


# ---------------------------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    id: str
    split: str       # "train", "heldout" or "test"
    question: str    # with its options, where it has any
    gold: str        # canonical
    kind: str        # "number", "letter" or "math"
    subject: str | None = None
    level: str | None = None


def is_correct(problem: Problem, answer: str | None) -> bool:
    return same_answer(answer, problem.gold, problem.kind)


def question_key(question: str) -> str:
    """A short hash of the question as compared between splits: case, spacing and punctuation do not count."""
    return hashlib.blake2b(" ".join(re.findall(r"\w+", question.lower())).encode(), digest_size=8).hexdigest()


class Task(NamedTuple):
    """A public task: the kind of its answers, and where the hub has its splits."""
    kind: str
    hub: dict[str, tuple[str, str | None, str, str]]   # "train" or "test" -> (data set, configuration, revision, split there)


EMBEDDED = {"tiny": "packs", "tiny-score": "score"}  # the two families of embedded problems (tiny/problems.py)
TASKS = {
    "gsm8k": Task("number", {split: ("openai/gsm8k", "main", "main", split) for split in ("train", "test")}),
    "math": Task("math", {"train": ("DigitalLearningGmbH/MATH-lighteval", None, "main", "train"), "test": ("HuggingFaceH4/MATH-500", None, "main", "test")}),
    "mmlu": Task("letter", {"train": ("cais/mmlu", "all", "main", "auxiliary_train"), "test": ("cais/mmlu", "all", "main", "test")}),
    "logiqa": Task("letter", {split: ("lucasmccabe/logiqa", None, "refs/convert/parquet", split) for split in ("train", "test")}),
}
SPLITS = ("train", "heldout", "test")
COLUMNS = {  # what a problem needs -> the names it has in public data sets, tried in this order
    "question": ("question", "problem", "query"), "context": ("context",), "choices": ("choices", "options"),
    "answer": ("answer", "correct_option", "solution"), "id": ("id", "unique_id"), "subject": ("subject", "type"), "level": ("level",)}


def load_problems(*, task: str, data: str | None, split: str, num: int) -> list[Problem]:
    """`num` problems of a split. A split is fixed by problem id, never by a seed or the size of a run.

    task: an embedded family or a public task. data: a file (JSON lines; or json, csv, parquet) in place of the hub; its answers are of
    the public task's kind, else of the narrowest kind that fits all of them. Hub and file alike: one in eight of the training
    problems, by a hash of the id, is `heldout`; a file given for `test` is taken whole. They come in an order fixed by a hash, too, so
    that the first `num` are a fair sample of a file sorted by subject.
    """
    if task in EMBEDDED and data is None:
        problems = [tiny_problems.make_puzzle(EMBEDDED[task], split, i) for i in range(num)]
        return [Problem(p.id, split, p.question, str(p.answer), "number", p.story, str(p.n)) for p in problems]
    if task not in EMBEDDED and task not in TASKS:
        raise InputError(f"--task {task}: unknown; it is one of {', '.join((*EMBEDDED, *TASKS))} (or give --data FILE.jsonl)")
    where = data or task
    rows = _read_file(data) if data else _read_hub(task, split)
    fields, seen = [], Counter()
    for number, row in enumerate(rows, 1):
        found = _read_row(row, f"{where}, line {number}")
        key = f"{Path(where).stem if task in EMBEDDED else task}-{question_key(found['question'])}"
        seen[key] += 1   # a row without an id is known by its question, so that reordering the file changes nothing
        fields.append({"id": key if seen[key] == 1 else f"{key}-{seen[key]}", **found})
    twice = [problem_id for problem_id, n in Counter(row["id"] for row in fields).items() if n > 1]
    if twice:
        raise InputError(f"{where}: the id {twice[0]} occurs twice")
    kind = TASKS[task].kind if task in TASKS else next(
        kind for kind in ("letter", "number", "math") if kind == "math" or all(_is_plain(row["gold"], kind) for row in fields))
    digest = lambda row, what: hashlib.blake2b(f"{what} {row['id']}".encode(), digest_size=8).digest()
    if split != "test":
        fields = [row for row in fields if (digest(row, "split")[0] % 8 == 0) == (split == "heldout")]
    chosen = sorted(fields, key=lambda row: digest(row, "order"))[:num]
    if len(chosen) < num:
        print(f"{where}: {num} {split} problems were asked for, there are {len(chosen)}", file=sys.stderr)
    return [_graded(row, kind, split, where) for row in chosen]


def _graded(row: dict, kind: str, split: str, where: str) -> Problem:
    """A problem whose gold answer is sure to be one: it must equal itself in the way answers are compared."""
    gold = canonical(row["gold"], kind)
    if gold is None or kind == "math" and not (_NUMERAL.fullmatch(gold) or _WORDS.fullmatch(gold) or SYMPY.equal(gold, gold)):
        raise InputError(f"{where}: the answer of problem {row['id']} cannot be read as a {kind}: {row['gold']!r}")
    return Problem(row["id"], split, row["question"], gold, kind, row.get("subject"), row.get("level"))


def _read_row(row: dict, where: str) -> dict:
    """Question with its options, gold answer, and id, subject and level where there are any, from a row of any of the COLUMNS."""
    found = {what: next((row[name] for name in names if row.get(name) is not None), None) for what, names in COLUMNS.items()}
    for what in ("question", "answer"):
        if found[what] is None or not str(found[what]).strip():
            raise InputError(f"{where}: no `{what}`; each line needs `question` and `answer`")
    question, gold = str(found["question"]).strip(), str(found["answer"]).strip()
    if found["context"]:
        question = f"{str(found['context']).strip()}\n{question}"
    if found["choices"]:
        letters = [chr(ord("A") + i) for i in range(len(found["choices"]))]
        question += "\n" + "\n".join(f"{letter}) {choice}" for letter, choice in zip(letters, found["choices"]))
        texts = [str(choice).strip() for choice in found["choices"]]
        if gold in texts and not isinstance(found["answer"], int) and gold not in letters:
            gold = letters[texts.index(gold)]
        elif gold.isdigit() and int(gold) < len(letters):
            gold = letters[int(gold)]              # an index, from 0; a number in the data is one even where an option reads the same
        if gold not in letters:
            raise InputError(f"{where}: the answer {gold!r} is none of the options; give its letter, its index from 0, or its text")
    elif "####" in gold:
        gold = gold.rsplit("####", 1)[-1].strip()  # as GSM8K ends its solutions
    elif row.get("answer") is None and "solution" in row:
        gold = _boxed(gold) or ""                  # as MATH ends its solutions
    optional = {what: str(found[what]) for what in ("id", "subject", "level") if found[what] is not None}
    return {"question": question, "gold": gold, **optional}


def _read_file(data: str) -> list[dict]:
    formats = {".json": "json", ".csv": "csv", ".parquet": "parquet"}
    if Path(data).suffix not in formats:
        return read_jsonl(Path(data))
    if not Path(data).is_file():
        raise InputError(f"--data {data}: no such file")
    return _load_dataset(f"--data {data}", formats[Path(data).suffix], data_files=data, split="train")


def _read_hub(task: str, split: str) -> list[dict]:
    name, config, revision, there = TASKS[task].hub["test" if split == "test" else "train"]
    return _load_dataset(f"--task {task}", name, config, revision=revision, split=there)


def _load_dataset(flag: str, *args, **options) -> list[dict]:
    """Through `datasets`, which falls back on its own cache where there is no network."""
    import datasets  # takes a second; the embedded default does without
    try:
        return datasets.load_dataset(*args, **options).to_list()
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{flag}: cannot be loaded ({reason}); where there is no network, give the file with --data FILE") from None


def source(task: str, data: str | None) -> dict:
    """Where the problems come from, for the records."""
    return {"task": task, "data": data, "hub": TASKS[task].hub if task in TASKS and data is None else None}


def _is_plain(gold: str, kind: str) -> bool:
    """Whether a gold is nothing but a number (or a letter)."""
    if kind == "letter":
        return re.fullmatch(r"\(?[A-Z]\)?", gold) is not None
    return canonical(gold, "number") is not None and canonical(gold, "number") == canonical(gold, "math")


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSON-lines file; a line that is not JSON is named."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    return parse_jsonl(path.read_text(encoding="utf-8"), path)


def parse_jsonl(text: str, path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(text.split("\n"), 1):   # not splitlines: a message may hold other line separators
        try:
            rows += [json.loads(line)] if line.strip() else []
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}); the file is torn or not JSON lines") from None
    return rows


def seeded(*parts) -> random.Random:
    """A generator of its own for each combination of parts: independent of order, batch and process."""
    return random.Random("/".join(map(str, parts)))
