"""Stage 1: label every action by search, without a human (MAS-MCTS, paper section 4.1).

For each training problem, N simulations over the agents; the final answer's reward of +1 or -1 is backed up along the
path; the mean reward Q(s, a) of an edge is the target for V at next(s, a). No value model is involved here.

    python generate_rollouts.py                        # the embedded default -> runs/tiny/rollouts/trees.jsonl
    accelerate launch --num_processes 4 generate_rollouts.py     # the same trees, by four processes (one GPU each)
    python generate_rollouts.py --benchmark            # batched over many problems against one problem at a time

Searches are plain sequential generators: one search knows one problem, yields requests, is resumed with replies and
knows no model. `run` advances hundreds of them at once and answers their requests in batches.
"""

import hashlib
import itertools
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from mas import (HERE, MAS, InputError, Parser, Problem, State, cli, extract_answer, is_correct, load_graph, load_problems,
                 non_negative_float, non_negative_int, parse_jsonl, positive_float, positive_int, positive_unit_float, seeded, source)

# ---------------------------------------------------------------------------------------------------------------------
# The tree


class Candidate(NamedTuple):
    """One sampled message."""
    text: str
    tokens: int          # generated, the end-of-message token included
    logprob: float       # sum over its tokens of log pi(token | prefix) in nats, before temperature, top-k and top-p
    truncated: bool      # it ran into the token limit


class Node:
    """A state, and the edge (s, a) that leads to it: N, W and Q are that edge's statistics; the root has no edge."""

    def __init__(self, state: State, parent: "Node | None", candidate: Candidate | None, path: tuple[int, ...]):
        self.state, self.parent, self.candidate = state, parent, candidate
        self.path = path                          # which candidate was taken at each step from the root
        self.children: list[Node] | None = None   # None until expanded
        self.N = 0                                # visits
        self.W = 0.0                              # sum of what was backed up
        self.V: float | None = None               # V(state), where a value model scored it (stage 3)
        self.reward: float | None = None          # what a terminal state backs up

    @property
    def Q(self) -> float:
        return self.W / self.N if self.N else 0.0  # an edge never visited: 0, the middle of [-1, 1]


def select(node: Node, c: float) -> Node:
    """Eq. 2: argmax_a Q(s,a) + c * sqrt(ln(1 + sum_b N(s,b)) / (1 + N(s,a))); ties go to the first."""
    log_total = math.log(1 + sum(child.N for child in node.children))
    return max(node.children, key=lambda child: child.Q + c * math.sqrt(log_total / (1 + child.N)))


def backup(node: Node, value: float) -> None:
    """N += 1 and W += value on every edge from `node` to the root; no discount. The root counts visits, too."""
    while node is not None:
        node.N += 1
        node.W += value
        node = node.parent


def make_root(question: str) -> Node:
    return Node(State(question, ()), None, None, ())


def make_child(mas: MAS, node: Node, candidate: Candidate, index: int) -> Node:
    return Node(mas.step(node.state, candidate.text), node, candidate, node.path + (index,))


def expand(mas: MAS, node: Node, candidates: list[Candidate]) -> list[Node]:
    """One child per distinct text: identical texts are one action (the first of them)."""
    first = {candidate.text: index for index, candidate in reversed(list(enumerate(candidates)))}
    node.children = [make_child(mas, node, candidates[index], index) for index in sorted(first.values())]
    return node.children


# ---------------------------------------------------------------------------------------------------------------------
# Requests: what a search may ask for. The reply has one entry per node.


class Sample(NamedTuple):
    """`num` messages from the agent on turn, at each node. Reply: a list of `num` Candidates per node."""
    nodes: list[Node]
    num: int
    greedy: bool = False   # take the most likely token at every step instead of drawing


class Score(NamedTuple):
    """A value in [-1, 1] of each node's state: V, or what stands in for it (policy likelihood, random)."""
    nodes: list[Node]


class Outcome(NamedTuple):
    """The outcome model's value in [-1, 1] of each (terminal) node's state."""
    nodes: list[Node]


