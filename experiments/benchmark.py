"""How fast the engine is: ratios of runs in one process, or shares of a limit of the machine.

Run it from the root of the repository:

    python -m experiments.benchmark trees --problems 64
    python -m experiments.benchmark packing --shape tiny --prompt 200 --new 30
    python -m experiments.benchmark engine --shape tiny --rows 16 64 --prompt 128 --new 32 \
        --states 64 --state-tokens 256
    python -m experiments.benchmark engine --device cuda --bandwidth 4300 --tflops 790

`trees` labels problems together, and in simpler ways. `packing` compares V on packed rows with V on
one row per sequence. `engine` measures decoding, scoring and training of V. Speed does not depend
on the weights, so the last two have random ones, and all messages have the same length. Their
default shape is that of a 1.5B model.
"""

import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    Qwen2Config,
)

import generate_rollouts
from llm.adapters import add_lora
from llm.decoding import Decoder, Draft, message_key, sample_tokens
from llm.packing import pack, sequence_columns
from llm.policy import Policy, make_policy
from mas import CHAIN
from support.flags import TINY_AGENTS, Parser, cli, positive_float, positive_int
from support.progress import Progress
from support.runs import peak_memory
from tasks.problems import Problem, load_problems
from train_value import training_loss
from value import Transcript, ValueModel, load_backbone

# ---- Simpler decoders ----------------------------------------------------------------------------


class UnsharedDecoder(Decoder):
    """Keeps a row of the cache for every message from its prompt on."""

    def decode(self, groups, *, batch_tokens):
        alone = [[message] for group in groups for message in group]
        return super().decode(alone, batch_tokens=batch_tokens)


class KeyedSampler(LogitsProcessor):
    """Makes `generate` take the tokens that our sampler draws with given keys.

    Attributes:
        logprobs: of the tokens of each step, [rows] per step.
    """

    def __init__(self, keys: torch.Tensor, greedy: torch.Tensor, warpers: LogitsProcessorList):
        self.keys = keys
        self.greedy = greedy
        self.warpers = warpers
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.logprobs)
        rows = torch.arange(len(scores), device=scores.device)
        steps = torch.full_like(rows, step)
        tokens, logprobs = sample_tokens(
            scores, rows, self.keys, steps, self.greedy, warpers=self.warpers
        )
        self.logprobs.append(logprobs)
        only_tokens = torch.full_like(scores, -torch.inf)
        return only_tokens.scatter(-1, tokens[:, None], 0.0)


