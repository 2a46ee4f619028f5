"""Tests of llm/policy.py, on the tiny agents.

A message is a function of (seed, problem, path, candidate), not of the batch. Nothing leaks in from
the checkpoint, costs add up, and what was generated is never generated again.
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain

import pytest
import torch
from conftest import make_tiny_policy
from transformers import GenerationConfig

import generate_rollouts
from llm.decoding import gumbel_noise, message_key
from llm.policy import policy_settings, run_settings, with_journal
from mas import CHAIN
from support.flags import InputError
from support.progress import Progress
from tasks.problems import load_problems
from tree import Candidate, Sample, TooLong, expand, make_root

PROBLEMS = load_problems("tiny", None, {"test": 6})


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
    assert policy.prompt_ids(node.state, PROBLEMS[0].answer_type) == prompt_ids[0].tolist()
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
        tokens: token ids of every message; None for its end alone.

    Attributes:
        asked: (length of the prompt, limit, key, greedy) of every message.
    """

    def __init__(self, decoder, tokens=None):
        self.model = decoder.model
        self.eos_ids = decoder.eos_ids
        self.tokens = tokens or [min(self.eos_ids)]
        self.asked = []

    def decode(self, groups, *, batch_tokens):
        for index, draft in enumerate(chain(*groups), 1):
            self.asked.append((len(draft.prompt), draft.limit, draft.key, draft.greedy))
            draft.tokens, draft.logprobs = self.tokens, [-1.0] * len(self.tokens)
            draft.seconds = 0.1 * index
            yield draft


@pytest.mark.parametrize("flag, limits", [(300, (256, 300)), (20, (20, 20))])
def test_every_message_has_its_own_key_and_the_smaller_limit_of_agent_and_flag(
    policy, flag, limits
):
    """The Planner's own limit is 256, the Solver's is 512. The longest are decoded first."""
    scripted = replace(policy, decoder=ScriptedDecoder(policy.decoder), seed=5, max_new_tokens=flag)
    for_planner = child_of(make_root(PROBLEMS[0].question), "x", "facts")
    for_solver = child_of(for_planner, "plan")
    scripted([(PROBLEMS[0], Sample([for_planner, for_solver], 2))])
    scripted([(PROBLEMS[1], Sample([for_planner], 1, greedy=True))])
    expected = []
    for problem, node, limit, num in (
        (PROBLEMS[0], for_planner, limits[0], 2),
        (PROBLEMS[0], for_solver, limits[1], 2),
        (PROBLEMS[1], for_planner, limits[0], 1),
    ):
        length = prompt_of(policy, problem, node).shape[1]
        for index in range(num):
            key = message_key(5, problem.id, node.path, index)
            expected.append((length, limit, key, problem is PROBLEMS[1]))
    assert sorted(scripted.decoder.asked) == sorted(expected)
    sizes = [length + limit for length, limit, _, _ in scripted.decoder.asked[:4]]
    assert sizes == sorted(sizes, reverse=True)


def test_the_text_of_a_message_is_all_but_its_end_and_costs_count_every_token(policy):
    """Any token may be an end. A message that was cut has none. A prompt is charged once."""
    tokenizer = policy.chat_format.tokenizer
    ids = policy.prompt_ids(roots()[0].state, "number")
    *words, end = [token for token in ids if tokenizer.decode(token).strip().isalpha()][:3]
    lengths = [prompt_of(policy, PROBLEMS[0], node).shape[1] for node in roots(2)]
    for tokens in ((*words, end), (*words,)):
        decoder = ScriptedDecoder(policy.decoder, list(tokens))
        decoder.eos_ids = {end}
        request = (PROBLEMS[0], Sample(roots(2), 3))
        [([first, second], cost)] = replace(policy, decoder=decoder)([request])
        text, is_cut = tokenizer.decode(words).strip(), end not in tokens
        assert first == second == [Candidate(text, len(tokens), -len(tokens), is_cut, tokens)] * 3
        assert (cost.agent_calls, cost.generated_tokens) == (6, 6 * len(tokens))
        assert cost.prompt_tokens == sum(lengths)
        assert cost.truncated == ({"Reader": 6} if is_cut else {})
        assert cost.seconds == pytest.approx(2.1)


@pytest.mark.parametrize("room, limit", [(500, 128), (128, 128), (127, 127), (1, 1), (0, None)])
def test_a_message_may_fill_the_context_and_a_prompt_that_does_is_refused(
    policy, monkeypatch, room, limit
):
    scripted = replace(policy, decoder=ScriptedDecoder(policy.decoder))
    length = prompt_of(policy, PROBLEMS[0], roots()[0]).shape[1]
    monkeypatch.setattr(policy.decoder.model.config, "max_position_embeddings", length + room)
    with nullcontext() if limit else pytest.raises(TooLong, match=f"Reader.* {length} .*{length}"):
        ask(scripted, roots(1))
    assert [limit for _, limit, _, _ in scripted.decoder.asked] == [limit] * bool(limit)


@pytest.fixture
def scarce(policy, monkeypatch):
    """The policy, and how many rows its model has memory for: less than three messages need."""
    num_rows = [2]
    forward = policy.decoder.model.forward

    def scarce_forward(input_ids, **inputs):
        if len(input_ids) > num_rows[0]:
            raise torch.OutOfMemoryError("no room")
        return forward(input_ids=input_ids, **inputs)

    monkeypatch.setattr(policy.decoder.model, "forward", scarce_forward)
    return replace(policy, batch_tokens=8000, progress=Progress(shown=False)), num_rows


