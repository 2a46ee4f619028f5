"""Pages for teachers and auditors, from a run folder's records. No model, no GPU, no network.

    python report.py tree runs/tiny packs-train-00012       # a labelled tree -> RUN/pages/*.html
    python report.py tree runs/tiny packs-test-00003 --method mcts-8x3-value   # a search of stage 4

A tree page shows every message with N, Q and V, what its agent saw, and Eq. 2 with its numbers at
every step of the search. It is one file that opens by double click.
"""

import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from runs import HERE, InputError, Parser, cli, read_config, read_records, without_shard

# ---- The tree page -------------------------------------------------------------------------------

LEGEND = (
    "N: visits, Q: mean value of these visits, {scorer}: {scorer_meaning}, p: geometric mean "
    "probability of the message's tokens, {terminal}: value of the final answer. Blue is above 0, "
    "orange below. ★ and a bold line mark the path to the answer, a dashed line the newest "
    "simulation; pale messages are not sampled yet at this point of the search."
)
EQUATION = (
    "Eq. 2 takes the candidate with the largest Q + c·√(ln(1+ΣN) / (1+N)), here with c = {c_uct:g}."
)
SCORER_MEANINGS = {
    "V": "the value model's estimate, from −1 to 1",
    "ORM": "the outcome model's estimate, from −1 to 1",
    "likelihood": "the policy's likelihood, scaled to −1 to 1",
    "random": "a random number",
}


def tree_page(record: dict, settings: dict, method: str | None) -> str:
    """Return the page of a tree.

    Args:
        record: a line of trees.jsonl, or of an evaluation that kept its trees. From an evaluation
            `chosen` is the node whose answer was given.
        settings: of the run (config.json): its graph, c_uct.
        method: the search's name; None for a labelled tree.
    """
    scorer = scorer_name(method)
    tree = {
        "question": record["question"],
        "gold": record["gold"],
        "summary": tree_summary(record, method),
        "nodes": record["nodes"],
        # Trees of versions before this one have no order of simulations.
        "simulations": record.get("simulations", []),
        "chosen": record.get("chosen"),
        "virtual": method is not None,
        "c_uct": settings["c_uct"],
        "scorer": scorer,
        "terminal": "reward" if method is None else "value",
        "agents": [agent["name"] for agent in settings["graph"]["agents"]],
        "sees": {agent["name"]: agent["sees"] for agent in settings["graph"]["agents"]},
    }
    title = f"{record['id']}, {'labelled by search' if method is None else method}"
    meaning = SCORER_MEANINGS[scorer]
    legend = LEGEND.format(scorer=scorer, scorer_meaning=meaning, terminal=tree["terminal"])
    return render(
        "tree.html",
        title=title,
        tree=tree,
        legend=legend,
        equation=EQUATION.format(c_uct=tree["c_uct"]),
    )


def scorer_name(method: str | None) -> str:
    """Return what V of a node is called: a search may be guided by something else."""
    names = {"outcome": "ORM", "policy": "likelihood", "random": "random"}
    for scorer, name in names.items():
        if method is not None and scorer in method.split("-"):
            return name
    return "V"


def tree_summary(record: dict, method: str | None) -> str:
    """Say in a sentence what came out of a tree."""
    num_messages = len(record["nodes"]) - 1
    num_simulations = len(record.get("simulations", []))
    if method is None:
        leaves = [node for node in record["nodes"] if "reward" in node]
        num_right = sum(node["reward"] > 0 for node in leaves)
        outcome = f"{num_right} of {len(leaves)} final answers are right"
    else:
        answer = record["nodes"][record["chosen"]].get("answer")
        outcome = "it gave no answer" if answer is None else f"it answers {answer}"
    searched = f", {num_simulations} simulations" if num_simulations else ""
    return f"{num_messages} messages{searched}; {outcome}."