class NaiveDecoder(Decoder):
    """Decodes by one padded `generate`, a row per message. All rows stay until the last ends."""

    def decode(self, groups, *, batch_tokens):
        start = time.perf_counter()
        messages = list(chain.from_iterable(groups))
        tokens, logprobs = self._generate(messages)
        for row, message in enumerate(messages):
            length = self._length(tokens[row], message.limit)
            message.tokens = tokens[row][:length]
            message.logprobs = logprobs[row][:length]
            message.seconds = (time.perf_counter() - start) / len(messages)
        return messages

    def _generate(self, messages: list[Draft]) -> tuple[list[list[int]], list[list[float]]]:
        """Return the new tokens and their log-probabilities, [rows][steps]."""
        token_ids, mask = self._pad([message.prompt for message in messages])
        inputs = [(message.key, message.greedy) for message in messages]
        keys, greedy = torch.tensor(inputs, device=self.model.device).T
        sampler = KeyedSampler(keys, greedy, self.warpers)
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max(message.limit for message in messages),
            eos_token_id=sorted(self.eos_ids),
            pad_token_id=self.pad_id,
        )
        with torch.inference_mode():
            output = self.model.generate(
                input_ids=token_ids,
                attention_mask=mask,
                logits_processor=LogitsProcessorList([sampler]),
                generation_config=config,
            )
        logprobs = torch.stack(sampler.logprobs, dim=1)
        return output[:, token_ids.shape[1] :].tolist(), logprobs.tolist()

    def _pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad prompts on the left. Returns token ids and attention mask, [prompts, longest]."""
        pad = partial(pad_sequence, batch_first=True, padding_side="left")
        token_ids = [torch.tensor(prompt, device=self.model.device) for prompt in prompts]
        mask = [torch.ones_like(ids) for ids in token_ids]
        return pad(token_ids, padding_value=self.pad_id), pad(mask)

    def _length(self, tokens: list[int], limit: int) -> int:
        """Return the length of a message: its end-of-message token is its last token."""
        for index, token in enumerate(tokens[:limit]):
            if token in self.eos_ids:
                return index + 1
        return limit


# ---- Trees: the speed of labelling ---------------------------------------------------------------


def make_labelling_policy(decoder_class: type[Decoder], args) -> Policy:
    """Load the agents as generate_rollouts.py does, but with another decoder."""
    policy = make_policy(args, CHAIN, progress=Progress(shown=False))
    decoder = decoder_class(
        policy.decoder.model,
        eos_ids=policy.decoder.eos_ids,
        pad_id=policy.decoder.pad_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    return replace(policy, decoder=decoder)


def label(problems: list[Problem], policy: Policy, args) -> tuple[float, dict]:
    """Label problems. Returns the seconds, and problem id -> nodes of its tree."""
    num_candidates = CHAIN.counts_per_agent(args.num_candidates, "--num-candidates")
    trees = {}
    start = time.perf_counter()
    for record in generate_rollouts.label_problems(problems, policy, num_candidates, args):
        trees[record["id"]] = record["nodes"]
    seconds = time.perf_counter() - start
    for nodes in trees.values():
        for node in nodes:
            node.pop("logprob", None)  # depends on the shape of the batch, by rounding
    return seconds, trees


def measure_trees(args) -> None:
    """Label the same problems in several ways, and compare each with the way it is done."""
    problems = load_problems("tiny", None, {"train": args.problems})
    together = len(problems)
    ways = {
        "all together": (Decoder, together),
        "a row per message": (UnsharedDecoder, together),
        "one padded generate per round": (NaiveDecoder, together),
        "one problem at a time": (Decoder, 1),
    }
    results = []
    for way, (decoder_class, max_active) in ways.items():
        argv = ["--num-threads", str(args.num_threads), "--device", args.device]
        argv += ["--max-active", str(max_active)]
        labelling_args = generate_rollouts.parse_args(argv)
        policy = make_labelling_policy(decoder_class, labelling_args)
        label(problems[:4], policy, labelling_args)  # to warm up
        results.append(label(problems, policy, labelling_args))

        (first_seconds, first_trees), (seconds, trees) = results[0], results[-1]
        num_equal = sum(trees[problem.id] == first_trees[problem.id] for problem in problems)
        print(
            f"{way:30s} {60 * len(problems) / seconds:7.1f} trees/min, takes "
            f"{seconds / first_seconds:5.2f} times as long as all together, "
            f"{num_equal} of {len(problems)} trees are equal",
            flush=True,
        )


# ---- Models with random weights ------------------------------------------------------------------


class Shape(NamedTuple):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int


SHAPES = {
    "1.5B": Shape(1536, 8960, 28, 12, 2, 151936),
    "0.5B": Shape(896, 4864, 24, 14, 2, 151936),
    "tiny": Shape(128, 384, 4, 4, 2, 640),
}


def random_model(args) -> PreTrainedModel:
    """Return a model of a shape, on a device, with random weights."""
    config = Qwen2Config(
        **SHAPES[args.shape]._asdict(), max_position_embeddings=8192, tie_word_embeddings=True
    )
    dtype = "bfloat16" if args.device != "cpu" else "float32"
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval()


def random_ids(num: int, args) -> list[int]:
    """Return token ids that are no special tokens."""
    return torch.randint(10, SHAPES[args.shape].vocab_size, (num,)).tolist()


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, after another to warm up."""
    for _ in range(2):
        if device != "cpu":
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
    return time.perf_counter() - start


# ---- Packing: what V reads -----------------------------------------------------------------------

NUM_SIBLINGS = 8


