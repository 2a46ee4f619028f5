"""Tests of policy.py, on the tiny agents.

A message is a function of (seed, problem, path, candidate), not of the batch. Nothing leaks in from
the checkpoint, and costs add up.
"""

import shutil
from collections import Counter
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from conftest import AGENTS, NoProgress, StopError, make_tiny_policy
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

import generate_rollouts
from generate_rollouts import label_tree
from llm import decoding
from llm.decoding import MessageQueue, gumbel_noise, message_key
from llm.policy import make_policy, policy_settings, search_settings
from mas import CHAIN
from support.flags import InputError
from support.runs import seeded
from tasks.problems import Problem, load_problems
from tree import Candidate, Cost, Sample, expand, make_root, run_searches, tree_record

PROBLEMS = load_problems(task="tiny", data=None, split="test", num=8)


def first_messages(policy, problems, *, num=3, greedy=False):
    """Sample `num` first messages of each problem. Returns candidates and cost per problem."""
    requests = []
    for problem in problems:
        request = Sample([make_root(problem.question)], num, greedy)
        requests.append((problem, request))
    candidates, costs = [], []
    for reply, cost in policy(requests):
        candidates.append(reply[0])
        costs.append(cost)
    return candidates, costs


def texts_of(candidates_per_problem):
    texts = []
    for candidates in candidates_per_problem:
        texts += [candidate.text for candidate in candidates]
    return texts


def assert_equal_candidates(candidates, others):
    """Equal messages; the rounding of the log-probabilities depends on the shape of the batch."""
    assert len(candidates) == len(others)
    for candidate, other in zip(candidates, others, strict=True):
        assert candidate.text == other.text
        assert candidate.tokens == other.tokens
        assert candidate.truncated == other.truncated
        assert candidate.logprob == pytest.approx(other.logprob, abs=1e-3)


# ---- A message is a function of (seed, problem, path, candidate) ---------------------------------


def test_a_problem_alone_equals_itself_among_many_and_in_other_batches(chain, policy):
    together, _ = first_messages(policy, PROBLEMS)
    in_small_batches, _ = first_messages(make_tiny_policy(chain, batch_tokens=700), PROBLEMS)
    for index, problem in enumerate(PROBLEMS):
        [alone], _ = first_messages(policy, [problem])
        assert_equal_candidates(alone, together[index])
        assert_equal_candidates(alone, in_small_batches[index])
    # The messages are not all the same.
    assert len(set(texts_of(together))) > len(PROBLEMS)


def test_the_kth_candidate_does_not_depend_on_how_many_are_sampled(policy):
    [three], _ = first_messages(policy, PROBLEMS[:1], num=3)
    [six], _ = first_messages(policy, PROBLEMS[:1], num=6)
    assert_equal_candidates(three, six[:3])
    assert len(set(texts_of([six]))) > 1


def test_another_seed_gives_other_messages(chain, policy):
    candidates, _ = first_messages(policy, PROBLEMS)
    others, _ = first_messages(make_tiny_policy(chain, seed=1), PROBLEMS)
    assert texts_of(candidates) != texts_of(others)


def record_keys(policy, monkeypatch):
    """Let the decoder say one token per message. Returns [(keys, limits)] of every batch."""
    batches = []

    def decode(prompts, repeats, limits, keys, greedy, *, batch_tokens, on_message):
        batches.append((keys, limits))
        [end, *_] = policy.decoder.eos_ids
        for index in range(sum(repeats)):
            on_message(index, [end], [0.0], 0.5)

    monkeypatch.setattr(policy.decoder, "decode", decode)
    return batches


def test_the_noise_of_a_message_is_that_of_seed_problem_path_and_candidate(chain, monkeypatch):
    """No two messages share their noise."""
    policy = make_tiny_policy(chain, seed=5)
    batches = record_keys(policy, monkeypatch)
    expected = []
    for problem in PROBLEMS[:2]:
        root = make_root(problem.question)
        candidates = [Candidate(text, 1, 0.0, False) for text in "xy"]
        children = expand(chain, root, candidates)
        for node in [root, *children]:
            policy([(problem, Sample([node], 3))])
            for candidate in range(3):
                expected.append(message_key(5, problem.id, node.path, candidate))
    keys = [key for keys, _ in batches for key in keys]
    assert keys == expected
    assert len(set(keys)) == len(keys)


