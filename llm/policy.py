"""The agents' language model: what a search may ask for, and the policy that answers it.

All agents share one causal language model; their roles differ by system prompt. A search asks for
messages with a `Sample` request, and `Policy` answers many such requests in one batch.

Given the model, its sampling settings and the prompt, a message is a function of (seed, problem,
path in the tree, candidate index), not of the batch it is sampled in. One problem alone, a resumed
run and another batch size give the same text, up to floating-point rounding: no difference was seen
in float32, few in bfloat16 (README, "Limits").
Messages are kept in a journal (journal.py) and never generated twice.
"""

import argparse
import json
import math
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, PreTrainedModel

from llm.cache import takes_fixed_steps
from llm.chat import TEMPLATE_DATE, ChatFormat
from llm.decoding import Decoder
from llm.journal import Journal
from llm.loading import (
    checkpoint_fingerprint,
    context_length,
    end_of_message_ids,
    load_pretrained,
    resolve_dtype,
)
from llm.sampling import SAMPLER, message_key
from mas import GRAPHS, MAS
from support.flags import (
    HERE,
    InputError,
    Parser,
    add_run_arguments,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    positive_unit_float,
)
from support.progress import ignore
from support.records import device_of_this_process
from support.runs import fingerprint
from tasks.problems import EMBEDDED, TASKS, Problem, source
from tree import Candidate, Cost, Sample

# ---- The policy ----------------------------------------------------------------------------------


@dataclass
class PromptJob:
    """One prompt, and the messages that are sampled from it.

    Attributes:
        path: of the node.
        candidates: candidate index -> message, for those that are known already.
        seconds: candidate index -> time that the message took when it was generated. Messages may
            end in any order: `fsum` gives one sum for all of them.
    """

    request_index: int
    problem_id: str
    path: tuple[int, ...]
    agent: str
    prompt_ids: list[int]
    max_new_tokens: int
    num_messages: int
    greedy: bool
    candidates: dict[int, Candidate] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)

    @property
    def row_tokens(self) -> int:
        """Tokens that one message of this prompt can occupy in the cache."""
        return len(self.prompt_ids) + self.max_new_tokens

    def key(self, candidate_index: int) -> str:
        """Return the key of a message in the journal: all that it depends on but the settings."""
        place = (self.problem_id, self.path, candidate_index)
        return fingerprint([*place, self.greedy, self.max_new_tokens, self.prompt_ids])

    def messages(self) -> list[Candidate]:
        return [self.candidates[index] for index in range(self.num_messages)]

    def cost(self) -> Cost:
        messages = self.messages()
        num_truncated = sum(message.truncated for message in messages)
        return Cost(
            agent_calls=self.num_messages,
            prompt_tokens=len(self.prompt_ids),
            generated_tokens=sum(message.tokens for message in messages),
            seconds=math.fsum(self.seconds.values()),
            truncated=Counter({self.agent: num_truncated}),  # a sum drops zeros
        )


class PendingMessages(NamedTuple):
    """Messages of one job that have to be generated."""

    job: PromptJob
    candidate_indices: list[int]

    def without_finished(self) -> "PendingMessages":
        indices = [index for index in self.candidate_indices if index not in self.job.candidates]
        return PendingMessages(self.job, indices)


