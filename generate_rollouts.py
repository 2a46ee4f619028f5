"""Stage 1: label every action by search, without a human (MAS-MCTS, paper section 4.1).

For each training problem, N simulations over the agents; the final answer's reward of +1 or -1 is backed up along the
path; the mean reward Q(s, a) of an edge is the target for V at next(s, a). No value model is involved here.

    python generate_rollouts.py                        # the embedded default -> runs/tiny/rollouts/trees.jsonl
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
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import (AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig, LogitsProcessor,
                          LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper)
from transformers.utils.logging import disable_progress_bar

from mas import (HERE, MAS, InputError, Parser, Problem, State, cli, extract_answer, is_correct, load_graph, load_problems,
                 non_negative_float, positive_float, positive_int, read_jsonl, seeded, unit_float)

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
            [candidates] = yield Sample([node], num_candidates[len(node.state.messages)])
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
    truncated: int = 0          # messages that ran into their token limit
    seconds: float = 0.0

    def __iadd__(self, other: "Cost") -> "Cost":
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))
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


class SeededSampler(LogitsProcessor):
    """Draws every row's next token by inverse CDF from that row's own uniforms, whatever else is in the batch.

    Returns scores that leave only the drawn token, so that `generate` with do_sample=False takes it. This is what makes
    a message a function of (seed, problem, path, candidate) rather than of the batch. Records log pi(token).

    draws: float64 [rows, max_new_tokens]; greedy: bool [rows], rows that take the most likely token instead.
    """

    def __init__(self, draws: torch.Tensor, greedy: torch.Tensor, warpers: LogitsProcessorList):
        self.draws, self.greedy, self.warpers = draws, greedy, warpers
        self.logprobs: list[torch.Tensor] = []   # one [rows] per step

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        logprobs = scores.float().log_softmax(-1)
        cdf = self.warpers(input_ids, scores.float()).double().softmax(-1).cumsum(-1)
        draw = self.draws[:, len(self.logprobs), None] * cdf[:, -1:]
        tokens = torch.searchsorted(cdf, draw, right=True).clamp(max=scores.shape[-1] - 1)
        tokens = torch.where(self.greedy[:, None], logprobs.argmax(-1, keepdim=True), tokens)
        self.logprobs.append(logprobs.gather(-1, tokens)[:, 0])
        return torch.full_like(scores, -math.inf).scatter(-1, tokens, 0.0)


def add_policy_arguments(parser: Parser) -> None:
    """The flags that generate_rollouts.py, search.py and evaluate.py share: the agents and how they are sampled."""
    parser.add_argument("--run", default="runs/tiny", help="run folder")
    parser.add_argument("--task", default="tiny", help="embedded problems: tiny or tiny-score")
    parser.add_argument("--data", default=None, help="JSON-lines file with `question` and `answer`, instead of --task")
    parser.add_argument("--graph", default="chain", help="communication graph, a constant of mas.py")
    parser.add_argument("--model", default=os.path.relpath(HERE / "tiny" / "agents"), help="the agents' causal LM: folder or hub name")
    parser.add_argument("--temperature", type=positive_float, default=1.0, help="of every sampled message (greedy is greedy)")
    parser.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest tokens only; 0: all")
    parser.add_argument("--top-p", type=unit_float, default=1.0, help="sample from the nucleus of this mass; 1: all")
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
    """pi: the agents. Answers Sample requests; the only caller of `model.generate`.

    The weights are bfloat16 on a GPU and float32 on a CPU. `seconds` tells where the time went.
    """

    def __init__(self, mas: MAS, model: str, *, seed: int, temperature: float, top_k: int, top_p: float, max_new_tokens: int,
                 batch_tokens: int, device: str):
        self.mas, self.seed, self.device = mas, seed, torch.device(device)
        self.max_new_tokens, self.batch_tokens = max_new_tokens, batch_tokens
        self.seconds = {"model": 0.0, "tokenizer": 0.0}
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.model, self.tokenizer = load_pretrained("--model", model, AutoModelForCausalLM, dtype=dtype)
        if self.tokenizer.chat_template is None:
            raise InputError(f"--model {model}: its tokenizer has no chat template; the agents need a chat model")
        self.model.to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        self.ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        # A checkpoint's own sampling settings (top_k, repetition_penalty, ...) must not leak in: only what we pass counts.
        self.model.generation_config = GenerationConfig(eos_token_id=sorted(self.ends), pad_token_id=self.tokenizer.pad_token_id)
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if top_p < 1:
            self.warpers.append(TopPLogitsWarper(top_p))

    def __call__(self, requests: list[tuple[Problem, Sample]]) -> list[tuple[list[list[Candidate]], Cost]]:
        """The handler of Sample. A prompt is computed once for all its candidates; agents do not share a batch, as their
        messages differ in length."""
        start = time.perf_counter()
        flat = [(i, problem, request, node) for i, (problem, request) in enumerate(requests) for node in request.nodes]
        chats = [self.mas.prompt(node.state) for *_, node in flat]
        texts = self.tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False)
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        self.seconds["tokenizer"] += time.perf_counter() - start

        costs = [Cost() for _ in requests]
        candidates: list[list[Candidate]] = [[] for _ in flat]
        for limit, batch in self._batches(flat, prompts):
            start = time.perf_counter()
            rows = [(at, k) for at in batch for k in range(flat[at][2].num)]
            draws = np.stack([uniforms(limit, self.seed, flat[at][1].id, flat[at][3].path, k) for at, k in rows])
            tokens, logprobs = self._generate([prompts[at] for at in batch], [flat[at][2].num for at in batch], draws,
                                              [flat[at][2].greedy for at, _ in rows])
            for (at, _), row, row_logprobs in zip(rows, tokens, logprobs):
                candidates[at].append(self._candidate(row, row_logprobs))
            for at in batch:
                cost = costs[flat[at][0]]
                cost += Cost(agent_calls=flat[at][2].num, prompt_tokens=len(prompts[at]),
                             generated_tokens=sum(c.tokens for c in candidates[at]),
                             truncated=sum(c.truncated for c in candidates[at]),
                             seconds=(time.perf_counter() - start) * flat[at][2].num / len(rows))
        replies = iter(candidates)
        return [([next(replies) for _ in request.nodes], cost) for (_, request), cost in zip(requests, costs)]

    def _batches(self, flat, prompts) -> Iterator[tuple[int, list[int]]]:
        """(token limit, indices into `flat`): one agent per batch, sorted by length, within the token budget."""
        agents = [self.mas.turn(node.state) for *_, node in flat]
        order = sorted(range(len(flat)), key=lambda at: (agents[at].name, len(prompts[at])), reverse=True)
        room = self.model.config.max_position_embeddings
        batch, rows = [], 0
        for at in order:
            limit = min(agents[at].max_new_tokens, self.max_new_tokens)
            if len(prompts[at]) + limit > room:
                raise InputError(f"problem {flat[at][1].id}: the {agents[at].name}'s prompt of {len(prompts[at])} tokens and a message of "
                                 f"{limit} do not fit into the model's {room}; lower --max-new-tokens or drop the problem")
            full = batch and (rows + flat[at][2].num) * (len(prompts[batch[0]]) + limit) > self.batch_tokens
            if batch and (full or agents[at] != agents[batch[0]]):
                yield min(agents[batch[0]].max_new_tokens, self.max_new_tokens), batch
                batch, rows = [], 0
            batch.append(at)
            rows += flat[at][2].num
        if batch:
            yield min(agents[batch[0]].max_new_tokens, self.max_new_tokens), batch

    @torch.inference_mode()
    def _generate(self, prompts: list[list[int]], repeats: list[int], draws: np.ndarray, greedy: list[bool]):
        """Prefill each prompt once, copy its cache to its rows, decode all rows together.

        draws: [rows, limit] with rows = sum(repeats). Returns (tokens, logprobs): a list per row, to be cut at its end.
        """
        start = time.perf_counter()
        width = max(map(len, prompts))
        ids = torch.full((len(prompts), width), self.tokenizer.pad_token_id)
        mask = torch.zeros((len(prompts), width), dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt):] = torch.tensor(prompt)
            mask[i, width - len(prompt):] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        rows = torch.repeat_interleave(torch.arange(len(prompts)), torch.tensor(repeats)).to(self.device)
        cache = DynamicCache(config=self.model.config)
        self.model(input_ids=ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, logits_to_keep=1,
                   position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, :-1])
        cache.batch_select_indices(rows)  # all but the last prompt token, which `generate` feeds itself
        sampler = SeededSampler(torch.from_numpy(draws).to(self.device), torch.tensor(greedy, device=self.device), self.warpers)
        out = self.model.generate(
            input_ids=ids[rows], attention_mask=mask[rows], past_key_values=cache, use_cache=True,
            logits_processor=LogitsProcessorList([sampler]), do_sample=False, num_beams=1, max_new_tokens=draws.shape[1])
        tokens, logprobs = out[:, width:].tolist(), torch.stack(sampler.logprobs, dim=1).tolist()
        self.seconds["model"] += time.perf_counter() - start
        return tokens, logprobs

    def _candidate(self, tokens: list[int], logprobs: list[float]) -> Candidate:
        start = time.perf_counter()
        end = next((i for i, token in enumerate(tokens) if token in self.ends), None)
        length = len(tokens) if end is None else end + 1
        text = self.tokenizer.decode(tokens[:end], skip_special_tokens=True).strip()
        self.seconds["tokenizer"] += time.perf_counter() - start
        return Candidate(text, length, sum(logprobs[:length]), end is None)


def load_pretrained(flag: str, name: str, auto_class, **options):
    """(model, tokenizer) by folder or hub name through `from_pretrained`; what cannot be loaded is the user's to know."""
    if Path(name).exists() and not (Path(name) / "config.json").is_file():
        raise InputError(f"{flag} {name}: no model here (there is no config.json in it)")
    disable_progress_bar()  # of transformers' weight loading
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = auto_class.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {name}: cannot be loaded as a folder or from the hub: {str(error).splitlines()[0]}") from None
    if tokenizer.eos_token_id is None:
        raise InputError(f"{flag} {name}: its tokenizer has no end-of-message (eos) token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def make_policy(args, mas: MAS) -> Policy:
    torch.set_num_threads(args.num_threads)
    return Policy(mas, args.model, seed=args.seed, temperature=args.temperature, top_k=args.top_k, top_p=args.top_p,
                  max_new_tokens=args.max_new_tokens, batch_tokens=args.batch_tokens, device=args.device)


def policy_settings(args, mas: MAS) -> dict:
    """What decides the policy's messages: recorded, and compared when a run is resumed."""
    return {"model": args.model, "graph": asdict(mas), "seed": args.seed, "temperature": args.temperature, "top_k": args.top_k,
            "top_p": args.top_p, "max_new_tokens": args.max_new_tokens}


# ---------------------------------------------------------------------------------------------------------------------
# The run folder: config.json says what was run, JSON lines hold one finished problem each


def open_run(folder: Path, settings: dict, *, overwrite: bool) -> None:
    """Start a run folder, or go on in one with the same settings; any other settings are refused by name."""
    settings = json.loads(json.dumps(settings))  # as they will be read back
    config = folder / "config.json"
    if config.is_file() and overwrite:
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
    temporary = folder / "config.json.part"
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


def resume_jsonl(path: Path) -> list[dict]:
    """The records of an earlier run. A line torn by a kill is cut off; its problem is then done again."""
    if not path.is_file():
        return []
    data = path.read_bytes()
    complete = data.rfind(b"\n") + 1
    if complete < len(data):
        print(f"{path}: the last line is torn; it is cut off and its problem done again", file=sys.stderr)
        os.truncate(path, complete)
    return read_jsonl(path)


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
    return {**asdict(problem), "nodes": nodes, "cost": asdict(cost)}


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
        inside = policy.seconds["model"] + policy.seconds["tokenizer"]
        print(f"{max_active:4d} in flight: {rates[-1]:7.1f} trees/min; time in model and sampling {policy.seconds['model'] / seconds:.1%}, "
              f"tokenizer {policy.seconds['tokenizer'] / seconds:.1%}, outside both {1 - inside / seconds:.1%}")
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
    open_run(folder, policy_settings(args, mas) | {"task": args.data or args.task, "num_simulations": args.num_simulations,
                                                   "num_candidates": num_candidates, "c_uct": args.c_uct}, overwrite=args.overwrite)
    path = folder / "trees.jsonl"
    done = {record["id"] for record in resume_jsonl(path)}
    todo = [problem for problem in problems if problem.id not in done]
    print(f"labelling {len(todo)} problems with N = {args.num_simulations}, C = {num_candidates} "
          f"({len(problems) - len(todo)} are done already) -> {path}")
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(todo), desc="trees", unit="tree", disable=not todo) as progress:
        for problem, root, cost in run(make_searches(todo, mas, args), {Sample: policy}, max_active=args.max_active, progress=progress):
            append_jsonl(file, tree_record(problem, root, cost))
    print(summarise(resume_jsonl(path), mas))


if __name__ == "__main__":
    cli(parse_args, main)