def label_tree(problem: Problem, mas: MAS, *, num_simulations: int, num_candidates: tuple[int, ...], c_uct: float,
               rng: random.Random) -> Generator[Sample, list[list[Candidate]], Node]:
    """MAS-MCTS for one problem (Algorithm 1). Returns the root.

    num_candidates: C per agent. rng: the tree's own; it picks where to go on among fresh children.
    The gold answer is used here, and only here: to label.
    """
    root = make_root(problem.question)
    for _ in range(num_simulations):
        node = root
        while not mas.is_terminal(node.state):
            if node.children is not None:
                node = select(node, c_uct)                                                    # Eq. 2
                continue
            [candidates] = yield Sample([node], num_candidates[mas.index(node.state)])
            node = rng.choice(expand(mas, node, candidates))                                  # uniform among the fresh
            for sibling in node.parent.children:
                if mas.is_terminal(sibling.state):
                    answer = extract_answer(sibling.state.messages[-1].text, problem.kind)
                    sibling.reward = 1.0 if is_correct(problem, answer) else -1.0
                    if sibling is not node:
                        backup(sibling, sibling.reward)      # already generated, so graded and counted once
        backup(node, node.reward)
    return root


# ---------------------------------------------------------------------------------------------------------------------
# The driver: sequential searches, batched execution


@dataclass
class Cost:
    """What a search used. `seconds` is its share, by rows, of the wall time of the batches it took part in."""
    agent_calls: int = 0        # sampled messages
    prompt_tokens: int = 0      # prefilled; a prompt counts once for all candidates drawn from it
    generated_tokens: int = 0   # end-of-message tokens included
    scored_tokens: int = 0      # read by a value or outcome model
    truncated: Counter = field(default_factory=Counter)   # agent -> messages that ran into their token limit
    seconds: float = 0.0

    def __iadd__(self, other: "Cost") -> "Cost":
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name) + getattr(other, entry.name))
        return self


Handler = Callable[[list[tuple[Problem, Any]]], list[tuple[Any, Cost]]]


def run(searches: Iterable[tuple[Problem, Generator]], handlers: dict[type, Handler], *, max_active: int,
        progress: tqdm) -> Iterator[tuple[Problem, Any, Cost]]:
    """Advance up to `max_active` searches together; yield (problem, result, cost) as each one finishes.

    All waiting requests of one kind are answered in one batch. `handlers` maps a kind of request to what answers it and is
    ordered from cheap to dear: cheap kinds are answered first, so that everyone ends up waiting for messages together.
    A search cannot tell how many others run beside it, so its result does not depend on them.
    """
    searches = iter(searches)
    waiting = {kind: [] for kind in handlers}  # kind -> [(problem, search, cost, request)]
    calls = 0

    def resume(resumed):
        """Send each search its reply (None starts it): it asks again, or it is done."""
        for problem, search, cost, reply in resumed:
            try:
                request = search.send(reply)
            except StopIteration as stop:
                progress.update()
                yield problem, stop.value, cost
            else:
                waiting[type(request)].append((problem, search, cost, request))

    while True:
        while (active := sum(map(len, waiting.values()))) < max_active and (fresh := list(itertools.islice(searches, max_active - active))):
            yield from resume((problem, search, Cost(), None) for problem, search in fresh)
        kind = next((kind for kind in handlers if waiting[kind]), None)
        if kind is None:
            return
        batch, waiting[kind] = waiting[kind], []
        replies = handlers[kind]([(problem, request) for problem, _, _, request in batch])
        for (_, _, cost, _), (_, spent) in zip(batch, replies, strict=True):
            cost += spent
            calls += spent.agent_calls
        progress.set_postfix_str(f"{active} in flight, {calls} messages")
        yield from resume((problem, search, cost, reply) for (problem, search, cost, _), (reply, _) in zip(batch, replies))


# ---------------------------------------------------------------------------------------------------------------------
# The policy: all agents share one causal LM; their roles differ by system prompt


def uniforms(count: int, *key) -> np.ndarray:
    """`count` uniforms in [0, 1) from a counter-based stream (Philox) of their own, for each key."""
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "big"))).random(count)


