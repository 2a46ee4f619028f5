"""Tests of cache.py: columns with room, rows that are copied and added, steps of fixed shape."""

import copy
import math
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from conftest import PROMPT, VOCABULARY, make_decoder, make_tiny_policy
from torch.fx.experimental.proxy_tensor import make_fx
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llm.decoding import (
    CacheRows,
    FixedRows,
    FixedSteps,
    PreallocatedLayer,
    Recorder,
    pad_left,
    takes_fixed_steps,
)
from llm.policy import _check_cuda_graphs
from search import ModelScorer, make_handlers, parse_method
from support.flags import InputError
from tasks.problems import load_problems
from tree import Sample, make_root

# ---- The key-value cache -------------------------------------------------------------------------


COLUMNS_PER_STEP = [
    # A prompt, single tokens until the layer has grown, then several tokens at once.
    [5] + [1] * (PreallocatedLayer.SPARE_COLUMNS + 3) + [4],
    # A prompt of one token, then more tokens than there is room for.
    [1, PreallocatedLayer.SPARE_COLUMNS + 1],
]


def test_keys_and_values_may_differ_in_size():
    """As in models that cache latents beside a few rotary dimensions."""
    ours, theirs, other = PreallocatedLayer(), DynamicLayer(), PreallocatedLayer()
    for columns in (3, 1, PreallocatedLayer.SPARE_COLUMNS + 1):
        keys, values = torch.randn(2, 1, columns, 8), torch.randn(2, 1, columns, 4)
        ours.update(keys, values)
        theirs.update(keys, values)
    ours.batch_select_indices(torch.tensor([1]))
    theirs.batch_select_indices(torch.tensor([1]))
    other.update(torch.ones(1, 1, 2, 8), torch.ones(1, 1, 2, 4))
    ours.add_rows(other)
    for name in ("keys", "values"):
        assert torch.equal(getattr(ours, name)[:1], getattr(theirs, name))
        assert getattr(ours, name)[1, 0, -2:].eq(1).all()
        assert getattr(ours, name)[1, 0, :-2].eq(0).all()


@pytest.mark.parametrize("columns_per_step", COLUMNS_PER_STEP)
@pytest.mark.parametrize("head_dim", [8, 128])
def test_a_preallocated_layer_equals_one_that_copies(columns_per_step, head_dim):
    """The heads may have fewer or more dimensions than the layer has columns."""
    ours = PreallocatedLayer()
    theirs = DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    num_rows = 3
    for num_columns in columns_per_step:
        shape = (2, num_rows, 2, num_columns, head_dim)
        keys, values = torch.randn(shape, generator=generator)
        our_keys, our_values = ours.update(keys, values)
        their_keys, their_values = theirs.update(keys, values)
        assert torch.equal(our_keys, their_keys)
        assert torch.equal(our_values, their_values)
        if theirs.get_seq_length() in (9, 40):
            # Drop and reorder rows, as when some messages have ended.
            num_rows = 2
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([1, 0]))
    assert ours.get_seq_length() == theirs.get_seq_length()
    assert ours.get_seq_length() > PreallocatedLayer.SPARE_COLUMNS


def test_a_layer_is_copied_only_if_it_has_no_room():
    layer = PreallocatedLayer()
    layer.update(torch.zeros(1, 1, 5, 8), torch.zeros(1, 1, 5, 8))
    [storage, _] = layer.storages
    column = torch.zeros(1, 1, 1, 8)
    for _ in range(PreallocatedLayer.SPARE_COLUMNS):
        layer.update(column, column)
        assert layer.storages[0] is storage
    layer.update(column, column)
    assert layer.storages[0] is not storage


def test_prompts_are_padded_on_the_left_and_their_padding_is_masked():
    token_ids, mask = pad_left([[7, 8], [4, 5, 6], [9]], pad_id=3)
    assert token_ids.tolist() == [[3, 7, 8], [4, 5, 6], [3, 3, 9]]
    assert mask.tolist() == [[0, 1, 1], [1, 1, 1], [0, 0, 1]]
    assert token_ids.dtype == mask.dtype == torch.int64


