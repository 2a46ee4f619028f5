"""Tests of the embedded problems, and of who is guilty of a wrong answer to them (tiny/)."""

import itertools
import json
import random
import re
from dataclasses import asdict
from itertools import combinations

import pytest
import torch
from conftest import AGENTS
from report.diagnosis import LostAnswer

from experiments import blame as check_blame
from experiments import make_tiny, problems
from mas import CHAIN
from support.flags import InputError
from support.runs import fingerprint
from tasks.problems import question_key
from tiny.problems import FAMILIES, SPLITS, make_puzzle, numbers_of, total


def stated_numbers(family, split):
    """Return all (a, b, n, t) that the questions of a split state."""
    stated = set()
    for a, b, x, y in numbers_of(family, split):
        stated.add((a, b, x + y, total(family, a, b, x, y)))
    return stated


def question_keys(family, split):
    """Return the keys of the first 300 questions of a split."""
    puzzles = [make_puzzle(family, split, index) for index in range(300)]
    return {question_key(puzzle.question) for puzzle in puzzles}


@pytest.mark.parametrize("family", FAMILIES)
def test_splits_share_no_question_and_no_numbers(family):
    numbers = {split: stated_numbers(family, split) for split in SPLITS}
    questions = {split: question_keys(family, split) for split in SPLITS}
    for split, other in combinations(SPLITS, 2):
        assert not questions[split] & questions[other]
        # The agents practised on all numbers, but in other questions.
        if "agents" not in (split, other):
            assert not numbers[split] & numbers[other]


@pytest.mark.parametrize("family", FAMILIES)
def test_embedded_problems_have_one_solution_and_it_is_the_answer(family):
    for index in range(50):
        puzzle = make_puzzle(family, "test", index)
        assert puzzle == make_puzzle(family, "test", index)

        solutions = []
        for x in range(puzzle.n + 1):
            y = puzzle.n - x
            if total(family, puzzle.a, puzzle.b, x, y) == puzzle.t:
                solutions.append((x, y))
        assert solutions == [(puzzle.x, puzzle.y)]

        query = puzzle.question.split(".")[-1]
        count_of_item = dict(zip(puzzle.item_names, solutions[0], strict=True))
        assert puzzle.asked_item in query
        assert puzzle.answer == count_of_item[puzzle.asked_item]


# ---- Who is guilty of a wrong answer -------------------------------------------------------------


def tree_of(messages):
    """A tree of one path, as in trees.jsonl."""
    nodes = [{"parent": None}]
    for agent, message in zip(CHAIN.agents, messages, strict=True):
        nodes.append({"parent": len(nodes) - 1, "agent": agent.name, "message": message})
    return {"id": PUZZLE.id, "question": PUZZLE.question, "nodes": nodes}


PUZZLE = make_puzzle("packs", "heldout", 3)
PAIR = (PUZZLE.x, PUZZLE.y)
WRONG_PAIR = (PUZZLE.x + 1, PUZZLE.y - 1)


def faultless_messages(pair):
    """What faultless agents say after the Planner has proposed a pair."""
    rng = random.Random(0)
    plan, check = make_tiny.planner_message(PUZZLE, *pair, rng, estimate=True)
    return [
        make_tiny.reader_message(PUZZLE, rng),
        plan + check,
        make_tiny.solver_message(PUZZLE, *pair),
        make_tiny.verifier_message(PUZZLE, *pair),
    ]


@pytest.mark.parametrize(
    "pair, changed, guilty",
    [
        (PAIR, {}, None),
        (PAIR, {"Reader": "Facts: none"}, "Reader"),
        (WRONG_PAIR, {}, "Planner"),
        (WRONG_PAIR, {"Solver": "Total: 1|1 same."}, "Planner"),  # the first one
        (PAIR, {"Solver": "Total: 1|1 same."}, "Solver"),
        (PAIR, {"Verifier": "Final answer: 0"}, "Verifier"),
    ],
)
def test_the_first_agent_that_does_not_do_its_work_is_guilty(pair, changed, guilty):
    messages = faultless_messages(pair)
    for index, agent in enumerate(CHAIN.agents):
        messages[index] = changed.get(agent.name, messages[index])
    assert check_blame.first_wrong_work(tree_of(messages), 4, CHAIN) == guilty


def test_blame_is_right_where_it_names_the_guilty_agent():
    """On p both of two blames are right, on q none of one: a mean over problems of 50 %."""
    lost = [
        LostAnswer("p", 1, "Planner", 0.5),
        LostAnswer("p", 2, "Solver", 0.5),
        LostAnswer("q", 1, None, 0.0),
    ]
    lost.append(LostAnswer("q", 2, "Planner", 0.5))
    guilty = ["Planner", "Solver", "Planner", None]
    cells = check_blame.shares_found(lost, guilty, ["Reader", "Planner", "Solver"])
    assert cells[0] == "50.0"
    assert cells[1] == "0.0 to 100.0"
    assert cells[2:] == ["-", "50.0", "100.0"]


