"""The agents' language model: what a search may ask for, and the policy that answers it.

All agents share one causal language model; their roles differ by system prompt. A search asks for
messages with a `Sample` request, and `Policy` answers many such requests in one batch.

A message is a function of (seed, problem, path in the tree, candidate index), not of the batch it
is sampled in. One problem alone, a resumed run and another batch size give the same text, up to
floating-point rounding: no difference was seen in float32, few in bfloat16 (README, "Limits").
"""

import argparse
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from checkpoints import (
    TEMPLATE_DATE,
    ChatFormat,
    end_of_message_ids,
    load_pretrained,
    resolve_dtype,
)
from decoding import Decoder, message_key
from mas import GRAPHS, MAS
from runs import (
    HERE,
    InputError,
    Parser,
    add_run_arguments,
    device_of_this_process,
    ignore,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    positive_unit_float,
)
from tasks import EMBEDDED, TASKS, Problem

# ---- Requests ------------------------------------------------------------------------------------
# What a search may ask for. A request names nodes of a tree: whatever has a `state` (mas.State) and
# a `path` (which candidate was taken at each step from the root). The reply has one entry per node.


class Candidate(NamedTuple):
    """One sampled message.

    Attributes:
        text: without reasoning blocks; other agents, V and the answer see nothing of them.
        tokens: number of tokens generated, reasoning and the end-of-message token included.
        logprob: sum over the tokens of log pi(token | prefix) in nats, before temperature, top-k
            and top-p.
        truncated: whether the message reached its token limit.
    """

    text: str
    tokens: int
    logprob: float
    truncated: bool


class Sample(NamedTuple):
    """Ask for `num` messages of the next agent at each node. Reply: `num` Candidates per node.

    greedy: take the most likely token at every step instead of sampling.
    """

    nodes: list
    num: int
    greedy: bool = False


class Score(NamedTuple):
    """Ask for a value in [-1, 1] of each node's state: V, or another scorer in its place."""

    nodes: list


class Outcome(NamedTuple):
    """Ask for the outcome model's value in [-1, 1] of each node's state, which is terminal."""

    nodes: list


@dataclass
class Cost:
    """Resources that a search has used.

    Attributes:
        agent_calls: sampled messages.
        prompt_tokens: prefilled tokens; a prompt counts once for all candidates sampled from it.
        generated_tokens: sampled tokens, end-of-message tokens included.
        scored_tokens: tokens read by a value or outcome model.
        truncated: agent -> messages that reached their token limit.
        seconds: share of the wall time of its batches, by tokens generated or states scored.
    """

    agent_calls: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    scored_tokens: int = 0
    truncated: Counter = field(default_factory=Counter)
    seconds: float = 0.0

    def __iadd__(self, other: "Cost") -> "Cost":
        for entry in fields(self):
            total = getattr(self, entry.name) + getattr(other, entry.name)
            setattr(self, entry.name, total)
        return self


# A handler answers all waiting requests of one type: [(problem, request)] -> [(reply, cost)].
Handler = Callable[[list[tuple[Problem, Any]]], list[tuple[Any, Cost]]]

# ---- The policy ----------------------------------------------------------------------------------


@dataclass
class PromptJob:
    """One prompt, and the messages that are sampled from it."""

    request_index: int
    problem_id: str
    path: tuple[int, ...]  # of the node
    agent: str
    prompt_ids: list[int]
    max_new_tokens: int
    num_messages: int
    greedy: bool
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def row_tokens(self) -> int:
        """Tokens that one message of this prompt can occupy in the cache."""
        return len(self.prompt_ids) + self.max_new_tokens


