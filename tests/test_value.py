"""Tests of value.py and train_value.py: labels, scoring, losses, training, saving and loading."""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    AGENTS,
    NoProgress,
    ScriptedPolicy,
    StopError,
    exit_code_of,
    start_in_fork,
    stop,
)
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertConfig, BertModel

import evaluate
import generate_rollouts
import train_agents
import train_value
import value
from generate_rollouts import label_tree
from llm.adapters import add_lora, lora_config
from llm.decoding import uniforms
from llm.loading import load_pretrained
from llm.packing import collate, num_distinct_tokens, pack, packed_batches, sequences_of
from mas import CHAIN, SINGLE, State
from support.flags import HERE, InputError
from support.progress import ignore
from support.records import append_jsonl, open_to_append, read_jsonl
from support.runs import fingerprint, open_run, seeded
from tasks.problems import Problem
from train_value import (
    epoch_batches,
    learning_rate_factor,
    make_rows,
    num_terms,
    pack_trees,
    train,
    training_loss,
    training_rows,
    verify_saved,
)
from tree import Edge, Sample, run_searches, tree_paths, tree_record
from value import Row, ValueModel, backbone_setting, load_backbone, rendering_fingerprint

# ---- Scripted trees ------------------------------------------------------------------------------

WORDS = ["the", "plan", "holds", "because", "four", "boxes", "of", "seven", "pens", "make"]
WORDS += ["twenty", "eight"]


def random_message(problem_id, path):
    """Return 2 to 9 random words. The fourth agent adds an answer: 0, 1 or 2."""
    draws = uniforms(20, problem_id, path)
    num_words = int(2 + 8 * draws[19])
    words = [WORDS[int(draw * len(WORDS))] for draw in draws[:num_words]]
    phrase = " ".join(words)
    if len(path) < 4:
        return phrase
    return f"{phrase} Final answer: {int(draws[18] * 3)}"


class RandomPolicy(ScriptedPolicy):
    """Answers Sample requests with `random_message`."""

    def __init__(self):
        super().__init__(say=None)

    def __call__(self, requests):
        replies = []
        for problem, request in requests:
            self.say = partial(random_message, problem.id)
            replies += super().__call__([(problem, request)])
        return replies


def make_problem(index, split):
    question = f"Question number {index} " * (index + 1)
    return Problem(f"p{index}", split, question, gold="1", answer_type="number")


def scripted_trees():
    """Return the records of six trees: four training problems and two held-out ones."""
    searches = []
    for index, split in enumerate(["train"] * 4 + ["heldout"] * 2):
        problem = make_problem(index, split)
        search = label_tree(
            problem,
            CHAIN,
            num_simulations=10,
            num_candidates=(2, 2, 2, 2),
            c_uct=1.0,
            rng=seeded(0, problem.id),
        )
        searches.append((problem, search))
    handlers = {Sample: RandomPolicy()}
    records = []
    for problem, root, cost in run_searches(
        searches, handlers, max_active=99, progress=NoProgress()
    ):
        records.append(tree_record(problem, root, cost))
    return records


@pytest.fixture(scope="module")
def records():
    return scripted_trees()


def paths_of(records, target="search"):
    paths = []
    for record in records:
        paths += tree_paths(record, CHAIN, target)
    return paths


def edges_of(paths):
    return [edge for path in paths for edge in path]


def states_of(records):
    return [edge.state for edge in edges_of(paths_of(records))]


def visited_leaves(records):
    leaves = []
    for record in records:
        leaves += [node for node in record["nodes"] if "reward" in node and node["N"] > 0]
    return leaves


def make_model(*, quantize=False, view="full", loss="huber", dtype="float32"):
    """Return a V whose LoRA and head are random, always the same."""
    torch.manual_seed(0)
    backbone, tokenizer = load_backbone(AGENTS, quantize=quantize, device="cpu", dtype=dtype)
    model = ValueModel(add_lora(backbone, rank=4), tokenizer, CHAIN, view, loss)
    nn.init.normal_(model.head.weight, std=0.02)
    return model


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("rank", [2, 16])
def test_an_adapter_is_scaled_by_two_at_every_rank(rank):
    """alpha / rank = 2. There is no dropout: V of a state is the same in training."""
    config = lora_config(rank)
    assert config.lora_alpha / config.r == 2
    assert config.lora_dropout == 0.0


# ---- What V reads --------------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["full", "local"])
def test_v_reads_the_text_of_its_view(view):
    """Each segment ends with the end-of-message token, and V is read at the last of them."""
    model = make_model(view=view)
    state = State("a question", ())
    for word in ("facts", "plan", "work"):
        state = CHAIN.step(state, word)
    tokenizer = model.tokenizer
    expected, expected_ends = [], []
    for segment in CHAIN.value_text(state, view):
        ids = tokenizer(segment, add_special_tokens=False)["input_ids"]
        expected += [*ids, tokenizer.eos_token_id]
        expected_ends.append(len(expected) - 1)
    assert model.encode(state) == (expected, expected_ends)
    assert len(expected_ends) == (4 if view == "full" else 2)  # the Solver sees the plan alone


def test_a_state_that_fills_the_context_is_read_and_a_longer_one_is_refused(model, monkeypatch):
    state = CHAIN.step(State("a question", ()), "facts")
    ids, _ = model.encode(state)
    config = model.backbone.config.get_text_config()
    monkeypatch.setattr(config, "max_position_embeddings", len(ids))
    assert model.encode(state)[0] == ids
    monkeypatch.setattr(config, "max_position_embeddings", len(ids) - 1)
    with pytest.raises(InputError, match=f"a transcript of {len(ids)} tokens does not fit"):
        model.encode(state)


# ---- Labels --------------------------------------------------------------------------------------


def test_every_visited_edge_is_labelled_exactly_once_with_its_q(records):
    for record in records:
        edges = edges_of(tree_paths(record, CHAIN, "search"))
        visited = [node for node in record["nodes"][1:] if node["N"] > 0]
        assert len(edges) == len(visited)
        assert len({edge.state for edge in edges}) == len(edges)

        labels = []
        for edge in edges:
            labels.append((edge.agent, edge.state.messages[-1].text, edge.y, edge.visits))
        expected = []
        for node in visited:
            expected.append((node["agent"], node["message"], node["W"] / node["N"], node["N"]))
        assert sorted(labels) == sorted(expected)
        assert all(-1 <= edge.y <= 1 for edge in edges)


def test_outcome_labels_are_terminal_states_and_rewards(records):
    edges = edges_of(paths_of(records, "outcome"))
    assert len(edges) > 0
    assert all(CHAIN.is_terminal(edge.state) for edge in edges)
    assert all(edge.y in (1.0, -1.0) for edge in edges)
    assert len(edges) == len(visited_leaves(records))


@pytest.mark.parametrize("view", ["full", "local"])
def test_rows_read_v_at_the_token_that_ends_the_labelled_message(records, model, view):
    """V at a position sees exactly its state: the row up to there is the state encoded alone."""
    model = ValueModel(model.backbone, model.tokenizer, CHAIN, view, "huber")
    paths = paths_of(records)
    edges = iter(edges_of(paths))
    for row in make_rows(paths, model):
        for position, target in zip(row.positions, row.targets, strict=True):
            edge = next(edges)
            ids, ends = model.encode(edge.state)
            assert row.ids[: position + 1] == ids
            assert ends[-1] == position
            assert target == edge.y
            assert row.ids[position] == model.tokenizer.eos_token_id
    assert next(edges, None) is None  # every edge is in a row


def test_a_path_without_labels_has_no_row_and_hides_no_other(records, model):
    """Such paths occur among outcome labels, where only terminal states have one."""
    first, second, *_ = paths_of(records)
    assert make_rows([first, [], second], model) == make_rows([first, second], model)


def test_paths_share_their_prefix_instead_of_repeating_it(records, model):
    """One forward over a path serves all states on it: far fewer tokens than a row per state."""
    paths = paths_of(records)
    rows = make_rows(paths, model)
    tokens_of_rows = sum(len(row.ids) for row in rows)
    tokens_of_states = 0
    for state in states_of(records):
        ids, _ = model.encode(state)
        tokens_of_states += len(ids)
    assert tokens_of_rows < 0.7 * tokens_of_states
    assert len(rows) == len(visited_leaves(records))


def test_no_problem_is_on_both_sides(records):
    problems = {"train": set(), "heldout": set()}
    for edge in edges_of(paths_of(records)):
        problems[edge.split].add(edge.problem_id)
    assert problems["train"]
    assert problems["heldout"]
    assert not problems["train"] & problems["heldout"]


def write_labels(folder, records, graph=CHAIN):
    settings = {"graph": asdict(graph), "name": folder.name}
    open_run(folder, settings, device="cpu", overwrite=False)
    with open_to_append(folder / "trees.jsonl") as file:
        for record in records:
            append_jsonl(file, record)


def load(*argv):
    return train_value.load_labels(train_value.parse_args(list(argv)))


def by_id(records):
    """Return the records as p0 to p5: the first four are training problems."""
    return sorted(records, key=lambda record: record["id"])


def ids_of(records):
    return [record["id"] for record in records]


def test_labels_of_each_split_come_from_its_folder(records, tmp_path):
    records = by_id(records)
    write_labels(tmp_path / "rollouts", records[:2] + records[4:5])
    write_labels(tmp_path / "others", records[3:])

    labels = load("--run", str(tmp_path))
    assert labels.mas == CHAIN
    assert ids_of(labels.records["train"]) == ["p0", "p1"]
    assert ids_of(labels.records["heldout"]) == ["p4"]
    assert labels.paths["train"] == paths_of(records[:2])
    assert labels.paths["heldout"] == paths_of(records[4:5])
    assert labels.settings["heldout"] == labels.settings["train"]

    labels = load("--run", str(tmp_path), "--heldout-rollouts", str(tmp_path / "others"))
    assert ids_of(labels.records["train"]) == ["p0", "p1"]
    assert ids_of(labels.records["heldout"]) == ["p4", "p5"]
    assert labels.settings["train"]["name"] == "rollouts"
    assert labels.settings["heldout"]["name"] == "others"

    outcomes = load("--run", "x", "--rollouts", str(tmp_path / "others"), "--target", "outcome")
    assert ids_of(outcomes.records["train"]) == ["p3"]
    assert outcomes.paths["heldout"] == paths_of(records[4:], "outcome")


