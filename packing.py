"""Batches, and packing: token sequences that share prefixes are read as one row, each token once.

The states of a tree share their beginnings, and so do the messages that answer one prompt. A padded
batch reads a shared prefix once per sequence. Here it is read once: a row holds a tree of tokens, a
token's position is its depth in this tree, and the mask lets it see its own path only. A model with
absolute or rotary positions then computes the same hidden states as for each sequence alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

# ---- Batches -------------------------------------------------------------------------------------


def token_batches(lengths: list[int], order: list[int], batch_tokens: int) -> Iterator[list[int]]:
    """Cut `order` into batches whose padded size, rows x longest, is at most `batch_tokens`."""
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


def packed_batches(
    sequences: list[list[int]], batch_tokens: int, *, max_width: int
) -> list[list[int]]:
    """Return batches of sequences, as indices; the smallest first. See `pack`, `token_batches`."""
    rows = pack(sequences, max_width=max_width)
    widths = [row.width for row in rows]
    by_width = sorted(range(len(rows)), key=widths.__getitem__)
    batches = []
    for batch in token_batches(widths, by_width, batch_tokens):
        batches.append([index for row in batch for index in rows[row].columns])
    return batches


# ---- Packing -------------------------------------------------------------------------------------

# A row is no longer than this, unless a single sequence is: the cost of attention grows with the
# square of a row.
MAX_WIDTH = 1024
# A sequence joins a row if it shares at least this part of its tokens with the one before it.
SMALLEST_SHARE = 0.25


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

    def add(self, index: int, sequence: list[int], shared: int, neighbour: list[int]) -> None:
        """Add a sequence that shares its first `shared` tokens with the columns `neighbour`."""
        start = len(self.ids)
        self.ids += sequence[shared:]
        self.depths += range(shared, len(sequence))
        if len(self.ids) > start:
            parent = neighbour[shared - 1] if shared else None
            self.branches.append((parent, start, len(self.ids)))
        self.columns[index] = neighbour[:shared] + list(range(start, len(self.ids)))


def max_width_for(config) -> int:
    """Return how wide a packed row may be for a model; 0 if it must read sequences one by one.

    The mask of a packed row replaces the model's own, so every layer has to attend to everything
    before it. Sliding windows and recurrent layers do not. And the attention has to take a mask of
    bools: "sdpa" does, "eager" would add it to the scores.
    """
    config = config.get_text_config()
    if config._attn_implementation != "sdpa":
        return 0
    layer_types = getattr(config, "layer_types", None) or []
    has_window = getattr(config, "sliding_window", None) is not None
    if any(layer_type != "full_attention" for layer_type in layer_types):
        return 0
    if has_window and not layer_types:
        return 0
    return MAX_WIDTH


def pack(sequences: list[list[int]], *, max_width: int) -> list[PackedRow]:
    """Distribute sequences over rows, so that few tokens are read twice.

    In alphabetical order, a sequence shares most with its neighbours.
    """
    rows: list[PackedRow] = []
    previous = None
    for index in sorted(range(len(sequences)), key=sequences.__getitem__):
        sequence = sequences[index]
        if previous is not None:
            shared = shared_prefix(sequences[previous], sequence)
            fits = rows[-1].width + len(sequence) - shared <= max_width
            if fits and shared >= SMALLEST_SHARE * len(sequence):
                rows[-1].add(index, sequence, shared, rows[-1].columns[previous])
                previous = index
                continue
        rows.append(PackedRow([], [], [], {}))
        rows[-1].add(index, sequence, 0, [])
        previous = index
    return rows


def sequence_columns(rows: list[PackedRow]) -> dict[int, tuple[int, list[int]]]:
    """Return where each sequence is: its index -> (row, the column of each of its tokens)."""
    places = {}
    for row_index, row in enumerate(rows):
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

    input_ids, position_ids: [rows, width]; attention_mask: bool [rows, 1, width, width], True where
    a column (third dimension) sees another one. Padding sees itself, as attention to nothing is not
    a number. Without shared prefixes there is no mask: a causal model does not see what follows.
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