def test_the_kinds_of_blame_are_those_that_the_table_names(tmp_path, monkeypatch, capsys):
    """The Planner is guilty; only one of the four kinds of blame finds it."""
    found = {("V", "before"): "Planner"}

    def blame(heldout, *, by, below):
        return [LostAnswer("p", 1, found.get((by, below), "Reader"), 0.5)]

    settings = {"graph": asdict(CHAIN)}
    for name, entry in (("rollouts", settings), ("value", {"heldout_rollouts": settings})):
        (tmp_path / name).mkdir()
        config = {"settings": entry}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "rollouts" / "trees.jsonl").write_text('{"id": "p"}\n')
    (tmp_path / "value" / "heldout.jsonl").write_text("")
    monkeypatch.setattr(check_blame, "blame", blame)
    monkeypatch.setattr(check_blame, "first_wrong_work", lambda *args: "Planner")
    names = {
        ("V", "before"): "by V, below the state before",
        ("V", "siblings"): "by V, below its siblings",
        ("y", "before"): "by labels, below the state before",
        ("y", "siblings"): "by labels, below its siblings",
    }
    for kind, name in names.items():
        found.clear()
        found[kind] = "Planner"
        check_blame.main(check_blame.parse_args([str(tmp_path)]))
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "1 wrong final answers; guilty: Planner 1; 0 without guilt"
        shares = {}
        for other in names.values():
            [line] = [line for line in lines if line.startswith(other + " ")]
            shares[other] = line[len(other) :].split()[0]
        assert shares == {other: "100.0" if other == name else "0.0" for other in names.values()}


def test_blame_is_checked_on_the_trees_that_v_was_measured_on(tmp_path):
    for name, settings in (("rollouts", {"seed": 0}), ("value", {"heldout_rollouts": {"seed": 1}})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(InputError, match="measured on other trees than .*rollouts"):
        check_blame.main(check_blame.parse_args([str(tmp_path)]))


# ---- How the tiny agents learn, and what from ----------------------------------------------------


def test_the_embedded_problems_never_change():
    """The tiny agents were trained on texts of the split `agents`, and would know other tests."""
    texts = []
    for family in problems.FAMILIES:
        for split in problems.SPLITS:
            for index in range(60):
                puzzle = problems.make_puzzle(family, split, index)
                texts.append(f"{puzzle.id} {puzzle.question} {puzzle.answer}")
    assert fingerprint(texts) == "87ecd0d798e9946452cdd2692cae8d88"
    sizes = {}
    for family in problems.FAMILIES:
        sizes[family] = [problems.size_of(family, split) for split in ("heldout", "test")]
    assert sizes == {"packs": [45, 178], "score": [54, 229]}


def test_only_the_target_of_an_example_is_learnt():
    """Not the prompt, not a wrong guess of the agent's own, but the end of the message is."""
    tokenizer = make_tiny.AutoTokenizer.from_pretrained(AGENTS)
    chat = [{"role": "user", "content": "How many?"}]
    examples = [make_tiny.Example(chat, "", "Four."), make_tiny.Example(chat, "Try 3.", " Try 4.")]
    input_ids, labels = make_tiny.collate(make_tiny.encode(tokenizer, examples), pad_token_id=0)
    for row, learnt in zip(labels, ["Four.", " Try 4."], strict=True):
        kept = row[row != make_tiny.IGNORED_LABEL].tolist()
        assert tokenizer.decode(kept) == learnt + tokenizer.eos_token
    prompt = make_tiny.render(tokenizer, chat)
    texts = [tokenizer.decode(ids[ids != 0]) for ids in input_ids]
    assert texts == [prompt + "Four.<|im_end|>", prompt + "Try 3. Try 4.<|im_end|>"]


@pytest.mark.parametrize("agent", ["Planner", "Refiner"])
def test_a_wrong_guess_is_never_learnt(agent):
    """Neither of the Planner, who may guess twice, nor of the Refiner."""
    num_wrong = 0
    for index in range(40):
        puzzle = problems.make_puzzle("packs", "agents", index)
        example = make_tiny.make_example(
            puzzle, agent, random.Random(index), estimate=True, retry_share=0.3
        )
        solution = (puzzle.x, puzzle.y)
        learnt = make_tiny.read_candidates(puzzle, example.target)
        guessed = make_tiny.read_candidates(puzzle, example.prefix)
        assert set(learnt) <= {solution}
        assert solution not in guessed
        assert len(learnt) + len(guessed) >= 1
        num_wrong += len(guessed)
    assert 5 < num_wrong < 35


def test_a_token_is_predicted_from_those_before_it():
    """By hand, from the logits of the whole row. Unlabelled tokens do not count."""
    model = make_tiny.AutoModelForCausalLM.from_pretrained(AGENTS)
    input_ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]])
    labels = torch.full_like(input_ids, make_tiny.IGNORED_LABEL)
    labels[0, 3:], labels[1, 2] = input_ids[0, 3:], input_ids[1, 2]
    logprobs = model(input_ids=input_ids).logits.log_softmax(-1)
    expected = -(logprobs[0, 2, 13] + logprobs[0, 3, 14] + logprobs[1, 1, 22]) / 3
    loss = make_tiny.target_loss(model, input_ids, labels)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_the_weights_of_the_agents_change_within_a_phase():
    first, *_ = make_tiny.PHASES
    early, late = first.weights[0][1], first.weights[1][1]
    steps = (0, 1399, 1400, 3999)
    assert [first.weights_at(step) for step in steps] == [early, early, late, late]


