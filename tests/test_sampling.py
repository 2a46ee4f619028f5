"""Tests of sampling.py: random numbers, tokens, filters."""

import math

import pytest
import torch
from conftest import keys_of
from scipy.stats import chisquare, gumbel_r, kstest
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llm import sampling
from llm.decoding import (
    GOLDEN_GAMMA,
    _mix_bits,
    _smallest_in_nucleus,
    _to_gumbel,
    filter_logits,
    gumbel_noise,
    message_key,
    sample_tokens,
    uniforms,
)

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


def test_the_keys_are_those_of_earlier_runs():
    """Another key gives other messages, and a journal would mix both."""
    assert message_key(*KEY) == 4132359778552634624
    assert uniforms(2, 0, "p", (0, 1)).tolist() == [0.980234034495447, 0.0819247099945386]


# ---- Noise ---------------------------------------------------------------------------------------


def test_the_bits_are_those_of_splitmix64():
    """The first outputs of the published generator for the seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    counters = torch.arange(1, 6)
    bits = _mix_bits(1234567 + counters * GOLDEN_GAMMA)
    assert [number % 2**64 for number in bits.tolist()] == published


def splitmix64(seed, index):
    """Return output `index`, counted from 0, of the generator with this seed, in Python's integers.

    From the published C code, apart from torch's signed integers.
    """
    number = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


def test_noise_is_that_of_a_stream_over_steps_and_of_one_over_tokens_at_each_step():
    keys = torch.tensor([1234567, -7])
    for step in (0, 5):
        noise = gumbel_noise(keys, step, torch.arange(3))
        for row, key in enumerate(keys.tolist()):
            for token in range(3):
                bits = splitmix64(splitmix64(key, step), token)
                uniform = (bits >> 11) / 2**53
                by_hand = -math.log(-math.log(1 - uniform))
                assert noise[row, token].item() == pytest.approx(by_hand, abs=1e-5)


def test_noise_is_a_function_of_key_step_and_token_alone():
    keys = keys_of(8)
    token_ids = torch.arange(50)
    noise = gumbel_noise(keys, 3, token_ids)
    assert torch.equal(gumbel_noise(keys[5:6], 3, token_ids), noise[5:6])
    assert torch.equal(gumbel_noise(keys.flip(0), 3, token_ids), noise.flip(0))
    assert torch.equal(gumbel_noise(keys, 3, torch.tensor([49, 7])), noise[:, [49, 7]])
    token_of_each = torch.arange(8)[:, None] * 6
    assert torch.equal(gumbel_noise(keys, 3, token_of_each), noise.gather(1, token_of_each))


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_another_key_has_other_noise(key):
    keys = torch.tensor([message_key(*KEY), message_key(*key)])
    noise, other = gumbel_noise(keys, 0, torch.arange(3000))
    assert (noise != other).all()
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.06


def noise_along(axis):
    """Return entries that differ only in their key, their step or their token."""
    count = 20_000
    first_token = torch.tensor([0])
    if axis == "key":
        return gumbel_noise(keys_of(count), 0, first_token)[:, 0]
    if axis == "token":
        return gumbel_noise(keys_of(1), 0, torch.arange(count))[0]
    steps = [gumbel_noise(keys_of(1), step, first_token)[0] for step in range(count // 10)]
    return torch.cat(steps)


@pytest.mark.parametrize("axis", ["key", "step", "token"])
def test_noise_is_gumbel_and_independent_along_every_axis(axis):
    noise = noise_along(axis)
    assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 0.01
    # Neighbours, and entries at other distances, are not correlated.
    for distance in (1, 2, 16, 256):
        pairs = torch.stack([noise[:-distance], noise[distance:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(len(noise))


def test_the_noise_is_exact_in_the_tail_and_finite():
    """A token of probability p is chosen by noise of about log(1 / p): rare tokens need the tail.

    u = 2^-24, 2^-44 and 2^-53 give noise of 24, 44 and 53 times log 2. The least u, which is 0, is
    taken for 2^-54; the greatest is taken for 1 - 2^-24, the last float32 before 1.
    """
    bits = torch.tensor([2**40, 2**20, 2**11, 0])
    by_hand = [24 * math.log(2), 44 * math.log(2), 53 * math.log(2), 54 * math.log(2)]
    assert _to_gumbel(bits).tolist() == pytest.approx(by_hand, abs=1e-5)
    [of_the_greatest] = _to_gumbel(torch.tensor([-1])).tolist()
    assert of_the_greatest == pytest.approx(-math.log(24 * math.log(2)), abs=1e-5)


# ---- Sampling ------------------------------------------------------------------------------------


def sample_repeatedly(probabilities, *, greedy=False, temperature=1.0, top_k=0):
    """Sample 20,000 tokens of one distribution. Returns the tokens and their log-probabilities."""
    num = 20_000
    return sample_tokens(
        torch.log(torch.tensor([probabilities])),
        torch.zeros(num, dtype=torch.long),
        keys_of(num),
        torch.zeros(num, dtype=torch.long),
        torch.full((num,), greedy),
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
    )


def test_the_sampler_draws_from_the_distribution(block_size):
    tokens, logprobs = sample_repeatedly([0.1, 0.2, 0.25, 0.05, 0.4])
    counts = tokens.bincount().numpy()
    assert chisquare(counts, [2000, 4000, 5000, 1000, 8000]).pvalue > 0.01
    assert logprobs[tokens == 1] == pytest.approx(math.log(0.2), abs=1e-6)
    assert logprobs[tokens == 3] == pytest.approx(math.log(0.05), abs=1e-6)


def test_every_message_is_sampled_from_its_own_row(block_size):
    """Row 0 has tokens 0 and 1 only, row 1 tokens 2 to 5, row 2 is not read."""
    probabilities = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.4, 0.3, 0.2, 0.1], [1.0] * 6])
    num = 8_000
    row_of_message = torch.arange(num) % 4 // 3  # three messages of row 0, one of row 1
    tokens, logprobs = sample_tokens(
        probabilities.log(),
        row_of_message,
        keys_of(num),
        torch.full((num,), 7),
        torch.zeros(num, dtype=torch.bool),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    counts = tokens[row_of_message == 0].bincount(minlength=6).numpy()
    assert counts[2:].tolist() == [0] * 4
    assert chisquare(counts[:2], [3000, 3000]).pvalue > 0.01
    counts = tokens[row_of_message == 1].bincount(minlength=6).numpy()
    assert counts[:2].tolist() == [0, 0]
    assert chisquare(counts[2:], [800, 600, 400, 200]).pvalue > 0.01
    expected = probabilities[row_of_message, tokens].log()
    assert logprobs.tolist() == pytest.approx(expected.tolist(), abs=1e-6)


def large_vocabulary():
    """Return logits of 800 rows: together they have more entries than are worked on at once."""
    logits = 2 * torch.randn((800, 3000), generator=torch.Generator().manual_seed(0))
    assert logits.numel() > 2**21
    return logits


def sample_large(logits, keys, *, top_p=1.0):
    rows = torch.arange(len(logits))
    greedy = torch.zeros(len(logits), dtype=torch.bool)
    return sample_tokens(logits, rows, keys, rows, greedy, temperature=1.0, top_k=0, top_p=top_p)


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_token_does_not_depend_on_the_rows_that_are_sampled_together(top_p):
    logits, keys = large_vocabulary(), keys_of(800)
    tokens, logprobs = sample_large(logits, keys, top_p=top_p)
    for row in (0, 5, 698, 699, 799):
        alone, alone_logprob = sample_tokens(
            logits[row : row + 1],
            torch.tensor([0]),
            keys[row : row + 1],
            torch.tensor([row]),
            torch.tensor([False]),
            temperature=1.0,
            top_k=0,
            top_p=top_p,
        )
        assert alone == tokens[row]
        assert alone_logprob.item() == pytest.approx(logprobs[row].item(), abs=1e-5)
        assert logprobs[row].item() == pytest.approx(
            logits[row].log_softmax(-1)[tokens[row]].item(), abs=1e-5
        )


def test_only_differences_of_logits_count():
    """Nothing is drawn from what is missing in the last block."""
    logits, keys = large_vocabulary(), keys_of(800)
    tokens, _ = sample_large(logits, keys)
    shifted_tokens, _ = sample_large(logits.double() - 1000, keys)
    assert (tokens == shifted_tokens).float().mean() > 0.99
    assert shifted_tokens.max() < 3000


def test_tokens_of_all_blocks_are_drawn_as_often_as_they_should_be():
    """The last block has 452 tokens. Tokens of one block differ 20 times in probability."""
    num, vocabulary = 20_000, 2500
    logits = torch.linspace(-1.5, 1.5, 1024).repeat(3)[:vocabulary]
    logits[1024:] += 1
    tokens, _ = sample_tokens(
        logits[None],
        torch.zeros(num, dtype=torch.long),
        keys_of(num),
        torch.arange(num) % 100,
        torch.zeros(num, dtype=torch.bool),
        temperature=1.0,
        top_k=0,
        top_p=1.0,
    )
    groups = torch.arange(vocabulary) // 25
    observed = torch.zeros(100).index_add(0, groups, tokens.bincount(minlength=vocabulary).float())
    expected = torch.zeros(100).index_add(0, groups, num * logits.softmax(-1))
    expected *= num / expected.sum()
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01


def test_a_token_is_the_best_of_its_block_and_its_block_the_best_of_all():
    """Another batch, or rounding, changes it only if two scores are that close."""
    logits, keys, steps = large_vocabulary(), keys_of(800), torch.arange(800)
    tokens, _ = sample_large(logits, keys)

    scores_of_blocks = []
    for number, block in enumerate(logits.split(1024, dim=-1)):
        noise = gumbel_noise(keys, steps, torch.tensor([3000 + number]))[:, 0]
        scores_of_blocks.append(block.exp().sum(-1).log() + noise)
    best_block = torch.stack(scores_of_blocks, dim=-1).argmax(-1)
    assert best_block.unique().tolist() == [0, 1, 2]

    is_in_block = torch.arange(3000) // 1024 == best_block[:, None]
    scores = logits + gumbel_noise(keys, steps, torch.arange(3000))
    assert torch.equal(tokens, scores.masked_fill(~is_in_block, -math.inf).argmax(-1))


def test_greedy_messages_take_the_likeliest_token_of_their_row_in_every_part():
    logits, keys, rows = large_vocabulary(), keys_of(800), torch.arange(800)
    greedy = rows % 4 == 0
    filters = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    tokens, _ = sample_tokens(logits, rows, keys, rows, greedy, **filters)
    sampled, _ = sample_large(logits, keys)
    assert torch.equal(tokens, torch.where(greedy, logits.argmax(-1), sampled))
    assert not torch.equal(tokens, sampled)


@pytest.mark.parametrize("vocabulary, num_drawn", [(640, 640 + 1), (151_936, 1024 + 149)])
def test_noise_is_drawn_for_blocks_and_for_the_tokens_of_one_block_only(
    vocabulary, num_drawn, monkeypatch
):
    drawn = []
    original = sampling.gumbel_noise

    def look(keys, steps, token_ids):
        noise = original(keys, steps, token_ids)
        drawn.append(noise.shape[-1])
        return noise

    monkeypatch.setattr(sampling, "gumbel_noise", look)
    sample_large(torch.zeros(2, vocabulary), keys_of(2))
    assert sum(drawn) == num_drawn


def test_a_vocabulary_of_one_block_is_sampled_by_the_argmax_of_logits_and_noise():
    logits, keys, steps = large_vocabulary()[:, :1024], keys_of(800), torch.arange(800)
    tokens, _ = sample_large(logits, keys)
    assert torch.equal(tokens, (logits + gumbel_noise(keys, steps, torch.arange(1024))).argmax(-1))


def test_logits_in_bfloat16_are_filtered_and_normalised_in_float32():
    logits = large_vocabulary()[:50].bfloat16()
    tokens, logprobs = sample_large(logits, keys_of(50), top_p=0.95)
    expected_tokens, expected_logprobs = sample_large(logits.float(), keys_of(50), top_p=0.95)
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(logprobs, expected_logprobs)


def test_temperature_and_top_k_change_the_draws_but_not_the_logprobs(block_size):
    """At temperature 0.5 the two likeliest have 0.3^2 : 0.4^2 = 0.36 : 0.64."""
    tokens, logprobs = sample_repeatedly([0.1, 0.2, 0.3, 0.4], temperature=0.5, top_k=2)
    counts = tokens.bincount(minlength=4).numpy()
    assert counts[:2].tolist() == [0, 0]
    assert chisquare(counts[2:], [7200, 12800]).pvalue > 0.01
    assert logprobs[tokens == 3] == pytest.approx(math.log(0.4), abs=1e-6)


def test_greedy_messages_take_the_likeliest_token(block_size):
    tokens, _ = sample_repeatedly([0.1, 0.2, 0.3, 0.4], greedy=True, temperature=0.5)
    assert tokens.eq(3).all()


# ---- Filters -------------------------------------------------------------------------------------

FILTERS = [  # top-k, top-p, standard deviation of the logits
    (0, 0.9, 1.0),
    (0, 0.9, 5.0),
    (1, 1.0, 1.0),
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


def test_top_p_of_one_keeps_every_token_however_unlikely():
    """In float32 the others reach 1 before the last one."""
    logits = torch.tensor([[0.0, -1.0, -50.0]])
    assert torch.equal(filter_logits(logits, temperature=1.0, top_k=0, top_p=1.0), logits)


NUCLEI = [  # probabilities, top-p, and the probability of the least likely token in the nucleus
    ([0.5, 0.25, 0.25], 0.4, 0.5),
    ([0.5, 0.25, 0.25], 0.5, 0.5),  # the first token reaches top-p exactly
    ([0.25, 0.5, 0.25], 0.625, 0.25),
    ([0.5, 0.25, 0.125, 0.125], 0.75, 0.25),
    ([0.5, 0.25, 0.125, 0.125], 0.8125, 0.125),
]


@pytest.mark.parametrize("probabilities, top_p, smallest", NUCLEI)
def test_the_nucleus_ends_with_the_token_that_reaches_top_p(probabilities, top_p, smallest):
    result = _smallest_in_nucleus(torch.tensor([probabilities]), top_p)
    assert result.tolist() == [[smallest]]


def test_the_whole_vocabulary_is_sorted_only_if_1024_tokens_do_not_reach_top_p(monkeypatch):
    sorted_tokens = []
    original_topk = torch.Tensor.topk

    def recorded_topk(probs, k):
        sorted_tokens.append(k)
        return original_topk(probs, k)

    monkeypatch.setattr(torch.Tensor, "topk", recorded_topk)
    uniform = torch.full((2, 2048), 2.0**-11)
    assert _smallest_in_nucleus(uniform, 0.5).tolist() == [[2.0**-11]] * 2
    assert sorted_tokens == [1024]  # they reach 0.5 exactly

    # Half of the second row is outside its likeliest 1,024 tokens, and one of those has 2 ** -12.
    mixed = uniform.clone()
    mixed[0] = 0.0
    mixed[0, 7] = 1.0
    mixed[1, 0] = 1.5 * 2.0**-11
    mixed[1, 1] = 0.5 * 2.0**-11
    sorted_tokens.clear()
    assert _smallest_in_nucleus(mixed, 0.9999).tolist() == [[1.0], [0.5 * 2.0**-11]]
    assert sorted_tokens == [1024, 2048]


def test_as_many_rows_are_sampled_at_once_as_fit_into_two_million_entries(monkeypatch):
    """One by one would take a kernel launch each; all together, memory of their size."""
    parts = []
    original = sampling._sample_tokens

    def look(logits, *args, **filters):
        parts.append(len(logits))
        return original(logits, *args, **filters)

    monkeypatch.setattr(sampling, "_sample_tokens", look)
    sample_large(torch.zeros(1500, 2000), keys_of(1500))
    assert parts == [1048, 452]
    assert sampling._rows_at_once(torch.empty(1, 200_000, device="meta")) == 2**26 // 200_000
    assert sampling._rows_at_once(torch.empty(1, 2**22)) == 1