class Policy:
    """pi: the agents. Answers Sample requests; nothing else in this project generates text.

    Args:
        decoder: the language model of all agents.
        chat_format: renders their prompts and reads their messages.
        max_new_tokens: limit of a message, in addition to the agent's own.
        batch_tokens: limit of rows x (prompt + message limit) in one batch.

    Attributes:
        on_batch: called with (prompts, messages) after each batch, to show progress.
    """

    def __init__(
        self,
        mas: MAS,
        decoder: Decoder,
        chat_format: ChatFormat,
        *,
        seed: int,
        max_new_tokens: int,
        batch_tokens: int,
    ):
        self.mas = mas
        self.decoder = decoder
        self.chat_format = chat_format
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens
        self.on_batch: Callable[[int, int], None] = ignore

    def __call__(
        self, requests: list[tuple[Problem, Sample]]
    ) -> list[tuple[list[list[Candidate]], Cost]]:
        """Answer Sample requests. Reply: a list of candidates per node; a prompt is read once.

        Raises InputError if a prompt and its message do not fit into the model's context, or if
        the messages of one prompt do not fit into memory.
        """
        # 1. One job per node: its prompt, and how many messages to sample from it.
        jobs = self._make_jobs(requests)
        self._check_context(jobs)
        costs = [Cost() for _ in requests]

        # 2. Decode in batches, the longest rows first: memory runs out early or never.
        queue = sorted(jobs, key=lambda job: job.row_tokens)
        while queue:
            batch = self._take_batch(queue)
            start = time.perf_counter()
            try:
                self._sample_batch(batch)
            except torch.OutOfMemoryError:
                self._halve_batch_tokens(batch)
                queue += reversed(batch)
                continue
            self._charge(batch, costs, seconds=time.perf_counter() - start)
            self.on_batch(len(batch), sum(job.num_messages for job in batch))

        # 3. Jobs are in the order of the requests' nodes.
        remaining = iter(jobs)
        replies = []
        for (_, request), cost in zip(requests, costs, strict=True):
            reply = [next(remaining).candidates for _ in request.nodes]
            replies.append((reply, cost))
        return replies

    def _make_jobs(self, requests: list[tuple[Problem, Sample]]) -> list[PromptJob]:
        jobs, chats = [], []
        for request_index, (problem, request) in enumerate(requests):
            for node in request.nodes:
                agent = self.mas.turn(node.state)
                chats.append(self.mas.prompt(node.state, problem.answer_type))
                job = PromptJob(
                    request_index=request_index,
                    problem_id=problem.id,
                    path=node.path,
                    agent=agent.name,
                    prompt_ids=[],
                    max_new_tokens=min(agent.max_new_tokens, self.max_new_tokens),
                    num_messages=request.num,
                    greedy=request.greedy,
                )
                jobs.append(job)
        for job, prompt_ids in zip(jobs, self.chat_format.encode(chats), strict=True):
            job.prompt_ids = prompt_ids
        return jobs

    def _check_context(self, jobs: list[PromptJob]) -> None:
        context = self.decoder.model.config.max_position_embeddings
        for job in jobs:
            if job.row_tokens > context:
                raise InputError(
                    f"problem {job.problem_id}: the {job.agent}'s prompt of "
                    f"{len(job.prompt_ids)} tokens and a message of {job.max_new_tokens} "
                    f"do not fit into the model's {context}; "
                    f"lower --max-new-tokens or remove the problem"
                )

    def _take_batch(self, queue: list[PromptJob]) -> list[PromptJob]:
        """Take as many jobs from the end of the queue as `batch_tokens` allows, at least one."""
        batch = [queue.pop()]
        longest = batch[0].row_tokens
        num_rows = batch[0].num_messages
        while queue and (num_rows + queue[-1].num_messages) * longest <= self.batch_tokens:
            batch.append(queue.pop())
            num_rows += batch[-1].num_messages
        return batch

    def _sample_batch(self, batch: list[PromptJob]) -> None:
        """Sample all messages of a batch and append them to its jobs."""
        limits, greedy, owners, keys = [], [], [], []
        for job in batch:
            for candidate_index in range(job.num_messages):
                keys.append(message_key(self.seed, job.problem_id, job.path, candidate_index))
                limits.append(job.max_new_tokens)
                greedy.append(job.greedy)
                owners.append(job)
        messages = self.decoder.decode(
            [job.prompt_ids for job in batch],
            [job.num_messages for job in batch],
            limits,
            keys,
            greedy,
        )
        for job, (tokens, logprobs) in zip(owners, messages, strict=True):
            job.candidates.append(self._make_candidate(tokens, logprobs))

    def _make_candidate(self, tokens: list[int], logprobs: list[float]) -> Candidate:
        truncated = tokens[-1] not in self.decoder.eos_ids
        text = self.chat_format.message(tokens if truncated else tokens[:-1])
        return Candidate(text, len(tokens), sum(logprobs), truncated)

    def _halve_batch_tokens(self, batch: list[PromptJob]) -> None:
        """Lower the batch size after running out of memory. Raises InputError if it cannot help."""
        if len(batch) == 1:
            raise InputError(
                f"out of memory with {batch[0].num_messages} messages of one prompt; "
                f"lower --max-new-tokens or --num-candidates, or give --quantize-policy"
            ) from None
        self.batch_tokens //= 2
        message = f"out of memory: --batch-tokens halved to {self.batch_tokens}"
        tqdm.write(message, file=sys.stderr)

    def _charge(self, batch: list[PromptJob], costs: list[Cost], *, seconds: float) -> None:
        """Add each job's tokens, and its share of the seconds, to the cost of its request."""
        tokens_per_job = [sum(candidate.tokens for candidate in job.candidates) for job in batch]
        seconds_per_token = seconds / sum(tokens_per_job)
        for job, tokens in zip(batch, tokens_per_job, strict=True):
            num_truncated = sum(candidate.truncated for candidate in job.candidates)
            costs[job.request_index] += Cost(
                agent_calls=job.num_messages,
                prompt_tokens=len(job.prompt_ids),
                generated_tokens=tokens,
                seconds=tokens * seconds_per_token,
                truncated=Counter({job.agent: num_truncated} if num_truncated else {}),
            )