def draw_tokens(logits: torch.Tensor, draws: torch.Tensor, greedy: torch.Tensor, *, temperature: float, top_k: int,
                top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(next token, log pi(token)) per row, by inverse CDF from that row's own uniform, whatever else is in the batch.

    This is what makes a message a function of (seed, problem, path, candidate) rather than of the batch. logits: [rows, vocabulary];
    draws: float64 [rows] in [0, 1); greedy: bool [rows], rows that take the most likely token instead. log pi is the
    policy's own: before temperature, top-k and top-p.
    """
    logits = logits.float()
    logprobs = logits.log_softmax(-1)
    cdf = warp(logits, temperature=temperature, top_k=top_k, top_p=top_p).double().softmax(-1).cumsum(-1)
    tokens = torch.searchsorted(cdf, draws[:, None] * cdf[:, -1:], right=True).clamp(max=logits.shape[-1] - 1)
    tokens = torch.where(greedy[:, None], logprobs.argmax(-1, keepdim=True), tokens)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]


def warp(logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Temperature, then the k likeliest (0: all), then the nucleus: the likeliest tokens that together reach top_p (1: all).

    The nucleus is looked for among the 1,024 likeliest first: sorting a whole vocabulary can cost as much as the model.
    """
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], -math.inf)
    if top_p < 1:
        probs = logits.softmax(-1)
        for width in (min(1024, probs.shape[-1]), probs.shape[-1]):
            top = probs.topk(width).values
            if bool((top.sum(-1) >= top_p).all()):
                break
        kept = top.cumsum(-1) - top < top_p          # a token is in while those before it do not reach top_p
        least = top.masked_fill(~kept, 2.0).min(-1, keepdim=True).values
        logits = logits.masked_fill(probs < least, -math.inf)
    return logits


class SpareLayer(DynamicLayer):
    """Keys and values with spare columns behind them: a step writes its own column. `DynamicLayer` copies all that is there
    at every step (torch.cat), which takes a third of the time on a CPU."""

    SPARE = 64
    rows = None     # [2, rows, heads, columns and spare ones, head dim]; keys and values are views of it

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        old, end = self.get_seq_length(), self.get_seq_length() + key_states.shape[-2]
        if self.rows is None or self.rows.shape[3] < end:
            grown = key_states.new_empty((2, *key_states.shape[:2], end + self.SPARE, key_states.shape[-1]))
            if old:
                grown[0, :, :, :old], grown[1, :, :, :old] = self.keys, self.values
            self.rows = grown
        self.rows[0, :, :, old:end], self.rows[1, :, :, old:end] = key_states, value_states
        self.keys, self.values = self.rows[:, :, :, :end]
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        end, self.rows = self.get_seq_length(), self.rows[:, indices]
        self.keys, self.values = self.rows[:, :, :, :end]


def add_policy_arguments(parser: Parser) -> None:
    """The flags that generate_rollouts.py, search.py and evaluate.py share: the agents and how they are sampled."""
    parser.add_argument("--run", default="runs/tiny", help="run folder")
    parser.add_argument("--task", default="tiny", help="tiny, tiny-score (embedded), gsm8k, math, mmlu or logiqa")
    parser.add_argument("--data", default=None, help="problems from a file (JSON lines, json, csv, parquet) with `question` and `answer`, graded as --task")
    parser.add_argument("--graph", default="chain", help="communication graph: a constant of mas.py (chain, single, debate, constraints, refine) or FILE.toml")
    parser.add_argument("--model", default=os.path.relpath(HERE / "tiny" / "agents"), help="the agents' causal LM: folder or hub name")
    parser.add_argument("--quantize-policy", action="store_true", help="NF4 weights for the agents, for small cards")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="of every sampled message (greedy is greedy)")
    parser.add_argument("--top-k", type=non_negative_int, default=0, help="sample among the k likeliest tokens only; 0: all")
    parser.add_argument("--top-p", type=positive_unit_float, default=1.0, help="sample from the nucleus of this mass; 1: all")
    parser.add_argument("--max-new-tokens", type=positive_int, default=128,
                        help="limit of a message beside the agent's own; suits the tiny agents, give 512 or so for a real model")
    parser.add_argument("--num-candidates", default="3", help="C, messages per expansion: 3, or 1.8.1.1, or Planner=8,Reader=2")
    parser.add_argument("--c-uct", type=non_negative_float, default=1.0, help="c of Eq. 2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-active", type=positive_int, default=512, help="problems in flight together")
    parser.add_argument("--batch-tokens", type=positive_int, default=32768, help="rows x (prompt + limit) of one generate call")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num-threads", type=positive_int, default=min(2, os.cpu_count() or 1),
                        help="torch threads on the CPU; more than 2 do not help tiny models")