def test_out_of_memory_lowers_the_batches_and_loses_nothing(scarce):
    policy, num_rows = scarce
    messages, costs = ask(policy, roots(), num=3)
    assert policy.batch_tokens <= 4000
    assert policy.progress.num_generated == 3 * len(PROBLEMS)
    num_rows[0] = 99
    expected, expected_costs = ask(policy, roots(), num=3)
    assert_equal_candidates(messages, expected)
    assert without_seconds(costs) == without_seconds(expected_costs)
    num_rows[0] = 0
    with pytest.raises(InputError, match="--max-new-tokens"):
        ask(policy, roots(1))


# ---- The journal ---------------------------------------------------------------------------------


@pytest.fixture
def journaled(policy, tmp_path):
    """The policy with a journal, and counts of its own."""
    args = generate_rollouts.parse_args(["--run", str(tmp_path)])
    with with_journal(replace(policy, progress=Progress(shown=False)), args) as journaled:
        yield journaled


def test_only_missing_messages_are_generated_and_others_cost_what_they_did(journaled, policy):
    """The journal keeps everything of a message but its token ids."""
    progress = journaled.progress
    first, costs = ask(journaled, roots(3), num=2)
    again, costs_again = ask(journaled, roots(3), num=2)
    assert (progress.num_generated, progress.num_recalled) == (6, 6)
    assert again == [[c._replace(token_ids=()) for c in candidates] for candidates in first]
    assert costs_again == costs
    more, costs_of_more = ask(journaled, roots(3), num=4)
    assert (progress.num_generated, progress.num_recalled) == (12, 12)
    alone, costs_alone = ask(policy, roots(3), num=4)  # without a journal
    assert_equal_candidates([candidates[2:] for candidates in more], [c[2:] for c in alone])
    assert [candidates[:2] for candidates in more] == again
    assert without_seconds(costs_of_more) == without_seconds(costs_alone)


def test_a_message_is_reused_only_at_its_place_and_for_its_prompt(journaled, policy):
    scripted = replace(journaled, decoder=ScriptedDecoder(policy.decoder))
    problem = PROBLEMS[0]
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
        return run_settings(args, replace(policy, settings=settings))

    value = SETTINGS[name]
    flags = ["--" + name.replace("_", "-")]
    if value is not True:
        flags.append(json.dumps(value) if isinstance(value, dict) else str(value))
    before, after = settings_with(), settings_with(*flags)
    assert {key for key in before if before[key] != after[key]} == {name}
    assert after[name] == value


def test_the_flags_reach_the_policy(chain):
    flags = {"seed": 1, "max_new_tokens": 64, "batch_tokens": 999}
    policy = make_tiny_policy(chain, **flags, top_k=1, chat_template_kwargs='{"x": 1}')
    assert {name: getattr(policy, name) for name in flags} == flags
    assert policy.chat_format.template_kwargs == {"x": 1}
    likeliest, _ = ask(policy, roots(2), greedy=True)
    assert ask(policy, roots(2))[0] == likeliest  # top-k of 1
    assert policy.settings["model"]["name"] == generate_rollouts.parse_args([]).model


TURNS = [  # how the template ends a turn, the token that ends a message, and whether that is wrong
    ("<|im_end|>\n", "<|im_end|>", False),
    ("\n<|im_end|>", "<|im_end|>", False),
    ("<|im_end|>\n", "<|endoftext|>", True),  # a base model with the template of a chat model
    ("\n\n", "<|im_end|>", True),
]


@pytest.mark.parametrize("end, eos_token, is_wrong", TURNS)
def test_agents_whose_messages_would_not_end_are_refused(
    chain, policy, copied_agents, end, eos_token, is_wrong
):
    """What ends the chat does not end its messages."""
    template = copied_agents / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>\n", end) + "<|endoftext|>")
    settings = copied_agents / "tokenizer_config.json"
    text = settings.read_text()
    settings.write_text(text.replace('eos_token": "<|im_end|>', f'eos_token": "{eos_token}'))
    eos_id = policy.chat_format.tokenizer.convert_tokens_to_ids(eos_token)
    GenerationConfig(eos_token_id=eos_id).save_pretrained(copied_agents)
    with pytest.raises(InputError, match="no message would end") if is_wrong else nullcontext():
        make_tiny_policy(chain, model=copied_agents)


@pytest.mark.parametrize("ends", [[2, 300], 300])
def test_a_checkpoints_own_sampling_settings_do_not_leak_in(chain, policy, copied_agents, ends):
    """Only the ends of a message do: it may have more of them than the tokenizer knows."""
    settings = {"repetition_penalty": 5.0, "top_k": 1, "temperature": 9.0, "do_sample": True}
    settings |= {"max_new_tokens": 3, "eos_token_id": ends, "pad_token_id": 0}
    GenerationConfig(**settings).save_pretrained(copied_agents)
    leaky = make_tiny_policy(chain, model=str(copied_agents))
    assert leaky.decoder.eos_ids == policy.decoder.eos_ids | {2, 300}
    leaky.decoder.eos_ids = policy.decoder.eos_ids
    assert_equal_candidates(ask(leaky, roots(), num=2)[0], ask(policy, roots(), num=2)[0])
