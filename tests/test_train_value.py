"""Tests of train_value.py: labels, batches, losses by hand, the training loop, the whole script."""

import math
import os
import shutil
import signal

import pytest
import torch
from conftest import error_of, exit_code_of, output_of, read_lines, start_in_fork
from labelled import (
    HELDOUT,
    TREES,
    flags,
    load,
    make_model,
    make_tree,
    states_of,
    transcripts_of,
    write_trees,
)
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_value
from llm.packing import sequences_of
from mas import CHAIN, load_graph
from support.flags import InputError
from support.runs import differences, read_config, seeded
from tasks.problems import question_key
from train_value import edges_of, epoch_batches, learning_rate_factor, pack_trees, training_loss
from value import ValueModel, size_of


@pytest.fixture(scope="module")
def model():
    return make_model()


# ---- Labels and batches --------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["search", "outcome"])
def test_every_edge_is_labelled_once_and_read_where_its_message_ends(model, target):
    """Up to that token, a transcript is the state encoded alone."""
    num_labels = 0
    for tree in TREES:
        for node in tree["nodes"][1:]:
            num_labels += node["N"] > 0 and (target == "search" or "reward" in node)
    transcripts = train_value.make_transcripts(TREES, model, target)
    edges = {(edge.problem_id, edge.node) for edge in edges_of(transcripts)}
    assert len(edges) == len(edges_of(transcripts)) == num_labels
    for transcript in transcripts:
        for edge, position in zip(transcript.edges, transcript.positions, strict=True):
            assert transcript.ids[: position + 1] == model.encode(edge.state)[0]


