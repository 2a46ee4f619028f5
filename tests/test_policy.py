"""The agents: sampling is a function of (seed, problem, path, candidate), not of the batch; nothing leaks in; costs add up."""

import math
import shutil

import pytest
import torch
from conftest import AGENTS, NoProgress, make_tiny_policy
from transformers import GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from generate_rollouts import Sample, SpareLayer, draw_tokens, expand, label_tree, make_root, run, tree_record, warp
from mas import InputError, load_problems, seeded

PROBLEMS = load_problems(task="tiny", data=None, split="test", num=8)


def ask(policy, problems, num=3, greedy=False):
    """First messages for each problem."""
    replies = policy([(problem, Sample([make_root(problem.question)], num, greedy)) for problem in problems])
    return [reply[0] for reply, _ in replies], [cost for _, cost in replies]


def assert_same(a, b):
    """Equal messages; log-probabilities up to the rounding that another batch shape brings."""
    assert [(c.text, c.tokens, c.truncated) for c in a] == [(c.text, c.tokens, c.truncated) for c in b]
    assert [c.logprob for c in a] == pytest.approx([c.logprob for c in b], abs=1e-3)


def test_a_problem_alone_equals_itself_among_many_and_in_other_batches(chain, policy):
    together, _ = ask(policy, PROBLEMS)
    small_batches, _ = ask(make_tiny_policy(chain, batch_tokens=700), PROBLEMS)
    for problem, among, split in zip(PROBLEMS, together, small_batches):
        [alone], _ = ask(policy, [problem])
        assert_same(alone, among)
        assert_same(alone, split)
    assert len({c.text for candidates in together for c in candidates}) > len(PROBLEMS)   # they do differ


def test_the_kth_candidate_does_not_depend_on_how_many_are_drawn(policy):
    [three], _ = ask(policy, PROBLEMS[:1], num=3)
    [six], _ = ask(policy, PROBLEMS[:1], num=6)
    assert_same(three, six[:3])
    assert len({c.text for c in six}) > 1


def test_another_seed_gives_other_messages(chain, policy):
    one, _ = ask(policy, PROBLEMS)
    other, _ = ask(make_tiny_policy(chain, seed=1), PROBLEMS)
    assert [c.text for cs in one for c in cs] != [c.text for cs in other for c in cs]


def plain_generate(policy, problem):
    """Greedy decoding by `generate` alone, without our cache, sampler or batching."""
    chat = policy.mas.prompt(make_root(problem.question).state, problem.kind)
    text = policy.tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    out = policy.model.generate(**ids, generation_config=GenerationConfig(do_sample=False, max_new_tokens=128, eos_token_id=policy.tokenizer.eos_token_id,
                                                                          pad_token_id=policy.tokenizer.pad_token_id))
    return ids["input_ids"], out[0, ids["input_ids"].shape[1]:]


def test_greedy_is_greedy_and_logprobs_are_those_of_the_model(policy):
    messages, _ = ask(policy, PROBLEMS, num=1, greedy=True)
    for problem, [message] in zip(PROBLEMS, messages):
        prompt, tokens = plain_generate(policy, problem)
        assert message.text == policy.tokenizer.decode(tokens, skip_special_tokens=True) and message.tokens == len(tokens)
        logits = policy.model(input_ids=torch.cat([prompt, tokens[None]], 1)).logits[0, prompt.shape[1] - 1:-1]
        assert message.logprob == pytest.approx(logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item(), abs=1e-3)


def test_greedy_and_sampled_rows_share_a_batch_without_touching(policy):
    nodes = [make_root(problem.question) for problem in PROBLEMS[:2]]
    mixed = policy([(PROBLEMS[0], Sample([nodes[0]], 2)), (PROBLEMS[1], Sample([nodes[1]], 1, True))])
    [sampled], _ = ask(policy, PROBLEMS[:1], num=2)
    [best], _ = ask(policy, PROBLEMS[1:2], num=1, greedy=True)
    assert_same(mixed[0][0][0], sampled)
    assert_same(mixed[1][0][0], best)