def test_a_message_has_the_smaller_limit_of_agent_and_flag(chain, monkeypatch):
    """The Solver's own limit is 512, the Planner's is 256."""
    limits_by_flag = {}
    for max_new_tokens in (300, 20):
        policy = make_tiny_policy(chain, max_new_tokens=max_new_tokens)
        batches = record_keys(policy, monkeypatch)
        [problem] = PROBLEMS[:1]
        root = make_root(problem.question)
        [for_planner] = expand(chain, root, [Candidate("facts", 1, 0.0, False)])
        [for_solver] = expand(chain, for_planner, [Candidate("plan", 1, 0.0, False)])
        policy([(problem, Sample([for_planner, for_solver], 1))])
        [(_, limits)] = batches
        limits_by_flag[max_new_tokens] = sorted(limits)
    assert limits_by_flag == {300: [256, 300], 20: [20, 20]}


def test_a_request_is_answered_without_the_gold_answer(policy):
    """The agents are given the question and the answer type."""
    [problem] = PROBLEMS[:1]
    other = Problem(problem.id, "train", problem.question, "-1", problem.answer_type, "x", "y")
    candidates, _ = first_messages(policy, [problem])
    others, _ = first_messages(policy, [other])
    assert candidates == others


def test_problem_path_and_candidate_each_give_other_messages(policy):
    """The prompts are equal, so that only the key of the message tells them apart."""
    state = make_root(PROBLEMS[0].question).state
    requests = []
    for problem_id, path in (("a", ()), ("b", ()), ("a", (1,))):
        problem = replace(PROBLEMS[0], id=problem_id)
        requests.append((problem, Sample([SimpleNamespace(state=state, path=path)], 6)))
    messages = set()
    for [candidates], _ in policy(requests):
        messages.add(tuple(candidate.text for candidate in candidates))
        assert len(set(texts_of([candidates]))) > 1
    assert len(messages) == 3


def test_every_message_keeps_its_own_noise_limit_and_mode_when_others_end(chain):
    """Messages of one to 24 tokens, greedy and sampled, together and each alone."""
    decode = make_tiny_policy(chain, temperature=3.0).decoder.decode
    num_messages = [2, 3, 1]
    limits = [3, 24, 9, 24, 1, 24]
    greedy = [False, False, True, False, False, True]
    keys = [message_key(index) for index in range(6)]
    prompts = []
    owners = []
    for length, num in zip((5, 9, 7), num_messages, strict=True):
        prompt = list(range(10, 10 + length))
        prompts.append(prompt)
        owners += [prompt] * num

    together = decode(prompts, num_messages, limits, keys, greedy)
    lengths = [len(tokens) for tokens, _ in together]
    assert lengths[4] == 1
    assert len(set(lengths)) > 3
    for index, (tokens, logprobs) in enumerate(together):
        limit = limits[index]
        [alone] = decode([owners[index]], [1], [limit], [keys[index]], [greedy[index]])
        assert tokens == alone[0]
        assert logprobs == pytest.approx(alone[1], abs=1e-3)


def test_any_of_the_ends_of_a_message_ends_it(policy, monkeypatch):
    """A checkpoint may name several; the end itself is counted, and is not part of the text."""
    hot = {"temperature": 3.0, "top_k": 0, "top_p": 1.0}
    monkeypatch.setattr(policy.decoder, "sampling", hot)

    keys = [message_key("any")]

    def decode(eos_ids):
        monkeypatch.setattr(policy.decoder, "eos_ids", eos_ids)
        [(tokens, _)] = policy.decoder.decode([[10, 11, 12]], [1], [30], keys, [False])
        return tokens

    endless = decode({policy.decoder.model.config.vocab_size})
    assert len(endless) == 30
    for end in (endless[7], endless[20]):
        for other in (0, policy.decoder.model.config.vocab_size):
            expected = min(endless.index(eos) for eos in {end, other} & set(endless))
            assert decode({end, other}) == endless[: expected + 1]