class Policy:
    """pi: the agents. Answers Sample requests; the only one that generates text.

    The weights are bfloat16 on a GPU and float32 on a CPU, or NF4 (quantize). `seconds` tells where the time went.
    The decoding loop is our own: `generate` computes equal messages as often as they are drawn, keeps the rows that have ended until
    the last one ends, cannot tell rows' limits apart, and copies its cache at every step (README, "Speed").
    """

    def __init__(self, mas: MAS, model: str, *, seed: int, temperature: float, top_k: int, top_p: float, max_new_tokens: int,
                 batch_tokens: int, device: str, quantize: bool):
        self.mas, self.seed, self.device = mas, seed, torch.device(device)
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.seconds = {"model": 0.0, "sampling": 0.0, "tokenizer": 0.0}
        self.model, self.tokenizer = load_pretrained("--model", model, AutoModelForCausalLM, quantize=quantize, device=device)
        if self.tokenizer.chat_template is None:
            raise InputError(f"--model {model}: its tokenizer has no chat template; the agents need a chat model")
        self.model.eval()
        ends = self.model.generation_config.eos_token_id  # nothing else of it is used: no checkpoint's own sampling leaks in
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}

    def __call__(self, requests: list[tuple[Problem, Sample]]) -> list[tuple[list[list[Candidate]], Cost]]:
        """The handler of Sample. A prompt is computed once for all its candidates."""
        start = time.perf_counter()
        asked = [(i, problem, request, node) for i, (problem, request) in enumerate(requests) for node in request.nodes]
        chats = [self.mas.prompt(node.state, problem.kind) for _, problem, _, node in asked]
        texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        limits = [min(self.mas.turn(node.state).max_new_tokens, self.max_new_tokens) for *_, node in asked]
        self._spent("tokenizer", start)
        for (_, problem, _, node), prompt, limit in zip(asked, prompts, limits):
            if len(prompt) + limit > self.model.config.max_position_embeddings:
                raise InputError(f"problem {problem.id}: the {self.mas.turn(node.state).name}'s prompt of {len(prompt)} tokens and a message of "
                                 f"{limit} do not fit into the model's {self.model.config.max_position_embeddings}; lower --max-new-tokens or drop the problem")

        costs = [Cost() for _ in requests]
        candidates: list[list[Candidate]] = [[] for _ in asked]
        num, size = [request.num for _, _, request, _ in asked], [len(prompt) + limit for prompt, limit in zip(prompts, limits)]
        todo = sorted(range(len(asked)), key=size.__getitem__)
        while todo:
            start, batch = time.perf_counter(), [todo.pop()]   # the longest first, then those that fit in beside it
            while todo and (sum(num[at] for at in batch) + num[todo[-1]]) * size[batch[0]] <= self.batch_tokens:
                batch.append(todo.pop())
            rows = [(at, k) for at in batch for k in range(num[at])]
            draws = np.zeros((len(rows), max(limits[at] for at in batch)))
            for row, (at, k) in enumerate(rows):
                _, problem, _, node = asked[at]
                draws[row, :limits[at]] = uniforms(limits[at], self.seed, problem.id, node.path, k)
            try:
                messages = self._decode([prompts[at] for at in batch], [num[at] for at in batch], [limits[at] for at, _ in rows], draws,
                                        [asked[at][2].greedy for at, _ in rows])
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise InputError(f"out of memory with {len(rows)} messages of one prompt; lower --max-new-tokens or --num-candidates, or give --quantize-policy") from None
                self.batch_tokens //= 2
                tqdm.write(f"out of memory: --batch-tokens halved to {self.batch_tokens}", file=sys.stderr)
                todo += reversed(batch)
                continue
            for (at, _), message in zip(rows, messages):
                candidates[at].append(self._candidate(*message))
            per_token = (time.perf_counter() - start) / sum(len(tokens) for tokens, _ in messages)
            for at in batch:
                i, _, _, node = asked[at]
                tokens, truncated = sum(c.tokens for c in candidates[at]), sum(c.truncated for c in candidates[at])
                costs[i] += Cost(agent_calls=num[at], prompt_tokens=len(prompts[at]), generated_tokens=tokens, seconds=tokens * per_token,
                                 truncated=Counter({self.mas.turn(node.state).name: truncated} if truncated else {}))
        replies = iter(candidates)
        return [([next(replies) for _ in request.nodes], cost) for (_, request), cost in zip(requests, costs)]

    @torch.inference_mode()
    def _decode(self, prompts: list[list[int]], repeats: list[int], limits: list[int], draws: np.ndarray,
                greedy: list[bool]) -> list[tuple[list[int], list[float]]]:
        """Prefill each prompt once and decode all messages together. The messages of one prompt share a row of the cache for as
        long as they are the same, and rows whose messages have ended are dropped.

        repeats: messages per prompt. limits, greedy: per message. draws: [messages, longest limit]. Returns (tokens,
        log-probabilities) per message.
        """
        clock, device = time.perf_counter(), self.device
        width, steps = max(map(len, prompts)), draws.shape[1]
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.ones((len(prompts), width + steps), dtype=torch.long)
        for i, prompt in enumerate(prompts):   # padded on the left, so that every row writes into the same column
            ids[i, width - len(prompt):] = torch.tensor(prompt)
            mask[i, :width - len(prompt)] = 0
        ids, mask = ids.to(device), mask.to(device)
        cache = DynamicCache(config=self.model.config)
        cache.layers = [SpareLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = self.model(input_ids=ids, attention_mask=mask[:, :width], position_ids=positions[:, :width], past_key_values=cache,
                            logits_to_keep=1).logits[:, -1]

        row = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(repeats)).to(device)   # of the cache, for each live message
        live = torch.arange(len(row), device=device)
        draws, greedy = torch.from_numpy(draws).to(device), torch.tensor(greedy, device=device)
        limit, ends = torch.tensor(limits, device=device), torch.tensor(sorted(self.ends), device=device)
        tokens = torch.zeros(draws.shape, dtype=torch.long, device=device)
        logprobs = torch.zeros(draws.shape, device=device)
        lengths = torch.zeros(len(draws), dtype=torch.long, device=device)
        for step in range(steps):
            clock = self._spent("model", clock)
            newest, newest_logprobs = draw_tokens(logits[row], draws[live, step], greedy[live], **self.sampling)
            tokens[live, step], logprobs[live, step], lengths[live] = newest, newest_logprobs, step + 1
            going = (~torch.isin(newest, ends) & (limit[live] > step + 1)).nonzero()[:, 0]
            if not len(going):
                break
            live, row = live[going], row[going]
            rows, vocabulary = logits.shape
            alike, branch = torch.unique(row * vocabulary + newest[going], return_inverse=True)   # one row, one token: still the same
            parent, newest = alike // vocabulary, alike % vocabulary
            if len(alike) > len(parent.unique()) or len(alike) < 0.8 * rows:   # some part ways, or enough have ended to pay for the copy
                cache.batch_select_indices(parent)
                row, mask, positions = branch, mask[parent], positions[parent]
            else:
                newest = newest.new_zeros(rows).index_copy(0, parent, newest)
            clock = self._spent("sampling", clock)
            at = width + step
            logits = self.model(input_ids=newest[:, None], attention_mask=mask[:, :at + 1], position_ids=positions[:, at:at + 1],
                                past_key_values=cache, logits_to_keep=1).logits[:, -1]
        return [(own[:length], own_logprobs[:length]) for own, own_logprobs, length in zip(tokens.tolist(), logprobs.tolist(), lengths.tolist())]

    def _spent(self, what: str, since: float) -> float:
        now = time.perf_counter()
        self.seconds[what] += now - since
        return now

    def _candidate(self, tokens: list[int], logprobs: list[float]) -> Candidate:
        start = time.perf_counter()
        truncated = tokens[-1] not in self.ends
        text = self.tokenizer.decode(tokens if truncated else tokens[:-1], skip_special_tokens=True).strip()
        self._spent("tokenizer", start)
        return Candidate(text, len(tokens), sum(logprobs), truncated)


