"""Tests of decoding.py: frequencies of messages, shared rows, batches and refilling, memory."""

import pytest
import torch
from conftest import PROMPT, VOCABULARY, keys_of, make_decoder
from scipy.stats import chisquare
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llm.decoding import CacheRows, Decoder, MessageQueue
from tasks.problems import load_problems
from tree import Sample, make_root

# ---- Frequencies of messages ---------------------------------------------------------------------


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
def test_two_sampled_tokens_have_the_frequencies_of_the_softmax(small_model, sampling, block_size):
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

    def recorded_decode(*args, **options):
        decoded = decode(*args, **options)
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


# ---- Which messages are decoded together ---------------------------------------------------------


def started(queue, live=()):
    """Start messages beside the live ones. Returns the indices of those started."""
    return [index for part in queue.take(list(live)) for index in part.messages]


def make_queue(batch_tokens, sizes_of_prompts, *, is_resizable=True):
    """Make a queue of prompts of ten tokens: a list of the limits of its messages for each."""
    prompts = [[1] * 10] * len(sizes_of_prompts)
    limits = [limit for limits in sizes_of_prompts for limit in limits]
    repeats = list(map(len, sizes_of_prompts))
    return MessageQueue(prompts, repeats, limits, batch_tokens, is_resizable=is_resizable)


def test_a_batch_holds_as_many_messages_as_its_tokens_allow():
    """Messages x (prompt + limit) of the longest is at most `batch_tokens`. Here: 10 + 20."""
    prompts = [[20] * 3] * 4
    assert started(make_queue(12 * 30, prompts)) == list(range(12))
    assert started(make_queue(12 * 30 - 1, prompts)) == list(range(9))
    assert started(make_queue(None, prompts)) == list(range(12))
    queue = make_queue(12 * 30, [[5] * 3, [20] * 3, [5] * 7])
    assert started(queue) == list(range(6))  # 13 x 30 would be too much, though 13 x 15 is not
    assert queue.max_width == 30


def test_messages_of_a_prompt_stay_together_unless_they_need_more_than_a_batch():
    queue = make_queue(9 * 30, [[20], [20] * 5, [20] * 4])
    assert started(queue) == list(range(6))
    assert started(queue, live=[0, 1, 2, 3, 4, 5]) == []  # there is room for three of the four
    assert started(queue, live=[1, 2, 3, 4, 5]) == [6, 7, 8, 9]
    assert started(queue) == []

    queue = make_queue(3 * 30, [[20] * 8])
    assert [started(queue) for _ in range(4)] == [[0, 1, 2], [3, 4, 5], [6, 7], []]
    queue = make_queue(1, [[20] * 2, [20]])
    assert [started(queue) for _ in range(4)] == [[0], [1], [2], []]  # one always fits


def test_the_longest_of_the_live_messages_counts_too():
    queue = make_queue(100, [[40], [10], [10], [10], [10]])
    assert started(queue) == [0, 1]  # 2 x 50
    assert queue.max_width == 50
    assert started(queue, live=[0]) == [2]
    assert started(queue, live=[1, 2]) == [3, 4]  # 4 x 20
    assert queue.max_width == 20


def test_prompts_are_added_when_a_fifth_of_the_batch_is_free():
    queue = make_queue(10 * 30, [[20]] * 30)
    assert len(started(queue)) == 10
    assert [queue.has_room(num_live) for num_live in (10, 9, 8, 0)] == [False, False, True, True]
    for _ in range(2):
        started(queue)
    assert not queue.has_room(0)  # nothing waits


# ---- Refilling: prompts that take the rows of messages that have ended ---------------------------


def test_without_alignment_the_longest_prompt_and_the_largest_limit_count():
    """They can belong to different messages: 8 + 20 columns, where 18 and 22 are used."""
    prompts = [[1] * 8, [1] * 2]
    for is_resizable, num_together in ((True, 2), (False, 1)):
        queue = MessageQueue(prompts, [1, 1], [10, 20], 2 * 22, is_resizable=is_resizable)
        assert len(started(queue)) == num_together
    queue = MessageQueue(prompts, [1, 1], [10, 20], 2 * 28, is_resizable=False)
    assert started(queue) == [0, 1]
    assert queue.max_width == 28


@pytest.mark.parametrize("num_short, num_rows", [(7, 4), (9, 10)])
@pytest.mark.parametrize("model_name", ["small_model", "model_with_windows"])
def test_the_cache_stays_within_its_limit(request, monkeypatch, model_name, num_short, num_rows):
    """Long prompts with short messages beside short prompts with long messages.

    Of ten rows, nine are worth keeping when the first has ended; its columns are not.
    """
    model = request.getfixturevalue(model_name)
    prompts = [PROMPT * 6] + [PROMPT[:2]] * num_short
    limits = [4] + [30] * num_short
    batch_tokens = num_rows * 34
    sizes = []
    forward = model.forward

    def recorded_forward(attention_mask, **options):
        sizes.append(attention_mask.numel())  # rows x columns of the cache
        return forward(attention_mask=attention_mask, **options)

    monkeypatch.setattr(model, "forward", recorded_forward)
    decoder = make_decoder(model)
    decoder.eos_ids = {VOCABULARY}  # no message ends before its limit
    num = 1 + num_short
    arguments = (prompts, [1] * num, limits, list(range(num)), [False] * num)
    messages = decoder.decode(*arguments, batch_tokens=batch_tokens)
    assert [len(tokens) for tokens, _ in messages] == limits
    assert batch_tokens / 2 < max(sizes) <= batch_tokens