@torch.inference_mode()
@pytest.mark.parametrize("pad_id", [0, 5])
def test_logits_do_not_depend_on_padding(model_with_absolute_positions, pad_id):
    """A short prompt and a long one, then two more tokens: as if each row were alone."""
    model = model_with_absolute_positions
    rows = [[3, 1], [2, 7, 1, 7, 2]]
    cache_rows = CacheRows(model, rows, pad_id=pad_id)
    for newest in ([4, 6], [5, 1]):
        for row, logits in zip(rows, cache_rows.logits, strict=True):
            alone = model(input_ids=torch.tensor([row])).logits[0, -1]
            assert logits.tolist() == pytest.approx(alone.tolist(), abs=1e-5)
        rows = [[*row, token] for row, token in zip(rows, newest, strict=True)]
        cache_rows.append(torch.tensor(newest))


@torch.inference_mode()
def test_layers_with_full_attention_have_room_and_the_others_keep_their_window(model_with_windows):
    cache_rows = CacheRows(model_with_windows, [PROMPT], pad_id=0)
    layer_types = [type(layer) for layer in cache_rows.cache.layers]
    assert layer_types == [PreallocatedLayer, DynamicSlidingWindowLayer]


@torch.inference_mode()
def test_only_the_logits_of_the_newest_token_are_computed(small_model, monkeypatch):
    """Those of a whole prompt would be prompt x vocabulary numbers per row."""
    num_logits = []
    forward = small_model.forward

    def recorded_forward(**options):
        output = forward(**options)
        num_logits.append(output.logits.numel())
        return output

    monkeypatch.setattr(small_model, "forward", recorded_forward)
    CacheRows(small_model, [PROMPT, PROMPT], pad_id=0)
    assert num_logits == [2 * VOCABULARY]


BRANCHINGS = [
    # rows before; row and newest token of each message; parents of the rows after it
    (5, [0, 1, 2, 3], [6, 6, 6, 6], None),  # four of five rows are enough: nothing is copied
    (5, [0, 1, 2], [6, 6, 6], [0, 1, 2]),  # too many have ended
    (1, [0, 0], [6, 6], None),  # equal messages share a row
    (1, [0, 0, 0], [6, 2, 6], [0, 0]),  # and get their own rows when they differ
    (2, [0, 1, 1], [6, 6, 2], [0, 1, 1]),
]


@torch.inference_mode()
@pytest.mark.parametrize("num_rows, row_of_message, tokens, parents", BRANCHINGS)
def test_rows_are_copied_only_if_messages_differ_or_many_have_ended(
    small_model, monkeypatch, num_rows, row_of_message, tokens, parents
):
    prompts = [[*PROMPT, row] for row in range(num_rows)]
    cache_rows = CacheRows(small_model, prompts, pad_id=0)
    copied = []
    monkeypatch.setattr(cache_rows, "_select", lambda rows: copied.append(rows.tolist()))
    new_row_of_message, newest = cache_rows.branch(
        torch.tensor(row_of_message), torch.tensor(tokens), max_width=99
    )
    assert copied == ([] if parents is None else [parents])
    assert newest[new_row_of_message].tolist() == tokens
    parent_of_row = range(num_rows) if parents is None else parents
    assert [parent_of_row[row] for row in new_row_of_message] == row_of_message


def check_logits(cache_rows, rows):
    """Compare the logits of each row with those of its tokens alone."""
    for row, logits in zip(rows, cache_rows.logits, strict=True):
        alone = cache_rows.model(input_ids=torch.tensor([row])).logits[0, -1]
        assert logits.tolist() == pytest.approx(alone.tolist(), abs=1e-5)


def append_to(cache_rows, rows, tokens):
    """Append a token to each row of the cache and of `rows`, and check the logits."""
    cache_rows.append(torch.tensor(tokens))
    for row, token in zip(rows, tokens, strict=True):
        row.append(token)
    check_logits(cache_rows, rows)


