"""Pages for teachers and auditors, from a run folder's records. No model, no GPU, no network.

    python report.py runs/tiny                          # all stages of a run -> RUN/report.html
    python report.py tree runs/tiny packs-train-00012   # a labelled tree -> RUN/pages/*.html
    python report.py tree runs/tiny packs-test-00003 --method mcts-8x3-value   # a search of stage 4

A tree page shows every message with N, Q and V, what its agent saw, and Eq. 2 with its numbers at
every step of the search. The report of a run shows labels, V, answers and finetuned agents, which
signatures of failure they have (diagnosis.py), and links to the trees of instructive problems. Each
page is one file that opens by double click.
"""

import base64
import io
import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from report.diagnosis import (
    Signature,
    agents_signatures,
    answer_signatures,
    blame,
    evidence,
    label_signatures,
    value_signatures,
)
from report.pictures import (
    plot_accuracy,
    plot_epochs,
    plot_reliability,
    plot_targets,
    plot_training,
)
from report.tables import (
    METHODS_NOTE,
    Table,
    breakdown_table,
    comparisons_table,
    edges_of_agents,
    heldout_table,
    labels_table,
    methods_table,
    targets_of,
)
from support.flags import ROOT, InputError, Parser, cli
from support.records import read_finished_lines, read_records, record_names
from support.runs import read_config

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


# ---- The report of a run -------------------------------------------------------------------------


class Picture(NamedTuple):
    """A PNG inside a page."""

    description: str
    source: str  # a data: URL


class Section(NamedTuple):
    """A part of the report: a stage, or the instructive problems.

    Attributes:
        provenance: command, commit, time and device; "" if it has no config.json of its own.
        tables: each with its caption.
    """

    title: str
    provenance: str
    notes: list[str]
    tables: list[tuple[str, Table]]
    pictures: list[Picture]


class Link(NamedTuple):
    """A cell of a table that leads to a page."""

    text: str
    target: str


def run_page(run: Path) -> str:
    """Return the report of a run, and write the tree pages that it links to.

    Raises InputError if no stage has left anything to show.
    """
    evaluation = load_evaluation(run / "eval")
    sections, missing = [], []
    signatures: list[tuple[str, Signature]] = []  # with the title of their section
    for name, make_section in (
        ("rollouts", labels_section),
        ("value", value_section),
        ("orm", value_section),
        ("eval", partial(answers_section, evaluation=evaluation)),
        ("agents", agents_section),
    ):
        if (run / name).is_dir():
            section, found = make_section(run / name)
            sections.append(section)
            signatures += [(section.title, signature) for signature in found]
        else:
            missing.append(name)
    if not sections:
        raise InputError(f"{run}: none of {', '.join(missing)} is in it; it is not a run")
    if (run / "eval").is_dir():
        sections.append(instructive_section(run, evaluation))
    triggered, silent, unmeasured = [], [], []
    for title, signature in signatures:
        if signature.is_triggered:
            triggered.append((title, signature))
        elif signature.number is not None:
            silent.append((title, signature))
        else:
            unmeasured.append((title, signature))
    return render(
        "report.html",
        title=f"Run {run.resolve().name}",
        sections=sections,
        triggered=triggered,
        silent=silent,
        unmeasured=unmeasured,
        evidence=evidence,
        missing=missing,
    )


def picture(description: str, plot, *arguments, **options) -> Picture:
    """Draw into memory. plot: a function of pictures.py; its file is added to the arguments."""
    file = io.BytesIO()
    plot(*arguments, file, **options)
    encoded = base64.b64encode(file.getvalue()).decode()
    return Picture(description, f"data:image/png;base64,{encoded}")


def provenance(config: dict) -> str:
    """Say which command has made a stage, and when. config: its config.json."""
    commit, *dirty = (config["commit"] or "unknown").split("-")
    parts = [config["command"], "-".join([f"commit {commit[:7]}", *dirty])]
    parts += [f"started {config['started']}", config["device"]]
    return ", ".join(parts)


def labels_section(folder: Path) -> tuple[Section, list[Signature]]:
    """Show the labels of stage 1, per agent."""
    config = read_config(folder)
    trees = list(read_records(folder / "trees.jsonl").values())
    names = [agent["name"] for agent in config["settings"]["graph"]["agents"]]
    labelled = {}
    for agent, edges in edges_of_agents(trees, names).items():
        targets = targets_of(edges)
        if targets:
            labelled[agent] = targets
    pictures = []
    if labelled:
        pictures.append(picture("Distribution of the targets", plot_targets, labelled))
    section = Section(
        title="Labels",
        provenance=provenance(config),
        notes=[f"{len(trees)} trees."],
        tables=[("Labels per agent", labels_table(trees, names))],
        pictures=pictures,
    )
    num_candidates = config["settings"]["num_candidates"]
    return section, label_signatures(trees, names, num_candidates)


