"""Batched decoding: token ids in, token ids out. Knows no agents, problems or trees.

Every message has its own random numbers, so the messages it is decoded with change it through
rounding only. Messages of one prompt share their computation for as long as their tokens are equal.
When some messages have ended, the next prompts take their rows (continuous batching).
"""

import hashlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from llm.loading import context_length
from support.flags import InputError

# ---- Random numbers ------------------------------------------------------------------------------


def uniforms(count: int, *key) -> np.ndarray:
    """Return `count` uniforms in [0, 1) from the counter-based stream (Philox) of this key."""
    stream = np.random.Philox(key=int.from_bytes(_digest(key, 16), "big"))
    return np.random.Generator(stream).random(count)


def message_key(*key) -> int:
    """Hash a key to a signed 64-bit integer, for `gumbel_noise`."""
    return int.from_bytes(_digest(key, 8), "big", signed=True)


def _digest(key: tuple, num_bytes: int) -> bytes:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=num_bytes).digest()


# The constants of SplitMix64, as signed integers. Products wrap around at 64 bits.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9 - 2**64
SECOND_MULTIPLIER = 0x94D049BB133111EB - 2**64


def gumbel_noise(keys: torch.Tensor, steps: torch.Tensor, token_ids: torch.Tensor) -> torch.Tensor:
    """Return standard Gumbel noise, float32 [messages, tokens], independent in every entry.

    An entry is a function of (key, step, token id) alone, the same on every device.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014). Each
    message seeds a SplitMix64 stream over steps; each step seeds one over tokens.

    All arguments are int64: keys (`message_key`) and steps (index of the token in its message)
    [messages], token_ids [messages, tokens], or [tokens] for all messages.
    """
    step_keys = _mix_bits(keys + (steps + 1) * GOLDEN_GAMMA)
    bits = _mix_bits(step_keys[:, None] + (token_ids + 1) * GOLDEN_GAMMA)
    # -log(-log(1 - u)), with u in (0, 1) from the upper 53 bits. Small u become the large noise on
    # which rare tokens depend, and float32 keeps their precision.
    noise = _shift_right(bits, 11).float().mul_(2.0**-53)
    noise.clamp_(min=2.0**-54, max=1 - 2.0**-24)
    # In place: with a large vocabulary, new memory takes longer than the logarithms.
    return noise.neg_().log1p_().neg_().log_().neg_()


