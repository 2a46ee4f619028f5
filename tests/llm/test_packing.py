"""Tests of packing.py: batches, rows by hand, and what models compute from packed rows."""

import random

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    MistralConfig,
    Qwen2Config,
)

from llm.packing import (
    MAX_WIDTH,
    collate,
    pack,
    packed_batches,
    row_mask,
    row_width,
    sequence_columns,
)


def pack_all(sequences, max_width=MAX_WIDTH):
    return pack(sequences, indices=range(len(sequences)), max_width=max_width)


# ---- Batches -------------------------------------------------------------------------------------


def test_packed_batches_hold_whole_rows_within_the_budget():
    """Two trees of widths 6 and 4, and a sequence of 9 that is alone."""
    tree = [[1, 1, 1, 1, 2], [1, 1, 1, 1, 3]]
    small = [[2, 2, 2], [2, 2, 3]]
    sequences = [tree[0], small[0], [9] * 9, tree[1], small[1]]

    def batches(batch_tokens, max_width):
        indices = range(5)
        found = packed_batches(sequences, batch_tokens, indices=indices, max_width=max_width)
        return [list(sequence_columns(batch)) for batch in found]

    assert batches(12, MAX_WIDTH) == [[1, 4, 0, 3], [2]]
    assert batches(11, MAX_WIDTH) == [[1, 4], [0, 3], [2]]
    assert batches(5, MAX_WIDTH) == [[1, 4], [0], [3], [2]]  # no row is wider than a batch
    assert batches(11, 0) == [[1, 4], [0, 3], [2]]
    assert batches(9, 0) == [[1, 4], [0], [3], [2]]


# ---- Rows ----------------------------------------------------------------------------------------


def test_a_row_by_hand():
    """
    1 - 2 - 3 - 4
         \\    \\ 5 - 6
          7
    """
    sequences = [[1, 2, 7], [1, 2, 3, 5, 6], [8], [1, 2, 3, 4]]
    [row] = pack(sequences, indices=[3, 1, 0], max_width=99)
    assert row.ids == [1, 2, 3, 4, 5, 6, 7]
    assert row.depths == [0, 1, 2, 3, 3, 4, 2]
    assert row.columns == {3: [0, 1, 2, 3], 1: [0, 1, 2, 4, 5], 0: [0, 1, 6]}
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


SIBLINGS = [[1, 1, 1, 1, token] for token in (5, 3, 7, 2, 8, 6, 4)]
WIDTHS = [  # sequences, largest width, widths of the rows
    (SIBLINGS, 99, [11]),
    (SIBLINGS, 7, [7, 7, 5]),
    (SIBLINGS, 3, [5] * 7),  # one sequence always fits
    # One shared token pays for 1 + sqrt(1 * 833) = 29.9 columns, two for 2 + sqrt(2 * 834) = 42.8.
    ([[1] + [token] * 14 for token in range(2, 9)], 99, [29, 29, 29, 15]),
    ([[1, 1] + [token] * 20 for token in range(2, 9)], 99, [42, 42, 42, 22]),
    ([[1] + [token] * 15 for token in range(2, 5)], 99, [16, 16, 16]),
]


@pytest.mark.parametrize("sequences, max_width, widths", WIDTHS)
def test_a_row_is_as_wide_as_pays(sequences, max_width, widths):
    assert [row.width for row in pack_all(sequences, max_width)] == widths


# ---- What a model computes -----------------------------------------------------------------------


def random_trees(seed):
    """Sequences of three trees of depth three, in random order, some of them twice."""
    rng = random.Random(seed)

    def tokens():
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
SHAPE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
CONFIGS = {
    "Qwen2": Qwen2Config(**SHAPE),
    "Bloom, no positions but biases of the attention": BloomConfig(**SHAPE),
    "Gemma 3, every second layer with a window": Gemma3TextConfig(
        **SHAPE, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "GPT-2, absolute positions": GPT2Config(
        vocab_size=60, n_positions=60, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
    ),
    "Mistral, windows": MistralConfig(**SHAPE, sliding_window=6),
}


@pytest.mark.parametrize("max_width", [MAX_WIDTH, 30, 0])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_sequences_are_read_as_if_each_were_alone(name, max_width):
    """The logits, and the gradients of a loss on them. Rows of other widths are padded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]).eval()
    sequences = random_trees(0)

    def gradients(logits_of_sequences):
        model.zero_grad()
        sum(logits.square().sum() for logits in logits_of_sequences).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    alone = [model(input_ids=torch.tensor([sequence])).logits[0] for sequence in sequences]
    rows = pack_all(sequences, max_width=min(max_width, row_width(model.config)))
    assert len({row.width for row in rows}) > 1
    logits = model(**collate(rows, 0, model.device)).logits
    packed = []
    for index, (row, columns) in sorted(sequence_columns(rows).items()):
        assert [rows[row].ids[column] for column in columns] == sequences[index]
        packed.append(logits[row, columns])

    assert logits.isfinite().all()
    for ours, expected in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
    for ours, expected in zip(gradients(packed), gradients(alone), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-3, rtol=1e-4)


def test_without_shared_prefixes_there_is_no_mask():
    """The model's own causal attention is then right, and faster."""
    inputs = collate(pack_all([[1, 2, 3], [4, 5]]), 0, torch.device("cpu"))
    assert set(inputs) == {"input_ids", "use_cache"} and inputs["use_cache"] is False
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    inputs = collate(pack_all([[1, 2], [1, 3], [4, 5]]), 0, torch.device("cpu"))
    assert inputs["attention_mask"].shape == (2, 1, 3, 3)
    assert inputs["input_ids"].tolist() == [[1, 2, 3], [4, 5, 0]]
    assert inputs["position_ids"].tolist() == [[0, 1, 1], [0, 1, 0]]
    assert inputs["position_ids"].dtype == torch.int64  # absolute positions are looked up


ATTENTION = [  # configuration, attention, and whether our mask can replace the model's own
    (Qwen2Config(), "sdpa", True),
    (Qwen2Config(), "eager", False),
    (Qwen2Config(), "flash_attention_2", False),
    (Qwen2Config(use_sliding_window=True, sliding_window=8, max_window_layers=1), "sdpa", False),
    (MistralConfig(sliding_window=None), "sdpa", True),
    (MistralConfig(sliding_window=4096), "sdpa", False),
    (Gemma3TextConfig(), "sdpa", False),
    (FalconConfig(alibi=False), "sdpa", True),
    (FalconConfig(alibi=True), "sdpa", False),
]


@pytest.mark.parametrize("config, attention, can_pack", ATTENTION)
def test_models_whose_mask_cannot_be_replaced_read_sequences_one_by_one(
    config, attention, can_pack
):
    config._attn_implementation = attention
    assert row_width(config) == (MAX_WIDTH if can_pack else 0)
