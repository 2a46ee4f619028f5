"""The value model: labels, rendering to token ids, scoring, the training loop, saving and loading, held-out metrics."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import AGENTS, HERE, NoProgress, ScriptedPolicy
from peft import LoraConfig, get_peft_model
from torch import nn

import train_value
from generate_rollouts import Sample, label_tree, open_run, run, tree_record, uniforms
from mas import GRAPHS, InputError, Problem, State, seeded
from train_value import Edge, ValueModel, auc, load_backbone, make_rows, metrics, token_batches, train, tree_paths

WORDS = "the plan holds because four boxes of seven pens make twenty eight".split()


def scripted_trees(chain, count=6):
    """Trees whose messages are long and short random phrases and whose answers are right one time in three."""

    class Policy(ScriptedPolicy):
        def __call__(self, requests):
            replies = []
            for problem, request in requests:
                def say(path, problem=problem):
                    u = uniforms(20, problem.id, path)
                    phrase = " ".join(WORDS[int(x * len(WORDS))] for x in u[:int(2 + 8 * u[19])])
                    return f"{phrase} Final answer: {int(u[18] * 3)}" if len(path) == 4 else phrase
                self.say = say
                replies += super().__call__([(problem, request)])
            return replies
    problems = [Problem(f"p{i}", "train" if i < count - 2 else "heldout", f"Question number {i} " * (i + 1), "1", "number") for i in range(count)]
    searches = ((p, label_tree(p, chain, num_simulations=10, num_candidates=(2, 2, 2, 2), c_uct=1.0, rng=seeded(0, p.id))) for p in problems)
    return [tree_record(p, root, cost) for p, root, cost in run(searches, {Sample: Policy(None)}, max_active=99, progress=NoProgress())]


@pytest.fixture(scope="module")
def records():
    return scripted_trees(GRAPHS["chain"])


def make_model(chain, *, quantize=False, view="full", rank=4, loss="huber"):
    torch.manual_seed(0)
    backbone, tokenizer = load_backbone(AGENTS, quantize=quantize, device="cpu")
    model = ValueModel(get_peft_model(backbone, LoraConfig(r=rank, lora_alpha=8, target_modules="all-linear")), tokenizer, chain, view, loss)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model(GRAPHS["chain"])


def paths_of(records, chain, target="search"):
    return [path for record in records for path in tree_paths(record, chain, target)]


def all_states(records, chain):
    return [edge.state for path in paths_of(records, chain) for edge in path]


# Labels


def test_every_visited_edge_is_labelled_exactly_once_with_its_q(records, chain):
    for record in records:
        edges = [edge for path in tree_paths(record, chain, "search") for edge in path]
        visited = [node for node in record["nodes"][1:] if node["N"] > 0]
        assert len({edge.state for edge in edges}) == len(edges) == len(visited)
        assert sorted((e.agent, e.state.messages[-1].text, e.y, e.visits) for e in edges) == sorted(
            (n["agent"], n["message"], n["W"] / n["N"], n["N"]) for n in visited)
        assert all(-1 <= edge.y <= 1 for edge in edges)


def test_outcome_labels_are_terminal_states_and_rewards(records, chain):
    edges = [edge for path in paths_of(records, chain, "outcome") for edge in path]
    assert edges and all(chain.is_terminal(edge.state) and edge.y in (1.0, -1.0) for edge in edges)
    assert len(edges) == sum("reward" in node and node["N"] > 0 for record in records for node in record["nodes"])


@pytest.mark.parametrize("view", ["full", "local"])
def test_rows_read_v_at_the_token_that_ends_the_labelled_message(records, chain, model, view):
    """V at a row's position sees exactly the ids of that state: the row up to there is the state encoded alone."""
    model = ValueModel(model.backbone, model.tokenizer, chain, view, "huber")
    paths = paths_of(records, chain)
    rows, edges = make_rows(paths, model), iter([edge for path in paths for edge in path])
    for row in rows:
        for position, y in zip(row.positions, row.targets, strict=True):
            edge = next(edges)
            ids, ends = model.encode(edge.state)
            assert row.ids[:position + 1] == ids and ends[-1] == position and y == edge.y
            assert row.ids[position] == model.tokenizer.eos_token_id
    assert next(edges, None) is None


