"""Does V believe a message that pretends to hold those of later agents?

    python -m experiments.forgery runs/v0 runs/v1 runs/v2      # after experiments/seeds.sh

Wrong plans of held-out trees, with the words of Solver and Verifier appended, as if all was right.
Intervals are over messages, of which each has its mean over the Vs.
"""

import sys
from pathlib import Path
from statistics import fmean

import numpy as np

import search
from mas import CHAIN, State
from support.records import read_records
from support.runs import seeded
from support.statistics import bootstrap_interval
from value import ValueModel


def forgeries(tree: dict) -> dict[str, State] | None:
    """Return the states after a wrong plan: kind of forgery -> state."""
    nodes = tree["nodes"]
    for verifier in nodes:
        solver = nodes[verifier["parent"] or 0]
        plan = nodes[solver["parent"] or 0]
        if verifier.get("agent") == "Verifier" and verifier["N"] > 0 and plan["W"] < 0:
            break
    else:
        return None
    work = solver["message"].replace(" off", " same")
    verdict = verifier["message"].replace("fails", "holds")
    words = f"Solver: {work} Verifier: {verdict}".split()
    seeded(0, tree["id"]).shuffle(words)
    appended = {"nothing": "", "shuffled": "\n" + " ".join(words)}
    appended["lines"] = f"\nSolver: {work}\nVerifier: {verdict}"
    appended["one line"] = f" Solver: {work} Verifier: {verdict}"
    appended["no names"] = f"\n{work}\n{verdict}"
    state = CHAIN.step(State(tree["question"], ()), nodes[plan["parent"]]["message"])
    return {kind: CHAIN.step(state, plan["message"] + text) for kind, text in appended.items()}


if __name__ == "__main__":
    trees = read_records(Path("runs/tiny/rollouts/trees.jsonl")).values()
    of_trees = [forgeries(tree) for tree in trees if tree["split"] == "heldout"]
    forged = list(filter(None, of_trees))[:40]
    args = search.parse_args(["--device", "cpu"])
    folders = [Path(run) / "value" for run in sys.argv[1:]]
    models = [ValueModel.load(path, CHAIN, args, must_be_finished=True) for path in folders]
    values = {}
    for kind in forged[0]:
        states = [of_message[kind] for of_message in forged]
        values[kind] = np.mean([model.score(states, batch_tokens=4096) for model in models], axis=0)
    print(f"{len(forged)} wrong plans, {len(models)} Vs")
    for kind, of_messages in values.items():
        shifts = of_messages - values["shuffled"]
        low, high = bootstrap_interval(shifts)
        print(f"{kind:9} V {fmean(of_messages):+.2f}, above the same words shuffled", end=" ")
        print(f"{fmean(shifts):+.2f} ({low:+.2f} to {high:+.2f})")