def test_the_text_of_a_message_is_all_but_its_end(policy, monkeypatch):
    """A message that was cut has no end, and an end may be any token. Special tokens are hidden."""
    [problem] = PROBLEMS[:1]
    tokenizer = policy.chat_format.tokenizer
    ids = prompt_ids_of(policy, problem)[0].tolist()
    words = [token for token in ids if tokenizer.decode(token).strip().isalpha()][:4]
    monkeypatch.setattr(policy.decoder, "eos_ids", {words[3]})
    special = tokenizer.eos_token_id
    decoded = [([special, *words[:2]], [-1.0] * 3), (words[:4], [-1.0] * 4)]

    def decode(*args, on_message, **options):
        for index, message in enumerate(decoded):
            on_message(index, *message, 0.0)

    monkeypatch.setattr(policy.decoder, "decode", decode)
    [([[cut, ended]], cost)] = policy([(problem, Sample([make_root(problem.question)], 2))])
    assert cut == (tokenizer.decode(words[:2]).strip(), 3, -3.0, True)
    assert ended == (tokenizer.decode(words[:3]).strip(), 4, -4.0, False)
    assert cost.truncated == {"Reader": 1}


def test_greedy_and_sampled_messages_can_share_a_batch(policy):
    sampled_problem, greedy_problem = PROBLEMS[:2]
    mixed = policy(
        [
            (sampled_problem, Sample([make_root(sampled_problem.question)], 2)),
            (greedy_problem, Sample([make_root(greedy_problem.question)], 1, greedy=True)),
        ]
    )
    [([sampled], _), ([likeliest], _)] = mixed
    [sampled_alone], _ = first_messages(policy, [sampled_problem], num=2)
    [likeliest_alone], _ = first_messages(policy, [greedy_problem], num=1, greedy=True)
    assert_equal_candidates(sampled, sampled_alone)
    assert_equal_candidates(likeliest, likeliest_alone)


def test_messages_of_several_agents_can_share_a_batch(chain, policy):
    """Removing the rows of ended messages changes nothing for the others."""
    # 1. Four problems wait for the Planner, and four for the Reader.
    nodes = [make_root(problem.question) for problem in PROBLEMS]
    requests = []
    for problem, root in zip(PROBLEMS[:4], nodes[:4], strict=True):
        requests.append((problem, Sample([root], 1)))
    for index, ([candidates], _) in enumerate(policy(requests)):
        [nodes[index]] = expand(chain, nodes[index], candidates)
    assert {chain.turn(node.state).name for node in nodes} == {"Reader", "Planner"}

    # 2. All together equal each alone.
    requests = []
    for problem, node in zip(PROBLEMS, nodes, strict=True):
        requests.append((problem, Sample([node], 2)))
    together = policy(requests)
    for request, ([candidates], _) in zip(requests, together, strict=True):
        [([alone], _)] = policy([request])
        assert_equal_candidates(candidates, alone)


def comparable_trees(chain, policy, problems, max_active):
    """Label problems. Returns problem id -> nodes without log-probabilities, which are rounded."""
    searches = []
    for problem in problems:
        search = label_tree(
            problem,
            chain,
            num_simulations=4,
            num_candidates=(2, 2, 2, 2),
            c_uct=1.0,
            rng=seeded(0, problem.id),
        )
        searches.append((problem, search))
    trees = {}
    for problem, root, cost in run_searches(
        searches, {Sample: policy}, max_active=max_active, progress=NoProgress()
    ):
        nodes = tree_record(problem, root, cost)["nodes"]
        for node in nodes:
            node.pop("logprob", None)
        trees[problem.id] = nodes
    return trees


def test_a_tree_alone_equals_its_tree_in_a_full_run(chain, policy):
    full_run = comparable_trees(chain, policy, PROBLEMS[:4], max_active=100)
    assert len(full_run) == 4
    for problem in PROBLEMS[:2]:
        alone = comparable_trees(chain, policy, [problem], max_active=1)
        assert alone == {problem.id: full_run[problem.id]}


