"""Tests of the house rules: imports, flags, the names in the documentation, and the sizes."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
import generate_rollouts
import search
import train_agents
import train_value
from support.flags import HERE, Parser

# Files import only upwards: from the files before them.
ORDER = [
    "runs",
    "mas",
    "answers",
    "extraction",
    "tasks",
    "packing",
    "sampling",
    "cache",
    "decoding",
    "checkpoints",
    "adapters",
    "journal",
    "policy",
    "tables",
    "pictures",
    "diagnosis",
    "report",
    "generate_rollouts",
    "value",
    "metrics",
    "compare",
    "train_value",
    "search",
    "evaluate",
    "rewards",
    "train_agents",
]
DOCUMENTS = ["README.md", "RESULTS.md", "CONTRIBUTING.md"]
FOLDERS = [HERE, HERE / "tests", HERE / "tiny"]


def test_all_files_are_there_when_mutants_are_tested():
    """mutmut copies the files that pyproject.toml names; the scripts import all of them."""
    settings = (HERE / "pyproject.toml").read_text("utf-8").partition("[tool.mutmut]")[2]
    copied = re.search(r"source_paths = \[(.*?)\]", settings, re.DOTALL)[1]
    assert re.findall(r'"(\w+)\.py"', copied) == ORDER

    also_copied = re.search(r"also_copy = \[(.*?)\]", settings, re.DOTALL)[1]
    read_by_tests = {path.name for path in HERE.iterdir() if path.suffix in (".md", ".mk", ".txt")}
    read_by_tests |= {"Makefile", "docs", "templates", "tiny"}
    assert set(re.findall(r'"([\w.-]+)"', also_copied)) == read_by_tests


# ---- Imports -------------------------------------------------------------------------------------


def python_files():
    paths = []
    for folder in FOLDERS:
        paths += sorted(folder.glob("*.py"))
    return paths


def imported_modules(path: Path) -> set[str]:
    """Return the names of all modules that a file imports, anywhere in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            modules.add(node.module)
            # `from tiny import problems` imports the module tiny.problems
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def path_of_module(name: str) -> Path:
    return HERE / (name.replace(".", "/") + ".py")


def imported_files(path: Path) -> set[Path]:
    """Return the files of this project that a file imports, directly or not."""
    files = set()
    unread = [path]
    while unread:
        for module in imported_modules(unread.pop()):
            imported = path_of_module(module)
            if imported.is_file() and imported not in files:
                files.add(imported)
                unread.append(imported)
    return files


def test_every_file_has_its_place_in_the_order():
    names = {path.stem for path in HERE.glob("*.py")}
    assert names == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_files_import_only_upwards(name):
    not_above = ORDER[ORDER.index(name) :]
    assert not imported_modules(path_of_module(name)) & set(not_above)


def test_a_script_is_imported_by_no_file_that_it_imports():
    """Python would load such a script twice: as the script, and under its own name."""
    scripts = []
    for path in python_files():
        if 'if __name__ == "__main__":' in path.read_text().splitlines():
            scripts.append(path)
            assert path not in imported_files(path), path.name
    names = {path.stem for path in scripts}
    assert {"generate_rollouts", "train_value", "search", "evaluate", "train_agents"} < names


def test_agents_answers_and_tasks_need_no_torch():
    code = "import sys, mas, answers, tasks; print('torch' in sys.modules)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "False"


# ---- Flags ---------------------------------------------------------------------------------------


def test_the_same_flag_means_the_same_in_every_script(monkeypatch):
    meanings = {}
    original_add_argument = Parser.add_argument

    def add_argument(self, *names, **options):
        action = original_add_argument(self, *names, **options)
        meaning = (str(action.type), str(action.default), str(action.choices))
        meanings.setdefault(names[0], set()).add(meaning)
        return action

    monkeypatch.setattr(Parser, "add_argument", add_argument)
    for module in (generate_rollouts, train_value, search, evaluate, train_agents):
        module.parse_args([])
    assert len(meanings) > 20
    ambiguous = {flag for flag, different in meanings.items() if len(different) > 1}
    # Stage 2 reads rollouts from a folder; stage 5 makes its own, as passes or as trees.
    assert ambiguous == {"--rollouts"}


def test_the_defaults_are_those_with_which_the_results_were_made():
    """RESULTS.md names flags only where they differ from these."""
    args = generate_rollouts.parse_args([])
    assert (args.run, args.task, args.graph, args.seed) == ("runs/tiny", "tiny", "chain", 0)
    assert (args.num_train, args.num_heldout) == (300, 45)
    assert (args.max_new_tokens, args.max_active, args.batch_tokens) == (192, 512, 131072)
    assert not args.quantize_policy and args.adapter is None and args.data is None
    args = train_value.parse_args([])
    assert (args.target, args.view, args.loss, args.label_weights) == (
        *("search", "full", "huber", "equal"),
    )
    args = train_agents.parse_args([])
    assert (args.num_steps, args.num_questions, args.num_minibatches) == (10, 64, 4)
    assert (args.policy_lr, args.lora_rank, args.train_batch_tokens) == (1e-3, 16, 2048)
    assert (args.num_dev_passes, args.dev_every) == (4, 2)


# ---- Documents -----------------------------------------------------------------------------------


def read_document(name: str) -> str:
    """Return the text of a document; RESULTS.md and CONTRIBUTING.md are optional."""
    path = HERE / name
    if name != "README.md" and not path.is_file():
        return ""
    return path.read_text()


def named_tests(text: str) -> set[str]:
    return set(re.findall(r"`(test_\w+)`", text))


def named_functions(text: str) -> set[tuple[str, str]]:
    """Return (file, name) of each `file.name` in backticks, for the files of this project."""
    named = re.findall(rf"`({'|'.join(ORDER)})\.([\w.]+)`", text)
    return {(file, name) for file, name in named if name != "py"}


def exists(file: str, name: str) -> bool:
    """Whether a module has a name, e.g. `ValueModel` or `MAS.turn`."""
    value = importlib.import_module(file)
    for part in name.split("."):
        if not hasattr(value, part):
            return False
        value = getattr(value, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_functions_and_tests_that_the_documents_name_exist(document):
    text = read_document(document)
    tests = "".join(path.read_text() for path in (HERE / "tests").glob("test_*.py"))
    for name in named_tests(text):
        assert f"def {name}(" in tests, name
    for file, name in named_functions(text):
        assert exists(file, name), f"{file}.{name}"


def test_the_readme_names_functions_and_tests():
    text = read_document("README.md")
    assert len(named_tests(text)) > 10
    assert len(named_functions(text)) > 10


# ---- Sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", python_files(), ids=lambda path: str(path.relative_to(HERE)))
def test_no_line_is_longer_than_100_columns(path):
    for number, line in enumerate(path.read_text().splitlines(), 1):
        assert len(line) <= 100, f"line {number}"


def test_the_readme_fits_an_hour():
    assert (HERE / "README.md").stat().st_size <= 15_000
