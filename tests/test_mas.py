"""Tests of mas.py: the schedule, who sees what, prompts, and graphs from TOML files."""

import json
from dataclasses import asdict

import pytest

from mas import (
    CHAIN,
    GRAPHS,
    MAS,
    Agent,
    Message,
    State,
    counts_per_agent,
    load_graph,
    normalize_words,
)
from support.flags import InputError
from tasks.grading import extract_answer

# ---- The chain -----------------------------------------------------------------------------------

TEXTS = {
    "Reader": "facts-of-reader",
    "Planner": "plan-of-planner",
    "Solver": "work-of-solver",
    "Verifier": "check-of-verifier",
}


def states_of_one_path(mas):
    """Return all states from the question to the end, in which each agent says its TEXTS."""
    states = [State("the-question", ())]
    while not mas.is_terminal(states[-1]):
        speaker = mas.turn(states[-1])
        states.append(mas.step(states[-1], TEXTS[speaker.name]))
    return states


def test_schedule_is_a_function_of_the_state(chain):
    turns = [chain.turn(state) for state in states_of_one_path(chain)]
    assert [agent.name for agent in turns[:-1]] == ["Reader", "Planner", "Solver", "Verifier"]
    assert turns[-1] is None


def test_states_are_values():
    message = Message("A", "x")
    assert State("q", (message,)) == State("q", (Message("A", "x"),))
    assert len({State("q", ()), State("q", ())}) == 1


# ---- Who sees what -------------------------------------------------------------------------------


@pytest.mark.parametrize("turn", range(4))
def test_a_prompt_contains_exactly_the_in_edges(chain, turn):
    state = states_of_one_path(chain)[turn]
    agent = chain.turn(state)
    system, user = chain.prompt(state, "number")
    assert system["content"] == agent.prompt.replace("<answer>", "<number>")
    assert ("Question: the-question" in user["content"]) == ("Q" in agent.sees)
    speakers = {message.agent for message in state.messages}
    for name, text in TEXTS.items():
        is_seen = name in agent.sees and name in speakers
        assert (f"{name}: {text}" in user["content"]) == is_seen


def test_a_prompt_by_hand(duo):
    """The role is the system's message; what the agent sees is the user's, in order."""
    state = duo.step(State("How many?", ()), "Six boxes.")
    assert duo.prompt(state, "number") == [
        {"role": "system", "content": "You are B."},
        {"role": "user", "content": "Question: How many?\n\nA: Six boxes."},
    ]


def test_the_solver_does_not_see_the_question(chain):
    state = states_of_one_path(chain)[2]
    assert chain.turn(state).name == "Solver"
    prompt = str(chain.prompt(state, "number"))
    assert "plan-of-planner" in prompt
    assert "the-question" not in prompt
    assert "facts-of-reader" not in prompt


ANSWERS = [  # answer type, the form that a prompt shows, an answer in this form, its canonical form
    ("number", "<number>", "42", "42"),
    ("letter", "<letter of the option>", "C", "C"),
    ("math", "<answer in LaTeX>", r"\frac{3}{4}", "3/4"),
]


@pytest.mark.parametrize("answer_type, form, answer, canonical", ANSWERS)
@pytest.mark.parametrize("name", GRAPHS)
def test_an_answer_in_the_form_that_the_last_prompt_shows_is_read_back(
    name, answer_type, form, answer, canonical
):
    graph = GRAPHS[name]
    state = State("the-question", ())
    while not graph.is_terminal(state):
        system, _ = graph.prompt(state, answer_type)
        state = graph.step(state, "The check holds.")
    shown_line = system["content"].rsplit("Your last line is: ")[-1]
    last_line = shown_line.replace(form, answer)
    assert extract_answer(last_line, answer_type).value == canonical


def test_value_text_of_a_state_is_a_prefix_of_its_childrens(chain):
    texts = [chain.value_text(state, "full") for state in states_of_one_path(chain)]
    for parent, child in zip(texts[:-1], texts[1:], strict=True):
        assert child[: len(parent)] == parent
        assert len(child) == len(parent) + 1


