"""Tests of value.py: what V reads, V by hand, packed against alone, saving and loading."""

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import labelled
import pytest
import torch
import transformers
from conftest import output_of, read_lines
from labelled import HELDOUT, TREES, load, make_model, states_of, transcripts_of
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, MistralConfig

import search
import train_value
from llm.adapters import add_lora
from mas import CHAIN, MAS, State, load_graph
from support.flags import TINY_AGENTS, InputError
from value import ValueModel, load_backbone, rendering_fingerprint


@pytest.fixture(scope="module")
def model():
    return make_model()


def after(*messages: str) -> State:
    """Return the state after these messages."""
    state = State("a question", ())
    for message in messages:
        state = CHAIN.step(state, message)
    return state


# ---- What V reads, and V by hand -----------------------------------------------------------------

FULL = ["Question: a question", "Reader: facts", "Planner: plan", "Solver: work"]


@pytest.mark.parametrize("view, segments", [("full", FULL), ("local", FULL[2:])])
def test_v_reads_the_text_of_its_view_and_each_segment_ends_with_the_end_of_message(view, segments):
    model = make_model(view=view)
    expected, expected_ends = [], []
    for segment in segments:
        ids = model.tokenizer(segment, add_special_tokens=False)["input_ids"]
        expected += [*ids, model.tokenizer.eos_token_id]
        expected_ends.append(len(expected) - 1)
    assert model.encode(after("facts", "plan", "work")) == (expected, expected_ends)

    # With a tokenizer that begins every text with a token, BOS.
    tokenizer = AutoTokenizer.from_pretrained(TINY_AGENTS, bos_token="the")
    special_tokens = [("the", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("the $A", None, special_tokens)
    model = ValueModel(model.backbone, tokenizer, CHAIN, view, "huber")
    assert model.encode(after("facts", "plan", "work"))[0] == [tokenizer.bos_token_id, *expected]


def test_token_ids_of_a_state_are_a_prefix_of_its_childrens(model):
    messages = ["ends in newlines\n\n", " starts with a space", "", "Ünïcödé ☃"]
    encoded = [model.encode(after(*messages[:count]))[0] for count in range(1, 5)]
    for parent, child in pairwise(encoded):
        assert child[: len(parent)] == parent


def value_by_hand(model, ids, position):
    """Return V at one position of one text, read alone up to there."""
    output = model.backbone(input_ids=torch.tensor([ids[: position + 1]]), use_cache=False)
    hidden = output.last_hidden_state[0, -1]
    return torch.tanh(hidden @ model.head.weight[0] + model.head.bias[0])


def gradient(model, values):
    """Return the gradient of a sum of squares."""
    parts = torch.autograd.grad(values.square().sum(), list(model.trained_parameters().values()))
    return torch.cat([part.flatten() for part in parts])


def test_v_is_tanh_of_the_head_at_the_last_token_of_the_newest_message(model):
    state = after("facts", "a plan")
    ids, _ = model.encode(state)
    by_hand = value_by_hand(model, ids, len(ids) - 1).item()
    assert model.score([state], batch_tokens=99) == [pytest.approx(by_hand, abs=1e-6)]


def test_v_is_the_mean_of_a_distribution():
    """21 bins lie at -1, -0.9, ..., 1."""
    outputs = torch.full((3, 21), -torch.inf)
    outputs[0, 0] = outputs[1, 15] = outputs[2, 10] = outputs[2, 11] = 0.0
    values = make_model(loss="dist").value(outputs).tolist()
    assert values == pytest.approx([-1.0, 0.5, 0.05], abs=1e-6)


# ---- Packed against alone ------------------------------------------------------------------------


@pytest.mark.parametrize("is_windowed", [False, True])
def test_packed_values_and_gradients_equal_those_of_every_state_alone(model, is_windowed):
    """A backbone with windows reads each alone. Other architectures: see the tests of packing."""
    if is_windowed:
        torch.manual_seed(0)
        size = {"vocab_size": 640, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
        config = MistralConfig(**size, num_hidden_layers=2, sliding_window=9, initializer_range=0.3)
        backbone = add_lora(AutoModel.from_config(config).requires_grad_(False), rank=2)
        model = ValueModel(backbone, model.tokenizer, CHAIN, "full", "huber")
        labelled.with_random_weights(model)

    # 1. By hand. One token before, V is another: a wrong position would be seen.
    transcripts = transcripts_of(model, TREES[:2])[:12]
    by_hand, one_before = [], []
    for transcript in transcripts:
        for position in transcript.positions:
            by_hand.append(value_by_hand(model, transcript.ids, position))
            one_before.append(value_by_hand(model, transcript.ids, position - 1))
    by_hand, one_before = torch.stack(by_hand), torch.stack(one_before)
    assert (by_hand - one_before).abs().mean() > 1e-3

    # 2. Packed into small and large batches.
    for batch_tokens in (150, 100_000):
        predictions = model.predict(transcripts, batch_tokens=batch_tokens)
        values = [value for values in predictions for value in values]
        assert values == pytest.approx(by_hand.tolist(), abs=2e-5)

    batch = train_value.pack_trees(transcripts, model, 100_000)
    packed = gradient(model, model.value(model.outputs(batch, transcripts)))
    alone = gradient(model, by_hand)
    assert torch.allclose(packed, alone, atol=1e-4 * alone.abs().max())


def test_out_of_memory_halves_batches_and_is_an_error_for_a_single_transcript(model):
    states, limit = states_of(model, TREES[:2]), 200
    expected = model.score(states, batch_tokens=4096)

    def run_out(module, arguments, inputs):
        if inputs["input_ids"].numel() > limit:
            raise torch.OutOfMemoryError("no room")

    hook = model.backbone.register_forward_pre_hook(run_out, with_kwargs=True)
    assert model.score(states, batch_tokens=4096) == pytest.approx(expected, abs=1e-5)
    limit = 20
    with pytest.raises(InputError, match="out of memory"):
        model.score(states, batch_tokens=4096)
    hook.remove()


@pytest.mark.parametrize("quantize", [False, True])
def test_bfloat16_stays_bfloat16_up_to_the_head_and_all_that_is_trained_is_float32(quantize):
    """Embeddings, norms and hidden states too: float32 ones would take twice the memory."""
    model = make_model(quantize=quantize, dtype="bfloat16")
    adapted = [module.base_layer for module in model.modules() if hasattr(module, "lora_A")]
    for layer in adapted:
        assert type(layer).__name__ == ("Linear4bit" if quantize else "Linear")
        if quantize:  # NF4 with double quantisation
            state = layer.weight.quant_state
            assert (state.quant_type, state.nested) == ("nf4", True)
    trained = model.trained_parameters()
    for name, parameter in model.named_parameters():
        assert (name in trained) == ("lora_" in name or name.startswith("head."))
        if parameter.is_floating_point():
            assert parameter.dtype == (torch.float32 if name in trained else torch.bfloat16), name
    output = model.backbone(input_ids=torch.tensor([[1, 2]]), output_hidden_states=True)
    assert {hidden.dtype for hidden in output.hidden_states} == {torch.bfloat16}
    exact = make_model(quantize=quantize).score([after("facts")], batch_tokens=99)
    assert model.score([after("facts")], batch_tokens=99) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize("quantize", [False, True])
def test_checkpointed_activations_change_no_gradient(quantize):
    model = make_model(quantize=quantize).train()
    transcripts = transcripts_of(model, TREES[:1])[:2]
    batch = train_value.pack_trees(transcripts, model, 999)
    plain = gradient(model, model.outputs(batch, transcripts))
    model.backbone.get_base_model().activation_checkpointing_enable()
    checkpointed = gradient(model, model.outputs(batch, transcripts))
    assert torch.allclose(plain, checkpointed, atol=1e-6)
    assert plain.abs().sum() > 0


# ---- Save and load -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Return a folder with the runs "nf4" and "full", trained on a copy of the tiny agents.

    "full" is a link. On the way from there to the agents, ".." leads out of the linked folder.
    """
    root = tmp_path_factory.mktemp("runs")
    shutil.copytree(TINY_AGENTS, root / "agents")
    (root / "disk" / "full").mkdir(parents=True)
    (root / "full").symlink_to("disk/full")
    rollouts = labelled.write_trees(root / "rollouts", [TREES[0], *HELDOUT], CHAIN)
    for name, flag in (("nf4", "--quantize"), ("full", "--no-quantize")):
        argv = ["--run", root / name, "--rollouts", rollouts, "--backbone", root / "agents"]
        output_of(train_value, *argv, flag, "--epochs", 1, "--lora-rank", 2)
    return root


def test_a_loaded_v_is_the_one_that_was_saved(runs):
    """As stage 2 has measured it, in heldout.jsonl, with NF4 weights and without."""
    values = []
    for name in ("nf4", "full"):
        model = load(runs / name / "value")
        measured = [line["V"] for line in read_lines(runs / name / "value" / "heldout.jsonl")]
        values.append(model.score(states_of(model, HELDOUT), batch_tokens=999))
        assert values[-1] == pytest.approx(measured, abs=1e-5)
    assert values[0] != pytest.approx(values[1], abs=1e-5)


def test_a_v_moves_together_with_its_backbone(runs, tmp_path, monkeypatch):
    root = shutil.copytree(runs, tmp_path / "moved", symlinks=True)
    monkeypatch.chdir(tmp_path)
    folders = (Path("moved/nf4/value"), root / "full" / "value")
    for folder in folders:
        name = load(folder).backbone.config._name_or_path
        assert Path(name).resolve() == root / "agents"

    # Or one of them alone. A folder of this name that holds another checkpoint does not count.
    (root / "agents").rename(root / "elsewhere")
    other = shutil.copytree(root / "elsewhere", root / "agents")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    for folder in folders:
        with pytest.raises(InputError, match=f"{root / 'agents'}.* --backbone"):
            load(folder, backbone=other)
        for flag in ("--backbone", "--model"):
            args = search.parse_args(["--device", "cpu", flag, str(root / "elsewhere")])
            model = ValueModel.load(folder, CHAIN, args, must_be_finished=True)
            assert Path(model.backbone.config._name_or_path) == root / "elsewhere"


OTHER_READER = replace(CHAIN.agents[0], prompt="Other.")
OTHER_CHAIN = replace(CHAIN, agents=(OTHER_READER, *CHAIN.agents[1:]))


def test_a_v_that_does_not_belong_here_is_refused(runs, tmp_path):
    def refused(reason, mas=CHAIN):
        with pytest.raises(InputError, match=reason):
            load(root / "full" / "value", mas, backbone=root / "agents")

    root = shutil.copytree(runs, tmp_path / "runs", symlinks=True)
    refused("graph .*chain.*single", load_graph("single"))
    refused("graph .*chain.*chain", OTHER_CHAIN)

    config = root / "full" / "value" / "config.json"
    text = config.read_text()
    for name, setting in (("not finished", '"finished": '), ("rendering", '"rendering": ')):
        config.write_text(text.replace(setting, f'{setting}null, "old": '))
        refused(name)
    config.write_text(text)

    (root / "full" / "value" / "head.safetensors").unlink()
    refused("head.safetensors")


def test_a_v_that_read_senders_unquoted_is_another_one():
    class Unquoted(MAS):
        def value_text(self, state, view):
            return tuple(part.replace("> ", "") for part in super().value_text(state, view))

    unquoted = Unquoted(CHAIN.name, CHAIN.agents)
    assert rendering_fingerprint(unquoted, "full") != rendering_fingerprint(CHAIN, "full")


@pytest.fixture
def saved(runs, tmp_path):
    """A copy of the folder of a V."""
    return shutil.copytree(runs / "full" / "value", tmp_path / "value")


def change(path, edit):
    """Change the weights of a file. edit: of the dict of weights, and the name of one of them."""
    weights = load_file(path)
    edit(weights, min(weights))
    save_file(weights, path)


FILES = ["head.safetensors", "adapter/adapter_model.safetensors"]
EDITS = {
    "missing": lambda weights, name: weights.pop(name),
    "foreign": lambda weights, name: weights.update(other=weights[name].clone()),
    "of another shape": lambda weights, name: weights.update({name: torch.zeros(3)}),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("edit", EDITS)
def test_a_v_whose_weights_do_not_fit_is_refused(saved, file, edit):
    """A missing weight would be random; a foreign one was meant for another V."""
    change(saved / file, EDITS[edit])
    with pytest.raises(InputError, match=str((saved / file).parent)):
        load(saved)


def test_a_v_is_told_apart_by_head_adapter_and_alpha_and_by_nothing_else(saved):
    """Not by the order in which peft writes its sets, nor by what is in the folder later."""
    model = load(saved)
    expected = model.fingerprint
    path = saved / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    config["target_modules"].reverse()
    for alpha in (5, 4):
        path.write_text(json.dumps(config | {"lora_alpha": alpha}))
        seen = {expected, load(saved).fingerprint}
        assert len(seen) == (1 if alpha == 4 else 2)
    for file in FILES:
        change(saved / file, lambda weights, name: weights[name].add_(1))
        seen.add(load(saved).fingerprint)
    assert len(seen) == 3 and model.fingerprint == expected


def test_a_backbone_that_reads_ahead_is_refused(tmp_path):
    """V would read the final answer in every state before it."""
    shutil.copytree(TINY_AGENTS, tmp_path, dirs_exist_ok=True)
    size = {"vocab_size": 640, "dim": 8, "hidden_dim": 8, "n_heads": 1, "n_layers": 1}
    config = transformers.DistilBertConfig(**size)
    transformers.DistilBertForMaskedLM(config).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="V needs a causal language model"):
        load_backbone(str(tmp_path), quantize=False, device="cpu", dtype="float32")
