"""Tests of decoding.py: random numbers, sampling, filters, the cache, messages that share rows."""

import math

import pytest
import torch
from scipy.stats import chisquare, gumbel_r, kstest
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer

from decoding import (
    GOLDEN_GAMMA,
    CacheRows,
    Decoder,
    PreallocatedLayer,
    _mix_bits,
    _smallest_in_nucleus,
    _to_gumbel,
    filter_logits,
    gumbel_noise,
    message_key,
    sample_tokens,
    uniforms,
)
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


# ---- Noise ---------------------------------------------------------------------------------------


def keys_of(count):
    return torch.tensor([message_key(*KEY, index) for index in range(count)])


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


def test_noise_is_a_function_of_key_step_and_token_alone():
    keys = keys_of(8)
    noise = gumbel_noise(keys, 3, 50)
    assert torch.equal(gumbel_noise(keys[5:6], 3, 50), noise[5:6])
    assert torch.equal(gumbel_noise(keys.flip(0), 3, 50), noise.flip(0))
    assert torch.equal(gumbel_noise(keys, 3, 7), noise[:, :7])


@pytest.mark.parametrize("key", OTHER_KEYS)
def test_another_key_has_other_noise(key):
    keys = torch.tensor([message_key(*KEY), message_key(*key)])
    noise, other = gumbel_noise(keys, 0, 3000)
    assert (noise != other).all()
    assert abs(torch.corrcoef(torch.stack([noise, other]))[0, 1]) < 0.06


def noise_along(axis):
    """Return entries that differ only in their key, their step or their token."""
    count = 20_000
    if axis == "key":
        return gumbel_noise(keys_of(count), 0, 1)[:, 0]
    if axis == "token":
        return gumbel_noise(keys_of(1), 0, count)[0]
    steps = [gumbel_noise(keys_of(1), step, 1)[0] for step in range(count // 10)]
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

    u = 2^-24, 2^-44 and 2^-53 give noise of 24, 44 and 53 times log 2.
    """
    bits = torch.tensor([2**40, 2**20, 2**11])
    by_hand = [24 * math.log(2), 44 * math.log(2), 53 * math.log(2)]
    assert _to_gumbel(bits).tolist() == pytest.approx(by_hand, abs=1e-5)
    assert _to_gumbel(torch.tensor([0, -1])).isfinite().all()  # the least and the greatest u


# ---- Sampling ------------------------------------------------------------------------------------


def sample_repeatedly(probabilities, *, greedy=False, temperature=1.0, top_k=0):
    """Sample 20,000 tokens of one distribution. Returns the tokens and their log-probabilities."""
    num = 20_000
    return sample_tokens(
        torch.log(torch.tensor([probabilities])).repeat(num, 1),
        gumbel_noise(keys_of(num), 0, len(probabilities)),
        torch.full((num,), greedy),
        temperature=temperature,
        top_k=top_k,
        top_p=1.0,
    )


def test_the_sampler_draws_from_the_distribution():
    tokens, logprobs = sample_repeatedly([0.1, 0.2, 0.3, 0.4])
    counts = tokens.bincount().numpy()
    assert chisquare(counts, [2000, 4000, 6000, 8000]).pvalue > 0.01
    assert logprobs[tokens == 1] == pytest.approx(math.log(0.2), abs=1e-6)


def test_temperature_and_top_k_change_the_draws_but_not_the_logprobs():
    """At temperature 0.5 the two likeliest have 0.3^2 : 0.4^2 = 0.36 : 0.64."""
    tokens, logprobs = sample_repeatedly([0.1, 0.2, 0.3, 0.4], temperature=0.5, top_k=2)
    counts = tokens.bincount(minlength=4).numpy()
    assert counts[:2].tolist() == [0, 0]
    assert chisquare(counts[2:], [7200, 12800]).pvalue > 0.01
    assert logprobs[tokens == 3] == pytest.approx(math.log(0.4), abs=1e-6)


def test_greedy_rows_take_the_likeliest_token():
    tokens, _ = sample_repeatedly([0.1, 0.2, 0.3, 0.4], greedy=True, temperature=0.5)
    assert tokens.eq(3).all()


# ---- Frequencies of messages ---------------------------------------------------------------------

VOCABULARY = 8
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def small_model():
    """Return a language model with random weights, whose next tokens are far from uniform."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
    )
    return Qwen2ForCausalLM(config).eval()


@torch.inference_mode()
def probabilities_of_next_token(model, token_ids, *, temperature, top_k, top_p):
    """Return the distribution by transformers' own filters, [vocabulary]."""
    logits = model(input_ids=torch.tensor([token_ids])).logits[:, -1]
    logits = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.softmax(-1)[0]


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 1.7, "top_k": 0, "top_p": 1.0},
        {"temperature": 0.7, "top_k": 0, "top_p": 0.9},
        {"temperature": 1.7, "top_k": 4, "top_p": 0.8},
    ],
    ids=["temperature", "top-p", "top-k and top-p"],
)
def test_two_sampled_tokens_have_the_frequencies_of_the_softmax(small_model, sampling):
    """p(first) * p(second | first), over 10,000 messages of one prompt."""
    # 1. Sample.
    num = 10_000
    decoder = Decoder(small_model, eos_ids={-1}, pad_id=0, **sampling)
    keys = keys_of(num).tolist()
    messages = decoder.decode([PROMPT], [num], [2] * num, keys, [False] * num)
    counts = torch.zeros((VOCABULARY, VOCABULARY))
    for (first, second), _ in messages:
        counts[first, second] += 1

    # 2. The exact probability of every pair.
    probabilities = torch.zeros((VOCABULARY, VOCABULARY), dtype=torch.float64)
    of_first = probabilities_of_next_token(small_model, PROMPT, **sampling)
    for first in range(VOCABULARY):
        of_second = probabilities_of_next_token(small_model, [*PROMPT, first], **sampling)
        probabilities[first] = of_first[first].double() * of_second.double()

    # 3. Compare: no pair outside the filters, and the others as often as they should be.
    is_possible = probabilities > 0
    assert counts[~is_possible].sum() == 0
    expected = num * probabilities[is_possible]
    observed = counts[is_possible].double()
    is_rare = expected < 5
    observed = torch.cat([observed[~is_rare], observed[is_rare].sum()[None]])
    expected = torch.cat([expected[~is_rare], expected[is_rare].sum()[None]])
    if expected[-1] == 0:
        observed, expected = observed[:-1], expected[:-1]
    assert len(expected) >= 6
    expected = expected * num / expected.sum()
    assert chisquare(observed.numpy(), expected.numpy()).pvalue > 0.01


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
    keys = [0, 1]
    tokens_per_forward = record_forwards(decoder.model, monkeypatch)
    [(short, _), (long, _)] = decoder.decode(prompts, [1, 1], limits, keys, [True, True])
    assert len(short) == 5
    assert 10 < len(long) <= 30

    # The longer prompt has 4 tokens; both rows are padded to it.
    prefill, *steps = tokens_per_forward
    assert prefill == 2 * 4
    assert steps == [2] * 4 + [1] * (len(long) - 5)

    [(alone, _)] = decoder.decode(prompts[1:], [1], limits[1:], keys[1:], [True])
    assert long == alone
