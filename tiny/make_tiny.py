"""Make the tiny agents: one small causal LM that plays all agents of `chain` and `refine`.

    python tiny/make_tiny.py                       # train, save to tiny/agents, measure
    python tiny/make_tiny.py --evaluate            # measure the agents saved in tiny/agents

The agents are trained on correct work only:

- The Reader copies the facts that matter.
- The Planner proposes the pair of counts that solves the problem and checks its last digit.
- The Solver carries out any pair that it is given, right or wrong, and compares digit by digit.
- The Verifier reports the comparison and answers.
- The Refiner of the graph `refine` proposes another pair if the check fails.

Reading, multiplying and comparing are learnt well. The Planner would have to divide, so it is left
guessing. In the last phase it learns, from few examples, that it may try again if the last digit is
off: a rare habit that finetuning (train_agents.py) can make common.

The prompts are those of mas.py in the model's chat template, as for any checkpoint. The model and
the tokenizer are saved in Hugging Face format.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

# Python puts the folder of this script on sys.path, but the modules below are one folder up.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mas import GRAPHS, Agent, State
from tasks.extraction import extract_answer
from tiny.problems import FAMILIES, Puzzle, make_puzzle, total

HERE = Path(__file__).resolve().parent
REFINE = GRAPHS["refine"]  # the agents of `chain`, then a Refiner


# ---- Messages: what a faultless worker says ------------------------------------------------------


def reader_message(puzzle: Puzzle, rng: random.Random) -> str:
    """Write the Reader's message: the facts in random order, and the item that is asked for."""
    facts = [*_item_facts(puzzle), f"count {puzzle.n}", f"total {puzzle.t}"]
    rng.shuffle(facts)
    return f"Facts: {', '.join(facts)}. Asked: {puzzle.asked_item}."


def planner_message(
    puzzle: Puzzle, x: int, y: int, rng: random.Random, *, estimate: bool
) -> tuple[str, str]:
    """Write the Planner's message in two parts: the plan and the rough check of its candidate.

    The plan repeats the facts for the Solver and ends with the candidate (x, y). With `estimate`
    it also says what the total would be if all items were of one kind. The candidate is then a
    guess between these two bounds.
    """
    first_fact, second_fact = _item_facts(puzzle)
    facts = f"{first_fact}, {second_fact}, count {puzzle.n}, total {puzzle.t}. "
    bounds = ""
    if estimate:
        all_first = f"{puzzle.n}*{puzzle.a}={puzzle.n * puzzle.a:02d}"
        all_second = f"{puzzle.n}*{puzzle.b}={puzzle.n * puzzle.b:02d}"
        bounds = f"If all: {all_first}, {all_second}. "
    plan = facts + bounds + candidate_sentence(puzzle, x, y, rng)
    return plan, rough_check(puzzle, x, y)


def second_try(puzzle: Puzzle, x: int, y: int, rng: random.Random) -> str:
    """Write what the Planner adds if the last digit of its first candidate is off."""
    return f" {candidate_sentence(puzzle, x, y, rng)}{rough_check(puzzle, x, y)}"


def solver_message(puzzle: Puzzle, x: int, y: int) -> str:
    """Write the Solver's message: the total of the candidate, and the comparison with the facts.

    The products have two digits, so that they line up. Their sum or difference is taken column by
    column, units first, with a carry or a borrow.
    """
    first_item, second_item = puzzle.item_names
    first_product = puzzle.a * x
    second_product = puzzle.b * y
    units = units_column(puzzle, first_product, second_product)
    sign = units.sign
    computed = total(puzzle.family, puzzle.a, puzzle.b, x, y)

    # 1. the total, column by column
    if computed < 0:
        columns = ""
        result = "<0"
    else:
        columns = f"{units}. {_tens_column(first_product, second_product, units)}. "
        result = f"={computed:02d}"

    # 2. the count
    count = x + y
    count_check = compare_digit(count, puzzle.n)

    return (
        f"{x} {first_item}: {x}*{puzzle.a}={first_product:02d}. "
        f"{y} {second_item}: {y}*{puzzle.b}={second_product:02d}. "
        f"{columns}{first_product:02d}{sign}{second_product:02d}{result}. {x}+{y}={count}. "
        f"Total: {compare(computed, puzzle.t)}. Count: {count_check}."
    )


