"""Batched decoding: token ids in, token ids out. Knows no agents, problems or trees.

Every message draws its tokens with its own random numbers, so it depends on the batch it is decoded
in through rounding of the logits only. Messages of one prompt share their computation for as long
as their tokens are equal. When some messages have ended, the next prompts take their rows
(continuous batching).
"""

import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from llm.cache import CacheRows, FixedRows, FixedSteps
from llm.sampling import sample_tokens

# ---- The decoder ---------------------------------------------------------------------------------


def ignore(*a):
    pass


class PromptMessages(NamedTuple):
    """A prompt and those of its messages that are started together, as indices."""

    prompt: int
    messages: list[int]


class MessageQueue:
    """Decides which messages are decoded together.

    Args:
        prompts, repeats, limits, batch_tokens: see `Decoder.decode`.
        is_resizable: see `CacheRows.is_resizable_for`. If padding columns cannot be dropped, the
            cache can need the longest prompt and the largest limit, even of different messages.

    Attributes:
        max_width: columns of the cache that the live messages can need.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        repeats: list[int],
        limits: list[int],
        batch_tokens: int | None,
        *,
        is_resizable: bool,
    ):
        self.batch_tokens = sys.maxsize if batch_tokens is None else batch_tokens
        self.is_resizable = is_resizable
        self.max_width = 1
        self.sizes: list[tuple[int, int]] = []  # per message: (length of its prompt, token limit)
        self.waiting: deque[PromptMessages] = deque()
        for prompt, num in enumerate(repeats):
            first = len(self.sizes)
            self.waiting.append(PromptMessages(prompt, list(range(first, first + num))))
            self.sizes += [(len(prompts[prompt]), limit) for limit in limits[first : first + num]]

    def take(self, live: list[int]) -> list[PromptMessages]:
        """Return the prompts to start next to the live messages; at least one if none is live.

        The messages of one prompt stay together unless they need more than a whole batch.
        """
        together = list(live)
        taken = []
        while self.waiting:
            prompt, messages = self.waiting[0]
            room = self.batch_tokens // self._columns(together + messages) - len(together)
            if together and room < len(messages):
                break
            room = max(1, room)
            self.waiting.popleft()
            taken.append(PromptMessages(prompt, messages[:room]))
            together += messages[:room]
            if messages[room:]:
                self.waiting.appendleft(PromptMessages(prompt, messages[room:]))
                break
        self.max_width = self._columns(together)
        return taken

    def _columns(self, messages: list[int]) -> int:
        """Return how many columns a row of the cache can take with these messages."""
        sizes = [self.sizes[index] for index in messages]
        if self.is_resizable:
            return max((prompt + limit for prompt, limit in sizes), default=1)
        return max(prompt for prompt, _ in sizes) + max(limit for _, limit in sizes)

    def has_room(self, num_live: int) -> bool:
        """Whether so much of a batch is free that adding prompts, which copies the cache, pays."""
        capacity = self.batch_tokens // self.max_width
        return bool(self.waiting) and num_live <= CacheRows.SHARE_WORTH_KEEPING * capacity


class Drafts:
    """Messages as far as they are sampled.

    Attributes:
        lengths: [messages], tokens so far.
        seconds: [messages], each one's share of the time of the steps in which it was live.
    """

    def __init__(self, limits: list[int], device: torch.device):
        self.limits = torch.tensor(limits, device=device)
        shape = (len(limits), max(limits))
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.lengths = torch.zeros_like(self.limits)
        self.seconds = torch.zeros(len(limits), dtype=torch.float64)

    def append(self, live: torch.Tensor, tokens: torch.Tensor, logprobs: torch.Tensor) -> None:
        """Add one token to each of these messages."""
        lengths = self.lengths[live]
        self.tokens[live, lengths] = tokens
        self.logprobs[live, lengths] = logprobs
        self.lengths[live] = lengths + 1

    def are_full(self, live: torch.Tensor) -> torch.Tensor:
        """Return whether each of these messages is at its token limit."""
        return self.lengths[live] >= self.limits[live]

    def share_time(self, live: torch.Tensor, seconds: float) -> None:
        self.seconds[live.cpu()] += seconds / len(live)

    def message(self, index: int) -> tuple[list[int], list[float]]:
        """Return the token ids and log-probabilities of a message."""
        length = self.lengths[index]
        return self.tokens[index, :length].tolist(), self.logprobs[index, :length].tolist()


class Decoder:
    """Samples many messages together, each with its own token limit.

    The decoding loop is our own, because `generate` repeats equal computations for equal messages,
    keeps ended rows until the last one ends, has one token limit per batch, and copies its cache at
    every step (RESULTS.md, "Speed").

    Args:
        eos_ids: token ids that end a message.
        pad_id: any token id; prompts are padded with it.
        temperature, top_k, top_p: of every sampled token, see `filter_logits`.
        cuda_graphs: decode with steps of fixed shape, see `FixedSteps`.

    Attributes:
        fixed_steps: these steps; None without them.
        seconds: time spent per activity: "model", and "sampling", which includes copying the cache
            when messages differ. Approximate on a GPU, as its kernels run asynchronously.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_ids: set[int],
        pad_id: int,
        temperature: float,
        top_k: int,
        top_p: float,
        cuda_graphs: bool = False,
    ):
        self.model = model.eval()
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.fixed_steps = FixedSteps(model) if cuda_graphs else None
        self.seconds = {"model": 0.0, "sampling": 0.0}

    @torch.inference_mode()
    def decode(
        self,
        prompts: list[list[int]],
        repeats: list[int],
        limits: list[int],
        keys: list[int],
        greedy: list[bool],
        *,
        batch_tokens: int | None = None,
        on_message: Callable[[int, list[int], list[float], float], None] = ignore,
    ) -> list[tuple[list[int], list[float]]]:
        """Sample all messages, from one prefill per prompt.

        As many are decoded together as `batch_tokens` allows. When some have ended, the next
        prompts take their rows, so that steps do not run with a handful of rows because a few
        messages are long.

        Args:
            prompts: token ids of each prompt. They are started in this order.
            repeats: number of messages per prompt.
            limits: token limit per message.
            keys: per message, see `message_key`.
            greedy: per message.
            batch_tokens: limit of messages x the longest prompt and message limit; None: no limit.
            on_message: called with (index, token ids, log-probabilities, seconds) of each message
                when it has ended. Messages share the seconds of the steps in which they are live.

        Returns:
            (token ids, log-probabilities) per message.
        """
        device = self.model.device
        is_resizable = CacheRows.is_resizable_for(self.model)
        queue = MessageQueue(prompts, repeats, limits, batch_tokens, is_resizable=is_resizable)
        drafts = Drafts(limits, device)
        keys = torch.tensor(keys, device=device)
        greedy = torch.tensor(greedy, device=device)
        eos_ids = torch.tensor(sorted(self.eos_ids), device=device)

        rows = None
        # Messages that are being decoded, and the row of the cache that each of them reads.
        live = torch.zeros(0, dtype=torch.long, device=device)
        row_of_message = live
        while queue.waiting or rows is not None:
            start = time.perf_counter()

            # 1. Start further prompts if there is room. All messages of one begin in its row.
            if rows is None or (is_resizable and queue.has_room(len(live))):
                started = queue.take(live.tolist())
                with self._timed("model"):
                    rows, row_of_message = self._prefill(rows, row_of_message, prompts, started)
                for row, part in enumerate(started, len(rows.logits) - len(started)):
                    indices = torch.tensor(part.messages, device=device)
                    live = torch.cat([live, indices])
                    row_of_message = torch.cat([row_of_message, torch.full_like(indices, row)])

            # 2. Sample the next token of every message, and see which end with it.
            with self._timed("sampling"):
                newest, logprobs = sample_tokens(
                    rows.logits,
                    row_of_message,
                    keys[live],
                    drafts.lengths[live],
                    greedy[live],
                    **self.sampling,
                )
                drafts.append(live, newest, logprobs)
                has_ended = torch.isin(newest, eos_ids) | drafts.are_full(live)
                ended, continuing = live[has_ended], (~has_ended).nonzero()[:, 0]
            drafts.share_time(live, time.perf_counter() - start)
            for index in ended.tolist():
                on_message(index, *drafts.message(index), drafts.seconds[index].item())

            # 3. Read the tokens of the others.
            start = time.perf_counter()
            live = live[continuing]
            if len(live) == 0:
                rows, row_of_message = None, live
                continue
            with self._timed("sampling"):
                row_of_message, newest_of_row = rows.branch(
                    row_of_message[continuing], newest[continuing], queue.max_width
                )
            with self._timed("model"):
                rows.append(newest_of_row)
            drafts.share_time(live, time.perf_counter() - start)
        return [drafts.message(index) for index in range(len(limits))]

    def _prefill(
        self,
        rows: CacheRows | None,
        row_of_message: torch.Tensor,
        prompts: list[list[int]],
        started: list[PromptMessages],
    ) -> tuple[CacheRows, torch.Tensor]:
        """Read the prompts that are started, into the last rows of the cache or into a new one.

        Returns the cache, and row_of_message of the messages that were live before.
        """
        new_prompts = [prompts[part.prompt] for part in started]
        if rows is None and self.fixed_steps is None:
            rows = CacheRows(self.model, new_prompts, pad_id=self.pad_id)
        elif rows is None:
            rows = FixedRows(self.model, new_prompts, pad_id=self.pad_id, steps=self.fixed_steps)
        elif new_prompts:
            row_of_message = rows.add_prompts(new_prompts, row_of_message)
        return rows, row_of_message

    def free_memory(self) -> bool:
        """Give back the memory that is kept between calls. Returns whether there was some."""
        if self.fixed_steps is None or not self.fixed_steps.memory:
            return False
        self.fixed_steps.free()
        return True

    @contextmanager
    def _timed(self, activity: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start
