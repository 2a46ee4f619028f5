"""Pages for teachers and auditors, from a run folder's records. No model, no GPU, no network.

    python -m report runs/tiny                          # all stages of a run -> RUN/report.html
    python -m report tree runs/tiny packs-train-00012   # a labelled tree -> RUN/pages/*.html
    python -m report tree runs/tiny packs-test-00003 --method mcts-8x3-value   # a search of stage 4

A tree page shows every message with N, Q and V, what its agent saw, and Eq. 2 with its numbers at
every step of the search. The page of a run shows what each stage has left, warnings, and links to
the trees of instructive problems. Each page is one file that opens by double click.
"""

import base64
import itertools
import re
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from report.pictures import plot_reliability
from report.tables import labels_table, training_table, value_table
from report.warnings import agents_warnings, answer_warnings, label_warnings, value_warnings
from support.flags import InputError, Parser, cli
from support.records import parse_json, read_jsonl, read_records
from support.runs import read_config


def tree_page(record: dict, settings: dict, method: dict | None) -> str:
    """Return the page of a tree.

    Args:
        record: a line of trees.jsonl; or of an evaluation, with the fields of its tree.
        settings: of the run (config.json): graph, c_uct.
        method: name and scorer, as in records; None for a labelled tree.
    """
    tree = {key: record[key] for key in ("question", "gold", "nodes", "simulations")}
    tree["chosen"] = record.get("chosen")
    tree["c"] = settings["c_uct"]
    tree["scorer"] = method and method["scorer"]
    tree["sees"] = {agent["name"]: agent["sees"] for agent in settings["graph"]["agents"]}
    title = f"{record['id']}, {method['name'] if method else 'labelled by search'}"
    return render("tree.html", title=title, tree=tree)


def render(template: str, **values) -> str:
    """Fill a template. Texts are escaped: a message cannot become HTML."""
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
    return environment.get_template(template).render(**values)


def run_page(run: Path) -> str:
    """Return the page of a run, and write the tree pages that it links to.

    The functions of the stages return blocks (paragraphs, and tables as lists of rows), and the
    lines of warnings. Pictures in the folder of a stage are shown as well.
    """
    stages = ("rollouts", "value", "orm", "eval", "agents")
    shows = (show_labels, show_value, show_value, show_answers, show_agents)
    sections = []
    for stage, show in zip(stages, shows, strict=True):
        folder = run / stage
        if folder.is_dir():
            config = read_config(folder)
            blocks, lines = ["This stage is not finished."], []
            is_finished = config.get("finished") or (folder / "summary.json").is_file()
            if is_finished or stage == "rollouts":
                blocks, lines = show(folder, config)
            images = [path.read_bytes() for path in sorted(folder.glob("*.png"))]
            texts = [base64.b64encode(image).decode() for image in images]
            sections.append((stage, config, blocks, texts, lines))
    if not sections:
        raise InputError(f"{run}: no stage has written this folder; it is not a run")
    return render("report.html", title=f"Run {run.resolve().name}", sections=sections)


def show_labels(folder: Path, config: dict):
    trees = list(read_records(folder / "trees.jsonl").values())
    agents = [agent["name"] for agent in config["settings"]["graph"]["agents"]]
    return [labels_table(trees, agents)], label_warnings(trees)


def show_value(folder: Path, config: dict):
    epochs = read_jsonl(folder / "metrics.jsonl")
    heldout = read_jsonl(folder / "heldout.jsonl")
    blocks = []
    for epoch in epochs:
        blocks.append(f"Epoch {epoch['epoch'] + 1}: training loss {epoch['train_loss']:.4f}")
        blocks.append(value_table([epoch["heldout"]]))
    plot_reliability(heldout, list(epochs[-1]["heldout"])).savefig(folder / "reliability.png")
    return blocks, value_warnings(epochs[-1]["train_loss"], heldout, config["settings"])


def show_answers(folder: Path, config: dict):
    path = folder / "summary.json"
    summary = parse_json(path.read_bytes(), str(path))
    records = {}
    for method in summary["methods"]:
        record_of = read_records(folder / f"{method}.jsonl")
        records[method] = [record_of[problem_id] for problem_id in summary["problems"]]
    blocks = read_markdown((folder / "table.md").read_text("utf-8", errors="replace"))
    blocks += ["Instructive problems:", instructive_problems(records, folder.parent, config)]
    return blocks, answer_warnings(records, folder.parent / "value")