def test_paths_share_their_prefix_instead_of_repeating_it(records, chain, model):
    """One forward over a path serves all states on it: far fewer tokens than a row per state, and no label twice."""
    paths = paths_of(records, chain)
    rows = make_rows(paths, model)
    assert sum(len(row.ids) for row in rows) < 0.7 * sum(len(model.encode(edge.state)[0]) for path in paths for edge in path)
    assert len(rows) == sum("reward" in node and node["N"] > 0 for record in records for node in record["nodes"])


def test_distinct_tokens_by_hand():
    rows = [train_value.Row(ids, [], [], []) for ids in ([1, 2, 3], [1, 2, 4], [1, 5], [2, 3], [1, 2])]
    assert train_value.distinct_tokens(rows) == 7   # 1, 12, 123, 124, 15, 2, 23


def test_no_problem_is_on_both_sides(records, chain):
    sides = {split: {e.problem_id for p in paths_of(records, chain) for e in p if e.split == split} for split in ("train", "heldout")}
    assert sides["train"] and sides["heldout"] and not sides["train"] & sides["heldout"]


# Scoring


def test_token_ids_of_a_state_are_a_prefix_of_its_childrens(chain, model):
    state, encoded = State("How many? ", ()), []
    for text in ("ends in newlines\n\n", " starts with a space", "", "Ünïcödé ☃"):
        state = chain.step(state, text)
        encoded.append(model.encode(state)[0])
    assert all(child[:len(parent)] == parent for parent, child in zip(encoded, encoded[1:]))


def test_padded_equals_unpadded_and_one_forward_per_path_equals_one_per_state(records, chain, model):
    states = all_states(records[:3], chain)
    batched, _ = model.score(states, batch_tokens=100_000)
    alone = [model.score([state], batch_tokens=1)[0][0] for state in states]
    by_path = [v for row in model.predict(make_rows(paths_of(records[:3], chain), model), batch_tokens=2000, progress=None) for v in row]
    assert batched == pytest.approx(alone, abs=1e-5) and by_path == pytest.approx(alone, abs=1e-5)
    assert len({round(v, 4) for v in alone}) > len(alone) // 2 and all(-1 < v < 1 for v in alone)


def test_v_is_tanh_of_the_head_at_the_last_token(chain, model):
    state = chain.step(State("q", ()), "facts")
    ids, ends = model.encode(state)
    hidden = model.backbone(input_ids=torch.tensor([ids]), use_cache=False).last_hidden_state[0, ends[-1]]
    by_hand = torch.tanh(hidden @ model.head.weight[0] + model.head.bias[0]).item()
    assert model.score([state], batch_tokens=99)[0][0] == pytest.approx(by_hand, abs=1e-6) and ends[-1] == len(ids) - 1


def test_a_later_message_does_not_change_an_earlier_value(chain, model):
    state = chain.step(State("q", ()), "facts")
    child = chain.step(state, "a plan that is quite long and says a lot")
    ids, ends = model.encode(child)
    with torch.inference_mode():
        [at_parent, at_child] = model([ids], [(0, ends[1]), (0, ends[2])]).tolist()
    assert at_parent == pytest.approx(model.score([state], batch_tokens=99)[0][0], abs=1e-6) and at_parent != at_child


def test_out_of_memory_splits_the_batch_and_goes_on(records, chain, model, monkeypatch, capsys):
    states, forward = all_states(records[:2], chain), ValueModel.outputs

    def scarce(self, rows, at):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no room")
        return forward(self, rows, at)
    expected, _ = model.score(states, batch_tokens=100_000)
    monkeypatch.setattr(ValueModel, "outputs", scarce)
    assert model.score(states, batch_tokens=100_000)[0] == pytest.approx(expected, abs=1e-5)
    assert "out of memory" in capsys.readouterr().err


def test_equal_states_are_read_once_and_paid_once(chain, model):
    state = chain.step(State("q", ()), "facts")
    values, tokens = model.score([state, state], batch_tokens=99)
    assert values[0] == values[1] and tokens == [len(model.encode(state)[0]), 0]


def test_a_transcript_that_does_not_fit_raises_instead_of_losing_its_end(chain, model):
    with pytest.raises(InputError, match="does not fit"):
        model.score([chain.step(State("q", ()), "word " * 1100)], batch_tokens=99)


