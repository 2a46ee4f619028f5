"""Flags, bad input, and how a script ends."""

import argparse
import math
import os
import re
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent

# ---- Flags and bad input -------------------------------------------------------------------------


class InputError(Exception):
    """Bad input from the user. Its one line says what is wrong and what would be right."""


class FileInUseError(InputError):
    """Another process is writing a file."""


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show the default of each flag except switches."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default is None or isinstance(action.default, bool):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """`argparse.ArgumentParser` that reports a wrong flag as an InputError and shows defaults.

    Args:
        doc: the docstring of the script. Its first paragraph becomes the description.
    """

    def __init__(self, doc: str):
        super().__init__(
            description=doc.split("\n\n")[0],
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str):
        raise InputError(f"{message} (--help lists the flags)")


def positive_int(text: str) -> int:
    if not re.fullmatch(r"\+?\d+", text) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def non_negative_int(text: str) -> int:
    if not re.fullmatch(r"\+?\d+|-0+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def positive_float(text: str) -> float:
    return _float_in_range(text, above=0)


def non_negative_float(text: str) -> float:
    return _float_in_range(text, at_least=0)


def unit_float(text: str) -> float:
    return _float_in_range(text, at_least=0, at_most=1)


def positive_unit_float(text: str) -> float:
    return _float_in_range(text, above=0, at_most=1)


def device_name(text: str) -> str:
    import torch  # imported late, see _default_device

    try:
        torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not cpu, cuda or cuda:N") from None
    return text


def _float_in_range(
    text: str, *, above: float = -math.inf, at_least: float = -math.inf, at_most: float = math.inf
) -> float:
    bounds = []
    if above > -math.inf:
        bounds.append(f"above {above}")
    if at_least > -math.inf:
        bounds.append(f"at least {at_least}")
    if at_most < math.inf:
        bounds.append(f"at most {at_most}")
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    # A comparison with nan is false, so nan is refused as well.
    if not (above < value < math.inf and at_least <= value <= at_most):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number {' and '.join(bounds)}")
    return value


def add_run_arguments(parser: Parser) -> None:
    """Add the flags that every script has."""
    parser.add_argument("--run", default="runs/tiny", help="run folder")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything that is random")
    parser.add_argument(
        "--device", type=device_name, default=_default_device(), help="cpu, cuda or cuda:N"
    )
    parser.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="type of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    parser.add_argument(
        "--num-threads",
        type=positive_int,
        default=_default_num_threads(),
        help="torch threads on the CPU; more than 2 do not help tiny models, and scripts that run "
        "at the same time are several times slower if they have more threads than cores",
    )
    parser.add_argument(
        "--batch-tokens",
        type=positive_int,
        default=131072,
        help="size of one batch that is generated or scored: rows x tokens of the longest",
    )


def add_overwrite_argument(parser: Parser) -> None:
    """Add the flag of the scripts that write to the run folder."""
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="delete this stage's results and start over",
    )


def _default_num_threads() -> int:
    """Return OMP_NUM_THREADS, or 2 if there are two cores."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if re.fullmatch(r"[1-9]\d*", wanted):
        return int(wanted)
    return min(2, os.cpu_count() or 1)


def _default_device() -> str:
    import torch  # imported late: mas.py and tasks.py import this file and need no torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def cli(parse_args, main) -> None:
    """Run a script.

    Bad input prints one line and exits with code 2. An interrupt prints one line and exits with
    code 130. Output that nobody reads ends it with code 141. Programming errors raise.
    """
    script = Path(sys.argv[0]).name
    try:
        main(parse_args())
    except InputError as error:
        print(f"{script}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        message = "interrupted; what is finished is kept, the command without --overwrite resumes"
        print(f"\n{script}: {message}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # Nobody reads the output any more, as in `report.py RUN | head`. Python writes what is left
        # when it exits, so that goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
