"""Tests of rewards.py: rollouts, rewards, returns and advantages, by hand."""

import statistics
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    AGENTS,
    ScriptedPolicy,
    drive,
    hint_graph,
    make_tiny_policy,
    sample_tiny_rollouts,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import generate_rollouts
import train_agents
import train_agents as rewards
from llm.coach import Coach
from mas import CHAIN, REFINE
from search import sample_passes
from support.flags import InputError
from support.runs import seeded
from tasks.problems import Problem
from train_agents import (
    Rollout,
    advantages,
    descendants,
    mean_outcomes,
    mix_with_outcome,
    outcome_rewards,
    read_values,
    returns,
    sample_tree,
    search_rewards,
    shuffle_within_agents,
    value_delta_rewards,
    value_rewards,
)
from tree import Candidate, Node, Sample

PROBLEM = Problem("p", "train", "What is 3 + 4?", "7", "number")

# ---- Pieces --------------------------------------------------------------------------------------


def say(path):
    return "message " + ".".join(map(str, path))


def tree_of(mas, num_candidates, num_agents=None, say=say) -> Node:
    num_agents = len(mas.agents) if num_agents is None else num_agents
    search = sample_tree("q", mas, num_candidates=num_candidates, num_agents=num_agents)
    return drive(search, {Sample: ScriptedPolicy(say)})


def rollout_of(root: Node, outcomes=()) -> Rollout:
    """Return a rollout whose terminal nodes have these outcomes z, in their order."""
    nodes = descendants(root)
    leaves = [node for node in nodes if not node.children]
    for leaf, z in zip(leaves, outcomes, strict=False):
        leaf.reward = z
    return Rollout(PROBLEM, root, nodes, {})


def by_path(rewards) -> dict:
    return {node.path: reward for node, reward in rewards.items()}


class FakeValue:
    """Stands in for V: a function of the state."""

    def __init__(self, value_of):
        self.value_of = value_of
        self.states = []
        self.batch_tokens = set()

    def score(self, states, *, batch_tokens):
        self.states += states
        self.batch_tokens.add(batch_tokens)
        return [self.value_of(state) for state in states]


# ---- Rollouts ------------------------------------------------------------------------------------


