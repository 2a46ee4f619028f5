"""Data files: JSON lines, json, csv or parquet, each also gzipped (.gz).

Cells of a csv are texts: "NA" is a text, and so is "007". Nothing is cached.
"""

import csv
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.flags import InputError
from support.progress import Progress
from support.records import STRICT_JSON, process_rank, read_line

Rows = Iterator[tuple[str, dict]]  # (line or row, for the messages of errors, and its columns)


def read_rows(path: Path) -> Rows:
    """Yield the rows of a data file, each with its place. A bar shows how much is read.

    The end of its name says what it is, in upper or lower case; JSON lines if it says nothing else.
    Raises InputError if the file cannot be read.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_zipped = suffixes[-1:] == [".gz"]
    suffix = "".join(suffixes[-2:-1] if is_zipped else suffixes[-1:])
    progress = Progress(shown=process_rank()[0] == 0)
    try:
        num_bytes = path.stat().st_size
        with (
            open(path, "rb") as raw,
            progress.over(path.name, num_bytes, unit="bytes", delay=3),
        ):
            file = gzip.GzipFile(fileobj=raw) if is_zipped else raw
            for index, row in enumerate(READERS.get(suffix, json_lines)(file)):
                if index % 1000 == 0:
                    progress.advance(raw.tell() - progress.finished, f"{index:,} rows")
                yield row
    except (OSError, EOFError, ValueError, csv.Error, zlib.error) as error:
        reason = str(error).partition("\n")[0]
        raise InputError(f"{path}: {reason}") from None


def json_lines(file: BinaryIO) -> Rows:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield f"line {number}", read_line(line, number)


def json_rows(file: BinaryIO) -> Rows:
    """Read a list of objects, or JSON lines."""
    content = file.read()
    text = content.decode("utf-8-sig").lstrip()
    if not text.startswith("["):
        yield from json_lines(io.BytesIO(content))
        return
    for number, row in enumerate(STRICT_JSON.decode(text), 1):
        if not isinstance(row, dict):
            raise ValueError(f"row {number}: not an object, such as {{...}}")
        yield f"row {number}", row


def csv_rows(file: BinaryIO) -> Rows:
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    reader = csv.DictReader(text, strict=True)
    for row in reader:
        if None in row:
            raise ValueError(f"line {reader.line_num}: more cells than the first line has")
        yield f"line {reader.line_num}", row


def parquet_rows(file: BinaryIO) -> Rows:
    from pyarrow import parquet  # imported late: it takes a part of a second

    number = 0
    for batch in parquet.ParquetFile(file).iter_batches(batch_size=10_000):
        for row in batch.to_pylist():
            number += 1
            yield f"row {number}", row


READERS = {".json": json_rows, ".csv": csv_rows, ".parquet": parquet_rows}