def test_children_keep_the_path_of_the_candidate_they_came_from(chain, policy):
    [candidates], _ = first_messages(policy, PROBLEMS[:1], num=6)
    children = expand(chain, make_root(PROBLEMS[0].question), candidates)
    for child in children:
        [index] = child.path
        assert child.candidate == candidates[index]


# ---- Against the model itself --------------------------------------------------------------------


def prompt_ids_of(policy, problem):
    """Return the token ids [1, tokens] of the first prompt of a problem."""
    chat = policy.mas.prompt(make_root(problem.question).state, problem.answer_type)
    text = policy.chat_format.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    tokenized = policy.chat_format.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    return tokenized["input_ids"]


def generate_greedily(policy, prompt_ids):
    """Decode by `generate` alone, without our cache, sampling or batching. Returns token ids."""
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=128,
        eos_token_id=policy.chat_format.tokenizer.eos_token_id,
        pad_token_id=policy.chat_format.tokenizer.pad_token_id,
    )
    output = policy.decoder.model.generate(
        prompt_ids, attention_mask=torch.ones_like(prompt_ids), generation_config=config
    )
    return output[0, prompt_ids.shape[1] :]


def test_greedy_is_greedy_and_logprobs_are_those_of_the_model(policy):
    messages, _ = first_messages(policy, PROBLEMS, num=1, greedy=True)
    for problem, [message] in zip(PROBLEMS, messages, strict=True):
        prompt_ids = prompt_ids_of(policy, problem)
        tokens = generate_greedily(policy, prompt_ids)
        assert message.text == policy.chat_format.tokenizer.decode(tokens, skip_special_tokens=True)
        assert message.tokens == len(tokens)

        # One forward over the prompt and the message gives the log-probability of each token.
        all_ids = torch.cat([prompt_ids, tokens[None]], dim=1)
        logits = policy.decoder.model(input_ids=all_ids).logits[0]
        logits_of_message = logits[prompt_ids.shape[1] - 1 : -1]
        logprobs = logits_of_message.log_softmax(-1).gather(1, tokens[:, None])
        assert message.logprob == pytest.approx(logprobs.sum().item(), abs=1e-3)


def sample_by_hand(policy, prompt_ids, key, temperature):
    """Sample one message token by token: a forward over everything, then Gumbel-max.

    Returns its token ids and the log-probabilities before temperature.
    """
    tokens, logprobs = [], []
    keys = torch.tensor([message_key(*key)])
    for step in range(128):
        all_ids = torch.cat([prompt_ids, torch.tensor([tokens], dtype=torch.long)], dim=1)
        with torch.inference_mode():
            logits = policy.decoder.model(input_ids=all_ids).logits[0, -1].double()
        [noise] = gumbel_noise(keys, step, torch.arange(len(logits)))
        token = int((logits / temperature + noise).argmax())
        tokens.append(token)
        logprobs.append(logits.log_softmax(-1)[token].item())
        if token == policy.chat_format.tokenizer.eos_token_id:
            break
    return tokens, logprobs


def test_a_sampled_message_is_drawn_from_the_model_at_its_temperature(chain):
    """Two candidates of the Planner, whose path is not empty, at temperature 1.7."""
    policy = make_tiny_policy(chain, temperature=1.7, seed=3)
    [problem] = PROBLEMS[:1]
    root = make_root(problem.question)
    [_, reader] = expand(chain, root, [Candidate(text, 1, 0.0, False) for text in ("x", "y")])
    [([candidates], _)] = policy([(problem, Sample([reader], 2))])

    chat = chain.prompt(reader.state, problem.answer_type)
    text = policy.chat_format.tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    tokenized = policy.chat_format.tokenizer(text, add_special_tokens=False, return_tensors="pt")
    for index, candidate in enumerate(candidates):
        key = (3, problem.id, (1,), index)
        tokens, logprobs = sample_by_hand(policy, tokenized["input_ids"], key, temperature=1.7)
        assert candidate.tokens == len(tokens) > 5
        text = policy.chat_format.tokenizer.decode(tokens, skip_special_tokens=True)
        assert candidate.text == text.strip()
        assert candidate.logprob == pytest.approx(sum(logprobs), abs=1e-3)
    assert candidates[0].text != candidates[1].text