def test_the_accuracy_of_the_team_by_hand():
    """A greedy pass and two samples. All plans for the first of two problems are right.

    The other agents are faultless, so the Refiner corrects every plan that is wrong.
    """
    puzzles = [problems.make_puzzle("packs", "heldout", index) for index in (3, 4)]
    rng = random.Random(0)
    plans = itertools.count()

    class Team:
        def speak(self, states, *, temperature):
            return [self.message(state, temperature) for state in states]

        def message(self, state, temperature):
            [puzzle] = [puzzle for puzzle in puzzles if puzzle.question == state.question]
            agent = make_tiny.REFINE.turn(state).name
            right = (puzzle.x, puzzle.y)
            if agent == "Reader":
                return make_tiny.reader_message(puzzle, rng)
            if agent == "Planner":
                is_right = next(plans) in (0, 2, 4)
                pair = right if is_right else make_tiny.wrong_pair(puzzle, rng)
                return "".join(make_tiny.planner_message(puzzle, *pair, rng, estimate=True))
            if agent == "Refiner":
                return "".join(make_tiny.refiner_message(puzzle, *right, rng))
            pair = make_tiny.read_candidate(puzzle, state.messages[1].text)
            write = {"Solver": make_tiny.solver_message, "Verifier": make_tiny.verifier_message}
            return write[agent](puzzle, *pair)

    assert make_tiny.measure(Team(), puzzles, num_passes=2) == {
        "greedy": 0.5,
        "greedy, refined": 1.0,
        "share refined": 0.5,
        "sample": 0.5,
        "oracle@2": 0.5,
        "Reader correct work": 1.0,
        "Planner correct work": 0.5,
        "Solver correct work": 1.0,
        "Verifier correct work": 1.0,
        "Refiner correct work": 1.0,
    }


@pytest.mark.parametrize("family", problems.FAMILIES)
def test_every_equation_that_a_faultless_agent_writes_is_true(family):
    """Products, sums and differences, column by column, of right and of wrong candidates."""
    num_checked = 0
    for index in range(40):
        puzzle = problems.make_puzzle(family, "agents", index)
        rng = random.Random(index)
        for pair in ((puzzle.x, puzzle.y), make_tiny.wrong_pair(puzzle, rng)):
            texts = make_tiny.planner_message(puzzle, *pair, rng, estimate=True)
            texts += (make_tiny.second_try(puzzle, *pair, rng),)
            texts += (make_tiny.solver_message(puzzle, *pair),)
            for left, right in re.findall(r"([\d*+-]+)=(\d+)", " ".join(texts)):
                numbers = re.sub(r"\b0+(?=\d)", "", left)  # 07 is no number in Python
                assert eval(numbers) == int(right), (left, right)
                num_checked += 1
            for first, second, verdict in re.findall(r"(\d+)\|(\d+) (\w+)", " ".join(texts)):
                assert (first == second) == (verdict == "same")
    assert num_checked > 800


@pytest.mark.parametrize("family", problems.FAMILIES)
def test_a_faultless_verifier_says_that_the_check_holds_only_for_the_solution(family):
    """A candidate may have the right total with another count, or the right count."""
    for index in range(40):
        puzzle = problems.make_puzzle(family, "agents", index)
        for x, y in itertools.product(range(1, 9), repeat=2):
            text = make_tiny.verifier_message(puzzle, x, y)
            holds = (x, y) == (puzzle.x, puzzle.y)
            assert text.startswith(f"The check {'holds' if holds else 'fails'}. ")
            assert text.endswith(f"Final answer: {(x, y)[puzzle.asked_index]}")
