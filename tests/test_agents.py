"""Tests of train_agents.py and adapters.py: the update by hand, a step, what is logged and kept."""

import copy
import json
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    AGENTS,
    ScriptedPolicy,
    dev_record,
    drive,
    make_tiny_policy,
    sample_tiny_rollouts,
)
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import train_agents
from llm.adapters import AgentAdapters, adapters_setting
from llm.loading import load_pretrained
from llm.packing import pack, sequences_of
from mas import CHAIN, State
from report.pictures import plot_training
from report.tables import training_line, training_table
from support.flags import InputError
from support.records import read_jsonl
from support.runs import seeded
from tasks.problems import Problem, load_problems
from train_agents import (
    REWARDS,
    CannotGoOnError,
    DistinctMessage,
    Learner,
    Rollout,
    Training,
    advantages,
    descendants,
    distinct_messages,
    mean_outcomes,
    mix_with_outcome,
    returns,
    sample_tree,
)
from tree import Candidate, Node, Sample

# ---- Pieces --------------------------------------------------------------------------------------


def trained_policy(sharing="shared"):
    """Return the tiny agents with new adapters, which change nothing yet."""
    policy = make_tiny_policy(CHAIN)
    torch.manual_seed(0)
    policy.adapters = AgentAdapters.add(policy.decoder.model, CHAIN, sharing=sharing, rank=8)
    return policy


def write_adapters(policy, folder, *, sharing):
    """Write finished adapters of the tiny agents, as stage 5 does. Returns their settings."""
    policy.adapters.save(folder)
    settings = {"adapters": sharing, "graph": asdict(CHAIN), "quantize_policy": False}
    settings["model"] = policy.settings["model"]
    (folder / "config.json").write_text(json.dumps({"settings": settings, "finished": True}))
    return settings


def make_learner(policy, **changes):
    settings = {"temperature": 1.0, "lr": 1e-3, "clip": 0.2, "kl_coef": 0.01}
    settings |= {"num_minibatches": 1, "batch_tokens": 4096} | changes
    return Learner(policy.adapters, pad_id=policy.decoder.pad_id, **settings)


@pytest.fixture(scope="module")
def shared():
    """Agents whose adapters were never trained, and who are left as they are."""
    return trained_policy()


@pytest.fixture
def learner(shared):
    """Return a learner of agents that are as before when the test ends."""
    weights = shared.adapters.weights()
    yield make_learner(shared)
    shared.adapters.set_weights(weights)


def problems_of(split="train", num=2):
    return load_problems(task="tiny", data=None, split=split, num=num)


def rollouts_of(policy, *, counts=(2, 1, 1, 1), num_agents=4, num=2, seed="s"):
    problems = problems_of(num=num)
    return sample_tiny_rollouts(policy, problems, counts=counts, num_agents=num_agents, seed=seed)


@pytest.fixture(scope="module")
def rollouts(shared):
    return rollouts_of(shared)


def rows_of(rollouts, advantage=1.0):
    nodes = [node for rollout in rollouts for node in rollout.nodes]
    return distinct_messages(rollouts, dict.fromkeys(nodes, advantage))


def in_one_batch(learner, rows):
    """Pack all rows into one batch."""
    sequences = [row.prompt_ids + row.token_ids for row in rows]
    return pack(sequences, token_cost=learner.token_cost, max_width=10_000)


def message_logprobs(learner, rows):
    """Return the log-probabilities of each message's tokens, in the order of the rows."""
    logprobs = learner.message_logprobs(rows, in_one_batch(learner, rows))
    return [logprobs[index] for index in range(len(rows))]


def logprobs_of(learner, rows):
    """Return the summed log-probability of each message."""
    with torch.no_grad():
        return [logprobs.sum().item() for logprobs in message_logprobs(learner, rows)]


def gradient_of(learner, rows):
    """Return the gradient of the loss of these rows, as one vector."""
    for row in rows:
        with torch.no_grad():
            [logprobs] = message_logprobs(learner, [row])
        row.old_logprobs = row.reference_logprobs = logprobs
    learner.optimizer.zero_grad()
    loss, _, _ = learner.loss(rows, in_one_batch(learner, rows))
    loss.backward()
    parameters = learner.adapters.parameters().values()
    gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])
    learner.optimizer.zero_grad()
    return gradient


# ---- Log-probabilities ---------------------------------------------------------------------------


def test_before_training_the_ratio_to_the_sampler_is_1_and_the_kl_is_0(learner, rollouts):
    """The forward that trains reads the same ids at the same places as the one that sampled."""
    for rollout in rollouts:
        for node in rollout.nodes:
            row = DistinctMessage(node.message.agent, *rollout.tokens[node.path])
            [logprob] = logprobs_of(learner, [row])
            assert logprob == pytest.approx(node.candidate.logprob, abs=1e-3)
            assert len(row.token_ids) == node.candidate.tokens
    statistics = learner.update(rows_of(rollouts), seeded(0))
    assert statistics["kl"] == pytest.approx(0, abs=1e-6)
    assert statistics["clip_share"] == 0


def test_log_probabilities_do_not_depend_on_the_batch(learner, rollouts):
    """Prompts and messages of different lengths are padded."""
    rows = rows_of(rollouts)
    together = message_logprobs(learner, rows)
    for row, batched in zip(rows, together, strict=True):
        [alone] = message_logprobs(learner, [row])
        assert len(alone) == len(row.token_ids)
        torch.testing.assert_close(batched, alone, atol=1e-5, rtol=0)


def test_the_policy_is_the_softmax_at_the_sampling_temperature(shared, rollouts):
    """By hand, from the model's own logits."""
    [row, *_] = rows_of(rollouts)
    learner = make_learner(shared, temperature=1.7)
    [logprobs] = message_logprobs(learner, [row])
    ids = torch.tensor([row.prompt_ids + row.token_ids])
    logits = learner.model(input_ids=ids).logits[0]
    for index, token in enumerate(row.token_ids):
        at = len(row.prompt_ids) + index - 1
        expected = (logits[at] / 1.7).log_softmax(-1)[token]
        assert logprobs[index].item() == pytest.approx(expected.item(), abs=1e-4)


def test_what_is_read_at_once_is_no_larger_than_a_batch(learner):
    """Messages of one prompt that were packed apart are not put together later.

    With 30 shared tokens, a row is best 190 wide: messages of 70, 140 and 70 tokens get three rows.
    Those of 100 are in one batch with the other prompts, 5 x 115 tokens. As one row they would be
    170 wide, and the batch 4 x 170.
    """
    learner.batch_tokens = 600
    lengths = {(1,) * 30: (70, 140, 70), (2,) * 45: (70,), (3,) * 45: (70,), (4,) * 45: (70,)}
    rows = []
    for prompt, messages in lengths.items():
        for first_token, length in enumerate(messages, start=5):
            rows.append(DistinctMessage("Planner", list(prompt), [first_token] * length, [0.0]))
    sizes = []

    def record(module, args, kwargs):
        sizes.append(kwargs["input_ids"].numel())

    hook = learner.model.register_forward_pre_hook(record, with_kwargs=True)
    learner.update(rows, seeded(0))
    hook.remove()
    assert max(sizes) <= 600