# ---- Flags ---------------------------------------------------------------------------------------

FLAGS = {  # flag -> a value that is not its default
    "seed": 1,
    "temperature": 0.5,
    "top_k": 7,
    "top_p": 0.8,
    "max_new_tokens": 64,
}


def test_the_flags_reach_the_decoder(chain):
    policy = make_tiny_policy(chain, batch_tokens=999, **FLAGS)
    assert policy.decoder.sampling == {"temperature": 0.5, "top_k": 7, "top_p": 0.8}
    assert (policy.seed, policy.max_new_tokens, policy.batch_tokens) == (1, 64, 999)


def settings_with(mas, *flags):
    args = generate_rollouts.parse_args(["--model", AGENTS, *map(str, flags)])
    policy = SimpleNamespace(mas=mas, settings=policy_settings(args, model=None))
    return search_settings(args, policy)


CHANGES = {name: ("--" + name.replace("_", "-"), value) for name, value in FLAGS.items()}
CHANGES |= {
    "quantize_policy": ("--quantize-policy",),
    "chat_template_kwargs": ("--chat-template-kwargs", '{"x": 1}'),
    "dtype": ("--dtype", "bfloat16"),
    "c_uct": ("--c-uct", 2),
    "task": ("--task", "tiny-score"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_setting_that_changes_messages_or_trees_is_recorded(chain, name):
    """Messages with and without NF4, say, must not end up in one folder."""
    before, after = settings_with(chain), settings_with(chain, *CHANGES[name])
    assert {key for key in before if before[key] != after[key]} == {name}


def test_model_and_graph_are_recorded(chain, duo, tmp_path):
    assert settings_with(duo)["graph"] != settings_with(chain)["graph"]
    # The same files elsewhere are the same model.
    copied = copy_of_agents(tmp_path)
    model, moved = (settings_with(chain, *flags)["model"] for flags in ([], ["--model", copied]))
    assert moved["fingerprint"] == model["fingerprint"]
    (copied / "tokenizer.json").write_text("{}")
    assert settings_with(chain, "--model", copied)["model"]["fingerprint"] != model["fingerprint"]


def test_the_fingerprint_is_that_of_the_model_that_was_loaded(chain, monkeypatch):
    """A model of the hub has the commit that was loaded, whatever the hub holds later."""
    asked = []

    def recorded_fingerprint(name, model):
        asked.append((name, model))
        return "fingerprint"

    monkeypatch.setattr("llm.policy.checkpoint_fingerprint", recorded_fingerprint)
    policy = make_tiny_policy(chain)
    assert asked == [(AGENTS, policy.decoder.model)]
    assert policy.settings["model"] == {"name": AGENTS, "fingerprint": "fingerprint"}


def test_quantized_agents_have_nf4_weights(chain):
    """NF4 with double quantisation, in all linear layers but the output layer."""
    args = generate_rollouts.parse_args(["--model", AGENTS, "--device", "cpu", "--quantize-policy"])
    args.num_threads = 1
    layers = {}
    for name, module in make_policy(args, chain).decoder.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            layers[name] = module
    assert layers
    for name, layer in layers.items():
        if name == "lm_head":
            continue
        assert type(layer).__name__ == "Linear4bit", name
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert not layer.support_avx512bf16_for_cpu
    [unquantized] = [
        module
        for name, module in make_tiny_policy(chain).decoder.model.named_modules()
        if name == "model.layers.0.self_attn.q_proj"
    ]
    assert type(unquantized) is torch.nn.Linear


def test_the_variables_of_the_template_reach_it(chain):
    policy = make_tiny_policy(chain, chat_template_kwargs='{"enable_thinking": false}')
    assert policy.chat_format.template_kwargs == {"enable_thinking": False}


def test_a_launched_process_loads_the_agents_on_its_own_gpu(chain, monkeypatch):
    asked = []

    def load(*args, device, **options):
        asked.append(device)
        raise StopError

    monkeypatch.setattr("llm.policy.load_pretrained", load)
    monkeypatch.setenv("LOCAL_RANK", "3")
    with pytest.raises(StopError):
        make_tiny_policy(chain, device="cuda")
    assert asked == ["cuda:3"]


def test_messages_of_another_sampler_are_others(chain, monkeypatch):
    before = settings_with(chain)
    monkeypatch.setattr("llm.policy.SAMPLER", "another")
    after = settings_with(chain)
    assert {key for key in before if before[key] != after[key]} == {"sampler"}


def test_the_number_of_threads_is_that_of_omp_num_threads(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert generate_rollouts.parse_args([]).num_threads == 7
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")
    assert generate_rollouts.parse_args([]).num_threads <= 2


# ---- Costs and progress --------------------------------------------------------------------------


def test_costs_count_prompts_once_per_node_and_every_generated_token(policy):
    candidates_per_problem, costs = first_messages(policy, PROBLEMS)
    for problem, candidates, cost in zip(PROBLEMS, candidates_per_problem, costs, strict=True):
        prompt_ids = prompt_ids_of(policy, problem)
        assert cost.prompt_tokens == prompt_ids.shape[1]
        assert cost.agent_calls == 3
        assert cost.scored_tokens == 0
        assert cost.generated_tokens == sum(candidate.tokens for candidate in candidates)
        assert cost.seconds > 0


def test_a_search_is_charged_the_seconds_of_its_messages(policy, monkeypatch):
    """One message and three, of half a second each."""
    record_keys(policy, monkeypatch)
    requests = []
    for problem, num in zip(PROBLEMS[:2], (1, 3), strict=True):
        requests.append((problem, Sample([make_root(problem.question)], num)))
    [(_, first), (_, second)] = policy(requests)
    assert (first.agent_calls, first.seconds) == (1, 0.5)
    assert (second.agent_calls, second.seconds) == (3, 1.5)
    assert dict(first.truncated) == {}


def test_a_request_bears_the_cost_of_all_its_nodes(policy, monkeypatch):
    record_keys(policy, monkeypatch)
    roots = [make_root(problem.question) for problem in PROBLEMS[:2]]
    [(_, cost)] = policy([(PROBLEMS[0], Sample(roots, 3))])
    assert (cost.agent_calls, cost.generated_tokens) == (6, 6)
    lengths = [prompt_ids_of(policy, problem).shape[1] for problem in PROBLEMS[:2]]
    assert cost.prompt_tokens == sum(lengths)


def test_costs_add_up():
    total = Cost(agent_calls=1, prompt_tokens=2, truncated=Counter(A=1))
    total += Cost(agent_calls=10, scored_tokens=3, truncated=Counter(A=2, B=1), seconds=0.5)
    total += Cost(generated_tokens=4, seconds=0.25)
    assert total == Cost(11, 2, 4, 3, Counter(A=3, B=1), 0.75)


def test_messages_that_reach_the_limit_are_marked_and_counted(chain):
    short = make_tiny_policy(chain, max_new_tokens=5)
    candidates_per_problem, costs = first_messages(short, PROBLEMS)
    for candidates, cost in zip(candidates_per_problem, costs, strict=True):
        assert all(candidate.truncated for candidate in candidates)
        assert all(candidate.tokens == 5 for candidate in candidates)
        assert cost.truncated == {"Reader": 3}
        assert cost.generated_tokens == 15


def record_batch_sizes(monkeypatch):
    """Return a list of how many messages are live together whenever some are started."""
    take = MessageQueue.take
    sizes = []

    def recorded_take(self, live):
        parts = take(self, live)
        sizes.append(len(live) + sum(len(part.messages) for part in parts))
        return parts

    monkeypatch.setattr(MessageQueue, "take", recorded_take)
    return sizes


def test_every_message_is_reported_and_every_prompt_when_it_is_complete(chain):
    policy = make_tiny_policy(chain, batch_tokens=2000)
    reported = []
    policy.on_batch = lambda *sizes: reported.append(sizes)
    first_messages(policy, PROBLEMS, num=3)
    assert [num_messages for _, num_messages in reported] == [1] * 3 * len(PROBLEMS)
    assert sum(num_prompts for num_prompts, _ in reported) == len(PROBLEMS)
    assert reported[-1] == (1, 1)


def test_messages_are_charged_all_the_time_between_them(chain, monkeypatch):
    """Also with a batch that is refilled."""
    policy = make_tiny_policy(chain, batch_tokens=2000)
    now = 0.0
    monkeypatch.setattr(decoding.time, "perf_counter", lambda: now)

    def taking(seconds, function):
        def timed(*args, **options):
            nonlocal now
            now += seconds
            return function(*args, **options)

        return timed

    model = policy.decoder.model
    monkeypatch.setattr(model, "forward", taking(1.0, model.forward))
    monkeypatch.setattr(decoding, "sample_tokens", taking(0.25, decoding.sample_tokens))
    _, costs = first_messages(policy, PROBLEMS, num=3)
    assert now > 10
    assert sum(cost.seconds for cost in costs) == pytest.approx(now)


# ---- Memory --------------------------------------------------------------------------------------


def run_out_of_memory(monkeypatch, *, max_messages):
    """Let the decoder run out of memory when more than `max_messages` are live together."""
    take = MessageQueue.take

    def scarce_take(self, live):
        parts = take(self, live)
        if len(live) + sum(len(part.messages) for part in parts) > max_messages:
            raise torch.OutOfMemoryError("no room")
        return parts

    monkeypatch.setattr(MessageQueue, "take", scarce_take)


def test_out_of_memory_lowers_the_batches_and_loses_nothing(chain, policy, monkeypatch, capsys):
    expected, expected_costs = first_messages(policy, PROBLEMS)

    small = make_tiny_policy(chain, batch_tokens=8000)
    freed = []
    monkeypatch.setattr(small.decoder, "free_memory", lambda: freed.append(small.batch_tokens))
    run_out_of_memory(monkeypatch, max_messages=2)  # less than the three of a prompt
    reported = []
    small.on_batch = lambda num_prompts, num_messages: reported.append(num_messages)
    messages, costs = first_messages(small, PROBLEMS)
    assert small.batch_tokens < 8000 and freed[0] == 8000
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == f"out of memory: --batch-tokens lowered to {small.batch_tokens}"
    assert isinstance(small.batch_tokens, int)
    assert sum(reported) == 3 * len(PROBLEMS)
    for candidates, others in zip(messages, expected, strict=True):
        assert_equal_candidates(candidates, others)
    for cost, expected_cost in zip(costs, expected_costs, strict=True):
        assert cost.prompt_tokens == expected_cost.prompt_tokens
        assert cost.agent_calls == expected_cost.agent_calls


def test_out_of_memory_halves_the_batch_and_decodes_what_had_not_ended(policy, monkeypatch):
    """The first message of the first prompt had. The longest prompts stay first."""
    decoded = []

    def decode(prompts, repeats, limits, keys, greedy, *, batch_tokens, on_message):
        decoded.append(([len(prompt) for prompt in prompts], repeats, keys, batch_tokens))
        [end, *_] = policy.decoder.eos_ids
        for index in range(sum(repeats)):
            on_message(index, [end], [0.0], 0.5)
            if len(decoded) == 1:
                raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(policy.decoder, "decode", decode)
    monkeypatch.setattr(policy, "batch_tokens", 10**6)
    problems = [replace(PROBLEMS[0], id=f"p{i}", question="word " * 9 * i) for i in range(1, 6)]
    first_messages(policy, problems)

    [(lengths, repeats, keys, _), (lengths_again, repeats_again, keys_again, batch_tokens)] = (
        decoded
    )
    assert lengths == sorted(set(lengths), reverse=True) == lengths_again
    assert (repeats, repeats_again) == ([3] * 5, [2, 3, 3, 3, 3])
    assert keys_again == keys[1:]
    assert batch_tokens == 14 * (lengths[0] + policy.max_new_tokens) // 2 == policy.batch_tokens


def test_a_prompt_with_more_messages_than_a_batch_holds_is_split(chain, policy, monkeypatch):
    small = make_tiny_policy(chain, batch_tokens=700)
    sizes = record_batch_sizes(monkeypatch)
    [candidates], _ = first_messages(small, PROBLEMS[:1], num=8)
    assert max(sizes) == 3
    [expected], _ = first_messages(policy, PROBLEMS[:1], num=8)
    assert_equal_candidates(candidates, expected)


def test_a_message_that_does_not_fit_into_memory_is_refused(chain, monkeypatch):
    policy = make_tiny_policy(chain)
    run_out_of_memory(monkeypatch, max_messages=0)
    with pytest.raises(InputError, match="out of memory with one message of .* tokens.*lower"):
        first_messages(policy, PROBLEMS[:1])


def test_a_prompt_and_its_message_may_fill_the_context(policy, monkeypatch):
    [problem] = PROBLEMS[:1]
    row_tokens = prompt_ids_of(policy, problem).shape[1] + policy.max_new_tokens
    record_keys(policy, monkeypatch)
    config = policy.decoder.model.config
    monkeypatch.setattr(config, "max_position_embeddings", row_tokens)
    first_messages(policy, [problem])
    monkeypatch.setattr(config, "max_position_embeddings", row_tokens - 1)
    with pytest.raises(InputError, match=f"message of 128 do not fit .* {row_tokens - 1};"):
        first_messages(policy, [problem])


def test_a_prompt_that_does_not_fit_into_the_context_is_named(policy):
    problem = Problem("long", "test", "word " * 1000, gold="1", answer_type="number")
    with pytest.raises(InputError, match="problem long: the Reader's prompt of .* do not fit"):
        first_messages(policy, [problem])


# ---- Loading checkpoints -------------------------------------------------------------------------


def copy_of_agents(folder):
    return shutil.copytree(AGENTS, folder / "agents")


def test_a_checkpoints_own_sampling_settings_do_not_leak_in(chain, policy, tmp_path):
    agents = copy_of_agents(tmp_path)
    settings = GenerationConfig(
        repetition_penalty=5.0,
        top_k=1,
        temperature=9.0,
        do_sample=True,
        max_new_tokens=3,
        eos_token_id=2,
        pad_token_id=0,
    )
    settings.save_pretrained(agents)
    messages, _ = first_messages(make_tiny_policy(chain, model=str(agents)), PROBLEMS)
    expected, _ = first_messages(policy, PROBLEMS)
    for candidates, others in zip(messages, expected, strict=True):
        assert_equal_candidates(candidates, others)


def test_a_folder_without_a_model_is_named(chain, tmp_path):
    with pytest.raises(InputError, match="no config.json"):
        make_tiny_policy(chain, model=str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be loaded"):
        make_tiny_policy(chain, model=str(tmp_path))


def test_an_unknown_model_is_named(chain):
    with pytest.raises(InputError, match="--model no/such/model"):
        make_tiny_policy(chain, model="no/such/model")


def test_a_checkpoint_with_weights_missing_is_refused(chain, tmp_path):
    agents = copy_of_agents(tmp_path)
    path = agents / "model.safetensors"
    weights = load_file(path)
    kept = {name: weight for name, weight in weights.items() if "layers.2.mlp" not in name}
    save_file(kept, path, metadata={"format": "pt"})
    complaint = "do not hold all weights of Qwen2ForCausalLM: model.layers.2.mlp"
    with pytest.raises(InputError, match=complaint):
        make_tiny_policy(chain, model=str(agents))


def test_searches_record_where_their_problems_come_from(policy):
    flags = ["--task", "gsm8k", "--data", "mine.jsonl", "--c-uct", "2", "--max-new-tokens", "7"]
    settings = search_settings(generate_rollouts.parse_args(flags), policy)
    expected = {"task": "gsm8k", "data": "mine.jsonl", "hub": None, "c_uct": 2.0}
    expected |= {"max_new_tokens": 7, "graph": asdict(policy.mas)}
    assert expected.items() <= settings.items()


def test_a_message_ends_where_the_checkpoint_says(tmp_path):
    """A chat model may have an end of turn that its tokenizer does not call its end."""
    agents = shutil.copytree(AGENTS, tmp_path / "agents")
    GenerationConfig(eos_token_id=[2, 300]).save_pretrained(agents)
    policy = make_tiny_policy(CHAIN, model=str(agents))
    assert policy.decoder.eos_ids == {2, 300}
