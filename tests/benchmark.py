"""How fast the engine is; every figure is a ratio of two runs in this process, or a share of a limit.

    python tests/benchmark.py trees                      # labels: all in flight, less of the engine, one padded generate per round, one problem at a time
    python tests/benchmark.py scaling                    # cost per problem with 50, 200 and 800 problems
    python tests/benchmark.py engine --device cuda --shape 1.5B --bandwidth 4300 --tflops 790     # decoding, scoring, QLoRA
    python tests/benchmark.py engine --shape tiny --rows 16 64 --prompt 128 --new 32 --states 64 --state-tokens 256

The engine's speed does not depend on its weights, so `engine` draws them at random; every message has the same length.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LogitsProcessor, LogitsProcessorList, Qwen2Config
from transformers.cache_utils import DynamicLayer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import generate_rollouts  # noqa: E402
from generate_rollouts import Policy, Sample, draw_tokens, make_searches, run, tree_record  # noqa: E402
from mas import GRAPHS, load_problems  # noqa: E402
from train_value import LoraConfig, Row, ValueModel, get_peft_model, load_backbone, training_loss  # noqa: E402

SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary
    "1.5B": (1536, 8960, 28, 12, 2, 151936), "0.5B": (896, 4864, 24, 14, 2, 151936), "tiny": (128, 384, 4, 4, 2, 640)}


class NaivePolicy(Policy):
    """The usual way: all that wait in one padded `generate`, each prompt repeated for its candidates, all rows kept to the end."""

    def _decode(self, prompts, repeats, limits, draws, greedy):
        start, steps, step = time.perf_counter(), draws.shape[1], iter(range(draws.shape[1]))
        prompts = [prompt for prompt, n in zip(prompts, repeats) for _ in range(n)]
        width = max(map(len, prompts))
        ids = torch.tensor([[self.tokenizer.pad_token_id] * (width - len(prompt)) + prompt for prompt in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=self.device)
        draws, greedy, logprobs, sampling = torch.from_numpy(draws).to(self.device), torch.tensor(greedy, device=self.device), [], self.sampling

        class Sampler(LogitsProcessor):
            def __call__(self, input_ids, scores):
                tokens, own = draw_tokens(scores, draws[:, next(step)], greedy, **sampling)
                logprobs.append(own)
                return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)
        with torch.inference_mode():
            out = self.model.generate(input_ids=ids, attention_mask=mask, logits_processor=LogitsProcessorList([Sampler()]), generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=steps, eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.pad_token_id))
        found = []
        for tokens, own, limit in zip(out[:, width:].tolist(), torch.stack(logprobs, 1).tolist(), limits):
            end = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), limit)
            found.append((tokens[:min(end, limit)], own[:min(end, limit)]))
        self._spent("model", start)
        return found


class UnsharedPolicy(Policy):
    """A row of the cache for every message from its prompt on, as in the naive batch."""

    def _decode(self, prompts, repeats, limits, draws, greedy):
        return super()._decode([prompt for prompt, n in zip(prompts, repeats) for _ in range(n)], [1] * len(draws), limits, draws, greedy)


class CopyingPolicy(Policy):
    """The library's cache, which is copied at every step."""

    def _decode(self, *batch):
        with mock.patch.object(generate_rollouts, "SpareLayer", DynamicLayer):
            return super()._decode(*batch)


def label(policy: Policy, problems, args, max_active: int):
    """(trees per minute, trees without their log-probabilities, shares of the time)."""
    policy.seconds = dict.fromkeys(policy.seconds, 0.0)
    start, trees = time.perf_counter(), {}
    progress = SimpleNamespace(update=lambda: None, set_postfix_str=lambda text: None)
    for problem, root, cost in run(make_searches(problems, policy.mas, args), {Sample: policy}, max_active=max_active, progress=progress):
        trees[problem.id] = [{k: v for k, v in node.items() if k != "logprob"} for node in tree_record(problem, root, cost)["nodes"]]
    seconds = time.perf_counter() - start
    shares = {name: spent / seconds for name, spent in policy.seconds.items()}
    return 60 * len(problems) / seconds, trees, shares | {"driver and tree": 1 - sum(shares.values())}


def agents(policy_class, args, **changes) -> Policy:
    torch.set_num_threads(args.num_threads)
    settings = dict(seed=args.seed, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=128, batch_tokens=args.batch_tokens, device="cpu", quantize=False)
    return policy_class(GRAPHS["chain"], args.model, **(settings | changes))


def trees(args, own) -> None:
    problems = load_problems(task="tiny", data=None, split="train", num=own.problems)
    everyone = len(problems)
    ways = {"all in flight": (agents(Policy, args), everyone), "the library's cache": (agents(CopyingPolicy, args), everyone),
            "a row per message": (agents(UnsharedPolicy, args), everyone),
            "one padded generate per round": (agents(NaivePolicy, args, batch_tokens=10**9), everyone), "one problem at a time": (agents(Policy, args), 1)}
    found = {}
    for name, (policy, max_active) in ways.items():
        label(policy, problems[:4], args, max_active)   # to warm up
        rate, grown, shares = label(policy, problems, args, max_active)
        found[name] = (rate, grown)
        print(f"{name:30s} {rate:7.1f} trees/min   " + ", ".join(f"{what} {share:.1%}" for what, share in shares.items()), flush=True)
    rate, grown = found["all in flight"]
    for name in list(ways)[1:]:
        same = sum(grown[p.id] == found[name][1][p.id] for p in problems)
        print(f"all in flight / {name}: {rate / found[name][0]:.2f}; {same} of {len(problems)} trees are equal")