def show_agents(folder: Path, config: dict):
    records = read_jsonl(folder / "metrics.jsonl")
    return [training_table([(records, config["best_step"])])], agents_warnings(records)


def read_markdown(text: str) -> list[str | list[list[str]]]:
    """Return the paragraphs and the tables of table.md. A table begins with a bar."""
    blocks = []
    for block in re.split(r"\n{2,}", text.strip()):
        if block.startswith("|"):
            header, _, *rows = block.splitlines()
            cells_of_rows = [re.split(r" *(?<!\\)\| *", row)[1:-1] for row in (header, *rows)]
            block = [[cell.replace("\\|", "|") for cell in cells] for cells in cells_of_rows]
        blocks.append(block)
    return blocks


def instructive_problems(records: dict[str, list[dict]], run: Path, config: dict):
    """Return a table of problems from which something can be learnt; write the pages of its trees.

    Of the searches by V that kept their trees, these answered wrongly although their tree holds a
    right answer. Those in which V errs most come first.
    """
    missed = []  # (error of V, what happened, record)
    for record in itertools.chain(*records.values()):
        if record["tree"] is None or record["method"]["scorer"] != "value" or record["correct"]:
            continue
        nodes = record["tree"]["nodes"]
        right = [node["V"] for node in nodes if node.get("correct")]
        if right:
            chosen = nodes[record["tree"]["chosen"]]["V"]
            what = f"V of the wrong answer {chosen:+.3f}, of a right one {max(right):+.3f}"
            missed.append((chosen - max(right), what, record))
    missed.sort(key=lambda instance: -instance[0])
    table = [["problem", "method", "what happened", "answer", "gold"]]
    for _, what, record in missed[:10]:
        method = record["method"]
        page = page_path(run, record["id"], method["name"])
        write_page(page, tree_page(record | record["tree"], config["settings"], method))
        link = Markup('<a href="pages/{}">{}</a>').format(quote(page.name), record["id"])
        table.append([link, method["name"], what, record["answer"] or "none", record["gold"]])
    return table


def page_path(run: Path, problem_id: str, name: str) -> Path:
    """Return where the page of a tree lies. An id may hold a slash."""
    return run / "pages" / f"{quote(problem_id, safe='')}-{name}.html"


def write_page(path: Path, page: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    print(f"{path} ({len(page) / 1000:.0f} kB) opens in any browser")


def load_tree(run: Path, problem_id: str, method: str | None) -> tuple[dict, dict]:
    """Return a record with its tree, and the settings of its run."""
    folder = run / ("eval" if method else "rollouts")
    config = read_config(folder)
    path = folder / f"{method or 'trees'}.jsonl"
    records = read_records(path)
    kept = [name for name, record in records.items() if record.get("tree", record) is not None]
    if problem_id not in kept:
        raise InputError(f"{path} has no tree of {problem_id}, but {len(kept)} others: {kept[:3]}")
    record = records[problem_id]
    return record | record.get("tree", {}), config["settings"]


def parse_args(argv=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("page", nargs="+", metavar="RUN", help="a run, or: tree RUN ID")
    add("--method", default=None, help="with tree: the search by this method")
    add("--output", default=None, help="file of the page (of a run: in its folder)")
    return parser.parse_args(argv)


def main(args) -> None:
    if len(args.page) == 1 and args.method is None:
        run = Path(args.page[0])
        write_page(Path(args.output or run / "report.html"), run_page(run))
    elif len(args.page) == 3 and args.page[0] == "tree":
        run, problem_id = Path(args.page[1]), args.page[2]
        record, settings = load_tree(run, problem_id, args.method)
        path = Path(args.output or page_path(run, problem_id, args.method or "labels"))
        write_page(path, tree_page(record, settings, record.get("method")))
    else:
        raise InputError("give RUN, or: tree RUN ID, with or without --method METHOD")


if __name__ == "__main__":
    cli(parse_args, main)