class Policy:
    """pi: the agents. Answers Sample requests; nothing else in this project generates text.

    Args:
        decoder: the language model of all agents.
        chat_format: renders their prompts and reads their messages.
        settings: what determines a message, apart from its key (see `PromptJob.key`).
        max_new_tokens: limit of a message, in addition to the agent's own.
        batch_tokens: limit of messages x (prompt + limit) that are decoded together.

    Attributes:
        adapters: of agents that were finetuned (stage 5); None for the model as it is.
        journal: where messages are looked up and written down; None generates every message.
        num_generated, num_recalled: messages so far, by the model and from the journal.
        on_batch: called with (prompts, messages) that are finished, to show progress.
        on_message: called with (job, candidate index, token ids) for each generated message.
    """

    def __init__(
        self,
        mas: MAS,
        decoder: Decoder,
        chat_format: ChatFormat,
        *,
        settings: dict,
        seed: int,
        max_new_tokens: int,
        batch_tokens: int,
    ):
        self.mas = mas
        self.decoder = decoder
        self.chat_format = chat_format
        self.settings = settings
        self.seed = seed
        self.max_new_tokens = max_new_tokens
        self.batch_tokens = batch_tokens
        self.adapters = None
        self.journal: Journal | None = None
        self.num_generated = 0
        self.num_recalled = 0
        self.on_batch: Callable[[int, int], None] = ignore
        self.on_message: Callable[[PromptJob, int, list[int]], None] = ignore

    def __call__(
        self, requests: list[tuple[Problem, Sample]]
    ) -> list[tuple[list[list[Candidate]], Cost]]:
        """Answer Sample requests. Reply: a list of candidates per node; a prompt is charged once.

        The cost of a message is that of generating it, even if it comes from the journal.

        Raises InputError if a prompt and its message do not fit into the model's context, or if
        a single message does not fit into memory.
        """
        # 1. One job per node: its prompt, and how many messages to sample from it.
        jobs = self._make_jobs(requests)
        self._check_context(jobs)

        # 2. Look up the messages that were generated before. The others are pending.
        pending = []
        for job in jobs:
            missing = self._load_from_journal(job)
            if missing:
                pending.append(PendingMessages(job, missing))

        # 3. Decode these, the longest first: memory runs out early or never. Messages that are
        #    decoded together have the same adapter.
        pending.sort(key=lambda messages: -messages.job.row_tokens)
        pending_of_adapter = defaultdict(list)
        for messages in pending:
            pending_of_adapter[self._adapter_of(messages.job)].append(messages)
        for pending_of_one in pending_of_adapter.values():
            self._sample(pending_of_one)

        # 4. Jobs are in the order of the requests' nodes.
        replies: list[tuple[list, Cost]] = [([], Cost()) for _ in requests]
        for job in jobs:
            reply, cost = replies[job.request_index]
            reply.append(job.messages())
            cost += job.cost()
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
        context = context_length(self.decoder.model)
        for job in jobs:
            if job.row_tokens > context:
                raise InputError(
                    f"problem {job.problem_id}: the {job.agent}'s prompt of "
                    f"{len(job.prompt_ids)} tokens and a message of {job.max_new_tokens} "
                    f"do not fit into the model's {context}; "
                    f"lower --max-new-tokens or remove the problem"
                )

    def _load_from_journal(self, job: PromptJob) -> list[int]:
        """Fill in the messages that are in the journal. Returns the indices of the others."""
        if self.journal is None:
            return list(range(job.num_messages))
        missing = []
        for candidate_index in range(job.num_messages):
            entry = self.journal.find(job.key(candidate_index))
            if entry is None:
                missing.append(candidate_index)
                continue
            job.candidates[candidate_index] = Candidate(
                entry["text"], entry["tokens"], entry["logprob"], entry["truncated"]
            )
            job.seconds[candidate_index] = entry["seconds"]
        if job.candidates:
            self.num_recalled += len(job.candidates)
            self.on_batch(0 if missing else 1, len(job.candidates))
        return missing

    def _adapter_of(self, job: PromptJob) -> str:
        return "" if self.adapters is None else self.adapters.name_for(job.agent)

    def _sample(self, pending: list[PendingMessages]) -> None:
        """Sample messages of one adapter. Running out of memory lowers batch_tokens."""
        while pending:
            try:
                with self._adapter_merged(pending[0].job.agent):
                    self._decode(pending)
            except torch.OutOfMemoryError:
                self.decoder.free_memory()
                pending = [messages.without_finished() for messages in pending]
                pending = [messages for messages in pending if messages.candidate_indices]
                self._halve_batch_tokens(pending)
            else:
                return

    def _adapter_merged(self, agent: str) -> AbstractContextManager:
        return nullcontext() if self.adapters is None else self.adapters.merged(agent)

    def _decode(self, pending: list[PendingMessages]) -> None:
        """Decode messages; write each down when it has ended."""
        # 1. Each message has its own key, from which its noise follows.
        places, limits, greedy, keys = [], [], [], []
        for job, candidate_indices in pending:
            for candidate_index in candidate_indices:
                keys.append(message_key(self.seed, job.problem_id, job.path, candidate_index))
                limits.append(job.max_new_tokens)
                greedy.append(job.greedy)
                places.append((job, candidate_index))

        # 2. Decode them together.
        def on_message(index: int, tokens: list[int], logprobs: list[float], seconds: float):
            job, candidate_index = places[index]
            job.candidates[candidate_index] = self._make_candidate(tokens, logprobs)
            job.seconds[candidate_index] = seconds
            self._save_to_journal(job, candidate_index, seconds)
            self.on_message(job, candidate_index, tokens)
            self.num_generated += 1
            self.on_batch(int(len(job.candidates) == job.num_messages), 1)

        self.decoder.decode(
            [job.prompt_ids for job, _ in pending],
            [len(candidate_indices) for _, candidate_indices in pending],
            limits,
            keys,
            greedy,
            batch_tokens=self.batch_tokens,
            on_message=on_message,
        )

    def _make_candidate(self, tokens: list[int], logprobs: list[float]) -> Candidate:
        truncated = tokens[-1] not in self.decoder.eos_ids
        text = self.chat_format.message(tokens if truncated else tokens[:-1])
        return Candidate(text, len(tokens), sum(logprobs), truncated)

    def _save_to_journal(self, job: PromptJob, candidate_index: int, seconds: float) -> None:
        if self.journal is None:
            return
        place = {"problem": job.problem_id, "path": job.path, "candidate": candidate_index}
        message = job.candidates[candidate_index]._asdict()
        entry = place | {"agent": job.agent} | message | {"seconds": seconds}
        self.journal.add(job.key(candidate_index), entry)

    def _halve_batch_tokens(self, pending: list[PendingMessages]) -> None:
        """Lower the batch size after running out of memory. Raises InputError if it cannot help."""
        longest = max(messages.job.row_tokens for messages in pending)
        num_messages = sum(len(candidate_indices) for _, candidate_indices in pending)
        batch_tokens = min(self.batch_tokens, num_messages * longest)
        if batch_tokens < 2 * longest:
            raise InputError(
                f"out of memory with one message of {longest} tokens, prompt included; "
                f"lower --max-new-tokens, or give --quantize-policy"
            ) from None
        self.batch_tokens = batch_tokens // 2
        note = f"out of memory: --batch-tokens lowered to {self.batch_tokens}"
        tqdm.write(note, file=sys.stderr)


