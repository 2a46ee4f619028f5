"""The policy: all agents, as one causal language model whose roles differ by system prompt.

A search asks for messages with a `Sample` request, and `Policy` answers many such requests in one
batch. Given the model, its sampling settings and the prompt, a message is a function of (seed,
problem, path in the tree, candidate index), not of the batch it is sampled in. One problem alone, a
resumed run and another batch size give the same text, up to rounding (README, "Limits").
"""

import json
import math
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from llm.decoding import SAMPLER, Decoder, message_key
from llm.loading import (
    checkpoint_setting,
    context_length,
    end_of_message_ids,
    load_pretrained,
    resolve_dtype,
)
from llm.packing import collate, packed_batches, row_width, sequence_columns
from llm.text import TextEncoder
from mas import MAS, State, graph_names
from support.flags import (
    TINY_AGENTS,
    InputError,
    Parser,
    non_negative_float,
    non_negative_int,
    positive_float,
    positive_int,
    positive_unit_float,
)
from support.progress import Progress
from support.records import Journal, errors_name
from support.runs import fingerprint, without_names
from tasks.problems import Problem, source
from tree import Candidate, Cost, Sample, TooLong

# ---- Chats: how an agent is asked, and how its message is read -----------------------------------

# The date that a template is told if it asks for today's: Llama 3's own default. A message must not
# depend on the day it was sampled.
TEMPLATE_DATE = date(2024, 7, 26)


