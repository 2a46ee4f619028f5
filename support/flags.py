"""Flags, bad input, and how a script ends.

Every stage is a script with `parse_args(argv=None)` and `main(args)`, called through `cli`. A
default stands in the parser and nowhere else.
"""

import argparse
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

SURROGATE = re.compile("[\ud800-\udfff]")  # a text that has one cannot be written as UTF-8
ROOT = Path(__file__).resolve().parent.parent  # of this project
TINY_AGENTS = os.path.relpath(ROOT / "tiny" / "agents")  # the embedded language model


class InputError(Exception):
    """Bad input from the user. Its one line says what is wrong and what would be right."""


# ---- Flags ---------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that reports a wrong flag as an InputError and shows defaults.

    doc: the docstring of the script. Its first paragraph becomes the description.
    """

    def __init__(self, doc: str):
        super().__init__(
            description=doc.split("\n\n")[0],
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")

    def parse_args(self, argv=None) -> argparse.Namespace:
        """Read the flags. None may be empty: `--run ""` would write to the root of the machine."""
        args = super().parse_args(argv)
        for name, value in vars(args).items():
            for text in value if isinstance(value, list) else [value]:
                if text == "" or SURROGATE.search(str(text)):
                    raise InputError(f"--{name.replace('_', '-')}: it is empty, or not in UTF-8")
        return args


def _number(kind: type, description: str, is_valid: Callable[[float], bool]):
    """Return an argparse type: a number for which `is_valid` holds. NaN fails every comparison."""

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not is_valid(value):
            raise argparse.ArgumentTypeError(f"{text!r} is not {description}")
        return value

    return parse


positive_int = _number(int, "a whole number of at least 1", lambda value: value >= 1)
non_negative_int = _number(int, "a whole number of at least 0", lambda value: value >= 0)
positive_float = _number(float, "a number above 0", lambda value: 0 < value < math.inf)
non_negative_float = _number(float, "a number of at least 0", lambda value: 0 <= value < math.inf)
unit_float = _number(float, "a number from 0 to 1", lambda value: 0 <= value <= 1)
positive_unit_float = _number(float, "a number above 0, at most 1", lambda value: 0 < value <= 1)


def stage_parser(doc: str, *, writes: bool) -> Parser:
    """Return a parser with the flags that every stage has; --overwrite if it `writes` results."""
    import torch  # imported late: mas.py and tasks/ import this file and need no torch

    default_device = "cpu"
    if torch.cuda.is_available():
        default_device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # of this process
    parser = Parser(doc)
    add = parser.add_argument
    add("--run", default="runs/tiny", help="run folder")
    add("--seed", type=int, default=0, help="seed of everything that is random")
    add("--device", default=default_device, help="cpu, cuda or cuda:N")
    dtypes = ("auto", "float32", "bfloat16")
    add("--dtype", choices=dtypes, default="auto", help="auto: bfloat16 on a GPU, else float32")
    most_threads = math.inf if "OMP_NUM_THREADS" in os.environ else 2
    num_threads = min(most_threads, torch.get_num_threads())
    add("--num-threads", type=positive_int, default=num_threads, help="of torch, on the CPU")
    help_batch = "size of a batch that is generated or scored: rows x tokens of the longest"
    add("--batch-tokens", type=positive_int, default=131072, help=help_batch)
    if writes:
        add("--overwrite", action="store_true", help="delete this stage's results and start over")
    return parser


# ---- The end of a script -------------------------------------------------------------------------


def cli(parse_args, main) -> None:
    """Run a script.

    Bad input, and files that cannot be read or written, print one line and exit with code 2, an
    interrupt with code 130. Output that nobody reads ends it with code 141. Other errors raise.
    """
    script = Path(sys.argv[0]).name
    try:
        main(parse_args())
        sys.stdout.flush()  # a full disk shows here at the latest
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        message = "interrupted; what is finished is kept, the command without --overwrite resumes"
        print(f"\n{script}: {message}", file=sys.stderr)
        sys.exit(130)
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (what Python writes when it exits)
        if isinstance(error, BrokenPipeError):  # as in `evaluate.py | head`
            sys.exit(141)
        remedy = "give another path, make room, or run the stage that writes it"
        print(f"{script}: error: {error}; {remedy}; what is finished is kept", file=sys.stderr)
        sys.exit(2)
