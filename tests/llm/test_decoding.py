"""Tests of decoding.py: random numbers, the sampler, shared and refilled rows, `generate`."""

import math
import time
from contextlib import contextmanager
from itertools import islice

import pytest
import torch
from scipy.stats import chisquare, gumbel_r, kstest
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from llm.decoding import (
    BLOCK_SIZE,
    SHARE_WORTH_KEEPING,
    Decoder,
    Draft,
    PreallocatedLayer,
    gumbel_noise,
    make_warpers,
    message_key,
    sample_tokens,
    uniforms,
)
from support.flags import InputError

# ---- Random numbers ------------------------------------------------------------------------------


def keys_of(count):
    """Return the keys of so many messages of one prompt: seed, problem, path, candidate."""
    return torch.tensor([message_key(0, "p", (0, 1), index) for index in range(count)])


def test_the_keys_are_those_of_earlier_runs():
    """Another key gives other messages, and a journal would mix both."""
    assert message_key(0, "p", (0, 1), 2) == 4132359778552634624
    assert uniforms(2, 0, "p", (0, 1)).tolist() == [0.980234034495447, 0.0819247099945386]


def splitmix64(seed, index):
    """Return output `index`, counted from 0, of the generator with this seed, in Python's integers.

    From the published C code, apart from torch's signed integers.
    """
    number = (seed + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    number = (number ^ (number >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    number = (number ^ (number >> 27)) * 0x94D049BB133111EB % 2**64
    return number ^ (number >> 31)


@pytest.mark.parametrize("token_ids", [[0, 1, 2000], [[7, 8], [151_000, 3], [0, 5]]])
def test_noise_is_splitmix64_over_steps_and_over_the_tokens_of_each_step(token_ids):
    """So it is a function of key, step and token alone."""
    assert splitmix64(1234567, 0) == 6457827717110365317  # the published first outputs
    assert splitmix64(1234567, 4) == 16408922859458223821
    keys, steps, token_ids = [1234567, -7, 2**63 - 1], [0, 5, 300], torch.tensor(token_ids)
    noise = gumbel_noise(torch.tensor(keys), torch.tensor(steps), token_ids)
    for row, tokens in enumerate(token_ids.expand(3, -1).tolist()):
        seed = splitmix64(keys[row], steps[row])
        for token, number in zip(tokens, noise[row].tolist(), strict=True):
            uniform = (splitmix64(seed, token) >> 11) / 2**53
            assert number == pytest.approx(-math.log(-math.log(1 - uniform)), abs=1e-5)


def test_noise_is_exact_for_rare_tokens_too_and_finite():
    """Near 1, float32 numbers are 6e-8 apart: log(1 - u) must not be computed as it stands."""
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), torch.arange(3_000_000))[0]
    assert noise.isfinite().all()
    for token in noise.topk(20).indices.tolist():
        uniform = (splitmix64(splitmix64(0, 0), token) >> 11) / 2**53
        assert noise[token].item() == pytest.approx(-math.log(-math.log1p(-uniform)), abs=1e-5)
    assert noise.max() > 14
    # Bits of 0 are taken for u = 2^-54. SplitMix64 gives them for a sum of 0 modulo 2^64.
    token = (-splitmix64(0, 0) * pow(0x9E3779B97F4A7C15, -1, 2**64) - 1 + 2**63) % 2**64 - 2**63
    noise = gumbel_noise(torch.tensor([0]), torch.tensor([0]), torch.tensor([token]))
    assert noise.item() == pytest.approx(54 * math.log(2))


@pytest.mark.parametrize("axis", ["key", "step", "token"])
def test_noise_is_gumbel_and_independent_along_every_axis(axis):
    num = 20_000
    keys = keys_of(num) if axis == "key" else keys_of(1)
    steps = torch.arange(num if axis == "step" else 1)
    token_ids = torch.arange(num if axis == "token" else 1)
    noise = gumbel_noise(keys, steps, token_ids).flatten()
    assert kstest(noise.numpy(), gumbel_r.cdf).pvalue > 0.01
    # Neighbours, and entries at other distances, are not correlated.
    for distance in (1, 2, 16, 256):
        pairs = torch.stack([noise[:-distance], noise[distance:]])
        assert abs(torch.corrcoef(pairs)[0, 1]) < 4 / math.sqrt(num)


# ---- The sampler ---------------------------------------------------------------------------------

VOCABULARY = 3000  # two blocks of BLOCK_SIZE tokens, and one of 952


def sample(logits, *, keys, rows=None, steps=None, greedy=None, **sampling):
    """Sample a token per key; by default from its own row, at step 0, with nothing changed."""
    num = len(keys)
    return sample_tokens(
        logits,
        torch.arange(num) if rows is None else rows,
        keys,
        torch.zeros(num, dtype=torch.long) if steps is None else steps,
        torch.zeros(num, dtype=torch.bool) if greedy is None else greedy,
        warpers=make_warpers(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling),
    )


def assert_frequencies(counts, probabilities):
    """Assert that outcomes are as frequent as they should be. Rare ones count as one outcome."""
    expected = counts.sum() * probabilities.double() / probabilities.double().sum()
    assert counts[expected == 0].sum() == 0
    is_common = expected >= 5
    observed = torch.cat([counts[is_common], counts[~is_common].sum()[None]])
    expected = torch.cat([expected[is_common], expected[~is_common].sum()[None]])
    keep = expected > 0
    assert keep.sum() == 1 or chisquare(observed[keep], expected[keep]).pvalue > 0.01


def test_every_message_is_drawn_from_the_distribution_of_its_own_row():
    """Row 0 has tokens 0 and 1 only, row 1 tokens 2 to 5, row 2 is not read."""
    probs = torch.tensor([[0.5, 0.5, 0, 0, 0, 0], [0, 0, 0.4, 0.3, 0.2, 0.1], [1.0] * 6])
    rows = torch.arange(20_000) % 4 // 3  # three messages of row 0, one of row 1
    tokens, logprobs = sample(probs.log(), keys=keys_of(20_000), rows=rows)
    for row in (0, 1):
        assert_frequencies(tokens[rows == row].bincount(minlength=6), probs[row])
    assert logprobs.tolist() == pytest.approx(probs[rows, tokens].log().tolist(), abs=1e-6)


FILTERS = [  # settings, and what is drawn if the model says 0.1, 0.2, 0.3, 0.4
    ({"temperature": 0.5}, [1 / 30, 4 / 30, 9 / 30, 16 / 30]),
    ({"top_k": 1}, [0, 0, 0, 1]),
    ({"top_k": 9}, [0.1, 0.2, 0.3, 0.4]),
    ({"top_k": 2, "temperature": 0.5}, [0, 0, 0.36, 0.64]),
    ({"top_p": 0.45}, [0, 0, 3 / 7, 4 / 7]),
    ({"top_p": 0.35}, [0, 0, 0, 1]),
    ({"top_p": 0.8, "temperature": 0.5}, [0, 0, 0.36, 0.64]),  # 0.53 and 0.3; three without
    ({"top_p": 0.5, "top_k": 2}, [0, 0, 0, 1]),  # 4/7 of what top-k leaves
]


@pytest.mark.parametrize("sampling, drawn", FILTERS)
def test_temperature_top_k_and_top_p_change_the_draws_but_not_the_logprobs(sampling, drawn):
    """Two of the tokens are in the first block, which must not share its noise with a token."""
    probs = torch.zeros(1, VOCABULARY)
    probs[0, [0, 1, 1500, 2900]] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    rows = torch.zeros(8000, dtype=torch.long)
    tokens, logprobs = sample(probs.log(), keys=keys_of(8000), rows=rows, **sampling)
    assert_frequencies(tokens.bincount(minlength=VOCABULARY)[probs[0] > 0], torch.tensor(drawn))
    assert logprobs.tolist() == pytest.approx(probs[0, tokens].log().tolist(), abs=1e-6)


@pytest.mark.parametrize("logits", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("greedy", [True, False])
def test_logits_without_a_distribution_are_refused(logits, greedy):
    """An argmax would be some token."""
    sample(torch.tensor([[0.0, -math.inf]]), keys=keys_of(1), greedy=torch.tensor([greedy]))
    with pytest.raises(InputError, match="--model"):
        sample(torch.tensor([logits]), keys=keys_of(1), greedy=torch.tensor([greedy]))


def test_tokens_of_all_blocks_are_drawn_as_often_as_they_should_be():
    """Tokens of one block differ 20 times in probability."""
    num = 8_000
    logits = torch.linspace(-1.5, 1.5, BLOCK_SIZE).repeat(3)[:VOCABULARY]
    logits[BLOCK_SIZE:] += 1
    rows = torch.zeros(num, dtype=torch.long)
    tokens, _ = sample(logits[None], keys=keys_of(num), rows=rows, steps=torch.arange(num) % 100)
    counts = tokens.bincount(minlength=VOCABULARY).view(100, 30).sum(-1)
    assert_frequencies(counts, logits.double().softmax(-1).view(100, 30).sum(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_token_does_not_depend_on_the_rows_that_are_sampled_together(top_p, dtype):
    """Logits of any type are sampled in float32, of so many rows not all at once."""
    logits = 2 * torch.randn((800, VOCABULARY), generator=torch.Generator().manual_seed(0))
    logits, sampling = logits.to(dtype), {"temperature": 0.9, "top_p": top_p}
    keys, steps = keys_of(800), torch.arange(800)
    tokens, logprobs = sample(logits, keys=keys, steps=steps, **sampling)
    for part in (slice(0, 1), slice(5, 6), slice(690, 800)):
        some = sample(logits[part].float(), keys=keys[part], steps=steps[part], **sampling)
        assert torch.equal(some[0], tokens[part])
        assert some[1].tolist() == pytest.approx(logprobs[part].tolist())


# ---- Models --------------------------------------------------------------------------------------

SMALL = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
WINDOW = 6  # shorter than prompts and messages
CONFIGS = {
    "Qwen2": Qwen2Config(**SMALL),
    "Llama": LlamaConfig(**SMALL),
    "Mistral, windows": MistralConfig(**SMALL, sliding_window=WINDOW),
    "Gemma2, every second layer with a window": Gemma2Config(
        **SMALL, head_dim=8, sliding_window=WINDOW
    ),
    "GPT-2, absolute positions": GPT2Config(
        vocab_size=40, n_positions=120, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3
    ),
}
PROMPTS = [[5, 17], [8, 3, 9, 11, 30, 2, 25, 7], [1], [39, 4, 4, 20], [12, 13, 5, 26, 6]]


def make_model(config):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    return make_model(CONFIGS[request.param])


@pytest.fixture(scope="module")
def qwen():
    return make_model(CONFIGS["Qwen2"])


def make_decoder(model, *, eos_ids=(0,), **sampling):
    sampling = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling
    return Decoder(model, eos_ids=set(eos_ids), pad_id=7, **sampling)


def groups_of(prompts, limits, *, repeats=None, keys=None, greedy=None):
    """Return the messages of each prompt; by default one, sampled, with the keys 0, 1, ..."""
    places = iter(range(len(limits)))
    groups = []
    for prompt, num in zip(prompts, repeats or [1] * len(limits), strict=True):
        groups.append([])
        for place in islice(places, num):
            key = keys[place] if keys else place
            is_greedy = bool(greedy and greedy[place])
            groups[-1].append(Draft(place, prompt, limits[place], key, is_greedy))
    return groups


def decode(decoder, prompts, *, limits, batch_tokens=10**9, **settings):
    """Decode messages. Returns (token ids, log-probabilities) of each, in their order."""
    groups = groups_of(prompts, limits, **settings)
    ended = sorted(decoder.decode(groups, batch_tokens=batch_tokens), key=lambda m: m.place)
    assert [message.place for message in ended] == list(range(len(limits)))
    return [(message.tokens, message.logprobs) for message in ended]


@contextmanager
def recorded(model, look):
    """Collect what `look` finds in the arguments of each forward of the model."""
    found = []

    def hook(_, args, arguments):
        found.append(look(arguments))

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


# ---- Against the model itself --------------------------------------------------------------------


def test_greedy_messages_equal_those_of_generate(model):
    """Prompts of several lengths, together and refilled. The cache has no room for the longest."""
    decoder = make_decoder(model.train())  # which turns dropout off
    limit = PreallocatedLayer.SPARE_COLUMNS + 20
    config = GenerationConfig(max_new_tokens=limit, eos_token_id=0, pad_token_id=7, do_sample=False)
    expected = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected.append(output[0, len(prompt) :].tolist())
    assert max(map(len, expected)) == limit

    settings = {"limits": [limit] * 5, "greedy": [True] * 5}
    for batch_tokens in (5 * (8 + limit), 2 * (8 + limit)):
        messages = decode(decoder, PROMPTS, batch_tokens=batch_tokens, **settings)
        assert [tokens for tokens, _ in messages] == expected


def test_a_message_alone_equals_the_message_in_any_batch(model):
    """Messages that begin alike, branch and end at many steps, all together and refilled.

    Their log-probabilities are those of one forward over the prompt and the message.
    """
    repeats = [3, 1, 4, 2, 3]
    num = sum(repeats)
    limits = [2 + 11 * number % 40 for number in range(num)]
    greedy = [number % 4 == 1 for number in range(num)]
    # Few tokens are likely, so that messages have common beginnings; some tokens end them.
    decoder = make_decoder(model, eos_ids=range(0, 40, 9), temperature=0.7, top_k=3)
    settings = {"repeats": repeats, "limits": limits, "greedy": greedy}
    together = decode(decoder, PROMPTS, **settings)
    first_two = {tuple(tokens[:2]) for tokens, _ in together}
    assert len(PROMPTS) < len(first_two) < num

    for capacity in (1, 2, 5):
        refilled = decode(decoder, PROMPTS, batch_tokens=capacity * (8 + 41), **settings)
        assert [tokens for tokens, _ in refilled] == [tokens for tokens, _ in together]
        for (_, logprobs), (_, expected) in zip(refilled, together, strict=True):
            assert logprobs == pytest.approx(expected, abs=1e-4)

    prompt_of_message = sum(([prompt] * n for prompt, n in zip(PROMPTS, repeats, strict=True)), [])
    for index, (tokens, logprobs) in enumerate(together):
        prompt = prompt_of_message[index]
        alone = decode(
            decoder, [prompt], limits=[limits[index]], keys=[index], greedy=[greedy[index]]
        )
        assert alone[0][0] == tokens
        assert len(tokens) == limits[index] or tokens[-1] % 9 == 0
        assert all(token % 9 > 0 for token in tokens[:-1])
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
        expected = logits.log_softmax(-1)[torch.arange(len(tokens)), tokens]
        assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_a_message_that_has_filled_the_context_does_not_stop_the_others():
    """Its row is still read for a while, and GPT-2 has no more positions."""
    decoder = make_decoder(make_model(CONFIGS["GPT-2, absolute positions"]), eos_ids=())
    prompts, limits = [[3] * 117, *PROMPTS * 2], [3] + [30] * 10
    messages = decode(decoder, prompts, limits=limits)
    assert messages[1][0] == decode(decoder, prompts[1:2], limits=[30], keys=[1])[0][0]
    assert [len(tokens) for tokens, _ in messages] == limits


# ---- The rows of the cache -----------------------------------------------------------------------


@pytest.mark.parametrize("greedy", [True, False])
def test_messages_of_one_prompt_are_computed_once_while_they_are_equal(qwen, greedy):
    """The model reads the prompt once, and each distinct beginning of its messages once.

    It reads a little more than that, because rows of ended messages are not removed at once.
    """
    decoder = make_decoder(qwen, eos_ids=[40], temperature=0.5, top_k=2)
    with recorded(qwen, lambda a: a["input_ids"].numel()) as tokens_per_forward:
        messages = decode(
            decoder, PROMPTS[1:2], repeats=[8], limits=list(range(12, 20)), greedy=[greedy] * 8
        )
    prefill, *steps = tokens_per_forward
    beginnings = set()
    for tokens, _ in messages:
        beginnings.update(tuple(tokens[:end]) for end in range(1, len(tokens)))
    assert prefill == len(PROMPTS[1])
    assert (len(beginnings) == 18) == greedy
    assert len(beginnings) <= sum(steps) <= len(beginnings) / SHARE_WORTH_KEEPING
    assert sum(steps) < 0.9 * sum(range(11, 19))


def test_rows_of_messages_that_have_ended_are_given_to_others(qwen):
    """Four long messages and 36 short ones in a batch of eight: steps of few rows are the last."""
    limits = [30 if number % 10 == 0 else 3 for number in range(40)]
    prompts = [[3, number] for number in range(40)]
    decoder = make_decoder(qwen, eos_ids=[40])
    with recorded(qwen, lambda a: a["input_ids"].shape) as shapes:
        decode(decoder, prompts, limits=limits, batch_tokens=8 * 32)
    live_rows = [rows for rows, columns in shapes if columns == 1]
    # 4 x 29 and 36 x 2 rows are read after the prompts: 23.5 steps if each had eight.
    assert sum(live_rows) >= 4 * 29 + 36 * 2
    assert len(live_rows) < 60  # batch after batch: 4 x 29 + 2
    assert max(live_rows) <= 8


@pytest.mark.parametrize("name", ["Qwen2", "Mistral, windows"])
def test_the_cache_stays_within_its_limit(name):
    """Long prompts with short messages beside short prompts with long messages."""
    model = make_model(CONFIGS[name])
    prompts = [PROMPTS[1] * 3, *PROMPTS * 4]
    limits = [4] + [30] * 20
    decoder = make_decoder(model, eos_ids=[40])
    batch_tokens = 6 * (24 + 30)
    with recorded(model, lambda a: a["attention_mask"].numel()) as sizes:
        decode(decoder, prompts, limits=limits, batch_tokens=batch_tokens)
    assert batch_tokens / 2 < max(sizes) <= batch_tokens


# ---- What is reported ----------------------------------------------------------------------------


def test_a_message_takes_its_share_of_the_seconds_of_its_steps(qwen):
    """A message of more steps takes longer; together they take all the time of the model."""
    groups = groups_of(PROMPTS, [2, 20, 3, 9, 5])
    with recorded(qwen, lambda _: time.sleep(0.01)) as forwards:
        start = time.perf_counter()
        messages = list(make_decoder(qwen, eos_ids=[40]).decode(groups, batch_tokens=3 * 28))
        elapsed = time.perf_counter() - start
    seconds = [message.seconds for message in messages]
    assert 0.01 * len(forwards) <= sum(seconds) <= elapsed
    assert min(seconds) > 0.006 and groups[1][0].seconds == max(seconds)


def test_messages_that_have_ended_are_known_before_memory_runs_out(qwen):
    def run_out_of_memory(arguments):
        if arguments["input_ids"].shape[1] == 1:
            raise torch.OutOfMemoryError("no room")

    messages = make_decoder(qwen).decode(groups_of(PROMPTS[:2], [1, 5]), batch_tokens=999)
    with recorded(qwen, run_out_of_memory):
        assert next(messages).place == 0
        with pytest.raises(torch.OutOfMemoryError):
            next(messages)
