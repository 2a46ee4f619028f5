"""Tests of llm/adapters.py: each agent has its adapter, and the base stays as it is."""

from dataclasses import asdict, replace

import pytest
import torch
from conftest import make_tiny_policy
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llm.adapters import AgentAdapters
from mas import CHAIN, MAS
from support.flags import TINY_AGENTS, InputError
from support.runs import write_config
from tasks.problems import Problem
from tree import Sample, make_root

TOKENS = torch.arange(9)[None]


def add_adapters(sharing, **flags):
    model = make_tiny_policy(CHAIN, **flags).decoder.model
    adapters = AgentAdapters.add(model, CHAIN, sharing=sharing, rank=4)
    randomise(adapters)
    return adapters


def randomise(adapters, *, std=0.1, only=""):
    torch.manual_seed(1)
    for name, weight in adapters.parameters().items():
        if only in name:
            weight.data = std * torch.randn_like(weight)


@torch.no_grad()
def logits_of(adapters, agent):
    adapters.use(agent)
    return adapters.model(input_ids=TOKENS).logits


@pytest.mark.parametrize("flags", [{}, {"quantize_policy": None}, {"dtype": "bfloat16"}])
def test_each_agent_has_its_adapter_and_without_them_the_base_speaks(flags):
    """Adapters are float32, because steps between bfloat16 numbers are larger than an update."""
    base = make_tiny_policy(CHAIN, **flags).decoder.model
    with torch.no_grad():
        of_base = base(input_ids=TOKENS).logits
    adapters = add_adapters("per-agent", **flags)
    assert {weight.dtype for weight in adapters.parameters().values()} == {torch.float32}
    assert adapters.model.peft_config["agent_Reader"].lora_alpha == 2 * adapters.rank
    logits = [logits_of(adapters, agent.name) for agent in CHAIN.agents]
    for index, agent in enumerate(CHAIN.agents):
        assert torch.equal(logits_of(adapters, agent.name), logits[index])
        assert not torch.equal(logits[index], logits[index - 1])
        with adapters.off():
            assert torch.equal(logits_of(adapters, agent.name), of_base)


def test_messages_asked_for_together_are_spoken_by_the_adapters_of_their_agents():
    policy = make_tiny_policy(CHAIN, max_new_tokens=12)
    adapters = AgentAdapters.add(policy.decoder.model, CHAIN, sharing="per-agent", rank=4)
    policy = replace(policy, adapters=adapters)
    problem = Problem("p", "train", "What is 3 + 4?", "7", "number")
    nodes = [make_root(problem.question) for _ in range(2)]
    nodes[1].state = CHAIN.step(nodes[1].state, "facts")  # the Planner is next
    requests = [(problem, Sample([node], 1, True)) for node in nodes]
    before = [reply for reply, _ in policy(requests)]
    randomise(adapters, std=1.0, only="agent_Planner")
    after = [reply for reply, _ in policy(requests)]
    assert after[0] == before[0] and after[1] != before[1]


def test_saved_adapters_are_loaded_by_us_and_by_peft_and_refused_elsewhere(tmp_path):
    adapters = add_adapters("per-agent")
    adapters.save(tmp_path)
    settings = {"adapters": "per-agent", "lora_rank": 4, "graph": asdict(CHAIN)}
    settings |= make_tiny_policy(CHAIN).settings
    write_config(tmp_path, {"settings": settings, "finished": True})
    policy = make_tiny_policy(CHAIN, adapter=tmp_path)
    for agent in CHAIN.agents:
        expected = logits_of(adapters, agent.name)
        assert torch.equal(logits_of(policy.adapters, agent.name), expected)
        base = AutoModelForCausalLM.from_pretrained(TINY_AGENTS)
        plain = PeftModel.from_pretrained(base, tmp_path / "adapter" / f"agent_{agent.name}")
        torch.testing.assert_close(plain(input_ids=TOKENS).logits, expected, atol=1e-5, rtol=1e-5)

    # The record depends on the weights of each.
    randomise(adapters, std=0.2, only="agent_Verifier")
    adapters.save(tmp_path)
    other = make_tiny_policy(CHAIN, adapter=tmp_path).settings["adapter"]
    assert other["fingerprint"] != policy.settings["adapter"]["fingerprint"]

    # One that lacks a weight is refused.
    path = tmp_path / "adapter" / "agent_Reader" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file({name: weights[name] for name in weights if name != min(weights)}, path)
    with pytest.raises(InputError, match="agent_Reader.* do not fit"):
        make_tiny_policy(CHAIN, adapter=tmp_path)
    save_file(weights, path)

    reader, *others = CHAIN.agents
    briefed = MAS("chain", (replace(reader, prompt=reader.prompt + " Be brief."), *others))
    with pytest.raises(InputError, match="each of them"):
        make_tiny_policy(briefed, adapter=tmp_path)
    other_base = {"model": {"name": "other", "fingerprint": "0"}}
    for changes in (other_base, {"quantize_policy": True}):
        write_config(tmp_path, {"settings": settings | changes, "finished": True})
        with pytest.raises(InputError, match="trained (on|with) (another|the other)"):
            make_tiny_policy(CHAIN, adapter=tmp_path)