BLAME_NOTE = (
    "A wrong answer of the held-out trees is lost by the message with the largest drop: below the "
    "state before it, or below the mean of its visited siblings."
)


def value_section(folder: Path) -> tuple[Section, list[Signature]]:
    """Show how V, or the ORM, has learnt, and how it reads held-out states."""
    name = "V" if folder.name == "value" else "ORM"
    config = read_config(folder)
    names = [agent["name"] for agent in config["settings"]["graph"]["agents"]]
    epochs = read_finished_lines(folder / "metrics.jsonl")
    heldout = read_finished_lines(folder / "heldout.jsonl")
    notes, tables, pictures, signatures = [], [], [], []
    if not config.get("finished"):
        notes.append("Its training is not finished.")
    if epochs:
        tables.append(("Held-out labels", heldout_table(epochs[-1]["heldout"])))
        pictures.append(picture(f"{name}, epoch by epoch", plot_epochs, epochs))
    if heldout and epochs:
        edges_of_agent = {agent: [] for agent in names}
        for edge in heldout:
            edges_of_agent[edge["agent"]].append(edge)
        edges_of_agent = {agent: edges for agent, edges in edges_of_agent.items() if edges}
        pictures.append(
            picture(f"{name} against held-out labels", plot_reliability, edges_of_agent)
        )
        signatures = value_signatures(epochs[-1]["train_loss"], heldout, config["settings"])
        if folder.name == "value":
            tables.append(("Which message lost the wrong answers", blame_table(heldout, names)))
            notes.append(BLAME_NOTE)
    elif epochs:
        notes.append(
            "No reliability, blame or signatures: train_value.py of that version kept no held-out "
            "values (heldout.jsonl); train again with --overwrite."
        )
    section = Section(name, provenance(config), notes, tables, pictures)
    return section, signatures


def blame_table(heldout: list[dict], agents: list[str]) -> Table:
    """Return how many answers each agent's message lost, by V and by the labels."""
    header = ["lost by"]
    rows = [[agent] for agent in [*agents, "nobody"]]
    for by, by_text in (("V", "V"), ("y", "labels")):
        for below, below_text in (("before", "state before"), ("siblings", "siblings")):
            header.append(f"by {by_text}, below {below_text}")
            lost = blame(heldout, by=by, below=below)
            counts = Counter(answer.agent or "nobody" for answer in lost)
            for row in rows:
                row.append(str(counts[row[0]]))
    return Table(header, rows)


class Evaluation(NamedTuple):
    """What stage 4 has left: summary.json, and method -> the records of its problems, in order."""

    summary: dict
    records: dict[str, list[dict]]


def load_evaluation(folder: Path) -> Evaluation | None:
    """Load an evaluation; None if there is none, or if it is not finished.

    A folder can hold more than its summary: other methods, and more problems than the last command
    asked for.
    """
    path = folder / "summary.json"
    if not path.is_file():
        return None
    summary = json.loads(path.read_text("utf-8"))
    record_of = {}
    for method in summary["methods"]:
        record_of[method] = read_records(folder / f"{method}.jsonl")
    ids = summary.get("problems")
    if ids is None:  # of an older version
        ids = list(next(iter(record_of.values())))
    records = {}
    for method, record_of_id in record_of.items():
        records[method] = [record_of_id[name] for name in ids if name in record_of_id]
    return Evaluation(summary, records)


MAX_GROUPS = 20  # a table by subject with more rows shows nothing


def answers_section(
    folder: Path, *, evaluation: Evaluation | None
) -> tuple[Section, list[Signature]]:
    """Show how often the methods are right, and what they cost."""
    config = read_config(folder)
    if evaluation is None:
        notes = ["The evaluation is not finished: no summary.json. Run evaluate.py again."]
        return Section("Answers", provenance(config), notes, [], []), []
    summary, records = evaluation
    tables = [("Methods", methods_table(summary))]
    tables.append(("Comparisons on the same problems", comparisons_table(summary)))
    for key in ("subject", "level"):
        groups = {str(record[key]) for record in next(iter(records.values()))}
        if 1 < len(groups) <= MAX_GROUPS:
            tables.append((f"EM % by {key}", breakdown_table(records, key)))
    pictures = []
    for cost in ("agent calls", "tokens"):
        pictures.append(picture(f"Exact match against {cost}", plot_accuracy, summary, cost=cost))
    section = Section("Answers", provenance(config), [METHODS_NOTE], tables, pictures)
    return section, answer_signatures(records, summary["comparisons"])


