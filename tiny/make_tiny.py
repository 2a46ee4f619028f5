"""Make the tiny agents: one small causal LM, in Hugging Face format, that plays all four agents of the graph `chain`.

    python tiny/make_tiny.py                       # train, save to tiny/agents, measure
    python tiny/make_tiny.py --evaluate            # measure what is in tiny/agents

The agents are honest workers: they are trained on correct work only. The Reader copies the facts that matter, the Planner
proposes the pair that solves the problem and checks its last digit, the Solver carries out whatever pair it is given (also wrong
ones) and compares, the Verifier reports the comparison and answers; the Refiner of the graph `refine` proposes another pair where
the check fails. Reading, multiplying and comparing are learnt well; the Planner, which would have to divide, is left guessing.
The prompts are those of `mas.py`, in the model's chat template, as a real checkpoint would get them.
"""

import argparse
import json
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mas import GRAPHS, State, extract_answer  # noqa: E402
from tiny.problems import FAMILIES, Puzzle, make_puzzle, total  # noqa: E402

HERE = Path(__file__).resolve().parent
REFINE = GRAPHS["refine"]  # the chain, and a Refiner
# The share of an agent's examples about a wrong candidate; with fewer, the Solver learns to find what the plan hopes for.
WRONG_SHARE = {"Reader": 0.0, "Planner": 0.4, "Solver": 0.65, "Verifier": 0.65, "Refiner": 0.4}
CHAT_TEMPLATE = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
                 "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def reader_message(puzzle: Puzzle, rng: random.Random) -> str:
    """The facts in any order."""
    verb = "adds" if puzzle.family == "packs" else "takes"
    facts = [f"{puzzle.kinds[0]} adds {puzzle.a}", f"{puzzle.kinds[1]} {verb} {puzzle.b}",
             f"count {puzzle.n}", f"total {puzzle.t}"]
    rng.shuffle(facts)
    return f"Facts: {', '.join(facts)}. Asked: {puzzle.kinds[puzzle.asked]}."


def planner_message(puzzle: Puzzle, x: int, y: int, rng: random.Random, *, estimate: bool) -> tuple[str, str]:
    """(the facts for the Solver and a candidate, its two halves in either order; a rough check of it). See `rough_check`.
    estimate: with what the total would be if all were of one kind, between which the candidate is guessed."""
    verb = "adds" if puzzle.family == "packs" else "takes"
    bounds = f"If all: {puzzle.n}*{puzzle.a}={puzzle.n * puzzle.a:02d}, {puzzle.n}*{puzzle.b}={puzzle.n * puzzle.b:02d}. " if estimate else ""
    return (f"{puzzle.kinds[0]} adds {puzzle.a}, {puzzle.kinds[1]} {verb} {puzzle.b}, count {puzzle.n}, total {puzzle.t}. "
            f"{bounds}{candidate(puzzle, x, y, rng)}", rough_check(puzzle, x, y))


def candidate(puzzle: Puzzle, x: int, y: int, rng: random.Random) -> str:
    halves = [f"{x} {puzzle.kinds[0]}", f"{y} {puzzle.kinds[1]}"]
    rng.shuffle(halves)
    return f"Try {halves[0]} and {halves[1]}."


def rough_check(puzzle: Puzzle, x: int, y: int) -> str:
    """The last digit of what a candidate comes to, beside the wanted one. It is written after the guess, so it cannot help
    the guess, but it can be read: a rough check made by the agent whose work it is, and local enough to be learnt."""
    first, second = puzzle.a * x, puzzle.b * y
    units, sign, unit = add_units(puzzle, first, second)
    return f" {x}*{puzzle.a}={first:02d}, {y}*{puzzle.b}={second:02d}, {units[0]}{sign}{units[1]}={unit:02d}, {compare_digit(unit % 10, puzzle.t % 10)}."


