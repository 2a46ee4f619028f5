"""The graph, the state, answers and problems."""

import json

import pytest

from mas import (GRAPHS, MAS, Agent, InputError, Message, State, canonical, extract_answer, is_correct, load_graph, load_problems,
                 question_key, same_answer)

TEXTS = {"Reader": "facts-of-reader", "Planner": "plan-of-planner", "Solver": "work-of-solver", "Verifier": "check-of-verifier"}


def states(mas):
    """Every state on one path, from the question to the end."""
    state = State("the-question", ())
    yield state
    while not mas.is_terminal(state):
        state = mas.step(state, TEXTS[mas.turn(state).name])
        yield state


def test_schedule_is_a_function_of_the_state(chain):
    turns = [chain.turn(state) and chain.turn(state).name for state in states(chain)]
    assert turns == ["Reader", "Planner", "Solver", "Verifier", None]


def test_a_prompt_contains_exactly_the_in_edges(chain):
    for state in states(chain):
        agent = chain.turn(state)
        if agent is None:
            continue
        system, user = chain.prompt(state)
        assert system["content"] == agent.prompt
        for name, text in {"Q": "the-question", **TEXTS}.items():
            label = "Question" if name == "Q" else name
            spoken = name == "Q" or any(m.agent == name for m in state.messages)
            assert (f"{label}: {text}" in user["content"]) == (name in agent.sees and spoken)


def test_the_solver_does_not_see_the_question(chain):
    solver = next(s for s in states(chain) if chain.turn(s) and chain.turn(s).name == "Solver")
    assert "the-question" not in str(chain.prompt(solver)) and "facts-of-reader" not in str(chain.prompt(solver))


def test_value_text_of_a_state_is_a_prefix_of_its_childrens(chain):
    rendered = [chain.value_text(state, "full") for state in states(chain)]
    for parent, child in zip(rendered, rendered[1:]):
        assert child[:len(parent)] == parent and len(child) == len(parent) + 1


def test_value_text_labels_senders_and_local_shows_what_the_speaker_saw(chain):
    after_solver = list(states(chain))[3]
    assert chain.value_text(after_solver, "full") == ("Question: the-question", "Reader: facts-of-reader", "Planner: plan-of-planner",
                                                      "Solver: work-of-solver")
    assert chain.value_text(after_solver, "local") == ("Planner: plan-of-planner", "Solver: work-of-solver")


def test_states_are_values():
    assert State("q", (Message("A", "x"),)) == State("q", (Message("A", "x"),))
    assert len({State("q", ()), State("q", ())}) == 1


@pytest.mark.parametrize("agents, complaint", [
    ((Agent("A", ("Q",), "", 1), Agent("A", ("Q",), "", 1)), "two agents are called A"),
    ((Agent("A", ("B",), "", 1), Agent("B", ("Q",), "", 1)), "A sees"),
    ((Agent("A", (), "", 1),), "A sees"),
    ((), "no agents")])
def test_graphs_that_make_no_sense_are_refused(agents, complaint):
    with pytest.raises(InputError, match=complaint):
        MAS("bad", agents)


def test_a_recorded_graph_reads_back(chain):
    from dataclasses import asdict
    assert MAS.from_dict(json.loads(json.dumps(asdict(chain)))) == chain


def test_counts_per_agent(chain):
    assert chain.per_agent("3", "C") == (3, 3, 3, 3)
    assert chain.per_agent("1.8.1.2", "C") == (1, 8, 1, 2)
    assert chain.per_agent("Planner=6,Reader=2", "C") == (2, 6, 1, 1)
    for bad in ("0", "-1", "1.2", "x", "Plumber=2", "1.0.1.1", "Reader=", ""):
        with pytest.raises(InputError, match="C"):
            chain.per_agent(bad, "C")


def test_unknown_graph_and_task_are_named():
    with pytest.raises(InputError, match="nonsense.*chain"):
        load_graph("nonsense")
    with pytest.raises(InputError, match="nonsense.*tiny"):
        load_problems(task="nonsense", data=None, split="test", num=1)


# Answers: the text of a last message, and what must be read from it.
NUMBERS = [
    ("16 − 3 = 13. Final answer: 13", "13"), ("There are 6 boxes of 7. Final answer: 42 apples", "42"),
    ("Final answer: $1,234.50", "2469/2"), ("**Final answer:** **73**", "73"), ("**Final answer**: 73.", "73"),
    ("Final answer: -3/4", "-3/4"), ("Final answer: −7 degrees", "-7"), ("Final answer: .5", "1/2"), ("Final answer: 0.50", "1/2"),
    ("Final answer: 50%", "50"), ("Final answer: 16-3=13", "13"), ("The final answer is 12.", "12"), ("#### 72", "72"),
    ("Final answer: 3\nWait. Final answer: 4", "4"), (r"so \boxed{42} it is, not 7", "42"), (r"\boxed{\frac{3}{4}}", "3/4"),
    (r"\boxed{1} then \boxed{2}", "2"), ("5 + 8 = 13", "13"), ("first 2, then 1,000", "1000"), ("the range 3-5", "5"),
    ("Final answer: 1/0", None), ("I do not know", None), ("Final answer: none", None), ("", None), ("Final answer: 7 (see step 2)", "7"),
]


@pytest.mark.parametrize("text, answer", NUMBERS)
def test_numbers_are_read_from_the_final_answer(text, answer):
    assert extract_answer(text, "number") == answer


