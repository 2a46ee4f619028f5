"""The graph, the state, answers and problems."""

import json

import pytest

from mas import (GRAPHS, MAS, TASKS, Agent, InputError, Message, State, canonical, extract_answer, is_correct, load_graph, load_problems,
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
        system, user = chain.prompt(state, "number")
        assert system["content"] == agent.prompt.replace("<answer>", "<number>")
        for name, text in {"Q": "the-question", **TEXTS}.items():
            label = "Question" if name == "Q" else name
            spoken = name == "Q" or any(m.agent == name for m in state.messages)
            assert (f"{label}: {text}" in user["content"]) == (name in agent.sees and spoken)


def test_the_solver_does_not_see_the_question(chain):
    solver = next(s for s in states(chain) if chain.turn(s) and chain.turn(s).name == "Solver")
    shown = str(chain.prompt(solver, "number"))
    assert "plan-of-planner" in shown and "the-question" not in shown and "facts-of-reader" not in shown


@pytest.mark.parametrize("name", GRAPHS)
def test_the_last_agents_prompt_asks_for_the_form_that_is_read(name):
    """For every kind of answer: an answer given in the form that the prompt shows is read back."""
    graph, samples = GRAPHS[name], {"number": ("<number>", "42", "42"), "letter": ("<letter of the option>", "C", "C"),
                                    "math": ("<answer in LaTeX>", r"\frac{3}{4}", "3/4")}
    for kind, (form, said, read) in samples.items():
        state = State("the-question", ())
        while not graph.is_terminal(state):
            system = graph.prompt(state, kind)[0]["content"]
            state = graph.step(state, "The check holds.")
        assert extract_answer(system.rsplit("Your last line is: ")[-1].replace(form, said), kind) == read


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
    ((Agent("A", ("Q",), "", 1), Agent("A", ("Q",), "", 1)), "A is the name of two agents"),
    ((Agent("Q", ("Q",), "", 1),), "Q is the name of the question"),
    ((Agent("A", ("B",), "", 1), Agent("B", ("Q",), "", 1)), "A sees B, a later agent, which closes a cycle"),
    ((Agent("A", ("Q", "A"), "", 1),), "A sees A, itself"),
    ((Agent("A", ("Q", "Z"), "", 1),), "A sees Z, nobody of this graph; it can see Q"),
    ((Agent("A", ("Q", "Q"), "", 1),), "A sees Q, Q; name each of them once"),
    ((Agent("A", (), "", 1),), "A sees nothing; it must see the question"),
    ((Agent("A", ("Q",), "", 1), Agent("B", ("Q",), "", 1)), "nobody sees A"),
    ((Agent("A", ("Q",), "", 1, ("B", "x")), Agent("B", ("Q",), "", 1)), "A speaks when B says 'x'; it can wait for words of nobody"),
    ((Agent("A", ("Q",), "", 1), Agent("B", ("A",), "", 1, ("A", "**"))), "B speaks when A says"),
    ((Agent("A", ("Q",), "", 1), Agent("B", ("Q",), "", 1, ("A", "x")), Agent("C", ("B",), "", 1)), "C sees B; it must see"),
    ((), "no agent")])
def test_graphs_that_make_no_sense_are_refused(agents, complaint):
    with pytest.raises(InputError, match=complaint):
        MAS("bad", agents)


@pytest.mark.parametrize("name", GRAPHS)
def test_a_recorded_graph_reads_back(name):
    from dataclasses import asdict
    assert MAS.from_dict(json.loads(json.dumps(asdict(GRAPHS[name])))) == GRAPHS[name]


@pytest.mark.parametrize("verdict, refines", [
    ("The check fails. Final answer: 3", True), ("**Check FAILS**: 3", True), ("_check_ `fails`", True), ("The check holds. Final answer: 3", False),
    ("The check failsafe holds", False), ("The recheck fails", False), ("check? It fails", False), ("", False)])
