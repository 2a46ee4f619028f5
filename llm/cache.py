"""The key-value cache of messages that are decoded together, and the steps that fill it.

Messages share a row for as long as their tokens are equal. A row is copied when its messages
differ, removed when they have ended, and added for a new prompt.
"""

import math
from collections.abc import Callable
from typing import NoReturn

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from llm.packing import takes_our_mask
from support.flags import InputError

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
        self.fill(end)
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

    def fill(self, end: int) -> None:
        """Make `keys` and `values` views of the first `end` columns."""
        self.keys, self.values = (storage[:, :, :end] for storage in self.storages)

    def move_to(self, storages: list[torch.Tensor]) -> None:
        """Copy keys and values into other storages, and use these."""
        end = self.get_seq_length()
        for storage, states in zip(storages, (self.keys, self.values), strict=True):
            storage[:, :, :end] = states
        self.storages = tuple(storages)
        self.fill(end)

    def batch_select_indices(self, indices: torch.Tensor, first_column: int = 0) -> None:
        """Keep, reorder or repeat rows, without the columns before `first_column`."""
        end = self.get_seq_length() - first_column
        self.storages = tuple(storage[indices, :, first_column:] for storage in self.storages)
        self.fill(end)

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
        self.fill(end)


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
        rows_in_use, row_of_message = torch.unique(row_of_message, return_inverse=True)
        if len(rows_in_use) < len(self.logits):
            self._select(rows_in_use)
            self.logits = self.logits[rows_in_use]
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


# ---- Steps of fixed shape: CUDA graphs -----------------------------------------------------------
# A step of a small model takes a GPU less time than Python needs to launch its hundreds of kernels.
# A CUDA graph launches them all at once, but it always reads and writes the same memory. So keys,
# values and the arguments of the model have fixed places, with room for more rows and columns than
# are in use. On a CPU the same steps run without a graph.
#
#     FixedRows     the rows of a batch
#     FixedSteps    the memory, and a FixedStep for each shape
#     FixedStep     one forward pass of one shape
#     FixedLayer    how it writes keys and values
#     Recorder      how it is repeated


class FixedRows(CacheRows):
    """Rows that are read by steps of fixed shape. The model must satisfy `takes_fixed_steps`.

    Attributes:
        step: the step whose memory holds the rows; None after rows have been copied or added.
    """

    def __init__(
        self, model: PreTrainedModel, prompts: list[list[int]], *, pad_id: int, steps: "FixedSteps"
    ):
        super().__init__(model, prompts, pad_id=pad_id)
        self.steps = steps
        self.step: FixedStep | None = None

    def append(self, tokens: torch.Tensor) -> None:
        if self.step is not None and self.width == self.step.num_columns:
            # The step is full. The next one has more columns in the same memory, so all rows are
            # copied out of it first.
            self._select(torch.arange(len(tokens), device=tokens.device))
        if self.step is None:
            self.step = self.steps.load(self.cache.layers, self.width, self.logits)
        self.width += 1
        self.lengths = self.lengths + 1
        self.logits = self.step(tokens, self.lengths, self.width)

    def _select(self, rows: torch.Tensor) -> None:
        self._leave_step()
        super()._select(rows)

    def add_prompts(self, prompts: list[list[int]], row_of_message: torch.Tensor) -> torch.Tensor:
        self._leave_step()
        return super().add_prompts(prompts, row_of_message)

    def _leave_step(self) -> None:
        """Stop using the step. The layers now end at the newest column."""
        if self.step is not None:
            for layer in self.cache.layers:
                layer.fill(self.width)
            self.step = None


def takes_fixed_steps(model: PreTrainedModel) -> bool:
    """Return whether a model can read a cache with columns that are not in use yet."""
    # Dynamic rotary positions change with the longest row, which a graph would not notice.
    is_dynamic = "dynamic" in str(getattr(model.config, "rope_parameters", None))
    return takes_our_mask(model.config) and CacheRows.is_resizable_for(model) and not is_dynamic


