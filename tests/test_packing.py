"""Tests of packing.py: batches, and sequences that share prefixes in one row."""

import itertools
import random

import pytest
import torch
from transformers import (
    FalconConfig,
    Gemma3TextConfig,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from llm.packing import (
    MAX_WIDTH,
    best_width,
    collate,
    num_distinct_tokens,
    pack,
    packed_batches,
    row_mask,
    sequence_columns,
    sequences_of,
    shared_prefix,
    token_batches,
    token_cost_for,
)

SHARE_ALL = 1e9  # a token costs so much that every shared one is read once

# ---- Batches -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "budget, lengths_of_batches",
    [
        (20, [[1, 4, 4, 5], [8, 9], [30]]),
        (12, [[1, 4, 4], [5], [8], [9], [30]]),
    ],
)
def test_token_batches_cover_all_rows_within_the_budget(budget, lengths_of_batches):
    lengths = [5, 9, 1, 30, 4, 4, 8]
    by_length = sorted(range(7), key=lengths.__getitem__)
    batches = list(token_batches(lengths, by_length, budget))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    for batch, expected in zip(batches, lengths_of_batches, strict=True):
        batch_lengths = [lengths[index] for index in batch]
        assert batch_lengths == expected
        assert len(batch) * max(batch_lengths) <= budget or len(batch) == 1


def test_the_longest_row_so_far_counts_in_whatever_order():
    assert list(token_batches([9, 1, 1], [0, 1, 2], 18)) == [[0, 1], [2]]
    assert list(token_batches([1, 1, 9], [0, 1, 2], 18)) == [[0, 1], [2]]


def test_packed_batches_hold_whole_rows_within_the_budget():
    """Two trees of widths 6 and 4, and a sequence of 9 that is alone."""
    tree = [[1, 1, 1, 1, 2], [1, 1, 1, 1, 3]]
    small = [[2, 2, 2], [2, 2, 3]]
    sequences = [tree[0], small[0], [9] * 9, tree[1], small[1]]

    def batches(batch_tokens, token_cost=SHARE_ALL):
        found = packed_batches(sequences, batch_tokens, token_cost=token_cost)
        return [sequences_of(batch) for batch in found]

    assert batches(12) == [[1, 4, 0, 3], [2]]
    assert batches(11) == [[1, 4], [0, 3], [2]]
    assert batches(5) == [[1, 4], [0], [3], [2]]  # no row is wider than a batch
    assert batches(11, token_cost=None) == [[1, 4], [0, 3], [2]]
    assert batches(9, token_cost=None) == [[1, 4], [0], [3], [2]]


# ---- Rows ----------------------------------------------------------------------------------------


def test_a_row_by_hand():
    """
    1 - 2 - 3 - 4
         \\    \\ 5 - 6
          7
    """
    sequences = [[1, 2, 7], [1, 2, 3, 5, 6], [1, 2, 3, 4]]
    [row] = pack(sequences, token_cost=SHARE_ALL, max_width=99)
    assert row.ids == [1, 2, 3, 4, 5, 6, 7]
    assert row.depths == [0, 1, 2, 3, 3, 4, 2]
    assert row.columns == {2: [0, 1, 2, 3], 1: [0, 1, 2, 4, 5], 0: [0, 1, 6]}
    assert row_mask(row, 8).astype(int).tolist() == [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 1, 0, 0, 0],
        [1, 1, 1, 0, 1, 1, 0, 0],
        [1, 1, 0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 0, 1],  # padding
    ]


def test_equal_sequences_and_prefixes_take_no_room():
    sequences = [[1, 2, 3], [1, 2], [1, 2, 3], [1]]
    [row] = pack(sequences, token_cost=SHARE_ALL, max_width=99)
    assert row.ids == [1, 2, 3]
    assert row.columns == {3: [0], 1: [0, 1], 0: [0, 1, 2], 2: [0, 1, 2]}


def test_a_row_is_not_wider_than_its_limit_unless_a_sequence_is():
    sequences = [[1, 1, 1, 1, token] for token in range(2, 9)]

    def widths(max_width):
        return [row.width for row in pack(sequences, token_cost=SHARE_ALL, max_width=max_width)]

    assert widths(7) == [7, 7, 5]
    assert widths(3) == [5] * 7
    assert widths(99) == [11]