def verifier_message(puzzle: Puzzle, x: int, y: int) -> str:
    """Write the Verifier's message: whether the candidate fits the question, and its answer.

    The Verifier gives the answer of the candidate even if the check fails: it knows no other.
    """
    total_fits = total(puzzle.family, puzzle.a, puzzle.b, x, y) == puzzle.t
    count_fits = x + y == puzzle.n
    verdict = "holds" if total_fits and count_fits else "fails"
    return f"The check {verdict}. {_final_answer(puzzle, x, y)}"


def refiner_message(puzzle: Puzzle, x: int, y: int, rng: random.Random) -> tuple[str, str]:
    """Write the Refiner's message in two parts: the candidate; its rough check and its answer."""
    candidate = candidate_sentence(puzzle, x, y, rng)
    return candidate, f"{rough_check(puzzle, x, y)} {_final_answer(puzzle, x, y)}"


def _item_facts(puzzle: Puzzle) -> tuple[str, str]:
    """State what one item of each kind adds or takes."""
    first_item, second_item = puzzle.item_names
    second_verb = "adds" if puzzle.family == "packs" else "takes"
    return f"{first_item} adds {puzzle.a}", f"{second_item} {second_verb} {puzzle.b}"


def _final_answer(puzzle: Puzzle, x: int, y: int) -> str:
    """State the answer that a candidate gives."""
    return f"Final answer: {(x, y)[puzzle.asked_index]}"


def candidate_sentence(puzzle: Puzzle, x: int, y: int, rng: random.Random) -> str:
    """Propose a candidate, its two halves in random order: "Try 4 small and 2 big."."""
    first_item, second_item = puzzle.item_names
    halves = [f"{x} {first_item}", f"{y} {second_item}"]
    rng.shuffle(halves)
    return f"Try {halves[0]} and {halves[1]}."


def rough_check(puzzle: Puzzle, x: int, y: int) -> str:
    """Compare the last digit of a candidate's total with the last digit of the stated total.

    The check follows the guess, so it cannot help the guess. But a reader of the message can use
    it. It needs only nearby digits, so a small model can learn it.
    """
    first_product = puzzle.a * x
    second_product = puzzle.b * y
    units = units_column(puzzle, first_product, second_product)
    last_digits = compare_digit(units.result % 10, puzzle.t % 10)
    return (
        f" {x}*{puzzle.a}={first_product:02d}, {y}*{puzzle.b}={second_product:02d}, "
        f"{units}, {last_digits}."
    )


class UnitsColumn(NamedTuple):
    """The units of a written sum or difference of two products: "13-7=06"."""

    first: int  # units digit of the first product, plus ten if a ten was borrowed
    second: int  # units digit of the second product
    sign: str  # "+" or "-"
    result: int
    carry: int  # 1 if a ten was carried ("+") or borrowed ("-"), else 0

    def __str__(self) -> str:
        return f"{self.first}{self.sign}{self.second}={self.result:02d}"


def units_column(puzzle: Puzzle, first_product: int, second_product: int) -> UnitsColumn:
    """Compute the units column of a candidate's total: a sum (packs) or a difference (score)."""
    first = first_product % 10
    second = second_product % 10
    if puzzle.family == "packs":
        result = first + second
        carry = int(result > 9)
        return UnitsColumn(first, second, "+", result, carry)
    borrow = int(first < second)
    first += 10 * borrow
    return UnitsColumn(first, second, "-", first - second, borrow)


def _tens_column(first_product: int, second_product: int, units: UnitsColumn) -> str:
    """Write the tens of a sum or a difference, with the carry or the borrow: "2-1-1=00"."""
    first = first_product // 10
    second = second_product // 10
    sign = units.sign
    direction = 1 if sign == "+" else -1
    result = first + direction * (second + units.carry)
    return f"{first}{sign}{second}{sign}{units.carry}={result:02d}"


def compare(computed: int, stated: int) -> str:
    """Compare two totals digit by digit: "3|3 same, 4|8 off".

    A computed total without two digits has one phrase of its own.
    """
    if not 0 <= computed <= 99:
        return "out of range, off"
    computed_tens, computed_units = divmod(computed, 10)
    stated_tens, stated_units = divmod(stated, 10)
    tens = compare_digit(computed_tens, stated_tens)
    units = compare_digit(computed_units, stated_units)
    return f"{tens}, {units}"