class FixedSteps:
    """The steps of all shapes. They share the memory for keys, values and logits.

    Attributes:
        steps: (rows, columns) -> step.
        capacity: tokens for which there is memory.
        memory: of each layer, for keys and for values, [capacity, heads x dim].
        logits: [most rows of a step, vocabulary].
    """

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.free()

    def free(self) -> None:
        """Give the memory back."""
        self.steps: dict[tuple[int, int], FixedStep] = {}
        self.capacity = 0
        self.memory: list[list[torch.Tensor]] = []
        self.logits: torch.Tensor | None = None
        self.recorder = Recorder(self.model.device)

    def load(
        self, layers: list[PreallocatedLayer], width: int, logits: torch.Tensor
    ) -> "FixedStep":
        """Move keys and values into the memory of a step that has room for a further column.

        They must not lie in this memory: another shape lays it out differently, and recording a
        step writes into it.

        Args:
            logits: [rows, vocabulary], for their type.
        """
        num_rows = len(layers[0].keys)
        rows, columns = self._shape(num_rows, width + 1)
        if (rows, columns) not in self.steps:
            self._reserve(layers, logits, rows, columns)
            storages = self._storages(layers, rows, columns)
            step = FixedStep(self.model, storages, self.logits[:rows], self.recorder)
            self.steps[rows, columns] = step
        step = self.steps[rows, columns]
        for layer, storages in zip(layers, step.storages, strict=True):
            for storage in storages:
                # Attention multiplies masked columns by zero, which leaves a NaN what it is.
                storage[:num_rows, :, width:] = 0
            layer.move_to([storage[:num_rows] for storage in storages])
        return step

    @staticmethod
    def _shape(num_rows: int, num_columns: int) -> tuple[int, int]:
        """Round rows and columns up, so that there are few shapes: each takes a graph."""
        rows = 64 * math.ceil(num_rows / 64)
        if num_rows < 64:
            rows = 2 ** math.ceil(math.log2(num_rows))
        return rows, 128 * math.ceil(num_columns / 128)

    def _reserve(
        self, layers: list[PreallocatedLayer], logits: torch.Tensor, rows: int, columns: int
    ) -> None:
        """Have memory for a step of this shape. If there is too little, all steps are dropped."""
        most_rows = 0 if self.logits is None else len(self.logits)
        if rows * columns <= self.capacity and rows <= most_rows:
            return
        most_rows = max(most_rows, rows)
        capacity = max(rows * columns, self.capacity * 5 // 4)
        self.free()  # the steps work on the memory of before
        self.logits = logits.new_zeros((most_rows, logits.shape[-1]))
        for layer in layers:
            memory_of_layer = []
            for states in (layer.keys, layer.values):
                shape = (capacity, states.shape[1] * states.shape[3])
                memory_of_layer.append(states.new_zeros(shape))
            self.memory.append(memory_of_layer)
        self.capacity = capacity

    def _storages(
        self, layers: list[PreallocatedLayer], rows: int, columns: int
    ) -> list[list[torch.Tensor]]:
        """Return storages for each layer, [rows, heads, columns, dim], for keys and for values."""
        storages = []
        for layer, (keys, values) in zip(layers, self.memory, strict=True):
            keys = keys[: rows * columns].view(rows, layer.keys.shape[1], columns, -1)
            values = values[: rows * columns].view(rows, layer.values.shape[1], columns, -1)
            storages.append([keys, values])
        return storages


class FixedStep:
    """A step of one shape. Rows and columns that are not in use are masked.

    Args:
        storages: of each layer, for keys and for values, [rows, heads, columns, dim].
        logits: [rows, vocabulary], where its result is written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        storages: list[list[torch.Tensor]],
        logits: torch.Tensor,
        recorder: "Recorder",
    ):
        device = model.device
        self.storages = storages
        self.logits = logits
        num_rows, _, self.num_columns, _ = storages[0][0].shape
        self.column_ids = torch.arange(self.num_columns, device=device)
        self.newest_column = torch.zeros(1, dtype=torch.long, device=device)
        self.token_ids = torch.zeros((num_rows, 1), dtype=torch.long, device=device)
        self.position_ids = torch.zeros_like(self.token_ids)
        # Rows that are not in use may see anything, but not nothing: its softmax would be NaN.
        shape = (num_rows, 1, 1, self.num_columns)
        self.mask = torch.ones(shape, dtype=torch.bool, device=device)
        cache = DynamicCache(config=model.config)
        cache.layers = [FixedLayer(*pair, self.newest_column) for pair in storages]

        def read_newest() -> None:
            output = model(
                input_ids=self.token_ids,
                attention_mask=self.mask,
                position_ids=self.position_ids,
                past_key_values=cache,
            )
            logits.copy_(output.logits[:, -1])

        self.read_newest = recorder.repeatable(read_newest)

    def __call__(self, tokens: torch.Tensor, lengths: torch.Tensor, width: int) -> torch.Tensor:
        """Read one more token per row, into the last of `width` columns.

        Args:
            tokens: [rows], of the rows in use.
            lengths: [rows], tokens of each row, the newest included.

        Returns:
            logits [rows, vocabulary], which the next step overwrites.
        """
        num_rows = len(tokens)
        self.newest_column.fill_(width - 1)
        self.token_ids[:num_rows, 0] = tokens
        self.position_ids[:num_rows, 0] = lengths - 1
        first_token = (width - lengths)[:, None]
        sees = (self.column_ids >= first_token) & (self.column_ids < width)
        self.mask[:num_rows, 0, 0] = sees
        self.read_newest()
        return self.logits[:num_rows]


class FixedLayer(DynamicLayer):
    """Keys and values of one layer at a fixed place. A token is written into `newest_column`."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, newest_column: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.newest_column = keys, values, newest_column
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys.index_copy_(2, self.newest_column, key_states)
        self.values.index_copy_(2, self.newest_column, value_states)
        return self.keys, self.values


class Recorder:
    """Records work as CUDA graphs. They share one stream, and memory for intermediate results."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)
            self.pool = torch.cuda.graph_pool_handle()

    def repeatable(self, work: Callable[[], None]) -> Callable[[], None]:
        """Return a function that does `work` again, on the tensors that it reads and writes.

        On a GPU this is a CUDA graph, in which everything but the contents of tensors is fixed.

        Raises InputError if the model does what a graph cannot contain.
        """
        if self.device.type != "cuda":
            return work
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device):
            # The first call compiles kernels and allocates workspaces, which must not happen while
            # a graph is recorded. Recording itself computes nothing.
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                work()
            try:
                with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                    work()
            except RuntimeError as error:
                self._explain(error)
            torch.cuda.current_stream().wait_stream(self.stream)
        return graph.replay

    @staticmethod
    def _explain(error: RuntimeError) -> NoReturn:
        """Raise OutOfMemoryError, also for memory that torch does not manage, or InputError."""
        reason = str(error).strip().partition("\n")[0]
        if "out of memory" in reason:
            raise torch.OutOfMemoryError(reason) from error
        raise InputError(
            f"--cuda-graphs: a step of these agents cannot be recorded ({reason}); "
            f"leave out --cuda-graphs"
        ) from error
