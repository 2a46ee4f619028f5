"""Tests of stage 5 as a whole: it learns, resumes, and refuses what makes no sense."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import AGENTS, make_tiny_policy, sample_tiny_rollouts
from peft import PeftModel
from safetensors.torch import load_file
from test_agents import logprobs_of, make_learner, problems_of, rollouts_of, rows_of, trained_policy
from transformers import AutoModelForCausalLM

import evaluate
import generate_rollouts
import search
import train_agents
import train_agents as rewards
from mas import CHAIN, DEBATE, MAS
from support.flags import HERE, InputError
from support.records import read_jsonl
from support.runs import read_config, seeded
from tasks.problems import load_problems
from train_agents import Training, advantages, distinct_messages

# ---- It learns -----------------------------------------------------------------------------------


def test_a_planted_reward_is_learnt():
    """The Reader lists its facts in random order. Reward it for starting with the total."""
    policy = trained_policy()
    learner = make_learner(policy, lr=3e-3, num_minibatches=2)
    problems = problems_of(num=24)
    shares = []
    for step in range(6):
        rollouts = sample_tiny_rollouts(
            policy,
            problems[4 * step : 4 * step + 4],
            counts=(12, 1, 1, 1),
            num_agents=1,
            seed=f"step {step}",
        )
        rewards = {}
        for rollout in rollouts:
            for node in rollout.nodes:
                rewards[node] = float(node.message.text.startswith("Facts: total"))
        shares.append(sum(rewards.values()) / len(rewards))
        rows = distinct_messages(rollouts, advantages(rewards, "siblings"))
        learner.update(rows, seeded(step))
    assert shares[0] < 0.5
    assert shares[-1] > 0.85


# ---- The script ----------------------------------------------------------------------------------

SMALL = ["--device", "cpu", "--num-threads", "1", "--num-questions", "2", "--num-passes", "2"]
SMALL += ["--num-train", "6", "--num-heldout", "2", "--num-dev-passes", "1", "--reward", "outcome"]
SMALL += ["--policy-lr", "3e-3", "--dev-every", "1", "--num-steps", "3"]


def run_stage(run, *flags):
    train_agents.main(train_agents.parse_args(["--run", str(run), *SMALL, *flags]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return a run folder whose agents have been trained for three small steps."""
    run = tmp_path_factory.mktemp("finished")
    run_stage(run)
    return run


def test_the_folder_of_a_finished_run(finished):
    folder = finished / "agents"
    config = read_config(folder)
    records = read_jsonl(folder / "metrics.jsonl")
    assert config["finished"] and not (folder / "checkpoint.pt").exists()
    assert [record["step"] for record in records] == [0, 1, 2, 3]
    accuracies = [record["dev"]["accuracy"] for record in records]
    assert config["best_step"] == accuracies.index(max(accuracies))
    assert [record["messages"] for record in records] == [0, 16, 32, 48]
    steps = read_jsonl(folder / "messages.jsonl")
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert [len(step["messages"]) for step in steps] == [16, 16, 16]
    assert (folder / "curves.png").stat().st_size > 10_000


def test_only_training_problems_are_trained_on(finished):
    seen = set()
    for step in read_jsonl(finished / "agents" / "messages.jsonl"):
        seen |= {message["problem"] for message in step["messages"]}
    assert seen <= {problem.id for problem in problems_of("train", 6)}
    rows = read_jsonl(finished / "agents" / "problems.jsonl")
    assert {row["split"] for row in rows} == {"train", "heldout"}
    assert len(rows) == 8


class KillError(BaseException):
    pass


def kill(*args, **options):
    raise KillError


def run_until_killed(run, monkeypatch, *, step, name):
    """Run the stage until this method of Training is called after this many steps."""
    original = getattr(Training, name)

    def until_killed(self, *args):
        if self.step == step:
            raise KillError
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Training, name, until_killed)
        with pytest.raises(KillError):
            run_stage(run)


def test_killed_and_resumed_equals_uninterrupted(finished, tmp_path, monkeypatch):
    """Killed while it samples, and after a line was logged but before its checkpoint."""
    run_until_killed(tmp_path, monkeypatch, step=1, name="train_step")
    run_until_killed(tmp_path, monkeypatch, step=2, name="save_checkpoint")
    run_stage(tmp_path)
    for name in ("metrics.jsonl", "messages.jsonl", "adapter/shared/adapter_model.safetensors"):
        resumed, uninterrupted = tmp_path / "agents" / name, finished / "agents" / name
        assert resumed.read_bytes() == uninterrupted.read_bytes(), name
    best_steps = [read_config(run / "agents")["best_step"] for run in (tmp_path, finished)]
    assert best_steps[0] == best_steps[1]