def compare_digit(computed: int, stated: int) -> str:
    """Compare two numbers of one digit: "3|3 same" or "4|8 off"."""
    verdict = "same" if computed == stated else "off"
    return f"{computed}|{stated} {verdict}"


# ---- Examples: one turn of one agent -------------------------------------------------------------

# The share of an agent's examples with a wrong candidate. With fewer wrong ones, the Solver learns
# to find the result that the plan hopes for.
WRONG_SHARE = {"Reader": 0.0, "Planner": 0.4, "Solver": 0.65, "Verifier": 0.65, "Refiner": 0.4}

RIGHT_COUNT_SHARE = 0.7  # of the wrong candidates that are drawn
MAX_SECOND_ITEMS = 8  # in a wrong candidate, so that its products have at most two digits


class Example(NamedTuple):
    """A prompt, and the message that answers it: `prefix` + `target`. Only `target` is learnt."""

    chat: list[dict[str, str]]
    prefix: str
    target: str


def make_example(
    puzzle: Puzzle, agent: str, rng: random.Random, *, estimate: bool, retry_share: float
) -> Example:
    """Make an example of one turn in which an agent does correct work.

    A wrong candidate is never learnt, only the work that follows from it. The Solver and the
    Verifier are prompted with work on a wrong candidate. The Planner and the Refiner get their own
    wrong guess as the prefix of their message, and learn to check it. See WRONG_SHARE.

    Args:
        estimate: whether the Planner writes its bounds, see `planner_message`.
        retry_share: the share of plans with two candidates, the first of which is wrong and seen to
            be wrong. The Planner learns a second one that is right; the others work with the last.
    """
    solution = (puzzle.x, puzzle.y)
    first_pair = None
    if retry_share > 0 and rng.random() < retry_share:
        first_pair = pair_seen_to_be_wrong(puzzle, rng)

    # 1. choose the candidate of the chain; the Refiner speaks only after a wrong one
    pair = solution
    wants_wrong_pair = rng.random() < WRONG_SHARE[agent]
    if wants_wrong_pair or agent == "Refiner":
        pair = wrong_pair(puzzle, rng)

    # 2. let correct workers speak until it is the agent's turn
    messages = _chain_messages(puzzle, pair, first_pair, rng, estimate=estimate)
    state = State(puzzle.question, ())
    while REFINE.turn(state).name != agent:
        speaker = REFINE.turn(state).name
        state = REFINE.step(state, messages[speaker])
    chat = REFINE.prompt(state, "number")

    # 3. write the agent's own message; a wrong guess of its own is not learnt
    if agent == "Refiner":
        return _refiner_example(puzzle, chat, rng)
    if agent == "Planner" and first_pair is not None:
        plan, check = planner_message(puzzle, *first_pair, rng, estimate=estimate)
        return Example(chat, prefix=plan, target=check + second_try(puzzle, *solution, rng))
    if agent == "Planner" and pair != solution:
        plan, check = planner_message(puzzle, *pair, rng, estimate=estimate)
        return Example(chat, prefix=plan, target=check)
    return Example(chat, prefix="", target=messages[agent])


def _chain_messages(
    puzzle: Puzzle,
    pair: tuple[int, int],
    first_pair: tuple[int, int] | None,
    rng: random.Random,
    *,
    estimate: bool,
) -> dict[str, str]:
    """Write the message of each agent of the chain if the Planner proposes `pair`.

    first_pair: what the Planner has tried before, if anything.
    """
    x, y = pair
    facts = reader_message(puzzle, rng)
    plan, check = planner_message(puzzle, *(first_pair or pair), rng, estimate=estimate)
    retry = second_try(puzzle, x, y, rng) if first_pair else ""
    return {
        "Reader": facts,
        "Planner": plan + check + retry,
        "Solver": solver_message(puzzle, x, y),
        "Verifier": verifier_message(puzzle, x, y),
    }


def _refiner_example(puzzle: Puzzle, chat: list[dict[str, str]], rng: random.Random) -> Example:
    """Make an example of the Refiner, which guesses anew."""
    solution = (puzzle.x, puzzle.y)
    pair = solution
    if rng.random() < WRONG_SHARE["Refiner"]:
        pair = wrong_pair(puzzle, rng)
    candidate, check_and_answer = refiner_message(puzzle, *pair, rng)
    if pair == solution:
        return Example(chat, prefix="", target=candidate + check_and_answer)
    return Example(chat, prefix=candidate, target=check_and_answer)