def selections(record: dict, *, c_uct: float, virtual: bool) -> list[dict]:
    """Replay a search: what Eq. 2 compared at each step of each simulation, and what was taken.

    Returns per selection: simulation, node, `rows` with (child, N, Q, bound), taken (the child that
    the simulation went to), and whether it was picked by chance, as new candidates of a labelled
    tree are.

    Args:
        virtual: new children start with a virtual visit, N = 1 and W = V (searches).
    """
    nodes = record["nodes"]
    children: list[list[int]] = [[] for _ in nodes]
    for index, node in enumerate(nodes):
        if node["parent"] is not None:
            children[node["parent"]].append(index)
    visits, totals = [0] * len(nodes), [0.0] * len(nodes)
    expanded = set()
    found = []
    for simulation, leaves in enumerate(record["simulations"]):
        path = path_to(nodes, leaves[-1])
        for node, taken in zip(path, path[1:], strict=False):
            is_new = node not in expanded
            if is_new and virtual:
                for child in children[node]:
                    visits[child], totals[child] = 1, nodes[child]["V"]
            expanded.add(node)
            log_sum = math.log(1 + sum(visits[child] for child in children[node]))
            rows = []
            for child in children[node]:
                num = visits[child]
                mean = totals[child] / num if num else 0.0
                rows.append((child, num, mean, mean + c_uct * math.sqrt(log_sum / (1 + num))))
            chance = is_new and not virtual
            selection = {"simulation": simulation, "node": node, "rows": rows, "taken": taken}
            found.append(selection | {"chance": chance})
        for leaf in leaves:
            for node in path_to(nodes, leaf):
                visits[node] += 1
                totals[node] += nodes[leaf]["reward"]
    return found


def path_to(nodes: list[dict], index: int) -> list[int]:
    """Return the nodes from the root to a node."""
    path = [index]
    while nodes[path[-1]]["parent"] is not None:
        path.append(nodes[path[-1]]["parent"])
    return path[::-1]


# ---- Templates -----------------------------------------------------------------------------------


def render(template: str, **values) -> str:
    """Fill a template of templates/. Texts are escaped: a message cannot become HTML."""
    environment = Environment(
        loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(template).render(**values)


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument("what", choices=("tree",), help="which page")
    parser.add_argument("run", help="run folder")
    parser.add_argument("id", help="id of a problem")
    parser.add_argument(
        "--method", default=None, help="its search by this method, not its labelled tree"
    )
    parser.add_argument(
        "--output", default=None, help="the page's file (default: RUN/pages/ID-METHOD.html)"
    )
    return parser.parse_args(argv)


def main(args) -> None:
    run = Path(args.run)
    record, settings = load_tree(run, args.id, args.method)
    default = run / "pages" / f"{args.id}-{args.method or 'labels'}.html"
    path = Path(args.output) if args.output else default
    write_page(path, tree_page(record, settings, args.method))


def load_tree(run: Path, problem_id: str, method: str | None) -> tuple[dict, dict]:
    """Return a tree and the settings of its run.

    Raises InputError if there is none: an unknown problem or method, or trees were not kept.
    """
    folder, name = (run / "rollouts", "trees") if method is None else (run / "eval", method)
    config = read_config(folder)
    records = read_records(folder / f"{name}.jsonl")
    if method is not None and not records:
        methods = sorted({without_shard(path).stem for path in folder.glob("*.jsonl")})
        raise InputError(f"--method {method}: not in {folder}; it has {', '.join(methods)}")
    record = records.get(problem_id)
    if record is None:
        example = next(iter(records), "none")
        raise InputError(f"{problem_id}: no such problem in {folder}; one of them is {example}")
    if method is not None:
        tree = record.get("tree")
        if tree is None:
            raise InputError(
                f"{problem_id}: {method} kept no tree of it; only sbs and mcts have trees, those "
                f"of the first --num-trees problems of evaluate.py are kept"
            )
        record = record | tree
    return record, config["settings"]


def write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{path} ({len(page.encode()) / 1000:.0f} kB) opens in any browser")


if __name__ == "__main__":
    cli(parse_args, main)
