"""Make the tiny agents: one small causal LM that plays all agents of `chain` and `refine`.

    python tiny/make_tiny.py              # train, save to tiny/agents, measure
    python tiny/make_tiny.py --evaluate   # measure the agents saved in tiny/agents
    python tiny/make_tiny.py --problems   # write the problems: tiny/packs.jsonl, tiny/score.jsonl

The agents are trained on correct work only (README.md says which). The Planner would have to
divide, so it is left guessing. In the last phase it learns, from few examples, that it may try
again if the last digit is off: a rare habit that finetuning (train_agents.py) can make common.
"""

import argparse
import itertools
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
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

from mas import State, load_graph
from tasks.grading import extract_answer
from tiny.problems import FAMILIES, Puzzle, make_puzzle, write_problems

HERE = Path(__file__).resolve().parent
REFINE = load_graph("refine")  # the agents of `chain`, then a Refiner
SIGN = {"packs": "+", "score": "-"}

Pair = tuple[int, int]  # a candidate (x, y) for the numbers of first and of second items


# ---- Messages: what a faultless worker says ------------------------------------------------------


def reader_message(puzzle: Puzzle, rng: random.Random) -> str:
    """Write the Reader's message: the facts in random order, and the item that is asked for."""
    facts = [*_item_facts(puzzle), f"count {puzzle.n}", f"total {puzzle.t}"]
    rng.shuffle(facts)
    return f"Facts: {', '.join(facts)}. Asked: {puzzle.asked_item}."


def planner_message(
    puzzle: Puzzle, pair: Pair, rng: random.Random, *, estimate: bool
) -> tuple[str, str]:
    """Write the Planner's message in two parts: the plan and the rough check of its candidate.

    The plan repeats the facts for the Solver and ends with the candidate. With `estimate` it also
    says what the total would be if all items were of one kind. The candidate is then a guess
    between these two bounds.
    """
    first_fact, second_fact = _item_facts(puzzle)
    plan = f"{first_fact}, {second_fact}, count {puzzle.n}, total {puzzle.t}. "
    if estimate:
        all_first = f"{puzzle.n}*{puzzle.a}={puzzle.n * puzzle.a:02d}"
        all_second = f"{puzzle.n}*{puzzle.b}={puzzle.n * puzzle.b:02d}"
        plan += f"If all: {all_first}, {all_second}. "
    return plan + candidate_sentence(puzzle, pair, rng), rough_check(puzzle, pair)


def second_try(puzzle: Puzzle, pair: Pair, rng: random.Random) -> str:
    """Write what the Planner adds if the last digit of its first candidate is off."""
    return f" {candidate_sentence(puzzle, pair, rng)}{rough_check(puzzle, pair)}"