def test_a_finished_run_is_not_trained_again(finished, monkeypatch, capsys):
    monkeypatch.setattr(train_agents, "train", None)
    run_stage(finished)
    output = capsys.readouterr().out
    assert "is finished already" in output and "before" in output


def test_a_run_with_a_coach_adapters_of_their_own_and_another_seed(tmp_path, monkeypatch):
    """An odd number of steps is measured at its end, too."""
    monkeypatch.setattr(rewards.Coach, "SMALLEST_SHARE_OF_DIGITS", 0.0)
    seeds = []
    original = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or original(seed))
    flags = ["--reward", "coach", "--coach", AGENTS, "--adapters", "per-agent"]
    flags += ["--lora-rank", "4", "--seed", "7", "--num-steps", "1", "--dev-every", "2"]
    run_stage(tmp_path, *flags)
    assert 7 in seeds
    folder = tmp_path / "agents"
    assert ["dev" in record for record in read_jsonl(folder / "metrics.jsonl")] == [True, True]
    [step] = read_jsonl(folder / "messages.jsonl")
    assert {message["reward"] is None for message in step["messages"]} == {False}
    for agent in CHAIN.agents:
        path = folder / "adapter" / f"agent_{agent.name}" / "adapter_config.json"
        assert json.loads(path.read_text())["r"] == 4


def test_what_is_not_needed_is_not_sampled(finished, tmp_path, monkeypatch):
    """V reads the Planner's message alone, so that nobody has to speak after the Planner."""

    class FakeValue:
        def score(self, states, *, batch_tokens):
            return [len(state.messages[-1:] and state.messages[-1].text) / 1000 for state in states]

    monkeypatch.setattr(train_agents, "load_value_model", lambda args, mas: FakeValue())
    monkeypatch.setattr(train_agents, "weights_fingerprint", lambda folder: "0")
    (tmp_path / "value").mkdir()
    row = {"id": "seen by V", "split": "train", "question_key": "0"}
    (tmp_path / "value" / "problems.jsonl").write_text(json.dumps(row) + "\n")
    flags = ["--reward", "value", "--rollouts", "tree", "--num-candidates", "1.3.1.1"]
    run_stage(tmp_path, *flags, "--baseline", "siblings", "--num-steps", "1")
    [step] = read_jsonl(tmp_path / "agents" / "messages.jsonl")
    assert [message["agent"] for message in step["messages"]] == 2 * ["Reader", *3 * ["Planner"]]
    for message in step["messages"]:
        assert message["outcome"] is None
        assert message["reward"] == pytest.approx((len(message["message"]) / 1000 + 1) / 2)
    record = read_jsonl(tmp_path / "agents" / "metrics.jsonl")[1]
    assert "seen by V" in (tmp_path / "agents" / "problems.jsonl").read_text()
    planner = record["rollouts"]["Planner"]
    assert planner["right"] is None and planner["value_auc"] is None and planner["value"] > 0.5


OTHER_SETTINGS = [
    ["--reward", "random"],
    ["--rollouts", "tree"],
    ["--max-new-tokens", "90"],
    ["--num-passes", "3"],
    ["--num-steps", "4"],
    ["--num-questions", "1"],
    ["--num-train", "5"],
    ["--num-heldout", "1"],
    ["--adapters", "per-agent"],
    ["--lora-rank", "4"],
    ["--policy-lr", "0.1"],
    ["--clip", "0.1"],
    ["--kl-coef", "0"],
    ["--num-minibatches", "1"],
    ["--num-dev-passes", "2"],
    ["--dev-every", "2"],
    ["--seed", "1"],
    ["--temperature", "0.5"],
]


@pytest.mark.parametrize("flags", OTHER_SETTINGS, ids=" ".join)
def test_another_setting_in_the_same_folder_is_refused(finished, flags):
    with pytest.raises(InputError, match="another configuration"):
        run_stage(finished, *flags)


def test_saved_adapters_load_with_plain_peft(finished):
    """And give the log-probabilities of `--adapter`."""
    folder = finished / "agents" / "adapter" / "shared"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(AGENTS), folder)
    policy = make_tiny_policy(CHAIN, adapter=finished / "agents")
    rows = rows_of(rollouts_of(policy))[:2]
    ours = logprobs_of(make_learner(policy), rows)
    for row, logprob in zip(rows, ours, strict=True):
        logits = plain(input_ids=torch.tensor([row.prompt_ids + row.token_ids])).logits[0]
        at = slice(len(row.prompt_ids) - 1, -1)
        tokens = torch.tensor(row.token_ids)[:, None]
        expected = logits[at].log_softmax(-1).gather(-1, tokens).sum()
        assert logprob == pytest.approx(expected.item(), abs=1e-3)