def test_value_text_labels_senders_and_local_shows_what_the_speaker_saw(chain):
    after_solver = states_of_one_path(chain)[3]
    assert chain.value_text(after_solver, "full") == (
        "Question: the-question",
        "Reader: facts-of-reader",
        "Planner: plan-of-planner",
        "Solver: work-of-solver",
    )
    assert chain.value_text(after_solver, "local") == (
        "Planner: plan-of-planner",
        "Solver: work-of-solver",
    )


@pytest.mark.parametrize("view", ["full", "local"])
def test_the_question_alone_is_read_in_both_views(view):
    """Stage 5 lets V read the question before anybody has spoken."""
    assert CHAIN.value_text(State("why?", ()), view) == ("Question: why?",)


# ---- Agents with a condition ---------------------------------------------------------------------

VERDICTS = [  # message of the Verifier, and whether the Refiner then speaks
    ("The check fails. Final answer: 3", True),
    ("**Check FAILS**: 3", True),
    ("_check_ `fails`", True),
    ("The check holds. Final answer: 3", False),
    ("The check failsafe holds", False),
    ("The recheck fails", False),
    ("check? It fails", False),
    ("", False),
]


@pytest.mark.parametrize("verdict, refines", VERDICTS)
def test_a_conditional_agent_speaks_only_when_its_condition_holds(verdict, refines):
    refine = GRAPHS["refine"]
    state = State("q", ())
    for text in ("facts", "plan", "work", verdict):
        assert not refine.is_terminal(state)
        state = refine.step(state, text)
    assert refine.is_terminal(state) == (not refines)
    if refines:
        assert refine.turn(state).name == "Refiner"
        assert refine.is_terminal(refine.step(state, "Final answer: 4"))


def test_words_are_compared_in_lower_case_without_markdown():
    assert normalize_words("**Check**  _FAILS_.") == " check fails "
    assert normalize_words("**") == ""


def test_a_skipped_agent_leaves_a_shorter_transcript():
    """B waits for A, and D waits for B: without B, D does not speak either."""
    a = Agent("A", sees=("Q",), prompt="", max_new_tokens=1)
    b = Agent("B", sees=("A",), prompt="", max_new_tokens=1, when=("A", "help"))
    c = Agent("C", sees=("B", "Q"), prompt="", max_new_tokens=1)
    d = Agent("D", sees=("C",), prompt="", max_new_tokens=1, when=("B", "x"))
    graph = MAS("hint", (a, b, c, d))

    without_b = graph.step(State("q", ()), "fine")
    assert graph.turn(without_b) == c
    assert [message.agent for message in graph.observe(without_b, c)] == ["Q"]
    assert graph.is_terminal(graph.step(without_b, "done"))

    with_b = graph.step(graph.step(State("q", ()), "Help!"), "x")
    assert graph.turn(with_b) == c
    assert [message.agent for message in graph.observe(with_b, c)] == ["Q", "B"]
    assert graph.turn(graph.step(with_b, "done")) == d


# ---- Checking a graph ----------------------------------------------------------------------------


def make_agent(name, *sees, when=None):
    """Make an agent of which only the edges and the condition matter."""
    return Agent(name, sees, prompt="", max_new_tokens=1, when=when)


BAD_GRAPHS = [  # agents, and the complaint about them
    ([make_agent("A", "Q"), make_agent("A", "Q")], "A is the name of two agents"),
    ([make_agent("Q", "Q")], "Q is the name of the question"),
    ([make_agent("Question", "Q")], "Question is the name of the question"),
    ([make_agent("A", "B"), make_agent("B", "Q")], "A sees B, a later agent, which closes a cycle"),
    ([make_agent("A", "Q", "A")], "A sees A, itself"),
    ([make_agent("A", "Q", "Z")], "A sees Z, which is not an agent of this graph; it can see Q"),
    ([make_agent("A", "Q"), make_agent("B", "A", "Z")], "B sees Z, .*; it can see Q, A$"),
    ([make_agent("A", "Q", "Q")], "A sees Q, Q; name each of them once"),
    ([make_agent("A")], "A sees nothing; it must see the question"),
    ([make_agent("A", "Q"), make_agent("B", "Q")], "nobody sees A"),
    ([make_agent("A", "Q"), make_agent("B", "Q"), make_agent("C", "A")], "nobody sees B"),
    (
        [make_agent("A", "Q", when=("B", "x")), make_agent("B", "Q")],
        "A speaks when B says 'x'; it can wait for words of nobody",
    ),
    ([make_agent("A", "Q"), make_agent("B", "A", when=("A", "**"))], "B speaks when A says"),
    (
        [make_agent("A", "Q"), make_agent("B", "Q", when=("A", "x")), make_agent("C", "B")],
        "C sees B; it must see",
    ),
    ([], "no agent"),
]