def pair_seen_to_be_wrong(puzzle: Puzzle, rng: random.Random) -> tuple[int, int] | None:
    """Draw a wrong candidate whose last digit is off; None if ten draws find none."""
    for _ in range(10):
        x, y = wrong_pair(puzzle, rng)
        if total(puzzle.family, puzzle.a, puzzle.b, x, y) % 10 != puzzle.t % 10:
            return x, y
    return None


def wrong_pair(puzzle: Puzzle, rng: random.Random) -> tuple[int, int]:
    """Draw a wrong candidate: mostly with the right count, sometimes with one item more or less."""
    while True:
        x = rng.randint(1, puzzle.n - 1)
        y = puzzle.n - x
        if rng.random() >= RIGHT_COUNT_SHARE:
            y += rng.choice((-1, 1))
        if 1 <= y <= MAX_SECOND_ITEMS and (x, y) != (puzzle.x, puzzle.y):
            return x, y


# ---- Tokenizer -----------------------------------------------------------------------------------

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
VOCABULARY_SIZE = 640
MAX_LENGTH = 1024  # tokens of a prompt and its message
NUM_TOKENIZER_PUZZLES = 4000


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Train Qwen2's tokenizer with a small vocabulary: byte-level BPE, each digit is one token.

    AutoTokenizer splits text in Qwen2's way for any Qwen2 model, whatever its tokenizer.json says.
    So the text is split in this way here, too. Byte-level BPE can encode any text.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = qwen.normalizer
    tokenizer.pre_tokenizer = qwen.pre_tokenizer
    tokenizer.decoder = qwen.decoder
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(tokenizer_texts(rng), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
    )


def tokenizer_texts(rng: random.Random) -> list[str]:
    """Return the texts that the tokenizer is trained on: prompts, messages and roles."""
    texts = []
    for index in range(NUM_TOKENIZER_PUZZLES):
        family = FAMILIES[index % len(FAMILIES)]
        puzzle = make_puzzle(family, "agents", index)
        for agent in REFINE.agents:
            example = make_example(puzzle, agent.name, rng, estimate=False, retry_share=0.0)
            texts += [turn["content"] for turn in example.chat]
            texts.append(example.prefix + example.target)
            texts += ["assistant", "system", "user"]
    return texts


# ---- Phases and batches --------------------------------------------------------------------------

BATCHES_PER_POOL = 16
MAIN_FAMILY_SHARE = 0.7  # the share of FAMILIES[0] in the examples
IGNORED_LABEL = -100  # the label of a token without a loss


@dataclass(frozen=True)
class Phase:
    """A phase of the training. Each phase has a one-cycle schedule of its own."""

    steps: int
    learning_rate: float
    estimate: bool  # whether the Planner writes its bounds, see `planner_message`
    retry_share: float  # the share of plans with a second try, see `make_example`
    # Pairs (start, weight of each agent in the examples), by rising `start`. The weights hold from
    # `start` on, a fraction of the phase's steps. They are in the order of REFINE.agents: Reader,
    # Planner, Solver, Verifier, Refiner.
    weights: tuple[tuple[float, tuple[float, ...]], ...]

    def weights_at(self, step: int) -> tuple[float, ...]:
        """Return the weight of each agent in the examples from this step on."""
        current_weights = ()
        for start, weights in self.weights:
            if step >= start * self.steps:
                current_weights = weights
        return current_weights


PHASES = (
    # All agents learn arithmetic and the form of their messages.
    Phase(
        steps=4000,
        learning_rate=2e-3,
        estimate=False,
        retry_share=0.0,
        weights=(
            (0.0, (0.25, 0.25, 0.35, 0.10, 0.05)),
            (0.35, (0.08, 0.54, 0.24, 0.07, 0.07)),
        ),
    ),
    # The Planner learns to guess between two bounds.
    Phase(
        steps=1200,
        learning_rate=1.5e-3,
        estimate=True,
        retry_share=0.0,
        weights=((0.0, (0.07, 0.60, 0.10, 0.17, 0.06)),),
    ),
    # The Planner learns that it may try again, and the Solver to work with the last try.
    Phase(
        steps=560,
        learning_rate=1e-3,
        estimate=True,
        retry_share=0.12,
        weights=((0.0, (0.07, 0.55, 0.20, 0.12, 0.06)),),
    ),
)