@torch.inference_mode()
def test_prompts_that_are_added_are_read_as_if_each_were_alone(model_with_absolute_positions):
    """A shorter and a longer one than what is there. Rows are dropped, and columns with them."""
    model = model_with_absolute_positions
    cache_rows = CacheRows(model, [[3, 1], [2, 7, 1, 7]], pad_id=0)
    rows = [[3, 1], [2, 7, 1, 7]]

    def check():
        assert cache_rows.lengths.tolist() == [len(row) for row in rows]
        assert cache_rows.width == cache_rows.cache.get_seq_length()
        check_logits(cache_rows, rows)

    def append(tokens):
        append_to(cache_rows, rows, tokens)
        check()

    append([5, 6])
    row_of_message = cache_rows.add_prompts([[6], [7, 2, 7, 1, 7, 2, 7]], torch.tensor([1, 0, 1]))
    assert row_of_message.tolist() == [1, 0, 1]
    rows += [[6], [7, 2, 7, 1, 7, 2, 7]]
    check()
    append([1, 2, 3, 4])
    assert cache_rows.width == 8

    # The first and the third stay, twice the latter: four columns at most, instead of eight.
    rows = [[3, 1, 5, 1], [6, 3], [6, 3]]
    cache_rows._select(torch.tensor([0, 2, 2]))
    assert cache_rows.width == 4
    append([2, 5, 7])

    # No message reads the second row any more.
    row_of_message = cache_rows.add_prompts([[4, 4]], torch.tensor([2, 0, 2]))
    assert row_of_message.tolist() == [1, 0, 1]
    rows = [rows[0], rows[2], [4, 4]]
    check()
    append([1, 1, 1])


