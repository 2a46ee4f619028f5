"""How fast the engine is: ratios of runs in one process, or shares of a limit of the machine.

Run it from the root of the repository:

    python -m tests.benchmark trees      # labels: as they are, and without one feature at a time
    python -m tests.benchmark scaling    # time per problem with 50, 200 and 800 problems
    python -m tests.benchmark engine --device cuda --bandwidth 4300 --tflops 790 --cuda-graphs
    python -m tests.benchmark engine --shape tiny --rows 16 64 --prompt 128 --new 32 \
        --states 64 --state-tokens 256
    python -m tests.benchmark lengths --shape tiny --prompt 64
    python -m tests.benchmark packing --shape 0.5B --prompt 500 --new 60

`engine` measures decoding, scoring and training of V. Speed does not depend on the weights, so they
are random, and every message has the same length. Its default shape is that of a 1.5B model.
"""

import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from itertools import product
from typing import NamedTuple
from unittest import mock

import torch
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
from generate_rollouts import make_searches
from llm.adapters import AgentAdapters, add_lora
from llm.cache import CacheRows, PreallocatedLayer
from llm.chat import ChatFormat
from llm.decoding import Decoder
from llm.packing import pack, sequences_of
from llm.policy import Policy, make_policy
from llm.sampling import message_key, sample_tokens
from mas import CHAIN, counts_per_agent
from support.flags import HERE, Parser, cli, positive_float, positive_int
from support.progress import SearchProgress, Work
from tasks.problems import load_problems
from train_value import peak_memory, training_loss
from tree import Sample, run_searches, tree_record
from value import Row, ValueModel, label_places, load_backbone

# ---- Decoders that lack a feature ----------------------------------------------------------------


def repeat_prompts(prompts: list[list[int]], repeats: list[int]) -> list[list[int]]:
    """Return one prompt per message."""
    repeated = []
    for prompt, num_messages in zip(prompts, repeats, strict=True):
        repeated += [prompt] * num_messages
    return repeated


class CopyingDecoder(Decoder):
    """Copies its cache at every step, as that of transformers does."""

    def decode(self, *batch, **options):
        with mock.patch.object(PreallocatedLayer, "SPARE_COLUMNS", 0):
            return super().decode(*batch, **options)


class UnfilledDecoder(Decoder):
    """Decodes batch after batch, each until its longest message has ended."""

    def decode(self, *batch, **options):
        with mock.patch.object(CacheRows, "is_resizable_for", staticmethod(lambda _: False)):
            return super().decode(*batch, **options)


class UnsharedDecoder(Decoder):
    """Keeps a row of the cache for every message from its prompt on."""

    def decode(self, prompts, repeats, *rest, **options):
        prompts = repeat_prompts(prompts, repeats)
        return super().decode(prompts, [1] * len(prompts), *rest, **options)


class KeyedSampler(LogitsProcessor):
    """Makes `generate` take the tokens that our sampler draws with given keys.

    Attributes:
        logprobs: of the tokens of each step, [rows] per step.
    """

    def __init__(self, keys: torch.Tensor, greedy: torch.Tensor, sampling: dict):
        self.keys = keys
        self.greedy = greedy
        self.sampling = sampling
        self.logprobs: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        step = len(self.logprobs)
        rows = torch.arange(len(scores), device=scores.device)
        steps = torch.full_like(rows, step)
        tokens, logprobs = sample_tokens(
            scores, rows, self.keys, steps, self.greedy, **self.sampling
        )
        self.logprobs.append(logprobs)
        only_tokens = torch.full_like(scores, -torch.inf)
        return only_tokens.scatter(-1, tokens[:, None], 0.0)


