"""Records: JSON lines that survive a kill, written by one process or by several; the journal.

Every finished problem is one line, flushed when it is finished. A line that a kill has torn is
skipped by readers and cut off by the next writer, and what it recorded is done again.
"""

import fcntl
import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from support.flags import InputError

# ---- JSON and JSON lines -------------------------------------------------------------------------


@contextmanager
def errors_name(what: object) -> Iterator[None]:
    """Make any error in a `with` block an InputError that names a file or a flag.

    Libraries raise errors of many types for a file that is damaged, cut off or another program's,
    and for a full disk. A block only reads or writes, so that programming errors still raise.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"{what}: {reason:.200} ({type(error).__name__})") from error


def _finite(text: str) -> float:
    """Read a number of JSON. Raises ValueError for NaN and Infinity, which Python writes."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a finite number")
    return number


STRICT_JSON = {"parse_float": _finite, "parse_constant": _finite}  # for json.loads


class Fields(dict):
    """An object of a JSON file. A field that it lacks is an InputError that names the file."""

    def __init__(self, place: str, fields: dict):
        super().__init__(fields)
        self.place = place

    def __missing__(self, name: str):
        raise InputError(f"{self.place}: it lacks {name!r}; damaged, or another program's?")


def parse_json(text: bytes, place: str) -> Fields:
    """Read an object. Raises InputError if it is none. place: where it is, for the errors."""
    try:
        value = json.loads(text, object_hook=partial(Fields, place), **STRICT_JSON)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise InputError(f"{place}: not JSON ({error})") from None
    if not isinstance(value, Fields):
        raise InputError(f"{place}: not an object, such as {{...}}")
    return value


def read_jsonl(path: Path) -> list[Fields]:
    """Read a JSON-lines file. Raises InputError that names a bad line, or a file without any."""
    records = [record for record, _ in _parse_lines(path, only_finished=False)]
    if not records:
        raise InputError(f"{path}: it is empty")
    return records


def _parse_lines(path: Path, *, only_finished: bool) -> Iterator[tuple[Fields, int]]:
    """Yield each record, an object, and the place of its first byte."""
    start = 0
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if only_finished and not line.endswith(b"\n"):
                return
            if line.strip():
                yield parse_json(line, f"{path}, line {number}"), start
            start += len(line)


def open_to_append(path: Path) -> BinaryIO:
    """Open a JSON-lines file as its only writer, until it is closed. A torn last line is cut off.

    Only a writer may do that: to a reader, a line that is being written looks the same.

    Raises InputError if another process is writing the file.
    """
    file = open(path, "a+b")  # noqa: SIM115 (the caller closes it)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"{path}: another process is writing this file; wait for it, or choose another --run"
        ) from None
    file.seek(0)
    num_finished_bytes = sum(len(line) for line in file if line.endswith(b"\n"))
    if num_finished_bytes < file.tell():
        note = "the last line is torn; it is cut off, and what it recorded is done again"
        print(f"{path}: {note}", file=sys.stderr)
        file.truncate(num_finished_bytes)
    return file


def append_jsonl(file: BinaryIO, record: dict) -> None:
    """Write one line and flush it, so that a kill loses no finished record. NaN raises."""
    line = json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"
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
    rank, world_size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise InputError(f"RANK={rank}, WORLD_SIZE={world_size} in the environment: no process")
    return int(rank), int(world_size)


def is_mine(problem_id: str) -> bool:
    """Return whether a problem belongs to this process. It belongs to exactly one."""
    rank, world_size = process_rank()
    digest = hashlib.blake2b(problem_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % world_size == rank


def shard_path(path: Path) -> Path:
    """Return the file this process appends to: `path`, or NAME.RANKofWORLD.jsonl next to it."""
    rank, world_size = process_rank()
    if world_size == 1:
        return path
    return path.with_suffix(f".{rank}of{world_size}.jsonl")


def read_records(
    path: Path, keep: Callable[[dict], dict] = lambda record: record
) -> dict[str, dict]:
    """Read the records of all processes: problem id -> record, sorted by id.

    Shards count whatever the number of processes was. A problem whose line is torn has no record.
    keep: what to keep of each record, so that large files need not fit into memory.
    """
    records = {}
    shards = sorted(path.parent.glob(f"{path.stem}.*of*.jsonl"))
    for shard in [*path.parent.glob(path.name), *shards]:
        for record, _ in _parse_lines(shard, only_finished=True):
            records[record["id"]] = keep(record)
    return Fields(str(path), dict(sorted(records.items())))


@contextmanager
def unfinished(
    path: Path, problems: list, keep: Callable[[dict], dict]
) -> Iterator[tuple[BinaryIO, dict[str, dict], list, int]]:
    """Find the problems of this process that have no record yet, inside a `with` block.

    Yields the file to append their records to, the records of all processes (`read_records`), these
    problems, and how many of this process have a record.
    """
    with open_to_append(shard_path(path)) as file:
        records = read_records(path, keep)
        mine = [problem for problem in problems if is_mine(problem.id)]
        todo = [problem for problem in mine if problem.id not in records]
        yield file, records, todo, len(mine) - len(todo)


def only(*names: str) -> Callable[[dict], dict]:
    """Return a function that keeps these fields of a record."""
    return lambda record: {name: record[name] for name in names}


# ---- The journal: no message is ever generated twice ---------------------------------------------


class Journal(AbstractContextManager):
    """All messages that were sampled with the same settings, on disk, by key.

    A message is a function of its prompt, of how it is sampled, and of its place in the search. The
    policy writes each message down when it is finished, and answers an equal request from here. So
    a killed run loses only unfinished messages, and methods share the messages of equal places.

        RUN/messages/NAME.json     how the messages were sampled: model, temperature, seed, ...
        RUN/messages/NAME.jsonl    one line per message; NAME.1.jsonl by a second process

    Each process writes to a file of its own, and reads the files of the others when it starts. Only
    the places of the lines are kept in memory.

    folder: of the journals of a run. name: a fingerprint of the settings. settings: what determines
    a message, apart from its key.
    """

    def __init__(self, folder: Path, name: str, settings: dict):
        self.places: dict[str, tuple[Path, int]] = {}  # key -> (file, first byte of its line)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(settings, indent=1) + "\n")
        for number in itertools.count():
            self.path = folder / (f"{name}.{number}.jsonl" if number else f"{name}.jsonl")
            with suppress(InputError):  # another process is writing it
                self.file = open_to_append(self.path)
                break
        for path in sorted(folder.glob(f"{name}*.jsonl")):
            for entry, start in _parse_lines(path, only_finished=True):
                self.places[entry["key"]] = (path, start)

    def __exit__(self, *exception) -> None:
        self.file.close()

    def find(self, key: str) -> dict | None:
        """Return the entry with this key; None if there is none."""
        if key not in self.places:
            return None
        path, start = self.places[key]
        with open(path, "rb") as file:
            file.seek(start)
            return parse_json(file.readline(), str(path))

    def add(self, key: str, entry: dict) -> None:
        """Append an entry. It survives a kill from now on."""
        start = self.file.seek(0, os.SEEK_END)
        append_jsonl(self.file, {"key": key} | entry)
        self.places[key] = (self.path, start)