def test_token_batches_cover_all_rows_within_the_budget():
    lengths = [5, 9, 1, 30, 4, 4, 8]
    batches = list(token_batches(lengths, sorted(range(7), key=lengths.__getitem__), 20))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len(batch) * max(lengths[i] for i in batch) <= 20 or len(batch) == 1 for batch in batches)


# Training


def fit(model, rows, tmp_path, epochs=2, after_epoch=lambda epoch, loss: None, batch_tokens=1500):
    train(model, rows, epochs=epochs, lr=3e-3, batch_tokens=batch_tokens, huber_delta=1.0, seed=0, checkpoint=tmp_path / "checkpoint.pt", after_epoch=after_epoch)


@pytest.mark.parametrize("quantize", [False, True])
def test_lora_and_head_move_and_the_base_does_not(records, chain, tmp_path, quantize):
    model = make_model(chain, quantize=quantize)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = []
    fit(model, make_rows(paths_of(records, chain)[:24], model), tmp_path, after_epoch=lambda epoch, loss: losses.append(loss))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(model.trained_state()) == {name for name in before if "lora_" in name or name.startswith("head.")}
    assert losses[1] < losses[0]


def test_the_loss_is_huber_in_tanh_space(records, chain, tmp_path):
    model = make_model(chain)
    [row] = make_rows([next(path for path in paths_of(records, chain) if len(path) == 4)], model)
    values = torch.tensor(model.predict([row], batch_tokens=999, progress=None)[0])
    error = (values - torch.tensor(row.targets)).abs()
    by_hand = torch.where(error <= 1, 0.5 * error ** 2, error - 0.5).mean().item()
    seen = []
    fit(model, [row], tmp_path, epochs=1, after_epoch=lambda epoch, loss: seen.append(loss))
    assert seen == [pytest.approx(by_hand, abs=1e-5)]


def test_every_loss_by_hand(chain):
    """Four labels in two trees; outputs as the head gives them."""
    targets, groups = torch.tensor([1.0, -1.0, 0.5, 0.0]), [("p", "Solver"), ("p", "Solver"), ("p", "Planner"), ("q", "Solver")]
    outputs = torch.tensor([[0.3], [0.8], [-0.2], [0.1]])
    loss = lambda name, out: train_value.training_loss(make_model(chain, loss=name), out, targets, groups, huber_delta=1.0).item()
    error = (torch.tanh(outputs)[:, 0] - targets).abs()
    assert loss("huber", outputs) == pytest.approx(torch.where(error <= 1, error ** 2 / 2, error - 0.5).mean().item())
    assert loss("mse", outputs) == pytest.approx((error ** 2).mean().item())
    # One pair only: the two Solver states of tree p. -log sigmoid(0.3 - 0.8)
    assert loss("rank", outputs) == pytest.approx(-math.log(1 / (1 + math.exp(0.5))))
    assert train_value.training_loss(make_model(chain, loss="rank"), outputs[2:], targets[2:], groups[2:], huber_delta=1.0).item() == 0.0
    bins = ValueModel.BINS
    flat = torch.zeros(4, bins)
    assert loss("dist", flat) == pytest.approx(math.log(bins))
    exact = torch.full((4, bins), -50.0)   # all mass on the bins that hold 1, -1, 0.5 (half on each of two: 15 is 0.5) and 0
    for row, bin_of_y in enumerate((20, 0, 15, 10)):
        exact[row, bin_of_y] = 50.0
    assert loss("dist", exact) == pytest.approx(0.0, abs=1e-6)
    assert make_model(chain, loss="dist").value(exact).tolist() == pytest.approx(targets.tolist(), abs=1e-6)


@pytest.mark.parametrize("loss", ["mse", "rank", "dist"])
def test_the_other_losses_train_save_and_load(records, chain, tmp_path, loss):
    from dataclasses import asdict
    model, losses = make_model(chain, loss=loss), []
    fit(model, make_rows(paths_of(records, chain)[:12], model), tmp_path, epochs=8, after_epoch=lambda epoch, mean: losses.append(mean))
    assert losses[-1] < losses[0]
    open_run(tmp_path / "value", {"graph": asdict(chain), "view": "full", "rendering": train_value.rendering(chain, "full"), "backbone": AGENTS,
                                  "quantize": False, "loss": loss}, overwrite=False)
    model.save(tmp_path / "value")
    train_value.verify_saved(model, tmp_path / "value", all_states(records[:1], chain), device="cpu", batch_tokens=4000)
    assert all(-1 <= v <= 1 for v in model.score(all_states(records[:1], chain), batch_tokens=4000)[0])


