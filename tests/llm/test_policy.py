"""Tests of llm/policy.py, on the tiny agents.

A message is a function of (seed, problem, path, candidate), not of the batch. Nothing leaks in from
the checkpoint, costs add up, and what was generated is never generated again.
"""

import json
from dataclasses import replace

import pytest
import torch
from conftest import make_tiny_policy
from transformers import GenerationConfig

import generate_rollouts
from llm.decoding import gumbel_noise, message_key
from llm.policy import policy_settings, search_settings, with_journal
from mas import CHAIN
from support.progress import Progress
from tasks.problems import load_problems
from tree import Candidate, Sample, expand, make_root

PROBLEMS = load_problems(task="tiny", data=None, split="test", num=6)


def ask(policy, nodes, *, num=1, greedy=False):
    """Ask for messages at one node of each problem. Returns candidates and cost per node."""
    requests = []
    for problem, node in zip(PROBLEMS, nodes, strict=False):
        requests.append((problem, Sample([node], num, greedy)))
    replies = policy(requests)
    return [candidates for [candidates], _ in replies], [cost for _, cost in replies]


def without_seconds(costs):
    return [replace(cost, seconds=0) for cost in costs]


def roots(num=6):
    return [make_root(problem.question) for problem in PROBLEMS[:num]]


def child_of(node, *texts):
    """Return the last of the children of a node in the chain."""
    return expand(CHAIN, node, [Candidate(text, 1, 0.0, False) for text in texts])[-1]


def assert_equal_candidates(found, expected):
    """Equal messages; the rounding of the log-probabilities depends on the shape of the batch."""
    for candidates, others in zip(found, expected, strict=True):
        for candidate, other in zip(candidates, others, strict=True):
            logprob = pytest.approx(other.logprob, abs=1e-3)
            assert candidate == other._replace(logprob=logprob)


# ---- A message is a function of (seed, problem, path, candidate) ---------------------------------


def test_a_message_alone_equals_itself_among_many_and_in_other_batches(policy):
    """Some problems wait for the Planner, some for the Reader; every second message is greedy."""
    nodes = roots(4)
    facts, _ = ask(policy, nodes[:2])
    for index, [candidate] in enumerate(facts):
        nodes[index] = child_of(nodes[index], candidate.text)
    requests = []
    for index, (problem, node) in enumerate(zip(PROBLEMS, nodes, strict=False)):
        requests.append((problem, Sample([node], 3, greedy=index % 2 == 1)))
    together = [reply[0] for reply, _ in policy(requests)]
    in_small_batches = replace(policy, batch_tokens=700)(requests)
    assert_equal_candidates([reply[0] for reply, _ in in_small_batches], together)
    for request, candidates in zip(requests, together, strict=True):
        [(alone, _)] = policy([request])
        assert_equal_candidates(alone, [candidates])
    [six], _ = ask(policy, nodes[:1], num=6)
    assert_equal_candidates([six[:3]], together[:1])
    assert len({candidate.text for candidates in together for candidate in candidates}) > 6


def prompt_of(policy, problem, node) -> torch.Tensor:
    """Return the token ids [1, tokens] of a prompt, by the library alone."""
    chat = policy.mas.prompt(node.state, problem.answer_type)
    options = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
    return policy.chat_format.tokenizer.apply_chat_template(chat, **options)["input_ids"]


def generate_greedily(policy, prompt_ids) -> torch.Tensor:
    """Decode by `generate` alone, without our cache, sampling or batching. Returns token ids."""
    tokenizer = policy.chat_format.tokenizer
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    output = policy.decoder.model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=config
    )
    return output[0, prompt_ids.shape[1] :]


def test_greedy_messages_are_those_of_generate(policy):
    messages, _ = ask(policy, roots(), greedy=True)
    for problem, node, [message] in zip(PROBLEMS, roots(), messages, strict=True):
        prompt_ids = prompt_of(policy, problem, node)
        assert policy.prompt_ids(node.state, problem.answer_type) == prompt_ids[0].tolist()
        tokens = generate_greedily(policy, prompt_ids)
        assert message.token_ids == tuple(tokens.tolist())
        text = policy.chat_format.tokenizer.decode(tokens, skip_special_tokens=True)
        assert message.text == text.strip()


def sample_by_hand(policy, prompt_ids, key, temperature):
    """Sample one message token by token: a forward over everything, then Gumbel-max.

    Returns its token ids and the sum of the log-probabilities before temperature.
    """
    tokens, logprob = [], 0.0
    keys = torch.tensor([message_key(*key)])
    while not tokens or tokens[-1] not in policy.decoder.eos_ids:
        all_ids = torch.cat([prompt_ids, torch.tensor([tokens], dtype=torch.long)], dim=1)
        with torch.inference_mode():
            logits = policy.decoder.model(input_ids=all_ids).logits[0, -1].double()
        step = torch.tensor([len(tokens)])
        [noise] = gumbel_noise(keys, step, torch.arange(len(logits)))
        tokens.append(int((logits / temperature + noise).argmax()))
        logprob += logits.log_softmax(-1)[tokens[-1]].item()
    return tuple(tokens), logprob


