"""Tests of the embedded problems and of the tiny agents (tiny/)."""

import random
import re
from itertools import combinations, product

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.flags import TINY_AGENTS as AGENTS
from support.records import read_jsonl
from tasks.problems import EMBEDDED, load_problems, question_key
from tiny import make_tiny
from tiny.make_tiny import REFINE, make_example, read_candidates
from tiny.problems import FAMILIES, SPLITS, make_puzzle, numbers_of, total, write_problems

# ---- Problems ------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", EMBEDDED)
def test_the_data_files_are_what_the_generator_writes_and_the_tasks_load(tmp_path, task):
    """The agents were trained on texts of the split `agents`, and would know other problems."""
    path = EMBEDDED[task]
    write_problems(tmp_path)
    assert path.read_bytes() == (tmp_path / path.name).read_bytes()

    rows = read_jsonl(path)
    sizes = {"tiny": [500, 45, 178], "tiny-score": [500, 54, 229]}[task]
    for split, size in zip(("train", "heldout", "test"), sizes, strict=True):
        problems = load_problems(task, None, {split: size})
        assert len(problems) == size
        of_split = [row for row in rows if row["split"] == split]
        for problem, row in zip(problems, of_split, strict=True):  # in the order of the file
            assert (problem.id, problem.question) == (row["id"], row["question"])
            assert (problem.gold, problem.level) == (str(row["answer"]), str(row["level"]))
            assert (problem.split, problem.subject) == (split, row["subject"])
            assert problem.answer_type == "number"


@pytest.mark.parametrize("family", FAMILIES)
def test_each_problem_has_one_solution_and_splits_share_neither_questions_nor_numbers(family):
    """The agents practised on all numbers, but in other questions."""
    numbers, questions = {}, {}
    for split in SPLITS:
        numbers[split], stated = set(), []
        for a, b, x, y in numbers_of(family, split):
            numbers[split].add((*sorted((a, b)), x + y, total(family, a, b, x, y)))
        puzzles = [make_puzzle(family, split, index) for index in range(500)]
        for puzzle in puzzles:
            a, b, n, t = puzzle.a, puzzle.b, puzzle.n, puzzle.t
            stated.append((a, b, n, t))
            solutions = [(x, n - x) for x in range(n + 1) if total(family, a, b, x, n - x) == t]
            assert solutions == [puzzle.solution]
            count_of_item = dict(zip(puzzle.item_names, puzzle.solution, strict=True))
            [asked] = [item for item in count_of_item if item in puzzle.question.split(".")[-1]]
            assert count_of_item[asked] == puzzle.answer
            assert {str(a), str(b), str(n), str(t)} <= set(re.findall(r"\d+", puzzle.question))
        stated = stated[: len(numbers_of(family, split))]  # after these they come again
        assert len(stated) == len(set(stated))
        questions[split] = {question_key(puzzle.question) for puzzle in puzzles}
    for split, other in combinations(SPLITS, 2):
        assert not questions[split] & questions[other]
        if "agents" not in (split, other):
            assert not numbers[split] & numbers[other]


# ---- The agents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("agent", [agent.name for agent in REFINE.agents])
def test_every_equation_of_an_example_is_true_and_a_wrong_guess_is_never_learnt(family, agent):
    """Products, sums and differences, column by column; and the verdicts on their digits."""
    num_wrong = 0
    for index in range(60):
        rng = random.Random(index)
        puzzle = make_puzzle(family, "agents", index)
        example = make_example(puzzle, agent, rng, estimate=True, retry_share=0.3)
        message = example.prefix + example.target
        for left, right in re.findall(r"([\d*+-]+)=(\d+)", message):
            numbers = re.sub(r"\b0+(?=\d)", "", left)  # 07 is no number in Python
            assert eval(numbers) == int(right)
        for computed, stated, verdict in re.findall(r"(\d+)\|(\d+) (\w+)", message):
            assert (computed == stated) == (verdict == "same")

        learnt = read_candidates(puzzle, example.target)
        guessed = read_candidates(puzzle, example.prefix)
        assert set(learnt) <= {puzzle.solution}
        assert puzzle.solution not in guessed
        num_wrong += len(guessed)
    assert 10 < num_wrong < 50 if agent in ("Planner", "Refiner") else num_wrong == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_of_a_candidate_holds_for_the_solution_only(family):
    for index, x, y in product(range(10), range(1, 9), range(1, 9)):
        puzzle = make_puzzle(family, "agents", index)
        verdict = "holds" if (x, y) == puzzle.solution else "fails"
        answer = (x, y)[puzzle.asked_index]
        expected = f"The check {verdict}. Final answer: {answer}"
        assert make_tiny.verifier_message(puzzle, (x, y)) == expected


def test_only_the_target_of_an_example_is_learnt_each_token_from_those_before_it():
    """Not the prompt, not a wrong guess of the agent's own, but the end of the message is."""
    tokenizer = AutoTokenizer.from_pretrained(AGENTS)
    chat = [{"role": "user", "content": "How many?"}]
    examples = [make_tiny.Example(chat, "", "Four."), make_tiny.Example(chat, "Try 3.", " Try 4.")]
    input_ids, labels = make_tiny.collate(make_tiny.encode(tokenizer, examples), pad_token_id=0)
    learnt = labels != make_tiny.IGNORED_LABEL
    assert torch.equal(input_ids[learnt], labels[learnt])
    texts = [tokenizer.decode(row[mask]) for row, mask in zip(labels, learnt, strict=True)]
    assert texts == ["Four.<|im_end|>", " Try 4.<|im_end|>"]

    model = AutoModelForCausalLM.from_pretrained(AGENTS)
    logprobs = model(input_ids=input_ids).logits.log_softmax(-1)[:, :-1]
    of_next = logprobs.gather(-1, input_ids[:, 1:, None]).squeeze(-1)
    loss = make_tiny.target_loss(model, input_ids, labels)
    assert loss.item() == pytest.approx(-of_next[learnt[:, 1:]].mean().item(), abs=1e-5)