def test_the_policy_is_computed_in_float32_on_a_model_in_bfloat16():
    """In bfloat16 a ratio near 1 would have steps of 1/128, and log-probabilities of 1/16."""
    policy = make_tiny_policy(CHAIN, dtype="bfloat16")
    policy.adapters = AgentAdapters.add(policy.decoder.model, CHAIN, sharing="shared", rank=4)
    learner = make_learner(policy)
    row = DistinctMessage("Reader", list(range(10, 30)), list(range(40, 50)), [1.0])
    batch = pack([row.prompt_ids + row.token_ids], token_cost=None, max_width=99)
    logprobs = learner.message_logprobs([row], batch)[0]
    ids = torch.tensor([row.prompt_ids + row.token_ids])
    logits = learner.model(input_ids=ids).logits[0, 19:-1]
    assert logits.dtype == torch.bfloat16 and logprobs.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, ids[0, 20:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)


# ---- The loss by hand ----------------------------------------------------------------------------


def loss_by_hand(learner, monkeypatch, *, new, old, reference, advantages):
    """Return the loss of one message whose tokens have these log-probabilities."""
    row = DistinctMessage("Reader", [1], [2] * len(new), list(advantages))
    row.old_logprobs, row.reference_logprobs = torch.tensor(old), torch.tensor(reference)
    logprobs = torch.tensor(new, requires_grad=True)
    monkeypatch.setattr(learner, "message_logprobs", lambda rows, batch: {0: logprobs})
    loss, kl, num_clipped = learner.loss([row], batch=[])
    loss.backward()
    return loss.item(), kl, num_clipped, logprobs.grad.tolist()


CLIPPED = [  # ratio, advantage, gain, clipped
    (1.0, 2.0, 2.0, 0),
    (1.1, 1.0, 1.1, 0),
    (1.5, 1.0, 1.2, 1),  # no more to gain above 1 + clip
    (0.5, 1.0, 0.5, 0),
    (0.5, -1.0, -0.8, 1),  # no more to gain below 1 - clip
    (1.5, -1.0, -1.5, 0),
]


@pytest.mark.parametrize("ratio, advantage, gain, clipped", CLIPPED)
def test_the_clipped_objective_by_hand(learner, monkeypatch, ratio, advantage, gain, clipped):
    new = [torch.tensor(ratio).log().item()]
    loss, kl, num_clipped, [gradient] = loss_by_hand(
        learner, monkeypatch, new=new, old=[0.0], reference=new, advantages=[advantage]
    )
    assert gradient == pytest.approx(0 if clipped else -ratio * advantage, abs=1e-6)
    assert (loss, kl, num_clipped) == (pytest.approx(-gain, abs=1e-6), 0, clipped)


def test_the_kl_penalty_by_hand(learner, monkeypatch):
    """r - log r - 1 per token, with r = reference / policy, and never negative."""
    new, reference = [-1.0, -2.0], [-1.5, -1.0]
    loss, kl, _, gradient = loss_by_hand(
        learner, monkeypatch, new=new, old=new, reference=reference, advantages=[0.0] * 3
    )
    log_r = torch.tensor(reference) - torch.tensor(new)
    expected = 3 * (log_r.exp() - log_r - 1).sum().item()  # of three samples
    assert kl == pytest.approx(expected)
    assert loss == pytest.approx(0.01 * expected)
    assert expected > 0
    # The derivative by log pi, which pulls the policy to the reference, is 1 - r.
    assert gradient == pytest.approx((3 * 0.01 * (1 - log_r.exp())).tolist())


def test_the_gradient_of_the_loss_by_hand(learner, monkeypatch):
    """-ratio * advantage per sample, and kl_coef * (1 - r). No ratio is clipped here."""
    new, old, reference = [-1.0, -2.0], [-1.1, -1.9], [-1.5, -1.0]
    *_, gradient = loss_by_hand(
        learner, monkeypatch, new=new, old=old, reference=reference, advantages=[2.0, -1.0, 0.5]
    )
    ratio = (torch.tensor(new) - torch.tensor(old)).exp()
    r = (torch.tensor(reference) - torch.tensor(new)).exp()
    expected = -(2.0 - 1.0 + 0.5) * ratio + 3 * 0.01 * (1 - r)
    assert gradient == pytest.approx(expected.tolist())


def test_every_sample_of_a_row_counts_with_its_own_advantage(learner, monkeypatch):
    """Clipping depends on the sign, so the mean advantage of equal messages would not do."""
    new = [torch.tensor(1.5).log().item()]
    loss, _, num_clipped, _ = loss_by_hand(
        learner, monkeypatch, new=new, old=[0.0], reference=new, advantages=[1.0, 1.0, -1.0]
    )
    assert loss == pytest.approx(-(1.2 + 1.2 - 1.5), abs=1e-6)
    assert num_clipped == 2


def test_equal_messages_are_read_once_and_weighted(learner, rollouts):
    [row, *_] = rows_of(rollouts)

    def copy_with(*advantages):
        return DistinctMessage(row.agent, row.prompt_ids, row.token_ids, list(advantages))

    once = gradient_of(learner, [copy_with(1.0, 0.5)])
    twice = gradient_of(learner, [copy_with(1.0), copy_with(0.5)])
    torch.testing.assert_close(once, twice, atol=1e-5, rtol=1e-4)
    assert once.abs().max() > 0


def test_rows_are_distinct_messages_of_distinct_prompts(rollouts):
    nodes = [node for rollout in rollouts for node in rollout.nodes]
    doubled = copy.copy(rollouts[0])
    rows = distinct_messages([*rollouts, doubled], {node: 1.0 for node in nodes})
    alone = distinct_messages(rollouts, {node: 1.0 for node in nodes})
    assert len(rows) == len(alone) <= len(nodes)
    samples = sum(len(row.advantages) for row in rows)
    assert samples == len(nodes) + len(rollouts[0].nodes)
    kept = {(row.agent, tuple(row.prompt_ids), tuple(row.token_ids)) for row in rows}
    assert len(kept) == len(rows)