def test_labels_that_cannot_be_used_are_refused(records, tmp_path):
    records = by_id(records)
    write_labels(tmp_path / "train", records[:2])
    write_labels(tmp_path / "heldout", records[4:])
    write_labels(tmp_path / "single", [], SINGLE)
    shared = [record | {"split": "heldout"} for record in records[1:3]]
    write_labels(tmp_path / "shared", records[4:] + shared)

    def complaint_about(train, heldout):
        with pytest.raises(InputError) as error:
            load("--rollouts", str(tmp_path / train), "--heldout-rollouts", str(tmp_path / heldout))
        return str(error.value).replace(str(tmp_path) + "/", "")

    assert complaint_about("train", "single") == "single was labelled with another graph than train"
    assert complaint_about("train", "train") == (
        "train/trees.jsonl: no heldout problems; generate_rollouts.py --num-heldout N labels some"
    )
    assert complaint_about("heldout", "heldout") == (
        "heldout/trees.jsonl: no train problems; generate_rollouts.py --num-train N labels some"
    )
    assert complaint_about("train", "shared") == (
        "shared: 1 held-out problems have questions that V would be trained on, "
        "for example p1; label other ones"
    )


def test_shared_questions_are_counted_and_one_is_named():
    """A question is the same however it is spaced, and whatever the id of its problem is."""
    trained_on = [{"id": "a", "question": "How many?"}, {"id": "b", "question": "How much?"}]
    heldout = [
        {"id": "c", "question": "How long?"},
        {"id": "d", "question": "how  MANY?"},
        {"id": "e", "question": "How much?"},
    ]
    train_value._refuse_shared_questions({"train": trained_on, "heldout": heldout[:1]}, Path("f"))
    with pytest.raises(InputError) as error:
        train_value._refuse_shared_questions({"train": trained_on, "heldout": heldout}, Path("f"))
    assert str(error.value) == (
        "f: 2 held-out problems have questions that V would be trained on, "
        "for example d; label other ones"
    )


def test_the_list_of_problems_has_their_keys(tmp_path):
    train = [{"id": "a", "split": "train", "question": "How much is 0+1?", "gold": "1"}]
    heldout = [{"id": "b", "split": "heldout", "question": "how much  is 1+1?"}]
    labels = SimpleNamespace(records={"train": train, "heldout": heldout})
    with open(tmp_path / "problems.jsonl", "wb") as file:
        train_value.save_problems(file, labels.records["train"] + labels.records["heldout"])
    assert read_jsonl(tmp_path / "problems.jsonl") == [
        {"id": "a", "split": "train", "question_key": "6d0b55cc1a669634"},
        {"id": "b", "split": "heldout", "question_key": "4016dfc61ac56ef9"},
    ]


# ---- Scoring -------------------------------------------------------------------------------------


def score(model, states, batch_tokens=99):
    return model.score(states, batch_tokens=batch_tokens)


def test_token_ids_of_a_state_are_a_prefix_of_its_childrens(model):
    state = State("How many? ", ())
    encoded = []
    for text in ("ends in newlines\n\n", " starts with a space", "", "Ünïcödé ☃"):
        state = CHAIN.step(state, text)
        ids, _ = model.encode(state)
        encoded.append(ids)
    for parent, child in pairwise(encoded):
        assert child[: len(parent)] == parent


def test_padded_equals_unpadded_and_one_forward_per_path_equals_one_per_state(records, model):
    states = states_of(records[:3])
    alone = [score(model, [state], batch_tokens=1)[0] for state in states]
    assert score(model, states, batch_tokens=100_000) == pytest.approx(alone, abs=1e-5)

    rows = make_rows(paths_of(records[:3]), model)
    values_of_rows = model.predict(rows, batch_tokens=2000)
    by_path = [value for values in values_of_rows for value in values]
    assert by_path == pytest.approx(alone, abs=1e-5)

    # The values are no constant that would hide a difference.
    assert len({round(value, 4) for value in alone}) > len(alone) // 2
    assert all(-1 < value < 1 for value in alone)


def test_v_is_tanh_of_the_head_at_the_last_token(model):
    state = CHAIN.step(State("q", ()), "facts")
    ids, ends = model.encode(state)
    assert ends[-1] == len(ids) - 1
    output = model.backbone(input_ids=torch.tensor([ids]), use_cache=False)
    hidden = output.last_hidden_state[0, ends[-1]]
    by_hand = torch.tanh(hidden @ model.head.weight[0] + model.head.bias[0]).item()
    assert score(model, [state]) == [pytest.approx(by_hand, abs=1e-6)]


def pack_one(ids):
    return pack([ids], token_cost=None, max_width=len(ids))


def test_a_later_message_does_not_change_an_earlier_value(model):
    state = CHAIN.step(State("q", ()), "facts")
    child = CHAIN.step(state, "a plan that is quite long and says a lot")
    ids, ends = model.encode(child)
    with torch.inference_mode():
        values = model(pack_one(ids), [(0, ends[1]), (0, ends[2])])
    value_of_state, value_of_child = values.tolist()
    assert score(model, [state]) == [pytest.approx(value_of_state, abs=1e-6)]
    assert value_of_state != value_of_child


def test_out_of_memory_splits_the_batch(records, model, monkeypatch, capsys):
    states = states_of(records[:2])
    expected = score(model, states, batch_tokens=100_000)
    original_outputs = ValueModel.outputs

    def scarce_outputs(self, rows, positions):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("no room")
        return original_outputs(self, rows, positions)

    monkeypatch.setattr(ValueModel, "outputs", scarce_outputs)
    assert score(model, states, batch_tokens=100_000) == pytest.approx(expected, abs=1e-5)
    assert "out of memory" in capsys.readouterr().err


def test_memory_that_others_keep_is_freed_before_a_batch_is_split(
    records, model, monkeypatch, capsys
):
    states = states_of(records[:2])
    expected = score(model, states, batch_tokens=100_000)
    kept_by_others = [True]
    original_outputs = ValueModel.outputs

    def scarce_outputs(self, rows, positions):
        if kept_by_others:
            raise torch.OutOfMemoryError("no room")
        return original_outputs(self, rows, positions)

    def free_memory():
        was_kept = bool(kept_by_others)
        kept_by_others.clear()
        return was_kept

    monkeypatch.setattr(ValueModel, "outputs", scarce_outputs)
    monkeypatch.setattr(model, "free_memory", free_memory)
    assert score(model, states, batch_tokens=100_000) == expected
    assert capsys.readouterr().err == ""


def test_a_batch_is_split_in_its_middle_and_a_single_sequence_is_an_error(model, capsys):
    """Also if the batch is a single packed row."""
    sequences = [[5, 5, 5, *range(10, 20 + number)] for number in range(4)] + [[7] * 77]

    def split(*indices):
        batch = pack(sequences, token_cost=model.token_cost, max_width=999, indices=indices)
        return [sequences_of(half) for half in model._split(batch, sequences)]

    assert split(0, 3) == [[0], [3]]
    message = "out of memory: 2 transcripts are scored in two batches\n"
    assert capsys.readouterr().err == message
    assert split(4, 1, 2, 3, 0) == [[0, 1], [2, 3, 4]]
    assert split(0, 1, 2, 3) == [[0, 1], [2, 3]]
    [row] = pack(sequences[:4], token_cost=model.token_cost, max_width=999)
    assert [len(half) for half in model._split([row], sequences)] == [1, 1]  # still packed

    with pytest.raises(InputError) as error:
        split(4)
    message = "out of memory with one transcript of 77 tokens; take a smaller --backbone"
    assert str(error.value) == message


def test_v_is_read_without_dropout(records):
    """Held-out values are read in the middle of a training."""
    model = make_model()
    model.train()
    score(model, states_of(records)[:2])
    assert not model.training and not model.backbone.training


def test_what_states_share_is_read_once(model, monkeypatch):
    """Two states, one of them twice, that share a question and a message."""
    state = CHAIN.step(State("q", ()), "facts")
    first, second = CHAIN.step(state, "a plan"), CHAIN.step(state, "another")
    expected = score(model, [first]) + score(model, [second])
    num_shared = len(model.encode(state)[0])
    num_tokens = num_shared
    for child in (first, second):
        num_tokens += len(model.encode(child)[0]) - num_shared

    widths = []

    def collate_and_count(rows, *args):
        widths.extend(row.width for row in rows)
        return collate(rows, *args)

    monkeypatch.setattr(value, "collate", collate_and_count)
    values = score(model, [first, second, first], batch_tokens=999)
    assert values == pytest.approx([*expected, expected[0]], abs=1e-5)
    assert widths[0] < num_tokens + 3  # "a plan" and "another" may begin alike
    assert widths == [model.num_tokens([first, second, first])]


def test_batches_of_a_cpu_fit_into_its_caches(records, model, monkeypatch):
    limits = []

    def batches_and_limit(sequences, batch_tokens, **options):
        limits.append(batch_tokens)
        return packed_batches(sequences, batch_tokens, **options)

    monkeypatch.setattr(value, "packed_batches", batches_and_limit)
    states = states_of(records[:1])
    for batch_tokens in (300, 100_000):
        score(model, states, batch_tokens=batch_tokens)
    assert limits == [300, ValueModel.CPU_BATCH_TOKENS]


def test_a_transcript_that_does_not_fit_raises_instead_of_losing_its_end(model):
    state = CHAIN.step(State("q", ()), "word " * 1100)
    with pytest.raises(InputError, match="does not fit"):
        score(model, [state])


# ---- Number types and memory ---------------------------------------------------------------------


@pytest.mark.parametrize("quantize", [False, True])
def test_bfloat16_stays_bfloat16_up_to_the_head(quantize):
    """Embeddings, norms and hidden states too: float32 ones would take twice the memory."""
    model = make_model(quantize=quantize, dtype="bfloat16")
    embeddings = model.backbone.get_input_embeddings()
    assert embeddings.weight.dtype == torch.bfloat16
    types = set()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            types.add(parameter.dtype)
        assert parameter.requires_grad == (parameter.dtype == torch.float32), name
    assert types == {torch.bfloat16}
    compute_types = set()
    for module in model.modules():
        if hasattr(module, "compute_dtype"):  # NF4
            compute_types.add(module.compute_dtype)
    assert compute_types == ({torch.bfloat16} if quantize else set())

    ids, ends = model.encode(CHAIN.step(State("q", ()), "facts"))
    output = model.backbone(input_ids=torch.tensor([ids]), output_hidden_states=True)
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}
    value = model(pack_one(ids), [(0, ends[-1])])
    assert value.dtype == torch.float32
    exact = make_model(quantize=quantize)(pack_one(ids), [(0, ends[-1])])
    assert value.item() == pytest.approx(exact.item(), abs=0.02)

    value.sum().backward()
    for name, parameter in model.trained_parameters().items():
        assert parameter.dtype == torch.float32, name
        assert parameter.grad is not None, name