def test_neither_of_two_numbers_will_do():
    problem = load_problems(task="tiny", data=None, split="test", num=1)[0]
    wrong = type(problem)("p", "test", "q", "16", "number")
    assert not is_correct(wrong, extract_answer("16 − 3 = 13. Final answer: 13", "number"))


MATH = [
    (r"\frac{3}{4}", "3", False), (r"2\sqrt{3}", "23", False), ("(3,4)", "(3,7)", False), ("x^2+1", "x^2-5", False),
    (r"\frac{1}{2}", r"\frac{1}{3}", False), (r"2\sqrt{3}", "2", False), (r"\frac12", "0.5", True), (r"\dfrac{1}{2}", r"\frac{1}{2}", True),
    (r"\sqrt{12}", r"2\sqrt{3}", True), ("(3, 4)", "(3,4)", True), ("x^2+1", "1+x^2", True), ("42", "42.0", True), (r"\text{42}", "42", True)]


@pytest.mark.parametrize("a, b, equal", MATH)
def test_symbolic_equality_is_right_and_symmetric(a, b, equal):
    a, b = canonical(a, "math"), canonical(b, "math")
    assert same_answer(a, b, "math") == same_answer(b, a, "math") == equal


def test_boxes_with_inner_braces_are_read_whole():
    assert extract_answer(r"thus \boxed{2\sqrt{3}}", "math") == r"2\sqrt{3}"
    assert extract_answer(r"thus \boxed{\frac{3}{4}}", "math") == "3/4"
    assert extract_answer(r"thus \boxed{\frac{3}{4}", "math") is None  # never closed


LETTERS = [("Final answer: A", "A"), ("Final answer: (b)", "B"), ("Final answer: Option E.", "E"), ("A train leaves town", None),
           ("Final answer: A train", None), ("Final answer: **C**", "C"), (r"\boxed{D}", "D"), ("**Final answer**: B", "B")]


@pytest.mark.parametrize("text, letter", LETTERS)
def test_letters_are_read_only_where_an_answer_is_given(text, letter):
    assert extract_answer(text, "letter") == letter


def test_no_answer_equals_nothing():
    assert not same_answer(None, None, "number") and not same_answer(None, "0", "number") and same_answer("0", "0", "number")


def test_splits_share_no_question_and_no_numbers():
    from tiny.problems import FAMILIES, SPLITS, make_puzzle, numbers_of, total
    for family in FAMILIES:
        told = {split: {(a, b, x + y, total(family, a, b, x, y)) for a, b, x, y in numbers_of(family, split)} for split in SPLITS}
        questions = {split: {question_key(make_puzzle(family, split, i).question) for i in range(300)} for split in SPLITS}
        for one in SPLITS:
            for other in set(SPLITS) - {one}:
                assert not questions[one] & questions[other]
                assert not told[one] & told[other] or "agents" in (one, other)   # the agents know all numbers, but other questions


def test_embedded_problems_have_one_solution_and_it_is_the_answer():
    from tiny.problems import FAMILIES, make_puzzle, total
    for family in FAMILIES:
        for i in range(50):
            p = make_puzzle(family, "test", i)
            fits = [(x, p.n - x) for x in range(p.n + 1) if total(family, p.a, p.b, x, p.n - x) == p.t]
            assert fits == [(p.x, p.y)] and p == make_puzzle(family, "test", i)
            assert f"{p.kinds[p.asked]}" in p.question.split(".")[-1]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_own_data_is_split_by_id_and_its_kind_is_found(tmp_path):
    data = write(tmp_path / "d.jsonl", [{"id": f"p{i}", "question": f"q {i}", "answer": f"reasoning #### {i:,}"} for i in range(0, 4000, 40)])
    split = {name: load_problems(task="", data=data, split=name, num=100) for name in ("train", "heldout", "test")}
    ids = {name: {p.id for p in problems} for name, problems in split.items()}
    assert not ids["train"] & ids["heldout"] and ids["train"] | ids["heldout"] == ids["test"] and 2 < len(ids["heldout"]) < 30
    assert {p.gold for p in split["test"]} == {str(i) for i in range(0, 4000, 40)} and split["test"][0].kind == "number"
    data = write(tmp_path / "e.jsonl", [{"question": "q", "answer": "E"}, {"question": "r", "answer": "A"}])
    assert [p.kind for p in load_problems(task="", data=data, split="test", num=2)] == ["letter", "letter"]


@pytest.mark.parametrize("rows, complaint", [
    ([{"question": "q"}], "line 1: no `answer`"), ([{"question": "", "answer": "1"}], "line 1: no `question`"),
    ([{"id": "a", "question": "q", "answer": "1"}] * 2, "id a occurs twice"),
    ([{"id": "a", "question": "q", "answer": "$$"}], "problem a cannot be parsed")])
def test_bad_data_is_refused_with_its_place(tmp_path, rows, complaint):
    with pytest.raises(InputError, match=complaint):
        load_problems(task="", data=write(tmp_path / "d.jsonl", rows), split="test", num=1)


def test_torn_or_missing_data_is_named(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"question": "q", "answer": "1"}\n{"quest')
    with pytest.raises(InputError, match="torn.jsonl, line 2"):
        load_problems(task="", data=str(tmp_path / "torn.jsonl"), split="test", num=1)
    with pytest.raises(InputError, match="no such file"):
        load_problems(task="", data=str(tmp_path / "none.jsonl"), split="test", num=1)


def test_all_graphs_by_name():
    assert all(load_graph(name) is graph for name, graph in GRAPHS.items())
