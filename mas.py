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


_NUMBER = re.compile(r"""(?P<sign>[-+])?\s*[$€£]?\s*
                         (?: (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)? (?P<decimals>\.\d+)? )
                         (?: (?:[ ]+(?P<part>\d+))? \s*/\s* (?P<denominator>\d+(?!\.?\d)) )?""", re.VERBOSE)  # 1 3/4: one and three quarters
_FINAL = re.compile(r"(?:final\s+answer\s*(?:is)?\s*[:=]?|####)[ \t]*(?P<answer>[^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"^[:=\s]*(?:(?:option|choice|answer)\s*\(?|\()?([A-Z])(?![\w'])", re.IGNORECASE)
_ARTICLE = re.compile(r"^[:=\s]*[AI]\s+\w", re.IGNORECASE)  # "A train ..." names no option


def _plain(text: str) -> str:
    """Strip what does not carry meaning: markdown, dollar signs of LaTeX, thin spaces; write LaTeX fractions as a/b."""
    text = text.replace("−", "-").replace("–", "-").replace("\\$", "$").replace("\\%", "%").replace("\\!", "").replace("\u202f", " ")
    text = re.sub(r"(?<=\d)\s*(?=\\[dt]?frac\s*[{\d])", " ", text)   # 1\frac{3}{4} is not 13/4
    text = re.sub(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1/\2", text)
    text = re.sub(r"\\[dt]?frac\s*(\d)\s*(\d)", r"\1/\2", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"\\left|\\right|\\[,;: ]|\\\(|\\\)|\\\[|\\\]|(?<=\d)\{,\}(?=\d)", lambda m: "," if "{" in m[0] else " ", text)
    return re.sub(r"[*`_]{1,3}(?=\S)|(?<=\S)[*`_]{1,3}", "", text).strip()


def _numbers(text: str) -> list[tuple[Fraction, int, int]]:
    """Every number in `text` with where it starts and ends."""
    found = []
    for match in _NUMBER.finditer(text):
        if match["whole"] is None and match["decimals"] is None or match["denominator"] and int(match["denominator"]) == 0:
            continue
        value = Fraction((match["whole"] or "0").replace(",", "") + (match["decimals"] or ""))
        if match["part"]:
            value += Fraction(int(match["part"]), int(match["denominator"]))
        else:
            value /= int(match["denominator"] or 1)
        before = text[:match.start()].rstrip()[-1:]
        negative = match["sign"] == "-" and not (before.isalnum() or before == ")")  # "16 - 3" holds no -3
        found.append((-value if negative else value, match.start(), match.end()))
    return found


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{...}, braces matched; None where there is none or it is never closed."""
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start)
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1:i]
    return None


def canonical(answer: str, kind: str) -> str | None:
    """An answer in the form in which answers are recorded and compared; None if it is not an answer of this kind.

    kind "number": an exact fraction, e.g. "42", "-3/4" (units, currency, commas, percent signs dropped)
    kind "letter": the letter of an option, upper case
    kind "math":   a number as above where it is one, else the LaTeX as written
    """
    plain = _plain(answer)
    if kind == "letter":
        match = _LETTER.match(plain)
        return match[1].upper() if match and not _ARTICLE.match(plain) else None
    if kind == "number":
        numbers = _numbers(plain.rsplit("=", 1)[-1])
        return str(numbers[0][0]) if numbers else None
    numbers = _numbers(plain)
    if len(numbers) == 1 and not (plain[:numbers[0][1]] + plain[numbers[0][2]:]).strip(" $%."):
        return str(numbers[0][0])
    return plain.strip(" $.") or None


def extract_answer(text: str, kind: str) -> str | None:
    r"""The final answer of a message: the last \boxed{}, else the last "final answer" or "####" line, else, for numbers
    only, the last number. None where there is none: that is counted, never guessed."""
    boxed = _boxed(text)
    if boxed is not None:
        return canonical(boxed, kind)
    final = list(_FINAL.finditer(text))
    if final:
        return canonical(final[-1]["answer"], kind)
    numbers = _numbers(_plain(text)) if kind == "number" else []
    return str(numbers[-1][0]) if numbers else None


def same_answer(a: str | None, b: str | None, kind: str) -> bool:
    """Whether two canonical answers are equal; symmetric. No answer equals nothing."""
    if a is None or b is None:
        return False
    if a == b or kind != "math":
        return a == b
    plain = [_NUMERAL.fullmatch(answer) is not None for answer in (a, b)]
    words = [_WORDS.fullmatch(answer) is not None for answer in (a, b)]
    if any(words) or all(plain):   # "east" is no product of e, a, s and t; two different fractions are not equal
        return all(words) and a.lower().split() == b.lower().split()
    powers = [_unit_power(answer) for answer in (a, b)]
    if None not in powers and powers[0] != powers[1]:   # math-verify drops units, and 15 cm^2 is not 15 cm^3
        return False
    return SYMPY.equal(*sorted((a, b)))


_NUMERAL = re.compile(r"-?\d+(/\d+)?")
_UNIT = re.compile(r"(?P<named>square|cubic|sq\.?|cu\.?)?\s*\b(?:[ckm]m|inch|inches|ft|foot|feet|yd|yards?|miles?|units?|(?:centi|kilo|milli)?met(?:er|re)s?)\b"
                   r"[.}\s]*(?:\^\{?(?P<power>\d))?")
_WORDS = re.compile(r"[A-Za-z]{3,}(?:[ -][A-Za-z]+)*")


def _unit_power(answer: str) -> int | None:
    """1 for a length, 2 for an area, 3 for a volume; None where no such unit is given."""
    match = _UNIT.search(answer)
    return match and (int(match["power"] or 1) if match["power"] or not match["named"] else {"s": 2, "c": 3}[match["named"][0]])


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
            print(json.dumps(all(parsed) and all(math_verify.verify(a, b) for a, b in (parsed, parsed[::-1]))), flush=True)
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
        if gold.isdigit() and int(gold) < len(letters) and gold not in texts:
            gold = letters[int(gold)]              # an index, from 0
        elif gold in texts:
            gold = letters[texts.index(gold)]
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
