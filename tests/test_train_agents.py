"""Tests of train_agents.py: rewards and advantages by hand, the update by hand, and whole runs."""

import itertools
import json
import math
import os
import signal
import statistics
import time
from collections import defaultdict
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import error_of, exit_code_of, output_of, read_lines, script_argv, start_in_fork
from searching import DUO, HINT, ScriptedPolicy, drive

import train_agents
from llm.adapters import add_lora
from mas import CHAIN
from support.flags import TINY_AGENTS, InputError
from support.runs import read_config, seeded, write_config
from support.statistics import agent_measures
from tasks.grading import extract_answer
from tasks.problems import Problem, is_correct, load_problems
from train_agents import (
    CLIP,
    KL_COEF,
    NUM_MINIBATCHES,
    REWARDS,
    Learner,
    TrainedMessage,
    advantages,
    returns,
    sample_tree,
    search_rewards,
)
from tree import Candidate, Sample
from value import ValueModel, load_backbone, rendering_fingerprint

PROBLEM = Problem("p", "train", "What is 3 + 4?", "7", "number")

# ---- Rollouts ------------------------------------------------------------------------------------


def messages_of(mas, num_candidates, *, say=str, outcomes=(), problem=PROBLEM):
    """Return the messages of a scripted tree; its terminal nodes have these outcomes, in order."""
    nodes = drive(sample_tree("q", mas, num_candidates), {Sample: ScriptedPolicy(mas, say)})
    leaves = [node for node in nodes if not node.children]
    for leaf, outcome in zip(leaves, outcomes, strict=False):
        leaf.outcome = outcome
    return dict.fromkeys(nodes, problem)


def by_path(numbers):
    return {node.path: number for node, number in numbers.items()}