def test_rank_batches_hold_whole_trees(records, chain, model):
    rows = make_rows(paths_of(records, chain), model)
    batches = train_value.epoch_batches(rows, 10**9, seeded(0), by_tree=True)
    order = [rows[i].groups[0][0] for batch in batches for i in batch]
    assert sorted(i for batch in batches for i in batch) == list(range(len(rows)))
    assert len([a for a, b in zip(order, order[1:]) if a != b]) == len({*order}) - 1


def test_training_resumed_after_a_kill_equals_uninterrupted_training(records, chain, tmp_path):
    rows = make_rows(paths_of(records, chain)[:12], make_model(chain))
    straight, broken = make_model(chain), make_model(chain)
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    fit(straight, rows, tmp_path / "a", epochs=3)

    class Killed(Exception): ...

    def die(epoch, loss):
        if epoch == 1:
            raise Killed
    with pytest.raises(Killed):
        fit(broken, rows, tmp_path / "b", epochs=3, after_epoch=die)
    resumed = make_model(chain)
    epochs = []
    fit(resumed, rows, tmp_path / "b", epochs=3, after_epoch=lambda epoch, loss: epochs.append(epoch))
    assert epochs == [1, 2]
    for name, p in resumed.trained_state().items():
        assert torch.allclose(p, straight.trained_state()[name], atol=1e-6), name


TWO_PROCESSES = """if True:
    import sys; sys.path[:0] = sys.argv[1:3]
    from pathlib import Path
    from test_value import *
    torch.distributed.init_process_group("gloo")
    model = make_model(GRAPHS["chain"])
    fit(model, make_rows(paths_of(scripted_trees(GRAPHS["chain"]), GRAPHS["chain"])[:13], model), Path(sys.argv[3]), batch_tokens=300)
    if train_value.process()[0] == 0:
        torch.save(model.trained_state(), Path(sys.argv[3]) / "two.pt")
"""


def test_data_parallel_training_equals_one_process_with_the_batches_together(records, chain, tmp_path, monkeypatch):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py"), str(HERE), str(HERE.parent),
                           str(tmp_path)], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    (tmp_path / "one").mkdir()
    separate, sizes = train_value.epoch_batches, []

    def together(rows, *rest, **options):
        batches = separate(rows, *rest, **options)
        sizes.append(len(batches))
        return [sum(batches[at:at + 2], []) for at in range(0, len(batches), 2)]
    monkeypatch.setattr(train_value, "epoch_batches", together)
    one = make_model(chain)
    fit(one, make_rows(paths_of(records, chain)[:13], one), tmp_path / "one", batch_tokens=300)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert min(sizes) > 2 and any(size % 2 for size in sizes)   # an odd one at the end: one process has nothing to do in that step
    for name, p in one.trained_state().items():
        assert torch.allclose(p, two[name], atol=1e-5), name


