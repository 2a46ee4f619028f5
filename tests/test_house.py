"""Tests of the house: imports, names in the documents, sizes, and the variants that are shown."""

import importlib
import os
import re
import runpy
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import exit_code_of, start_in_fork

from support.flags import ROOT

SCRIPTS = ["generate_rollouts", "train_value", "search", "evaluate", "train_agents"]
FILES_OF_ROOT = {"mas", "tree", "value", *SCRIPTS}
FOLDERS = ["llm", "tasks", "report", "support"]


def files_of(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def num_lines(paths) -> int:
    return sum(len(path.read_text().splitlines()) for path in paths)


PRODUCT = {}  # name of a module, such as llm.policy -> its file
for path in [*ROOT.glob("*.py"), *files_of(*FOLDERS)]:
    PRODUCT[".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
ROOT_PATHS = [PRODUCT[name] for name in PRODUCT if "." not in name]

# ---- Imports -------------------------------------------------------------------------------------


def imports_of(name: str, indent: str = " *") -> set[str]:
    """Return the modules of the product that one imports, with a pattern of the indent."""
    imported = set()
    pattern = rf"^{indent}(?:from|import) ([\w.]+)(?: import ([\w, ]+))?"
    for module, names in re.findall(pattern, PRODUCT[name].read_text(), re.MULTILINE):
        # `from tasks import problems` imports tasks.problems
        imported |= {module, *[f"{module}.{part}" for part in names.split(", ")]}
    return imported & PRODUCT.keys()


def test_the_root_shows_the_method_and_folders_import_only_mas_and_tree_from_it():
    assert {path.stem for path in ROOT_PATHS} == FILES_OF_ROOT
    for name in PRODUCT:
        if name in FILES_OF_ROOT:
            drawing = [other for other in imports_of(name, indent="") if "report." in other]
            assert not drawing, f"{name} imports {drawing} at load"
        else:
            from_root = imports_of(name) & FILES_OF_ROOT
            assert from_root <= {"mas", "tree"}, f"{name} imports {from_root}"


def test_neither_files_nor_folders_import_each_other_in_circles():
    """A script that a file imports which it imports would be loaded twice, under two names."""
    arrows = {name: imports_of(name) - {name} for name in PRODUCT}
    TopologicalSorter(arrows).prepare()  # which refuses circles
    folders = {folder: set() for folder in FOLDERS}
    for name in PRODUCT.keys() - FILES_OF_ROOT:
        folder = name.partition(".")[0]
        folders[folder] |= {other.partition(".")[0] for other in arrows[name]} - {folder}
    TopologicalSorter(folders).prepare()


# ---- Documents -----------------------------------------------------------------------------------


@pytest.mark.parametrize("document, at_least", [("README.md", 10), ("CONTRIBUTING.md", 0)])
def test_functions_and_tests_that_the_documents_name_exist(document, at_least):
    text = (ROOT / document).read_text()
    tests = "".join(path.read_text() for path in files_of("tests"))
    named_tests = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in named_tests if f"def {name}(" not in tests} == set()

    modules = "|".join(sorted(map(re.escape, PRODUCT), key=len, reverse=True))
    named = set(re.findall(rf"`({modules})\.(?!py\b)([\w.]+)`", text.replace("/", ".")))
    for module, name in named:
        value = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    assert min(len(named_tests), len(named)) >= at_least


SMALL = ["--num-train", "4", "--num-heldout", "2", "--num-simulations", "3"]
SMALL += ["--num-candidates", "2"]


def run_in(house: Path, script: str, *flags: str) -> None:
    def load_and_run():
        os.chdir(house)
        for name in list(sys.modules):
            if name in PRODUCT or name in FOLDERS or name.startswith("tiny"):
                del sys.modules[name]
        sys.path.insert(0, str(house))
        sys.argv = [script, *flags, "--device", "cpu", "--num-threads", "1"]
        runpy.run_path(script, run_name="__main__")

    child = start_in_fork(load_and_run, output=house / "output.txt")
    assert exit_code_of(child) == 0, (house / "output.txt").read_text()


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> Path:
    """A copy of this house, with labels and V in runs/tiny."""
    house = tmp_path_factory.mktemp("house") / "copy"
    for folder in (*FOLDERS, "tiny"):
        shutil.copytree(ROOT / folder, house / folder)
    for path in ROOT_PATHS:
        shutil.copy(path, house)
    run_in(house, "generate_rollouts.py", *SMALL)
    run_in(house, "train_value.py", "--epochs", "1", "--lora-rank", "4")
    return house


def variants() -> list[tuple[str, str]]:
    """Return (command, diff) of the variants that CONTRIBUTING.md shows."""
    pattern = r"`python ([^`\n]+)`[^`\n]*\n+```diff\n(.*?)```"
    return re.findall(pattern, (ROOT / "CONTRIBUTING.md").read_text(), re.DOTALL)


def test_three_variants_are_shown():
    assert len(variants()) >= 3


FURTHER_FLAGS = {
    "generate_rollouts.py": SMALL,
    "train_value.py": ["--rollouts", "runs/tiny/rollouts", "--epochs", "1", "--lora-rank", "4"],
    "evaluate.py": ["--value", "runs/tiny/value", "--num-problems", "2"],
}


@pytest.mark.parametrize("command, diff", variants(), ids=[command for command, _ in variants()])
def test_a_variant_changes_one_file_of_the_root_in_few_lines_and_runs(
    house, tmp_path, command, diff
):
    [changed] = set(re.findall(r"^\+\+\+ b/(\S+)", diff, re.MULTILINE))
    assert changed.removesuffix(".py") in FILES_OF_ROOT
    assert len(re.findall(r"^[+-](?!\+\+ |-- )", diff, re.MULTILINE)) <= 40
    copy = shutil.copytree(house, tmp_path / "copy")
    subprocess.run(["git", "apply", "-"], input=diff, text=True, cwd=copy, check=True)
    script, *flags = command.split()
    run_in(copy, script, *flags, *FURTHER_FLAGS[script], "--run", "runs/variant")


# ---- Sizes ---------------------------------------------------------------------------------------


def test_the_house_stays_small():
    product = num_lines(PRODUCT.values())
    assert num_lines(ROOT_PATHS) <= 3000 and product <= 6900
    assert num_lines(files_of("tests")) <= min(6900, product)
    assert num_lines(files_of("tiny")) <= 1000 and num_lines(files_of("experiments")) <= 1200
    assert (ROOT / "README.md").stat().st_size <= 13_000
    assert (ROOT / "docs" / "results.md").stat().st_size <= 35_000