def test_a_tree_has_c_candidates_per_state_and_nothing_is_selected(duo):
    root = tree_of(duo, (2, 3))
    paths = [node.path for node in descendants(root)]
    assert paths == [(0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert all(duo.is_terminal(node.state) for node in descendants(root)[2:])


def test_equal_messages_are_not_merged(duo):
    """Else a message sampled twice would count once, and means would be no expectations."""
    root = tree_of(duo, (3, 1), say=lambda path: "the same")
    assert [node.path for node in root.children] == [(0,), (1,), (2,)]
    assert len(descendants(root)) == 6


def test_only_the_first_agents_speak_if_the_others_are_not_needed(chain):
    root = tree_of(chain, (1, 3, 1, 1), num_agents=2)
    assert [node.path for node in descendants(root)] == [(0,), (0, 0), (0, 1), (0, 2)]


def test_an_agent_that_is_skipped_is_not_waited_for():
    """The Refiner speaks only if the check fails."""

    def say(path):
        return "The check fails." if path[:2] == (0, 1) else "The check holds."

    root = tree_of(REFINE, (1, 2, 1, 1, 2), say=say)
    depths = sorted(len(node.path) for node in descendants(root) if not node.children)
    assert depths == [4, 5, 5]


def test_passes_are_a_tree_that_branches_at_the_first_agent(chain):
    """The same messages as those of vote and best-of-N: equal paths, hence equal noise."""
    tree = rollout_of(tree_of(chain, (3, 1, 1, 1)))
    passes = drive(sample_passes("q", chain, num=3, greedy=False), {Sample: ScriptedPolicy(say)})
    leaves = [node for node in tree.nodes if not node.children]
    assert [leaf.state for leaf in leaves] == [leaf.state for leaf in passes]
    assert [leaf.path for leaf in leaves] == [leaf.path for leaf in passes]


@pytest.fixture(scope="module")
def tiny_policy():
    return make_tiny_policy(CHAIN)


def rollouts_of(policy, *, seed="s", problems=(PROBLEM,), counts=(2, 1, 1, 1), num_agents=4):
    problems = list(problems)
    return sample_tiny_rollouts(policy, problems, counts=counts, num_agents=num_agents, seed=seed)


def test_the_token_ids_kept_are_those_that_were_sampled(tiny_policy, monkeypatch):
    """Nothing is decoded and encoded again: another tokenisation of the text is another action."""
    decoded = []
    decode = tiny_policy.decoder.decode

    def spy(prompts, repeats, *args, **options):
        messages = decode(prompts, repeats, *args, **options)
        index = 0
        for prompt, repeat in zip(prompts, repeats, strict=True):
            for _ in range(repeat):
                decoded.append((prompt, messages[index][0]))
                index += 1
        return messages

    monkeypatch.setattr(tiny_policy.decoder, "decode", spy)
    [rollout] = rollouts_of(tiny_policy)
    kept = [rollout.tokens[node.path] for node in rollout.nodes]
    assert len(kept) == 8
    assert sorted(kept) == sorted(decoded)
    tokenizer = tiny_policy.chat_format.tokenizer
    for node in rollout.nodes:
        prompt_ids, token_ids = rollout.tokens[node.path]
        text = tokenizer.decode(token_ids, skip_special_tokens=True).strip()
        assert text == node.message.text
        chat = CHAIN.prompt(node.parent.state, "number")
        assert prompt_ids == tiny_policy.chat_format.encode([chat])[0]


def test_every_terminal_state_is_graded(tiny_policy, monkeypatch):
    monkeypatch.setattr(
        generate_rollouts, "grade", lambda problem, node: 1.0 if node.path[0] else -1.0
    )
    [rollout] = rollouts_of(tiny_policy)
    assert [node.reward for node in rollout.nodes if not node.children] == [-1.0, 1.0]
    assert [node.reward for node in rollout.nodes if node.children] == [None] * 6
    [unfinished] = rollouts_of(tiny_policy, num_agents=2)
    assert [node.reward for node in unfinished.nodes] == [None] * 4


def test_every_answer_is_graded_against_the_gold_answer_of_its_problem(tiny_policy, monkeypatch):
    monkeypatch.setattr(generate_rollouts, "grade", lambda problem, node: float(problem.gold))
    golds = {"a": "1", "b": "-1", "c": "1"}
    problems = [
        Problem(name, "train", "What is 3 + 4?", gold, "number") for name, gold in golds.items()
    ]
    for rollout in rollouts_of(tiny_policy, problems=problems, counts=(1, 1, 1, 1)):
        assert rollout.nodes[-1].reward == float(golds[rollout.problem.id])


def test_another_seed_gives_other_messages_and_the_same_one_the_same(tiny_policy):
    def texts(seed):
        [rollout] = rollouts_of(tiny_policy, seed=seed, counts=(4, 1, 1, 1), num_agents=1)
        return [node.message.text for node in rollout.nodes]

    assert texts("step 1") == texts("step 1")
    assert texts("step 1") != texts("step 2")


def test_rollouts_come_in_an_order_of_their_own(tiny_policy):
    problems = [Problem(name, "train", f"{name}?", "7", "number") for name in "cab"]
    rollouts = rollouts_of(tiny_policy, problems=problems, num_agents=1)
    assert [rollout.problem.id for rollout in rollouts] == ["a", "b", "c"]


def test_only_the_first_agents_of_the_schedule_speak_also_after_one_that_is_skipped():
    """C is the third agent, whether or not B has spoken."""
    graph = hint_graph()

    def messages(num_agents):
        policy = ScriptedPolicy(lambda path: "fine" if len(path) == 1 else "word")
        tree = rewards.sample_tree("q", graph, num_candidates=(1, 2, 2), num_agents=num_agents)
        root = drive(tree, {Sample: policy})
        return [node.message.agent for node in rewards.descendants(root)]

    assert messages(2) == ["A"]
    assert messages(3) == ["A", "C", "C"]


# ---- Rewards -------------------------------------------------------------------------------------


@pytest.fixture
def tree(duo) -> Rollout:
    """Two messages of A; below the first z = 1, 1, below the second z = 1, -1."""
    rollout = rollout_of(tree_of(duo, (2, 2)), outcomes=[1.0, 1.0, 1.0, -1.0])
    values = [0.5, 0.0, 0.8, 0.4, -0.2, -0.6]
    for node, value in zip(rollout.nodes, values, strict=True):
        node.V = value
    rollout.root.V = 0.25
    return rollout


def test_search_and_outcome_by_hand(tree):
    q = {(0,): 1.0, (1,): 0.0, (0, 0): 1.0, (0, 1): 1.0, (1, 0): 1.0, (1, 1): -1.0}
    assert by_path(search_rewards(tree)) == q
    assert by_path(outcome_rewards(tree)) == {path: (value + 1) / 2 for path, value in q.items()}


def test_the_expectation_below_a_message_weighs_its_continuations_equally():
    """Not their leaves: where the Refiner speaks, a branch has more leaves than the other."""

    def say(path):
        return "The check fails." if path[:2] == (0, 1) else "The check holds."

    rollout = rollout_of(tree_of(REFINE, (1, 2, 1, 1, 2), say=say), outcomes=[1.0, -1.0, -1.0])
    assert by_path(mean_outcomes(rollout))[0,] == 0.0  # the mean of 1 and -1, not of 1, -1, -1


def test_without_final_answers_there_are_no_outcomes(chain):
    rollout = rollout_of(tree_of(chain, (1, 2, 1, 1), num_agents=2))
    assert by_path(mean_outcomes(rollout)) == {(0,): None, (0, 0): None, (0, 1): None}


def test_value_rewards_by_hand(tree):
    expected = {(0,): 0.75, (1,): 0.5, (0, 0): 0.9, (0, 1): 0.7, (1, 0): 0.4, (1, 1): 0.2}
    assert by_path(value_rewards(tree)) == pytest.approx(expected)


def test_the_names_of_the_rewards():
    expected = {
        "outcome": outcome_rewards,
        "search": search_rewards,
        "value": value_rewards,
        "value-delta": value_delta_rewards,
        "random": outcome_rewards,
    }
    assert expected == rewards.REWARDS


def test_value_delta_rewards_by_hand(tree):
    """The last message gets (z - V(s)) / 2; V of the state that it leads to plays no part."""
    expected = {
        (0,): (0.5 - 0.25) / 2,
        (1,): (0.0 - 0.25) / 2,
        (0, 0): (1 - 0.5) / 2,
        (0, 1): (1 - 0.5) / 2,
        (1, 0): (1 - 0.0) / 2,
        (1, 1): (-1 - 0.0) / 2,
    }
    assert by_path(value_delta_rewards(tree)) == pytest.approx(expected)


def test_the_mix_with_the_outcome_by_hand(tree):
    rewards = value_rewards(tree)
    rewards[tree.nodes[-1]] = None
    expected = {(0,): 0.8125, (1,): 0.5, (0, 0): 0.925, (0, 1): 0.775, (1, 0): 0.55}
    mixed = by_path(mix_with_outcome(tree, rewards, 0.25))
    assert mixed.pop((1, 1)) is None  # a message without a reward gets no neutral one
    assert mixed == pytest.approx(expected)


def test_rollouts_are_sampled_together_as_many_as_the_flag_says(tiny_policy, monkeypatch):
    given = []

    def look(searches, handlers, *, max_active, progress):
        given.append(max_active)
        return iter(())

    monkeypatch.setattr(rewards, "run_searches", look)
    sample_tiny_rollouts(tiny_policy, [PROBLEM], counts=(1, 1, 1, 1), num_agents=4, seed="s")
    assert given == [64]


def test_v_reads_every_state_once_and_the_question_without_any_message(duo):
    """V of the question is a baseline: it must not depend on what the agents then said."""
    rollout = rollout_of(tree_of(duo, (2, 1), say=lambda path: str(0.1 * sum(path) + 0.2)))

    def value_of(state):
        return float(state.messages[-1].text) if state.messages else -0.7

    value_model = FakeValue(value_of)
    read_values([rollout], value_model, batch_tokens=100)
    assert [node.V for node in rollout.nodes] == pytest.approx([0.2, 0.3, 0.2, 0.3])
    value_of_question = rollout.root.V
    assert value_of_question == -0.7
    assert value_model.states == [node.state for node in [rollout.root, *rollout.nodes]]
    assert value_model.batch_tokens == {100}


def test_random_rewards_are_those_of_other_messages_of_the_same_agent(chain):
    rollout = rollout_of(tree_of(chain, (3, 2, 1, 1)))
    original = {node: float(index) for index, node in enumerate(rollout.nodes)}
    shuffled = shuffle_within_agents(original, seeded(0))
    assert shuffled.keys() == original.keys()
    assert shuffled != original
    assert shuffle_within_agents(original, seeded(1)) != shuffled
    for agent in chain.agents:
        mine = [node for node in rollout.nodes if node.message.agent == agent.name]
        given = [shuffled[node] for node in mine]
        assert sorted(given) == [original[node] for node in mine]
        # Solver and Verifier have no siblings: their rewards come from other states.
        assert given != [original[node] for node in mine] or len(mine) < 6


# ---- Returns -------------------------------------------------------------------------------------


def test_returns_add_the_later_rewards_and_average_over_continuations(tree):
    rewards = dict(zip(tree.nodes, [1.0, 2.0, 10.0, 20.0, 30.0, 50.0], strict=True))
    expected = {(0,): 16.0, (1,): 42.0, (0, 0): 10.0, (0, 1): 20.0, (1, 0): 30.0, (1, 1): 50.0}
    assert by_path(returns(tree, rewards)) == expected


@settings(max_examples=30, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=15, max_size=15), st.lists(st.booleans(), min_size=6))
def test_returns_of_value_delta_telescope_to_the_outcome_minus_v(values, is_right):
    """No error of V can bend them: V is a baseline only."""
    outcomes = [1.0 if right else -1.0 for right in is_right]
    rollout = rollout_of(tree_of(CHAIN, (2, 3, 1, 1)), outcomes=outcomes)
    nodes = [rollout.root, *rollout.nodes]
    for node, value in zip(nodes, values + values, strict=False):
        node.V = value
    totals = returns(rollout, value_delta_rewards(rollout))
    q = mean_outcomes(rollout)
    for node in rollout.nodes:
        assert totals[node] == pytest.approx((q[node] - node.parent.V) / 2, abs=1e-9)


# ---- Advantages ----------------------------------------------------------------------------------


def test_the_agent_baseline_whitens_per_agent(duo):
    rollout = rollout_of(tree_of(duo, (2, 2)))
    rewards = dict(zip(rollout.nodes, [0.0, 1.0, 1.0, 3.0, 5.0, 7.0], strict=True))
    result = by_path(advantages(rewards, "agent"))
    spread = statistics.pstdev([1, 3, 5, 7])
    expected = {(0,): -1.0, (1,): 1.0}
    for path, reward in zip([(0, 0), (0, 1), (1, 0), (1, 1)], [1, 3, 5, 7], strict=True):
        expected[path] = (reward - 4) / spread
    assert result == pytest.approx(expected)


def test_the_agent_baseline_is_over_the_whole_batch(duo):
    """MAPPA: no group by question, because later agents see different inputs."""
    first = rollout_of(tree_of(duo, (1, 1)))
    second = rollout_of(tree_of(duo, (1, 1)))
    rewards = {first.nodes[0]: 0.0, first.nodes[1]: 1.0}
    rewards |= {second.nodes[0]: 4.0, second.nodes[1]: 2.0}
    result = advantages(rewards, "agent")
    assert [result[node] for node in first.nodes + second.nodes] == [-1.0, -1.0, 1.0, 1.0]


def test_the_siblings_baseline_compares_candidates_of_one_state(duo):
    rollout = rollout_of(tree_of(duo, (2, 2)))
    rewards = dict(zip(rollout.nodes, [0.0, 1.0, 1.0, 3.0, 5.0, 7.0], strict=True))
    result = by_path(advantages(rewards, "siblings"))
    spread = statistics.pstdev([1, 3, 5, 7])  # of the agent, so that the scale is the same
    expected = {(0,): -1.0, (1,): 1.0, (0, 0): -1 / spread, (0, 1): 1 / spread}
    expected |= {(1, 0): -1 / spread, (1, 1): 1 / spread}
    assert result == pytest.approx(expected)


def test_with_siblings_an_agent_whose_copies_agree_is_not_moved_by_the_luck_of_others(duo):
    rollout = rollout_of(tree_of(duo, (2, 2)))
    rewards = dict(zip(rollout.nodes, [0.0, 1.0, 3.0, 3.0, 7.0, 7.0], strict=True))
    result = by_path(advantages(rewards, "siblings"))
    assert [result[path] for path in [(0, 0), (0, 1), (1, 0), (1, 1)]] == [0.0] * 4
    assert 0.0 not in by_path(advantages(rewards, "agent")).values()


def test_with_siblings_a_message_without_any_is_not_trained_on(chain):
    """Else its tokens would dilute the step, and rewards would differ in what they train on."""
    rollout = rollout_of(tree_of(chain, (1, 3, 1, 1)))
    rewards = {node: float(index) for index, node in enumerate(rollout.nodes)}
    assert set(by_path(advantages(rewards, "siblings"))) == {(0, 0), (0, 1), (0, 2)}
    # The only Reader has nothing to be compared with under either baseline.
    assert len(advantages(rewards, "agent")) == len(rollout.nodes) - 1


@pytest.mark.parametrize("difference", [0.0, 1e-9, 9e-5])
def test_equal_rewards_give_no_advantage_even_up_to_rounding(duo, difference):
    rollout = rollout_of(tree_of(duo, (2, 2)))
    rewards = {node: 0.3 + difference * (index % 2) for index, node in enumerate(rollout.nodes)}
    assert advantages(rewards, "agent") == {}
    rewards = {node: 0.3 + 1e-3 * (index % 2) for index, node in enumerate(rollout.nodes)}
    assert len(advantages(rewards, "agent")) == 6


@pytest.mark.parametrize("baseline", ["agent", "siblings"])
def test_a_message_that_was_cut_or_has_no_reward_does_not_count(duo, baseline):
    """Neither is it trained on, nor does it shift the mean of the others."""
    rollout = rollout_of(tree_of(duo, (4, 1)))
    first, second, third, fourth = rollout.root.children
    third.candidate = Candidate("cut", 16, -1.0, truncated=True)
    rewards = {first: 0.0, second: 1.0, third: 100.0, fourth: None}
    assert by_path(advantages(rewards, baseline)) == {(0,): -1.0, (1,): 1.0}


def test_a_message_whose_siblings_do_not_count_has_none(duo):
    """It is not trained on. Of the second state, both messages count."""
    rollout = rollout_of(tree_of(duo, (2, 2)))
    (left, cut), (low, high) = (node.children for node in rollout.root.children)
    cut.candidate = Candidate("cut", 16, -1.0, truncated=True)
    rewards = {left: 0.0, cut: 9.0, low: 1.0, high: 3.0}
    assert set(advantages(rewards, "siblings")) == {low, high}
    assert set(advantages(rewards, "agent")) == {left, low, high}


# ---- The coach -----------------------------------------------------------------------------------


ON_CPU = {"quantize": False, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def coach():
    return Coach(AGENTS, CHAIN, seed=0, batch_tokens=1000, template_kwargs={}, **ON_CPU)


@pytest.fixture
def chain_rollout(chain) -> Rollout:
    return rollout_of(tree_of(chain, (2, 1, 1, 1)), outcomes=[1.0, -1.0])


def test_the_score_is_the_expected_digit_over_9(coach, monkeypatch):
    """From the distribution over the next token alone, renormalised to the ten digits."""
    vocabulary = coach.model.config.vocab_size

    def logits_of(probs):
        logits = torch.full((vocabulary,), -30.0)
        for token_id, prob in probs.items():
            logits[token_id] = torch.tensor(prob).log()
        return logits

    digit = coach.digit_ids
    other = next(i for i in range(vocabulary) if i not in digit)
    rows = [
        logits_of({digit[9]: 1.0}),
        logits_of({digit[0]: 0.4, digit[6]: 0.4, other: 0.2}),
        logits_of({digit[9]: 0.4, other: 0.6}),  # it would rather say something else
    ]

    class Output:
        logits = torch.stack(rows)[:, None]

    monkeypatch.setattr(type(coach.model), "forward", lambda self, **kwargs: Output)
    scores = coach.scores([[1, 2], [1], [1, 2, 3]])
    assert scores[:2] == pytest.approx([1.0, (0.5 * 0 + 0.5 * 6) / 9], abs=1e-4)
    assert scores[2] is None


def test_the_digits_of_the_coach_are_digits(coach):
    tokenizer = coach.chat_format.tokenizer
    assert [tokenizer.decode([token_id]) for token_id in coach.digit_ids] == list("0123456789")


def test_a_score_does_not_depend_on_the_batch(coach, chain_rollout, monkeypatch):
    """Prompts of different lengths are padded."""
    monkeypatch.setattr(coach, "SMALLEST_SHARE_OF_DIGITS", 0.0)
    together = coach(chain_rollout)
    assert list(map(type, together.values())) == [float] * 8
    assert len(set(together.values())) > 2
    for node, score in together.items():
        [prompt] = coach.chat_format.encode([coach.chat(PROBLEM, node)])
        assert coach.scores([prompt]) == [pytest.approx(score, abs=1e-6)]


def test_the_coach_sees_role_observation_and_message_but_not_the_gold_answer(coach, chain_rollout):
    problem = Problem("p", "train", "What is 3 + 4?", "gold 98765", "number")
    for node in chain_rollout.nodes:
        system, user = coach.chat(problem, node)
        role, observation = CHAIN.prompt(node.parent.state, "number")
        marker = user["content"].split("\n")[1]
        for title, text in (
            (f"Role of the {node.message.agent}", role["content"]),
            ("What it could see", observation["content"]),
            ("Its message", node.message.text),
        ):
            assert f"{title}:\n{marker}\n{text}\n{marker}" in user["content"]
        assert "98765" not in system["content"] + user["content"]


def test_a_message_cannot_know_the_marker_that_ends_it(coach, chain_rollout, monkeypatch):
    markers = set()
    for node in chain_rollout.nodes:
        _, user = coach.chat(PROBLEM, node)
        lines = user["content"].split("\n")
        marker = lines[lines.index(f"Role of the {node.message.agent}:") + 1]
        assert user["content"].count(marker) == 6  # around each of three parts
        markers.add(marker)
    [node, *_] = chain_rollout.nodes
    other_problem = Problem("other", "train", PROBLEM.question, "7", "number")
    markers.add(coach.chat(other_problem, node)[1]["content"].split("\n")[1])
    monkeypatch.setattr(coach, "seed", 1)
    markers.add(coach.chat(PROBLEM, node)[1]["content"].split("\n")[1])
    assert len(markers) == len(chain_rollout.nodes) + 2


def test_equal_messages_of_one_state_have_equal_grades(coach, chain):
    """Wherever they stand among their siblings; else a baseline would compare noise."""
    rollout = rollout_of(tree_of(chain, (2, 1, 1, 1), say=lambda path: "the same"))
    first, second = rollout.root.children
    assert coach.chat(PROBLEM, first) == coach.chat(PROBLEM, second)


def test_the_coach_renders_its_chats_as_the_flags_say():
    kwargs = {"enable_thinking": False}
    coach = Coach(AGENTS, CHAIN, seed=0, batch_tokens=99, template_kwargs=kwargs, **ON_CPU)
    assert coach.chat_format.template_kwargs == kwargs


def test_the_scores_of_a_coach_in_bfloat16_are_computed_in_float32(coach, monkeypatch):
    torch.manual_seed(0)
    vocabulary = coach.model.config.vocab_size
    logits = torch.full((3, 1, vocabulary), -30.0)
    logits[..., coach.digit_ids] = torch.randn(3, 1, 10)
    outputs = iter([logits.bfloat16(), logits.bfloat16().float()])

    def forward(self, **kwargs):
        return SimpleNamespace(logits=next(outputs))

    monkeypatch.setattr(type(coach.model), "forward", forward)
    prompts = [[1, 2], [1], [1, 2, 3]]
    assert coach.scores(prompts) == coach.scores(prompts)


def test_a_coach_without_a_chat_template_is_refused(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(AGENTS)
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(AGENTS).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"^--coach .* no chat template"):
        Coach(str(tmp_path), CHAIN, seed=0, batch_tokens=100, template_kwargs={}, **ON_CPU)


def test_a_prompt_that_does_not_fit_into_the_coach_is_refused(coach, chain):
    long = rollout_of(tree_of(chain, (1, 1, 1, 1), say=lambda path: "word " * 2000))
    with pytest.raises(InputError, match="problem p: .* does not fit into the coach"):
        coach(long)


def test_the_coach_has_the_settings_of_the_flags(monkeypatch):
    made = []
    monkeypatch.setattr(
        train_agents, "Coach", lambda *args, **options: made.append((args, options))
    )
    monkeypatch.setenv("LOCAL_RANK", "2")
    flags = ["--reward", "coach", "--coach", "c", "--seed", "7", "--batch-tokens", "99"]
    flags += ["--chat-template-kwargs", '{"enable_thinking": false}', "--device", "cuda"]
    flags += ["--dtype", "float32"]
    train_agents.load_reward(train_agents.parse_args(flags), CHAIN)
    options = {"seed": 7, "batch_tokens": 99, "template_kwargs": {"enable_thinking": False}}
    options |= {"quantize": False, "device": "cuda:2", "dtype": "float32"}
    assert made == [(("c", CHAIN), options)]


def test_the_coach_reads_no_more_at_once_than_a_batch(coach, chain, monkeypatch):
    sizes = []

    def look(prompts):
        sizes.append(len(prompts) * max(map(len, prompts)))
        return [0.5] * len(prompts)

    monkeypatch.setattr(coach, "scores", look)
    rewards_of = coach(rollout_of(tree_of(chain, (2, 1, 1, 1))))
    assert len(rewards_of) == 8
    assert len(sizes) > 1 and max(sizes) <= coach.batch_tokens


def test_the_coach_reads_without_a_graph_of_gradients(coach, monkeypatch):
    modes = []
    forward = coach.model.forward

    def look(**options):
        modes.append(torch.is_grad_enabled())
        return forward(**options)

    monkeypatch.setattr(coach.model, "forward", look)
    coach.scores([[1, 2, 3]])
    assert modes == [False]


@pytest.mark.parametrize("ids_of_9", [[], [5, 6]])
def test_a_coach_to_whom_a_digit_is_not_one_token_is_refused(monkeypatch, ids_of_9):
    def tokenizer(text, **options):
        return {"input_ids": ids_of_9 if text == "9" else [int(text)]}

    tokenizer.pad_token_id = 0
    loaded = (torch.nn.Identity(), tokenizer)
    monkeypatch.setattr(rewards, "load_pretrained", lambda *args, **options: loaded)
    monkeypatch.setattr(rewards, "ChatFormat", lambda *args, **options: None)
    with pytest.raises(InputError, match="--coach c: the digit 9 is not one of its tokens"):
        Coach("c", CHAIN, seed=0, batch_tokens=9, template_kwargs={})
