"""Tests of the journal: no message is generated twice, and results do not change."""

import json
from dataclasses import replace

import pytest
from conftest import NoProgress, make_tiny_policy
from llm.journal import Journal

from generate_rollouts import parse_args
from llm.policy import journal_of
from mas import CHAIN, MAS
from search import RandomScorer, make_handlers, parse_method
from support.flags import InputError
from tasks.problems import load_problems
from tree import Sample, expand, make_root, run_searches

PROBLEMS = load_problems(task="tiny", data=None, split="test", num=3)
SETTINGS = {"model": "m", "seed": 0}

# ---- The file ------------------------------------------------------------------------------------


def test_entries_are_found_by_key_now_and_later(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        assert journal.find("a") is None
        journal.add("a", {"text": "one\ntwo\u2028three"})
        journal.add("b", {"text": "zwölf"})
        assert journal.find("a")["text"] == "one\ntwo\u2028three"
    with Journal(tmp_path, SETTINGS) as journal:
        journal.add("c", {"text": "new"})
        texts = [journal.find(key)["text"] for key in "abc"]
    assert texts == ["one\ntwo\u2028three", "zwölf", "new"]


def test_an_entry_is_on_disk_as_soon_as_it_is_added(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.add("a", {"text": "x"})
        assert journal.path.read_text().endswith("\n")


def test_other_settings_have_another_journal_and_settings_can_be_read(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.add("a", {"text": "x"})
    with Journal(tmp_path, SETTINGS | {"seed": 1}) as other:
        assert other.find("a") is None
    recorded = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert sorted(settings["seed"] for settings in recorded) == [0, 1]


def test_a_model_that_was_moved_has_the_same_journal(tmp_path):
    model = {"name": "here", "fingerprint": "1234"}
    with Journal(tmp_path, {"model": model}) as journal:
        journal.add("a", {"text": "x"})
    with Journal(tmp_path, {"model": model | {"name": "there"}}) as moved:
        assert moved.find("a") is not None
    with Journal(tmp_path, {"model": model | {"fingerprint": "5678"}}) as other:
        assert other.find("a") is None


def test_a_second_process_has_a_file_of_its_own_and_reads_the_first(tmp_path):
    with Journal(tmp_path, SETTINGS) as first:
        first.add("a", {"text": "x"})
        with Journal(tmp_path, SETTINGS) as second:
            assert first.path.name == f"{first.name}.jsonl"
            assert second.path.name == f"{first.name}.1.jsonl"
            assert second.find("a")["text"] == "x"
            second.add("b", {"text": "y"})
            assert first.find("b") is None  # others are read at the start only
    with Journal(tmp_path, SETTINGS) as later:
        assert later.find("b")["text"] == "y"


def test_a_torn_last_line_is_done_again(tmp_path, capsys):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.add("a", {"text": "x"})
        journal.add("b", {"text": "y"})
    content = journal.path.read_bytes()
    journal.path.write_bytes(content[:-3])
    with Journal(tmp_path, SETTINGS) as journal:
        assert journal.find("a")["text"] == "x"
        assert journal.find("b") is None
        journal.add("b", {"text": "y"})
    assert journal.path.read_bytes() == content


def test_a_damaged_line_and_a_folder_that_cannot_be_written_are_named(tmp_path):
    with Journal(tmp_path, SETTINGS) as journal:
        journal.add("a", {"text": "x"})
    content = journal.path.read_text()
    for line in ("nonsense", "5", "{}"):
        journal.path.write_text(f"{content}{line}\n")
        with pytest.raises(InputError, match=r"\.jsonl, line 2: not a message"):
            Journal(tmp_path, SETTINGS)
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(InputError, match="file: messages cannot be kept here .*--messages"):
        Journal(blocked, SETTINGS)


def test_a_line_that_another_process_has_not_ended_is_left_alone(tmp_path):
    settings = {"model": "m"}
    with Journal(tmp_path, settings) as first, Journal(tmp_path, settings) as second:
        first.add("a", {"text": "x"})
        second.add("b", {"text": "y"})
    content = second.path.read_bytes()
    second.path.write_bytes(content + content[:-3])
    with Journal(tmp_path, settings) as later:
        assert [later.find(key)["text"] for key in "ab"] == ["x", "y"]
    assert second.path.read_bytes() == content + content[:-3]


# ---- The policy and its journal ------------------------------------------------------------------


def first_messages(policy, *, num, problems=PROBLEMS, greedy=False):
    """Sample first messages of each problem. Returns [(candidates, cost)]."""
    requests = []
    for problem in problems:
        requests.append((problem, Sample([make_root(problem.question)], num, greedy)))
    return [(reply[0], cost) for reply, cost in policy(requests)]


@pytest.fixture
def make_policy(tmp_path):
    """Return a function that loads a policy with the journal of this test."""
    policies = []

    def make(mas=CHAIN, **changes):
        policy = make_tiny_policy(mas, **changes)
        policy.journal = Journal(tmp_path, policy.settings)
        policies.append(policy)
        return policy

    yield make
    for policy in policies:
        policy.journal.file.close()


def test_an_equal_request_generates_nothing_and_gives_the_same_messages_and_cost(make_policy):
    policy = make_policy()
    first = first_messages(policy, num=3)
    assert (policy.num_generated, policy.num_recalled) == (9, 0)
    policy.decoder.decode = None  # to generate again would raise
    reported = []
    policy.on_batch = lambda *sizes: reported.append(sizes)
    assert first_messages(policy, num=3) == first
    assert (policy.num_generated, policy.num_recalled) == (9, 9)
    # Replayed messages count as progress, too.
    assert reported == [(1, 3)] * 3


def test_only_missing_messages_are_generated(make_policy, policy):
    journaled = make_policy()
    first_messages(journaled, num=2)
    reported = []
    journaled.on_batch = lambda *sizes: reported.append(sizes)
    replies = first_messages(journaled, num=5)
    assert journaled.num_generated == 3 * 5
    # As progress, a prompt counts once: with the messages that are generated.
    assert reported[:3] == [(0, 2)] * 3
    assert [num_messages for _, num_messages in reported[3:]] == [1] * 9
    assert sum(num_prompts for num_prompts, _ in reported) == 3
    expected = first_messages(policy, num=5)  # without a journal
    for (candidates, cost), (expected_candidates, expected_cost) in zip(
        replies, expected, strict=True
    ):
        assert [c.text for c in candidates] == [c.text for c in expected_candidates]
        assert replace(cost, seconds=0) == replace(expected_cost, seconds=0)


def test_an_entry_says_what_was_generated_and_where(make_policy):
    policy = make_policy()
    [([candidate], cost)] = first_messages(policy, num=1, problems=PROBLEMS[:1])
    entry = json.loads(policy.journal.path.read_text())
    assert len(entry.pop("key")) == 32
    place = {"problem": PROBLEMS[0].id, "path": [], "candidate": 0, "agent": "Reader"}
    assert entry == place | candidate._asdict() | {"seconds": cost.seconds}


def test_the_cost_in_seconds_is_that_of_generating_the_messages(make_policy):
    policy = make_policy()
    requests = first_messages(policy, num=4)
    for candidates, cost in requests:
        entries = []
        for line in policy.journal.path.read_text().splitlines():
            entry = json.loads(line)
            if entry["text"] in {candidate.text for candidate in candidates}:
                entries.append(entry)
        assert cost.seconds > 0
        assert cost.seconds <= sum(entry["seconds"] for entry in entries) + 1e-9
    replayed = first_messages(policy, num=4)
    assert [cost for _, cost in replayed] == [cost for _, cost in requests]


def test_the_cost_in_seconds_does_not_depend_on_which_message_ended_first(make_policy, monkeypatch):
    policy = make_policy()
    decode = policy.decoder.decode

    def decode_from_last_to_first(*args, on_message, **options):
        ended = []
        decode(*args, on_message=lambda *message: ended.append(message), **options)
        for index, tokens, logprobs, _ in sorted(ended, reverse=True):
            on_message(index, tokens, logprobs, (index + 1) / 10)

    monkeypatch.setattr(policy.decoder, "decode", decode_from_last_to_first)
    [(_, cost)] = first_messages(policy, num=3, problems=PROBLEMS[:1])
    [(_, replayed)] = first_messages(policy, num=3, problems=PROBLEMS[:1])
    assert 0.1 + 0.2 + 0.3 != 0.3 + 0.2 + 0.1  # in floating point
    assert replayed == cost
    assert cost.seconds == pytest.approx(0.6)


def test_messages_that_have_ended_survive_a_kill_while_others_are_decoded(make_policy, monkeypatch):
    policy = make_policy(batch_tokens=700)
    decode = policy.decoder.decode

    def dying_decode(*args, on_message, **options):
        num_ended = 0

        def dying_on_message(*message):
            nonlocal num_ended
            if num_ended == 6:
                raise KeyboardInterrupt
            on_message(*message)
            num_ended += 1

        return decode(*args, on_message=dying_on_message, **options)

    monkeypatch.setattr(policy.decoder, "decode", dying_decode)
    with pytest.raises(KeyboardInterrupt):
        first_messages(policy, num=3)

    resumed = make_policy(batch_tokens=700)
    first_messages(resumed, num=3)
    assert (resumed.num_generated, resumed.num_recalled) == (3, 6)


@pytest.mark.parametrize(
    "changes", [{"seed": 1}, {"temperature": 0.9}, {"top_k": 5}, {"top_p": 0.9}]
)
def test_messages_sampled_otherwise_are_not_reused(make_policy, changes):
    first_messages(make_policy(), num=1)
    other = make_policy(**changes)
    first_messages(other, num=1)
    assert (other.num_generated, other.num_recalled) == (3, 0)


def test_a_message_is_reused_only_at_its_place_and_for_its_prompt(make_policy, policy):
    journaled = make_policy()
    [problem] = PROBLEMS[:1]
    root = make_root(problem.question)
    [([candidate], _)] = first_messages(journaled, num=1, problems=[problem])

    def generated_by(problem, node, num=1, greedy=False, limit=128):
        before = journaled.num_generated
        journaled.max_new_tokens = limit
        journaled([(problem, Sample([node], num, greedy))])
        return journaled.num_generated - before

    assert generated_by(problem, root) == 0
    assert generated_by(problem, root, num=2) == 1  # another candidate
    assert generated_by(problem, root, greedy=True) == 1
    assert generated_by(problem, root, limit=100) == 1
    assert generated_by(replace(problem, id="other"), root) == 1
    assert generated_by(problem, make_root(problem.question + " Please.")) == 1

    # The same message at another place in the tree is another sample.
    [first] = expand(CHAIN, make_root(problem.question), [candidate])
    [second] = expand(CHAIN, make_root(problem.question), [candidate])
    second.path = (1,)
    assert generated_by(problem, first) == 1
    assert generated_by(problem, first) == 0
    assert generated_by(problem, second) == 1


def test_other_system_prompts_are_other_messages(make_policy):
    first_messages(make_policy(), num=1)
    reader = replace(CHAIN.agents[0], prompt="You are the Reader. Be brief.")
    other = make_policy(MAS("other", (reader, *CHAIN.agents[1:])))
    first_messages(other, num=1)
    assert other.num_recalled == 0


# ---- Methods share messages ----------------------------------------------------------------------


def answers_of(name, policy):
    """Run a method on all problems. Returns problem id -> (final state, cost without seconds)."""
    method = parse_method(name, CHAIN, num_candidates="3", lam=0.0)
    searches = [(problem, method.search(problem, CHAIN, c_uct=1.0)) for problem in PROBLEMS[:2]]
    handlers = make_handlers(method, {"random": RandomScorer(seed=0)}, policy)
    answers = {}
    for problem, leaf, cost in run_searches(
        searches, handlers, max_active=8, progress=NoProgress()
    ):
        answers[problem.id] = (leaf.state, replace(cost, seconds=0))
    return answers


def test_methods_share_messages_and_each_costs_what_it_costs_alone(make_policy, policy):
    shared = make_policy()
    names = ["vote-2", "best_of-2-random", "mcts-2x1.2.1.1-random", "sbs-2x1.2.1.1-random"]
    generated = {}
    for name in names:
        before = shared.num_generated
        assert answers_of(name, shared) == answers_of(name, policy)  # alone, without a journal
        generated[name] = shared.num_generated - before
    assert generated["vote-2"] == 2 * 4 * 2
    assert generated["best_of-2-random"] == 0
    # Only the second beam of one Solver and one Verifier can be new to SBS.
    assert generated["sbs-2x1.2.1.1-random"] <= 4 * 2


def test_a_policy_keeps_its_journal_in_the_run_folder_or_where_it_is_told(policy, tmp_path):
    run, shared = str(tmp_path / "run"), str(tmp_path / "shared")
    with journal_of(policy, parse_args(["--run", run])):
        assert policy.journal.path.parent == tmp_path / "run" / "messages"
    with (
        pytest.raises(KeyboardInterrupt),
        journal_of(policy, parse_args(["--run", run, "--messages", shared])),
    ):
        assert policy.journal.path.parent == tmp_path / "shared"
        raise KeyboardInterrupt
    assert policy.journal is None