def add_units(puzzle: Puzzle, first: int, second: int) -> tuple[tuple[int, int], str, int]:
    """The units' column: (its two numbers, with a borrowed ten where one is needed; the sign; what they come to)."""
    units = first % 10, second % 10
    if puzzle.family == "packs":
        return units, "+", units[0] + units[1]
    units = units[0] + 10 * (units[0] < units[1]), units[1]
    return units, "-", units[0] - units[1]


def solver_message(puzzle: Puzzle, x: int, y: int) -> str:
    """What the candidate comes to, and the comparison digit by digit (products have two digits, so that they line up).
    The sum is taken column by column, units first, carrying."""
    first, second, got = puzzle.a * x, puzzle.b * y, total(puzzle.family, puzzle.a, puzzle.b, x, y)
    units, sign, unit = add_units(puzzle, first, second)
    carry = int(unit > 9 if sign == "+" else units[0] > 9)
    tens = first // 10 + second // 10 + carry if sign == "+" else first // 10 - second // 10 - carry
    columns = f"{units[0]}{sign}{units[1]}={unit:02d}. {first // 10}{sign}{second // 10}{sign}{carry}={tens:02d}. " if got >= 0 else ""
    shown = f"={got:02d}" if got >= 0 else "<0"
    return (f"{x} {puzzle.kinds[0]}: {x}*{puzzle.a}={first:02d}. {y} {puzzle.kinds[1]}: {y}*{puzzle.b}={second:02d}. "
            f"{columns}{first:02d}{sign}{second:02d}{shown}. {x}+{y}={x + y}. "
            f"Total: {compare(got, puzzle.t)}. Count: {x + y}|{puzzle.n} {'same' if x + y == puzzle.n else 'off'}.")


def compare(got: int, want: int) -> str:
    """Two-digit numbers digit by digit, "3|3 same, 4|8 off"; one phrase where `got` has no two digits."""
    if not 0 <= got <= 99:
        return "out of range, off"
    return ", ".join(compare_digit(int(g), int(w)) for g, w in zip(f"{got:02d}", f"{want:02d}"))


def compare_digit(got: int, want: int) -> str:
    return f"{got}|{want} {'same' if got == want else 'off'}"


def verifier_message(puzzle: Puzzle, x: int, y: int) -> str:
    """Whether the work fits the question, and the answer the work gives, be it right or not: there is no other."""
    fits = total(puzzle.family, puzzle.a, puzzle.b, x, y) == puzzle.t and x + y == puzzle.n
    return f"The check {'holds' if fits else 'fails'}. Final answer: {(x, y)[puzzle.asked]}"


def refiner_message(puzzle: Puzzle, x: int, y: int, rng: random.Random) -> tuple[str, str]:
    """(another candidate; a rough check of it and the answer it gives)."""
    return candidate(puzzle, x, y, rng), f"{rough_check(puzzle, x, y)} Final answer: {(x, y)[puzzle.asked]}"


def wrong_pair(puzzle: Puzzle, rng: random.Random) -> tuple[int, int]:
    """A wrong candidate: mostly another pair with the right count, sometimes a neighbour with a wrong count."""
    while True:
        x = rng.randint(1, puzzle.n - 1)
        y = puzzle.n - x if rng.random() < 0.7 else puzzle.n - x + rng.choice((-1, 1))
        if 1 <= y <= 8 and (x, y) != (puzzle.x, puzzle.y):
            return x, y


