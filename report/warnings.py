"""Five warnings, from plain records. Stages 1, 2, 4 and 5 print them, the page of a run shows them.

Each function returns lines, none if all is well.
"""

import itertools
import math
from pathlib import Path
from statistics import fmean, pvariance

from support.records import read_jsonl
from support.statistics import bootstrap_interval, problem_aucs


def _unless(is_fine: bool, trouble: str, remedy: str) -> list[str]:
    return [] if is_fine else [f"! {trouble}", f"  {remedy}"]


def _cut_warning(num_cut: int, num_messages: int) -> list[str]:
    trouble = f"{num_cut} of {num_messages} messages are cut at their limit."
    return _unless(
        num_cut <= 0.05 * num_messages,
        trouble,
        "Raise --max-new-tokens, or take a model with a longer context.",
    )


def label_warnings(trees: list[dict]) -> list[str]:
    """Warn if the messages of labelled trees are cut. trees: lines of trees.jsonl."""
    messages = [node for tree in trees for node in tree["nodes"][1:]]
    return _cut_warning(sum(node["truncated"] for node in messages), len(messages))


def agents_warnings(records: list[dict]) -> list[str]:
    """Warn if the messages that agents are trained on are cut. records: stage 5's metrics.jsonl."""
    num_cut = sum(record["cut"] for record in records if record["step"] > 0)
    return _cut_warning(num_cut, records[-1]["messages"])


def value_warnings(train_loss: float, heldout: list[dict], settings: dict) -> list[str]:
    """Warn if V, or the ORM, fits its training problems only.

    That is if it explains less than half of the variance of held-out labels, at a loss of more than
    twice that of training. Only regression losses can be compared.

    Args:
        train_loss: mean loss of the last epoch.
        heldout: lines of heldout.jsonl.
        settings: of the training: target, loss, huber_delta.
    """
    if settings["loss"] not in ("huber", "mse") or not heldout:
        return []
    errors = [abs(edge["V"] - edge["y"]) for edge in heldout]
    losses = [error**2 for error in errors]
    is_explained = fmean(losses) <= 0.5 * pvariance(edge["y"] for edge in heldout)
    if settings["loss"] == "huber":
        delta = settings["huber_delta"]
        losses = [min(error, delta) * (error - min(error, delta) / 2) for error in errors]
    model = "V" if settings["target"] == "search" else "The ORM"
    return _unless(
        is_explained or fmean(losses) <= 2 * train_loss,
        f"{model} fits training problems only: loss {train_loss:.3f}, else {fmean(losses):.3f}.",
        "Label more problems (--num-train), or train less (--epochs, --lora-rank).",
    )


def answer_warnings(records: dict[str, list[dict]], value_folder: Path) -> list[str]:
    """Return the warnings about an evaluation.

    Args:
        records: method -> its records, with their trees if they were kept.
        value_folder: of V, if it was used; stage 2 has recorded its AUC on held-out problems there.
    """
    # 1. What the records hold.
    num_messages, num_cut = 0, 0
    num_reached, num_possible = 0, 0  # final states of MCTS by V or the ORM
    num_scored, num_different = 0, 0  # final states that V and the ORM have scored
    ids, targets, values = [], [], []  # of the final states of searches by V
    for record in itertools.chain(*records.values()):
        num_messages += record["agent_calls"]
        num_cut += sum(record["truncated"].values())
        if record["tree"] is None:
            continue
        method = record["method"]
        if method["algorithm"] == "mcts" and method["scorer"] in ("value", "orm"):
            ends = [leaves[-1] for leaves in record["tree"]["simulations"]]
            num_reached += len(set(ends))
            num_possible += min(len(ends), math.prod(method["num_candidates"]))
        for node in record["tree"]["nodes"]:
            if "orm" in node:
                num_scored += 1
                num_different += (node["orm"] > 0) != (node["V"] > 0)
            if "correct" in node and method["scorer"] == "value":
                agent = node["agent"]  # the last one
                ids.append(record["id"])
                targets.append(1 if node["correct"] else -1)
                values.append(node["V"])

    # 2. What of it means trouble.
    lines = _unless(
        num_reached >= 0.2 * num_possible,
        f"MCTS ended in {num_reached} distinct final states, of {num_possible} possible ones.",
        "Raise --c-uct, or give fewer simulations.",
    )
    lines += _unless(
        num_different <= 0.2 * num_scored,
        f"V and the ORM disagree on {num_different} of {num_scored} final states.",
        "Find out which one is wrong before you mix them (--lam).",
    )
    aucs = problem_aucs(ids, targets, values)
    if len(aucs) >= 10 and (value_folder / "metrics.jsonl").is_file():
        auc = read_jsonl(value_folder / "metrics.jsonl")[-1]["heldout"][agent]["auc"]
        lines += _unless(
            auc is None or bootstrap_interval(aucs)[1] >= auc - 0.05,
            f"V ranks answers worse here: its AUC is {fmean(aucs):.2f}, held-out {auc}.",
            "Label problems like these, with these agents, and train V on them.",
        )
    return lines + _cut_warning(num_cut, num_messages)
