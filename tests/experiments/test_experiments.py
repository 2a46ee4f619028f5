"""Tests of the experiments: their commands have flags that exist and go together."""

import importlib
import os
import re
import subprocess

import pytest

import search
from mas import load_graph
from support.flags import ROOT


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    """[(program, flags)] that the experiments and the README run, by a Python that runs nothing."""
    folder = tmp_path_factory.mktemp("commands")
    python = folder / "python"
    python.write_text(f"""#!/bin/sh\nprintf '%s\\0' "$@" >> {folder}/log; echo >> {folder}/log\n""")
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "PATH": f"{folder}:{os.environ['PATH']}"}
    environment.pop("SEEDS", None)
    for script in sorted(ROOT.glob("experiments/*.sh")):
        subprocess.run([script], env=environment, check=True)
    readme = (ROOT / "README.md").read_text()
    for block in re.findall(r"^```\w*\n((?:[A-Z]+=.*\n)*python .*?)^```", readme, re.M | re.S):
        subprocess.run(["bash", "-euc", block], env=environment, check=True)
    commands = []
    for line in (folder / "log").read_text().splitlines():
        program, *flags = line.removeprefix("-m\0").split("\0")[:-1]
        commands.append((program, flags))
    return commands


def test_flags_of_the_experiments_exist_and_methods_have_names_that_parse(commands):
    assert len(commands) > 200
    for program, flags in commands:
        module = "report.__main__" if program == "report" else program.removesuffix(".py")
        args = importlib.import_module(module).parse_args(flags)
        for name in getattr(args, "methods", None) or []:
            mas = load_graph(args.graph)
            search.parse_method(name, mas, num_candidates=args.num_candidates, lam=args.lam)


def test_runs_of_a_seed_have_it(commands):
    """Else the noise of training that is reported would be none."""
    num_checked = 0
    for program, flags in commands:
        run = flags[flags.index("--run") + 1] if "--run" in flags else ""
        seed = re.search(r"(?:/v|-)(\d)$", run)
        # Vs of several seeds are compared with the same agents, so these have the same seed.
        if seed and (program != "evaluate.py" or run.startswith("runs/5/")):
            # The rounds of a loop put a digit in front, so that each draws its own questions.
            assert flags[flags.index("--seed") + 1].endswith(seed[1]), (program, run)
            num_checked += 1
    assert num_checked > 150
