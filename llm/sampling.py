"""Sampling: from logits and keys to tokens.

The random numbers of a token are a function of the key of its message, its place in the message and
its id. So messages that are sampled together do not change each other.
"""

import hashlib
import json
import math

import numpy as np
import torch
from torch.nn.functional import pad

# ---- Random numbers ------------------------------------------------------------------------------


def _digest(key: tuple, num_bytes: int) -> bytes:
    return hashlib.blake2b(json.dumps(key).encode(), digest_size=num_bytes).digest()


def uniforms(count: int, *key) -> np.ndarray:
    """Return `count` uniforms in [0, 1) from the counter-based stream (Philox) of this key."""
    stream = np.random.Philox(key=int.from_bytes(_digest(key, 16), "big"))
    return np.random.Generator(stream).random(count)


def message_key(*key) -> int:
    """Hash a key to a signed 64-bit integer, for `gumbel_noise`."""
    return int.from_bytes(_digest(key, 8), "big", signed=True)


# The constants of SplitMix64, as signed integers. Products wrap around at 64 bits.
GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64
FIRST_MULTIPLIER = 0xBF58476D1CE4E5B9 - 2**64
SECOND_MULTIPLIER = 0x94D049BB133111EB - 2**64


def gumbel_noise(
    keys: torch.Tensor, steps: torch.Tensor | int, token_ids: torch.Tensor
) -> torch.Tensor:
    """Return standard Gumbel noise, float32 [messages, tokens], independent in every entry.

    An entry is a function of (key, step, token id) alone. It is computed on the device of
    `keys`, from integers that are equal on every device.

    Source: Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (2014). Each
    message seeds a SplitMix64 stream over steps; each step seeds one over tokens.

    Args:
        keys: int64 [messages], see `message_key`.
        steps: index of the token in its message, int64 [messages] or one for all.
        token_ids: int64 [messages, tokens], or [tokens] for all messages.
    """
    steps = torch.as_tensor(steps, device=keys.device)
    step_keys = _mix_bits(keys + (steps + 1) * GOLDEN_GAMMA)
    return _to_gumbel(_mix_bits(step_keys[:, None] + (token_ids + 1) * GOLDEN_GAMMA))


def _mix_bits(numbers: torch.Tensor) -> torch.Tensor:
    """Apply the output function of SplitMix64 in place: a bijection of 64 bits that mixes them."""
    numbers ^= _shift_right(numbers, 30)
    numbers *= FIRST_MULTIPLIER
    numbers ^= _shift_right(numbers, 27)
    numbers *= SECOND_MULTIPLIER
    numbers ^= _shift_right(numbers, 31)
    return numbers


def _to_gumbel(bits: torch.Tensor) -> torch.Tensor:
    """Return -log(-log(1 - u)), float32 and finite. u: uniform in (0, 1), from the upper 53 bits.

    Small u become the large values on which rare tokens depend, and float32 keeps their precision.
    """
    noise = _shift_right(bits, 11).float().mul_(2.0**-53)
    noise.clamp_(min=2.0**-54, max=1 - 2.0**-24)
    # In place: with a large vocabulary, new memory takes longer than the logarithms.
    noise.neg_().log1p_()  # log(1 - u)
    return noise.neg_().log_().neg_()


def _shift_right(numbers: torch.Tensor, places: int) -> torch.Tensor:
    """Shift and fill with zeros. Torch fills with the sign bit."""
    shifted = numbers >> places
    shifted &= 2 ** (64 - places) - 1
    return shifted


# ---- Sampling ------------------------------------------------------------------------------------

BLOCK_SIZE = 1024  # tokens of the vocabulary that are first sampled as one

# Recorded with every run: another way of sampling gives other messages.
SAMPLER = f"Gumbel-max of blocks of {BLOCK_SIZE:,} tokens, then of tokens, SplitMix64"