@pytest.mark.parametrize("quantize", [False, True])
def test_saved_and_reloaded_v_is_equal_in_a_fresh_process(records, chain, tmp_path, quantize):
    from dataclasses import asdict
    model = make_model(chain, quantize=quantize)
    fit(model, make_rows(paths_of(records, chain)[:6], model), tmp_path, epochs=1)
    settings = {"graph": asdict(chain), "view": "full", "rendering": train_value.rendering(chain, "full"), "backbone": AGENTS, "quantize": quantize, "loss": "huber"}
    open_run(tmp_path / "value", settings, overwrite=False)
    model.save(tmp_path / "value")
    train_value.verify_saved(model, tmp_path / "value", all_states(records[:1], chain), device="cpu", batch_tokens=4000)
    code = ("import sys, json; sys.path.insert(0, sys.argv[1])\nfrom train_value import *\nfrom mas import GRAPHS\n"
            "chain = GRAPHS['chain']; m = ValueModel.load(Path(sys.argv[2]), chain, device='cpu')\n"
            "s = chain.step(State('a question', ()), 'some facts'); print(json.dumps(m.score([s], batch_tokens=99)[0]))")
    out = subprocess.run([sys.executable, "-c", code, str(HERE.parent), str(tmp_path / "value")], capture_output=True, text=True, check=True).stdout
    assert json.loads(out.splitlines()[-1])[0] == pytest.approx(model.score([chain.step(State("a question", ()), "some facts")], batch_tokens=99)[0][0], abs=1e-5)

    # What does not belong to this V is refused, by name.
    load = lambda mas: ValueModel.load(tmp_path / "value", mas, device="cpu")
    with pytest.raises(InputError, match="graph 'chain', now it is 'single'"):
        load(GRAPHS["single"])
    with pytest.raises(InputError, match="other agents or prompts"):
        load(replace(chain, agents=(replace(chain.agents[0], prompt="Other."), *chain.agents[1:])))
    config = json.loads((tmp_path / "value" / "config.json").read_text())
    for changed, complaint in (({"rendering": "older"}, "another rendering"), ({"backbone": "no/such/model"}, "no/such/model")):
        (tmp_path / "value" / "config.json").write_text(json.dumps(config | {"settings": config["settings"] | changed}))
        with pytest.raises(InputError, match=complaint):
            load(chain)
    (tmp_path / "value" / "config.json").write_text(json.dumps(config))
    (tmp_path / "value" / "head.safetensors").unlink()
    with pytest.raises(InputError, match="head.safetensors is missing"):
        load(chain)
    (tmp_path / "value" / "config.json").write_text(json.dumps(config | {"finished": False}))
    with pytest.raises(InputError, match="not finished"):
        load(chain)


def test_no_quantize_works_without_bitsandbytes(tmp_path):
    code = ("import sys; sys.path.insert(0, sys.argv[1]); sys.modules['bitsandbytes'] = None\n"
            "from train_value import *\nbackbone, _ = load_backbone(sys.argv[2], quantize=False, device='cpu')\n"
            "get_peft_model(backbone, LoraConfig(r=2, target_modules='all-linear')); print('fine')")
    out = subprocess.run([sys.executable, "-c", code, str(HERE.parent), AGENTS], capture_output=True, text=True)
    assert out.stdout.endswith("fine\n"), out.stderr


# Metrics


def test_auc_by_hand():
    assert auc([0.9, 0.1], [True, False]) == 1.0 and auc([0.1, 0.9], [True, False]) == 0.0 and auc([0.5, 0.5], [True, False]) == 0.5
    assert auc([0.8, 0.6, 0.4, 0.2], [True, False, True, False]) == 0.75


def edge(problem, parent, y):
    return Edge(problem, "heldout", parent, "Solver", State("q", ()), y, 1)


def test_metrics_by_hand():
    """Problem a is easy (all V high), b hard (all V low): AUC within problems is blind to that; top-1 looks at siblings."""
    edges = [edge("a", 0, 1.0), edge("a", 0, -1.0), edge("a", 0, -1.0), edge("b", 0, 1.0), edge("b", 0, -0.5), edge("b", 1, 0.5), edge("b", 1, 0.5)]
    values = [0.9, 0.8, 0.95, -0.9, -0.8, 0.1, 0.0]
    report = metrics(edges, values)["Solver"]
    assert report["auc"] == pytest.approx((0.5 + 2 / 3) / 2) and report["auc_problems"] == 2
    assert report["sibling_groups"] == 2 and report["top1"] == 0.0 and report["chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    bins = [(0.9, 1.0), (0.95, -1.0), (0.8, -1.0), (-0.9, 1.0), (-0.8, -0.5), (0.1, 0.5), (0.0, 0.5)]   # 0.8 to 1: the first three; -1 to -0.8; -0.8 to -0.6; 0 to 0.2
    by_hand = (abs(sum(v for v, _ in bins[:3]) + 1) + abs(-0.9 - 1) + abs(-0.8 + 0.5) + abs(0.1 - 1.0)) / 7
    assert report["ece"] == pytest.approx(by_hand)
    assert report["rmse"] == pytest.approx((sum((v - e.y) ** 2 for v, e in zip(values, edges)) / 7) ** 0.5)


def test_a_v_that_only_knows_the_problem_scores_chance():
    edges = [edge(p, 0, y) for p in "abcd" for y in (1.0, -1.0, 1.0)]
    assert metrics(edges, [float("abcd".index(e.problem_id)) / 4 for e in edges])["Solver"]["auc"] == 0.5