def test_every_token_of_every_sample_has_the_same_weight(shared, rollouts, monkeypatch):
    """Token mean over the step, whatever the minibatches and batches are."""
    rows = rows_of(rollouts)[:6]
    rows[0].advantages = [1.0, -0.5, 0.25]  # sampled three times
    learner = make_learner(shared, lr=1e-12, kl_coef=0.0, num_minibatches=1, batch_tokens=500)
    steps = []
    monkeypatch.setattr(learner.optimizer, "step", lambda: steps.append(gradient_now(learner)))
    monkeypatch.setattr(train_agents.nn.utils, "clip_grad_norm_", lambda *args, **options: None)
    learner.update(rows, seeded(0))
    expected = gradient_of(make_learner(shared, kl_coef=0.0), rows)
    expected /= sum(len(row.token_ids) * len(row.advantages) for row in rows)
    torch.testing.assert_close(steps[0], expected, atol=1e-5, rtol=1e-3)

    # With two minibatches, the mean of their gradients is the same.
    steps.clear()
    learner.num_minibatches = 2
    learner.update(rows, seeded(0))
    assert len(steps) == 2
    torch.testing.assert_close((steps[0] + steps[1]) / 2, expected, atol=1e-5, rtol=1e-3)


def gradient_now(learner):
    parameters = learner.adapters.parameters().values()
    return torch.cat([parameter.grad.flatten().clone() for parameter in parameters])


def test_gradients_are_clipped_to_norm_1(shared, rollouts, monkeypatch):
    learner = make_learner(shared)
    norms = []
    monkeypatch.setattr(
        learner.optimizer, "step", lambda: norms.append(gradient_now(learner).norm().item())
    )
    learner.update(rows_of(rollouts, advantage=1e4), seeded(0))
    assert norms == [pytest.approx(1.0, abs=1e-3)]


def test_an_update_reports_the_mean_kl_and_the_share_of_clipped_tokens(
    learner, rollouts, monkeypatch
):
    """Over all tokens of all samples, of all batches of all minibatches."""
    rows = rows_of(rollouts)[:4]
    rows[0].advantages = [1.0, -1.0]
    some_weight = next(iter(learner.adapters.parameters().values()))
    calls = []

    def loss(minibatch, batch):
        calls.append(batch)
        return 0.0 * some_weight.sum(), 0.5, 3

    monkeypatch.setattr(learner, "loss", loss)
    learner.num_minibatches, learner.batch_tokens = 2, 1
    statistics = learner.update(rows, seeded(0))
    num_tokens = sum(len(row.token_ids) for row in rows) + len(rows[0].token_ids)
    assert len(calls) == 4
    assert statistics == {
        "kl": pytest.approx(4 * 0.5 / num_tokens),
        "clip_share": pytest.approx(4 * 3 / num_tokens),
    }


def test_a_gradient_that_is_not_finite_raises(learner, rollouts):
    with pytest.raises(InputError, match="the gradient is not finite; lower --policy-lr"):
        learner.update(rows_of(rollouts, advantage=float("inf"))[:1], seeded(0))
    learner.optimizer.zero_grad()


# ---- What an update moves ------------------------------------------------------------------------


def test_a_step_raises_messages_with_a_positive_advantage_and_lowers_the_others(learner, rollouts):
    rows = [row for row in rows_of(rollouts) if row.agent == "Reader"][:2]
    rows[0].advantages, rows[1].advantages = [1.0], [-1.0]
    before = logprobs_of(learner, rows)
    learner.update(rows, seeded(0))
    after = logprobs_of(learner, rows)
    assert after[0] > before[0] and after[1] < before[1]


def test_masked_messages_move_nothing(shared, rollouts):
    """A message that was cut gives no gradient, and changes none."""
    [rollout, *_] = rollouts
    rewards = {node: float(index) for index, node in enumerate(rollout.nodes)}
    cut = rollout.nodes[0]
    candidate = cut.candidate
    cut.candidate = candidate._replace(truncated=True)
    try:
        with_cut = distinct_messages([rollout], advantages(rewards, "agent"))
        del rewards[cut]
        without = distinct_messages([rollout], advantages(rewards, "agent"))
    finally:
        cut.candidate = candidate
    assert [vars(row) for row in with_cut] == [vars(row) for row in without]
    assert tuple(rollout.tokens[cut.path][1]) not in {
        tuple(row.token_ids) for row in with_cut if row.prompt_ids == rollout.tokens[cut.path][0]
    }


def test_neither_the_base_nor_v_is_moved_by_an_update():
    policy = trained_policy()
    model = policy.decoder.model
    before = {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if "lora_" not in name
    }
    learner = make_learner(policy)
    rows = rows_of(rollouts_of(policy, num_agents=2))
    learner.update(rows, seeded(0))
    after = dict(model.named_parameters())
    assert before and all(torch.equal(after[name], weight) for name, weight in before.items())
    trained = {id(parameter) for parameter in policy.adapters.parameters().values()}
    assert {id(p) for group in learner.optimizer.param_groups for p in group["params"]} == trained


def test_with_per_agent_adapters_only_that_of_the_speaker_moves():
    policy = trained_policy("per-agent")
    learner = make_learner(policy)
    rows = [row for row in rows_of(rollouts_of(policy, num_agents=2)) if row.agent == "Planner"]
    before = policy.adapters.weights()
    learner.update(rows, seeded(0))
    after = policy.adapters.weights()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and all(".agent_Planner." in name for name in moved)
    assert {config.r for config in policy.adapters.model.peft_config.values()} == {8}
    names = {name.split(".")[-2] for name in before}
    assert names == {"agent_Reader", "agent_Planner", "agent_Solver", "agent_Verifier"}