# ---- Flags ---------------------------------------------------------------------------------------


def add_policy_arguments(parser: Parser) -> None:
    """Add the flags of all stages with agents: the problems, the agents, how they are sampled."""
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
        "--adapter",
        default=None,
        help="use finetuned agents: a folder RUN/agents of train_agents.py",
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
        default=192,
        help="limit of a message, in addition to the agent's own; suits the tiny agents, "
        "give 512 or so for a real model",
    )
    # the search
    parser.add_argument(
        "--num-candidates",
        default="3",
        help="C, messages per expansion: 3, or 1.8.1.1, or Planner=8,Reader=2",
    )
    parser.add_argument(
        "--max-active", type=positive_int, default=512, help="problems that are searched together"
    )


def add_tree_search_arguments(parser: Parser) -> None:
    """Add the flags of the stages that search a tree and keep a journal: 1, 3 and 4."""
    parser.add_argument("--c-uct", type=non_negative_float, default=1.0, help="c of Eq. 2")
    parser.add_argument(
        "--messages",
        default=None,
        help="folder of the journal of messages; runs with the same agents can share it "
        "(default: RUN/messages)",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="generate with CUDA graphs: a step does not wait for Python (not run on a GPU yet)",
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
    """Load the agents that the flags name.

    Raises InputError if they are not a chat model, or if their adapters do not belong to them.
    """
    torch.set_num_threads(args.num_threads)
    model, tokenizer = load_pretrained(
        "--model",
        args.model,
        AutoModelForCausalLM,
        quantize=args.quantize_policy,
        device=device_of_this_process(args.device),
        dtype=args.dtype,
    )
    chat_format = ChatFormat(
        tokenizer,
        name=f"--model {args.model}",
        template_kwargs=args.chat_template_kwargs,
    )
    cuda_graphs = getattr(
        args, "cuda_graphs", False
    )  # stage 5 trains adapters: it has no such flag
    if cuda_graphs:
        _check_cuda_graphs(args, model)
    decoder = Decoder(
        model,
        eos_ids=end_of_message_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        cuda_graphs=cuda_graphs,
    )
    policy = Policy(
        mas,
        decoder,
        chat_format,
        settings=policy_settings(args, model),
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
    )
    if args.adapter is not None:
        load_adapters(policy, args.adapter)
    return policy


def _check_cuda_graphs(args, model: PreTrainedModel) -> None:
    """Raise InputError if CUDA graphs cannot decode with these agents."""
    if args.adapter is not None:
        raise InputError("--cuda-graphs: not with --adapter, as a graph keeps one set of adapters")
    if not takes_fixed_steps(model):
        raise InputError(
            f"--cuda-graphs: not with --model {args.model}; every layer has to attend to all "
            f"tokens, with attention 'sdpa'"
        )


def load_adapters(policy: Policy, folder: str) -> None:
    """Let finetuned agents speak. folder: RUN/agents of stage 5."""
    from llm.adapters import AgentAdapters, adapters_setting

    adapters = AgentAdapters.load(policy.decoder.model, policy.mas, Path(folder), policy.settings)
    policy.adapters = adapters
    policy.settings["adapter"] = adapters_setting(folder, adapters.names)


def policy_settings(args, model: PreTrainedModel) -> dict:
    """Return the settings that determine the agents' messages, apart from graph and limits."""
    return {
        "model": {"name": args.model, "fingerprint": checkpoint_fingerprint(args.model, model)},
        "quantize_policy": args.quantize_policy,
        "sampler": SAMPLER,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "dtype": resolve_dtype(args.dtype, args.device),
        "chat_template_kwargs": args.chat_template_kwargs,
        "template_date": TEMPLATE_DATE,
    }


def search_settings(args, policy: Policy) -> dict:
    """Return the settings that determine searches over the agents, recorded for resuming."""
    return policy.settings | {
        "max_new_tokens": args.max_new_tokens,
        "graph": asdict(policy.mas),
        "c_uct": args.c_uct,
        **source(args.task, args.data),
    }


@contextmanager
def journal_of(policy: Policy, args) -> Iterator[None]:
    """Let the policy keep a journal of its messages in the run folder, or where --messages says."""
    folder = Path(args.messages or f"{args.run}/messages")
    with Journal(folder, policy.settings) as journal:
        policy.journal = journal
        try:
            yield
        finally:
            policy.journal = None


def describe_messages(policy: Policy) -> str:
    return f"{policy.num_generated:,} messages generated, {policy.num_recalled:,} from the journal"