class ChatFormat:
    """Turns chats into token ids by the checkpoint's own template, and token ids into messages.

    A template may refuse the system role, or leave it out. The system text then begins the user's
    turn. This is found by rendering an example.

    Args:
        name: the flag and the model that it names, for the messages of errors.
        template_kwargs: further variables of the template, e.g. {"enable_thinking": False}.

    Attributes:
        merges_system: whether the system text becomes part of the user's turn.
        opens_reasoning: whether prompts end with an open reasoning block.

    Raises:
        InputError: if there is no template, or if it fails or leaves out the user's text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, name: str, template_kwargs: dict):
        self.tokenizer = tokenizer
        self.text_encoder = TextEncoder(tokenizer)
        self.name = name
        self.template_kwargs = template_kwargs
        if tokenizer.chat_template is None:
            raise self._error("its tokenizer has no chat template; the agents need a chat model")

        # transformers tells a template today's date, and takes no function as a variable.
        self.template = re.sub(
            r"""strftime_now\((["'])(.*?)\1\)""",
            lambda call: repr(TEMPLATE_DATE.strftime(call[2])),
            tokenizer.get_chat_template(),
        )

        # Render an example to learn what the template does with the two roles.
        example = [
            {"role": "system", "content": "EXAMPLE-OF-SYSTEM"},
            {"role": "user", "content": "EXAMPLE-OF-USER"},
        ]
        self.merges_system = False
        try:
            self.merges_system = "EXAMPLE-OF-SYSTEM" not in self._render([example])[0]
        except InputError:  # the template refuses the role
            self.merges_system = True
        [text] = self._render([example])
        if "EXAMPLE-OF-USER" not in text:
            raise self._error("its chat template leaves out the user's text")
        self.opens_reasoning = text.rstrip().endswith("<think>")

    def encode(self, chats: list[list[dict[str, str]]]) -> list[list[int]]:
        """Return the token ids of each chat, up to where the model's message begins.

        A chat has a system turn and a user turn. Raises InputError if the template fails.
        """
        protect = self.text_encoder.protect
        protected = []
        for chat in chats:
            protected.append([turn | {"content": protect(turn["content"])} for turn in chat])
        return self.text_encoder.encode(self._render(protected))

    def message(self, token_ids: list[int]) -> str:
        """Return the text of a message, without special tokens and without its reasoning."""
        text = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        if self.opens_reasoning:
            text = "<think>" + text
        return without_reasoning(text).strip()

    def check_end(self, eos_ids: set[int]) -> None:
        """Raise InputError if the template ends a message by none of `eos_ids`: none would end."""
        roles = ("user", "assistant", "user")
        chat = [{"role": role, "content": f"EXAMPLE-OF-{role}"} for role in roles]
        options = {"tokenize": False, "chat_template": self.template, **self.template_kwargs}
        with errors_name(f"{self.name}: its chat template fails"):
            text = self.tokenizer.apply_chat_template(chat, **options)
        _, is_shown, rest = text.partition("EXAMPLE-OF-assistant")
        end = rest.partition("EXAMPLE-OF-user")[0]
        ids = self.tokenizer(end, add_special_tokens=False)["input_ids"]
        if is_shown and eos_ids.isdisjoint(ids):
            raise self._error(
                f"its chat template ends a message by {end!r}, which is no eos_token of the "
                f"checkpoint: no message would end; take a chat model, or correct that setting"
            )

    def _render(self, chats: list[list[dict[str, str]]]) -> list[str]:
        if self.merges_system:
            texts = ["\n\n".join(turn["content"] for turn in chat) for chat in chats]
            chats = [[{"role": "user", "content": text}] for text in texts]
        with errors_name(f"{self.name}: its chat template fails"):
            return self.tokenizer.apply_chat_template(
                chats,
                add_generation_prompt=True,
                tokenize=False,
                chat_template=self.template,
                **self.template_kwargs,
            )

    def _error(self, reason: str) -> InputError:
        return InputError(f"{self.name}: {reason}")


def without_reasoning(text: str) -> str:
    """Remove reasoning blocks, <think> ... </think>, from a message.

    An unclosed block is reasoning up to the end. If only the closing tag is there, everything
    before it is reasoning.
    """
    text = re.sub(r"<think>.*?</think>", "", text, flags=re.DOTALL)
    text = text.rpartition("</think>")[2]
    return text.partition("<think>")[0]


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

    def missing(self) -> list[int]:
        return [index for index in range(self.num_messages) if index not in self.candidates]

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


@dataclass
class Policy:
    """pi: the agents. Answers Sample requests; nothing else in this project generates text.

    Attributes:
        decoder: the language model of all agents.
        chat_format: renders their prompts and reads their messages.
        settings: what determines a message, apart from its key (see `PromptJob.key`).
        max_new_tokens: limit of a message, in addition to the agent's own.
        batch_tokens: limit of messages x (prompt + limit) that are decoded together.
        adapters: of agents that were finetuned (stage 5); None for the model as it is.
        journal: where messages are looked up and written down; None generates every message.
    """

    mas: MAS
    decoder: Decoder
    chat_format: ChatFormat
    settings: dict
    seed: int | str
    max_new_tokens: int
    batch_tokens: int
    progress: Progress
    adapters: Any = None  # llm.adapters.AgentAdapters
    journal: Journal | None = None

    def __call__(
        self, requests: list[tuple[Problem, Sample]]
    ) -> list[tuple[list[list[Candidate]], Cost]]:
        """Answer Sample requests. Reply: a list of candidates per node; a prompt is charged once.

        The cost of a message is that of generating it, even if it comes from the journal. A message
        is cut where the model's context ends.

        Raises TooLong if a prompt alone fills the context, and InputError if a single message does
        not fit into memory.
        """
        # 1. One job per node: its prompt, and how many messages to sample from it.
        jobs = self._make_jobs(requests)

        # 2. Look up the messages that were generated before.
        for job in jobs:
            self._load_from_journal(job)

        # 3. Decode the others, the longest first: memory runs out early or never. Messages that are
        #    decoded together have the same adapter.
        jobs_of_adapter = defaultdict(list)
        for job in sorted(jobs, key=lambda job: -job.row_tokens):
            if job.missing():
                name = self.adapters.name_for(job.agent) if self.adapters else None
                jobs_of_adapter[name].append(job)
        for jobs_of_one in jobs_of_adapter.values():
            self._sample(jobs_of_one)

        # 4. Jobs are in the order of the requests' nodes.
        replies: list[tuple[list, Cost]] = [([], Cost()) for _ in requests]
        for job in jobs:
            reply, cost = replies[job.request_index]
            reply.append(job.messages())
            cost += job.cost()
        return replies

    def prompt_ids(self, state: State, answer_type: str) -> list[int]:
        """Return the token ids that ask the next agent for its message."""
        [ids] = self.chat_format.encode([self.mas.prompt(state, answer_type)])
        return ids

    def _make_jobs(self, requests: list[tuple[Problem, Sample]]) -> list[PromptJob]:
        context = context_length(self.decoder.model)
        places, chats = [], []
        for index, (problem, request) in enumerate(requests):
            for node in request.nodes:
                places.append((index, problem, request, node))
                chats.append(self.mas.prompt(node.state, problem.answer_type))
        encoded = self.chat_format.encode(chats)  # in one call
        jobs = []
        for (index, problem, request, node), prompt_ids in zip(places, encoded, strict=True):
            agent = self.mas.turn(node.state)
            room = context - len(prompt_ids)
            if room < 1:
                place = f"the {agent.name}'s prompt of {len(prompt_ids)} tokens"
                raise TooLong(f"{place} fills the model's context of {context}")
            job = PromptJob(
                request_index=index,
                problem_id=problem.id,
                path=node.path,
                agent=agent.name,
                prompt_ids=prompt_ids,
                max_new_tokens=min(agent.max_new_tokens, self.max_new_tokens, room),
                num_messages=request.num,
                greedy=request.greedy,
            )
            jobs.append(job)
        return jobs

    def _sample(self, jobs: list[PromptJob]) -> None:
        """Sample the missing messages of jobs with one adapter.

        Running out of memory halves batch_tokens. Raises InputError if this cannot help.
        """
        if self.adapters is not None:
            self.adapters.use(jobs[0].agent)
        while jobs:
            try:
                self._decode(jobs)
            except torch.OutOfMemoryError:
                self._halve_batch_tokens([job for job in jobs if job.missing()])
            jobs = [job for job in jobs if job.missing()]

    def _decode(self, jobs: list[PromptJob]) -> None:
        """Decode the missing messages; write each down when it has ended."""
        # 1. Each message has its own key, from which its noise follows.
        places, repeats, keys = [], [], []
        for job in jobs:
            missing = job.missing()
            repeats.append(len(missing))
            for index in missing:
                places.append((job, index))
                keys.append(message_key(self.seed, job.problem_id, job.path, index))

        # 2. Decode them together.
        def on_message(place: int, tokens: list[int], logprobs: list[float], seconds: float):
            job, index = places[place]
            job.candidates[index] = self._make_candidate(tokens, logprobs)
            job.seconds[index] = seconds
            self._save_to_journal(job, index)
            self.progress.message_generated(len(tokens))

        self.decoder.decode(
            [job.prompt_ids for job in jobs],
            repeats,
            [job.max_new_tokens for job, _ in places],
            keys,
            [job.greedy for job, _ in places],
            batch_tokens=self.batch_tokens,
            on_message=on_message,
        )

    def _make_candidate(self, tokens: list[int], logprobs: list[float]) -> Candidate:
        truncated = tokens[-1] not in self.decoder.eos_ids
        text = self.chat_format.message(tokens if truncated else tokens[:-1])
        return Candidate(text, len(tokens), sum(logprobs), truncated, tuple(tokens))

    def _halve_batch_tokens(self, jobs: list[PromptJob]) -> None:
        longest = max(job.row_tokens for job in jobs)
        num_messages = sum(len(job.missing()) for job in jobs)
        batch_tokens = min(self.batch_tokens, num_messages * longest)
        if batch_tokens < 2 * longest:
            raise InputError(
                f"out of memory with one message of {longest} tokens, prompt included; "
                f"lower --max-new-tokens, or give --quantize-policy"
            ) from None
        self.batch_tokens = batch_tokens // 2
        print(f"out of memory: --batch-tokens lowered to {self.batch_tokens}", file=sys.stderr)

    # -- The journal --

    def _load_from_journal(self, job: PromptJob) -> None:
        """Fill in the messages that are in the journal."""
        if self.journal is None:
            return
        for index in range(job.num_messages):
            entry = self.journal.find(job.key(index))
            if entry is not None:
                job.seconds[index] = entry["seconds"]
                job.candidates[index] = Candidate(
                    entry["text"], entry["tokens"], entry["logprob"], entry["truncated"]
                )
                self.progress.message_recalled()

    def _save_to_journal(self, job: PromptJob, index: int) -> None:
        if self.journal is None:
            return
        entry = {"problem": job.problem_id, "path": job.path, "candidate": index}
        entry |= {"agent": job.agent} | job.candidates[index]._asdict()
        del entry["token_ids"]  # only stage 5 needs them, and it has no journal
        self.journal.add(job.key(index), entry | {"seconds": job.seconds[index]})

    # -- Reading messages, for stage 5 --

    def message_logprobs(
        self, messages: list, *, batch_tokens: int
    ) -> Iterator[list[tuple[Any, torch.Tensor]]]:
        """Yield messages in packed batches, each with log pi of its tokens: float32 [tokens].

        pi is the softmax of logits / temperature. A prompt that several messages answer is read
        once. A batch has messages of one adapter.

        Args:
            messages: whatever has `agent`, `prompt_ids` and `token_ids`.
            batch_tokens: see `packed_batches`.
        """
        adapters, model = self.adapters, self.adapters.model
        options = {"batch_tokens": batch_tokens, "max_width": row_width(model.config)}
        for name in adapters.names:
            own = [message for message in messages if adapters.name_for(message.agent) == name]
            sequences = [[*message.prompt_ids, *message.token_ids] for message in own]
            for batch in packed_batches(sequences, indices=range(len(own)), **options):
                # 1. A token is predicted at the column before its own. Other logits take memory.
                places = []
                for index, (row, columns) in sequence_columns(batch).items():
                    places.append((own[index], row, columns[len(own[index].prompt_ids) - 1 : -1]))
                kept = sorted({column for _, _, columns in places for column in columns})
                position = {column: index for index, column in enumerate(kept)}

                # 2. Read, and look up each token.
                adapters.use(own[0].agent)
                inputs = collate(batch, self.decoder.pad_id, model.device)
                inputs["logits_to_keep"] = torch.tensor(kept, device=model.device)
                logits = model(**inputs).logits.float()  # [packed rows, kept, vocabulary]
                logprobs = (logits / self.settings["temperature"]).log_softmax(-1)
                read = []
                for message, row, columns in places:
                    positions = [position[column] for column in columns]
                    read.append((message, logprobs[row, positions, list(message.token_ids)]))
                yield read


# ---- Flags ---------------------------------------------------------------------------------------


def add_agent_arguments(parser: Parser) -> None:
    """Add the flags of all stages with agents: who they are, and how they speak."""
    named_graphs = ", ".join(graph_names())
    add = parser.add_argument
    add("--graph", default="chain", help=f"{named_graphs}, or FILE.toml: who sees whom")
    add("--model", default=TINY_AGENTS, help="the agents' language model: folder or hub name")
    add("--adapter", default=None, help="finetuned agents: a folder RUN/agents of train_agents.py")
    help_kwargs = "variables of the chat template, as JSON"
    add("--chat-template-kwargs", type=json.loads, default="{}", help=help_kwargs)
    add("--temperature", type=positive_float, default=1.0, help="of every sampled message")
    help_limit = "limit of a message, beside the agent's own; give 512 or so for a real model"
    add("--max-new-tokens", type=positive_int, default=192, help=help_limit)


def add_tree_search_arguments(parser: Parser) -> None:
    """Add the flags of the stages that search a tree and keep a journal: 1, 3 and 4."""
    add_agent_arguments(parser)
    add = parser.add_argument
    add("--quantize-policy", action="store_true", help="NF4 weights for the agents")
    add("--top-k", type=non_negative_int, default=0, help="only the k likeliest tokens; 0: all")
    help_top_p = "only the likeliest tokens that together have this probability; 1: all"
    add("--top-p", type=positive_unit_float, default=1.0, help=help_top_p)
    add("--num-candidates", default="3", help="C per expansion: 3, 1.8.1.1, or Planner=8,Reader=2")
    add("--c-uct", type=non_negative_float, default=1.0, help="c of Eq. 2")
    add("--max-active", type=positive_int, default=512, help="problems searched together")
    help_messages = "folder of the journal (default: RUN/messages); runs may share one"
    add("--messages", default=None, help=help_messages)


def make_policy(args, mas: MAS, *, progress: Progress) -> Policy:
    """Load the agents that the flags name.

    Raises InputError if they are not a chat model, or if their adapters do not belong to them.
    """
    torch.set_num_threads(args.num_threads)
    model, tokenizer = load_pretrained(
        "--model",
        args.model,
        AutoModelForCausalLM,
        quantize=args.quantize_policy,
        device=args.device,
        dtype=args.dtype,
    )
    chat_format = ChatFormat(
        tokenizer,
        name=f"--model {args.model}",
        template_kwargs=args.chat_template_kwargs,
    )
    decoder = Decoder(
        model,
        eos_ids=end_of_message_ids(model, tokenizer),
        pad_id=tokenizer.pad_token_id,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
    )
    chat_format.check_end(decoder.eos_ids)
    settings = policy_settings(args)
    adapters = None
    if args.adapter is not None:
        from llm.adapters import AgentAdapters  # imported late: peft takes a second

        adapters = AgentAdapters.load(model, mas, Path(args.adapter), settings)
        settings["adapter"] = {"name": args.adapter, "fingerprint": adapters.fingerprint}
    return Policy(
        mas,
        decoder,
        chat_format,
        settings=settings,
        seed=args.seed,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
        progress=progress,
        adapters=adapters,
    )


def policy_settings(args) -> dict:
    """Return the settings that determine the agents' messages, apart from graph and limits."""
    return {
        "model": checkpoint_setting(args.model),
        "quantize_policy": args.quantize_policy,
        "sampler": SAMPLER,
        "seed": args.seed,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "dtype": resolve_dtype(args.dtype, args.device),
        "chat_template_kwargs": args.chat_template_kwargs,
        "template_date": TEMPLATE_DATE.isoformat(),
    }


def run_settings(args, policy: Policy) -> dict:
    """Return the settings of every stage with agents, recorded for resuming."""
    return policy.settings | {
        "max_new_tokens": args.max_new_tokens,
        "graph": asdict(policy.mas),
        **source(args.task, args.data),
    }


@contextmanager
def with_journal(policy: Policy, args) -> Iterator[Policy]:
    """Give the policy a journal, in the run folder or where --messages says."""
    folder = Path(args.messages or f"{args.run}/messages")
    name = fingerprint(without_names(policy.settings))[:12]
    with Journal(folder, name, policy.settings) as journal:
        yield replace(policy, journal=journal)