def agents_section(folder: Path) -> tuple[Section, list[Signature]]:
    """Show what training has done to the agents (stage 5)."""
    config = read_config(folder)
    records = read_finished_lines(folder / "metrics.jsonl")
    if not config.get("finished"):
        notes = ["Their training is not finished."]
        return Section("Finetuned agents", provenance(config), notes, [], []), []
    best_step = config["best_step"]
    learning = picture("How the agents learnt", plot_training, records, best_step)
    section = Section("Finetuned agents", provenance(config), [], [], [learning])
    return section, agents_signatures(records, best_step)


# ---- Instructive problems ------------------------------------------------------------------------

NUM_INSTRUCTIVE = 10
NO_TREES = (
    "No search guided by V has kept its trees with the verdicts on their answers: evaluate.py "
    "keeps those of the first --num-trees problems; older versions kept no verdicts."
)


class Instance(NamedTuple):
    """A problem from which something can be learnt.

    Attributes:
        why: what happened.
        strength: a number by which problems of the same kind are ranked, the largest first.
    """

    method: str
    record: dict
    why: str
    strength: float


def instructive_section(run: Path, evaluation: Evaluation | None) -> Section:
    """Link to the trees of the most instructive problems, whose pages are written."""
    title = "Instructive problems"
    if evaluation is None:
        return Section(title, "", ["The evaluation is not finished."], [], [])
    if not searches_by_value(evaluation.records):
        return Section(title, "", [NO_TREES], [], [])
    instances = choose_instances(evaluation.records)
    if not instances:
        return Section(title, "", ["None: no search by V missed a right answer."], [], [])
    settings = read_config(run / "eval")["settings"]
    rows = []
    for instance in instances:
        record, method = instance.record, instance.method
        page = default_page(run, record["id"], method)
        save_page(page, tree_page(record | record["tree"], settings, method))
        link = Link(record["id"], quote(page.relative_to(run).as_posix()))
        answer = record["answer"] or "none"
        rows.append([link, method, instance.why, answer, record["gold"], values_on_path(record)])
    header = ["problem", "method", "what happened", "answer", "gold"]
    header += ["V from message to message"]
    caption = "What can be learnt from them is on the page of each tree"
    return Section(title, "", [], [(caption, Table(header, rows))], [])


def values_on_path(record: dict) -> str:
    """Return V after each message of the answer: "Reader -0.41, Planner +0.87"."""
    parts = []
    for turn in record["transcript"]:
        if turn["V"] is not None:
            parts.append(f"{turn['agent']} {turn['V']:+.2f}")
    return ", ".join(parts)


def choose_instances(records: dict[str, list[dict]]) -> list[Instance]:
    """Return the most instructive problems, of each kind in turn, each problem once.

    records: method -> its records. Only searches guided by V that kept their trees are considered.
    """
    kinds = [missed_answers(records), disagreements(records), lost_to_vote(records)]
    for instances in kinds:
        instances.sort(key=lambda instance: -instance.strength)
    chosen: dict[str, Instance] = {}
    while any(kinds) and len(chosen) < NUM_INSTRUCTIVE:
        for instances in kinds:
            while instances and instances[0].record["id"] in chosen:
                instances.pop(0)
            if instances and len(chosen) < NUM_INSTRUCTIVE:
                instance = instances.pop(0)
                chosen[instance.record["id"]] = instance
    return list(chosen.values())


def searches_by_value(records: dict[str, list[dict]]) -> list[tuple[str, dict]]:
    """Return (method, record) of each search guided by V whose tree was kept with its verdicts."""
    searches = []
    for method, records_of_method in records.items():
        if "-value" not in method:
            continue
        for record in records_of_method:
            tree = record.get("tree")
            if tree is not None and any("correct" in node for node in tree["nodes"]):
                searches.append((method, record))
    return searches


