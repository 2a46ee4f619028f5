"""Tests of support/flags.py: numbers, flags that mean the same everywhere, ends of scripts."""

import argparse
import importlib
import os
import signal
import subprocess
import sys

import pytest

from support import flags
from support.flags import ROOT, InputError

# ---- Numbers -------------------------------------------------------------------------------------

NUMBERS = {  # type of a flag -> (text and value) of good ones, and texts that are refused
    "positive_int": ({"1": 1, "+12": 12}, ["0", "-5", "1.5", "", "x"]),
    "non_negative_int": ({"0": 0, "7": 7}, ["-1", "0.5"]),
    "positive_float": ({"0.5": 0.5, "1e-3": 0.001}, ["0", "-1", "inf", "nan"]),
    "non_negative_float": ({"0": 0.0, "2": 2.0}, ["-0.1", "inf", "nan"]),
    "unit_float": ({"0": 0.0, "1": 1.0}, ["1.5", "-0.1", "nan", "half"]),
    "positive_unit_float": ({"1": 1.0, "0.1": 0.1}, ["0", "1.01", "nan"]),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_flags_are_read_or_refused(name):
    number_type = getattr(flags, name)
    good, bad = NUMBERS[name]
    assert {text: number_type(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=repr(text)):
            number_type(text)


# ---- Flags of the scripts ------------------------------------------------------------------------


def test_the_same_flag_means_the_same_in_every_script(monkeypatch):
    """Stage 2 reads its rollouts from a folder, stage 5 makes its own: the one exception."""
    meanings = {}
    add_argument = argparse.ArgumentParser.add_argument

    def recorded_add_argument(self, *names, **options):
        action = add_argument(self, *names, **options)
        meaning = (str(action.type), str(action.default), str(action.choices))
        meanings.setdefault(names[0], set()).add(meaning)
        return action

    monkeypatch.setattr(argparse.ArgumentParser, "add_argument", recorded_add_argument)
    for name in ("generate_rollouts", "train_value", "search", "evaluate", "train_agents"):
        importlib.import_module(name).parse_args([])
    assert len(meanings) > 20
    assert {flag for flag, different in meanings.items() if len(different) > 1} <= {"--rollouts"}


# ---- The end of a script -------------------------------------------------------------------------

SCRIPT = """
import sys
from support.flags import Parser, cli, positive_int

def parse_args():
    parser = Parser("A script.")
    parser.add_argument("--num", type=positive_int, default=1)
    return parser.parse_args()

def main(args):
    print("first", flush=True)
    sys.stdin.read()
    print("second")  # is written when it ends

cli(parse_args, main)
"""


ENDS = [  # what happens, flags, and the code; an abbreviated flag is a bad one as well
    ("bad flag", ["--num", "0"], 2),
    ("bad flag", ["--nu", "3"], 2),
    ("interrupt", [], 130),
    ("no reader", [], 141),  # as in `stage.py | head`
    ("full disk", [], 2),
]


@pytest.mark.parametrize("argv", [["--run", ""], ["--run="], ["--run", "a\udcff"]])
def test_a_flag_that_is_empty_or_no_text_is_refused(argv):
    """Else --run "" would write its messages into the root of the machine."""
    with pytest.raises(InputError, match="--run: "):
        flags.stage_parser("", writes=True).parse_args(argv)


@pytest.mark.parametrize("end, argv, code", ENDS)
def test_a_script_ends_with_at_most_one_line_and_its_code(tmp_path, end, argv, code):
    path = tmp_path / "stage.py"
    path.write_text(SCRIPT)
    pipes = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""}
    if end == "full disk":
        pipes["stdout"] = os.open("/dev/full", os.O_WRONLY)
    with subprocess.Popen(
        [sys.executable, path, *argv], env=environment, text=True, **pipes
    ) as child:
        if end in ("interrupt", "no reader"):
            assert child.stdout.readline() == "first\n"
        if end == "interrupt":
            child.send_signal(signal.SIGINT)
        if end == "no reader":
            child.stdout.close()
            child.stdin.close()
        error = child.stderr.read()
    assert child.returncode == code
    assert error.count("stage.py: ") == len(error.strip().splitlines()) == (end != "no reader")
    assert all(flag in error for flag in argv)