def test_some_of_the_sequences_are_packed_under_their_own_indices():
    sequences = [[1, 1, 2], [5, 5], [1, 1, 3], [1, 1, 4]]
    [row] = pack(sequences, token_cost=SHARE_ALL, max_width=99, indices=[3, 0])
    assert row.ids == [1, 1, 2, 4]
    assert row.columns == {0: [0, 1, 2], 3: [0, 1, 3]}
    assert sequences_of([row]) == [0, 3]


def test_sequences_that_share_little_have_rows_of_their_own():
    """At a cost of 5, a shared token pays for a width of 1 + sqrt(1 * 6), and two for 2 + 14."""
    assert len(pack([[1, 2], [1, 3]], token_cost=5, max_width=99)) == 1
    assert len(pack([[1, 2, 2], [1, 3, 3]], token_cost=5, max_width=99)) == 2
    assert len(pack([[1, 1, 2, 2], [1, 1, 3]], token_cost=5, max_width=99)) == 1
    assert len(pack([[1, 1, 2, 2], [1, 1, 3, 3]], token_cost=5, max_width=99)) == 2
    assert len(pack([[2, 2], [3, 3]], token_cost=SHARE_ALL, max_width=99)) == 2


@pytest.mark.parametrize("shared, num_new, token_cost", [(40, 7, 300), (200, 25, 800), (9, 3, 50)])
def test_the_width_of_rows_makes_reading_cheap(shared, num_new, token_cost):
    """No other limit of the width is cheaper by more than 3 %, and reading each alone is dearer."""
    sequences = [[0] * shared + [number] * num_new for number in range(1, 121)]

    def cost(rows):
        return sum(token_cost * row.width + row.width**2 for row in rows)

    chosen = cost(pack(sequences, token_cost=token_cost, max_width=10**9))
    others = []
    for max_width in range(shared, 10 * shared, max(1, shared // 9)):
        others.append(cost(pack(sequences, token_cost=SHARE_ALL, max_width=max_width)))
    assert chosen <= 1.03 * min(others)
    assert 1.5 * chosen < cost(pack(sequences, token_cost=None, max_width=10**9))
    assert shared < best_width(shared, token_cost) < 10 * shared  # the others are on both sides


def test_shared_prefixes_and_distinct_tokens_by_hand():
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2, 4]) == 2
    assert shared_prefix([], [1]) == 0
    sequences = [[1, 2, 3], [1, 2, 4], [1, 5], [2, 3], [1, 2]]
    # The distinct prefixes: 1, 12, 123, 124, 15, 2, 23
    assert num_distinct_tokens(sequences) == 7


# ---- What a model computes -----------------------------------------------------------------------


def random_trees(seed: int) -> list[list[int]]:
    """Sequences of three trees of depth three, in random order, some of them twice."""
    rng = random.Random(seed)

    def tokens() -> list[int]:
        return [rng.randrange(60) for _ in range(rng.randrange(4, 12))]

    sequences = []
    for _ in range(3):
        question = tokens()
        for _ in range(2):
            facts = question + tokens()
            sequences.append(facts)
            sequences += [facts + tokens() for _ in range(3)]
    rng.shuffle(sequences)
    return sequences + sequences[:2]


SHAPE = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(**SHAPE)).eval()
    assert token_cost_for(model.config) is not None
    return model


def logits_of_sequences(model, sequences, **options):
    """Read all sequences in one batch. Returns the logits of each, [tokens, vocabulary]."""
    rows = pack(sequences, **options)
    logits = model(**collate(rows, 0, model.device)).logits
    found = {}
    for index, (row_index, columns) in sequence_columns(rows).items():
        assert [rows[row_index].ids[column] for column in columns] == sequences[index]
        found[index] = logits[row_index, columns]
    return [found[index] for index in range(len(sequences))]