def gradients_of(model, row):
    """Return the gradients of one step, and how often its first layer was computed."""
    num_forwards = 0

    def count(*args):
        nonlocal num_forwards
        num_forwards += 1

    first_layer = model.backbone.get_base_model().layers[0]
    hook = first_layer.mlp.register_forward_pre_hook(count)
    model.train()
    outputs = model.outputs(pack_one(row.ids), [(0, position) for position in row.positions])
    outputs.square().sum().backward()
    hook.remove()
    gradients = {}
    for name, parameter in model.trained_parameters().items():
        gradients[name] = parameter.grad
    return gradients, num_forwards


@pytest.mark.parametrize("quantize", [False, True])
def test_checkpointed_activations_are_computed_twice_and_change_no_gradient(records, quantize):
    plain, checkpointed = make_model(quantize=quantize), make_model(quantize=quantize)
    checkpointed.backbone.get_base_model().activation_checkpointing_enable()
    for model in (plain, checkpointed):
        for parameter in model.trained_parameters().values():
            nn.init.constant_(parameter, 0.01)
    [row] = make_rows(paths_of(records)[:1], plain)
    expected, num_forwards = gradients_of(plain, row)
    gradients, num_forwards_checkpointed = gradients_of(checkpointed, row)
    assert (num_forwards, num_forwards_checkpointed) == (1, 2)
    assert_close_parameters(gradients, expected, atol=1e-6)
    for name, gradient in gradients.items():
        assert gradient.abs().sum() > 0, name


@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_activations_are_checkpointed_on_a_gpu_only(monkeypatch, quantize, device):
    """The model itself is on the CPU here."""

    def load_on_cpu(*args, **options):
        return load_pretrained(*args, **(options | {"device": "cpu"}))

    monkeypatch.setattr(value, "load_pretrained", load_on_cpu)
    backbone, _ = load_backbone(AGENTS, quantize=quantize, device=device, dtype="float32")
    assert backbone.is_gradient_checkpointing == (device == "cuda:1")
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_v_is_read_without_a_graph_of_gradients(records, monkeypatch):
    """Which would keep all activations of all batches."""
    model = make_model()
    modes = []
    original = ValueModel.outputs

    def look(self, *args):
        modes.append(torch.is_grad_enabled())
        return original(self, *args)

    monkeypatch.setattr(ValueModel, "outputs", look)
    model.score(states_of(records)[:2], batch_tokens=999)
    assert modes and not any(modes)


def test_a_saved_v_is_loaded_as_it_was_trained_on_the_device_and_in_the_type_asked_for(
    tmp_path, monkeypatch
):
    save_with_settings(make_model(), tmp_path / "value", quantize=False, loss="huber")
    asked = []

    def look(name, **options):
        asked.append(options)
        raise StopError

    monkeypatch.setattr(value, "load_backbone", look)
    with pytest.raises(StopError):
        ValueModel.load(
            tmp_path / "value", CHAIN, device="cuda:1", dtype="bfloat16", must_be_finished=False
        )
    assert asked == [{"quantize": False, "device": "cuda:1", "dtype": "bfloat16"}]


def test_the_widest_batch_is_scored_first(records, monkeypatch):
    """So that memory runs out at once, or never."""
    model = make_model()
    sizes = []
    original = ValueModel.outputs

    def look(self, batch, places):
        sizes.append(max(row.width for row in batch))
        return original(self, batch, places)

    monkeypatch.setattr(ValueModel, "outputs", look)
    model.score(states_of(records[:3]), batch_tokens=150)
    assert len(set(sizes)) > 2
    assert sizes == sorted(sizes, reverse=True)


# ---- Losses by hand ------------------------------------------------------------------------------
# Four labels in two trees, and the outputs of the head for them.

TARGETS = torch.tensor([1.0, -1.0, 0.5, 0.0])
GROUPS = [("p", "Solver"), ("p", "Solver"), ("p", "Planner"), ("q", "Solver")]
OUTPUTS = torch.tensor([[0.3], [0.8], [-0.2], [0.1]])


def loss_of(model, outputs, targets=TARGETS, groups=GROUPS, *, weights=None, huber_delta=1.0):
    if weights is None:
        weights = torch.ones(len(targets))
    loss = training_loss(model, outputs, targets, weights, groups, huber_delta=huber_delta)
    return loss.item()


def huber(error, delta=1.0):
    """Return the Huber loss of each absolute error."""
    return torch.where(error <= delta, error**2 / 2, delta * (error - delta / 2))


def test_huber_and_squared_error_by_hand():
    """The loss of a batch is a sum over its labels. One of the four errors is above delta."""
    error = (torch.tanh(OUTPUTS)[:, 0] - TARGETS).abs()
    model = make_model(loss="huber")
    assert loss_of(model, OUTPUTS) == pytest.approx(huber(error).sum().item())
    by_hand = huber(error, delta=0.3).sum().item()
    assert loss_of(model, OUTPUTS, huber_delta=0.3) == pytest.approx(by_hand)
    assert loss_of(make_model(loss="mse"), OUTPUTS) == pytest.approx((error**2).sum().item())


@pytest.mark.parametrize("loss", ["huber", "mse", "dist"])
def test_the_loss_of_a_label_is_multiplied_by_its_weight(loss):
    model = make_model(loss=loss)
    outputs = OUTPUTS.repeat(1, ValueModel.NUM_BINS) if loss == "dist" else OUTPUTS
    loss_of_label = []
    for index in range(4):
        label = slice(index, index + 1)
        loss_of_label.append(loss_of(model, outputs[label], TARGETS[label], GROUPS[label]))
    weights = torch.tensor([2.0, 0.5, 0.0, 1.0])
    by_hand = 2 * loss_of_label[0] + loss_of_label[1] / 2 + loss_of_label[3]
    assert loss_of(model, outputs, weights=weights) == pytest.approx(by_hand)


def test_the_ranking_loss_by_hand():
    """Only one pair is comparable, the Solver states of tree p: -log sigmoid(0.3 - 0.8)."""
    model = make_model(loss="rank")
    by_hand = -math.log(1 / (1 + math.exp(0.5)))
    assert loss_of(model, OUTPUTS) == pytest.approx(by_hand)
    assert loss_of(model, OUTPUTS[2:], TARGETS[2:], GROUPS[2:]) == 0.0  # no pair at all


def test_the_ranking_loss_sums_over_all_pairs_of_a_group():
    """Targets 1, -1 and 0 are three pairs; equal targets are none."""
    targets = torch.tensor([1.0, -1.0, 0.0, 0.0])
    by_hand = 0.0
    for better, worse in [(0.3, 0.8), (0.3, -0.2), (0.3, 0.1), (-0.2, 0.8), (0.1, 0.8)]:
        by_hand += math.log(1 + math.exp(worse - better))
    groups = [("p", "Solver")] * 4
    assert loss_of(make_model(loss="rank"), OUTPUTS, targets, groups) == pytest.approx(by_hand)


def test_the_distributional_loss_by_hand():
    """21 bins lie at -1, -0.9, ..., 1, so that 1, -1, 0.5 and 0 are bins 20, 0, 15 and 10."""
    model = make_model(loss="dist")
    num_bins = ValueModel.NUM_BINS
    uniform = torch.zeros(4, num_bins)
    assert loss_of(model, uniform) == pytest.approx(4 * math.log(num_bins))

    exact = torch.full((4, num_bins), -50.0)
    for row, bin_of_target in enumerate((20, 0, 15, 10)):
        exact[row, bin_of_target] = 50.0
    assert loss_of(model, exact) == pytest.approx(0.0, abs=1e-6)
    assert model.value(exact).tolist() == pytest.approx(TARGETS.tolist(), abs=1e-6)


@pytest.mark.parametrize("loss, num_outputs", [("huber", 1), ("rank", 1), ("dist", 21)])
def test_only_a_distribution_has_more_outputs_than_v(model, loss, num_outputs):
    model = ValueModel(model.backbone, model.tokenizer, CHAIN, "full", loss)
    assert model.outputs(pack_one([5, 6, 7]), [(0, 1), (0, 2)]).shape == (2, num_outputs)


def test_the_head_and_its_bins_are_on_the_device_of_the_backbone():
    on_cpu = make_model(loss="dist")
    model = ValueModel(on_cpu.backbone.to("meta"), on_cpu.tokenizer, CHAIN, "full", "dist")
    assert model.head.weight.device.type == "meta"
    assert model.bins().device.type == "meta"


def test_the_distributional_loss_splits_a_target_between_its_two_nearest_bins():
    """y = 0.525 is a quarter of the way from bin 15 (0.5) to bin 16 (0.6)."""
    target, group = torch.tensor([0.525]), GROUPS[:1]
    outputs = torch.linspace(-1, 1, ValueModel.NUM_BINS)[None]
    logprobs = outputs.log_softmax(-1)[0]
    by_hand = -(0.75 * logprobs[15] + 0.25 * logprobs[16]).item()
    assert loss_of(make_model(loss="dist"), outputs, target, group) == pytest.approx(by_hand)


# ---- Training ------------------------------------------------------------------------------------


def fit(model, rows, folder, *, epochs=2, batch_tokens=1500, lr=3e-3, seed=0, after_epoch=None):
    """Train a model with the checkpoint in `folder`. Returns the training loss of each epoch."""
    losses = []

    def remember(epoch, loss):
        losses.append(loss)
        if after_epoch is not None:
            after_epoch(epoch, loss)

    train(
        model,
        rows,
        pack_trees(rows, batch_tokens, token_cost=model.token_cost),
        epochs=epochs,
        lr=lr,
        batch_tokens=batch_tokens,
        huber_delta=1.0,
        seed=seed,
        checkpoint=folder / "checkpoint.pt",
        after_epoch=remember,
    )
    return losses