def test_the_sampler_draws_from_the_distribution():
    """Inverse CDF by hand, and frequencies over evenly spaced uniforms."""
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(1000, 1)
    draws, sampled = (torch.arange(1000).double() + 0.5) / 1000, torch.zeros(1000, dtype=torch.bool)
    tokens, logprobs = draw_tokens(logits, draws, sampled, temperature=1.0, top_k=0, top_p=1.0)
    assert tokens.bincount().tolist() == [100, 200, 300, 400] and tokens[:100].eq(0).all() and tokens[-400:].eq(3).all()
    assert logprobs[tokens == 1] == pytest.approx(math.log(0.2), abs=1e-6)
    tokens, logprobs = draw_tokens(logits, draws, sampled, temperature=0.5, top_k=2, top_p=1.0)
    assert tokens.bincount(minlength=4).tolist() == [0, 0, 360, 640]       # 0.3^2 : 0.4^2
    assert logprobs[tokens == 3] == pytest.approx(math.log(0.4), abs=1e-6)  # the policy's own, before temperature
    tokens, _ = draw_tokens(logits, draws, ~sampled, temperature=0.5, top_k=0, top_p=1.0)
    assert tokens.eq(3).all()


@pytest.mark.parametrize("size", [50, 3000])   # 3,000: the nucleus may have to be looked for beyond the 1,024 likeliest
@pytest.mark.parametrize("top_k, top_p, spread", [(0, 0.9, 1.0), (0, 0.9, 5.0), (7, 1.0, 1.0), (20, 0.5, 2.0), (0, 0.05, 1.0), (10_000, 0.999, 0.1)])
def test_warping_equals_the_librarys(size, top_k, top_p, spread):
    logits = spread * torch.randn((5, size), generator=torch.Generator().manual_seed(0))
    expected = TemperatureLogitsWarper(0.7)(None, logits)
    expected = TopKLogitsWarper(top_k)(None, expected) if top_k else expected
    expected = TopPLogitsWarper(top_p)(None, expected) if top_p < 1 else expected
    assert torch.equal(warp(logits, temperature=0.7, top_k=top_k, top_p=top_p), expected)


def test_a_cache_with_spare_columns_equals_one_that_copies():
    ours, theirs, generator = SpareLayer(), DynamicLayer(), torch.Generator().manual_seed(0)
    rows = 3
    for columns in [5] + [1] * (SpareLayer.SPARE + 3) + [4]:
        new = torch.randn((2, rows, 2, columns, 8), generator=generator)
        for a, b in zip(ours.update(*new), theirs.update(*new)):
            assert torch.equal(a, b)
        if theirs.get_seq_length() in (9, 40):    # drop and reorder rows, as when some have ended
            rows = 2
            for layer in (ours, theirs):
                layer.batch_select_indices(torch.tensor([1, 0]))
    assert ours.get_seq_length() == theirs.get_seq_length() > SpareLayer.SPARE


def test_rows_with_other_limits_and_agents_share_a_batch(chain, policy):
    """Dropping the rows that have ended changes nothing for the others."""
    fresh = [make_root(problem.question) for problem in PROBLEMS]
    nodes = list(fresh)
    for i, [reply] in zip(range(4), (reply for reply, _ in policy([(p, Sample([n], 1)) for p, n in zip(PROBLEMS[:4], fresh)]))):
        [nodes[i]] = expand(chain, fresh[i], reply)
    mixed = policy([(p, Sample([n], 2)) for p, n in zip(PROBLEMS, nodes)])
    assert {chain.turn(n.state).name for n in nodes} == {"Reader", "Planner"}
    for problem, node, ([candidates], _) in zip(PROBLEMS, nodes, mixed):
        [([alone], _)] = policy([(problem, Sample([node], 2))])
        assert_same(candidates, alone)


def test_messages_of_one_prompt_are_computed_once_for_as_long_as_they_are_the_same(policy, monkeypatch):
    """What the model reads is every prompt and every distinct beginning of its messages, up to rows that have ended and are not dropped yet."""
    forward, fed, drawn = policy.model.forward, [], []
    monkeypatch.setattr(policy.model, "forward", lambda input_ids, **rest: fed.append(input_ids.numel()) or forward(input_ids=input_ids, **rest))
    decode = type(policy)._decode
    monkeypatch.setattr(type(policy), "_decode", lambda *args: drawn.append(decode(*args)) or drawn[-1])
    problem = PROBLEMS[0]
    for greedy in (True, False):
        fed.clear()
        drawn.clear()
        policy([(problem, Sample([make_root(problem.question)], 8, greedy))])
        [messages] = drawn
        beginnings = {tuple(tokens[:end]) for tokens, _ in messages for end in range(1, len(tokens))}   # the last token of a message is not read
        assert len(beginnings) <= sum(fed[1:]) <= len(beginnings) / 0.8
        distinct = len({tuple(tokens) for tokens, _ in messages})
        assert len(messages) == 8 and (distinct == 1 if greedy else distinct > 1)
        assert sum(fed[1:]) < sum(len(tokens) - 1 for tokens, _ in messages)