def _mix_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Apply the output function of SplitMix64 in place: a bijection of 64 bits that mixes them."""
    numbers ^= _shift_right(numbers, 30)
    numbers *= FIRST_MULTIPLIER
    numbers ^= _shift_right(numbers, 27)
    numbers *= SECOND_MULTIPLIER
    numbers ^= _shift_right(numbers, 31)
    return numbers


def _shift_right(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """Shift and fill with zeros. Torch fills with the sign bit."""
    return (numbers >> places).bitwise_and_(2 ** (64 - places) - 1)


# ---- Sampling ------------------------------------------------------------------------------------

BLOCK_SIZE = 1024  # tokens of the vocabulary that are first sampled as one

# Recorded with every run: another way of sampling gives other messages.
SAMPLER = f"Gumbel-max of blocks of {BLOCK_SIZE:,} tokens, then of tokens, SplitMix64"


def make_warpers(*, temperature: float, top_k: int, top_p: float) -> LogitsProcessorList:
    """Return what changes logits before sampling: temperature, top-k (0: off), top-p (1: off)."""
    warpers = LogitsProcessorList()
    if temperature != 1:
        warpers.append(TemperatureLogitsWarper(temperature))
    if top_k > 0:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    return warpers


def sample_tokens(
    logits: torch.Tensor,
    row_of_message: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    greedy: torch.Tensor,
    *,
    warpers: LogitsProcessorList,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per message by Gumbel-max: the argmax of logits plus Gumbel noise.

    The token has the probability that the softmax of the warped logits gives it. If logits are
    rounded differently, Gumbel-max changes fewer tokens than inverse CDF: only the two best scores
    matter, not the sum over all tokens before.

    Noise for every token of a large vocabulary can take a third of the time of the model. So a
    block of tokens is sampled first, by the log-sum-exp of its logits, then a token of this block:
    p(token) = p(block) p(token | block). Source: Maddison, Tarlow and Minka, "A* sampling" (2014),
    section 3, sampling Gumbels top-down.

    Args:
        logits: [rows, vocabulary], of any float type.
        row_of_message, keys, steps: int64 [messages], see `gumbel_noise`.
        greedy: [messages], 1 for those that take the most likely token instead.

    Returns tokens [messages], and log pi(token) [messages] before temperature, top-k and top-p.
    Raises InputError if logits are no distribution.
    """
    vocabulary = logits.shape[-1]
    block_size = min(BLOCK_SIZE, vocabulary)
    block_logits = _logits_of_blocks(logits, block_size)
    log_total = block_logits.logsumexp(-1)
    warped = logits
    if warpers:
        warped = warpers(None, logits.float())
        block_logits = _logits_of_blocks(warped, block_size)

    # 1. A block for every message. Blocks are numbered after the tokens: no noise is used twice.
    block_ids = vocabulary + torch.arange(block_logits.shape[-1], device=logits.device)
    scores = block_logits[row_of_message] + gumbel_noise(keys, steps, block_ids)
    block = scores.argmax(-1, keepdim=True)

    # 2. A token of this block. The last block may be smaller than the others.
    token_ids = block * block_size + torch.arange(block_size, device=logits.device)
    in_vocabulary = token_ids.clamp(max=vocabulary - 1)
    scores = warped[row_of_message[:, None], in_vocabulary] + gumbel_noise(keys, steps, token_ids)
    scores[token_ids >= vocabulary] = -math.inf
    tokens = token_ids.gather(1, scores.argmax(-1, keepdim=True))[:, 0]

    if greedy.any():
        tokens = torch.where(greedy.bool(), logits.argmax(-1)[row_of_message], tokens)
    logprobs = logits[row_of_message, tokens] - log_total[row_of_message]
    if not logprobs.isfinite().all():  # a single logit that is NaN makes the sum of its row NaN
        raise InputError("agents without finite probabilities: restore their --model or --adapter")
    return tokens, logprobs


