"""Pieces that several tests use: graphs, the tiny agents, scripts and processes."""

import json
import os
import shutil
import signal
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from threading import RLock

import pytest
import torch
from tqdm import tqdm

import generate_rollouts
from llm.policy import Policy, make_policy
from mas import CHAIN, MAS, Agent
from support.flags import TINY_AGENTS, cli
from support.progress import Progress

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # a fork can hang if there are further threads

# `make test` hands out whole files. These take longest and begin first.
LONGEST_FILES = ["test_pipeline.py", "test_train_value.py", "test_train_agents.py"]


def pytest_collection_modifyitems(items) -> None:
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


# ---- Graphs --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def chain() -> MAS:
    return CHAIN


@pytest.fixture(scope="session")
def duo() -> MAS:
    """Two agents: small enough to work out trees by hand."""
    first = Agent("A", sees=("Q",), prompt="You are A.", max_new_tokens=16)
    second = Agent("B", sees=("Q", "A"), prompt="You are B.", max_new_tokens=16)
    return MAS("duo", (first, second))


# ---- The tiny agents -----------------------------------------------------------------------------


def make_tiny_policy(mas: MAS, **flags) -> Policy:
    """Load a policy as the scripts do, on the CPU, with messages of at most 128 tokens.

    flags: those that differ from their defaults, e.g. `batch_tokens=700`; None for a switch.
    """
    argv = ["--device", "cpu", "--num-threads", "1"]
    for name, value in ({"max_new_tokens": 128} | flags).items():
        argv.append("--" + name.replace("_", "-"))
        if value is not None:
            argv.append(str(value))
    args = generate_rollouts.parse_args(argv)
    return make_policy(args, mas, progress=Progress(shown=False))


@pytest.fixture(scope="session")
def policy(chain) -> Policy:
    return make_tiny_policy(chain)


@pytest.fixture
def copied_agents(tmp_path) -> Path:
    """A copy of the tiny agents, for tests that change it."""
    return shutil.copytree(TINY_AGENTS, tmp_path / "agents")


# ---- Running a script in this process ------------------------------------------------------------


def script_argv(argv) -> list[str]:
    # One thread: a fork can hang after torch has started more.
    return ["--device", "cpu", "--num-threads", "1", *map(str, argv)]


def output_of(module, *argv, code: int = 0) -> str:
    """Run a script in this process, which must end with this code. Returns what it has printed.

    Of a script that succeeds, what it has written to stdout, else what to stderr.
    """
    parse_args = partial(module.parse_args, script_argv(argv))
    out, err = StringIO(), StringIO()
    ended_with = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            cli(parse_args, module.main)
        except SystemExit as stop:
            ended_with = stop.code
    assert ended_with == code, err.getvalue()
    return err.getvalue() if code else out.getvalue()


def error_of(module, *argv) -> str:
    """Run a script that must refuse its input: one line, exit code 2. Returns the line."""
    [line] = [line for line in output_of(module, *argv, code=2).splitlines() if "error:" in line]
    return line


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- Other processes -----------------------------------------------------------------------------


def become_process(monkeypatch, rank: int, world_size: int) -> None:
    """Set the environment as a launcher does."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(world_size))


def start_in_fork(function, output: Path | str = os.devnull) -> int:
    """Call a function in a forked child, which prints to a file. Returns its process id.

    A fork has imported all libraries already, a new process takes seconds for them. It is ended
    after two minutes.
    """
    child = os.fork()
    if child == 0:
        signal.alarm(120)
        tqdm.set_lock(RLock())  # that of a parent is shared, and a kill does not release it
        code = 1
        with open(output, "w") as file, redirect_stdout(file), redirect_stderr(file):
            try:
                function()
                code = 0
            except BaseException:
                traceback.print_exc()
        os._exit(code)
    return child


def exit_code_of(child: int) -> int:
    """Wait for a child. Returns its exit code, -9 if it was killed."""
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def num_lines(run: Path, pattern: str) -> int:
    return sum(path.read_bytes().count(b"\n") for path in run.glob(pattern))


def kill_when(run: Path, pattern: str, num: int, module, *argv) -> int:
    """Kill a script with SIGKILL when it has written so many lines. Returns how many are there."""
    child = start_in_fork(partial(output_of, module, "--run", run, *argv))
    deadline = time.time() + 100
    while num_lines(run, pattern) < num and time.time() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert exit_code_of(child) == -signal.SIGKILL
    return num_lines(run, pattern)
