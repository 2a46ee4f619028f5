"""The multi-agent system: who speaks when, who sees what, and how a state is shown.

Departs from the paper: an agent may have a condition (`when`) and is skipped if it does not hold.

A multi-agent system (MAS) is agents 1..n on a directed communication graph with a fixed schedule
(paper, section 3). An edge j -> i lets agent i see agent j's message. An edge Q -> i lets it see
the question. An agent sees nothing else. A state s is the question and the messages so far. An
action a is one agent's whole message, and next(s, a) appends it.
"""

import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from support.flags import ROOT, InputError
from support.records import errors_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

# ---- Agents and states ---------------------------------------------------------------------------

QUESTION = "Q"  # the name of the question among the in-edges of an agent
QUESTION_SENDER = "Question"  # its name in what agents and V read

# Answer type -> how the last agent is asked to give its answer.
ANSWER_FORMS = {
    "number": "<number>",
    "letter": "<letter of the option>",
    "math": "\\boxed{<answer in LaTeX>}",
}


@dataclass(frozen=True)
class Agent:
    """One agent: a role of the shared language model.

    Attributes:
        sees: in-edges of the graph: "Q" for the question, or names of earlier agents.
        prompt: the system prompt. `<answer>` in it is replaced by the form of the answer.
        max_new_tokens: limit of one message, in tokens.
        when: (earlier agent, words): the agent speaks only if that agent said these words.
    """

    name: str
    sees: tuple[str, ...]
    prompt: str
    max_new_tokens: int
    when: tuple[str, str] | None = None


class Message(NamedTuple):
    """A message and its sender; QUESTION is the sender of the question."""

    agent: str
    text: str


@dataclass(frozen=True)
class State:
    """s: the question and the messages so far, in the order spoken. Immutable and hashable."""

    question: str
    messages: tuple[Message, ...]


# ---- The multi-agent system ----------------------------------------------------------------------


@dataclass(frozen=True)
class MAS:
    """Agents in the order of the schedule. Who speaks next is a function of the state alone.

    Raises InputError if the agents do not form a graph that can answer a question.
    """

    name: str
    agents: tuple[Agent, ...]

    def __post_init__(self):
        earlier = []
        always_there = {QUESTION}  # part of every transcript
        for agent in self.agents:
            when = agent.when or (None, "always")
            is_sound = (
                re.fullmatch(r"\w+", agent.name)
                and agent.name not in (QUESTION, QUESTION_SENDER, *earlier)
                and isinstance(agent.prompt, str)
                and type(agent.max_new_tokens) is int
                and agent.max_new_tokens > 0
                and isinstance(agent.sees, tuple)
                and always_there & set(agent.sees)
                and set(agent.sees) <= {QUESTION, *earlier}
                and len(when) == 2
                and when[0] in (None, *earlier)
                and normalize_words(when[1])
            )
            if not is_sound:
                raise InputError(
                    f"graph {self.name}, {agent.name!r}: an agent has a name of its own, one word, "
                    f"a `prompt`, `max_new_tokens` of at least 1, and sees Q or one that always "
                    f"speaks; it sees and awaits earlier ones only, not {agent.sees}, {agent.when}"
                )
            earlier.append(agent.name)
            if agent.when is None:
                always_there.add(agent.name)
        if not earlier:
            raise InputError(f"graph {self.name}: it has no agents")

    @classmethod
    def from_dict(cls, fields: dict) -> "MAS":
        """Make a graph from JSON or TOML, which have lists in place of tuples."""
        agents = []
        for agent in fields["agents"]:
            values = {}
            for key, value in agent.items():
                values[key] = tuple(value) if isinstance(value, list) else value
            agents.append(Agent(**values))
        return cls(fields["name"], tuple(agents))

    def counts_per_agent(self, spec: str, flag: str) -> tuple[int, ...]:
        """Read one count per agent.

        Raises InputError if there is not one count of at least 1 for each agent.

        spec: "3" for all agents, "1.8.1.1" in the order of the schedule, or "Reader=1,Planner=8",
        in which agents that are not named get 1. flag: where it comes from, for errors.
        """
        names = [agent.name for agent in self.agents]
        pairs = [pair.partition("=") for pair in spec.split(",")] if "=" in spec else []
        count_of = {name: count for name, _, count in pairs}
        texts = [count_of.get(name, "1") for name in names] if pairs else spec.split(".")
        if len(texts) == 1:
            texts *= len(names)
        counts = [int(text) for text in texts if text.isdecimal()]
        are_agents = len(pairs) == len(count_of) and count_of.keys() <= set(names)
        if not are_agents or not len(texts) == len(counts) == len(names) or min(counts) < 1:
            raise InputError(
                f"{flag} {spec}: give one whole number of at least 1, or one for each of "
                f"{', '.join(names)}, as 1.8.1.1 or Planner=8,Solver=2"
            )
        return tuple(counts)

    # -- The schedule --

    def turn_index(self, state: State) -> int | None:
        """Return the index of the agent that speaks next; None if the state is terminal."""
        names = [agent.name for agent in self.agents]
        next_index = 0
        if state.messages:
            next_index = names.index(state.messages[-1].agent) + 1
        for index in range(next_index, len(self.agents)):
            if self._may_speak(self.agents[index], state):
                return index
        return None

    def _may_speak(self, agent: Agent, state: State) -> bool:
        if agent.when is None:
            return True
        awaited_agent, awaited_words = agent.when
        said = {message.agent: message.text for message in state.messages}
        return normalize_words(awaited_words) in normalize_words(said.get(awaited_agent, ""))

    def turn(self, state: State) -> Agent | None:
        """Return the agent that speaks next; None if the state is terminal."""
        index = self.turn_index(state)
        return None if index is None else self.agents[index]

    def is_terminal(self, state: State) -> bool:
        return self.turn_index(state) is None

    def step(self, state: State, text: str) -> State:
        """Return next(s, a): the next agent says `text`."""
        message = Message(self.turn(state).name, text)
        return State(state.question, state.messages + (message,))

    # -- Who sees what --

    def observe(self, state: State, agent: Agent) -> list[Message]:
        """Return what `agent` sees: the in-edges of the graph, each message with its sender."""
        question = Message(QUESTION, state.question)
        transcript = (question, *state.messages)
        return [message for message in transcript if message.agent in agent.sees]

    def prompt(self, state: State, answer_type: str) -> list[dict[str, str]]:
        """Return the chat that asks the next agent for its message, a ~ pi_i(. | observation).

        The state must not be terminal. answer_type: "number", "letter" or "math" (ANSWER_FORMS).
        """
        agent = self.turn(state)
        role = agent.prompt.replace("<answer>", ANSWER_FORMS[answer_type])
        observation = [self._with_sender(message) for message in self.observe(state, agent)]
        return [
            {"role": "system", "content": role},
            {"role": "user", "content": "\n\n".join(observation)},
        ]

    def value_text(self, state: State, view: str) -> tuple[str, ...]:
        """Render a state for V, in training, search and evaluation alike.

        Returns segments, the newest message last. The value model ends every segment with the
        end-of-message token and reads V at the last one. Segments are tokenised one by one, so the
        prefix property below holds for token ids as well.

        Args:
            view: "full" renders the whole transcript: the segments of a state are a prefix of those
                of each of its children. "local" renders what the newest message's agent could see,
                then its message.
        """
        question = Message(QUESTION, state.question)
        shown = [question, *state.messages]
        if view == "local" and state.messages:
            [speaker] = [agent for agent in self.agents if agent.name == state.messages[-1].agent]
            shown = [*self.observe(state, speaker), state.messages[-1]]
        return tuple(self._with_sender(message) for message in shown)

    def _with_sender(self, message: Message) -> str:
        """Return a message as agents and V read it: "Solver: 5", with other senders quoted.

        A line that begins with a name (or "Output", of a program) and a colon, or holds no more, is
        marked: "> **Verifier**: 5". Case, markdown, numbers and unseen characters do not hide it.
        """
        sender = QUESTION_SENDER if message.agent == QUESTION else message.agent
        senders = [QUESTION_SENDER, "Output", *(agent.name for agent in self.agents)]
        names = "|".join(map(re.escape, senders))
        forged = re.compile(rf"[\W\d_]*(?:{names})[\W\d_]*?(?::|$)", re.IGNORECASE)
        lines = []
        for line in message.text.splitlines(keepends=True):
            seen = "".join(filter(str.isprintable, unicodedata.normalize("NFKC", line)))
            lines.append(f"> {line}" if forged.match(seen) else line)
        return f"{sender}: {''.join(lines)}"