@pytest.mark.parametrize(
    "token_cost, max_width", [(None, 500), (SHARE_ALL, 30), (20, 500), (SHARE_ALL, 500)]
)
def test_packed_sequences_are_read_as_if_each_were_alone(model, token_cost, max_width):
    """The logits, and the gradients of a loss on them."""
    sequences = random_trees(0)

    def gradients() -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in model.parameters()]

    model.zero_grad()
    expected = []
    for sequence in sequences:
        expected.append(model(input_ids=torch.tensor([sequence]), use_cache=False).logits[0])
    sum(logits.square().sum() for logits in expected).backward()
    expected_gradients = gradients()

    model.zero_grad()
    packed = logits_of_sequences(model, sequences, token_cost=token_cost, max_width=max_width)
    sum(logits.square().sum() for logits in packed).backward()
    for logits, alone in zip(packed, expected, strict=True):
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
    for gradient, alone in zip(gradients(), expected_gradients, strict=True):
        torch.testing.assert_close(gradient, alone, atol=1e-4, rtol=1e-4)


def test_packing_reads_every_token_of_a_tree_once():
    sequences = random_trees(1)
    rows = pack(sequences, token_cost=SHARE_ALL, max_width=500)
    assert len(rows) == 3
    assert sum(row.width for row in rows) == num_distinct_tokens(sequences)
    assert num_distinct_tokens(sequences) < 0.6 * sum(map(len, sequences))


def test_without_shared_prefixes_there_is_no_mask():
    """The model's own causal attention is then right, and faster."""
    rows = pack([[1, 2, 3], [4, 5]], token_cost=SHARE_ALL, max_width=99)
    inputs = collate(rows, 0, torch.device("cpu"))
    assert set(inputs) == {"input_ids", "use_cache"} and inputs["use_cache"] is False
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    rows = pack([[1, 2], [1, 3], [4, 5]], token_cost=SHARE_ALL, max_width=99)
    inputs = collate(rows, 0, torch.device("cpu"))
    assert inputs["attention_mask"].shape == (2, 1, 3, 3)
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert inputs["position_ids"].dtype == torch.int64  # absolute positions are looked up


@pytest.mark.parametrize(
    "config, can_pack",
    [
        (Qwen2Config(), True),
        (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1), False),
        (MistralConfig(sliding_window=None), True),
        (MistralConfig(sliding_window=4096), False),
        (Gemma3TextConfig(), False),
        (FalconConfig(alibi=False), True),
        (FalconConfig(alibi=True), False),
    ],
)
def test_models_whose_mask_cannot_be_replaced_read_sequences_one_by_one(config, can_pack):
    config._attn_implementation = "sdpa"
    assert (token_cost_for(config) is not None) == can_pack


def test_only_sdpa_takes_the_mask_of_a_packed_row():
    config = Qwen2Config()
    for other in ("eager", "flash_attention_2", "flex_attention"):
        config._attn_implementation = other
        assert token_cost_for(config) is None
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(Qwen2Config(**SHAPE), attn_implementation="eager").eval()
    assert token_cost_for(model.config) is None


def test_the_cost_of_a_token_beside_attention_is_that_of_its_weights():
    """2 FLOPs per weight and token; 4 * hidden size per column that it attends to."""
    config = Qwen2Config(hidden_size=64, intermediate_size=160, num_hidden_layers=1, vocab_size=9)
    config._attn_implementation = "sdpa"
    layer = Qwen2ForCausalLM(config).model.layers[0]
    num_weights = sum(weight.numel() for weight in layer.parameters() if weight.dim() == 2)
    assert token_cost_for(config) == pytest.approx(2 * num_weights / (4 * 64))


def test_no_row_is_wider_than_its_mask_may_be():
    assert best_width(1000, 832.0) == pytest.approx(1000 + (1000 * 1832) ** 0.5)
    assert best_width(100_000, 832.0) == MAX_WIDTH


def test_a_row_shares_with_the_neighbour_in_alphabetical_order():
    """Whatever the order in which sequences are given, the same rows result."""
    sequences = [[1, 1, 1, 2], [1, 1, 1, 3], [4, 4, 4, 5], [4, 4, 4, 6]]
    for order in itertools.permutations(sequences):
        rows = pack(list(order), token_cost=SHARE_ALL, max_width=99)
        assert [row.ids for row in rows] == [[1, 1, 1, 2, 3], [4, 4, 4, 5, 6]]
