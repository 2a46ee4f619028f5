"""Tests of train_agents.py: rewards and advantages by hand, the update by hand, and whole runs."""

import itertools
import json
import math
import re
import shutil
import statistics
from collections import defaultdict
from dataclasses import replace

import pytest
import torch
from conftest import error_of, kill_when, output_of, read_lines, script_argv
from labelled import TREES, write_trees
from safetensors.torch import load_file
from searching import DUO, HINT, ScriptedPolicy, drive

import generate_rollouts
import train_agents
import train_value
from mas import CHAIN
from support.flags import TINY_AGENTS, InputError
from support.runs import read_config, seeded
from support.statistics import agent_measures
from tasks.problems import Problem, load_problems
from train_agents import REWARDS, Learner, TrainedMessage, advantages, returns, search_rewards
from tree import Candidate, Sample, sample_tree

# ---- Rollouts ------------------------------------------------------------------------------------


def messages_of(mas, num_candidates, *, say=str, outcomes=()):
    """Return the messages of a scripted tree; its terminal nodes have these outcomes, in order."""
    policy = ScriptedPolicy(mas, say)
    nodes = drive(sample_tree("q", mas, num_candidates, greedy=False), {Sample: policy})
    assert all(paths for _, paths, _, _ in policy.requests)  # nothing is asked of no node
    leaves = [node for node in nodes if not node.children]
    for leaf, outcome in zip(leaves, outcomes, strict=False):
        leaf.outcome = outcome
    return dict.fromkeys(nodes)


