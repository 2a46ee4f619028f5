"""Records: JSON lines that survive a kill, written by one process or by several."""

import fcntl
import hashlib
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from support.flags import FileInUseError, InputError

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
