"""The journal of messages: no message is ever generated twice.

A message is a function of its prompt, of how it is sampled, and of its place in the search: the
problem, the path and the candidate index. The policy writes each message down when it is finished,
and answers an equal request from the journal. So a killed run loses only unfinished messages, and
methods share the messages of equal places. (Processes that run at the same time read each
other's messages only when they start.)

    RUN/messages/NAME.json     how the messages were sampled: model, temperature, seed, ...
    RUN/messages/NAME.jsonl    one line per message; NAME.1.jsonl by a second process
"""

import itertools
import json
import os
from pathlib import Path

from support.flags import FileInUseError, InputError
from support.records import append_jsonl, open_to_append
from support.runs import fingerprint, without_names


class Journal:
    """All messages that were sampled with the same settings, on disk, by key.

    Each process writes to a file of its own, and reads the files of the others when it starts. Only
    the places of the lines are kept in memory.

    Args:
        folder: of the journals of a run.
        settings: what determines a message, apart from its key.

    Raises:
        InputError: if the folder cannot be written, or a file in it is damaged.
    """

    def __init__(self, folder: Path, settings: dict):
        self.name = fingerprint(without_names(settings))[:12]
        self.places: dict[str, tuple[Path, int]] = {}  # key -> (file, first byte of its line)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{self.name}.json").write_text(json.dumps(settings, indent=1) + "\n")
            self._open_own_file(folder)
        except OSError as error:
            raise InputError(
                f"{folder}: messages cannot be kept here ({error.strerror}); give --messages FOLDER"
            ) from None
        for path in sorted(folder.glob(f"{self.name}*.jsonl")):
            self._read_places(path)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *exception) -> None:
        self.file.close()

    def find(self, key: str) -> dict | None:
        """Return the entry with this key; None if there is none."""
        if key not in self.places:
            return None
        path, start = self.places[key]
        with open(path, "rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def add(self, key: str, entry: dict) -> None:
        """Append an entry. It survives a kill from now on."""
        start = self.file.seek(0, os.SEEK_END)
        append_jsonl(self.file, {"key": key} | entry)
        self.places[key] = (self.path, start)

    def _open_own_file(self, folder: Path) -> None:
        """Open the first file of this journal that no other process is writing."""
        for number in itertools.count():
            suffix = f".{number}.jsonl" if number else ".jsonl"
            self.path = folder / (self.name + suffix)
            try:
                self.file = open_to_append(self.path)
                return
            except FileInUseError:
                continue

    def _read_places(self, path: Path) -> None:
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):  # another process writes this line, or was killed
                    return
                try:
                    key = json.loads(line)["key"]
                except (ValueError, KeyError, TypeError):
                    raise InputError(
                        f"{path}, line {number}: not a message; delete this line or the file"
                    ) from None
                self.places[key] = (path, start)
                start += len(line)