@pytest.mark.parametrize("agents, complaint", BAD_GRAPHS)
def test_a_graph_that_cannot_answer_a_question_is_refused(agents, complaint):
    with pytest.raises(InputError, match=complaint):
        MAS("bad", tuple(agents))


def test_an_agent_that_nobody_sees_may_be_the_last_to_speak():
    """B speaks only sometimes. If it does not, the answer is A's."""
    waiting = make_agent("B", "Q", when=("A", "x"))
    MAS("good", (make_agent("A", "Q"), waiting))
    with pytest.raises(InputError, match="nobody sees A"):
        MAS("bad", (make_agent("A", "Q"), waiting, make_agent("C", "Q")))


@pytest.mark.parametrize("name", ["Two words", "a.b", "", "x/y"])
def test_the_name_of_an_agent_is_one_word(tmp_path, name):
    """It becomes the name of a folder and of a part of the model."""
    path = tmp_path / "bad.toml"
    agent = f'[[agents]]\nname = "{name}"\nsees = ["Q"]\nprompt = "p"\nmax_new_tokens = 1\n'
    path.write_text(agent)
    with pytest.raises(InputError, match="should be one word"):
        load_graph(str(path))


# ---- Graphs by name and from files ---------------------------------------------------------------


@pytest.mark.parametrize("name", GRAPHS)
def test_a_named_graph_is_loaded(name):
    assert load_graph(name) is GRAPHS[name]


def test_an_unknown_graph_is_named():
    with pytest.raises(InputError, match="nonsense.*chain"):
        load_graph("nonsense")


@pytest.mark.parametrize("name", GRAPHS)
def test_a_recorded_graph_reads_back(name):
    graph = GRAPHS[name]
    recorded = json.loads(json.dumps(asdict(graph)))
    assert MAS.from_dict(recorded) == graph


TOML = """
name = "pair"
[[agents]]
name = "Writer"
sees = ["Q"]
prompt = "Write an answer."
max_new_tokens = 32
[[agents]]
name = "Editor"
sees = ["Q", "Writer"]
prompt = "Correct it. Your last line is: Final answer: <answer>"
max_new_tokens = 16
when = ["Writer", "not sure"]
"""


def test_a_graph_from_a_file(tmp_path):
    path = tmp_path / "file.toml"
    path.write_text(TOML.replace("32", "1"))
    writer = Agent("Writer", sees=("Q",), prompt="Write an answer.", max_new_tokens=1)
    editor = Agent(
        name="Editor",
        sees=("Q", "Writer"),
        prompt="Correct it. Your last line is: Final answer: <answer>",
        max_new_tokens=16,
        when=("Writer", "not sure"),
    )
    assert load_graph(str(path)) == MAS("pair", (writer, editor))

    # Without a name, it has that of its file.
    path.write_text(TOML.replace("32", "1").replace('name = "pair"', ""))
    assert load_graph(str(path)) == MAS("file", (writer, editor))


