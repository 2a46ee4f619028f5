"""Batches, and packing: token sequences that share prefixes are read as one row, each token once.

The states of a tree share their beginnings, and so do the messages that answer one prompt. A padded
batch reads a shared prefix once per sequence. Here it is read once: a row holds a tree of tokens, a
token's position is its depth in this tree, and the mask lets it see its own path only. A model with
absolute or rotary positions then computes the same hidden states as for each sequence alone.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

# ---- Batches -------------------------------------------------------------------------------------


def token_batches(lengths: list[int], order: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut `order` into batches whose padded size, rows x longest, is at most `batch_tokens`.

    A sequence that is longer is a batch of its own. order: indices into `lengths`.
    """
    batch = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if batch and (len(batch) + 1) * longest > batch_tokens:
            yield batch
            batch = []
            longest = lengths[index]
        batch.append(index)
    if batch:
        yield batch


# ---- Packing -------------------------------------------------------------------------------------


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

    ids: list[int]
    depths: list[int]
    branches: list[tuple[int | None, int, int]]
    columns: dict[int, list[int]]

    @property
    def width(self) -> int:
        return len(self.ids)

    def add(self, index: int, sequence: list[int], shared: int, previous: list[int]) -> None:
        """Add a sequence whose first `shared` tokens are those of the columns `previous`."""
        start = len(self.ids)
        self.ids += sequence[shared:]
        self.depths += range(shared, len(sequence))
        if len(self.ids) > start:
            parent = previous[shared - 1] if shared else None
            self.branches.append((parent, start, len(self.ids)))
        self.columns[index] = previous[:shared] + list(range(start, len(self.ids)))


Batch = list[PackedRow]  # what is read at once


def takes_our_mask(config) -> bool:
    """Return whether every layer of a model attends to the columns that a mask of bools names.

    Our mask replaces the model's own, so every layer has to attend to everything before it. Sliding
    windows and recurrent layers do not. And the attention has to take a mask of bools: "sdpa" does,
    "eager" would add it to the scores.
    """
    config = config.get_text_config()
    if config._attn_implementation != "sdpa":
        return False
    if getattr(config, "alibi", False):  # Falcon computes its biases from a mask of two dimensions
        return False
    layer_types = getattr(config, "layer_types", None) or []
    has_window = getattr(config, "sliding_window", None) is not None
    if any(layer_type != "full_attention" for layer_type in layer_types):
        return False
    return bool(layer_types) or not has_window


def token_cost_for(config) -> float | None:
    """Return what a token costs a model apart from attention; None if it cannot read packed rows.

    The unit is the attention of one column to another: 4 h FLOPs per layer, with a hidden size h.
    The projections take 8 h^2 and an MLP of size i takes 6 h i, so a token costs 2 h + 1.5 i units.
    """
    config = config.get_text_config()
    if not takes_our_mask(config):
        return None
    # GPT-2 and its like have no such setting: their MLP is four times as wide as the hidden state.
    intermediate_size = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return 2 * config.hidden_size + 1.5 * intermediate_size


# The mask of a batch takes batch tokens x width bytes, and two to four times that in attention.
MAX_WIDTH = 4096


def best_width(shared: int, token_cost: float) -> float:
    """Return how wide a row should be whose sequences share their first `shared` tokens.

    A row of width w costs token_cost * w + w^2. If each sequence adds n tokens, a row of m costs,
    per sequence,

        token_cost * (shared / m + n) + (shared + m n)^2 / m,

    which is least at m n = sqrt(shared * (shared + token_cost)): a narrower row reads the shared
    tokens too often, a wider one attends to too many columns. At most MAX_WIDTH.
    """
    return min(MAX_WIDTH, shared + math.sqrt(shared * (shared + token_cost)))


