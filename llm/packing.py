"""Batches, and packing: token sequences that share prefixes are read as one row, each token once.

The states of a tree share their beginnings, and so do the messages that answer one prompt. A padded
batch reads a shared prefix once per sequence. Here it is read once: a row holds a tree of tokens, a
token's position is its depth in this tree, and the mask lets it see its own path only. A model with
absolute or rotary positions then computes the same hidden states as for each sequence alone.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch


def token_batches(items: Iterable, batch_tokens: int, *, length: Callable) -> Iterator[list]:
    """Cut items into batches whose padded size, items x longest, is at most `batch_tokens`.

    The order is kept. An item that is longer is a batch of its own. length: item -> its tokens.
    """
    batch = []
    longest = 0
    for item in items:
        longest = max(longest, length(item))
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
            longest = length(item)
        batch.append(item)
    if batch:
        yield batch


@dataclass
class PackedRow:
    """Sequences that are read as one row.

    Attributes:
        ids: token ids, [width].
        depths: number of tokens before each on its path, [width].
        branches: (parent, start, end) per run of columns: the columns start ... end - 1 continue
            each other, and the first of them continues column `parent`; None at a beginning.
        columns: index of a sequence -> the column of each of its tokens.
    """

    ids: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    branches: list[tuple[int | None, int, int]] = field(default_factory=list)
    columns: dict[int, list[int]] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return len(self.ids)

    def add(self, index: int, sequence: list[int], shared: int) -> None:
        """Add a sequence whose first `shared` tokens are those of the sequence added last."""
        start = self.width
        path = list(self.columns.values())[-1][:shared] if shared else []
        self.ids += sequence[shared:]
        self.depths += range(shared, len(sequence))
        if self.width > start:
            parent = path[-1] if path else None
            self.branches.append((parent, start, self.width))
        self.columns[index] = path + list(range(start, self.width))


Batch = list[PackedRow]  # what is read at once

MAX_WIDTH = 4096  # the mask of a batch takes batch tokens x width bytes, and more in attention


def row_width(config) -> int:
    """Return how wide packed rows of a model may be; 0 if it has to read each sequence alone.

    Our mask replaces the model's own, so every layer has to attend to everything before it. Sliding
    windows and recurrent layers do not. And the attention has to take a mask of bools: "sdpa" does,
    "eager" would add it to the scores.
    """
    config = config.get_text_config()
    layer_types = getattr(config, "layer_types", None) or []
    has_window = not layer_types and getattr(config, "sliding_window", None) is not None
    has_other_layers = any(layer_type != "full_attention" for layer_type in layer_types)
    has_alibi = getattr(config, "alibi", False)  # Falcon computes it from a mask of two dimensions
    if config._attn_implementation != "sdpa" or has_window or has_other_layers or has_alibi:
        return 0
    return MAX_WIDTH


# The work on a token apart from attention, in columns attended to, for the tiny agents. A row of m
# sequences that share s tokens and add n each costs TOKEN_COST * (s / m + n) + (s + m n)^2 / m per
# sequence, which is least at m n = sqrt(s * (s + TOKEN_COST)).
TOKEN_COST = 832


def pack(sequences: list[list[int]], *, indices: Iterable[int], max_width: int) -> list[PackedRow]:
    """Distribute sequences over rows, so that reading them costs little.

    Sequences are taken in the lexicographic order of their token ids, in which each one shares its
    longest prefix with the one before or after it. A sequence joins the current row unless that
    would become wider than pays for what it shares with the one before (TOKEN_COST).

    indices: of the sequences to pack. max_width: no row is wider, unless a single sequence is.
    """
    rows: list[PackedRow] = []
    previous: list[int] = []
    for index in sorted(indices, key=sequences.__getitem__):
        sequence = sequences[index]
        shared = shared_prefix(previous, sequence)
        limit = min(max_width, shared + math.sqrt(shared * (shared + TOKEN_COST)))
        if not rows or rows[-1].width + len(sequence) - shared > limit:
            rows.append(PackedRow())
            shared = 0
        rows[-1].add(index, sequence, shared)
        previous = sequence
    return rows


def packed_batches(
    sequences: list[list[int]], batch_tokens: int, *, indices: Iterable[int], max_width: int
) -> list[Batch]:
    """Pack sequences (`pack`), and cut the rows into batches, the narrowest rows first."""
    rows = pack(sequences, indices=indices, max_width=min(max_width, batch_tokens))
    rows.sort(key=lambda row: row.width)
    return list(token_batches(rows, batch_tokens, length=lambda row: row.width))


def sequence_columns(batch: Batch) -> dict[int, tuple[int, list[int]]]:
    """Return where each sequence is: its index -> (row, the column of each of its tokens).

    Sequences are in the order of the rows.
    """
    places = {}
    for row_index, row in enumerate(batch):
        for index, columns in row.columns.items():
            places[index] = (row_index, columns)
    return places


def shared_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    return len(os.path.commonprefix([a, b]))  # of any two lists


def num_distinct_tokens(sequences: list[list[int]]) -> int:
    """Count the tokens that are left if every shared prefix is read once."""
    num = sum(map(len, sequences))
    for previous, sequence in pairwise(sorted(sequences)):
        num -= shared_prefix(previous, sequence)
    return num


def collate(rows: Batch, pad_id: int, device: torch.device) -> dict:
    """Return the arguments of a model's forward for a batch of rows, padded on the right.

    input_ids: int64 [rows, width]. If a row has branches, also position_ids: int64 [rows, width],
    and attention_mask: bool [rows, 1, width, width], True where a column (third dimension) attends
    to another (fourth). Without branches, positions and mask are the model's own: a causal model
    does not see padding on its right.
    """
    width = max(row.width for row in rows)
    ids = np.full((len(rows), width), pad_id)
    depths = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : row.width] = row.ids
        depths[index, : row.width] = row.depths
    arguments = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if any(len(row.branches) > 1 for row in rows):
        mask = np.stack([row_mask(row, width) for row in rows])
        arguments["position_ids"] = torch.from_numpy(depths).to(device)
        arguments["attention_mask"] = torch.from_numpy(mask)[:, None].to(device)
    return arguments


def row_mask(row: PackedRow, width: int) -> np.ndarray:
    """Return which columns each column of a row sees, padded to a width: bool [width, width]."""
    sees = np.eye(width, dtype=bool)  # also padding: a softmax over nothing would be NaN
    for parent, start, end in row.branches:
        if parent is not None:
            sees[start:end] = sees[parent]
        sees[start:end, start:end] = np.tri(end - start, dtype=bool)
    return sees