def measure_packing(args) -> None:
    """Score and train on siblings: packed into one row, and each in a row of its own."""
    torch.set_num_threads(args.num_threads)
    backbone = add_lora(random_model(args).model.requires_grad_(False), rank=16)
    tokenizer = AutoTokenizer.from_pretrained(TINY_AGENTS)
    model = ValueModel(backbone, tokenizer, CHAIN, "full", "huber")
    torch.nn.init.normal_(model.head.weight, std=0.02)
    prefix = random_ids(args.prompt, args)
    sequences = [prefix + random_ids(args.new, args) for _ in range(NUM_SIBLINGS)]
    transcripts = [Transcript(ids, positions=[len(ids) - 1]) for ids in sequences]
    print(f"{args.shape} shape, {args.prompt} shared tokens, {NUM_SIBLINGS} x {args.new} new")

    def values(max_width: int) -> torch.Tensor:
        batch = pack(sequences, indices=range(NUM_SIBLINGS), max_width=max_width)
        read = model.value(model.outputs(batch, transcripts))
        order = torch.tensor(list(sequence_columns(batch)), device=read.device).argsort()
        return read[order]

    score = torch.inference_mode()(values)

    def train(max_width: int) -> torch.Tensor:
        model.zero_grad()
        values(max_width).square().sum().backward()
        gradients = [parameter.grad.flatten() for parameter in model.trained_parameters().values()]
        return torch.cat(gradients)

    for activity, work, result in (("scoring", score, "V"), ("training", train, "gradients")):
        alone = seconds_of(partial(work, 0), args.device)
        packed = seconds_of(partial(work, model.row_width), args.device)
        difference = (work(0) - work(model.row_width)).abs().max().item()
        print(
            f"{activity}: {alone:.2f} s alone, {packed:.2f} s packed, "
            f"{alone / packed:.2f} times faster; {result} differ by {difference:.1e} at most"
        )


# ---- Engine: decoding, scoring and training ------------------------------------------------------

NUM_CANDIDATES = 3  # messages per prompt


def measure_engine(args) -> None:
    """Measure decoding, then scoring and a training step of V, on a model of one shape."""
    torch.set_num_threads(args.num_threads)
    model = random_model(args)
    measure_decoding(model, args)
    flops_per_token = 2 * sum(parameter.numel() for parameter in model.model.parameters())

    # V is loaded as from a checkpoint.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(TINY_AGENTS).save_pretrained(folder)
        del model  # make room
        backbone, tokenizer = load_backbone(folder, quantize=True, device=args.device, dtype="auto")
    backbone = add_lora(backbone, rank=args.lora_rank)
    value_model = ValueModel(backbone, tokenizer, CHAIN, "full", "huber")
    transcripts = []
    for _ in range(args.states):
        ids = random_ids(args.state_tokens, args)
        transcripts.append(Transcript(ids, positions=[len(ids) - 1]))
    measure_scoring(value_model, transcripts, flops_per_token, args)
    measure_training_step(value_model, transcripts, args)