def test_the_optimizer_and_the_adapters_have_the_settings_given(shared):
    learner = make_learner(shared, lr=0.125)
    [group] = learner.optimizer.param_groups
    assert (group["lr"], group["weight_decay"]) == (0.125, 0.0)
    config = shared.adapters.model.peft_config["shared"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (8, 16, 0.0)
    assert shared.adapters.rank == 8


def randomised(policy, seed=0):
    """Give every adapter its own random weights, which change every message."""
    torch.manual_seed(seed)
    weights = policy.adapters.weights()
    policy.adapters.set_weights({name: torch.randn_like(w) for name, w in weights.items()})


def test_every_agent_is_read_with_its_own_adapter_also_in_one_step(rollouts, tmp_path):
    """And after saving and loading: each adapter is that of its agent."""
    policy = trained_policy("per-agent")
    randomised(policy)
    learner = make_learner(policy)
    rows = rows_of(rollouts)
    expected = {}
    for index, row in enumerate(rows):
        policy.adapters.model.set_adapter(f"agent_{row.agent}")
        ids = torch.tensor([row.prompt_ids + row.token_ids])
        with torch.no_grad():
            logits = learner.model(input_ids=ids).logits[0, len(row.prompt_ids) - 1 : -1]
        tokens = torch.tensor(row.token_ids)[:, None]
        expected[index] = logits.log_softmax(-1).gather(-1, tokens)[:, 0]
    assert len({row.agent for row in rows}) == 4

    learner.kl_coef = 0.0
    for row in rows:
        row.advantages = [0.0]  # nothing is moved
    learner.update(rows, seeded(0))
    for index, row in enumerate(rows):
        torch.testing.assert_close(row.old_logprobs, expected[index], atol=1e-3, rtol=1e-4)

    write_adapters(policy, tmp_path, sharing="per-agent")
    names = sorted(path.name for path in (tmp_path / "adapter").iterdir() if path.is_dir())
    assert names == ["agent_Planner", "agent_Reader", "agent_Solver", "agent_Verifier"]
    loaded = make_tiny_policy(CHAIN, adapter=tmp_path)
    for index, row in enumerate(rows):
        [logprobs] = message_logprobs(make_learner(loaded), [row])
        torch.testing.assert_close(logprobs, expected[index], atol=1e-3, rtol=1e-4)

    # The record of the adapters depends on each of them.
    before = loaded.settings["adapter"]["fingerprint"]
    scale = tmp_path / "adapter" / "agent_Solver" / "adapter_config.json"
    text = scale.read_text()
    scale.write_text(text.replace('"lora_alpha": 16', '"lora_alpha": 32'))
    assert scale.read_text() != text
    assert adapters_setting(str(tmp_path), loaded.adapters.names)["fingerprint"] != before
    scale.write_text(text)
    weights = tmp_path / "adapter" / "agent_Verifier" / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    after = adapters_setting(str(tmp_path), loaded.adapters.names)["fingerprint"]
    assert before != after


def test_an_update_at_a_low_temperature_is_finite(shared, rollouts):
    """Prompts and padding have log-probabilities of minus hundreds there, and must not count."""
    weights = shared.adapters.weights()
    learner = make_learner(shared, temperature=0.05, lr=1e-9)
    learner.update(rows_of(rollouts), seeded(0))
    assert all(torch.isfinite(weight).all() for weight in shared.adapters.weights().values())
    shared.adapters.set_weights(weights)


def test_minibatches_are_drawn_at_random(learner, rollouts, monkeypatch):
    """And every row is in exactly one of them."""
    rows = rows_of(rollouts)
    learner.num_minibatches = 2

    def minibatches(seed):
        order = []

        def loss(minibatch, batch):
            order.extend(rows.index(minibatch[index]) for index in sequences_of(batch))
            return 0.0 * some_weight.sum(), 0.0, 0

        monkeypatch.setattr(learner, "loss", loss)
        learner.update(rows, seeded(seed))
        assert sorted(order) == list(range(len(rows)))
        return order

    some_weight = next(iter(learner.adapters.parameters().values()))
    assert minibatches(0) == minibatches(0) != minibatches(1)


def test_messages_of_one_prompt_are_in_one_minibatch_and_read_together(learner, shared):
    """So that the prompt is read once: before the update, by the reference, and in the update."""
    [rollout] = rollouts_of(shared, counts=(1, 4, 1, 1), num_agents=2, num=1)
    rows = rows_of([rollout])
    [reader] = [row for row in rows if row.agent == "Reader"]
    plans = [row for row in rows if row.agent == "Planner"]
    assert len(plans) > 1
    learner.num_minibatches = 3
    minibatches = learner._minibatches(rows, seeded("minibatches"))
    assert sorted(map(len, minibatches)) == [0, 1, len(plans)]
    assert [reader] in minibatches

    widths = []

    def count(module, args, kwargs):
        widths.append(kwargs["input_ids"].shape)

    hook = learner.model.register_forward_pre_hook(count, with_kwargs=True)
    learner.update(plans, seeded("update"))
    hook.remove()
    num_tokens = len(plans[0].prompt_ids) + sum(len(row.token_ids) for row in plans)
    assert len(widths) == 3
    for num_rows, width in widths:
        assert num_rows == 1
        assert len(plans[0].prompt_ids) < width <= num_tokens


def test_agents_with_adapters_of_their_own_speak_with_them():
    """Also when their messages are asked for together."""
    policy = trained_policy("per-agent")
    root = Node(State("What is 3 + 4?", ()), None, None, ())
    problem = Problem("p", "train", "What is 3 + 4?", "7", "number")
    planner = Node(CHAIN.step(root.state, "facts"), root, Candidate("facts", 1, 0.0, False), (0,))
    request = [(problem, Sample([root], 1, True)), (problem, Sample([planner], 1, True))]

    def texts():
        return [reply[0][0].text for reply, _ in policy(request)]

    before = texts()
    weights = policy.adapters.weights()
    noisy = {}
    for name, weight in weights.items():
        noisy[name] = torch.randn_like(weight) if ".agent_Planner." in name else weight
    policy.adapters.set_weights(noisy)
    after = texts()
    assert after[0] == before[0] and after[1] != before[1]
    assert texts() == after


def agents_model(*, quantize=False):
    settings = {"quantize": quantize, "device": "cpu", "dtype": "float32"}
    model, _ = load_pretrained("--model", AGENTS, AutoModelForCausalLM, **settings)
    return model


def small_gpt2():
    """Return a model whose layers hold their weights transposed."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    return GPT2LMHeadModel(config).eval()


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
@pytest.mark.parametrize(
    "make_model", [agents_model, partial(agents_model, quantize=True), small_gpt2]
)
def test_a_merged_adapter_speaks_as_beside_the_base_which_does_not_move(make_model):
    model = make_model()
    base = dict(model.named_parameters())
    before = {name: weight.detach().clone() for name, weight in base.items()}
    adapters = AgentAdapters.add(model, CHAIN, sharing="per-agent", rank=4)
    torch.manual_seed(1)
    for weight in adapters.parameters().values():
        weight.data = 0.1 * torch.randn_like(weight)

    @torch.no_grad()
    def logits():
        return adapters.model(input_ids=torch.arange(9)[None]).logits

    with adapters.off():
        of_base = logits()
    adapters.use("Solver")
    expected = logits()
    adapters.use("Reader")
    with adapters.merged("Solver"):
        merged = logits()
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-4)
    assert (merged - of_base).abs().max() > 0.01
    with pytest.raises(InputError), adapters.merged("Planner"):
        raise InputError("a message does not fit")

    adapters.use("Solver")
    assert torch.equal(logits(), expected)
    for name, weight in base.items():
        assert torch.equal(weight, before[name]), name
    trained = [name for name, weight in adapters.parameters().items() if weight.requires_grad]
    assert trained and all(".agent_Solver." in name for name in trained)


def test_a_small_change_is_not_lost_in_bfloat16():
    """Half of the steps between bfloat16 numbers are larger than it; merged, it would be gone."""
    policy = make_tiny_policy(CHAIN, dtype="bfloat16")
    adapters = AgentAdapters.add(policy.decoder.model, CHAIN, sharing="shared", rank=4)
    torch.manual_seed(1)
    for name, weight in adapters.parameters().items():
        weight.data = (1e-4 if "lora_B" in name else 1.0) * torch.randn_like(weight)

    @torch.no_grad()
    def logits():
        return adapters.model(input_ids=torch.arange(9)[None]).logits

    adapters.use("Reader")
    expected = logits()
    with adapters.merged("Reader"):
        assert torch.equal(logits(), expected)


def test_sampling_reads_merged_weights_only():
    policy = trained_policy()
    calls = []
    for name, module in policy.adapters.model.named_modules():
        if name.endswith("lora_A.shared"):
            module.register_forward_hook(lambda *_: calls.append(1))
    rollouts_of(policy, num=1)
    assert calls == []
    policy.adapters.model(input_ids=torch.tensor([[1, 2]]))
    assert calls


def test_the_reference_is_the_model_with_its_adapters_off(learner, rollouts):
    rows = rows_of(rollouts)[:2]
    before = logprobs_of(learner, rows)
    learner.adapters.set_weights(
        {name: torch.randn_like(weight) for name, weight in learner.adapters.weights().items()}
    )
    assert logprobs_of(learner, rows) != pytest.approx(before, abs=1e-2)
    with learner.adapters.off():
        assert logprobs_of(learner, rows) == pytest.approx(before, abs=1e-4)
    learner.update(rows, seeded(0))
    with learner.adapters.off():
        expected = message_logprobs(learner, rows)
    for row, logprobs in zip(rows, expected, strict=True):
        torch.testing.assert_close(row.reference_logprobs, logprobs, atol=1e-4, rtol=0)


def test_every_adapter_is_float32_on_a_model_in_bfloat16():
    policy = make_tiny_policy(CHAIN, dtype="bfloat16")
    adapters = AgentAdapters.add(policy.decoder.model, CHAIN, sharing="per-agent", rank=4)
    assert {parameter.dtype for parameter in adapters.parameters().values()} == {torch.float32}


# ---- A step: which numbers reach the update ------------------------------------------------------


def scripted_rollouts(problems):
    """Return a tree per problem: two messages of the Reader, each with two of the Planner."""
    rollouts = []
    for number, problem in enumerate(problems):
        rng = seeded("scripted", number)
        search = sample_tree(problem.question, CHAIN, num_candidates=(2, 2, 1, 1), num_agents=4)
        policy = ScriptedPolicy(lambda path, number=number: f"message {path} {number}")
        root = drive(search, {Sample: policy})
        nodes = descendants(root)
        tokens = {}
        for node in [root, *nodes]:
            node.V = rng.uniform(-1, 1)
            tokens[node.path] = ([number], list(node.path))
            if CHAIN.is_terminal(node.state):
                node.reward = rng.choice([1.0, -1.0])
        rollouts.append(Rollout(problem, root, nodes, tokens))
    return rollouts


def scripted_training(reward, *flags, **changes):
    """Return a Training whose update does nothing, and whose rollouts have two Planners each."""
    statistics = {"kl": 0.0, "clip_share": 0.0}
    pieces = {
        "args": train_agents.parse_args(list(flags)),
        "policy": SimpleNamespace(mas=CHAIN),
        "learner": SimpleNamespace(
            adapters=SimpleNamespace(weights=dict), update=lambda rows, rng: statistics
        ),
        "train_problems": problems_of(num=1),
        "dev_problems": problems_of("heldout", 1),
        "num_candidates": (2, 2, 1, 1),
        "num_agents": 4,
        "value_model": None,
        "reward": reward,
    }
    return Training(**pieces | changes)


def step_with(monkeypatch, *flags, reward="value"):
    """Take a scripted step. Returns its rollouts, its records, and the rows of the update."""
    updates = []

    def update(rows, rng):
        updates.append(rows)
        return {"kl": 0.0, "clip_share": 0.0}

    training = scripted_training(
        REWARDS[reward],
        *["--reward", reward, *flags],
        learner=SimpleNamespace(update=update),
        train_problems=problems_of(num=3),
    )
    kept = []

    def sample(problems, policy, **options):
        kept.append(scripted_rollouts(problems))
        return kept[-1]

    monkeypatch.setattr(train_agents, "sample_rollouts", sample)
    record, messages = training.train_step()
    return kept[0], record, messages["messages"], updates[0]


def check_step(step, expected_credits, baseline):
    """Assert that the advantages of a step are those of these credits."""
    rollouts, record, messages, rows = step
    expected = advantages(expected_credits, baseline)
    nodes = [node for rollout in rollouts for node in rollout.nodes]
    assert [message["advantage"] for message in messages] == [expected.get(node) for node in nodes]
    of_message = defaultdict(list)
    for rollout in rollouts:
        for node in rollout.nodes:
            if node in expected:
                prompt_ids, token_ids = rollout.tokens[node.path]
                key = (node.message.agent, tuple(prompt_ids), tuple(token_ids))
                of_message[key].append(expected[node])
    in_rows = {}
    for row in rows:
        in_rows[row.agent, tuple(row.prompt_ids), tuple(row.token_ids)] = row.advantages
    assert in_rows == of_message
    assert record["trained_on"] == len(expected) and record["messages"] == len(nodes)


@pytest.mark.parametrize("baseline", ["agent", "siblings"])
@pytest.mark.parametrize("reward", ["outcome", "search", "value", "value-delta"])
def test_the_reward_and_the_baseline_of_the_flags_are_used(monkeypatch, reward, baseline):
    flags = ["--rollouts", "tree", "--baseline", baseline]
    step = step_with(monkeypatch, *flags, reward=reward)
    credits = {}
    for rollout in step[0]:
        credits |= REWARDS[reward](rollout)
    check_step(step, credits, baseline)
    nodes = [node for rollout in step[0] for node in rollout.nodes]
    assert [message["reward"] for message in step[2]] == [credits[node] for node in nodes]


def test_credit_return_adds_up_the_changes_of_v(monkeypatch):
    step = step_with(monkeypatch, "--credit", "return", reward="value-delta")
    credits = {}
    for rollout in step[0]:
        credits |= returns(rollout, REWARDS["value-delta"](rollout))
    check_step(step, credits, "agent")


def test_the_outcome_is_mixed_into_the_credit(monkeypatch):
    """After the returns, which would otherwise count the outcome once per agent."""
    flags = ["--credit", "return", "--outcome-share", "0.25"]
    step = step_with(monkeypatch, *flags, reward="value-delta")
    credits = {}
    for rollout in step[0]:
        own = returns(rollout, REWARDS["value-delta"](rollout))
        credits |= mix_with_outcome(rollout, own, 0.25)
    check_step(step, credits, "agent")


def test_random_credit_is_that_of_other_messages(monkeypatch):
    rollouts, _, messages, _ = step_with(monkeypatch, reward="random")
    credits = {}
    for rollout in rollouts:
        credits |= REWARDS["outcome"](rollout)
    unshuffled = advantages(credits, "agent")
    nodes = [node for rollout in rollouts for node in rollout.nodes]
    given = [message["advantage"] for message in messages]
    expected = [unshuffled.get(node) for node in nodes]
    assert None not in given + expected
    assert sorted(given) == pytest.approx(sorted(expected))
    num_same = sum(a == pytest.approx(b) for a, b in zip(given, expected, strict=True))
    assert num_same < 0.8 * len(nodes)
    # The record shows what has been compared, beside the reward that the message had.
    assert [message["reward"] for message in messages] == [credits[node] for node in nodes]
    for agent in CHAIN.agents:
        rows = [message for message in messages if message["agent"] == agent.name]
        by_credit = sorted(rows, key=lambda message: message["credit"])
        in_order = [message["advantage"] for message in by_credit]
        assert in_order == sorted(in_order)


def test_every_step_asks_other_questions_with_other_noise(monkeypatch):
    calls = []

    def sample(problems, policy, *, seed, **options):
        calls.append((seed, [problem.id for problem in problems]))
        return scripted_rollouts(problems)

    training = training_with(monkeypatch, [0.1, 0.2, 0.3])
    training.args.num_questions = 3
    training.train_problems = problems_of(num=30)
    training.reward = REWARDS["outcome"]
    training.learner.update = lambda rows, rng: {"kl": 0.0, "clip_share": 0.0}
    monkeypatch.setattr(train_agents, "sample_rollouts", sample)
    training.train_step()
    training.measure_dev()
    training.train_step()
    training.measure_dev()
    (seed, ids), (dev_seed, dev_ids), (next_seed, next_ids), (next_dev_seed, next_dev_ids) = calls
    assert len(set(ids)) == len(set(next_ids)) == 3
    assert ids != next_ids and seed != next_seed
    assert (dev_seed, dev_ids) == (next_dev_seed, next_dev_ids)  # differences are due to the agents
    assert dev_seed not in (seed, next_seed)
    assert dev_ids == [problem.id for problem in training.dev_problems]
    assert set(ids) | set(next_ids) <= {problem.id for problem in training.train_problems}

    # Another --seed asks other questions with other noise.
    training.step, training.args.seed = 0, 1
    training.train_step()
    training.measure_dev()
    (other_seed, other_ids), (other_dev_seed, _) = calls[4:]
    assert other_ids != ids
    assert len({seed, next_seed, dev_seed, other_seed, other_dev_seed}) == 5


def test_the_held_out_measurement_has_the_passes_of_the_flag_and_v(monkeypatch):
    asked = []

    def sample(problems, policy, *, num_candidates, num_agents, **options):
        asked.append((num_candidates, num_agents))
        return scripted_rollouts(problems)

    training = training_with(monkeypatch, [0.1])
    training.args.num_dev_passes = 5
    monkeypatch.setattr(train_agents, "sample_rollouts", sample)
    read = []
    monkeypatch.setattr(train_agents, "read_values", lambda *args, **kwargs: read.append(args))
    training.value_model = "V"
    training.measure_dev()
    assert asked == [((5, 1, 1, 1), 4)]
    assert [args[1] for args in read] == ["V"]


NUM_AGENTS = [  # flags, candidates, and how many agents have to speak
    (["--reward", "value", "--baseline", "siblings"], (1, 3, 1, 1), 2),
    (["--reward", "value", "--baseline", "siblings"], (2, 1, 1, 1), 1),
    (["--reward", "value", "--baseline", "siblings"], (2, 1, 2, 1), 3),
    (["--reward", "coach", "--baseline", "siblings"], (1, 3, 1, 1), 2),
    (["--reward", "value", "--baseline", "agent"], (1, 3, 1, 1), 4),
    (["--reward", "value", "--rollouts", "passes"], (4, 1, 1, 1), 4),
    (["--reward", "outcome", "--baseline", "siblings"], (1, 3, 1, 1), 4),
    (["--reward", "search", "--baseline", "siblings"], (1, 3, 1, 1), 4),
    (["--reward", "random", "--baseline", "siblings"], (1, 3, 1, 1), 4),
    (["--reward", "value-delta", "--baseline", "siblings"], (1, 3, 1, 1), 4),
    (
        ["--reward", "value", "--baseline", "siblings", "--outcome-share", "0.5"],
        (1, 3, 1, 1),
        4,
    ),
]


@pytest.mark.parametrize("flags, num_candidates, expected", NUM_AGENTS)
def test_how_many_agents_have_to_speak(flags, num_candidates, expected):
    args = train_agents.parse_args(flags)
    assert train_agents.num_agents_of_rollouts(args, CHAIN, num_candidates) == expected


def test_the_learner_has_the_settings_of_the_flags(shared):
    flags = ["--policy-lr", "0.5", "--clip", "0.4", "--kl-coef", "0.3", "--num-minibatches", "7"]
    flags += ["--train-batch-tokens", "99", "--temperature", "1.5"]
    learner = train_agents.make_learner(shared, train_agents.parse_args(flags))
    assert learner.optimizer.param_groups[0]["lr"] == 0.5
    assert (learner.clip, learner.kl_coef, learner.num_minibatches) == (0.4, 0.3, 7)
    assert (learner.batch_tokens, learner.temperature) == (99, 1.5)
    assert learner.pad_id == shared.decoder.pad_id


def test_a_step_asks_for_what_its_flags_say(monkeypatch):
    """As many searches together, and as large batches of V."""
    asked, read = [], []

    def sample(problems, policy, *, max_active, **options):
        asked.append(max_active)
        return scripted_rollouts(problems)

    def values(rollouts, model, *, batch_tokens):
        read.append((model, batch_tokens))

    monkeypatch.setattr(train_agents, "sample_rollouts", sample)
    monkeypatch.setattr(train_agents, "read_values", values)
    flags = ["--max-active", "77", "--batch-tokens", "555", "--train-batch-tokens", "44"]
    training = scripted_training(REWARDS["value"], *flags)
    training.value_model = "V"
    training.train_step()
    training.measure_dev()
    assert asked == [77, 77]
    assert read == [("V", 555)] * 2


# ---- What is logged ------------------------------------------------------------------------------


def test_the_measures_of_an_agent_by_hand(monkeypatch):
    [rollout] = scripted_rollouts(problems_of(num=1))
    planner = [node for node in rollout.nodes if node.message.agent == "Planner"]
    leaves = [node for node in rollout.nodes if not node.children]
    for node, z in zip(leaves, [1.0, 1.0, -1.0, 1.0], strict=True):
        node.reward = z
    for node, value in zip(planner, [0.9, 0.1, 0.5, 0.3], strict=True):
        node.V = value
    planner[0].candidate = Candidate("long", 12, -1.0, truncated=True)
    report = train_agents.measure([rollout])["Planner"]
    assert report["messages"] == 4
    assert report["right"] == 0.75
    assert report["value"] == pytest.approx((0.95 + 0.55 + 0.75 + 0.65) / 4)
    assert report["value_auc"] == pytest.approx(
        1 / 3
    )  # .5 is wrong; only .9 of the others is above
    assert report["tokens"] == (12 + 2 + 2 + 2) / 4
    assert report["truncated"] == 0.25
    for node in rollout.nodes:
        node.V = None
    without = train_agents.measure([rollout])["Planner"]
    assert (without["value"], without["value_auc"], without["right"]) == (None, None, 0.75)


def test_the_auc_of_v_is_within_problems(monkeypatch):
    """V knows which question is easy, and ranks the plans of each in the wrong order."""
    first, second = scripted_rollouts(problems_of(num=2))
    for rollout, level in ((first, 0.5), (second, -0.5)):
        plans = [node for node in rollout.nodes if node.message.agent == "Planner"]
        leaves = [node for node in rollout.nodes if not node.children]
        is_right = [True, True, True, False] if rollout is first else [True, False, False, False]
        for plan, leaf, right in zip(plans, leaves, is_right, strict=True):
            leaf.reward = 1.0 if right else -1.0
            plan.V = level - 0.1 * right
    assert train_agents.measure([first, second])["Planner"]["value_auc"] == 0.0


def test_the_mean_reward_leaves_out_messages_without_one(duo):
    [rollout] = scripted_rollouts(problems_of(num=1))
    first, second, *others = rollout.nodes
    rewards = {first: 0.5, second: None} | dict.fromkeys(others)
    means = train_agents.mean_rewards(rewards)
    assert means == {"Reader": 0.5, "Planner": None, "Solver": None, "Verifier": None}


def test_the_picture_shows_agents_that_speak_only_sometimes(tmp_path):
    """As the Refiner of `refine`."""
    row = {"value": 0.5, "value_auc": None, "right": 0.5, "tokens": 9.0, "truncated": 0.0}
    first = {"step": 0, "dev": {"accuracy": 0.5, "agents": {"Reader": row, "Refiner": row}}}
    second = {"step": 1, "kl": 0.1, "clip_share": 0.0, "reward": {"Reader": 0.5}}
    second |= {"cut": 0, "without_reward": 2}
    second["dev"] = {"accuracy": 0.75, "agents": {"Reader": row, "Solver": row}}
    plot_training([first, second], 1, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    assert "2 messages without a reward" in training_line(second)
    table = training_table([first, second], 1)
    assert "before, step 0" in table and "kept, step 1" in table and "75.0 %" in table


def test_the_record_of_a_message_has_its_own_v_outcome_and_text(monkeypatch):
    rollouts, _, messages, _ = step_with(monkeypatch, reward="value")
    nodes = [node for rollout in rollouts for node in rollout.nodes]
    outcomes = {}
    for rollout in rollouts:
        outcomes |= mean_outcomes(rollout)
    assert len({node.V for node in nodes}) == len(nodes) and len(set(outcomes.values())) > 2
    for node, message in zip(nodes, messages, strict=True):
        assert (message["V"], message["outcome"]) == (node.V, outcomes[node])
        assert (message["agent"], message["message"]) == node.message[:2]
        assert message["path"] == node.path


def test_the_reward_of_a_step_is_logged_without_what_is_mixed_in(monkeypatch):
    _, record, messages, _ = step_with(monkeypatch, "--outcome-share", "0.25", reward="value")
    for agent in CHAIN.agents:
        rewards = [row["reward"] for row in messages if row["agent"] == agent.name]
        assert record["reward"][agent.name] == pytest.approx(sum(rewards) / len(rewards))


def test_what_is_printed_warns_of_the_kept_step(capsys):
    """V thinks well of these agents, who are right half of the time."""
    records = [dev_record(0, 0.5, 0.5, 0.7), dev_record(1, 0.9, 0.5, 0.7)]
    train_agents.report_training(records, 1)
    assert "! V thinks better" in capsys.readouterr().out
    train_agents.report_training(records, 0)
    assert "! V thinks better" not in capsys.readouterr().out


def test_the_line_of_a_step_counts_its_messages(monkeypatch):
    """Two of 14 messages are cut, three others have no reward, two of the others are equal."""
    [rollout] = scripted_rollouts(problems_of(num=1))
    nodes = rollout.nodes  # 2 of the Reader, and 4 of each of the others
    for node in nodes[:2]:
        node.candidate = node.candidate._replace(truncated=True)
    rollout.tokens[nodes[-1].path] = rollout.tokens[nodes[-2].path]
    rewards_of = {node: float(index) for index, node in enumerate(nodes)}
    rewards_of |= dict.fromkeys(nodes[2:5])
    monkeypatch.setattr(train_agents, "sample_rollouts", lambda *args, **options: [rollout])
    training = scripted_training(lambda rollout: rewards_of)
    record, _ = training.train_step()
    assert record["step"] == 1 and record["messages"] == 14
    assert (record["cut"], record["without_reward"]) == (2, 3)
    assert record["trained_on"] == 8  # of one Planner's message there is nothing to compare with
    assert record["distinct"] == 7
    expected = {"Reader": 0.5, "Planner": 5.0, "Solver": 7.5, "Verifier": 11.5}
    assert record["reward"] == expected


# ---- Choosing the adapters -----------------------------------------------------------------------


def training_with(monkeypatch, accuracies):
    """Return a Training whose accuracy on held-out problems is given, and whose agents change."""
    weights = iter(range(100))
    adapters = SimpleNamespace(weights=lambda: {"w": next(weights)})
    training = scripted_training(None, learner=SimpleNamespace(adapters=adapters))
    given = iter(accuracies)
    monkeypatch.setattr(train_agents, "sample_rollouts", lambda *args, **kwargs: [])
    monkeypatch.setattr(train_agents, "accuracy", lambda rollouts: next(given))
    return training


def test_the_adapters_with_the_best_held_out_accuracy_are_kept(monkeypatch):
    """Whatever the reward is; the first of equally good ones."""
    training = training_with(monkeypatch, [0.3, 0.5, 0.4, 0.5])
    kept = []
    for step in range(4):
        training.step = step
        training.measure_dev()
        kept.append((training.best_step, training.best_accuracy, dict(training.best_weights)))
    assert kept[0] == (0, 0.3, {"w": 0})
    assert kept[1:] == [(1, 0.5, {"w": 1})] * 3


@pytest.mark.parametrize("dev_every, measured", [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5])])
def test_adapters_are_measured_every_few_steps_and_at_the_end(
    monkeypatch, tmp_path, dev_every, measured
):
    training = training_with(monkeypatch, [0.1] * 6)
    training.args.num_steps, training.args.dev_every = 5, dev_every

    def step(self):
        self.step += 1
        numbers = {"reward": {}, "kl": 0.0, "clip_share": 0.0, "cut": 0, "without_reward": 0}
        return {"step": self.step} | numbers, {"step": self.step}

    monkeypatch.setattr(Training, "train_step", step)
    monkeypatch.setattr(Training, "save_checkpoint", lambda self, path: None)
    train_agents.train(training, tmp_path)
    records = read_jsonl(tmp_path / "metrics.jsonl")
    assert [record["step"] for record in records if "dev" in record] == measured


@pytest.mark.parametrize("accuracies, best_step", [([0.1, 0.9], 1), ([0.9, 0.1], 0)])
def test_a_step_that_is_not_possible_ends_training_with_the_best_so_far(
    monkeypatch, tmp_path, capsys, accuracies, best_step
):
    """It would not be possible after a restart, either. If there is nothing to keep, it says so."""
    training = training_with(monkeypatch, accuracies)
    training.args.num_steps, training.args.dev_every = 5, 1

    def only_the_first(self):
        if self.step == 1:
            raise CannotGoOnError("all messages were cut")
        self.step += 1
        numbers = {"reward": {}, "kl": 0.0, "clip_share": 0.0, "cut": 0, "without_reward": 0}
        return {"step": self.step} | numbers, {"step": self.step}

    monkeypatch.setattr(Training, "train_step", only_the_first)
    monkeypatch.setattr(Training, "save_checkpoint", lambda self, path: None)
    if best_step == 0:
        with pytest.raises(InputError, match="all messages were cut"):
            train_agents.train(training, tmp_path)
    else:
        train_agents.train(training, tmp_path)
        assert "ends before step 2: all messages were cut" in capsys.readouterr().err
    assert training.best_step == best_step
    assert [record["step"] for record in read_jsonl(tmp_path / "metrics.jsonl")] == [0, 1]


def test_accuracy_is_the_share_of_right_final_answers(duo):
    root = Node(State("q", ()), None, None, ())
    first = Node(duo.step(root.state, "a"), root, None, (0,))
    leaves = [Node(duo.step(first.state, "b"), first, None, (0, index)) for index in range(4)]
    first.children = leaves
    for leaf, z in zip(leaves, [1.0, -1.0, -1.0, -1.0], strict=True):
        leaf.reward = z
    rollout = SimpleNamespace(nodes=[first, *leaves])
    assert train_agents.accuracy([rollout]) == 0.25
    right = SimpleNamespace(nodes=leaves[:1])
    assert train_agents.accuracy([rollout, right]) == train_agents.accuracy([right, rollout]) == 0.4


# ---- Settings ------------------------------------------------------------------------------------


def test_the_defaults_are_those_of_the_readme_and_of_mappa():
    args = train_agents.parse_args([])
    assert (args.reward, args.credit, args.outcome_share) == ("value", "own", 0.0)
    assert (args.rollouts, args.num_passes, args.baseline) == ("passes", 4, "agent")
    assert (args.adapters, args.kl_coef, args.clip) == ("shared", 0.01, 0.2)


def settings_of(monkeypatch, *flags, fingerprint="0", value_model="V", num_candidates=(1, 8, 1, 1)):
    """Return the recorded settings. The fingerprint of a coach tells its name and its weights."""

    def fingerprint_of_coach(name, model):
        return f"{name} {model}"

    monkeypatch.setattr(train_agents, "weights_fingerprint", lambda folder: fingerprint)
    monkeypatch.setattr(train_agents, "checkpoint_fingerprint", fingerprint_of_coach)
    training = SimpleNamespace(
        policy=SimpleNamespace(settings={}, mas=CHAIN),
        train_problems=problems_of(num=2),
        dev_problems=problems_of("heldout", 1),
        num_candidates=num_candidates,
        value_model=value_model,
        reward=SimpleNamespace(model="weights of the coach"),
    )
    return train_agents.training_settings(train_agents.parse_args(list(flags)), training)


@pytest.mark.parametrize(
    "flags",
    [
        ["--credit", "return"],
        ["--baseline", "siblings"],
        ["--outcome-share", "0.5"],
        ["--reward", "outcome"],
    ],
    ids=" ".join,
)
def test_what_changes_the_adapters_is_recorded(monkeypatch, flags):
    assert settings_of(monkeypatch, *flags) != settings_of(monkeypatch)


@pytest.mark.parametrize("reward", ["value", "outcome"])
def test_the_v_that_rewards_or_is_logged_is_recorded(monkeypatch, reward):
    """Else a run that was killed would go on with a V that was trained again in between."""
    flags = ["--reward", reward]
    settings = settings_of(monkeypatch, *flags)
    assert settings["value"]["fingerprint"] == "0"
    assert settings_of(monkeypatch, *flags, fingerprint="1") != settings
    assert settings_of(monkeypatch, *flags, value_model=None)["value"] is None


def test_the_coach_and_the_shape_of_the_rollouts_are_recorded(monkeypatch):
    """Else a run that is resumed with others would go on as if nothing had changed."""
    settings = settings_of(monkeypatch, "--reward", "coach", "--coach", "c")
    assert settings["coach"] == {"name": "c", "fingerprint": "c weights of the coach"}
    assert tuple(settings["num_candidates"]) == (1, 8, 1, 1)
    assert settings["graph"] == asdict(CHAIN)
    other = settings_of(monkeypatch, num_candidates=(1, 4, 1, 1))
    assert other != settings_of(monkeypatch)


# ---- Loading adapters ----------------------------------------------------------------------------


def test_an_adapter_without_weights_is_named(tmp_path):
    """Whichever of them it is. peft would look for them on the hub."""
    base = write_adapters(trained_policy("per-agent"), tmp_path, sharing="per-agent")
    (tmp_path / "adapter" / "agent_Solver" / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="adapter/agent_Solver has no weights; restore them"):
        AgentAdapters.load(torch.nn.Identity(), CHAIN, tmp_path, base)


@pytest.mark.parametrize("was_quantized, remedy", [(True, "give"), (False, "leave out")])
def test_adapters_are_used_on_the_weights_they_were_trained_on(tmp_path, was_quantized, remedy):
    settings = {"adapters": "shared", "model": {"fingerprint": "f"}}
    config = {"settings": settings | {"quantize_policy": was_quantized}, "finished": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = settings | {"quantize_policy": not was_quantized}
    with pytest.raises(InputError, match=f"other weights of the model; {remedy} --quantize-policy"):
        AgentAdapters.load(torch.nn.Identity(), CHAIN, tmp_path, base)