def test_padding_is_zero_because_attention_multiplies_it():
    """Zero times whatever was in memory could be not a number."""
    layer, other = PreallocatedLayer(), PreallocatedLayer()
    layer.update(torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    other.update(torch.ones(1, 1, 5, 4), torch.ones(1, 1, 5, 4))
    layer.add_rows(other)
    assert layer.keys[:, 0, :, 0].tolist() == [[0, 0, 0, 1, 1], [1] * 5]
    assert layer.values[:, 0, :, 0].tolist() == [[0, 0, 0, 1, 1], [1] * 5]


# ---- Steps of fixed shape: CUDA graphs -----------------------------------------------------------


def repeat_operations(recorder, work):
    """Stand in for a CUDA graph: record the operations on tensors, and repeat nothing else.

    As in a graph, numbers and shapes are those of the first call, and a tensor that is replaced by
    another one is still read where it was.
    """
    work()
    return make_fx(work)()


@pytest.fixture(params=[Recorder.repeatable, repeat_operations], ids=["on a CPU", "as a graph"])
def fixed_steps(request, monkeypatch):
    """Let steps of fixed shape be repeated as on a CPU, or as on a GPU."""
    monkeypatch.setattr(Recorder, "repeatable", request.param)


def decode_messages(decoder, *, capacity):
    """Decode messages of 1 to 150 tokens. `capacity`: of them together; the batch is refilled."""
    prompts = [PROMPT[: 1 + number % 3] for number in range(6)]
    repeats = [1, 3, 1, 4, 1, 2]
    num = sum(repeats)
    limits = [1 + 41 * number % 150 for number in range(num)]
    decoder.eos_ids = {VOCABULARY}  # no message ends before its limit
    return decoder.decode(
        prompts,
        repeats,
        limits,
        list(range(num)),
        [number % 4 == 0 for number in range(num)],
        batch_tokens=capacity * 153,
    )


@pytest.mark.parametrize("capacity", [3, 12])
def test_steps_of_fixed_shape_give_the_same_messages(small_model, fixed_steps, capacity):
    expected = decode_messages(make_decoder(small_model), capacity=capacity)
    decoder = make_decoder(small_model, cuda_graphs=True)
    for (tokens, logprobs), (expected_tokens, expected_logprobs) in zip(
        decode_messages(decoder, capacity=capacity), expected, strict=True
    ):
        assert tokens == expected_tokens
        assert logprobs == pytest.approx(expected_logprobs, abs=1e-4)
    columns = {columns for _, columns in decoder.fixed_steps.steps}
    assert columns == {128, 256}
    assert max(rows for rows, _ in decoder.fixed_steps.steps) == (4 if capacity == 3 else 16)


@torch.inference_mode()
def test_fixed_steps_read_each_row_as_if_it_were_alone(model_with_absolute_positions, fixed_steps):
    """Rows are appended to, copied and added; so are rows of which no message is left."""
    model = model_with_absolute_positions
    rows = [[3, 1], [2, 7, 1, 7], [6]]
    fixed_rows = FixedRows(model, rows, pad_id=0, steps=FixedSteps(model))

    append_to(fixed_rows, rows, [5, 6, 7])
    append_to(fixed_rows, rows, [1, 2, 3])
    rows = [list(rows[index]) for index in (2, 0, 0, 0, 1)]
    fixed_rows._select(torch.tensor([2, 0, 0, 0, 1]))  # more rows than there is memory for
    append_to(fixed_rows, rows, [1, 2, 3, 4, 5])
    row_of_message = fixed_rows.add_prompts([[7, 7, 7]], torch.tensor([4, 0, 3]))
    assert row_of_message.tolist() == [2, 0, 1]
    rows = [rows[0], rows[3], rows[4], [7, 7, 7]]
    append_to(fixed_rows, rows, [6, 5, 4, 3])
    append_to(fixed_rows, rows, [3, 3, 3, 3])


SHAPES = [  # rows and columns in use, and of the step
    ((1, 1), (1, 128)),
    ((3, 128), (4, 128)),
    ((33, 129), (64, 256)),
    ((64, 256), (64, 256)),
    ((65, 257), (128, 384)),
    ((129, 1000), (192, 1024)),
]


@pytest.mark.parametrize("in_use, shape", SHAPES)
def test_there_are_few_shapes(in_use, shape):
    assert FixedSteps._shape(*in_use) == shape


def layers_with(num_rows, num_columns):
    """Return two layers whose keys and values are random, with 2 heads of 4 and 3 dimensions."""
    layers = [PreallocatedLayer(), PreallocatedLayer()]
    for layer in layers:
        keys = torch.randn(num_rows, 2, num_columns, 4)
        layer.update(keys, torch.randn(num_rows, 2, num_columns, 3))
    return layers


@torch.inference_mode()
def test_what_is_loaded_is_all_that_is_in_the_memory(small_model):
    """A NaN of a batch before would reach rows of this one: zero times NaN is NaN."""
    steps = FixedSteps(small_model)
    FixedRows(small_model, [PROMPT] * 4, pad_id=0, steps=steps).append(torch.tensor([1, 2, 3, 4]))
    for keys_and_values in steps.memory:
        for numbers in keys_and_values:
            numbers.fill_(math.nan)
    rows = FixedRows(small_model, [PROMPT] * 3, pad_id=0, steps=steps)
    for _ in range(3):
        rows.append(torch.tensor([1, 2, 3]))
    assert rows.logits.isfinite().all()


def test_steps_share_one_memory_which_grows_by_a_quarter_or_more(small_model):
    steps = FixedSteps(small_model)

    def load(num_rows, width):
        layers = layers_with(num_rows, width)
        before = [(layer.keys.clone(), layer.values.clone()) for layer in layers]
        step = steps.load(layers, width, torch.zeros(num_rows, VOCABULARY))
        for layer, (keys, values), storages in zip(layers, before, step.storages, strict=True):
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
            assert torch.equal(storages[0][:num_rows, :, :width], keys)
            assert torch.equal(storages[1][:num_rows, :, :width], values)
        return step

    large = load(5, 200)
    assert steps.capacity == 8 * 256
    small = load(3, 100)
    assert steps.capacity == 8 * 256
    assert load(7, 200) is large
    for large_pair, small_pair in zip(large.storages, small.storages, strict=True):
        for large_storage, small_storage in zip(large_pair, small_pair, strict=True):
            assert large_storage.data_ptr() == small_storage.data_ptr()
    pointers = {storage.data_ptr() for pair in large.storages for storage in pair}
    assert len(pointers) == 4

    # As much as there is: nothing changes. More: what works on the old memory is dropped.
    load(8, 100)
    assert (steps.capacity, list(steps.steps)) == (8 * 256, [(8, 256), (4, 128), (8, 128)])
    assert steps.logits.shape == (8, VOCABULARY)
    load(9, 100)  # memory for keys and values, but not for logits
    assert (steps.capacity, list(steps.steps)) == (10 * 256, [(16, 128)])
    assert steps.logits.shape == (16, VOCABULARY)
    load(1, 10 * 256)
    assert (steps.capacity, list(steps.steps)) == (25 * 128, [(1, 21 * 128)])
    assert steps.logits.shape == (16, VOCABULARY)
    load(9, 128)
    assert (steps.capacity, list(steps.steps)) == (16 * 256, [(16, 256)])
    load(8, 639)
    assert (steps.capacity, list(steps.steps)) == (8 * 640, [(8, 640)])
    steps.free()
    assert (steps.capacity, steps.steps, steps.memory) == (0, {}, [])


def test_rows_that_are_not_in_use_stay_finite(small_model, monkeypatch):
    """A row that sees nothing is not a number, on some devices. It would make others so, to which
    its memory is given: attention multiplies masked columns by zero.
    """
    forward = small_model.forward

    def look(attention_mask, **options):
        if attention_mask.dim() == 4:
            assert attention_mask.any(-1).all()
        return forward(attention_mask=attention_mask, **options)

    def call_first(recorder, work):  # as on a GPU, before the graph is recorded
        work()
        return work

    monkeypatch.setattr(Recorder, "repeatable", call_first)
    monkeypatch.setattr(small_model, "forward", look)
    decoder = make_decoder(small_model, cuda_graphs=True)
    decode_messages(decoder, capacity=12)
    assert any(columns == 256 for _, columns in decoder.fixed_steps.steps)
    for flat in decoder.fixed_steps.memory:
        for numbers in flat:
            assert numbers.isfinite().all()


@torch.inference_mode()
def test_a_full_memory_in_use_is_loaded_into_a_step_with_more_columns(small_model):
    rows = FixedRows(small_model, [PROMPT, PROMPT[:2]], pad_id=0, steps=FixedSteps(small_model))
    growing = CacheRows(small_model, [PROMPT, PROMPT[:2]], pad_id=0)
    for number in range(130):
        tokens = torch.tensor([number % VOCABULARY, 3 * number % VOCABULARY])
        rows.append(tokens)
        growing.append(tokens)
        assert torch.allclose(rows.logits, growing.logits, atol=1e-5)
        assert rows.step.num_columns == (128 if number < 123 else 256)


def test_fixed_steps_need_our_mask_and_one_column_per_token(
    small_model, model_with_windows, monkeypatch
):
    assert takes_fixed_steps(small_model)
    assert not takes_fixed_steps(model_with_windows)
    _check_cuda_graphs(SimpleNamespace(adapter=None, model="small"), small_model)
    with pytest.raises(InputError, match="--cuda-graphs: not with --model windows; every layer"):
        _check_cuda_graphs(SimpleNamespace(adapter=None, model="windows"), model_with_windows)
    with pytest.raises(InputError, match="--cuda-graphs: not with --adapter"):
        _check_cuda_graphs(SimpleNamespace(adapter="a/agents", model="small"), small_model)
    for name, value in (
        ("_attn_implementation", "eager"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        ("rope_parameters", {"full_attention": {"rope_type": "dynamic"}}),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(small_model.config, name, value)
            assert not takes_fixed_steps(small_model)
    monkeypatch.setattr(CacheRows, "is_resizable_for", staticmethod(lambda model: False))
    assert not takes_fixed_steps(small_model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("capacity", [3, 12])
def test_cuda_graphs_give_the_same_messages(small_model, capacity):
    model = copy.deepcopy(small_model).to("cuda")
    expected = decode_messages(make_decoder(model), capacity=capacity)
    actual = decode_messages(make_decoder(model, cuda_graphs=True), capacity=capacity)
    assert [tokens for tokens, _ in actual] == [tokens for tokens, _ in expected]


class FakeCuda:
    """Stands in for torch.cuda, and notes what is done in which stream and on which device."""

    def __init__(self):
        self.events = []
        self.device_index = 0
        self.current = "default"
        self.error = None

    def Stream(self, device):
        return SimpleNamespace(
            name=f"own of {device}",
            wait_stream=lambda other: self.events.append(f"own waits for {other.name}"),
        )

    def current_stream(self):
        name = f"{self.current} of cuda:{self.device_index}"

        def wait_stream(other):
            self.events.append(f"{name} waits for {other.name}")

        return SimpleNamespace(name=name, wait_stream=wait_stream)

    def graph_pool_handle(self):
        return "pool"

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.events.append("replay"))

    @contextmanager
    def device(self, device):
        self.device_index = device.index
        yield
        self.device_index = 0

    @contextmanager
    def stream(self, stream):
        self.current = stream.name
        yield
        self.current = "default"

    @contextmanager
    def graph(self, graph, pool, stream):
        self.current = f"graph in {pool} and {stream.name}"
        if self.error is not None:
            raise self.error
        yield
        self.current = "default"


@pytest.fixture
def fake_cuda(monkeypatch):
    fake = FakeCuda()
    for name in ("Stream", "current_stream", "graph_pool_handle", "CUDAGraph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(fake, name))
    return fake


def test_work_is_done_once_then_recorded_then_replayed(fake_cuda):
    """As the documentation of torch.cuda.graph asks for, on the device of the model."""
    recorder = Recorder(torch.device("cuda", 1))

    def work():
        fake_cuda.events.append(f"work in {fake_cuda.current} on {fake_cuda.device_index}")

    repeat = recorder.repeatable(work)
    repeat()
    repeat()
    assert fake_cuda.events == [
        "own waits for default of cuda:1",
        "work in own of cuda:1 on 1",
        "work in graph in pool and own of cuda:1 on 1",
        "default of cuda:1 waits for own of cuda:1",
        "replay",
        "replay",
    ]


def test_what_cannot_be_recorded_is_named_and_no_memory_is_out_of_memory(fake_cuda):
    recorder = Recorder(torch.device("cuda", 0))
    fake_cuda.error = RuntimeError("operation not permitted when stream is capturing\nmore")
    with pytest.raises(InputError, match=r"recorded \(operation not .* capturing\); leave out"):
        recorder.repeatable(lambda: None)
    fake_cuda.error = RuntimeError("CUDA error: out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        recorder.repeatable(lambda: None)


def test_the_flag_lets_agents_decode_with_fixed_steps_on_a_cpu_too(chain):
    policy = make_tiny_policy(chain, cuda_graphs=None)
    problems = load_problems(task="tiny", data=None, split="train", num=3)
    requests = [(problem, Sample([make_root(problem)], 3)) for problem in problems]
    expected = make_tiny_policy(chain)(requests)
    for (reply, cost), (expected_reply, expected_cost) in zip(
        policy(requests), expected, strict=True
    ):
        texts = [candidate.text for candidate in reply[0]]
        assert texts == [candidate.text for candidate in expected_reply[0]]
        assert cost.generated_tokens == expected_cost.generated_tokens
    assert policy.decoder.fixed_steps.steps

    # V can have the memory.
    scorer = ModelScorer(SimpleNamespace(free_memory=None), batch_tokens=99)
    method = parse_method("sbs-2x2-value", chain, num_candidates="2", lam=0.0)
    make_handlers(method, {"value": scorer}, policy)
    assert scorer.model.free_memory()
    assert not policy.decoder.fixed_steps.memory
    assert not scorer.model.free_memory()
