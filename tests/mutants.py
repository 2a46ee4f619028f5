"""Mutation testing: change the program in one place at a time, and see that a test fails.

    python tests/mutants.py                        # all files: some hours on two cores
    python tests/mutants.py search.py metrics.py   # these files
    python tests/mutants.py --report               # the score of the last run again

mutmut makes the changed programs ("mutants") and runs them ([tool.mutmut] in pyproject.toml). This
script chooses the functions, which are those that decide a number, and prints the score by file. A
mutant that no test notices has survived; `mutmut show NAME` prints it.

mutmut does not change decorated functions (properties, `Decoder.decode`), constants and classes
without methods. This file is also a pytest plugin of these runs: it puts fast tests first, and ends
mutants that never end.
"""

import ast
import json
import os
import signal
import subprocess
import sys
import threading
from fnmatch import fnmatch
from pathlib import Path

from tqdm import tqdm

HERE = Path(__file__).resolve().parent.parent

FILES = [
    "runs.py",
    "mas.py",
    "answers.py",
    "extraction.py",
    "tasks.py",
    "packing.py",
    "sampling.py",
    "cache.py",
    "decoding.py",
    "journal.py",
    "policy.py",
    "tables.py",
    "diagnosis.py",
    "report.py",
    "generate_rollouts.py",
    "value.py",
    "metrics.py",
    "compare.py",
    "train_value.py",
    "search.py",
    "evaluate.py",
    "adapters.py",
    "rewards.py",
    "train_agents.py",
]

# Functions that decide no number: scripts, flags, messages, progress and what is printed. The tests
# of the scripts (tests/test_pipeline.py) run them, which is too slow for every mutant.
OUT_OF_SCOPE = [
    "*.main",
    "*.parse_args",
    "*.add_*_argument*",
    "*.print_*",
    "*.report_to",
    "*.expected_work*",
    "runs.Progress.*",
    "runs.SearchProgress.*",
    "runs.Parser.*",
    "runs._HelpFormatter.*",
    "runs.cli",
    "runs.provenance",
    "runs._commit",
    "runs._short",
    "runs._default_device",
    "runs.finished_message",
    "policy.describe_messages",
    "runs.ignore",
    "mas._why_it_cannot_be_seen",
    "decoding.Decoder._timed",
    "generate_rollouts.label_problems",
    "train_value.describe_training",
    "train_value.peak_memory",
    "train_value.start_data_parallel",  # needs two processes; so does sum_gradients
    "train_value.sum_gradients",
    "search.show_tree",
    "search.choose_problem",
    "evaluate.write_report",
    "train_agents.describe_training",
    "rewards.expected_work_of_rollout",
]

# Exit codes of a mutant's tests.
SURVIVED, NO_TEST, TIMED_OUT = 0, 33, 24
KILLED = (1, 3, TIMED_OUT, -24, 36, 152, -9, 255)  # a test failed, or it ran out of its time

# ---- The plugin ----------------------------------------------------------------------------------


def seconds_of_tests() -> dict[str, float]:
    """Return how long each test takes without a mutant; nothing before that is known."""
    path = Path("mutmut-stats.json")  # pytest runs in the folder of the mutants
    return json.loads(path.read_text())["duration_by_test"] if path.is_file() else {}


def pytest_configure() -> None:
    """Give tqdm a lock that the processes of the mutants do not share: one may die holding it."""
    tqdm.set_lock(threading.RLock())


def pytest_collection_modifyitems(items) -> None:
    """Put fast tests first, so that most mutants are noticed within a second."""
    seconds = seconds_of_tests()
    items.sort(key=lambda item: seconds.get(item.nodeid, 0.0))