class EncodedExample(NamedTuple):
    """An example in tokens. The loss is on the tokens from `target_start` on."""

    token_ids: list[int]  # prompt, message, end of message
    target_start: int


def encode(tokenizer, examples: list[Example]) -> list[EncodedExample]:
    """Tokenize examples. Raises AssertionError if a prefix ends inside a token of its message."""
    prompts = [render(tokenizer, example.chat) for example in examples]
    prefixes = [example.prefix for example in examples]
    messages = [example.prefix + example.target for example in examples]

    # No token may span a prompt and its message: a model that generates gets the prompt alone.
    prompt_ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    prefix_ids = tokenizer(prefixes, add_special_tokens=False)["input_ids"]
    message_ids = tokenizer(messages, add_special_tokens=False)["input_ids"]

    encoded = []
    for prompt, prefix, message in zip(prompt_ids, prefix_ids, message_ids, strict=True):
        assert message[: len(prefix)] == prefix, "a message must be cut between two tokens"
        token_ids = prompt + message + [tokenizer.eos_token_id]
        encoded.append(EncodedExample(token_ids, target_start=len(prompt) + len(prefix)))
    return encoded


def render(tokenizer, chat: list[dict[str, str]]) -> str:
    """Render a prompt with the chat template, up to where the agent starts to speak."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def batches(
    tokenizer, phase: Phase, *, batch_size: int, rng: random.Random
) -> Iterator[list[EncodedExample]]:
    """Yield the batches of a phase, one per step.

    Batches are cut from pools of BATCHES_PER_POOL batches sorted by length, to save padding.
    """
    next_index = dict.fromkeys(FAMILIES, 1)
    num_made = 0
    while num_made < phase.steps:
        # 1. draw the examples of a pool
        weights = phase.weights_at(num_made)
        examples = []
        for _ in range(batch_size * BATCHES_PER_POOL):
            family = FAMILIES[0] if rng.random() < MAIN_FAMILY_SHARE else FAMILIES[1]
            puzzle = make_puzzle(family, "agents", next_index[family])
            next_index[family] += 1
            [agent] = rng.choices(REFINE.agents, weights)
            example = make_example(
                puzzle,
                agent.name,
                rng,
                estimate=phase.estimate,
                retry_share=phase.retry_share,
            )
            examples.append(example)

        # 2. cut the sorted pool into batches; the last pool may have more than the phase needs
        pool = sorted(encode(tokenizer, examples), key=_num_tokens)
        pool_batches = []
        for start in range(0, len(pool), batch_size):
            pool_batches.append(pool[start : start + batch_size])
        pool_batches = pool_batches[: phase.steps - num_made]

        # 3. yield them in random order
        rng.shuffle(pool_batches)
        yield from pool_batches
        num_made += len(pool_batches)


def _num_tokens(example: EncodedExample) -> int:
    return len(example.token_ids)


def collate(batch: list[EncodedExample], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the right-padded token ids and the labels of a batch, both [batch, length]."""
    length = max(map(_num_tokens, batch))
    input_ids = torch.full((len(batch), length), pad_token_id)
    labels = torch.full((len(batch), length), IGNORED_LABEL)
    for i, (token_ids, target_start) in enumerate(batch):
        end = len(token_ids)
        input_ids[i, :end] = torch.tensor(token_ids)
        labels[i, target_start:end] = torch.tensor(token_ids[target_start:])
    return input_ids, labels


# ---- Training ------------------------------------------------------------------------------------

HEAD_SIZE = 32  # of an attention head; two heads share their keys and values
ADAM_BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.01
WARMUP_SHARE = 0.05  # of a phase's steps
MAX_GRADIENT_NORM = 1.0

NEW_LOSS_WEIGHT = 0.02  # in the running mean of the loss, which is only printed
STEPS_PER_LINE = 50