def test_every_state_gets_its_candidates_and_equal_messages_are_not_merged():
    """Else a message sampled twice would count once, and means would be no expectations."""
    nodes = list(messages_of(DUO, (2, 3), say=lambda path: "the same"))
    paths = [node.path for node in nodes]
    assert paths == [(0,), (1,), (0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    passes = [node.path for node in messages_of(CHAIN, (2, 1, 1, 1))]
    assert passes == [(0,), (1,), (0, 0), (1, 0), (0, 0, 0), (1, 0, 0), (0, 0, 0, 0), (1, 0, 0, 0)]


@pytest.mark.parametrize(
    "first, num_candidates, expected",
    [
        ("help", (1, 2, 2), "ABBCCCC"),
        ("fine", (1, 2, 2), "ACC"),  # C is the third agent, whether or not B has spoken
        ("fine", (1, 2), "A"),
        ("help", (1, 2), "ABB"),
    ],
)
def test_agents_speak_in_their_turn_if_they_have_an_entry(first, num_candidates, expected):
    nodes = messages_of(HINT, num_candidates, say=lambda path: "word" if path[1:] else first)
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
    assert by_path(search_rewards(rollouts))[0, 0] == 1.0
    assert by_path(search_rewards(rollouts))[0,] == 0.5
    assert set(search_rewards(messages_of(CHAIN, (1, 2))).values()) == {None}


def test_random_rewards_are_those_of_other_messages_of_the_same_agent():
    outcomes = [1.0, -1.0, -1.0] * 4
    rollouts = messages_of(CHAIN, (3, 4, 1, 1), outcomes=outcomes)
    original, shuffled = REWARDS["outcome"](rollouts), REWARDS["random"](rollouts)
    assert list(shuffled) == list(rollouts)
    for agent in CHAIN.agents:
        nodes = [node for node in rollouts if node.message.agent == agent.name]
        assert sorted(shuffled[node] for node in nodes) == sorted(original[node] for node in nodes)
    leaves = [node for node in rollouts if not node.children]
    assert [shuffled[node] for node in leaves] != [original[node] for node in leaves]
    other_texts = messages_of(CHAIN, (3, 4, 1, 1), outcomes=outcomes, say=lambda path: f"{path}!")
    assert list(REWARDS["random"](other_texts).values()) != list(shuffled.values())


def test_returns_add_the_later_rewards_and_average_over_continuations(tree):
    rewards = dict(zip(tree, [1.0, 2.0, 10.0, 20.0, 30.0, 50.0], strict=True))
    assert list(returns(rewards).items()) == list(
        zip(tree, [16.0, 42.0, 10.0, 20.0, 30.0, 50.0], strict=True)
    )


@pytest.mark.parametrize("seed", range(3))
def test_changes_of_v_sum_to_the_outcome_minus_v_whatever_v_is(seed):
    """No error of V can bend the returns: (Q - V) / 2, so V is a baseline only."""
    rng = seeded(seed)
    outcomes = [rng.choice([1.0, -1.0]) for _ in range(6)]
    rollouts = messages_of(CHAIN, (2, 3, 1, 1), outcomes=outcomes)
    for node in [next(iter(rollouts)).parent, *rollouts]:
        node.V = rng.uniform(-1, 1)
    q = search_rewards(rollouts)
    for node, total in returns(REWARDS["value-return"](rollouts)).items():
        assert total == pytest.approx((q[node] - node.parent.V) / 2)


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


def test_the_agent_baseline_is_over_all_questions():
    """MAPPA: no group by question, because later agents see different inputs."""
    first, second = list(messages_of(DUO, (1, 1))), list(messages_of(DUO, (1, 1)))
    credits = dict(zip(first + second, [0.0, 1.0, 4.0, 2.0], strict=True))
    assert list(advantages(credits, "agent").values()) == [-1.0, -1.0, 1.0, 1.0]
    assert advantages(credits, "siblings") == {}


# ---- What is measured ----------------------------------------------------------------------------


def test_the_measures_of_an_agent_by_hand():
    """V knows which question is easy, and ranks the plans of each in the wrong order."""
    other = replace(PROBLEM, id="other")
    easy = messages_of(CHAIN, (1, 4, 1, 1), outcomes=[1.0, 1.0, 1.0, -1.0])
    hard = messages_of(CHAIN, (1, 4, 1, 1), outcomes=[1.0, -1.0, -1.0, -1.0], problem=other)
    for rollouts, level in ((easy, 0.5), (hard, -0.5)):
        for node in rollouts:
            node.V = level - 0.1 * search_rewards(rollouts)[node]
    plan = next(node for node in easy if node.message.agent == "Planner")
    plan.candidate = Candidate("long", 12, -1.0, truncated=True)
    measures = agent_measures(easy | hard, search_rewards(easy | hard))["Planner"]
    assert measures == {
        "messages": 8,
        "tokens": (12 + 7 * 2) / 8,
        "truncated": 1 / 8,
        "right": 0.5,
        "value": pytest.approx(0.5),
        "value_auc": 0.0,
    }
    for node in easy:
        node.V = None
    measures = agent_measures(easy, search_rewards(easy))["Planner"]
    assert (measures["value"], measures["value_auc"], measures["right"]) == (None, None, 0.75)


# ---- The update ----------------------------------------------------------------------------------


def make_learner(*flags):
    """Return the tiny agents, without V, as the script loads them."""
    flags = ["--run", "nowhere", "--reward", "outcome", "--max-new-tokens", 60, *flags]
    return Learner(train_agents.parse_args(script_argv(flags)))


@pytest.fixture(scope="module")
def shared():
    """A learner that no test changes."""
    return make_learner()


@pytest.fixture
def learner(shared):
    """A learner that is as before when the test ends."""
    weights = shared.adapters.weights()
    yield shared
    shared.adapters.set_weights(weights)
    shared.optimizer.zero_grad()


def train_problems(num):
    return load_problems(task="tiny", data=None, split="train", num=num)


@pytest.fixture(scope="module")
def rollouts(shared):
    return shared.sample(train_problems(2), (2, 2, 1, 1), name="fixture")


def trained_messages(learner, rollouts, advantage=1.0):
    messages = []
    for node, problem in rollouts.items():
        prompt_ids = tuple(learner.policy.prompt_ids(node.parent.state, problem.answer_type))
        token_ids = node.candidate.token_ids
        messages.append(TrainedMessage(node.message.agent, prompt_ids, token_ids, advantage))
    return messages


def randomise(adapters, std=0.05):
    torch.manual_seed(1)
    adapters.set_weights(
        {name: std * torch.randn_like(w) for name, w in adapters.weights().items()}
    )


@torch.no_grad()
def teacher_forced(learner, message, temperature):
    """Return log pi of the tokens of a message that is read alone, without packing."""
    learner.adapters.use(message.agent)
    ids = torch.tensor([[*message.prompt_ids, *message.token_ids]])
    logits = learner.adapters.model(input_ids=ids).logits[0, len(message.prompt_ids) - 1 : -1]
    chosen = torch.tensor(message.token_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, chosen)[:, 0]


def test_log_probabilities_are_those_of_the_agent_that_spoke_at_the_sampling_temperature():
    """Packed or alone; the sampler recorded those before temperature. Each agent has its adapter."""
    learner = make_learner("--adapters", "per-agent", "--temperature", 1.7)
    randomise(learner.adapters)
    rollouts = learner.sample(train_problems(1), (2, 2, 1, 1), name="s")
    messages = trained_messages(learner, rollouts)
    read = list(itertools.chain(*learner.read(messages)))
    assert len(read) == len(messages) == 2 + 3 * 4
    for message, logprobs in read:
        expected = teacher_forced(learner, message, 1.7)
        torch.testing.assert_close(logprobs.detach(), expected, atol=1e-4, rtol=0)
    for node, message in zip(rollouts, messages, strict=True):
        logprob = teacher_forced(learner, message, 1.0).sum().item()
        assert node.candidate.logprob == pytest.approx(logprob, abs=1e-3)
    learner.update(messages, seeded(0))
    with learner.adapters.off():
        for message in messages:
            expected = teacher_forced(learner, message, 1.7)
            torch.testing.assert_close(message.reference_logprobs, expected, atol=1e-4, rtol=0)


def test_messages_are_sampled_graded_and_read_by_v(learner, tmp_path):
    """With the noise of the step's name. V also reads the question, without any message."""
    problems = train_problems(2)[::-1]
    rollouts = learner.sample(problems, (2, 1, 1, 1), name="step 1")
    ids = [problem.id for problem in rollouts.values()]
    assert ids == sorted(ids) and set(ids) == {problem.id for problem in problems}
    for node, problem in rollouts.items():
        assert learner.policy.chat_format.message(node.candidate.token_ids) == node.message.text
        expected = None
        if CHAIN.is_terminal(node.state):
            answer = extract_answer(node.message.text, problem.answer_type).value
            expected = 1.0 if is_correct(problem, answer) else -1.0
        assert node.outcome == expected and node.V is None
    texts = [node.message.text for node in rollouts]
    write_value(tmp_path)
    reader = make_learner("--value", tmp_path)
    again = reader.sample(problems, (2, 1, 1, 1), name="step 1")
    assert [node.message.text for node in again] == texts
    other = reader.sample(problems, (2, 1, 1, 1), name="step 2")
    assert [node.message.text for node in other] != texts
    nodes = [*again, next(iter(again)).parent]
    for node in nodes:
        [expected] = reader.value_model.score([node.state], batch_tokens=999)
        assert pytest.approx(expected, abs=1e-5) == node.V
    assert len({node.V for node in nodes}) > 3


CLIPPED_BY_HAND = [  # ratio, advantage, gain, clipped
    (1.0, 2.0, 2.0, 0),
    (1.1, 1.0, 1.1, 0),
    (1.5, 1.0, 1 + CLIP, 1),  # no more to gain above 1 + CLIP
    (0.5, 1.0, 0.5, 0),
    (0.5, -1.0, CLIP - 1, 1),  # no more to gain below 1 - CLIP
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
    assert loss.item() == pytest.approx(KL_COEF * expected)
    # The derivative by log pi, which pulls the policy to the reference, is 1 - r.
    r = (reference - new).exp()
    assert logprobs.grad.tolist() == pytest.approx((2 * KL_COEF * (1 - r)).tolist())


def gradients_of_update(learner, messages):
    """Return the gradient of each optimizer step, and what `update` returns."""
    gradients = []

    def keep(optimizer, *_):
        grads = [p.grad for p in learner.parameters if p.grad is not None]
        gradients.append(torch.cat([grad.flatten() for grad in grads]) if grads else None)

    for group in learner.optimizer.param_groups:
        group["lr"] = 1e-12
    hook = learner.optimizer.register_step_pre_hook(keep)
    report = learner.update(messages, seeded(0))
    hook.remove()
    return gradients, report


def test_every_token_of_every_sample_has_the_same_weight(learner, rollouts):
    """Whatever the minibatches and batches are. Equal messages count as often as they were sampled."""
    messages = trained_messages(learner, rollouts, advantage=0.01)
    messages += [replace(messages[0], advantage=a) for a in (-0.02, 0.03)]
    gradients, _ = gradients_of_update(learner, messages)
    assert len(gradients) == NUM_MINIBATCHES
    num_tokens = sum(len(message.token_ids) for message in messages)
    learner.optimizer.zero_grad()
    for message in messages:
        for batch in learner.read([message]):
            (learner.loss(batch)[0] / num_tokens).backward()
    expected = torch.cat([parameter.grad.flatten() for parameter in learner.parameters])
    assert expected.norm() > 1e-4
    mean = sum(gradient for gradient in gradients if gradient is not None) / NUM_MINIBATCHES
    torch.testing.assert_close(mean, expected, atol=1e-6, rtol=1e-3)


def test_messages_of_one_prompt_share_a_minibatch_and_are_read_together(learner, rollouts):
    """The first minibatch has ratio 1; its KL is that to the base, over all tokens."""
    randomise(learner.adapters)
    messages = [m for m in trained_messages(learner, rollouts) if m.agent == "Reader"]
    prompts = [m.prompt_ids for m in messages]
    messages = [m for m in messages if m.prompt_ids == prompts[0]]
    assert len(messages) == 2
    sizes = []
    hook = learner.adapters.model.register_forward_pre_hook(
        lambda module, args, kwargs: sizes.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    gradients, report = gradients_of_update(learner, messages)
    hook.remove()
    assert sum(gradient is not None for gradient in gradients) == 1
    tokens = [len(m.token_ids) for m in messages]
    assert max(sizes) <= len(prompts[0]) + sum(tokens) and len(sizes) == 3
    kl = sum((m.reference_logprobs - m.old_logprobs).expm1().sum() for m in messages)
    kl -= sum((m.reference_logprobs - m.old_logprobs).sum() for m in messages)
    assert report == {"kl": pytest.approx(kl.item() / sum(tokens), rel=1e-3), "clip_share": 0}
    assert report["kl"] > 0.01


def test_gradients_are_clipped_to_norm_1_and_must_be_finite(learner, rollouts):
    messages = trained_messages(learner, rollouts, advantage=1e4)
    for gradient in gradients_of_update(learner, messages)[0]:
        assert gradient is None or gradient.norm().item() == pytest.approx(1.0, abs=1e-3)
    messages[0].advantage = math.inf
    with pytest.raises(InputError, match="not finite; lower --policy-lr"):
        learner.update(messages, seeded(0))


def test_an_update_moves_the_adapter_of_the_speaker_only(rollouts):
    learner = make_learner("--adapters", "per-agent", "--lora-rank", 4)
    before = {n: p.detach().clone() for n, p in learner.adapters.model.named_parameters()}
    messages = [m for m in trained_messages(learner, rollouts) if m.agent == "Planner"]
    learner.update(messages, seeded(0))
    after = dict(learner.adapters.model.named_parameters())
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".agent_Planner." in name for name in moved)
    assert learner.update([], seeded(0)) == {"kl": 0, "clip_share": 0}


def test_a_planted_reward_is_learnt():
    """The Reader lists its facts in random order. Reward it for starting with the total."""
    learner = make_learner("--policy-lr", "4e-3")
    problems = train_problems(20)
    shares = []
    for step in range(5):
        rollouts = learner.sample(problems[4 * step : 4 * step + 4], (12,), name=f"step {step}")
        rewards = {node: float(node.message.text.startswith("Facts: total")) for node in rollouts}
        shares.append(statistics.fmean(rewards.values()))
        advantage_of = advantages(rewards, "siblings")
        messages = trained_messages(learner, {node: rollouts[node] for node in advantage_of})
        for message, advantage in zip(messages, advantage_of.values(), strict=True):
            message.advantage = advantage
        learner.update(messages, seeded(step))
    assert shares[0] < 0.5 and shares[-1] > 0.8, shares


# ---- The script ----------------------------------------------------------------------------------

SMALL = ["--num-questions", 2, "--rollouts", "passes-2", "--num-train", 6, "--num-heldout", 2]
SMALL += ["--num-steps", 3, "--policy-lr", "3e-3", "--reward", "outcome", "--seed", 0]
FILES = ("metrics.jsonl", "messages.jsonl", "adapter/shared/adapter_model.safetensors")


def write_value(folder):
    """Write a V with random weights, which has seen one problem."""
    torch.manual_seed(0)
    backbone, tokenizer = load_backbone(TINY_AGENTS, quantize=False, device="cpu", dtype="float32")
    model = ValueModel(add_lora(backbone, rank=2), tokenizer, CHAIN, "full", "huber")
    torch.nn.init.normal_(model.head.weight, std=0.2)
    folder.mkdir(exist_ok=True)
    model.save(folder)
    fingerprint = make_learner().policy.settings["model"]["fingerprint"]
    settings = {"backbone": {"name": str(Path(TINY_AGENTS).resolve()), "fingerprint": fingerprint}}
    settings |= {"quantize": False, "view": "full", "loss": "huber", "graph": asdict(CHAIN)}
    settings |= {"rendering": rendering_fingerprint(CHAIN, "full"), "target": "search"}
    write_config(folder, {"settings": settings, "finished": True})
    line = {"id": "seen by V", "split": "train", "question_key": "0"}
    (folder / "problems.jsonl").write_text(json.dumps(line) + "\n")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of a finished run of three small steps, of which the second is the best."""
    run = tmp_path_factory.mktemp("finished")
    output_of(train_agents, "--run", run, *SMALL)
    return run / "agents"


def test_the_adapters_of_the_best_step_are_kept(finished, tmp_path):
    records = read_lines(finished / "metrics.jsonl")
    assert [record["messages"] for record in records] == [0, 16, 32, 48]
    accuracies = {r["step"]: r["dev"]["accuracy"] for r in records if "dev" in r}
    assert list(accuracies) == [0, 2, 3] and max(accuracies, key=accuracies.get) == 2
    assert read_config(finished)["best_step"] == 2 and not (finished / "checkpoint.pt").exists()
    output_of(train_agents, "--run", tmp_path, *SMALL, "--num-steps", 2)
    assert (finished / FILES[2]).read_bytes() == (tmp_path / "agents" / FILES[2]).read_bytes()
    # It is not trained again.
    assert "finished already" in output_of(train_agents, "--run", finished.parent, *SMALL)
    # Test problems are not among those that it has seen.
    trained_on = {
        m["problem"] for step in read_lines(finished / FILES[1]) for m in step["messages"]
    }
    seen = read_lines(finished / "problems.jsonl")
    assert len(seen) == 8 and trained_on <= {row["id"] for row in seen if row["split"] == "train"}


def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(finished, tmp_path):
    run = partial(output_of, train_agents, "--run", tmp_path, *SMALL)
    metrics = tmp_path / "agents" / "metrics.jsonl"
    for num_lines in (1, 3):
        child = start_in_fork(run)
        while not metrics.is_file() or metrics.read_bytes().count(b"\n") < num_lines:
            time.sleep(0.01)
        os.kill(child, signal.SIGKILL)
        assert exit_code_of(child) == -signal.SIGKILL
    run()
    for name in FILES:
        assert (tmp_path / "agents" / name).read_bytes() == (finished / name).read_bytes(), name


def test_training_goes_on_from_given_adapters(finished, tmp_path):
    """As good as they were on the held-out problems, whose noise is the same at every step."""
    flags = ["--adapter", finished, "--num-steps", 1]
    output_of(train_agents, "--run", tmp_path, *SMALL, *flags)
    start, _ = read_lines(tmp_path / "agents" / "metrics.jsonl")
    assert start["dev"] == read_lines(finished / "metrics.jsonl")[2]["dev"]
    seen = read_lines(tmp_path / "agents" / "problems.jsonl")
    assert len(seen) == 16 and seen[8:] == read_lines(finished / "problems.jsonl")


@pytest.mark.parametrize(
    "reward, rollouts, speakers",
    [
        ("value", "tree-1.3.1.1", 2),  # nobody has to speak after the Planner
        ("search", "tree-1.3.1.1", 4),
        ("value-return", "passes-3", 4),
        ("random", "passes-3", 4),
    ],
)
def test_what_a_step_logs_is_what_it_compares(tmp_path, reward, rollouts, speakers):
    write_value(tmp_path / "value")
    flags = ["--reward", reward, "--rollouts", rollouts, "--num-steps", 1, "--num-heldout", 1]
    output_of(train_agents, "--run", tmp_path, *SMALL, *flags)
    [step] = read_lines(tmp_path / "agents" / "messages.jsonl")
    groups, agents = defaultdict(list), defaultdict(list)
    for message in step["messages"]:
        compared = message.get("return", message["reward"])
        parent = (message["problem"], str(message["path"][:-1]))
        groups[message["agent"] if "passes" in rollouts else parent].append((compared, message))
        agents[message["agent"]].append(compared)
        if reward == "value":
            assert message["reward"] == (message["V"] + 1) / 2 and message["outcome"] is None
        assert ("return" in message) == (reward == "value-return")
    assert len(agents) == speakers
    for group in groups.values():
        mean = statistics.fmean(compared for compared, _ in group)
        for compared, message in group:
            spread = statistics.pstdev(agents[message["agent"]])
            expected = (compared - mean) / spread if len(group) > 1 and spread > 1e-4 else None
            assert message["advantage"] == pytest.approx(expected)
    seen_by_v = "seen by V" in (tmp_path / "agents" / "problems.jsonl").read_text()
    assert seen_by_v == reward.startswith("value")


def test_messages_without_a_score_of_the_coach_are_not_trained_on(tmp_path):
    """The tiny agents do not grade. So nothing moves, also not from one measurement to the next."""
    flags = ["--reward", f"coach:{TINY_AGENTS}", "--adapters", "per-agent", "--num-steps", 1]
    output_of(train_agents, "--run", tmp_path, *SMALL, *flags, "--lora-rank", 4)
    start, end = read_lines(tmp_path / "agents" / "metrics.jsonl")
    assert (end["messages"], end["without_reward"], end["trained_on"]) == (16, 16, 0)
    assert start["dev"] == end["dev"] and read_config(tmp_path / "agents")["best_step"] == 0


OTHER_SETTINGS = ["--reward random", "--rollouts passes-3", "--num-train 5", "--lora-rank 4"]
OTHER_SETTINGS += ["--adapters per-agent", "--policy-lr 0.1", "--seed 1", "--num-steps 4"]


@pytest.mark.parametrize("flags", OTHER_SETTINGS)
def test_another_setting_in_the_same_folder_is_refused(finished, flags):
    error = error_of(train_agents, "--run", finished.parent, *SMALL, *flags.split())
    assert flags.split()[0][2:].replace("num-train", "problems").replace("-", "_") in error


@pytest.mark.parametrize(
    "flags, complaint",
    [
        (["--reward", "bogus"], "coach:MODEL"),
        (["--rollouts", "bogus"], "passes-4"),
        (["--rollouts", "tree-1"], "tree-1.8.1.1"),
        (["--reward", "value"], "value: no config.json"),
        (["--value", "nowhere"], "nowhere: no config.json"),
        (["--adapter", "nowhere"], "nowhere: no config.json"),
    ],
)
def test_flags_that_make_no_sense_are_refused_in_one_line(tmp_path, flags, complaint):
    assert complaint in error_of(train_agents, "--run", tmp_path, *SMALL, *flags)
    assert not (tmp_path / "agents").exists()


def test_there_are_25_flags():
    assert len(vars(train_agents.parse_args([]))) == 25 + 3  # and three that are fixed
