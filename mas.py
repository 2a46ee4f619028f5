"""The multi-agent system: who speaks when, who sees what, what a state is, and what counts as a right answer.

A multi-agent system (MAS) is agents 1..n on a directed communication graph with a fixed schedule (paper, section 3).
An edge j -> i lets agent i see agent j's message, an edge Q -> i lets it see the question. Nothing else is visible.
A state s is the question and the messages so far; an action a is one agent's whole message; next(s, a) appends it.

No torch here: this file is the problem, not the model.
"""

import argparse
import hashlib
import json
import math
import random
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

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


def positive_float(text: str) -> float:
    return _float(text, low=0, open_below=True, high=math.inf)


def non_negative_float(text: str) -> float:
    return _float(text, low=0, open_below=False, high=math.inf)


def unit_float(text: str) -> float:
    return _float(text, low=0, open_below=False, high=1)


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
    """Agents in the order of the schedule. Which agent is on turn is a function of the state alone."""
    name: str
    agents: tuple[Agent, ...]

    def __post_init__(self):
        earlier = {"Q"}
        for agent in self.agents:
            if agent.name in earlier:
                raise InputError(f"graph {self.name}: two agents are called {agent.name}; each needs a name of its own")
            if not agent.sees or not set(agent.sees) <= earlier:
                raise InputError(f"graph {self.name}: {agent.name} sees {list(agent.sees)}; it must see at least one of "
                                 f"those before it: {sorted(earlier)}")
            earlier.add(agent.name)
        if not self.agents:
            raise InputError(f"graph {self.name}: it has no agents")

    @classmethod
    def from_dict(cls, fields: dict) -> "MAS":
        """The graph that a config.json records."""
        return cls(fields["name"], tuple(Agent(**{**agent, "sees": tuple(agent["sees"])}) for agent in fields["agents"]))

    def turn(self, state: State) -> Agent | None:
        """The agent on turn, or None where the state is terminal."""
        return self.agents[len(state.messages)] if len(state.messages) < len(self.agents) else None

    def is_terminal(self, state: State) -> bool:
        return self.turn(state) is None

    def step(self, state: State, text: str) -> State:
        """next(s, a): the agent on turn says `text`."""
        return State(state.question, state.messages + (Message(self.turn(state).name, text),))

    def observe(self, state: State, agent: Agent) -> list[Message]:
        """What `agent` sees: the in-edges of the graph and nothing else, each message with its sender."""
        everything = (Message("Q", state.question),) + state.messages
        return [message for message in everything if message.agent in agent.sees]

    def prompt(self, state: State) -> list[dict[str, str]]:
        """The chat that asks the agent on turn for its message (an action a ~ pi_i(. | what i observes))."""
        agent = self.turn(state)
        seen = "\n\n".join(_labelled(message) for message in self.observe(state, agent))
        return [{"role": "system", "content": agent.prompt}, {"role": "user", "content": seen}]

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


def _labelled(message: Message) -> str:
    return f"{'Question' if message.agent == 'Q' else message.agent}: {message.text}"


GRAPHS = {graph.name: graph for graph in (
    MAS("chain", (
        Agent("Reader", ("Q",), "You are the Reader. List the facts of the question that matter and say what is asked. "
                                "Do not solve it.", 256),
        Agent("Planner", ("Q", "Reader"), "You are the Planner. Propose a way to the answer. The Solver sees only your "
                                          "message, so repeat the facts it needs.", 256),
        Agent("Solver", ("Planner",), "You are the Solver. Carry out the plan step by step and check the result.", 512),
        Agent("Verifier", ("Q", "Solver"), "You are the Verifier. Compare the work with the question. "
                                           "Your last line is: Final answer: <answer>", 256),
    )),
    MAS("single", (
        Agent("Solver", ("Q",), "You solve the question step by step. Your last line is: Final answer: <answer>", 512),
    )),
)}


def load_graph(name: str) -> MAS:
    if name not in GRAPHS:
        raise InputError(f"--graph {name}: unknown; it is one of {', '.join(GRAPHS)}")
    return GRAPHS[name]


# ---------------------------------------------------------------------------------------------------------------------
# Answers: one extraction, one equality


_NUMBER = re.compile(r"""(?P<sign>[-+])?\s*[$€£]?\s*
                         (?: (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)? (?P<decimals>\.\d+)? )
                         (?: \s*/\s* (?P<denominator>\d+(?!\.?\d)) )?""", re.VERBOSE)
_FINAL = re.compile(r"(?:final\s+answer\s*(?:is)?\s*[:=]?|####)[ \t]*(?P<answer>[^\n]*)", re.IGNORECASE)
_LETTER = re.compile(r"^[:=\s]*(?:(?:option|choice|answer)\s*\(?|\()?([A-Z])(?![\w'])", re.IGNORECASE)
_ARTICLE = re.compile(r"^[:=\s]*[AI]\s+\w", re.IGNORECASE)  # "A train ..." names no option