def make_model(tokenizer, *, hidden_size: int, num_layers: int) -> Qwen2ForCausalLM:
    """Make an untrained model."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // HEAD_SIZE,
        num_key_value_heads=hidden_size // (2 * HEAD_SIZE),
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(args) -> None:
    """Train tokenizer and model from scratch, or from a saved phase, and save them."""
    start_time = time.time()

    # 1. make the tokenizer and the model
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer, hidden_size=args.hidden, num_layers=args.layers)
    model = model.to(args.device)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{num_parameters:,} parameters, {len(tokenizer)} tokens, {args.threads} threads",
        flush=True,
    )

    # 2. train phase by phase
    for number, phase in enumerate(PHASES, start=1):
        if number < args.from_phase:
            continue
        if number > 1:
            # Always load the saved result of the previous phase. A run that starts here, with
            # --from-phase, then gives the same model as a run from scratch.
            model = AutoModelForCausalLM.from_pretrained(args.output).to(args.device)
            tokenizer = AutoTokenizer.from_pretrained(args.output)
            rng = random.Random(f"{args.seed}/{number}")
        name = f"phase {number}/{len(PHASES)}"
        train_phase(
            model,
            tokenizer,
            phase,
            rng,
            name=name,
            batch_size=args.batch_size,
            device=args.device,
        )
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)

    check_saved_tokenizer(tokenizer, args.output, rng)
    minutes = (time.time() - start_time) / 60
    print(f"saved to {args.output} after {minutes:.1f} minutes")


def check_saved_tokenizer(tokenizer, folder: str, rng: random.Random) -> None:
    """Raise AssertionError if the saved tokenizer does not encode like the one in memory."""
    examples = []
    for index in range(9):
        puzzle = make_puzzle(FAMILIES[0], "agents", index)
        for agent in REFINE.agents:
            example = make_example(puzzle, agent.name, rng, estimate=True, retry_share=0.5)
            examples.append(example)
    expected = encode(tokenizer, examples)
    saved_tokenizer = AutoTokenizer.from_pretrained(folder)
    encoded = encode(saved_tokenizer, examples)
    assert encoded == expected, "the saved tokenizer encodes differently"


def train_phase(
    model,
    tokenizer,
    phase: Phase,
    rng: random.Random,
    *,
    name: str,
    batch_size: int,
    device: str,
) -> None:
    """Train the model in place for one phase. `name` labels the printed lines."""
    model.train()
    # This is saved with the model: an agent ends its message with this token.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, weight_decay=WEIGHT_DECAY, betas=ADAM_BETAS
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.steps, pct_start=WARMUP_SHARE
    )

    start_time = time.time()
    num_tokens = 0
    mean_loss = None
    phase_batches = batches(tokenizer, phase, batch_size=batch_size, rng=rng)
    for step, batch in enumerate(phase_batches, start=1):
        # 1. take one step
        input_ids, labels = collate(batch, tokenizer.pad_token_id)
        loss = target_loss(model, input_ids.to(device), labels.to(device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        # 2. report
        num_tokens += input_ids.numel()
        if mean_loss is None:
            mean_loss = loss.item()
        else:
            mean_loss = (1 - NEW_LOSS_WEIGHT) * mean_loss + NEW_LOSS_WEIGHT * loss.item()
        if step % STEPS_PER_LINE == 0 or step == phase.steps:
            seconds = time.time() - start_time
            print(
                f"{name}  step {step}/{phase.steps}  loss {mean_loss:.4f}  "
                f"{num_tokens / seconds:,.0f} tokens/s  {seconds / 60:.1f} min",
                flush=True,
            )


def target_loss(model, input_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the labelled tokens, each predicted from those before it.

    Inputs are right-padded and the model is causal, so no attention mask is needed. The logits are
    computed only where there is a label.
    """
    hidden = model.model(input_ids=input_ids, use_cache=False).last_hidden_state
    hidden_before = hidden[:, :-1]
    next_labels = labels[:, 1:]
    has_label = next_labels != IGNORED_LABEL
    logits = model.lm_head(hidden_before[has_label])
    return F.cross_entropy(logits, next_labels[has_label])


# ---- Measuring -----------------------------------------------------------------------------------

MAX_NEW_TOKENS = 192
ORDER_SEEDS = range(8)  # among these, both orders of the Planner's candidate occur