def test_a_conditional_agent_speaks_only_when_its_condition_holds(verdict, refines):
    refine, state = GRAPHS["refine"], State("q", ())
    for text in ("facts", "plan", "work", verdict):
        assert not refine.is_terminal(state)
        state = refine.step(state, text)
    assert refine.is_terminal(state) == (not refines)
    if refines:
        assert refine.turn(state).name == "Refiner" and refine.is_terminal(refine.step(state, "Final answer: 4"))


def test_an_agent_passed_over_in_the_middle_leaves_a_shorter_transcript():
    graph = MAS("hint", (Agent("A", ("Q",), "", 1), Agent("B", ("A",), "", 1, ("A", "help")), Agent("C", ("B", "Q"), "", 1), Agent("D", ("C",), "", 1, ("B", "x"))))
    alone = graph.step(State("q", ()), "fine")
    assert graph.turn(alone).name == "C" and [m.agent for m in graph.observe(alone, graph.agents[2])] == ["Q"]
    assert graph.is_terminal(graph.step(alone, "done"))         # B did not speak, so D's condition does not hold
    helped = graph.step(graph.step(State("q", ()), "Help!"), "x")
    assert [m.agent for m in graph.observe(helped, graph.turn(helped))] == ["Q", "B"]
    assert graph.turn(graph.step(helped, "done")).name == "D"


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
prompt = "Mend it. Your last line is: Final answer: <answer>"
max_new_tokens = 16
when = ["Writer", "not sure"]
"""


def test_a_graph_from_a_file(tmp_path):
    (tmp_path / "pair.toml").write_text(TOML)
    graph = load_graph(str(tmp_path / "pair.toml"))
    assert graph == MAS("pair", (Agent("Writer", ("Q",), "Write an answer.", 32),
                                 Agent("Editor", ("Q", "Writer"), "Mend it. Your last line is: Final answer: <answer>", 16, ("Writer", "not sure"))))


@pytest.mark.parametrize("old, new, complaint", [
    ('name = "Editor"', 'name = "Writer"', "Writer is the name of two agents"), ('sees = ["Q"]', 'sees = "Q"', "agent 1: sees = 'Q' should be a list of strings"),
    ("max_new_tokens = 32", "max_tokens = 32", "agent 1: unknown key max_tokens; an agent has name, sees"), ("max_new_tokens = 32", "", "agent 1: max_new_tokens is missing"),
    ("max_new_tokens = 32", "max_new_tokens = 0", "max_new_tokens at least 1"), ('["Writer", "not sure"]', '["Writer"]', "words it says"),
    ('["Writer", "not sure"]', '["Author", "not sure"]', "Editor speaks when Author says"), ("[[agents]]", "[[agent]]", "no \\[\\[agents\\]\\]"), ("name =", "name", "not TOML")])
def test_a_bad_graph_file_is_refused_in_one_line(tmp_path, old, new, complaint):
    (tmp_path / "bad.toml").write_text(TOML.replace(old, new))
    with pytest.raises(InputError, match=complaint) as error:
        load_graph(str(tmp_path / "bad.toml"))
    assert "\n" not in str(error.value)


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
    ("Final answer: 1 3/4 cups", "7/4"), (r"\boxed{1\frac{3}{4}}", "7/4"), ("Final answer: 10 / 4", "5/2"), ("the years 1990 1991", "1991"), ("Final answer: -1 1/2", "-3/2"),
    ("Final answer:\n18", "18"), ("**Final Answer:**\n\n**12**", "12"), ("The final answer is:\n\n$12$", "12"), ("### Final Answer\n7", "7"), ("Final answer - 12", "12"),
    ("**Final Answer**\n\nThe answer is 18.", "18"), ("Final answer: 12\nThe Solver's final answer is correct.", "12"), ("Final answer: 12\n\nThis is the final answer.", "12"),
    ("Let's find the final answer.\n\nTotal = 5 + 7 = 12", "12"), ("#### Step 1\n5 + 7\n#### Step 2\n5+7=12\nSo she has 12 apples.", "12"), ("#### $1,200 per year", "1200"),
    ("The answer is -6.", "-6"), ("She is left with **-6** dollars", "-6"), ("Final answer: The temperature is -10", "-10"), ("x-3", "3"), ("f(2) - 3", "3"),
    ("Final answer: 5 or 6", None), ("Final answer: Between 5 and 6", None), ("Final answer: 5, 6", None), ("Final answer: 2^3", None), (r"\boxed{2 \times 3}", None),
    ("Final answer: 12 hours (= 0.5 days)", "12"), ("Final answer: 12 dollars (1 dollar = 100 cents)", "12"), ("Final answer: 5 = 2 + 3", "5"), (r"\boxed{12=5+7}", "12"),
    ("Final answer: In 4 weeks she earns $12.", "12"), ("Final answer: Total for 2 people: $17", "17"), (r"\boxed{1\,234}", "1234"), (r"\boxed{\frac{1,000}{3}}", "1000/3"),
    ("Final answer: $1.45 million", "1450000"), ("Final answer: minus 3", "-3"), ("Final answer: 3½", "7/2"), ("Final answer: 3 and 1/2", "7/2"), (r"\boxed 7", "7"), (r"\boxed {12}", "12"),
    (r"\boxed{}" "\nFinal answer: 12", "12"), ("Final answer: " + "1" * 5000, None), ("Final answer: 1,23,456", "123456"), ("Total: 3*4 and 2*15", "15"),
]


@pytest.mark.parametrize("text, answer", NUMBERS)
def test_numbers_are_read_from_the_final_answer(text, answer):
    assert extract_answer(text, "number") == answer


def test_neither_of_two_numbers_will_do():
    problem = load_problems(task="tiny", data=None, split="test", num=1)[0]
    wrong = type(problem)("p", "test", "q", "16", "number")
    assert not is_correct(wrong, extract_answer("16 − 3 = 13. Final answer: 13", "number"))


MATH = [  # two answers as agents and data sets write them, and whether they are equal
    (r"\frac{3}{4}", "3", False), (r"2\sqrt{3}", "23", False), ("(3,4)", "(3,7)", False), ("x^2+1", "x^2-5", False), (r"\frac{1}{2}", r"\frac{1}{3}", False),
    (r"2\sqrt{3}", "2", False), (r"\frac12", "0.5", True), (r"\dfrac{1}{2}", r"\frac{1}{2}", True), (r"\sqrt{12}", r"2\sqrt{3}", True), ("(3, 4)", "(3,4)", True),
    ("x^2+1", "1+x^2", True), ("42", "42.0", True), (r"\text{42}", "42", True), ("(3,4)", "(4,3)", False), ("[3,4]", "(3,4)", False), (r"\left[3,4\right)", "[3,4)", True),
    (r"\{1,2\}", r"\{2,1\}", True), (r"\{1,2\}", r"\{1,3\}", False), ("1,2", "2,1", True), ("1,2", "1,3", False), ("1,234", "1234", True), (r"1{,}234", "1234", True),
    (r"1\!,234", "1234", True), ("12%", "12", True), (r"12\%", "12", True), ("$12", "12", True), (r"\$12", "12", True), (r"90^\circ", "90", True), (r"90^\circ", "91", False),
    (r"15\mbox{ cm}^2", "15", True), (r"15\mbox{ cm}^2", r"15\mbox{ cm}^3", False), (r"15\text{ cm}^2", r"15 \text{ cm}^2", True), (r"5\text{ square feet}", r"5\text{ feet}", False),
    (r"\pi", "3.14", False), (r"\pi", r"\pi", True), (r"\frac{\pi}{2}", r"\pi/2", True), (r"\frac{\pi}{2}", r"\frac{\pi}{3}", False), ("x=5", "5", True), ("x=5", "6", False),
    ("y=2x+3", "y=3x+2", False), ("y=2x+3", "y=3+2x", True), (r"\text{east}", "East", True), (r"\text{east}", "seat", False), (r"\text{Evelyn}", "Evelyn", True),
    (r"\text{even}", "odd", False), (r"\text{(B)}", "(B)", True), (r"\text{(B)}", "(C)", False), ("2^3", "8", True), ("2^3", "9", False), ("x^{2}", "x^{3}", False), ("x^2", "x^{2}", True),
    ("3x", "x3", True), ("ab", "ba", True), ("a-b", "b-a", False), ("-3", "3", False), ("−3", "-3", True), (r"-\frac{1}{2}", r"\frac{-1}{2}", True), (r"-\frac{1}{2}", r"\frac{1}{2}", False),
    (r"\frac{2}{4}", r"\frac{1}{2}", True), ("0.333333", r"\frac{1}{3}", False), ("0.25", r"\frac{1}{4}", True), (r"1\frac{1}{2}", r"\frac{3}{2}", True), (r"\sqrt{2}", "1.41", False),
    (r"\sqrt[3]{8}", "2", True), (r"\sqrt[3]{2}", r"\sqrt{2}", False), (r"\log 2", r"\log 3", False), (r"5!", "120", True), (r"\infty", r"-\infty", False), (r"(-\infty, 3]", "(-\\infty,3]", True),
    (r"(-\infty, 3]", r"(-\infty, 3)", False), (r"3+4i", "4i+3", True), ("3+4i", "3-4i", False), (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}", True),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False), ("2:3", "3:2", False), ("10^{3}", "1000", True), ("1.5e3", "1500", False), ("7,8", "78", False),
    # rows of a matrix are not spaces
    (r"\begin{pmatrix} -2 \\ -14 \\ -7 \end{pmatrix}", r"\begin{pmatrix} -14 \\ -2 \\ -7 \end{pmatrix}", False), (r"\begin{pmatrix} -7 \\ 16 \end{pmatrix}", r"\begin{pmatrix}-7\\16\end{pmatrix}", True),
    (r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}", r"\begin{pmatrix} -1 & 5 \\ 0 & -1 \end{pmatrix}", False), (r"\begin{pmatrix} -7 \\ 16 \end{pmatrix}", r"\begin{pmatrix} -7 \\[4pt] 16 \end{pmatrix}", True),
    (r"\begin{pmatrix} 1/5 \\ -18/5 \end{pmatrix}", r"\begin{pmatrix}\frac15\\-\frac{18}{5}\end{pmatrix}", True),
    # words behind a number are no variables, but areas are no lengths
    ("36", r"36\text{ dollars}", True), ("36", r"35\text{ dollars}", False), (r"\$18.90", r"18.90 \text{ dollars}", True), ("58,500", r"58,500\text{ people}", True), ("36", "36 dollars", True),
    (r"12\pi", r"12\pi \text{ cm}^2", True), (r"15\mbox{ cm}^2", r"15\text{ cm}^2", True), (r"15\mbox{ cm}^2", r"15 \text{ square centimeters}", True), (r"15\text{ m}^2", r"15\text{ m}", False),
    (r"864 \mbox{ inches}^2", r"864 \text{ in}^2", True), (r"9:30\text{ p.m.}", r"9:30\text{ a.m.}", False), (r"9:30\text{ p.m.}", r"9:30 \text{ p.m.}", True), ("5", "5x", False),
    # a fraction before a factor
    (r"\frac{\pi}{2}", r"\frac{1}{2}\pi", True), (r"\frac12\pi", r"\frac{1}{2\pi}", False), (r"\frac{3\sqrt3}{4}", r"\frac{3}{4}\sqrt3", True), (r"\frac{x+1}{2}", r"\frac12(x+1)", True),
    (r"-\frac12x+3", r"3-\frac{1}{2x}", False), ("1", r"2^\frac{1}{2}", False), (r"\sqrt2", r"2^\frac{1}{2}", True), (r"y=\frac12x+1", r"y=\frac x2+1", True),
    # subscripts and stars are no markdown
    ("52_8", "528", False), ("52_8", "52_{8}", True), ("52_8", "52_9", False), ("4210_{5}", "4210_5", True), ("a_1", "a1", False), ("23", "2*3", False), ("2xy", "2*x*y", True), ("**x^2**", "x^2", True),
    (r"\log_2 3", r"\frac{\ln 3}{\ln 2}", True),
    # thousands, units of degrees, scientific and repeating numbers
    (r"11,\! 111,\! 100", "11,111,100", True), (r"10\,080", "10080", True), (r"\frac{448}{15,625}", r"\frac{448}{15625}", True), ("145°", r"145^\circ", True), (r"145\degree", r"145^\circ", True),
    (".0000672", r"6.72 \times 10^{-5}", True), (r"0.\overline{36}", r"\frac{4}{11}", True), (r"0.\overline{36}", r"\frac{4}{10}", False),
    # relations, equations, sets
    (r"x\in[-2,7]", r"-2 \le x \le 7", True), ("(3,4]", r"3<x\le4", True), ("(3,4]", "3<x<4", False), ("5", "f(2)=5", True), ("5", "f(5)=2", False), ("4", "x=3, y=4", False),
    (r"\{1,2\}", "(1,2)", False), (r"\{(1,1),(2,2)\}", "(1,1),(2,2)", True), (r"\emptyset", r"\varnothing", True), (r"\frac{3}{56}", r"\frac{3}{56} \approx 0.0536", True),
    # letters, words, i
    ("3r^2", "3R^2", False), (r"\text{No}", "no", True), (r"\textbf{Evelyn}", r"\mbox{Evelyn}", True), (r"\text{(C)}", r"\text{(C) hyperbola}", True), (r"\text{(C)}", r"\text{(D) circle}", False),
    (r"\text{Friday, June 5}", "Friday, June 5", True), (r"\text{Friday, June 5}", "Friday, June 6", False), (r"\frac32 i", r"\frac{3i}{2}", True), ("2i", r"2\mathrm{i}", True), ("2i", "-2i", False), ("2i", "2", False)]


@pytest.mark.parametrize("a, b, equal", MATH)
def test_symbolic_equality_is_right_and_symmetric(a, b, equal):
    a, b = canonical(a, "math"), canonical(b, "math")
    assert same_answer(a, b, "math") == same_answer(b, a, "math") == equal


def test_a_comparison_that_takes_forever_is_given_up_and_counted(monkeypatch, capsys):
    from mas import _Sympy
    slow = _Sympy()
    monkeypatch.setattr(_Sympy, "SECONDS", 1.0)
    monkeypatch.setattr(_Sympy, "PROGRAM", "import time; print('ready', flush=True); input(); time.sleep(60)")
    assert not slow.equal("x", "y") and slow.timeouts == 1 and "took more than 1 s; counted as unequal" in capsys.readouterr().err
    monkeypatch.undo()
    assert slow.equal("x+y", "y+x")   # a fresh process answers the next one
    slow.process.kill()


def test_symbolic_answers_are_compared_from_any_thread():
    from threading import Thread
    found = []
    thread = Thread(target=lambda: found.append(same_answer("x+1", "1+x", "math")))
    thread.start()
    thread.join(30)
    assert found == [True]


def test_boxes_with_inner_braces_are_read_whole():
    assert extract_answer(r"thus \boxed{2\sqrt{3}}", "math") == r"2\sqrt{3}"
    assert extract_answer(r"thus \boxed{\frac{3}{4}}", "math") == "3/4"
    assert extract_answer(r"thus \boxed{\frac{3}{4}", "math") is None  # never closed


LETTERS = [("Final answer: A", "A"), ("Final answer: (b)", "B"), ("Final answer: Option E.", "E"), ("A train leaves town", None),
           ("Final answer: A train", None), ("Final answer: **C**", "C"), (r"\boxed{D}", "D"), ("**Final answer**: B", "B"),
           ("Final answer: A is correct", "A"), ("Final answer: **A** because it follows", "A"), ("Final answer: a train", None), ("Final answer: I would say so", None),
           ("Final answer: $C$", "C"), (r"\boxed{\text{(C)}}", "C"), (r"\boxed{\textrm{B}}", "B"), (r"Final answer: $\mathrm{D}$", "D"), ("Final answer: [C]", "C"), ('Final answer: "C"', "C"),
           ("Final answer: <C>", "C"), ("Final answer: The correct answer is C", "C"), ("Final answer: The correct option is (C).", "C"), ("Final Answer: The final answer is $C$. I hope it is correct.", "C"),
           ("Final answer: Answer: C", "C"), ("Final Answer:\nC", "C"), ("### Final Answer\nC", "C"), ("Final answer: C\n\n#### Explanation\nB is wrong.", "C"), ("Final answer - C", "C"),
           ("Final answer: C or D", None), ("Final answer: C/D", None), ("Final answer: Option C and Option D", None), (r"\boxed{A, B}", None), ("Final answer: C) Paris", "C"),
           ("Final answer: N/A", None), ("Final answer: e.g. dogs", None), ("Final answer: U.S. law", None), ("Final answer: T-shirt", None), ("Final answer: x = 3", None),
           ("Final answer: I’m not sure", None), ("Final answer: None of these", None), ("Final answer: (J)", "J"), ("#### C", "C"), ("#### Step B", None)]


@pytest.mark.parametrize("text, letter", LETTERS)
def test_letters_are_read_only_where_an_answer_is_given(text, letter):
    assert extract_answer(text, "letter") == letter


@pytest.mark.parametrize("text, answer", [
    (r"Final answer: the length is $2\sqrt{3}$.", r"2\sqrt{3}"), (r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct.", "1/2"),
    ("Final answer:\n$$x+1$$", "x+1"), ("**Final answer:** $x+1$", "x+1"), (r"Final answer: \(x+1\)", "x+1"), ("#### Explanation", None), ("Final answer: x+1\nMy final answer is right.", "x+1")])
def test_formulas_are_read_from_the_final_answer(text, answer):
    assert extract_answer(text, "math") == answer


def test_an_option_is_given_by_letter_index_or_text(tmp_path):
    rows = [(["8", "2", "24", "120"], 2, "C"), (["3", "2", "1", "0"], 3, "D"), (["1", "0", "3", "2"], 0, "A"), (["8", "2"], "2", "B"), (["red", "blue"], "blue", "B"),
            (["red", "blue"], "1", "B"), (["B", "A", "C"], "A", "A"), (["red"] * 4 + ["blue"], "E", "E")]
    data = write(tmp_path / "d.jsonl", [{"id": str(i), "question": "q", "choices": choices, "answer": answer} for i, (choices, answer, _) in enumerate(rows)])
    golds = {p.id: p.gold for p in load_problems(task="mmlu", data=data, split="test", num=len(rows))}
    assert golds == {str(i): letter for i, (*_, letter) in enumerate(rows)}


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
    split = {name: load_problems(task="tiny", data=data, split=name, num=100) for name in ("train", "heldout", "test")}
    ids = {name: {p.id for p in problems} for name, problems in split.items()}
    assert not ids["train"] & ids["heldout"] and ids["train"] | ids["heldout"] == ids["test"] and 2 < len(ids["heldout"]) < 30
    assert {p.gold for p in split["test"]} == {str(i) for i in range(0, 4000, 40)} and split["test"][0].kind == "number"
    data = write(tmp_path / "e.jsonl", [{"question": "q", "answer": "E"}, {"question": "r", "answer": "A"}])
    assert [p.kind for p in load_problems(task="tiny", data=data, split="test", num=2)] == ["letter", "letter"]


@pytest.mark.parametrize("rows, complaint", [
    ([{"question": "q"}], "line 1: no `answer`"), ([{"question": "", "answer": "1"}], "line 1: no `question`"),
    ([{"id": "a", "question": "q", "answer": "1"}] * 2, "id a occurs twice"),
    ([{"id": "a", "question": "q", "answer": "$$"}], "problem a cannot be read as a")])
def test_bad_data_is_refused_with_its_place(tmp_path, rows, complaint):
    with pytest.raises(InputError, match=complaint):
        load_problems(task="tiny", data=write(tmp_path / "d.jsonl", rows), split="test", num=1)


def test_columns_of_public_data_sets_are_understood(tmp_path):
    """Rows as GSM8K, MATH, MMLU and LogiQA have them."""
    def one(task, row):
        [problem] = load_problems(task=task, data=write(tmp_path / f"{task}.jsonl", [row]), split="test", num=1)
        return problem
    assert one("gsm8k", {"question": "How many?", "answer": "6 * 7 = <<6*7=42>>42\n#### 42"}).gold == "42"
    math = one("math", {"problem": "Find x.", "solution": r"So $x = \boxed{\frac{1}{2}}$.", "level": "Level 5", "type": "Algebra"})
    assert (math.gold, math.level, math.subject, math.kind) == ("1/2", "Level 5", "Algebra", "math")
    mmlu = one("mmlu", {"question": "Which?", "choices": ["p", "q", "r", "s", "t"], "answer": 0, "subject": "law"})
    assert mmlu.gold == "A" and mmlu.question == "Which?\nA) p\nB) q\nC) r\nD) s\nE) t" and mmlu.subject == "law"
    for answer in (4, "4", "E", "t"):
        assert one("mmlu", {"question": "Which?", "choices": ["p", "q", "r", "s", "t"], "answer": answer}).gold == "E"
    with pytest.raises(InputError, match="'5' is none of the options"):
        one("mmlu", {"question": "Which?", "choices": ["p", "q"], "answer": 5})
    logiqa = one("logiqa", {"context": "All cats purr.", "query": "What follows?", "options": ["x", "y"], "correct_option": "1"})
    assert logiqa.gold == "B" and logiqa.question.startswith("All cats purr.\nWhat follows?\nA) x")
    with pytest.raises(InputError, match="cannot be read as a number"):
        one("gsm8k", {"question": "How many?", "answer": "#### many"})


def test_rows_without_ids_keep_theirs_when_the_file_is_reordered(tmp_path):
    rows = [{"question": f"How much is {i}+1?", "answer": str(i + 1)} for i in range(40)] + [{"question": "twice", "answer": "1"}] * 2
    forwards = {p.id: p.gold for p in load_problems(task="gsm8k", data=write(tmp_path / "a.jsonl", rows), split="test", num=42)}
    backwards = {p.id: p.gold for p in load_problems(task="gsm8k", data=write(tmp_path / "b.jsonl", rows[::-1]), split="test", num=42)}
    assert forwards == backwards and len(forwards) == 42
    few = [p.id for p in load_problems(task="gsm8k", data=str(tmp_path / "a.jsonl"), split="test", num=5)]
    assert few == [p.id for p in load_problems(task="gsm8k", data=str(tmp_path / "b.jsonl"), split="test", num=42)][:5]


def test_parquet_files_are_read_as_the_hub_stores_them(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.Dataset.from_list([{"question": "q", "answer": "#### 7"}]).to_parquet(tmp_path / "d.parquet")
    [problem] = load_problems(task="gsm8k", data=str(tmp_path / "d.parquet"), split="test", num=1)
    assert problem.gold == "7"


def test_a_data_set_that_cannot_be_had_is_one_line(monkeypatch):
    import datasets

    def offline(*args, **options):
        raise ConnectionError("Couldn't reach the hub\nsecond line")
    monkeypatch.setattr(datasets, "load_dataset", offline)
    for task in TASKS:
        with pytest.raises(InputError, match=f"--task {task}: cannot be loaded .Couldn't reach the hub.; .* --data FILE"):
            load_problems(task=task, data=None, split="test", num=1)


def test_torn_or_missing_data_is_named(tmp_path):
    (tmp_path / "torn.jsonl").write_text('{"question": "q", "answer": "1"}\n{"quest')
    with pytest.raises(InputError, match="torn.jsonl, line 2"):
        load_problems(task="tiny", data=str(tmp_path / "torn.jsonl"), split="test", num=1)
    with pytest.raises(InputError, match="no such file"):
        load_problems(task="tiny", data=str(tmp_path / "none.jsonl"), split="test", num=1)


def test_all_graphs_by_name():
    assert all(load_graph(name) is graph for name, graph in GRAPHS.items())