def test_a_sampled_message_is_drawn_from_the_model_by_seed_problem_path_and_candidate(chain):
    """Two candidates of the Planner, whose path is not empty, at temperature 1.7."""
    policy = make_tiny_policy(chain, temperature=1.7, seed=3)
    node = child_of(make_root(PROBLEMS[0].question), "x", "y")
    [candidates], _ = ask(policy, [node], num=2)
    prompt_ids = prompt_of(policy, PROBLEMS[0], node)
    for index, candidate in enumerate(candidates):
        key = (3, PROBLEMS[0].id, (1,), index)
        tokens, logprob = sample_by_hand(policy, prompt_ids, key, temperature=1.7)
        assert candidate.token_ids == tokens
        assert (candidate.tokens, candidate.truncated) == (len(tokens), False)
        assert candidate.logprob == pytest.approx(logprob, abs=1e-3)
    assert candidates[0].text != candidates[1].text


# ---- What the decoder is asked for, and what is made of its tokens -------------------------------


class ScriptedDecoder:
    """Says the same tokens in every message, each of them at probability 1 / e.

    Args:
        decoder: of which the model and its end-of-message tokens are used.
        tokens: token ids of every message.
    """

    def __init__(self, decoder, tokens):
        self.model = decoder.model
        self.eos_ids = decoder.eos_ids
        self.tokens = tokens

    def decode(self, prompts, repeats, limits, keys, greedy, *, batch_tokens, on_message):
        for index in range(len(keys)):
            on_message(index, self.tokens, [-1.0] * len(self.tokens), 0.1 * (index + 1))


def with_scripted_decoder(policy):
    decoder = ScriptedDecoder(policy.decoder, [min(policy.decoder.eos_ids)])
    return replace(policy, decoder=decoder)


def test_the_text_of_a_message_is_all_but_its_end_and_costs_count_every_token(policy):
    """A message that was cut has no end. A prompt is charged once for all its messages."""
    tokenizer = policy.chat_format.tokenizer
    ids = policy.prompt_ids(roots()[0].state, "number")
    words = [token for token in ids if tokenizer.decode(token).strip().isalpha()][:2]
    text = tokenizer.decode(words).strip()
    for end, truncated in (([tokenizer.eos_token_id], 0), ([], 3)):
        decoder = ScriptedDecoder(policy.decoder, [*words, *end])
        [([first, second], cost)] = replace(policy, decoder=decoder)(
            [(PROBLEMS[0], Sample(roots(2), 3))]
        )
        tokens = (*words, *end)
        expected = Candidate(text, len(tokens), -1.0 * len(tokens), truncated > 0, tokens)
        assert first == second == [expected] * 3
        lengths = [prompt_of(policy, PROBLEMS[0], node).shape[1] for node in roots(2)]
        assert cost.prompt_tokens == sum(lengths)
        assert (cost.agent_calls, cost.generated_tokens) == (6, 6 * len(tokens))
        assert cost.truncated == ({"Reader": 6} if truncated else {})
        assert cost.seconds == pytest.approx(2.1)


# ---- Memory --------------------------------------------------------------------------------------


def let_the_model_hold(max_rows: int, policy, monkeypatch):
    """Let forwards of more rows run out of memory."""
    forward = policy.decoder.model.forward

    def scarce_forward(input_ids, **inputs):
        if len(input_ids) > max_rows:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(policy.decoder.model, "forward", scarce_forward)


def test_out_of_memory_lowers_the_batches_and_loses_nothing(policy, monkeypatch):
    """There is memory for two rows, less than the three messages of a prompt."""
    expected, expected_costs = ask(policy, roots(), num=3)
    let_the_model_hold(2, policy, monkeypatch)
    scarce = replace(policy, batch_tokens=8000, progress=Progress(shown=False))
    messages, costs = ask(scarce, roots(), num=3)
    assert scarce.batch_tokens < 4001
    assert_equal_candidates(messages, expected)
    assert without_seconds(costs) == without_seconds(expected_costs)
    assert scarce.progress.num_generated == 3 * len(PROBLEMS)


# ---- The journal ---------------------------------------------------------------------------------


@pytest.fixture
def journaled(policy, tmp_path):
    """The policy with a journal, and counts of its own."""
    args = generate_rollouts.parse_args(["--run", str(tmp_path)])
    with with_journal(replace(policy, progress=Progress(shown=False)), args) as journaled:
        yield journaled


def counts_of(policy) -> tuple[int, int]:
    return policy.progress.num_generated, policy.progress.num_recalled