def make_example(puzzle: Puzzle, agent: str, rng: random.Random, *, estimate: bool) -> tuple[list[dict], str, str]:
    """(chat, given, said): one turn of one agent doing correct work; its message is given + said, only `said` is learnt.

    A wrong candidate is never learnt, only what follows from it: in two thirds of the examples the Planner and the Refiner are
    given their guess, wrong, and learn to check it; the Solver and the Verifier are given work that starts from it.
    """
    pair = wrong_pair(puzzle, rng) if rng.random() < WRONG_SHARE[agent] or agent == "Refiner" else (puzzle.x, puzzle.y)
    messages = {"Reader": reader_message(puzzle, rng), "Planner": "".join(planner_message(puzzle, *pair, rng, estimate=estimate)),
                "Solver": solver_message(puzzle, *pair), "Verifier": verifier_message(puzzle, *pair)}
    state = State(puzzle.question, ())
    while REFINE.turn(state).name != agent:
        state = REFINE.step(state, messages[REFINE.turn(state).name])
    given, said = "", messages.get(agent)
    if agent == "Planner" and pair != (puzzle.x, puzzle.y):
        given, said = planner_message(puzzle, *pair, rng, estimate=estimate)
    if agent == "Refiner":
        again = wrong_pair(puzzle, rng) if rng.random() < WRONG_SHARE[agent] else (puzzle.x, puzzle.y)
        given, said = refiner_message(puzzle, *again, rng)
        if again == (puzzle.x, puzzle.y):
            given, said = "", given + said
    return REFINE.prompt(state, "number"), given, said


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Qwen2's tokenizer with a small vocabulary: byte-level BPE, any text can be encoded, every digit is one token.

    AutoTokenizer gives any Qwen2 model Qwen2's own way of splitting text, whatever a tokenizer.json says; so that is used.
    """
    qwen = Qwen2Tokenizer().backend_tokenizer
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = qwen.normalizer, qwen.pre_tokenizer, qwen.decoder
    texts = []
    for i in range(4000):
        puzzle = make_puzzle(FAMILIES[i % len(FAMILIES)], "agents", i)
        for agent in REFINE.agents:
            chat, given, said = make_example(puzzle, agent.name, rng, estimate=False)
            texts += [turn["content"] for turn in chat] + [given + said, "assistant", "system", "user"]
    trainer = trainers.BpeTrainer(vocab_size=640, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   chat_template=CHAT_TEMPLATE, model_max_length=1024)


def encode(tokenizer, examples) -> list[tuple[list[int], int]]:
    """(token ids of prompt + message + end-of-message, how many of them are given) per example."""
    tokens = lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"]
    prompts = tokens([tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat, _, _ in examples])
    given, messages = tokens([given for _, given, _ in examples]), tokens([given + said for _, given, said in examples])
    assert all(m[:len(g)] == g for g, m in zip(given, messages)), "a message must be cut between two tokens"
    return [(p + m + [tokenizer.eos_token_id], len(p) + len(g)) for p, g, m in zip(prompts, given, messages)]


PHASES = (  # each has a one-cycle schedule of its own; shares: (from which part of the phase on, share of each agent in the examples)
    {"steps": 4000, "lr": 2e-3, "estimate": False, "shares": (   # all learn their forms, and arithmetic
        (0.0, {"Reader": 0.25, "Planner": 0.25, "Solver": 0.35, "Verifier": 0.1, "Refiner": 0.05}),
        (0.35, {"Reader": 0.08, "Planner": 0.54, "Solver": 0.24, "Verifier": 0.07, "Refiner": 0.07}))},
    {"steps": 1200, "lr": 1.5e-3, "estimate": True, "shares": (  # the Planner learns to guess between two bounds
        (0.0, {"Reader": 0.07, "Planner": 0.6, "Solver": 0.1, "Verifier": 0.17, "Refiner": 0.06}),)},
)


def batches(tokenizer, phase: dict, *, batch_size: int, rng: random.Random):
    """A phase's batches, cut from pools sorted by length so that little is padding."""
    index, made, pools = {family: 0 for family in FAMILIES}, 0, 16
    while made < phase["steps"]:
        shares = next(shares for start, shares in reversed(phase["shares"]) if made >= start * phase["steps"])
        examples = []
        for _ in range(batch_size * pools):
            family = FAMILIES[0] if rng.random() < 0.7 else FAMILIES[1]
            index[family] += 1
            agent = rng.choices(list(shares), list(shares.values()))[0]
            examples.append(make_example(make_puzzle(family, "agents", index[family]), agent, rng, estimate=phase["estimate"]))
        pool = sorted(encode(tokenizer, examples), key=lambda row: len(row[0]))
        cuts = [pool[i:i + batch_size] for i in range(0, len(pool), batch_size)][:phase["steps"] - made]
        rng.shuffle(cuts)
        yield from cuts
        made += len(cuts)