@pytest.mark.parametrize("quantize", [False, True])
def test_lora_and_head_move_and_the_base_does_not(records, tmp_path, quantize):
    model = make_model(quantize=quantize)
    before = {}
    for name, parameter in model.named_parameters():
        before[name] = parameter.detach().clone()
    rows = make_rows(paths_of(records)[:24], model)
    losses = fit(model, rows, tmp_path)

    moved, expected = set(), set()
    for name, parameter in model.named_parameters():
        if not torch.equal(parameter, before[name]):
            moved.add(name)
        if "lora_" in name or name.startswith("head."):
            expected.add(name)
    assert moved == expected
    assert set(model.trained_parameters()) == expected
    assert losses[1] < losses[0]


@pytest.mark.parametrize("num_labels", [1, 4])
def test_the_loss_is_huber_in_tanh_space(records, tmp_path, num_labels):
    model = make_model()
    whole_path = next(path for path in paths_of(records) if len(path) == 4)
    [row] = make_rows([whole_path[:num_labels]], model)
    [values] = model.predict([row], batch_tokens=999)
    error = (torch.tensor(values) - torch.tensor(row.targets)).abs()
    losses = fit(model, [row], tmp_path, epochs=1)
    assert losses == [pytest.approx(huber(error).mean().item(), abs=1e-5)]


def test_the_training_loss_of_an_epoch_is_the_mean_over_its_labels(records, tmp_path):
    """A step per row, with a learning rate so small that the model stays what it is."""
    model = make_model()
    rows = make_rows(paths_of(records)[:6], model)
    assert len({len(row.targets) for row in rows}) > 1
    errors = []
    for row, values in zip(rows, model.predict(rows, batch_tokens=999), strict=True):
        errors += [value - target for value, target in zip(values, row.targets, strict=True)]
    losses = fit(model, rows, tmp_path, epochs=1, batch_tokens=1, lr=1e-12)
    assert losses == [pytest.approx(huber(torch.tensor(errors).abs()).mean().item(), abs=1e-5)]


def test_the_learning_rate_warms_up_and_decays_to_zero():
    """Of 40 steps, two are warm-up: 1/3, 2/3, then the cosine from 1 at step 2 to 0 at step 40."""
    factors = [learning_rate_factor(step, 40) for step in range(41)]
    assert factors[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert factors[21] == pytest.approx(1 / 2)
    assert factors[2 + 38 // 4] == pytest.approx((1 + math.cos(math.pi * 9 / 38)) / 2)
    assert factors[40] == pytest.approx(0, abs=1e-12)
    assert learning_rate_factor(0, 1) == 1  # a single step is not lost


def test_only_the_learning_rate_changes_from_step_to_step(records, tmp_path):
    """In particular, the betas of Adam do not."""
    steps = []

    def remember_step(optimizer, args, kwargs):
        [group] = optimizer.param_groups
        steps.append({name: value for name, value in group.items() if name != "params"})

    hook = register_optimizer_step_pre_hook(remember_step)
    model = make_model()
    rows = make_rows(paths_of(records), model)[:20]
    fit(model, rows, tmp_path, batch_tokens=1, epochs=2)  # a step per row
    hook.remove()

    assert len(steps) == 40
    for index, step in enumerate(steps):
        assert step["lr"] == pytest.approx(3e-3 * learning_rate_factor(index, len(steps)))
        assert step["betas"] == (0.9, 0.999)
        assert step["weight_decay"] == 0


def mean_gradient(model, rows, folder, monkeypatch, *, batch_tokens):
    """Return the mean gradient of the steps of one epoch, before clipping, and their number.

    The learning rate is so small that the model stays what it is.
    """
    gradients = []

    def remember_gradients(parameters, max_norm):
        assert max_norm == 1
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))

    monkeypatch.setattr(nn.utils, "clip_grad_norm_", remember_gradients)
    folder.mkdir()
    fit(model, rows, folder, epochs=1, batch_tokens=batch_tokens, lr=1e-12)
    return torch.stack(gradients).mean(0), len(gradients)


@pytest.mark.parametrize("loss", ["huber", "rank"])
def test_a_label_counts_the_same_in_a_small_and_in_a_large_batch(
    records, tmp_path, monkeypatch, loss
):
    """However an epoch is cut into batches, its mean step is the gradient of the mean loss.

    The trees have different sizes, and `rank` batches of one tree lose none of its pairs.
    """
    rows = make_rows(paths_of(records[:3]), make_model())
    trees = [rows_of_tree(rows, record["id"]) for record in records[:3]]
    largest_tree = max(len(tree) * max(len(row.ids) for row in tree) for tree in trees)
    together, num_steps = mean_gradient(
        make_model(loss=loss), rows, tmp_path / "one", monkeypatch, batch_tokens=10**9
    )
    assert num_steps == 1
    apart, num_steps = mean_gradient(
        make_model(loss=loss), rows, tmp_path / "more", monkeypatch, batch_tokens=largest_tree
    )
    assert num_steps > 1
    assert torch.allclose(apart, together, rtol=1e-3, atol=1e-5 * together.abs().max())


def rows_of_tree(rows, problem_id):
    return [row for row in rows if row.groups[0][0] == problem_id]


def test_weights_by_visits_are_proportional_to_n_and_have_mean_1(records):
    model = make_model()
    paths = paths_of(records)
    edges = edges_of(paths)
    rows = training_rows(paths, model, "visits")
    weights = [weight for row in rows for weight in row.weights]
    mean_visits = sum(edge.visits for edge in edges) / len(edges)
    assert weights == pytest.approx([edge.visits / mean_visits for edge in edges])
    assert sum(weights) / len(weights) == pytest.approx(1)
    assert len(set(weights)) > 3

    for row in training_rows(paths, model, "equal"):
        assert row.weights == [1.0] * len(row.targets)


def test_weights_of_labels_reach_the_gradient(records, tmp_path, monkeypatch):
    """Rows of weight 0 might as well not be there, except that a step is a mean over all labels."""
    rows = make_rows(paths_of(records[:2]), make_model())
    rows = [
        replace(row, weights=[float(index % 2)] * len(row.weights))
        for index, row in enumerate(rows)
    ]
    weighted_rows = [row for row in rows if row.weights[0] == 1]
    options = {"batch_tokens": 10**9}
    all_rows, _ = mean_gradient(make_model(), rows, tmp_path / "all", monkeypatch, **options)
    few_rows, _ = mean_gradient(
        make_model(), weighted_rows, tmp_path / "few", monkeypatch, **options
    )
    share = num_terms(weighted_rows, "huber") / num_terms(rows, "huber")
    assert torch.allclose(all_rows, share * few_rows, rtol=1e-3, atol=1e-6)


def test_what_the_ranking_loss_cannot_use_is_refused(records, tmp_path):
    model = make_model(loss="rank")
    paths = paths_of(records[:1])
    with pytest.raises(InputError, match="--label-weights visits: --loss rank compares pairs"):
        training_rows(paths, model, "visits")
    equal_labels = []
    for row in make_rows(paths, model):
        equal_labels.append(replace(row, targets=[1.0] * len(row.targets)))
    with pytest.raises(InputError, match="no two states of one agent in one tree"):
        fit(model, equal_labels, tmp_path)


def test_v_is_trained_on_the_training_problems_and_measured_on_the_others(
    records, tmp_path, monkeypatch
):
    """The whole script, with a training loop that only looks at what it is given."""
    folder = tmp_path / "rollouts"
    open_run(folder, {"graph": asdict(CHAIN)}, device="cpu", overwrite=False)
    with open_to_append(folder / "trees.jsonl") as file:
        for record in records:
            append_jsonl(file, record)
    problems_trained_on = set()

    def look_at_the_rows(model, rows, trees, *, after_epoch, **options):
        for row in rows:
            problems_trained_on.update(problem_id for problem_id, _ in row.groups)
        after_epoch(0, 0.0)

    class SavedNothing(Exception): ...

    def stop(*args):
        raise SavedNothing

    monkeypatch.setattr(train_value, "train", look_at_the_rows)
    monkeypatch.setattr(ValueModel, "save", stop)
    argv = ["--run", str(tmp_path), "--no-quantize", "--device", "cpu", "--num-threads", "1"]
    with pytest.raises(SavedNothing):
        train_value.main(train_value.parse_args(argv))

    assert problems_trained_on == {"p0", "p1", "p2", "p3"}
    [epoch] = read_jsonl(tmp_path / "value" / "metrics.jsonl")
    num_measured = sum(row["n"] for row in epoch["heldout"].values())
    heldout = [record for record in records if record["split"] == "heldout"]
    assert num_measured == len(edges_of(paths_of(heldout)))


def save_with_settings(model, folder, *, quantize, loss, backbone=AGENTS):
    """Save a model with the settings that loading it needs."""
    settings = {
        "graph": asdict(CHAIN),
        "view": model.view,
        "rendering": rendering_fingerprint(CHAIN, model.view),
        "backbone": backbone_setting(backbone, model.backbone, folder),
        "quantize": quantize,
        "loss": loss,
    }
    open_run(folder, settings, device="cpu", overwrite=False)
    model.save(folder)


@pytest.mark.parametrize("loss, view", [("mse", "full"), ("rank", "local"), ("dist", "full")])
def test_the_other_losses_train_save_and_load(records, tmp_path, loss, view):
    model = make_model(loss=loss, view=view)
    rows = make_rows(paths_of(records)[:12], model)
    losses = fit(model, rows, tmp_path, epochs=8)
    assert losses[-1] < losses[0]

    folder = tmp_path / "value"
    save_with_settings(model, folder, quantize=False, loss=loss)
    states = states_of(records[:1])
    verify_saved(model, folder, states, device="cpu", dtype="float32", batch_tokens=4000)
    assert all(-1 <= value <= 1 for value in score(model, states, batch_tokens=4000))


def test_an_epoch_is_every_row_once_within_the_budget_and_in_an_order_of_its_own(records, model):
    rows = make_rows(paths_of(records), model)
    budget = 3 * max(len(row.ids) for row in rows)
    trees = pack_trees(rows, budget, token_cost=model.token_cost)
    epochs = []
    for seed in (0, 0, 1):
        batches = epoch_batches(trees, budget, seeded(seed), whole_trees=False)
        order = [index for batch in batches for index in sequences_of(batch)]
        assert sorted(order) == list(range(len(rows)))
        assert max(map(padded_size, batches)) <= budget
        epochs.append(batches)
    assert epochs[0] == epochs[1]
    assert epochs[0] != epochs[2]

    # Rows of similar widths are together, so that little is padding, but wide batches do not
    # always come last.
    batches = epochs[0]
    num_tokens = sum(row.width for batch in batches for row in batch)
    assert sum(map(padded_size, batches)) < 1.15 * num_tokens
    widest = [max(row.width for row in batch) for batch in batches]
    assert widest != sorted(widest)


