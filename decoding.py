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
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from runs import ignore
from sampling import sample_tokens

# ---- The key-value cache -------------------------------------------------------------------------


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, with room for more columns.

    `DynamicLayer` copies all keys and values at every step (torch.cat). Here a step writes one new
    column, and a copy is made only if there is no room.
    """

    SPARE_COLUMNS = 64
    # Of keys and of values, [rows, heads, columns with spare ones, dim]. Some models store keys and
    # values of different dim. `keys` and `values` are views of the columns that are filled.
    storages: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        newest = (key_states, value_states)
        if self.storages is None or self.storages[0].shape[2] < end:
            self.storages = self._with_room(newest, start, end)
        for storage, states in zip(self.storages, newest, strict=True):
            storage[:, :, start:end] = states
        self._fill(end)
        return self.keys, self.values

    def _with_room(self, newest, start: int, end: int) -> tuple[torch.Tensor, ...]:
        """Return storages with spare columns that hold the keys and values so far."""
        storages = []
        for so_far, states in zip((self.keys, self.values), newest, strict=True):
            rows, heads, _, dim = states.shape
            storage = states.new_empty((rows, heads, end + self.SPARE_COLUMNS, dim))
            if start > 0:
                storage[:, :, :start] = so_far
            storages.append(storage)
        return tuple(storages)

    def _fill(self, end: int) -> None:
        """Make `keys` and `values` views of the first `end` columns."""
        self.keys, self.values = (storage[:, :, :end] for storage in self.storages)

    def batch_select_indices(self, indices: torch.Tensor, first_column: int = 0) -> None:
        """Keep, reorder or repeat rows, without the columns before `first_column`."""
        end = self.get_seq_length() - first_column
        self.storages = tuple(storage[indices, :, first_column:] for storage in self.storages)
        self._fill(end)

    def add_rows(self, other: "PreallocatedLayer") -> None:
        """Append the rows of another layer, aligned on the right."""
        end = max(self.get_seq_length(), other.get_seq_length())
        storages = []
        for upper, lower in ((self.keys, other.keys), (self.values, other.values)):
            num_rows, heads, _, dim = upper.shape
            shape = (num_rows + len(lower), heads, end + self.SPARE_COLUMNS, dim)
            # Zeros: attention ignores padding, but 0 * (not a number) is not a number.
            storage = upper.new_zeros(shape)
            storage[:num_rows, :, end - upper.shape[2] : end] = upper
            storage[num_rows:, :, end - lower.shape[2] : end] = lower
            storages.append(storage)
        self.storages = tuple(storages)
        self._fill(end)


def pad_left(rows: list[list[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the left. Returns them and their attention mask, int64 [rows, longest]."""
    longest = max(map(len, rows))
    token_ids = torch.full((len(rows), longest), pad_id)
    mask = torch.zeros((len(rows), longest), dtype=torch.long)
    for index, row in enumerate(rows):
        token_ids[index, longest - len(row) :] = torch.tensor(row)
        mask[index, longest - len(row) :] = 1
    return token_ids, mask