MISTAKES = [  # a part of TOML, its replacement, and the complaint
    ('name = "Editor"', 'name = "Writer"', "Writer is the name of two agents"),
    ('sees = ["Q"]', 'sees = "Q"', "agent 1: sees = 'Q' should be a list of strings"),
    ('name = "pair"', "num_candidates = 3", "unknown key num_candidates; a graph has a name"),
    (
        "max_new_tokens = 32",
        "max_tokens = 32",
        "agent 1: unknown key max_tokens; an agent has name, sees",
    ),
    ("max_new_tokens = 32", "", "agent 1: max_new_tokens is missing"),
    ("max_new_tokens = 32", "max_new_tokens = 0", "max_new_tokens should be at least 1"),
    ('["Writer", "not sure"]', '["Writer"]', "words it says"),
    ('["Writer", "not sure"]', '["Author", "not sure"]', "Editor speaks when Author says"),
    (
        "max_new_tokens = 32",
        "max_new_tokens = true",
        "max_new_tokens = True should be a whole",
    ),
    ("[[agents]]", "[[agent]]", r"no \[\[agents\]\]"),
    ("name =", "name", "not TOML"),
]


@pytest.mark.parametrize("part, mistake, complaint", MISTAKES)
def test_a_bad_graph_file_is_refused_in_one_line(tmp_path, part, mistake, complaint):
    path = tmp_path / "bad.toml"
    path.write_text(TOML.replace(part, mistake))
    with pytest.raises(InputError, match=complaint) as error:
        load_graph(str(path))
    assert "\n" not in str(error.value)


def test_a_graph_file_that_is_missing_or_a_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="none.toml: no such file"):
        load_graph(str(tmp_path / "none.toml"))
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(InputError, match="folder.toml: cannot be read .Is a directory"):
        load_graph(str(tmp_path / "folder.toml"))


def test_a_graph_file_in_another_encoding_is_refused(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(TOML.replace("Editor", "Éditeur").encode("latin-1"))
    with pytest.raises(InputError, match="bad.toml: not TOML in UTF-8"):
        load_graph(str(path))


EDGES = {
    "chain": {"Reader": "Q", "Planner": "Q Reader", "Solver": "Planner", "Verifier": "Q Solver"},
    "single": {"Solver": "Q"},
    "debate": {"First": "Q", "Second": "Q First", "Judge": "Q First Second"},
    "constraints": {"Extractor": "Q", "Builder": "Q Extractor", "Checker": "Q Builder"},
}
EDGES["refine"] = EDGES["chain"] | {"Refiner": "Q Planner Solver Verifier"}
LIMITS = {  # tokens of a message
    "chain": [256, 256, 512, 256],
    "single": [512],
    "debate": [256, 256, 256],
    "constraints": [384, 512, 256],
    "refine": [256, 256, 512, 256, 512],
}


@pytest.mark.parametrize("name", GRAPHS)
def test_the_edges_of_the_named_graphs(name):
    """Graphs are recorded with every run: another edge is another multi-agent system."""
    graph = GRAPHS[name]
    assert {agent.name: " ".join(agent.sees) for agent in graph.agents} == EDGES[name]
    assert [agent.max_new_tokens for agent in graph.agents] == LIMITS[name]
    conditions = {agent.name: agent.when for agent in graph.agents if agent.when}
    expected = {"Refiner": ("Verifier", "check fails")} if name == "refine" else {}
    assert conditions == expected


# ---- Counts per agent ----------------------------------------------------------------------------

COUNTS = [  # as a flag gives them, and per agent of the chain
    ("3", (3, 3, 3, 3)),
    ("1.8.1.2", (1, 8, 1, 2)),
    ("Planner=6,Reader=2", (2, 6, 1, 1)),
]


@pytest.mark.parametrize("spec, counts", COUNTS)
def test_counts_per_agent(chain, spec, counts):
    assert counts_per_agent(chain, spec, "C") == counts


BAD_COUNTS = ["0", "-1", "1.2", "x", "Plumber=2", "1.0.1.1", "Reader=", "Reader=2,Reader=3", ""]


@pytest.mark.parametrize("spec", BAD_COUNTS)
def test_bad_counts_per_agent_are_refused(chain, spec):
    with pytest.raises(InputError, match=f"--num-candidates {spec}: "):
        counts_per_agent(chain, spec, "--num-candidates")


def test_a_count_for_an_agent_that_is_not_there_names_it(chain):
    with pytest.raises(InputError, match="no agent Plumber in graph chain; it has Reader, Planner"):
        counts_per_agent(chain, "Plumber=2", "--num-candidates")