def load_pretrained(flag: str, name: str, auto_class, *, quantize: bool, device: str):
    """(model, tokenizer) by folder or hub name through `from_pretrained`; what cannot be loaded is the user's to know.

    bfloat16 on a GPU, float32 on a CPU; quantize: NF4 with double quantisation, computing in that type. Needs bitsandbytes.
    """
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{flag} {name}: no model here (there is no config.json in it)")
    dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
    nf4 = {"device_map": {"": device}, "quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)}
    disable_progress_bar()  # of transformers' weight loading, and its report, which is checked here instead
    set_verbosity_error()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model, report = auto_class.from_pretrained(name, dtype=dtype, output_loading_info=True, **(nf4 if quantize else {}))
    except ImportError as error:
        raise InputError(f"{flag} {name}: NF4 needs bitsandbytes ({error}); install it, or "
                         f"{'give --no-quantize' if flag == '--backbone' else 'leave out --quantize-policy'}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {name}: cannot be loaded as a folder or from the hub: {str(error).splitlines()[0]}") from None
    if absent := [*report["missing_keys"], *report["mismatched_keys"]]:   # they would be random
        raise InputError(f"{flag} {name}: its files do not hold all weights of {type(model).__name__}: {', '.join(map(str, sorted(absent)[:3]))} ...")
    for module in model.modules() if quantize else ():
        if type(module).__name__ == "Linear4bit":
            # On some CPUs bitsandbytes would repack the weights for a bfloat16 kernel whenever it is not training:
            # V would then differ between training and search, and from one machine to another.
            module.support_avx512bf16_for_cpu = False
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {name}: its tokenizer has no end-of-message (eos) token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return (model if quantize else model.to(device)), tokenizer


def make_policy(args, mas: MAS) -> Policy:
    torch.set_num_threads(args.num_threads)
    return Policy(mas, args.model, seed=args.seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                  max_new_tokens=args.max_new_tokens, batch_tokens=args.batch_tokens, device=own_device(args.device), quantize=args.quantize_policy)


def policy_settings(args, mas: MAS) -> dict:
    """What decides the policy's messages: recorded, and compared when a run is resumed."""
    return {"model": args.model, "graph": asdict(mas), "seed": args.seed, "temperature": args.temperature, "top_k": args.top_k,
            "top_p": args.top_p, "max_new_tokens": args.max_new_tokens, "quantize_policy": args.quantize_policy}


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: config.json says what was run, JSON lines hold one finished problem each


def open_run(folder: Path, settings: dict, *, overwrite: bool) -> None:
    """Start a run folder, or go on in one with the same settings; any other settings are refused by name."""
    settings = json.loads(json.dumps(settings))  # as they will be read back
    config = folder / "config.json"
    if config.is_file() and overwrite:
        if process()[1] > 1:
            raise InputError(f"--overwrite works in one process only (another may have begun to write); delete {folder} first")
        for path in [config, *folder.glob("*.jsonl")]:
            path.unlink()
    if config.is_file():
        old = read_config(folder)["settings"]
        changed = [f"{key} (there {_short(old.get(key))}, now {_short(settings.get(key))})"
                   for key in sorted(old.keys() | settings.keys()) if old.get(key) != settings.get(key)]
        if changed:
            raise InputError(f"{folder} holds a run with another configuration: {', '.join(changed)}; "
                             f"choose another --run, or start over with --overwrite")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, {"settings": settings} | provenance())