def test_a_cache_with_windows_is_not_added_to(model_with_windows, small_model):
    assert not CacheRows.is_resizable_for(model_with_windows)
    assert CacheRows.is_resizable_for(small_model)
    decoder = make_decoder(model_with_windows)
    num = 7
    arguments = ([PROMPT] * num, [1] * num, [9] * num, list(range(num)), [False] * num)
    together = decoder.decode(*arguments)
    small_batches = decoder.decode(*arguments, batch_tokens=2 * (len(PROMPT) + 9))
    assert [tokens for tokens, _ in small_batches] == [tokens for tokens, _ in together]


def test_messages_that_have_ended_are_reported_before_memory_runs_out(small_model, monkeypatch):
    def no_room(self, tokens):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(CacheRows, "append", no_room)
    reported = []
    with pytest.raises(torch.OutOfMemoryError):
        make_decoder(small_model).decode(
            [PROMPT, PROMPT],
            [1, 1],
            [1, 5],
            [0, 1],
            [True, True],
            on_message=lambda index, *_: reported.append(index),
        )
    assert reported == [0]


@pytest.mark.parametrize("capacity", [1, 3, 5])
def test_messages_do_not_depend_on_what_they_are_decoded_beside(small_model, capacity, block_size):
    """A batch that is refilled while messages of 1 to 40 tokens end gives what one batch gives."""
    decoder = make_decoder(small_model)
    prompts = [PROMPT[: 1 + number % 3] for number in range(8)]
    repeats = [1, 3, 2, 1, 4, 1, 2, 1]
    limits = [1 + 13 * number % 40 for number in range(sum(repeats))]
    keys = list(range(sum(repeats)))
    greedy = [number % 4 == 0 for number in keys]
    expected = decoder.decode(prompts, repeats, limits, keys, greedy)

    reported = {}

    def on_message(index, tokens, logprobs, seconds):
        assert index not in reported and seconds > 0
        reported[index] = (tokens, logprobs)

    refilled = decoder.decode(
        prompts,
        repeats,
        limits,
        keys,
        greedy,
        batch_tokens=capacity * 44,
        on_message=on_message,
    )
    assert [reported[index] for index in keys] == refilled
    for (tokens, logprobs), (other_tokens, other_logprobs) in zip(refilled, expected, strict=True):
        assert tokens == other_tokens
        assert logprobs == pytest.approx(other_logprobs, abs=1e-4)


def test_rows_of_messages_that_have_ended_are_given_to_others(small_model, monkeypatch):
    """Four long messages and 36 short ones in a batch of eight: steps of few rows are the last."""
    live_rows = []
    forward = small_model.forward

    def recorded_forward(input_ids, **options):
        if input_ids.shape[1] == 1:
            live_rows.append(len(input_ids))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(small_model, "forward", recorded_forward)
    decoder = make_decoder(small_model)
    decoder.eos_ids = {VOCABULARY}  # no message ends before its limit
    num = 40
    limits = [30 if number % 10 == 0 else 3 for number in range(num)]
    prompts = [[*PROMPT[:1], number % VOCABULARY] for number in range(num)]
    decoder.decode(prompts, [1] * num, limits, list(range(num)), [False] * num, batch_tokens=8 * 32)
    # 4 x 29 and 36 x 2 rows are read after the prompts: 23.5 steps if each had eight.
    assert sum(live_rows) >= 4 * 29 + 36 * 2
    assert len(live_rows) < 60  # batch after batch: 4 x 29 + 2
    assert max(live_rows) <= 8


def test_the_time_of_both_activities_is_counted_from_zero(small_model):
    decoder = Decoder(small_model, eos_ids={-1}, pad_id=0, temperature=1.0, top_k=0, top_p=1.0)
    assert decoder.seconds == {"model": 0.0, "sampling": 0.0}
    decoder.decode([PROMPT], [1], [2], [0], [True])
    assert min(decoder.seconds.values()) > 0


# ---- Memory --------------------------------------------------------------------------------------


def test_messages_are_sampled_without_a_graph_of_gradients(small_model, monkeypatch):
    """Which would keep the activations and the caches of all steps."""
    modes = []
    forward = small_model.forward

    def look(**options):
        modes.append(torch.is_grad_enabled())
        return forward(**options)

    monkeypatch.setattr(small_model, "forward", look)
    make_decoder(small_model).decode([PROMPT], [2], [4, 4], [0, 1], [False, False])
    assert modes and not any(modes)