def test_a_kill_while_the_picture_is_drawn_loses_nothing(tmp_path, monkeypatch):
    one_step = ["--num-steps", "1", "--num-questions", "1", "--num-heldout", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(train_agents, "plot_training", kill)
        with pytest.raises(KillError):
            run_stage(tmp_path, *one_step)
    monkeypatch.setattr(Training, "train_step", None)
    run_stage(tmp_path, *one_step)
    assert read_config(tmp_path / "agents")["finished"]


def test_the_kept_adapters_are_those_of_the_best_step(tmp_path, monkeypatch, capsys):
    """Here the second, after which the run is killed: the last weights are another set."""
    drawn = []
    monkeypatch.setattr(train_agents, "plot_training", lambda *args: drawn.append(args[1]))
    given = iter([0.1, 0.2, 0.9, 0.3])
    snapshots = []
    monkeypatch.setattr(train_agents, "accuracy", lambda rollouts: next(given))
    original = Training.save_checkpoint

    def keep(self, path):
        snapshots.append(self.learner.adapters.weights())
        original(self, path)

    monkeypatch.setattr(Training, "save_checkpoint", keep)
    run_until_killed(tmp_path, monkeypatch, step=2, name="train_step")
    run_stage(tmp_path)
    saved = load_file(tmp_path / "agents/adapter/shared/adapter_model.safetensors")
    assert read_config(tmp_path / "agents")["best_step"] == 2
    printed = capsys.readouterr().out
    assert "kept, step 2" in printed and "at the end, step 3" in printed and drawn == [2]
    for name, weight in saved.items():
        name = name.replace(".weight", ".shared.weight")
        assert torch.equal(weight, snapshots[2][name])
        differs = not torch.equal(snapshots[3][name], weight)
        assert differs or "lora_A" in name


def test_later_stages_use_the_adapters_and_record_them(finished, tmp_path):
    base = make_tiny_policy(CHAIN)
    trained = make_tiny_policy(CHAIN, adapter=finished / "agents")
    assert "adapter" not in base.settings  # a journal of the base stays valid
    recorded = trained.settings["adapter"]
    assert recorded["name"] == str(finished / "agents") and len(recorded["fingerprint"]) == 32
    for module in (generate_rollouts, search, evaluate):
        assert module.parse_args(["--adapter", "x"]).adapter == "x"


def test_other_weights_have_another_fingerprint(finished, tmp_path):
    copied = tmp_path / "agents"
    shutil.copytree(finished / "agents", copied)
    assert make_tiny_policy(DEBATE, adapter=copied).adapters.names == ["shared"]  # of any graph
    same = make_tiny_policy(CHAIN, adapter=copied).settings["adapter"]["fingerprint"]
    weights = copied / "adapter/shared/adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    other = make_tiny_policy(CHAIN, adapter=copied).settings["adapter"]["fingerprint"]
    original = make_tiny_policy(CHAIN, adapter=finished / "agents").settings["adapter"]
    assert original["fingerprint"] == same != other


def test_training_goes_on_from_given_adapters(finished, tmp_path):
    """The loop: relabel with the new agents, a fresh V, and on with `--adapter`."""
    args = train_agents.parse_args(["--run", str(tmp_path), *SMALL])
    args.adapter = str(finished / "agents")
    policy = train_agents.make_policy(args, CHAIN)
    saved = load_file(finished / "agents/adapter/shared/adapter_model.safetensors")
    for name, parameter in policy.adapters.parameters().items():
        assert torch.equal(parameter, saved[name.replace(".shared", "")])
        assert parameter.requires_grad
    for flags, complaint in (
        (["--adapters", "per-agent"], "of the other kind"),
        (["--lora-rank", "4"], "have rank 16"),
        (["--run", str(finished), "--overwrite"], "would write where it reads"),
    ):
        with pytest.raises(InputError, match=complaint):
            run_stage(tmp_path, "--adapter", str(finished / "agents"), *flags)


def test_what_the_first_adapters_and_v_have_seen_is_seen_by_the_next(tmp_path):
    """A chain of runs may use several data sets; evaluate.py must refuse to test on any of them."""
    for name, problem_id in (("first", "a"), ("value", "v")):
        (tmp_path / name).mkdir()
        row = {"id": problem_id, "split": "train", "question_key": problem_id}
        (tmp_path / name / "problems.jsonl").write_text(json.dumps(row) + "\n")

    def seen(**changes):
        defaults = {"adapter": None, "reward": "outcome", "value": str(tmp_path / "value")}
        args = SimpleNamespace(**(defaults | changes))
        return [row["id"] for row in train_agents.inherited_problems(args)]

    assert seen() == []
    assert seen(adapter=str(tmp_path / "first")) == ["a"]
    assert seen(reward="value-delta") == ["v"]
    assert seen(reward="value", adapter=str(tmp_path / "first")) == ["a", "v"]


def test_test_questions_that_the_agents_were_trained_on_are_refused(finished):
    args = SimpleNamespace(value=None, orm=None, run="r", adapter=str(finished / "agents"))
    fresh = load_problems(task="tiny", data=None, split="test", num=3)
    evaluate.refuse_leaks(fresh, [], args)
    for split in ("train", "heldout"):
        [leaked] = load_problems(task="tiny", data=None, split=split, num=1)
        with pytest.raises(InputError, match="was trained or selected on"):
            evaluate.refuse_leaks([*fresh, leaked], [], args)


# ---- Bad input -----------------------------------------------------------------------------------

REFUSED = [
    (["--reward", "bogus"], "invalid choice: 'bogus'"),
    (["--reward", "search"], "give --rollouts tree"),
    (["--baseline", "siblings"], "give --rollouts tree"),
    (
        ["--baseline", "siblings", "--rollouts", "tree", "--num-candidates", "1"],
        "needs an agent with several",
    ),
    (["--reward", "coach"], "belong together"),
    (["--coach", AGENTS], "belong together"),
    (["--reward", "value"], "no trained value model there"),
    (["--reward", "value-delta"], "no trained value model there"),
    (["--value", "nowhere"], "nowhere: no trained value model there"),
    (["--credit", "return"], "give --reward value-delta"),
    (["--outcome-share", "0.5"], "is the outcome already"),
    (["--top-p", "0.9"], "leave them out"),
    (["--top-k", "5"], "leave them out"),
    (["--reward", "coach", "--coach", str(HERE / "tests")], "--coach .*: no model here"),
    (["--adapter", "nowhere"], "nowhere: no config.json here"),
]


@pytest.mark.parametrize("flags, complaint", REFUSED, ids=lambda value: " ".join(value)[:40])
def test_flags_that_make_no_sense_are_refused_in_one_line(tmp_path, flags, complaint):
    with pytest.raises(InputError, match=complaint) as refusal:
        run_stage(tmp_path, *flags)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "agents").exists()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        run_stage(tmp_path)


