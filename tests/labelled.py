"""Labelled trees without a search, and small Vs: what the tests of stage 2 share."""

import random
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

import train_value
from llm.adapters import add_lora
from mas import CHAIN, MAS
from support.flags import TINY_AGENTS
from support.records import append_jsonl, open_to_append
from support.runs import open_run
from value import ValueModel, load_backbone

WORDS = ("the", "plan", "holds", "because", "four", "boxes", "of", "seven", "pens", "make", "28")


def make_tree(index: int, split: str) -> dict:
    """Return a line of trees.jsonl: two messages per state, and 0 to 3 visits of each leaf."""
    rng = random.Random(index)
    nodes = [{"parent": None, "N": 0, "W": 0.0}]
    leaves = [0]
    for agent in CHAIN.agents:
        parents, leaves = leaves, []
        for parent in parents * 2:
            message = " ".join(rng.choices(WORDS, k=rng.randint(2, 9)))
            leaves.append(len(nodes))
            node = {"parent": parent, "agent": agent.name, "message": message, "N": 0, "W": 0.0}
            nodes.append(node)
    for leaf in leaves:
        reward = nodes[leaf]["reward"] = rng.choice((1.0, -1.0))
        visits = rng.randint(0, 3)
        index_of_node = leaf
        while index_of_node is not None:
            node = nodes[index_of_node]
            node["N"] += visits
            node["W"] += visits * reward
            index_of_node = node["parent"]
    question = f"Question number {index} " * (index + 1)
    return {"id": f"p{index}", "split": split, "question": question, "nodes": nodes}


TREES = [make_tree(index, "train" if index < 4 else "heldout") for index in range(6)]
HELDOUT = TREES[4:]


def write_trees(folder: Path, trees: list[dict], graph: MAS) -> Path:
    """Write a folder of stage 1."""
    open_run(folder, {"graph": asdict(graph)}, device="cpu", overwrite=False)
    with open_to_append(folder / "trees.jsonl") as file:
        for tree in trees:
            append_jsonl(file, tree)
    return folder


def make_model(*, view="full", loss="huber", quantize=False, dtype="float32") -> ValueModel:
    """Return a V of the tiny agents whose LoRA and head are random, always the same."""
    backbone, tokenizer = load_backbone(TINY_AGENTS, quantize=quantize, device="cpu", dtype=dtype)
    return with_random_weights(ValueModel(add_lora(backbone, rank=2), tokenizer, CHAIN, view, loss))


def with_random_weights(model: ValueModel) -> ValueModel:
    torch.manual_seed(0)
    for parameter in model.trained_parameters().values():
        nn.init.normal_(parameter, std=0.02)
    return model


def transcripts_of(model: ValueModel, trees: list[dict]):
    return train_value.make_transcripts(trees, model, "search")


def states_of(model: ValueModel, trees: list[dict]):
    return [edge.state for edge in train_value.edges_of(transcripts_of(model, trees))]


def load(folder: Path, mas: MAS = CHAIN, *, backbone=TINY_AGENTS) -> ValueModel:
    return ValueModel.load(folder, mas, flags("--backbone", backbone), must_be_finished=True)


def flags(*argv):
    return train_value.parse_args([*map(str, argv), "--device", "cpu", "--num-threads", "1"])