def padded_size(batch):
    return len(batch) * max(row.width for row in batch)


def test_what_transcripts_of_a_tree_share_is_trained_on_once(records, model):
    """Rows hold a single tree, and are nearly as few tokens as there are distinct ones."""
    rows = make_rows(paths_of(records), model)
    trees = pack_trees(rows, 4096, token_cost=model.token_cost)
    assert len(trees) == len(records)
    distinct, read = 0, 0
    for tree in trees:
        indices = sequences_of(tree)
        assert len({rows[index].groups[0][0] for index in indices}) == 1
        distinct += num_distinct_tokens([rows[index].ids for index in indices])
        read += sum(row.width for row in tree)
    alone = sum(len(row.ids) for row in rows)
    assert distinct <= read < 1.25 * distinct < alone


def test_a_row_takes_half_a_batch_at_most():
    """So that a batch holds more than one tree."""
    rows = [Row([1] * 20 + [number] * 9, [28], [0.0], [("p", "A")]) for number in range(2, 9)]
    [tree] = pack_trees(rows, 100, token_cost=1e9)
    assert [row.width for row in tree] == [47, 47, 29]
    [tree] = pack_trees(rows, 40, token_cost=1e9)  # none can be narrower than a transcript
    assert [row.width for row in tree] == [29] * 7


def test_rows_of_equal_length_meet_others_in_every_epoch():
    trees = packed_alone([Row([0] * 5, [4], [1.0], [("p", "Solver")])] * 20)
    batches_of_seed = []
    for seed in range(2):
        batches = epoch_batches(trees, 25, seeded(seed), whole_trees=False)
        assert [len(batch) for batch in batches] == [5] * 4
        batches_of_seed.append({frozenset(sequences_of(batch)) for batch in batches})
    assert batches_of_seed[0] != batches_of_seed[1]

    trees = packed_alone([Row([0] * 5, [4], [1.0], [("p", "Solver")])] * (train_value.POOL + 1))
    [batch] = epoch_batches(trees, 10**9, seeded(0), whole_trees=False)
    assert sorted(sequences_of(batch)) == list(range(train_value.POOL + 1))


def packed_alone(rows):
    return pack_trees(rows, 999, token_cost=None)


def test_the_order_of_an_epoch_is_a_function_of_seed_and_epoch(records, tmp_path, monkeypatch):
    model = make_model()
    rows = make_rows(paths_of(records), model)
    epochs = []

    def look_at_the_steps(rows, steps, loss):
        epochs.append(steps)
        return 1.0

    monkeypatch.setattr(train_value, "mean_terms_per_step", look_at_the_steps)
    monkeypatch.setattr(train_value, "training_step", lambda *args, **options: (0.0, 1))
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        (tmp_path / name).mkdir()
        fit(model, rows, tmp_path / name, batch_tokens=500, epochs=2, seed=seed)
    first, second, first_again, second_again, *of_another_seed = epochs
    assert first == first_again
    assert second == second_again
    assert first != second
    assert first not in of_another_seed


def test_rank_batches_hold_whole_trees(records, model):
    """The loss compares states of one tree, so no tree that fits into a batch is cut."""
    rows = make_rows(paths_of(records), model)
    trees = pack_trees(rows, 500, token_cost=model.token_cost)
    assert max(map(len, trees)) > 1
    largest_tree = max(map(padded_size, trees))

    num_batches = []
    for budget in (10**9, 2 * largest_tree, largest_tree):
        batches = epoch_batches(trees, budget, seeded(0), whole_trees=True)
        assert max(map(padded_size, batches)) <= budget
        trees_of_batches = []
        for batch in batches:
            trees_of_batches.append({rows[index].groups[0][0] for index in sequences_of(batch)})
        order = [index for batch in batches for index in sequences_of(batch)]
        assert sorted(order) == list(range(len(rows)))
        assert sum(map(len, trees_of_batches)) == len(records)  # each tree is in one batch
        num_batches.append(len(batches))
    assert 1 == num_batches[0] < num_batches[1] < num_batches[2]  # trees share a batch if they fit


def test_a_rank_batch_is_cut_only_if_its_tree_is_larger(records, model):
    rows = make_rows(paths_of(records[:1]), model)
    longest = max(len(row.ids) for row in rows)
    batches = epoch_batches(packed_alone(rows), 2 * longest, seeded(0), whole_trees=True)
    order = [index for batch in batches for index in sequences_of(batch)]
    assert sorted(order) == list(range(len(rows)))
    assert max(map(len, batches)) <= 2 < len(rows)


def assert_close_parameters(trained, expected, *, atol):
    for name, parameter in trained.items():
        assert torch.allclose(parameter, expected[name], atol=atol), name


def test_training_resumed_after_a_kill_equals_uninterrupted_training(records, tmp_path):
    uninterrupted, killed, resumed = make_model(), make_model(), make_model()
    rows = make_rows(paths_of(records)[:12], uninterrupted)
    for name in ("uninterrupted", "killed"):
        (tmp_path / name).mkdir()
    fit(uninterrupted, rows, tmp_path / "uninterrupted", epochs=3)

    class Killed(Exception): ...

    def die_after_second_epoch(epoch, loss):
        if epoch == 1:
            raise Killed

    with pytest.raises(Killed):
        fit(killed, rows, tmp_path / "killed", epochs=3, after_epoch=die_after_second_epoch)

    epochs = []

    def remember_epoch(epoch, loss):
        epochs.append(epoch)

    fit(resumed, rows, tmp_path / "killed", epochs=3, after_epoch=remember_epoch)
    assert epochs == [1, 2]
    expected = uninterrupted.trained_parameters()
    assert_close_parameters(resumed.trained_parameters(), expected, atol=1e-6)


def test_the_largest_batch_is_tried_first_and_leaves_no_gradient(records, tmp_path, monkeypatch):
    """Memory that runs out late in an epoch would lose the epoch."""
    model = make_model()
    rows = make_rows(paths_of(records), model)
    sizes, have_gradients = [], []
    original = train_value.training_step

    def look(model, rows, batches, *args, **options):
        sizes.append(padded_size(batches[0]))
        have_gradients.append(any(p.grad is not None for p in model.trained_parameters().values()))
        return original(model, rows, batches, *args, **options)

    monkeypatch.setattr(train_value, "training_step", look)
    fit(model, rows, tmp_path, epochs=1, batch_tokens=300)
    assert len(set(sizes[1:])) > 2
    assert sizes[0] == max(sizes[1:]) and not any(have_gradients)


def test_v_is_in_training_mode_in_every_epoch(records, tmp_path, monkeypatch):
    """Measuring leaves it in the other mode, in which a GPU keeps all activations."""
    model = make_model()
    rows = make_rows(paths_of(records)[:2], model)
    modes = []

    def look(model, *args, **options):
        modes.append(model.training and model.backbone.training)
        return 0.0, 1

    monkeypatch.setattr(train_value, "training_step", look)
    model.eval()
    fit(model, rows, tmp_path, epochs=2, after_epoch=lambda epoch, loss: model.eval())
    assert len(modes) >= 2 and all(modes)


def test_training_that_runs_out_of_memory_says_what_to_lower(records, tmp_path, monkeypatch):
    def no_room(*args, **options):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(train_value, "train", no_room)
    write_labels(tmp_path / "rollouts", records)
    flags = ["--run", str(tmp_path), "--no-quantize", "--num-threads", "1", "--device", "cpu"]
    with pytest.raises(InputError, match="^out of memory; lower --train-batch-tokens or"):
        train_value.main(train_value.parse_args(flags))


def test_the_delta_of_the_huber_loss_reaches_every_step(records, tmp_path, monkeypatch):
    model = make_model()
    rows = make_rows(paths_of(records)[:6], model)
    errors = []
    for row, values in zip(rows, model.predict(rows, batch_tokens=999), strict=True):
        errors += [v - target for v, target in zip(values, row.targets, strict=True)]
    losses = []
    train_value.train(
        model,
        rows,
        pack_trees(rows, 999, token_cost=model.token_cost),
        epochs=1,
        lr=1e-12,
        batch_tokens=999,
        huber_delta=0.1,
        seed=0,
        checkpoint=tmp_path / "checkpoint.pt",
        after_epoch=lambda epoch, loss: losses.append(loss),
    )
    expected = huber(torch.tensor(errors).abs(), delta=0.1).mean().item()
    assert losses == [pytest.approx(expected, abs=1e-5)]


# ---- Other processes -----------------------------------------------------------------------------


def run_python(*argv, timeout=150):
    """Run Python with our files and the tests on its path. Returns its standard output."""
    path = os.pathsep.join([str(HERE), str(HERE / "tests")])
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_as_one_of_two(rank, rows, folder):
    """Train a new V in this process and another one. The first saves it as two.pt."""
    os.environ.update(RANK=str(rank), WORLD_SIZE="2")
    store = (folder / "store").as_uri()
    torch.distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    model = make_model()
    fit(model, rows, folder, batch_tokens=200)
    if rank == 0:
        torch.save(model.trained_parameters(), folder / "two.pt")
    torch.distributed.destroy_process_group()


def test_data_parallel_training_equals_one_process_with_the_batches_together(
    records, tmp_path, monkeypatch
):
    # 1. train in two processes
    one = make_model()
    rows = make_rows(paths_of(records)[:15], one)
    children = []
    for rank in (0, 1):
        children.append(start_in_fork(partial(train_as_one_of_two, rank, rows, tmp_path)))
    assert [exit_code_of(child) for child in children] == [0, 0]

    # 2. train in one process, on both batches of a step together
    num_batches = []

    def pairs_of_batches(*args, **options):
        batches = epoch_batches(*args, **options)
        num_batches.append(len(batches))
        pairs = []
        for start in range(0, len(batches), 2):
            pair = batches[start : start + 2]
            pairs.append([row for batch in pair for row in batch])
        return pairs

    monkeypatch.setattr(train_value, "epoch_batches", pairs_of_batches)
    (tmp_path / "one").mkdir()
    fit(one, rows, tmp_path / "one", batch_tokens=200)

    # 3. compare. With an odd number of batches, one process has none in the last step.
    assert min(num_batches) > 2
    assert any(num % 2 == 1 for num in num_batches)
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert_close_parameters(one.trained_parameters(), two, atol=1e-5)