def _short(value) -> str:
    """A setting in a few words; a graph by its name and a fingerprint of its prompts and edges."""
    if isinstance(value, dict) and "agents" in value:
        return f"{value['name']}#{hashlib.blake2b(json.dumps(value).encode(), digest_size=3).hexdigest()}"
    return json.dumps(value)


def read_config(folder: Path) -> dict:
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json here; it is not (or not yet) a folder that these scripts wrote")
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not JSON ({error.msg}); the file is torn, start this stage again with --overwrite") from None


def write_config(folder: Path, config: dict) -> None:
    """All or nothing: a kill leaves the old file or the new one."""
    temporary = folder / f"config.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(folder / "config.json")


def provenance() -> dict:
    """What a reader needs to repeat this: command, code, versions, machine."""
    commit = subprocess.run(["git", "-C", str(HERE), "rev-parse", "HEAD"], capture_output=True, text=True)
    packages = ("torch", "transformers", "peft", "numpy")
    return {"command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]), "commit": commit.stdout.strip() or None,
            "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {os.cpu_count()} cores",
            "started": time.strftime("%Y-%m-%d %H:%M:%S")}


def process() -> tuple[int, int]:
    """(rank, number of processes) under `accelerate launch` or torchrun; (0, 1) alone. No process waits for another here."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def mine(problems: list[Problem]) -> list[Problem]:
    """What this process does, by a hash of the problem's id: nothing is done twice, in whatever order and whenever they start."""
    rank, world = process()
    return [p for p in problems if int.from_bytes(hashlib.blake2b(p.id.encode(), digest_size=8).digest(), "big") % world == rank]


