"""How often is the blamed agent the guilty one? On the embedded problems the truth is known.

    python -m experiments.blame runs/tiny     # after generate_rollouts.py and train_value.py

For each wrong final answer of the held-out trees, `blame` names the agent whose message lost the
problem. Guilty is the first agent whose message is not correct work
(`make_tiny.is_correct_work`: what a faultless agent says, and of the Planner the right pair). Wrong
answers of which nobody is guilty are counted and left out. Each problem counts the same.
"""

from collections import Counter, defaultdict
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from mas import MAS, State
from report.tables import text_table
from support.flags import InputError, Parser, cli
from support.records import read_jsonl, read_records
from support.runs import read_config
from support.statistics import bootstrap_interval
from tiny.make_tiny import is_correct_work
from tiny.problems import make_puzzle


class LostAnswer(NamedTuple):
    """A wrong final state, and the message that lost the problem.

    Attributes:
        problem_id, node: the final state, an index of its tree.
        agent: who is blamed; None if there is no drop.
        drop: how far V falls with its message.
    """

    problem_id: str
    node: int
    agent: str | None
    drop: float


def blame(edges: list[dict], *, by: str, below: str) -> list[LostAnswer]:
    """Say for each wrong final state of the trees which message lost the problem.

    It is the message with the largest drop; of equal drops, the first one.

    Args:
        edges: lines of heldout.jsonl.
        by: "V", or "y" for the labels themselves.
        below: what a message falls below. "siblings": their mean, as the other candidates in the
            same state show what could be expected there. Only visited ones have labels and count; a
            message without them has no drop. "before": the state before it; the first message falls
            below the mean of its siblings.
    """
    edge_of = {(edge["id"], edge["node"]): edge for edge in edges}
    candidates = defaultdict(list)  # state -> its labelled messages
    for edge in edges:
        candidates[edge["id"], edge["parent"]].append(edge)
    lost = []
    for edge in edges:
        is_final = (edge["id"], edge["node"]) not in candidates
        if not is_final or edge["y"] > 0:
            continue
        agent, largest_drop = None, 0.0
        for message in reversed(_path_to_root(edge, edge_of)):
            before = edge_of.get((message["id"], message["parent"]))
            if below == "siblings" or before is None:
                others = []
                for candidate in candidates[message["id"], message["parent"]]:
                    if candidate is not message:
                        others.append(candidate[by])
                expected = fmean(others) if others else message[by]
            else:
                expected = before[by]
            drop = expected - message[by]
            if drop > largest_drop:
                agent, largest_drop = message["agent"], drop
        lost.append(LostAnswer(edge["id"], edge["node"], agent, largest_drop))
    return lost


def _path_to_root(edge: dict, edge_of: dict[tuple[str, int], dict]) -> list[dict]:
    """Return the edges from this one up to the root."""
    path = []
    while edge is not None:
        path.append(edge)
        edge = edge_of.get((edge["id"], edge["parent"]))
    return path


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("run", help="run folder of the embedded agents")
    parser.add_argument(
        "--heldout-rollouts", default=None, help="as for train_value.py (default: RUN/rollouts)"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    # 1. Who is guilty of each wrong final answer.
    run = Path(args.run)
    rollouts = Path(args.heldout_rollouts or run / "rollouts")
    settings = read_config(rollouts)["settings"]
    if settings != read_config(run / "value")["settings"]["heldout_rollouts"]:
        raise InputError(f"{run} was measured on other trees than {rollouts}: --heldout-rollouts")
    mas = MAS.from_dict(settings["graph"])
    trees = read_records(rollouts / "trees.jsonl")
    heldout = read_jsonl(run / "value" / "heldout.jsonl")
    by_v = blame(heldout, by="V", below="before")
    guilty = [first_wrong_work(trees[answer.problem_id], answer.node, mas) for answer in by_v]
    counts = Counter(guilty)
    num_without = counts.pop(None, 0)
    described = ", ".join(f"{agent} {num}" for agent, num in counts.most_common())
    print(f"{counts.total()} wrong final answers; guilty: {described}; {num_without} without guilt")

    # 2. How often each kind of blame names them.
    agents = [agent.name for agent in mas.agents]
    if not counts:
        return
    most_guilty = counts.most_common(1)[0][0]
    kinds = {
        "by V, below the state before": by_v,
        "by V, below its siblings": blame(heldout, by="V", below="siblings"),
        "by labels, below the state before": blame(heldout, by="y", below="before"),
        "by labels, below its siblings": blame(heldout, by="y", below="siblings"),
        f"always the {most_guilty}": [answer._replace(agent=most_guilty) for answer in by_v],
    }
    table = [["blamed", "% guilty", "95 % interval"] + [f"{agent} found" for agent in agents]]
    table += [[name, *shares_found(lost, guilty, agents)] for name, lost in kinds.items()]
    chance = f"{100 / len(agents):.1f}"
    table.append(["chance", chance, ""] + [chance] * len(agents))
    print(text_table(table))


def first_wrong_work(tree: dict, leaf: int, mas: MAS) -> str | None:
    """Return the first agent on the path to a final state whose message is not correct work."""
    family, split, index = tree["id"].split("-")
    puzzle = make_puzzle(family, split, int(index))
    path = []
    while leaf != 0:
        path.append(tree["nodes"][leaf])
        leaf = path[-1]["parent"]
    state = State(tree["question"], ())
    for node in reversed(path):
        if not is_correct_work(puzzle, node["agent"], state, node["message"]):
            return node["agent"]
        state = mas.step(state, node["message"])
    return None


def shares_found(lost: list[LostAnswer], guilty: list[str | None], agents: list[str]) -> list[str]:
    """Return how often the blamed agent is the guilty one, its interval, and this per guilty agent.

    In percent. The first is a mean over problems, each of which counts the same.
    """
    hits_of_problem, hits_of_agent = defaultdict(list), defaultdict(list)
    for answer, agent in zip(lost, guilty, strict=True):
        if agent is not None:
            hits_of_problem[answer.problem_id].append(answer.agent == agent)
            hits_of_agent[agent].append(answer.agent == agent)
    shares = [fmean(hits) for hits in hits_of_problem.values()]
    low, high = bootstrap_interval(shares)
    cells = [f"{100 * fmean(shares):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]
    for agent in agents:
        hits = hits_of_agent[agent]
        cells.append(f"{100 * fmean(hits):.1f}" if hits else "-")
    return cells


if __name__ == "__main__":
    cli(parse_args, main)