def test_out_of_memory_halves_the_token_budget_and_goes_on(chain, policy, monkeypatch, capsys):
    small, decode, sizes = make_tiny_policy(chain, batch_tokens=8000), type(policy)._decode, []

    def scarce(self, prompts, *rest):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise torch.OutOfMemoryError("no room")
        return decode(self, prompts, *rest)

    monkeypatch.setattr(type(policy), "_decode", scarce)
    found, _ = ask(small, PROBLEMS)
    assert max(sizes) > 2 and small.batch_tokens < 8000 and "out of memory: --batch-tokens halved" in capsys.readouterr().err
    monkeypatch.undo()
    for a, b in zip(found, ask(policy, PROBLEMS)[0]):
        assert_same(a, b)


def test_a_checkpoints_own_sampling_settings_do_not_leak_in(chain, policy, tmp_path):
    shutil.copytree(AGENTS, tmp_path / "agents")
    GenerationConfig(repetition_penalty=5.0, top_k=1, temperature=9.0, do_sample=True, max_new_tokens=3, eos_token_id=2, pad_token_id=0).save_pretrained(tmp_path / "agents")
    leaky, _ = ask(make_tiny_policy(chain, model=str(tmp_path / "agents")), PROBLEMS)
    for a, b in zip(leaky, ask(policy, PROBLEMS)[0]):
        assert_same(a, b)


def test_messages_that_run_into_the_limit_are_marked_and_counted(chain):
    short = make_tiny_policy(chain, max_new_tokens=5)
    candidates, costs = ask(short, PROBLEMS)
    assert all(c.truncated and c.tokens == 5 for cs in candidates for c in cs)
    assert all(cost.truncated == {"Reader": 3} and cost.generated_tokens == 15 for cost in costs)


def test_costs_count_prompts_once_per_node_and_every_generated_token(policy):
    candidates, costs = ask(policy, PROBLEMS)
    for problem, cs, cost in zip(PROBLEMS, candidates, costs):
        prompt, _ = plain_generate(policy, problem)
        assert cost.prompt_tokens == prompt.shape[1] and cost.agent_calls == 3 and cost.scored_tokens == 0
        assert cost.generated_tokens == sum(c.tokens for c in cs) and cost.seconds > 0


def test_a_tree_alone_equals_its_tree_in_a_full_run(chain, policy):
    def trees(problems, max_active):
        searches = ((p, label_tree(p, chain, num_simulations=6, num_candidates=(2, 2, 2, 2), c_uct=1.0, rng=seeded(0, p.id))) for p in problems)
        return {p.id: [{k: v for k, v in node.items() if k != "logprob"} for node in tree_record(p, root, cost)["nodes"]]
                for p, root, cost in run(searches, {Sample: policy}, max_active=max_active, progress=NoProgress())}
    full = trees(PROBLEMS, 100)
    assert len(full) == len(PROBLEMS)
    for problem in PROBLEMS[:3]:
        assert trees([problem], 1) == {problem.id: full[problem.id]}


def test_a_prompt_that_does_not_fit_is_named(policy):
    problem = type(PROBLEMS[0])("long", "test", "word " * 1000, "1", "number")
    with pytest.raises(InputError, match="problem long: the Reader's prompt of .* do not fit"):
        ask(policy, [problem])


def test_children_keep_the_path_of_the_candidate_they_came_from(chain, policy):
    [candidates], _ = ask(policy, PROBLEMS[:1], num=6)
    root = make_root(PROBLEMS[0].question)
    expand(chain, root, candidates)
    assert [child.candidate for child in root.children] == [candidates[child.path[0]] for child in root.children]


@pytest.mark.parametrize("files, complaint", [([], "no config.json"), (["config.json"], "cannot be loaded")])
def test_a_wrong_model_folder_is_named(chain, tmp_path, files, complaint):
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=complaint):
        make_tiny_policy(chain, model=str(tmp_path))
    with pytest.raises(InputError, match="--model no/such/model"):
        make_tiny_policy(chain, model="no/such/model")


def test_a_checkpoint_with_weights_missing_is_refused(chain, tmp_path):
    from safetensors.torch import load_file, save_file
    shutil.copytree(AGENTS, tmp_path / "agents")
    weights = load_file(tmp_path / "agents" / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "layers.2.mlp" not in k}, tmp_path / "agents" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="do not hold all weights of Qwen2ForCausalLM: model.layers.2.mlp"):
        make_tiny_policy(chain, model=str(tmp_path / "agents"))
