"""The agents: sampling is a function of (seed, problem, path, candidate), not of the batch; nothing leaks in; costs add up."""

import math
import shutil

import pytest
import torch
from conftest import AGENTS, NoProgress, make_tiny_policy
from transformers import GenerationConfig, LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper

from generate_rollouts import Sample, SeededSampler, expand, label_tree, make_root, run, tree_record
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
    chat = policy.mas.prompt(make_root(problem.question).state)
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
    scores = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(1000, 1)
    draws = (torch.arange(1000).double()[:, None] + 0.5) / 1000
    sampler = SeededSampler(draws, torch.zeros(1000, dtype=torch.bool), LogitsProcessorList([TemperatureLogitsWarper(1.0)]))
    tokens = sampler(torch.zeros(1000, 1, dtype=torch.long), scores).argmax(-1)
    assert tokens.bincount().tolist() == [100, 200, 300, 400] and tokens[:100].eq(0).all() and tokens[-400:].eq(3).all()
    assert sampler.logprobs[0][tokens == 1] == pytest.approx(math.log(0.2), abs=1e-6)
    hot = SeededSampler(draws, torch.zeros(1000, dtype=torch.bool), LogitsProcessorList([TemperatureLogitsWarper(0.5), TopKLogitsWarper(2)]))
    tokens = hot(torch.zeros(1000, 1, dtype=torch.long), scores).argmax(-1)
    assert tokens.bincount(minlength=4).tolist() == [0, 0, 360, 640]       # 0.3^2 : 0.4^2
    assert hot.logprobs[0][tokens == 3] == pytest.approx(math.log(0.4), abs=1e-6)  # the policy's own, before temperature


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
    assert all(cost.truncated == 3 and cost.generated_tokens == 15 for cost in costs)


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