SCORE_IN_A_FRESH_PROCESS = """
import json
import sys
from pathlib import Path

from mas import CHAIN, State
from value import ValueModel

state = CHAIN.step(State("a question", ()), "some facts")
values = []
for folder in sys.argv[1:]:
    model = ValueModel.load(Path(folder), CHAIN, device="cpu", dtype="float32")
    values += model.score([state], batch_tokens=99)
print(json.dumps(values))
"""


def test_saved_and_reloaded_v_is_equal_in_a_fresh_process(records, tmp_path):
    """With NF4 weights, and without. One process loads both, as it takes seconds to start."""
    state = CHAIN.step(State("a question", ()), "some facts")
    folders, expected = [], []
    for quantize in (False, True):
        model = make_model(quantize=quantize)
        folder = tmp_path / f"quantize_{quantize}"
        folder.mkdir()
        fit(model, make_rows(paths_of(records)[:6], model), folder, epochs=1)
        save_with_settings(model, folder / "value", quantize=quantize, loss="huber")
        states = states_of(records[:1])
        verify_saved(
            model, folder / "value", states, device="cpu", dtype="float32", batch_tokens=4000
        )
        folders.append(folder / "value")
        expected += score(model, [state])

    output = run_python("-c", SCORE_IN_A_FRESH_PROCESS, *folders)
    values = json.loads(output.splitlines()[-1])
    assert values == pytest.approx(expected, abs=1e-5)
    assert values[0] != pytest.approx(values[1], abs=1e-5)


def test_no_quantize_works_without_bitsandbytes():
    code = """
import sys

sys.modules["bitsandbytes"] = None  # importing it now raises ImportError
from adapters import add_lora
from value import load_backbone

backbone, _ = load_backbone(sys.argv[1], quantize=False, device="cpu", dtype="float32")
add_lora(backbone, rank=2)
print("fine")
"""
    assert run_python("-c", code, AGENTS).endswith("fine\n")


# ---- A value model that does not belong here is refused ------------------------------------------


@pytest.fixture(params=[False, True], ids=["LoRA", "QLoRA"])
def saved(request, records, tmp_path):
    """Return the folder of a saved V that may be used."""
    quantize = request.param
    model = make_model(quantize=quantize)
    folder = tmp_path / "value"
    save_with_settings(model, folder, quantize=quantize, loss="huber")
    verify_saved(
        model, folder, states_of(records[:1]), device="cpu", dtype="float32", batch_tokens=4000
    )
    return folder


def refusal(folder, mas=CHAIN):
    """Return why a saved V is refused."""
    with pytest.raises(InputError) as error:
        ValueModel.load(folder, mas, device="cpu", dtype="float32")
    return str(error.value)


def change_config(folder, **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | changes))


def change_settings(folder, **changes):
    settings = json.loads((folder / "config.json").read_text())["settings"]
    change_config(folder, settings=settings | changes)


def test_a_v_of_another_graph_is_refused(saved):
    other_reader = replace(CHAIN.agents[0], prompt="Other.")
    other_chain = replace(CHAIN, agents=(other_reader, *CHAIN.agents[1:]))
    for mas, now in (
        (SINGLE, "'single'"),
        (other_chain, "'chain' with other agents or prompts"),
    ):
        assert refusal(saved, mas) == (
            f"{saved}: V was trained with the graph 'chain', now it is {now}; "
            f"give the same --graph, or train a V for this one"
        )


def test_a_v_of_another_rendering_is_refused(saved):
    change_settings(saved, rendering="older")
    assert "another rendering" in refusal(saved)


RENDERINGS = [  # view, and the segments of the states after one, two, three and four messages
    (
        "full",
        [
            ["Question: a question", "Reader: message 0"],
            ["Question: a question", "Reader: message 0", "Planner: message 1"],
            [
                "Question: a question",
                "Reader: message 0",
                "Planner: message 1",
                "Solver: message 2",
            ],
            [
                "Question: a question",
                "Reader: message 0",
                "Planner: message 1",
                "Solver: message 2",
                "Verifier: message 3",
            ],
        ],
    ),
    (
        "local",
        [
            ["Question: a question", "Reader: message 0"],
            ["Question: a question", "Reader: message 0", "Planner: message 1"],
            ["Planner: message 1", "Solver: message 2"],
            ["Question: a question", "Solver: message 2", "Verifier: message 3"],
        ],
    ),
]


@pytest.mark.parametrize("view, renderings", RENDERINGS)
def test_a_rendering_is_known_by_all_states_of_an_example(view, renderings):
    """A saved V names this fingerprint: another example would refuse every V there is."""
    assert rendering_fingerprint(CHAIN, view) == fingerprint(renderings)


def test_a_backbone_of_the_hub_keeps_its_name(tmp_path):
    name = "Qwen/Qwen2.5-1.5B"
    backbone = SimpleNamespace(config=SimpleNamespace(_commit_hash="c0ffee"))
    setting = backbone_setting(name, backbone, tmp_path)
    assert setting == {"name": name, "fingerprint": f"{name}@c0ffee"}
    assert value._name_from_here(name, tmp_path) == name


def test_a_v_whose_backbone_is_missing_is_refused(saved):
    change_settings(saved, backbone={"name": "no/such/model", "fingerprint": ""})
    assert "no/such/model" in refusal(saved)


def test_a_v_follows_its_backbone_but_refuses_other_weights(records, tmp_path, monkeypatch):
    # 1. Saved with relative paths.
    shutil.copytree(AGENTS, tmp_path / "agents")
    monkeypatch.chdir(tmp_path)
    model = make_model()
    save_with_settings(model, Path("run/value"), quantize=False, loss="huber", backbone="agents")
    states = states_of(records[:1])
    verify_saved(model, Path("run/value"), states, device="cpu", dtype="float32", batch_tokens=4000)

    # 2. Loaded from another working directory.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    ValueModel.load(Path("../run/value"), CHAIN, device="cpu", dtype="float32")

    # 3. The weights change in place.
    weights = load_file(tmp_path / "agents" / "model.safetensors")
    name = min(weights)
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "agents" / "model.safetensors", metadata={"format": "pt"})
    assert "agents has other files than when V was trained" in refusal(Path("../run/value"))


def test_a_v_below_a_link_is_found_again(tmp_path, monkeypatch):
    """Runs often lie on another disk; ".." then leads out of that folder, not of the link."""
    shutil.copytree(AGENTS, tmp_path / "agents")
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "runs").symlink_to(tmp_path / "disk" / "deep")
    monkeypatch.chdir(tmp_path)
    folder = Path("runs/tiny/value")
    save_with_settings(make_model(), folder, quantize=False, loss="huber", backbone="agents")
    change_config(folder, finished=True)
    ValueModel.load(folder, CHAIN, device="cpu", dtype="float32")
    monkeypatch.chdir(tmp_path / "disk")
    ValueModel.load(tmp_path / folder, CHAIN, device="cpu", dtype="float32")


def test_a_folder_of_another_stage_is_not_taken_for_a_v(tmp_path):
    open_run(tmp_path, {"graph": asdict(CHAIN)}, device="cpu", overwrite=False)
    assert "no value model; train_value.py trains one" in refusal(tmp_path)


