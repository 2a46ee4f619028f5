"""Rows of a data file: JSON lines, json, csv or parquet, also gzipped (.gz). Nothing is cached."""

import csv
import gzip
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from support.flags import InputError
from support.progress import Progress
from support.records import STRICT_JSON, process_rank


def read_rows(path: Path) -> Iterator[dict]:
    """Yield the rows of a data file. The end of its name says what it is; if not, it is JSON.

    Raises InputError that names the first row that cannot be read.
    """
    name = path.name.lower()
    read = READERS.get(Path(name.removesuffix(".gz")).suffix, json_rows)
    size = path.stat().st_size
    progress = Progress(shown=size > 10**7 and process_rank()[0] == 0)
    number = 1
    try:
        with open(path, "rb") as raw, progress.over(path.name, size, unit="bytes"):
            for row in read(gzip.GzipFile(fileobj=raw) if name.endswith(".gz") else raw):
                if not isinstance(row, dict):
                    raise ValueError("not an object, such as {...}")
                yield row
                number += 1
                if number % 1000 == 0:
                    progress.advance(raw.tell() - progress.finished, f"{number:,} rows")
    except Exception as error:  # the libraries have many; see errors_name
        raise InputError(f"{path}, row {number}: {error}".partition("\n")[0]) from error


def json_rows(file: BinaryIO) -> Iterator[dict]:
    """Read JSON lines, or a list."""
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    for line in text:
        if line.lstrip().startswith("["):
            yield from JSON.decode(line + text.read())
        elif line.strip():
            yield JSON.decode(line)


def csv_rows(file: BinaryIO) -> Iterator[dict[str, str]]:
    """Read cells as texts: "NA" is one, and so is "007"."""
    csv.field_size_limit(sys.maxsize)
    text = io.TextIOWrapper(file, "utf-8-sig", newline="")
    for row in csv.DictReader(text, strict=True):
        if None in row:
            raise ValueError("more cells than the first line has")
        yield row


def parquet_rows(file: BinaryIO) -> Iterator[dict]:
    from pyarrow import parquet  # imported late: it takes a part of a second

    for batch in parquet.ParquetFile(file).iter_batches():
        yield from batch.to_pylist()


JSON = json.JSONDecoder(**STRICT_JSON)  # `json.loads` would make one for every line
READERS = {".csv": csv_rows, ".parquet": parquet_rows}