def test_every_state_gets_its_candidates_and_equal_messages_are_not_merged():
    """Else a message sampled twice would count once, and means would be no expectations."""
    nodes = list(messages_of(DUO, (2, 3), say=lambda path: "the same"))
    paths = [node.path for node in nodes]
    assert paths == [(0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]


def test_agents_speak_in_their_turn_if_they_have_an_entry():
    """C is the third agent, whether or not B has spoken."""
    for first, all_agents, without_c in (("help", "ABBCCCC", "ABB"), ("fine", "ACC", "A")):
        for num_candidates, expected in (((1, 2, 2), all_agents), ((1, 2), without_c)):
            nodes = messages_of(HINT, num_candidates, say=lambda path, a=first: a)
            assert "".join(node.message.agent for node in nodes) == expected


# ---- Rewards -------------------------------------------------------------------------------------


@pytest.fixture
def tree():
    """Two messages of A; below the first the outcomes are 1, 1, below the second 1, -1."""
    rollouts = messages_of(DUO, (2, 2), outcomes=[1.0, 1.0, 1.0, -1.0])
    for node, value in zip(rollouts, [0.5, 0.0, 0.8, 0.4, -0.2, -0.6], strict=True):
        node.V = value
    next(iter(rollouts)).parent.V = 0.25
    return rollouts


REWARDS_BY_HAND = {  # of the messages (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)
    "value": [0.75, 0.5, 0.9, 0.7, 0.4, 0.2],
    # The last message gets (z - V(s)) / 2; V of the state that it leads to plays no part.
    "value-delta": [0.125, -0.125, 0.25, 0.25, 0.5, -0.5],
    "value-return": [0.125, -0.125, 0.25, 0.25, 0.5, -0.5],
    "search": [1.0, 0.0, 1.0, 1.0, 1.0, -1.0],
    "outcome": [1.0, 0.5, 1.0, 1.0, 1.0, 0.0],
}


@pytest.mark.parametrize("name", REWARDS_BY_HAND)
def test_the_rewards_by_hand(tree, name):
    rewards = REWARDS[name](tree)
    assert list(rewards) == list(tree)
    assert list(rewards.values()) == pytest.approx(REWARDS_BY_HAND[name])


def test_the_mean_outcome_weighs_continuations_equally_and_needs_answers():
    """Not leaves: of two messages of A, one is answered by B twice, and one ends."""
    rollouts = messages_of(HINT, (1, 2, 2), say=lambda path: "help", outcomes=[1.0] * 3 + [-1.0])
    assert list(search_rewards(rollouts).values())[:3] == [0.5, 1.0, 0.0]
    assert set(search_rewards(messages_of(CHAIN, (1, 2))).values()) == {None}


def test_random_rewards_are_those_of_other_messages_of_the_same_agent():
    rollouts = messages_of(CHAIN, (3, 4, 1, 1), outcomes=[1.0, -1.0, -1.0] * 4)
    original, shuffled = REWARDS["outcome"](rollouts), REWARDS["random"](rollouts)
    for agent in CHAIN.agents:
        nodes = [node for node in rollouts if node.message.agent == agent.name]
        assert sorted(shuffled[node] for node in nodes) == sorted(original[node] for node in nodes)
    assert list(shuffled.values())[-12:] != list(original.values())[-12:]


def test_returns_add_the_later_rewards_and_average_over_continuations(tree):
    rewards = dict(zip(tree, [1.0, 2.0, 10.0, 20.0, 30.0, 50.0], strict=True))
    expected = dict(zip(tree, [16.0, 42.0, 10.0, 20.0, 30.0, 50.0], strict=True))
    assert list(returns(rewards).items()) == list(expected.items())


# ---- Advantages ----------------------------------------------------------------------------------

SPREAD = statistics.pstdev([1, 3, 5, 7])
ADVANTAGES_BY_HAND = [  # rewards of the tree, and what follows from them by either baseline
    (
        [0.0, 1.0, 1.0, 3.0, 5.0, 7.0],
        [-1.0, 1.0, *((reward - 4) / SPREAD for reward in (1, 3, 5, 7))],
        [-1.0, 1.0, -1 / SPREAD, 1 / SPREAD, -1 / SPREAD, 1 / SPREAD],
    ),
    # B's siblings agree: it is not moved by the luck of A.
    ([0.0, 1.0, 3.0, 3.0, 7.0, 7.0], [-1, 1, -1, -1, 1, 1], [-1, 1, 0, 0, 0, 0]),
    # Equal rewards, up to rounding, give nothing to compare.
    ([0.3, 0.3 + 9e-5, 5.0, 5.0, 5.0, 5.0], [None] * 6, [None] * 6),
    # Without a reward: neither trained on, nor part of a mean. Its sibling has nothing to compare.
    (
        [None, 9.0, 1.0, None, 1.0, 3.0],
        [None, None, -(0.5**0.5), None, -(0.5**0.5), 2**0.5],  # mean 5/3, spread sqrt(8/9)
        [None, None, None, None, -(1.125**0.5), 1.125**0.5],
    ),
]


@pytest.mark.parametrize("rewards, by_agent, by_siblings", ADVANTAGES_BY_HAND)
@pytest.mark.parametrize("is_cut", [False, True])
def test_the_advantages_by_hand(tree, rewards, by_agent, by_siblings, is_cut):
    """A message that was cut at its limit counts as one without a reward."""
    credits = dict(zip(tree, rewards, strict=True))
    for node in tree:
        if is_cut and credits[node] is None:
            credits[node] = 100.0
            node.candidate = node.candidate._replace(truncated=True)
    for baseline, expected in (("agent", by_agent), ("siblings", by_siblings)):
        result = advantages(credits, baseline)
        assert [result.get(node) for node in tree] == pytest.approx(expected)


def test_the_measures_of_an_agent_by_hand():
    """V knows which question is easy, and ranks the plans of each in the wrong order."""
    easy = messages_of(CHAIN, (1, 4, 1, 1), outcomes=[1.0, 1.0, 1.0, -1.0])
    hard = messages_of(CHAIN, (1, 4, 1, 1), outcomes=[1.0, -1.0, -1.0, -1.0])
    easy_problem, hard_problem = (Problem(name, "train", "q", "7", "number") for name in "ab")
    both = dict.fromkeys(easy, easy_problem) | dict.fromkeys(hard, hard_problem)
    q = search_rewards(both)
    for node in both:
        node.V = (0.5 if node in easy else -0.5) - 0.1 * q[node]
    plan = next(node for node in easy if node.message.agent == "Planner")
    plan.candidate = Candidate("long", 12, -1.0, truncated=True)
    expected = {"messages": 8, "tokens": (12 + 7 * 2) / 8, "truncated": 1 / 8, "right": 0.5}
    expected |= {"value": pytest.approx(0.5), "value_auc": 0.0}
    assert agent_measures(both, q)["Planner"] == expected
    for node in easy:
        node.V = None
    measures = agent_measures(dict.fromkeys(easy, easy_problem), q)["Planner"]
    assert (measures["value"], measures["value_auc"], measures["right"]) == (None, None, 0.75)


# ---- The update ----------------------------------------------------------------------------------


def make_learner(*flags):
    """Return the tiny agents, without V, as the script loads them."""
    flags = ["--run", "nowhere", "--reward", "outcome", "--max-new-tokens", 60, *flags]
    return Learner(train_agents.parse_args(script_argv(flags)))


@pytest.fixture(scope="module")
def shared():
    """A learner whose weights no test moves."""
    return make_learner()


def train_problems(num):
    return load_problems("tiny", None, {"train": num})


@pytest.fixture(scope="module")
def rollouts(shared):
    return shared.sample(train_problems(2), (2, 2, 1, 1), name="fixture")


def trained_messages(learner, advantage_of, rollouts):
    messages = []
    for node, advantage in advantage_of.items():
        prompt_ids = learner.policy.prompt_ids(node.parent.state, rollouts[node].answer_type)
        agent, token_ids = node.message.agent, node.candidate.token_ids
        messages.append(TrainedMessage(agent, tuple(prompt_ids), token_ids, advantage))
    return messages


@torch.no_grad()
def teacher_forced(learner, message, temperature):
    """Return log pi of the tokens of a message that is read alone, without packing."""
    learner.adapters.use(message.agent)
    ids = torch.tensor([[*message.prompt_ids, *message.token_ids]])
    logits = learner.adapters.model(input_ids=ids).logits[0, len(message.prompt_ids) - 1 : -1]
    chosen = torch.tensor(message.token_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]


def test_log_probabilities_are_those_of_the_agent_that_spoke_at_the_sampling_temperature():
    """Packed or alone. Each agent has an adapter, which the reference is without."""
    learner = make_learner("--adapters", "per-agent", "--temperature", 1.7)
    torch.manual_seed(1)
    for weight in learner.parameters:
        weight.data = 0.05 * torch.randn_like(weight)
    rollouts = learner.sample(train_problems(1), (2, 2, 1, 1), name="s")
    messages = trained_messages(learner, dict.fromkeys(rollouts, 1.0), rollouts)
    read = list(itertools.chain(*learner.read(messages)))
    assert len(read) == len(messages) == 2 + 3 * 4
    for message, logprobs in read:
        expected = teacher_forced(learner, message, 1.7)
        torch.testing.assert_close(logprobs.detach(), expected, atol=1e-4, rtol=0)
    learner.update(messages, seeded(0))
    with learner.adapters.off():
        for message in messages:
            expected = teacher_forced(learner, message, 1.7)
            torch.testing.assert_close(message.reference_logprobs, expected, atol=1e-4, rtol=0)


def test_messages_are_sampled_with_the_noise_of_their_step_and_read_by_v(value_folder):
    """V also reads the question, without any message."""
    learner = make_learner("--value", value_folder)
    first, again, other = [
        learner.sample(train_problems(1), (2, 1, 1, 1), name=name) for name in ("1", "1", "2")
    ]
    texts = [[node.message.text for node in nodes] for nodes in (first, again, other)]
    assert texts[0] == texts[1] != texts[2]
    nodes = [*first, next(iter(first)).parent]
    for node in nodes:
        [expected] = learner.value_model.score([node.state], batch_tokens=999)
        assert abs(node.V - expected) < 1e-5
    assert len({node.V for node in nodes}) > 3


CLIPPED_BY_HAND = [  # ratio, advantage, gain, clipped
    (1.1, 1.0, 1.1, 0),
    (1.5, 1.0, 1.2, 1),  # no more to gain above 1.2
    (0.5, 1.0, 0.5, 0),
    (0.5, -1.0, -0.8, 1),  # no more to gain below 0.8
    (1.5, -1.0, -1.5, 0),
]


@pytest.mark.parametrize("ratio, advantage, gain, clipped", CLIPPED_BY_HAND)
def test_the_clipped_objective_by_hand(shared, ratio, advantage, gain, clipped):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    message = TrainedMessage("Reader", (1,), (2,), advantage, torch.zeros(1), logprobs.detach())
    loss, kl, num_clipped = shared.loss([(message, logprobs)])
    loss.backward()
    assert (loss.item(), kl, num_clipped) == (pytest.approx(-gain, abs=1e-6), 0, clipped)
    assert logprobs.grad.item() == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-6)