def pytest_runtest_setup(item) -> None:
    """End a mutant whose test needs far more CPU time than without it, or hangs.

    The time of fixtures that several tests share is not known, so there is some for them.
    """
    seconds = seconds_of_tests().get(item.nodeid)
    if seconds is not None:
        signal.signal(signal.SIGPROF, time_out)
        signal.setitimer(signal.ITIMER_PROF, 30 + 10 * seconds)
        signal.signal(signal.SIGALRM, time_out)
        signal.setitimer(signal.ITIMER_REAL, 120 + 30 * seconds)  # the machine may be busy


def time_out(*_) -> None:
    os._exit(TIMED_OUT)


def pytest_sessionfinish() -> None:
    """Leave no timer and no child behind: mutmut waits for its own children only."""
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    answers = sys.modules.get("answers")
    if answers is not None and answers.MATH_VERIFY.process is not None:
        answers.MATH_VERIFY.process.kill()
        answers.MATH_VERIFY.process.wait()
        answers.MATH_VERIFY.process = None


# ---- Which mutants -------------------------------------------------------------------------------


def functions_in_scope(file: str) -> list[str]:
    """Return the functions of a file that decide a number: "mcts", "Method.search"."""
    names = []
    for node in ast.parse((HERE / file).read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.append(node.name)
        if isinstance(node, ast.ClassDef):
            methods = [child for child in node.body if isinstance(child, ast.FunctionDef)]
            names += [f"{node.name}.{method.name}" for method in methods]
    return [name for name in names if not is_out_of_scope(Path(file).stem, name)]


def is_out_of_scope(module: str, function: str) -> bool:
    return any(fnmatch(f"{module}.{function}", pattern) for pattern in OUT_OF_SCOPE)


def mutant_prefix(module: str, function: str) -> str:
    """Return how mutmut begins the names of a function's mutants."""
    if "." in function:
        class_name, method = function.split(".")
        return f"{module}.xǁ{class_name}ǁ{method}__mutmut_"
    return f"{module}.x_{function}__mutmut_"


# ---- The score -----------------------------------------------------------------------------------


def results_in_scope(file: str) -> dict[str, int]:
    """Return name -> exit code of the mutants of a file that were run."""
    meta = HERE / "mutants" / f"{file}.meta"
    if not meta.is_file():
        return {}
    prefixes = []
    for function in functions_in_scope(file):
        prefixes.append(mutant_prefix(Path(file).stem, function))
    results = {}
    for name, exit_code in json.loads(meta.read_text())["exit_code_by_key"].items():
        if exit_code is not None and name.startswith(tuple(prefixes)):
            results[name] = exit_code
    return results


def report(files: list[str]) -> None:
    """Print the score by file, then the mutants that no test notices."""
    unnoticed = {}
    print(f"{'file':22s} mutants   killed    score")
    for file in files:
        results = results_in_scope(file)
        if not results:
            print(f"{file:22s} not run")
            continue
        num_killed = 0
        for name, exit_code in results.items():
            if exit_code in KILLED:
                num_killed += 1
            else:
                unnoticed[name] = exit_code
        score = num_killed / len(results)
        print(f"{file:22s} {len(results):7d} {num_killed:8d} {score:8.1%}")

    reasons = {SURVIVED: "survived", NO_TEST: "no test reaches it"}
    for name, exit_code in unnoticed.items():
        print(f"{name}: {reasons.get(exit_code, f'exit code {exit_code}')}")


def main(argv: list[str]) -> None:
    only_report = "--report" in argv
    files = [name for name in argv if name != "--report"] or FILES
    unknown = sorted(set(files) - set(FILES))
    if unknown:
        sys.exit(f"{unknown[0]}: not one of {', '.join(FILES)}")
    if not only_report:
        patterns = []
        for file in files:
            module = Path(file).stem
            for function in functions_in_scope(file):
                patterns.append(f"{mutant_prefix(module, function)}*")
        mutmut = Path(sys.executable).parent / "mutmut"
        subprocess.run([mutmut, "run", "--max-children", "1", *patterns], cwd=HERE, check=True)
    report(files)


if __name__ == "__main__":
    main(sys.argv[1:])