class NaiveDecoder(Decoder):
    """Decodes by one padded `generate` with a row per message. All rows stay until the last ends.

    All its time counts as that of the model.
    """

    def decode(self, prompts, repeats, limits, keys, greedy, *, batch_tokens, on_message):
        start = time.perf_counter()
        with self._timed("model"):
            prompts = repeat_prompts(prompts, repeats)
            tokens, logprobs = self._generate(prompts, max(limits), keys, greedy)
        seconds = (time.perf_counter() - start) / len(prompts)
        for row, limit in enumerate(limits):
            length = self._length(tokens[row], limit)
            on_message(row, tokens[row][:length], logprobs[row][:length], seconds)

    def _generate(
        self, prompts: list[list[int]], num_steps: int, keys: list[int], greedy: list[bool]
    ) -> tuple[list[list[int]], list[list[float]]]:
        """Return the new tokens and their log-probabilities, [rows][steps]."""
        device = self.model.device
        token_ids, mask = self._pad(prompts)
        sampler = KeyedSampler(
            torch.tensor(keys, device=device), torch.tensor(greedy, device=device), self.sampling
        )
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=num_steps,
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
        new_tokens = output[:, token_ids.shape[1] :]
        logprobs = torch.stack(sampler.logprobs, dim=1)
        return new_tokens.tolist(), logprobs.tolist()

    def _pad(self, prompts: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad prompts on the left. Returns token ids and attention mask, [prompts, longest]."""
        longest = max(map(len, prompts))
        token_ids, mask = [], []
        for prompt in prompts:
            padding = longest - len(prompt)
            token_ids.append([self.pad_id] * padding + prompt)
            mask.append([0] * padding + [1] * len(prompt))
        device = self.model.device
        return torch.tensor(token_ids, device=device), torch.tensor(mask, device=device)

    def _length(self, tokens: list[int], limit: int) -> int:
        """Return the length of a message: its end-of-message token is its last token."""
        for index, token in enumerate(tokens[:limit]):
            if token in self.eos_ids:
                return index + 1
        return limit


# ---- Trees: the speed of labelling ---------------------------------------------------------------


class Measurement(NamedTuple):
    """How fast problems were labelled.

    Attributes:
        trees: problem id -> nodes of its tree, without log-probabilities.
        shares: activity -> share of the time.
    """

    trees_per_minute: float
    trees: dict[str, list[dict]]
    shares: dict[str, float]

    def show_shares(self) -> str:
        return ", ".join(f"{activity} {share:.1%}" for activity, share in self.shares.items())


def make_labelling_args(num_threads: int):
    """Return the default flags of generate_rollouts.py, on the CPU."""
    argv = ["--num-threads", str(num_threads), "--device", "cpu"]
    return generate_rollouts.parse_args(argv)


def make_labelling_policy(decoder_class: type[Decoder], args) -> Policy:
    """Load the agents as generate_rollouts.py does, but with another decoder."""
    policy = make_policy(args, CHAIN)
    decoder = policy.decoder
    policy.decoder = decoder_class(
        decoder.model, eos_ids=decoder.eos_ids, pad_id=decoder.pad_id, **decoder.sampling
    )
    return policy


def load_training_problems(num: int):
    return load_problems(task="tiny", data=None, split="train", num=num)


def label(policy: Policy, problems: list, args, *, max_active: int) -> Measurement:
    """Label problems and measure the time."""
    seconds_before = dict(policy.decoder.seconds)
    num_candidates = counts_per_agent(CHAIN, args.num_candidates, "--num-candidates")
    searches = make_searches(problems, CHAIN, num_candidates, args)
    progress = SearchProgress(len(problems), Work(1, 1), description="", shown=False)
    trees = {}
    start = time.perf_counter()
    with decoding_time(policy.decoder) as decoding, tokenizer_time(policy.chat_format) as texts:
        for problem, root, cost in run_searches(
            searches, {Sample: policy}, max_active=max_active, progress=progress
        ):
            trees[problem.id] = without_logprobs(tree_record(problem, root, cost)["nodes"])
    seconds = time.perf_counter() - start

    shares = {}
    for activity, seconds_after in policy.decoder.seconds.items():
        shares[activity] = (seconds_after - seconds_before[activity]) / seconds
    shares["rest of the decoder"] = decoding.total() / seconds - sum(shares.values())
    shares["tokenizer"] = texts.total() / seconds
    shares["driver and tree"] = 1 - (decoding.total() + texts.total()) / seconds
    return Measurement(60 * len(problems) / seconds, trees, shares)


@contextmanager
def decoding_time(decoder: Decoder):
    """Count the seconds in `decode`, without those of what it calls for each message."""
    seconds = Counter()
    decode = decoder.decode

    def timed_decode(*args, on_message, **options):
        own_on_message = timed(on_message, seconds, "on_message", -1)
        return decode(*args, on_message=own_on_message, **options)

    with mock.patch.object(decoder, "decode", timed(timed_decode, seconds, "decode")):
        yield seconds


@contextmanager
def tokenizer_time(chat_format: ChatFormat):
    """Count the seconds in which prompts are rendered and encoded, and messages decoded."""
    seconds = Counter()
    with ExitStack() as patches:
        for name in ("encode", "message"):
            function = timed(getattr(chat_format, name), seconds, name)
            patches.enter_context(mock.patch.object(chat_format, name, function))
        yield seconds


def timed(function: Callable, seconds: Counter, activity: str, sign: int = 1) -> Callable:
    """Let a function add its seconds to those of an activity."""

    def call(*args, **options):
        start = time.perf_counter()
        try:
            return function(*args, **options)
        finally:
            seconds[activity] += sign * (time.perf_counter() - start)

    return call


def without_logprobs(nodes: list[dict]) -> list[dict]:
    """Log-probabilities depend on the shape of the batch, by rounding."""
    stripped = []
    for node in nodes:
        stripped.append({key: node[key] for key in node if key != "logprob"})
    return stripped


AS_IT_IS = "all in flight"


def measure_trees(args) -> None:
    """Label the same problems in several ways, and compare each with the way it is done."""
    labelling_args = make_labelling_args(args.num_threads)
    problems = load_training_problems(args.problems)
    decoders = {
        AS_IT_IS: Decoder,
        "batch after batch": UnfilledDecoder,
        "the library's cache": CopyingDecoder,
        "a row per message": UnsharedDecoder,
        "one padded generate per round": NaiveDecoder,
        "one problem at a time": Decoder,
    }

    # 1. measure
    measurements = {}
    for way, decoder_class in decoders.items():
        policy = make_labelling_policy(decoder_class, labelling_args)
        max_active = 1 if way == "one problem at a time" else len(problems)
        label(policy, problems[:4], labelling_args, max_active=max_active)  # to warm up
        measured = label(policy, problems, labelling_args, max_active=max_active)
        measurements[way] = measured
        rate = f"{measured.trees_per_minute:7.1f} trees/min"
        print(f"{way:30s} {rate}   {measured.show_shares()}", flush=True)

    # 2. compare
    as_it_is = measurements.pop(AS_IT_IS)
    for way, measured in measurements.items():
        ratio = as_it_is.trees_per_minute / measured.trees_per_minute
        num_equal = sum(as_it_is.trees[p.id] == measured.trees[p.id] for p in problems)
        equal = f"{num_equal} of {len(problems)} trees are equal"
        print(f"{AS_IT_IS} / {way}: {ratio:.2f}; {equal}")


def measure_scaling(args) -> None:
    """Label more and more problems together. The peak memory is that of the process so far."""
    labelling_args = make_labelling_args(args.num_threads)
    policy = make_labelling_policy(Decoder, labelling_args)
    for num in (50, 200, 800):
        measured = label(policy, load_training_problems(num), labelling_args, max_active=num)
        milliseconds = 60_000 / measured.trees_per_minute
        print(
            f"{num:4d} problems: {milliseconds:6.1f} ms per problem, peak {peak_memory('cpu')}   "
            f"{measured.show_shares()}",
            flush=True,
        )


# ---- Engine: decoding, scoring and training, on random weights -----------------------------------


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
NUM_CANDIDATES = 3  # messages per prompt


def measure_engine(args) -> None:
    """Measure decoding, then scoring and a training step of V, on a model of one shape."""
    torch.set_num_threads(args.num_threads)
    labelling_args = make_labelling_args(args.num_threads)
    batch_tokens = labelling_args.batch_tokens

    model = random_agents(args)
    measure_decoding(model, args)
    num_body_parameters = sum(parameter.numel() for parameter in model.model.parameters())

    # V is loaded as from a checkpoint. Any tokenizer will do.
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(labelling_args.model).save_pretrained(folder)
        del model  # make room
        backbone, tokenizer = load_backbone(folder, quantize=True, device=args.device, dtype="auto")
    backbone = add_lora(backbone, rank=args.lora_rank)
    value_model = ValueModel(backbone, tokenizer, CHAIN, "full", "huber")
    rows = random_rows(args.states, args.state_tokens, SHAPES[args.shape].vocab_size)
    measure_scoring(value_model, rows, batch_tokens, 2 * num_body_parameters, args)
    measure_training_step(value_model, rows, args)


def random_model(args) -> PreTrainedModel:
    """Return a model of the shape, type and device that the flags say, with random weights."""
    config = Qwen2Config(
        **SHAPES[args.shape]._asdict(), max_position_embeddings=8192, tie_word_embeddings=True
    )
    default = "bfloat16" if on_gpu(args.device) else "float32"
    torch.manual_seed(0)
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=args.dtype or default)
    return model.eval()


def random_agents(args) -> PreTrainedModel:
    """Return a random model whose next token is about as certain as that of a trained one.

    The sampler is fast because few tokens are likely. With logits of standard deviation 6, the
    1,024 likeliest of 152,000 tokens have 99.6 % of the probability.
    """
    model = random_model(args)
    embedding_std = model.config.initializer_range
    logits_std = embedding_std * math.sqrt(model.config.hidden_size)
    with torch.no_grad():
        model.model.norm.weight.mul_(6 / logits_std)
    return model


def on_gpu(device: str) -> bool:
    return device.startswith("cuda")


def seconds_of(work: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, after two others to warm up.

    CUDA graphs are made in the first, and again in the second if their memory has grown.
    """
    for _ in range(3):
        if on_gpu(device):
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if on_gpu(device):
            torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_decoding(model: PreTrainedModel, args) -> None:
    """Compare our decoder with `generate` per node, and with the bandwidth of the memory."""
    prompt = torch.randint(10, model.config.vocab_size, (args.prompt,)).tolist()
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    device_name = torch.cuda.get_device_name() if on_gpu(args.device) else "CPU"
    print(
        f"{args.shape} shape, {weight_bytes / 2**30:.2f} GiB of weights, "
        f"{args.prompt} prompt tokens, {args.new} new, {device_name}"
    )
    rate_per_node = NUM_CANDIDATES * args.new / seconds_per_node(model, prompt, args)
    print(f"per-node generate, {NUM_CANDIDATES} rows: {rate_per_node:9.0f} tokens/s")

    ways = {"engine": False, "graphs": True} if args.cuda_graphs else {"engine": False}
    for num_rows, (way, cuda_graphs) in product(args.rows, ways.items()):
        seconds = seconds_of_decoder(model, prompt, num_rows, args, cuda_graphs=cuda_graphs)
        rate = num_rows * args.new / seconds
        sampling = args.new * seconds_of_sampler(model, num_rows, args) / seconds
        share = ""
        if args.bandwidth:
            # Every step reads the weights and the keys and values of all rows once.
            mean_length = args.prompt + args.new / 2
            bytes_per_step = weight_bytes + num_rows * mean_length * cache_bytes_per_token(model)
            limit = num_rows * args.bandwidth * 1e9 / bytes_per_step
            share = f", {rate / limit:.1%} of the bandwidth limit"
        print(
            f"{way}, {num_rows:5d} rows:         {rate:9.0f} tokens/s, "
            f"{rate / rate_per_node:5.1f} times per-node generate, sampling takes {sampling:.1%}"
            f"{share}, peak {peak_memory(args.device)}",
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


def seconds_of_decoder(
    model: PreTrainedModel, prompt: list[int], num_rows: int, args, *, cuda_graphs: bool
) -> float:
    """Measure our decoder on `num_rows` messages, NUM_CANDIDATES per prompt."""
    decoder = Decoder(
        model,
        eos_ids={-1},  # so that no message ends before its limit
        pad_id=0,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        cuda_graphs=cuda_graphs,
    )
    num_prompts, rest = divmod(num_rows, NUM_CANDIDATES)
    repeats = [NUM_CANDIDATES] * num_prompts
    if rest:
        repeats.append(rest)
    prompts = [prompt] * len(repeats)
    limits = [args.new] * num_rows
    greedy = [False] * num_rows
    keys = [message_key(row) for row in range(num_rows)]

    def decode() -> None:
        decoder.decode(prompts, repeats, limits, keys, greedy)

    return seconds_of(decode, args.device)


@torch.inference_mode()
def seconds_of_sampler(model: PreTrainedModel, num_rows: int, args) -> float:
    """Measure one step of the sampler. Each message has logits of its own."""
    generator = torch.Generator(args.device).manual_seed(0)
    shape = (num_rows, model.config.vocab_size)
    logits = 6 * torch.randn(shape, generator=generator, device=args.device).to(model.dtype)
    messages = torch.arange(num_rows, device=args.device)
    greedy = torch.zeros(num_rows, dtype=torch.bool, device=args.device)

    def sample() -> None:
        sample_tokens(
            logits, messages, messages, messages, greedy, temperature=1.0, top_k=0, top_p=1.0
        )

    return seconds_of(sample, args.device)


def random_rows(num_rows: int, num_tokens: int, vocab_size: int) -> list[Row]:
    """Return rows of random tokens with one label each, at the last token."""
    rows = []
    for _ in range(num_rows):
        ids = torch.randint(10, vocab_size, (num_tokens,)).tolist()
        rows.append(Row(ids, positions=[num_tokens - 1], targets=[0.5], groups=[("p", "a")]))
    return rows


def measure_scoring(
    model: ValueModel, rows: list[Row], batch_tokens: int, flops_per_token: int, args
) -> None:
    def score() -> None:
        model.predict(rows, batch_tokens=batch_tokens)

    states_per_second = len(rows) / seconds_of(score, args.device)
    share = ""
    if args.tflops:
        flops = states_per_second * args.state_tokens * flops_per_token
        share = f", {flops / (args.tflops * 1e12):.1%} of the FLOP limit"
    print(
        f"scoring, NF4 with LoRA: {states_per_second:7.1f} states/s "
        f"of {args.state_tokens} tokens{share}",
        flush=True,
    )


def measure_training_step(model: ValueModel, rows: list[Row], args) -> None:
    """Measure forward and backward of one batch of at most 8,192 tokens."""
    rows = rows[: max(1, 8192 // args.state_tokens)]
    batch = pack([row.ids for row in rows], token_cost=model.token_cost, max_width=8192)
    targets = torch.full((len(rows),), 0.5, device=args.device)
    weights = torch.ones_like(targets)
    groups = [("p", "a")] * len(rows)
    if on_gpu(args.device):
        torch.cuda.reset_peak_memory_stats()

    def step() -> None:
        model.train()
        outputs = model.outputs(batch, label_places(batch, rows))
        training_loss(model, outputs, targets, weights, groups, huber_delta=1.0).backward()

    tokens_per_second = len(rows) * args.state_tokens / seconds_of(step, args.device)
    print(
        f"QLoRA step, rank {args.lora_rank}: {tokens_per_second:7.0f} tokens/s, "
        f"peak {peak_memory(args.device)}"
    )


# ---- Messages of different lengths ---------------------------------------------------------------

MEDIAN_LENGTH, LENGTH_SPREAD, LONGEST_LENGTH = 120, 0.7, 512  # lognormal, as of real models


def measure_lengths(args) -> None:
    """Decode messages of different lengths: with refilling, and batch after batch."""
    torch.set_num_threads(args.num_threads)
    model = random_agents(args)
    generator = torch.Generator().manual_seed(0)
    num = args.messages
    logs = torch.randn(num, generator=generator) * LENGTH_SPREAD + math.log(MEDIAN_LENGTH)
    limits = logs.exp().ceil().clamp(max=LONGEST_LENGTH).int().tolist()
    prompts = torch.randint(10, model.config.vocab_size, (num, args.prompt)).tolist()
    batch = (prompts, [1] * num, limits, list(range(num)), [False] * num)
    batch_tokens = args.rows[0] * (args.prompt + LONGEST_LENGTH)
    print(
        f"{num} messages of {sum(limits) / num:.0f} tokens on average, "
        f"at most {args.rows[0]} together"
    )
    results = []
    for name, decoder_class in (("refilled", Decoder), ("batch after batch", UnfilledDecoder)):
        decoder = decoder_class(model, eos_ids={-1}, pad_id=0, temperature=1.0, top_k=0, top_p=1.0)
        rows_of_step = []

        def count(module, args, kwargs, rows_of_step=rows_of_step):
            if kwargs["input_ids"].shape[1] == 1:
                rows_of_step.append(len(kwargs["input_ids"]))

        hook = model.register_forward_pre_hook(count, with_kwargs=True)
        start = time.perf_counter()
        messages = decoder.decode(*batch, batch_tokens=batch_tokens)
        seconds = time.perf_counter() - start
        hook.remove()
        results.append((seconds, len(rows_of_step), [tokens for tokens, _ in messages]))
        mean_rows = sum(limits) / len(rows_of_step)
        print(
            f"{name:18s} {len(rows_of_step):6d} steps, {mean_rows:6.1f} live messages per step "
            f"({mean_rows / args.rows[0]:.0%}), {seconds:6.1f} s",
            flush=True,
        )
    (seconds, steps, messages), (other_seconds, other_steps, other_messages) = results
    num_equal = sum(a == b for a, b in zip(messages, other_messages, strict=True))
    print(
        f"{other_steps / steps:.2f} times fewer steps, {other_seconds / seconds:.2f} times faster; "
        f"{num_equal} of {num} messages are equal"
    )


# ---- Finetuned agents ----------------------------------------------------------------------------


def measure_adapters(args) -> None:
    """Decode by agents with an adapter: beside the weights of the base, and merged into them."""
    torch.set_num_threads(args.num_threads)
    model = random_agents(args)
    adapters = AgentAdapters.add(model, CHAIN, sharing="shared", rank=args.lora_rank)
    prompt = torch.randint(10, model.config.vocab_size, (args.prompt,)).tolist()
    print(f"{args.shape} shape, LoRA of rank {args.lora_rank}, {args.prompt} + {args.new} tokens")
    for num_rows in args.rows:
        beside = seconds_of_decoder(model, prompt, num_rows, args)
        with adapters.merged("Reader"):
            merged = seconds_of_decoder(model, prompt, num_rows, args)
        print(
            f"{num_rows:5d} rows: {beside:6.2f} s beside, {merged:6.2f} s merged, "
            f"{beside / merged:.2f} times faster",
            flush=True,
        )


# ---- What V reads --------------------------------------------------------------------------------


def measure_packing(args) -> None:
    """Score and train on siblings: packed, and each with a row of its own."""
    torch.set_num_threads(args.num_threads)
    model = random_model(args).model.requires_grad_(False)
    model = ValueModel(
        add_lora(model, rank=16),
        AutoTokenizer.from_pretrained(HERE / "tiny" / "agents"),
        CHAIN,
        "full",
        "huber",
    ).to(args.device)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.head.weight, std=0.02)
    prefix = torch.randint(10, model.backbone.config.vocab_size, (args.prompt,)).tolist()
    sequences = []
    for _ in range(args.candidates):
        message = torch.randint(10, model.backbone.config.vocab_size, (args.new,)).tolist()
        sequences.append(prefix + message)
    rows = [Row(ids, positions=[len(ids) - 1]) for ids in sequences]
    print(f"{args.shape} shape, {args.prompt} shared tokens, {args.candidates} x {args.new} new")

    def read(token_cost) -> tuple[torch.Tensor, int]:
        batch = pack(sequences, token_cost=token_cost, max_width=10**6)
        values = model(batch, label_places(batch, rows))
        order = torch.tensor(sequences_of(batch), device=values.device).argsort()
        return values[order], sum(row.width for row in batch)

    def train(token_cost) -> list[torch.Tensor]:
        model.zero_grad()
        read(token_cost)[0].square().sum().backward()
        return [parameter.grad.clone() for parameter in model.trained_parameters().values()]

    with torch.inference_mode():
        scoring = {
            cost: seconds_of(lambda cost=cost: read(cost), args.device)
            for cost in (None, model.token_cost)
        }
        (alone, num_alone), (packed, num_packed) = read(None), read(model.token_cost)
    training = {
        cost: seconds_of(lambda cost=cost: train(cost), args.device)
        for cost in (None, model.token_cost)
    }
    gradients = zip(train(None), train(model.token_cost), strict=True)
    largest = max((a - b).abs().max().item() for a, b in gradients)
    print(
        f"tokens read: {num_alone} alone, {num_packed} packed\n"
        f"scoring: {scoring[None]:.2f} s alone, {scoring[model.token_cost]:.2f} s packed, "
        f"{scoring[None] / scoring[model.token_cost]:.2f} times faster; "
        f"V differs by {(alone - packed).abs().max():.1e}\n"
        f"training: {training[None]:.2f} s alone, {training[model.token_cost]:.2f} s packed, "
        f"{training[None] / training[model.token_cost]:.2f} times faster; "
        f"gradients differ by {largest:.1e} at most"
    )


# ---- The script ----------------------------------------------------------------------------------

BENCHMARKS = {
    "trees": measure_trees,
    "scaling": measure_scaling,
    "engine": measure_engine,
    "lengths": measure_lengths,
    "adapters": measure_adapters,
    "packing": measure_packing,
}


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("benchmark", choices=BENCHMARKS, help="what to measure")
    add("--num-threads", type=positive_int, default=1, help="torch threads on the CPU")
    add("--problems", type=positive_int, default=96, help="trees: problems to label")
    add("--device", default="cpu", help="cpu, cuda or cuda:N")
    add("--shape", choices=SHAPES, default="1.5B", help="shape of the model")
    add("--dtype", help="of the weights; default: bfloat16 on a GPU, float32 on a CPU")
    add("--rows", type=positive_int, nargs="+", default=[64, 256, 1024], help="messages together")
    add("--prompt", type=positive_int, default=768, help="tokens of a prompt")
    add("--new", type=positive_int, default=256, help="tokens of a message")
    add("--messages", type=positive_int, default=1536, help="lengths: messages in all")
    add("--candidates", type=positive_int, default=8, help="packing: messages of one state")
    add("--states", type=positive_int, default=256, help="engine: states to score")
    add("--state-tokens", type=positive_int, default=1024, help="engine: tokens of a state")
    add("--lora-rank", type=positive_int, default=256, help="engine and adapters: rank of LoRA")
    add("--bandwidth", type=positive_float, help="engine: of the memory, GB/s; shows the share")
    add("--cuda-graphs", action="store_true", help="engine: decode with CUDA graphs, too")
    add("--tflops", type=positive_float, help="engine: of the device; shows the share")
    return parser.parse_args(argv)


def main(args) -> None:
    BENCHMARKS[args.benchmark](args)


if __name__ == "__main__":
    cli(parse_args, main)