class CacheRows:
    """Rows of the key-value cache, one per distinct beginning of a message.

    All messages sampled from one prompt start in one row. They share it for as long as their tokens
    are equal, and get their own rows when they differ. Rows are padded on the left, so that each
    writes its next token into the same column, whenever its prompt was added.

    Attributes:
        lengths: [rows], tokens that each row holds, in the last columns.
        width: columns of the cache that are filled.
        logits: [rows, vocabulary], of the next token of each row.
    """

    # When no more than this share of the rows is still read, the others are removed and prompts can
    # be added. Copying the cache costs about as much as a few steps, so it is not done more often.
    SHARE_WORTH_KEEPING = 0.8

    def __init__(self, model: PreTrainedModel, prompts: list[list[int]], *, pad_id: int):
        """Prefill each prompt once. prompts: token ids."""
        self.model = model
        self.pad_id = pad_id
        token_ids, mask = pad_left(prompts, pad_id)
        self.width = token_ids.shape[1]
        self.lengths = mask.sum(-1).to(model.device)
        self.is_resizable = self.is_resizable_for(model)
        self.cache = DynamicCache(config=model.config)
        self.cache.layers = [
            PreallocatedLayer() if type(layer) is DynamicLayer else layer
            for layer in self.cache.layers
        ]
        self._forward(token_ids.to(model.device))

    @staticmethod
    def is_resizable_for(model: PreTrainedModel) -> bool:
        """Return whether rows can be added and padding columns dropped.

        Layers with sliding windows or recurrent states do not keep one column per token.
        """
        layers = DynamicCache(config=model.config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    def branch(
        self, row_of_message: torch.Tensor, tokens: torch.Tensor, max_width: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Give each message a row that it shares only with messages of equal tokens.

        Args:
            row_of_message: [messages], the row of each message that has not ended.
            tokens: [messages], the newest token of each.
            max_width: columns that the live messages can need. A wider cache still holds columns of
                messages that have ended.

        Returns:
            row_of_message after branching, and the newest token of each row [rows].
        """
        num_rows, vocabulary = self.logits.shape
        # Messages of one row that continue with the same token are still equal.
        row_and_token = row_of_message * vocabulary + tokens
        distinct, new_row_of_message = torch.unique(row_and_token, return_inverse=True)
        parents, newest = distinct // vocabulary, distinct % vocabulary
        some_differ = len(distinct) > len(parents.unique())
        enough_have_ended = len(distinct) < self.SHARE_WORTH_KEEPING * num_rows
        is_too_wide = self.is_resizable and self.width >= max_width
        if some_differ or enough_have_ended or is_too_wide:
            self._select(parents)
            return new_row_of_message, newest
        # Nothing has to be copied. Rows of ended messages stay; what they read is ignored.
        return row_of_message, newest.new_zeros(num_rows).index_copy(0, parents, newest)

    def _select(self, rows: torch.Tensor) -> None:
        """Keep, reorder or repeat rows, without columns that are padding in all of them."""
        self.lengths = self.lengths[rows]
        if not self.is_resizable:
            self.cache.batch_select_indices(rows)
            return
        first_column = self.width - int(self.lengths.max())
        for layer in self.cache.layers:
            layer.batch_select_indices(rows, first_column)
        self.width -= first_column

    def append(self, tokens: torch.Tensor) -> None:
        """Read one more token per row: tokens [rows]. Updates `logits`."""
        self.width += 1
        self.lengths = self.lengths + 1
        self._forward(tokens[:, None])

    def add_prompts(self, prompts: list[list[int]], row_of_message: torch.Tensor) -> torch.Tensor:
        """Prefill further prompts, and append their rows. Rows that no message reads are removed.

        Returns row_of_message after they have been removed.
        """
        read, row_of_message = torch.unique(row_of_message, return_inverse=True)
        if len(read) < len(self.logits):
            self._select(read)
            self.logits = self.logits[read]
        added = CacheRows(self.model, prompts, pad_id=self.pad_id)
        for layer, added_layer in zip(self.cache.layers, added.cache.layers, strict=True):
            layer.add_rows(added_layer)
        self.width = max(self.width, added.width)
        self.lengths = torch.cat([self.lengths, added.lengths])
        self.logits = torch.cat([self.logits, added.logits])
        return row_of_message

    def _forward(self, token_ids: torch.Tensor) -> None:
        """Read the newest columns: token_ids [rows, columns]. Updates `logits`."""
        columns = torch.arange(self.width, device=self.lengths.device)
        first_token = (self.width - self.lengths)[:, None]  # the columns before it are padding
        newest = columns[self.width - token_ids.shape[1] :]
        output = self.model(
            input_ids=token_ids,
            attention_mask=(columns >= first_token).long(),
            position_ids=(newest - first_token).clamp(min=0),
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


# ---- The decoder ---------------------------------------------------------------------------------


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

    Attributes:
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
    ):
        self.model = model.eval()
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
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
        if rows is None:
            return CacheRows(self.model, new_prompts, pad_id=self.pad_id), row_of_message
        if new_prompts:
            row_of_message = rows.add_prompts(new_prompts, row_of_message)
        return rows, row_of_message

    @contextmanager
    def _timed(self, activity: str):
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - start