# ---- Flags ---------------------------------------------------------------------------------------


def add_policy_arguments(parser: Parser) -> None:
    """Add the flags of stages 1, 3 and 4: the problems, the agents, and how they are sampled."""
    add_run_arguments(parser)
    # the problems
    embedded = ", ".join(EMBEDDED)
    parser.add_argument(
        "--task", default="tiny", help=f"{embedded} (embedded), or {', '.join(TASKS)}"
    )
    parser.add_argument(
        "--data",
        default=None,
        help="problems from a file (JSON lines, json, csv, parquet) with `question` and `answer`; "
        "graded as --task, or by the narrowest answer type that fits if that is embedded",
    )
    # the agents
    parser.add_argument(
        "--graph",
        default="chain",
        help=f"communication graph: {', '.join(GRAPHS)}, or FILE.toml",
    )
    parser.add_argument(
        "--model",
        default=os.path.relpath(HERE / "tiny" / "agents"),
        help="the agents' causal language model: folder or hub name",
    )
    parser.add_argument(
        "--quantize-policy", action="store_true", help="NF4 weights for the agents, for small cards"
    )
    parser.add_argument(
        "--chat-template-kwargs",
        type=json_object,
        default="{}",
        help='variables of the chat template as JSON, e.g. {"enable_thinking": false}',
    )
    # how their messages are sampled
    parser.add_argument(
        "--temperature", type=positive_float, default=1.0, help="of every sampled message"
    )
    parser.add_argument(
        "--top-k",
        type=non_negative_int,
        default=0,
        help="sample among the k most likely tokens only; 0: all",
    )
    parser.add_argument(
        "--top-p",
        type=positive_unit_float,
        default=1.0,
        help="sample among the most likely tokens that together have this probability; 1: all",
    )
    parser.add_argument(
        "--max-new-tokens",
        type=positive_int,
        default=128,
        help="limit of a message, in addition to the agent's own; suits the tiny agents, "
        "give 512 or so for a real model",
    )
    # the search
    parser.add_argument(
        "--num-candidates",
        default="3",
        help="C, messages per expansion: 3, or 1.8.1.1, or Planner=8,Reader=2",
    )
    parser.add_argument("--c-uct", type=non_negative_float, default=1.0, help="c of Eq. 2")
    parser.add_argument(
        "--max-active", type=positive_int, default=512, help="problems that are searched together"
    )


def json_object(text: str) -> dict:
    """Parse the value of a flag that is a JSON object."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error.msg})") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f'{text!r} is not a JSON object such as {{"name": true}}')
    return value


def make_policy(args, mas: MAS) -> Policy:
    """Load the agents that the flags name. Raises InputError if they are not a chat model."""
    torch.set_num_threads(args.num_threads)
    model, tokenizer = load_pretrained(
        "--model",
        args.model,
        AutoModelForCausalLM,
        quantize=args.quantize_policy,
        device=device_of_this_process(args.device),
        dtype=args.dtype,
    )
    chat_format = ChatFormat(tokenizer, name=args.model, template_kwargs=args.chat_template_kwargs)
    decoder = Decoder(
        model,
        eos_ids=end_of_message_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    return Policy(
        mas,
        decoder,
        chat_format,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
    )


def policy_settings(args, mas: MAS) -> dict:
    """Return the settings that determine the agents' messages, recorded for resuming."""
    return {
        "model": args.model,
        "graph": asdict(mas),
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "quantize_policy": args.quantize_policy,
        "chat_template_kwargs": args.chat_template_kwargs,
        "template_date": TEMPLATE_DATE,
        "dtype": resolve_dtype(args.dtype, args.device),
    }