def sample_tokens(
    logits: torch.Tensor,
    row_of_message: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    greedy: torch.Tensor,
    **filters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per message, from the filtered logits of its row.

    Rows are sampled `_rows_at_once`, in float32. See `_sample_tokens` for the method.

    Args:
        logits: [rows, vocabulary].
        row_of_message: [messages], the row of each message.
        keys, steps: [messages], see `gumbel_noise`.
        greedy: bool [messages], messages that take the most likely token instead.
        filters: temperature, top_k and top_p, see `filter_logits`.

    Returns:
        tokens [messages], and log pi(token) [messages] before temperature, top-k and top-p.
    """
    tokens = torch.empty_like(row_of_message)
    logprobs = torch.empty(len(tokens), device=logits.device)
    first_row = 0
    for part in logits.split(_rows_at_once(logits)):
        end_row = first_row + len(part)
        is_in_part = (row_of_message >= first_row) & (row_of_message < end_row)
        [messages] = is_in_part.nonzero(as_tuple=True)
        tokens[messages], logprobs[messages] = _sample_tokens(
            part.float(),
            row_of_message[messages] - first_row,
            keys[messages],
            steps[messages],
            greedy[messages],
            **filters,
        )
        first_row = end_row
    return tokens, logprobs


def _rows_at_once(logits: torch.Tensor) -> int:
    """Return how many rows of float32 logits the sampler works on together.

    A vocabulary of 152,000 is so large that a CPU spends more time on new memory than on numbers. A
    GPU has memory for more rows, and an overhead for every call.
    """
    entries_at_once = 2**21 if logits.device.type == "cpu" else 2**26
    return max(1, entries_at_once // logits.shape[-1])


def _sample_tokens(
    logits: torch.Tensor,
    row_of_message: torch.Tensor,
    keys: torch.Tensor,
    steps: torch.Tensor,
    greedy: torch.Tensor,
    **filters,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per message by Gumbel-max: the argmax of filtered logits plus Gumbel noise.

    Exact: the token has the probability that the softmax of the filtered logits gives it. If
    logits are rounded differently, as in bfloat16 with another batch, Gumbel-max changes fewer
    tokens than inverse CDF: only the two best scores matter, not the sum over all tokens before.

    Noise for every token of a large vocabulary can take a third of the time of the model. So a
    block of tokens is sampled first, by the log-sum-exp of its logits, then a token of this block:
    p(token) = p(block) p(token | block). Blocks are summed up once for all messages of a row.

    Source: Maddison, Tarlow and Minka, "A* sampling" (2014), section 3: sampling Gumbels top-down.
    """
    vocabulary = logits.shape[-1]
    block_size = min(BLOCK_SIZE, vocabulary)
    blocks = _split_into_blocks(logits, block_size)
    block_logits = blocks.logsumexp(-1)
    normalizers = block_logits.logsumexp(-1)
    filtered = filter_logits(logits, **filters)
    if filtered is not logits:
        blocks = _split_into_blocks(filtered, block_size)
        block_logits = blocks.logsumexp(-1)

    # 1. A block for every message. Blocks are numbered after the tokens: no noise is used twice.
    block_ids = vocabulary + torch.arange(block_logits.shape[-1], device=logits.device)
    noise = gumbel_noise(keys, steps, block_ids)
    block = (block_logits[row_of_message] + noise).argmax(-1)

    # 2. A token of this block.
    token_ids = block[:, None] * block_size + torch.arange(block_size, device=logits.device)
    scores = blocks[row_of_message, block] + gumbel_noise(keys, steps, token_ids)
    tokens = block * block_size + scores.argmax(-1)

    if greedy.any():
        tokens = torch.where(greedy, logits.argmax(-1)[row_of_message], tokens)
    return tokens, logits[row_of_message, tokens] - normalizers[row_of_message]


def _split_into_blocks(logits: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return logits [rows, blocks, block_size]. What is missing in the last block is -inf."""
    padding = -logits.shape[-1] % block_size
    return pad(logits, (0, padding), value=-math.inf).unflatten(-1, (-1, block_size))


def filter_logits(
    logits: torch.Tensor, *, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Apply temperature, then top-k (0: all tokens), then top-p (1: all tokens).

    Returns logits [rows, vocabulary] in which the excluded tokens are -inf; `logits` itself if
    nothing changes.
    """
    if temperature != 1:
        logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -math.inf)
    if top_p < 1:
        probs = logits.softmax(-1)
        logits = logits.masked_fill(probs < _smallest_in_nucleus(probs, top_p), -math.inf)
    return logits


NUM_SORTED = 1024  # tokens among which the nucleus of top-p is searched first


def _smallest_in_nucleus(probs: torch.Tensor, top_p: float) -> torch.Tensor:
    """Return the probability [rows, 1] of the least likely token in the nucleus.

    The nucleus is the most likely tokens that together reach `top_p`. It is searched among the
    NUM_SORTED most likely tokens first: sorting a whole vocabulary can cost as much as the model.
    """
    vocabulary = probs.shape[-1]
    top = probs.topk(min(NUM_SORTED, vocabulary)).values
    if not bool((top.sum(-1) >= top_p).all()):
        top = probs.topk(vocabulary).values
    mass_before = top.cumsum(-1) - top
    in_nucleus = mass_before < top_p
    return top.masked_fill(~in_nucleus, 2.0).min(-1, keepdim=True).values