def test_a_backbone_that_reads_ahead_is_refused(tmp_path):
    """V would read the final answer in every state before it."""
    shutil.copytree(AGENTS, tmp_path / "bert", ignore=shutil.ignore_patterns("*.safetensors"))
    config = BertConfig(
        vocab_size=640,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(InputError, match="bert: each token of it reads those that follow"):
        load_backbone(str(tmp_path / "bert"), quantize=False, device="cpu", dtype="float32")


def test_a_v_without_a_head_is_refused(saved):
    (saved / "head.safetensors").unlink()
    assert "head.safetensors is missing" in refusal(saved)


def test_a_head_that_was_not_saved_is_noticed(records, tmp_path):
    model = make_model()
    folder = tmp_path / "value"
    save_with_settings(model, folder, quantize=False, loss="huber")
    nn.init.constant_(model.head.bias, 1.0)
    states = states_of(records[:1])
    with pytest.raises(AssertionError, match="the saved value model is not the trained one"):
        verify_saved(model, folder, states, device="cpu", dtype="float32", batch_tokens=4000)
    assert "not finished" in refusal(folder)


def test_measuring_leaves_no_progress_bar_on_the_model(records):
    model = make_model()
    paths = paths_of(records[:1])
    edges = [edge for path in paths for edge in path]
    values = train_value.heldout_values(model, make_rows(paths, model), batch_tokens=4000)
    assert len(values) == len(edges)
    assert model.on_rows is ignore


def test_a_v_whose_training_is_not_finished_is_refused(saved):
    change_config(saved, finished=False)
    assert "not finished" in refusal(saved)


# ---- What training prints and records ------------------------------------------------------------


def test_an_epoch_that_is_done_again_replaces_its_line(tmp_path, capsys):
    report = {"A": {"rmse": 0.25, "n": 3}, "B": {"rmse": 0.12345, "n": 1}}
    path = tmp_path / "metrics.jsonl"
    with open_to_append(path) as log:
        for epoch in range(3):
            train_value.log_epoch(log, epoch, 1.5 - epoch, report)
    assert capsys.readouterr().out.splitlines()[2:4] == [
        "epoch 2: training loss 0.5000",
        "  held-out RMSE: A 0.250, B 0.123",
    ]
    lines = [{"epoch": i, "train_loss": 1.5 - i, "heldout": report} for i in range(3)]
    assert read_jsonl(path) == lines

    with open_to_append(path) as log:
        train_value.log_epoch(log, 1, 7.0, report)
    assert read_jsonl(path) == [lines[0], lines[1] | {"train_loss": 7.0}]
    with open_to_append(path) as log:
        train_value.log_epoch(log, 0, 8.0, report)
    assert read_jsonl(path) == [lines[0] | {"train_loss": 8.0}]


def test_v_is_measured_on_every_label_in_its_order(monkeypatch, tmp_path):
    """The first row has the labels of A and B, the second one has another label of A."""
    state = State("q", ())
    edges = [
        Edge("p", "heldout", *label, visits=1)
        for label in ((1, 0, "A", state, 0.5), (2, 1, "B", state, -1.0), (3, 0, "A", state, 0.0))
    ]
    rows = [Row([1, 2], [0, 1], [0.5, -1.0], []), Row([1], [0], [0.0], [])]
    bars = []

    class RecordedProgress(NoProgress):
        def __init__(self, total, description):
            bars.append((total, description))

        def __enter__(self):
            return self

        def __exit__(self, *error): ...

        def advance(self, amount):
            bars.append(amount)

    class FixedModel:
        def predict(self, rows, *, batch_tokens):
            assert batch_tokens == 99
            self.on_rows(len(rows))
            return [[0.5, -0.5], [0.25]]

    monkeypatch.setattr(train_value, "Progress", RecordedProgress)
    values = train_value.heldout_values(FixedModel(), rows, batch_tokens=99)
    assert values == [0.5, -0.5, 0.25]
    report = train_value.value_metrics(edges, values)
    assert bars == [(2, "held-out"), 2]
    assert {agent: row["n"] for agent, row in report.items()} == {"A": 2, "B": 1}
    assert report["A"]["rmse"] == pytest.approx(math.sqrt(0.25**2 / 2))
    assert report["B"]["rmse"] == 0.5

    for _ in range(2):  # a later epoch replaces it
        train_value.write_heldout(tmp_path / "heldout.jsonl", edges, values)
    assert read_jsonl(tmp_path / "heldout.jsonl") == [
        {"id": "p", "node": 1, "parent": 0, "agent": "A", "y": 0.5, "N": 1, "V": 0.5},
        {"id": "p", "node": 2, "parent": 1, "agent": "B", "y": -1.0, "N": 1, "V": -0.5},
        {"id": "p", "node": 3, "parent": 0, "agent": "A", "y": 0.0, "N": 1, "V": 0.25},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.jsonl"]


def test_training_is_described_by_its_sizes():
    model = SimpleNamespace(
        trained_parameters=lambda: {"a": torch.zeros(40, 50), "b": torch.zeros(3)}
    )
    rows = [Row([1, 2, 3], [1, 2], [0.0, 1.0], [("p", "A")] * 2), Row([1, 2, 4], [2], [1.0], [])]
    rows[1].groups.append(("p", "A"))
    labels = SimpleNamespace(records={"train": [{}, {}, {}, {}, {}]})
    for token_cost, tokens in (
        (None, "6 tokens in 2 packed rows"),
        (1, "4 tokens in 1 packed rows"),
    ):
        trees = pack_trees(rows, 99, token_cost=token_cost)
        assert train_value.describe_training(model, rows, trees, labels, [None] * 7) == (
            "3 labelled states of 5 problems in 2 transcripts; 7 held-out states\n"
            f"{tokens} an epoch ({int(tokens[0]) / 4:.2f} times the distinct ones)\n"
            "2,003 trained parameters"
        )


def test_peak_memory_is_in_gibibytes(monkeypatch):
    usage = SimpleNamespace(ru_maxrss=5 * 2**19)  # KiB
    monkeypatch.setattr(train_value.resource, "getrusage", lambda who: usage)
    allocated = {"cuda:0": 0, "cuda:1": 7 * 2**29}
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", allocated.__getitem__)
    monkeypatch.setattr(train_value.sys, "platform", "linux")
    assert train_value.peak_memory("cpu") == "2.5 GiB of the process"
    assert train_value.peak_memory("cuda:1") == "3.5 GiB allocated on the GPU"
    monkeypatch.setattr(train_value.sys, "platform", "darwin")
    usage.ru_maxrss = 5 * 2**29  # bytes
    assert train_value.peak_memory("cpu") == "2.5 GiB of the process"


def test_all_settings_of_the_weights_are_recorded(records, monkeypatch):
    asked = []

    def recorded_setting(*args):
        asked.append(args)
        return "the backbone"

    monkeypatch.setattr(train_value, "backbone_setting", recorded_setting)
    monkeypatch.setenv("WORLD_SIZE", "3")
    of_splits = {"train": {"num": 1}, "heldout": {"num": 2}}
    labels = train_value.Labels(CHAIN, of_splits, {"train": records[:1], "heldout": []}, {})
    args = train_value.parse_args(["--backbone", "b", "--device", "cpu"])
    model = SimpleNamespace(backbone="weights")

    settings = train_value.value_settings(args, labels, model, Path("f"))
    assert asked == [("b", "weights", Path("f"))]
    assert settings == {
        "target": "search",
        "view": "full",
        "loss": "huber",
        "quantize": True,
        "lora_rank": 16,
        "lr": 1e-3,
        "epochs": 2,
        "label_weights": "equal",
        "huber_delta": 1.0,
        "train_batch_tokens": 2048,
        "seed": args.seed,
        "dtype": "float32",
        "backbone": "the backbone",
        "processes": 3,
        "graph": asdict(CHAIN),
        "rendering": rendering_fingerprint(CHAIN, "full"),
        "rollouts": {"num": 1},
        "heldout_rollouts": {"num": 2},
        "trees": train_value.trees_fingerprint(labels.records),
    }


def test_trees_are_told_apart_by_all_but_their_cost(records):
    def fingerprint_of(train, heldout):
        return train_value.trees_fingerprint({"train": train, "heldout": heldout})

    train, heldout = records[:2], records[4:]
    fingerprint = fingerprint_of(train, heldout)
    slower = [record | {"cost": {"seconds": 99}} for record in train]
    assert fingerprint_of(slower, heldout) == fingerprint
    other_nodes = [*train[0]["nodes"][:-1], train[0]["nodes"][-1] | {"N": 99}]
    other_tree = train[0] | {"nodes": other_nodes}
    assert fingerprint_of([other_tree, train[1]], heldout) != fingerprint
    assert fingerprint_of(train, heldout[:1]) != fingerprint
    assert fingerprint_of(train[:1], heldout) != fingerprint


def test_an_untrained_v_is_that_of_the_flags(monkeypatch):
    calls = []
    loaded = []

    def recorded_load(name, **options):
        calls.append((name, options))
        loaded.append(load_backbone(AGENTS, quantize=False, device="cpu", dtype="float32"))
        return loaded[-1]

    monkeypatch.setattr(train_value, "load_backbone", recorded_load)
    argv = ["--view", "local", "--loss", "dist", "--lora-rank", "2", "--backbone", "b"]
    argv += ["--dtype", "bfloat16"]
    model = train_value.make_value_model(train_value.parse_args(argv), CHAIN, "cuda:1")
    assert calls == [("b", {"quantize": True, "device": "cuda:1", "dtype": "bfloat16"})]
    assert (model.view, model.loss, model.mas) == ("local", "dist", CHAIN)
    assert model.tokenizer is loaded[0][1]
    ranks = {len(weight) for name, weight in model.trained_parameters().items() if "lora_A" in name}
    assert ranks == {2}


def test_the_lora_of_an_untrained_v_is_a_function_of_the_seed():
    """So it is the same on every process."""
    loras = []
    for seed in ("0", "0", "1"):
        args = train_value.parse_args(["--seed", seed, "--no-quantize", "--lora-rank", "2"])
        model = train_value.make_value_model(args, CHAIN, "cpu")
        trained = model.trained_parameters()
        loras.append(torch.cat([trained[name].flatten() for name in sorted(trained)]))
    assert torch.equal(loras[0], loras[1])
    assert not torch.equal(loras[0], loras[2])


# ---- Several processes and checkpoints, without starting any -------------------------------------


def test_gradients_of_all_processes_are_summed(monkeypatch):
    """The other process has the gradients 10, 20, ...; a parameter may be unused in this one."""

    def add_other_process(flat):
        flat += 10 * torch.arange(1, len(flat) + 1)

    monkeypatch.setattr(torch.distributed, "all_reduce", add_other_process)
    used, unused = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1, 2))
    used.grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    train_value.sum_gradients({"used": used, "unused": unused})
    assert used.grad.tolist() == [[11.0, 22.0], [33.0, 44.0]]
    assert unused.grad.tolist() == [[50.0, 60.0]]


def test_a_process_without_a_batch_takes_part_in_the_step(records, monkeypatch):
    """The last step of an epoch may have fewer batches than there are processes."""
    model = make_model()
    rows = make_rows(paths_of(records)[:1], model)
    [batch] = pack_trees(rows, 999, token_cost=model.token_cost)
    summed = []
    monkeypatch.setattr(train_value, "sum_gradients", lambda trained: summed.append(set(trained)))
    monkeypatch.setenv("WORLD_SIZE", "2")
    results = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        results.append(train_value.training_step(model, rows, [batch], 1.0, huber_delta=1.0))
    assert results[0][0] > 0
    assert results[0][1] == len(rows[0].targets)
    assert results[1] == (0.0, 0)
    assert summed == [set(model.trained_parameters())] * 2