def test_the_kl_penalty_by_hand(shared):
    """r - log r - 1 per token, with r = reference / policy: never negative, 0 at the reference."""
    new, reference = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -1.0, -3.0])
    logprobs = new.clone().requires_grad_()
    message = TrainedMessage("Reader", (1,), (2, 3, 4), 0.0, new, reference)
    loss, kl, _ = shared.loss([(message, logprobs)] * 2)
    loss.backward()
    expected = 2 * ((math.exp(-0.5) + 0.5 - 1) + (math.exp(1) - 1 - 1))
    assert kl == pytest.approx(expected) and kl > 0
    assert loss.item() == pytest.approx(0.01 * expected)
    # The derivative by log pi, which pulls the policy to the reference, is 1 - r.
    r = (reference - new).exp()
    assert logprobs.grad.tolist() == pytest.approx((2 * 0.01 * (1 - r)).tolist())


def gradients_of_update(learner, messages):
    """Return the gradient of each optimizer step."""
    gradients = []

    def keep(optimizer, *_):
        gradients.append(torch.cat([p.grad.flatten() for p in learner.parameters]))

    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-12
    hook = learner.optimizer.register_step_pre_hook(keep)
    learner.optimizer.zero_grad()
    learner.update(messages, seeded(0))
    hook.remove()
    return gradients