def pack(
    sequences: list[list[int]],
    *,
    token_cost: float | None,
    max_width: int,
    indices: Iterable[int] | None = None,
) -> list[PackedRow]:
    """Distribute sequences over rows, so that reading them costs little.

    Sequences are taken in the lexicographic order of their token ids, in which each one shares its
    longest prefix with the one before or after it. A sequence joins the current row unless that
    would become wider than pays (`best_width`).

    Args:
        token_cost: see `token_cost_for`. With None every sequence has a row of its own.
        max_width: no row is wider, unless a single sequence is.
        indices: of the sequences to pack; default: of all.
    """
    if indices is None:
        indices = range(len(sequences))
    rows: list[PackedRow] = []
    previous: list[int] = []
    previous_columns: list[int] = []
    for index in sorted(indices, key=sequences.__getitem__):
        sequence = sequences[index]
        shared = shared_prefix(previous, sequence)
        limit = 0.0
        if token_cost is not None:
            limit = min(max_width, best_width(shared, token_cost))
        if not rows or rows[-1].width + len(sequence) - shared > limit:
            rows.append(PackedRow([], [], [], {}))
            shared = 0
        rows[-1].add(index, sequence, shared, previous_columns)
        previous, previous_columns = sequence, rows[-1].columns[index]
    return rows


def packed_batches(
    sequences: list[list[int]],
    batch_tokens: int,
    *,
    token_cost: float | None,
    indices: Iterable[int] | None = None,
) -> list[Batch]:
    """Pack sequences, and cut the rows into batches (`token_batches`), the narrowest rows first.

    indices: see `pack`.
    """
    rows = pack(sequences, token_cost=token_cost, max_width=batch_tokens, indices=indices)
    return cut_into_batches(sorted(rows, key=width_of), batch_tokens)


def cut_into_batches(rows: list[PackedRow], batch_tokens: int) -> list[Batch]:
    """Cut rows into batches, in this order; see `token_batches`."""
    widths = [row.width for row in rows]
    batches = []
    for batch in token_batches(widths, list(range(len(rows))), batch_tokens):
        batches.append([rows[index] for index in batch])
    return batches


def width_of(row: PackedRow) -> int:
    return row.width


def sequences_of(batch: Batch) -> list[int]:
    """Return the indices of the sequences in a batch, row by row."""
    return [index for row in batch for index in row.columns]


def sequence_columns(batch: Batch) -> dict[int, tuple[int, list[int]]]:
    """Return where each sequence is: its index -> (row, the column of each of its tokens)."""
    places = {}
    for row_index, row in enumerate(batch):
        for index, columns in row.columns.items():
            places[index] = (row_index, columns)
    return places


def shared_prefix(a: list[int], b: list[int]) -> int:
    """Return how many tokens two sequences have in common at their beginnings."""
    num = 0
    for token, other in zip(a, b, strict=False):
        if token != other:
            break
        num += 1
    return num


def num_distinct_tokens(sequences: list[list[int]]) -> int:
    """Count the tokens that are left if every shared prefix is read once."""
    ordered = sorted(sequences)
    num = 0
    previous: list[int] = []
    for sequence in ordered:
        num += len(sequence) - shared_prefix(previous, sequence)
        previous = sequence
    return num


def collate(
    rows: list[PackedRow], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor | bool]:
    """Return the arguments of a model's forward for a batch of rows, padded on the right.

    input_ids: int64 [rows, width]. If a row has branches, also position_ids: int64 [rows, width],
    and attention_mask: bool [rows, 1, width, width], True where a column (third dimension) attends
    to another (fourth). A padding column attends to itself: a softmax over nothing would be NaN.
    Without branches, positions and mask are the model's own: a causal model does not see padding on
    its right.
    """
    width = max(row.width for row in rows)
    is_packed = any(len(row.branches) > 1 for row in rows)
    ids = np.full((len(rows), width), pad_id)
    depths = np.zeros((len(rows), width), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : row.width] = row.ids
        depths[index, : row.width] = row.depths
    arguments = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if is_packed:
        mask = np.stack([row_mask(row, width) for row in rows])
        arguments["position_ids"] = torch.from_numpy(depths).to(device)
        arguments["attention_mask"] = torch.from_numpy(mask)[:, None].to(device)
    return arguments


def row_mask(row: PackedRow, width: int) -> np.ndarray:
    """Return which columns each column of a row sees, padded to a width: bool [width, width]."""
    sees = np.eye(width, dtype=bool)
    for parent, start, end in row.branches:
        if parent is not None:
            sees[start:end] = sees[parent]
        sees[start:end, start:end] = np.tri(end - start, dtype=bool)
    return sees