def scaling(args, own) -> None:
    policy = agents(Policy, args)
    for num in (50, 200, 800):
        rate, _, shares = label(policy, load_problems(task="tiny", data=None, split="train", num=num), args, num)
        print(f"{num:4d} problems: {60 / rate * 1000:6.1f} ms per problem   " + ", ".join(f"{what} {share:.1%}" for what, share in shares.items()), flush=True)


def random_model(shape: str, device: str):
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
                         num_key_value_heads=kv_heads, max_position_embeddings=8192, tie_word_embeddings=True)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if device.startswith("cuda") else torch.float32).eval()


def timed(work, device: str) -> float:
    """Seconds, after one call to warm up."""
    for _ in range(2):
        if device.startswith("cuda"):
            torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        if device.startswith("cuda"):
            torch.cuda.synchronize()
    return time.perf_counter() - start


def engine(args, own) -> None:
    device, num = own.device, 3   # C = 3 candidates per prompt
    torch.set_num_threads(args.num_threads)
    model = random_model(own.shape, device)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    config, size = model.config, model.dtype.itemsize
    kv = 2 * config.num_hidden_layers * config.num_key_value_heads * (config.hidden_size // config.num_attention_heads) * size
    policy = Policy.__new__(Policy)
    policy.model, policy.device, policy.tokenizer, policy.ends = model, torch.device(device), SimpleNamespace(pad_token_id=0), {-1}
    policy.sampling, policy.seconds = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}, {"model": 0.0, "sampling": 0.0, "tokenizer": 0.0}
    prompt = torch.randint(10, config.vocab_size, (own.prompt,)).tolist()

    def per_node():
        policy.model.generate(input_ids=torch.tensor([prompt], device=device), attention_mask=torch.ones((1, own.prompt), dtype=torch.long, device=device),
                              generation_config=GenerationConfig(do_sample=True, top_k=0, top_p=1.0, num_return_sequences=num, min_new_tokens=own.new, max_new_tokens=own.new,
                                                          eos_token_id=1, pad_token_id=0))
    alone = num * own.new / timed(per_node, device)
    print(f"{own.shape} shape, {weights / 2**30:.2f} GiB of weights, {own.prompt} prompt tokens, {own.new} new, {torch.cuda.get_device_name() if device != 'cpu' else 'CPU'}")
    print(f"per-node generate, {num} rows: {alone:9.0f} tokens/s")
    for rows in own.rows:
        prompts = -(-rows // num)
        repeats = [num] * (prompts - 1) + [rows - num * (prompts - 1)]
        seconds = timed(lambda: policy._decode([prompt] * prompts, repeats, [own.new] * rows, np.random.default_rng(0).random((rows, own.new)), [False] * rows), device)
        rate = rows * own.new / seconds
        limit = own.bandwidth and rows / ((weights + rows * kv * (own.prompt + own.new / 2)) / (own.bandwidth * 1e9))
        peak = f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device != "cpu" else ""
        print(f"engine, {rows:5d} rows:         {rate:9.0f} tokens/s, {rate / alone:5.1f} times per-node generate"
              + (f", {rate / limit:.1%} of the bandwidth limit" if limit else "") + peak, flush=True)
    flops = 2 * sum(p.numel() for p in model.model.parameters())
    with tempfile.TemporaryDirectory() as folder:   # through the same door as a real backbone; any tokenizer will do
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(args.model).save_pretrained(folder)
        del policy.model, model
        backbone, tokenizer = load_backbone(folder, quantize=True, device=device)
    lora = LoraConfig(r=own.lora_rank, lora_alpha=2 * own.lora_rank, target_modules="all-linear")
    value = ValueModel(get_peft_model(backbone, lora), tokenizer, GRAPHS["chain"], "full", "huber")
    rows = [Row(torch.randint(10, config.vocab_size, (own.state_tokens,)).tolist(), [own.state_tokens - 1], [0.5], [("p", "a")]) for _ in range(own.states)]
    seconds = timed(lambda: value.predict(rows, batch_tokens=args.batch_tokens, progress=None), device)
    print(f"scoring, NF4 with LoRA: {own.states / seconds:7.1f} states/s of {own.state_tokens} tokens"
          + (f", {own.states * own.state_tokens * flops / seconds / (own.tflops * 1e12):.1%} of the FLOP limit" if own.tflops else ""), flush=True)
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    batch = rows[:max(1, 8192 // own.state_tokens)]

    def step():
        value.train()
        outputs = value.outputs([row.ids for row in batch], [(i, row.positions[0]) for i, row in enumerate(batch)])
        training_loss(value, outputs, torch.full((len(batch),), 0.5, device=device), [("p", "a")] * len(batch), huber_delta=1.0).backward()
    print(f"QLoRA step, rank {own.lora_rank}: {len(batch) * own.state_tokens / timed(step, device):7.0f} tokens/s"
          + (f", peak {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB" if device != "cpu" else ""))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("trees", "scaling", "engine"))
    parser.add_argument("--problems", type=int, default=96)
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--rows", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--prompt", type=int, default=768)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--states", type=int, default=256)
    parser.add_argument("--state-tokens", type=int, default=1024)
    parser.add_argument("--lora-rank", type=int, default=256)
    parser.add_argument("--bandwidth", type=float, default=0.0, help="of the memory, GB/s; gives the share of the limit")
    parser.add_argument("--tflops", type=float, default=0.0, help="of the device; gives the share of the limit")
    own = parser.parse_args()
    {"trees": trees, "scaling": scaling, "engine": engine}[own.what](generate_rollouts.parse_args(["--num-threads", str(own.num_threads)]), own)