def test_every_token_of_every_sample_has_the_same_weight(shared, rollouts):
    """Whatever the minibatches are. Equal messages count as often as they were sampled."""
    messages = trained_messages(shared, dict.fromkeys(rollouts, 0.01), rollouts)
    messages.append(replace(messages[0], advantage=0.03))
    gradients = gradients_of_update(shared, messages)
    assert len(gradients) == 4
    num_tokens = sum(len(message.token_ids) for message in messages)
    for message in messages:
        for batch in shared.read([message]):
            (shared.loss(batch)[0] / num_tokens).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in shared.parameters])
    assert expected.norm() > 1e-4
    mean = torch.stack(gradients).mean(0)
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-3)


def test_messages_of_one_prompt_share_a_minibatch(rollouts):
    """At the first minibatch the ratio is 1, and the KL that to the base, over all tokens."""
    learner = make_learner("--seed", 1)
    for weight in learner.parameters:
        weight.data = 0.2 * torch.randn_like(weight)
    messages = trained_messages(learner, dict.fromkeys(rollouts, 1.0), rollouts)
    messages = [m for m in messages if m.prompt_ids == messages[0].prompt_ids]
    had_gradient = []
    learner.optimizer.register_step_pre_hook(
        lambda *_: had_gradient.append(learner.parameters[0].grad is not None)
    )
    report = learner.update(messages, seeded(0))
    assert len(messages) == 2 and sorted(had_gradient) == [False, False, False, True]
    log_r = torch.cat([message.reference_logprobs - message.old_logprobs for message in messages])
    kl = (log_r.exp() - log_r - 1).mean().item()
    assert report == {"kl": pytest.approx(kl, rel=1e-3), "clip_share": 0} and kl > 0.01


def test_gradients_are_clipped_to_norm_1_and_must_be_finite(shared, rollouts):
    messages = trained_messages(shared, dict.fromkeys(rollouts, 1e4), rollouts)
    for gradient in gradients_of_update(shared, messages):
        assert gradient.norm().item() == pytest.approx(1.0, abs=1e-3)
    messages[0].advantage = math.inf
    with pytest.raises(InputError, match="not finite"):
        gradients_of_update(shared, messages)