def own_device(device: str) -> str:
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and "LOCAL_RANK" in os.environ else device


def own_shard(path: Path) -> Path:
    """The file that this process appends to: `path` itself, or one per process beside it."""
    rank, world = process()
    return path if world == 1 else path.with_suffix(f".{rank}of{world}.jsonl")


def resume_jsonl(path: Path) -> dict[str, dict]:
    """Problem id -> record, of an earlier run and of all processes, sorted by id. A line torn by a kill does not count, and is cut off
    where this process goes on writing; its problem is then done again."""
    records = {}
    for shard in (path, *sorted(path.parent.glob(f"{path.stem}.*of*.jsonl"))):
        data = shard.read_bytes() if shard.is_file() else b""
        complete = data.rfind(b"\n") + 1
        if complete < len(data) and shard == own_shard(path):
            print(f"{shard}: the last line is torn; it is cut off and its problem done again", file=sys.stderr)
            os.truncate(shard, complete)
        records |= {record["id"]: record for record in parse_jsonl(data[:complete].decode(), shard)}
    return dict(sorted(records.items()))


def append_jsonl(file, record: dict) -> None:
    """One line, on its way to the disk before the next problem finishes."""
    file.write(json.dumps(record, ensure_ascii=False) + "\n")
    file.flush()


def tree_record(problem: Problem, root: Node, cost: Cost) -> dict:
    """A whole tree as one line: everything needed to grade and label it again. Parents come before their children."""
    nodes, index, stack = [], {}, [root]
    while stack:
        node = stack.pop()
        index[node] = len(nodes)
        if node.parent is None:
            nodes.append({"parent": None, "N": node.N, "W": node.W})
        else:
            message = node.state.messages[-1]
            nodes.append({"parent": index[node.parent], "agent": message.agent, "message": message.text,
                          "tokens": node.candidate.tokens, "logprob": round(node.candidate.logprob, 4),
                          "truncated": node.candidate.truncated, "N": node.N, "W": node.W})
        if node.reward is not None:
            nodes[-1] |= {"reward": node.reward, "answer": extract_answer(node.state.messages[-1].text, problem.kind)}
        stack += reversed(node.children or [])
    return {**asdict(problem), "nodes": nodes, "cost": vars(cost)}


# ---------------------------------------------------------------------------------------------------------------------


def summarise(records: list[dict], mas: MAS) -> str:
    """Label statistics per agent, from the records alone."""
    lines = [f"{'agent':10s} {'edges':>7s} {'visited':>8s} {'mean Q':>7s} {'|Q| = 1':>8s} {'truncated':>10s}"]
    for agent in mas.agents:
        edges = [node for record in records for node in record["nodes"] if node.get("agent") == agent.name]
        q = [node["W"] / node["N"] for node in edges if node["N"]]
        lines.append(f"{agent.name:10s} {len(edges):7d} {len(q):8d} {sum(q) / max(1, len(q)):7.3f} "
                     f"{sum(abs(x) == 1 for x in q) / max(1, len(q)):8.1%} {sum(n['truncated'] for n in edges):10d}")
    leaves = [[node for node in record["nodes"] if "reward" in node] for record in records]
    mixed = sum(len({leaf["reward"] for leaf in tree}) == 2 for tree in leaves)
    unread = sum(leaf["answer"] is None for tree in leaves for leaf in tree)
    lines.append(f"{len(records)} trees, {mixed} of them with both right and wrong answers; "
                 f"{unread} of {sum(map(len, leaves))} final messages held no answer (graded wrong)")
    return "\n".join(lines)