def normalize_words(text: str) -> str:
    """Return the words of a text with a space around each: "**Check**  FAILS." -> " check fails ".

    Case, markdown and punctuation cannot hide the words of a condition.
    """
    words = re.findall(r"[^\W_]+", text.lower())
    return f" {' '.join(words)} " if words else ""


# ---- Graphs: the paper's, and from files ---------------------------------------------------------

READER = Agent(
    name="Reader",
    sees=("Q",),
    prompt="You are the Reader. List the facts of the question that matter and say what is asked. "
    "Do not solve it.",
    max_new_tokens=256,
)
PLANNER = Agent(
    name="Planner",
    sees=("Q", "Reader"),
    prompt="You are the Planner. Propose a way to the answer. The Solver sees only your message, "
    "so repeat the facts it needs.",
    max_new_tokens=256,
)
SOLVER = Agent(
    name="Solver",
    sees=("Planner",),
    prompt="You are the Solver. Carry out the plan step by step and check the result.",
    max_new_tokens=512,
)
VERIFIER = Agent(
    name="Verifier",
    sees=("Q", "Solver"),
    prompt="You are the Verifier. Compare the work with the question: say that the check holds or "
    "that the check fails. Your last line is: Final answer: <answer>",
    max_new_tokens=256,
)

# Each agent sees the message before it; all but the Solver see the question.
CHAIN = MAS("chain", (READER, PLANNER, SOLVER, VERIFIER))


def graph_names() -> list[str]:
    """Return the names of the graphs that come with this project: the files of graphs/."""
    return ["chain", *sorted(path.stem for path in (ROOT / "graphs").glob("*.toml"))]


def load_graph(name: str) -> MAS:
    """Return the paper's graph "chain", one of graphs/ by its name, or one of another TOML file.

    Raises InputError if there is no such graph, or if the file does not describe one.
    """
    if name == "chain":
        return CHAIN
    path = Path(name)
    if path.suffix != ".toml":
        path = ROOT / "graphs" / f"{name}.toml"
    with errors_name(f"--graph {name} (it is {', '.join(graph_names())}, or FILE.toml)"):
        table = tomllib.loads(path.read_text(encoding="utf-8"))
        if not table.keys() <= {"name", "agents"}:
            raise InputError(f"--graph {name}: its keys are `name`, `agents`, not {list(table)}")
        return MAS.from_dict({"name": path.stem} | table)
