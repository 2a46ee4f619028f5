"""How a script runs: flags and bad input, progress, the run folder, resuming, several processes.

Every stage is a script with `parse_args(argv=None)` and `main(args)`, called through `cli`. A stage
that writes results has a folder for them: `config.json` records the settings, and JSON-lines files
hold one line per finished problem. Running the same command again skips what is finished.

This file knows no agents, problems or models; it imports nothing of ours. A reader who audits the
method can skip it.
"""

import argparse
import fcntl
import hashlib
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, NamedTuple

from tqdm import tqdm

HERE = Path(__file__).resolve().parent

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


# ---- Progress ------------------------------------------------------------------------------------


class Progress:
    """Show work done and time left: a bar on a terminal, a plain line every half minute in a log.

    The time left assumes that every unit of work takes the time of the average unit so far.

    Args:
        total: amount of work. May be corrected later through the attribute `total`.
        description: what is being done.
        shown: False shows nothing at all.
    """

    SECONDS_BETWEEN_LINES = 30.0

    def __init__(self, total: float, *, description: str, shown: bool = True):
        self.total, self.done = total, 0
        self.description = description
        self.start = self.last_line = time.perf_counter()
        on_terminal = sys.stderr.isatty()
        self.lines_shown = shown and not on_terminal
        self.bar = tqdm(
            total=total,
            desc=description,
            disable=not (shown and on_terminal),
            smoothing=0,  # average speed since the start
            miniters=1,  # show every update that comes 0.1 s after the one before
            dynamic_ncols=True,
            bar_format="{desc} {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()

    def advance(self, amount: float, note: str = "") -> None:
        """Count `amount` more as done. note: shown after the time left."""
        self.done += amount
        self.total = max(self.total, self.done)
        self.bar.total = self.total
        if note:
            self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(amount)
        self._write_line(note)

    def _write_line(self, note: str) -> None:
        now = time.perf_counter()
        if not self.lines_shown or now - self.last_line < self.SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        elapsed = now - self.start
        left = elapsed * (self.total - self.done) / max(self.done, 1e-9)
        times = f"{tqdm.format_interval(elapsed)} so far, about {tqdm.format_interval(left)} left"
        share = self.done / max(self.total, 1e-9)
        line = f"{self.description}: {share:.0%}, {times}"
        print(f"{line}; {note}" if note else line, file=sys.stderr, flush=True)


def ignore(*arguments) -> None:
    """Do nothing: the default of a hook."""


class Work(NamedTuple):
    """Work of a search: prompts read, messages sampled, and states scored by a model."""

    prompts: float
    messages: float
    states: float = 0

    @property
    def units(self) -> float:
        """The work as one number. On a CPU, scoring a state takes about as long as two messages."""
        return self.prompts + self.messages + 2 * self.states


class SearchProgress(Progress):
    """Progress of many searches.

    Searches that advance together all finish at the very end, so the number of finished searches
    says little. The bar counts work instead, whose amount is not known beforehand: each unfinished
    search is expected to need `expected.messages`, or a quarter more than the average so far if
    that is more, and prompts and states in proportion.

    Args:
        expected: the expected work of one search.
        num_finished_before: problems that an earlier run has finished, for the note.
    """

    def __init__(
        self,
        num_searches: int,
        expected: Work,
        *,
        description: str,
        num_finished_before: int = 0,
        shown: bool = True,
    ):
        super().__init__(num_searches * expected.units, description=description, shown=shown)
        self.num_searches = num_searches
        self.expected = expected
        self.num_finished_before = num_finished_before
        self.num_finished = 0
        self.num_messages = 0
        self.messages_of_finished = 0

    def sampled(self, num_prompts: int, num_messages: int) -> None:
        self.num_messages += num_messages
        self._update(Work(num_prompts, num_messages).units)

    def scored(self, num_states: int) -> None:
        self._update(Work(0, 0, num_states).units)

    def search_finished(self, num_messages: int) -> None:
        self.num_finished += 1
        self.messages_of_finished += num_messages
        self._update(0)

    def _update(self, units: float) -> None:
        num_unfinished = self.num_searches - self.num_finished
        if num_unfinished == 0:
            self.total = self.done + units
        else:
            average = self.num_messages / self.num_searches
            expected_messages = max(self.expected.messages, 1.25 * average)
            messages = self.messages_of_finished + num_unfinished * expected_messages
            self.total = messages * self.expected.units / self.expected.messages
        num_finished = self.num_finished_before + self.num_finished
        num_problems = self.num_finished_before + self.num_searches
        note = f"{num_finished}/{num_problems} problems, {self.num_messages} messages"
        self.advance(units, note)


# ---- JSON lines ----------------------------------------------------------------------------------


def read_jsonl(path: Path) -> list[dict]:
    """Read a JSON-lines file. Raises InputError that names a missing file or a bad line."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        return list(parse_jsonl(file, path))


def parse_jsonl(lines: Iterable[bytes], path: Path) -> Iterator[dict]:
    """Parse JSON lines, each of which is an object. path: for the message of an error."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            reason = f"not JSON ({error.msg}); the file is torn or not JSON lines"
            raise InputError(f"{path}, line {number}: {reason}") from None
        except UnicodeDecodeError:
            raise InputError(f"{path}, line {number}: not UTF-8; save it as UTF-8") from None
        if not isinstance(record, dict):
            raise InputError(f"{path}, line {number}: not an object, such as {{...}}")
        yield record


def read_finished_lines(path: Path) -> list[dict]:
    """Read a file that another process may be writing, or was writing when it was killed.

    A last line without its end is ignored. A missing file has no lines.
    """
    return list(_finished_lines(path))


def _finished_lines(path: Path) -> Iterator[dict]:
    if not path.is_file():
        return
    with open(path, "rb") as file:
        # Stop at the first line without its end: another process may complete it in the meantime.
        finished = itertools.takewhile(lambda line: line.endswith(b"\n"), file)
        yield from parse_jsonl(finished, path)


def open_to_append(path: Path) -> BinaryIO:
    """Open a JSON-lines file as its only writer, until it is closed.

    A last line torn by a kill is cut off; what it recorded is then done again. Only a writer may do
    that: to a reader, a line that is being written looks the same.

    Raises FileInUseError if another process is writing the file.
    """
    file = open(path, "a+b")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FileInUseError(
            f"{path}: another process is writing this file; wait for it, or choose another --run"
        ) from None
    num_bytes = file.seek(0, os.SEEK_END)
    num_finished_bytes = _end_of_last_line(file, num_bytes)
    if num_finished_bytes < num_bytes:
        note = "the last line is torn; it is cut off, and what it recorded is done again"
        print(f"{path}: {note}", file=sys.stderr)
        file.truncate(num_finished_bytes)
    return file


def _end_of_last_line(file: BinaryIO, num_bytes: int) -> int:
    """Return how many bytes the finished lines of a file have. Reads from its end."""
    block_end = num_bytes
    while block_end > 0:
        block_start = max(0, block_end - 65536)
        file.seek(block_start)
        last_newline = file.read(block_end - block_start).rfind(b"\n")
        if last_newline >= 0:
            return block_start + last_newline + 1
        block_end = block_start
    return 0


def append_jsonl(file: BinaryIO, record: dict) -> None:
    """Write one line and flush it, so that a kill loses no finished record."""
    line = json.dumps(record, ensure_ascii=False) + "\n"
    file.write(line.encode())
    file.flush()


def write_line(file: BinaryIO, index: int, record: dict) -> None:
    """Write a record as line `index`, counted from 0. It replaces this line and all after it.

    So a step that is done again after a kill replaces what was logged for it.
    """
    file.seek(0)
    file.truncate(sum(len(line) for line in itertools.islice(file, index)))
    append_jsonl(file, record)


# ---- Several processes ---------------------------------------------------------------------------
# Processes started by `accelerate launch` share the problems and need no coordination: each takes
# its problems by a hash of their ids, appends to its own shard, and reads all shards to resume.


def process_rank() -> tuple[int, int]:
    """Return (rank, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def finished_message(num_missing: int, missing: str) -> str:
    """Say that this process has finished and others have not. missing: "problems" or "answers"."""
    rank, world_size = process_rank()
    return (
        f"process {rank} of {world_size} has finished; {num_missing} {missing} are left to the "
        f"others (or to this command, run again)"
    )


def is_mine(problem_id: str) -> bool:
    """Return whether a problem belongs to this process. It belongs to exactly one."""
    rank, world_size = process_rank()
    digest = hashlib.blake2b(problem_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % world_size == rank


def device_of_this_process(device: str) -> str:
    """Return the GPU of this process if `device` is "cuda" and a launcher has assigned one."""
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


def shard_path(path: Path) -> Path:
    """Return the file this process appends to: `path`, or NAME.RANKofWORLD.jsonl next to it."""
    rank, world_size = process_rank()
    if world_size == 1:
        return path
    return path.with_suffix(f".{rank}of{world_size}.jsonl")


def all_shards(path: Path) -> list[Path]:
    """Return `path` and every shard of it that exists, whatever the number of processes was."""
    return [path, *sorted(path.parent.glob(f"{path.stem}.*of*.jsonl"))]


def without_shard(path: Path) -> Path:
    """Return the path that `path` is a shard of."""
    return path.with_name(re.sub(r"\.\d+of\d+\.jsonl$", ".jsonl", path.name))


def record_names(folder: Path) -> set[str]:
    """Return the names of the record files of a folder, without suffix, whatever their shards."""
    return {without_shard(path).stem for path in folder.glob("*.jsonl")}


def read_records(
    path: Path, keep: Callable[[dict], dict] = lambda record: record
) -> dict[str, dict]:
    """Read the records of all processes: problem id -> record, sorted by id.

    A last line torn by a kill is ignored; its problem has no record.

    Args:
        keep: what to keep of each record, so that large files need not fit into memory.
    """
    records = {}
    for shard in all_shards(path):
        for record in _finished_lines(shard):
            records[record["id"]] = keep(record)
    return dict(sorted(records.items()))


def only(*names: str) -> Callable[[dict], dict]:
    """Return a function that keeps these fields of a record."""
    return lambda record: {name: record[name] for name in names}


# ---- The run folder ------------------------------------------------------------------------------


def open_run(folder: Path, settings: dict, *, device: str, overwrite: bool) -> None:
    """Start a run folder, or resume one that has the same settings.

    Args:
        settings: what determines the results. A dict with a "fingerprint" equals another one if
            the fingerprints are equal, whatever the names.
        device: recorded, but not compared.
        overwrite: delete the records of a run with any settings.

    Raises InputError that names every setting that differs, or if records that are to be deleted
    are being written.
    """
    settings = json.loads(json.dumps(settings))  # as they will be read back
    config = folder / "config.json"
    if config.is_file() and overwrite:
        _delete_results(folder)

    # 1. Start a new run.
    if not config.is_file():
        if any(folder.glob("*.jsonl")):
            raise InputError(f"{folder} holds records, but no config.json; delete the folder")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            write_config(folder, {"settings": settings} | provenance(device))
        except OSError as error:
            raise InputError(f"--run: {folder} cannot be written ({error.strerror})") from None
        return

    # 2. Resume, if all settings are the same.
    changes = _changes(read_config(folder)["settings"], settings)
    if changes:
        raise InputError(
            f"{folder} holds a run with another configuration: {', '.join(changes)}; "
            f"choose another --run, or start over with --overwrite"
        )


# What a stage writes into its folder, apart from config.json and the adapter of V.
RESULT_FILES = ("*.jsonl", "checkpoint.pt", "head.safetensors", "summary.json", "table.md", "*.png")


def _delete_results(folder: Path) -> None:
    """Delete the results of a stage. Raises InputError if another process may be writing them."""
    if process_rank()[1] > 1:
        reason = "another process may already be writing"
        raise InputError(f"--overwrite needs a single process ({reason}); delete {folder} first")
    for path in folder.glob("*.jsonl"):
        open_to_append(path).close()  # refuses if another process is writing it
    for pattern in RESULT_FILES:
        for path in folder.glob(pattern):
            path.unlink()
    # Last: without it, the results would be taken for those of the next settings.
    (folder / "config.json").unlink()


def without_names(value):
    """Replace every dict that has a fingerprint by it: a model that was moved is still the same."""
    if not isinstance(value, dict):
        return value
    if "fingerprint" in value:
        return value["fingerprint"]
    return {key: without_names(entry) for key, entry in value.items()}


def _changes(old: dict, new: dict, prefix: str = "") -> list[str]:
    """Name every setting that differs, such as "rollouts.seed (there 0, now 1)"."""
    changes = []
    for key in sorted(old.keys() | new.keys()):
        there, now = old.get(key), new.get(key)
        if without_names(there) == without_names(now):
            continue
        if _is_group(there) and _is_group(now):
            changes += _changes(there, now, f"{prefix}{key}.")
        else:
            changes.append(f"{prefix}{key} (there {_short(there)}, now {_short(now)})")
    return changes


def _is_group(value) -> bool:
    """Return whether a value is a dict of settings, not a graph or a model, which have names."""
    return isinstance(value, dict) and not value.keys() & {"agents", "fingerprint"}


def _short(value) -> str:
    """Show a setting in a few words: a graph or a model by its name and a fingerprint."""
    if isinstance(value, dict) and "agents" in value:
        return f"{value['name']}#{fingerprint(value)[:6]}"
    if isinstance(value, dict) and "fingerprint" in value:
        return f"{value['name']}#{value['fingerprint'][:6]}"
    return json.dumps(value)


def fingerprint(value) -> str:
    """Return a hash of a value that can be written as JSON."""
    text = json.dumps(value, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def read_config(folder: Path) -> dict:
    """Read a folder's config.json. Raises InputError if it is missing, torn or another's."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json here; no stage has written this folder yet")
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path}: not JSON ({error.msg}); the file is torn, "
            f"start this stage again with --overwrite"
        ) from None
    if "settings" not in config:
        raise InputError(f"{folder}: its config.json was not written by a stage of this project")
    return config


def write_config(folder: Path, config: dict) -> None:
    """Write config.json atomically: a kill leaves the old file or the new one."""
    temporary = folder / f"config.json.{os.getpid()}.part"
    temporary.write_text(json.dumps(config, indent=1) + "\n")
    temporary.replace(folder / "config.json")


def provenance(device: str) -> dict:
    """Return the provenance of a run: command, commit, versions, machine, time.

    device: as given by --device.
    """
    import torch  # imported late, see _default_device

    if torch.device(device).type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"CPU, {os.cpu_count()} cores"
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "numpy"):
        versions[package] = version(package)
    return {
        "command": " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "versions": versions,
        "device": f"{device} ({machine})",
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _commit() -> str | None:
    """Return the commit of this code, with "-dirty" if it was changed; None if it has no git."""
    git = ["git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        return None
    return commit or None


# ---- Randomness ----------------------------------------------------------------------------------


def seeded(*parts) -> random.Random:
    """Return a random generator that is seeded by `parts` alone, whatever the order of calls."""
    return random.Random("/".join(map(str, parts)))