def without_ids(candidates_per_node):
    """The journal keeps everything of a message but its token ids."""
    messages = []
    for candidates in candidates_per_node:
        messages.append([candidate._replace(token_ids=()) for candidate in candidates])
    return messages


def test_only_missing_messages_are_generated_and_others_cost_what_they_did(journaled, policy):
    first, costs = ask(journaled, roots(3), num=2)
    assert counts_of(journaled) == (6, 0)
    again, costs_again = ask(journaled, roots(3), num=2)
    assert counts_of(journaled) == (6, 6)
    assert again == without_ids(first) and costs_again == costs
    more, costs_of_more = ask(journaled, roots(3), num=4)
    assert counts_of(journaled) == (12, 12)
    alone, costs_alone = ask(policy, roots(3), num=4)  # without a journal
    assert_equal_candidates(without_ids(more), without_ids(alone))
    assert without_seconds(costs_of_more) == without_seconds(costs_alone)


def test_a_message_is_reused_only_at_its_place_and_for_its_prompt(journaled):
    scripted = with_scripted_decoder(journaled)
    [problem, other_problem, *_] = PROBLEMS
    root = make_root(problem.question)
    first, second = child_of(make_root(problem.question), "x"), child_of(root, "y", "x")
    assert first.state == second.state

    def num_generated_by(problem, node, num=1, *, greedy=False, limit=128):
        before = scripted.progress.num_generated
        replace(scripted, max_new_tokens=limit)([(problem, Sample([node], num, greedy))])
        return scripted.progress.num_generated - before

    assert num_generated_by(problem, first) == 1
    assert num_generated_by(problem, first) == 0
    assert num_generated_by(problem, second) == 1  # another path
    assert num_generated_by(problem, first, num=2) == 1  # another candidate
    assert num_generated_by(problem, first, greedy=True) == 1
    assert num_generated_by(problem, first, limit=100) == 1
    assert num_generated_by(replace(problem, id="other"), first) == 1
    assert num_generated_by(problem, child_of(make_root(problem.question), "z")) == 1
    # The gold answer is not a part of it: no agent sees it.
    assert num_generated_by(replace(problem, gold="-1", split="train"), first) == 0


def test_other_settings_have_another_journal_which_runs_can_share(policy, tmp_path):
    def path_with(settings, *flags):
        args = generate_rollouts.parse_args(["--run", str(tmp_path / "run"), *flags])
        with with_journal(replace(policy, settings=settings), args) as journaled:
            return journaled.journal.path

    path = path_with(policy.settings)
    assert path.parent == tmp_path / "run" / "messages"
    assert json.loads(path.with_suffix(".json").read_text()) == policy.settings
    moved = policy.settings["model"] | {"name": "elsewhere"}
    assert path_with(policy.settings | {"model": moved}) == path
    assert path_with(policy.settings | {"seed": 1}) != path
    shared = path_with(policy.settings, "--messages", str(tmp_path / "shared"))
    assert shared == tmp_path / "shared" / path.name


# ---- Flags and checkpoints -----------------------------------------------------------------------

SETTINGS = {  # recorded setting -> a value that is not the default
    "seed": 1,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.8,
    "max_new_tokens": 64,
    "c_uct": 2.0,
    "task": "tiny-score",
    "data": "mine.jsonl",
    "dtype": "bfloat16",
    "chat_template_kwargs": {"x": 1},
    "quantize_policy": True,
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_changes_messages_or_trees_is_recorded(policy, name):
    """Messages with and without NF4, say, must not end up in one folder."""

    def settings_with(*flags):
        args = generate_rollouts.parse_args(list(flags))
        settings = policy_settings(args)
        return search_settings(args, replace(policy, settings=settings))

    value = SETTINGS[name]
    flags = ["--" + name.replace("_", "-")]
    if value is not True:
        flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    before, after = settings_with(), settings_with(*flags)
    assert {key for key in before if before[key] != after[key]} == {name}
    assert after[name] == value


def test_a_checkpoints_own_sampling_settings_do_not_leak_in(chain, policy, copied_agents):
    """Only the ends of a message do: it may have more of them than the tokenizer knows."""
    settings = {"repetition_penalty": 5.0, "top_k": 1, "temperature": 9.0, "do_sample": True}
    settings |= {"max_new_tokens": 3, "eos_token_id": [2, 300], "pad_token_id": 0}
    GenerationConfig(**settings).save_pretrained(copied_agents)
    leaky = make_tiny_policy(chain, model=str(copied_agents))
    assert leaky.decoder.eos_ids == policy.decoder.eos_ids | {2, 300}
    leaky.decoder.eos_ids = policy.decoder.eos_ids
    assert_equal_candidates(ask(leaky, roots(), num=2)[0], ask(policy, roots(), num=2)[0])