def edit_config(folder, **changes):
    config = read_config(folder)
    for key, value in changes.items():
        if key in config["settings"]:
            config["settings"][key] = value
        else:
            config[key] = value
    (folder / "config.json").write_text(json.dumps(config))


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished / "agents", tmp_path / "copy")


def test_adapters_of_another_base_or_other_agents_are_refused(copied):
    edit_config(copied, model={"name": "other/model", "fingerprint": "0"})
    with pytest.raises(InputError, match="trained on another model, other/model"):
        make_tiny_policy(CHAIN, adapter=copied)


def test_unfinished_adapters_are_refused(copied):
    edit_config(copied, finished=False)
    with pytest.raises(InputError, match="its training is not finished"):
        make_tiny_policy(CHAIN, adapter=copied)


def test_adapters_trained_on_quantised_weights_need_them(copied):
    edit_config(copied, quantize_policy=True)
    with pytest.raises(InputError, match="other weights of the model; give --quantize-policy"):
        make_tiny_policy(CHAIN, adapter=copied)


def test_a_folder_of_v_is_no_folder_of_agents(copied):
    config = read_config(copied)
    del config["settings"]["adapters"], config["settings"]["model"]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="not a folder RUN/agents"):
        make_tiny_policy(CHAIN, adapter=copied)


def test_adapters_for_the_agents_of_another_graph_are_refused(copied):
    edit_config(copied, adapters="per-agent")
    with pytest.raises(InputError, match="belongs to an agent of the graph 'chain'"):
        make_tiny_policy(DEBATE, adapter=copied)
    # Agents of the same names with another prompt are others.
    reader, *others = CHAIN.agents
    other_reader = replace(reader, prompt=reader.prompt + " Be brief.")
    with pytest.raises(InputError, match="and these agents are others"):
        make_tiny_policy(MAS("chain", (other_reader, *others)), adapter=copied)


def test_a_step_in_which_every_message_is_cut_is_refused(tmp_path):
    with pytest.raises(InputError, match="raise --max-new-tokens"):
        run_stage(tmp_path, "--max-new-tokens", "1")


def test_training_that_runs_out_of_memory_says_what_to_lower(tmp_path, monkeypatch):
    def no_room(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_agents, "train", no_room)
    with pytest.raises(InputError, match="^out of memory; lower --train-batch-tokens or"):
        run_stage(tmp_path)