def test_an_update_moves_the_adapter_of_the_speaker_only(rollouts):
    learner = make_learner("--adapters", "per-agent", "--lora-rank", 4)
    before = {n: p.detach().clone() for n, p in learner.adapters.model.named_parameters()}
    plans = {node: 1.0 for node in rollouts if node.message.agent == "Planner"}
    learner.update(trained_messages(learner, plans, rollouts), seeded(0))
    after = dict(learner.adapters.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".agent_Planner." in name for name in moved)


def test_a_planted_reward_is_learnt():
    """The Reader lists its facts in random order. Reward it for starting with the total."""
    learner = make_learner("--policy-lr", "4e-3")
    assert learner.optimizer.param_groups[0]["lr"] == 4e-3
    problems = train_problems(20)
    shares = []
    for step in range(5):
        rollouts = learner.sample(problems[4 * step : 4 * step + 4], (12,), name=f"step {step}")
        rewards = {node: float(node.message.text.startswith("Facts: total")) for node in rollouts}
        shares.append(statistics.fmean(rewards.values()))
        messages = trained_messages(learner, advantages(rewards, "siblings"), rollouts)
        learner.update(messages, seeded(step))
    assert shares[0] < 0.5 and shares[-1] > 0.8, shares


@pytest.fixture(scope="module")
def value_folder(tmp_path_factory):
    """Return the folder of a V that has been trained a little, on scripted labels."""
    run = tmp_path_factory.mktemp("value")
    write_trees(run / "rollouts", TREES, CHAIN)
    output_of(train_value, "--run", run, "--epochs", 1, "--lr", "0.01", "--lora-rank", 2)
    return run / "value"


@pytest.mark.parametrize("reward", ["value", "value-return"])
def test_a_step_compares_values_with_siblings_or_returns_with_the_agent(value_folder, reward):
    """For V of new states, nobody has to speak after the Planner, whose messages are compared."""
    compared, rollouts, speakers = {
        "value": ("reward", "tree-1.3.1.1", {"Reader", "Planner"}),
        "value-return": ("return", "passes-3", {agent.name for agent in CHAIN.agents}),
    }[reward]
    flags = ["--reward", reward, "--rollouts", rollouts, "--num-questions", 2]
    learner = make_learner("--value", value_folder, *flags, "--max-new-tokens", 192)
    _, step = learner.take_step(1)
    groups, of_agent = defaultdict(list), defaultdict(list)
    for message in step["messages"]:
        of_agent[message["agent"]].append(message[compared])
        state = (message["problem"], message["path"][:-1])
        groups[state if reward == "value" else message["agent"]].append(message)
    assert of_agent.keys() == speakers
    for group in groups.values():
        mean = statistics.fmean(message[compared] for message in group)
        for message in group:
            spread = statistics.pstdev(of_agent[message["agent"]])
            expected = (message[compared] - mean) / spread if len(group) > 1 else None
            assert message["advantage"] == pytest.approx(expected)


def test_messages_without_a_score_of_the_coach_are_not_trained_on():
    """The tiny agents do not grade. Every step has other questions, and other noise for them."""
    flags = ["--reward", f"coach:{TINY_AGENTS}", "--num-questions", 2, "--num-train", 3]
    learner = make_learner(*flags, "--graph", "single", "--max-new-tokens", 30)
    texts = [defaultdict(list), defaultdict(list)]
    for step in (0, 1):
        record, logged = learner.take_step(step)
        assert (record["without_reward"], record["trained_on"]) == (8, 0)
        for message in logged["messages"]:
            texts[step][message["problem"]].append(message["message"])
    [shared] = texts[0].keys() & texts[1].keys()
    assert texts[0][shared] != texts[1][shared]


# ---- The script ----------------------------------------------------------------------------------

SMALL = ["--graph", "single", "--reward", "outcome", "--num-questions", 8, "--num-train", 24]
SMALL += ["--num-heldout", 12, "--num-steps", 3, "--policy-lr", "3e-3", "--seed", 4]
FILES = ("metrics.jsonl", "messages.jsonl", "adapter/shared/adapter_model.safetensors")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Flags of a run of a few seconds. The agent lists facts, and should end with the largest."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    with open(path, "w") as file:
        for problem in train_problems(200):
            total = max(re.findall(r"\d+", problem.question), key=int)
            print(json.dumps({"question": problem.question, "answer": total}), file=file)
    return [*SMALL, "--data", path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small):
    """Return the folder of a finished run, in which the agents become better."""
    run = tmp_path_factory.mktemp("finished")
    output_of(train_agents, "--run", run, *small)
    return run / "agents"