@pytest.mark.parametrize("view", ["full", "local"])
def test_states_that_are_too_long_for_the_backbone_are_left_out(monkeypatch, capsys, view):
    """The others of their problem stay. If none is left, that is an error."""
    model = make_model(view=view)
    length_of = {}
    for edge in edges_of(transcripts_of(model, TREES)):
        length_of[edge.problem_id, edge.node] = len(model.encode(edge.state)[0])
    context = sorted(length_of.values())[len(length_of) // 2]
    monkeypatch.setattr(model.backbone.config, "max_position_embeddings", context)
    left = [(edge.problem_id, edge.node) for edge in edges_of(transcripts_of(model, TREES))]
    assert sorted(left) == sorted(key for key in length_of if length_of[key] <= context)
    assert f"{len(length_of) - len(left)} states are too long" in capsys.readouterr().out
    monkeypatch.setattr(model.backbone.config, "max_position_embeddings", 1)
    with pytest.raises(InputError, match="--backbone"):
        transcripts_of(model, TREES)


def test_an_epoch_is_every_transcript_once_in_batches_of_the_budget_in_an_order_of_its_own(model):
    transcripts = transcripts_of(model, TREES)
    rows = pack_trees(transcripts, model, 600)
    epochs = [epoch_batches(rows, 600, seeded(seed)) for seed in (0, 0, 1)]
    for batches in epochs:
        order = [index for batch in batches for index in sequences_of(batch)]
        assert sorted(order) == list(range(len(transcripts)))
        assert max(map(size_of, batches)) <= 600
    assert epochs[0] == epochs[1] != epochs[2]


# ---- Losses by hand ------------------------------------------------------------------------------
# Five labels: three Solver states and a Planner state of tree p, a Solver state of tree q.

TARGETS = [1.0, -1.0, 0.0, 0.5, 0.525]
GROUPS = [("p", "Solver")] * 3 + [("p", "Planner"), ("q", "Solver")]
LOGITS = [0.3, 0.8, -0.2, -0.7, 0.1]


def loss_of(loss, outputs, huber_delta=1.0):
    """Return the loss of the batch of all labels: their sum, no mean."""
    model, targets = make_model(loss=loss), torch.tensor(TARGETS)
    return training_loss(model, outputs, targets, GROUPS, huber_delta=huber_delta).item()


def huber(error, delta):
    return error**2 / 2 if abs(error) <= delta else delta * (abs(error) - delta / 2)


def test_huber_and_squared_error_by_hand():
    outputs = torch.tensor(LOGITS)[:, None]
    errors = [math.tanh(logit) - y for logit, y in zip(LOGITS, TARGETS, strict=True)]
    for delta in (1.0, 0.3):
        by_hand = sum(huber(error, delta) for error in errors)
        assert loss_of("huber", outputs, delta) == pytest.approx(by_hand)
    assert loss_of("mse", outputs) == pytest.approx(sum(error**2 for error in errors))


def test_the_ranking_loss_by_hand():
    """The mean over the labels of one agent in one tree with another y, 0 if there are none."""

    def of_pair(better, worse):
        return math.log(1 + math.exp(LOGITS[worse] - LOGITS[better]))

    first, second, third = of_pair(0, 1), of_pair(0, 2), of_pair(2, 1)
    by_hand = [(first + second) / 2, (first + third) / 2, (second + third) / 2, 0, 0]
    assert loss_of("rank", torch.tensor(LOGITS)[:, None]) == pytest.approx(sum(by_hand))


def test_the_distributional_loss_by_hand():
    """Bins lie at -1, -0.9, ..., 1; y = 0.525 is a quarter of the way from bin 15 to bin 16."""
    outputs = torch.linspace(-1, 2, 21).repeat(5, 1)
    logprobs = outputs[0].log_softmax(-1).tolist()
    by_hand = [logprobs[index] for index in (20, 0, 10, 15)]
    by_hand.append(0.75 * logprobs[15] + 0.25 * logprobs[16])
    assert loss_of("dist", outputs) == pytest.approx(-sum(by_hand))


# ---- The training loop ---------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_decays_to_zero():
    """Of 40 steps, two are warm-up: 1/3, 2/3, then the cosine from 1 at step 2 to 0 at step 40."""
    factors = [learning_rate_factor(step, 40) for step in (0, 1, 2, 11, 21, 40)]
    cosine = (1 + math.cos(math.pi * 9 / 38)) / 2
    assert factors == pytest.approx([1 / 3, 2 / 3, 1, cosine, 1 / 2, 0], abs=1e-9)
    assert learning_rate_factor(0, 1) == 1  # a single step is not lost


def fit(model, transcripts, folder, *argv):
    """Train. Returns the loss of each epoch, and of each step its settings and its gradient."""
    folder.mkdir(exist_ok=True)
    steps = []

    def look(optimizer, args, kwargs):
        [group] = optimizer.param_groups
        gradient = torch.cat([parameter.grad.flatten() for parameter in group["params"]])
        steps.append((group["lr"], (group["betas"], group["weight_decay"]), gradient))

    hook = register_optimizer_step_pre_hook(look)
    training = train_value.train(model, transcripts, folder / "checkpoint.pt", flags(*argv))
    losses = [loss for _, loss in training]
    hook.remove()
    return losses, steps


def test_steps_differ_in_their_learning_rate_and_gradients_are_clipped(tmp_path):
    model = make_model()
    model.head.weight.data *= 10
    argv = ["--epochs", 5, "--train-batch-tokens", 200, "--lr", 1e-6]
    _, steps = fit(model, transcripts_of(model, TREES[:1]), tmp_path, *argv)
    assert len(steps) >= 20
    for index, (lr, settings, gradient) in enumerate(steps):
        assert lr == pytest.approx(1e-6 * learning_rate_factor(index, len(steps)))
        assert settings == ((0.9, 0.999), 0.0)
        assert gradient.norm() < 1.001
    assert max(gradient.norm() for *_, gradient in steps) > 0.999


def test_a_label_counts_the_same_in_small_and_in_large_batches(tmp_path):
    """However an epoch is cut, its mean step is the gradient of the mean loss over all labels.

    V hardly moves here, so the loss is known.
    """
    gradients = []
    for batch_tokens in (10**6, 700, 1):
        model = make_model()
        transcripts = transcripts_of(model, TREES[:3])
        edges = edges_of(transcripts)
        predictions = model.predict(transcripts, batch_tokens=999)
        values = [value for values in predictions for value in values]
        errors = [value - edge.y for edge, value in zip(edges, values, strict=True)]
        argv = ["--epochs", 1, "--lr", 1e-12, "--huber-delta", 0.01]
        argv += ["--train-batch-tokens", batch_tokens]
        [loss], steps = fit(model, transcripts, tmp_path / str(batch_tokens), *argv)
        by_hand = sum(huber(error, 0.01) for error in errors) / len(edges)
        assert loss == pytest.approx(by_hand, rel=1e-4)
        gradients.append(torch.stack([gradient for *_, gradient in steps]).mean(0))
        assert max(gradient.norm() for *_, gradient in steps) < 0.99  # not clipped
    assert len(steps) == len(transcripts)
    for gradient in gradients[1:]:
        assert torch.allclose(gradient, gradients[0], atol=1e-4 * gradients[0].abs().max())


@pytest.mark.parametrize("quantize", [False, True])
def test_training_moves_lora_and_head_only(tmp_path, quantize):
    model = make_model(quantize=quantize)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    argv = ["--epochs", 2, "--lr", 3e-3, "--train-batch-tokens", 700]
    fit(model, transcripts_of(model, TREES), tmp_path, *argv)
    moved = {name for name, weight in model.named_parameters() if (weight != before[name]).any()}
    assert moved == {name for name in before if "lora_" in name or name.startswith("head.")}


# ---- The script ----------------------------------------------------------------------------------

SMALL = ["--no-quantize", "--lora-rank", 2, "--train-batch-tokens", 600, "--lr", 3e-3]
SMALL += ["--epochs", 3]


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    return write_trees(tmp_path_factory.mktemp("labels") / "rollouts", TREES, CHAIN)


@pytest.fixture(scope="module")
def trained(rollouts, tmp_path_factory):
    """Return the folder of a V of three epochs."""
    run = tmp_path_factory.mktemp("run")
    output_of(train_value, "--run", run, "--rollouts", rollouts, *SMALL)
    return run / "value"


def test_v_is_measured_on_held_out_problems(trained):
    model = load(trained)
    edges = edges_of(transcripts_of(model, HELDOUT))
    values = model.score([edge.state for edge in edges], batch_tokens=999)
    expected = []
    for edge, value in zip(edges, values, strict=True):
        line = {"id": edge.problem_id, "node": edge.node, "parent": edge.parent}
        line |= {"agent": edge.agent, "y": edge.y, "N": edge.visits}
        expected.append(line | {"V": pytest.approx(value, abs=1e-5)})
    assert read_lines(trained / "heldout.jsonl") == expected
    # V was chosen on the held-out problems, too: evaluate.py refuses to test on either.
    for line, tree in zip(read_lines(trained / "problems.jsonl"), TREES, strict=True):
        key = question_key(tree["question"])
        assert line == {"id": tree["id"], "split": tree["split"], "question_key": key}


def test_a_killed_run_resumes_to_the_same_weights(trained, rollouts, tmp_path):
    args = flags("--run", tmp_path, "--rollouts", rollouts, *SMALL)
    model = make_model()
    rows = pack_trees(transcripts_of(model, TREES[:4]), model, 600)
    num_steps = [len(epoch_batches(rows, 600, seeded(0, "epoch", epoch))) for epoch in range(3)]
    steps = []

    def count(*_):
        steps.append(1)
        if len(steps) == num_steps[0] + num_steps[1] + 2:
            os.kill(os.getpid(), signal.SIGKILL)

    hook = register_optimizer_step_pre_hook(count)
    assert exit_code_of(start_in_fork(lambda: train_value.main(args))) == -signal.SIGKILL
    with open(tmp_path / "value" / "metrics.jsonl", "r+") as log:
        assert len(log.readlines()) == 2
        log.write('{"epoch": 2}\n')  # as if it was killed before its third checkpoint
    train_value.main(args)
    hook.remove()
    assert len(steps) == num_steps[2]
    assert load(tmp_path / "value").fingerprint == load(trained).fingerprint
    for name in ("metrics.jsonl", "heldout.jsonl"):
        assert (tmp_path / "value" / name).read_text() == (trained / name).read_text()


@pytest.fixture
def unfinished(trained, tmp_path):
    """Return a copy of that V which is not marked as finished."""
    folder = shutil.copytree(trained, tmp_path / "value")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"finished": true', '"finished": false'))
    return folder


def test_a_damaged_checkpoint_is_one_line_that_names_it(unfinished, rollouts):
    (unfinished / "checkpoint.pt").write_bytes(b"PK")
    error = error_of(train_value, "--run", unfinished.parent, "--rollouts", rollouts, *SMALL)
    assert str(unfinished / "checkpoint.pt") in error


def test_v_is_not_trained_on_held_out_labels(trained, rollouts, tmp_path):
    other = write_trees(tmp_path / "other", [make_tree(9, "heldout"), TREES[0]], CHAIN)
    argv = ["--rollouts", rollouts, "--heldout-rollouts", other, "--run", tmp_path]
    output_of(train_value, *argv, *SMALL)
    assert {line["id"] for line in read_lines(tmp_path / "value" / "heldout.jsonl")} == {"p9"}
    assert load(tmp_path / "value").fingerprint == load(trained).fingerprint


def test_a_head_that_was_not_saved_is_noticed(unfinished):
    model = ValueModel.load(unfinished, CHAIN, flags(), must_be_finished=False)
    model.head.bias.data += 1
    with pytest.raises(AssertionError, match="is not the trained one"):
        train_value.verify_saved(model, unfinished, states_of(model, HELDOUT), flags())
    assert not read_config(unfinished)["finished"]


@pytest.mark.parametrize("argv", ["--loss rank --target outcome", "--loss dist --view local"])
def test_the_variants_train_save_and_load(rollouts, tmp_path, argv):
    output_of(train_value, "--run", tmp_path, "--rollouts", rollouts, *SMALL, *argv.split())
    folder = tmp_path / ("orm" if "outcome" in argv else "value")
    losses = [record["train_loss"] for record in read_lines(folder / "metrics.jsonl")]
    assert losses[-1] < losses[0]
    load(folder)


CHANGES = "--target outcome, --view local, --loss mse, --no-quantize, --lora-rank 7, --lr 0.5, "
CHANGES += "--epochs 9, --huber-delta 0.3, --train-batch-tokens 100, --seed 8, --dtype bfloat16"


def test_every_flag_that_changes_v_is_a_setting(model, tmp_path):
    before = train_value.value_settings(flags(), model, tmp_path)
    for change in CHANGES.split(", "):
        settings = train_value.value_settings(flags(*change.split()), model, tmp_path)
        assert differences(before, settings), change


def test_what_cannot_be_trained_on_is_refused(trained, rollouts, tmp_path):
    """Splits that share a question, however it is spaced; of other graphs; changed labels."""
    question = TREES[1]["question"].upper().replace(" ", "  ")
    for name, trees, graph, reason in (
        ("shared", [TREES[4], TREES[5] | {"question": question}], CHAIN, "the held-out problem p5"),
        ("single", HELDOUT, load_graph("single"), "another graph"),
        ("changed", HELDOUT[:1], CHAIN, "trees (there"),
    ):
        folder = write_trees(tmp_path / name, trees, graph)
        argv = ["--run", trained.parent, "--rollouts", rollouts, "--heldout-rollouts", folder]
        assert reason in error_of(train_value, *argv, *SMALL)