@pytest.mark.parametrize("device, backend", [("cpu", "gloo"), ("cuda:1", "nccl")])
def test_processes_wait_a_day_for_each_other(monkeypatch, device, backend):
    calls = []

    def init_process_group(backend, *, timeout):
        calls.append((backend, timeout.total_seconds()))

    monkeypatch.setattr(torch.cuda, "set_device", calls.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
    train_value.start_data_parallel(device)
    chosen = [device] if device != "cpu" else []
    assert calls == [*chosen, (backend, 24 * 60 * 60)]


def test_a_checkpoint_cannot_run_code(tmp_path):
    torch.save({"epoch": Path("x"), "trained": {}}, tmp_path / "checkpoint.pt")
    model = SimpleNamespace(backbone=SimpleNamespace(device="cpu"))
    with pytest.raises(pickle.UnpicklingError):
        train_value.load_checkpoint(tmp_path / "checkpoint.pt", model, None, None)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    train_value.write_checkpoint(path, {"step": 1})

    def killed(state, file):
        Path(file).write_bytes(b"torn")
        raise StopError

    monkeypatch.setattr(torch, "save", killed)
    with pytest.raises(StopError):
        train_value.write_checkpoint(path, {"step": 2})
    assert torch.load(path, weights_only=True) == {"step": 1}


def test_what_is_printed_of_v_is_of_the_last_epoch_and_warns(tmp_path, capsys):
    settings = {"target": "search", "loss": "huber", "huber_delta": 1.0, "label_weights": "equal"}
    open_run(tmp_path, settings, device="cpu", overwrite=False)
    metrics = {"n": 3, "rmse_of_mean": 0.9, "ece": 0.1, "auc": 0.75, "auc_95": [0.7, 0.8]}
    metrics |= {"auc_problems": 3, "top1": None, "chance": None}
    with open(tmp_path / "metrics.jsonl", "w") as file:
        for epoch, rmse in enumerate([0.9, 0.4]):
            heldout = {"Planner": metrics | {"rmse": rmse}}
            line = {"epoch": epoch, "train_loss": 0.1, "heldout": heldout}
            file.write(json.dumps(line) + "\n")
    with open(tmp_path / "heldout.jsonl", "w") as file:
        for index in range(200):
            edge = {"id": f"p{index % 20}", "agent": "Planner", "V": 0.0, "y": (-1.0) ** index}
            file.write(json.dumps(edge) + "\n")
    train_value.report_last_epoch(tmp_path)
    out = capsys.readouterr().out
    [line] = [line for line in out.splitlines() if line.startswith("Planner")]
    assert line.split()[:3] == ["Planner", "3", "0.400"]
    assert "! V explains little" in out


def test_trees_that_fill_a_batch_exactly_share_it():
    rows = [Row([1] * 5, [4], [0.0], [(problem_id, "A")]) for problem_id in "aabb"]
    [batch] = train_value.whole_tree_batches(packed_alone(rows), 20)
    assert sequences_of(batch) == [0, 1, 2, 3]
    batches = train_value.whole_tree_batches(packed_alone(rows), 19)
    assert [sequences_of(batch) for batch in batches] == [[0, 1], [2, 3]]


def test_a_step_counts_the_terms_of_its_loss(records):
    """Pairs for `rank`, labels otherwise: the mean training loss divides by them."""
    paths = paths_of(records)[:8]
    for loss in ("huber", "rank"):
        model = make_model(loss=loss)
        rows = make_rows(paths, model)
        trees = pack_trees(rows, 4096, token_cost=model.token_cost)
        batch = [row for tree in trees for row in tree]
        _, terms = train_value.training_step(model, rows, [batch], 1.0, huber_delta=1.0)
        assert terms == num_terms(rows, loss)
    assert num_terms(rows, "rank") != num_terms(rows, "huber")


def test_only_the_first_process_measures_and_writes_the_checkpoint(
    records,
    tmp_path,
    monkeypatch,
):
    """Two processes that write one file at a time can lose it."""
    model = make_model()
    rows = make_rows(paths_of(records)[:2], model)
    monkeypatch.setattr(train_value, "training_step", lambda *args, **options: (0.0, 1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, num_epochs in (("1", 0), ("0", 2)):
        monkeypatch.setenv("RANK", rank)
        assert len(fit(model, rows, tmp_path, epochs=2)) == num_epochs
        assert (tmp_path / "checkpoint.pt").exists() == (rank == "0")


def test_a_further_process_trains_on_its_own_gpu_and_saves_nothing(
    records,
    tmp_path,
    monkeypatch,
):
    """It joins the first one, takes part in every step, and leaves the folder alone."""
    write_labels(tmp_path / "rollouts", records)
    calls, loads = [], []
    original = train_value.load_backbone

    def load_on_cpu(name, *, device, **options):
        loads.append(device)
        return original(name, device="cpu", **options)

    monkeypatch.setattr(train_value, "load_backbone", load_on_cpu)
    monkeypatch.setattr(train_value, "start_data_parallel", lambda device: calls.append(device))
    monkeypatch.setattr(train_value, "train", lambda *args, **options: calls.append("train"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: calls.append("leave"))
    monkeypatch.setattr("support.runs.provenance", lambda device: {})
    for name, text in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, text)
    flags = ["--run", str(tmp_path), "--no-quantize", "--lora-rank", "2", "--num-threads", "1"]
    train_value.main(train_value.parse_args([*flags, "--device", "cuda", "--dtype", "float32"]))
    assert loads == ["cuda:1"]
    assert calls == ["cuda:1", "train", "leave"]
    assert [path.name for path in (tmp_path / "value").iterdir()] == ["config.json"]


# ---- From the flags to the functions that are tested above ---------------------------------------


def test_the_training_loop_has_the_settings_of_the_flags(records, tmp_path, monkeypatch):
    write_labels(tmp_path / "rollouts", records)
    given = {}

    def look(model, rows, trees, **options):
        given.update(options | {"model": model, "rows": rows, "trees": trees})
        raise StopError

    monkeypatch.setattr(train_value, "train", look)
    flags = ["--no-quantize", "--lora-rank", "2", "--device", "cpu", "--num-threads", "1"]
    flags += ["--epochs", "5", "--lr", "0.25", "--huber-delta", "0.125", "--seed", "7"]
    flags += ["--train-batch-tokens", "400", "--label-weights", "visits"]
    with pytest.raises(StopError):
        train_value.main(train_value.parse_args(["--run", str(tmp_path), *flags]))
    model, rows, trees = given.pop("model"), given.pop("rows"), given.pop("trees")
    assert given.pop("after_epoch") is not None
    assert given == {
        "epochs": 5,
        "lr": 0.25,
        "batch_tokens": 400,
        "huber_delta": 0.125,
        "seed": 7,
        "checkpoint": tmp_path / "value" / "checkpoint.pt",
    }
    assert trees == pack_trees(rows, 400, token_cost=model.token_cost)
    assert trees != pack_trees(rows, 32768, token_cost=model.token_cost)
    assert len({weight for row in rows for weight in row.weights}) > 1  # visits


@pytest.fixture
def trained_v(records, tmp_path, monkeypatch):
    """Run train_value.py without training or saving. Returns what other functions were given."""
    write_labels(tmp_path / "rollouts", records)
    seen = SimpleNamespace(run=tmp_path, heldout=[], verified=[])

    def train_nothing(model, rows, trees, *, checkpoint, after_epoch, **options):
        after_epoch(0, 0.5)
        checkpoint.touch()

    def fake_values(model, rows, *, batch_tokens):
        seen.heldout.append(batch_tokens)
        return [0.0 for row in rows for _ in row.positions]

    def verify(model, folder, states, **options):
        seen.verified.append((folder, states, options))

    monkeypatch.setattr(train_value, "train", train_nothing)
    monkeypatch.setattr(train_value, "heldout_values", fake_values)
    monkeypatch.setattr(ValueModel, "save", lambda self, folder: None)
    monkeypatch.setattr(train_value, "verify_saved", verify)
    flags = ["--run", str(tmp_path), "--no-quantize", "--lora-rank", "2", "--num-threads", "1"]
    flags += ["--device", "cpu", "--dtype", "bfloat16", "--batch-tokens", "777"]
    train_value.main(train_value.parse_args(flags))
    return seen


def test_v_is_measured_and_verified_as_the_flags_say(trained_v, records):
    [(folder, states, options)] = trained_v.verified
    heldout = [record for record in by_id(records) if record["split"] == "heldout"]
    assert trained_v.heldout == [777]
    assert folder == trained_v.run / "value"
    assert states == states_of(heldout)[:64]
    assert options == {"device": "cpu", "dtype": "bfloat16", "batch_tokens": 777}
    assert not (folder / "checkpoint.pt").exists()


def test_a_v_lists_the_training_and_the_held_out_problems(trained_v):
    """evaluate.py refuses to test on either: V was chosen on the held-out ones."""
    rows = read_jsonl(trained_v.run / "value" / "problems.jsonl")
    assert sorted((row["id"], row["split"]) for row in rows) == [
        ("p0", "train"),
        ("p1", "train"),
        ("p2", "train"),
        ("p3", "train"),
        ("p4", "heldout"),
        ("p5", "heldout"),
    ]


def opened_run(monkeypatch, module, argv):
    """Run a script up to where it opens its run folder. Returns (folder, settings, options)."""
    opened = []

    def look(folder, settings, **options):
        opened.append((folder, settings, options))
        raise StopError

    monkeypatch.setattr(module, "open_run", look)
    with pytest.raises(StopError):
        module.main(module.parse_args(argv))
    return opened[0]


@pytest.mark.parametrize(
    "module", [generate_rollouts, train_value, train_agents, evaluate], ids=lambda m: m.__name__
)
def test_every_stage_starts_over_if_it_is_told_to(module, records, tmp_path, monkeypatch):
    write_labels(tmp_path / "rollouts", records)
    argv = ["--run", str(tmp_path), "--device", "cpu", "--num-threads", "1"]
    argv += {train_agents: ["--reward", "outcome"], train_value: ["--no-quantize"]}.get(module, [])
    argv += ["--methods", "greedy"] if module is evaluate else []
    for flags, overwrite in (([], False), (["--overwrite"], True)):
        _, _, options = opened_run(monkeypatch, module, [*argv, *flags])
        assert options == {"device": "cpu", "overwrite": overwrite}


def test_the_shape_of_the_trees_is_recorded(tmp_path, monkeypatch):
    """Else a run that is resumed with other flags would mix trees of two kinds."""
    argv = ["--run", str(tmp_path), "--num-simulations", "9", "--num-candidates", "1.8.1.2"]
    fake = SimpleNamespace(mas=CHAIN, settings={"model": "m"})
    monkeypatch.setattr(generate_rollouts, "make_policy", lambda args, mas: fake)
    folder, settings, _ = opened_run(monkeypatch, generate_rollouts, argv)
    assert folder == tmp_path / "rollouts"
    assert settings["num_simulations"] == 9
    assert tuple(settings["num_candidates"]) == (1, 8, 1, 2)
    assert settings["graph"] == asdict(CHAIN) and settings["model"] == "m"


@pytest.mark.parametrize("module", [generate_rollouts, train_value], ids=lambda m: m.__name__)
def test_a_script_uses_as_many_threads_as_it_is_told(module, records, tmp_path, monkeypatch):
    """More than there are cores make scripts that run side by side several times slower."""
    asked = []
    write_labels(tmp_path / "rollouts", records)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr("llm.policy.load_pretrained", stop)
    monkeypatch.setattr(value, "load_pretrained", stop)
    with pytest.raises(StopError):
        module.main(module.parse_args(["--run", str(tmp_path), "--num-threads", "5"]))
    assert asked == [5]