def test_a_finished_run_has_measured_kept_and_recorded_what_it_should(finished, small):
    records = read_lines(finished / "metrics.jsonl")
    accuracies = {r["step"]: r["dev"]["accuracy"] for r in records if "dev" in r}
    assert list(accuracies) == [0, 2, 3] and accuracies[3] > accuracies[0]
    assert read_config(finished)["best_step"] == max(accuracies, key=accuracies.get)
    trained_on = set()
    for step in read_lines(finished / "messages.jsonl"):
        trained_on |= {message["problem"] for message in step["messages"]}
    seen = read_lines(finished / "problems.jsonl")
    assert len(seen) == 36 and trained_on <= {row["id"] for row in seen if row["split"] == "train"}


def test_the_first_of_the_best_adapters_are_kept(tmp_path, small):
    """Here the agents break, so that nothing is better than the adapters that change nothing."""
    flags = ["--policy-lr", "0.03", "--num-steps", 1, "--seed", 2, "--max-new-tokens", 60]
    output_of(train_agents, "--run", tmp_path, *small, *flags)
    before, after = read_lines(tmp_path / "agents" / "metrics.jsonl")
    assert before["dev"]["accuracy"] > after["dev"]["accuracy"]
    assert read_config(tmp_path / "agents")["best_step"] == 0
    weights = load_file(tmp_path / "agents" / FILES[2])
    assert all(weight.abs().max() == 0 for name, weight in weights.items() if "lora_B" in name)


def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(finished, tmp_path, small):
    kill_when(tmp_path, "agents/metrics.jsonl", 3, train_agents, *small)
    output_of(train_agents, "--run", tmp_path, *small)
    for name in FILES:
        assert (tmp_path / "agents" / name).read_bytes() == (finished / name).read_bytes(), name


def test_training_from_given_adapters_inherits_what_they_and_v_have_seen(finished, tmp_path, small):
    """evaluate.py refuses to test on it."""
    flags = ["--graph", "single", "--num-train", 3, "--num-heldout", 1, "--num-simulations", 3]
    output_of(generate_rollouts, "--run", tmp_path, *flags)
    output_of(train_value, "--run", tmp_path, "--epochs", 1)
    flags = ["--adapter", finished, "--reward", "value", "--num-steps", 1, "--num-questions", 1]
    output_of(train_agents, "--run", tmp_path, *small, *flags)
    seen = read_lines(tmp_path / "agents" / "problems.jsonl")
    assert seen[36:72] == read_lines(finished / "problems.jsonl")
    assert seen[72:] == read_lines(tmp_path / "value" / "problems.jsonl")


def test_a_run_does_not_go_on_without_the_v_that_it_was_given(value_folder, tmp_path, small):
    value = shutil.copytree(value_folder, tmp_path / "value")
    flags = ["--run", tmp_path, *small, "--graph", "chain", "--num-steps", 1, "--num-heldout", 1]
    output_of(train_agents, *flags, "--num-train", 2, "--max-new-tokens", 20)
    value.rename(tmp_path / "moved")
    error = error_of(train_agents, *flags, "--num-train", 2, "--max-new-tokens", 20)
    assert f"value (there {value}#" in error


OTHER_SETTINGS = ["--reward random", "--rollouts passes-3", "--num-train 5", "--lora-rank 4"]
OTHER_SETTINGS += ["--adapters per-agent", "--policy-lr 0.1", "--seed 1", "--num-steps 4"]


@pytest.mark.parametrize("flags", OTHER_SETTINGS)
def test_another_setting_in_the_same_folder_is_refused(finished, small, flags):
    error = error_of(train_agents, "--run", finished.parent, *small, *flags.split())
    assert flags.split()[0][2:].replace("num-train", "problems").replace("-", "_") in error
