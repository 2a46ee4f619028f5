"""Tests of decoding.py: uniforms, sampling, filters, the cache, and messages that share rows."""

import math

import numpy as np
import pytest
import torch
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from decoding import CacheRows, PreallocatedLayer, filter_logits, sample_tokens, uniforms
from generate_rollouts import make_root
from policy import Sample
from tasks import load_problems

# ---- Uniforms ------------------------------------------------------------------------------------

KEY = (0, "p", (0, 1), 2)  # seed, problem, path, candidate
OTHER_KEYS = [(1, "p", (0, 1), 2), (0, "q", (0, 1), 2), (0, "p", (1, 0), 2), (0, "p", (0, 1), 3)]


def test_uniforms_are_uniform_and_a_function_of_their_key():
    draws = uniforms(1000, *KEY)
    assert (draws == uniforms(1000, *KEY)).all()
    assert (draws[:10] == uniforms(10, *KEY)).all()
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.05


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_uniforms_of_another_key_are_independent(key):
    """The mean product of two independent uniforms is 1/4."""
    draws = uniforms(1000, *KEY)
    others = uniforms(1000, *key)
    assert (draws != others).all()
    assert abs((draws * others).mean() - 0.25) < 0.05


# ---- Sampling ------------------------------------------------------------------------------------


def sample_evenly(probabilities, *, greedy=False, temperature=1.0, top_k=0):
    """Sample 1,000 tokens of one distribution, with evenly spaced uniforms."""
    num = 1000
    draws = (torch.arange(num).double() + 0.5) / num
    return sample_tokens(
        torch.log(torch.tensor([probabilities])).repeat(num, 1),
        draws,
        torch.full((num,), greedy),
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
    )


def test_the_sampler_draws_from_the_distribution():
    """Inverse CDF: token 0 up to 0.1, token 1 up to 0.3, token 2 up to 0.6, then token 3."""
    tokens, logprobs = sample_evenly([0.1, 0.2, 0.3, 0.4])
    assert tokens.bincount().tolist() == [100, 200, 300, 400]
    assert tokens[:100].eq(0).all()
    assert tokens[-400:].eq(3).all()
    assert logprobs[tokens == 1] == pytest.approx(math.log(0.2), abs=1e-6)


def test_temperature_and_top_k_change_the_draws_but_not_the_logprobs():
    """At temperature 0.5 the two likeliest have 0.3^2 : 0.4^2 = 0.36 : 0.64."""
    tokens, logprobs = sample_evenly([0.1, 0.2, 0.3, 0.4], temperature=0.5, top_k=2)
    assert tokens.bincount(minlength=4).tolist() == [0, 0, 360, 640]
    assert logprobs[tokens == 3] == pytest.approx(math.log(0.4), abs=1e-6)


def test_greedy_rows_take_the_likeliest_token():
    tokens, _ = sample_evenly([0.1, 0.2, 0.3, 0.4], greedy=True, temperature=0.5)
    assert tokens.eq(3).all()


# ---- Filters -------------------------------------------------------------------------------------

FILTERS = [  # top-k, top-p, standard deviation of the logits
    (0, 0.9, 1.0),
    (0, 0.9, 5.0),
    (7, 1.0, 1.0),
    (20, 0.5, 2.0),
    (0, 0.05, 1.0),
    (10_000, 0.999, 0.1),
]


# In a vocabulary of 3,000 the nucleus may reach beyond the 1,024 likeliest tokens.
@pytest.mark.parametrize("vocabulary", [50, 3000])
@pytest.mark.parametrize("top_k, top_p, spread", FILTERS)
def test_filtered_logits_equal_those_of_transformers(vocabulary, top_k, top_p, spread):
    generator = torch.Generator().manual_seed(0)
    logits = spread * torch.randn((5, vocabulary), generator=generator)
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    filtered = filter_logits(logits, temperature=0.7, top_k=top_k, top_p=top_p)
    assert torch.equal(filtered, expected)


# ---- The key-value cache -------------------------------------------------------------------------


def test_a_preallocated_layer_equals_one_that_copies():
    """A prompt, single tokens until the layer has grown, then several tokens at once."""
    ours = PreallocatedLayer()
    theirs = DynamicLayer()
    generator = torch.Generator().manual_seed(0)
    num_rows = 3
    for num_columns in [5] + [1] * (PreallocatedLayer.SPARE_COLUMNS + 3) + [4]:
        keys, values = torch.randn((2, num_rows, 2, num_columns, 8), generator=generator)
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


# ---- Messages that share rows --------------------------------------------------------------------


def record_forwards(model, monkeypatch):
    """Return a list to which each forward of the model adds the number of tokens it reads."""
    forward = model.forward
    tokens_per_forward = []

    def recorded_forward(input_ids, **options):
        tokens_per_forward.append(input_ids.numel())
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(model, "forward", recorded_forward)
    return tokens_per_forward


def record_messages(decoder, monkeypatch):
    """Return a list to which the decoder adds the token ids of each message."""
    decode = decoder.decode
    messages = []

    def recorded_decode(*args):
        decoded = decode(*args)
        messages.extend(tokens for tokens, _ in decoded)
        return decoded

    monkeypatch.setattr(decoder, "decode", recorded_decode)
    return messages


def beginnings_of(messages):
    """Return all distinct beginnings of some messages. The last token of a message is not read."""
    beginnings = set()
    for tokens in messages:
        for end in range(1, len(tokens)):
            beginnings.add(tuple(tokens[:end]))
    return beginnings


@pytest.mark.parametrize("greedy", [True, False])
def test_messages_of_one_prompt_are_computed_once_while_they_are_equal(policy, monkeypatch, greedy):
    """The model reads the prompt once, and each distinct beginning of its messages once.

    It reads a little more than that, because rows of ended messages are not removed at once.
    """
    tokens_per_forward = record_forwards(policy.decoder.model, monkeypatch)
    messages = record_messages(policy.decoder, monkeypatch)
    [problem] = load_problems(task="tiny", data=None, split="test", num=1)
    request = Sample([make_root(problem.question)], 8, greedy)
    [(_, cost)] = policy([(problem, request)])

    num_distinct = len({tuple(tokens) for tokens in messages})
    assert len(messages) == 8
    assert (num_distinct == 1) == greedy

    prefill, *steps = tokens_per_forward
    num_beginnings = len(beginnings_of(messages))
    assert prefill == cost.prompt_tokens
    assert num_beginnings <= sum(steps) <= num_beginnings / CacheRows.SHARE_WORTH_KEEPING
    assert sum(steps) < sum(len(tokens) - 1 for tokens in messages)


def test_a_message_ends_at_its_own_limit_and_its_row_is_removed(policy, monkeypatch):
    """Two greedy messages: the first ends after 5 tokens, and the other continues alone."""
    decoder = policy.decoder
    prompts = [[10, 11, 12], [20, 21, 22, 23]]
    limits = [5, 30]
    draws = np.zeros((2, 30))
    tokens_per_forward = record_forwards(decoder.model, monkeypatch)
    [(short, _), (long, _)] = decoder.decode(prompts, [1, 1], limits, draws, [True, True])
    assert len(short) == 5
    assert 10 < len(long) <= 30

    # The longer prompt has 4 tokens; both rows are padded to it.
    prefill, *steps = tokens_per_forward
    assert prefill == 2 * 4
    assert steps == [2] * 4 + [1] * (len(long) - 5)

    [(alone, _)] = decoder.decode(prompts[1:], [1], limits[1:], draws[1:], [True])
    assert long == alone