def train(args) -> None:
    rng, start = random.Random(args.seed), time.time()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(rng)
    config = Qwen2Config(vocab_size=len(tokenizer), hidden_size=args.hidden, intermediate_size=3 * args.hidden,
                         num_hidden_layers=args.layers, num_attention_heads=args.hidden // 32,
                         num_key_value_heads=args.hidden // 64, tie_word_embeddings=True, max_position_embeddings=1024,
                         eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None)
    model = Qwen2ForCausalLM(config).to(args.device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {args.threads} threads", flush=True)
    for number, phase in enumerate(PHASES, 1):
        if number < args.from_phase:
            continue
        if number > 1:   # as saved, so that going on from a saved phase is the same as going straight through
            model = AutoModelForCausalLM.from_pretrained(args.output).to(args.device)
            tokenizer, rng = AutoTokenizer.from_pretrained(args.output), random.Random(f"{args.seed}/{number}")
        train_phase(model, tokenizer, phase, rng, args, f"phase {number}/{len(PHASES)}")
    probe = [make_example(make_puzzle(FAMILIES[0], "agents", i), agent.name, rng, estimate=True) for i in range(9) for agent in REFINE.agents]
    assert encode(tokenizer, probe) == encode(AutoTokenizer.from_pretrained(args.output), probe), "the tokenizer loads differently"
    print(f"saved to {args.output} after {(time.time() - start) / 60:.1f} minutes")


def train_phase(model, tokenizer, phase: dict, rng: random.Random, args, name: str) -> None:
    model.train()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    optimizer = torch.optim.AdamW(model.parameters(), lr=phase["lr"], weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, phase["lr"], total_steps=phase["steps"], pct_start=0.05)
    start, tokens, running = time.time(), 0, None
    for step, rows in enumerate(batches(tokenizer, phase, batch_size=args.batch_size, rng=rng), 1):
        width = max(len(ids) for ids, _ in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        labels = torch.full((len(rows), width), -100)
        for i, (row, given) in enumerate(rows):
            ids[i, :len(row)] = torch.tensor(row)
            labels[i, given:len(row)] = torch.tensor(row[given:])  # the loss is on what the agent says
        ids, labels = ids.to(args.device), labels.to(args.device)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # causal and right-padded: no mask needed
        own = labels[:, 1:] != -100
        loss = torch.nn.functional.cross_entropy(model.lm_head(hidden[own]), labels[:, 1:][own])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        tokens += ids.numel()
        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        if step % 50 == 0 or step == phase["steps"]:
            print(f"{name}  step {step}/{phase['steps']}  loss {running:.4f}  {tokens / (time.time() - start):,.0f} tokens/s  "
                  f"{(time.time() - start) / 60:.1f} min", flush=True)
    model.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)


@torch.no_grad()
def say(model, tokenizer, states, *, temperature: float, generator) -> list[str]:
    """One message per state from the agent on turn; a plain padded decode, only for measuring here."""
    ids = tokenizer([tokenizer.apply_chat_template(REFINE.prompt(s, "number"), add_generation_prompt=True, tokenize=False) for s in states],
                    add_special_tokens=False, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {"do_sample": False}
    torch.manual_seed(generator.randrange(2**31))
    out = model.generate(**ids, max_new_tokens=120, pad_token_id=tokenizer.pad_token_id, **sampling)
    return tokenizer.batch_decode(out[:, ids["input_ids"].shape[1]:], skip_special_tokens=True)


def evaluate(args) -> dict:
    """Accuracy per agent and the operating point, on fresh problems: greedy, one sample, the oracle over `passes` samples."""
    model = AutoModelForCausalLM.from_pretrained(args.output).to(args.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    rng, report = random.Random(args.seed + 1), {}
    for family in FAMILIES:
        puzzles = [make_puzzle(family, args.split, i) for i in range(args.problems)]
        wins, right, said = [0] * len(puzzles), {}, {}
        for run in range(args.passes + 1):  # run 0 is greedy
            states = [State(p.question, ()) for p in puzzles]
            refined = []
            for agent in REFINE.agents:   # the chain, and where its Verifier objects, the Refiner
                live = [i for i, state in enumerate(states) if REFINE.turn(state) == agent]
                if agent.name == "Refiner":
                    hits, refined = [extract_answer(s.messages[-1].text, "number") == str(p.answer) for s, p in zip(states, puzzles)], live
                texts = say(model, tokenizer, [states[i] for i in live], temperature=0.0 if run == 0 else 1.0, generator=rng) if live else []
                for i, text in zip(live, texts):
                    said[agent.name] = said.get(agent.name, 0) + 1
                    right[agent.name] = right.get(agent.name, 0) + is_correct_work(puzzles[i], agent.name, states[i], text)
                    states[i] = REFINE.step(states[i], text)
            after = [extract_answer(s.messages[-1].text, "number") == str(p.answer) for s, p in zip(states, puzzles)]
            if run == 0:
                report[f"{family}/greedy"], report[f"{family}/greedy, refined"] = sum(hits) / len(hits), sum(after) / len(after)
                report[f"{family}/share refined"] = len(refined) / len(puzzles)
            else:
                wins = [w + h for w, h in zip(wins, hits)]
        report[f"{family}/sample"] = sum(wins) / len(wins) / max(1, args.passes)
        report[f"{family}/oracle@{args.passes}"] = sum(w > 0 for w in wins) / len(wins)
        report |= {f"{family}/{name} correct work": right[name] / said[name] for name in said}
    for name, value in report.items():
        print(f"{name:32s} {value:.3f}")
    return report


def is_correct_work(puzzle: Puzzle, agent: str, state: State, text: str) -> bool:
    """Whether a message is what a faultless worker would say, given what this one was given."""
    if agent == "Reader":
        return _same_facts(puzzle, text)
    if agent == "Planner":
        return text in ("".join(planner_message(puzzle, puzzle.x, puzzle.y, random.Random(s), estimate=True)) for s in range(8))
    try:  # the candidate that was made
        words = (text if agent == "Refiner" else state.messages[1].text).split("Try ")[1].split(".")[0].split()
        counts = {words[1]: int(words[0]), words[4]: int(words[3])}
        x, y = counts[puzzle.kinds[0]], counts[puzzle.kinds[1]]
    except (IndexError, KeyError, ValueError):
        return False
    if agent == "Refiner":
        return (x, y) == (puzzle.x, puzzle.y) and text.endswith("".join(refiner_message(puzzle, x, y, random.Random(0))).split(".", 1)[1])
    return text == (solver_message(puzzle, x, y) if agent == "Solver" else verifier_message(puzzle, x, y))


def _same_facts(puzzle: Puzzle, text: str) -> bool:
    """The Reader's facts in another order."""
    wanted = reader_message(puzzle, random.Random(0))
    facts = lambda t: (sorted(t.split(". Asked")[0].removeprefix("Facts: ").split(", ")), t.split(". Asked")[-1])
    return facts(text) == facts(wanted)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default=str(HERE / "agents"), help="folder of the model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--from-phase", type=int, default=1, help="go on with this phase (of PHASES) from what the one before saved in --output")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--evaluate", action="store_true", help="only measure what is in --output")
    parser.add_argument("--split", default="heldout", help="split to measure on")
    parser.add_argument("--problems", type=int, default=100, help="problems per family to measure on")
    parser.add_argument("--passes", type=int, default=30, help="sampled passes per problem")
    return parser.parse_args(argv)


def main(args) -> None:
    torch.set_num_threads(args.threads)
    if not args.evaluate:
        train(args)
    (Path(args.output) / "accuracy.json").write_text(json.dumps(evaluate(args), indent=1) + "\n")


if __name__ == "__main__":
    main(parse_args())
