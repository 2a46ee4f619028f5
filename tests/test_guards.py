"""Tests of what keeps results apart: recorded settings, fingerprints of models, leaks, NF4 of V."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train_value
from evaluate import refuse_leaks, scorer_fingerprint
from mas import CHAIN, SINGLE
from search import parse_method
from support.flags import InputError
from support.runs import open_run
from tasks.problems import Problem, question_key
from train_value import Labels, value_settings

# ---- Settings of V -------------------------------------------------------------------------------

RECORD = {"id": "p", "split": "train", "question": "q", "gold": "1", "nodes": []}


def make_labels(*, mas=CHAIN, records=(RECORD,), seed=0):
    settings = {"graph": {}, "seed": seed}
    return Labels(
        mas=mas,
        settings={"train": settings, "heldout": {"graph": {}, "seed": 0}},
        records={"train": list(records), "heldout": []},
        paths={"train": [], "heldout": []},
    )


def settings_with(*flags, labels):
    config = SimpleNamespace(_commit_hash="1234")  # of a backbone from the hub
    model = SimpleNamespace(backbone=SimpleNamespace(config=config))
    return value_settings(train_value.parse_args(list(flags)), labels, model, Path("r/value"))


CHANGES = [
    ["--target", "outcome"],
    ["--backbone", "another"],
    ["--view", "local"],
    ["--loss", "mse"],
    ["--no-quantize"],
    ["--lora-rank", "7"],
    ["--lr", "0.5"],
    ["--epochs", "9"],
    ["--huber-delta", "0.3"],
    ["--train-batch-tokens", "100"],
    ["--seed", "8"],
    ["--label-weights", "visits"],
    ["--dtype", "bfloat16"],
]


@pytest.mark.parametrize("flags", CHANGES)
def test_a_setting_that_changes_v_is_recorded(flags):
    labels = make_labels()
    before = settings_with(labels=labels)
    assert settings_with(*flags, labels=labels) != before
    assert settings_with(labels=labels) == before


def test_the_cost_of_trees_does_not_change_v():
    quick, slow = ({"seconds": seconds} for seconds in (1, 2))
    settings = []
    for cost in (quick, slow):
        settings.append(settings_with(labels=make_labels(records=[RECORD | {"cost": cost}])))
    assert settings[0] == settings[1]


def test_the_labels_that_change_v_are_recorded():
    seen = [
        settings_with(labels=make_labels()),
        settings_with(labels=make_labels(mas=SINGLE)),
        settings_with(labels=make_labels(seed=1)),
        settings_with(labels=make_labels(records=[RECORD | {"gold": "2"}])),
        settings_with(labels=make_labels(records=[])),
    ]
    for index, settings in enumerate(seen):
        assert settings not in seen[:index]


def test_a_quantized_backbone_has_nf4_weights_under_the_adapter():
    """QLoRA: every adapted layer is NF4 with double quantisation. --no-quantize: none is."""
    for flag, layer_type in (("--quantize", "Linear4bit"), ("--no-quantize", "Linear")):
        args = train_value.parse_args([flag, "--lora-rank", "2", "--device", "cpu"])
        model = train_value.make_value_model(args, CHAIN, "cpu")
        adapted = []
        for module in model.modules():
            if hasattr(module, "lora_A"):
                adapted.append(module.base_layer)
        assert len(adapted) >= 7  # every linear layer of every block
        for layer in adapted:
            assert type(layer).__name__ == layer_type
            if flag == "--quantize":
                assert layer.weight.quant_state.quant_type == "nf4"
                assert layer.weight.quant_state.nested
        # Nothing else is linear but the adapter and the head.
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear):
                assert any(part in name for part in ("lora_", "base_layer", "head")), name


def test_a_setting_that_only_one_of_two_runs_has_is_a_difference(tmp_path):
    open_run(tmp_path / "a" / "run", {"seed": 0}, device="cpu", overwrite=False)
    with pytest.raises(InputError, match="top_k"):
        open_run(tmp_path / "a" / "run", {"seed": 0, "top_k": 5}, device="cpu", overwrite=False)
    with pytest.raises(InputError, match="seed"):
        open_run(tmp_path / "a" / "run", {}, device="cpu", overwrite=False)
    open_run(tmp_path / "a" / "run", {"seed": 0}, device="cpu", overwrite=False)


# ---- V and the ORM by their weights --------------------------------------------------------------


def make_model_folder(folder, weights: bytes, questions=()):
    """Make a folder that looks like a trained model, with the questions it was trained on."""
    (folder / "adapter").mkdir(parents=True)
    (folder / "head.safetensors").write_bytes(weights)
    (folder / "adapter" / "adapter_model.safetensors").write_bytes(weights)
    rows = []
    for index, question in enumerate(questions):
        row = {"id": f"t{index}", "question_key": question_key(question)}
        rows.append(json.dumps(row) + "\n")
    (folder / "problems.jsonl").write_text("".join(rows))


@pytest.fixture
def models(tmp_path):
    """Flags that name a V trained on "Asked of V?" and an ORM trained on "Asked of the ORM?"."""
    make_model_folder(tmp_path / "value", b"v", ["Asked of V?", "Another of V?"])
    make_model_folder(tmp_path / "orm", b"o", ["Asked of the ORM?"])
    return SimpleNamespace(run=tmp_path, value=None, orm=None, adapter=None)


def method_named(name):
    return parse_method(name, CHAIN, num_candidates="2", lam=0.0)


def test_a_scorer_is_named_with_the_weights_of_its_models(models, tmp_path):
    def name_of(method):
        return scorer_fingerprint(method_named(method), models)

    assert name_of("greedy") is None
    assert name_of("mcts-2-policy") == "policy"
    value, outcome = name_of("mcts-2-value"), name_of("best_of-2-outcome")
    assert value.startswith("value#")
    assert outcome.startswith("outcome#")
    assert value.removeprefix("value#") != outcome.removeprefix("outcome#")
    assert name_of("mcts-2-value-lam0.5") == f"{value} + {outcome}"
    assert name_of("mcts-2-random-lam0.5") == f"random + {outcome}"

    # Another head or another adapter is another model.
    for part in ("head.safetensors", "adapter/adapter_model.safetensors"):
        before = name_of("mcts-2-value")
        (tmp_path / "value" / part).write_bytes(b"other")
        assert name_of("mcts-2-value") != before
        assert name_of("best_of-2-outcome") == outcome


LEAKS = [  # method, question, and the problem of which model it leaks from
    ("mcts-2-value", "Asked of V?", "t0, which .*value was trained"),
    ("mcts-2-value", "  another OF v? ", "t1, which .*value was trained"),
    ("best_of-2-outcome", "Asked of the ORM?", "t0, which .*orm was trained"),
    ("mcts-2-value-lam0.5", "Asked of the ORM?", "t0, which .*orm was trained"),
    ("mcts-2-value-lam0.5", "Asked of V?", "t0, which .*value was trained"),
    ("mcts-2-value", "Asked of the ORM?", None),
    ("best_of-2-outcome", "Asked of V?", None),
    ("mcts-2-policy", "Asked of V?", None),
    ("mcts-2-value-lam0.5", "Asked of nobody?", None),
]


@pytest.mark.parametrize("name, question, complaint", LEAKS)
def test_questions_that_a_queried_model_was_trained_on_are_refused(
    models, name, question, complaint
):
    """Of the models that a method queries: V, the ORM, or both."""
    problems = [
        Problem("fine", "test", "A fresh question?", "1", "number"),
        Problem("mine", "test", question, "1", "number"),
    ]
    methods = [method_named("greedy"), method_named(name)]
    if complaint is None:
        refuse_leaks(problems, methods, models)
        return
    with pytest.raises(InputError, match=f"test problem mine has the question of {complaint}"):
        refuse_leaks(problems, methods, models)


def test_questions_that_finetuned_agents_were_trained_on_are_refused(models, tmp_path):
    """Also by methods that ask no model but the agents."""
    (tmp_path / "agents").mkdir()
    row = {"id": "a0", "split": "train", "question_key": question_key("Asked of the agents?")}
    (tmp_path / "agents" / "problems.jsonl").write_text(json.dumps(row) + "\n")
    problems = [Problem("mine", "test", "Asked of the agents?", "1", "number")]
    refuse_leaks(problems, [method_named("greedy")], models)
    models.adapter = str(tmp_path / "agents")
    with pytest.raises(InputError, match="has the question of a0, which .*agents was trained"):
        refuse_leaks(problems, [method_named("greedy")], models)