class Team:
    """The saved agents, ready to speak. A plain padded decode, used only for measuring."""

    def __init__(self, folder: str, *, device: str, seed: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rng = random.Random(seed)

    @torch.no_grad()
    def speak(self, states: list[State], *, temperature: float) -> list[str]:
        """Return one message per state from the agent on turn; temperature 0 is greedy."""
        # 1. render and tokenize the prompts, padded on the left
        prompts = []
        for state in states:
            chat = REFINE.prompt(state, "number")
            prompts.append(render(self.tokenizer, chat))
        inputs = self.tokenizer(
            prompts,
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(self.model.device)

        # 2. generate
        sampling = {"do_sample": False}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(self.rng.randrange(2**31))
        sequences = self.model.generate(
            **inputs,
            max_new_tokens=MAX_NEW_TOKENS,
            pad_token_id=self.tokenizer.pad_token_id,
            **sampling,
        )

        # 3. decode the new tokens
        prompt_length = inputs["input_ids"].shape[1]
        return self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)


@dataclass
class WorkCount:
    """How many messages each agent has written, and how many of them were correct work."""

    written: Counter = field(default_factory=Counter)
    correct: Counter = field(default_factory=Counter)

    def shares(self) -> dict[str, float]:
        """Return the share of correct work of each agent that has written anything."""
        return {name: self.correct[name] / self.written[name] for name in self.written}


class Pass(NamedTuple):
    """The result of one transcript per problem."""

    chain_correct: list[bool]  # per problem, whether the Verifier's answer is right
    refined_correct: list[bool]  # per problem, whether the last answer is right
    num_refined: int  # transcripts in which the Refiner spoke


def evaluate(args) -> dict[str, float]:
    """Measure the saved agents on problems of a split, and print the measures."""
    team = Team(args.output, device=args.device, seed=args.seed + 1)
    report = {}
    for family in FAMILIES:
        puzzles = [make_puzzle(family, args.split, i) for i in range(args.problems)]
        measures = measure(team, puzzles, num_passes=args.passes)
        for name, value in measures.items():
            report[f"{family}/{name}"] = value
    for name, value in report.items():
        print(f"{name:32s} {value:.3f}")
    return report


def measure(team: Team, puzzles: list[Puzzle], *, num_passes: int) -> dict[str, float]:
    """Measure the team's accuracy and each agent's share of correct work.

    Accuracy is the share of problems answered correctly, from 0 to 1: by the greedy transcript, by
    one sample (the mean of `num_passes`), and by the oracle, which needs one correct sample.
    """
    work = WorkCount()

    # 1. one greedy transcript per problem
    greedy = run_team(team, puzzles, work, temperature=0.0)

    # 2. `num_passes` samples per problem
    num_right = [0] * len(puzzles)
    for _ in range(num_passes):
        sample = run_team(team, puzzles, work, temperature=1.0)
        for i, is_right in enumerate(sample.chain_correct):
            num_right[i] += is_right
    num_solved = sum(num > 0 for num in num_right)

    # 3. summarize
    num_problems = len(puzzles)
    measures = {
        "greedy": sum(greedy.chain_correct) / num_problems,
        "greedy, refined": sum(greedy.refined_correct) / num_problems,
        "share refined": greedy.num_refined / num_problems,
        "sample": sum(num_right) / num_problems / max(1, num_passes),
        f"oracle@{num_passes}": num_solved / num_problems,
    }
    for name, share in work.shares().items():
        measures[f"{name} correct work"] = share
    return measures


def run_team(team: Team, puzzles: list[Puzzle], work: WorkCount, *, temperature: float) -> Pass:
    """Let the team work on each problem once. Counts each agent's work in `work`."""
    *chain_agents, refiner = REFINE.agents
    states = [State(puzzle.question, ()) for puzzle in puzzles]
    for agent in chain_agents:
        take_turn(team, agent, puzzles, states, work, temperature=temperature)
    chain_correct = _are_correct(puzzles, states)
    num_refined = take_turn(team, refiner, puzzles, states, work, temperature=temperature)
    refined_correct = _are_correct(puzzles, states)
    return Pass(chain_correct, refined_correct, num_refined)


def take_turn(
    team: Team,
    agent: Agent,
    puzzles: list[Puzzle],
    states: list[State],
    work: WorkCount,
    *,
    temperature: float,
) -> int:
    """Let an agent speak in each state in which it is on turn. Returns the number of these states.

    Replaces the states in place, and counts the agent's work in `work`.
    """
    on_turn = [i for i, state in enumerate(states) if REFINE.turn(state) == agent]
    if not on_turn:
        return 0
    messages = team.speak([states[i] for i in on_turn], temperature=temperature)
    for i, message in zip(on_turn, messages, strict=True):
        work.written[agent.name] += 1
        work.correct[agent.name] += is_correct_work(puzzles[i], agent.name, states[i], message)
        states[i] = REFINE.step(states[i], message)
    return len(on_turn)


def _are_correct(puzzles: list[Puzzle], states: list[State]) -> list[bool]:
    """Return for each state whether its last message gives the right answer."""
    correct = []
    for puzzle, state in zip(puzzles, states, strict=True):
        answer = extract_answer(state.messages[-1].text, "number")
        correct.append(answer.value == str(puzzle.answer))
    return correct


def is_correct_work(puzzle: Puzzle, agent: str, state: State, text: str) -> bool:
    """Return whether a message is what a faultless worker would say on this turn.

    The work of others is taken as it is: a Solver or a Verifier that is given a wrong candidate is
    correct if it works with this candidate. For the Planner and the Refiner, correct work includes
    the right candidate.
    """
    if agent == "Reader":
        return _is_correct_reader(puzzle, text)
    if agent == "Planner":
        return _is_correct_planner(puzzle, text)
    if agent == "Refiner":
        return _is_correct_refiner(puzzle, text)
    plan = state.messages[1].text
    candidate = read_candidate(puzzle, plan)
    if candidate is None:
        return False
    if agent == "Solver":
        return text == solver_message(puzzle, *candidate)
    return text == verifier_message(puzzle, *candidate)


def _is_correct_reader(puzzle: Puzzle, text: str) -> bool:
    """Return whether the Reader states the facts, in any order, and the item that is asked for."""
    expected = reader_message(puzzle, random.Random(0))
    return _split_facts(text) == _split_facts(expected)


def _split_facts(text: str) -> tuple[list[str], str]:
    """Split a Reader's message into its sorted facts and its last sentence."""
    sentences = text.split(". Asked")
    facts = sentences[0].removeprefix("Facts: ").split(", ")
    return sorted(facts), sentences[-1]


def _is_correct_planner(puzzle: Puzzle, text: str) -> bool:
    """Return whether the Planner proposes the solution, in either order, and checks it.

    It may do so after another candidate that it has checked correctly.
    """
    candidates = read_candidates(puzzle, text)
    if len(candidates) not in (1, 2) or candidates[-1] != (puzzle.x, puzzle.y):
        return False
    for seed in ORDER_SEEDS:
        plan, check = planner_message(puzzle, *candidates[0], random.Random(seed), estimate=True)
        if len(candidates) == 1:
            retries = [""]
        else:
            rngs = [random.Random(retry_seed) for retry_seed in ORDER_SEEDS]
            retries = [second_try(puzzle, puzzle.x, puzzle.y, rng) for rng in rngs]
        if text in [plan + check + retry for retry in retries]:
            return True
    return False


def _is_correct_refiner(puzzle: Puzzle, text: str) -> bool:
    """Return whether the Refiner proposes the solution, in either order, and checks it."""
    if read_candidate(puzzle, text) != (puzzle.x, puzzle.y):
        return False
    _, check_and_answer = refiner_message(puzzle, puzzle.x, puzzle.y, random.Random(0))
    return text.endswith(check_and_answer)


def read_candidate(puzzle: Puzzle, text: str) -> tuple[int, int] | None:
    """Read the last candidate of a message; None if there is none."""
    candidates = read_candidates(puzzle, text)
    return candidates[-1] if candidates else None


def read_candidates(puzzle: Puzzle, text: str) -> list[tuple[int, int]]:
    """Read every (x, y) from sentences such as "Try 4 small and 2 big." in a message."""
    candidates = []
    for part in text.split("Try ")[1:]:
        words = part.split(".")[0].split()
        try:
            counts = {words[1]: int(words[0]), words[4]: int(words[3])}
            first_item, second_item = puzzle.item_names
            candidates.append((counts[first_item], counts[second_item]))
        except (IndexError, KeyError, ValueError):
            continue
    return candidates


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=str(HERE / "agents"), help="folder of the model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument(
        "--from-phase",
        type=int,
        default=1,
        help="start with this phase (of PHASES), from what the previous phase saved in --output",
    )
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--evaluate", action="store_true", help="only measure the agents saved in --output"
    )
    parser.add_argument("--split", default="heldout", help="split to measure on")
    parser.add_argument(
        "--problems", type=int, default=100, help="problems per family to measure on"
    )
    parser.add_argument("--passes", type=int, default=30, help="sampled passes per problem")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        train(args)
    evaluate(args)


if __name__ == "__main__":
    main(parse_args())