def measure_decoding(model: PreTrainedModel, args) -> None:
    """Compare our decoder with `generate` per node, and with the bandwidth of the memory."""
    prompt = random_ids(args.prompt, args)
    print(f"{args.shape} shape, {args.prompt} prompt tokens, {args.new} new")
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    rate_per_node = NUM_CANDIDATES * args.new / seconds_per_node(model, prompt, args)
    print(f"per-node generate, {NUM_CANDIDATES} rows: {rate_per_node:9.0f} tokens/s")
    for num_rows in args.rows:
        rate = num_rows * args.new / seconds_of_decoder(model, prompt, num_rows, args)
        share = ""
        if args.bandwidth:
            # Every step reads the weights and the keys and values of all rows once.
            mean_length = args.prompt + args.new / 2
            bytes_per_step = weight_bytes + num_rows * mean_length * cache_bytes_per_token(model)
            limit = num_rows * args.bandwidth * 1e9 / bytes_per_step
            share = f", {rate / limit:.1%} of the bandwidth limit"
        print(
            f"engine, {num_rows:5d} rows: {rate:9.0f} tokens/s, "
            f"{rate / rate_per_node:5.1f} times per-node generate{share}, "
            f"peak {peak_memory(args.device)}",
            flush=True,
        )


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Return the size of the keys and values of one token, in all layers."""
    config = model.config
    head_dim = config.hidden_size // config.num_attention_heads
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim
    return numbers * model.dtype.itemsize


def seconds_per_node(model: PreTrainedModel, prompt: list[int], args) -> float:
    """Measure `generate` for the candidates of one node."""
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        num_return_sequences=NUM_CANDIDATES,
        min_new_tokens=args.new,
        max_new_tokens=args.new,
        eos_token_id=1,
        pad_token_id=0,
    )
    token_ids = torch.tensor([prompt], device=args.device)
    mask = torch.ones_like(token_ids)

    def generate() -> None:
        model.generate(input_ids=token_ids, attention_mask=mask, generation_config=config)

    return seconds_of(generate, args.device)


def seconds_of_decoder(model: PreTrainedModel, prompt: list[int], num_rows: int, args) -> float:
    """Measure our decoder on `num_rows` messages, NUM_CANDIDATES per prompt."""
    # No token ends a message before its limit.
    decoder = Decoder(model, eos_ids={-1}, pad_id=0, temperature=1.0, top_k=0, top_p=1.0)
    batch_tokens = num_rows * (args.prompt + args.new)

    def decode() -> list[Draft]:
        drafts = [Draft(row, prompt, args.new, message_key(row), False) for row in range(num_rows)]
        starts = range(0, num_rows, NUM_CANDIDATES)
        groups = [drafts[start : start + NUM_CANDIDATES] for start in starts]
        return list(decoder.decode(groups, batch_tokens=batch_tokens))

    return seconds_of(decode, args.device)


def measure_scoring(
    model: ValueModel, transcripts: list[Transcript], flops_per_token: int, args
) -> None:
    """Measure how many states V scores, beside what the device could compute."""

    def score() -> None:
        model.predict(transcripts, batch_tokens=131072)

    states_per_second = len(transcripts) / seconds_of(score, args.device)
    share = ""
    if args.tflops:
        flops = states_per_second * args.state_tokens * flops_per_token
        share = f", {flops / (args.tflops * 1e12):.1%} of the FLOP limit"
    print(
        f"scoring, NF4 with LoRA: {states_per_second:7.1f} states/s "
        f"of {args.state_tokens} tokens{share}",
        flush=True,
    )


def measure_training_step(model: ValueModel, transcripts: list[Transcript], args) -> None:
    """Measure forward and backward of one batch of at most 8,192 tokens."""
    transcripts = transcripts[: max(1, 8192 // args.state_tokens)]
    sequences = [transcript.ids for transcript in transcripts]
    batch = pack(sequences, indices=range(len(sequences)), max_width=model.row_width)
    targets = torch.full([len(sequences)], 0.5, device=args.device)
    groups = [("p", "a")] * len(sequences)
    if args.device != "cpu":
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        model.train()
        outputs = model.outputs(batch, transcripts)
        training_loss(model, outputs, targets, groups, huber_delta=1.0).backward()

    tokens_per_second = len(sequences) * args.state_tokens / seconds_of(step, args.device)
    print(
        f"QLoRA step, rank {args.lora_rank}: {tokens_per_second:7.0f} tokens/s, "
        f"peak {peak_memory(args.device)}"
    )


# ---- The script ----------------------------------------------------------------------------------

BENCHMARKS = {"trees": measure_trees, "packing": measure_packing, "engine": measure_engine}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="what to measure")
    add("--num-threads", type=positive_int, default=1, help="torch threads on the CPU")
    add("--problems", type=positive_int, default=64, help="trees: problems to label")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--shape", choices=SHAPES, default="1.5B", help="shape of the model")
    add("--rows", type=positive_int, nargs="+", default=[64, 256, 1024], help="messages together")
    add("--prompt", type=positive_int, default=768, help="tokens of a prompt")
    add("--new", type=positive_int, default=256, help="tokens of a message")
    add("--states", type=positive_int, default=256, help="engine: states to score")
    add("--state-tokens", type=positive_int, default=1024, help="engine: tokens of a state")
    add("--lora-rank", type=positive_int, default=256, help="engine: rank of LoRA")
    add("--bandwidth", type=positive_float, help="engine: of the memory, GB/s; shows the share")
    add("--tflops", type=positive_float, help="engine: of the device; shows the share")
    return parser.parse_args(argv)


def main(args) -> None:
    BENCHMARKS[args.benchmark](args)


if __name__ == "__main__":
    cli(parse_args, main)