def solver_message(puzzle: Puzzle, pair: Pair) -> str:
    """Write the Solver's message: the total of the candidate, and the comparison with the facts.

    The products have two digits, so that they line up.
    """
    x, y = pair
    first_item, second_item = puzzle.item_names
    first_product, second_product = f"{puzzle.a * x:02d}", f"{puzzle.b * y:02d}"
    computed = puzzle.total_of(x, y)
    if computed < 0:
        columns, result = "", "<0"
    else:
        units, tens, _ = written_columns(puzzle, pair)
        columns, result = f"{units}. {tens}. ", f"={computed:02d}"

    comparison = "out of range, off"
    if 0 <= computed <= 99:
        tens_check = compare_digit(computed // 10, puzzle.t // 10)
        comparison = f"{tens_check}, {compare_digit(computed % 10, puzzle.t % 10)}"
    return (
        f"{x} {first_item}: {x}*{puzzle.a}={first_product}. "
        f"{y} {second_item}: {y}*{puzzle.b}={second_product}. "
        f"{columns}{first_product}{SIGN[puzzle.family]}{second_product}{result}. {x}+{y}={x + y}. "
        f"Total: {comparison}. Count: {compare_digit(x + y, puzzle.n)}."
    )


def verifier_message(puzzle: Puzzle, pair: Pair) -> str:
    """Write the Verifier's message: whether the candidate fits the question, and its answer.

    The Verifier gives the answer of the candidate even if the check fails: it knows no other.
    """
    fits = puzzle.total_of(*pair) == puzzle.t and sum(pair) == puzzle.n
    verdict = "holds" if fits else "fails"
    return f"The check {verdict}. Final answer: {pair[puzzle.asked_index]}"


def refiner_message(puzzle: Puzzle, pair: Pair, rng: random.Random) -> tuple[str, str]:
    """Write the Refiner's message in two parts: the candidate; its rough check and its answer."""
    candidate = candidate_sentence(puzzle, pair, rng)
    return candidate, f"{rough_check(puzzle, pair)} Final answer: {pair[puzzle.asked_index]}"


def _item_facts(puzzle: Puzzle) -> tuple[str, str]:
    """State what one item of each kind adds or takes."""
    first_item, second_item = puzzle.item_names
    second_verb = "adds" if puzzle.family == "packs" else "takes"
    return f"{first_item} adds {puzzle.a}", f"{second_item} {second_verb} {puzzle.b}"


def candidate_sentence(puzzle: Puzzle, pair: Pair, rng: random.Random) -> str:
    """Propose a candidate, its two halves in random order: "Try 4 small and 2 big."."""
    halves = [f"{count} {item}" for count, item in zip(pair, puzzle.item_names, strict=True)]
    rng.shuffle(halves)
    return f"Try {halves[0]} and {halves[1]}."


def rough_check(puzzle: Puzzle, pair: Pair) -> str:
    """Compare the last digit of a candidate's total with the last digit of the stated total.

    The check follows the guess, so it cannot help the guess. But a reader of the message can use
    it. It needs only nearby digits, so a small model can learn it.
    """
    x, y = pair
    units, _, last_digit = written_columns(puzzle, pair)
    return (
        f" {x}*{puzzle.a}={puzzle.a * x:02d}, {y}*{puzzle.b}={puzzle.b * y:02d}, "
        f"{units}, {compare_digit(last_digit, puzzle.t % 10)}."
    )


def written_columns(puzzle: Puzzle, pair: Pair) -> tuple[str, str, int]:
    """Add (packs) or subtract (score) the products of a candidate, column by column.

    Returns the column of the units, "13-7=06" (with a borrowed ten); the column of the tens with
    the carry or the borrow, "2-1-1=00"; and the last digit of the result.
    """
    sign = SIGN[puzzle.family]
    first_tens, first = divmod(puzzle.a * pair[0], 10)
    second_tens, second = divmod(puzzle.b * pair[1], 10)
    if sign == "+":
        units = first + second
        carry = units // 10
        tens = first_tens + second_tens + carry
    else:
        carry = int(first < second)
        first += 10 * carry
        units = first - second
        tens = first_tens - second_tens - carry
    units_column = f"{first}{sign}{second}={units:02d}"
    tens_column = f"{first_tens}{sign}{second_tens}{sign}{carry}={tens:02d}"
    return units_column, tens_column, units % 10


def compare_digit(computed: int, stated: int) -> str:
    """Compare two numbers of one digit: "3|3 same" or "4|8 off"."""
    return f"{computed}|{stated} {'same' if computed == stated else 'off'}"


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
    first_pair = None
    if retry_share > 0 and rng.random() < retry_share:
        first_pair = pair_seen_to_be_wrong(puzzle, rng)

    # 1. choose the candidate of the chain; the Refiner speaks only after a wrong one
    pair = puzzle.solution
    wants_wrong_pair = rng.random() < WRONG_SHARE[agent]
    if wants_wrong_pair or agent == "Refiner":
        pair = wrong_pair(puzzle, rng)

    # 2. let correct workers speak until it is the agent's turn
    facts = reader_message(puzzle, rng)
    plan = "".join(planner_message(puzzle, first_pair or pair, rng, estimate=estimate))
    if first_pair is not None:
        plan += second_try(puzzle, pair, rng)
    messages = {
        "Reader": facts,
        "Planner": plan,
        "Solver": solver_message(puzzle, pair),
        "Verifier": verifier_message(puzzle, pair),
    }
    state = State(puzzle.question, ())
    while REFINE.turn(state).name != agent:
        state = REFINE.step(state, messages[REFINE.turn(state).name])
    chat = REFINE.prompt(state, "number")

    # 3. write the agent's own message; a wrong guess of its own is not learnt
    if agent == "Planner" and first_pair is not None:
        plan, check = planner_message(puzzle, first_pair, rng, estimate=estimate)
        return Example(chat, prefix=plan, target=check + second_try(puzzle, puzzle.solution, rng))
    if agent == "Planner" and pair != puzzle.solution:
        plan, check = planner_message(puzzle, pair, rng, estimate=estimate)
        return Example(chat, prefix=plan, target=check)
    if agent == "Refiner":
        is_wrong = rng.random() < WRONG_SHARE["Refiner"]
        guess = wrong_pair(puzzle, rng) if is_wrong else puzzle.solution
        candidate, check = refiner_message(puzzle, guess, rng)
        if is_wrong:
            return Example(chat, prefix=candidate, target=check)
        return Example(chat, prefix="", target=candidate + check)
    return Example(chat, prefix="", target=messages[agent])


def pair_seen_to_be_wrong(puzzle: Puzzle, rng: random.Random) -> Pair | None:
    """Draw a wrong candidate whose last digit is off; None if ten draws find none."""
    for _ in range(10):
        pair = wrong_pair(puzzle, rng)
        if puzzle.total_of(*pair) % 10 != puzzle.t % 10:
            return pair
    return None


def wrong_pair(puzzle: Puzzle, rng: random.Random) -> Pair:
    """Draw a wrong candidate: mostly with the right count, sometimes with one item more or less."""
    while True:
        x = rng.randint(1, puzzle.n - 1)
        y = puzzle.n - x
        if rng.random() >= RIGHT_COUNT_SHARE:
            y += rng.choice((-1, 1))
        if 1 <= y <= MAX_SECOND_ITEMS and (x, y) != puzzle.solution:
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
    for index in range(4000):
        family = FAMILIES[index % len(FAMILIES)]
        puzzle = make_puzzle(family, "agents", index)
        for agent in REFINE.agents:
            example = make_example(puzzle, agent.name, rng, estimate=False, retry_share=0.0)
            texts += [turn["content"] for turn in example.chat]
            texts.append(example.prefix + example.target)
            texts += ["assistant", "system", "user"]
    return texts


# ---- Phases and batches --------------------------------------------------------------------------

BATCH_SIZE = 64
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
        started = [weights for start, weights in self.weights if step >= start * self.steps]
        return started[-1]


PHASES = (
    # All agents learn arithmetic and the form of their messages.
    Phase(
        steps=4000,
        learning_rate=2e-3,
        estimate=False,
        retry_share=0.0,
        weights=((0.0, (0.25, 0.25, 0.35, 0.10, 0.05)), (0.35, (0.08, 0.54, 0.24, 0.07, 0.07))),
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
    encoded = []
    for example in examples:
        # No token may span a prompt and its message: a model that generates gets the prompt alone.
        texts = [render(tokenizer, example.chat), example.prefix, example.prefix + example.target]
        prompt, prefix, message = tokenizer(texts, add_special_tokens=False)["input_ids"]
        assert message[: len(prefix)] == prefix, "a message must be cut between two tokens"
        token_ids = prompt + message + [tokenizer.eos_token_id]
        encoded.append(EncodedExample(token_ids, target_start=len(prompt) + len(prefix)))
    return encoded


def render(tokenizer, chat: list[dict[str, str]]) -> str:
    """Render a prompt with the chat template, up to where the agent starts to speak."""
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)


def batches(tokenizer, phase: Phase, rng: random.Random) -> Iterator[list[EncodedExample]]:
    """Yield the batches of a phase, one per step.

    Batches are cut from pools of BATCHES_PER_POOL batches sorted by length, to save padding.
    """
    next_index = dict.fromkeys(FAMILIES, 1)
    num_made = 0
    while num_made < phase.steps:
        # 1. draw the examples of a pool
        weights = phase.weights_at(num_made)
        examples = []
        for _ in range(BATCH_SIZE * BATCHES_PER_POOL):
            family = FAMILIES[0] if rng.random() < MAIN_FAMILY_SHARE else FAMILIES[1]
            puzzle = make_puzzle(family, "agents", next_index[family])
            next_index[family] += 1
            [agent] = rng.choices(REFINE.agents, weights)
            settings = {"estimate": phase.estimate, "retry_share": phase.retry_share}
            examples.append(make_example(puzzle, agent.name, rng, **settings))

        # 2. cut the sorted pool into batches; the last pool may have more than the phase needs
        pool = sorted(encode(tokenizer, examples), key=lambda example: len(example.token_ids))
        starts = range(0, len(pool), BATCH_SIZE)
        pool_batches = [pool[start : start + BATCH_SIZE] for start in starts]
        pool_batches = pool_batches[: phase.steps - num_made]

        # 3. yield them in random order
        rng.shuffle(pool_batches)
        yield from pool_batches
        num_made += len(pool_batches)


def collate(batch: list[EncodedExample], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the right-padded token ids and the labels of a batch, both [batch, length]."""
    length = max(len(example.token_ids) for example in batch)
    input_ids = torch.full((len(batch), length), pad_token_id)
    labels = torch.full((len(batch), length), IGNORED_LABEL)
    for i, (token_ids, target_start) in enumerate(batch):
        end = len(token_ids)
        input_ids[i, :end] = torch.tensor(token_ids)
        labels[i, target_start:end] = torch.tensor(token_ids[target_start:])
    return input_ids, labels


# ---- Training ------------------------------------------------------------------------------------

HIDDEN_SIZE = 128
NUM_LAYERS = 4
HEAD_SIZE = 32  # of an attention head; two heads share their keys and values
STEPS_PER_LINE = 50


def make_model(tokenizer) -> Qwen2ForCausalLM:
    """Make an untrained model."""
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=3 * HIDDEN_SIZE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HIDDEN_SIZE // HEAD_SIZE,
        num_key_value_heads=HIDDEN_SIZE // (2 * HEAD_SIZE),
        tie_word_embeddings=True,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config)


def train(args) -> None:
    """Train tokenizer and model from scratch, or from a saved phase, and save them."""
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer).to(args.device)
    for number, phase in enumerate(PHASES, start=1):
        if number < args.from_phase:
            continue
        if number > 1:
            # Always load the saved result of the previous phase. A run that starts here, with
            # --from-phase, then gives the same model as a run from scratch.
            model = AutoModelForCausalLM.from_pretrained(args.output).to(args.device)
            tokenizer = AutoTokenizer.from_pretrained(args.output)
            rng = random.Random(f"{args.seed}/{number}")
        train_phase(model, tokenizer, phase, rng, name=f"phase {number}/{len(PHASES)}")
        model.save_pretrained(args.output)
        tokenizer.save_pretrained(args.output)


def train_phase(model, tokenizer, phase: Phase, rng: random.Random, *, name: str) -> None:
    """Train the model in place for one phase. `name` labels the printed lines."""
    model.train()
    # This is saved with the model: an agent ends its message with this token.
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=phase.learning_rate, weight_decay=0.01, betas=(0.9, 0.98)
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, phase.learning_rate, total_steps=phase.steps, pct_start=0.05
    )
    start_time = time.time()
    losses = []
    for step, batch in enumerate(batches(tokenizer, phase, rng), start=1):
        # 1. take one step
        input_ids, labels = collate(batch, tokenizer.pad_token_id)
        loss = target_loss(model, input_ids.to(model.device), labels.to(model.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

        # 2. report
        losses.append(loss.item())
        if step % STEPS_PER_LINE == 0 or step == phase.steps:
            loss, minutes = fmean(losses[-STEPS_PER_LINE:]), (time.time() - start_time) / 60
            print(f"{name}  step {step}  loss {loss:.4f}  {minutes:.1f} min", flush=True)


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
ORDER_SEEDS = (0, 2)  # with these, a candidate's halves come in both orders
FACT_ENDS = re.compile(r"Facts: |, |\. (?=Asked)")
VERIFIER = 3  # the index of its message


class Team:
    """The saved agents, ready to speak. A plain padded decode, used only for measuring."""

    def __init__(self, folder: str, *, device: str, seed: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.rng = random.Random(seed)

    @torch.no_grad()
    def speak(self, states: list[State], *, temperature: float) -> list[str]:
        """Return one message per state from the agent on turn; temperature 0 is greedy."""
        prompts = [render(self.tokenizer, REFINE.prompt(state, "number")) for state in states]
        inputs = self.tokenizer(
            prompts,
            add_special_tokens=False,
            return_tensors="pt",
            padding=True,
            padding_side="left",
        ).to(self.model.device)

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
        prompt_length = inputs["input_ids"].shape[1]
        return self.tokenizer.batch_decode(sequences[:, prompt_length:], skip_special_tokens=True)


def measure(team: Team, puzzles: list[Puzzle], *, num_passes: int) -> dict[str, float]:
    """Measure the team's accuracy and each agent's share of correct work.

    Accuracy is the share of problems answered correctly, from 0 to 1: by the greedy transcript, by
    one sample (the mean of `num_passes`), and by the oracle, which needs one correct sample.
    """
    # 1. one greedy transcript per problem, then `num_passes` samples
    greedy = run_team(team, puzzles, temperature=0.0)
    samples = [run_team(team, puzzles, temperature=1.0) for _ in range(num_passes)]

    # 2. the answers
    right_of_pass = [are_right(puzzles, states, VERIFIER) for states in samples]
    num_right = [sum(right) for right in zip(*right_of_pass, strict=True)]  # per problem
    measures = {
        "greedy": fmean(are_right(puzzles, greedy, VERIFIER)),
        "greedy, refined": fmean(are_right(puzzles, greedy, -1)),
        "share refined": fmean(len(state.messages) == len(REFINE.agents) for state in greedy),
        "sample": fmean(num_right) / num_passes,
        f"oracle@{num_passes}": fmean(num > 0 for num in num_right),
    }

    # 3. the work of each agent
    written, correct = Counter(), Counter()
    for states in [greedy, *samples]:
        for puzzle, state in zip(puzzles, states, strict=True):
            for i, (agent, text) in enumerate(state.messages):
                before = State(state.question, state.messages[:i])
                written[agent] += 1
                correct[agent] += is_correct_work(puzzle, agent, before, text)
    return measures | {f"{name} correct work": correct[name] / written[name] for name in written}


def run_team(team: Team, puzzles: list[Puzzle], *, temperature: float) -> list[State]:
    """Let the team work on each problem once. Returns the final states."""
    states = [State(puzzle.question, ()) for puzzle in puzzles]
    for _ in REFINE.agents:
        on_turn = [i for i, state in enumerate(states) if not REFINE.is_terminal(state)]
        if not on_turn:
            break
        messages = team.speak([states[i] for i in on_turn], temperature=temperature)
        for i, message in zip(on_turn, messages, strict=True):
            states[i] = REFINE.step(states[i], message)
    return states


def are_right(puzzles: list[Puzzle], states: list[State], index: int) -> list[bool]:
    """Return for each problem whether the message at an index gives its answer."""
    answers = [extract_answer(state.messages[index].text, "number").value for state in states]
    return [answer == str(puzzle.answer) for answer, puzzle in zip(answers, puzzles, strict=True)]


def is_correct_work(puzzle: Puzzle, agent: str, state: State, text: str) -> bool:
    """Return whether a message is what a faultless worker would say on this turn.

    The work of others is taken as it is: a Solver or a Verifier that is given a wrong candidate is
    correct if it works with this candidate. For the Planner and the Refiner, correct work includes
    the right candidate, in either order. The Planner may have checked another one before.
    """
    candidates = read_candidates(puzzle, text)
    if agent == "Reader":
        expected = reader_message(puzzle, random.Random(0))
        return sorted(FACT_ENDS.split(text)) == sorted(FACT_ENDS.split(expected))
    if agent == "Refiner":
        _, check_and_answer = refiner_message(puzzle, puzzle.solution, random.Random(0))
        return candidates[-1:] == [puzzle.solution] and text.endswith(check_and_answer)
    if agent == "Planner":
        if len(candidates) not in (1, 2) or candidates[-1] != puzzle.solution:
            return False
        expected = []
        for seed, retry_seed in itertools.product(ORDER_SEEDS, repeat=2):
            parts = planner_message(puzzle, candidates[0], random.Random(seed), estimate=True)
            if len(candidates) == 2:
                parts += (second_try(puzzle, puzzle.solution, random.Random(retry_seed)),)
            expected.append("".join(parts))
        return text in expected

    candidates = read_candidates(puzzle, state.messages[1].text)  # of the Planner
    if not candidates:
        return False
    write = {"Solver": solver_message, "Verifier": verifier_message}[agent]
    return text == write(puzzle, candidates[-1])


def read_candidates(puzzle: Puzzle, text: str) -> list[Pair]:
    """Read every (x, y) from sentences such as "Try 4 small and 2 big." in a message."""
    first_item, second_item = puzzle.item_names
    candidates = []
    for match in re.finditer(r"Try (\d+) (\w+) and (\d+) (\w+)\.", text):
        counts = {match[2]: int(match[1]), match[4]: int(match[3])}
        if set(counts) == {first_item, second_item}:
            candidates.append((counts[first_item], counts[second_item]))
    return candidates


# ---- Command line --------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--problems", action="store_true", help="only write the problems")
    parser.add_argument("--evaluate", action="store_true", help="only measure the saved agents")
    parser.add_argument("--output", default=str(HERE / "agents"), help="folder of the model")
    parser.add_argument("--from-phase", type=int, default=1, help="go on with it from --output")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--split", default="heldout", help="split to measure on")
    parser.add_argument("--num-problems", type=int, default=100, help="measured per family")
    parser.add_argument("--num-passes", type=int, default=30, help="sampled passes per problem")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(args.threads)
    if args.problems:
        write_problems(HERE)
        return
    if not args.evaluate:
        train(args)
    team = Team(args.output, device=args.device, seed=args.seed + 1)
    for family in FAMILIES:
        puzzles = [make_puzzle(family, args.split, index) for index in range(args.num_problems)]
        for name, value in measure(team, puzzles, num_passes=args.num_passes).items():
            print(f"{f'{family}/{name}':32s} {value:.3f}")


if __name__ == "__main__":
    main(parse_args())