def missed_answers(records: dict[str, list[dict]]) -> list[Instance]:
    """Return the searches that answered wrongly although their tree holds a right answer."""
    instances = []
    for method, record in searches_by_value(records):
        nodes = record["tree"]["nodes"]
        right = [node["V"] for node in nodes if node.get("correct")]
        if record["correct"] or not right:
            continue
        chosen = nodes[record["tree"]["chosen"]]["V"]
        if chosen > max(right):
            why = f"V prefers a wrong answer ({chosen:+.2f}) to a right one ({max(right):+.2f})"
        else:  # MCTS decides by Q
            why = f"V of the wrong answer is {chosen:+.2f}, of a right one {max(right):+.2f}"
        instances.append(Instance(method, record, why, chosen - max(right)))
    return instances


def disagreements(records: dict[str, list[dict]]) -> list[Instance]:
    """Return the searches with ORM, each with the final state on which V and ORM differ most."""
    instances = []
    for method, record in searches_by_value(records):
        both = [node for node in record["tree"]["nodes"] if "outcome" in node]
        if not both:
            continue
        node = max(both, key=lambda node: abs(node["V"] - node["outcome"]))
        verdict = "right" if node["correct"] else "wrong"
        why = f"V {node['V']:+.2f}, ORM {node['outcome']:+.2f} of a {verdict} answer"
        instances.append(Instance(method, record, why, abs(node["V"] - node["outcome"])))
    return instances


def lost_to_vote(records: dict[str, list[dict]]) -> list[Instance]:
    """Return the searches that answered wrongly where a vote was right."""
    instances = []
    votes = [method for method in records if method.startswith("vote-")]
    for vote in votes:
        right = {record["id"] for record in records[vote] if record["correct"]}
        for method, record in searches_by_value(records):
            if record["correct"] or record["id"] not in right:
                continue
            chosen = record["tree"]["nodes"][record["tree"]["chosen"]]["V"]
            why = f"{vote} is right; V of the search's wrong answer is {chosen:+.2f}"
            instances.append(Instance(method, record, why, chosen))
    return instances


# ---- Templates -----------------------------------------------------------------------------------


def render(template: str, **values) -> str:
    """Fill a template of templates/. Texts are escaped: a message cannot become HTML."""
    environment = Environment(
        loader=FileSystemLoader(ROOT / "report" / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
    )
    return environment.get_template(template).render(**values)


# ---- The script ----------------------------------------------------------------------------------


def parse_args(argv=None):
    parser = Parser(__doc__)
    parser.add_argument(
        "page",
        nargs="+",
        metavar="RUN",
        help="RUN for its report, or: tree RUN ID, ID of a problem",
    )
    parser.add_argument(
        "--method", default=None, help="with tree: its search by this method, not its labelled tree"
    )
    parser.add_argument(
        "--output",
        default=None,
        help="the page's file (default: RUN/report.html, RUN/pages/ID-METHOD.html)",
    )
    return parser.parse_args(argv)


def main(args) -> None:
    if len(args.page) == 1:
        if args.method is not None:
            raise InputError("--method is for a tree: report.py tree RUN ID --method METHOD")
        run = Path(args.page[0])
        # Its links to tree pages start at the run folder.
        if args.output and Path(args.output).resolve().parent != run.resolve():
            raise InputError(f"--output {args.output}: a report has to lie in {run}")
        path = Path(args.output) if args.output else run / "report.html"
        page = run_page(run)
    elif len(args.page) == 3 and args.page[0] == "tree":
        run, problem_id = Path(args.page[1]), args.page[2]
        record, settings = load_tree(run, problem_id, args.method)
        path = Path(args.output) if args.output else default_page(run, problem_id, args.method)
        page = tree_page(record, settings, args.method)
    else:
        raise InputError(f"{' '.join(args.page)}: give RUN for its report, or tree RUN ID")
    write_page(path, page)


def load_tree(run: Path, problem_id: str, method: str | None) -> tuple[dict, dict]:
    """Return a tree and the settings of its run.

    Raises InputError if there is none: an unknown problem or method, or trees were not kept.
    """
    folder, name = (run / "rollouts", "trees") if method is None else (run / "eval", method)
    config = read_config(folder)
    records = read_records(folder / f"{name}.jsonl")
    if method is not None and not records:
        methods = sorted(record_names(folder))
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


def default_page(run: Path, problem_id: str, method: str | None) -> Path:
    """Return where the page of a tree lies, unless the user says otherwise."""
    name = f"{quote(problem_id, safe='')}-{method or 'labels'}.html"  # an id may hold a slash
    return run / "pages" / name


def save_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def write_page(path: Path, page: str) -> None:
    """Save a page, and tell the user."""
    save_page(path, page)
    print(f"{path} ({len(page.encode()) / 1000:.0f} kB) opens in any browser")


if __name__ == "__main__":
    cli(parse_args, main)