def make_searches(problems: list[Problem], mas: MAS, args) -> Iterator[tuple[Problem, Generator]]:
    num_candidates = mas.per_agent(args.num_candidates, "--num-candidates")
    for problem in problems:
        yield problem, label_tree(problem, mas, num_simulations=args.num_simulations, num_candidates=num_candidates,
                                  c_uct=args.c_uct, rng=seeded(args.seed, problem.id))


def benchmark(args, mas: MAS) -> None:
    """Trees per minute: all problems in flight against one at a time. The same problems, the same trees, one process."""
    problems = load_problems(task=args.task, data=args.data, split="train", num=args.num_train)
    rates, trees = [], []
    for max_active in (len(problems), 1):
        policy = make_policy(args, mas)
        start, found = time.perf_counter(), {}
        with tqdm(total=len(problems), desc=f"at most {max_active}", unit="tree") as progress:
            for problem, root, cost in run(make_searches(problems, mas, args), {Sample: policy}, max_active=max_active, progress=progress):
                found[problem.id] = [{k: v for k, v in n.items() if k != "logprob"} for n in tree_record(problem, root, cost)["nodes"]]
        seconds = time.perf_counter() - start
        rates.append(60 * len(problems) / seconds)
        trees.append(found)
        inside = sum(policy.seconds.values())
        print(f"{max_active:4d} in flight: {rates[-1]:7.1f} trees/min; time in "
              + ", ".join(f"{name} {spent / seconds:.1%}" for name, spent in policy.seconds.items()) + f", driver and tree {1 - inside / seconds:.1%}")
    same = sum(trees[0][problem.id] == trees[1][problem.id] for problem in problems)
    print(f"ratio {rates[0] / rates[1]:.1f}; {same} of {len(problems)} trees are equal")


def parse_args(argv=None):
    parser = Parser(__doc__)
    add_policy_arguments(parser)
    parser.add_argument("--num-train", type=positive_int, default=300, help="training problems to label")
    parser.add_argument("--num-heldout", type=positive_int, default=80, help="held-out problems to label, for V's metrics")
    parser.add_argument("--num-simulations", type=positive_int, default=40, help="N, simulations per problem")
    parser.add_argument("--overwrite", action="store_true", help="start over where the folder holds another configuration")
    parser.add_argument("--benchmark", action="store_true", help="only measure: batched against one problem at a time")
    return parser.parse_args(argv)


def main(args) -> None:
    mas = load_graph(args.graph)
    if args.benchmark:
        return benchmark(args, mas)
    num_candidates = mas.per_agent(args.num_candidates, "--num-candidates")
    problems = [problem for split, num in (("train", args.num_train), ("heldout", args.num_heldout))
                for problem in load_problems(task=args.task, data=args.data, split=split, num=num)]
    policy = make_policy(args, mas)
    folder = Path(args.run) / "rollouts"
    open_run(folder, policy_settings(args, mas) | source(args.task, args.data) | {
        "num_simulations": args.num_simulations, "num_candidates": num_candidates, "c_uct": args.c_uct}, overwrite=args.overwrite)
    path, (rank, world) = folder / "trees.jsonl", process()
    done = resume_jsonl(path)
    todo = [problem for problem in mine(problems) if problem.id not in done]
    print(f"labelling {len(todo)} problems with N = {args.num_simulations}, C = {num_candidates} "
          f"({sum(p.id in done for p in problems)} of {len(problems)} are done already) -> {own_shard(path)}")
    with open(own_shard(path), "a", encoding="utf-8") as file, \
            tqdm(total=len(todo), desc="trees", unit="tree", disable=not todo or rank > 0) as progress:
        for problem, root, cost in run(make_searches(todo, mas, args), {Sample: policy}, max_active=args.max_active, progress=progress):
            append_jsonl(file, tree_record(problem, root, cost))
    records = resume_jsonl(path)
    if missing := sum(problem.id not in records for problem in problems):
        print(f"process {rank} of {world} is done; {missing} problems are left to others (or to this command, once more)")
    else:
        print(summarise(list(records.values()), mas))


if __name__ == "__main__":
    cli(parse_args, main)