def _logits_of_blocks(logits: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return the log-sum-exp of the logits of each block: float32 [rows, blocks].

    Few rows are made float32 at once: with a vocabulary of 152,000, a CPU would spend more time on
    new memory than on numbers.
    """
    padding = -logits.shape[-1] % block_size
    block_logits = []
    for rows in logits.split(max(1, 2**21 // logits.shape[-1])):
        blocks = pad(rows.float(), (0, padding), value=-math.inf).unflatten(-1, (-1, block_size))
        block_logits.append(blocks.logsumexp(-1))
    return torch.cat(block_logits)


# ---- The key-value cache -------------------------------------------------------------------------

# At this share of live rows, ended ones are removed and prompts added: a copy costs a few steps.
SHARE_WORTH_KEEPING = 0.8


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer, with room for more columns.

    `DynamicLayer` copies all keys and values at every step. Here a step writes one new column.
    `keys` and `values` are the filled columns of storages [rows, heads, columns + spare ones, dim].
    """

    SPARE_COLUMNS = 64

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        newest = (key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.storages = [states[:, :, :0] for states in newest]
        start = self.get_seq_length()
        end = start + key_states.shape[2]
        missing = end - self.storages[0].shape[2]
        if missing > 0:
            room = (0, 0, 0, missing + self.SPARE_COLUMNS)
            self.storages = [pad(storage, room) for storage in self.storages]
        for storage, states in zip(self.storages, newest, strict=True):
            storage[:, :, start:end] = states
        self._use(self.storages, end)
        return self.keys, self.values

    def _use(self, storages: list[torch.Tensor], end: int) -> None:
        self.storages = storages
        self.keys, self.values = (storage[:, :, :end] for storage in storages)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._use([storage[indices] for storage in self.storages], self.get_seq_length())

    def drop_first_columns(self, num: int) -> None:
        self._use([storage[:, :, num:] for storage in self.storages], self.get_seq_length() - num)

    def add_rows(self, other: "PreallocatedLayer") -> None:
        """Append the rows of another layer, aligned on the right. The padding is zeros."""
        end = max(self.get_seq_length(), other.get_seq_length())

        def align(states: torch.Tensor) -> torch.Tensor:
            return pad(states, (0, 0, end - states.shape[2], self.SPARE_COLUMNS))

        keys = torch.cat([align(self.keys), align(other.keys)])
        values = torch.cat([align(self.values), align(other.values)])
        self._use([keys, values], end)


@dataclass
class Draft:
    """A message, as far as it is sampled.

    Attributes:
        place: whatever the caller tells messages apart by.
        prompt: token ids.
        limit: of its tokens.
        key: of its random numbers, a `message_key`.
        row: of the cache. It holds the prompt and all tokens but the newest.
        logprobs: log pi of each token.
        seconds: its share of the time of the steps in which it was live.
    """

    place: Any
    prompt: list[int]
    limit: int
    key: int
    greedy: bool
    row: int = 0
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    seconds: float = 0.0


class CacheRows:
    """Rows of the key-value cache, one per distinct beginning of a message.

    All messages sampled from one prompt start in one row. They share it for as long as their tokens
    are equal, and get their own rows when they differ. Rows are padded on the left, so that each
    writes its next token into the same column, whenever its prompt was added.

    Attributes:
        is_resizable: whether rows can be added and padding columns dropped. Layers with sliding
            windows or recurrent states do not keep one column per token.
        lengths: [rows], tokens that each row holds, in the last columns.
        width: columns of the cache that are filled.
        logits: [rows, vocabulary], of the next token of each row.
    """

    def __init__(self, model: PreTrainedModel, groups: list[list[Draft]], *, pad_id: int):
        """Read the prompt of each group of messages, and give them its row."""
        self.model = model
        self.pad_id = pad_id
        self.cache = DynamicCache(config=model.config)
        self.is_resizable = all(type(layer) is DynamicLayer for layer in self.cache.layers)
        for index, layer in enumerate(self.cache.layers):
            if type(layer) is DynamicLayer:
                self.cache.layers[index] = PreallocatedLayer()
        for row, group in enumerate(groups):
            for message in group:
                message.row = row
        rows = [torch.tensor(group[0].prompt) for group in groups]
        token_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        self.width = token_ids.shape[1]
        self.lengths = torch.tensor([len(row) for row in rows], device=model.device)
        self._forward(token_ids.to(model.device))

    def append(self, live: list[Draft]) -> None:
        """Read the newest token of each message. Messages that differ in it get their own rows."""
        # Messages of one row that continue with the same token are still equal.
        beginnings = [(message.row, message.tokens[-1]) for message in live]
        num_distinct = len(set(beginnings))
        some_differ = num_distinct > len({message.row for message in live})
        enough_have_ended = num_distinct < SHARE_WORTH_KEEPING * len(self.logits)
        if some_differ or enough_have_ended:
            self._give_rows(live, beginnings)
        # Rows of ended messages may still be there; what they read is ignored.
        newest = [self.pad_id] * len(self.logits)
        for message in live:
            newest[message.row] = message.tokens[-1]
        self.width += 1
        self.lengths = self.lengths + 1
        self._forward(torch.tensor(newest, device=self.model.device)[:, None])

    def add_groups(self, groups: list[list[Draft]], live: list[Draft]) -> None:
        """Read further prompts, and append their rows. Rows that no message reads are removed."""
        self._give_rows(live, [(message.row,) for message in live])
        added = CacheRows(self.model, groups, pad_id=self.pad_id)
        for message in chain.from_iterable(groups):
            message.row += len(self.logits)
        for layer, added_layer in zip(self.cache.layers, added.cache.layers, strict=True):
            layer.add_rows(added_layer)
        self.width = max(self.width, added.width)
        self.lengths = torch.cat([self.lengths, added.lengths])
        self.logits = torch.cat([self.logits, added.logits])

    def _give_rows(self, live: list[Draft], beginnings: list[tuple[int, ...]]) -> None:
        """Give messages that begin alike one row. Other rows and padding columns are removed."""
        distinct = sorted(set(beginnings))
        new_rows = {beginning: row for row, beginning in enumerate(distinct)}
        for message, beginning in zip(live, beginnings, strict=True):
            message.row = new_rows[beginning]
        rows = torch.tensor([beginning[0] for beginning in distinct], device=self.model.device)
        self.lengths = self.lengths[rows]
        self.logits = self.logits[rows]
        if self.is_resizable:
            unused = self.width - int(self.lengths.max())
            for layer in self.cache.layers:
                layer.drop_first_columns(unused)
            self.width -= unused
        self.cache.batch_select_indices(rows)

    def _forward(self, token_ids: torch.Tensor) -> None:
        """Read the newest columns: token_ids [rows, columns]. Updates `logits`."""
        columns = torch.arange(self.width, device=self.lengths.device)
        first_token = (self.width - self.lengths)[:, None]  # the columns before it are padding
        newest = columns[self.width - token_ids.shape[1] :]
        last_position = context_length(self.model) - 1  # rows of ended messages may run past it
        output = self.model(
            input_ids=token_ids,
            attention_mask=(columns >= first_token).long(),
            position_ids=(newest - first_token).clamp(0, last_position),
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        self.logits = output.logits[:, -1]


# ---- The decoder ---------------------------------------------------------------------------------


def columns_of(messages: list[Draft]) -> int:
    """Return how many columns of the cache messages can need when they are decoded together."""
    longest_prompt = max(len(message.prompt) for message in messages)
    return longest_prompt + max(message.limit for message in messages)


def take_waiting(
    waiting: deque[list[Draft]], live: list[Draft], batch_tokens: int
) -> list[list[Draft]]:
    """Remove what to start next to the live messages from those waiting; some if none is live.

    The messages of one prompt stay together unless they need more than a whole batch.
    """
    if live and len(live) > SHARE_WORTH_KEEPING * (batch_tokens // columns_of(live)):
        return []
    together = list(live)
    taken = []
    while waiting:
        group = waiting[0]
        room = batch_tokens // columns_of(together + group) - len(together)
        if together and room < len(group):
            break
        waiting.popleft()
        room = max(1, room)
        taken.append(group[:room])
        together += group[:room]
        if group[room:]:
            waiting.appendleft(group[room:])
    return taken


class Decoder:
    """Samples many messages together, each with its own token limit.

    The decoding loop is our own, because `generate` repeats equal computations for equal messages,
    keeps ended rows until the last one ends, has one token limit per batch, and copies its cache at
    every step (docs/results.md, "Speed").

    Args:
        eos_ids: token ids that end a message.
        pad_id: any token id; prompts are padded with it.
        sampling: temperature, top_k and top_p, see `make_warpers`.
    """

    def __init__(self, model: PreTrainedModel, *, eos_ids: set[int], pad_id: int, **sampling):
        self.model = model.eval()
        self.eos_ids = eos_ids
        self.pad_id = pad_id
        self.warpers = make_warpers(**sampling)

    @torch.inference_mode()
    def decode(self, groups: list[list[Draft]], *, batch_tokens: int) -> Iterator[Draft]:
        """Sample all messages, and yield each when it has ended.

        Args:
            groups: the messages of each prompt. They are started in this order.
            batch_tokens: limit of messages x (longest prompt + largest limit) in a batch.
        """
        waiting = deque(groups)
        rows = None
        live: list[Draft] = []
        while waiting or live:
            start = time.perf_counter()

            # 1. Read the newest tokens.
            if live:
                rows.append(live)
            else:
                rows = None

            # 2. Read further prompts if there is room.
            if rows is None or rows.is_resizable:
                started = take_waiting(waiting, live, batch_tokens)
                if rows is None:
                    rows = CacheRows(self.model, started, pad_id=self.pad_id)
                elif started:
                    rows.add_groups(started, live)
                live += chain.from_iterable(started)

            # 3. Sample the next token of every message.
            inputs = [(draft.row, draft.key, len(draft.tokens), draft.greedy) for draft in live]
            tokens, logprobs = sample_tokens(
                rows.logits,
                *torch.tensor(inputs, device=self.model.device).T,
                warpers=self.warpers,
            )
            sampled = zip(live, tokens.tolist(), logprobs.tolist(), strict=True)
            seconds = (time.perf_counter() - start) / len(live)

            # 4. See which messages have ended with it.
            live = []
            for message, token, logprob in sampled:
                message.tokens.append(token)
                message.logprobs.append(logprob)
                message.seconds += seconds
                if token not in self.eos_ids and len(message.tokens) < message.limit:
                    live.append(message)
                else:
                    yield message