def _plain(text: str) -> str:
    """Strip what does not carry meaning: markdown, dollar signs of LaTeX, thin spaces; write LaTeX fractions as a/b."""
    text = text.replace("−", "-").replace("–", "-").replace("\\$", "$").replace("\\%", "%").replace("\\!", "").replace("\u202f", " ")
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
    import math_verify  # sympy takes seconds to import; only symbolic answers need it
    parsed = [math_verify.parse(f"${answer}$") for answer in (a, b)]
    return math_verify.verify(*parsed) and math_verify.verify(*reversed(parsed))


# ---------------------------------------------------------------------------------------------------------------------
# Problems


@dataclass(frozen=True)
class Problem:
    id: str
    split: str       # "train", "heldout" or "test"
    question: str
    gold: str        # canonical
    kind: str        # "number", "letter" or "math"


def is_correct(problem: Problem, answer: str | None) -> bool:
    return same_answer(answer, problem.gold, problem.kind)


def question_key(question: str) -> str:
    """A short hash of the question as compared between splits: case, spacing and punctuation do not count."""
    return hashlib.blake2b(" ".join(re.findall(r"\w+", question.lower())).encode(), digest_size=8).hexdigest()


TASKS = {"tiny": "packs", "tiny-score": "score"}  # the two families of embedded problems (tiny/problems.py)
SPLITS = ("train", "heldout", "test")


def load_problems(*, task: str, data: str | None, split: str, num: int) -> list[Problem]:
    """The first `num` problems of a split. A split is fixed by problem id, never by a seed or the size of a run.

    task: an embedded family. data: a JSON-lines file (fields `question`, `answer`, optional `id`) instead of a task; its
    problems are `train` or `heldout` by a hash of their id (one in eight is held out), and all of them are `test`.
    """
    problems = _read_problems(data, split) if data else _make_problems(task, split, num)
    if len(problems) < num:
        print(f"{data or task}: {num} {split} problems were asked for, there are {len(problems)}", file=sys.stderr)
    return problems[:num]


def _make_problems(task: str, split: str, num: int) -> list[Problem]:
    if task not in TASKS:
        raise InputError(f"--task {task}: unknown; it is one of {', '.join(TASKS)} (or give --data FILE.jsonl)")
    puzzles = [tiny_problems.make_puzzle(TASKS[task], split, i) for i in range(num)]
    return [Problem(p.id, split, p.question, str(p.answer), "number") for p in puzzles]


def _read_problems(data: str, split: str) -> list[Problem]:
    rows, seen = [], set()
    for number, row in enumerate(read_jsonl(Path(data)), 1):
        where = f"{data}, line {number}"
        for field in ("question", "answer"):
            if not str(row.get(field, "")).strip():
                raise InputError(f"{where}: no `{field}`; each line needs `question` and `answer`")
        row_id = str(row.get("id", f"{Path(data).stem}-{number:06d}"))
        if row_id in seen:
            raise InputError(f"{where}: the id {row_id} occurs twice")
        seen.add(row_id)
        answer = str(row["answer"])
        rows.append((row_id, str(row["question"]), answer.rsplit("####", 1)[-1].strip()))
    kinds = [kind for kind in ("number", "letter") if all(_is_plain(gold, kind) for _, _, gold in rows)]
    kind = kinds[0] if kinds else "math"
    problems = []
    for row_id, question, answer in rows:
        gold = canonical(answer, kind)
        if gold is None:
            raise InputError(f"{data}: the answer of problem {row_id} cannot be parsed: {answer!r}")
        heldout = hashlib.blake2b(row_id.encode(), digest_size=8).digest()[0] % 8 == 0
        if split == "test" or split == ("heldout" if heldout else "train"):
            problems.append(Problem(row_id, split, question, gold, kind))
    return problems


def _is_plain(gold: str, kind: str) -> bool:
    """Whether a gold is nothing but a number (or a letter)."""
    if kind == "letter":
        return re.fullmatch(r"\(?[A-Z]\)?", gold) is not None
    return canonical(gold, "number") is not None and canonical(gold, "number") == canonical(gold, "math")


def read_jsonl(path: Path) -> list[dict]:
    """All rows of a JSON-lines file; a line that is not JSON is named."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}, line {number}: not JSON ({error.msg}); the file is torn or not JSON lines") from None
    return rows


def seeded(*parts) -> random.Random:
    """A generator of its own for each combination of parts: independent of order, batch and process."""
    return random.Random("/".join(map(str, parts)))
